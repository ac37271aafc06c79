"""What becomes of a slot after each token: the method of solving, apart from the machinery of decoding.

Here is the unified method: one model writes everything (an answer, a chain of thought, or sub-questions and their
solutions) until it ends its text, and the calculator writes the results of its annotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.problems import calculator


class Solution:
    """One problem on its way: what was written so far, and what the slot has to read next."""

    def __init__(self, index: int, prompt: list[int], noise_key: int, writer: Writer) -> None:
        self.index = index
        self.noise_key = noise_key
        self.tokens: list[int] = list(writer.opening)  # everything after the problem
        self.finished = False  # the model ended it; False: cut off
        self.pending = prompt + self.tokens
        self.length = 0
        self._writer = writer
        self._longest = int(min(len(self.tokens) + writer.max_new_tokens, writer.context - len(prompt)))

    def after(self, token: int) -> bool:
        """Take the token that was chosen; `pending` is what to read before the next one. False: it has ended."""
        self.tokens.append(token)
        if token in self._writer.end_tokens:
            self.finished = True
            return False
        self.pending = [token]
        if token in self._writer.calculator_triggers:
            self.pending += self._writer.calculated(self.tokens)
            self.tokens += self.pending[1:]
            del self.tokens[self._longest :]
        return len(self.tokens) < self._longest


class Writer:
    """The rules all solutions of an evaluation share: when to stop, and when the calculator takes the pen."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        context: float,
        max_new_tokens: int,
        use_calculator: bool,
        opening: Sequence[int] = (),
    ) -> None:
        """`context`: longest sequence of the model in tokens. `opening`: what every solution is made to begin with."""
        self.tokenizer = tokenizer
        self.context = context
        self.max_new_tokens = max_new_tokens
        self.opening = tuple(opening)
        self.end_tokens = end_tokens(model, tokenizer)
        # The text is decoded only after a token that can complete `<<48/2=`.
        self.calculator_triggers = tokens_ending_in_equals(tokenizer) if use_calculator else frozenset()

    def calculated(self, tokens: list[int]) -> tuple[int, ...]:
        """If the text ends in an open annotation the calculator accepts: the tokens of its result and `>>`."""
        expression = calculator.open_expression(self.text(tokens))
        result = calculator.evaluate(expression) if expression is not None else None
        return _tokens_of(self.tokenizer, f"{result}>>") if result is not None else ()

    def text(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, without the end token."""
        written = [token for token in tokens if token not in self.end_tokens]
        return str(self.tokenizer.decode(written, clean_up_tokenization_spaces=False))


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's generation_config (there may be several)."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    many = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*many, tokenizer.eos_token_id) if token is not None)


@lru_cache(maxsize=4)
def tokens_ending_in_equals(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens whose own text ends in `=`."""
    count = len(tokenizer)
    return frozenset(
        token
        for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(count)]))
        if text.endswith("=")
    )


@lru_cache(maxsize=4096)
def _tokens_of(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
