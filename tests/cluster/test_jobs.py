"""The jobs for the stages of a study, and their dependencies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trainer.cluster import jobs
from trainer.cluster.jobs import Dependency, JobId, SlurmJob
from trainer.study import stages
from trainer.study.study_file import Study

MakeStudy = Callable[[dict[str, Any]], Study]


def plan(study: Study, done: set[str] = frozenset(), live: dict[str, JobId] | None = None) -> list[SlurmJob]:  # type: ignore[assignment]
    return jobs.make_jobs(stages.study_stages(study), done, live or {}, study.name)


def labels(batch: SlurmJob) -> list[str]:
    return [stage.label for stage in batch.stages]


def test_similar_runs_are_arrays_with_dependencies_by_task(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    found = plan(make_study(values))
    assert [batch.kind for batch in found] == ["prepare", "prepare", "train", "convert", "evaluate", "report"]
    prepare_train, prepare_test, train, convert, evaluate, report = found
    assert prepare_train.dependencies == () and not prepare_train.needs_accelerator
    assert (train.indices, train.dependencies) == ((0, 1), (Dependency("afterok", 0),))
    assert (convert.indices, convert.dependencies) == ((0, 1), (Dependency("aftercorr", 2),))
    assert set(evaluate.dependencies) == {Dependency("aftercorr", 3), Dependency("afterok", 1)}
    assert (report.indices, report.dependencies) == ((), (Dependency("afterany", 4),))
    assert [batch.needs_accelerator for batch in found] == [False, False, True, False, True, False]
    assert prepare_test.stages[0].label == "prepare stories-test"


def test_finished_stages_are_omitted_and_tasks_keep_their_number(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    values["methods"] = ["answer_only", "cot", "socratic"]
    study = make_study(values)
    done = {"prepare stories-train", "prepare stories-test", "train stories.cot.0.2m.s0"}
    found = plan(study, done)
    # The training of cot is done: its conversion has no dependency, so it is not in the array of the others.
    train, *rest = found
    assert labels(train) == ["train stories.answer_only.0.2m.s0", "train stories.socratic.0.2m.s0"]
    converts = [batch for batch in rest if batch.kind == "convert"]
    assert [(labels(batch), batch.indices, batch.dependencies) for batch in converts] == [
        (
            ["convert stories.answer_only.0.2m.s0", "convert stories.socratic.0.2m.s0"],
            (0, 1),
            (Dependency("aftercorr", 0),),
        ),
        (["convert stories.cot.0.2m.s0"], (), ()),
    ]
    single = next(b for b in rest if labels(b) == ["evaluate stories.cot.0.2m.s0 on stories-test"])
    assert single.dependencies == (Dependency("afterok", 2),)


def test_jobs_in_the_queue_are_dependencies_and_not_submitted_again(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    done = {"prepare stories-train", "prepare stories-test"}
    live = {
        "train stories.answer_only.0.2m.s0": JobId("7", 0),
        "train stories.cot.0.2m.s0": JobId("7", 1),
        "convert stories.cot.0.2m.s0": JobId("8", 1),
    }
    found = plan(make_study(values), done, live)
    assert [(batch.kind, batch.indices, batch.dependencies) for batch in found] == [
        ("convert", (), (Dependency("afterok", "7", 0),)),
        ("evaluate", (), (Dependency("afterok", 0),)),
        ("evaluate", (), (Dependency("afterok", "8", 1),)),
        ("report", (), (Dependency("afterany", 1), Dependency("afterany", 2))),
    ]


def test_a_pair_depends_on_both_models(values: dict[str, Any], make_study: MakeStudy) -> None:
    values["methods"] = ["cot", "decomposer_interleaved", "solver", "iterative_interleaved"]
    found = plan(make_study(values))
    train = next(batch for batch in found if batch.kind == "train")
    convert = next(batch for batch in found if batch.kind == "convert")
    assert len(train.stages) == len(convert.stages) == 3
    task_of = {label: index for index, label in zip(convert.indices, labels(convert), strict=True)}
    number = found.index(convert)
    pair = next(batch for batch in found if "iterative_interleaved" in batch.stages[0].label)
    assert pair.indices == ()
    tasks = [task_of[f"convert stories.{name}.0.2m.s0"] for name in ("decomposer_interleaved", "solver")]
    needed = {Dependency("afterok", number, index) for index in tasks}
    assert needed <= set(pair.dependencies) and len(pair.dependencies) == 3, "both exports and the problems"


def test_a_finished_study_has_no_jobs(values: dict[str, Any], make_study: MakeStudy) -> None:
    study = make_study(values)
    assert plan(study, {stage.label for stage in stages.study_stages(study)}) == []


@pytest.mark.parametrize("text", ["12", "12_3"])
def test_job_ids(text: str) -> None:
    assert str(JobId.parse(text)) == text
