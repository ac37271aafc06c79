"""Stop requests by signals and the time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.runtime import terminal
from trainer.runtime.exit_codes import EXIT_INTERRUPTED, EXIT_REQUEUE
from trainer.runtime.stop_request import StopRequest

REPOSITORY = Path(__file__).resolve().parents[2]
WAIT_FOR_REQUEST = """
import sys, time
{preparation}
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


def start_process(statement: str = "", preparation: str = "", **environment: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT_FOR_REQUEST.format(statement=statement, preparation=preparation)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
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


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_ends_the_process_with_one_line_of_rank_0(rank: int) -> None:
    process = start_process(RANK=str(rank), WORLD_SIZE="2")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert errors == ("" if rank else f"{terminal.INTERRUPTED}\n")


def test_ctrl_c_ends_a_process_whose_main_thread_is_in_c_code() -> None:
    """Like a rank in an MPI call. Python's handlers of the main thread run only after the call, here after many minutes."""
    call = 'print("ready", flush=True); import hashlib; hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)'
    process = start_process(call)
    time.sleep(0.5)  # now the main thread is in the call
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == EXIT_INTERRUPTED


def test_background_jobs_ignore_ctrl_c() -> None:
    process = start_process(preparation="import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=60)


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
