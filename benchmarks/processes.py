"""The processes of a contender: one a rank, each with a line to the harness on its standard input and output.

Loading torch, DeepSpeed, transformers and TRL takes longer than most of what is measured, and no figure counts it. So a script
is forked from one interpreter that has loaded them (`preload`), instead of started by a new one; it runs as if it had
been. Another interpreter's commands, and modules that are not ours, are started as they are.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import queue
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.distributed import place
from trainer.runtime import process_group

REPOSITORY = Path(__file__).resolve().parent.parent
LINES_KEPT = 60  # of a failed contender's output, which the error shows
TURNS = "BENCH_TURNS"  # set for a contender that waits for its turn before every round
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
END_SECONDS = 60.0  # to end by itself after the last round

_context = multiprocessing.get_context("forkserver")
_preloaded = False


class Failed(Exception):
    """A contender ended with an error, took too long, or told nothing."""


def preload(*modules: str) -> None:
    """Once, before the first contender: scripts are forked from a process that has loaded these modules."""
    global _preloaded
    places = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join(places))
    _context.set_forkserver_preload(list(modules))
    _preloaded = True


def turns() -> Iterator[None]:
    """In a contender: one round after another, each when it is its turn. One round without a harness."""
    if TURNS not in os.environ:
        yield
        return
    for _ in iter(sys.stdin.readline, ""):
        yield


def apart(function: Callable[[], Any]) -> Any:
    """In a contender: what `function` returns (as JSON), from a process forked for it, whose memory is free afterwards."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(sending, "w") as channel:
                json.dump(function(), channel)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(sending)
    with open(receiving) as channel:
        told = channel.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a forked process ended with status {os.waitstatus_to_exitcode(status)}")
    return json.loads(told)


class Running:
    """A contender that has been started, on `ranks` ranks of one machine; None: one process that is told nothing of ranks."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], ranks: int | None) -> None:
        self._name = name
        self._output: deque[str] = deque(maxlen=LINES_KEPT)
        self._told: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._channels: list[socket.socket] = []
        self._processes: list[Any] = []
        # Several live at the same time: not even those of one rank may meet at the usual port.
        port = process_group.free_port()
        for rank in range(ranks or 1):
            told = place(rank, ranks, port) if ranks else {}
            ours, theirs = socket.socketpair()
            self._processes.append(_start(command, {**environment, **told}, theirs))
            theirs.close()
            self._channels.append(ours)
            threading.Thread(target=self._listen, args=(rank, ours), daemon=True).start()

    def turn(self, timeout_seconds: float) -> dict[str, Any]:
        """One round: the JSON object that rank 0 tells, with `wall_seconds` added. Raises Failed."""
        start = time.perf_counter()
        for channel in self._channels:
            with contextlib.suppress(OSError):  # it has ended: told below
                channel.sendall(b"\n")
        while True:
            rank, line = self._next(start + timeout_seconds - time.perf_counter(), timeout_seconds)
            if line is not None:
                return {**json.loads(line), "wall_seconds": time.perf_counter() - start}
            status = self._status(rank)
            if status or rank == 0:
                raise Failed(f"{self._name}: exit status {status}\n{self._last_words()}")

    def end(self) -> None:
        """No more rounds: every rank ends by itself. Raises Failed if one does not end well."""
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_WR)
        statuses = [self._status(rank) for rank in range(len(self._processes))]
        self.kill()
        if any(statuses):
            raise Failed(f"{self._name}: exit statuses {statuses}\n{self._last_words()}")

    def kill(self) -> None:
        """All ranks, at once, with what they have started."""
        for process in self._processes:
            running = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if running:  # the number of one that has ended may be another's
                    os.killpg(process.pid, signal.SIGKILL)
        for channel in self._channels:
            channel.close()

    def _next(self, seconds: float, limit: float) -> tuple[int, str | None]:
        try:
            return self._told.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise Failed(f"{self._name}: no end within {limit:.0f} seconds\n{self._last_words()}") from None

    def _listen(self, rank: int, channel: socket.socket) -> None:
        """Until the rank ends: its chatter is kept, what rank 0 tells is passed on."""
        with contextlib.suppress(OSError), channel.makefile("r", errors="replace") as lines:
            for line in lines:
                self._output.append(line)
                if rank == 0 and line.startswith('{"'):
                    self._told.put((rank, line))
        self._told.put((rank, None))

    def _status(self, rank: int) -> int | None:
        process = self._processes[rank]
        if isinstance(process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            return process.returncode
        process.join(END_SECONDS)
        status: int | None = process.exitcode
        return status

    def _last_words(self) -> str:
        return "".join(self._output)


def _start(command: list[str], environment: dict[str, str], channel: socket.socket) -> Any:
    ours = command[1].endswith(".py") or (command[1] == "-m" and command[2].startswith("benchmarks."))
    if _preloaded and command[0] == sys.executable and ours:
        process = _context.Process(target=_become, args=(command[1:], environment, channel))
        process.start()
        return process
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT, **environment},
        stdin=channel,
        stdout=channel,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _become(argv: list[str], environment: dict[str, str], channel: socket.socket) -> None:
    """In the forked process: the script or module, its arguments, its environment, its standard streams."""
    gc.freeze()  # not its own objects: a collection need not look at all that was loaded for others
    os.setsid()
    os.chdir(REPOSITORY)
    for descriptor in (0, 1, 2):
        os.dup2(channel.fileno(), descriptor)
    channel.close()
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.update(environment)
    torch = sys.modules.get("torch")
    if torch and torch.cuda._is_in_bad_fork():  # a library has looked at the GPU as it was loaded
        os.execv(sys.executable, [sys.executable, *argv])
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
