"""The installed package: what it requires, what it contains, and that it runs without the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.test_imports import TRAINER, files, imports, module_file
from trainer.commands.extras import EXTRAS, needs_extra, require_extra
from trainer.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
COMPUTE = ("training", "evaluation", "export", "shards")  # packages that run on compute nodes
OWN_SEVEN = {"deepspeed", "torch", "transformers", "datasets", "mpi4py", "wandb", "safetensors"}
IMPORT_NAMES = {"pyyaml": "yaml", "myst-parser": "myst_parser"}  # others: the distribution's name
NOT_IN_CORE = {"statsmodels", "matplotlib", "sacrebleu", "openai", "sphinx", "myst_parser", "furo", "pytest"}
STUDY = {
    "study": "tiny",
    "data": {"stories": {"train": {"num_problems": 60}, "test": {"num_problems": 4}}},
    "models": {"small": {"config_name": "stories-0.2m"}},
    "methods": ["answer_only"],
    "prepare": {"tokenizer_name": "stories"},
    "train": {"max_steps": 1, "pack_length": 256},
    "evaluate": {"max_new_tokens": 4},
}


def names(requirements: list[str]) -> set[str]:
    """Names to import of a list of requirements."""
    found = {re.split(r"[^A-Za-z0-9_.-]", text, maxsplit=1)[0].lower() for text in requirements}
    return {IMPORT_NAMES.get(name, name) for name in found}


REQUIRED = names(PROJECT["dependencies"])
OPTIONAL = {extra: names(found) for extra, found in PROJECT["optional-dependencies"].items()}


def test_the_core_requires_the_seven_libraries() -> None:
    assert REQUIRED >= OWN_SEVEN
    for extra in ("report", "teacher", "docs"):
        assert not REQUIRED & OPTIONAL[extra], extra


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_error_names_the_packages_of_the_extra(extra: str) -> None:
    assert set(EXTRAS[extra]) == OPTIONAL[extra]


def test_whatever_is_imported_is_required_or_in_an_extra() -> None:
    known = REQUIRED | set().union(*OPTIONAL.values()) | set(sys.stdlib_module_names) | {"trainer"}
    known |= {"bert_score", "huggingface_hub", "markupsafe"}  # bert-score; needed by transformers; by jinja2
    for path in TRAINER.rglob("*.py"):
        unknown = {name.split(".")[0] for name in imports(path)} - known
        assert not unknown, f"{path}: {unknown}"


def _needs(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """(file, imported package) of files and of everything of ours that they import, inside functions too."""
    seen, waiting = set(), list(paths)
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path):
            yield path, name.split(".")[0]
            if found := module_file(name):
                waiting.append(found)


@pytest.mark.parametrize("folder", COMPUTE)
def test_a_compute_node_needs_no_extra(folder: str) -> None:
    """From the source: also what is imported late, and what these modules import of ours."""
    for path, package in _needs(files(folder)):
        assert package not in set(EXTRAS["report"]) | set(EXTRAS["teacher"]) | OPTIONAL["docs"], path


def test_the_modules_of_a_compute_node_import_without_the_extras() -> None:
    """For real. pandas (datasets), jinja2 and scipy (optional in other libraries) cannot be taken away here."""
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for folder in COMPUTE
        for path in files(folder)
    ]
    lines = ["import importlib, sys", f"sys.modules.update(dict.fromkeys({sorted(NOT_IN_CORE)}))"]
    lines += [f"for name in {modules}: importlib.import_module(name.removesuffix('.__init__'))"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_missing_extra_is_an_error_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    remedy = r'matplotlib is not installed; run: pip install "socratic-trainer\[report\]"'
    with pytest.raises(UserError, match=remedy), needs_extra("report"):
        import matplotlib.pyplot
    with pytest.raises(UserError, match="matplotlib"):
        require_extra("report")
    with pytest.raises(ModuleNotFoundError), needs_extra("teacher"):
        import matplotlib.pyplot  # noqa: F401


def test_every_data_file_is_in_the_package(installed: Path) -> None:
    """Whatever lies in trainer/ beside the modules is installed."""
    found = {path.relative_to(TRAINER) for path in TRAINER.rglob("*") if path.is_file()}
    found = {path for path in found if path.suffix != ".pyc"}
    package = next(installed.glob("lib/python3*/site-packages/trainer"))
    assert [str(path) for path in sorted(found) if not (package / path).is_file()] == []
    assert (package / "cluster" / "ranks.sh").read_text() == (REPOSITORY / "slurm" / "ranks.sh").read_text()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the package (not editable) and, through a path file, our own other packages."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a build leaves files in the source tree
    shutil.copytree(REPOSITORY / "trainer", source / "trainer", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    environment = folder / "venv"
    venv.create(environment, symlinks=True)
    own = next(environment.glob("lib/python3*/site-packages"))
    (own / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    pip += ["--no-build-isolation", "--ignore-installed", str(source)]
    done = subprocess.run(pip, env=_outside(), capture_output=True, text=True)
    if "Cannot import 'setuptools" in done.stderr:
        pytest.skip("this environment has no setuptools to build with")
    assert done.returncode == 0, done.stderr[-3000:]
    return environment


def _outside() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """Run `socratic ARGUMENTS` of the installed package in a folder outside the repository."""
    command = [str(installed / "bin" / "socratic"), *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        env=_outside() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_study_runs_without_the_repository(installed: Path, tmp_path: Path) -> None:
    """Shards, training, conversion, evaluation and report, with nothing but the installed package."""
    assert "prepare_shards" in run(installed, tmp_path, "--help")
    where = [str(installed / "bin" / "python"), "-c", "import trainer; print(trainer.__file__)"]
    assert (
        str(installed)
        in subprocess.run(where, cwd=tmp_path, env=_outside(), capture_output=True, text=True).stdout
    )
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(STUDY))
    assert "-m trainer.commands.train" in run(installed, tmp_path, "study", "run", "tiny.yaml", "--dry_run")
    output = run(installed, tmp_path, "study", "run", "tiny.yaml")
    assert "report: runs/tiny/report/index.html" in output
    assert "6 of 6 stages done" in run(installed, tmp_path, "study", "status", "tiny.yaml")


def test_batch_scripts_run_the_installed_modules(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**STUDY, "num_ranks": 2}))
    (tmp_path / "cluster.env").write_text("PARTITION=gpu\nGPUS_PER_NODE=2\nVENV=/shared/venv\n")
    script = run(installed, tmp_path, "study", "submit", "tiny.yaml", "--cluster", "cluster.env", "--dry_run")
    assert "runs/tiny/slurm/ranks.sh /shared/venv/bin/python -m trainer.commands.train" in script


def test_the_deepspeed_launcher_starts_a_module(tmp_path: Path) -> None:
    """The launcher passes its own --local_rank between the module and the flags of the command."""
    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.is_file():
        pytest.skip("this environment has no deepspeed command")
    command = [
        str(launcher),
        "--num_gpus",
        "2",
        "--module",
        "trainer.commands.train",
        "--train_shards=missing",
    ]
    command += [f"--output_dir={tmp_path}/run", "--config_name=stories-0.2m"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert "error: missing" in done.stdout + done.stderr, done.stdout + done.stderr


def test_every_required_package_is_imported() -> None:
    used = {name.split(".")[0] for path in TRAINER.rglob("*.py") for name in imports(path)}
    assert REQUIRED - used == set()


def test_the_long_files_exist() -> None:
    """A file that is renamed keeps its mark."""
    from tests.conftest import _COMPUTE_FILES

    assert [name for name in sorted(_COMPUTE_FILES) if not (REPOSITORY / "tests" / name).is_file()] == []
