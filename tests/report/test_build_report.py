from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.report.synthetic_study import make_run, make_study, write_evaluation
from trainer.errors import UserError
from trainer.evaluation.score import wilson_interval
from trainer.report import format
from trainer.report.build import build_report
from trainer.report.drawing import method_styles
from trainer.report.load import load_frames
from trainer.report.plots import plot_num_steps
from trainer.report.summary import summarise, summarise_by_num_steps
from trainer.storage.run_directory import StudyDirectory

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = ("accuracy_vs_parameters", "accuracy_by_num_steps", "what_went_wrong", "loss_curves")
NUMBERS = ["comparison.csv", "comparison.tex", "index.html", "results.csv", "results.json"]


class _Page(HTMLParser):
    """Tags, ids and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.targets.append(value or "")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] not in (["style"], ["script"]):
            self.words.append(data)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    study = make_study(tmp_path_factory.mktemp("runs") / "quickstart")
    killed = make_run(study.path, "cot", "stories-13m", 13_107_200, seed=2, stop=92)
    with open(killed.metrics, "a") as file:
        file.write('{"step": 93, "loss": 0.4')
    return build_report([study.path]).parent


def test_default_output_is_the_report_folder_of_the_study(report: Path) -> None:
    figures = [f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")]
    assert sorted(path.name for path in report.iterdir()) == sorted([*figures, *NUMBERS])
    assert report.name == "report" and report.parent.name == "quickstart"


def test_two_builds_are_the_same_bytes(report: Path, tmp_path: Path) -> None:
    page = build_report([report.parent], tmp_path / "again")
    assert page == tmp_path / "again" / "index.html"
    assert _digests(page.parent) == _digests(report)


def test_csv_and_json_contain_the_counts_of_the_evaluations(report: Path) -> None:
    with open(report / "results.csv", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert len(rows) == 13
    study = StudyDirectory(report.parent)
    for run in study.runs():
        row = rows[run.name]
        names = run.evaluation_names()
        if not names:
            assert row["missing"] == "training stopped at step 91 of 240, no checkpoint"
            assert row["strict_accuracy"] == "" and row["broken_metrics_lines"] == "1"
            assert row["parameters"] == "13107200" and row["training_steps"] == "91"
            continue
        results = json.loads(run.evaluation(names[0]).results.read_text())
        for rule in ("strict", "flexible"):
            score = results["accuracy"][rule]
            assert int(row[f"{rule}_correct"]) == score["correct"] and int(row["n"]) == score["n"]
            found = float(row[f"{rule}_low"]), float(row[f"{rule}_high"])
            assert found == pytest.approx(wilson_interval(score["correct"], score["n"]))
        assert row["unfinished_generations"] == str(results["unfinished"]) and row["training_steps"] == "240"
    record = json.loads((report / "results.json").read_text())
    assert [row["run"] for row in record["runs"]] == list(rows)
    assert len(record["summary"]) == 6 and len(record["comparisons"]) == 12
    assert len(record["by_num_steps"]) == 6 * 4
    assert record["unfinished"] == [
        {
            "study": "quickstart",
            "run": "stories.cot.stories-13m.s2",
            "missing": "training stopped at step 91 of 240, no checkpoint",
        }
    ]


def test_page_and_json_have_the_same_numbers(report: Path) -> None:
    record = json.loads((report / "results.json").read_text())
    text = _Page((report / "index.html").read_text()).text.replace(" ,", ",")
    assert record["headlines"][0].split(".")[0] in text
    for row in record["summary"]:
        assert f"{format.percent(row['mean'])} {format.interval(row['low'], row['high'])}" in text
    for row in record["runs"]:
        if row["data"]:
            low_high = format.interval(row["strict_low"], row["strict_high"])
            assert f"{format.percent(row['strict_accuracy'])} {low_high} {row['n']}" in text
    for row in record["comparisons"]:
        counts = f"{row['both']} {row['only_first']} {row['only_second']} {row['neither']}"
        assert f"{counts} {format.p_value(row['p'])} {format.p_value(row['p_holm'])}" in text
    assert "1 of 13 runs is unfinished" in text
    assert "training stopped at step 91 of 240, no checkpoint" in text
    assert "unreadable lines in the training log, cut by a kill and left out: 1" in text
    assert "Distilling Reasoning Capabilities into Smaller Language Models, Findings of ACL 2023" in text
    assert "DeepSpeed config ds_configs/zero1.json" in text and "deepspeed 0.19.8" in text
    assert "torch 2.13.0" in text and "learning_rate 0.0005" in text


def test_the_page_loads_nothing(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = _Page(text)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert page.tags.count("script") == 2, "the predictions and what pages through them"
    script = text[text.rindex("<script>") + len("<script>") : text.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text, "no other script would run"
    assert page.tags.count("svg") == 2 * 1 + 2 + 2 * 1 + 2, "two figures have a narrow form"
    assert len(page.ids) == len(set(page.ids)), "ids of figures collide"
    assert {t[1:] for t in page.targets if t.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    outside = [t for t in page.targets if t.startswith("http")]
    assert set(outside) == {"https://aclanthology.org/2023.findings-acl.441/"}
    assert all((report / target).is_file() for target in page.targets if not target.startswith(("#", "http")))
    style_sheet = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style_sheet and "url(" not in style_sheet
    assert "prefers-color-scheme: dark" in style_sheet and "@media print" in style_sheet
    undefined = set(re.findall(r"var\(--([\w-]+)\)", text)) - set(re.findall(r"--([\w-]+):", text))
    assert not undefined


def test_a_method_has_one_colour_everywhere(report: Path) -> None:
    for name in FIGURES:
        svg = (report / f"{name}.svg").read_text()
        assert "#1b6a8c" in svg or name != "what_went_wrong", "right answers"
        assert all(color in svg for color in ("#767b82", "#0072b2", "#d55e00"))
    inlined = (report / "index.html").read_text().split("<main>")[1].split("<script")[0]
    assert not re.search(r"#(767b82|0072b2|d55e00|1c1f23|1b6a8c|c8452f)", inlined), (
        "a colour that dark mode cannot change"
    )


def test_names_are_escaped(tmp_path: Path) -> None:
    model, title = '<script>alert("m")</script>&$x_1$', "<img src=x> & $\\alpha$"
    run = make_run(tmp_path / "a & <b>", "cot", "m", 5, 0, name="stories.cot.<u>&.s0")
    write_evaluation(run, "cot", model, 5, 0, 0, train_data="<i>stories</i>")
    run.settings.write_text("method: cot\nseed: 0\npack_length: '<em>3</em>'\n")
    page = _Page(build_report([run.path.parent], title=title).read_text())
    assert not {"img", "u", "em"} & set(page.tags) and page.tags.count("script") == 2
    assert (
        "<em>3</em>" in page.text
        and title in page.text
        and model in page.text
        and "stories.cot.<u>&.s0" in page.text
    )


@pytest.mark.filterwarnings("error")
def test_names_that_cannot_be_encoded_or_drawn(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"study \xff\n")
    run = make_run(folder, "cot", "m", 5, 0, name="a run of 思维链 " + 60 * "x")
    write_evaluation(run, "cot", "\x00\x1b\ud800 m\u202e" + 300 * "y", 5, 0, 0, split="思维链")
    page = build_report([folder])
    text = page.read_text(encoding="utf-8")
    assert "study \ufffd\ufffd" in text and "思维链" in text and "\ufffd\ufffd\ufffd m\ufffdyyy" in text
    for name in FIGURES:
        ElementTree.parse(page.parent / f"{name}.svg")


def test_a_single_run_without_steps_and_a_run_directory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "study", "socratic", "stories-2m", 2_013_952, 0)
    path = write_evaluation(run, "socratic", "stories-2m", 2_013_952, 0, 0)
    record = json.loads((path / "results.json").read_text())
    (path / "results.json").write_text(json.dumps(record | {"by_num_steps": {"0": record["accuracy"]}}))
    page = build_report([run.path])
    assert page.parent == StudyDirectory(tmp_path / "study").report
    text = _Page(page.read_text()).text
    assert "On 300 problems of stories test, models of 2.01M parameters: socratic" in text
    assert "One training seed." in text and "the differences between training seeds are unknown" in text
    assert "Accuracy by number of steps" not in text and "McNemar" not in text and "Unfinished" not in text


def test_methods_without_numbers_of_steps_keep_their_position(tmp_path: Path) -> None:
    """Lines are shifted by the position of their method among all methods of the model, not only the drawn ones."""
    study = make_study(
        tmp_path / "study", {"m": 1000}, ("answer_only", "cot", "socratic"), (0,), num_problems=40
    )
    path = study.run("stories.answer_only.m.s0").evaluation("stories-test-answer_only").results
    path.write_text(json.dumps(json.loads(path.read_text()) | {"by_num_steps": {}}))
    evaluations = load_frames([study.path]).evaluations
    (panel,) = plot_num_steps(
        summarise(evaluations),
        summarise_by_num_steps(evaluations),
        method_styles(["answer_only", "cot", "socratic"]),
    )
    axes = Figure().add_subplot()
    panel.draw(axes)
    first = [line.get_xdata()[0] for line in axes.get_lines()]
    assert first == pytest.approx([2.0, 2.14])  # answer_only would be at 1.86


def test_no_evaluation_yet_and_old_figures_are_deleted(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", sizes={"m": 1000}, methods=("cot",))
    build_report([study.path])
    (study.report / "scaling_fit.svg").write_text("a figure of an earlier version")
    for run in study.runs():
        for name in run.evaluation_names():
            run.evaluation(name).results.unlink()
        run.metrics.unlink()
    page = build_report([study.path])
    text = _Page(page.read_text()).text
    assert "No run has been evaluated yet" in text and "2 of 2 runs are unfinished" in text
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "index.html",
        "results.csv",
        "results.json",
    ]


def test_an_old_report_survives_an_error(report: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "study", "cot", "m", 1000, 0)
    results = write_evaluation(run, "cot", "m", 1000, 0, 0) / "results.json"
    folder = build_report([run.path]).parent
    before = _digests(folder)
    results.write_text("{}")
    with pytest.raises(UserError):
        build_report([run.path])
    assert _digests(folder) == before


def test_no_torch_is_imported(report: Path) -> None:
    code = "import sys, trainer.report.build; sys.exit('torch' in sys.modules or 'pyplot' in str(list(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_error_without_the_extra() -> None:
    code = (
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'statsmodels' else find(name, *rest)\n"
        "import trainer.report"
    )
    failed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert "UserError: the report needs statsmodels: pip install 'socratic-trainer[report]'" in failed.stderr


def test_the_tool(report: Path, tmp_path: Path) -> None:
    tool = [sys.executable, str(REPOSITORY / "tools" / "plot_scaling.py")]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    flags = [str(report.parent), "--output_dir", str(tmp_path / "out"), "--title", "My study"]
    done = subprocess.run([*tool, *flags], env=environment, capture_output=True, text=True)
    record = json.loads((report / "results.json").read_text())
    expected = [
        *record["headlines"],
        "not in the report: quickstart/stories.cot.stories-13m.s2: training stopped at step 91 of 240, no checkpoint",
        f"report: {tmp_path / 'out' / 'index.html'}",
    ]
    assert done.returncode == 0 and done.stdout.splitlines() == expected, done.stderr
    assert "<title>My study</title>" in (tmp_path / "out" / "index.html").read_text()
    failed = subprocess.run([*tool, str(tmp_path / "none")], env=environment, capture_output=True, text=True)
    assert (
        failed.returncode == 2 and "is not a directory" in failed.stderr and "Traceback" not in failed.stderr
    )


def test_numbers_as_text() -> None:
    assert [format.count(n) for n in (0, 7, 999, 1000, 13_107_200, 124_439_808, 999_999, 1.5e9, None)] == [
        *("0", "7", "999", "1k", "13.1M", "124M", "1M", "1.5B", "–")
    ]
    assert [format.p_value(p) for p in (1.0, 0.31, 0.0312, 0.00042, 1e-9, None)] == [
        *("1.00", "0.31", "0.031", "0.0004", "< 0.0001", "–")
    ]
    assert [format.seconds(s) for s in (0.31, 42.2, 75, 3725, None)] == [
        *("0.3 s", "42 s", "1 min 15 s", "1 h 02 min", "–")
    ]
    assert [format.percent(f) for f in (0.8134, -0.012, -0.0001)] == ["81.3 %", "−1.2 %", "0.0 %"]
    assert format.interval(0.762, 0.8512, 0) == "[76, 85]"
