"""Whole evaluations in one process: files, resuming, and rejected settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import remade
from trainer.errors import UserError
from trainer.evaluation import job, model_reference, rank_files
from trainer.evaluation.evaluate import evaluate
from trainer.report.load import load_frames
from trainer.settings import EvaluateSettings
from trainer.shards.read import Shards
from trainer.storage import atomic_dir
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory


def settings(export: Path, shards: Shards, **changes: Any) -> EvaluateSettings:
    return EvaluateSettings(
        **{"model_name_or_path": str(export), "shards": str(shards.path), "batch_size": 4, **changes}
    )


def read(directory: EvaluationDirectory) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of predictions.jsonl, and the results without measured values."""
    results = json.loads(directory.results.read_text())
    return directory.predictions.read_bytes(), {
        name: value for name, value in results.items() if name not in ("seconds", "world_size")
    }


def test_results_and_predictions(export: Path, shards: Shards, tmp_path: Path) -> None:
    copy = remade(export, tmp_path / "mine" / "stories.socratic.tiny.s0")
    results = evaluate(settings(copy, shards))
    run = RunDirectory(copy.parent)
    directory = run.evaluation("stories-test-socratic")
    assert json.loads(directory.results.read_text()) == results
    assert results["accuracy"]["strict"]["correct"] == results["num_problems"] == len(shards) == 10
    assert {
        "mode": "socratic",
        "calculator": True,
        "train_seed": 0,
        "world_size": 1,
    }.items() <= results.items()
    lines = [json.loads(line) for line in directory.predictions.read_text().splitlines()]
    assert [line["id"] for line in lines] == [shards.problem(index).id for index in range(10)]
    assert sum(line["generated_tokens"] for line in lines) == results["generated_tokens"]
    assert not directory.rank_files.exists()

    without = evaluate(settings(run.path, shards, calculator=False))  # a run directory stands for its export
    assert (
        without["accuracy"]["strict"]["correct"] < 10
        and "train_on_calculator_results" in without["warnings"][0]
    )
    assert (run.evaluations / "stories-test-socratic-no_calculator" / "results.json").is_file()

    run.settings.write_text("method: socratic\nseed: 0\n")
    found = load_frames([run.path]).evaluations  # the report reads them
    assert set(found[["mode", "calculator", "model"]].itertuples(index=False, name=None)) == {
        ("socratic", True, "tiny"),
        ("socratic", False, "tiny"),
    }


def test_results_do_not_depend_on_the_number_of_slots(export: Path, shards: Shards, tmp_path: Path) -> None:
    for changes in ({}, {"temperature": 1.0, "top_p": 0.95, "seed": 3}):
        for slots in (1, 16):
            output_dir = tmp_path / f"{slots}{len(changes)}"
            evaluate(settings(export, shards, batch_size=slots, output_dir=str(output_dir), **changes))
        one, many = (EvaluationDirectory(tmp_path / f"{slots}{len(changes)}") for slots in (1, 16))
        assert read(one) == read(many)


def test_interrupted_evaluation_is_resumed(
    export: Path,
    shards: Shards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uninterrupted, killed = (EvaluationDirectory(tmp_path / name) for name in ("uninterrupted", "killed"))
    evaluate(settings(export, shards, output_dir=str(uninterrupted.path)))
    append = rank_files.RankFile.append
    appended: list[str] = []

    def interrupted(file: rank_files.RankFile, prediction: dict[str, Any]) -> None:
        if len(appended) == 4:
            raise KeyboardInterrupt
        append(file, prediction)
        appended.append(prediction["id"])

    monkeypatch.setattr(rank_files.RankFile, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings(export, shards, output_dir=str(killed.path)))
    monkeypatch.setattr(rank_files.RankFile, "append", lambda f, x: (append(f, x), appended.append(x["id"])))
    assert not killed.results.exists() and len(list(killed.rank_files.iterdir())) == 1

    evaluate(
        settings(export, shards, output_dir=str(tmp_path / "killed"), seed=1)
    )  # other settings: nothing resumed
    assert len(appended) == 14 and len(list(killed.rank_files.iterdir())) == 1
    killed.results.unlink()
    evaluate(settings(export, shards, output_dir=str(killed.path)))
    assert len(appended) == 20 and sorted(appended[:4] + appended[14:]) == sorted(set(appended))
    assert "4 of 10 problems were solved before" in capsys.readouterr().out
    assert read(killed) == read(uninterrupted) and not killed.rank_files.exists()


def test_finished_results_are_kept(
    export: Path, shards: Shards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = str(tmp_path / "there")
    first = evaluate(settings(export, shards, output_dir=output_dir))
    assert evaluate(settings(export, shards, output_dir=output_dir, batch_size=1)) == first
    assert "already evaluated: strict 100.0 %" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other settings .max_new_tokens: 256 there, 9 now.*--overwrite"):
        evaluate(settings(export, shards, output_dir=output_dir, max_new_tokens=9))
    cut = evaluate(
        settings(export, shards, output_dir=output_dir, max_new_tokens=9, overwrite=True, max_problems=7)
    )
    assert cut["unfinished"] == cut["num_problems"] == 7 and cut["accuracy"]["strict"]["correct"] == 0
    (tmp_path / "there" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="not the result of an evaluation"):
        evaluate(settings(export, shards, output_dir=output_dir))


def test_two_evaluations_of_one_directory_are_detected(export: Path, shards: Shards, tmp_path: Path) -> None:
    ours = settings(export, shards, output_dir=str(tmp_path))
    resolved = job.resolve_job(ours)
    fingerprint = job.job_fingerprint(
        resolved.fingerprint_fields({"student": atomic_dir.manifest_digest(export)})
    )
    first = shards.problem(0).id
    for _ in range(2):  # two processes that both started before the other had written
        with rank_files.RankFile(resolved.directory.rank_files, fingerprint) as file:
            file.append({"id": first, "correct_strict": True})
    with pytest.raises(UserError, match=f"'{first}' occur more than once"):
        evaluate(ours)
    assert not resolved.directory.results.exists()


def test_incompatible_models_are_rejected(export: Path, shards: Shards, tmp_path: Path) -> None:
    stopped = remade(export, tmp_path / "stopped", finished=False, step=5)
    with pytest.raises(UserError, match=r"stopped at step 5 before its end.*--allow_unfinished"):
        evaluate(settings(stopped, shards))
    results = evaluate(settings(stopped, shards, allow_unfinished=True, max_problems=1))
    assert results["finished"] is False and "stopped at step 5" in results["warnings"][0]
    foreign = remade(export, tmp_path / "foreign", tokenizer_fingerprint="0" * 64)
    with pytest.raises(UserError, match="not trained with the tokenizer"):
        evaluate(settings(foreign, shards))
    flipped = remade(export, tmp_path / "flipped")
    weights = bytearray((flipped / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (flipped / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt"):
        evaluate(settings(flipped, shards))
    with pytest.raises(UserError, match="half of a pair"):
        evaluate(settings(remade(export, tmp_path / "solver", method="solver"), shards))
    with pytest.raises(UserError, match="export does not exist"):
        evaluate(settings(tmp_path / "nothing" / "export", shards))
    elsewhere = remade(export, tmp_path / "x").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="give output_dir for the results"):
        evaluate(settings(elsewhere, shards))


def test_plain_model_folder(export: Path, shards: Shards, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(export, folder, ignore=shutil.ignore_patterns(atomic_dir.MANIFEST))
    output_dir = str(tmp_path / "out")
    with pytest.raises(UserError, match="give mode: answer_only, cot, socratic"):
        evaluate(settings(folder, shards, output_dir=output_dir))
    results = evaluate(settings(folder, shards, output_dir=output_dir, mode="cot", dtype="bf16"))
    assert (results["method"], results["train_seed"], results["model_name"]) == ("", None, "plain")
    assert results["num_parameters"] == atomic_dir.read_manifest(export)["facts"]["num_parameters"]
    assert results["accuracy"]["strict"]["correct"] >= 8
    direct = evaluate(
        settings(folder, shards, output_dir=f"{output_dir}2", mode="answer_only", max_new_tokens=6)
    )
    assert direct["impose_answer"] and direct["mode"] == "answer_only"


def test_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        model_reference.find_model(str(tmp_path))
    with pytest.raises(UserError, match="nowhere does not exist"):
        model_reference.find_model(str(tmp_path / "nowhere"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"holds an adapter .* merge it first"):
        model_reference.find_model(str(tmp_path / "adapter"))
