"""What a user sees: one line an event, a progress bar on long work, errors last and readable.

The chatter of DeepSpeed, torch and transformers goes to a log file, at the level of file descriptors, so that C++
code is caught as well. Ranks other than 0 show nothing unless they fail alone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from trainer.errors import UserError
from trainer.runtime import distributed
from trainer.runtime.exit_codes import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_PEER_LOST,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
)

_LINE_INTERVAL_SECONDS = 15.0  # of progress, where there is no terminal to draw a bar on
# A failing rank other than 0 lets rank 0 print its error first: the launcher kills the others when one exits.
_OTHERS_WAIT_SECONDS = 3.0

_output: TextIO | None = None
_log: Path | None = None


def redirect_library_output(logs: Path, tool: str) -> None:
    """From now on stdout and stderr of this process go to `logs/<tool>.rank<r>.log`; `say`, `warn` and bars do not.

    Called before the heavy imports, which are the first to chatter.
    """
    global _output, _log
    rank = distributed.environment_from_launcher(os.environ).rank
    logs.mkdir(parents=True, exist_ok=True)
    _log = logs / f"{tool}.rank{rank}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    if _output is None:
        _output = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace", buffering=1)
    descriptor = os.open(_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def info(text: str) -> None:
    """One event, for the user, once."""
    if distributed.is_main_process():
        _write_line(text, sys.stdout)


def warning(text: str) -> None:
    info(f"warning: {text}")


def error_on_any_rank(text: str) -> None:
    """Of any rank, at once: what the others cannot say because they hang."""
    _write_line(text, sys.stderr)


class ProgressBars:
    """Progress of what goes on at the same time: bars below each other on a terminal, a line every few seconds elsewhere,
    nothing on other ranks."""

    def __init__(self) -> None:
        self._open: list[ProgressBar] = []
        self._drawn: Any = None  # rich's, while a bar is open

    def add(self, label: str, total: int, done: int = 0) -> ProgressBar:
        """Total 0: unknown."""
        if not self._open:
            self._drawn = _drawn()
        bar = ProgressBar(self, self._drawn, label, total, done)
        self._open.append(bar)
        return bar

    @property
    def line_every_seconds(self) -> float:
        """Of one of them, where there is no terminal: the more there are, the less often, and lines come as often as ever."""
        return _LINE_INTERVAL_SECONDS * len(self._open)

    def remove(self, bar: ProgressBar) -> None:
        if bar in self._open:
            self._open.remove(bar)
            if self._drawn is not None and not self._open:
                self._drawn.stop()

    def close(self) -> None:
        for bar in list(self._open):
            bar.close()


class ProgressBar:
    """How far one thing is; made by `Bars.add` or `progress`."""

    def __init__(self, bars: ProgressBars, drawn: Any, label: str, total: int, done: int):
        self._bars, self._drawn = bars, drawn
        self._label, self._total, self._done = label, total, done
        self._start, self._start_done, self._last_line = time.monotonic(), done, time.monotonic()
        if drawn is not None:
            self._task = drawn.add_task(label, total=total or None, completed=done, note="")
            drawn.start()

    def update(self, done: int, note: str = "", total: int = 0) -> None:
        """`done` of the total (if it was unknown before: now `total`) are done; `note` says how it goes."""
        self._done, self._total = done, total or self._total
        if self._drawn is not None:
            self._drawn.update(self._task, completed=done, total=self._total or None, note=note)
        elif time.monotonic() - self._last_line >= self._bars.line_every_seconds:
            self._last_line = time.monotonic()
            of_total = f"/{self._total}" if self._total else ""
            info(f"{self._label} {done}{of_total}{', ' + note if note else ''}{self._eta()}")

    def close(self) -> None:
        self._bars.remove(self)
        if self._drawn is not None:
            self._drawn.remove_task(self._task)

    def _eta(self) -> str:
        fresh = self._done - self._start_done
        if fresh <= 0 or not self._total:
            return ""
        seconds = (time.monotonic() - self._start) / fresh * max(0, self._total - self._done)
        return f", {duration(seconds)} left"


def _drawn() -> Any:
    """rich's bars, still without any, for our terminal; None where there is none, and on other ranks."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=_output or sys.stdout)
    if not distributed.is_main_process() or not console.is_terminal:
        return None
    what, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (what, BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), note)
    return Progress(*columns, console=console, transient=True)


@contextlib.contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[ProgressBar]:
    with contextlib.closing(ProgressBars().add(label, total, done)) as bar:
        yield bar


def duration(seconds: float) -> str:
    """90 -> "1m30s"."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def run(main: Callable[[], object]) -> NoReturn:
    """Run a tool's main: a UserError becomes one message (status 2), a fault of ours keeps its traceback (status 1), and
    so does a connection to another rank that is lost (LOST_OTHERS).

    Ends the process itself in every case. A rank that failed must not wait for the others in a destructor. And one that
    did its work must not fail afterwards: gloo's threads may still be letting go of a tensor, and the interpreter, as it
    ends, ends a thread that asks for it; in C++ that is "terminate called without an active exception".
    """
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    except UserError as error:
        _fail(f"error: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        traceback.print_exc()  # to the log, if chatter is captured
        where = f" (traceback in {_log})" if _log else ""
        is_lost = distributed.is_communication_failure(error)
        _fail(f"error: {type(error).__name__}: {error}{where}", EXIT_PEER_LOST if is_lost else EXIT_FAILURE)
    if not isinstance(status, int):  # sys.exit("why")
        _fail(str(status), EXIT_FAILURE)
    distributed.shutdown()
    atexit._run_exitfuncs()  # what libraries asked for: temporary files, processes of their own
    _end(int(status))


def exit_for_requeue() -> NoReturn:
    """End this process with the status that says: I was asked to stop, what is done is kept, start me again."""
    _end(EXIT_REQUEUE)


def _fail(message: str, status: int) -> NoReturn:
    try:
        rank = distributed.environment().rank
    except UserError:  # the environment is what is wrong
        rank = 0
    if rank != 0:
        time.sleep(_OTHERS_WAIT_SECONDS)
        message = f"rank {rank}: {message}"
    _write_line(message, sys.stderr)
    _end(status)


def _end(status: int) -> NoReturn:
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            file.flush()
    os._exit(status)


def _write_line(text: str, file: TextIO) -> None:
    """In one write: `print` to an unbuffered file makes two, and another process's line comes between.

    A terminal that was closed, a pipe whose reader has ended or a log on a full disk is no reason to end the work.
    """
    with contextlib.suppress(OSError):
        (_output or file).write(f"{text}\n")
        (_output or file).flush()
