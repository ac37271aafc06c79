"""Peak memory against tools/plan.py: what torch allocated at most against what was predicted before the first step."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu import cases
from benchmarks.harness import Comparison, Contender, no_gate, python


def comparisons(tiny: bool) -> Iterator[Comparison]:
    for case in cases.memory(tiny):
        command = python("-m", "benchmarks.gpu.train_ours", *case.flags())
        yield Comparison(
            work=f"memory {case.name}",
            figure="memory_error_percent",
            unit="% (plan / measured - 1)",
            contenders=[Contender("plan", command, False, cases.environment(tiny))],
            gate=no_gate,
            timeout_seconds=500,
        )
