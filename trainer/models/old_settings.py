"""Add to a config.json the settings under their transformers 4 names, beside those of transformers 5.

transformers 5 moves the settings of rotary positions (`rope_theta`, `rope_scaling`, `rotary_pct`, ...) into
`rope_parameters`, and Qwen3-MoE's `num_experts` into `num_local_experts`. Software that reads only the old names would
use its defaults, for positions silently.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ROPE = "rope_parameters"
# Not settings of the model, or written by this program.
_NOT_KEPT = {
    "architectures", "auto_map", "dtype", "model_type", "quantization_config", "torch_dtype", "transformers_version",
    "use_cache", "_name_or_path",
}  # fmt: skip


def add_old_settings(path: Path, published: dict[str, Any]) -> None:
    """Add to the config.json at `path` the settings of `published`, the base model's config.json, that it lacks.

    Settings of rotary positions and numbers of experts that `published` lacks are derived. Settings are added only if
    transformers reads the same config from the result, with and without `rope_parameters`.
    """
    from transformers import AutoConfig

    ours = json.loads(path.read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    kind, expected = type(config), {**config.to_dict(), "_name_or_path": ""}
    kept = {key: value for key, value in published.items() if key not in ours and key not in _NOT_KEPT}
    renamed = {
        old: ours[new] for old, new in config.attribute_map.items() if "experts" in old and new in ours
    }
    kept = {old: value for old, value in renamed.items() if old not in ours} | kept
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
        for theta_name, share_name in (
            ("rope_theta", "partial_rotary_factor"),
            ("rotary_emb_base", "rotary_pct"),
        ):
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
