"""Processes of a contender, one per rank, connected to the harness by a socket on stdin and stdout.

Loading torch, DeepSpeed, transformers and TRL takes longer than most measurements, and no figure counts it. Scripts of
this repository are therefore forked from one interpreter that has loaded them (`preload`). Commands of other
interpreters and other modules are started directly.
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

from tests.distributed import rank_environment
from trainer.runtime import process_group

REPOSITORY = Path(__file__).resolve().parent.parent
LINES_KEPT = 60  # of a failed contender's output, which the error shows
TURNS = "BENCH_TURNS"  # set for a contender that runs several rounds, each started by a line on stdin
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
END_SECONDS = 60.0  # timeout of the exit after the last round

_context = multiprocessing.get_context("forkserver")
_preloaded = False


class ContenderFailed(Exception):
    """A contender ended with an error, took too long, or printed no result."""


def preload(*modules: str) -> None:
    """Fork later scripts from a process that has loaded these modules. Call once, before the first contender."""
    global _preloaded
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join(paths))
    _context.set_forkserver_preload(list(modules))
    _preloaded = True


def turns() -> Iterator[None]:
    """Yield once per round, when the harness starts it; once without a harness. For contenders."""
    if TURNS not in os.environ:
        yield
        return
    for _ in iter(sys.stdin.readline, ""):
        yield


def run_in_fork(function: Callable[[], Any]) -> Any:
    """Return the JSON result of `function`, run in a forked process, whose memory is freed. For contenders."""
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
        output = channel.read()
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a forked process ended with status {os.waitstatus_to_exitcode(status)}")
    return json.loads(output)


class Running:
    """A started contender with `ranks` ranks on this machine; None: one process without launcher variables."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], ranks: int | None) -> None:
        self._name = name
        self._output: deque[str] = deque(maxlen=LINES_KEPT)
        self._results: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._channels: list[socket.socket] = []
        self._processes: list[Any] = []
        # Several contenders run concurrently, so each needs its own port.
        port = process_group.free_port()
        for rank in range(ranks or 1):
            launcher = rank_environment(rank, ranks, port) if ranks else {}
            ours, theirs = socket.socketpair()
            self._processes.append(_start(command, {**environment, **launcher}, theirs))
            theirs.close()
            self._channels.append(ours)
            threading.Thread(target=self._listen, args=(rank, ours), daemon=True).start()

    def turn(self, timeout_seconds: float) -> dict[str, Any]:
        """Run one round; return the JSON object of rank 0 with `wall_seconds` added. Raises ContenderFailed."""
        start = time.perf_counter()
        for channel in self._channels:
            with contextlib.suppress(OSError):  # an ended rank is reported below
                channel.sendall(b"\n")
        while True:
            rank, line = self._next(start + timeout_seconds - time.perf_counter(), timeout_seconds)
            if line is not None:
                return {**json.loads(line), "wall_seconds": time.perf_counter() - start}
            status = self._status(rank)
            if status or rank == 0:
                raise ContenderFailed(f"{self._name}: exit status {status}\n{self._last_lines()}")

    def end(self) -> None:
        """Wait for all ranks to exit. Raises ContenderFailed if one exits with an error or not at all."""
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_WR)
        statuses = [self._status(rank) for rank in range(len(self._processes))]
        self.kill()
        if any(statuses):
            raise ContenderFailed(f"{self._name}: exit statuses {statuses}\n{self._last_lines()}")

    def kill(self) -> None:
        """Kill all ranks and their child processes."""
        for process in self._processes:
            running = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if running:  # the pid of an ended process may be reused
                    os.killpg(process.pid, signal.SIGKILL)
        for channel in self._channels:
            channel.close()

    def _next(self, seconds: float, limit: float) -> tuple[int, str | None]:
        try:
            return self._results.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise ContenderFailed(
                f"{self._name}: no end within {limit:.0f} seconds\n{self._last_lines()}"
            ) from None

    def _listen(self, rank: int, channel: socket.socket) -> None:
        """Read the output until the rank ends: keep the last lines, and queue the results of rank 0."""
        with contextlib.suppress(OSError), channel.makefile("r", errors="replace") as lines:
            for line in lines:
                self._output.append(line)
                if rank == 0 and line.startswith('{"'):
                    self._results.put((rank, line))
        self._results.put((rank, None))

    def _status(self, rank: int) -> int | None:
        process = self._processes[rank]
        if isinstance(process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            return process.returncode
        process.join(END_SECONDS)
        status: int | None = process.exitcode
        return status

    def _last_lines(self) -> str:
        return "".join(self._output)


def _start(command: list[str], environment: dict[str, str], channel: socket.socket) -> Any:
    is_ours = command[1].endswith(".py") or (command[1] == "-m" and command[2].startswith("benchmarks."))
    if _preloaded and command[0] == sys.executable and is_ours:
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
    """Run the script or module in the forked process, with its arguments, environment and standard streams."""
    gc.freeze()  # exclude the preloaded objects from garbage collection
    os.setsid()
    os.chdir(REPOSITORY)
    for descriptor in (0, 1, 2):
        os.dup2(channel.fileno(), descriptor)
    channel.close()
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.update(environment)
    torch = sys.modules.get("torch")
    if torch and torch.cuda._is_in_bad_fork():  # a library initialised CUDA when it was loaded
        os.execv(sys.executable, [sys.executable, *argv])
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
