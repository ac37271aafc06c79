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
RANKED = ("train", "evaluate")  # run on several ranks
ON_DEVICES = (*RANKED, "annotate")  # each rank uses one CUDA device, if there are any


@dataclass(frozen=True)
class Stage:
    """One command. `subject`: the shard set, run or study that it processes.

    `needs`: labels of the stages that must be done first; labels are unique in a study.
    """

    kind: str  # a key of SCRIPTS
    subject: str
    settings: Any  # a dataclass of the tool's settings
    log: Path
    num_ranks: int = 1
    detail: str = ""
    run: RunSpec | None = None
    needs: tuple[str, ...] = ()
    shards: str = ""  # annotate only: the shards made from it

    @property
    def label(self) -> str:
        return f"{self.kind} {self.subject}{' on ' + self.detail if self.detail else ''}"


def study_stages(study: Study) -> list[Stage]:
    """Return all stages, run by run, so that the first run is finished while others still train."""
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
    """Return training, conversion and evaluations of a run, as far as it has them."""
    directory, stages = run.directory, []
    if run.train:
        shards = (run.train.train_shards, run.train.eval_shards)
        needs = tuple(prepare_label(path) for path in shards if path)
        train = Stage(
            "train", run.name, run.train, directory.log("train"), run.num_ranks, run=run, needs=needs
        )
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
    """Return the command line of a stage. Every setting is a flag, so that it can be copied and run by hand.

    `auto`: several ranks train under the deepspeed launcher, which imports torch and deepspeed twice before the first
    rank starts (7 s on two cores); evaluation uses mpiexec (0.03 s) if the environment has it.
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
    return [deepspeed_command(), *_device_flags(stage.num_ranks, environment), *master_port, *script]


def stage_environment(stage: Stage, cores: int, devices: Sequence[str] = ()) -> dict[str, str]:
    """Return variables to add to a stage's environment: its devices, and threads per rank (torch's default: all cores).

    `cores`: number of cores for this stage. Without `devices` it inherits CUDA_VISIBLE_DEVICES.
    """
    variables = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}
    if stage.kind in RANKED and "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, cores // stage.num_ranks))
    return variables


def to_flags(settings: Any) -> list[str]:
    """Return fields that differ from their default as flags, one for each item of a list.

    `--name=value` also works for a value that begins with a dash.
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
    """Return a command of this Python's virtual environment, even if it is not activated."""
    path = Path(sys.executable).parent / name
    return str(path) if os.access(path, os.X_OK) else None


def _own_mpiexec() -> str | None:
    """Return mpiexec of this virtual environment; under another MPI than mpi4py's every world size would be 1."""
    return _beside_python("mpiexec") if importlib.util.find_spec("mpi4py") else None


def deepspeed_command() -> str:
    command = _beside_python("deepspeed") or shutil.which("deepspeed")
    if not command:
        raise UserError(f"there is no deepspeed command beside {sys.executable}; pip install deepspeed")
    return command


def _device_flags(num_ranks: int, environment: Mapping[str, str]) -> list[str]:
    """Return the launcher's device flags; with --num_gpus it ignores CUDA_VISIBLE_DEVICES and takes the first ones."""
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
