"""Stop requests by signals and the time limit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.runtime.exit_codes import EXIT_REQUEUE
from trainer.runtime.stop_request import StopRequest

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT_FOR_REQUEST = """
import sys, time
from trainer.runtime.stop_request import StopRequest
stop = StopRequest()
stop.install_signal_handlers()
{statement}
print("ready", flush=True)
deadline = time.monotonic() + 60
while not stop.is_requested and time.monotonic() < deadline:
    time.sleep(0.01)
print("stopped by", stop.reason, flush=True)
stop.ignore_signals()
print("saved", flush=True)
sys.stdin.read()
sys.exit(75)
"""


def start_process(statement: str = "") -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT_FOR_REQUEST.format(statement=statement)],
        cwd=REPOSITORY,
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_process_immediately(number: signal.Signals) -> None:
    process = start_process()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE
    assert errors == f"{number.name}: stopped as requested, all results so far are on disk\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_deferred_signal_sets_the_reason_and_later_ones_are_ignored(number: signal.Signals) -> None:
    process = start_process("stop.defer_signals()")
    process.send_signal(number)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == [f"stopped by {number.name}\n", "saved\n"]
    for later in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process.send_signal(later)
    process.communicate(input="", timeout=60)
    assert process.returncode == EXIT_REQUEUE


def test_the_deadline_includes_a_reserve_for_a_step_and_a_save() -> None:
    stop = StopRequest()
    stop.record_duration(step=1800.0, save=1900.0)
    assert not stop.is_requested, "there is no deadline"
    stop = StopRequest()
    stop.set_deadline(3600.0, save_seconds=60.0)
    assert not stop.is_requested
    stop.record_duration(step=1800.0)
    assert stop.reason == "the time limit is near"
    stop = StopRequest()
    stop.set_deadline(3600.0, save_seconds=60.0)
    stop.record_duration(save=1900.0)
    assert stop.is_requested
    assert stop.should_stop_on_any_rank(), "world size 1"
