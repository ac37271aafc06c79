"""Slot-refill decoding: as soon as a sequence ends, its slot goes to the next problem (see models/slots.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

from trainer.evaluation import sampling
from trainer.evaluation.engine import Engine
from trainer.evaluation.solve import Solution
from trainer.models.slots import slot_attention_of

_MOST_TOKENS_A_STEP = 16384  # bounds the activations when many slots start at once

Choose = Callable[[torch.Tensor, list[Solution]], list[int]]


def chooser(temperature: float, top_p: float) -> Choose:
    """How tokens are chosen: greedily at temperature 0, else sampled with each solution's own noise."""

    def choose(logits: torch.Tensor, solutions: list[Solution]) -> list[int]:
        if temperature == 0:
            return sampling.greedy(logits)
        uniforms = [sampling.uniform(solution.noise_key, solution.length) for solution in solutions]
        return sampling.sampled(logits, temperature, top_p, uniforms)

    return choose


def generate(
    model: PreTrainedModel,
    draw: Callable[[], Solution | None],
    num_slots: int,
    capacity: int,
    choose: Choose,
    each_step: Callable[[], object] = lambda: None,
) -> Iterator[Solution]:
    """Yield solutions as they end. `draw` gives the next one to start, None when there are no more.

    `capacity` is the longest sequence (prompt and solution) in tokens; `each_step` is called after each forward
    pass. The model's attention and mode are as before when the iterator is exhausted or closed.
    """
    with slot_attention_of(model):
        engine = Engine(model, num_slots, capacity, choose)
        while True:
            waiting_tokens = sum(len(solution.pending) for solution in engine.live)
            while engine.num_free and waiting_tokens < _MOST_TOKENS_A_STEP:
                solution = draw()
                if solution is None:
                    break
                engine.add(solution)
                waiting_tokens += len(solution.pending)
            if not engine.live:
                return
            tokens = engine.step()
            each_step()
            over = [slot for slot, token in enumerate(tokens) if not engine.live[slot].after(token)]
            ended = [engine.live[slot] for slot in over]
            for slot in reversed(over):
                successor = draw()
                if successor is None:
                    engine.remove(slot)
                else:
                    engine.replace(slot, successor)
            yield from ended
