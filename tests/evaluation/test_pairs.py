"""Pairs of real models: texts do not depend on the batch, every token is processed once, and one model in both roles
generates the same text as alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.recorded_launches import decode_by_graphs
from trainer.evaluation.decoding import DECOMPOSER, PLANNER, SOLVER, STUDENT, Decoding
from trainer.evaluation.pipeline import Pipeline, RoleModel, predictions
from trainer.models.load import load_model
from trainer.models.tokenizer import load_tokenizer
from trainer.runtime.shared_counter import ProcessCounter
from trainer.shards.methods import VIEWS, SegmentRole
from trainer.shards.read import Shards

HOT = {"temperature": 1.4, "seed": 4, "max_new_tokens": 80, "max_steps": 2}
INTERLEAVED = {DECOMPOSER: "decomposer_interleaved", SOLVER: "solver"}
AHEAD = {DECOMPOSER: "decomposer", SOLVER: "solver"}
PLANNED = {PLANNER: "planner_operators", DECOMPOSER: "decomposer_operators", SOLVER: "solver"}
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "interleaved": (INTERLEAVED, {"mode": "iterative_interleaved"}),
    "ahead": (AHEAD, {"mode": "iterative_ahead"}),
    "gold questions": ({SOLVER: "solver"}, {"mode": "gold_subquestions"}),
    "planned": (PLANNED, {"mode": "iterative_ahead", "guidance": "operators", "guidance_from": "planner"}),
    "gold plan": (
        {DECOMPOSER: "decomposer_operators", SOLVER: "solver"},
        {"mode": "iterative_ahead", "guidance": "operators", "guidance_from": "gold"},
    ),
}


@pytest.fixture(scope="module")
def models(export_for: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """Models in double precision: otherwise samples may depend on the last digit, which depends on the batch."""
    loaded: dict[str, PreTrainedModel] = {}

    def model(method: str) -> PreTrainedModel:
        if method not in loaded:
            loaded[method] = load_model(export_for(method), "fp32", "sdpa").double()
        return loaded[method]

    return model


@pytest.fixture(scope="module")
def tokenizer(shards: Shards) -> PreTrainedTokenizerBase:
    return load_tokenizer(shards.tokenizer_path)


def solve_all(
    models: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
    methods: dict[str, str],
    indices: list[int] | None = None,
    **decoding: Any,
) -> dict[str, dict[str, Any]]:
    """Return id -> prediction."""
    role_models = {role: RoleModel(models(method), method) for role, method in methods.items()}
    pipeline = Pipeline(role_models, tokenizer, shards, Decoding(**{"batch_size": 8, **decoding}))
    found = list(predictions(pipeline, indices or range(len(shards)), ProcessCounter()))
    assert len({prediction["id"] for prediction in found}) == len(found)
    return {prediction["id"]: prediction for prediction in found}


@pytest.mark.parametrize("case", CASES)
def test_texts_are_the_memorised_ones_and_every_token_is_processed_once(
    case: str,
    models: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
) -> None:
    methods, decoding = CASES[case]
    num_read: dict[str, int] = dict.fromkeys(methods, 0)
    hooks = []
    for role, method in methods.items():

        def count(_: Any, __: Any, inputs: dict[str, torch.Tensor], role: str = role) -> None:
            num_read[role] += inputs["input_ids"].numel()

        hooks.append(models(method).register_forward_pre_hook(count, with_kwargs=True))
    found = solve_all(models, tokenizer, shards, methods, **decoding)
    for hook in hooks:
        hook.remove()
    for index in range(len(shards)):
        problem = shards.problem(index)
        lines = [line for step in problem.steps for line in (step.question, step.solution)]
        prediction = found[problem.id]
        assert prediction["text"] == "\n".join([*lines, f"#### {problem.answer}"])
        assert (prediction["finished"], prediction["stopped"]) == (True, "")
        assert sum(prediction["generated_by"].values()) == prediction["generated_tokens"]
        assert list(prediction["generated_by"]) == list(methods)
        written = shards.segment_tokens(index, SegmentRole.SUBQUESTION)
        if case == "interleaved":
            assert prediction["generated_by"][DECOMPOSER] == len(written) + 1  # the delimiter
        if "plan" in case:
            plan = shards.segment_tokens(index, SegmentRole.OPERATORS)
            assert prediction["plan"] == tokenizer.decode(plan).strip() != ""
            assert prediction["generated_by"].get(PLANNER, len(plan)) == len(plan)
    for role, method in methods.items():
        views = [shards.example(index, VIEWS[method])[0] for index in range(len(shards))]
        # The last token of each view (the end, the delimiter, the plan's line break) is generated and not processed.
        assert num_read[role] == sum(len(tokens) - 1 for tokens in views)


@pytest.mark.parametrize("case", CASES)
def test_texts_do_not_depend_on_the_batch(
    case: str,
    models: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
) -> None:
    """Greedy, and sampled at a temperature at which texts lose the format, end early or reach the limits."""
    methods, decoding = CASES[case]
    for changes in ({}, HOT):
        together, alone = (
            solve_all(models, tokenizer, shards, methods, batch_size=slots, **decoding, **changes)
            for slots in (7, 1)
        )
        assert together == alone
    ends = {prediction["stopped"] for prediction in together.values()}
    assert len(ends) > 1, "all rollouts ended normally, so the test does not cover the other ends"
    for prediction in together.values():
        lines = prediction["text"].split("\n")
        assert prediction["generated_tokens"] <= HOT["max_new_tokens"]
        early = prediction["stopped"] == "ended_early"
        if prediction["finished"]:
            assert lines[-1].startswith("####") and (len(lines) % 2 == 1 or early)
        questions = [line for line in lines[::2] if line and not line.startswith("####")]
        if case == "gold questions":
            gold = [step["question"] for step in prediction["gold_steps"]]
            assert questions == gold[: len(questions)]
        else:
            assert len(questions) <= HOT["max_steps"] + 1


@pytest.mark.parametrize("case", ["interleaved", "planned"])
def test_texts_are_the_same_with_graph_steps(
    case: str,
    models: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: a model's slots wait while the other model generates."""
    methods, decoding = CASES[case]
    expected = [solve_all(models, tokenizer, shards, methods, **decoding, **changes) for changes in ({}, HOT)]
    for few_tokens in (1, 4, 100):  # token by token: one, a few, all pending tokens
        replayed = decode_by_graphs(monkeypatch, few_tokens)
        found = [
            solve_all(models, tokenizer, shards, methods, **decoding, **changes) for changes in ({}, HOT)
        ]
        assert found == expected
        assert len(replayed) > 30
        monkeypatch.undo()


def test_one_socratic_model_in_both_roles_gives_the_same_text_as_alone(
    models: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, shards: Shards
) -> None:
    """Token for token; sampled texts too, if they keep the format."""
    both = {DECOMPOSER: "socratic", SOLVER: "socratic"}
    for temperature, least in ((0.0, 10), (0.7, 7)):
        changes = {"temperature": temperature, "max_new_tokens": 150}
        unified = solve_all(models, tokenizer, shards, {STUDENT: "socratic"}, mode="socratic", **changes)
        iterative = solve_all(models, tokenizer, shards, both, mode="iterative_interleaved", **changes)
        in_form = [
            i for i, prediction in iterative.items() if prediction["finished"] and not prediction["stopped"]
        ]
        same = [
            i
            for i in in_form
            if (iterative[i]["text"], iterative[i]["generated_tokens"])
            == (unified[i]["text"], unified[i]["generated_tokens"])
        ]
        assert len(same) >= least
        for i in set(in_form) - set(same):  # alone it generates more after the answer
            assert unified[i]["text"].startswith(iterative[i]["text"])
    assert len({prediction["text"] for prediction in unified.values()}) == len(shards)


def test_context_length_of_the_solver_cuts_the_text(
    models: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = max(len(shards.example(index, VIEWS["solver"])[0]) for index in range(len(shards)))
    monkeypatch.setattr(models("solver").config, "max_position_embeddings", longest - 1)
    cut = solve_all(models, tokenizer, shards, INTERLEAVED, mode="iterative_interleaved")
    assert {prediction["stopped"] for prediction in cut.values()} == {"", "context"}
    assert all(prediction["finished"] == (prediction["stopped"] == "") for prediction in cut.values())
