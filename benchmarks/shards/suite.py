"""Tokens on disk, against `datasets`: building them, opening a million examples, reading them at random."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Comparison, Contender, equal_outputs, python
from benchmarks.shards import material
from benchmarks.training import material as training

OPEN_MS, READS_PER_SECOND = 5.0, 150_000.0


def comparisons() -> Iterator[Comparison]:
    training.data_folder()
    build = ("-m", "benchmarks.shards.build")  # not forked: the garbage collector searches all that is loaded
    yield Comparison(
        work="GSM8K train -> tokens on disk, GPT-2's tokenizer, 2 cores",
        figure="seconds",
        unit="s",
        contenders=[
            Contender("ours", python(*build, "ours", material.FOLDER / "built"), peer=False),
            Contender("datasets.map", python(*build, "datasets", material.FOLDER / "mapped")),
        ],
        gate=equal_outputs("digest"),
        goal=2.0,
        higher_is_better=False,
        notes="the same segments; datasets.map in batches of 1000 and two processes; ours digests and flushes its files",
    )
    access = "benchmarks/shards/access.py"
    paths = {"ours": material.ours(), "arrow": material.arrow()}
    for work, figure, unit, limit, higher in (
        ("open a million examples", "open_ms", "ms", OPEN_MS, False),
        ("random reads of a million examples", "reads_per_second", "examples/s", READS_PER_SECOND, True),
    ):
        yield Comparison(
            work=work,
            figure=figure,
            unit=unit,
            contenders=[
                Contender("ours", python(access, "ours", paths["ours"], "100000"), peer=False),
                Contender("datasets.load_from_disk", python(access, "arrow", paths["arrow"], "20000")),
            ],
            gate=equal_outputs("digest"),
            limit=limit,
            higher_is_better=higher,
            notes="a read is a pack's worth, the tokens of six examples and which of them are learned; datasets in its numpy format",
        )
