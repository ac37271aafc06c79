"""`completions` gives the texts of transformers' `generate`, cut at stop strings."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.evaluation.test_generate import make
from trainer.evaluation.complete import completions
from trainer.models.tokenizer import load_tokenizer
from trainer.shards.read import Shards


@pytest.fixture(scope="module")
def tokenizer(shards: Shards) -> PreTrainedTokenizerBase:
    return load_tokenizer(shards.tokenizer_path)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make("llama")


def prompts(count: int) -> list[list[int]]:
    numbers = random.Random(1)
    return [[numbers.randrange(1, 1024) for _ in range(numbers.randint(1, 30))] for _ in range(count)]


def test_greedy_is_what_transformers_generates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = prompts(6)
    found = {
        index: rest for index, *rest in completions(model, tokenizer, texts, max_new_tokens=12, batch_size=4)
    }
    assert sorted(found) == list(range(6))
    for index, text in enumerate(texts):
        output = model.generate(
            torch.tensor([text]), attention_mask=torch.ones(1, len(text)), do_sample=False, max_new_tokens=12,
            eos_token_id=0, pad_token_id=0,
        )[0, len(text) :].tolist()  # fmt: skip
        finished = output[-1] == 0
        written = tokenizer.decode(output[:-1] if finished else output)
        assert found[index] == [written, len(output), finished]


def test_text_ends_before_the_first_stop_string(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    (prompt,) = prompts(1)
    ((_, whole, num_whole, _),) = completions(model, tokenizer, [prompt], max_new_tokens=30)
    tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode([token]) for token in tokens]
    across = pieces[4][-1] + pieces[5][:1]  # begins in one token and ends in the next
    first = whole.index(across)
    ((_, text, num_tokens, finished),) = completions(
        model, tokenizer, [prompt], max_new_tokens=30, stop=("never written", across)
    )
    assert (text, finished) == (whole[:first], True) and num_tokens < num_whole


def test_samples_depend_on_prompt_and_seed_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = prompts(3)
    options = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 0.9}
    many = sorted(completions(model, tokenizer, texts * 2, seeds=[1, 2, 3, 4, 5, 6], batch_size=5, **options))
    alone = [
        next(completions(model, tokenizer, [texts[i % 3]], seeds=[i + 1], **options))[1:] for i in range(6)
    ]
    assert [made[1:] for made in many] == alone
    assert many[0][1] != many[3][1]
    assert list(completions(model, tokenizer, [], max_new_tokens=8)) == []
    ((_, text, num_tokens, finished),) = completions(model, tokenizer, [[1] * 96], max_new_tokens=8)
    assert (text, num_tokens, finished) == ("", 0, False)  # the prompt fills the context
