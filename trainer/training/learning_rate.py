"""Learning rate as a pure function of the step, so that a checkpoint needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.settings import TrainSettings


@dataclass(frozen=True)
class LearningRateSchedule:
    """Linear warm-up to `peak`, then constant, linear to 0, or half a cosine to 0 (transformers' definitions)."""

    peak: float
    kind: str
    warmup_steps: int
    total_steps: int

    @classmethod
    def make(cls, settings: TrainSettings, total_steps: int) -> LearningRateSchedule:
        warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total_steps)
        return cls(settings.learning_rate, settings.lr_scheduler_type, warmup, total_steps)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "linear":
            return self.peak * max(0.0, 1.0 - progress)
        return self.peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
