"""Tokenise and decode a text segment by segment; a segment after the first continues the text.

SentencePiece tokenizers (Llama 2, TinyLlama, Mistral 7B, Phi-3) put a space before every text. The first segment of a
text keeps it, as the base model was trained; a segment that continues a text is tokenised without it. When such a
tokenizer decodes a continuation alone, it drops the leading space; `decode_next` keeps it.
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
_BYTE_LEVEL_STEPS = {"ByteLevel", "Digits", "Split"}  # of a pre-tokenizer that keeps every byte


class SegmentTokenizer:
    """Encoder and decoder of text segments for one tokenizer; created by `segment_tokenizer`.

    Special tokens are neither added nor recognised: "<|endoftext|>" in a text is plain text. Encoding is thread-safe.

    is_lossless: every text can be decoded exactly from its tokens, by construction of the tokenizer.
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
        # Prefix that decoding adds to a whole text: a space for GPT-2 with add_prefix_space, nothing for Llama.
        self._lead = self._decode(letter).removesuffix(_LETTER)
        keeps_space = self._decode(self.encode_next([f" {_LETTER}"])[0]) == f" {_LETTER}"
        self._context = [] if keeps_space else letter
        self._context_text = "" if keeps_space else self._decode(letter)

    def encode_first(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that start an example (without BOS)."""
        return self._encode(self._first, texts)

    def encode_next(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts that continue a text before them."""
        return self._encode(self._next, texts)

    def decode_next(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens that continue a text, with its leading space."""
        text = self._decode([*self._context, *tokens])
        return text.removeprefix(self._context_text)

    def decode_texts(self, texts: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of token sequences that each start an example (without BOS and EOS)."""
        if self._first is None:
            found = [self._decode(tokens) for tokens in texts]
        else:
            found = self._first.decode_batch([list(tokens) for tokens in texts], skip_special_tokens=False)
        return [text.removeprefix(self._lead) for text in found]

    @property
    def continues_differently(self) -> bool:
        """True if a text that continues another has other tokens, or decodes otherwise, than one that starts an example."""
        return self._next is not self._first or bool(self._context)

    def _encode(self, backend: Tokenizer | None, texts: Sequence[str]) -> list[list[int]]:
        # Not transformers' `__call__`, whose offsets, masks and dictionaries double the time.
        if backend is None:
            encode = self._tokenizer.encode
            return [encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts]
        if backend.truncation or backend.padding or not backend.encode_special_tokens:
            # Once: other threads may be encoding.
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = True
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, tokens: Sequence[int]) -> str:
        if self._first is not None:
            return str(self._first.decode(list(tokens), skip_special_tokens=False))
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


@lru_cache(maxsize=8)
def segment_tokenizer(tokenizer: PreTrainedTokenizerBase) -> SegmentTokenizer:
    """Return the segment tokenizer of `tokenizer`, cached."""
    return SegmentTokenizer(tokenizer)


def _without_prefix_space(rules: dict[str, Any]) -> Tokenizer | None:
    """Return the tokenizer without the steps that add a prefix to a text; None if it has no such step."""
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
    """Return whether decoding is exact by construction: byte-level BPE, nothing normalised or removed."""
    from tokenizers.pre_tokenizers import ByteLevel

    steps = _steps(rules["pre_tokenizer"])
    for step in steps:
        if step.get("add_prefix_space") or step.get("behavior") == "Removed":
            return False
    types = {step["type"] for step in steps}
    decoder = (rules["decoder"] or {}).get("type")
    vocabulary = rules["model"].get("vocab", ())
    return (
        rules["normalizer"] is None
        and "ByteLevel" in types
        and types <= _BYTE_LEVEL_STEPS
        and decoder == "ByteLevel"
        and rules["model"]["type"] == "BPE"
        and all(letter in vocabulary for letter in ByteLevel.alphabet())
        and all(token["special"] for token in rules["added_tokens"])
    )


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [found for inner in step["pretokenizers"] for found in _steps(inner)]
