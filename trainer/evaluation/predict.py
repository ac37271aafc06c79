"""The problems of a shard set, solved by all ranks together: every rank yields the predictions it made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from trainer.evaluation.backends import Backend
from trainer.evaluation.backends.choice import make_backend
from trainer.evaluation.decoding import SINGLE_MODEL_MODES
from trainer.evaluation.generate import generate, make_sampler
from trainer.evaluation.pipeline import Pipeline
from trainer.evaluation.rollout import Rollout
from trainer.evaluation.score import score_prediction
from trainer.evaluation.work_queue import Counter, WorkQueue, batch_size
from trainer.runtime import distributed
from trainer.shards.read import Shards


def predictions(cast: Pipeline, indices: Sequence[int], counter: Counter) -> Iterator[dict[str, Any]]:
    """Solve the problems `indices` together with the other ranks; yield this rank's predictions as they are made.

    A problem whose prompt fills the model's context is a prediction without text. `cast.backends` says how each model is
    decoded.
    """
    if not indices:
        return
    shards, decoding = cast.shards, cast.decoding
    order = longest_first(shards, indices)
    # With more slots than problems the first rank to ask would take them all.
    num_slots = min(decoding.batch_size, -(-len(order) // distributed.environment().world_size))
    tickets = WorkQueue(counter, order, batch_size(len(order), num_slots))

    def draw() -> Rollout | None:
        index = tickets.next_index()
        return None if index is None else cast.rollout(index)

    choose = make_sampler(decoding.temperature, decoding.top_p)
    capacities = cast.capacities(order)
    backends: list[Backend[Rollout]] = [
        make_backend(
            how, seat, model, num_slots, capacities[seat], choose, cast.shared_prefix, len(cast.models)
        )
        for seat, (how, model) in enumerate(zip(cast.backends, cast.models, strict=True))
    ]
    for solution in generate(backends, draw, Rollout.on_token, num_slots, counter.serve):
        yield _prediction(cast, solution)


def longest_first(shards: Shards, indices: Iterable[int]) -> list[int]:
    """The long ones first, not last. What the data writes foretells what a student will write better than its prompt does."""
    totals = shards.total_lengths()
    return sorted(indices, key=lambda index: -totals[index])


def _prediction(cast: Pipeline, solution: Rollout) -> dict[str, Any]:
    written: dict[str, Any] = {
        "generated_tokens": solution.generated.total(),
        "calculator_results_given": solution.calculator_results,
        "finished": solution.finished,
    }
    if cast.decoding.mode not in SINGLE_MODEL_MODES:
        written["generated_by"] = {part: solution.generated[part] for part in cast.context.roles}
        written["stopped"] = solution.stop_reason
    if cast.decoding.guidance:
        written["plan"] = solution.plan
    return score_prediction(cast.shards.problem(solution.index), solution.text, written)
