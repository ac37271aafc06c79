"""The stages of a study in the order they are run, and the command line of each."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.run_directory import RunDirectory
from trainer.settings import PlotSettings
from trainer.study.plan import Run, Study, evaluation_name

SCRIPTS = {
    "prepare": "prepare_shards.py",
    "train": "train.py",
    "convert": "convert_checkpoint.py",
    "evaluate": "evaluate.py",
    "report": "plot_scaling.py",
}
RANKED = ("train", "evaluate")  # run on several ranks


@dataclass(frozen=True)
class Stage:
    """One command. `subject` is the shard set, the run or the study it works on."""

    kind: str  # prepare, train, convert, evaluate, report
    subject: str
    settings: Any  # of the tool
    log: Path
    num_ranks: int = 1
    detail: str = ""
    run: Run | None = None  # whose stage it is

    @property
    def label(self) -> str:
        return f"{self.kind} {self.subject}{' on ' + self.detail if self.detail else ''}"


def of_study(study: Study) -> list[Stage]:
    """All stages; run by run, so that the first finished run can be looked at while the others train."""
    prepare = [
        Stage(
            "prepare",
            Path(s.output_dir).name,
            s,
            study.directory.logs / f"prepare-{Path(s.output_dir).name}.log",
        )
        for s in study.shards
    ]
    plot = PlotSettings(runs=[str(study.directory.path)])
    report = Stage("report", study.name, plot, study.directory.logs / "report.log")
    return [*prepare, *(stage for run in study.runs for stage in of_run(run, study.num_ranks)), report]


def of_run(run: Run, num_ranks: int) -> list[Stage]:
    directory: RunDirectory = run.directory
    train = Stage("train", run.name, run.train, directory.log("train"), num_ranks, run=run)
    convert = Stage("convert", run.name, run.convert, directory.log("convert"), run=run)
    evaluate = []
    for settings in run.evaluations:
        name = evaluation_name(settings)
        log = directory.log(f"evaluate-{name}")
        detail = Path(settings.shards).name
        evaluate.append(Stage("evaluate", run.name, settings, log, num_ranks, detail, run))
    return [train, convert, *evaluate]


def command(stage: Stage, tools: Path, launcher: str, port: int | None = None) -> list[str]:
    """The command line. Every setting is a flag, so that the line can be copied and run by hand.

    `auto`: several ranks train under the deepspeed launcher, which imports torch and deepspeed twice before the first
    rank starts (7 s on two cores); evaluation does not need it and starts under mpiexec (0.03 s) where there is one.
    """
    script = [str(tools / SCRIPTS[stage.kind]), *_flags(stage.settings)]
    if stage.kind not in RANKED or (stage.num_ranks == 1 and launcher == "auto"):
        return [sys.executable, *script]
    if launcher == "mpiexec" or (launcher == "auto" and stage.kind == "evaluate" and _own_mpiexec()):
        mpiexec = _own_mpiexec() or shutil.which("mpiexec")
        if not mpiexec:
            raise UserError(
                "launcher is mpiexec, but there is none on the PATH; pip install mpich, or use deepspeed"
            )
        return [mpiexec, "-n", str(stage.num_ranks), sys.executable, *script]
    master_port = [f"--master_port={port}"] if port else []
    return [deepspeed(), *_devices(stage.num_ranks, os.environ), *master_port, *script]


def environment(stage: Stage, cores: int) -> dict[str, str]:
    """What a stage finds besides our own environment: threads, or every rank would use all the cores."""
    if stage.kind not in RANKED or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores // stage.num_ranks))}


def _flags(settings: Any) -> list[str]:
    """Fields that are not at their default, as flags; `--name=value` also holds a value that begins with a dash."""
    flags, positional = [], []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata.get("positional"):
            positional += value if isinstance(value, list) else [value]
        elif value != field.default:
            flags.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return [*positional, *flags]


def _beside_python(name: str) -> str | None:
    """A command of our own virtual environment, activated or not."""
    path = Path(sys.executable).parent / name
    return str(path) if os.access(path, os.X_OK) else None


def _own_mpiexec() -> str | None:
    """mpiexec of this virtual environment. Another one may not fit mpi4py: every rank would believe to be alone."""
    return _beside_python("mpiexec") if importlib.util.find_spec("mpi4py") else None


def deepspeed() -> str:
    found = _beside_python("deepspeed") or shutil.which("deepspeed")
    if not found:
        raise UserError(f"there is no deepspeed command beside {sys.executable}; pip install deepspeed")
    return found


def _devices(num_ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Which devices: with --num_gpus the launcher would drop CUDA_VISIBLE_DEVICES and take the first ones."""
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not visible:
        return ["--num_gpus", str(num_ranks)]
    devices = visible.split(",")
    if not all(device.isdigit() for device in devices):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible}: the deepspeed launcher takes device numbers only; "
            "unset it, or set 'launcher: mpiexec' in the study"
        )
    if len(devices) < num_ranks:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible} has {len(devices)} devices for num_ranks {num_ranks}"
        )
    return [f"--include=localhost:{','.join(devices[:num_ranks])}"]
