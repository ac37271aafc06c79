"""Few-shot exemplars: solved problems before the prompt of an undistilled model (Brown et al., 2020).

An exemplar has the text of the chain-of-thought view (question, solutions, `#### answer`), then an empty line. It is
tokenised in the same pieces as training examples, so that base and distilled models read the same format.
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

_EXEMPLAR_ROLES = VIEWS["cot"].inputs
_SEPARATOR = "\n\n"


def exemplar_tokens(exemplars: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens between the tokenizer's prefix (BOS) and the problem."""
    if not exemplars:
        return []
    pieces = [
        text
        for problem in exemplars
        for text in (*(text for role, text in segment_texts(problem) if role in _EXEMPLAR_ROLES), _SEPARATOR)
    ]
    codec = segment_tokenizer(tokenizer)
    encoded = [*codec.encode_first(pieces[:1]), *codec.encode_next(pieces[1:])]
    return [token for tokens in encoded for token in tokens]


def insert_exemplars(
    prompt: Sequence[int], exemplars: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the prompt of a problem (prefix and problem, as in the shards) with the exemplars' tokens inserted.

    Some tokenizers encode a problem that starts a text, as in the shards, differently from one that continues a text.
    """
    prefix = len(bos_tokens(tokenizer))
    problem = list(prompt[prefix:])
    codec = segment_tokenizer(tokenizer)
    if exemplars and problem and codec.continues_differently:
        problem = codec.encode_next(codec.decode_texts([problem]))[0]
    return [*prompt[:prefix], *exemplars, *problem]
