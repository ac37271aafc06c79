"""What goes wrong inside a rank, put there from outside: the product knows nothing of it.

`arm` is called in a rank's process before the command's first line, with a JSON object:

    record   folder: every pack that enters a training step is written down there, by life and rank
    life     number of this start
    kill     {"instant", "rank", "step", "marker"}: SIGKILL to ourselves at the instant (instants.py), once (the marker says so)
    clock    by so many hours the wall clock is wrong, the next number after every step
    late     {"rank", "seconds"}: begins to work so much later than the others
    poison   {"what": "loss" or "gradient", "rank", "step", "marker"}: not a number, on one rank, once
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.faults.instants import INSTANTS, wrap

_step = 0  # the optimizer step we are in, counted from 1; 0 outside


def arm(text: str) -> None:
    """Put into this process what `text` asks for."""
    from trainer.runtime.stop_request import StopRequest
    from trainer.training import loop

    wanted, rank = json.loads(text), int(os.environ["RANK"])
    _count_steps(loop)
    if "record" in wanted:
        _record(Path(wanted["record"]), wanted["life"], rank)
    for name, arming in (("kill", _arm_kill), ("poison", _arm_poison)):
        fault = wanted.get(name)
        if fault and fault["rank"] == rank and not Path(fault["marker"]).exists():
            arming(fault)
    if wanted.get("late", {}).get("rank") == rank:
        wrap(StopRequest, "defer_signals", before=lambda *_: time.sleep(wanted["late"]["seconds"]))
    if "clock" in wanted:
        _jump(loop, wanted["clock"], rank)


def _count_steps(loop: Any) -> None:
    original = loop.optimizer_step

    def optimizer_step(student: Any, step: int, stop: Any) -> Any:
        global _step
        _step = step + 1
        try:
            return original(student, step, stop)
        finally:
            _step = 0

    loop.optimizer_step = optimizer_step


def _record(folder: Path, life: int, rank: int) -> None:
    from trainer.training.batches import PackedDataset

    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / f"{life:05d}-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
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
        time.sleep(60)  # never reached: SIGKILL is not waited for

    INSTANTS[fault["instant"]](die, lambda: _step == step, step)


def _arm_poison(fault: dict[str, Any]) -> None:
    from trainer.training import loop

    original, marker = loop.summed_token_loss, Path(fault["marker"])

    def token_losses(engine: Any, *arguments: Any) -> Any:
        losses = original(engine, *arguments)
        if _step != fault["step"]:
            return losses
        marker.touch()
        if fault["what"] == "loss":
            return losses * float("nan")
        losses.register_hook(lambda gradient: gradient * float("inf"))
        return losses

    loop.summed_token_loss = token_losses


def _jump(loop: Any, hours: list[float], rank: int) -> None:
    """time.time, and with it all of Python's wall clock, is off by other hours after every step, and on every rank."""
    real, offset = time.time, 3600 * hours[rank]
    time.time = lambda: real() + offset

    def jump(student: Any, step: int, stop: Any) -> None:
        nonlocal offset
        offset = 3600 * hours[(step + rank) % len(hours)]

    wrap(loop, "optimizer_step", after=jump)
