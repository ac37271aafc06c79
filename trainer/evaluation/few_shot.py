"""Exemplars: solved problems that a model which was never distilled is shown before each problem (Brown et al., 2020).

They are written as the chain-of-thought view writes problems, question, solutions, `#### answer`, with an empty line after
each, and tokenised in the same pieces as the problem that follows, so that a base model is asked in the words that
a student is taught in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from trainer.errors import UserError
from trainer.problems.problem import Problem, Reject
from trainer.problems.sources import read_problems
from trainer.shards.methods import METHODS
from trainer.shards.segments import prefix_tokens, texts

_SHOWN = METHODS["cot"].reads
_BETWEEN = "\n\n"


def read_exemplars(path: str) -> list[Problem]:
    """All problems of a JSONL file (see problems/jsonl.py), in order. Raises UserError naming the line that is none."""
    found = []
    for record in read_problems("jsonl", Path(path).stem, path):
        if isinstance(record, Reject):
            raise UserError(
                f"{path}, line {record.line}: {record.reason}: {record.detail}; mend the exemplar"
            )
        found.append(record)
    return found


def exemplar_tokens(exemplars: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What comes between the tokenizer's prefix (BOS) and the problem's own tokens."""
    if not exemplars:
        return []  # a tokenizer refuses an empty batch
    pieces = [
        text
        for problem in exemplars
        for text in (*(text for role, text in texts(problem) if role in _SHOWN), _BETWEEN)
    ]
    encoded = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [token for tokens in encoded for token in tokens]


def after_exemplars(
    prompt: Sequence[int], exemplars: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The prompt of a problem (prefix and problem, as in the shards) with the exemplars' tokens between the two."""
    prefix = len(prefix_tokens(tokenizer))
    return [*prompt[:prefix], *exemplars, *prompt[prefix:]]
