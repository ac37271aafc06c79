"""Rounds of real processes; what is unequal is never timed; ratios are better the larger, whatever the figure."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import table
from benchmarks.harness import Comparison, Contender, Failed, Result, Unequal, measure, no_gate, same

FACTS = {"processor": "some processor", "cores": 2, "date": "2026-01-01", "versions": {"torch": "2.13.0"}}


def contender(name: str, code: str, peer: bool = True) -> Contender:
    return Contender(name, [sys.executable, "-c", code], peer)


def comparison(*contenders: Contender, **changes: object) -> Comparison:
    values = {"work": "some work", "figure": "rate", "unit": "a second", "gate": no_gate, **changes}
    return Comparison(contenders=list(contenders), **values)  # type: ignore[arg-type]


def test_contenders_alternate_and_the_order_rotates(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = f"open({str(log)!r}, 'a').write('%s'); print('chatter'); print('{{\"rate\": %d}}')"
    told: list[str] = []
    result = measure(
        comparison(contender("us", code % ("u", 6), peer=False), contender("them", code % ("t", 2))),
        3,
        told.append,
    )
    assert log.read_text() == "ut" + "tu" + "ut"
    assert (result.median("us"), result.median("them"), result.ratio) == (6, 2, 3)
    assert [line.split(": ")[1] for line in told] == ["us", "them", "them", "us", "us", "them"]


def test_what_is_unequal_is_never_timed() -> None:
    us, them = (
        contender("us", "print('{\"sum\": 1.0}')", False),
        contender("them", "print('{\"sum\": 1.001}')"),
    )
    with pytest.raises(Unequal, match=r"sum: us 1\.0, them 1\.001"):
        measure(comparison(us, them, figure="sum", gate=same("sum", 1e-4)), 1, lambda line: None)
    assert measure(comparison(us, them, figure="sum", gate=same("sum", 1e-2)), 1, lambda line: None)


def test_tokens_are_compared_one_by_one() -> None:
    gate = same("tokens")
    gate({"us": {"tokens": [[1, 2], [3]]}, "them": {"tokens": [[1, 2], [3]]}})
    for other in ([[1, 2]], [[1, 2], [4]], [[1, 2], [3, 3]]):
        with pytest.raises(Unequal):
            gate({"us": {"tokens": [[1, 2], [3]]}, "them": {"tokens": other}})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('no model here'); sys.exit(3)", "exit status 3\nno model here"),
        ("print('all is well')", "exit status 0\nall is well"),
        ("import time; time.sleep(600)", "no end within 1 seconds"),
    ],
)
def test_a_contender_that_fails_is_named_with_its_last_words(code: str, message: str) -> None:
    with pytest.raises(Failed, match=message):
        measure(comparison(contender("them", code), timeout_seconds=1.0), 1, lambda line: None)


def result(higher_is_better: bool, ours: list[float], theirs: list[float], **changes: object) -> Result:
    contenders = [contender("us", "", False), contender("them", ""), contender("others", "")]
    rounds = [
        {"us": {"rate": a}, "them": {"rate": b}, "others": {"rate": 1 if higher_is_better else 1000}}
        for a, b in zip(ours, theirs, strict=True)
    ]
    return Result(comparison(*contenders, higher_is_better=higher_is_better, **changes), rounds)


def test_the_ratio_is_of_the_same_round_and_to_the_best_peer() -> None:
    """A machine that is three times slower for a while slows both."""
    assert result(True, [40, 13, 41], [20, 6.5, 20]).ratio == 2
    assert result(False, [2, 6, 2], [5, 15, 5]).ratio == 2.5


def test_the_table_says_whether_a_goal_is_met(tmp_path: Path) -> None:
    results = [
        result(True, [40, 40, 40], [20, 20, 20], goal=1.5, work="fast"),
        result(True, [40, 40, 40], [20, 20, 20], goal=3.5, work="slow"),
        result(False, [4, 4, 4], [8, 8, 8], limit=3.0, work="long", notes="with a | in it"),
    ]
    text = table.markdown([one.to_dict() for one in results], FACTS)
    fast, slow, long = (line for line in text.splitlines() if line.startswith(("| fast", "| slow", "| long")))
    assert "**2.00x** | 1.5x, met |" in fast and "them: 20 (2.00x)" in fast
    assert "3.5x, not met" in slow
    assert "at most 3 a second, not met" in long and "- long: with a | in it" in text

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    table.into_readme(readme, text)
    assert readme.read_text() == f"before\n{table.START}\n{text}{table.END}\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="benchmarks"):
        table.into_readme(readme, text)
