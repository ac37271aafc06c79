from __future__ import annotations

import pytest

from trainer.problems.problem import Problem, RecordError, RejectedRecord, Step, one_line


def test_one_line_joins_every_kind_of_white_space():
    assert one_line("  a\tb \r\n c\u2028d\u00a0e  ") == "a b c d e"
    assert one_line(" \n ") == ""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Step(), "bad_step"),
        (lambda: Step("two\nlines"), "bad_step"),
        (lambda: Step("", "blank after "), "bad_step"),
        (lambda: Step("", "so #### 5"), "bad_step"),
        (lambda: Step("", "a\0b"), "nul_character"),
        (lambda: Step("", "\ud83d"), "not_utf8"),
        (lambda: Step(None), "bad_step"),
        (lambda: Step(5, "x"), "wrong_type"),
        (lambda: Problem("", "q", "a"), "bad_id"),
        (lambda: Problem("x" * 201, "q", "a"), "bad_id"),
        (lambda: Problem("two\nlines", "q", "a"), "bad_id"),
        (lambda: Problem("1", "", "a"), "no_question"),
        (lambda: Problem("1", "q\n", "a"), "no_question"),
        (lambda: Problem("1", "q\0", "a"), "nul_character"),
        (lambda: Problem("1", "q", ""), "no_answer"),
        (lambda: Problem("1", "q", "a\nb"), "bad_answer"),
        (lambda: Problem("1", "q", "#### 5"), "bad_answer"),
        (lambda: Problem("1", "q", "a", facts=("",)), "bad_fact"),
    ],
)
def test_invalid_texts_are_refused_with_a_reason(make, reason):
    with pytest.raises(RecordError) as caught:
        make()
    assert caught.value.reason == reason
    assert isinstance(caught.value, ValueError) and str(caught.value).startswith(reason)


def test_a_question_may_have_several_lines_and_a_step_only_one_text():
    problem = Problem("1", "Line one.\nLine two?", "5", (Step("What?"), Step("", "2+3 = 5")), ("A fact.",))
    assert problem.steps[0].solution == "" and problem.steps[1].question == ""


def test_a_rejected_record_truncates_its_text_and_checks_its_reason():
    assert RejectedRecord("a.jsonl", 3, "too_long", "why", "x" * 10**6).text == "x" * 200
    with pytest.raises(AssertionError):
        RejectedRecord("a.jsonl", 3, "no_such_reason", "why", "")
