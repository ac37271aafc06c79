"""Run the scaling study in pieces: python -m benchmarks.gpu.study [--tiny] [--seconds 540]

Runs studies/stories_scaling.yaml until it is done or the time is over; then stages save and stop, and the same command
continues (exit status 75). At the end the plots and results of the report are copied to studies/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu import cases, facts
from benchmarks.gpu.run import MORE_TO_DO
from benchmarks.harness import REPOSITORY

STUDY = REPOSITORY / "studies" / "stories_scaling.yaml"
GRACE_SECONDS = 90  # to save the largest model
PARALLEL = 14  # stages at the same time: they share the GPU, but loading libraries and starting kernels is the host's work
KEPT = ("accuracy_vs_parameters.png", "accuracy_by_num_steps.png", "results.json")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="one small size, few problems")
    parser.add_argument("--seconds", type=float, default=540, help="be done within about this time")
    chosen = parser.parse_args()
    file, runs = (tiny_study(), cases.folder(True)) if chosen.tiny else (STUDY, REPOSITORY)
    command = [sys.executable, "tools/study.py", "run", str(file)]
    command += ["--num_parallel", str(1 if chosen.tiny else min(PARALLEL, os.cpu_count() or 1))]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        status = process.wait(timeout=max(1.0, chosen.seconds - GRACE_SECONDS))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # the study ends its stages, which save
        process.wait()
        subprocess.run([sys.executable, "tools/study.py", "status", str(file)], cwd=REPOSITORY)
        return MORE_TO_DO
    if status == 0:
        keep(runs / "runs" / file.stem / "report", cases.folder(True) if chosen.tiny else STUDY.parent)
    return status


def keep(report: Path, target: Path) -> None:
    for name in KEPT:
        shutil.copyfile(report / name, target / f"{STUDY.stem}_{name}")
    print(f"measured on {facts.device()}; copied to {target}: {STUDY.stem}_*")


def tiny_study() -> Path:
    """Write the study with two methods, one small model, few problems and few steps; return its file."""
    content: dict[str, Any] = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    folder = cases.folder(True)
    content |= {
        "study": "stories_scaling_tiny",
        "shards_dir": str(folder / "shards"),
        "output_dir": str(folder / "runs"),
        "models": {"0.2m": {"config_name": "stories-0.2m"}},
    }
    for name, problems in (("train", 120), ("test", 6)):
        content["data"]["stories"][name]["num_problems"] = problems
    content["methods"] = {name: None for name in ("cot", "iterative_interleaved")}
    content["prepare"]["num_processes"] = 1
    content["train"] |= {"max_steps": 4, "per_device_train_batch_size": 2}
    content["evaluate"] |= {"dtype": "fp32", "batch_size": 6, "max_new_tokens": 24}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stories_scaling_tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
