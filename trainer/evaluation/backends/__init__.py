"""The interface between solving programs and the ways of decoding (backends).

A solving program (solution.py) says what a model reads and which model chooses the next token; a backend computes the
next tokens of one model. `generate.py` drives any number of backends and knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from transformers import PreTrainedModel


@dataclass
class SequenceState:
    """One text as one model reads it."""

    pending: list[int]  # tokens given and not read yet
    sampling_seed: int = 0
    length: int = 0  # tokens read already; the backend counts
    is_done: bool = False  # its model reads no more of it

    @property
    def num_tokens(self) -> int:
        return self.length + len(self.pending)


class Request(Protocol):
    """A problem that is being solved, as backends see it."""

    @property
    def sequences(self) -> Sequence[SequenceState]:
        """One for each backend."""

    @property
    def next_model(self) -> int | None:
        """The number of the backend whose model chooses the next token; None: the problem has ended."""


AnyRequest = TypeVar("AnyRequest", bound=Request)
Sampler = Callable[[torch.Tensor, list[SequenceState]], list[int]]  # logits [feeds, vocabulary] -> tokens


class Backend(Protocol[AnyRequest]):
    """Next tokens of one model for many problems at the same time.

    At most `num_slots` problems, a number given when the backend is made, are in it at any time.
    """

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def num_waiting(self) -> int:
        """The number of problems whose next token is this model's to choose."""

    def add(self, occupant: AnyRequest) -> None:
        """Take a new problem. It leaves when it has ended or its feed is over."""

    def step(self) -> list[tuple[AnyRequest, int]]:
        """Read pending tokens of problems that wait for this model; called only if there are any.

        Return the problems that have read everything that was pending, each with its next token.
        """

    def active(self) -> AbstractContextManager[None]:
        """Return a context manager that prepares the model for `step` and puts it back as it was."""
