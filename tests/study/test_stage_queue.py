"""The order of stages and their devices, without processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.study import stage_queue, stages, status
from trainer.study.stage_queue import StageQueue
from trainer.study.stages import Stage
from trainer.study.study_file import Study

MakeStudy = Callable[[dict[str, Any]], Study]
COT, ANSWER_ONLY = "stories.cot.small.s0", "stories.answer_only.small.s0"


@pytest.fixture
def todo(values: dict[str, Any], make_study: MakeStudy) -> list[Stage]:
    return stages.study_stages(make_study(values))


def startable(queue: StageQueue) -> list[Stage]:
    """Take all stages that can be started now."""
    return list(iter(queue.pop_ready, None))


def labels(found: list[Stage]) -> list[str]:
    return [stage.label for stage in found]


def test_one_at_a_time_is_the_order_of_the_study(todo: list[Stage]) -> None:
    queue = StageQueue(todo, [])
    order = []
    while stage := queue.pop_ready():
        order.append(stage)
        queue.mark_ended(stage, succeeded=True)
    assert order == todo


def test_a_stage_waits_for_all_that_it_needs(todo: list[Stage]) -> None:
    queue = StageQueue(todo, [])
    prepare_train, prepare_test = startable(queue)
    assert labels([prepare_train, prepare_test]) == ["prepare stories-train", "prepare stories-test"]
    assert queue.pop_ready() is None
    queue.mark_ended(prepare_train, succeeded=True)
    first, second = startable(queue)
    assert labels([first, second]) == [f"train {ANSWER_ONLY}", f"train {COT}"]
    queue.mark_ended(second, succeeded=True)
    [convert] = startable(queue)
    assert convert.label == f"convert {COT}"
    queue.mark_ended(convert, succeeded=True)
    assert queue.pop_ready() is None, "the problems of the evaluation are not prepared yet"
    queue.mark_ended(prepare_test, succeeded=True)
    assert labels(startable(queue)) == [f"evaluate {COT} on stories-test"]


def test_a_stage_with_too_many_ranks_stays_in_the_queue(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    values["models"]["alone"] = {**values["models"]["small"], "num_ranks": 1}
    values["methods"] = ["cot"]
    todo = stages.study_stages(make_study(values))
    queue = StageQueue(todo, todo[:2])
    alone = queue.pop_ready(max_ranks=1)
    assert alone and alone.label == "train stories.cot.alone.s0"
    assert queue.pop_ready(max_ranks=1) is None
    ranks = queue.pop_ready(max_ranks=2)
    assert ranks and (ranks.label, ranks.num_ranks) == ("train stories.cot.small.s0", 2)


def test_a_stage_that_is_done_is_not_started_even_if_its_dependencies_are_not(todo: list[Stage]) -> None:
    trained = [stage for stage in todo if stage.kind == "train"]
    assert labels(startable(StageQueue(todo, trained))) == [
        *("prepare stories-train", "prepare stories-test"),
        *(f"convert {ANSWER_ONLY}", f"convert {COT}"),
    ]


def test_dependents_of_a_failed_stage_fail_and_the_report_waits_for_the_others(todo: list[Stage]) -> None:
    queue = StageQueue(todo, todo[:2])
    answer_only, cot = startable(queue)
    queue.mark_ended(answer_only, succeeded=False)
    assert startable(queue) == [], "neither its conversion, nor its evaluation, nor the report"
    for kind in ("convert", "evaluate", "report"):
        queue.mark_ended(cot, succeeded=True)
        [cot] = startable(queue)
        assert cot.kind == kind


def test_a_report_is_made_anew_when_anything_else_is(
    todo: list[Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, report = todo[-2:]
    queue = StageQueue(todo, [stage for stage in todo if stage is not evaluate])
    assert queue.pop_ready() is evaluate
    assert queue.pop_ready() is None
    queue.mark_ended(evaluate, succeeded=True)
    assert queue.pop_ready() is report
    monkeypatch.setattr(status, "is_done", lambda stage: True)
    assert StageQueue(todo, todo).pop_ready() is None


def test_stages_share_devices_only_if_there_are_too_few() -> None:
    def taken(num_devices: int, *counts: int) -> list[str]:
        used: list[tuple[str, ...]] = []
        for count in counts:
            used.append(
                stage_queue.least_used_devices([str(number) for number in range(num_devices)], used, count)
            )
        return ["".join(found) for found in used]

    assert taken(8, 2, 2, 2, 2) == ["01", "23", "45", "67"]
    assert taken(4, 1, 2, 1) == ["0", "12", "3"]
    assert taken(2, 1, 1, 1, 1) == ["0", "1", "0", "1"]
    assert taken(1, 1, 1) == ["0", "0"]
    assert taken(3, 2, 2) == ["01", "20"]
    assert taken(2, 3) == ["01"], "the launcher reports the error"
    assert taken(0, 1) == [""]
    assert taken(2, 1, 0) == ["0", ""]
    assert stage_queue.least_used_devices(["4", "5"], [("4",), ()], 1) == ("5",), (
        "devices of ended stages are free"
    )


def test_devices_are_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage_queue.visible_devices({"CUDA_VISIBLE_DEVICES": "2, 5"}) == ("2", "5")
    assert stage_queue.visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-3a,MIG-3b"}) == ("GPU-3a", "MIG-3b")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stage_queue.visible_devices({}) == (), "no nvidia-smi"
    listing = "GPU 0: NVIDIA H100 (UUID: GPU-1)\\n  MIG 1g.10gb Device 0: (UUID: MIG-1)\\nGPU 1: NVIDIA H100 (UUID: GPU-2)"
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n[ \"$1\" = -L ] && printf '{listing}\\n'\n")
    command.chmod(0o755)
    assert stage_queue.visible_devices({}) == ("0", "1")
    assert stage_queue.visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == (), "set to the CPU only"
    command.write_text("#!/bin/sh\necho 'GPU access blocked by the operating system'; exit 9\n")
    assert stage_queue.visible_devices({}) == ()
