"""Decoding in slots is decoding: token for token what transformers' own generate gives, whatever shares the batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
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
from trainer.evaluation.rollout import ModelSlot, Program, Rollout, RolloutContext
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
    """Random weights, large enough that greedy texts vary and end tokens turn up."""
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
    """Tokens of every text by its index."""
    seat = ModelSlot(frozenset(), 96, ends or end_of_text_ids(model, tokenizer))
    rules = RolloutContext(StopTokens(tokenizer), [seat], {STUDENT: 0}, max_new_tokens, calculator=False)
    written: dict[int, list[int]] = {}

    def free_text(solution: Rollout) -> Program[None]:
        written[solution.index] = []

        def keep(tokens: list[int]) -> bool:
            written[solution.index] = list(tokens)
            return False

        yield from solution.generate(STUDENT, keep, lambda text: None)

    waiting: Iterator[int] = iter(order or range(len(texts)))

    def draw() -> Rollout | None:
        index = next(waiting, None)
        if index is None:
            return None
        return Rollout(index, texts[index], rules, free_text, [sampling_seed(5, f"problem {index}")])

    capacity = min(max(map(len, texts)) + max_new_tokens, 96)
    machine = SlotBackend[Rollout](0, model, num_slots, capacity, make_sampler(temperature, 0.9))
    ended = list(generate([machine], draw, Rollout.on_token, num_slots))
    assert sorted(solution.index for solution in ended) == list(range(len(texts)))
    for solution in ended:
        more = solution.generated.total() - len(written[solution.index])
        assert more == (solution.stop_reason == "")  # the end token
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


class Reading:
    """A text that is read in pieces, each when its turn comes: a number of the step. `seen`: logits after the last."""

    def __init__(self, text: list[int], pieces: list[int], steps: list[int]) -> None:
        ends = [sum(pieces[:i]) for i in range(len(pieces) + 1)]
        self.pieces = [text[a:b] for a, b in pairwise(ends)]
        self.steps = list(steps)
        self.sequences = [SequenceState([])]
        self.next_model: int | None = 1  # another model's

    def begin(self, step: int) -> None:
        self.next_model = 1
        if self.steps and step == self.steps[0]:
            self.steps.pop(0)
            self.sequences[0].pending = self.pieces.pop(0)
            self.next_model = 0


@pytest.mark.parametrize("name", MODELS)
def test_parked_slots_and_tokens_read_in_pieces_change_no_logits(name: str) -> None:
    """Slots that wait for another model lie before, between and behind slots that read one token, a few or a prompt."""
    model = make(name)
    texts = [
        [5, 6, 7, 8, 9, 10, 11, 12, 13],
        [14] * 9,
        [20, 21, 22, 30, 31, 32, 33, 34, 35],
        [40, 41, 42, 43],
    ]
    plans = [([2, 3, 4], [0, 1, 5]), ([9], [2]), ([1, 1, 7], [1, 2, 4]), ([1, 3], [0, 6])]
    seen: dict[int, torch.Tensor] = {}

    def keep(logits: torch.Tensor, feeds: list[SequenceState]) -> list[int]:
        for row, feed in zip(logits, feeds, strict=True):
            seen[id(feed)] = row.clone()
        return [0] * len(feeds)

    with use_slot_attention(model):
        machine = SlotBackend[Reading](0, model, 4, 32, keep)
        readings = [Reading(text, *plan) for text, plan in zip(texts, plans, strict=True)]
        for reading in readings:
            machine.add(reading)
        for step in range(7):
            for reading in readings:
                if reading.next_model is not None:
                    reading.begin(step)
            if machine.num_waiting:
                assert len(machine.step()) == sum(reading.next_model == 0 for reading in readings)
            for reading in readings:
                if not reading.steps:
                    reading.next_model = None  # its slot goes to the last one, keys and values with it
    for text, reading in zip(texts, readings, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(seen[id(reading.sequences[0])], expected, rtol=1e-4, atol=1e-4)


def test_prompts_that_are_too_much_for_one_pass_take_turns(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = make("gpt2"), prompts(8)
    together = solve(model, tokenizer, texts, num_slots=8)
    monkeypatch.setattr(slots, "MAX_STEP_TOKENS", 20)
    sizes: list[int] = []
    prepare_prefill = slots.prepare_prefill

    def counted(*arguments: Any) -> ForwardBatch:
        step = prepare_prefill(*arguments)
        sizes.append(step.input_ids.shape[1])
        return step

    monkeypatch.setattr(slots, "prepare_prefill", counted)
    assert solve(model, tokenizer, texts, num_slots=8) == together
    assert max(sizes) <= max(20, *map(len, texts)) < sum(map(len, texts))


def test_a_text_stops_where_the_context_does(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gpt2")
    assert len(solve(model, tokenizer, [[1] * 90], 1, ends=frozenset([-1]))[0]) == 6
    assert solve(model, tokenizer, [[1] * 96], 1, ends=frozenset([-1])) == {0: []}


def test_samples_belong_to_the_problem_not_to_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    model, texts = make("gpt2"), prompts(9)
    reference = solve(model, tokenizer, texts, num_slots=4, temperature=1.0)
    backwards = solve(model, tokenizer, texts, num_slots=2, temperature=1.0, order=list(reversed(range(9))))
    assert reference == backwards
    assert reference[0] != solve(model, tokenizer, texts, num_slots=4)[0]


def test_the_model_is_given_back_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gpt2").train()
    model.set_attn_implementation("eager")
    solve(model, tokenizer, prompts(2), num_slots=2, max_new_tokens=3)
    assert model.training and model.config._attn_implementation == "eager"
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()  # nothing of inference mode is left in it


def test_weights_that_are_not_numbers_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    for temperature in (0.0, 0.7):
        with pytest.raises(UserError, match="NaN"):
            solve(model, tokenizer, prompts(2), num_slots=2, temperature=temperature)
