"""ZeRO checkpoint of a 7B-shaped model -> fp32 safetensors: the converter against DeepSpeed's zero_to_fp32.py."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu import cases
from benchmarks.harness import Comparison, equal_outputs, no_gate


def comparisons(tiny: bool) -> Iterator[Comparison]:
    for stage in (3, 1):
        yield Comparison(
            work=f"make the checkpoint, ZeRO-{stage}{' in tiny' if tiny else ''}",
            figure="seconds",
            unit="s for the first step, the save and the start of both",
            contenders=[cases.contender("ours", "convert_one", "make", str(stage), tiny=tiny)],
            gate=no_gate,
            higher_is_better=False,
            timeout_seconds=590,
        )
        yield Comparison(
            work=f"convert a Llama of the 7B shape{' in tiny' if tiny else ''}, ZeRO-{stage}, to fp32",
            figure="seconds",
            unit="s",
            contenders=[
                cases.contender("ours", "convert_one", "ours", str(stage), tiny=tiny),
                cases.contender("zero_to_fp32.py", "convert_one", "deepspeed", str(stage), tiny=tiny),
            ],
            gate=equal_outputs("weights_sha256"),
            goal=2.0,
            higher_is_better=False,
            notes="as many of the 32 layers as the disk holds: the JSON has bytes and peak memory",
            timeout_seconds=590,
        )
