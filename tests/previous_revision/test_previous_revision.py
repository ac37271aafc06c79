"""Files written by revision c4f43e5 stay readable: shards, checkpoints, exports, evaluations, studies, Slurm records.

`c4f43e5.tar.xz` was made with that revision's tools in a folder with the archive's `study.yaml` (ZeRO-2 on two ranks, a
Llama of 3,896 parameters, a tokenizer of 320 tokens, generated stories):

    python tools/study.py run study.yaml           # runs/previous: three trainings, two evaluations, a report
    python tools/study.py submit submitted.yaml --cluster cluster.env    # runs/submitted, then scancel
    python tools/study.py run killed.yaml          # runs/killed, SIGKILL to all processes after the checkpoint of step 2
    python tools/evaluate.py --model_name_or_path runs/previous/stories.socratic.tiny.s0/export \\
        --shards shards/stories-test --calculator false --batch_size 1 --max_new_tokens 400    # SIGKILL after one answer

`tokenizer` is `trainer/models/stories_tokenizer.py` with VOCAB_SIZE = 320. The processes that were killed ran in a pid
namespace of their own, so whether they are alive cannot be seen from another process. Logs, batch scripts, the report's
pictures and the decomposer's and the solver's checkpoints of step 2 were left out. A revision that changes a format must
keep reading these files; the archive is replaced only when the format it holds is dropped on purpose.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
ARCHIVE = Path(__file__).with_name("c4f43e5.tar.xz")
RUN = Path("runs/previous/stories.socratic.tiny.s0")
PAIR = Path("runs/previous/stories.iterative_ahead.tiny.s0")
SHARDS = ("shards/stories-train", "shards/stories-test")
TIMEOUT_SECONDS = 240.0
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the extracted archive, for tests that only read it."""
    return extract(tmp_path_factory.mktemp("unchanged"))


def extract(folder: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run_tool(folder: Path, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python tools/<words>` in `folder`."""
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    script, *arguments = map(str, words)
    return subprocess.run(
        [sys.executable, REPOSITORY / "tools" / script, *arguments],
        cwd=folder,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def tool(folder: Path, *words: str | Path, **environment: str) -> str:
    """Run a tool and return what it printed; the exit status must be 0."""
    done = run_tool(folder, *words, **environment)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def tensor_bytes(export: Path) -> dict[str, bytes]:
    return {
        name: array.tobytes()
        for file in export.glob("*.safetensors")
        for name, array in load_file(file).items()
    }


def remove_last_step(folder: Path) -> list[dict[str, Any]]:
    """Leave the run as it was after step 2, and return the metrics of the steps after it."""
    shutil.rmtree(folder / RUN / "checkpoints" / "step-000004")
    shutil.rmtree(folder / RUN / "export")
    shutil.rmtree(folder / RUN / "evaluation")
    metrics = folder / RUN / "metrics.jsonl"
    steps = read_lines(metrics)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
    return steps[2:]


def assert_same_training(folder: Path, before: list[dict[str, Any]]) -> None:
    """Steps 3 and 4 read the same data and have the same loss; sums are rounded in another order elsewhere."""
    after = read_lines(folder / RUN / "metrics.jsonl")
    assert [step["step"] for step in after] == [1, 2, 3, 4]
    for old, new in zip(before, after[2:], strict=True):
        assert new["tokens"] == old["tokens"]
        assert new["packs_consumed"] == old["packs_consumed"]
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-5)
        assert new["grad_norm"] == pytest.approx(old["grad_norm"], rel=1e-3)
    assert (folder / RUN / "checkpoints" / "step-000004" / "MANIFEST.json").is_file()


def test_a_finished_study_has_nothing_left_to_do(unchanged: Path) -> None:
    before = contents(unchanged)
    status = tool(unchanged, "study.py", "status", "study.yaml")
    assert "11 of 11 stages done" in status
    assert "32 problems" in status and "4 problems" in status
    tool(unchanged, "study.py", "run", "study.yaml")
    kept = {name: content for name, content in contents(unchanged).items() if name in before}
    changed = {name for name in before if kept.get(name) != before[name]}
    assert {name for name in changed if not name.startswith("runs/previous/report/")} <= {
        "runs/previous/study.yaml"  # gains the settings that are new since
    }


def test_a_study_goes_on_from_the_checkpoint_with_the_shards_it_has(tmp_path: Path) -> None:
    """Two ranks train steps 3 and 4; then the run is converted, evaluated and reported, and nothing else is redone."""
    folder = extract(tmp_path)
    shards = {name: contents(folder / name) for name in SHARDS}
    kept = {
        name: contents(folder / name) for name in (PAIR / "evaluation", RUN / "checkpoints" / "step-000002")
    }
    tensors = load_file(folder / RUN / "export" / "model.safetensors")
    predictions = read_lines(next((folder / RUN).glob("evaluation/*/predictions.jsonl")))
    before = remove_last_step(folder)
    tool(folder, "study.py", "run", "study.yaml")
    assert_same_training(folder, before)
    assert {name: contents(folder / name) for name in SHARDS} == shards
    assert {name: contents(folder / name) for name in kept} == kept
    for name, array in load_file(folder / RUN / "export" / "model.safetensors").items():
        assert array == pytest.approx(tensors.pop(name), abs=1e-4)
    assert not tensors
    again = read_lines(folder / RUN / "evaluation" / "stories-test-socratic" / "predictions.jsonl")
    assert {line["id"] for line in again} == {line["id"] for line in predictions}


def test_one_rank_resumes_a_run_of_two_from_its_settings_file(tmp_path: Path) -> None:
    folder = extract(tmp_path)
    before = remove_last_step(folder)
    settings = folder / "settings.yaml"
    shutil.copy(folder / RUN / "settings.yaml", settings)
    tool(folder, "train.py", "--config", settings, "--gradient_accumulation_steps", "2")
    assert_same_training(folder, before)


def test_shards_of_other_stories_are_kept(unchanged: Path) -> None:
    """The generated problems have changed since, so the same settings no longer describe the shards: an error, no change."""
    before = contents(unchanged / SHARDS[0])
    done = run_tool(
        unchanged, "prepare_shards.py", "--tokenizer_name", "tokenizer", "--output_dir", SHARDS[0],
        "--max_length", "512", "--num_problems", "32", "--min_steps", "1", "--max_steps", "2", "--split", "train",
    )  # fmt: skip
    assert done.returncode == 2 and "holds shards made in another way (source: " in done.stdout
    assert contents(unchanged / SHARDS[0]) == before


def test_a_checkpoint_converts_to_the_same_tensors(unchanged: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    tool(unchanged, "convert_checkpoint.py", RUN / "checkpoints" / "step-000004", "--output_dir", export)
    assert tensor_bytes(export) == tensor_bytes(unchanged / RUN / "export")
    config, before = (
        json.loads((path / "config.json").read_text()) for path in (export, unchanged / RUN / "export")
    )
    assert {key: config[key] for key in before} == before


@pytest.mark.parametrize("is_pair", [False, True], ids=["one model", "decomposer and solver"])
def test_exports_are_evaluated(unchanged: Path, tmp_path: Path, is_pair: bool) -> None:
    """Answers depend on the processor's rounding; the problems and the digests of what was read do not."""
    flags = ["--shards", "shards/stories-test", "--batch_size", "4", "--max_new_tokens", "24"]
    if is_pair:
        before = unchanged / PAIR / "evaluation" / "stories-test-iterative_ahead"
        for role in ("decomposer", "solver"):
            flags += [f"--{role}", f"runs/previous/stories.{role}.tiny.s0/export"]
    else:
        before = unchanged / RUN / "evaluation" / "stories-test-socratic"
        flags += ["--model_name_or_path", str(RUN / "export")]
    tool(unchanged, "evaluate.py", *flags, "--output_dir", tmp_path / "new")
    old, new = (json.loads((path / "results.json").read_text()) for path in (before, tmp_path / "new"))
    compared = {"num_problems", "export_digest", "shards_fingerprint", "num_parameters", "mode"} & set(old)
    assert len(compared) > 3
    assert {name: new[name] for name in compared} == {name: old[name] for name in compared}
    lines = [read_lines(path / "predictions.jsonl") for path in (before, tmp_path / "new")]
    for line in (line for lines_of_one in lines for line in lines_of_one):
        assert {"text", "correct_strict", "correct_flexible", "finished"} <= set(line)
    questions = ("id", "question", "gold", "num_steps", "gold_steps")
    first, second = (
        sorted([[line[name] for name in questions] for line in found], key=str) for found in lines
    )
    assert first == second


def test_an_interrupted_evaluation_keeps_the_answers_it_has(tmp_path: Path) -> None:
    folder = extract(tmp_path)
    place = folder / RUN / "evaluation" / "stories-test-socratic-no_calculator"
    (kept,) = read_lines(next(place.glob("parts/*.jsonl")))
    tool(
        folder, "evaluate.py", "--model_name_or_path", RUN / "export", "--shards", "shards/stories-test",
        "--calculator", "false", "--batch_size", "1", "--max_new_tokens", "400",
    )  # fmt: skip
    found = {line["id"]: line for line in read_lines(place / "predictions.jsonl")}
    assert len(found) == 4
    assert found[kept["id"]]["text"] == kept["text"]


def test_a_report_has_the_same_numbers(unchanged: Path, tmp_path: Path) -> None:
    tool(unchanged, "plot_scaling.py", "runs/previous", "--output_dir", tmp_path)
    assert (tmp_path / "index.html").is_file()
    old, new = (
        json.loads((path / "results.json").read_text())
        for path in (unchanged / "runs/previous/report", tmp_path)
    )
    found, expected = accuracies(new), accuracies(old)
    assert found.keys() == expected.keys()
    missing = {name for name, value in expected.items() if value is None}
    assert missing == {name for name, value in found.items() if value is None}
    # statsmodels computes intervals in another order, so the last bits differ
    numbers = {name: value for name, value in expected.items() if value is not None}
    assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-12)
    assert len(accuracies(old)) > 4


def accuracies(value: Any, where: str = "") -> dict[str, Any]:
    """Return every counted number of a report's results by its path."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)  # type: ignore[assignment]
    else:
        counted = where.rsplit("/", 1)[-1] in ("correct", "n", "accuracy", "low", "high", "num_parameters")
        return {where: value} if counted else {}
    return {
        key: number for name, part in pairs for key, number in accuracies(part, f"{where}/{name}").items()
    }


def test_the_status_of_a_killed_study_names_the_process_that_had_its_lock(unchanged: Path) -> None:
    status = tool(unchanged, "study.py", "status", "killed.yaml")
    assert "2 of 6 stages done" in status
    assert "2/400" in status
    assert "pid 2," in status and "2026-11-28 08:51:46" in status


def test_the_status_of_a_submitted_study_names_its_jobs(unchanged: Path, tmp_path: Path) -> None:
    """Slurm, here commands that print nothing, has forgotten the jobs."""
    for name in ("squeue", "sacct", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    status = tool(unchanged, "study.py", "status", "submitted.yaml", PATH=f"{tmp_path}:{os.environ['PATH']}")
    rows = [line.split() for line in status.splitlines()]
    for stage, job in (("train", "1"), ("convert", "2"), ("evaluate", "3"), ("report", "4")):
        assert any(row[:1] == [stage] and job in row for row in rows), status
