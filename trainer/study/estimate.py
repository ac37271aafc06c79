"""Estimate the remaining time of a study from the durations of the stages that have ended."""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from trainer.study.stages import Stage


@dataclass
class StageTimes:
    """Durations of ended stages, and predictions for other stages.

    A training is predicted from the trainings of the same model, in proportion to the steps. Any other stage is predicted
    from stages of the same kind and method, else of the same kind.
    """

    _totals: dict[tuple[str, ...], list[float]] = field(
        default_factory=lambda: defaultdict(lambda: [0.0, 0.0])
    )

    def record(self, stage: Stage, seconds: float) -> None:
        for key in _keys(stage):
            total = self._totals[key]
            total[0] += seconds
            total[1] += _size(stage)

    def predict(self, stage: Stage) -> float | None:
        """Return the predicted seconds of a stage, or None before a stage of the same kind has ended."""
        for key in _keys(stage):
            seconds, size = self._totals.get(key, (0.0, 0.0))
            if size:
                return seconds / size * _size(stage)
        return None


def _keys(stage: Stage) -> Iterable[tuple[str, ...]]:
    """Return the groups of stages from which a stage is predicted, the most similar ones first."""
    if stage.kind == "train":
        settings = stage.settings
        yield stage.kind, settings.model_label, settings.method
        yield stage.kind, settings.model_label
    elif stage.run:
        yield stage.kind, stage.run.directory.name.split(".")[1]
    yield (stage.kind,)


def _size(stage: Stage) -> float:
    """Return the number of steps or epochs of a training; 1.0 for other stages."""
    return (
        float(stage.settings.max_steps or stage.settings.num_train_epochs) if stage.kind == "train" else 1.0
    )


def remaining_seconds(
    waiting: Sequence[Stage],
    running: Sequence[tuple[Stage, float]],
    times: StageTimes,
    num_parallel: int,
    max_ranks: float = math.inf,
) -> float | None:
    """Return the time until all stages have ended, if they are started in the order and under the limits of the executor.

    `running`: the running stages, each with the seconds that are left. Returns None if the training or the evaluation of a waiting stage cannot be
    predicted yet. Other kinds of stages that cannot be predicted count as 0 seconds.
    """
    seconds = {}
    for stage in waiting:
        predicted = times.predict(stage)
        if predicted is None and stage.kind in ("train", "evaluate"):
            return None
        seconds[stage.label] = predicted or 0.0
    queue, now = list(waiting), 0.0
    ends = [(left, number, stage) for number, (stage, left) in enumerate(running)]
    heapq.heapify(ends)
    unfinished = {stage.label for stage in (*waiting, *(stage for stage, _ in running))}
    while queue or ends:
        used = sum(stage.num_ranks for *_, stage in ends)
        ready = (
            candidate
            for candidate in queue
            if not unfinished.intersection(candidate.needs)
            and (not ends or used + candidate.num_ranks <= max_ranks)
        )
        if len(ends) < num_parallel and (started := next(ready, None)):
            queue.remove(started)
            heapq.heappush(ends, (now + seconds[started.label], len(queue) + len(running), started))
        elif ends:
            now, _, ended = heapq.heappop(ends)
            unfinished.discard(ended.label)
        else:
            break  # the remaining stages depend on failed stages
    return now
