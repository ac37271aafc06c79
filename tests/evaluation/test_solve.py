"""The calculator in the loop, and where a solution ends."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from trainer.errors import UserError
from trainer.evaluation.decoding import Decoding, resolve_mode
from trainer.evaluation.predict import predictions
from trainer.evaluation.solve import Solution, Writer, tokens_ending_in_equals
from trainer.evaluation.tickets import LocalCounter
from trainer.models.tokenizer import load_tokenizer
from trainer.shards.methods import METHODS, Role
from trainer.shards.read import Shards


@pytest.fixture(scope="module")
def tokenizer(export: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(export)


@pytest.fixture(scope="module")
def model(export: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(export, dtype="float32")


def write(writer: Writer, tokenizer: PreTrainedTokenizerBase, text: str, prompt_length: int = 3) -> Solution:
    """Let a "model" write `text`, token by token, as far as it is let."""
    solution = Solution(0, [1] * prompt_length, 0, writer)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not solution.after(token):
            break
    return solution


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("Leo has 48/2 = <<48/2=", "Leo has 48/2 = <<48/2=24>>"),
        ("<<(1+2)*3.5=", "<<(1+2)*3.5=10.5>>"),
        (
            "<<3*4=12>> and <<12+1=",
            "<<3*4=12>>12>> and <<12+1=13>>",
        ),  # the calculator was first, whoever goes on
        ("<<1/0=", "<<1/0="),
        ("<<eggs*2=", "<<eggs*2="),
        ("so 48/2 = ", "so 48/2 = "),
    ],
)
def test_the_calculator_takes_the_pen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, written: str, becomes: str
) -> None:
    writer = Writer(tokenizer, model, 256, 100, use_calculator=True)
    solution = write(writer, tokenizer, written)
    assert writer.text(solution.tokens) == becomes
    assert solution.tokens[-len(solution.pending) :] == solution.pending
    without = Writer(tokenizer, model, 256, 100, use_calculator=False)
    assert without.text(write(without, tokenizer, written).tokens) == written


def test_only_tokens_that_end_in_equals_are_looked_at(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = {tokenizer.decode([token]) for token in tokens_ending_in_equals(tokenizer)}
    assert {"=", " ="} <= texts and all(text.endswith("=") for text in texts)


def test_what_is_forced_has_the_tokens_it_had_in_training(
    shards: Shards, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The student knows the stories by heart, all but the sums: it writes them back token by token."""
    decoding = Decoding("socratic", batch_size=4)
    found = {
        prediction["id"]: prediction
        for prediction in predictions(model, tokenizer, shards, range(len(shards)), decoding, LocalCounter())
    }
    for index in range(len(shards)):
        tokens, _ = shards.example(index, METHODS["socratic"])
        expected = tokens[len(shards.prompt(index)) :].tolist()
        assert len(shards.segment_tokens(index, Role.CALCULATOR)) > 0
        prediction = found[shards.problem(index).id]
        assert prediction["text"] == tokenizer.decode(expected[:-1])
        assert prediction["generated_tokens"] == len(expected)
        assert prediction["correct_strict"] and prediction["finished"]


def test_length_limits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert (
        len(write(Writer(tokenizer, model, 256, 5, True), tokenizer, "one two three four five six").tokens)
        == 5
    )
    assert len(write(Writer(tokenizer, model, 10, 50, True), tokenizer, "a b c d e f g h i j k").tokens) == 7
    cut = write(
        Writer(tokenizer, model, 256, 8, True), tokenizer, "<<99*99="
    )  # 8 tokens with `<<`, `99` in two
    assert len(cut.tokens) <= 8 and not cut.finished
    ended = write(Writer(tokenizer, model, 256, 50, True), tokenizer, "yes<|endoftext|>and more")
    assert ended.finished and Writer(tokenizer, model, 256, 50, True).text(ended.tokens) == "yes"


def test_an_imposed_answer_begins_with_the_delimiter(
    shards: Shards, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    decoding = Decoding("answer_only", impose_answer=True, max_new_tokens=4)
    (prediction,) = predictions(model, tokenizer, shards, [3], decoding, LocalCounter())
    assert prediction["text"].startswith("####") and prediction["generated_tokens"] <= 5


def test_a_prompt_that_fills_the_context_is_a_problem_unsolved(
    shards: Shards,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = max(range(len(shards)), key=lambda index: len(shards.prompt(index)))
    monkeypatch.setattr(model.config, "max_position_embeddings", len(shards.prompt(longest)))
    made = list(
        predictions(model, tokenizer, shards, range(len(shards)), Decoding("socratic"), LocalCounter())
    )
    assert len(made) == len(shards)
    (unread,) = [p for p in made if p["id"] == shards.problem(longest).id]
    assert (unread["text"], unread["finished"], unread["correct_strict"]) == ("", False, False)


def test_modes() -> None:
    assert resolve_mode("auto", "cot") == ("cot", False)
    assert resolve_mode("cot", "cot") == ("cot", False)
    assert resolve_mode("answer_only", "answer_only") == ("answer_only", False)
    assert resolve_mode("answer_only", "socratic") == ("answer_only", True)
    assert resolve_mode("cot", None) == ("cot", False)
    for mode, method in (
        ("auto", None),
        ("cot", "socratic"),
        ("auto", "decomposer"),
        ("answer_only", "solver"),
    ):
        with pytest.raises(UserError):
            resolve_mode(mode, method)
