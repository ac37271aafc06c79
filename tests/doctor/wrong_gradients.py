"""Run the rank checks with a patched DeepSpeed: stages 1 and 2 reduce gradients that are 1 % too large."""

from __future__ import annotations

import sys

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from trainer.doctor import gradient_parity, rank_checks
from trainer.runtime import terminal

average_tensor = DeepSpeedZeroOptimizer.average_tensor


def average_enlarged_tensor(self: DeepSpeedZeroOptimizer, tensor: torch.Tensor, *rest: object) -> None:
    tensor.mul_(1.01)
    average_tensor(self, tensor, *rest)


DeepSpeedZeroOptimizer.average_tensor = average_enlarged_tensor
chosen = [case for case in gradient_parity.cases() if case.dtype == torch.float32 and not case.checkpointing]
chosen += [gradient_parity.ParityCase(0, torch.bfloat16, False)]
gradient_parity.cases = lambda: chosen
terminal.run_main(lambda: rank_checks.main(sys.argv[1:]))
