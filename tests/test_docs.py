"""README and docs/: links, lengths, the flags, targets and paths they show, and the formats they describe."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, is_typeddict

import pytest

import trainer
from tests.distributed import run_well
from trainer import settings
from trainer.settings import EvaluateSettings, PrepareSettings
from trainer.teacher.settings import AnnotateSettings

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
ABOUT = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted(
    [*ABOUT, *DOCS.glob("*.md"), *(p for n in ("ds_configs", "slurm", "studies", "tests", "benchmarks") for p in (REPOSITORY / n).rglob("README.md"))]
)  # fmt: skip
FOLDERS = ("benchmarks", "docs", "ds_configs", "slurm", "studies", "tests", "tools", "trainer")
TOOLS = {
    "annotate": AnnotateSettings,
    "convert_checkpoint": settings.ConvertSettings,
    "doctor": settings.DoctorSettings,
    "evaluate": EvaluateSettings,
    "plan": settings.PlanSettings,
    "plot_scaling": settings.PlotSettings,
    "prepare_shards": PrepareSettings,
    "train": settings.TrainSettings,
}
BATCH_SCRIPTS = {"prepare": "prepare_shards", "convert": "convert_checkpoint"}
_TOOL = re.compile(r"(?:tools/|^socratic )(\w+)(?:\.py)?\b|slurm/(\w+)\.sbatch")


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def parts(text: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, line) of every line of a page; kind: "text", "indented", or "fenced:" and the language of the block."""
    kind = "text"
    for line in text.splitlines():
        if line.startswith("```"):
            kind = f"fenced:{line[3:]}" if kind == "text" else "text"
        elif kind == "text" and line.startswith("    "):
            yield "indented", line[4:]
        else:
            yield kind, line


def prose(text: str) -> str:
    """Return the lines of a page outside code blocks."""
    return "\n".join(line for kind, line in parts(text) if kind == "text")


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def code_lines(text: str) -> list[str]:
    """Return the lines of code blocks without a language; a line that ends in a backslash is joined with the next."""
    lines = [line for kind, line in parts(text) if kind in ("indented", "fenced:", "fenced:bash")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page: GitHub's of its headings, and explicit `(name)=` targets."""
    text = prose(page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


@functools.cache
def study_flags() -> frozenset[str]:
    """Return the flags of tools/study.py, whose command line is not a settings class."""
    command = [sys.executable, str(REPOSITORY / "tools" / "study.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout
    return frozenset(re.findall(r"^  --(\w+)", text, re.MULTILINE))


def flags_of(tool: str) -> set[str]:
    known = study_flags() if tool == "study" else {field.name for field in fields(TOOLS[tool])}
    return {*known, "config", "help"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page.read_text(encoding="utf-8")))
    ):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name_of(page)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{name_of(page)}: no heading {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for code in [*code_lines(text), *inline_code(text)]:
        for path in re.findall(rf"(?<![\w./$}}-])(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/]", code):
            assert "NAME" in path or (REPOSITORY / path).exists(), f"{name_of(page)} names {path}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_test_that_is_named_exists(page: Path) -> None:
    for path, function in re.findall(r"(tests/[\w/]+\.py)::(\w+)", page.read_text(encoding="utf-8")):
        assert f"def {function}(" in (REPOSITORY / path).read_text(encoding="utf-8"), f"{path}::{function}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_flag_of_a_command_is_a_setting(page: Path) -> None:
    for line in code_lines(page.read_text(encoding="utf-8")):
        for command in re.split(r" && |; (?=do )", line):
            found = list(_TOOL.finditer(command))
            if not found:
                continue
            last = found[-1]
            tool = last[1] or BATCH_SCRIPTS.get(last[2], last[2])
            assert tool in (*TOOLS, "study"), f"{name_of(page)}: {command}"
            words = shlex.split(command[last.end() :].split(";")[0], comments=True)
            for flag in (word[2:].partition("=")[0] for word in words if word.startswith("--")):
                assert flag in flags_of(tool), f"{name_of(page)}: {tool} has no flag --{flag}: {command}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_every_flag_in_a_sentence_is_known(page: Path) -> None:
    """Flags of other programs that have an underscore, as ours have, are listed here."""
    others = {"num_gpus", "master_port", "master_addr", "local_rank", "bind_cores_to_rank", "safe_serialization", "inject_missing_state"}  # fmt: skip
    known = others.union(*map(flags_of, (*TOOLS, "study")))
    for code in inline_code(page.read_text(encoding="utf-8")):
        for flag in re.findall(r"(?<!\S)--(\w+_\w+)", code):
            assert flag in known, f"{name_of(page)}: --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_make_target_exists(page: Path) -> None:
    targets = set(
        re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    text = page.read_text(encoding="utf-8")
    for code in [*code_lines(text), *inline_code(text)]:
        for target in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", code.partition("#")[0]):
            assert target in targets, f"{name_of(page)}: make {target}"


def test_the_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert len(text.encode()) <= 9216


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {
        line
        for block in re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
        for line in block.splitlines()
    }
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= listed


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the extra 'docs' is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_citation_is_complete() -> None:
    import yaml

    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version", "license", "references"} <= set(citation)
    assert citation["version"] == trainer.__version__


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The program of docs/formats.md, as a module."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "formats.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "trainer" not in code
    folder = tmp_path_factory.mktemp("reader")
    (folder / "read_files.py").write_text(code, encoding="utf-8")
    import importlib.util

    spec = importlib.util.spec_from_file_location("read_files", folder / "read_files.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained for two steps by two ranks, exported and evaluated; beside it shards/."""
    folder = tmp_path_factory.mktemp("formats")
    shards, run = folder / "shards", folder / "runs" / "mine" / "stories.socratic.tiny.s0"
    run_well(["tools/prepare_shards.py", "--tokenizer_name", "stories", "--num_problems", "60", "--output_dir", str(shards)])  # fmt: skip
    sizes = (
        "num_hidden_layers=2,hidden_size=48,intermediate_size=64,num_attention_heads=4,num_key_value_heads=4"
    )
    train = [
        "--config_name",
        "stories-0.2m",
        "--config_overrides",
        sizes,
        "--max_steps",
        "2",
        "--pack_length",
        "512",
    ]
    train += ["--deepspeed", "ds_configs/zero2.json", "--train_shards", str(shards), "--output_dir", str(run)]
    run_well(["tools/train.py", *train], 2, timeout=300)
    run_well(["tools/convert_checkpoint.py", str(run)])
    evaluate = ["--shards", str(shards), "--max_problems", "5", "--max_new_tokens", "8"]
    run_well(["tools/evaluate.py", "--model_name_or_path", str(run / "export"), *evaluate])
    return run


def evaluation_of(run: Path) -> Path:
    (folder,) = (run / "evaluation").iterdir()
    return folder


def test_the_reader_reads_shards(reader: ModuleType, run: Path) -> None:
    from trainer.shards.read import Shards

    path = run.parents[2] / "shards"
    shards = Shards.open(path)
    for index in (0, 1, len(shards) - 1):
        text, segments = reader.problem(path, index)
        assert text["question"] == shards.problem(index).question
        assert segments == [(int(role), tokens.tolist()) for role, tokens in shards.segments(index)]


def test_the_reader_reads_a_checkpoint(reader: ModuleType, run: Path) -> None:
    import torch
    from safetensors.torch import load_file

    (checkpoint,) = (run / "checkpoints").iterdir()
    weights = reader.master_weights(checkpoint)
    exported = load_file(run / "export" / "model.safetensors")
    assert exported and all(torch.equal(weights[name], weight) for name, weight in exported.items())
    assert reader.facts(run / "export")["step"] == 2


def test_the_reader_reads_metrics_and_predictions(reader: ModuleType, run: Path) -> None:
    assert list(reader.steps(run / "metrics.jsonl")) == [1, 2]
    evaluation = evaluation_of(run)
    results = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))
    assert reader.accuracy(evaluation) == results["accuracy"]["strict"]["accuracy"]


def keys_of_section(heading: str) -> set[str]:
    """Return what stands in code in the first column of the table under a heading of docs/formats.md."""
    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, heading
    rows = re.findall(r"^\| (`[^|]*) \|", section[1], re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def test_the_page_lists_the_keys_of_the_files(run: Path) -> None:
    def first(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8").splitlines()[0])

    evaluation = evaluation_of(run)
    assert keys_of_section("metrics.jsonl") == set(first(run / "metrics.jsonl"))
    assert keys_of_section("predictions.jsonl") == set(first(evaluation / "predictions.jsonl"))
    results = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))
    assert keys_of_section("results.json") == set(results)


def test_the_types_of_records_have_the_fields_of_the_files(run: Path) -> None:
    from trainer.storage import manifest
    from trainer.storage.atomic_dir import read_manifest

    (checkpoint,) = (run / "checkpoints").iterdir()
    types = {
        run.parents[2] / "shards": manifest.ShardFacts,
        checkpoint: manifest.CheckpointFacts,
        run / "export": manifest.ExportFacts,
    }
    for path, record in types.items():
        assert set(read_manifest(path)["facts"]) - record.__optional_keys__ == record.__required_keys__, path
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(step) == set(manifest.StepMetrics.__annotations__) for step in steps)


def test_the_page_names_every_field_of_the_records() -> None:
    from trainer.storage import manifest

    text = (DOCS / "formats.md").read_text(encoding="utf-8")
    records = [record for record in vars(manifest).values() if is_typeddict(record)]
    assert len(records) > 5
    fields = {field for record in records for field in record.__required_keys__ | record.__optional_keys__}
    assert {field for field in fields if not re.search(rf'[`"]{field}[`"]', text)} == set()
