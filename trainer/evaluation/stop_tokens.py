"""Tokenizer functions of the solving programs: tokens that end a line, a text or an expression, and calculator results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.models.segment_tokenizer import SegmentTokenizer, segment_tokenizer
from trainer.problems import calculator


class StopTokens:
    """Sets of token ids at which solving programs look at the text, and conversion between tokens and text.

    `newlines`, `equals` and `hashes` are the tokens whose text contains a line break, ends with "=", or contains "#".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._codec = segment_tokenizer(tokenizer)
        texts = _texts_of_tokens(tokenizer)
        self.newlines = frozenset(token for token, text in enumerate(texts) if "\n" in text)
        # A text is decoded only after a token that can complete `<<48/2=` or `####`.
        self.equals = frozenset(token for token, text in enumerate(texts) if text.endswith("="))
        self.hashes = frozenset(token for token, text in enumerate(texts) if "#" in text)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens that continue a text."""
        return self._codec.decode_next(tokens)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that continues a text, as in the shards."""
        return _tokens_of(self._codec, text)

    def calculator_result(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens of `result>>` if the text ends in an open, valid calculator annotation, else ()."""
        if tokens[-1] not in self.equals:
            return ()
        expression = calculator.open_expression(self.text(tokens))
        result = calculator.evaluate(expression) if expression is not None else None
        return self.tokens(f"{result}>>") if result is not None else ()


def end_of_text_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the end tokens of the tokenizer and of the model's generation_config, which may have several."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    many = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*many, tokenizer.eos_token_id) if token is not None)


@lru_cache(maxsize=2)
def _texts_of_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.batch_decode([[token] for token in range(len(tokenizer))])


@lru_cache(maxsize=4096)
def _tokens_of(codec: SegmentTokenizer, text: str) -> tuple[int, ...]:
    return tuple(codec.encode_next([text])[0])
