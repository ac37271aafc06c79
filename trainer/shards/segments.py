"""Split problems into segments by role and tokenise each segment separately, as a continuation of the text before it.

Segment boundaries are token boundaries. Prompts and calculator results therefore have the same tokens at inference as in
training (see `trainer.models.segment_tokenizer`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.models.segment_tokenizer import segment_tokenizer
from trainer.problems import calculator
from trainer.problems.problem import DELIMITER, Problem
from trainer.shards.methods import GUIDANCE, SegmentRole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "x"
_SHOWN_CHARACTERS = 20  # an error message shows this many characters on each side of the first difference


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one role."""

    role: SegmentRole
    tokens: list[int]


def segment_texts(problem: Problem, with_facts: bool = False) -> list[tuple[SegmentRole, str]]:
    """Return (role, text) of every segment of a problem, in order and without BOS and EOS."""
    facts = "".join(f"{fact}\n" for fact in problem.facts) if with_facts else ""
    segments = [(SegmentRole.PROBLEM, f"{facts}{problem.question}\n"), *_guidance(problem)]
    for step in problem.steps:
        if step.question:
            segments.append((SegmentRole.SUBQUESTION, f"{step.question}\n"))
        if step.solution:
            for text, is_result in calculator.split_annotations(f"{step.solution}\n"):
                segments.append((SegmentRole.CALCULATOR if is_result else SegmentRole.SOLUTION, text))
    segments.append((SegmentRole.DELIMITER, DELIMITER))
    segments.append((SegmentRole.ANSWER, f" {problem.answer}"))
    return segments


def _guidance(problem: Problem) -> list[tuple[SegmentRole, str]]:
    """Return the plan as segments like `operators: * +` and `equations: 3*4; 12+5`; [] if no solution has annotations."""
    solutions = (step.solution for step in problem.steps)
    expressions = list(itertools.chain.from_iterable(map(calculator.annotated_expressions, solutions)))
    operators = " ".join(filter(None, map(calculator.operators, expressions)))
    segments = []
    if operators:
        segments.append((SegmentRole.OPERATORS, f"operators: {operators}\n"))
    if expressions:
        segments.append((SegmentRole.EQUATIONS, f"equations: {'; '.join(expressions)}\n"))
    return segments


def tokenise(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    prefix: list[int],
    with_facts: bool = False,
) -> list[tuple[list[Segment], str]]:
    """Return (segments, difference) for every problem.

    difference: the first difference between the problem's text and the text decoded from the tokens, or "" if the texts
    are equal. The first segment starts with `prefix` (see `bos_tokens`), and the last segment ends with EOS.
    """
    texts = [segment_texts(problem, with_facts) for problem in problems]
    codec = segment_tokenizer(tokenizer)
    if codec.continues_differently:
        first = codec.encode_first([split[0][1] for split in texts])
        following = iter(codec.encode_next([text for split in texts for _, text in split[1:]]))
        encoded = [
            [start, *(next(following) for _ in split[1:])] for start, split in zip(first, texts, strict=True)
        ]
    else:
        all_tokens = iter(codec.encode_first([text for split in texts for _, text in split]))
        encoded = [[next(all_tokens) for _ in split] for split in texts]
    changes = [""] * len(texts)
    if not codec.is_lossless:
        decoded = codec.decode_texts([list(itertools.chain.from_iterable(tokens)) for tokens in encoded])
        changes = [
            _first_difference("".join(text for _, text in split), text)
            for split, text in zip(texts, decoded, strict=True)
        ]
    results = []
    for split, token_lists, change in zip(texts, encoded, changes, strict=True):
        segments = [Segment(role, tokens) for (role, _), tokens in zip(split, token_lists, strict=True)]
        segments[0].tokens[:0] = prefix
        segments[-1].tokens.append(tokenizer.eos_token_id)
        results.append((segments, change))
    return results


def _first_difference(text: str, decoded: str) -> str:
    """Return "TEXT became DECODED" with the characters around the first difference, or "" if the texts are equal."""
    if text == decoded:
        return ""
    differing = (i for i, (a, b) in enumerate(zip(text, decoded, strict=False)) if a != b)
    at = next(differing, min(len(text), len(decoded)))
    around = slice(max(0, at - _SHOWN_CHARACTERS), at + _SHOWN_CHARACTERS)
    return f"{text[around]!r} became {decoded[around]!r}"


def example_length(segments: Sequence[Segment]) -> int:
    """Return the number of tokens of a problem without its plan segments (GUIDANCE).

    Plans do not count, because a long plan must not exclude a problem from methods that use no plan.
    """
    return sum(len(segment.tokens) for segment in segments if segment.role not in GUIDANCE)


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before a text: BOS for Llama, two tokens for GLM, none for GPT-2."""
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    whole = tokenizer(_PROBE)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return list(whole[:start])
    return [token for token in whole if token == tokenizer.bos_token_id]
