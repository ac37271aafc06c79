"""ZeRO checkpoint of a 7B-shaped model -> fp32 safetensors: the converter against DeepSpeed's zero_to_fp32.py."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu import cases
from benchmarks.harness import Comparison, Contender, no_gate, python, same


def comparisons(tiny: bool) -> Iterator[Comparison]:
    for stage in (3, 1):

        def contender(name: str, way: str, stage: int = stage) -> Contender:
            command = python("-m", "benchmarks.gpu.convert_one", way, str(stage), *["--tiny"] * tiny)
            return Contender(name, command, way == "deepspeed", cases.environment(tiny))

        yield Comparison(
            work=f"make the checkpoint, ZeRO-{stage}{' in tiny' if tiny else ''}",
            figure="seconds",
            unit="s for the first step, the save and the start of both",
            contenders=[contender("ours", "make")],
            gate=no_gate,
            higher_is_better=False,
            timeout_seconds=590,
        )
        yield Comparison(
            work=f"convert a Llama of the 7B shape{' in tiny' if tiny else ''}, ZeRO-{stage}, to fp32",
            figure="seconds",
            unit="s",
            contenders=[contender("ours", "ours"), contender("zero_to_fp32.py", "deepspeed")],
            gate=same("weights_sha256"),
            goal=2.0,
            higher_is_better=False,
            notes="as many of the 32 layers as the disk holds: the JSON has bytes and peak memory",
            timeout_seconds=590,
        )
