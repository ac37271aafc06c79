"""Sets whose steps a teacher writes first: what the teacher reads, what the shards are made of, what is asked once only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_status import commit_directory
from tests.study.test_study_run import Command
from trainer.errors import UserError
from trainer.storage.run_directory import AnnotationDirectory
from trainer.study import changes, stages, status
from trainer.study.study_file import Study

MakeStudy = Callable[[dict[str, Any]], Study]


@pytest.fixture
def taught(values: dict[str, Any]) -> dict[str, Any]:
    """SVAMP, whose training problems a local model annotates."""
    values["num_ranks"] = 1
    values["prepare"] = {"data_path": "somebody/svamp", "tokenizer_name": "gpt2", "seed": 5}
    values["annotate"] = {"model_name_or_path": "somebody/teacher", "num_samples": 4, "temperature": 0.7}
    values["data"] = {"svamp": {"train": {"annotate": {"max_steps": 3}}, "test": {}}}
    return values


def test_the_teacher_reads_the_source_and_the_shards_what_it_wrote(
    taught: dict[str, Any], make_study: MakeStudy
) -> None:
    annotate, prepare, test, *_ = stages.study_stages(make_study(taught))
    assert (annotate.label, annotate.num_ranks) == ("annotate svamp-train", 1)
    asked = annotate.settings
    assert (asked.data, asked.data_path, asked.split, asked.seed) == ("svamp", "somebody/svamp", "train", 5)
    assert (asked.num_samples, asked.max_steps, asked.output_dir) == (4, 3, "annotations/svamp-train")
    assert asked.decontaminate == ["svamp:somebody/svamp:test"], "nothing that is evaluated may be learned"
    assert (prepare.settings.data, prepare.needs) == ("jsonl", (annotate.label,))
    assert prepare.settings.data_path == "annotations/svamp-train/result/annotated.jsonl"
    assert (test.settings.data, test.settings.seed, test.needs) == ("svamp", 5, ())
    line = stages.stage_command(annotate, Path("tools"), "auto")
    assert line[1] == "tools/annotate.py" and "--model_name_or_path=somebody/teacher" in line


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
def test_what_is_wrong_is_named(taught: dict[str, Any], make_study: MakeStudy, message: str) -> None:
    taught["data"]["svamp"]["train"] = WRONG[message]
    with pytest.raises(UserError) as caught:
        make_study(taught)
    assert message in str(caught.value)


def test_somebody_has_to_teach(taught: dict[str, Any], make_study: MakeStudy) -> None:
    taught["annotate"] = {}
    with pytest.raises(
        UserError, match=r"data\.svamp\.train\.annotate: give either base_url .* or model_name"
    ):
        make_study(taught)


def test_the_teacher_is_asked_once(taught: dict[str, Any], make_study: MakeStudy) -> None:
    annotate = stages.study_stages(make_study(taught))[0]
    assert not status.is_done(annotate)
    result = AnnotationDirectory(Path("annotations/svamp-train")).result
    commit_directory(result, "annotations", recipe={"style": "socratic", "max_steps": 3})
    assert status.is_done(annotate)
    taught["data"]["svamp"]["train"]["annotate"]["style"] = "cot"
    with pytest.raises(
        UserError, match=r"result holds annotations with style 'socratic', the study says 'cot'"
    ):
        status.is_done(stages.study_stages(make_study(taught))[0])
    shutil.rmtree(result)
    commit_directory(Path("shards/svamp-train"), "shards", recipe={})
    assert status.is_done(annotate), "the shards are all that is needed"


def test_another_teacher_is_another_study(taught: dict[str, Any], make_study: MakeStudy) -> None:
    study = make_study(taught)
    changes.save_snapshot(study)
    commit_directory(study.runs[0].directory.checkpoint(1), "checkpoint", finished=True)
    taught["annotate"] |= {"batch_size": 3}
    changes.check_unchanged(make_study(taught))  # how many at a time does not matter
    taught["annotate"] |= {"model_name_or_path": "somebody/else"}
    message = r"annotate\.model_name_or_path was 'somebody/teacher', is now 'somebody/else'"
    with pytest.raises(UserError, match=message):
        changes.check_unchanged(make_study(taught))


def test_a_study_with_a_teacher_runs(tmp_path: Path, tools: Path, taught: dict[str, Any]) -> None:
    """The stand-in that makes shards fails if the annotations are not there."""
    command = Command(tmp_path, tools, taught)
    status, output = command("run")
    assert status == 0, output
    assert "[1/10] annotate svamp-train: 600 problems annotated, 90 not (" in output
    assert "10 stages, 10 done" in command("run")[1]
