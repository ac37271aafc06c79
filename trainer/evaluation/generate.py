"""Continuous batching: decode many requests with one or several models, and refill the slots of ended requests."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from trainer.evaluation import sampling
from trainer.evaluation.backends import AnyRequest, Backend, Sampler, SequenceState


def make_sampler(temperature: float, top_p: float) -> Sampler:
    """Return a function that chooses next tokens: the most probable at temperature 0, else sampled by `sampling_seed`."""

    def sample(logits: torch.Tensor, sequences: list[SequenceState]) -> list[int]:
        if temperature == 0:
            return sampling.greedy(logits)
        uniforms = [
            sampling.uniform_random(sequence.sampling_seed, sequence.length) for sequence in sequences
        ]
        return sampling.sampled(logits, temperature, top_p, uniforms)

    return sample


def generate(
    backends: Sequence[Backend[AnyRequest]],
    requests: Iterator[AnyRequest],
    on_token: Callable[[AnyRequest, int], None],
    num_slots: int,
    each_step: Callable[[], object] = lambda: None,
) -> Iterator[AnyRequest]:
    """Yield requests as they end. Up to `num_slots` requests are decoded at the same time.

    When a slot is free, the next request is taken from `requests`. `on_token` is called with a request and its next token,
    and must update `next_model` of the request. `each_step` is called after each step. The backend with the most runnable
    requests runs the next step, so that batches are large. The requests of the other backends get their turn, because the
    lengths of sequences are limited. The backends restore their models when the iterator ends.
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
