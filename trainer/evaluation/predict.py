"""The problems of a shard set, solved by all ranks together: every rank yields the predictions it made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from trainer import distributed
from trainer.evaluation.backends import Backend
from trainer.evaluation.backends.choice import make_backend
from trainer.evaluation.cast import Cast
from trainer.evaluation.decoding import ALONE
from trainer.evaluation.generate import chooser, generate
from trainer.evaluation.score import judge
from trainer.evaluation.solution import Solution
from trainer.evaluation.tickets import Counter, Tickets, ticket_size
from trainer.shards.read import Shards


def predictions(cast: Cast, indices: Sequence[int], counter: Counter) -> Iterator[dict[str, Any]]:
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
    tickets = Tickets(counter, order, ticket_size(len(order), num_slots))

    def draw() -> Solution | None:
        index = tickets.draw()
        return None if index is None else cast.solution(index)

    choose = chooser(decoding.temperature, decoding.top_p)
    capacities = cast.capacities(order)
    backends: list[Backend[Solution]] = [
        make_backend(how, seat, model, num_slots, capacities[seat], choose, cast.prefix, len(cast.models))
        for seat, (how, model) in enumerate(zip(cast.backends, cast.models, strict=True))
    ]
    for solution in generate(backends, draw, Solution.after, num_slots, counter.serve):
        yield _prediction(cast, solution)


def longest_first(shards: Shards, indices: Iterable[int]) -> list[int]:
    """The long ones first, not last. What the data writes foretells what a student will write better than its prompt does."""
    totals = shards.total_lengths()
    return sorted(indices, key=lambda index: -totals[index])


def _prediction(cast: Cast, solution: Solution) -> dict[str, Any]:
    written: dict[str, Any] = {
        "generated_tokens": solution.generated.total(),
        "calculator_results_given": solution.calculator_results,
        "finished": solution.finished,
    }
    if cast.decoding.mode not in ALONE:
        written["generated_by"] = {part: solution.generated[part] for part in cast.rules.voices}
        written["stopped"] = solution.stopped
    if cast.decoding.guidance:
        written["plan"] = solution.plan
    return judge(cast.shards.problem(solution.index), solution.text, written)
