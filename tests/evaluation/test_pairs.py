"""Two real models in turn: the same texts whoever shares the batch, every token read once, and one student in both parts
writes what it would have written alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.recorded_launches import decode_by_graphs
from trainer.evaluation.decoding import DECOMPOSER, PLANNER, SOLVER, STUDENT, Decoding
from trainer.evaluation.pipeline import Pipeline, RoleModel
from trainer.evaluation.predict import predictions
from trainer.models.load import load_model
from trainer.models.tokenizer import load_tokenizer
from trainer.runtime.shared_counter import ProcessCounter
from trainer.shards.methods import VIEWS, Role
from trainer.shards.read import Shards

CHAOS = {"temperature": 1.4, "seed": 4, "max_new_tokens": 80, "max_steps": 2}
INTERLEAVED = {DECOMPOSER: "decomposer_interleaved", SOLVER: "solver"}
AHEAD = {DECOMPOSER: "decomposer", SOLVER: "solver"}
PLANNED = {PLANNER: "planner_operators", DECOMPOSER: "decomposer_operators", SOLVER: "solver"}
WAYS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
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
def models(students: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """In double precision: what is sampled may otherwise hang on the last digit, which depends on the batch."""
    opened: dict[str, PreTrainedModel] = {}

    def model(method: str) -> PreTrainedModel:
        if method not in opened:
            opened[method] = load_model(students(method), "fp32", "sdpa").double()
        return opened[method]

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
    """id -> prediction."""
    actors = {part: RoleModel(models(method), method) for part, method in methods.items()}
    cast = Pipeline(actors, tokenizer, shards, Decoding(**{"batch_size": 8, **decoding}))
    made = list(predictions(cast, indices or range(len(shards)), ProcessCounter()))
    assert len({prediction["id"] for prediction in made}) == len(made)
    return {prediction["id"]: prediction for prediction in made}


@pytest.mark.parametrize("way", WAYS)
def test_they_write_what_they_know_by_heart_and_read_every_token_once(
    way: str,
    models: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
) -> None:
    methods, decoding = WAYS[way]
    num_read: dict[str, int] = dict.fromkeys(methods, 0)
    hooks = []
    for part, method in methods.items():

        def count(_: Any, __: Any, inputs: dict[str, torch.Tensor], part: str = part) -> None:
            num_read[part] += inputs["input_ids"].numel()

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
        written = shards.segment_tokens(index, Role.SUBQUESTION)
        if way == "interleaved":
            assert prediction["generated_by"][DECOMPOSER] == len(written) + 1  # the delimiter
        if "plan" in way:
            plan = shards.segment_tokens(index, Role.OPERATORS)
            assert prediction["plan"] == tokenizer.decode(plan).strip() != ""
            assert prediction["generated_by"].get(PLANNER, len(plan)) == len(plan)
    for part, method in methods.items():
        views = [shards.example(index, VIEWS[method])[0] for index in range(len(shards))]
        # The last token of each view (the end, the delimiter, the plan's line break) is written and not read again.
        assert num_read[part] == sum(len(tokens) - 1 for tokens in views)


@pytest.mark.parametrize("way", WAYS)
def test_many_problems_at_once_are_one_at_a_time(
    way: str,
    models: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
) -> None:
    """Greedy, and sampled so hot that solutions leave the form, end early, never end and are cut."""
    methods, decoding = WAYS[way]
    for changes in ({}, CHAOS):
        together, alone = (
            solve_all(models, tokenizer, shards, methods, batch_size=slots, **decoding, **changes)
            for slots in (7, 1)
        )
        assert together == alone
    ends = {prediction["stopped"] for prediction in together.values()}
    assert len(ends) > 1, "nothing went wrong, which is not what this test is for"
    for prediction in together.values():
        lines = prediction["text"].split("\n")
        assert prediction["generated_tokens"] <= CHAOS["max_new_tokens"]
        early = prediction["stopped"] == "ended_early"
        if prediction["finished"]:
            assert lines[-1].startswith("####") and (len(lines) % 2 == 1 or early)
        questions = [line for line in lines[::2] if line and not line.startswith("####")]
        if way == "gold questions":
            gold = [step["question"] for step in prediction["gold_steps"]]
            assert questions == gold[: len(questions)]
        else:
            assert len(questions) <= CHAOS["max_steps"] + 1


@pytest.mark.parametrize("way", ["interleaved", "planned"])
def test_they_write_the_same_where_a_pass_is_a_graph_or_reads(
    way: str,
    models: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: a model's slots stand still while another's turn lasts, and compute all the same."""
    methods, decoding = WAYS[way]
    expected = [
        solve_all(models, tokenizer, shards, methods, **decoding, **changes) for changes in ({}, CHAOS)
    ]
    for few_tokens in (1, 4, 100):  # all but the newest is read at once; a few one by one; everything
        replayed = decode_by_graphs(monkeypatch, few_tokens)
        found = [
            solve_all(models, tokenizer, shards, methods, **decoding, **changes) for changes in ({}, CHAOS)
        ]
        assert found == expected
        assert len(replayed) > 30
        monkeypatch.undo()


def test_one_socratic_student_in_both_parts_writes_what_it_writes_alone(
    models: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerBase, shards: Shards
) -> None:
    """Token for token; sampled solutions too, as long as the student keeps to the form."""
    both = {DECOMPOSER: "socratic", SOLVER: "socratic"}
    for temperature, least in ((0.0, 10), (0.7, 7)):
        changes = {"temperature": temperature, "max_new_tokens": 150}
        unified = solve_all(models, tokenizer, shards, {STUDENT: "socratic"}, mode="socratic", **changes)
        iterative = solve_all(models, tokenizer, shards, both, mode="iterative_interleaved", **changes)
        in_form = [i for i, made in iterative.items() if made["finished"] and not made["stopped"]]
        same = [
            i
            for i in in_form
            if (iterative[i]["text"], iterative[i]["generated_tokens"])
            == (unified[i]["text"], unified[i]["generated_tokens"])
        ]
        assert len(same) >= least
        for i in set(in_form) - set(same):  # alone it has gone on after its answer
            assert unified[i]["text"].startswith(iterative[i]["text"])
    assert len({made["text"] for made in unified.values()}) == len(shards)


def test_a_solver_that_reads_no_further_than_its_context_is_cut(
    models: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    shards: Shards,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = max(len(shards.example(index, VIEWS["solver"])[0]) for index in range(len(shards)))
    monkeypatch.setattr(models("solver").config, "max_position_embeddings", longest - 1)
    cut = solve_all(models, tokenizer, shards, INTERLEAVED, mode="iterative_interleaved")
    assert {made["stopped"] for made in cut.values()} == {"", "context"}
    assert all(made["finished"] == (made["stopped"] == "") for made in cut.values())
