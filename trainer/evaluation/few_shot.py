"""Exemplars: solved problems that a model which was never distilled is shown before each problem (Brown et al., 2020).

They are written as the chain-of-thought view writes problems, question, solutions, `#### answer`, with an empty line after
each, and tokenised in the same pieces as the problem that follows, so that a base model is asked in the words that
a student is taught in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.models.segment_tokenizer import segment_tokenizer
from trainer.problems.problem import Problem
from trainer.shards.methods import VIEWS
from trainer.shards.segments import bos_tokens, segment_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = VIEWS["cot"].inputs
_BETWEEN = "\n\n"


def exemplar_tokens(exemplars: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what comes between the tokenizer's prefix (BOS) and the problem's own tokens."""
    if not exemplars:
        return []
    pieces = [
        text
        for problem in exemplars
        for text in (*(text for role, text in segment_texts(problem) if role in _SHOWN), _BETWEEN)
    ]
    codec = segment_tokenizer(tokenizer)
    encoded = [*codec.encode_first(pieces[:1]), *codec.encode_next(pieces[1:])]
    return [token for tokens in encoded for token in tokens]


def after_exemplars(
    prompt: Sequence[int], exemplars: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the prompt of a problem (prefix and problem, as in the shards) with the exemplars' tokens between the two.

    The problem starts a text in the shards and continues one here, where it has other tokens with some tokenizers.
    """
    prefix = len(bos_tokens(tokenizer))
    problem = list(prompt[prefix:])
    codec = segment_tokenizer(tokenizer)
    if exemplars and problem and codec.continues_differently:
        problem = codec.encode_next(codec.decode_texts([problem]))[0]
    return [*prompt[:prefix], *exemplars, *problem]
