"""Solve the problems of a shard set on all ranks, which share a work queue."""

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


def predictions(pipeline: Pipeline, indices: Sequence[int], counter: Counter) -> Iterator[dict[str, Any]]:
    """Solve the problems `indices` together with the other ranks; yield this rank's predictions as they are made.

    A problem whose prompt fills the model's context gives a prediction with an empty text. `pipeline.backends` must hold
    the chosen backends.
    """
    if not indices:
        return
    shards, decoding = pipeline.shards, pipeline.decoding
    order = longest_first(shards, indices)
    # With more slots than problems the first rank would take all of them.
    num_slots = min(decoding.batch_size, -(-len(order) // distributed.environment().world_size))
    queue = WorkQueue(counter, order, batch_size(len(order), num_slots))

    def next_rollout() -> Rollout | None:
        index = queue.next_index()
        return None if index is None else pipeline.rollout(index)

    sampler = make_sampler(decoding.temperature, decoding.top_p)
    capacities = pipeline.capacities(order)
    backends: list[Backend[Rollout]] = [
        make_backend(
            choice,
            number,
            model,
            num_slots,
            capacities[number],
            sampler,
            pipeline.shared_prefix,
            len(pipeline.models),
        )
        for number, (choice, model) in enumerate(zip(pipeline.backends, pipeline.models, strict=True))
    ]
    for rollout in generate(backends, next_rollout, Rollout.on_token, num_slots, counter.serve):
        yield _prediction(pipeline, rollout)


def longest_first(shards: Shards, indices: Iterable[int]) -> list[int]:
    """Return the indices by falling length of the data's example, which predicts the generated length better than the prompt."""
    totals = shards.total_lengths()
    return sorted(indices, key=lambda index: -totals[index])


def _prediction(pipeline: Pipeline, rollout: Rollout) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "generated_tokens": rollout.generated.total(),
        "calculator_results_given": rollout.calculator_results,
        "finished": rollout.finished,
    }
    if pipeline.decoding.mode not in SINGLE_MODEL_MODES:
        fields["generated_by"] = {role: rollout.generated[role] for role in pipeline.context.roles}
        fields["stopped"] = rollout.stop_reason
    if pipeline.decoding.guidance:
        fields["plan"] = rollout.plan
    return score_prediction(pipeline.shards.problem(rollout.index), rollout.text, fields)
