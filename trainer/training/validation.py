"""Loss on held-out problems during training. The problems and the loss do not depend on the number of ranks."""

import torch
import torch.distributed as dist

from trainer.models import load
from trainer.runtime.stop_request import StopRequest
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.storage.manifest import ValidationResult
from trainer.training.batches import PackedDataset
from trainer.training.layouts import max_passes, split_into_batches
from trainer.training.loss import summed_token_loss
from trainer.training.setup import TrainState


class ValidationLoss:
    """Callable for `train(settings, evaluate=...)`: mean loss on about `max_problems` problems, in nats per target."""

    def __init__(self, shards_path: str, max_problems: int):
        self._shards = Shards.open(shards_path, verify=True)
        self._max_problems = max_problems
        self._data: PackedDataset | None = None

    def __call__(self, state: TrainState, stop: StopRequest) -> ValidationResult | None:
        """Collective. Return the values to log, or None if a stop request interrupted the validation."""
        settings, environment = state.settings, state.environment
        layout = state.layout_choice.layout
        if self._data is None:
            view = view_of(settings.method, settings.train_on_calculator_results)
            self._data = PackedDataset(self._shards, settings.method, view, settings.pack_length, seed=0)
        data = self._data
        fraction = min(1.0, self._max_problems / data.num_examples)
        num_packs = max(1, round(fraction * data.packs_per_epoch))
        total = torch.zeros((), dtype=torch.float64, device=load.local_device())
        state.engine.eval()
        with torch.no_grad():
            for first in range(0, num_packs, environment.world_size):
                if stop.should_stop_on_any_rank():  # do not delay the stop by a long validation
                    state.engine.train()
                    return None
                # Every rank runs the same number of forward passes, because ZeRO-3 gathers weights in each pass.
                packs = [range(pack, pack + 1) for pack in range(first, first + environment.world_size)]
                num_passes = max_passes(data, packs, num_packs, layout.arrangement)
                batch = data.micro_batch(packs[environment.rank], num_packs)
                for rows in split_into_batches(batch, layout, load.local_device(), num_passes):
                    total += summed_token_loss(state.engine, rows)
        state.engine.train()
        if environment.world_size > 1:
            dist.all_reduce(total)
        num_targets = data.num_target_tokens(0, num_packs)
        data_name = self._shards.facts["data"]
        return {"loss": float(total) / num_targets, "learned_tokens": num_targets, "data": data_name}
