"""Loss on held-out problems during training, over all ranks, exact for any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from trainer.runtime.stop_request import StopRequest
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.training.batches import PackedDataset
from trainer.training.layouts import forward_passes, max_passes
from trainer.training.loss import summed_token_loss
from trainer.training.setup import TrainState


class ValidationLoss:
    """Callable for `train(settings, evaluate=...)`: mean nats per learned token of the student's own method."""

    def __init__(self, shards_path: str, max_problems: int):
        self._shards = Shards.open(shards_path, verify=True)
        self._max_problems = max_problems
        self._data: PackedDataset | None = None

    def __call__(self, student: TrainState, stop: StopRequest) -> dict[str, Any] | None:
        settings, world = student.settings, student.world
        if self._data is None:
            view = view_of(settings.method, settings.train_on_calculator_results)
            self._data = PackedDataset(self._shards, settings.method, view, settings.pack_length, seed=0)
        data = self._data
        part = min(1.0, self._max_problems / data.num_examples)
        num_packs = max(1, round(part * data.packs_per_epoch))
        rounds = -(-num_packs // world.world_size)
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        student.engine.eval()
        stopping = False
        with torch.no_grad():
            for index in range(rounds):
                stopping = (
                    stop.should_stop_on_any_rank()
                )  # it may be long, and what it would tell is not worth a checkpoint
                if stopping:
                    break
                # Every rank makes as many forward passes (ZeRO-3 gathers weights in them); some may be empty.
                first = index * world.world_size
                packs = [range(pack, pack + 1) for pack in range(first, first + world.world_size)]
                num_passes = max_passes(data, packs, num_packs, student.layout.rows)
                batch = data.micro_batch(packs[world.rank], num_packs)
                for rows in forward_passes(batch, student.layout, student.device, num_passes):
                    total += summed_token_loss(student.engine, rows)
        student.engine.train()
        if stopping:
            return None
        if world.world_size > 1:
            dist.all_reduce(total)
        learned = data.num_target_tokens(0, num_packs)
        return {"loss": float(total) / learned, "learned_tokens": learned, "data": self._shards.facts["data"]}
