"""The problems of a shard set, solved by all ranks together: every rank yields the predictions it made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer import distributed
from trainer.evaluation.decoding import Decoding
from trainer.evaluation.generate import chooser, generate
from trainer.evaluation.sampling import noise_key
from trainer.evaluation.score import judge
from trainer.evaluation.solve import Solution, Writer
from trainer.evaluation.tickets import Counter, Tickets, ticket_size
from trainer.models.load import context_length
from trainer.problems.problem import DELIMITER
from trainer.shards.read import Shards


def predictions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
    indices: Sequence[int],
    decoding: Decoding,
    counter: Counter,
) -> Iterator[dict[str, Any]]:
    """Solve the problems `indices` together with the other ranks; yield this rank's predictions as they are made.

    A problem whose prompt fills the model's context is a prediction without text, made by rank 0.
    """
    opening = tokenizer(DELIMITER, add_special_tokens=False)["input_ids"] if decoding.impose_answer else []
    context = context_length(model.config) or math.inf
    writer = Writer(tokenizer, model, context, decoding.max_new_tokens, decoding.calculator, opening)
    lengths = {index: len(shards.prompt(index)) for index in indices}
    fitting = [index for index in indices if lengths[index] + len(opening) < context]
    if distributed.is_main_process():
        for index in set(indices) - set(fitting):
            yield judge(shards.problem(index), "", 0, False)
    if not fitting:
        return
    order = sorted(fitting, key=lambda index: -lengths[index])  # the long ones first, not last
    # With more slots than problems the first rank to ask would take them all.
    num_slots = min(decoding.batch_size, -(-len(order) // distributed.world().world_size))
    tickets = Tickets(counter, order, ticket_size(len(order), num_slots))

    def draw() -> Solution | None:
        index = tickets.draw()
        if index is None:
            return None
        key = noise_key(decoding.seed, shards.problem(index).id) if decoding.temperature else 0
        return Solution(index, shards.prompt(index).tolist(), key, writer)

    capacity = int(min(lengths[order[0]] + len(opening) + decoding.max_new_tokens, context))
    choose = chooser(decoding.temperature, decoding.top_p)
    for solution in generate(model, draw, num_slots, capacity, choose, counter.serve):
        text = writer.text(solution.tokens)
        yield judge(shards.problem(solution.index), text, len(solution.tokens), solution.finished)
