"""The check before the first step rejects layouts that give other numbers than the model, and accepts right ones."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.models.families import family_of
from trainer.errors import UserError
from trainer.models import load, packed_attention, training_kernels
from trainer.models.default_attention import set_attention
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory
from trainer.training import layouts
from trainer.training.batches import MicroBatch
from trainer.training.layout_check import Example, LayoutChoice, NoLayout, choose_layout, distances
from trainer.training.layout_selection import check_same_layout, layout_of_checkpoint
from trainer.training.layouts import (
    EQUAL_LENGTH,
    ONE_BY_ONE,
    PACKED,
    PADDED,
    BatchLayout,
    group_examples,
    split_into_batches,
)
from trainer.training.loss import summed_token_loss
from trainer.training.model_copy import _amplify

CPU = torch.device("cpu")
LENGTHS = (40, 57, 23, 23, 9)


def _examples(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 480) -> list[Example]:
    random = np.random.default_rng(0)
    return [(random.integers(3, vocabulary, length), np.arange(length) >= length // 3) for length in lengths]


def _choose(
    model: Any, packing: str = "auto", examples: list[Example] | None = None, **more: Any
) -> LayoutChoice:
    return choose_layout(
        model, layouts.candidates(model.config, packing), examples or _examples(), CPU, **more
    )


def _llama() -> Any:
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# --- families ---------------------------------------------------------------------------------------------------------

EXPECTED = {
    "gemma2-window": PACKED,
    "gpt_oss-window": PACKED,
    "mixtral": PACKED,
    "bloom": PACKED,
    "falcon-alibi": PACKED,
    "stablelm": PACKED,
    "gpt_neo-window": PADDED,
    "doge": PADDED,
    "qwen3_5-text": PADDED,
    "lfm2": PADDED,
    "mamba": PADDED,
    "openai-gpt": PADDED,
    "deepseek_v32": EQUAL_LENGTH,
    "phi4-mini-long": EQUAL_LENGTH,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_layout_gives_the_models_own_loss_and_gradient(name: str) -> None:
    plain, model = family_of(name).build(), family_of(name).build()
    training_kernels.patch_kernels(model, on_accelerator=False)
    examples = _examples()
    choice = _choose(model, examples=examples)
    assert choice.layout.arrangement == EXPECTED[name]
    assert bool(choice.fallback_reason) == (choice.layout.arrangement != PACKED)
    set_attention(model, choice.layout.attention)
    expected = torch.zeros(())
    for tokens, loss_mask in examples:
        row = torch.from_numpy(tokens)
        labels = torch.where(torch.from_numpy(loss_mask), row, -100)[1:]
        logits = plain(input_ids=row[None]).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    expected.backward()
    passes = split_into_batches(MicroBatch(0, [], examples), choice.layout, CPU, num_passes=7)
    assert len(passes) == (1 if choice.layout.arrangement in (PACKED, PADDED) else 4) + (
        6 if choice.layout.arrangement in (PACKED, PADDED) else 3
    )
    loss = torch.stack([summed_token_loss(model, rows) for rows in passes]).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    gradient, reference = (_gradient(m) for m in (model, plain))
    assert torch.linalg.norm(gradient - reference) < 1e-5 * torch.linalg.norm(reference)


def _gradient(model: Any) -> torch.Tensor:
    gradients = (torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())
    return torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("seed", range(6))
def test_rounding_in_a_mixture_of_experts_is_no_difference(seed: int) -> None:
    """Other examples in the batch change the shapes of the experts' products, and so their rounding."""
    config = MixtralConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=16,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert _choose(model, "true").layout.arrangement == PACKED


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = _llama().train()
    training_kernels.patch_kernels(model, on_accelerator=False)
    before = copy.deepcopy(model.state_dict())
    _choose(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert "forward" in vars(model.lm_head)  # the faster kernel is restored


# --- planted faults ---------------------------------------------------------------------------------------------------


def _patch_mlp(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    right = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, hidden: right(self, change(hidden)))


def test_attention_that_ignores_boundaries_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_attention.PackedSequence

    def one_example(lengths: Any, bounds: torch.Tensor, sdpa: bool) -> Any:
        return right([sum(lengths)], bounds[[0, -1]], sdpa)

    monkeypatch.setattr(packed_attention, "PackedSequence", one_example)
    choice = _choose(_llama())
    assert choice.layout == BatchLayout(PADDED, "sdpa")
    assert "differ from those of the model alone" in choice.fallback_reason
    with pytest.raises(NoLayout, match="differ from those of the model alone"):
        _choose(_llama(), "true")


def test_a_leak_between_examples_is_caught_in_a_mixture_of_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_attention.PackedSequence
    monkeypatch.setattr(
        packed_attention,
        "PackedSequence",
        lambda lengths, bounds, sdpa: right([sum(lengths)], bounds[[0, -1]], sdpa),
    )
    assert _choose(family_of("mixtral").build()).layout.arrangement == PADDED


def test_a_layer_that_reads_the_tokens_before_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution of two tokens is right in padded rows; in a pack it reads the previous example."""

    def shifted(hidden: torch.Tensor) -> torch.Tensor:
        return hidden + 0.01 * torch.nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))

    _patch_mlp(monkeypatch, shifted)
    assert _choose(_llama()).layout == BatchLayout(PADDED, "sdpa")


def test_positions_that_do_not_restart_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_attention.use_pack

    @contextlib.contextmanager
    def flat(model: Any, lengths: Any, bounds: torch.Tensor) -> Iterator[None]:
        def count_on(module: Any, arguments: tuple, keywords: dict[str, Any]) -> tuple:
            positions = torch.arange(keywords["input_ids"].shape[1]).unsqueeze(0)
            return arguments, {**keywords, "position_ids": positions}

        hook = model.register_forward_pre_hook(count_on, with_kwargs=True)
        with right(model, lengths, bounds):
            yield
        hook.remove()

    monkeypatch.setattr(packed_attention, "use_pack", flat)
    gpt2 = family_of("gpt2").build()
    assert _choose(gpt2).layout.arrangement == PADDED


def test_swallowed_sinks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.models import default_attention

    right = default_attention.attend

    def without_sinks(
        module: Any, query: Any, key: Any, value: Any, visible: Any, scaling: Any, *rest: Any
    ) -> Any:
        dropout, _, others = rest
        return right(module, query, key, value, visible, scaling, dropout, True, others)

    monkeypatch.setattr(default_attention, "attend", without_sinks)
    assert _choose(family_of("gpt_oss").build()).layout.arrangement == PADDED


def test_padding_that_is_read_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that reads the whole row reads the padding, and in a pack other examples; rows of equal length are right."""
    _patch_mlp(monkeypatch, lambda hidden: hidden + 0.01 * hidden.mean(1, keepdim=True))
    choice = _choose(_llama())
    assert choice.layout == BatchLayout(EQUAL_LENGTH, "sdpa")
    assert [layout.arrangement for layout, _ in choice.rejected] == [PACKED, PADDED, PADDED]


def test_rows_that_see_each_other_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    _patch_mlp(monkeypatch, lambda hidden: hidden + 0.01 * hidden.mean((0, 1), keepdim=True))
    assert _choose(_llama()).layout == BatchLayout(ONE_BY_ONE, "sdpa")


def test_memory_between_forward_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory: list[torch.Tensor] = []

    def remember(hidden: torch.Tensor) -> torch.Tensor:
        memory.append(hidden.detach().mean((0, 1)))
        return hidden + 0.1 * torch.stack(memory).mean(0)

    _patch_mlp(monkeypatch, remember)
    with pytest.raises(NoLayout, match="other logits when it is repeated"):
        _choose(_llama())


def test_a_layer_that_follows_the_batch_in_training_is_refused() -> None:
    """In evaluation mode a batch norm does not mix examples."""
    model = _llama()
    model.model.norm = torch.nn.Sequential(model.model.norm, _NormOverBatch(64))
    with pytest.raises(NoLayout, match="follow the batch in training"):
        _choose(model)


class _NormOverBatch(torch.nn.BatchNorm1d):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.flatten(0, 1)).view_as(hidden)


def test_weights_that_are_not_numbers_are_named() -> None:
    model = _llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NoLayout, match="its weights hold NaN"):
        _choose(model)


def test_a_window_that_only_the_longest_example_exceeds_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.models.default_attention import MaskPattern

    monkeypatch.setattr(MaskPattern, "is_causal", lambda self, length: True)  # ignores the window
    model = family_of("mistral-window").build()
    short = _examples((9, 14, 9))
    assert _choose(model, examples=short).layout.arrangement == PACKED
    assert _choose(model, examples=[*short, *_examples((18,))]).layout.arrangement == PADDED


def test_a_kernel_that_is_wrong_in_bf16_only_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_attention.attend

    def wrong_in_bf16(module: Any, query: torch.Tensor, *arguments: Any, **others: Any) -> Any:
        output, weights = right(module, query, *arguments, **others)
        return (output * 1.1 if query.dtype == torch.bfloat16 else output), weights

    monkeypatch.setattr(packed_attention, "attend", wrong_in_bf16)
    packed_attention.register()
    model = _llama()

    def in_bf16() -> contextlib.AbstractContextManager[None]:
        return load.data_in_dtypes([(parameter, torch.bfloat16) for parameter in model.parameters()])

    try:
        assert _choose(model).layout.arrangement == PACKED
        choice = _choose(model, in_training_dtype=in_bf16)
        assert choice.layout.arrangement == PADDED
        assert "in the training dtype" in choice.fallback_reason
    finally:
        monkeypatch.undo()
        packed_attention.register()
    assert _choose(model, in_training_dtype=in_bf16).layout.arrangement == PACKED


def test_a_model_whose_own_forward_pass_fails_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(hidden: torch.Tensor) -> torch.Tensor:
        raise ImportError("install the package of this family")

    _patch_mlp(monkeypatch, fails)
    with pytest.raises(NoLayout, match="its own forward pass fails: install the package"):
        _choose(_llama())


def test_a_model_without_a_backward_pass_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gradient(hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("forward only")
        return hidden

    _patch_mlp(monkeypatch, no_gradient)
    with pytest.raises(NoLayout, match="forward only"):
        _choose(_llama())


# --- parts ------------------------------------------------------------------------------------------------------------


def test_masked_logits_do_not_hide_a_difference() -> None:
    plain = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    plain[:, 40:] = torch.finfo(torch.float32).min
    found = plain.clone()
    found[1, 7] += 0.1
    difference = distances(found, plain)
    assert difference[0] == difference[2] == 0
    assert float(difference[1]) == pytest.approx(0.1 / 50**0.5 / float(plain[:, :40].std()), rel=1e-5)
    found[1, 7] = torch.nan
    assert not float(distances(found, plain).max()) <= 1


def test_amplified_initial_weights() -> None:
    gate = _amplify(torch.zeros(8), is_embedding=False)
    assert float(gate.std()) > 0.01
    small = 0.02 * torch.randn(64, 64)
    assert float(_amplify(small, is_embedding=False).square().mean().sqrt()) == pytest.approx(1 / 8, rel=1e-5)
    assert torch.equal(_amplify(small, is_embedding=True), small)
    large = torch.randn(64, 64)
    assert torch.equal(_amplify(large, is_embedding=False), large)


def test_examples_are_grouped() -> None:
    lengths = [5, 7, 5, 6, 7]
    assert group_examples(lengths, PACKED) == group_examples(lengths, PADDED) == [[0, 1, 2, 3, 4]]
    assert group_examples(lengths, EQUAL_LENGTH) == [[0, 2], [1, 4], [3]]
    assert group_examples(lengths, ONE_BY_ONE) == [[0], [1], [2], [3], [4]]
    assert all(group_examples([], rows) == [[]] for rows in (PACKED, PADDED, EQUAL_LENGTH, ONE_BY_ONE))


def test_default_attention_is_tried_before_eager() -> None:
    config = family_of("llama").config
    names = [str(layout) for layout in layouts.candidates(config, "false")]
    assert names == [
        "padded (attention sdpa)",
        "padded (attention eager)",
        "equal lengths (attention sdpa)",
        "one example (attention sdpa)",
    ]
    assert load.default_attn_implementation(config) == "sdpa"


@pytest.mark.parametrize(("packing", "rows"), [("true", PACKED), ("false", PADDED)])
def test_an_old_checkpoint_keeps_its_layout(packing: str, rows: str, tmp_path: Path) -> None:
    """Its facts have no layout; `packing` in its settings.yaml is true or false."""
    run = RunDirectory(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    checkpoint.parent.mkdir()
    staging = atomic_dir.create_staging(checkpoint)
    atomic_dir.publish(staging, checkpoint, "checkpoint", {"step": 1}, {})
    assert layout_of_checkpoint(checkpoint, run) is None
    run.settings.write_text(f"packing: {packing}\n", encoding="utf-8")
    layout = layout_of_checkpoint(checkpoint, run)
    assert layout is not None and layout.arrangement == rows
    check_same_layout(layout, "auto", checkpoint)
    check_same_layout(layout, packing, checkpoint)
    with pytest.raises(UserError, match="belongs to another run"):
        check_same_layout(layout, "false" if packing == "true" else "true", checkpoint)
