"""Problem sets with annotation by a teacher: its settings, the shards made from it, and when it is repeated."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_status import publish_directory
from tests.study.test_study_run import Command
from trainer.errors import UserError
from trainer.storage.run_directory import AnnotationDirectory
from trainer.study import changes, stages, status
from trainer.study.study_file import Study

MakeStudy = Callable[[dict[str, Any]], Study]


@pytest.fixture
def annotated_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return a study of SVAMP with a local model as its teacher."""
    values["num_ranks"] = 1
    values["prepare"] = {"data_path": "org/svamp", "tokenizer_name": "gpt2", "seed": 5}
    values["annotate"] = {"model_name_or_path": "org/teacher", "num_samples": 4, "temperature": 0.7}
    values["data"] = {"svamp": {"train": {"annotate": {"max_steps": 3}}, "test": {}}}
    return values


def test_annotation_reads_the_source_and_shards_read_the_annotation(
    annotated_values: dict[str, Any], make_study: MakeStudy
) -> None:
    annotate, prepare, test, *_ = stages.study_stages(make_study(annotated_values))
    assert (annotate.label, annotate.num_ranks) == ("annotate svamp-train", 1)
    settings = annotate.settings
    assert (settings.data, settings.data_path, settings.split, settings.seed) == (
        "svamp",
        "org/svamp",
        "train",
        5,
    )
    assert (settings.num_samples, settings.max_steps, settings.output_dir) == (
        4,
        3,
        "annotations/svamp-train",
    )
    assert settings.decontaminate == ["svamp:org/svamp:test"], "evaluated problems must not be trained on"
    assert (prepare.settings.data, prepare.needs) == ("jsonl", (annotate.label,))
    assert prepare.settings.data_path == "annotations/svamp-train/result/annotated.jsonl"
    assert (test.settings.data, test.settings.seed, test.needs) == ("svamp", 5, ())
    line = stages.stage_command(annotate, Path("tools"), "auto")
    assert line[1] == "tools/annotate.py" and "--model_name_or_path=org/teacher" in line


WRONG = {
    "data is decided": {"annotate": {"data": "gsm8k"}},
    "output_dir is decided": {"annotate": {"output_dir": "x"}},
    "data.svamp.train.annotate: unknown setting 'styl' (did you mean 'style'?)": {
        "annotate": {"styl": "cot"}
    },
    "data.svamp.train.annotate is 'yes', expected": {"annotate": "yes"},
    "max_steps is 0": {"annotate": {"max_steps": 0}},
}


@pytest.mark.parametrize("message", WRONG)
def test_faults_are_reported_with_their_key_path(
    annotated_values: dict[str, Any], make_study: MakeStudy, message: str
) -> None:
    annotated_values["data"]["svamp"]["train"] = WRONG[message]
    with pytest.raises(UserError) as caught:
        make_study(annotated_values)
    assert message in str(caught.value)


def test_annotation_requires_a_teacher(annotated_values: dict[str, Any], make_study: MakeStudy) -> None:
    annotated_values["annotate"] = {}
    with pytest.raises(
        UserError, match=r"data\.svamp\.train\.annotate: give either base_url .* or model_name"
    ):
        make_study(annotated_values)


def test_annotation_is_done_once(annotated_values: dict[str, Any], make_study: MakeStudy) -> None:
    annotate = stages.study_stages(make_study(annotated_values))[0]
    assert not status.is_done(annotate)
    result = AnnotationDirectory(Path("annotations/svamp-train")).result
    publish_directory(result, "annotations", recipe={"style": "socratic", "max_steps": 3})
    assert status.is_done(annotate)
    annotated_values["data"]["svamp"]["train"]["annotate"]["style"] = "cot"
    with pytest.raises(
        UserError, match=r"result holds annotations with style 'socratic', the study says 'cot'"
    ):
        status.is_done(stages.study_stages(make_study(annotated_values))[0])
    shutil.rmtree(result)
    publish_directory(Path("shards/svamp-train"), "shards", recipe={})
    assert status.is_done(annotate), "shards do not need their source"


def test_a_changed_teacher_is_refused(annotated_values: dict[str, Any], make_study: MakeStudy) -> None:
    study = make_study(annotated_values)
    changes.save_snapshot(study)
    publish_directory(study.runs[0].directory.checkpoint(1), "checkpoint", finished=True)
    annotated_values["annotate"] |= {"batch_size": 3}
    changes.check_unchanged(make_study(annotated_values))  # does not affect the result
    annotated_values["annotate"] |= {"model_name_or_path": "org/else"}
    message = r"annotate\.model_name_or_path was 'org/teacher', is now 'org/else'"
    with pytest.raises(UserError, match=message):
        changes.check_unchanged(make_study(annotated_values))


def test_a_study_with_a_teacher_runs(tmp_path: Path, tools: Path, annotated_values: dict[str, Any]) -> None:
    """stand_in.py fails to prepare shards if the annotations do not exist."""
    command = Command(tmp_path, tools, annotated_values)
    status, output = command("run")
    assert status == 0, output
    assert "[1/10] annotate svamp-train: 600 problems annotated, 90 not (" in output
    assert "10 stages, 10 done" in command("run")[1]
