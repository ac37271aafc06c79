"""Paths of the files of runs, evaluations, studies and annotations. Other modules must not repeat the file names."""

import re
from dataclasses import dataclass
from pathlib import Path

_CHECKPOINT = re.compile(r"step-(\d{6,})")


def evaluation_name(*parts: str, calculator: bool = True, temperature: float = 0.0, seed: int = 0) -> str:
    """Return the name of an evaluation: `parts` (data, split, mode) and suffixes, joined with "-".

    Suffixes: "no_calculator" without a calculator; "t<temperature>" and "s<seed>" if the temperature is not 0.
    """
    suffixes = [] if calculator else ["no_calculator"]
    if temperature:
        suffixes += [f"t{temperature:g}", f"s{seed}"]
    return "-".join([*parts, *suffixes])


def parse_run_name(name: str) -> tuple[str, str, str, int | None]:
    """Split <data>.<method>.<model>.s<seed> into (data, method, model, seed); the model may contain dots.

    Returns ("", "", "", None) for any other name.
    """
    parts = name.split(".")
    if len(parts) < 4 or not parts[-1].startswith("s") or not parts[-1][1:].isdecimal():
        return "", "", "", None
    return parts[0], parts[1], ".".join(parts[2:-1]), int(parts[-1][1:])


class _Child:
    """Descriptor of `_Directory` classes. Its value is the path of the file or folder `name` in the directory."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, directory: "_Directory", owner: type) -> Path:
        return directory.path / self._name


@dataclass(frozen=True)
class _Directory:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class EvaluationDirectory(_Directory):
    """Paths in `evaluation/<name>/`: predictions of each rank, merged predictions, and results."""

    results = _Child("results.json")
    predictions = _Child("predictions.jsonl")
    rank_files = _Child("parts")
    restarts = _Child("restarts.json")  # count of scheduler restarts (restarts.py)
    logs = _Child("logs")


@dataclass(frozen=True)
class RunDirectory(_Directory):
    """Paths in `runs/<study>/<run>/`, the output of one run: a training, or evaluations without training."""

    settings = _Child("settings.yaml")
    ds_config = _Child("ds_config.json")
    environment = _Child("environment.json")
    metrics = _Child("metrics.jsonl")
    model = _Child("model")  # config and tokenizer of the model, no weights; every checkpoint has a copy
    restarts = _Child("restarts.json")  # count of scheduler restarts (restarts.py)
    wandb_id = _Child("wandb_id")
    logs = _Child("logs")
    lock = _Child("lock")  # exists while a job trains here (directory_lock.py)
    heartbeats = _Child("heartbeats")  # one file per rank: heartbeat counter, last step and process identity
    checkpoints = _Child("checkpoints")
    export = _Child("export")
    evaluations = _Child("evaluation")

    def log(self, stage: str) -> Path:
        """Return the log file of a stage, e.g. "train"."""
        return self.logs / f"{stage}.log"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def checkpoint_steps(self) -> list[int]:
        """Return the steps of all checkpoint directories on disk, valid or not, in ascending order."""
        matches = (_CHECKPOINT.fullmatch(path.name) for path in _folders_in(self.checkpoints))
        return sorted(int(match[1]) for match in matches if match)

    def evaluation(self, name: str) -> EvaluationDirectory:
        return EvaluationDirectory(self.evaluations / name)

    def evaluation_names(self) -> list[str]:
        return [path.name for path in _folders_in(self.evaluations)]


@dataclass(frozen=True)
class StudyDirectory(_Directory):
    """Paths in `runs/<study>/`: the runs of a study and their report."""

    settings = _Child("study.yaml")
    lock = _Child("lock")  # exists while a process runs or submits the study (directory_lock.py)
    report = _Child("report")
    slurm = _Child("slurm")  # batch scripts, list of submitted jobs, output of the jobs
    logs = _Child("logs")

    def run(self, name: str) -> RunDirectory:
        return RunDirectory(self.path / name)

    def runs(self) -> list[RunDirectory]:
        """Return the runs on disk, sorted by name. A folder is a run if it contains run settings."""
        return [run for run in map(RunDirectory, _folders_in(self.path)) if run.settings.is_file()]


def pair_run(method: str, runs: list[RunDirectory]) -> RunDirectory | None:
    """Return the run directory in which the trained models of `runs` are evaluated together by `method`.

    The directory's name joins the models' names with "+". Returns None if the runs' study, data or seed differ or are unknown.
    """
    names = [parse_run_name(run.name) for run in runs]
    data, _, _, seed = names[0]
    studies = {run.path.resolve().parent for run in runs}
    if len(studies) > 1 or any((name[0], name[3]) != (data, seed) for name in names):
        return None
    models = "+".join(dict.fromkeys(model for _, _, model, _ in names))
    return RunDirectory(runs[0].path.parent / f"{data}.{method}.{models}.s{seed}") if data else None


@dataclass(frozen=True)
class AnnotationDirectory(_Directory):
    """Paths in `annotations/<name>/`: a teacher's responses, and the problems with accepted steps."""

    responses = _Child("responses.jsonl")  # all responses, one per line; a repeated command appends more
    corrupt_lines = _Child("responses.damaged.txt")  # partial lines, removed from the end of `responses`
    lock = _Child("lock")  # exists while a process annotates here (directory_lock.py)
    logs = _Child("logs")
    result = _Child("result")  # published atomically: annotated.jsonl, rejected.jsonl, summary.json, ...


def _folders_in(path: Path) -> list[Path]:
    """Return the folders in `path`, sorted by name; [] if `path` does not exist."""
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
