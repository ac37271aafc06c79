"""How a process of ours ends, whatever its libraries are about to do."""

from __future__ import annotations

import pytest

from tests.distributed import run

BUSY = """
import threading
from torch.distributed import HashStore
from trainer.runtime import terminal
store = HashStore()
store.set("key", "value")
asked = threading.Event()

def ask():
    while True:
        store.get("key")  # gives up the interpreter in C++, and wants it back
        asked.set()

for _ in range(4):
    threading.Thread(target=ask, daemon=True).start()
asked.wait()
terminal.run(lambda: print("done"))
"""


def test_a_thread_of_a_library_does_not_make_a_failure_of_work_that_is_done() -> None:
    """Left to the interpreter, nearly every one of these ends with "terminate called without an active exception"."""
    for _ in range(3):
        [outcome] = run(["-c", BUSY])
        assert (outcome.status, outcome.output) == (0, "done\n")


@pytest.mark.parametrize(
    ("main", "status", "said"),
    [
        ("int", 0, ""),
        ("lambda: sys.exit()", 0, ""),
        ("lambda: sys.exit(3)", 3, ""),
        ("lambda: sys.exit('so it is')", 1, "so it is\n"),
        ("lambda: atexit.register(print, 'put away')", 0, "put away\n"),
    ],
)
def test_status_and_last_words(main: str, status: int, said: str) -> None:
    [outcome] = run(["-c", f"import atexit, sys; from trainer.runtime import terminal; terminal.run({main})"])
    assert (outcome.status, outcome.output) == (status, said)


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


def test_lines_of_several_bars_say_whose_they_are() -> None:
    [outcome] = run(["-c", TWO_BARS])
    assert outcome.status == 0, outcome
    lines = [line.split(", 0s left")[0] for line in outcome.output.splitlines()]
    assert lines == [
        *("train a 3/10, loss 1.000", "train b 1/4", "a is done", "train b 2/4, loss 2.000", "all done"),
    ]


def test_several_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said meanwhile stands in a line of its own, and nothing of the bars is left behind it."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    [outcome] = run(["-c", TWO_BARS])
    assert outcome.status == 0, outcome
    assert "train a" in outcome.output and "train b" in outcome.output
    assert "a is done\n" in outcome.output
    assert outcome.output.endswith("all done\n")
    assert "train" not in outcome.output.rpartition("\x1b[2K")[2], "the last that is drawn is erased"
