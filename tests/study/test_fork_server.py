"""Stages that are forks of a server do what their command lines do alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from trainer.storage.run_directory import RunDirectory, StudyDirectory
from trainer.study import processes
from trainer.study.fork_server import ForkedStage, ForkServer

REPOSITORY = Path(__file__).parents[2]
SCRIPT = """
import json, os, sys, torch
print(json.dumps({"argv": sys.argv, "variables": dict(os.environ), "threads": torch.get_num_threads(), "name": __name__,
                  "folder": os.getcwd(), "session": os.getsid(0) == os.getpid(), "random": __import__("random").random()}))
print("to stderr", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyDirectory:
    return StudyDirectory(tmp_path_factory.mktemp("fork") / "runs" / "tiny")


@pytest.fixture(scope="module")
def server(study: StudyDirectory) -> Iterator[ForkServer]:
    stop = forkserver._forkserver._stop  # type: ignore[attr-defined]
    stop()  # a process has one fork server, and other tests of this process may have started it
    yield ForkServer(study, num_threads=1)
    processes.end_processes(study, 0.0)
    stop()


Start = Callable[..., ForkedStage]


@pytest.fixture
def start(server: ForkServer, study: StudyDirectory, tmp_path: Path) -> Start:
    """Return a function that starts Python source code as the stage `label`, with output to tmp_path/log."""

    def start(source: str, label: str = "train a", **variables: str) -> ForkedStage:
        script = tmp_path / f"{label.split()[-1]}.py"
        script.write_text(source)
        return server.start([str(script), "--flag=1"], label, tmp_path / "log", variables)

    return start


def wait(stage: ForkedStage) -> int:
    deadline = time.monotonic() + 120
    while stage.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert stage.returncode is not None
    return stage.returncode


def test_a_fork_is_as_the_script_alone(start: Start, study: StudyDirectory, tmp_path: Path) -> None:
    assert wait(start(SCRIPT, OMP_NUM_THREADS="1", EXTRA="x")) == 0
    first, second = (tmp_path / "log").read_text().splitlines()
    assert second == "to stderr"
    forked = json.loads(first)
    variables = processes.stage_variables(study, "train a", {"OMP_NUM_THREADS": "1", "EXTRA": "x"})
    command = [sys.executable, str(tmp_path / "a.py"), "--flag=1"]
    output = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, start_new_session=True, check=True
    )
    alone = json.loads(output.stdout)
    assert forked.pop("random") != alone.pop("random")
    assert forked == alone
    assert wait(start(SCRIPT)) == 0
    assert json.loads((tmp_path / "log").read_text().splitlines()[2])["random"] != forked.get("random")


@pytest.mark.parametrize(
    ("ending", "code"),
    [("sys.exit(75)", 75), ("os.kill(os.getpid(), 9)", -9), ("1 / 0", 1), ("os._exit(3)", 3)],
)
def test_exit_codes(start: Start, tmp_path: Path, ending: str, code: int) -> None:
    assert wait(start(f"import os, sys; {ending}")) == code
    assert ("ZeroDivisionError" in (tmp_path / "log").read_text()) == (ending == "1 / 0")


def test_the_processes_of_a_stage_are_found_and_ended(start: Start, study: StudyDirectory) -> None:
    """A child process of a forked stage is found too, but not the server, which has no label."""
    source = "import subprocess, time; subprocess.Popen(['sleep', '300']); time.sleep(300)"
    one, other = start(source, "train one"), start(source, "train other on stories-test")
    deadline = time.monotonic() + 60
    while len(found := processes.processes_of_study(study, "train one")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert one.pid in {process.pid for process in found} and len(found) == 2
    assert processes.end_processes(study, 5.0, stage="train one") == []
    assert wait(one) == -signal.SIGTERM
    assert other.poll() is None
    assert {process.pid for process in processes.processes_of_study(study)} > {other.pid}
    assert processes.end_processes(study, 5.0) == []
    assert processes.processes_of_study(study) == []
    assert wait(start("pass", "train again")) == 0, "the server is still alive"


def test_a_forked_training_gives_the_bits_of_its_command(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    shards = tmp_path / "shards"
    prepare = [
        "tools/prepare_shards.py",
        "--tokenizer_name=stories",
        "--num_problems=60",
        f"--output_dir={shards}",
    ]
    subprocess.run([sys.executable, *prepare], check=True, stdout=subprocess.DEVNULL)
    variables = {"OMP_NUM_THREADS": "1"}
    runs = [RunDirectory(tmp_path / name / "stories.cot.a.s0") for name in ("forked", "alone")]
    for run in runs:
        flags = [f"--train_shards={shards}", f"--output_dir={run.path}", "--method=cot", "--max_steps=6"]
        train = ["tools/train.py", *flags, "--config_name=stories-0.03m", "--learning_rate=1e-3"]
        convert = ["tools/convert_checkpoint.py", str(run.path)]
        for arguments in (train, convert):
            if run is runs[0]:
                assert wait(server.start(arguments, arguments[0], tmp_path / "log", variables)) == 0
            else:
                subprocess.run([sys.executable, *arguments], env={**os.environ, **variables}, check=True)
    weights = [(run.export / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    losses = [[json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    environments = [json.loads(run.environment.read_text()) for run in runs]
    commands = [environment.pop("command") for environment in environments]
    assert environments[0] == environments[1]
    assert [part.replace("/forked/", "/alone/") for part in commands[0]] == commands[1]
