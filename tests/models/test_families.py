"""The riskiest tenth of the rows of docs/models.md; `make test-models` measures all."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.models import measure_evaluation, measure_training
from tests.models.families import excluded, families, family_of, names
from tests.models.measure import measure_row
from tests.models.row import FALLBACK, OK, STAGES, WRONG
from trainer.evaluation.backends.choice import SLOTS, BackendChoice
from trainer.models import packed_attention
from trainer.training.layout_check import LayoutChoice
from trainer.training.layouts import PACKED, BatchLayout

# On both fast paths; the comments say what each covers.
FAST = (
    "deepseek_v3",  # latent attention, values smaller than keys
    "diffllama",  # calls attention twice a layer
    "falcon-alibi",  # biases by distance; layers chosen in a dict of classes
    "gemma2-window",  # soft caps and a short window
    "gemma3-4b-window",  # a multimodal wrapper
    "gemma4-e2b",  # a wrapper, key-value layers that are shared, head sizes that differ by layer
    "gpt2-dropout",
    "gpt_oss-window",  # sinks and experts
    "hrm_text",  # runs its layers several times
    "llama4-chunk",  # chunks shorter than the examples
    "qwen3_moe",
    "stablelm",  # its layers drop keyword arguments
)
# On the slower paths, with the reason.
SLOW = (
    "deepseek_v32",  # sparse attention also selects padding
    "granitemoehybrid",  # state space
    "gptj",  # its attention cannot be replaced
    "lfm2",  # convolutions
    "mamba",  # no attention
    "phi4-mini-long",  # rotary frequencies depend on the longest row of a batch
    "qwen3_5",  # linear attention inside a multimodal wrapper
)


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_numbers_are_those_of_transformers(name: str) -> None:
    row = measure_row(name)
    cells = {stage: getattr(row, stage) for stage in STAGES}
    assert {cell.status for cell in cells.values()} <= {OK, FALLBACK}, (cells, row.log)
    assert row.export.status == OK
    if name in FAST:
        assert row.is_fast, cells
    else:
        assert row.packed.status == row.slots.status == FALLBACK
        assert row.packed.reason and row.slots.reason, "a fallback says why"


def test_a_layout_that_leaks_is_measured_as_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed convolutions read the previous example; here without the check that refuses them."""
    folder, batch = str(family_of("lfm2").save(tmp_path)), measure_training.examples()
    wanted = measure_training.reference(family_of("lfm2").build(), batch)
    assert measure_training.measure(folder, "false", batch, wanted).status == OK
    leaking = LayoutChoice(BatchLayout(PACKED, packed_attention.register()), 0.0, 0.0, len(batch), (), "fp32")
    monkeypatch.setattr(measure_training, "choose_layout", lambda *_: leaking)
    assert measure_training.measure(folder, "auto", batch, wanted).status == WRONG


def test_a_backend_without_the_models_state_is_measured_as_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = str(family_of("lfm2").save(tmp_path)), family_of("lfm2").build()
    monkeypatch.setattr(measure_evaluation, "choose_backend", lambda *_: BackendChoice(SLOTS))
    assert measure_evaluation.measure(folder, "auto", plain).status == WRONG


def test_every_type_of_the_registry_is_a_row_or_excluded_with_a_reason() -> None:
    rows = {family.model_type for family in families()}
    left_out = excluded()
    assert not rows & set(left_out)
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= rows | set(left_out)
    assert all(left_out.values()) and len(names()) >= 130


@functools.cache
def _layer_types(name: str) -> set[str]:
    return set(getattr(family_of(name).text_config, "layer_types", None) or ())


def test_small_configs_keep_every_kind_of_layer() -> None:
    assert _layer_types("gemma3") == {"sliding_attention", "full_attention"}
    assert _layer_types("qwen3_5") == {"linear_attention", "full_attention"}
    assert _layer_types("llama4") == {"chunked_attention", "full_attention"}
    assert _layer_types("lfm2") == {"conv", "full_attention"}
    deepseek = family_of("deepseek_v3").config
    assert deepseek.v_head_dim < deepseek.qk_nope_head_dim + deepseek.qk_rope_head_dim
    assert family_of("gemma2-window").config.sliding_window < min(measure_training.LENGTHS[:4])
