"""Problem -> segments of text -> tokens. Segments are tokenised one by one.

A prompt at inference therefore ends on the token boundary it had in training, and what the calculator writes has
the tokens it had in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.problems import calculator
from trainer.problems.problem import DELIMITER, Problem
from trainer.shards.methods import GUIDANCE, Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """One run of tokens of one role."""

    role: Role
    tokens: list[int]


def texts(problem: Problem, with_facts: bool = False) -> list[tuple[Role, str]]:
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
    """Segments of every problem: `prefix` (see `prefix_tokens`) opens the first, EOS closes the last."""
    pieces = [texts(problem, with_facts) for problem in problems]
    tokens = iter(_encode([text for cut in pieces for _, text in cut], tokenizer))
    segmented = [[Segment(role, next(tokens)) for role, _ in cut] for cut in pieces]
    for segments in segmented:
        segments[0].tokens[:0] = prefix
        segments[-1].tokens.append(tokenizer.eos_token_id)
    return segmented


def example_length(segments: Sequence[Segment]) -> int:
    """Tokens of the longest example without guidance: which problems other methods see does not depend on guidance."""
    return sum(len(segment.tokens) for segment in segments if segment.role not in GUIDANCE)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of every text, nothing added; one that spells "<|endoftext|>" is text, it must not end the sequence.

    Asks the compiled tokenizer itself (transformers' `__call__` makes offsets, masks and dictionaries of every text, which
    takes as long again). Called by several threads; what is set in it here must be set by a first call of one.
    """
    if not tokenizer.is_fast:
        return [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
    compiled = tokenizer.backend_tokenizer
    if compiled.truncation or compiled.padding or not compiled.encode_special_tokens:
        compiled.no_truncation()
        compiled.no_padding()
        compiled.encode_special_tokens = True
    return [encoding.ids for encoding in compiled.encode_batch_fast(texts, add_special_tokens=False)]


def prefix_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before every text: BOS for Llama, nothing for GPT-2."""
    special = tokenizer("")["input_ids"]
    return [token for token in special if token == tokenizer.bos_token_id]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, sample: Problem) -> None:
    """Refuse a tokenizer with which the pieces of a text are not the text.

    Raises UserError if there is no EOS token, or if joining the pieces' tokens does not give the text back (some
    sentencepiece tokenizers put a space before every piece).
    """
    name = tokenizer.name_or_path
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name} has no end-of-sequence token; a student could never stop")
    pieces = [text for _, text in texts(sample)]
    tokens = [token for part in tokenizer(pieces, add_special_tokens=False)["input_ids"] for token in part]
    whole = "".join(pieces)
    back = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    if back != whole:
        raise UserError(
            f"tokenizer {name} does not give back a text tokenised in pieces: {whole[:120]!r} became {back[:120]!r}; "
            "use a byte-level tokenizer (GPT-2, Pythia, Qwen, Llama 3)"
        )
