"""Decoding of many problems with one or several models: as soon as a problem has ended, the next one takes its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from trainer.evaluation import sampling
from trainer.evaluation.backends import AnyRequest, Backend, Sampler, SequenceState


def make_sampler(temperature: float, top_p: float) -> Sampler:
    """How tokens are chosen: greedily at temperature 0, else sampled with each feed's own noise."""

    def choose(logits: torch.Tensor, feeds: list[SequenceState]) -> list[int]:
        if temperature == 0:
            return sampling.greedy(logits)
        uniforms = [sampling.uniform_noise(feed.sampling_seed, feed.length) for feed in feeds]
        return sampling.sampled(logits, temperature, top_p, uniforms)

    return choose


def generate(
    backends: Sequence[Backend[AnyRequest]],
    next_request: Callable[[], AnyRequest | None],
    on_token: Callable[[AnyRequest, int], None],
    num_slots: int,
    each_step: Callable[[], object] = lambda: None,
) -> Iterator[AnyRequest]:
    """Yield problems as they end; `num_slots` of them are on their way at the same time.

    `draw` gives the next one to start, None when there are no more; `after` hands a problem the token that was chosen
    for it. Of several backends the one for which most problems wait makes the next step: that fills the passes best,
    and as every problem's work is bounded, every problem ends. `each_step` is called after each step.
    The models are as before when the iterator is exhausted or closed.
    """
    with contextlib.ExitStack() as stack:
        for backend in backends:
            stack.enter_context(backend.active())
        on_their_way = 0
        while True:
            while on_their_way < num_slots and (problem := next_request()) is not None:
                if problem.next_model is None:  # it could not even start
                    yield problem
                    continue
                for backend in backends:
                    backend.add(problem)
                on_their_way += 1
            if not on_their_way:
                return
            busiest = max(backends, key=lambda backend: backend.num_waiting)
            ended = []
            for problem, token in busiest.step():
                on_token(problem, token)
                if problem.next_model is None:
                    ended.append(problem)
            on_their_way -= len(ended)
            each_step()
            yield from ended
