"""Tests of activation traces: against a real pass for every architecture, and growth with the examples."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.distributed import run_well
from tests.models.families import family_of
from trainer.errors import UserError
from trainer.models import presets
from trainer.planning.activations import trace_activations
from trainer.training import cross_entropy

CLEAR_REFS = Path("/proc/self/clear_refs")


def config(**changes: int) -> object:
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 500, **changes}
    made = AutoConfig.for_model("gpt2", **shape)
    made.use_cache = False
    return made


def peak(
    lengths: list[int], learned: int = 10, checkpointing: bool = False, cuda: bool = False, **shape: int
) -> int:
    return trace_activations(config(**shape), lengths, learned, torch.float32, checkpointing, cuda).peak_bytes


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="measures the resident set through Linux's /proc")
def test_the_trace_matches_a_real_pass_in_every_architecture() -> None:
    # malloc must return freed memory, or earlier frees hide new allocations
    output = run_well(
        ["-m", "tests.planning.measure_activations"], timeout=600, MALLOC_MMAP_THRESHOLD_="65536"
    )
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    results = json.loads(line.removeprefix("RESULT "))
    assert len(results) == 8
    wrong = {name: pair for name, pair in results.items() if abs(pair[0] / pair[1] - 1) > 0.10}
    assert not wrong, wrong


@pytest.mark.parametrize("cuda", [False, True])
def test_no_quadratic_term_in_a_pack(cuda: bool) -> None:
    """Twice the examples take twice the memory, whatever the length of the pack."""
    once, twice, four = (peak([64] * n, 16 * n, cuda=cuda, n_positions=64) for n in (2, 4, 8))
    assert (four - twice) == pytest.approx(2 * (twice - once), rel=0.02)


def test_logits_are_counted_at_targets_only() -> None:
    few, many = (peak([64] * 4, learned, vocab_size=50_000) for learned in (100, 200))
    # the gradient of fp32 logits overwrites them: one copy
    assert many - few == pytest.approx(100 * 50_000 * 4, rel=0.2)


def test_recomputation_and_the_gpu_s_dropout_save_memory() -> None:
    assert peak([64] * 8, n_layer=6, checkpointing=True) < 0.5 * peak([64] * 8, n_layer=6)
    assert peak([64] * 8, cuda=True) < peak([64] * 8)
    assert peak([64] * 8, cuda=True, checkpointing=True) < peak([64] * 8, cuda=True)


def test_every_gradient_is_in_the_trace_once() -> None:
    """Tied weights have one gradient."""
    found = trace_activations(config(), [32], 8, torch.float32, False, False)
    from trainer.models.load import num_parameters

    assert found.samples[-1].gradient_elements == num_parameters(config())
    assert found.samples[0].gradient_elements == 0


def test_nothing_is_allocated() -> None:
    """Weights of 4 GB are traced in a process that does not grow."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shape = presets.published_config("llama-2-7b")
    shape.use_cache, shape.num_hidden_layers = False, 4
    assert trace_activations(shape, [512] * 8, 4096, torch.float32, False, True).peak_bytes > 3e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 0.5e9


@pytest.mark.parametrize(
    "name",
    ["mixtral", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "falcon", "gptj", "bloom", "doge", "openai-gpt"],
)
@pytest.mark.parametrize("cuda", [False, True])
def test_families_without_packing_or_with_experts_are_planned(name: str, cuda: bool) -> None:
    """Twice as many examples take about twice the memory, in packs or in padded rows."""
    small = family_of(name).config
    few, many = (
        trace_activations(small, [40] * n, 20 * n, torch.float32, cuda, cuda).peak_bytes for n in (4, 8)
    )
    assert 1.5 < many / few < 2.5


def test_padding_is_counted_where_a_family_is_not_packed() -> None:
    small = family_of("gptj").config
    even, uneven = (
        trace_activations(small, lengths, 40, torch.float32, False, False).peak_bytes
        for lengths in ([30, 30], [10, 50])
    )
    assert uneven > 1.3 * even


def test_a_model_that_needs_values_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="memory of a jetmoe model cannot be planned, because"):
        trace_activations(family_of("jetmoe").config, [40], 20, torch.float32, False, False)


def test_the_loss_on_a_gpu_is_computed_in_large_blocks() -> None:
    tokens, vocabulary = [64] * 256, 50_000
    cpu, gpu = (peak(tokens, 64 * 256, cuda=cuda, vocab_size=vocabulary) for cuda in (False, True))
    assert gpu - cpu > 0.5 * cross_entropy.ACCELERATOR_BLOCK_BYTES
