"""Habits of writing that a reader has to decode, found in docstrings, comments, messages and documentation."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("trainer", "tools", "tests", "benchmarks", "docs", "slurm", "studies", "ds_configs")
HABITS = re.compile(
    r"\b(who|whoever|whom|nobody|somebody|everybody|whose turn|goes on|go on|is told|are told|so many|so long)\b",
    re.IGNORECASE,
)
RIDDLES = re.compile(r"^(What|Who|Which|How|Whether)\b")
# Word problems are about people; pages of models are generated from names.
SKIPPED = {"trainer/problems/stories/templates.py", "tests/test_language.py"}
EXCEPTIONS: set[str] = set()  # "file: text", at most ten


def _python_texts(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield line number, text and whether it is a docstring, for docstrings, comments and messages."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and node.body:
                docstrings.add(node.body[0].lineno)
                yield node.body[0].lineno, text, True
    in_tests = path.is_relative_to(REPOSITORY / "tests")  # strings of tests are data and expected output
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
        if is_text and not in_tests and node.lineno not in docstrings:
            yield node.lineno, node.value, False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string, False


def _texts(path: Path) -> Iterator[tuple[int, str, bool]]:
    if path.suffix == ".py":
        yield from _python_texts(path)
    else:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield number, line, False


def _files() -> list[Path]:
    found = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*")]
    found += [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "Makefile"]
    kinds = {".py", ".md", ".sh", ".sbatch", ".yaml", ".j2", ""}
    return sorted(
        path
        for path in found
        if path.is_file() and path.suffix in kinds and path.relative_to(REPOSITORY).as_posix() not in SKIPPED
    )


@pytest.mark.parametrize("path", _files(), ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_sentences_are_plain(path: Path) -> None:
    name = path.relative_to(REPOSITORY).as_posix()
    for number, text, is_docstring in _texts(path):
        found = HABITS.search(text) or (RIDDLES.search(text) if is_docstring else None)
        if found and not any(f"{name}: {known}" in EXCEPTIONS for known in text.splitlines()):
            pytest.fail(f"{name}, line {number}: {found[0]!r} in {text[:100]!r}; write a plain sentence")


def test_the_exceptions_are_few() -> None:
    assert len(EXCEPTIONS) <= 10
