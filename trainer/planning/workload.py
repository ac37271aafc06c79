"""Workload of a training, estimated before it starts: model, fullest micro-batch, steps, tokens."""

from __future__ import annotations

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
_STORIES_VOCABULARY = 1024  # of the embedded tokenizer, for the stories shapes without shards


@dataclass(frozen=True)
class Workload:
    """Workload of a training.

    `sizes`: elements of every parameter, tied ones once. `largest_layer`: elements of the largest decoder layer.
    `lengths`: tokens of each example of the fullest micro-batch.
    """

    model_name: str
    config: Any
    sizes: tuple[int, ...]
    largest_layer: int
    lengths: tuple[int, ...]
    num_target_tokens: int  # targets in the fullest micro-batch
    mean_length: float
    tokens_per_step: float
    total_steps: int  # 0: not known
    assumptions: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        return sum(self.sizes)


def estimate_workload(settings: PlanSettings, world_size: int) -> Workload:
    """Return the workload from the shards, or without shards for full packs in which every token is a target.

    Raises UserError for an unknown or missing model.
    """
    name = settings.model_name_or_path or settings.config_name
    config = _model_config(settings)
    model = load.build_on_meta(config)
    sizes = tuple(parameter.numel() for parameter in model.parameters())
    layers = [sum(part.numel() for part in layer.parameters()) for layer in load.decoder_layers(model)]
    found = (_from_shards if settings.train_shards else _assumed)(settings, world_size)
    return Workload(settings.model_label or Path(name).name, config, sizes, max(layers, default=0), **found)


def _model_config(settings: PlanSettings) -> Any:
    """Return the config of the settings' model: a folder, a hub name, or a preset."""
    name = settings.model_name_or_path or settings.config_name
    short = name.rpartition("/")[2].lower()
    if short in presets.published_names() and not Path(name).exists():
        config = load.apply_overrides(presets.published_config(short), settings.config_overrides)
    else:
        facts = Shards.open(settings.train_shards).facts if settings.train_shards else {}
        config = load.load_config(
            name, settings.config_overrides, facts.get("vocabulary_size", _STORIES_VOCABULARY)
        )
    config.use_cache = False
    return config


def _from_shards(settings: PlanSettings, world_size: int) -> dict[str, Any]:
    shards = Shards.open(settings.train_shards)
    view = view_of(settings.method, settings.train_on_calculator_results)
    data = PackedDataset(shards, settings.method, view, settings.pack_length, settings.seed)
    micro = settings.per_device_train_batch_size
    epochs, steps = settings.num_train_epochs, settings.max_steps
    plan = BatchPlan.make(
        micro, settings.gradient_accumulation_steps, world_size, data.packs_per_epoch, epochs, steps
    )
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


def _assumed(settings: PlanSettings, world_size: int) -> dict[str, Any]:
    tokens = settings.per_device_train_batch_size * settings.pack_length
    length = min(settings.mean_length, settings.pack_length)
    full, rest = divmod(tokens, length)
    per_step = tokens * settings.gradient_accumulation_steps * world_size
    steps = settings.max_steps
    if not steps and settings.num_problems:
        steps = math.ceil(settings.num_train_epochs * settings.num_problems * length / per_step)
    assumption = (
        f"no train_shards: full packs, examples of {length} tokens, every token learned (an upper bound)"
    )
    return {
        "lengths": (length,) * full + ((rest,) if rest else ()),
        "num_target_tokens": tokens,
        "mean_length": float(length),
        "tokens_per_step": float(per_step),
        "total_steps": steps,
        "assumptions": (assumption,),
    }
