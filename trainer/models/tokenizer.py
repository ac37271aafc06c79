"""Load a tokenizer exactly as its tokenizer.json defines it, and compare tokenizers."""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models.source import check_gguf, error_reason, find_file
from trainer.runtime import terminal

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

STORIES = "stories"
_FILE = "tokenizer.json"
_NUM_VOCABULARY_PROBES = 500  # texts made of the vocabulary, in addition to _PROBES
_inform_once = lru_cache(maxsize=64)(terminal.info)
_PROBES = (
    "2023 = 15", "1 + 2 = 3\n", "12,345.67%", "  two  spaces ", "tab\tand\r\n\n\nlines", "don't we'll I'M",
    "CamelCase snake_case", "naïve café", "nai\u0308ve", "½ ² ﬁ Ａ", "日本語 中文 한국어", "مرحبا", "🙂👩‍👧", "x=<<3*4=12>>12",
    "#### 72", "a\u00a0b\u200bc", "(a[b]{c})", "Äpfel, Öl", "http://a.b/c?d=1", "",
)  # fmt: skip


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local folder or Hub name; `stories` is the small embedded one, trained by this call.

    If transformers' tokenizer class would change a tokenizer.json, the file is used unchanged, with a line on rank 0.
    Raises UserError if there is no tokenizer.
    """
    from transformers import AutoTokenizer

    name = str(name_or_path)
    if name == STORIES:
        from trainer.models.stories_tokenizer import train_tokenizer

        tokenizer: PreTrainedTokenizerBase
        with tempfile.TemporaryDirectory() as folder:
            train_tokenizer(Path(folder))
            tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.name_or_path = STORIES
        return tokenizer
    check_gguf(name)
    try:
        tokenizer = _as_written(AutoTokenizer.from_pretrained(name, trust_remote_code=False), name)
    except UserError:
        raise
    except Exception as error:  # transformers raises errors of many types for files it cannot read
        expected = "" if Path(name).exists() else " (a local folder or a hub name is expected)"
        raise UserError(f"no tokenizer at {name}{expected}: {error_reason(error)}") from None
    # A tokenizer without its vocabulary file loads without an error and returns no tokens.
    if not tokenizer("1 + 2", add_special_tokens=False)["input_ids"]:
        raise UserError(f"the tokenizer at {name} returns no tokens: its vocabulary is missing")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a SHA-256 of all that determines the tokens of a text; equal before and after saving and loading."""
    state: dict[str, object] = {"vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        state |= {key: rules.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
        state["merges"] = rules["model"].get("merges")
    state["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def max_text_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest token id of texts, BOS and EOS; other special tokens are not counted.

    Gemma 3's tokenizer has an image token for which its text model has no embedding.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ours = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    return max((set(tokenizer.get_vocab().values()) - special) | ours, default=0)


def check_saved_tokenizer(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if transformers changes the tokenizer when it is loaded from beside this config, as in an export.

    For some model types (qwen2) transformers chooses the tokenizer's class by the config, regardless of the files.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto import tokenization_auto

    fixed = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", None)
    if fixed is not None and config.model_type not in fixed:
        return
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if fingerprint(found) != fingerprint(tokenizer) and not _same_tokens(found, tokenizer):
        raise UserError(
            f"transformers loads every tokenizer beside a {config.model_type} config as {type(found).__name__}, which gives "
            f"other tokens than {tokenizer.name_or_path}: exports would be loaded with another tokenizer. "
            f"Prepare the shards with the tokenizer of a {config.model_type} model, or choose another model type"
        )


def _as_written(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that tokenizer.json defines; `tokenizer` itself unless transformers' class has changed it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    # PreTrainedTokenizerFast loads the file unchanged.
    if not tokenizer.is_fast or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    path = find_file(name, _FILE)
    if path is None or _is_written_in(Path(path), tokenizer.backend_tokenizer):
        return tokenizer
    written = Tokenizer.from_file(path)
    changed = _differences(tokenizer.backend_tokenizer, written)
    if _same_tokens(tokenizer, written):
        return tokenizer
    loaded = PreTrainedTokenizerFast.from_pretrained(name)
    if not _same_tokens(loaded, written):
        raise UserError(
            f"the tokenizer at {name}: transformers changes {_FILE} when it loads it "
            f"({', '.join(_differences(loaded.backend_tokenizer, written))}); save it again with a newer transformers"
        )
    _inform_once(
        f"tokenizer {name}: {_FILE} is used unchanged; transformers' {type(tokenizer).__name__} would change its "
        f"{' and '.join(changed)}, and so its tokens"
    )
    return loaded


def _is_written_in(path: Path, backend: Tokenizer) -> bool:
    """Return whether a compiled tokenizer equals a tokenizer.json; faster than compiling the file too."""
    written, ours = json.loads(path.read_text(encoding="utf-8")), json.loads(backend.to_str())
    steps = ("normalizer", "pre_tokenizer", "decoder")
    return all(written.get(step) == ours[step] for step in steps) and all(
        _plain_merges(written["model"].get(key)) == _plain_merges(value)
        for key, value in ours["model"].items()
    )


def _plain_merges(value: Any) -> Any:
    """Return merges in the older form, one string "a b" for each; other values unchanged."""
    is_list_of_lists = isinstance(value, list) and value and isinstance(value[0], list)
    return [" ".join(merge) for merge in value] if is_list_of_lists else value


def _differences(one: Tokenizer, other: Tokenizer) -> list[str]:
    """Return the names of the steps in which two compiled tokenizers differ."""
    changed = []
    for name in ("normalizer", "pre_tokenizer", "decoder", "model"):
        steps = [getattr(tokenizer, name) for tokenizer in (one, other)]
        states = [None if step is None else step.__getstate__() for step in steps]
        if states[0] != states[1]:
            changed.append(name.replace("_", "-"))
    return changed


def _same_tokens(one: Any, other: Any) -> bool:
    """Return whether two tokenizers, compiled or of transformers, agree on the vocabulary and on the tokens of many texts."""
    compiled = [getattr(tokenizer, "backend_tokenizer", tokenizer) for tokenizer in (one, other)]
    vocabularies = [tokenizer.get_vocab(with_added_tokens=False) for tokenizer in compiled]
    if vocabularies[0] != vocabularies[1]:
        return False
    words = [word.replace("Ġ", " ").replace("▁", " ") for word in sorted(vocabularies[0])]
    mixed = ["".join(words[start::_NUM_VOCABULARY_PROBES][:200]) for start in range(_NUM_VOCABULARY_PROBES)]
    texts = [*_PROBES, *mixed]
    tokens = [
        [tokenizer.encode(text, add_special_tokens=False).ids for text in texts] for tokenizer in compiled
    ]
    decoded = [tokenizer.decode_batch(tokens[0], skip_special_tokens=False) for tokenizer in compiled]
    return tokens[0] == tokens[1] and decoded[0] == decoded[1]
