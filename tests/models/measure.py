"""Measure one row of docs/models.md: build the family, then run every stage of the product."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.models import measure_evaluation, measure_export, measure_training
from tests.models.families import Family, family_of
from tests.models.row import STAGES, Row
from trainer.models import load
from trainer.models.architecture import quiet_transformers

_SAME_LOGITS = 1e-5  # of a text part and its wrapper, in standard deviations


def measure_row(name: str) -> Row:
    """Return the row of the family `name`; exceptions become cells."""
    family = family_of(name)
    row = Row(family.name, family.model_type)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), row.stage(*STAGES):
        _measure(family, Path(folder), row)
    row.seconds = time.perf_counter() - start
    return row


def _measure(family: Family, folder: Path, row: Row) -> None:
    path = str(family.save(folder / "model"))
    plain = _plain_model(family, path)
    batch = measure_training.examples()
    wanted = measure_training.reference(plain, batch)
    for stage, packing in (("packed", "auto"), ("padded", "false")):
        with row.stage(stage):
            setattr(row, stage, measure_training.measure(path, packing, batch, wanted))
    for stage, backend in (("slots", "auto"), ("own_cache", "transformers")):
        with row.stage(stage):
            setattr(row, stage, measure_evaluation.measure(path, backend, plain))
    with row.stage("export"):
        row.export = measure_export.measure(Path(path), folder)


def _plain_model(family: Family, path: str) -> Any:
    """Return the causal LM as transformers loads it, for a wrapper the text part, in evaluation mode.

    Raises AssertionError if the text part does not give the wrapper's logits.
    """
    config: PreTrainedConfig = family.config
    if config.get_text_config(decoder=True) is config:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    plain: Any = load.load_model(path, "fp32").eval()
    whole = family.build()
    ids = torch.from_numpy(measure_training.examples()[0][0])[None]
    with torch.no_grad():
        wanted = whole(input_ids=ids).logits
        off = (plain(input_ids=ids).logits - wanted).abs().max() / wanted.std()
    assert off <= _SAME_LOGITS, f"the text part gives other logits than the wrapper (by {off:.0e})"
    return plain
