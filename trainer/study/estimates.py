"""What a study will take, as far as it is known without a network and before anything is made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.models import presets
from trainer.settings import EvaluateSettings, PrepareSettings, TrainSettings
from trainer.storage import atomic_dir


def num_problems(settings: PrepareSettings) -> int | None:
    """Problems of a set: of its shards, or of what will be generated; None where only the source knows."""
    if facts := _facts(settings.output_dir):
        return int(facts["num_problems"])
    if settings.data == "stories":
        return min(settings.max_problems or settings.num_problems, settings.num_problems)
    return None


def num_examples(training: TrainSettings, shards: Iterable[PrepareSettings]) -> int | None:
    """Problems a student learns from: those that have the steps its method needs."""
    facts = _facts(training.train_shards)
    if "problems_per_method" in facts:
        return int(facts["problems_per_method"].get(training.method, 0))
    return _of(training.train_shards, shards)


def num_answers(evaluation: EvaluateSettings, shards: Iterable[PrepareSettings]) -> int | None:
    """Problems that are answered."""
    there = _of(evaluation.shards, shards)
    return there if there is None else min(evaluation.max_problems or there, there)


def _of(path: str, shards: Iterable[PrepareSettings]) -> int | None:
    return next(num_problems(settings) for settings in shards if settings.output_dir == path)


def num_parameters(settings: TrainSettings, prepared: PrepareSettings) -> int | None:
    """Parameters of the model, counted on its config: a named shape, a folder, a model in the hub's local cache.

    None where that would need the network, or a vocabulary that is not there yet.
    """
    from trainer.models import load

    name = settings.model_name_or_path or settings.config_name
    try:
        config = _config(name, settings.config_overrides, _vocabulary_size(prepared))
        return None if config is None else load.num_parameters(config)
    except (UserError, OSError, ValueError):
        return None  # the training will say what is wrong with it


def _config(name: str, overrides: str, vocabulary_size: int) -> Any:
    from trainer.models import load

    if name in presets.student_names():
        return load.load_config(name, overrides, vocabulary_size) if vocabulary_size else None
    if Path(name).exists():
        return load.load_config(name, overrides)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return load.load_config(str(Path(cached).parent), overrides)
    short = name.rpartition("/")[2].lower()
    return presets.published_config(short) if short in presets.published_names() and not overrides else None


def _vocabulary_size(prepared: PrepareSettings) -> int:
    """Tokens of the shards' tokenizer; 0 if it is not known yet."""
    if facts := _facts(prepared.output_dir):
        return int(facts["vocabulary_size"])
    if prepared.tokenizer_name == "stories":
        from trainer.models import stories_tokenizer

        return stories_tokenizer.VOCAB_SIZE
    return 0


def _facts(shards: str) -> dict[str, Any]:
    path = Path(shards)
    return dict(atomic_dir.read_manifest(path, "shards")["facts"]) if atomic_dir.is_complete(path) else {}
