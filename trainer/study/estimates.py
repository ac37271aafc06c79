"""Numbers of problems, examples and parameters of a study, estimated without a network before anything is run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.models import presets
from trainer.settings import EvaluateSettings, PrepareSettings, TrainSettings
from trainer.storage import atomic_dir


def num_problems(settings: PrepareSettings) -> int | None:
    """Return the problems in a set, from its shards or its settings; None if they depend on a source not read yet."""
    if facts := _facts(settings.output_dir):
        return int(facts["num_problems"])
    if settings.data == "stories":
        return min(settings.max_problems or settings.num_problems, settings.num_problems)
    return None


def num_examples(training: TrainSettings, shards: Iterable[PrepareSettings]) -> int | None:
    """Return the training problems that have the steps the method requires; None if unknown."""
    facts = _facts(training.train_shards)
    if "problems_per_method" in facts:
        return int(facts["problems_per_method"].get(training.method, 0))
    return _num_problems_in(training.train_shards, shards)


def num_answers(evaluation: EvaluateSettings, shards: Iterable[PrepareSettings]) -> int | None:
    """Return the problems that an evaluation answers; None if unknown."""
    available = _num_problems_in(evaluation.shards, shards)
    return available and min(evaluation.max_problems or available, available)


def _num_problems_in(path: str, shards: Iterable[PrepareSettings]) -> int | None:
    return next(num_problems(settings) for settings in shards if settings.output_dir == path)


def num_parameters(settings: TrainSettings, prepared: PrepareSettings) -> int | None:
    """Return the number of parameters from the config of a preset, a local folder or a model in the Hub's local cache.

    None if it would require the network or a vocabulary that does not exist yet.
    """
    from trainer.models import load

    name = settings.model_name_or_path or settings.config_name
    try:
        config = _config(name, settings.config_overrides, _vocabulary_size(prepared))
        return None if config is None else load.num_parameters(config)
    except (UserError, OSError, ValueError):
        return None  # the training stage reports the error


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
    """Return the vocabulary size of the shards' tokenizer; 0 if it is not known yet."""
    if facts := _facts(prepared.output_dir):
        return int(facts["vocabulary_size"])
    if prepared.tokenizer_name == "stories":
        from trainer.models import stories_tokenizer

        return stories_tokenizer.VOCAB_SIZE
    return 0


def _facts(shards: str) -> dict[str, Any]:
    path = Path(shards)
    return dict(atomic_dir.read_manifest(path, "shards")["facts"]) if atomic_dir.is_complete(path) else {}
