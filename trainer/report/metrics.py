"""Read the training log of one run, metrics.jsonl, as a killed and resumed run leaves it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

Floats = NDArray[np.float64]
STEPS_OF_FINAL_LOSS = 20


@dataclass(frozen=True)
class Metrics:
    """One training log. All arrays have one entry a step, ascending; nan where the log has no number."""

    steps: NDArray[np.int64]
    loss: Floats  # mean nats per learned token of the whole step
    learned_tokens: Floats
    tokens_per_second: Floats
    seconds: Floats
    held_out_loss: dict[int, float]  # step -> loss of a periodic evaluation
    broken_lines: int  # cut by a kill while they were written
    undone_steps: int  # after the checkpoint that a killed run went on from
    non_finite_losses: int

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def total_learned_tokens(self) -> int:
        return int(np.nansum(self.learned_tokens))

    @property
    def total_seconds(self) -> float:
        return float(np.nansum(self.seconds))

    @property
    def final_loss(self) -> float | None:
        """Mean loss of the last steps: a single one is too noisy to compare."""
        tail = self.loss[-STEPS_OF_FINAL_LOSS:]
        tail = tail[np.isfinite(tail)]
        return float(tail.mean()) if len(tail) else None

    @property
    def speed_quartiles(self) -> tuple[float, float, float] | None:
        """Quartiles of tokens per second over the steps: the median does not care about slow first steps."""
        speed = self.tokens_per_second[np.isfinite(self.tokens_per_second)]
        if not len(speed):
            return None
        low, median, high = np.quantile(speed, [0.25, 0.5, 0.75])
        return float(low), float(median), float(high)


def read_metrics(path: Path) -> Metrics:
    """Read a log; a missing file is an empty one.

    A step that is not after the last one is a resume at an earlier checkpoint: it undoes that step and all later
    ones, so the last line of a step counts. Lines that are not JSON (a kill while writing) are left out and counted. Raises UserError if most lines are
    unreadable: then the file is something else.
    """
    steps: dict[int, dict[str, Any]] = {}
    held_out_loss: dict[int, float] = {}
    broken_lines = undone_steps = num_lines = last_step = 0
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        if not line.strip():
            continue
        num_lines += 1
        record = _parse(line)
        if record is None:
            broken_lines += 1
        elif isinstance(record.get("evaluation"), dict):
            held_out_loss[record["step"]] = _number(record["evaluation"].get("loss"))
        else:
            step = record["step"]
            if step <= last_step:
                undone = [known for known in steps if known >= step]
                undone_steps += len(undone)
                for known in undone:
                    del steps[known]
                held_out_loss = {known: loss for known, loss in held_out_loss.items() if known < step}
            steps[step] = record
            last_step = step
    if broken_lines > 1 and 2 * broken_lines > num_lines:
        raise UserError(
            f"{path}: {broken_lines} of {num_lines} lines are not metrics (JSON with a step); restore the file"
        )

    order = sorted(steps)

    def column(name: str) -> Floats:
        return np.array([_number(steps[step].get(name)) for step in order], dtype=np.float64)

    loss = column("loss")
    return Metrics(
        steps=np.array(order, dtype=np.int64),
        loss=loss,
        learned_tokens=column("learned_tokens"),
        tokens_per_second=column("tokens_per_second"),
        seconds=column("seconds"),
        held_out_loss=dict(sorted(held_out_loss.items())),
        broken_lines=broken_lines,
        undone_steps=undone_steps,
        non_finite_losses=int(np.count_nonzero(~np.isfinite(loss))),
    )


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else float("nan")
