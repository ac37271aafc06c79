"""Files of a pretrained model besides its weights: config, tokenizer, licence, Python files, generation settings.

A run copies them beside its config, from where checkpoints and exports take them. No copied code is executed.
"""

from __future__ import annotations

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

# Names in lower case, relative to the folder.
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
_UPPER_CASE_LICENCE = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # patterns of the Hub are case-sensitive
_ROPE = "rope_parameters"
_ROPE_NAMES = (("rope_theta", "partial_rotary_factor"), ("rotary_emb_base", "rotary_pct"))
# Not settings of the model, or written by this program.
_NOT_SETTINGS = {
    "architectures", "auto_map", "dtype", "model_type", "quantization_config", "torch_dtype", "transformers_version",
    "use_cache", "_name_or_path",
}  # fmt: skip
_NOT_COPIED = ("_from_model_config", "transformers_version")


def base_folder(name: str) -> Path | None:
    """Return the folder with the small files of a pretrained model; None, with a warning, if they cannot be downloaded.

    `name`: a local folder, or a Hub name, whose files are downloaded into the Hub's cache.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        return None
    from huggingface_hub import snapshot_download

    wanted = [*_WRITTEN_BY_TOKENIZER, *_OTHER_TOKENIZER_FILES, *_LICENCE, *_UPPER_CASE_LICENCE, *_CODE]
    try:
        return Path(snapshot_download(name, allow_patterns=[*wanted, "config.json", _GENERATION_CONFIG]))
    except Exception as error:  # of many types: no network, no such name, a gated repository
        terminal.warning(f"{name}: licence and generation settings are not copied ({first_line(error)})")
        return None


def copy_tokenizer(base: Path | None, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Write the shards' tokenizer into `target`, which holds the config.

    The files of `base` are copied unchanged if transformers loads this tokenizer from them beside this config. Otherwise
    the tokenizer is saved; if the tokenizer of `base` has the same tokens, its other files (`tokenizer.model`) are kept.
    """
    from transformers import AutoTokenizer

    if base is not None:
        copied = _copy(base, target, _WRITTEN_BY_TOKENIZER + _OTHER_TOKENIZER_FILES)
        ours = fingerprint(tokenizer)
        try:
            found = AutoTokenizer.from_pretrained(target, local_files_only=True, trust_remote_code=False)
            if fingerprint(found) == ours:
                return
            kept = _OTHER_TOKENIZER_FILES if fingerprint(load_tokenizer(base)) == ours else ()
        except Exception:  # of many types: no tokenizer in the base, or one that transformers cannot load
            kept = ()
        for name in copied:
            if not _matches(name, kept):
                (target / name).unlink()
    tokenizer.save_pretrained(target)


def copy_licence_and_code(base: Path | None, target: Path) -> None:
    """Copy the licence of `base` into `target`, and its Python files if a config names some (`auto_map`)."""
    if base is None:
        return
    _copy(base, target, _LICENCE)
    if any(_json_of(base, name).get("auto_map") for name in ("config.json", "tokenizer_config.json")):
        _copy(base, target, _CODE)


def generation_config(base: Path | None, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of generation_config.json.

    Sampling settings come from `base`; BOS and padding tokens from `base`, or from the tokenizer if `base` has none.
    `eos_token_id` is that of `base` plus the tokenizer's EOS token, because every training example ends with it.
    """
    import transformers

    settings = _json_of(base, _GENERATION_CONFIG)
    inherited = [settings, _json_of(base, "config.json"), published_settings(base)]

    def token(kind: str, *others: int | None) -> Any:
        values = [*(found.get(kind) for found in inherited), *others]
        return next((value for value in values if value is not None), None)

    ends = token("eos_token_id")
    ours = tokenizer.eos_token_id
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if ours is not None and ours not in known:
        ends = [*known, ours] if known else ours
    tokens = {
        "eos_token_id": ends,
        "pad_token_id": token("pad_token_id", tokenizer.pad_token_id, ours),
        "bos_token_id": token("bos_token_id", tokenizer.bos_token_id),
    }
    result = {name: value for name, value in settings.items() if name not in _NOT_COPIED}
    result |= {name: value for name, value in tokens.items() if value is not None}
    return result | {"transformers_version": transformers.__version__}


def published_settings(base: Path | None) -> dict[str, Any]:
    """Return config.json of `base`, its `text_config` if there is one, without transformers' defaults; {} without a base."""
    config = _json_of(base, "config.json")
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def add_old_settings(path: Path, published: dict[str, Any]) -> None:
    """Add to the config.json at `path` the settings of `published`, the base model's config.json, that it lacks.

    transformers 5 moves the settings of rotary positions (`rope_theta`, `rope_scaling`, `rotary_pct`, ...) into
    `rope_parameters`, and Qwen3-MoE's `num_experts` into `num_local_experts`. Software that reads only the names of
    transformers 4 would use its defaults, for positions silently.

    Settings of rotary positions and numbers of experts that `published` lacks are derived. Settings are added only if
    transformers reads the same config from the result, with and without `rope_parameters`.
    """
    from transformers import AutoConfig

    ours = json.loads(path.read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    kind, expected = type(config), {**config.to_dict(), "_name_or_path": ""}
    kept = {key: value for key, value in published.items() if key not in ours and key not in _NOT_SETTINGS}
    for old, new in config.attribute_map.items():
        if "experts" in old and new in ours and old not in ours:
            kept.setdefault(old, ours[new])
    for rope_settings, other_settings in itertools.product(_candidates(ours.get(_ROPE)), (kept, {})):
        added = {**rope_settings, **other_settings}
        without_new = {key: value for key, value in ours.items() if key != _ROPE}
        if all(_reads_same(kind, content | added, expected, added) for content in (ours, without_new)):
            path.write_text(json.dumps(ours | added, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            return


def _candidates(rope: Any) -> Iterator[dict[str, Any]]:
    """Yield forms in which configs of transformers 4 spell `rope_parameters`, last the empty one."""
    if isinstance(rope, dict):
        whole, local = rope, None
        if isinstance(rope.get("full_attention"), dict):
            whole, local = rope["full_attention"], rope.get("sliding_attention")
        theta, share = whole.get("rope_theta"), whole.get("partial_rotary_factor")
        rest = {name: whole[name] for name in whole if name not in ("rope_theta", "partial_rotary_factor")}
        scaling = {} if rest.get("rope_type", "default") == "default" else {"rope_scaling": rest}
        for theta_name, share_name in _ROPE_NAMES:
            names = {theta_name: theta, share_name: share}
            if isinstance(local, dict):
                names["rope_local_base_freq"] = local.get("rope_theta")
            yield {name: value for name, value in names.items() if value is not None} | scaling
    yield {}


def _reads_same(
    kind: type[PreTrainedConfig], content: dict[str, Any], expected: dict[str, Any], added: dict[str, Any]
) -> bool:
    """Return whether transformers reads `expected` from `content`; the names in `added` are not compared."""
    try:
        found = kind.from_dict(json.loads(json.dumps(content))).to_dict()
    except Exception:  # of many types: the family has no such setting
        return False
    return all(found.get(name) == value for name, value in expected.items() if name not in added)


def wrapper_type(base: Path | None, model_type: str) -> str:
    """Return the model type of `base` if it is a multimodal wrapper whose text part (of `model_type`) is used, else ""."""
    config = _json_of(base, "config.json")
    is_wrapper = "text_config" in config and config.get("model_type") != model_type
    return str(config.get("model_type", "")) if is_wrapper else ""


def _copy(base: Path, target: Path, patterns: tuple[str, ...]) -> list[str]:
    """Copy the files of `base` whose relative names match and return the names."""
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
    """Return the content of a JSON file of `base`; {} if there is none."""
    try:
        found = {} if base is None else json.loads((base / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
