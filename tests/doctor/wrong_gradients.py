"""The ranks' checks on a DeepSpeed that is broken on purpose: stages 1 and 2 reduce gradients that are 1 % too large."""

from __future__ import annotations

import sys

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from trainer.doctor import gradient_parity, rank_checks
from trainer.runtime import terminal

right = DeepSpeedZeroOptimizer.average_tensor


def wrong(self: DeepSpeedZeroOptimizer, tensor: torch.Tensor, *rest: object) -> None:
    tensor.mul_(1.01)
    right(self, tensor, *rest)


DeepSpeedZeroOptimizer.average_tensor = wrong
chosen = [case for case in gradient_parity.cases() if case.dtype == torch.float32 and not case.checkpointing]
chosen += [gradient_parity.ParityCase(0, torch.bfloat16, False)]
gradient_parity.cases = lambda: chosen
terminal.run(lambda: rank_checks.main(sys.argv[1:]))
