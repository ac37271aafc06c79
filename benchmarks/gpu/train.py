"""Real tokens a second and MFU: the trainer against TRL's SFTTrainer with packing, bf16, ZeRO-1 and 3."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping

from benchmarks.gpu import cases
from benchmarks.harness import Comparison, Contender, Output, Unequal, python

LOSS_TOLERANCE = 5e-3  # means over the same problems in another order and batching, bf16
# Packed rows in a forward pass of TRL, by ZeRO stage. One row leaves a GPU idle; without flash-attn a row of many costs
# the square of its length.
MICROS = {1: (1, 4), 3: (4,)}
MFU_GOAL = "45 % of peak from 0.8B parameters on"


def comparisons(tiny: bool) -> Iterator[Comparison]:
    threads = cases.environment(tiny)
    for case in cases.training(tiny):
        contenders = [
            Contender("ours", python("-m", "benchmarks.gpu.train_ours", *case.flags()), False, threads)
        ]
        if peers := os.environ.get("PEERS_PYTHON", sys.executable):
            for micro in dict.fromkeys(min(rows, case.packs) for rows in MICROS[case.stage]):
                command = [peers, "-m", "benchmarks.gpu.train_trl", str(micro), *case.flags()]
                contenders.append(
                    Contender(f"TRL, packed, {micro} x {case.pack_length}", command, True, threads)
                )
        yield Comparison(
            work=f"train {case.name}",
            figure="tokens_per_second",
            unit="real tokens/s",
            contenders=contenders,
            gate=same_loss,
            notes=f"goal: {MFU_GOAL}" if case == cases.training(tiny)[0] else "",
            timeout_seconds=500,
        )


def same_loss(outputs: Mapping[str, Output]) -> None:
    """Require equal mean losses: all start from the same weights, so another loss means other targets or data."""
    losses = {name: output["loss"] for name, output in outputs.items() if "loss" in output}
    if losses and max(losses.values()) > min(losses.values()) * (1 + LOSS_TOLERANCE):
        raise Unequal(f"mean losses differ: {losses}")
