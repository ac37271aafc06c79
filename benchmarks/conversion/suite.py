"""ZeRO checkpoints to Hugging Face weights, against DeepSpeed's zero_to_fp32.

BENCH_LARGE=all: of 774M and 1.5B parameters, which the goal is about, instead of 124M; or a part of their names,
`1.5B`, `774M-stage3-world8`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial

from benchmarks.conversion import make
from benchmarks.harness import MATERIALS, Comparison, Contender, equal_outputs, python

CASES = [("124M", stage, 2) for stage in (1, 3)]
LARGE = [(size, stage, ranks) for size in ("774M", "1.5B") for stage in (1, 2, 3) for ranks in (1, 8)]
MEMORY_LIMIT_MB = 256.0


def comparisons() -> Iterator[Comparison]:
    wanted = os.environ.get("BENCH_LARGE", "")
    for size, stage, ranks in LARGE if wanted else CASES:
        run = MATERIALS / "conversion" / f"{size}-stage{stage}-world{ranks}"
        if wanted not in ("", "all") and wanted not in run.name:
            continue
        checkpoint = make.make(run, size, stage, ranks)
        command = partial(python, "benchmarks/conversion/convert.py")
        contenders = [
            Contender("ours", command("ours", checkpoint, run / "ours"), peer=False),
            Contender("zero_to_fp32", command("zero_to_fp32", checkpoint, run / "peer")),
        ]
        name = f"ZeRO-{stage} -> fp32 weights, GPT-2 {size}, {ranks} rank(s)"
        yield Comparison(
            work=name,
            figure="seconds",
            unit="s",
            contenders=contenders,
            gate=equal_outputs("digest"),
            goal=2.0 if wanted else None,
            higher_is_better=False,
            notes="ours checks what it reads, digests what it writes and waits for the disk; the peer's file is .bin",
        )
        yield Comparison(
            work=f"{name}: memory beyond the loaded libraries",
            figure="extra_mb",
            unit="MB",
            contenders=contenders,
            gate=equal_outputs("digest"),
            limit=MEMORY_LIMIT_MB,
            higher_is_better=False,
        )
        if wanted:
            shutil.rmtree(run)  # 12 and 25 GB
