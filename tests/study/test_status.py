from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.storage import atomic_dir
from trainer.storage.run_directory import EvaluationDirectory, RunDirectory
from trainer.study import changes, stages, status
from trainer.study.study_file import Study

MakeStudy = Callable[[dict[str, Any]], Study]


def publish_directory(path: Path, kind: str, **facts: Any) -> None:
    with atomic_dir.atomic_directory(path, kind, facts):
        pass


def kinds_to_do(study: Study) -> list[str]:
    return [stage.kind for stage in stages.study_stages(study) if not status.is_done(stage)]


def write_results(study: Study, run: int = 0) -> EvaluationDirectory:
    directory = EvaluationDirectory(Path(study.runs[run].evaluations[0].output_dir))
    score = {"accuracy": 0.67, "low": 0.615, "high": 0.721}
    atomic_dir.write_text(directory.results, json.dumps({"accuracy": {"strict": score}}))
    return directory


def test_stages_are_done_when_their_result_is_published(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    values["methods"] = ["cot"]
    study = make_study(values)
    run = study.runs[0].directory
    assert kinds_to_do(study) == ["prepare", "prepare", "train", "convert", "evaluate", "report"]

    publish_directory(Path("shards/stories-train"), "shards", recipe={"num_problems": 300}, num_problems=300)
    assert kinds_to_do(study) == ["prepare", "train", "convert", "evaluate", "report"]

    publish_directory(run.checkpoint(1), "checkpoint", finished=False)
    assert "train" in kinds_to_do(study)
    run.checkpoint(3).mkdir()  # cut by a kill: there is no manifest
    assert "train" in kinds_to_do(study)
    publish_directory(run.checkpoint(2), "checkpoint", finished=True)
    assert kinds_to_do(study) == ["prepare", "convert", "evaluate", "report"]

    publish_directory(run.export, "export", finished=True)
    assert kinds_to_do(study) == ["prepare", "evaluate", "report"]
    write_results(study)
    assert kinds_to_do(study) == ["prepare", "report"]
    page = study.directory.report / "index.html"
    atomic_dir.write_text(run.settings, "method: cot\n")
    atomic_dir.write_text(page, "")
    assert kinds_to_do(study) == ["prepare"]
    os.utime(page, (1, 1))
    assert kinds_to_do(study) == ["prepare", "report"], "an evaluation is newer than the report"


def test_an_export_of_an_unfinished_training_is_repeated(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    study = make_study(values)
    publish_directory(study.runs[0].directory.export, "export", finished=False)
    assert kinds_to_do(study).count("convert") == 2


def test_an_evaluated_run_needs_no_weights(values: dict[str, Any], make_study: MakeStudy) -> None:
    """Checkpoints and exports may be deleted to make room."""
    study = make_study(values)
    write_results(study)
    assert kinds_to_do(study) == ["prepare", "prepare", "train", "convert", "evaluate", "report"]


def test_shards_with_other_settings_are_refused(values: dict[str, Any], make_study: MakeStudy) -> None:
    study = make_study(values)
    recipe = {"num_problems": 6000, "tokenizer": "digest of something"}
    publish_directory(Path("shards/stories-train"), "shards", recipe=recipe)
    with pytest.raises(UserError, match=r"shards/stories-train holds shards with num_problems 6000, .* 300"):
        kinds_to_do(study)


def test_training_progress_is_read_from_the_end_of_the_log(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    values["train"] = {"max_steps": 3000}
    settings = make_study(values).runs[0].train
    run = RunDirectory(Path(settings.output_dir))
    assert status.training_progress(settings) == status.Progress(0, 3000)
    run.path.mkdir(parents=True)
    lines = [json.dumps({"step": step, "total_steps": 2500, "loss": 3000 / step}) for step in range(1, 2001)]
    lines += ['{"step": 2000, "evaluation": {"loss": 1}}', '{"step": 2001, "lo']
    run.metrics.write_text("\n".join(lines))
    assert status.training_progress(settings) == status.Progress(2000, 2500, "loss 1.500")


def test_final_loss_excludes_steps_undone_by_a_resume(values: dict[str, Any], make_study: MakeStudy) -> None:
    run = make_study(values).runs[0].directory
    assert status.final_loss(run) is None
    run.path.mkdir(parents=True)
    losses = [(1, 4.0), (2, 90.0), (3, 90.0), (2, 2.0)]  # killed after 3, resumed from the checkpoint of 1
    run.metrics.write_text("".join(json.dumps({"step": s, "loss": loss}) + "\n" for s, loss in losses))
    assert status.final_loss(run) == 3.0


def test_evaluation_progress_counts_finished_problems(values: dict[str, Any], make_study: MakeStudy) -> None:
    settings = make_study(values).runs[0].evaluations[0]
    publish_directory(Path(settings.shards), "shards", num_problems=30)
    progress = status.EvaluationProgress(settings)
    assert progress() == status.Progress(0, 30)
    parts = EvaluationDirectory(Path(settings.output_dir)).rank_files
    parts.mkdir(parents=True)
    for rank in range(2):
        (parts / f"rank-{rank}.jsonl").write_text('{"id": 1}\n{"id": 2}\n{"i')
    assert progress() == status.Progress(4, 30)
    with open(parts / "rank-0.jsonl", "a") as file:
        file.write('d": 3}\n')
    assert progress() == status.Progress(5, 30)
    few = status.EvaluationProgress(dataclasses.replace(settings, max_problems=7))
    assert few() == status.Progress(5, 7)


def test_accuracy_has_its_interval(values: dict[str, Any], make_study: MakeStudy) -> None:
    study = make_study(values)
    results = write_results(study).results
    assert status.accuracy(study.runs[0].evaluations[0]) == "67.0% [61.5, 72.1]"
    results.write_text("{}")
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        status.accuracy(study.runs[0].evaluations[0])


def test_a_changed_study_is_refused_run_by_run(
    values: dict[str, Any], make_study: MakeStudy, tmp_path: Path
) -> None:
    config = tmp_path / "zero.json"
    config.write_text("{}")
    values["train"]["deepspeed"] = str(config)
    study = make_study(values)
    changes.check_unchanged(study)
    changes.save_snapshot(study)
    values["train"]["learning_rate"] = 1e-3
    values["num_ranks"] = 4
    changes.check_unchanged(make_study(values))  # nothing has been made yet
    publish_directory(study.runs[0].directory.checkpoint(1), "checkpoint", finished=False)
    with pytest.raises(UserError) as caught:
        changes.check_unchanged(make_study(values))
    message = str(caught.value)
    assert (
        "runs/tiny/stories.answer_only.small.s0: learning_rate was 5e-05, is now 0.001; num_ranks was 2"
        in message
    )
    assert "stories.cot.small" not in message, "it has no finished work"
    assert "study: tiny-2" in message

    del values["train"]["learning_rate"]
    values["num_ranks"] = 2
    values["train"] |= {"save_steps": 7, "timeout_seconds": 60}  # no effect on the result
    values["models"]["large"] = {"config_name": "stories-3m"}
    changes.check_unchanged(make_study(values))
    config.write_text('{"zero_optimization": {"stage": 1}}')
    with pytest.raises(UserError, match="deepspeed_digest was"):
        changes.check_unchanged(make_study(values))


def test_a_changed_evaluation_is_refused_once_it_has_results(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    study = make_study(values)
    changes.save_snapshot(study)
    publish_directory(study.runs[0].directory.checkpoint(1), "checkpoint", finished=True)
    values["evaluate"] = {"max_new_tokens": 99}
    changes.check_unchanged(make_study(values))
    write_results(study)
    with pytest.raises(
        UserError, match="evaluate stories-test-answer_only: max_new_tokens was 256, is now 99"
    ):
        changes.check_unchanged(make_study(values))
    values["evaluate"] = {"batch_size": 1}  # batches do not change answers
    changes.check_unchanged(make_study(values))


def test_runs_that_are_no_longer_in_the_file_are_listed(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    study = make_study(values)
    changes.save_snapshot(study)
    atomic_dir.write_text(study.runs[1].directory.settings, "method: cot\n")
    values["methods"] = ["answer_only"]
    smaller = make_study(values)
    assert changes.unlisted_runs(smaller) == ["stories.cot.small.s0"]
    changes.save_snapshot(smaller)
    values["methods"] = ["cot"]
    values["train"]["max_steps"] = 3
    publish_directory(study.runs[1].directory.checkpoint(1), "checkpoint", finished=True)
    with pytest.raises(UserError, match="max_steps was 2, is now 3"):  # its record was kept
        changes.check_unchanged(make_study(values))


def test_a_damaged_record_is_named(values: dict[str, Any], make_study: MakeStudy) -> None:
    study = make_study(values)
    atomic_dir.write_text(study.directory.settings, "format: [")
    with pytest.raises(UserError, match=r"study\.yaml is damaged"):
        changes.check_unchanged(study)
