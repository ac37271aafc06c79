"""The stages of a study in the order of execution, and the command line of each stage."""

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
from trainer.study.expand import evaluation_variant
from trainer.study.study_file import RunSpec, Study

SCRIPTS = {
    "annotate": "annotate.py",
    "prepare": "prepare_shards.py",
    "train": "train.py",
    "convert": "convert_checkpoint.py",
    "evaluate": "evaluate.py",
    "report": "plot_scaling.py",
}
MULTI_RANK_KINDS = ("train", "evaluate")  # stages of these kinds can run on several ranks
FORKED_KINDS = ("train", "convert", "evaluate")  # stages that can run in a fork of a server (fork_server.py)
ON_DEVICES = (*MULTI_RANK_KINDS, "annotate")  # each rank uses one CUDA device, if there are any


@dataclass(frozen=True)
class Stage:
    """One command of a study."""

    kind: str  # a key of SCRIPTS
    subject: str  # name of the shard set, run or study that the command processes
    settings: Any  # settings dataclass of the command
    log: Path
    num_ranks: int = 1
    detail: str = ""
    run: RunSpec | None = None
    needs: tuple[str, ...] = ()  # labels of the stages that must be done first; labels are unique in a study
    shards: str = ""  # annotate only: directory of the shards that are made from the annotations

    @property
    def label(self) -> str:
        return f"{self.kind} {self.subject}{' on ' + self.detail if self.detail else ''}"


def study_stages(study: Study) -> list[Stage]:
    """Return all stages: data first, then the runs one by one (so that the first run is complete early), then the report."""
    stages, logs = [], study.directory.logs
    for problems in study.problem_sets:
        shards = problems.shards.output_dir
        name, needs = Path(shards).name, tuple[str, ...]()
        if problems.annotate:
            log = logs / f"annotate-{name}.log"
            stages.append(Stage("annotate", name, problems.annotate, log, shards=shards))
            needs = (stages[-1].label,)
        stages.append(Stage("prepare", name, problems.shards, logs / f"prepare-{name}.log", needs=needs))
    for run in study.runs:
        stages += run_stages(run)
    plot = PlotSettings(runs=[str(study.directory.path)])
    evaluations = tuple(stage.label for stage in stages if stage.kind == "evaluate")
    return [*stages, Stage("report", study.name, plot, logs / "report.log", needs=evaluations)]


def run_stages(run: RunSpec) -> list[Stage]:
    """Return the training, the conversion and the evaluations of a run. A run without training has only evaluations."""
    directory, stages = run.directory, []
    if run.train:
        shards = (run.train.train_shards, run.train.eval_shards)
        needs = tuple(prepare_label(path) for path in shards if path)
        train = Stage("train", run.name, run.train, directory.log("train"), run.num_ranks, "", run, needs)
        log = directory.log("convert")
        stages = [train, Stage("convert", run.name, run.convert, log, run=run, needs=(train.label,))]
    exports = [f"convert {name}" for name in ((run.name,) if run.train else run.trained_runs)]
    for settings in run.evaluations:
        log = directory.log(f"evaluate-{Path(settings.output_dir).name}")
        variant = evaluation_variant(settings)
        required = (*exports, prepare_label(settings.shards))
        stages.append(Stage("evaluate", run.name, settings, log, run.num_ranks, variant, run, required))
    return stages


def prepare_label(shards: str) -> str:
    """Return the label of the stage that makes a shard directory."""
    return f"prepare {Path(shards).name}"


def python_arguments(kind: str, scripts_dir: Path | None) -> list[str]:
    """Return the arguments of `python` that start a stage: a script's path, or `-m` and a module if `scripts_dir` is None."""
    if scripts_dir is None:
        return ["-m", f"trainer.commands.{Path(SCRIPTS[kind]).stem}"]
    return [str(scripts_dir / SCRIPTS[kind])]


def stage_command(
    stage: Stage,
    scripts_dir: Path | None,
    launcher: str,
    port: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[str]:
    """Return the command line of a stage. Settings are flags, so that a user can copy and run the command line.

    A stage of one rank needs no launcher. With the launcher `auto`, stages of several ranks run under deepspeed, except that
    evaluations run under mpiexec if the virtual environment has mpiexec and mpi4py. On two cores, the first rank starts after
    7 s with deepspeed and after 0.03 s with mpiexec. Raises UserError if the launcher's command is missing.
    """
    script = [*python_arguments(stage.kind, scripts_dir), *to_flags(stage.settings)]
    if stage.num_ranks == 1:
        return [sys.executable, *script]
    if launcher == "mpiexec" or (launcher == "auto" and stage.kind == "evaluate" and _own_mpiexec()):
        mpiexec = _own_mpiexec() or shutil.which("mpiexec")
        if not mpiexec:
            raise UserError("launcher: no mpiexec is on the PATH; pip install mpich, or use deepspeed")
        return [mpiexec, "-n", str(stage.num_ranks), sys.executable, *script]
    master_port = [f"--master_port={port}"] if port else []
    if scripts_dir is None:
        script[0] = "--module"
    return [deepspeed_command(), *_device_flags(stage.num_ranks, environment), *master_port, *script]


def stage_environment(stage: Stage, cores: int, devices: Sequence[str] = ()) -> dict[str, str]:
    """Return variables to add to a stage's environment. Without `devices`, the stage inherits CUDA_VISIBLE_DEVICES."""
    variables = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    # By default, each rank would start one thread per core.
    if stage.kind in MULTI_RANK_KINDS and "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, cores // stage.num_ranks))
    return variables


def to_flags(settings: Any) -> list[str]:
    """Return the command-line arguments of a settings dataclass: positional fields first, then flags `--name=value`.

    A list gives one flag per item. Any other field gives a flag only if its value is not the default.
    """
    flags, positional = [], []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata.get("positional"):
            positional += value if isinstance(value, list) else [value]
        elif isinstance(value, list):
            flags += [f"--{field.name}={item}" for item in value]
        elif value != field.default:
            flags.append(f"--{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return [*positional, *flags]


def _beside_python(name: str) -> str | None:
    """Return the path of a command in this Python's virtual environment (activated or not); None if the command is missing."""
    path = Path(sys.executable).parent / name
    return str(path) if os.access(path, os.X_OK) else None


def _own_mpiexec() -> str | None:
    """Return the mpiexec beside this Python, or None if mpiexec or mpi4py is missing."""
    # Under an mpiexec that is not of mpi4py's MPI library, each process would have world size 1.
    return _beside_python("mpiexec") if importlib.util.find_spec("mpi4py") else None


def deepspeed_command() -> str:
    """Return the path of the deepspeed command. Raises UserError if there is none."""
    command = _beside_python("deepspeed") or shutil.which("deepspeed")
    if not command:
        raise UserError(f"there is no deepspeed command beside {sys.executable}; pip install deepspeed")
    return command


def _device_flags(num_ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Return flags that select devices for the deepspeed launcher, whose --num_gpus ignores CUDA_VISIBLE_DEVICES."""
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
        raise UserError(f"CUDA_VISIBLE_DEVICES={visible} has {len(devices)} devices for {num_ranks} ranks")
    return [f"--include=localhost:{','.join(devices[:num_ranks])}"]
