"""Start stages of one process as forks of a server that has imported the heavy libraries.

The imports of torch, transformers and deepspeed take 3 to 5 CPU seconds, which is longer than many stages of a small study.
A forked stage runs the same script with the same arguments, environment and log as its command line. The server must not be
used on a machine with CUDA devices, because CUDA cannot be used after a fork if an import has initialised it.
"""

import contextlib
import ctypes
import multiprocessing
import os
import random
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

from trainer.runtime import terminal
from trainer.storage.run_directory import StudyDirectory
from trainer.study.processes import STAGE_VARIABLE, stage_variables

# The imports of these modules must start no thread and compute nothing, because only the calling thread survives a fork.
_PRELOADED = (
    "trainer.training.loop",
    "trainer.training.validation",
    "trainer.evaluation.evaluate",
    "trainer.export.convert",
    "trainer.shards.prepare",
    "transformers.models.llama.modeling_llama",
    "deepspeed.runtime.zero.stage_1_and_2",
)
MIN_STAGES = (
    10  # for fewer stages, no server is started, because its imports delay the first stage by about 5 s
)
_LABEL_LENGTH = 1024  # bytes reserved for a stage's label in the environment of the server


class ForkedStage:
    """A stage that runs in a fork of the server, with the part of subprocess.Popen's interface that an executor needs."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode


class ForkServer:
    """Server process of a study. It ends when this process ends.

    `num_threads`: value of OMP_NUM_THREADS for the server, because torch reads the variable when it is imported.
    """

    def __init__(self, study: StudyDirectory, num_threads: int) -> None:
        self._study = study
        self._log = study.logs / "fork_server.log"
        self._num_threads = num_threads
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))
        self._ensure_running()

    def start(
        self, arguments: Sequence[str], stage: str, log: Path, environment: Mapping[str, str]
    ) -> ForkedStage:
        """Start `python ARGUMENTS`, where ARGUMENTS begin with a script, or with `-m` and a module."""
        self._ensure_running()
        variables = stage_variables(self._study, stage, environment)
        process = self._context.Process(target=_run, args=(list(arguments), stage, str(log), variables))
        process.start()
        return ForkedStage(process)

    def _ensure_running(self) -> None:
        with self._server_environment(), _output_to(self._log):
            forkserver.ensure_running()

    @contextlib.contextmanager
    def _server_environment(self) -> Iterator[None]:
        before = dict(os.environ)
        os.environ.update(stage_variables(self._study, " " * _LABEL_LENGTH, {}))
        os.environ.setdefault("OMP_NUM_THREADS", str(self._num_threads))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Context manager in which new processes write stdout and stderr to the end of `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(number) for number in (1, 2)]
    _redirect(log)
    try:
        yield
    finally:
        for number, descriptor in enumerate(saved, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _redirect(log: Path) -> None:
    """Make stdout and stderr of this process write to the end of `log`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _run(arguments: list[str], stage: str, log: str, environment: dict[str, str]) -> None:
    """Run a stage in this new process as `python ARGUMENTS` would."""
    os.setsid()  # Ctrl-C in the terminal must not reach the stage
    _redirect(Path(log))
    _write_label(stage)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _write_label(stage: str) -> None:
    """Write the label over the blanks in the environment block, where `processes` reads it from /proc/PID/environ.

    The kernel shows the block that the server got when it was executed; os.environ does not change this block.
    """
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    address = getenv(STAGE_VARIABLE.encode())
    label = stage.encode().ljust(_LABEL_LENGTH)[:_LABEL_LENGTH]
    if address and len(ctypes.string_at(address)) == _LABEL_LENGTH:
        ctypes.memmove(address, label, _LABEL_LENGTH)
    else:
        terminal.warning("the environment block cannot be changed; processes of this stage have no label")
