"""Solving programs with scripted models: the end of rollouts, and the tokens that each model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from trainer.evaluation import programs
from trainer.evaluation.decoding import (
    DECOMPOSER,
    PLANNER,
    SOLVER,
    STUDENT,
    Decoding,
)
from trainer.evaluation.pipeline import Pipeline, RoleModel, predictions
from trainer.evaluation.rollout import Program, Rollout, RolloutContext, RolloutModel
from trainer.evaluation.stop_tokens import StopTokens
from trainer.models.tokenizer import load_tokenizer
from trainer.runtime.shared_counter import ProcessCounter
from trainer.shards.methods import VIEWS, SegmentRole
from trainer.shards.read import Shards

END = 0
PROMPT = "P\n"


@pytest.fixture(scope="module")
def tokenizer(shards: Shards) -> PreTrainedTokenizerBase:
    return load_tokenizer(shards.tokenizer_path)


@pytest.fixture(scope="module")
def model(export: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(export, dtype="float32")


class ScriptedRollout:
    """A finished rollout whose models generate given texts; `|` is an end token.

    `methods`: role -> training method whose view its model reads. Roles named together ("decomposer solver") share a model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        program: Callable[[Rollout], Program[None]],
        methods: dict[str, str],
        texts: dict[str, str],
        max_new_tokens: int = 200,
        contexts: Sequence[int] = (1000, 1000, 1000),
        calculator: bool = True,
    ) -> None:
        stop_tokens = StopTokens(tokenizer)
        specs = [
            RolloutModel(VIEWS[name].inputs, length, frozenset([END]))
            for name, length in zip(methods.values(), contexts, strict=False)
        ]
        numbers = {role: number for number, roles in enumerate(methods) for role in roles.split()}
        context = RolloutContext(stop_tokens, specs, numbers, max_new_tokens, calculator)
        scripts = {
            list(methods).index(roles): iter(
                [t for piece in text.split("|") for t in (*stop_tokens.tokens(piece), END)][:-1]
            )
            for roles, text in texts.items()
        }
        self.read: list[list[int]] = [[] for _ in specs]
        self.rollout = Rollout(0, stop_tokens.tokens(PROMPT), context, program, [0] * len(specs))
        while (number := self.rollout.next_model) is not None:
            sequence = self.rollout.sequences[number]
            assert sequence.pending, "a model must process a token before it generates one"
            self.read[number] += sequence.pending
            sequence.length += len(sequence.pending)
            sequence.pending = []
            self.rollout.on_token(next(scripts[number]))
        self.text = self.rollout.text
        self.stopped = self.rollout.stop_reason
        self.finished = self.rollout.finished
        self.generated = dict(self.rollout.generated)
        self.unused = {number: tokenizer.decode(list(rest)) for number, rest in scripts.items()}
        self._tokenizer = tokenizer

    def read_text(self, number: int) -> str:
        text = self._tokenizer.decode(self.read[number])
        assert text.startswith(PROMPT)
        return text.removeprefix(PROMPT)


def solve_alone(
    tokenizer: PreTrainedTokenizerBase, text: str, opening: str = "", **limits: int
) -> ScriptedRollout:
    program = partial(programs.unified, opening=opening)
    return ScriptedRollout(tokenizer, program, {STUDENT: "socratic"}, {STUDENT: text}, **limits)  # type: ignore[arg-type]


INTERLEAVED = partial(programs.interleaved, max_steps=3, guidance=programs.without_guidance)
AHEAD = partial(programs.ahead, max_steps=3, guidance=programs.without_guidance)
TWO = {DECOMPOSER: "decomposer_interleaved", SOLVER: "solver"}
TWO_AHEAD = {DECOMPOSER: "decomposer", SOLVER: "solver"}
ONE = {f"{DECOMPOSER} {SOLVER}": "socratic"}


@pytest.mark.parametrize(
    ("written", "becomes"),
    [
        ("Leo has 48/2 = <<48/2=", "Leo has 48/2 = <<48/2=24>>"),
        ("<<(1+2)*3.5=", "<<(1+2)*3.5=10.5>>"),
        # the result is inserted also if the model generates it
        ("<<3*4=12>> and <<12+1=", "<<3*4=12>>12>> and <<12+1=13>>"),
        ("<<1/0=", "<<1/0="),
        ("<<eggs*2=", "<<eggs*2="),
        ("so 48/2 = ", "so 48/2 = "),
    ],
)
def test_calculator_results_are_inserted(
    tokenizer: PreTrainedTokenizerBase, written: str, becomes: str
) -> None:
    scripted = solve_alone(tokenizer, f"{written}|")
    assert (scripted.text, scripted.finished) == (becomes, True)
    assert scripted.rollout.calculator_results == becomes.count(">>") - written.count(">>")
    assert scripted.read_text(0) == becomes  # the result is read and counted like generated tokens
    assert scripted.generated[STUDENT] == len(scripted.read[0]) - len(tokenizer(PROMPT)["input_ids"]) + 1
    assert solve_alone(tokenizer, f"{written}|", calculator=False).text == written


def test_token_sets(tokenizer: PreTrainedTokenizerBase) -> None:
    stop_tokens = StopTokens(tokenizer)
    for tokens, members, holds in (
        (stop_tokens.equals, ("=", " ="), lambda text: text.endswith("=")),
        (stop_tokens.newlines, ("\n",), lambda text: "\n" in text),
        (stop_tokens.hashes, ("####", "#"), lambda text: "#" in text),
    ):
        texts = {tokenizer.decode([token]) for token in tokens}
        assert set(members) <= texts and all(map(holds, texts))


def test_length_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    num_prompt = len(tokenizer(PROMPT)["input_ids"])
    five = solve_alone(tokenizer, "a b c d e f g", max_new_tokens=5)
    assert (five.generated, five.stopped, five.finished) == ({STUDENT: 5}, "max_new_tokens", False)
    narrow = solve_alone(tokenizer, "a b c d e f g h", contexts=[num_prompt + 7])  # type: ignore[arg-type]
    assert (narrow.generated, narrow.stopped) == ({STUDENT: 7}, "context")
    num_written = len(tokenizer("<<99*99=")["input_ids"])
    limit = num_written + 2  # the first two tokens of the calculator: 9, 80
    cut = solve_alone(tokenizer, "<<99*99=", max_new_tokens=limit)
    assert cut.generated == {STUDENT: limit} and cut.text == "<<99*99=980" and cut.stopped == "max_new_tokens"
    ended = solve_alone(tokenizer, "yes|and more")
    assert ended.finished and ended.text == "yes" and ended.unused == {0: "and more"}
    with_opening = solve_alone(tokenizer, " 7|", opening="####")
    assert (with_opening.text, with_opening.generated) == (
        "#### 7",
        {STUDENT: len(tokenizer(" 7")["input_ids"]) + 1},
    )


ASKED = "How many?\nAnd then?\n####"
SOLVED = "2 = <<1+1=2>>2\n3 = <<2+1=3>>3\n 3|"
TEXT = "How many?\n2 = <<1+1=2>>2\nAnd then?\n3 = <<2+1=3>>3\n#### 3"


@pytest.mark.parametrize(
    ("method", "methods", "decomposer_reads"),
    [
        (INTERLEAVED, TWO, "How many?\n2 = <<1+1=2>>2\nAnd then?\n3 = <<2+1=3>>3\n"),
        (AHEAD, TWO_AHEAD, "How many?\nAnd then?\n"),
    ],
)
def test_two_models_read_their_views_token_for_token(
    tokenizer: PreTrainedTokenizerBase,
    method: programs.SolvingProgram,
    methods: dict[str, str],
    decomposer_reads: str,
) -> None:
    """Every model reads the tokens of its training view once."""
    # The calculator inserts the results, so the scripted solver leaves them out.
    solver_text = SOLVED.replace("=2>>", "=").replace("=3>>", "=")
    scripted = ScriptedRollout(tokenizer, method, methods, {DECOMPOSER: ASKED, SOLVER: solver_text})
    assert (scripted.text, scripted.finished, scripted.stopped) == (TEXT, True, "")
    assert scripted.read_text(0).startswith(decomposer_reads)
    assert "####" not in scripted.read_text(0) or scripted.read_text(0) == decomposer_reads + "####"
    assert scripted.read_text(1) == TEXT
    stop_tokens = StopTokens(tokenizer)
    pieces = [
        "P\n",
        "How many?\n",
        "2 = <<1+1=",
        "2>>",
        "2\n",
        "And then?\n",
        "3 = <<2+1=",
        "3>>",
        "3\n",
        "####",
        " 3",
    ]
    assert scripted.read[1] == [token for piece in pieces for token in stop_tokens.tokens(piece)]
    assert scripted.rollout.calculator_results == 2
    assert scripted.generated[DECOMPOSER] == len(stop_tokens.tokens(ASKED))
    assert scripted.rollout.sequences[0].is_done and scripted.unused == {0: "", 1: ""}


def test_one_model_in_both_roles_reads_one_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = {"decomposer solver": "How many?\n2 eggs\nAnd then?\n3 eggs\n#### 3|"}
    scripted = ScriptedRollout(tokenizer, INTERLEAVED, ONE, texts)
    unified = solve_alone(tokenizer, texts["decomposer solver"])
    assert scripted.text == unified.text == "How many?\n2 eggs\nAnd then?\n3 eggs\n#### 3"
    assert scripted.read == unified.read and scripted.rollout.generated.total() == unified.generated[STUDENT]
    assert scripted.generated == {
        DECOMPOSER: len(tokenizer("How many?\nAnd then?\n####")["input_ids"]),
        SOLVER: len(tokenizer("2 eggs\n3 eggs\n 3")["input_ids"]) + 1,
    }


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    ("asked", "solved", "text", "stopped"),
    [
        ("####", " 7|", "#### 7", ""),  # no question at all
        ("A?\n|", "1\n 7|", "A?\n1\n#### 7", "ended_early"),  # the end of the text instead of the delimiter
        ("A?\n\n", "1\n 7|", "A?\n1\n#### 7", "ended_early"),  # an empty question
        ("A?\n  \n", "1\n 7|", "A?\n1\n#### 7", "ended_early"),
        ("A?|####", "1\n 7|", "A?\n1\n#### 7", "ended_early"),  # the end of the text within a question
        ("A?\n" * 9, "1\n1\n1\n 7|", "A?\n1\n" * 3 + "#### 7", "max_steps"),  # the same question for ever
        ("A?\nA?\nA?\n####", "1\n1\n1\n 7|", "A?\n1\n" * 3 + "#### 7", ""),  # as many as allowed
        (
            "A?\nB?\n####",
            "1|2\n 7|",
            "A?\n1\nB?\n2\n#### 7",
            "ended_early",
        ),  # the end of the text within a solution
        ("A?\nB?\n####", "\n2\n 7|", "A?\n\nB?\n2\n#### 7", ""),  # an empty solution counts
        ("A?\nB?\n####", "#### 7|", "A?\n#### 7", "ended_early"),  # it answers before `####`
        ("####", " 7\nand on and on", "#### 7", ""),  # the answer's line is the last
    ],
)
def test_every_rollout_ends(
    tokenizer: PreTrainedTokenizerBase, interleaved: bool, asked: str, solved: str, text: str, stopped: str
) -> None:
    method, methods = (INTERLEAVED, TWO) if interleaved else (AHEAD, TWO_AHEAD)
    scripted = ScriptedRollout(tokenizer, method, methods, {DECOMPOSER: asked, SOLVER: solved})
    assert (scripted.text, scripted.stopped, scripted.finished) == (text, stopped, True)
    assert scripted.read_text(1) == text


@pytest.mark.parametrize(
    ("max_new_tokens", "contexts", "stopped"), [(9, (99, 99), "max_new_tokens"), (99, (99, 9), "context"), (99, (9, 99), "context")]
)  # fmt: skip
def test_length_limits_keep_the_text_so_far(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, contexts: tuple[int, int], stopped: str
) -> None:
    for method, methods in ((INTERLEAVED, TWO), (AHEAD, TWO_AHEAD)):
        scripted = ScriptedRollout(
            tokenizer,
            method,
            methods,
            {DECOMPOSER: "A?\n" * 40, SOLVER: "1\n" * 40},
            max_new_tokens,
            contexts,
        )
        assert (scripted.finished, scripted.stopped) == (False, stopped)
        lines = set(scripted.text.split("\n"))
        assert "A?\n1\nA?\n1".startswith(scripted.text) or lines <= {"A?", "1", "A", ""}
        assert scripted.rollout.generated.total() <= max_new_tokens
        for number, context in enumerate(contexts):
            assert len(scripted.read[number]) < context


def test_gold_questions_are_read_and_not_generated(tokenizer: PreTrainedTokenizerBase) -> None:
    questions = [StopTokens(tokenizer).tokens(text) for text in ("How many?\n", "And then?\n")]
    solver_text = SOLVED.replace("=2>>", "=").replace("=3>>", "=")
    scripted = ScriptedRollout(
        tokenizer,
        partial(programs.gold_subquestions, questions=questions),
        {SOLVER: "solver"},
        {SOLVER: solver_text},
    )
    assert (scripted.text, scripted.stopped, scripted.read_text(0)) == (TEXT, "", TEXT)
    assert scripted.generated == {SOLVER: len(tokenizer(SOLVED.removesuffix("|"))["input_ids"]) + 1}
    early = ScriptedRollout(
        tokenizer,
        partial(programs.gold_subquestions, questions=questions),
        {SOLVER: "solver"},
        {SOLVER: "#### 3|"},
    )
    assert (early.text, early.stopped) == ("How many?\n#### 3", "ended_early")
    cut = ScriptedRollout(
        tokenizer,
        partial(programs.gold_subquestions, questions=questions),
        {SOLVER: "solver"},
        {SOLVER: "1\n2"},
        1,
    )
    assert cut.text == "How many?\n1\nAnd then?" and cut.stopped == "max_new_tokens"


def test_plan_is_read_by_the_decomposer_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    planned = partial(programs.planner_guidance, segment_role=SegmentRole.OPERATORS)
    tokens = StopTokens(tokenizer).tokens("operators: + *\n")
    given = partial(programs.gold_guidance, segment_role=SegmentRole.OPERATORS, tokens=tokens)
    methods = {DECOMPOSER: "decomposer_interleaved_operators", SOLVER: "solver", PLANNER: "planner_operators"}
    texts = {DECOMPOSER: "A?\n####", SOLVER: "1\n 7|", PLANNER: "operators: + *\nnever generated"}
    for guidance in (planned, given):
        scripted = ScriptedRollout(
            tokenizer, partial(programs.interleaved, max_steps=3, guidance=guidance), methods, texts
        )
        assert (scripted.text, scripted.rollout.guidance_text) == ("A?\n1\n#### 7", "operators: + *")
        assert scripted.read_text(0).startswith("operators: + *\nA?\n1\n")
        assert scripted.read_text(1) == scripted.text and scripted.rollout.sequences[2].is_done == (
            guidance is planned
        )
        assert (scripted.unused[2] == "never generated") == (guidance is planned)
    texts[PLANNER] = "operators: +|"
    scripted = ScriptedRollout(
        tokenizer, partial(programs.ahead, max_steps=3, guidance=planned), methods, texts
    )
    assert scripted.read_text(0).startswith("operators: +\nA?\n") and scripted.stopped == "ended_early"


def test_forced_tokens_are_those_of_training(
    shards: Shards, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The model has memorised the stories without calculator results, and generates them token by token."""
    decoding = Decoding("socratic", batch_size=4)
    pipeline = Pipeline({STUDENT: RoleModel(model, "socratic")}, tokenizer, shards, decoding)
    found = {
        prediction["id"]: prediction
        for prediction in predictions(pipeline, range(len(shards)), ProcessCounter())
    }
    for index in range(len(shards)):
        tokens, _ = shards.example(index, VIEWS["socratic"])
        expected = tokens[len(shards.prompt(index)) :].tolist()
        assert len(shards.segment_tokens(index, SegmentRole.CALCULATOR)) > 0
        prediction = found[shards.problem(index).id]
        assert prediction["text"] == tokenizer.decode(expected[:-1])
        assert prediction["generated_tokens"] == len(expected)
        assert prediction["correct_strict"] and prediction["finished"]
        results = [role for role, _ in shards.segments(index) if role == SegmentRole.CALCULATOR]
        assert prediction["calculator_results_given"] == len(results)


def test_imposed_answer_starts_with_the_delimiter(
    shards: Shards, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    decoding = Decoding("answer_only", impose_answer=True, max_new_tokens=4)
    pipeline = Pipeline({STUDENT: RoleModel(model, "socratic")}, tokenizer, shards, decoding)
    (prediction,) = predictions(pipeline, [3], ProcessCounter())
    assert prediction["text"].startswith("####") and prediction["generated_tokens"] <= 4


def test_prompt_that_fills_the_context_gives_an_empty_text(
    shards: Shards,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = max(range(len(shards)), key=lambda index: len(shards.prompt(index)))
    monkeypatch.setattr(model.config, "max_position_embeddings", len(shards.prompt(longest)))
    pipeline = Pipeline({STUDENT: RoleModel(model, "socratic")}, tokenizer, shards, Decoding("socratic"))
    found = list(predictions(pipeline, range(len(shards)), ProcessCounter()))
    assert len(found) == len(shards)
    (unsolved,) = [p for p in found if p["id"] == shards.problem(longest).id]
    assert (unsolved["text"], unsolved["finished"], unsolved["correct_strict"]) == ("", False, False)
