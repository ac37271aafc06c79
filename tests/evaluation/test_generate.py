"""The slot backend gives the tokens of transformers' `generate`, with any other requests in the batch."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from trainer.errors import UserError
from trainer.evaluation.backends import slots
from trainer.evaluation.backends.slots import SequenceState, SlotBackend
from trainer.evaluation.decoding import STUDENT
from trainer.evaluation.generate import generate, make_sampler
from trainer.evaluation.rollout import Program, Rollout, RolloutContext, RolloutModel
from trainer.evaluation.sampling import sampling_seed
from trainer.evaluation.stop_tokens import StopTokens, end_of_text_ids
from trainer.models.kv_cache import ForwardBatch
from trainer.models.slot_attention import use_slot_attention
from trainer.models.tokenizer import load_tokenizer
from trainer.shards.read import Shards

VOCABULARY = 1024  # of the stories' tokenizer, whose end token is 0
ROTARY = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 96, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=4, n_positions=96, eos_token_id=None)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ROTARY, num_key_value_heads=4)),
    "qwen2, grouped queries": lambda: Qwen2ForCausalLM(Qwen2Config(**ROTARY, num_key_value_heads=2)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**ROTARY)),
}


@pytest.fixture(scope="module")
def tokenizer(shards: Shards) -> PreTrainedTokenizerBase:
    return load_tokenizer(shards.tokenizer_path)


def make(name: str) -> PreTrainedModel:
    """Return a model with random weights, large enough that greedy texts vary and contain end tokens."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return model


def prompts(count: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[numbers.randrange(1, VOCABULARY) for _ in range(numbers.randint(1, 30))] for _ in range(count)]


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[list[int]],
    num_slots: int,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    order: list[int] | None = None,
    ends: frozenset[int] | None = None,
) -> dict[int, list[int]]:
    """Return the generated tokens of every text by its index."""
    spec = RolloutModel(frozenset(), 96, ends or end_of_text_ids(model, tokenizer))
    context = RolloutContext(StopTokens(tokenizer), [spec], {STUDENT: 0}, max_new_tokens, calculator=False)
    written: dict[int, list[int]] = {}

    def free_text(rollout: Rollout) -> Program[None]:
        written[rollout.index] = []

        def is_done(tokens: list[int]) -> bool:
            written[rollout.index] = list(tokens)
            return False

        yield from rollout.generate(STUDENT, is_done, lambda text: None)

    rollouts = (
        Rollout(index, texts[index], context, free_text, [sampling_seed(5, f"problem {index}")])
        for index in order or range(len(texts))
    )
    capacity = min(max(map(len, texts)) + max_new_tokens, 96)
    backend = SlotBackend[Rollout](0, model, num_slots, capacity, make_sampler(temperature, 0.9))
    ended = list(generate([backend], rollouts, Rollout.on_token, num_slots))
    assert sorted(rollout.index for rollout in ended) == list(range(len(texts)))
    for rollout in ended:
        more = rollout.generated.total() - len(written[rollout.index])
        assert more == (rollout.stop_reason == "")  # the end token
    return written


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_what_transformers_generates(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model, texts = make(name), prompts(8)
    ends = frozenset(range(40))  # of 1024 random tokens some must end a text, for slots to be refilled
    expected = []
    for text in texts:
        output = model.generate(
            torch.tensor([text]), attention_mask=torch.ones(1, len(text)), do_sample=False,
            max_new_tokens=25, eos_token_id=sorted(ends), pad_token_id=0,
        )  # fmt: skip
        expected.append(output[0, len(text) :].tolist())
    assert len({len(tokens) for tokens in expected}) > 2
    for num_slots in (1, 5):
        written = solve(model, tokenizer, texts, num_slots, 25, ends=ends)
        ours = [[token for token in tokens if token not in ends] for tokens in expected]
        assert [written[index] for index in range(len(texts))] == ours
    assert model.config._attn_implementation == "sdpa"


class ChunkedRequest:
    """Request whose text becomes pending in chunks, each at a given step."""

    def __init__(self, text: list[int], sizes: list[int], steps: list[int]) -> None:
        ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.chunks = [text[a:b] for a, b in pairwise(ends)]
        self.steps = list(steps)
        self.sequences = [SequenceState([])]
        self.next_model: int | None = 1  # another model's

    def begin(self, step: int) -> None:
        self.next_model = 1
        if self.steps and step == self.steps[0]:
            self.steps.pop(0)
            self.sequences[0].pending = self.chunks.pop(0)
            self.next_model = 0


@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_waiting_slots_and_chunks(name: str) -> None:
    """Slots that wait for another model lie before, between and after slots that process one token, a few or a prompt."""
    model = make(name)
    texts = [
        [5, 6, 7, 8, 9, 10, 11, 12, 13],
        [14] * 9,
        [20, 21, 22, 30, 31, 32, 33, 34, 35],
        [40, 41, 42, 43],
    ]
    plans = [([2, 3, 4], [0, 1, 5]), ([9], [2]), ([1, 1, 7], [1, 2, 4]), ([1, 3], [0, 6])]
    seen: dict[int, torch.Tensor] = {}

    def record(logits: torch.Tensor, sequences: list[SequenceState]) -> list[int]:
        for row, sequence in zip(logits, sequences, strict=True):
            seen[id(sequence)] = row.clone()
        return [0] * len(sequences)

    with use_slot_attention(model):
        backend = SlotBackend[ChunkedRequest](0, model, 4, 32, record)
        requests = [ChunkedRequest(text, *plan) for text, plan in zip(texts, plans, strict=True)]
        for request in requests:
            backend.add(request)
        for step in range(7):
            for request in requests:
                if request.next_model is not None:
                    request.begin(step)
            if backend.num_runnable:
                assert len(backend.step()) == sum(request.next_model == 0 for request in requests)
            for request in requests:
                if not request.steps:
                    request.next_model = None  # the last request moves into its slot
    for text, request in zip(texts, requests, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(seen[id(request.sequences[0])], expected, rtol=1e-4, atol=1e-4)


def test_prompts_are_spread_over_several_steps(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = make("gpt2"), prompts(8)
    together = solve(model, tokenizer, texts, num_slots=8)
    monkeypatch.setattr(slots, "MAX_PREFILL_TOKENS", 20)
    sizes: list[int] = []
    prepare_prefill = slots.prepare_prefill

    def counted(*arguments: Any) -> ForwardBatch:
        step = prepare_prefill(*arguments)
        sizes.append(step.input_ids.shape[1])
        return step

    monkeypatch.setattr(slots, "prepare_prefill", counted)
    assert solve(model, tokenizer, texts, num_slots=8) == together
    assert max(sizes) <= max(20, *map(len, texts)) < sum(map(len, texts))


def test_text_ends_at_the_context_length(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gpt2")
    assert len(solve(model, tokenizer, [[1] * 90], 1, ends=frozenset([-1]))[0]) == 6
    assert solve(model, tokenizer, [[1] * 96], 1, ends=frozenset([-1])) == {0: []}


def test_samples_depend_on_the_problem_not_on_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    model, texts = make("gpt2"), prompts(9)
    reference = solve(model, tokenizer, texts, num_slots=4, temperature=1.0)
    backwards = solve(model, tokenizer, texts, num_slots=2, temperature=1.0, order=list(reversed(range(9))))
    assert reference == backwards
    assert reference[0] != solve(model, tokenizer, texts, num_slots=4)[0]


def test_model_is_restored(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gpt2").train()
    model.set_attn_implementation("eager")
    solve(model, tokenizer, prompts(2), num_slots=2, max_new_tokens=3)
    assert model.training and model.config._attn_implementation == "eager"
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()  # no tensor is left in inference mode


def test_nan_weights_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    for temperature in (0.0, 0.7):
        with pytest.raises(UserError, match="NaN"):
            solve(model, tokenizer, prompts(2), num_slots=2, temperature=temperature)
