"""The estimate of a study's remaining time, compared with a run of the same stages by the executor's rules."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.study import stages
from trainer.study.estimate import StageTimes, remaining_seconds
from trainer.study.stages import Stage
from trainer.study.study_file import Study

MakeStudy = Callable[[dict[str, Any]], Study]


def stage(label: str, ranks: int = 1, needs: tuple[str, ...] = ()) -> Stage:
    kind, subject = label.split()
    return Stage(kind, subject, None, Path("log"), ranks, needs=needs)


def times_of(**seconds: float) -> StageTimes:
    times = StageTimes()
    for kind, duration in seconds.items():
        times.record(stage(f"{kind} x"), duration)
    return times


@pytest.mark.parametrize(("num_parallel", "expected"), [(1, 40.0), (2, 20.0), (3, 20.0), (9, 10.0)])
def test_stages_share_the_slots(num_parallel: int, expected: float) -> None:
    waiting = [stage(f"convert {name}") for name in "abcd"]
    assert remaining_seconds(waiting, [], times_of(convert=10.0), num_parallel) == expected


def test_a_stage_starts_after_the_stages_that_it_needs() -> None:
    first, second = stage("prepare a"), stage("convert b", needs=("prepare a",))
    times = times_of(prepare=3.0, convert=4.0)
    assert remaining_seconds([first, second], [], times, 2) == 7.0
    assert remaining_seconds([second], [(first, 1.5)], times, 2) == 5.5
    assert remaining_seconds([second], [], times, 2) == 4.0, "what is needed has ended"


def test_stages_of_several_ranks_wait_until_they_fit() -> None:
    """`b` does not fit beside `a`, so `c` comes before it."""
    waiting = [stage("convert a"), stage("convert b", ranks=2), stage("convert c")]
    times = times_of(convert=10.0)
    assert remaining_seconds(waiting, [], times, 2, max_ranks=2) == 20.0
    assert remaining_seconds(waiting[1:2], [], times, 2, max_ranks=1) == 10.0, "alone, it runs in any case"


def test_stages_that_cannot_run_do_not_count() -> None:
    blocked = [stage("convert b", needs=("convert a",)), stage("convert a", needs=("convert b",))]
    assert remaining_seconds(blocked, [], times_of(convert=1.0), 2) == 0.0


def test_a_training_is_predicted_from_trainings_of_the_same_model(
    values: dict[str, Any], make_study: MakeStudy
) -> None:
    values["models"] = {
        "small": {"config_name": "stories-0.2m", "max_steps": 100},
        "large": {"config_name": "stories-3m", "max_steps": 50},
    }
    values["methods"] = {"answer_only": {"max_steps": 10}, "cot": None, "socratic": None}
    todo = stages.study_stages(make_study(values))
    found = {f"{s.kind} {s.subject.removeprefix('stories.').removesuffix('.s0')}": s for s in todo}
    times = StageTimes()
    assert times.predict(found["train cot.small"]) is None
    assert remaining_seconds(todo, [], times, 1) is None, "no training has ended"
    times.record(found["train answer_only.small"], 1.0)
    times.record(found["train answer_only.large"], 4.0)
    assert times.predict(found["train cot.small"]) == pytest.approx(10.0)
    assert times.predict(found["train cot.large"]) == pytest.approx(20.0)
    times.record(found["train cot.small"], 30.0)
    assert times.predict(found["train socratic.small"]) == pytest.approx(31.0 * 100 / 110)
    assert remaining_seconds(todo, [], times, 1) is None, "no evaluation has ended"
    times.record(found["evaluate answer_only.small"], 2.0)
    assert times.predict(found["evaluate cot.large"]) == 2.0
    times.record(found["evaluate cot.small"], 6.0)
    assert times.predict(found["evaluate cot.large"]) == 6.0
    assert times.predict(found["evaluate socratic.large"]) == 4.0


def test_the_estimate_is_the_duration_of_a_simulated_run() -> None:
    """A simulation with a fixed time step gives the same duration for random stages of random lengths, up to the steps."""
    rng = random.Random(0)
    for _ in range(20):
        times = StageTimes()
        waiting: list[Stage] = []
        for number in range(12):
            earlier = tuple(other.label for other in waiting if rng.random() < 0.2)
            new = stage(f"convert{number} x", ranks=rng.choice((1, 1, 2)), needs=earlier)
            times.record(new, rng.uniform(1.0, 9.0))
            waiting.append(new)
        estimate = remaining_seconds(waiting, [], times, 2, max_ranks=2)
        assert estimate == pytest.approx(simulate(waiting, times, time_step=0.002), abs=0.05)


def simulate(waiting: list[Stage], times: StageTimes, time_step: float) -> float:
    queue, done, now = list(waiting), set[str](), 0.0
    running: dict[str, tuple[int, float]] = {}  # label -> ranks and seconds left
    while queue or running:
        for candidate in list(queue):
            used = sum(ranks for ranks, _ in running.values())
            fits = not running or (len(running) < 2 and used + candidate.num_ranks <= 2)
            if fits and done.issuperset(candidate.needs):
                seconds = times.predict(candidate)
                assert seconds is not None
                running[candidate.label] = (candidate.num_ranks, seconds)
                queue.remove(candidate)
        now += time_step
        running = {label: (ranks, left - time_step) for label, (ranks, left) in running.items()}
        done |= {label for label, (_, left) in running.items() if left <= 0}
        running = {label: value for label, value in running.items() if value[1] > 0}
    return now
