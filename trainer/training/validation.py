"""Loss on held-out problems during training, the same for any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from trainer.runtime.stop_request import StopRequest
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.training.batches import PackedDataset
from trainer.training.layouts import max_passes, split_into_batches
from trainer.training.loss import summed_token_loss
from trainer.training.setup import TrainState


class ValidationLoss:
    """Callable for `train(settings, evaluate=...)`: mean loss in nats per target token of the run's own method."""

    def __init__(self, shards_path: str, max_problems: int):
        self._shards = Shards.open(shards_path, verify=True)
        self._max_problems = max_problems
        self._data: PackedDataset | None = None

    def __call__(self, state: TrainState, stop: StopRequest) -> dict[str, Any] | None:
        """Collective. Return the values to log, or None if a stop request interrupted it."""
        settings, environment = state.settings, state.environment
        if self._data is None:
            view = view_of(settings.method, settings.train_on_calculator_results)
            self._data = PackedDataset(self._shards, settings.method, view, settings.pack_length, seed=0)
        data = self._data
        fraction = min(1.0, self._max_problems / data.num_examples)
        num_packs = max(1, round(fraction * data.packs_per_epoch))
        total = torch.zeros((), dtype=torch.float64, device=state.device)
        state.engine.eval()
        stopping = False
        with torch.no_grad():
            for first in range(0, num_packs, environment.world_size):
                # Validation may be long, and saving must not wait for it.
                stopping = stop.should_stop_on_any_rank()
                if stopping:
                    break
                # Every rank makes the same number of forward passes (ZeRO-3 gathers weights in them).
                packs = [range(pack, pack + 1) for pack in range(first, first + environment.world_size)]
                num_passes = max_passes(data, packs, num_packs, state.layout.arrangement)
                batch = data.micro_batch(packs[environment.rank], num_packs)
                for rows in split_into_batches(batch, state.layout, state.device, num_passes):
                    total += summed_token_loss(state.engine, rows)
        state.engine.train()
        if stopping:
            return None
        if environment.world_size > 1:
            dist.all_reduce(total)
        num_targets = data.num_target_tokens(0, num_packs)
        return {
            "loss": float(total) / num_targets,
            "learned_tokens": num_targets,
            "data": self._shards.facts["data"],
        }
