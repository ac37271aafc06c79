"""Copy and adapt the files of a pretrained model other than the weights: config, tokenizer, licence, Python files.

A run stores these files in its model folder. Each checkpoint has a copy of the model folder, from which an export copies
the files. Copied code is never executed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import first_line
from trainer.models.tokenizer import fingerprint, load_tokenizer
from trainer.runtime import terminal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Patterns for paths relative to the model's folder. A path is converted to lower case before it is compared.
_WRITTEN_BY_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_OTHER_TOKENIZER_FILES = (
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model*", "*.tiktoken", "spiece.model", "sentencepiece*.model",
    "tekken.json",
)  # fmt: skip
_LICENCE = ("license*", "licence*", "notice*", "use_policy*", "copying*", "copyright*")
_GENERATION_CONFIG = "generation_config.json"
_CODE = ("*.py",)
_UPPER_CASE_LICENCE = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # Hub download patterns are case-sensitive
_ROPE = "rope_parameters"
_ROPE_NAMES = (("rope_theta", "partial_rotary_factor"), ("rotary_emb_base", "rotary_pct"))
# Fields of config.json that add_old_settings does not copy: they do not describe the model, or save_pretrained writes them.
_NOT_SETTINGS = {
    "architectures", "auto_map", "dtype", "model_type", "quantization_config", "torch_dtype", "transformers_version",
    "use_cache", "_name_or_path",
}  # fmt: skip
_NOT_COPIED = ("_from_model_config", "transformers_version")  # fields of generation_config.json


def base_folder(name: str) -> Path | None:
    """Return a local folder with the config, tokenizer, licence and Python files of a pretrained model.

    name: a local folder, or a Hub name, whose files are downloaded. Return None if `name` is a file or the download fails.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        return None
    from huggingface_hub import snapshot_download

    patterns = [*_WRITTEN_BY_TOKENIZER, *_OTHER_TOKENIZER_FILES, *_LICENCE, *_UPPER_CASE_LICENCE, *_CODE]
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns, "config.json", _GENERATION_CONFIG]))
    except Exception as error:  # many types of error: no network, no such name, a gated repository
        terminal.warning(f"{name}: licence and generation settings are not copied ({first_line(error)})")
        return None


def copy_tokenizer(base: Path | None, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write the files of `tokenizer` into the folder `target`, which must contain config.json.

    The tokenizer files of `base` are copied to `target`. If transformers then loads a tokenizer with the fingerprint of
    `tokenizer` from `target`, the copies stay. Otherwise, the copies are deleted and `tokenizer` is saved. Only copies
    that `save_pretrained` does not write (e.g. tokenizer.model) are kept, if the tokenizer of `base` has this fingerprint.
    """
    from transformers import AutoTokenizer

    if base is not None:
        copied = _copy(base, target, _WRITTEN_BY_TOKENIZER + _OTHER_TOKENIZER_FILES)
        expected = fingerprint(tokenizer)
        still_valid: tuple[str, ...] = ()
        # Many types of exception are possible if `base` has no tokenizer or transformers cannot load the tokenizer.
        with contextlib.suppress(Exception):
            loaded = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
            if fingerprint(loaded) == expected:
                return
            still_valid = _OTHER_TOKENIZER_FILES if fingerprint(load_tokenizer(base)) == expected else ()
        for name in copied:
            if not _matches(name, still_valid):
                (target / name).unlink()
    tokenizer.save_pretrained(target)


def copy_licence_and_code(base: Path | None, target: Path) -> None:
    """Copy the licence files from `base` to `target`, and the Python files if a config refers to them (`auto_map`)."""
    if base is None:
        return
    _copy(base, target, _LICENCE)
    if any(_json_of(base, name).get("auto_map") for name in ("config.json", "tokenizer_config.json")):
        _copy(base, target, _CODE)


def generation_config(base: Path | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of generation_config.json for a model that is trained with `tokenizer`.

    Sampling settings come from `base`. BOS and padding tokens come from `base`, or from the tokenizer if `base` does not
    define them. If neither defines a padding token, EOS is used for padding. `eos_token_id` holds the EOS tokens of `base`
    and the tokenizer's EOS token, because every training example ends with the tokenizer's EOS token.
    """
    import transformers

    settings = _json_of(base, _GENERATION_CONFIG)
    inherited = [settings, _json_of(base, "config.json"), published_settings(base)]

    def token(name: str, *defaults: int | None) -> Any:
        values = [*(config.get(name) for config in inherited), *defaults]
        return next((value for value in values if value is not None), None)

    ends, eos = token("eos_token_id"), tokenizer.eos_token_id
    base_ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if eos is not None and eos not in base_ends:
        ends = [*base_ends, eos] if base_ends else eos
    tokens = {
        "eos_token_id": ends,
        "pad_token_id": token("pad_token_id", tokenizer.pad_token_id, eos),
        "bos_token_id": token("bos_token_id", tokenizer.bos_token_id),
    }
    result = {name: value for name, value in settings.items() if name not in _NOT_COPIED}
    result |= {name: value for name, value in tokens.items() if value is not None}
    return result | {"transformers_version": transformers.__version__}


def published_settings(base: Path | None) -> dict[str, Any]:
    """Return `text_config` of config.json in `base`, or the whole config if it has no text_config; {} if `base` is None."""
    config = _json_of(base, "config.json")
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def add_old_settings(path: Path, published: dict[str, Any]) -> None:
    """Add settings to the config.json at `path` under the names that transformers 4 uses.

    transformers 5 moves the settings of rotary positions (`rope_theta`, `rope_scaling`, `rotary_pct`, ...) into
    `rope_parameters`, and renames Qwen3-MoE's `num_experts` to `num_local_experts`. Software that reads only the old names
    would use default values. Wrong values for rotary positions raise no error.

    The old settings are copied from `published`, the result of `published_settings`. If `published` lacks the rotary
    settings or the number of experts, these are derived from the new settings. Settings are added only if transformers
    then reads the same config as before. This must also hold for the new file without `rope_parameters`.
    """
    from transformers import AutoConfig

    current = json.loads(path.read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    expected = {**config.to_dict(), "_name_or_path": ""}
    missing = {name: published[name] for name in published.keys() - current.keys() - _NOT_SETTINGS}
    for old, new in config.attribute_map.items():
        if "experts" in old and new in current and old not in current:
            missing.setdefault(old, current[new])
    without_rope = {name: value for name, value in current.items() if name != _ROPE}
    for rope_settings, other_settings in itertools.product(_old_rope(current.get(_ROPE)), (missing, {})):
        added = {**rope_settings, **other_settings}
        compared = {name: value for name, value in expected.items() if name not in added}
        if all(_reads_as(type(config), {**form, **added}, compared) for form in (current, without_rope)):
            path.write_text(json.dumps(current | added, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            return


def _old_rope(rope: Any) -> Iterator[dict[str, Any]]:
    """Yield candidates for the transformers 4 form of `rope`, the value of `rope_parameters`. The last candidate is {}."""
    if isinstance(rope, dict):
        full, sliding = rope, None
        if isinstance(rope.get("full_attention"), dict):
            full, sliding = rope["full_attention"], rope.get("sliding_attention")
        theta, fraction = full.get("rope_theta"), full.get("partial_rotary_factor")
        rest = {name: full[name] for name in full if name not in ("rope_theta", "partial_rotary_factor")}
        scaling = {} if rest.get("rope_type", "default") == "default" else {"rope_scaling": rest}
        for theta_name, fraction_name in _ROPE_NAMES:
            settings = {theta_name: theta, fraction_name: fraction}
            if isinstance(sliding, dict):
                settings["rope_local_base_freq"] = sliding.get("rope_theta")
            yield {name: value for name, value in settings.items() if value is not None} | scaling
    yield {}


def _reads_as(config_class: type[PreTrainedConfig], content: Any, expected: dict[str, Any]) -> bool:
    """Return whether transformers reads `content` as a config that has every setting of `expected` with an equal value."""
    try:
        settings = config_class.from_dict(json.loads(json.dumps(content))).to_dict()
    except Exception:  # the type of the exception depends on the model family
        return False
    return all(settings.get(name) == value for name, value in expected.items())


def wrapper_type(base: Path | None, model_type: str) -> str:
    """Return the model type of `base` if `base` is a multimodal wrapper of a text model of type `model_type`, else ""."""
    config = _json_of(base, "config.json")
    is_wrapper = "text_config" in config and config.get("model_type") != model_type
    return str(config.get("model_type", "")) if is_wrapper else ""


def _copy(base: Path, target: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copy the files of `base` whose relative names match a pattern; return the names."""
    copied = []
    for path in sorted([*base.iterdir(), *base.glob("additional_chat_templates/*")]):
        name = path.relative_to(base).as_posix()
        if path.is_file() and _matches(name, patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
            copied.append(name)
    return copied


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)


def _json_of(base: Path | None, name: str) -> dict[str, Any]:
    """Return the content of a JSON file in `base`; {} if the file is missing or holds no JSON object."""
    try:
        content = {} if base is None else json.loads((base / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
