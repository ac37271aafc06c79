"""Continuous batching: decode many requests with one or several models, and refill free slots as requests end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from trainer.evaluation import sampling
from trainer.evaluation.backends import AnyRequest, Backend, Sampler, SequenceState


def make_sampler(temperature: float, top_p: float) -> Sampler:
    """Return a greedy sampler at temperature 0, else one that samples with each sequence's own random numbers."""

    def sample(logits: torch.Tensor, sequences: list[SequenceState]) -> list[int]:
        if temperature == 0:
            return sampling.greedy(logits)
        uniforms = [sampling.uniform_noise(sequence.sampling_seed, sequence.length) for sequence in sequences]
        return sampling.sampled(logits, temperature, top_p, uniforms)

    return sample


def generate(
    backends: Sequence[Backend[AnyRequest]],
    requests: Iterator[AnyRequest],
    on_token: Callable[[AnyRequest, int], None],
    num_slots: int,
    each_step: Callable[[], object] = lambda: None,
) -> Iterator[AnyRequest]:
    """Yield requests as they end; up to `num_slots` of them are decoded at the same time.

    `requests` is advanced when a slot is free; `on_token` receives a request and the token chosen for it; `each_step` is
    called after each step. Of several backends the one with most waiting requests steps next, which
    fills the batches best; every request ends because its length is bounded. The models are restored when the iterator is
    exhausted or closed.
    """
    with contextlib.ExitStack() as stack:
        for backend in backends:
            stack.enter_context(backend.prepared_model())
        num_active = 0
        while True:
            while num_active < num_slots and (request := next(requests, None)) is not None:
                if request.next_model is None:  # the prompt fills the context
                    yield request
                    continue
                for backend in backends:
                    backend.add(request)
                num_active += 1
            if not num_active:
                return
            busiest = max(backends, key=lambda backend: backend.num_runnable)
            ended = []
            for request, token in busiest.step():
                on_token(request, token)
                if request.next_model is None:
                    ended.append(request)
            num_active -= len(ended)
            each_step()
            yield from ended
