"""Tokens that end a text, and tokens after which an evaluation program decodes the text generated so far."""

from collections.abc import Sequence
from functools import lru_cache

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.models.segment_tokenizer import SegmentTokenizer, segment_tokenizer
from trainer.problems import calculator


class StopTokens:
    """Conversion between tokens and text, and sets of token ids after which a program (programs.py) must decode its text.

    newlines: ids of tokens whose text contains a line break. equals: ids of tokens that can complete `<<48/2=`. hashes: ids
    of tokens that can complete `####`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._codec = segment_tokenizer(tokenizer)
        texts = _texts_of_tokens(tokenizer)
        self.newlines = frozenset(token for token, text in enumerate(texts) if "\n" in text)
        self.equals = frozenset(token for token, text in enumerate(texts) if text.endswith("="))
        self.hashes = frozenset(token for token, text in enumerate(texts) if "#" in text)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, decoded as the continuation of another text."""
        return self._codec.decode_next(tokens)

    def tokens(self, text: str) -> tuple[int, ...]:
        """Return the token ids of `text`, tokenised as the continuation of another text, as in the shards."""
        return _tokens_of(self._codec, text)

    def calculator_result(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return the tokens to insert (`24>>`) if the text ends with a valid calculator expression (`<<48/2=`), else ()."""
        if tokens[-1] not in self.equals:
            return ()
        expression = calculator.open_expression(self.text(tokens))
        result = calculator.evaluate(expression) if expression is not None else None
        return self.tokens(f"{result}>>") if result is not None else ()


def end_of_text_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the tokenizer's end token and of the end tokens in the model's generation_config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id}
    return frozenset(ids - {None})


@lru_cache(maxsize=2)
def _texts_of_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return tokenizer.batch_decode([[token] for token in range(len(tokenizer))])


@lru_cache(maxsize=4096)
def _tokens_of(codec: SegmentTokenizer, text: str) -> tuple[int, ...]:
    return tuple(codec.encode_next([text])[0])
