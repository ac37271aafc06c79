"""Interface of decoding backends.

A request is a problem that is being solved, e.g. a `Rollout`. A request has one token sequence per model, and the index of
the model that must choose the next token. A backend chooses the next tokens of one model. `generate.py` uses backends only
through this interface.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedModel


@dataclass
class SequenceState:
    """The token sequence of one request in one model."""

    pending: list[int]  # tokens that the model has not processed yet
    sampling_seed: int = 0  # seed of the random numbers for this sequence
    length: int = 0  # number of processed tokens, updated by the backend
    is_done: bool = False  # True if no more tokens will be added

    @property
    def num_tokens(self) -> int:
        return self.length + len(self.pending)


class Request(Protocol):
    """Protocol for a problem that is being solved, with the attributes that backends use."""

    @property
    def sequences(self) -> Sequence[SequenceState]:
        """One sequence per model."""

    @property
    def next_model(self) -> int | None:
        """Index of the model that chooses the next token; None when the request has ended."""


AnyRequest = TypeVar("AnyRequest", bound=Request)
# Arguments: logits [sequences, vocabulary], sequences. Result: the next token of each sequence.
Sampler = Callable[[torch.Tensor, list[SequenceState]], list[int]]


@dataclass(eq=False)
class Backend(ABC, Generic[AnyRequest]):
    """Backend that computes the next tokens of one model for up to `num_slots` requests."""

    model_index: int  # index of the model's sequence in `Request.sequences`
    model: PreTrainedModel
    num_slots: int
    capacity: int  # maximum sequence length in tokens
    sampler: Sampler
    prefix: Sequence[int] = ()  # first tokens of every sequence, which a backend may process only once

    @property
    @abstractmethod
    def num_runnable(self) -> int:
        """Number of requests whose next token this model must choose."""

    @abstractmethod
    def add(self, request: AnyRequest) -> None:
        """Add a request. The backend removes it when the request ends or this model's sequence is done."""

    @abstractmethod
    def step(self) -> list[tuple[AnyRequest, int]]:
        """Process pending tokens of runnable requests and choose next tokens. At least one request must be runnable.

        Return (request, next token) for each processed request that has no pending tokens left.
        """

    @abstractmethod
    def prepared_model(self) -> AbstractContextManager[None]:
        """Return a context manager that prepares the model for `step` and restores it afterwards."""

    def sequence(self, request: AnyRequest) -> SequenceState:
        return request.sequences[self.model_index]

    def is_waiting(self, request: AnyRequest) -> bool:
        return request.next_model == self.model_index

    def is_released(self, request: AnyRequest) -> bool:
        return request.next_model is None or self.sequence(request).is_done
