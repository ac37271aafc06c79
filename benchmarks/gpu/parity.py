"""Parity checks of attention, training and generation on this device, required before speed is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.gpu import cases
from benchmarks.harness import Comparison, Output, Unequal

CHECKS = {
    "attention": "packed attention = written-out attention of each example alone, outputs and gradients",
    "training": "packed = padded, ZeRO-0 = 1 = 2 = 3, recomputed, resumed; bf16 near fp32",
    "tokens": "refilled slots = generate, many slots = one, fp32",
}


def comparisons(tiny: bool) -> Iterator[Comparison]:
    for name, description in CHECKS.items():
        yield Comparison(
            work=f"parity of {name}: {description}",
            figure="checks",
            unit="checks, all passed",
            contenders=[cases.contender("ours", f"parity_{name}", tiny=tiny)],
            gate=nothing_failed,
            timeout_seconds=500,
        )


def nothing_failed(outputs: Mapping[str, Output]) -> None:
    for output in outputs.values():
        if output["failures"]:
            raise Unequal("; ".join(output["failures"]))
