"""Tokenise and decode a text segment by segment. Each segment after the first continues the text.

SentencePiece tokenizers (Llama 2, TinyLlama, Mistral 7B, Phi-3) insert a space before every text. This module keeps that
space before the first segment, as in the base model's training, and omits it before all other segments. When such a
tokenizer decodes tokens, it removes a leading space. `decode_next` keeps this space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_LETTER = "x"
_BYTE_LEVEL_STEPS = {"ByteLevel", "Digits", "Split"}  # steps of pre-tokenizers that keep every byte


class SegmentTokenizer:
    """Encoder and decoder of text segments for one tokenizer; created by `segment_tokenizer`. Encoding is thread-safe.

    Special tokens are neither added nor recognised: "<|endoftext|>" in a text is plain text. is_lossless: whether the type
    of the tokenizer guarantees that decoding restores every text exactly.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._first: Tokenizer | None = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self._next = self._first
        self.is_lossless = False
        if self._first is not None:
            rules = json.loads(self._first.to_str())
            self.is_lossless = _keeps_every_byte(rules)
            self._next = _without_prefix_space(rules) or self._first
        letter = self.encode_first([_LETTER])[0]
        # Text that decoding adds before the first segment: a space for GPT-2 with add_prefix_space, "" for Llama.
        self._added_prefix = self._decode(letter).removesuffix(_LETTER)
        keeps_space = self._decode(self.encode_next([f" {_LETTER}"])[0]) == f" {_LETTER}"
        # Tokens that `decode_next` puts before its argument, so that decoding keeps a leading space of the text.
        self._context = [] if keeps_space else letter
        self._context_text = "" if keeps_space else self._decode(letter)

    def encode_first(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that start an example (without BOS)."""
        return self._encode(self._first, texts)

    def encode_next(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that each continue an example."""
        return self._encode(self._next, texts)

    def decode_next(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens that continue a text. A leading space is kept."""
        return self._decode([*self._context, *tokens]).removeprefix(self._context_text)

    def decode_texts(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of token sequences that each start an example (without BOS and EOS)."""
        if self._first is None:
            texts = list(map(self._decode, sequences))
        else:
            texts = self._first.decode_batch(list(map(list, sequences)), skip_special_tokens=False)
        return [text.removeprefix(self._added_prefix) for text in texts]

    @property
    def continues_differently(self) -> bool:
        """True if a text inside an example is encoded or decoded differently from a text at the start of an example."""
        return self._next is not self._first or bool(self._context)

    def _encode(self, backend: Tokenizer | None, texts: Sequence[str]) -> list[list[int]]:
        # transformers' `__call__` would take twice as long, because it also makes offsets, masks and dictionaries.
        if backend is None:
            encode = self._tokenizer.encode
            return [encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
        if backend.truncation or backend.padding or not backend.encode_special_tokens:
            # Change the backend only if needed, because other threads may use it.
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = True
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._first is not None:
            return str(self._first.decode(list(tokens), skip_special_tokens=False))
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


segment_tokenizer = lru_cache(maxsize=8)(SegmentTokenizer)


def _without_prefix_space(rules: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer without the steps that add a prefix to a text; None if there is no such step."""
    from tokenizers import Tokenizer

    changed = rules | {name: _plain_step(rules[name]) for name in ("normalizer", "pre_tokenizer")}
    return None if changed == rules else Tokenizer.from_str(json.dumps(changed))


def _plain_step(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [plain for inner in step[key] if (plain := _plain_step(inner)) is not None]}
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
        return {**step, "add_prefix_space": False}
    return step


def _keeps_every_byte(rules: dict[str, Any]) -> bool:
    """Return whether the tokenizer is a byte-level BPE that neither normalises nor removes text."""
    from tokenizers.pre_tokenizers import ByteLevel

    steps = _steps(rules["pre_tokenizer"])
    return (
        rules["normalizer"] is None
        and {"ByteLevel"} <= {step["type"] for step in steps} <= _BYTE_LEVEL_STEPS
        and not any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps)
        and (rules["decoder"] or {}).get("type") == "ByteLevel"
        and rules["model"]["type"] == "BPE"
        and set(ByteLevel.alphabet()) <= set(rules["model"]["vocab"])
        and all(token["special"] for token in rules["added_tokens"])
    )


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None or step["type"] != "Sequence":
        return [step] if step else []
    return [leaf for inner in step["pretokenizers"] for leaf in _steps(inner)]
