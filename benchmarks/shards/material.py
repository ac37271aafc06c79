"""A million examples: GSM8K's, over and over, as our shards and as a data set on disk of Arrow files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import MATERIALS
from benchmarks.training import material as training
from trainer.shards.methods import view_of
from trainer.shards.read import Shards
from trainer.storage import atomic_dir

FOLDER = MATERIALS / "shards"
METHOD = "cot"
EXAMPLES = 1_000_000


def ours() -> Path:
    """The arrays of GSM8K's shards repeated; texts, which no example needs, are left empty."""
    final = FOLDER / "million"
    if atomic_dir.is_complete(final):
        return final
    one = training.shards("train")
    times = -(-EXAMPLES // len(one))
    facts = dict(one.facts)
    with atomic_dir.atomic_directory(final, "shards", facts) as staging:
        counts = {"num_problems": len(one) * times, "num_segments": len(one.roles) * times}
        facts.update(counts, num_tokens=len(one.tokens) * times)
        np.tile(one.tokens, times).tofile(staging / "tokens.bin")
        np.tile(one.roles, times).tofile(staging / "roles.bin")
        _shifted(one._ends, len(one.tokens), times).tofile(staging / "ends.bin")
        first = _shifted(one._first_segment[:-1], len(one.roles), times)
        np.append(first, np.uint64(len(one.roles) * times)).tofile(staging / "segments.bin")
        line = json.dumps({"id": "", "question": "", "answer": "", "steps": [], "facts": []}) + "\n"
        (staging / "problems.jsonl").write_text(line * counts["num_problems"], encoding="utf-8")
        lines = np.arange(counts["num_problems"] + 1, dtype=np.uint64) * np.uint64(len(line))
        lines.tofile(staging / "lines.bin")
        (staging / "rejects.jsonl").touch()
    return final


def _shifted(values: np.ndarray, by: int, times: int) -> np.ndarray:
    shifts = np.arange(times, dtype=np.uint64) * np.uint64(by)
    return (np.asarray(values, np.uint64)[None] + shifts[:, None]).reshape(-1)


def arrow() -> Path:
    """The same examples as `input_ids` (uint16) and `learned` (bool), saved by `datasets`."""
    import datasets

    final = FOLDER / "arrow"
    if (final / "dataset_info.json").is_file():
        return final
    one = training.shards("train")
    rows = [one.example(index, view_of(METHOD)) for index in range(len(one))]
    features = datasets.Features(
        input_ids=datasets.Sequence(datasets.Value("uint16")),
        learned=datasets.Sequence(datasets.Value("bool")),
    )
    columns: dict[str, Any] = {
        "input_ids": [tokens.tolist() for tokens, _ in rows],
        "learned": [learned.tolist() for _, learned in rows],
    }
    single = datasets.Dataset.from_dict(columns, features=features)
    times = len(Shards.open(ours())) // len(one)
    datasets.concatenate_datasets([single] * times).save_to_disk(str(final))
    return final
