"""The published data sets: counts, and properties of every problem."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter

import pytest

from trainer.problems import answers, calculator, jsonl, svamp
from trainer.problems.problem import Problem, RecordError, RejectedRecord, Step, one_line
from trainer.problems.sources import read_problems


def _read(shared_data, data, split, **options):
    return list(read_problems(data, split, str(shared_data / data), **options))


@pytest.mark.parametrize(
    ("data", "split", "num_problems", "num_steps"),
    [
        ("gsm8k", "train", 7473, 26720),
        ("gsm8k", "test", 1319, 4819),
        ("gsm8k", "test_socratic", 1319, 4819),
        ("svamp", "train", 700, 700),
        ("svamp", "test", 299, 299),
        ("svamp", "all", 999, 999),
        ("strategyqa", "train", 2061, 6046),
        ("strategyqa", "dev", 229, 674),
    ],
)
def test_counts_and_unique_ids(shared_data, data, split, num_problems, num_steps):
    problems = [item for item in _read(shared_data, data, split) if isinstance(item, Problem)]
    assert len(problems) == len({problem.id for problem in problems}) == num_problems
    assert sum(len(problem.steps) for problem in problems) == num_steps


def test_gsm8k_socratic_and_plain_files_hold_the_same_problems(shared_data):
    plain, socratic = (_read(shared_data, "gsm8k", split) for split in ("test", "test_socratic"))
    for one, other in zip(plain, socratic, strict=True):
        assert (one.id, one.question, one.answer) == (other.id, other.question, other.answer)
        assert [step.solution for step in one.steps] == [step.solution for step in other.steps]
        assert all(step.question for step in other.steps) and not any(step.question for step in one.steps)
    assert plain[12].id == "gsm8k-test-000012"
    assert socratic[0].steps[1] == Step(
        "How much does Janet make at the farmers' market?",
        "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer’s market.",
    )


def test_gsm8k_keeps_every_character_but_white_space_and_commas_of_answers(shared_data):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for line, problem in zip(lines, _read(shared_data, "gsm8k", "train"), strict=True):
        record = json.loads(line)
        body, _, answer = record["answer"].rpartition("####")
        assert one_line(body) == " ".join(step.solution for step in problem.steps)
        assert problem.question == record["question"].strip()
        assert problem.answer == answer.strip().replace(",", "") and re.fullmatch("-?[0-9]+", problem.answer)


def _tokens(expression):
    """Return numbers and operators in order, without parentheses."""
    found = re.findall(r"[-+*/]|[0-9.]+", expression)
    return [token if token in "+-*/" else float(token) for token in found]


def test_svamp_problems_are_their_equations(shared_data):
    records = {
        record["ID"]: record for record in json.loads((shared_data / "svamp" / "SVAMP.json").read_bytes())
    }
    problems = [item for item in _read(shared_data, "svamp", "all") if isinstance(item, Problem)]
    for problem in problems:
        record = records[problem.id]
        assert float(problem.answer) == record["Answer"] and "." not in problem.answer
        assert problem.question == one_line(record["Body"]) + " " + one_line(record["Question"])
        ((_, is_text), (result, is_result), (end, _)) = calculator.split_annotations(
            problem.steps[0].solution
        )
        assert (is_text, is_result, result, end) == (False, True, f"{problem.answer}>>", problem.answer)
        equation = problem.steps[0].solution.partition(" = ")[0]
        assert _tokens(equation) == _tokens(record["Equation"])
    solutions = {problem.id: problem.steps[0].solution for problem in problems}
    assert solutions["chal-1"] == "76 - 25 = <<76-25=51>>51"
    assert solutions["chal-555"] == "8 = <<8=8>>8"
    nested = next(problem.id for problem in problems if records[problem.id]["Equation"].startswith("( ( "))
    assert re.fullmatch(r"\(\d+ [-+*/] \d+\) [-+*/] \d+ = <<.*", solutions[nested])


def test_svamp_rejects_the_contradictory_record(shared_data):
    rejects = [item for item in _read(shared_data, "svamp", "all") if isinstance(item, RejectedRecord)]
    assert [(r.reason, r.line, r.detail) for r in rejects] == [
        ("answer_mismatch", 5434, "the equation (4-2)+3 gives 5, the answer is 1")
    ]
    lines = (shared_data / "svamp" / "SVAMP.json").read_text().splitlines()
    assert lines[5434 - 1].strip() == "{" and '"chal-680"' in lines[5434]


def test_svamp_split_is_a_pinned_function_of_seed_and_id(shared_data):
    ids = [f"chal-{number}" for number in range(1, 1001)]
    test_ids = [id for id in ids if svamp.split_of(id) == "test"]
    assert len(test_ids) == 300 and test_ids[:5] == ["chal-1", "chal-7", "chal-8", "chal-10", "chal-12"]
    assert hashlib.sha256("\n".join(test_ids).encode()).hexdigest().startswith("432b7e737130bdd4")
    assert [p.id for p in _read(shared_data, "svamp", "test") if isinstance(p, Problem)] == [
        id for id in test_ids if id != "chal-680"
    ]
    other = {id for id in ids if svamp.split_of(id, seed=1) == "test"}
    assert len(other) == 300 and 50 < len(other & set(test_ids)) < 130  # two independent draws share about 90
    for id in ("chal-0", "chal-1001", "chal-01", "x", "chal-1\n"):
        with pytest.raises(RecordError, match="bad_id"):
            svamp.split_of(id)


def test_svamp_with_another_seed_divides_the_same_problems(shared_data):
    splits = [_read(shared_data, "svamp", split, seed=7) for split in ("train", "test")]
    ids = [{item.id for item in items if isinstance(item, Problem)} for items in splits]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 999


def test_strategyqa_answers_facts_and_references(shared_data):
    problems = _read(shared_data, "strategyqa", "train")
    assert Counter(problem.answer for problem in problems) == {"no": 1097, "yes": 964}
    assert all(answers.answer_type(problem.answer) == "yes_no" and problem.facts for problem in problems)
    assert not any(step.solution for problem in problems for step in problem.steps)
    assert problems[0].id == "2bc9c4f9c19c167187f2"
    assert problems[0].steps[2] == Step("Is #2 greater than #1?")
    assert problems[0].facts[:2] == (
        "Julius Caesar had three children.",
        "Genghis Khan had sixteen children.",
    )
    assert sum("#1" in step.question for problem in problems for step in problem.steps) > 2000


@pytest.mark.parametrize("rule", answers.ANSWER_RULES)
def test_the_gold_answer_is_right_on_every_data_set(shared_data, rule):
    for data, split in (("gsm8k", "train"), ("svamp", "all"), ("strategyqa", "train")):
        for problem in _read(shared_data, data, split):
            if isinstance(problem, Problem):
                text = f"{problem.question}\n#### {problem.answer}"
                answer = answers.extract_answer(text, rule, answers.answer_type(problem.answer))
                assert answers.answers_match(answer, problem.answer), problem
                wrong = {"yes": "no", "no": "yes"}.get(problem.answer, problem.answer + "1")
                assert not answers.answers_match(answer, wrong)


@pytest.mark.parametrize(
    "data_and_split", [("gsm8k", "test_socratic"), ("svamp", "test"), ("strategyqa", "dev")]
)
def test_jsonl_round_trip_of_every_published_problem(shared_data, tmp_path, data_and_split):
    problems = [item for item in _read(shared_data, *data_and_split) if isinstance(item, Problem)]
    with (tmp_path / "mine.jsonl").open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(
                json.dumps(jsonl.record_from_problem(problem, meta={"from": "a test"}), ensure_ascii=False)
                + "\n"
            )
    assert list(read_problems("jsonl", "mine", str(tmp_path))) == problems
