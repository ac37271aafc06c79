"""Decoding in slots is decoding: token for token what transformers' own generate gives, whatever shares the batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

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
from trainer.evaluation.engine import Engine
from trainer.evaluation.generate import chooser, generate
from trainer.evaluation.sampling import noise_key
from trainer.evaluation.solve import Solution, Writer
from trainer.models.slots import slot_attention_of
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
) -> dict[int, Solution]:
    writer = Writer(tokenizer, model, 96, max_new_tokens, use_calculator=False)
    writer.end_tokens = ends or writer.end_tokens
    waiting: Iterator[int] = iter(order or range(len(texts)))

    def draw() -> Solution | None:
        index = next(waiting, None)
        return (
            None if index is None else Solution(index, texts[index], noise_key(5, f"problem {index}"), writer)
        )

    capacity = min(max(map(len, texts)) + max_new_tokens, 96)
    ended = list(generate(model, draw, num_slots, capacity, chooser(temperature, 0.9)))
    solutions = {solution.index: solution for solution in ended}
    assert len(ended) == len(solutions) == len(texts)
    return solutions


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
        solutions = solve(model, tokenizer, texts, num_slots, 25, ends=ends)
        assert [solutions[index].tokens for index in range(len(texts))] == expected
        assert [solutions[i].finished for i in range(len(texts))] == [t[-1] in ends for t in expected]
    assert model.config._attn_implementation == "sdpa"


def test_tokens_read_in_pieces_are_tokens_read_one_by_one() -> None:
    """Forced tokens go into a slot together, beside slots that read one token or a whole prompt."""

    class Feed:
        def __init__(self, pieces: list[list[int]]) -> None:
            self.pieces, self.pending, self.length = pieces[1:], pieces[0], 0

    model = make("qwen2, grouped queries")
    texts = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14] * 9, [20, 21, 22, 30, 31, 32, 33, 34, 35]]
    cuts = [[2, 3, 4], [9], [1, 1, 7]]
    seen: dict[int, torch.Tensor] = {}

    def keep(logits: torch.Tensor, feeds: list[Feed]) -> list[int]:
        for row, feed in zip(logits, feeds, strict=True):
            if not feed.pieces:
                seen[id(feed)] = row.clone()
        return [0] * len(feeds)

    with slot_attention_of(model):
        engine = Engine(model, 3, 32, keep)
        feeds = []
        for text, lengths in zip(texts, cuts, strict=True):
            ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
            feeds.append(Feed([text[a:b] for a, b in pairwise(ends)]))
            engine.add(feeds[-1])
        while engine.live:
            engine.step()
            for slot in reversed(range(len(engine.live))):
                if engine.live[slot].pieces:
                    engine.live[slot].pending = engine.live[slot].pieces.pop(0)
                else:
                    engine.remove(slot)  # the last slot moves here, keys and values with it
    for text, feed in zip(texts, feeds, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([text])).logits[0, -1]
        torch.testing.assert_close(seen[id(feed)], expected, rtol=1e-4, atol=1e-4)


def test_a_text_stops_where_the_context_does(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gpt2")
    solution = solve(model, tokenizer, [[1] * 90], 1, ends=frozenset([-1]))[0]
    assert (len(solution.tokens), solution.finished) == (6, False)


def test_samples_belong_to_the_problem_not_to_the_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    model, texts = make("gpt2"), prompts(9)
    reference = solve(model, tokenizer, texts, num_slots=4, temperature=1.0)
    backwards = solve(model, tokenizer, texts, num_slots=2, temperature=1.0, order=list(reversed(range(9))))
    assert [reference[i].tokens for i in range(9)] == [backwards[i].tokens for i in range(9)]
    assert reference[0].tokens != solve(model, tokenizer, texts, num_slots=4)[0].tokens


def test_the_model_is_given_back_as_it_was(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gpt2").train()
    model.set_attn_implementation("eager")
    solve(model, tokenizer, prompts(2), num_slots=2, max_new_tokens=3)
    assert model.training and model.config._attn_implementation == "eager"
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()  # nothing of inference mode is left in it


def test_a_sliding_window_shorter_than_the_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    model = MistralForCausalLM(MistralConfig(**ROTARY, num_key_value_heads=2, sliding_window=16))
    with pytest.raises(UserError, match="sliding window of 16 tokens"):
        solve(model, tokenizer, prompts(2), num_slots=2)


def test_weights_that_are_not_numbers_are_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    for temperature in (0.0, 0.7):
        with pytest.raises(UserError, match="NaN"):
            solve(model, tokenizer, prompts(2), num_slots=2, temperature=temperature)
