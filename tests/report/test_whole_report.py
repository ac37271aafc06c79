"""The report of a study with all evaluated methods agrees with its predictions."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from tests.report.synthetic_study import make_evaluation_run, make_run, make_study, write_evaluation
from trainer.errors import UserError
from trainer.report import format
from trainer.report.build import build_report
from trainer.report.columns import to_dicts
from trainer.report.error_types import ERROR_TYPES, analyse
from trainer.report.load import load_frames
from trainer.report.provenance import facts_by_run, remarks, totals
from trainer.report.report_data import ReportData
from trainer.report.statistics import mcnemar
from trainer.report.summary import uncertainty_text
from trainer.storage.run_directory import StudyDirectory


@pytest.fixture(scope="module")
def record(whole_report: Path) -> dict[str, Any]:
    return json.loads((whole_report / "results.json").read_text())


def _predictions(study: StudyDirectory, run: str, evaluation: str) -> list[dict[str, Any]]:
    path = study.run(run).evaluation(evaluation).predictions
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_error_types_add_up_to_the_problems(record: dict[str, Any]) -> None:
    assert len(record["causes"]) == 3 * 7 + 3 * 2
    for row in record["causes"]:
        assert row["right"] + sum(row[error_type] for error_type in ERROR_TYPES) == row["n"] == 60
    asked = [row for row in record["causes"] if row["method"] in ("socratic", "iterative_ahead")]
    assert all(row["subquestion"] for row in asked if row["right"] < 40)
    assert not any(
        row["subquestion"] for row in record["causes"] if row["method"] in ("cot", "gold_subquestions")
    )
    plain = [row for row in record["causes"] if row["method"] == "answer_only"]
    assert all(row["operation"] + row["arithmetic"] == 0 and row["other"] for row in plain)


def test_the_calculator_is_compared_on_the_same_problems(
    whole_study: StudyDirectory, record: dict[str, Any]
) -> None:
    assert len(record["calculator"]) == 6
    row = next(r for r in record["calculator"] if (r["model_name"], r["method"]) == ("gpt2", "cot"))
    runs = [
        _predictions(whole_study, "stories.cot.gpt2.s0", f"gsm8k-test-cot{end}")
        for end in ("", "-no-calculator")
    ]
    on, off = ([line["correct_strict"] for line in lines] for lines in runs)
    table = Counter(zip(on, off, strict=True))
    assert (row["only_first"], row["only_second"]) == (table[True, False], table[False, True])
    assert (row["on"]["correct"], row["off"]["correct"], row["n"]) == (sum(on), sum(off), 60)
    p = stats.binomtest(table[True, False], table[True, False] + table[False, True]).pvalue
    assert row["p"] == pytest.approx(p) and row["p"] <= row["p_holm"]
    assert mcnemar(table[True, False], table[False, True]) == pytest.approx(p)


def test_new_methods_are_compared_with_old_ones(record: dict[str, Any]) -> None:
    pairs = {(c["first"], c["second"]) for c in record["comparisons"] if c["panel"] == "gsm8k test"}
    assert len(pairs) == 21 and ("socratic", "iterative_interleaved") in pairs
    few_shot = [c for c in record["comparisons"] if c["first"] == "few_shot"]
    assert few_shot and all(c["seed"] == 0 and not c["refusal"] for c in few_shot), (
        "an untrained model has no seed"
    )


def test_sub_questions_are_scored_if_the_model_writes_them(record: dict[str, Any]) -> None:
    methods = Counter(row["method"] for row in record["subquestions"])
    assert methods == {"socratic": 3, "iterative_ahead": 3, "iterative_interleaved": 6}
    for row in record["subquestions"]:
        assert 50 < row["bleu"] < 100.001 and row["right_number_share"] == row["right_number"] / row["n"] == 1
        assert row["bertscore"] is None and row["low"] < 1 == row["high"]


def test_differences_that_are_not_significant_are_listed(
    whole_study: StudyDirectory, whole_report: Path
) -> None:
    data = ReportData("whole", load_frames([whole_study.path]))
    first, second = to_dicts(data.uncertainty)
    weak = data.comparisons[
        (data.comparisons["panel"] == "gsm8k test") & (data.comparisons["p_holm"] >= 0.05)
    ]
    num_weak = len(weak[["model", "first", "second"]].drop_duplicates())
    assert 0 < len(first["not_significant"]) == num_weak < first["num_pairs"] == 63
    assert uncertainty_text(first) in (whole_report / "index.html").read_text()
    assert second["panel"].endswith("no calculator")
    assert any(text.startswith("gpt2, cot and socratic: ") for text in first["not_significant"])


def test_predictions_of_an_older_version(tmp_path: Path) -> None:
    """Without gold steps the report has a note instead of error types and sub-question quality."""
    study = make_study(
        tmp_path / "old", {"m": 1000}, ("cot", "socratic"), seeds=(0,), gold_steps=False, num_problems=40
    )
    page = build_report([study.path])
    record = json.loads((page.parent / "results.json").read_text())
    assert record["causes"] == record["subquestions"] == [] and len(record["comparisons"]) == 1
    text = " ".join(page.read_text().split())
    assert "The predictions do not hold the gold steps" in text and "predictions without gold steps" in text
    assert not (page.parent / "what_went_wrong.svg").exists() and 'id="browser"' in text
    new = make_study(tmp_path / "new", {"m2": 2000}, ("cot",), seeds=(0,), num_problems=40)
    both = json.loads(
        (build_report([study.path, new.path], tmp_path / "r").parent / "results.json").read_text()
    )
    assert [row["model"] for row in both["causes"]] == ["m2"]


def test_evaluation_runs_and_roles_of_pairs_are_not_unfinished(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    make_run(folder, "cot", "m", 1000, 0, name="stories.decomposer.m.s0").settings.write_text(
        "method: decomposer\n"
    )
    make_run(folder, "cot", "m", 1000, 0, name="stories.solver.m.s0").settings.write_text("method: solver\n")
    for name in ("decomposer", "solver"):  # as in their settings
        manifest = StudyDirectory(folder).run(f"stories.{name}.m.s0").export / "MANIFEST.json"
        manifest.write_text(manifest.read_text().replace('"cot"', f'"{name}"'))
    pair = make_evaluation_run(
        folder, "iterative_ahead", "m", 1000, 3
    )  # seed: 0 in its settings is of the sampling
    runs = {row["run"]: row for row in to_dicts(load_frames([folder]).runs)}
    assert runs[pair.name]["missing"] == "not evaluated" and runs[pair.name]["seed"] == 3
    assert {runs[name]["missing"] for name in runs if name != pair.name} == {
        "model of a pair, but no pair with it is evaluated"
    }
    write_evaluation(pair, "iterative_ahead", "m", 1000, 3, 0, num_problems=20)
    assert not load_frames([folder]).runs["missing"].any()
    (run,) = to_dicts(load_frames([folder]).evaluations)
    assert run["run"] == pair.name
    assert run["max_steps"] is None and not run["is_trained"]
    assert [member["role"] for member in run["members"]] == ["decomposer", "solver"]
    assert (run["parameters"], run["total_parameters"]) == (1000, 2000)


def test_provenance_names_the_generation_backends(tmp_path: Path) -> None:
    choices = {
        "decomposer": {"name": "slots", "difference": 2e-6, "tolerance": 1e-4, "reason": ""},
        "solver": {
            "name": "transformers",
            "difference": 7e-6,
            "tolerance": 1e-4,
            "reason": "in slots it differs",
        },
    }
    pair = make_evaluation_run(tmp_path / "study", "iterative_ahead", "m", 1000, 0)
    write_evaluation(pair, "iterative_ahead", "m", 1000, 0, 0, num_problems=20, backends=choices)
    other = make_run(tmp_path / "study", "cot", "m", 1000, 1)
    write_evaluation(other, "cot", "m", 1000, 1, 0, num_problems=20)  # of an older version
    study = load_frames([pair.path, other.path])
    facts = {run["run"]: facts for run, facts in facts_by_run(study)[1]}
    assert facts[pair.name]["answers decoded by"] == "slots, transformers"
    assert facts[pair.name]["their logits differ from the plain forward pass's by"] == (
        "at most 7e-06 standard deviations"
    )
    assert "answers decoded by" not in facts[other.name]
    assert facts_by_run(study)[0]["started by"] == "the deepspeed launcher or torchrun"
    notes = [text for name, text in remarks(ReportData("study", study)) if name.startswith(pair.name)]
    assert "the solver was decoded by the backend transformers: in slots it differs" in notes
    assert not any("decomposer was decoded" in text for text in notes)


def test_provenance_names_date_cost_processor_and_resumes(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "study", "cot", "m", 1000, seed) for seed in (0, 1)]
    for run, date in zip(runs, (1_700_000_000, 1_800_000_000), strict=True):
        results = (
            write_evaluation(run, "cot", "m", 1000, 0, 0, train_seed=None, num_problems=20) / "results.json"
        )
        os.utime(results, (date, date))
    environment = json.loads(runs[1].environment.read_text())
    runs[1].environment.write_text(json.dumps({**environment, "num_resumes": 3}))
    study = load_frames([tmp_path / "study"])
    facts = totals(study)
    assert facts["newest results.json"].startswith("2027-01-15 08:00 UTC")
    assert facts["resumed"] == "1 of 2 runs, 3 times in all"
    assert facts["evaluation, summed over runs"] == "25 s"  # 12.3 s each
    seconds = sum(
        json.loads(line).get("seconds", 0) for run in runs for line in run.metrics.read_text().splitlines()
    )
    assert facts["training, summed over runs"] == format.seconds(seconds)
    assert facts_by_run(study)[0]["processor"] == "AMD EPYC 7763"
    assert (runs[1].name, "times resumed from a checkpoint: 3") in remarks(ReportData("study", study))


def test_no_internal_words_and_one_name_per_method_on_the_page(whole_report: Path) -> None:
    text = re.sub(
        r"<style>.*?</style>|<script>.*?</script>",
        "",
        (whole_report / "index.html").read_text(),
        flags=re.DOTALL,
    )
    assert "ended before the format was complete" in text
    for word in (
        "ended_early",
        "launcher",
        "world_size",
        "Socratic unified",
        "CoT",
        "iterative, ahead",
        "answer only",
    ):
        assert word not in text.replace("the deepspeed launcher or torchrun", ""), word


def test_provenance_names_the_layout_of_examples(tmp_path: Path) -> None:
    layout = {
        "rows": "padded",
        "attention": "sdpa",
        "largest_difference": 7.3e-7,
        "tolerance": 2e-6,
        "compared_examples": 4,
        "compared_in": "fp32",
        "fallback_reason": "its logits differ",
    }
    run, older = (make_run(tmp_path / "study", "cot", "m", 1000, seed) for seed in (0, 1))
    environment = json.loads(run.environment.read_text())
    run.environment.write_text(json.dumps({**environment, "layout": layout}))
    study = load_frames([run.path, older.path])
    facts = {found["run"]: facts for found, facts in facts_by_run(study)[1]}
    assert facts[run.name]["layout of examples"] == "padded (attention sdpa)"
    assert facts[run.name]["its logits differ from the plain forward pass's by"] == (
        "7e-07 standard deviations (allowed: 2e-06; 4 examples, fp32)"
    )
    assert "layout of examples" not in facts[older.name]
    assert remarks(ReportData("study", study)) == [
        (run.name, "trained with a slower layout of examples: its logits differ")
    ]


def test_provenance_shows_a_setting_that_differs_from_the_trainings(tmp_path: Path) -> None:
    pair = make_evaluation_run(tmp_path / "study", "iterative_ahead", "m", 1000, 0)
    trained = [make_run(tmp_path / "study", "cot", "m", 1000, seed) for seed in (0, 1)]
    for run, dtype in ((pair, "bf16"), (trained[0], "fp32"), (trained[1], "fp32")):
        record = run.settings if run is pair else run.environment
        content = {**yaml.safe_load(record.read_text()), "dtype": dtype}
        record.write_text(json.dumps(content))  # JSON is YAML
    shared, own = facts_by_run(load_frames([pair.path, *(run.path for run in trained)]))
    facts = {run["run"]: facts for run, facts in own}
    assert shared["dtype"] == "fp32" and facts[pair.name]["dtype"] == "bf16"
    assert all("dtype" not in facts[run.name] for run in trained)


def test_guidance_is_part_of_the_method(tmp_path: Path) -> None:
    run = make_evaluation_run(tmp_path / "study", "iterative_ahead_operators", "m", 1000, 0)
    assert load_frames([run.path]).runs["run_method"].tolist() == ["iterative_ahead+operators"]
    path = write_evaluation(run, "iterative_ahead", "m", 1000, 0, 0, num_problems=20)
    path = path.rename(path.with_name("mine-hard-iterative_ahead_operators-gold_guidance"))
    results = json.loads((path / "results.json").read_text())
    results["decomposer"]["method"] = "decomposer_interleaved_operators"
    for guidance_from, method in (("planner", "+operators"), ("gold", "+gold operators")):
        (path / "results.json").write_text(json.dumps(results | {"guidance_from": guidance_from}))
        (row,) = to_dicts(load_frames([run.path]).evaluations)
        assert row["method"] == f"iterative_ahead{method}" and row["panel"] == "mine-hard"


def test_a_published_model_has_its_name_in_the_study(tmp_path: Path) -> None:
    run = make_evaluation_run(tmp_path / "study", "few_shot", "m", 1000, 0)
    results = write_evaluation(run, "few_shot", "gpt2", 1000, 0, 0, num_problems=20) / "results.json"
    unknown = {"method": "", "train_data": ""}  # as of a model that was not trained here
    results.write_text(json.dumps(json.loads(results.read_text()) | unknown))
    (row,) = to_dicts(load_frames([run.path]).evaluations)
    found = [row[name] for name in ("panel", "method", "parameters", "model")]
    assert found == ["stories test", "few_shot", 1000, "m"]


def test_an_incomplete_member_is_refused(tmp_path: Path) -> None:
    run = make_evaluation_run(tmp_path / "study", "iterative_ahead", "m", 1000, 0)
    write_evaluation(run, "iterative_ahead", "m", 1000, 0, 0, num_problems=20, solver={"model_name": "m"})
    with pytest.raises(
        UserError, match=r"results\.json: solver is .* expected model_name, method, num_parameters"
    ):
        load_frames([run.path])


def test_examples_are_shared_evenly_and_are_the_same_problems(whole_study: StudyDirectory) -> None:
    evaluations = load_frames([whole_study.path]).evaluations
    predictions, _ = analyse(evaluations, max_examples=280)
    shown = predictions[predictions["is_shown"]]
    ids = [set(rows["id"]) for _, rows in shown.groupby("evaluation")]
    assert len(evaluations) == len(ids) == 27 and {len(chosen) for chosen in ids} == {10}
    assert all(chosen == ids[0] for chosen in ids)
    assert predictions["text"].notna().equals(predictions["is_shown"]), "no other text is kept"
    assert not analyse(evaluations, max_examples=5)[0]["is_shown"].any()


@pytest.mark.parametrize("steps", ["none", [1], [["a", "b"]]])
def test_damaged_gold_steps_are_refused(tmp_path: Path, steps: Any) -> None:
    study = make_study(tmp_path / "study", {"m": 1000}, ("cot",), seeds=(0,), num_problems=5)
    path = study.run("stories.cot.m.s0").evaluation("stories-test-cot").predictions
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps(json.loads(first) | {"gold_steps": steps}) + "\n" + rest)
    with pytest.raises(UserError, match="line 1: gold_steps is not a list of steps"):
        build_report([study.path])
