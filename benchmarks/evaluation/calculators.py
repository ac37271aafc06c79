"""The trainer's calculator for decoders that take logits processors: it forces the tokens of a result, one a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from transformers import LogitsProcessor
from transformers.generation.continuous_batching.cb_logits_processors import (
    CLASSIC_TO_CB_PROCESSORS_MAP,
    ContinuousBatchingLogitsProcessor,
)

from trainer.evaluation.stop_tokens import StopTokens

NOT_FORCED = -1


class Forced:
    """Forced continuation of one text. `tokens` so far are given before each next one is chosen."""

    def __init__(self, language: StopTokens) -> None:
        self._language = language
        self._left: list[int] = []

    def next_token(self, tokens: Sequence[int]) -> int:
        """The token that has to come next, or NOT_FORCED."""
        if not self._left and tokens:
            self._left = list(self._language.calculator_result(tokens))
        return self._left.pop(0) if self._left else NOT_FORCED


def force(scores: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """scores [rows, vocabulary], a token or NOT_FORCED for each row; in place."""
    for row, token in enumerate(tokens):
        if token != NOT_FORCED:
            scores[row, token] = float("inf")
    return scores


class CalculatorOfGenerate(LogitsProcessor):
    """For one call of `generate`. `prompt_tokens`: columns of the padded prompts."""

    def __init__(self, language: StopTokens, rows: int = 0, prompt_tokens: int = 0) -> None:
        self.language = language
        self._forced = [Forced(language) for _ in range(rows)]
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids[:, self._prompt_tokens :].tolist()
        return force(scores, [one.next_token(row) for one, row in zip(self._forced, written, strict=True)])


class CalculatorOfContinuousBatching(ContinuousBatchingLogitsProcessor):
    """For any number of requests; what is forced is an argument of a request's row. Made from the one of `generate`."""

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, calculator: CalculatorOfGenerate) -> None:
        self._language = calculator.language
        self._forced: dict[str, Forced] = {}

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        int32_tensor.fill_(NOT_FORCED)

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        states = [request.state for request in requests_with_new_token]
        forced = [self._forced.setdefault(state.request_id, Forced(self._language)) for state in states]
        tokens = [one.next_token(state.generated_tokens) for one, state in zip(forced, states, strict=True)]
        return torch.tensor(tokens, dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        return force(scores, tensor_arg[: len(scores)].tolist())


# Only processors that are made from one of `generate` get a place for their argument.
CLASSIC_TO_CB_PROCESSORS_MAP[CalculatorOfGenerate] = CalculatorOfContinuousBatching
