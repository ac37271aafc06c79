"""Tests of the harness: rounds of real processes, gates, ratios and the table."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import table
from benchmarks.harness import (
    REPOSITORY,
    Comparison,
    Contender,
    ContenderFailed,
    Result,
    Unequal,
    equal_outputs,
    measure,
    no_gate,
)

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


def test_unequal_results_are_not_timed() -> None:
    us, them = (
        contender("us", "print('{\"sum\": 1.0}')", False),
        contender("them", "print('{\"sum\": 1.001}')"),
    )
    with pytest.raises(Unequal, match=r"sum: us 1\.0, them 1\.001"):
        measure(comparison(us, them, figure="sum", gate=equal_outputs("sum", 1e-4)), 1, lambda line: None)
    assert measure(comparison(us, them, figure="sum", gate=equal_outputs("sum", 1e-2)), 1, lambda line: None)


def test_tokens_are_compared_one_by_one() -> None:
    gate = equal_outputs("tokens")
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
        ("import sys; print('{\"rate\": 1}', flush=True); sys.exit(4)", r"exit statuses \[4\]"),
    ],
)
def test_the_error_of_a_contender_has_its_last_lines(code: str, message: str) -> None:
    with pytest.raises(ContenderFailed, match=message):
        measure(comparison(contender("them", code), timeout_seconds=1.0), 1, lambda line: None)


ROUNDS = """
import json, os, sys
sys.path.insert(0, os.getcwd())
from benchmarks.processes import turns
for number, _ in enumerate(turns()):
    print("chatter", {"of": "a library"})
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"rate": number + 1, "half": 0.5, "who": [os.getpid(), os.environ.get("WORLD_SIZE")]}), flush=True)
open(sys.argv[1] + os.environ.get("RANK", "0"), "w").close()
"""


def staying(tmp_path: Path, name: str, peer: bool = True, **changes: Any) -> Contender:
    script = tmp_path / "rounds.py"
    script.write_text(ROUNDS)
    command = [sys.executable, str(script), str(tmp_path / f"ended-{name}-")]
    return Contender(name, command, peer, is_persistent=True, **changes)


def test_a_staying_contender_is_started_once_runs_all_rounds_and_exits(tmp_path: Path) -> None:
    us, them = staying(tmp_path, "us", False, ranks=2), staying(tmp_path, "them")
    found = measure(comparison(us, them), 3, lambda line: None)
    assert [outputs["us"]["rate"] for outputs in found.rounds] == [1, 2, 3]
    assert len({tuple(outputs["us"]["who"]) for outputs in found.rounds}) == 1
    assert (found.rounds[0]["us"]["who"][1], found.rounds[0]["them"]["who"][1]) == ("2", None)
    assert {path.name for path in tmp_path.glob("ended-*")} == {"ended-us-0", "ended-us-1", "ended-them-0"}


def test_equal_commands_are_one_process_with_several_figures(tmp_path: Path) -> None:
    us = staying(tmp_path, "us", False)
    told: list[str] = []
    found = measure(comparison(us, replace(us, name="half", peer=True, figure="half")), 2, told.append)
    assert len(told) == 2
    assert found.values("us") == {0: 1, 1: 2} and found.values("half") == {0: 0.5, 1: 0.5}


def test_a_hopeless_peer_runs_but_once(tmp_path: Path) -> None:
    far, near = (
        contender(name, f"print('{{\"rate\": {rate}}}')") for name, rate in (("far", 2), ("near", 9))
    )
    us = contender("us", "print('{\"rate\": 10}')", False)
    found = measure(comparison(us, far, near, hopeless=1.5), 3, lambda line: None)
    assert [sorted(outputs) for outputs in found.rounds] == [["far", "near", "us"]] + 2 * [["near", "us"]]
    assert (found.ratio_to("far"), found.median("far"), found.ratio) == (5, 2, 10 / 9)


def test_a_script_is_forked_from_loaded_libraries_and_runs_as_if_it_were_not(tmp_path: Path) -> None:
    """In an interpreter of its own: what is forked has loaded the module before its first line, and knows its arguments."""
    (tmp_path / "script.py").write_text(
        "import sys; found = 'wave' in sys.modules; import json, wave\n"
        "print(json.dumps({'rate': int(found), 'argv': sys.argv, 'name': __name__, 'root': sys.stdin.readline()}))"
    )
    program = (
        "from benchmarks.harness import Comparison, Contender, measure, no_gate, python\n"
        "from benchmarks.processes import preload\n"
        "if __name__ == '__main__':\n"
        "    preload('wave')\n"
        f"    one = Contender('us', python({str(tmp_path / 'script.py')!r}, 'a b'), peer=False)\n"
        "    found = measure(Comparison('work', 'rate', '', [one], no_gate), 1).rounds[0]['us']\n"
        "    print(found['rate'], found['argv'][1], found['name'], repr(found['root']))\n"
    )
    (tmp_path / "program.py").write_text(program)
    ended = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, check=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert ended.stdout.splitlines()[-1] == "1 a b __main__ '\\n'"


def test_a_forked_function_leaves_only_its_result() -> None:
    """In an interpreter of its own: pytest has threads, which a fork does not take along."""
    program = (
        "import sys; from benchmarks.processes import run_in_fork\n"
        "kept = []\n"
        "print(run_in_fork(lambda: kept.append(1) or {'found': len(kept)}), kept)\n"
        "try: run_in_fork(lambda: 1 / 0)\n"
        "except RuntimeError as error: print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert ended.stdout == "{'found': 1} []\na forked process ended with status 1\n", ended.stderr
    assert "ZeroDivisionError" in ended.stderr


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
        result(False, [4, 4, 4], [8, 8, 8], work="like it", notes="with a | in it"),
    ]
    text = table.markdown([one.to_dict() for one in results], FACTS)
    fast, slow, long = (line for line in text.splitlines() if line.startswith(("| fast", "| slow", "| long")))
    assert "**2.00x** | 1.5x, met |" in fast and "them: 20 (2.00x)" in fast
    assert "3.5x, not met" in slow
    assert "at most 3 a second, not met" in long and long.startswith("| long (1) | ")
    assert "| like it (1) | " in text and text.endswith("\n\n1. with a | in it\n")

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.START}\nold\n{table.END}\nafter\n")
    table.into_readme(readme, text)
    assert readme.read_text() == f"before\n{table.START}\n{text}{table.END}\nafter\n"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="benchmarks"):
        table.into_readme(readme, text)
