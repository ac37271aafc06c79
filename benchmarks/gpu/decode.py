"""Time of a decode step, host and device: a student of 30M, all slots busy, every text of one length."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu import cases
from benchmarks.harness import Comparison, no_gate


def comparisons(tiny: bool) -> Iterator[Comparison]:
    yield Comparison(
        work="decode "
        + ("in tiny" if tiny else "512 problems x 150 tokens in 256 slots, Llama of 30M, bf16"),
        figure="milliseconds",
        unit="ms a step",
        contenders=[
            cases.contender("ours", "decode_one", "ours", tiny=tiny),
            cases.contender("ours, without CUDA graphs", "decode_one", "eager", tiny=tiny),
            cases.contender("static generate", "decode_one", "static", tiny=tiny),
        ],
        gate=no_gate,
        higher_is_better=False,
        notes="prompts are read within this time; texts of one length leave no slot to refill; tokens are compared in the part parity",
        timeout_seconds=200,
    )
