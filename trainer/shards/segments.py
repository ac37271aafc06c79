"""Problem -> segments of text -> tokens. Segments are tokenised one by one, each as it stands inside the text.

A prompt at inference therefore ends on the token boundary it had in training, and what the calculator writes has
the tokens it had in training (see `trainer.models.segment_tokenizer`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.models.segment_tokenizer import segment_tokenizer
from trainer.problems import calculator
from trainer.problems.problem import DELIMITER, Problem
from trainer.shards.methods import GUIDANCE, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "x"
_SHOWN_CHARACTERS = 20  # before and after the first difference


@dataclass(frozen=True)
class Segment:
    """One run of tokens of one role."""

    role: Role
    tokens: list[int]


def segment_texts(problem: Problem, with_facts: bool = False) -> list[tuple[Role, str]]:
    """The text of a problem, cut by role; the pieces that a method reads, joined, are its example (without BOS, EOS)."""
    facts = "".join(f"{fact}\n" for fact in problem.facts) if with_facts else ""
    pieces = [(Role.PROBLEM, f"{facts}{problem.question}\n"), *_guidance(problem)]
    for step in problem.steps:
        if step.question:
            pieces.append((Role.SUBQUESTION, f"{step.question}\n"))
        if step.solution:
            for text, is_result in calculator.annotations(f"{step.solution}\n"):
                pieces.append((Role.CALCULATOR if is_result else Role.SOLUTION, text))
    pieces.append((Role.DELIMITER, DELIMITER))
    pieces.append((Role.ANSWER, f" {problem.answer}"))
    return pieces


def _guidance(problem: Problem) -> list[tuple[Role, str]]:
    """`operators: * +` and `equations: 3*4; 12+5`; nothing where the solutions hold no calculation."""
    expressions = [
        expression for step in problem.steps for expression in calculator.expressions(step.solution)
    ]
    operators = [found for found in map(calculator.operators, expressions) if found]
    pieces = []
    if operators:
        pieces.append((Role.OPERATORS, f"operators: {' '.join(operators)}\n"))
    if expressions:
        pieces.append((Role.EQUATIONS, f"equations: {'; '.join(expressions)}\n"))
    return pieces


def tokenise(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    with_facts: bool = False,
) -> list[list[Segment]]:
    """Return the segments of every problem: `prefix` (see `prefix_tokens`) opens the first, EOS closes the last."""
    return [segments for segments, _ in tokenise_checked(problems, tokenizer, prefix, with_facts)]


def tokenise_checked(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    with_facts: bool = False,
) -> list[tuple[list[Segment], str]]:
    """Return the segments of every problem, and "" or where the text that their tokens spell is not the problem's."""
    pieces = [segment_texts(problem, with_facts) for problem in problems]
    codec = segment_tokenizer(tokenizer)
    if codec.continues_differently:
        first = codec.encode_first([cut[0][1] for cut in pieces])
        following = iter(codec.encode_next([text for cut in pieces for _, text in cut[1:]]))
        encoded = [
            [start, *(next(following) for _ in cut[1:])] for start, cut in zip(first, pieces, strict=True)
        ]
    else:
        joined = iter(codec.encode_first([text for cut in pieces for _, text in cut]))
        encoded = [[next(joined) for _ in cut] for cut in pieces]
    changes = [""] * len(pieces)
    if not codec.is_lossless:
        spelt = codec.decode_texts([list(itertools.chain.from_iterable(tokens)) for tokens in encoded])
        changes = [
            _first_difference("".join(text for _, text in cut), text)
            for cut, text in zip(pieces, spelt, strict=True)
        ]
    segmented = [
        [Segment(role, tokens) for (role, _), tokens in zip(cut, found, strict=True)]
        for cut, found in zip(pieces, encoded, strict=True)
    ]
    for segments in segmented:
        segments[0].tokens[:0] = prefix
        segments[-1].tokens.append(tokenizer.eos_token_id)
    return list(zip(segmented, changes, strict=True))


def _first_difference(text: str, spelt: str) -> str:
    """Return "" for equal texts, else where they part."""
    if text == spelt:
        return ""
    at = next(
        (i for i, (a, b) in enumerate(zip(text, spelt, strict=False)) if a != b), min(len(text), len(spelt))
    )
    start = max(0, at - _SHOWN_CHARACTERS)
    end = at + _SHOWN_CHARACTERS
    return f"{text[start:end]!r} became {spelt[start:end]!r}"


def example_length(segments: Sequence[Segment]) -> int:
    """Tokens of the longest example without guidance: which problems other methods see does not depend on guidance."""
    return sum(len(segment.tokens) for segment in segments if segment.role not in GUIDANCE)


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that the tokenizer itself puts before a text: BOS for Llama, two for GLM, nothing for GPT-2."""
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return [token for token in whole if token == tokenizer.bos_token_id]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without an EOS token. Raises UserError."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} has no end-of-sequence token; a student could never stop"
        )
