from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.problems import stories
from trainer.problems.calculator import evaluate
from trainer.problems.problem import Problem
from trainer.problems.stories.generator import MAX_NUMBER
from trainer.problems.stories.templates import PEOPLE

ANNOTATION = re.compile(r"<<([^<>=]+)=([^<>]+)>>")


def read(split: str, num_problems: int, **options: int) -> list[Problem]:
    return list(stories.generate_problems(split, num_problems=num_problems, **options))


@pytest.fixture(scope="module")
def long_stories() -> list[Problem]:
    return read("train", 3000, min_steps=1, max_steps=stories.MAX_STEPS)


def test_the_stories_never_change() -> None:
    """Digest of stories of every length; a change would change the data of every study."""
    digest = hashlib.sha256()
    for split in stories.SPLITS:
        for problem in read(split, 200, seed=7, min_steps=1, max_steps=8):
            digest.update(repr(problem).encode())
    assert digest.hexdigest() == "8422bf7af1ee8ad47a2e076873fd126f6f1310d35cea42a7d554636bc41a6112"


def test_more_problems_continue_the_same_sequence() -> None:
    few, many = read("test", 50, seed=3), read("test", 100, seed=3)
    assert many[:50] == few
    assert read("test", 50, seed=4) != few


def test_splits_are_disjoint_for_all_seeds() -> None:
    train = read("train", 20_000, seed=0, min_steps=1, max_steps=4)
    test = read("test", 2_000, seed=1, min_steps=1, max_steps=4)
    validation = read("validation", 2_000, seed=0, min_steps=1, max_steps=4)
    texts = [
        {stories.canonical(problem.question) for problem in split} for split in (train, test, validation)
    ]
    assert [len(split) for split in texts] == [20_000, 2_000, 2_000], "a story occurs twice in a split"
    for one, other in itertools.combinations(texts, 2):
        assert not one & other
    assert len({problem.id for problem in (*train, *test, *validation)}) == 24_000
    assert {stories.split_of(problem.question) for problem in test} == {"test"}


def test_stories_with_other_people_are_duplicates() -> None:
    (problem,) = read("test", 1)
    names = [person.name for person in PEOPLE if person.name in problem.question]
    renamed = problem.question.replace(names[0], "Zoe" if names[0] != "Zoe" else "Mia")
    assert renamed != problem.question
    assert stories.canonical(renamed) == stories.canonical(problem.question)


def test_every_calculation_is_right_and_leads_to_the_answer(long_stories: list[Problem]) -> None:
    for problem in long_stories:
        known = [int(number) for number in re.findall(r"\d+", problem.question)]
        for step in problem.steps:
            ((expression, result),) = ANNOTATION.findall(step.solution)
            assert evaluate(expression) == result
            assert 2 <= int(result) <= MAX_NUMBER
            left, right = (int(number) for number in re.findall(r"\d+", expression))
            assert left in known and right in known, "an operand is neither given nor a result"
            assert step.solution.count(f"{expression} = <<{expression}={result}>>{result} ") == 1
            known.append(int(result))
        assert problem.answer == result


def test_texts_are_plain_sentences_on_one_line(long_stories: list[Problem]) -> None:
    for problem in long_stories:
        assert problem.question.endswith(" " + problem.steps[-1].question)
        sentences = [problem.question]
        for step in problem.steps:
            assert step.question.startswith("How many ") and step.question.endswith("?")
            sentences += [step.question, step.solution]
        for text in sentences:
            assert text == " ".join(text.split()) and text.isascii()
            assert not set("{}#") & set(text)
            assert text[0].isupper() or text[0].isdigit()
            assert re.search(r"[.?]$", text)


def test_the_number_of_steps_is_uniform(long_stories: list[Problem]) -> None:
    counts = Counter(len(problem.steps) for problem in long_stories)
    assert sorted(counts) == list(range(1, stories.MAX_STEPS + 1))
    expected = len(long_stories) / len(counts)
    assert all(0.8 * expected < count < 1.2 * expected for count in counts.values())
    assert {len(problem.steps) for problem in read("test", 20, min_steps=8, max_steps=8)} == {8}


def test_every_operation_is_common(long_stories: list[Problem]) -> None:
    expressions = [ANNOTATION.findall(step.solution)[0][0] for p in long_stories for step in p.steps]
    counts = Counter(re.sub(r"\d", "", expression) for expression in expressions)
    assert set(counts) == set("+-*/")
    assert min(counts.values()) > 0.05 * len(expressions)


@pytest.mark.parametrize(
    ("split", "options", "message"),
    [
        ("dev", {}, "no split 'dev'"),
        ("test", {"min_steps": 3, "max_steps": 2}, "min_steps"),
        ("test", {"min_steps": 0}, "min_steps"),
        ("test", {"max_steps": 99}, "max_steps"),
        ("test", {"num_problems": -1}, "num_problems"),
    ],
)
def test_invalid_arguments_are_named(split: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        next(stories.generate_problems(split, **options))


def test_too_few_stories_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "_ATTEMPTS", 20)
    with pytest.raises(UserError, match="different test stories"):
        read("test", 10_000, min_steps=1, max_steps=1)


def test_tokenizer_is_deterministic_and_lossless(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from trainer.models import stories_tokenizer

    for name in ("one", "two"):
        stories_tokenizer.train_tokenizer(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) == stories_tokenizer.VOCAB_SIZE
    assert tokenizer.eos_token == tokenizer.bos_token == stories_tokenizer.END_OF_TEXT
    texts = ["Große Straße 9,5 — 日本\n", "#### 42", "12+5 = <<12+5=17>>17 apples.\n", "  two  spaces \n\n"]
    for problem in read("test", 200, min_steps=2, max_steps=8):
        texts.append(problem.question + "\n")
        for step in problem.steps:
            head, tail = step.solution.split("=", 2)[0], step.solution
            texts += [step.question + "\n", head, tail + "\n"]
    tokens: list[int] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        tokens += ids
    assert tokenizer.decode(tokens) == "".join(texts), "separately tokenised segments must concatenate"
