from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.report.synthetic_study import make_evaluation_run, make_study, write_evaluation
from trainer.report.build import build_report
from trainer.report.comparison import (
    escape_latex,
    paper_tables,
    paper_values,
    same_size,
    to_latex,
)
from trainer.report.load import load_frames
from trainer.report.summary import summarise


def _rows(report: Path) -> list[dict[str, str]]:
    with open(report / "comparison.csv", newline="") as file:
        return list(csv.DictReader(file))


def _tables(folder: Path) -> list[dict[str, Any]]:
    evaluations = load_frames([folder]).evaluations
    return paper_tables(evaluations, summarise(evaluations))


def test_every_value_was_read_or_quoted() -> None:
    values = paper_values()["values"]
    found = {(value["data"], value["model"], value["method"], value["accuracy"]) for value in values}
    assert found == {("gsm8k", "GPT-2 large", "cot", 14.1), ("gsm8k", "GPT-2 large", "socratic", 21.1)}
    assert set(paper_values()["marks"]) == {"read", "quoted"} and all(value["source"] for value in values)
    assert {value["mark"] for value in values} == {"quoted"}
    sizes = {"GPT-2 small": 124_439_808, "GPT-2 medium": 354_823_168, "GPT-2 large": 774_030_080}
    for value in values:
        assert [name for name, size in sizes.items() if same_size(size, value)] == [value["model"]]
    assert same_size(354_823_168, {"parameters": 345_000_000}) and not same_size(110, {"parameters": 100})


def test_paper_values_are_below_the_model_of_their_size(whole_report: Path) -> None:
    rows = [row for row in _rows(whole_report) if row["problems"] == "gsm8k test"]
    order = list(dict.fromkeys((row["who"], row["model"]) for row in rows))
    assert order == [
        *(("ours", "gpt2"), ("ours", "gpt2-medium"), ("ours", "gpt2-large"), ("paper", "GPT-2 large")),
    ]
    large = [(r["method"], r["accuracy"], r["mark"]) for r in rows if r["model"] == "GPT-2 large"]
    assert large == [("cot", "0.141", "quoted"), ("socratic", "0.211", "quoted")]
    pairs = [r for r in rows if r["who"] == "ours" and r["method"].startswith("iterative")]
    assert len(pairs) == 6 and all(int(r["total_parameters"]) == 2 * int(r["parameters"]) for r in pairs)
    assert {row["inside_our_interval"] for row in rows if row["method"] == "socratic"} == {""}, (
        "unified or iterative?"
    )


def test_inside_our_interval(whole_report: Path) -> None:
    rows = _rows(whole_report)
    ours = {(r["model"], r["method"]): r for r in rows if r["who"] == "ours"}
    (row,) = [r for r in rows if r["who"] == "paper" and r["inside_our_interval"]]
    mine = ours["gpt2-large", row["method"]]
    inside = float(mine["low"]) <= float(row["accuracy"]) <= float(mine["high"])
    assert row["method"] == "cot" and row["inside_our_interval"] == str(inside)


def test_columns_without_paper_values(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {"a & b_1": 1000}, ("cot",), seeds=(0,), num_problems=30)
    (table,) = _tables(study.path)
    assert table["columns"] == ["cot"], "no column without a value"
    assert [row["is_paper"] for row in table["rows"]] == [False] and not table["marks"]
    text = to_latex([table])
    assert r"a \& b\_1 & 1k & " in text and text.count(r"\\") == 2 and "--" not in text
    assert r"\texttt{cot}" in text


def test_no_paper_values_for_other_settings(tmp_path: Path) -> None:
    about = {"data": "gsm8k", "train_data": "gsm8k", "num_problems": 30}
    study = make_study(
        tmp_path / "study", {"m": 124_000_000}, ("cot",), seeds=(0,), calculator=False, **about
    )
    (table,) = _tables(study.path)
    assert table["title"] == "gsm8k test · no calculator"
    assert not any(row["is_paper"] for row in table["rows"])


def test_a_guided_pair_has_a_column_of_its_own(tmp_path: Path) -> None:
    run = make_evaluation_run(tmp_path / "study", "iterative_ahead_operators", "m", 1000, 0)
    path = write_evaluation(run, "iterative_ahead", "m", 1000, 0, 0, num_problems=20) / "results.json"
    results = json.loads(path.read_text())
    results["decomposer"]["method"] = "decomposer_operators"
    path.write_text(json.dumps(results))
    page = build_report([run.path])
    (row,) = _rows(page.parent)
    assert (row["method"], row["total_parameters"]) == ("iterative_ahead+operators", "2000")
    assert r"\texttt{iterative\_ahead\_operators}" in (page.parent / "comparison.tex").read_text()
    assert ">iterative_ahead_operators</span>" in page.read_text()


def test_latex_has_as_many_cells_in_every_row(whole_report: Path) -> None:
    text = (whole_report / "comparison.tex").read_text()
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 3 + 1
    for row in rows:
        assert row.count(" & ") + 1 + 2 * row.count(r"\multicolumn{3}") == 2 + 7
    other = text.split(r"\toprule")[2].split(r"\bottomrule")[0]  # without the calculator: two methods
    assert all(line.count(" & ") == 3 for line in other.splitlines() if line.endswith(r"\\"))
    assert "14.1$^{q}$" in text and "quoted by a third party" in text
    assert text.count("{") == text.count("}") and r"\usepackage{booktabs}" in text.splitlines()[0]


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex here")
def test_latex_compiles(whole_report: Path, tmp_path: Path) -> None:
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + (
        (whole_report / "comparison.tex").read_text() + r"\end{document}"
    )
    (tmp_path / "t.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]


def test_latex_escapes() -> None:
    assert escape_latex("50 % of a_b & {c} ~ ^ \\ $ #") == (
        r"50 \% of a\_b \& \{c\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$ \#"
    )


def test_results_json_contains_the_table(whole_report: Path) -> None:
    record = json.loads((whole_report / "results.json").read_text())
    assert len(record["comparison_table"]) == len(_rows(whole_report))
