"""Fault injection inside a rank, by patching functions from outside.

`arm` is called in a rank's process before the first line of the command, with a JSON object:

    record   folder: every pack that enters a training step is recorded there, by start and rank
    start    number of this start of the run
    kill     {"instant", "rank", "step", "marker"}: SIGKILL at the instant (instants.py), once (then `marker` exists)
    clock    list of hours by which the wall clock is wrong, the next one after every step
    late     {"rank", "seconds"}: the rank begins training that much later than the others
    poison   {"what": "loss" or "gradient", "rank", "step", "marker"}: NaN or Inf on one rank, once
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults.instants import INSTANTS, wrap

_step = 0  # the current optimizer step, counted from 1; 0 between steps


def arm(text: str) -> None:
    """Patch this process with the faults in `text`."""
    from trainer.runtime.stop_request import StopRequest
    from trainer.training import loop

    faults, rank = json.loads(text), int(os.environ["RANK"])
    _count_steps(loop)
    if "record" in faults:
        _record_packs(Path(faults["record"]), faults["start"], rank)
    for name, arm_fault in (("kill", _arm_kill), ("poison", _arm_poison)):
        fault = faults.get(name)
        if fault and fault["rank"] == rank and not Path(fault["marker"]).exists():
            arm_fault(fault)
    if faults.get("late", {}).get("rank") == rank:
        wrap(StopRequest, "defer_signals", before=lambda *_: time.sleep(faults["late"]["seconds"]))
    if "clock" in faults:
        _arm_clock(loop, faults["clock"], rank)


def _count_steps(loop: Any) -> None:
    original = loop.optimizer_step

    def optimizer_step(state: Any, step: int, stop: Any) -> Any:
        global _step
        _step = step + 1
        try:
            return original(state, step, stop)
        finally:
            _step = 0

    loop.optimizer_step = optimizer_step


def _record_packs(folder: Path, start: int, rank: int) -> None:
    from trainer.training.batches import PackedDataset

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{start:05d}-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    original = PackedDataset.micro_batch

    def micro_batch(self: Any, packs: range, end: int) -> Any:
        batch = original(self, packs, end)
        if _step and batch.problem_indices:
            line = {"step": _step, "pack": batch.first_pack, "problems": batch.problem_indices}
            os.write(descriptor, json.dumps(line).encode() + b"\n")  # unbuffered: it survives a SIGKILL
        return batch

    PackedDataset.micro_batch = micro_batch  # type: ignore[method-assign]


def _arm_kill(fault: dict[str, Any]) -> None:
    marker, step = Path(fault["marker"]), int(fault["step"])

    def die() -> None:
        marker.touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # SIGKILL may arrive a moment later

    INSTANTS[fault["instant"]](die, lambda: _step == step, step)


def _arm_poison(fault: dict[str, Any]) -> None:
    from trainer.training import loop

    original, marker = loop.summed_token_loss, Path(fault["marker"])

    def summed_token_loss(engine: Any, *arguments: Any) -> Any:
        losses = original(engine, *arguments)
        if _step != fault["step"]:
            return losses
        marker.touch()
        if fault["what"] == "loss":
            return losses * float("nan")
        losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    loop.summed_token_loss = summed_token_loss


def _arm_clock(loop: Any, hours: list[float], rank: int) -> None:
    """Offset `time.time` by other hours on every rank and after every step."""
    real, offset = time.time, 3600 * hours[rank]
    time.time = lambda: real() + offset

    def jump(state: Any, step: int, stop: Any) -> None:
        nonlocal offset
        offset = 3600 * hours[(step + rank) % len(hours)]

    wrap(loop, "optimizer_step", after=jump)
