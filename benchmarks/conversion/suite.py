"""ZeRO checkpoints to Hugging Face weights, against DeepSpeed's zero_to_fp32. BENCH_LARGE=1: 774M and 1.5B as well."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial

from benchmarks.conversion import make
from benchmarks.harness import MATERIALS, Comparison, Contender, python, same

CASES = [("124M", stage, 2) for stage in (1, 3)]
LARGE = [(size, stage, ranks) for size in ("774M", "1.5B") for stage in (1, 2, 3) for ranks in (1, 8)]
MEMORY_LIMIT_MB = 256.0


def comparisons() -> Iterator[Comparison]:
    for size, stage, ranks in LARGE if os.environ.get("BENCH_LARGE") else CASES:
        run = MATERIALS / "conversion" / f"{size}-stage{stage}-world{ranks}"
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
            gate=same("digest"),
            goal=2.0,
            higher_is_better=False,
            notes="ours checks what it reads, digests what it writes and waits for the disk; the peer's file is .bin",
        )
        yield Comparison(
            work=f"{name}: memory beyond the loaded libraries",
            figure="extra_mb",
            unit="MB",
            contenders=contenders,
            gate=same("digest"),
            limit=MEMORY_LIMIT_MB,
            higher_is_better=False,
        )
        if size not in ("124M", "355M"):
            shutil.rmtree(run)  # 12 and 25 GB
