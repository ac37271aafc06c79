"""Estimate the workload of a training run before it starts: model, fullest micro-batch, steps, tokens."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.models import load, presets
from trainer.settings import PlanSettings
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.training.batches import BatchPlan, PackedDataset

_MAX_SAMPLED_PACKS = 20_000
_STORIES_VOCABULARY = 1024  # size of the built-in stories vocabulary; assumed if no shards are given


@dataclass(frozen=True)
class Workload:
    """Model and batches of a training run. The fullest micro-batch is the one with the most tokens."""

    model_name: str
    config: Any
    sizes: tuple[int, ...]  # number of elements of each parameter; tied parameters count once
    largest_layer: int  # number of elements of the largest decoder layer
    lengths: tuple[int, ...]  # number of tokens of each example in the fullest micro-batch
    num_target_tokens: int  # number of target tokens in the fullest micro-batch
    mean_length: float  # mean number of tokens of an example
    tokens_per_step: float  # mean number of tokens of an optimizer step, over all ranks
    total_steps: int  # number of optimizer steps; 0 if it is not known
    assumptions: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes)


def estimate_workload(settings: PlanSettings, world_size: int) -> Workload:
    """Return the workload of a training run. Without shards, assume that all packs are full and all tokens are targets.

    Raises UserError for an unknown or missing model.
    """
    name = settings.model_name_or_path or settings.config_name
    config = _model_config(settings, name)
    model = load.build_on_meta(config)
    sizes = tuple(parameter.numel() for parameter in model.parameters())
    layers = [sum(weight.numel() for weight in layer.parameters()) for layer in load.decoder_layers(model)]
    batches = (_read_batches if settings.train_shards else _assume_batches)(settings, world_size)
    return Workload(settings.model_label or Path(name).name, config, sizes, max(layers, default=0), **batches)


def _model_config(settings: PlanSettings, name: str) -> Any:
    """Return the config of the model `name`, which is a folder, a Hub name or a preset."""
    short = name.rpartition("/")[2].lower()
    if short in presets.published_names() and not Path(name).exists():
        config = load.apply_overrides(presets.published_config(short), settings.config_overrides)
    else:
        shards = Shards.open(settings.train_shards) if settings.train_shards else None
        vocabulary_size = shards.facts["vocabulary_size"] if shards else _STORIES_VOCABULARY
        config = load.load_config(name, settings.config_overrides, vocabulary_size)
    config.use_cache = False
    return config


def _read_batches(settings: PlanSettings, world_size: int) -> dict[str, Any]:
    """Read the shards and return the fields of Workload from `lengths` to `assumptions`."""
    view = view_of(settings.method, settings.train_on_calculator_results)
    shards = Shards.open(settings.train_shards)
    data = PackedDataset(shards, settings.method, view, settings.pack_length, settings.seed)
    micro, accumulation_steps = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    epochs, steps = settings.num_train_epochs, settings.max_steps
    plan = BatchPlan.make(micro, accumulation_steps, world_size, data.packs_per_epoch, epochs, steps)
    packs = min(plan.total_packs, data.packs_per_epoch, _MAX_SAMPLED_PACKS)

    def num_tokens_and_targets(start: int) -> tuple[int, int]:
        last = min(start + micro, packs)
        return data.num_tokens(start, last), data.num_target_tokens(start, last)

    fullest = max(range(0, packs, micro), key=num_tokens_and_targets)
    batch = data.micro_batch(range(fullest, fullest + micro), packs)
    return {
        "lengths": tuple(len(tokens) for tokens, _ in batch.examples),
        "num_target_tokens": num_tokens_and_targets(fullest)[1],
        "mean_length": data.tokens_per_epoch / data.num_examples,
        "tokens_per_step": data.tokens_per_epoch / data.packs_per_epoch * plan.packs_per_step,
        "total_steps": plan.total_steps,
        "assumptions": (),
    }


def _assume_batches(settings: PlanSettings, world_size: int) -> dict[str, Any]:
    tokens = settings.per_device_train_batch_size * settings.pack_length
    length = min(settings.mean_length, settings.pack_length)
    full, rest = divmod(tokens, length)
    per_step = tokens * settings.gradient_accumulation_steps * world_size
    steps = settings.max_steps
    if not steps and settings.num_problems:
        steps = math.ceil(settings.num_train_epochs * settings.num_problems * length / per_step)
    assumption = f"no train_shards: full packs, examples of {length} tokens, all tokens learned (upper bound)"
    return {
        "lengths": (length,) * full + ((rest,) if rest else ()),
        "num_target_tokens": tokens,
        "mean_length": float(length),
        "tokens_per_step": float(per_step),
        "total_steps": steps,
        "assumptions": (assumption,),
    }
