"""Exit statuses, last output and progress bars of the tools."""

from __future__ import annotations

import pytest

from tests.distributed import run

BUSY_THREADS = """
import threading
from torch.distributed import HashStore
from trainer.runtime import terminal
store = HashStore()
store.set("key", "value")
started = threading.Event()

def call_store():
    while True:
        store.get("key")  # releases and reacquires the GIL in C++
        started.set()

for _ in range(4):
    threading.Thread(target=call_store, daemon=True).start()
started.wait()
terminal.run_main(lambda: print("done"))
"""


def test_a_library_thread_does_not_fail_the_exit() -> None:
    """With a normal exit nearly every run ends with "terminate called without an active exception"."""
    for _ in range(3):
        [outcome] = run(["-c", BUSY_THREADS])
        assert (outcome.status, outcome.output) == (0, "done\n")


@pytest.mark.parametrize(
    ("main", "status", "output"),
    [
        ("int", 0, ""),
        ("lambda: sys.exit()", 0, ""),
        ("lambda: sys.exit(3)", 3, ""),
        ("lambda: sys.exit('message')", 1, "message\n"),
        ("lambda: atexit.register(print, 'at exit')", 0, "at exit\n"),
    ],
)
def test_exit_status_and_output(main: str, status: int, output: str) -> None:
    [outcome] = run(
        ["-c", f"import atexit, sys; from trainer.runtime import terminal; terminal.run_main({main})"]
    )
    assert (outcome.status, outcome.output) == (status, output)


TWO_BARS = """
from trainer.runtime import terminal
terminal._LINE_INTERVAL_SECONDS = 0
bars = terminal.ProgressBars()
one, other = bars.add("train a", 10), bars.add("train b", 0)
one.update(3, "loss 1.000")
other.update(1, total=4)
one.close()
terminal.info("a is done")
other.update(2, "loss 2.000")
bars.close()
terminal.info("all done")
"""


def test_lines_of_several_bars_have_labels() -> None:
    [outcome] = run(["-c", TWO_BARS])
    assert outcome.status == 0, outcome
    lines = [line.split(", 0s left")[0] for line in outcome.output.splitlines()]
    assert lines == [
        *("train a 3/10, loss 1.000", "train b 1/4", "a is done", "train b 2/4, loss 2.000", "all done"),
    ]


def test_several_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages appear on lines of their own, and closed bars are erased."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    [outcome] = run(["-c", TWO_BARS])
    assert outcome.status == 0, outcome
    assert "train a" in outcome.output and "train b" in outcome.output
    assert "a is done\n" in outcome.output
    assert outcome.output.endswith("all done\n")
    assert "train" not in outcome.output.rpartition("\x1b[2K")[2], "the last bar is not erased"
