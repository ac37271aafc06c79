"""Signals and the time limit: what asks for a stop, and how a process answers before and after its work begins."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.runtime.exit_codes import EXIT_REQUEUE
from trainer.runtime.stop_request import StopRequest

REPOSITORY = Path(__file__).resolve().parents[2]
LISTEN = """
import sys, time
from trainer.runtime.stop_request import StopRequest
stop = StopRequest()
stop.install_signal_handlers()
{at_work}
print("ready", flush=True)
deadline = time.monotonic() + 60
while not stop.is_requested and time.monotonic() < deadline:
    time.sleep(0.01)
print("asked by", stop.reason, flush=True)
stop.ignore_signals()
print("saved", flush=True)
sys.stdin.read()
sys.exit(75)
"""


def started(at_work: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", LISTEN.format(at_work=at_work)],
        cwd=REPOSITORY,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_there_is_work_the_process_ends_at_once(number: signal.Signals) -> None:
    process = started("")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE
    assert errors == f"{number.name}: ended as asked, everything done so far is on disk\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_at_work_a_signal_is_remembered_and_later_ones_do_not_change_the_status(
    number: signal.Signals,
) -> None:
    process = started("stop.defer_signals()")
    process.send_signal(number)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [f"asked by {number.name}\n", "saved\n"]
    for again in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process.send_signal(again)
    process.communicate(input="", timeout=60)
    assert process.returncode == EXIT_REQUEUE


def test_the_time_limit_leaves_room_for_a_step_and_a_save() -> None:
    stop = StopRequest()
    stop.record_duration(step=1800.0, save=1900.0)
    assert not stop.is_requested, "there is no limit"
    stop = StopRequest()
    stop.set_deadline(3600.0, save_seconds=60.0)
    assert not stop.is_requested
    stop.record_duration(step=1800.0)
    assert stop.reason == "the time limit is near"
    stop = StopRequest()
    stop.set_deadline(3600.0, save_seconds=60.0)
    stop.record_duration(save=1900.0)
    assert stop.is_requested, "saving turned out to take long"
    assert stop.should_stop_on_any_rank(), "a world of one agrees with itself"
