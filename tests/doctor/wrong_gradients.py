"""The ranks' checks on a DeepSpeed that is broken on purpose: stages 1 and 2 reduce gradients that are 1 % too large."""

from __future__ import annotations

import sys

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from trainer import terminal
from trainer.doctor import parity, ranks

right = DeepSpeedZeroOptimizer.average_tensor


def wrong(self: DeepSpeedZeroOptimizer, tensor: torch.Tensor, *rest: object) -> None:
    tensor.mul_(1.01)
    right(self, tensor, *rest)


DeepSpeedZeroOptimizer.average_tensor = wrong
chosen = [case for case in parity.cases() if case.dtype == torch.float32 and not case.checkpointing]
chosen += [parity.ParityCase(0, torch.bfloat16, False)]
parity.cases = lambda: chosen
terminal.run(lambda: ranks.main(sys.argv[1:]))
