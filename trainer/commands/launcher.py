"""`--num_gpus N` of a command: run the command on N ranks of this machine with DeepSpeed's launcher."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil

from trainer.errors import UserError
from trainer.runtime import distributed, exit_codes, process_group, terminal
from trainer.study import stages

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def launch_ranks(name: str, settings: Any, num_ranks: int) -> NoReturn:
    """Run the command `name` ("train" or "evaluate") on `num_ranks` ranks, and exit with the status of the launcher.

    On Ctrl-C, the `deepspeed` command prints a traceback, and kills ranks that need more than 30 seconds to save. So the
    launcher runs in a session of its own, which Ctrl-C does not reach, and this process sends signals to the ranks alone.
    The launcher's own messages are not printed. Raises UserError if this process was itself started by a launcher.
    """
    if num_ranks < 1:
        raise UserError(f"num_gpus is {num_ranks}, must be at least 1")
    if distributed.environment_from_launcher(os.environ).launcher != "single":
        raise UserError("num_gpus: a launcher has already started this process; leave --num_gpus out")
    script = Path(sys.argv[0])
    scripts_dir = script.parent if script.suffix == ".py" and script.parent.name == "tools" else None
    stage = stages.Stage(name, name, settings, Path(os.devnull), num_ranks)
    command = stages.stage_command(stage, scripts_dir, "deepspeed", process_group.free_port())
    command[1:1] = ["--log_level", "critical"]
    launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        ranks = _ranks_of(launcher.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)
        if not ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)

    for number in _SIGNALS:
        signal.signal(number, forward)
    status = launcher.wait()
    if status < 0:  # the launcher was ended before it had started the ranks
        terminal.info(terminal.INTERRUPTED)
        sys.exit(exit_codes.EXIT_INTERRUPTED)
    sys.exit(status)


def _ranks_of(deepspeed_pid: int) -> list[psutil.Process]:
    """Return the ranks: the children of the helper process (launch.py) that the `deepspeed` command starts."""
    with contextlib.suppress(psutil.Error):
        return [rank for helper in psutil.Process(deepspeed_pid).children() for rank in helper.children()]
    return []
