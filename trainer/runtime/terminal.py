"""Terminal output of the tools (one line per event, progress bars, errors) and the exit of the process.

Output of DeepSpeed, torch and transformers is redirected to a log file. File descriptors are redirected, so output of C++
code is included. Ranks other than 0 print only their own failures.
"""

import atexit
import contextlib
import io
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from trainer.errors import UserError
from trainer.runtime import distributed, exit_codes

INTERRUPTED = "interrupted; run the same command to continue"
WIDTH_WITHOUT_TERMINAL = 160  # characters per line of tables if the output is not a terminal
_LINE_INTERVAL_SECONDS = 15.0  # minimum interval between progress lines if the output is not a terminal
# Launchers kill all ranks when one rank fails. Failing ranks other than 0 exit after this delay, so rank 0 can print its error.
_FAILURE_DELAY_SECONDS = 3.0
_RESTORE_TERMINAL = "\r\x1b[K\x1b[?25h"  # to the start of the line, clear it, show the cursor
_UNUSABLE_PATH_ERRORS = (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)

_output: TextIO | None = None
_log: Path | None = None


def redirect_library_output(logs: Path, tool: str) -> None:
    """Redirect stdout and stderr of this process to `logs/<tool>.rank<r>.log`, except this module's output.

    Must be called before heavy libraries are imported, because they print during their import.
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
    """Print one line on rank 0."""
    if distributed.is_main_process():
        _write_line(text, sys.stdout)


def warning(text: str) -> None:
    info(f"warning: {text}")


def deprecation(text: str) -> None:
    """Print a warning on rank 0, to stderr because stdout may hold JSON."""
    if distributed.is_main_process():
        _write_line(f"warning: {text}", sys.stderr)


def error_on_any_rank(text: str) -> None:
    """Print one line on any rank, so that an error is visible even if rank 0 hangs."""
    _write_line(text, sys.stderr)


def write_from_signal_handler(text: str) -> None:
    """Write one line on rank 0 in a single system call, because the signal may have interrupted another write.

    On a terminal, the line replaces a progress bar, and the cursor, which a bar hides, is shown again.
    """
    if _rank() == 0:
        with contextlib.suppress(OSError):  # the reader of the output may have exited
            descriptor = (_output or sys.stderr).fileno()
            restore = _RESTORE_TERMINAL if os.isatty(descriptor) else ""
            os.write(descriptor, f"{restore}{text}\n".encode())


class ProgressBars:
    """Progress of concurrent tasks on rank 0: bars on a terminal, or a line every 15 seconds if the output is not a terminal."""

    def __init__(self) -> None:
        self.open_bars: list[ProgressBar] = []
        self._rich: Any = None  # rich's Progress of the open bars; None if the output is not a terminal

    def add(self, label: str, total: int, done: int = 0, prints_lines: bool = True) -> "ProgressBar":
        """Open a bar and return it. `total`: number of units, 0 if unknown. `done`: number of units that are already done.

        `prints_lines`: whether the bar prints lines if the output is not a terminal.
        """
        if not self.open_bars:
            self._rich = _rich_progress()
        bar = ProgressBar(self, self._rich, label, total, done, prints_lines)
        self.open_bars.append(bar)
        return bar

    def remove(self, bar: "ProgressBar") -> None:
        if bar in self.open_bars:
            self.open_bars.remove(bar)
            if self._rich is not None and not self.open_bars:
                self._rich.stop()

    def close(self) -> None:
        for bar in list(self.open_bars):
            bar.close()


class ProgressBar:
    """Progress of one task. Must be created by `ProgressBars.add` or `progress_bar`."""

    def __init__(
        self, bars: ProgressBars, rich_progress: Any, label: str, total: int, done: int, prints_lines: bool
    ) -> None:
        self._bars, self._rich, self.prints_lines = bars, rich_progress, prints_lines
        self._label, self._total, self._done = label, total, done
        self._start, self._start_done, self._last_line = time.monotonic(), done, time.monotonic()
        if self._rich is not None:
            texts = {"counts": self._counts(), "time_left": "", "note": ""}
            self._task = self._rich.add_task(label, total=total or None, completed=done, **texts)
            self._rich.start()

    def update(self, done: int, note: str = "", total: int = 0, time_left: str | None = None) -> None:
        """Show `done` completed units and a `note`. `total` sets the total if it is not 0.

        `time_left`: text about the remaining time; None for an estimate from the units that were completed so far.
        """
        self._done, self._total = done, total or self._total
        time_left = self._time_left() if time_left is None else time_left
        # If several bars print lines, each bar prints less often, so that all bars together print as many lines as a single bar.
        interval_seconds = _LINE_INTERVAL_SECONDS * sum(bar.prints_lines for bar in self._bars.open_bars)
        if self._rich is not None:
            texts = {"counts": self._counts(), "time_left": time_left, "note": note}
            self._rich.update(self._task, completed=done, total=self._total or None, **texts)
        elif self.prints_lines and time.monotonic() - self._last_line >= interval_seconds:
            self._last_line = time.monotonic()
            info(f"{self._label} {', '.join(filter(None, (self._counts(), note, time_left)))}")

    def close(self) -> None:
        self._bars.remove(self)
        if self._rich is not None:
            self._rich.remove_task(self._task)

    def _counts(self) -> str:
        return f"{self._done}/{self._total}" if self._total else str(self._done)

    def _time_left(self) -> str:
        num_new = self._done - self._start_done
        if num_new <= 0 or not self._total:
            return ""
        seconds = (time.monotonic() - self._start) / num_new * max(0, self._total - self._done)
        return f"{duration_text(seconds)} left"


def _rich_progress() -> Any:
    """Return an empty rich Progress, or None if the output is not a terminal or the rank is not 0."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=_output or sys.stdout)
    if not distributed.is_main_process() or not console.is_terminal:
        return None
    texts = [TextColumn(f"{{task.fields[{name}]}}") for name in ("counts", "time_left", "note")]
    columns = (TextColumn("{task.description}"), BarColumn(24), *texts)
    return Progress(*columns, console=console, transient=True)


def progress_bar(label: str, total: int, done: int = 0) -> contextlib.closing[ProgressBar]:
    """Return a context manager that yields a single progress bar."""
    return contextlib.closing(ProgressBars().add(label, total, done))


def duration_text(seconds: float) -> str:
    """Return seconds as text: 90 -> "1m30s"."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def size_text(num_bytes: float) -> str:
    """Return a number of bytes as text: 13_900_000_000 -> "13.9 GB"."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 1000:.0f} kB"


def table_text(table: Any, width: int | None = None) -> str:
    """Return a rich Table as plain text. Default width: the terminal's, or 160 columns if stdout is not a terminal."""
    from rich.console import Console

    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def run_main(main: Callable[[], object]) -> NoReturn:
    """Run a tool's main function and exit the process with 0, a status of exit_codes.py, or the status of a SystemExit.

    UserError, Ctrl-C and an unusable path are printed as one message. For other exceptions, the traceback is printed too.
    The process exits with os._exit, for two reasons. A failed rank must not wait for other ranks in a destructor. A
    successful rank must not abort at interpreter shutdown ("terminate called without an active exception"). Such an abort
    happens if a gloo thread needs the GIL during the shutdown to release a tensor.
    """
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    except UserError as error:
        _fail(f"error: {error}", exit_codes.EXIT_USER_ERROR)
    except KeyboardInterrupt:
        exit_interrupted()
    except Exception as error:
        if isinstance(error, _UNUSABLE_PATH_ERRORS) and error.filename:
            text = f"error: {error.filename}: {error.strerror}; choose another path"
            _fail(text, exit_codes.EXIT_USER_ERROR)
        traceback.print_exc()  # goes to the log if output is redirected
        where = f" (traceback in {_log})" if _log else ""
        is_peer_lost = distributed.is_communication_failure(error)
        exit_status = exit_codes.EXIT_PEER_LOST if is_peer_lost else exit_codes.EXIT_FAILURE
        _fail(f"error: {type(error).__name__}: {error}{where}", exit_status)
    if not isinstance(status, int):  # the message of sys.exit("message")
        _fail(str(status), exit_codes.EXIT_FAILURE)
    distributed.shutdown()
    atexit._run_exitfuncs()  # libraries delete temporary files and end child processes
    _end(int(status))


def exit_interrupted() -> NoReturn:
    """Exit the process with EXIT_INTERRUPTED after Ctrl-C. Rank 0 prints one line."""
    if _rank() == 0:
        _write_line(INTERRUPTED, sys.stderr)
    _end(exit_codes.EXIT_INTERRUPTED)


def exit_for_requeue() -> NoReturn:
    """Exit the process with EXIT_REQUEUE after a stop request. The same command resumes the work."""
    _end(exit_codes.EXIT_REQUEUE)


def _rank() -> int:
    try:
        return distributed.environment().rank
    except UserError:  # contradictory launcher variables
        return 0


def _fail(message: str, status: int) -> NoReturn:
    if (rank := _rank()) != 0:
        time.sleep(_FAILURE_DELAY_SECONDS)
        message = f"rank {rank}: {message}"
    _write_line(message, sys.stderr)
    _end(status)


def _end(status: int) -> NoReturn:
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            file.flush()
    os._exit(status)


def _write_line(text: str, file: TextIO) -> None:
    """Write a line in one call. (With `print`, another process may write between the text and the line break.)

    Ignores OSError, because a closed terminal, a closed pipe or a full disk must not end the run.
    """
    with contextlib.suppress(OSError):
        (_output or file).write(f"{text}\n")
        (_output or file).flush()
