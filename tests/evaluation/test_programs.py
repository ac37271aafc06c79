"""Where a solution ends and who reads what: methods of solving played by voices whose words are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from trainer.errors import UserError
from trainer.evaluation import programs
from trainer.evaluation.decoding import (
    DECOMPOSER,
    PLANNER,
    SOLVER,
    STUDENT,
    Decoding,
    resolve_mode,
    resolve_pair,
)
from trainer.evaluation.model_reference import ModelReference
from trainer.evaluation.pipeline import Pipeline, RoleModel
from trainer.evaluation.predict import predictions
from trainer.evaluation.rollout import ModelSlot, Program, Rollout, RolloutContext
from trainer.evaluation.stop_tokens import StopTokens
from trainer.models.tokenizer import load_tokenizer
from trainer.runtime.shared_counter import ProcessCounter
from trainer.shards.methods import VIEWS, Role
from trainer.shards.read import Shards

END = 0
PROMPT = "P\n"


@pytest.fixture(scope="module")
def tokenizer(shards: Shards) -> PreTrainedTokenizerBase:
    return load_tokenizer(shards.tokenizer_path)


@pytest.fixture(scope="module")
def model(export: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(export, dtype="float32")


class Play:
    """A problem, solved by voices that say what they are given to say: `|` ends their text.

    `methods`: part -> the training method whose view it reads. Parts named together ("decomposer solver") share a seat.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        method: Callable[[Rollout], Program[None]],
        methods: dict[str, str],
        words: dict[str, str],
        max_new_tokens: int = 200,
        contexts: Sequence[int] = (1000, 1000, 1000),
        calculator: bool = True,
    ) -> None:
        language = StopTokens(tokenizer)
        seats = [
            ModelSlot(VIEWS[name].inputs, context, frozenset([END]))
            for name, context in zip(methods.values(), contexts, strict=False)
        ]
        voices = {part: seat for seat, parts in enumerate(methods) for part in parts.split()}
        rules = RolloutContext(language, seats, voices, max_new_tokens, calculator)
        said = {
            seat: iter([t for part in text.split("|") for t in (*language.tokens(part), END)][:-1])
            for seat, text in ((list(methods).index(parts), text) for parts, text in words.items())
        }
        self.read: list[list[int]] = [[] for _ in seats]
        self.solution = Rollout(0, language.tokens(PROMPT), rules, method, [0] * len(seats))
        while (turn := self.solution.next_model) is not None:
            feed = self.solution.sequences[turn]
            assert feed.pending, "a model has to read something before it can write"
            self.read[turn] += feed.pending
            feed.length += len(feed.pending)
            feed.pending = []
            self.solution.on_token(next(said[turn]))
        self.text = self.solution.text
        self.stopped = self.solution.stop_reason
        self.finished = self.solution.finished
        self.generated = dict(self.solution.generated)
        self.unsaid = {seat: tokenizer.decode(list(rest)) for seat, rest in said.items()}
        self._tokenizer = tokenizer

    def has_read(self, seat: int) -> str:
        text = self._tokenizer.decode(self.read[seat])
        assert text.startswith(PROMPT)
        return text.removeprefix(PROMPT)


def alone(tokenizer: PreTrainedTokenizerBase, words: str, opening: str = "", **limits: int) -> Play:
    method = partial(programs.unified, opening=opening)
    return Play(tokenizer, method, {STUDENT: "socratic"}, {STUDENT: words}, **limits)  # type: ignore[arg-type]


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
        # the calculator was first, whoever goes on
        ("<<3*4=12>> and <<12+1=", "<<3*4=12>>12>> and <<12+1=13>>"),
        ("<<1/0=", "<<1/0="),
        ("<<eggs*2=", "<<eggs*2="),
        ("so 48/2 = ", "so 48/2 = "),
    ],
)
def test_the_calculator_takes_the_pen(tokenizer: PreTrainedTokenizerBase, written: str, becomes: str) -> None:
    play = alone(tokenizer, f"{written}|")
    assert (play.text, play.finished) == (becomes, True)
    assert play.solution.calculator_results == becomes.count(">>") - written.count(">>")
    assert play.has_read(0) == becomes  # the result goes the way of its own words, and is counted
    assert play.generated[STUDENT] == len(play.read[0]) - len(tokenizer(PROMPT)["input_ids"]) + 1
    assert alone(tokenizer, f"{written}|", calculator=False).text == written


def test_only_tokens_that_can_complete_something_are_looked_at(tokenizer: PreTrainedTokenizerBase) -> None:
    language = StopTokens(tokenizer)
    for tokens, members, holds in (
        (language.equals, ("=", " ="), lambda text: text.endswith("=")),
        (language.newlines, ("\n",), lambda text: "\n" in text),
        (language.hashes, ("####", "#"), lambda text: "#" in text),
    ):
        texts = {tokenizer.decode([token]) for token in tokens}
        assert set(members) <= texts and all(map(holds, texts))


def test_length_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    num_prompt = len(tokenizer(PROMPT)["input_ids"])
    five = alone(tokenizer, "a b c d e f g", max_new_tokens=5)
    assert (five.generated, five.stopped, five.finished) == ({STUDENT: 5}, "max_new_tokens", False)
    narrow = alone(tokenizer, "a b c d e f g h", contexts=[num_prompt + 7])  # type: ignore[arg-type]
    assert (narrow.generated, narrow.stopped) == ({STUDENT: 7}, "context")
    cut = alone(tokenizer, "<<99*99=", max_new_tokens=9)  # 7 tokens of its own, 6 of the calculator
    assert cut.generated == {STUDENT: 9} and cut.text == "<<99*99=98" and cut.stopped == "max_new_tokens"
    ended = alone(tokenizer, "yes|and more")
    assert ended.finished and ended.text == "yes" and ended.unsaid == {0: "and more"}
    with_opening = alone(tokenizer, " 7|", opening="####")
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
def test_two_models_in_turn_read_their_views_token_for_token(
    tokenizer: PreTrainedTokenizerBase,
    method: programs.SolvingProgram,
    methods: dict[str, str],
    decomposer_reads: str,
) -> None:
    """No token is read twice, and none that the model's training did not show there."""
    # The calculator is faster than the solver, which then leaves its own result out.
    said = SOLVED.replace("=2>>", "=").replace("=3>>", "=")
    play = Play(tokenizer, method, methods, {DECOMPOSER: ASKED, SOLVER: said})
    assert (play.text, play.finished, play.stopped) == (TEXT, True, "")
    assert play.has_read(0).startswith(decomposer_reads)
    assert "####" not in play.has_read(0) or play.has_read(0) == decomposer_reads + "####"
    assert play.has_read(1) == TEXT
    language = StopTokens(tokenizer)
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
    assert play.read[1] == [token for piece in pieces for token in language.tokens(piece)]
    assert play.solution.calculator_results == 2
    num_words = {part: len(language.tokens(words)) for part, words in ((DECOMPOSER, ASKED), (SOLVER, SOLVED))}
    assert play.generated[DECOMPOSER] == num_words[DECOMPOSER]
    assert play.solution.sequences[0].is_done and play.unsaid == {0: "", 1: ""}


def test_one_student_in_both_parts_reads_one_text(tokenizer: PreTrainedTokenizerBase) -> None:
    words = {"decomposer solver": "How many?\n2 eggs\nAnd then?\n3 eggs\n#### 3|"}
    play = Play(tokenizer, INTERLEAVED, ONE, words)
    unified = alone(tokenizer, words["decomposer solver"])
    assert play.text == unified.text == "How many?\n2 eggs\nAnd then?\n3 eggs\n#### 3"
    assert play.read == unified.read and play.solution.generated.total() == unified.generated[STUDENT]
    assert play.generated == {
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
        ),  # the solver ends within a solution
        ("A?\nB?\n####", "\n2\n 7|", "A?\n\nB?\n2\n#### 7", ""),  # an empty solution is one
        ("A?\nB?\n####", "#### 7|", "A?\n#### 7", "ended_early"),  # it answers without being asked
        ("####", " 7\nand on and on", "#### 7", ""),  # the answer's line is the last
    ],
)
def test_whatever_they_say_there_is_an_end(
    tokenizer: PreTrainedTokenizerBase, interleaved: bool, asked: str, solved: str, text: str, stopped: str
) -> None:
    method, methods = (INTERLEAVED, TWO) if interleaved else (AHEAD, TWO_AHEAD)
    play = Play(tokenizer, method, methods, {DECOMPOSER: asked, SOLVER: solved})
    assert (play.text, play.stopped, play.finished) == (text, stopped, True)
    assert play.has_read(1) == text


@pytest.mark.parametrize(
    ("max_new_tokens", "contexts", "stopped"), [(9, (99, 99), "max_new_tokens"), (99, (99, 9), "context"), (99, (9, 99), "context")]
)  # fmt: skip
def test_a_cut_keeps_what_was_written(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, contexts: tuple[int, int], stopped: str
) -> None:
    for method, methods in ((INTERLEAVED, TWO), (AHEAD, TWO_AHEAD)):
        play = Play(
            tokenizer,
            method,
            methods,
            {DECOMPOSER: "A?\n" * 40, SOLVER: "1\n" * 40},
            max_new_tokens,
            contexts,
        )
        assert (play.finished, play.stopped) == (False, stopped)
        assert "A?\n1\nA?\n1".startswith(play.text) or set(play.text.split("\n")) <= {"A?", "1", "A", ""}
        assert play.solution.generated.total() <= max_new_tokens
        for seat, context in enumerate(contexts):
            assert len(play.read[seat]) < context


def test_gold_questions_are_given_and_never_written(tokenizer: PreTrainedTokenizerBase) -> None:
    questions = [StopTokens(tokenizer).tokens(text) for text in ("How many?\n", "And then?\n")]
    said = SOLVED.replace("=2>>", "=").replace("=3>>", "=")
    play = Play(
        tokenizer,
        partial(programs.gold_subquestions, questions=questions),
        {SOLVER: "solver"},
        {SOLVER: said},
    )
    assert (play.text, play.stopped, play.has_read(0)) == (TEXT, "", TEXT)
    assert play.generated == {SOLVER: len(tokenizer(SOLVED.removesuffix("|"))["input_ids"]) + 1}
    early = Play(
        tokenizer,
        partial(programs.gold_subquestions, questions=questions),
        {SOLVER: "solver"},
        {SOLVER: "#### 3|"},
    )
    assert (early.text, early.stopped) == ("How many?\n#### 3", "ended_early")
    cut = Play(
        tokenizer,
        partial(programs.gold_subquestions, questions=questions),
        {SOLVER: "solver"},
        {SOLVER: "1\n2"},
        1,
    )
    assert cut.text == "How many?\n1\nAnd then?" and cut.stopped == "max_new_tokens"


def test_a_plan_is_read_by_the_decomposer_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    planned = partial(programs.planner_guidance, role=Role.OPERATORS)
    tokens = StopTokens(tokenizer).tokens("operators: + *\n")
    given = partial(programs.gold_guidance, role=Role.OPERATORS, tokens=tokens)
    methods = {DECOMPOSER: "decomposer_interleaved_operators", SOLVER: "solver", PLANNER: "planner_operators"}
    words = {DECOMPOSER: "A?\n####", SOLVER: "1\n 7|", PLANNER: "operators: + *\nnever said"}
    for guidance in (planned, given):
        play = Play(tokenizer, partial(programs.interleaved, max_steps=3, guidance=guidance), methods, words)
        assert (play.text, play.solution.plan) == ("A?\n1\n#### 7", "operators: + *")
        assert play.has_read(0).startswith("operators: + *\nA?\n1\n")
        assert play.has_read(1) == play.text and play.solution.sequences[2].is_done == (guidance is planned)
        assert (play.unsaid[2] == "never said") == (guidance is planned)
    words[PLANNER] = "operators: +|"
    play = Play(tokenizer, partial(programs.ahead, max_steps=3, guidance=planned), methods, words)
    assert play.has_read(0).startswith("operators: +\nA?\n") and play.stopped == "ended_early"


def test_what_is_forced_has_the_tokens_it_had_in_training(
    shards: Shards, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The student knows the stories by heart, all but the sums: it writes them back token by token."""
    decoding = Decoding("socratic", batch_size=4)
    cast = Pipeline({STUDENT: RoleModel(model, "socratic")}, tokenizer, shards, decoding)
    found = {made["id"]: made for made in predictions(cast, range(len(shards)), ProcessCounter())}
    for index in range(len(shards)):
        tokens, _ = shards.example(index, VIEWS["socratic"])
        expected = tokens[len(shards.prompt(index)) :].tolist()
        assert len(shards.segment_tokens(index, Role.CALCULATOR)) > 0
        prediction = found[shards.problem(index).id]
        assert prediction["text"] == tokenizer.decode(expected[:-1])
        assert prediction["generated_tokens"] == len(expected)
        assert prediction["correct_strict"] and prediction["finished"]
        results = [role for role, _ in shards.segments(index) if role == Role.CALCULATOR]
        assert prediction["calculator_results_given"] == len(results)


def test_an_imposed_answer_begins_with_the_delimiter(
    shards: Shards, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    decoding = Decoding("answer_only", impose_answer=True, max_new_tokens=4)
    cast = Pipeline({STUDENT: RoleModel(model, "socratic")}, tokenizer, shards, decoding)
    (prediction,) = predictions(cast, [3], ProcessCounter())
    assert prediction["text"].startswith("####") and prediction["generated_tokens"] <= 4


def test_a_prompt_that_fills_the_context_is_a_problem_unsolved(
    shards: Shards,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = max(range(len(shards)), key=lambda index: len(shards.prompt(index)))
    monkeypatch.setattr(model.config, "max_position_embeddings", len(shards.prompt(longest)))
    cast = Pipeline({STUDENT: RoleModel(model, "socratic")}, tokenizer, shards, Decoding("socratic"))
    made = list(predictions(cast, range(len(shards)), ProcessCounter()))
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


def pair(**methods: str | None) -> dict[str, ModelReference]:
    return {
        part: ModelReference(f"runs/{method}", "export", {"method": method})
        for part, method in methods.items()
    }


def test_modes_of_pairs() -> None:
    assert resolve_pair(pair(decomposer="decomposer", solver="solver"), "planner") == ("iterative_ahead", "")
    for decomposer in ("decomposer_interleaved", "socratic"):
        students = pair(decomposer=decomposer, solver="socratic")
        assert resolve_pair(students, "planner") == ("iterative_interleaved", "")
    assert resolve_pair(pair(solver="solver"), "planner") == ("gold_subquestions", "")
    guided = {"decomposer": "decomposer_equations", "solver": "solver"}
    assert resolve_pair(pair(**guided), "gold") == ("iterative_ahead", "equations")
    assert resolve_pair(pair(**guided, planner="planner_equations"), "planner")[1] == "equations"


@pytest.mark.parametrize(
    ("students", "guidance_from", "told"),
    [
        (pair(decomposer="decomposer", solver="decomposer"), "planner", "a solver is of method solver or socratic"),
        (pair(decomposer="solver", solver="solver"), "planner", r"a decomposer is of method decomposer\*"),
        (pair(decomposer="cot", solver="solver"), "planner", "runs/cot is of method cot"),
        (pair(solver="answer_only"), "planner", "a solver is of method"),
        (pair(decomposer="decomposer", solver=None), "planner", "solver runs/None does not say by which method"),
        (pair(decomposer="decomposer_operators", solver="solver"), "planner", "guided by operators; give a planner"),
        (pair(decomposer="decomposer", solver="solver"), "gold", "reads no plan"),
        (pair(decomposer="decomposer", solver="solver", planner="planner_equations"), "planner", "reads no plan"),
        (
            pair(decomposer="decomposer_operators", solver="solver", planner="planner_equations"),
            "planner",
            "is guided by operators",
        ),
        (pair(decomposer="decomposer_operators", solver="solver", planner="cot"), "planner", r"of method planner_\*"),
    ],
)  # fmt: skip
def test_parts_that_a_student_cannot_play(
    students: dict[str, ModelReference], guidance_from: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        resolve_pair(students, guidance_from)
