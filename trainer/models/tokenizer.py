"""Load a tokenizer exactly as its tokenizer.json defines it, and compare tokenizers."""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.models.source import check_gguf, check_local, error_reason, find_file
from trainer.runtime import terminal

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

STORIES = "stories"
_FILE = "tokenizer.json"
_NUM_VOCABULARY_PROBES = 500  # number of test texts that consist of vocabulary entries
_inform_once = lru_cache(maxsize=64)(terminal.info)
_PROBES = (
    "2023 = 15", "1 + 2 = 3\n", "12,345.67%", "  two  spaces ", "tab\tand\r\n\n\nlines", "don't we'll I'M",
    "CamelCase snake_case", "naïve café", "nai\u0308ve", "½ ² ﬁ Ａ", "日本語 中文 한국어", "مرحبا", "🙂👩‍👧", "x=<<3*4=12>>12",
    "#### 72", "a\u00a0b\u200bc", "(a[b]{c})", "Äpfel, Öl", "http://a.b/c?d=1", "",
)  # fmt: skip


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local folder or Hub name.

    For the name "stories", train and return the tokenizer of the built-in stories data set. If transformers' tokenizer
    class gives other tokens than tokenizer.json defines, this file is used unchanged, and rank 0 logs a line. Raises
    UserError if there is no tokenizer, or if its vocabulary is missing.
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
    check_local(name)
    check_gguf(name)
    try:
        tokenizer = _as_in_file(AutoTokenizer.from_pretrained(name, trust_remote_code=False), name)
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
    """Return a SHA-256 of the settings that determine the tokens of a text. Saving and loading preserves this hash."""
    state: dict[str, object] = {"vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        state |= {key: rules.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
        state["merges"] = rules["model"].get("merges")
    state["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(state, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def max_text_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest token id that can occur in a text with BOS and EOS. Other special tokens are ignored.

    For example, Gemma 3's tokenizer has an image token, but the text model has no embedding of this token.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    bos_and_eos = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    return max((set(tokenizer.get_vocab().values()) - special) | bos_and_eos, default=0)


def check_saved_tokenizer(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if `tokenizer`, saved in one folder with `config`, gives other tokens when transformers loads it again.

    For some model types (e.g. qwen2), transformers chooses the tokenizer class by the model type in the config and ignores
    the class in the tokenizer's files. Only these model types are checked.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto import tokenization_auto

    fixed_types = getattr(tokenization_auto, "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS", None)
    if fixed_types is not None and config.model_type not in fixed_types:
        return
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if fingerprint(loaded) != fingerprint(tokenizer) and not _same_tokens(loaded, tokenizer):
        raise UserError(
            f"transformers loads every tokenizer beside a {config.model_type} config as {type(loaded).__name__}, which gives "
            f"other tokens than {tokenizer.name_or_path}: exports would be loaded with another tokenizer. "
            f"Prepare the shards with the tokenizer of a {config.model_type} model, or choose another model type"
        )


def _as_in_file(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Return `tokenizer` if it gives the tokens that tokenizer.json defines. If not, return the tokenizer of this file."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    # PreTrainedTokenizerFast loads the file unchanged.
    if not tokenizer.is_fast or type(tokenizer) is PreTrainedTokenizerFast:
        return tokenizer
    path = find_file(name, _FILE)
    if path is None or _equals_file(Path(path), tokenizer.backend_tokenizer):
        return tokenizer
    file_tokenizer = Tokenizer.from_file(path)
    if _same_tokens(tokenizer, file_tokenizer):
        return tokenizer
    loaded = PreTrainedTokenizerFast.from_pretrained(name)
    if not _same_tokens(loaded, file_tokenizer):
        raise UserError(
            f"the tokenizer at {name}: transformers changes {_FILE} when it loads it "
            f"({', '.join(_differences(loaded.backend_tokenizer, file_tokenizer))}); save it again with a newer transformers"
        )
    _inform_once(
        f"tokenizer {name}: {_FILE} is used unchanged; transformers' {type(tokenizer).__name__} would change its "
        f"{' and '.join(_differences(tokenizer.backend_tokenizer, file_tokenizer))}, and so its tokens"
    )
    return loaded


def _equals_file(path: Path, backend: Tokenizer) -> bool:
    """Return whether `backend` has the normalizer, pre-tokenizer, decoder and model of the tokenizer.json at `path`."""
    in_file, compiled = json.loads(path.read_text(encoding="utf-8")), json.loads(backend.to_str())
    steps = ("normalizer", "pre_tokenizer", "decoder")
    return all(in_file.get(step) == compiled[step] for step in steps) and all(
        _plain_merges(in_file["model"].get(key)) == _plain_merges(value)
        for key, value in compiled["model"].items()
    )


def _plain_merges(value: Any) -> Any:
    """Return a list of merge pairs in the older format, one string "a b" per pair. Return any other value unchanged."""
    is_list_of_lists = isinstance(value, list) and value and isinstance(value[0], list)
    return [" ".join(merge) for merge in value] if is_list_of_lists else value


def _differences(a: Tokenizer, b: Tokenizer) -> list[str]:
    """Return the names of the components in which two tokenizers differ, e.g. "pre-tokenizer" or "model"."""

    def state(tokenizer: Tokenizer, name: str) -> object:
        step = getattr(tokenizer, name)
        return None if step is None else step.__getstate__()

    names = ("normalizer", "pre_tokenizer", "decoder", "model")
    return [name.replace("_", "-") for name in names if state(a, name) != state(b, name)]


def _same_tokens(a: Any, b: Any) -> bool:
    """Return whether two tokenizers have the same vocabulary, and encode and decode many test texts equally."""
    compiled = [getattr(tokenizer, "backend_tokenizer", tokenizer) for tokenizer in (a, b)]
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
