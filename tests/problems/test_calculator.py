from __future__ import annotations

import ast
import operator
import random
import re
import time
from fractions import Fraction

import pytest

from trainer.problems import calculator
from trainer.problems.calculator import MAX_CHARACTERS, evaluate, open_expression


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("10-3-2", "5"),
        ("100/10/5", "2"),
        ("2*3/4*2", "3"),
        ("-5+2", "-3"),
        ("2*-3", "-6"),
        ("--5", "5"),
        ("+30-5", "25"),
        ("1,000*2", "2000"),
        ("1,234,567.5+0.5", "1234568"),
        (".5+.25", "0.75"),
        ("18.", "18"),
        (" 0.1 + 0.2 ", "0.3"),
        ("144.00", "144"),
        ("3×4÷2−1", "5"),
        ("1/3", "0.333333"),
        ("2/3", "0.666667"),
        ("-1/3", "-0.333333"),
        ("1/2000000", "0.000001"),  # half of the last decimal goes away from zero
        ("3*(1/3)", "1"),
        ("0*-1", "0"),
        ("((((7))))", "7"),
        ("999999999999999", "999999999999999"),
    ],
)
def test_accepted_arithmetic_and_its_canonical_text(expression, result):
    assert evaluate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "",
        " ",
        "()",
        "3-",
        "*3",
        "(1",
        "1)",
        "1 2",
        "5(3)",
        "2**3",
        "7//2",
        "5%",
        "$5",
        "1e5",
        "x",
        "3x4",
        "1,00",
        "1,0000",
        "1,000,00",
        "1..2",
        ".",
        "1/0",
        "1/(2-2)",
        "²",
        "٣",
        "0x10",
        "1_000",
        "__import__('os')",
        "1/3000000",
        "1000000000000000",
        "999999999999999.9999999",
        "=",
        "1=1",
        "1;2",
        "1\x00",
    ],
)
def test_other_expressions_give_none(expression):
    assert evaluate(expression) is None


def test_length_depth_and_size_are_bounded_in_time():
    start = time.perf_counter()
    hostile = [
        "9" * 10**6,
        "9*" * 99 + "9",
        "(" * 10**6,
        "(" * 100 + "1" + ")" * 99,
        "-" * 199 + "1",
        "1" + "/9" * 99,
    ]
    assert [evaluate(expression) for expression in hostile] == [None] * 6
    assert evaluate("(" * 20 + "1" + ")" * 20) == "1"
    assert evaluate("1+" * 99 + "1") == "100"
    assert evaluate("1+" * 100 + "1") is None and len("1+" * 100 + "1") > MAX_CHARACTERS
    assert time.perf_counter() - start < 5  # milliseconds, on an idle machine


def test_random_expressions_agree_with_python_fractions():
    rng = random.Random(0)
    for _ in range(2000):
        expression = _random_expression(rng, depth=3)
        try:
            exact = _exact(ast.parse(expression, mode="eval").body, expression)
        except ZeroDivisionError:
            assert evaluate(expression) is None, expression
            continue
        result = evaluate(expression)
        if result is None:
            assert abs(exact) >= 10**15 or 0 < abs(exact) < Fraction(1, 10**6), expression
        else:
            assert abs(Fraction(result) - exact) <= Fraction(1, 2 * 10**6), expression
            assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]{0,5}[1-9])?", result) and result != "-0"


def _exact(node: ast.expr, source: str) -> Fraction:
    """Return the value by Python's parser, as a reference for precedence and grouping."""
    if isinstance(node, ast.BinOp):
        left, right = _exact(node.left, source), _exact(node.right, source)
        operators = {
            ast.Add: operator.add,
            ast.Sub: operator.sub,
            ast.Mult: operator.mul,
            ast.Div: operator.truediv,
        }
        return operators[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp):
        return -_exact(node.operand, source)
    return Fraction(ast.get_source_segment(source, node) or "")


def _random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(["7", "12", "0.5", ".25", "100", "3.125", "0", "48"])
    left, right = (_random_expression(rng, depth - 1) for _ in range(2))
    return rng.choice(["{}+{}", "{}-{}", "{}*{}", "{}/{}", "({})*{}", "-({}+{})", "({})/({})"]).format(
        left, right
    )


def test_annotations_split_off_calculator_results():
    pieces = list(calculator.split_annotations("48/2 = <<48/2=24>>24 clips"))
    assert pieces == [("48/2 = <<48/2=", False), ("24>>", True), ("24 clips", False)]
    assert list(calculator.split_annotations("a <<1+1=2>><<2+2=4>>")) == [
        ("a <<1+1=", False),
        ("2>>", True),
        ("<<2+2=", False),
        ("4>>", True),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "no annotation",
        "<<8*18=144.00>>",
        "<<1/2=.5>>",
        "<<2+2=5>>",
        "<<2+2= 4>>",
        "<<2+2=4",
        "<<=4>>",
        "<<2+2=>>",
        "<<a=a>>",
        "<<2+2\n=4>>",
        "<2+2=4>",
        "2+2=4>>",
        "<<1=1=1>>",
        "<<7//2=3>>",
    ],
)
def test_an_annotation_with_another_result_stays_text(text):
    assert list(calculator.split_annotations(text)) == [(text, False)]


def test_annotations_of_an_empty_text():
    assert list(calculator.split_annotations("")) == []


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("he sold <<48/2=", "48/2"),
        ("<<1+1=2>> and <<2*3=", "2*3"),
        ("<<<5=", "5"),
        ("<<48/2", None),
        ("<<48/2=2", None),
        ("<<48/2=24>>", None),
        ("48/2 =", None),
        ("<<=", None),
        ("<<1=1=", None),
        ("<<1+1=2>> so 3+3=", None),
        ("<<a\nb=", None),
        ("<<" + "1" * 200 + "=", "1" * 200),
        ("<<" + "1" * 201 + "=", None),
        ("", None),
    ],
)
def test_open_expression_is_found_at_the_end_only(text, expression):
    assert open_expression(text) == expression


def test_time_is_linear_in_the_text():
    start = time.perf_counter()
    for text in ("<<" * 10**5, "<<1" * 10**5, "<" * 10**6 + "=", "<<1=1" * 10**5, "<<1=1>" * 10**5):
        assert "".join(piece for piece, _ in calculator.split_annotations(text)) == text
        open_expression(text)
    assert time.perf_counter() - start < 5


def test_agreement_with_gsm8k(shared_data):
    """The figures of the module docstring; `open_expression` and `annotations` are consistent."""
    from trainer.problems.sources import read_problems

    num_annotations = num_results = num_same_value = 0
    for problem in read_problems("gsm8k", "train", str(shared_data / "gsm8k")):
        for step in problem.steps:
            for expression, result in re.findall(r"<<(.*?)=(.*?)>>", step.solution):
                num_annotations += 1
                value = evaluate(expression)
                num_same_value += value is not None and Fraction(value) == Fraction(result)
            prefix = ""
            for piece, is_result in calculator.split_annotations(step.solution):
                num_results += is_result
                if is_result:
                    expression = open_expression(prefix)
                    assert expression is not None and evaluate(expression) == piece.removesuffix(">>")
                prefix += piece
            assert prefix == step.solution
    assert num_annotations == 23716
    assert num_same_value == 23714
    assert num_results >= 23047
