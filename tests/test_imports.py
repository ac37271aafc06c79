"""Imports point one way: the folders of trainer/ are stages in the order of the data, and none looks ahead."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TRAINER = REPOSITORY / "trainer"

# folder -> folders it may import. Neither training nor evaluation imports the other.
ALLOWED = {
    "storage": set(),
    "runtime": {"storage"},
    "problems": set(),
    "models": {"problems"},
    "shards": {"problems", "models"},
    "zero": set(),  # DeepSpeed's files: export reads them, and training when it resumes
    "training": {"problems", "models", "shards", "zero"},
    "export": {"models", "zero"},
    "evaluation": {"problems", "models", "shards", "export"},
    "teacher": {"problems", "models", "evaluation"},
    "report": {"problems"},
    "cluster": {"study"},
    "study": {"teacher.settings", "models.presets", "models.load", "models.stories_tokenizer"},
    "planning": {"models", "shards", "training", "study"},
    "doctor": set(),
    "commands": {"shards", "training", "export", "evaluation", "teacher", "report", "cluster", "study"}
    | {"planning", "doctor"},
}
FILES = {"errors", "settings"}  # beside the folders; every folder may import them
EVERYWHERE = {"storage", "runtime"}  # folders that every folder but these may import
WITHOUT_RUNTIME = {"storage", "report"}
HEAVY = {"torch", "deepspeed", "transformers", "datasets"}
WITHOUT_HEAVY = ("report", "study", "cluster")


def imports(path: Path, only_top: bool = False) -> Iterator[str]:
    """Full names of the modules a file imports; with `only_top` those imported as soon as it is."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _at_import(tree.body) if only_top else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            # `from trainer.problems import calculator` imports the module trainer.problems.calculator
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported; `if TYPE_CHECKING:` does not."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _at_import(node.orelse)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from _at_import(getattr(node, part, []))


def own_imports(path: Path) -> Iterator[tuple[str, str]]:
    """(first part, rest) below `trainer` of every import of ours: ("report", "statistics.wilson_interval")."""
    for name in imports(path):
        if name.split(".")[0] == "trainer":
            first, _, rest = name.removeprefix("trainer").removeprefix(".").partition(".")
            if first not in ("", "__version__"):  # the package itself imports nothing
                yield first, rest


def files(folder: str) -> list[Path]:
    return sorted((TRAINER / folder).rglob("*.py"))


def module_file(name: str) -> Path | None:
    """The file of a module of ours; for `trainer.storage.atomic_dir.directory`, a name in a module, that module's."""
    while name.startswith("trainer."):
        path = REPOSITORY / name.replace(".", "/")
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
        name = name.rpartition(".")[0]
    return None


def test_every_folder_is_listed() -> None:
    folders = {path.parent.name for path in TRAINER.glob("*/*.py")}
    assert folders == set(ALLOWED), "name what the folder may import in ALLOWED"
    assert {path.stem for path in TRAINER.glob("*.py")} - {"__init__"} == FILES


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_earlier_folders(folder: str) -> None:
    allowed = ALLOWED[folder] | ({"storage"} if folder in WITHOUT_RUNTIME else EVERYWHERE) | FILES | {folder}
    for path in files(folder):
        for first, rest in own_imports(path):
            module = f"{first}.{rest.split('.')[0]}"
            assert first in allowed or module in allowed, f"{path} imports trainer.{module}"


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_files_beside_the_folders_import_only_storage(name: str) -> None:
    path = TRAINER / f"{name}.py"
    assert {first for first, _ in own_imports(path)} <= FILES | {"storage"}, path


def test_no_module_imports_the_tools_and_only_commands_parse_arguments() -> None:
    for path in TRAINER.rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        not_allowed = {"tools", "tests"} | (set() if path.parent.name == "commands" else {"argparse"})
        assert not roots & not_allowed, path


@pytest.mark.parametrize("folder", WITHOUT_HEAVY)
def test_no_torch_in_what_only_reads(folder: str) -> None:
    """Neither named in the folder's files, nor imported by something that they import."""
    for path in files(folder):
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path
    seen: set[Path] = set()
    waiting = files(folder)
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in imports(path, only_top=True):
            assert name.split(".")[0] not in HEAVY, f"{folder} imports {path}, which imports {name}"
            found = module_file(name)
            if found:
                waiting.append(found)


@pytest.mark.parametrize("path", sorted((TRAINER / "commands").glob("*.py")), ids=lambda path: path.name)
def test_help_waits_for_no_torch(path: Path) -> None:
    """A tool imports what is heavy when it starts to work, so that --help answers at once."""
    for name in imports(path, only_top=True):
        assert name.split(".")[0] not in HEAVY, path
        found = module_file(name)
        if found:
            assert not {top.split(".")[0] for top in imports(found, only_top=True)} & HEAVY, found
