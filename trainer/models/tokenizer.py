"""Load a tokenizer and tell whether two are the same."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STORIES = "stories"


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder or the hub; `stories` is the small embedded one, made on the spot.

    Raises UserError if there is none.
    """
    from transformers import AutoTokenizer

    if str(name_or_path) == STORIES:
        from trainer.models.stories_tokenizer import build

        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))
            tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.name_or_path = STORIES
        return tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no tokenizer at {name_or_path} (a local folder or a hub name is expected): {reason}"
        ) from None
    # Trap: a tokenizer made without its vocabulary file loads without an error and returns nothing.
    if not tokenizer("1 + 2", add_special_tokens=False)["input_ids"]:
        raise UserError(f"the tokenizer at {name_or_path} turns text into nothing: its vocabulary is missing")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that decides which tokens a text gets; equal before and after saving and loading."""
    state: dict[str, object] = {"vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        state |= {key: rules.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
        state["merges"] = rules["model"].get("merges")
    state["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
