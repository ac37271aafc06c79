"""How a process of ours ends, whatever its libraries are about to do."""

from __future__ import annotations

import pytest

from tests.distributed import run

BUSY = """
import threading
from torch.distributed import HashStore
from trainer import terminal
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
    [outcome] = run(["-c", f"import atexit, sys; from trainer import terminal; terminal.run({main})"])
    assert (outcome.status, outcome.output) == (status, said)
