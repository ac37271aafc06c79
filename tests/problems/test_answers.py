from __future__ import annotations

import time
from fractions import Fraction

import pytest

from trainer.problems import answers
from trainer.problems.answers import ANSWER_RULES, answer_type, answers_match, extract_answer


@pytest.mark.parametrize(
    "answer",
    [
        "18",
        "18.",
        "18.0",
        "18.00",
        " 18 ",
        "$18",
        "$ 18",
        "+18",
        "18%",
        "36/2",
        "18 dollars",
        "18 dollars.",
        "18!",
        "$18.00.",
        "18 miles per hour",
        "18 square-feet",
        "18cm²",
        "18 °C",
        "18€",
        "**18**",
        "018",
        "18,",
    ],
)
def test_ways_to_write_eighteen(answer):
    assert (
        answers_match(answer, "18")
        and not answers_match(answer, "17")
        and not answers_match(answer, "-18")
        and not answers_match(answer, "0.18")
    )


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "180",
        "1 8",
        "1.8",
        "81",
        "-18",
        "18.001",
        "18 million",
        "18 thousand",
        "2 dozen",
        "18k",
        "18 or 19",
        "17-18",
        "18 + 0",
        "9*2",
        "18=18",
        "18:00",
        "1,8",
        "x18",
        "eighteen",
        "18/0",
        "18.0.0",
        "18e0",
        "about 18",
        "1e1",
        "١٨",
        "18 and nothing else at all",
        "--18",
        "18 2/3",
    ],
)
def test_answers_that_are_not_eighteen(answer):
    assert not answers_match(answer, "18")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("$1,000", "1000"),
        ("1000", "1,000"),
        ("1,000,000.50", "1000000.5"),
        ("1,00,000", "100000"),
        ("-3", "−3"),
        ("−$3", "-3"),
        ("$-3", "-3"),
        ("–3", "-3"),
        (".5", "0.5"),
        ("1/2", "0.5"),
        ("-0", "0"),
        ("1/3", "2/6"),
        ("yes", "Yes"),
        ("Yes, they are.", "yes"),
        ("TRUE", "yes"),
        ("no.", "false"),
        ("False", "no"),
        ("Paris.", "paris"),
        ("'The  Big Apple'", "the big apple"),
        ("Cafe\u0301", "CAFÉ"),
        ("18 dollars", "18 dollars"),
    ],
)
def test_matching_answers(answer, gold):
    assert answers_match(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (None, "18"),
        ("0.33", "1/3"),
        ("0.3333333333333333", "1/3"),
        ("9007199254740993", "9007199254740992"),  # equal as floats
        ("1,0000", "10000"),
        ("1.000", "1000"),
        ("yes", "no"),
        ("no doubt: yes", "yes"),
        ("nobody", "no"),
        ("not yes", "yes"),
        ("yes and no", "yes"),
        ("1", "yes"),
        ("Paris, France", "Paris"),
        ("", "Paris"),
    ],
)
def test_different_answers(answer, gold):
    assert not answers_match(answer, gold)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 3+4 = 7.\n#### 7", "7"),
        ("####7", "7"),
        ("#### 5\nwait\n#### 7 eggs\nQuestion: 9?", "7 eggs"),
        ("#### $1,000.", "$1,000."),
        ("##### 7", "7"),
        ("#### 5\n####", None),
        ("####\n7", None),
        ("### 7", None),
        ("The answer is 7.", None),
        ("", None),
    ],
)
def test_strict_takes_the_line_after_the_last_delimiter(text, answer):
    assert extract_answer(text) == extract_answer(text, "strict") == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", "18"),
        ("It costs $1,000.", "$1,000"),
        ("so 5-3", "3"),
        ("pages 3–5", "5"),
        ("it is -3 degrees", "-3"),
        ("he owes $-5", "$-5"),
        ("he owes -$5", "-$5"),
        ("(12)", "12"),
        ("3,4,5", "5"),
        ("half is .5", ".5"),
        ("one part is 3/4 of it", "3/4"),
        ("<<9*2=18>>18 eggs", "18"),
        ("<<9*2=", "2"),
        ("version 1.2.3", "3"),
        ("12.", "12"),
        ("no number", None),
        ("", None),
        ("9" * 201, None),
        ("#### 42\n\nQuestion: what is 6 times 7?", "42"),  # the stated answer is preferred
        ("#### 42 eggs", "42 eggs"),
        ("#### the answer is 42, not 41 or 43", "43"),
    ],
)
def test_flexible_takes_the_stated_number_or_the_last_one(text, number):
    assert extract_answer(text, "flexible", "number") == number


def test_flexible_uses_the_type_of_the_gold_answer():
    text = "Is 300 more than 20? Yes, so true. There were 2 of them."
    assert extract_answer(text, "flexible", "yes_no") == "true"
    assert extract_answer(text, "flexible", "number") == extract_answer(text, "flexible") == "2"
    assert extract_answer("3 of 4.\n#### no", "flexible") == "no"
    assert extract_answer("It sinks, so no.", "flexible") == "no"
    assert extract_answer("The city is\nParis", "flexible", "text") == "Paris"
    assert (
        extract_answer("so\n#### Paris\nbye", "flexible", "text")
        == extract_answer("#### Paris", "flexible")
        == "Paris"
    )
    assert [
        answer_type(gold) for gold in ("18", "-1,080.5", "$3", "1/2", "yes", "False.", "18 eggs", "no one")
    ] == [
        *["number"] * 4,
        *["yes_no"] * 2,
        *["text"] * 2,
    ]


@pytest.mark.parametrize("arguments", [("x", "lenient"), ("x", "flexible", "date"), ("x", "strict", "date")])
def test_unknown_rules_and_types_are_refused(arguments):
    with pytest.raises(ValueError, match="rule"):
        extract_answer(*arguments)


def test_time_is_linear_in_the_text():
    pieces = ["9", "1,", "-$", "####", "yes ", "1/", ".5", " ", "no,", "a-", "'", "1 a", "\n", "$ -", "1."]
    start = time.perf_counter()
    for text in [piece * 20_000 for piece in pieces] + ["#### " + piece * 20_000 for piece in pieces]:
        for rule in ANSWER_RULES:
            for gold_type in (None, *answers.ANSWER_TYPES):
                extract_answer(text, rule, gold_type)
        for gold in ("18", "yes", "Paris"):
            answers_match(text, gold)
    assert time.perf_counter() - start < 15  # about 1 s; a quadratic pattern would take many minutes


def _gold_texts(folder):
    """Yield (gold answer, gold solution with answer) of the 1319 GSM8K test problems."""
    from trainer.problems.sources import read_problems

    for problem in read_problems("gsm8k", "test", str(folder / "gsm8k")):
        body = "\n".join(step.solution for step in problem.steps)
        yield problem.answer, f"{body}\n#### {problem.answer}"


def test_every_gold_solution_of_gsm8k_is_right_and_every_changed_answer_wrong(shared_data):
    num_problems = 0
    for gold, text in _gold_texts(shared_data):
        num_problems += 1
        value = Fraction(gold)
        assert answer_type(gold) == "number" and answers.parse_number(gold) == value
        body = text.rpartition("####")[0]
        with_commas = f"{int(gold):,}"
        for stated in (
            gold,
            f"{gold}.",
            f"${with_commas}",
            f"{gold}.00",
            f"{gold} dollars",
            f" {with_commas} ",
        ):
            for rule in ANSWER_RULES:
                answer = extract_answer(f"{body}#### {stated}", rule, "number")
                assert answers_match(answer, gold), (rule, stated, answer, gold)
        wrong = [value + 1, value - 1, value * 10, -value, value / 10, value + Fraction(1, 100)]
        for changed in (str(w) for w in wrong if w != value):
            for rule in ANSWER_RULES:
                assert not answers_match(extract_answer(f"{body}#### {changed}", rule, "number"), gold), (
                    rule,
                    changed,
                    gold,
                )
        assert not answers_match(extract_answer(body, "strict"), gold)
        assert answers_match(extract_answer(f"{body}So the answer is {gold}.", "flexible", "number"), gold)
    assert num_problems == 1319


def test_right_under_strict_is_right_under_flexible(shared_data):
    tails = ["", "\n", "\n\nQuestion: Tom has 3 apples.", " 5", ".\n#### 7", " no\nyes"]
    for gold, text in list(_gold_texts(shared_data))[:200]:
        for tail in tails:
            for some_gold in (gold, "yes", "no", "7", "Paris"):
                if answers_match(extract_answer(text + tail, "strict"), some_gold):
                    assert answers_match(
                        extract_answer(text + tail, "flexible", answer_type(some_gold)), some_gold
                    )


def test_last_number_agrees_with_gold_for_solutions_without_delimiter(shared_data):
    """The last number of a GSM8K solution is nearly always its answer."""
    texts = [(gold, text.rpartition("####")[0]) for gold, text in _gold_texts(shared_data)]
    num_right = sum(answers_match(extract_answer(text, "flexible", "number"), gold) for gold, text in texts)
    assert num_right / len(texts) > 0.9
