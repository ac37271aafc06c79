"""The private attributes that trainer/runtime/library_internals.py uses exist in the installed libraries and do the same."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Cache,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
)

from trainer.runtime import library_internals

TRAINER = Path(library_internals.__file__).resolve().parents[1]
# Not of torch, DeepSpeed or transformers: the standard library's, bert-score's, and our own of another object.
OTHERS = {"_exit", "_run_exitfuncs", "_tokenizer", "_cache", "_kernel_replacements"}
LLAMA: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)).eval()


def test_no_other_module_uses_private_attributes_of_libraries() -> None:
    found = []
    for path in sorted(TRAINER.rglob("*.py")):
        if path.name == "library_internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                owner = node.value.id if isinstance(node.value, ast.Name) else ""
                if owner not in ("self", "cls") and node.attr not in OTHERS:
                    found.append(f"{path.relative_to(TRAINER)}:{node.lineno}: {node.attr}")
    assert not found


def test_norms_are_summed_in_the_asked_dtype() -> None:
    (norm,) = library_internals.tensor_norms([torch.full((4,), 2.0, dtype=torch.bfloat16)], torch.float64)
    assert norm.dtype == torch.float64 and norm.item() == 4.0


def test_a_storage_on_meta_has_its_offset_in_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3, dtype=torch.int64), "b": torch.arange(5, dtype=torch.int64) + 70}
    torch.save(tensors, tmp_path / "file.pt")
    content = (tmp_path / "file.pt").read_bytes()
    loaded = torch.load(tmp_path / "file.pt", map_location="meta", weights_only=True)
    for name, tensor in tensors.items():
        start = library_internals.offset_in_file(loaded[name].untyped_storage())
        assert content[start : start + tensor.nbytes] == tensor.numpy().tobytes()


def test_storages_and_views_on_meta() -> None:
    whole, other = torch.empty(4, 2, device="meta"), torch.empty(4, 2, device="meta")
    assert library_internals.storage_id(whole[1]) == library_internals.storage_id(whole)
    assert library_internals.storage_id(other) != library_internals.storage_id(whole)
    assert library_internals.is_view(whole[1]) and not library_internals.is_view(whole)


def test_a_parameter_is_replaced() -> None:
    linear = torch.nn.Linear(3, 2)
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    library_internals.replace_parameter(linear, "weight", parameter)
    assert dict(linear.named_parameters())["weight"] is parameter and linear.weight is parameter
    with pytest.raises(AssertionError):
        library_internals.replace_parameter(linear, "weight", torch.nn.Parameter(torch.zeros(3, 2)))


def test_the_end_of_a_capture_is_there() -> None:
    if not torch.backends.cuda.is_built():
        pytest.skip("torch was built without CUDA")
    assert callable(torch._C._cuda_endAllocateToPool)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_products_of_onednn_are_those_of_linear() -> None:
    rows, weight, bias = torch.randn(2, 5, 16), torch.randn(24, 16), torch.randn(24)
    expected = torch.nn.functional.linear(rows, weight, bias)
    torch.testing.assert_close(library_internals.linear_by_onednn(rows, weight, bias), expected)
    reordered = library_internals.reorder_linear_weight(weight)
    torch.testing.assert_close(library_internals.linear_by_onednn(rows, reordered, bias), expected)
    torch.testing.assert_close(library_internals.linear_by_onednn(rows, weight, None), expected - bias)


def test_every_process_group_gets_the_timeout(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]
        library_internals.set_timeout_of_all_process_groups(77)
        for group in groups:
            backend: Any = group._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
            assert backend.options._timeout.total_seconds() == 77
    finally:
        dist.destroy_process_group()


def test_deepspeed_calls_what_is_replaced() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine._broadcast_model
    assert "self._broadcast_model()" in inspect.getsource(DeepSpeedEngine)
    with library_internals.without_weight_broadcast():
        assert DeepSpeedEngine._broadcast_model is not original
    assert DeepSpeedEngine._broadcast_model is original
    assert "self._copy_recovery_script(" in inspect.getsource(DeepSpeedEngine)
    assert list(inspect.signature(DeepSpeedEngine._copy_recovery_script).parameters) == ["self", "save_path"]
    engine = SimpleNamespace()
    library_internals.leave_out_recovery_script(engine)
    engine._copy_recovery_script(save_path="")


def test_zero_3_updates_the_weights_of_a_sub_group_after_a_step() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Optimizer

    assert callable(Optimizer._reassign_or_swap_out_partitioned_parameters)
    source = inspect.getsource(Optimizer)  # a method alone is wrapped
    assert "def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id):" in source
    assert "self._reassign_or_swap_out_partitioned_parameters(sub_group_id)" in source


def test_grouped_products_are_turned_off_inside() -> None:
    from transformers.integrations import moe

    original = moe._can_use_grouped_mm
    assert "_can_use_grouped_mm(" in inspect.getsource(moe).replace("def _can_use_grouped_mm(", "")
    with library_internals.without_grouped_products():
        assert moe._can_use_grouped_mm(None, None, None) is False
    assert moe._can_use_grouped_mm is original


def test_attention_of_a_config_is_read_and_set(llama: Any) -> None:
    config = LlamaConfig(**LLAMA)
    assert library_internals.supports_sdpa(llama) and library_internals.supports_sdpa(LlamaForCausalLM)
    assert library_internals.can_set_attention(LlamaForCausalLM)
    assert not library_internals.can_set_attention(BloomForCausalLM)
    library_internals.set_attention(config, "eager")
    assert library_internals.get_attention(config) == "eager"
    assert library_internals.get_attention(LlamaForCausalLM(config).config) == "eager"


def test_what_a_class_says_of_its_tensors(llama: Any) -> None:
    from transformers.utils.loading_report import LoadStateDictInfo

    assert "lm_head.weight" in library_internals.tied_weight_keys(llama)
    assert library_internals.keys_not_saved(llama) == []
    assert library_internals.dtype_plan(llama, torch.bfloat16) == {}
    info = LoadStateDictInfo(set(), {"surplus.weight"}, set(), [], {}, set())
    library_internals.leave_out_expected_extras(llama, info)
    assert info.unexpected_keys == {"surplus.weight"}


def test_conversions_of_a_loaded_model_are_known_and_forgotten(tmp_path: Path) -> None:
    config = MixtralConfig(**LLAMA, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert library_internals.weight_conversions(model)
    library_internals.forget_weight_conversions(model)
    assert library_internals.weight_conversions(model) == []


def test_the_origin_of_a_config_is_copied() -> None:
    source, config = LlamaConfig(**LLAMA), LlamaConfig(**LLAMA)
    source.name_or_path, source._commit_hash = "some/model", "0123abc"
    library_internals.copy_origin(config, source)
    assert (config.name_or_path, config._commit_hash) == ("some/model", "0123abc")


def test_generate_s_cache_is_made(llama: Any) -> None:
    cache: dict[str, Any] = {}
    library_internals.prepare_cache(llama, cache, num_rows=2, capacity=8)
    assert isinstance(cache["past_key_values"], Cache)


def test_heads_of_bloom_and_falcon() -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))
    layer = bloom.transformer.h[0].self_attention
    query, key, value = library_internals.split_bloom_heads(layer, torch.randn(3, 5, 24))
    assert query.shape == key.shape == value.shape == (3, 2, 5, 4)
    falcon = FalconForCausalLM(
        FalconConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, multi_query=False
        )
    )
    layer = falcon.transformer.h[0].self_attention
    query, key, value = library_internals.split_falcon_heads(layer, torch.randn(3, 5, 24))
    assert query.shape == key.shape == value.shape == (3, 5, 2, 4)
