"""Stands for every tool of a study, by the name it is copied to: quick, and failing or sleeping when asked to.

What it is to do stands in --config_overrides: `exit=3`, `sleep` (saves on SIGTERM), `deaf` (sleeps through SIGTERM),
`early` (ends well without having finished).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from trainer import commit, distributed
from trainer.run_directory import AnnotationDirectory, EvaluationDirectory, RunDirectory, StudyDirectory

flags = dict(part[2:].split("=", 1) for part in sys.argv[1:] if part.startswith("--") and "=" in part)
world = distributed.discover(os.environ)


def annotate() -> None:
    directory = AnnotationDirectory(Path(flags["output_dir"]))
    recipe = {"data": "svamp", "style": flags.get("style", "socratic")}
    facts = {"recipe": recipe, "summary": {"problems": {"annotated": 600, "unannotated": 90}}}
    with commit.directory(directory.result, "annotations", facts) as staging:
        (staging / "annotated.jsonl").write_text("{}\n")


def prepare_shards() -> None:
    path = flags.get("data_path", "")
    if path.endswith(".jsonl") and not Path(path).is_file():
        sys.exit(f"error: there is no {path}")
    recipe = {"data": flags.get("data", "stories"), "num_problems": int(flags.get("num_problems", 4000))}
    facts = {"recipe": recipe, "num_problems": 30, "vocabulary_size": 1024}
    with commit.directory(Path(flags["output_dir"]), "shards", facts):
        pass


def train() -> None:
    run, wish = RunDirectory(Path(flags["output_dir"])), flags.get("config_overrides", "")
    run.path.mkdir(parents=True, exist_ok=True)
    if wish == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if wish == "sleep":
        signal.signal(signal.SIGTERM, lambda *_: save(run))
    if wish in ("sleep", "deaf"):
        commit.write_text(run.path / f"pid-{world.rank}", str(os.getpid()))
        time.sleep(300)
    os.write(
        1, b"a line before the end\n"
    )  # one call: the ranks share the log, and print makes two of a line
    if wish == "exit=1":
        os.write(2, b"error: the learning rate is cursed\n")
    if wish.startswith("exit="):
        sys.exit(int(wish[5:]))
    if world.rank == 0 and wish != "early":
        lines = [json.dumps({"step": step, "loss": 2.0 / step, "epoch": step / 2}) for step in (1, 2)]
        commit.write_text(run.metrics, "\n".join(lines) + "\n")
        commit.write_text(run.settings, "method: cot\n")
        facts = {"finished": True, "omp": os.environ.get("OMP_NUM_THREADS")}
        with commit.directory(run.checkpoint(2), "checkpoint", facts):
            pass


def save(run: RunDirectory) -> None:
    commit.write_text(run.path / f"saved-{world.rank}", "")
    sys.exit(0)


def convert_checkpoint() -> None:
    with commit.directory(Path(flags["output_dir"]), "export", {"finished": True}) as staging:
        (staging / "model.safetensors").write_bytes(bytes(1000))


def evaluate() -> None:
    students = [
        flags[name] for name in ("model_name_or_path", "decomposer", "solver", "planner") if name in flags
    ]
    for student in students:
        if student.endswith("export") and not commit.is_finished(Path(student)):
            sys.exit(f"error: there is no {student}")
    if world.rank == 0:
        run = RunDirectory(Path(flags["output_dir"]).parent.parent)
        if not run.settings.is_file():  # nothing was trained here
            commit.write_text(run.settings, json.dumps(flags))
        score = {"correct": 20, "n": 30, "accuracy": 20 / 30, "low": 0.488, "high": 0.808}
        results = EvaluationDirectory(Path(flags["output_dir"])).results
        commit.write_text(results, json.dumps({"accuracy": {"strict": score}}))


def plot_scaling() -> None:
    report = StudyDirectory(Path(sys.argv[1])).report
    commit.write_text(report / "results.json", json.dumps({"headlines": ["Steps help."]}))
    commit.write_text(report / "index.html", "<h1>report</h1>")


if __name__ == "__main__":
    globals()[Path(__file__).stem]()
