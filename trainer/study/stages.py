"""The stages of a study in the order they are run, and the command line of each."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.settings import PlotSettings
from trainer.storage.run_directory import RunDirectory
from trainer.study.data_sets import ProblemSet
from trainer.study.expand import evaluation_directory_of, evaluation_name_of
from trainer.study.study_file import RunSpec, Study

SCRIPTS = {
    "annotate": "annotate.py",
    "prepare": "prepare_shards.py",
    "train": "train.py",
    "convert": "convert_checkpoint.py",
    "evaluate": "evaluate.py",
    "report": "plot_scaling.py",
}
RANKED = ("train", "evaluate")  # run on several ranks
ON_DEVICES = (*RANKED, "annotate")  # a rank on a CUDA device of its own, where there are any


@dataclass(frozen=True)
class Stage:
    """One command. `subject` is the shard set, the run or the study it works on.

    `needs`: labels of the stages that must be done before; labels are unique in a study.
    """

    kind: str  # a key of SCRIPTS
    subject: str
    settings: Any  # of the tool
    log: Path
    num_ranks: int = 1
    detail: str = ""
    run: RunSpec | None = None  # whose stage it is
    needs: tuple[str, ...] = ()
    shards: str = ""  # of an annotation: the shards that are made of it

    @property
    def label(self) -> str:
        return f"{self.kind} {self.subject}{' on ' + self.detail if self.detail else ''}"


def study_stages(study: Study) -> list[Stage]:
    """All stages; run by run, so that the first finished run can be looked at while the others train."""
    problems = [stage for found in study.problem_sets for stage in _of_problems(found, study.directory.logs)]
    runs = [stage for run in study.runs for stage in run_stages(run)]
    plot = PlotSettings(runs=[str(study.directory.path)])
    needs = tuple(stage.label for stage in runs if stage.kind == "evaluate")
    report = Stage("report", study.name, plot, study.directory.logs / "report.log", needs=needs)
    return [*problems, *runs, report]


def _of_problems(problems: ProblemSet, logs: Path) -> list[Stage]:
    name = Path(problems.shards.output_dir).name
    annotate = []
    if problems.annotate:
        log, shards = logs / f"annotate-{name}.log", problems.shards.output_dir
        annotate = [Stage("annotate", name, problems.annotate, log, shards=shards)]
    needs = tuple(stage.label for stage in annotate)
    return [*annotate, Stage("prepare", name, problems.shards, logs / f"prepare-{name}.log", needs=needs)]


def run_stages(run: RunSpec) -> list[Stage]:
    """Training and conversion of a student, and the run's evaluations."""
    directory: RunDirectory = run.directory
    stages = []
    if run.train:
        learned = [prepared(path) for path in (run.train.train_shards, run.train.eval_shards) if path]
        log = directory.log("train")
        train = Stage("train", run.name, run.train, log, run.num_ranks, run=run, needs=tuple(learned))
        log = directory.log("convert")
        convert = Stage("convert", run.name, run.convert, log, run=run, needs=(train.label,))
        stages = [train, convert]
    exports = [f"convert {name}" for name in ((run.name,) if run.train else run.students)]
    for settings in run.evaluations:
        log = directory.log(f"evaluate-{evaluation_name_of(settings)}")
        needs = (*exports, prepared(settings.shards))
        stages.append(
            Stage(
                "evaluate",
                run.name,
                settings,
                log,
                run.num_ranks,
                evaluation_directory_of(settings),
                run,
                needs,
            )
        )
    return stages


def prepared(shards: str) -> str:
    """Label of the stage that makes a shard directory."""
    return f"prepare {Path(shards).name}"


def program(kind: str, tools: Path | None) -> list[str]:
    """Return what follows `python`: the script in `tools`, or the installed module if there is no such folder."""
    if tools is None:
        return ["-m", f"trainer.commands.{Path(SCRIPTS[kind]).stem}"]
    return [str(tools / SCRIPTS[kind])]


def stage_command(
    stage: Stage,
    tools: Path | None,
    launcher: str,
    port: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[str]:
    """The command line. Every setting is a flag, so that the line can be copied and run by hand in that environment.

    `auto`: several ranks train under the deepspeed launcher, which imports torch and deepspeed twice before the first
    rank starts (7 s on two cores); evaluation does not need it and starts under mpiexec (0.03 s) where there is one.
    """
    script = [*program(stage.kind, tools), *to_flags(stage.settings)]
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
    if tools is None:
        script[0] = "--module"
    return [deepspeed(), *_devices(stage.num_ranks, environment), *master_port, *script]


def stage_environment(stage: Stage, cores: int, devices: Sequence[str] = ()) -> dict[str, str]:
    """What a stage finds besides our own environment: threads, or every rank would use all the cores, and its devices.

    `cores` are those for this stage alone. Without `devices` it sees those that we see.
    """
    found = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    if stage.kind in RANKED and "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, cores // stage.num_ranks))
    return found


def to_flags(settings: Any) -> list[str]:
    """Fields that are not at their default, as flags; `--name=value` also holds a value that begins with a dash.

    A list is one flag an item.
    """
    given, positional = [], []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata.get("positional"):
            positional += value if isinstance(value, list) else [value]
        elif isinstance(value, list):
            given += [f"--{field.name}={item}" for item in value]
        elif value != field.default:
            given.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return [*positional, *given]


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
