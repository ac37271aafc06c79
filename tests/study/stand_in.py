"""Fast replacement for every tool of a study; the file name selects the tool.

--config_overrides of a training selects its behaviour: `exit=3`, `sleep` (saves on SIGTERM), `sleep=3` (saves, and waits
until 3 ranks of all trainings have saved), `deaf` (ignores SIGTERM), `early` (exits with 0 before its last step),
`meet=2` (waits until 2 trainings have started), `until=FILE` (waits for a file), `orphan` (leaves a process behind).

Every stage of a study appends its start and its end to events.txt.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainer.runtime import distributed
from trainer.storage import atomic_dir
from trainer.storage.run_directory import (
    AnnotationDirectory,
    EvaluationDirectory,
    RunDirectory,
    StudyDirectory,
)
from trainer.study import processes

flags = dict(part[2:].split("=", 1) for part in sys.argv[1:] if part.startswith("--") and "=" in part)
environment = distributed.environment_from_launcher(os.environ)


def annotate() -> None:
    directory = AnnotationDirectory(Path(flags["output_dir"]))
    recipe = {"data": "svamp", "style": flags.get("style", "socratic")}
    facts = {"recipe": recipe, "summary": {"problems": {"annotated": 600, "unannotated": 90}}}
    with atomic_dir.atomic_directory(directory.result, "annotations", facts) as staging:
        (staging / "annotated.jsonl").write_text("{}\n")


def prepare_shards() -> None:
    path = flags.get("data_path", "")
    if path.endswith(".jsonl") and not Path(path).is_file():
        sys.exit(f"error: there is no {path}")
    recipe = {"data": flags.get("data", "stories"), "num_problems": int(flags.get("num_problems", 4000))}
    facts = {"recipe": recipe, "num_problems": 30, "vocabulary_size": 1024}
    with atomic_dir.atomic_directory(Path(flags["output_dir"]), "shards", facts):
        pass


def train() -> None:
    run, behaviour = RunDirectory(Path(flags["output_dir"])), flags.get("config_overrides", "")
    run.path.mkdir(parents=True, exist_ok=True)
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour.startswith("sleep"):
        signal.signal(signal.SIGTERM, lambda *_: save(run, int(behaviour[6:] or 0)))
    if behaviour.startswith(("sleep", "deaf")):
        atomic_dir.write_text(run.path / f"pid-{environment.rank}", str(os.getpid()))
        time.sleep(300)
    os.write(1, b"a line before the end\n")  # one call: the ranks share the log, and print may split a line
    if behaviour.startswith("meet="):
        atomic_dir.write_text(run.path / "started", "")
        wait_for(lambda: len(list(run.path.parent.glob("*/started"))) >= int(behaviour[5:]))
    if behaviour.startswith("until="):
        atomic_dir.write_text(run.path / "started", "")
        wait_for(Path(behaviour[6:]).exists)
    if behaviour == "orphan":
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True
        )
        atomic_dir.write_text(run.path / "pid-orphan", str(child.pid))
        sys.exit(1)
    if behaviour == "exit=1":
        os.write(2, b"error: the learning rate is cursed\n")
    if behaviour.startswith("exit="):
        sys.exit(int(behaviour[5:]))
    if environment.rank == 0 and behaviour != "early":
        lines = [json.dumps({"step": step, "loss": 2.0 / step, "epoch": step / 2}) for step in (1, 2)]
        atomic_dir.write_text(run.metrics, "\n".join(lines) + "\n")
        atomic_dir.write_text(run.settings, "method: cot\n")
        seen = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
        facts = {"finished": True, "environment": seen}
        with atomic_dir.atomic_directory(run.checkpoint(2), "checkpoint", facts):
            pass


def save(run: RunDirectory, num_ranks: int) -> None:
    atomic_dir.write_text(run.path / f"saved-{environment.rank}", "")
    if num_ranks:
        wait_for(lambda: len(list(run.path.parent.glob("*/saved-*"))) >= num_ranks)
        atomic_dir.write_text(run.path / f"together-{environment.rank}", "")
    sys.exit(0)


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll for 30 s; exit with an error if the condition stays false."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("error: timed out")
        time.sleep(0.02)


def convert_checkpoint() -> None:
    with atomic_dir.atomic_directory(Path(flags["output_dir"]), "export", {"finished": True}) as staging:
        (staging / "model.safetensors").write_bytes(bytes(1000))


def evaluate() -> None:
    models = [
        flags[name] for name in ("model_name_or_path", "decomposer", "solver", "planner") if name in flags
    ]
    for model in models:
        if model.endswith("export") and not atomic_dir.is_complete(Path(model)):
            sys.exit(f"error: there is no {model}")
    if environment.rank == 0:
        run = RunDirectory(Path(flags["output_dir"]).parent.parent)
        if not run.settings.is_file():  # a run without training
            atomic_dir.write_text(run.settings, json.dumps(flags))
        score = {"correct": 20, "n": 30, "accuracy": 20 / 30, "low": 0.488, "high": 0.808}
        results = EvaluationDirectory(Path(flags["output_dir"])).results
        atomic_dir.write_text(results, json.dumps({"accuracy": {"strict": score}}))


def plot_scaling() -> None:
    report = StudyDirectory(Path(sys.argv[1])).report
    atomic_dir.write_text(report / "results.json", json.dumps({"headlines": ["Steps help."]}))
    atomic_dir.write_text(report / "index.html", "<h1>report</h1>")


def record(event: str) -> None:
    """Append the event in one write, so that lines of parallel stages are in order."""
    if stage := os.environ.get(processes.STAGE_VARIABLE):
        with open("events.txt", "a", buffering=1) as file:
            file.write(f"{event} {stage}\n")


if __name__ == "__main__":
    record("start")
    try:
        globals()[Path(__file__).stem]()
    finally:
        record("end")
