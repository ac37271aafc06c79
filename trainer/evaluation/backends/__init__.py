"""Interface between solving programs (rollout.py) and decoding backends.

A request defines the tokens that each model reads and which model chooses the next token; a backend computes the next
tokens of one model. `generate.py` drives any number of backends through this interface alone.
"""

from __future__ import annotations

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
    sampling_seed: int = 0
    length: int = 0  # number of processed tokens, updated by the backend
    is_done: bool = False  # no more tokens will be added

    @property
    def num_tokens(self) -> int:
        return self.length + len(self.pending)


class Request(Protocol):
    """A problem that is being solved, as backends use it."""

    @property
    def sequences(self) -> Sequence[SequenceState]:
        """One sequence per backend."""

    @property
    def next_model(self) -> int | None:
        """Number of the model that chooses the next token; None when the request has ended."""


AnyRequest = TypeVar("AnyRequest", bound=Request)
Sampler = Callable[[torch.Tensor, list[SequenceState]], list[int]]  # logits [sequences, vocabulary] -> tokens


@dataclass(eq=False)
class Backend(ABC, Generic[AnyRequest]):
    """Computes next tokens of one model for up to `num_slots` requests."""

    model_number: int  # of this model in requests
    model: PreTrainedModel
    num_slots: int
    capacity: int  # maximum sequence length in tokens
    sampler: Sampler
    prefix: Sequence[int] = ()  # tokens that all sequences start with; they are processed once

    @property
    @abstractmethod
    def num_runnable(self) -> int:
        """Number of requests whose next token this model must choose."""

    @abstractmethod
    def add(self, request: AnyRequest) -> None:
        """Add a request. It is removed when it has ended or its sequence is done."""

    @abstractmethod
    def step(self) -> list[tuple[AnyRequest, int]]:
        """Process pending tokens of waiting requests; must be called only if there are any.

        Return the requests without pending tokens left, each with its next token.
        """

    @abstractmethod
    def prepared_model(self) -> AbstractContextManager[None]:
        """Return a context manager that prepares the model for `step` and restores it afterwards."""

    def sequence(self, request: AnyRequest) -> SequenceState:
        return request.sequences[self.model_number]

    def is_waiting(self, request: AnyRequest) -> bool:
        return request.next_model == self.model_number

    def is_released(self, request: AnyRequest) -> bool:
        return request.next_model is None or self.sequence(request).is_done
