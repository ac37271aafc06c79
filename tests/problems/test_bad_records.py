"""Invalid records are rejected one by one, with reason and line."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from trainer.errors import UserError
from trainer.problems.problem import REJECTION_REASONS, Problem, RejectedRecord
from trainer.problems.records import MAX_RECORD_BYTES
from trainer.problems.sources import read_problems

GOOD = {"question": "What is 1+1?", "answer": "1+1 = <<1+1=2>>2\n#### 2"}


def _bytes(**changes):
    record = {key: value for key, value in {**GOOD, **changes}.items() if value is not ...}
    return json.dumps(record).encode()


BAD_LINES = [
    (b'{"question": "caf\xe9?", "answer": "#### 2"}', "not_utf8"),
    (b'{"question": "half \\ud83d?", "answer": "#### 2"}', "not_utf8"),
    (b'{"question": "broken', "not_json"),
    (b"not json at all", "not_json"),
    (b'{"question": "q", "answer": NaN}', "not_json"),
    (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "not_json"),
    (b"[" * 100_000, "not_json"),
    (b'{"a": 1} {"b": 2}', "not_json"),
    (b'["question", "answer"]', "not_an_object"),
    (b"null", "not_an_object"),
    (b'{"question": "' + b"x" * MAX_RECORD_BYTES + b'", "answer": "#### 2"}', "too_long"),
    (b"\0\0\0\0", "nul_character"),
    (b'{"question": "raw \0 NUL", "answer": "#### 2"}', "nul_character"),
    (_bytes(question="escaped \0 NUL"), "nul_character"),
    (_bytes(answer="a\0b\n#### 2"), "nul_character"),
    (_bytes(question=...), "no_question"),
    (_bytes(question=" \n "), "no_question"),
    (_bytes(question=None), "no_question"),
    (_bytes(question=["q"]), "wrong_type"),
    (_bytes(answer=...), "no_answer"),
    (_bytes(answer=""), "no_answer"),
    (_bytes(answer="1+1 = 2\n#### "), "no_answer"),
    (_bytes(answer=2), "wrong_type"),
    (_bytes(answer="1+1 = 2"), "no_delimiter"),
    (_bytes(answer="1+1 = 2\n#### two"), "bad_answer"),
    (_bytes(answer="#### 2\nand more\n#### 2"), "bad_step"),
    (_bytes(answer="How many? ** 1+1 = 2\nno sub-question here\n#### 2"), "bad_step"),
]


def test_every_bad_line_rejects_one_record(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [_bytes(question="first?")]
    for bad, _ in BAD_LINES:
        lines += [bad, _bytes(question=f"good one after line {len(lines) + 1}?")]
    path.write_bytes(b"\n".join(lines))  # no newline at the end of the file
    items = list(read_problems("gsm8k", "train", str(path)))
    rejects = [item for item in items if isinstance(item, RejectedRecord)]
    assert [(r.line, r.reason) for r in rejects] == [
        (2 * n + 2, reason) for n, (_, reason) in enumerate(BAD_LINES)
    ]
    assert len(items) - len(rejects) == len(BAD_LINES) + 1
    for reject, (bad, _) in zip(rejects, BAD_LINES, strict=True):
        assert reject.source == str(path) and reject.detail and len(reject.text) <= 200
        assert reject.text[:10] == bad[:10].decode()
    good = [item for item in items if isinstance(item, Problem)]
    assert good[1].id == "gsm8k-train-000002", "ids count records, so a bad one does not shift the others"


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_ignored(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + _bytes() + b"\r\n\r\n  \n" + _bytes(answer="no delimiter") + b"\r\n\n")
    problem, reject = read_problems("gsm8k", "train", str(path))
    assert problem.id == "gsm8k-train-000000" and (reject.line, reject.reason) == (4, "no_delimiter")


def test_a_very_long_line_is_not_kept_in_memory(tmp_path):
    path = tmp_path / "mine.jsonl"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"x" * MAX_RECORD_BYTES)
        file.write(b"\n" + _bytes() + b"\n")
    tracemalloc.start()
    reject, problem = read_problems("gsm8k", "train", str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (reject.reason, reject.line, problem.id) == ("too_long", 1, "gsm8k-train-000001")
    assert peak < 8 * MAX_RECORD_BYTES


def test_a_repeated_id_names_the_first_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    records = [{"id": id, "question": "q?", "answer": 1} for id in ("a", "b", 7, "a", "7", "c")]
    path.write_text("\n".join(map(json.dumps, records)))
    items = list(read_problems("jsonl", "train", str(path)))
    assert [item.id if isinstance(item, Problem) else item.reason for item in items] == [
        *("a", "b", "7", "repeated_id", "repeated_id", "c")
    ]
    assert (items[3].line, items[3].detail) == (4, "'a' is the id of line 1 too")
    assert (items[4].line, items[4].detail) == (5, "'7' is the id of line 3 too")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"step": []}, "unknown_key"),
        ({"steps": "one"}, "wrong_type"),
        ({"steps": ["one"]}, "wrong_type"),
        ({"steps": [{"question": "q", "answer": "a"}]}, "unknown_key"),
        ({"steps": [{"question": 1}]}, "wrong_type"),
        ({"steps": [{"question": " ", "solution": ""}]}, "bad_step"),
        ({"steps": [{"solution": "so #### 5"}]}, "bad_step"),
        ({"facts": "one"}, "wrong_type"),
        ({"facts": [" "]}, "bad_fact"),
        ({"id": ""}, "bad_id"),
        ({"id": 1.5}, "wrong_type"),
        ({"id": "x" * 201}, "bad_id"),
        ({"answer": []}, "wrong_type"),
        ({"answer": "1\n####"}, "bad_answer"),
        ({"answer": None}, "no_answer"),
    ],
)
def test_jsonl_records_are_checked(tmp_path, change, reason):
    path = tmp_path / "mine.jsonl"
    good = {"question": "q?", "answer": 1}
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, **change}))
    _, reject = read_problems("jsonl", "train", str(path))
    assert (reject.line, reject.reason) == (2, reason)


def test_jsonl_answers_become_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    written = [
        "12",
        "-3",
        "0.50",
        "18.00",
        "1e2",
        "true",
        "false",
        '"1,080"',
        '"  Paris  "',
        '"$1,000"',
        '"a,b"',
    ]
    path.write_text("\n".join(f'{{"question": "q?", "answer": {answer}}}' for answer in written))
    answers = [problem.answer for problem in read_problems("jsonl", "train", str(path))]
    assert answers == ["12", "-3", "0.5", "18", "100", "yes", "no", "1080", "Paris", "$1000", "a,b"]
    path.write_text('{"question": "q?", "answer": 1}\n{"question": "q?", "answer": 1e999999999}')
    assert list(read_problems("jsonl", "train", str(path)))[1].reason == "bad_answer"


def _svamp_record(number):
    return {
        "ID": f"chal-{number}",
        "Body": "b",
        "Question": "q?",
        "Equation": "( 1.0 + 1.0 )",
        "Answer": 2.0,
        "Type": "",
    }


def test_a_bad_element_of_an_array_rejects_one_record(tmp_path):
    path = tmp_path / "SVAMP.json"
    text = json.dumps([_svamp_record(number) for number in range(1, 9)], indent=4)
    content = text.encode()
    content = content.replace(b'"chal-2",\n        "Body": "b"', b'"chal-2",\n        "Body": "\xff"')
    content = content.replace(b'"chal-4",', b'"chal-4"')  # a missing comma
    content = content.replace(b'"chal-6"', b'"chal-x"').replace(b'"chal-7"', b'"chal-1"')
    path.write_bytes(content)
    items = list(read_problems("svamp", "all", str(path)))
    assert [item.id if isinstance(item, Problem) else item.reason for item in items] == [
        *("chal-1", "not_utf8", "chal-3", "not_json", "chal-5", "bad_id", "repeated_id", "chal-8")
    ]
    lines = text.splitlines()
    for item, number in zip(items, range(1, 9), strict=True):
        if isinstance(item, RejectedRecord):
            assert lines[item.line].strip() == f'"ID": "chal-{number}",'
    assert "line 2 " in items[6].detail
    for split in ("train", "test"):  # records without a valid id are reported in every split
        reasons = [
            r.reason for r in read_problems("svamp", split, str(path)) if isinstance(r, RejectedRecord)
        ]
        assert {"not_utf8", "not_json", "bad_id"} <= set(reasons)


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
def test_a_truncated_array_is_reported(tmp_path, cut):
    path = tmp_path / "SVAMP.json"
    content = json.dumps([_svamp_record(number) for number in range(1, 9)], indent=4)
    path.write_text(content[: int(len(content) * cut)])
    items = list(read_problems("svamp", "all", str(path)))
    assert items[-1].reason == "not_json" and all(isinstance(item, Problem) for item in items[:-1])
    path.write_text(content.rstrip("]\n ") + ",\n")
    *problems, last = read_problems("svamp", "all", str(path))
    assert len(problems) == 8 and last.detail == "the file ends inside its array"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Equation": "( 1.0 + x )"}, "bad_step"),
        ({"Equation": "( 1.0 / 0.0 )"}, "bad_step"),
        ({"Equation": "( 1.0 + 2.0 )"}, "answer_mismatch"),
        ({"Answer": "two"}, "answer_mismatch"),
        ({"Answer": None}, "no_answer"),
        ({"Question": ""}, "no_question"),
        ({"ID": 12}, "wrong_type"),
    ],
)
def test_svamp_records_are_checked(tmp_path, change, reason):
    path = tmp_path / "SVAMP.json"
    path.write_text(json.dumps([_svamp_record(1), {**_svamp_record(2), **change}], indent=1))
    _, reject = read_problems("svamp", "all", str(path))
    assert reject.reason == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": None}, "no_answer"),
        ({"answer": "yes"}, "wrong_type"),
        ({"decomposition": "what?"}, "wrong_type"),
        ({"decomposition": [""]}, "bad_step"),
        ({"facts": [1]}, "wrong_type"),
        ({"qid": ""}, "bad_id"),
    ],
)
def test_strategyqa_records_are_checked(tmp_path, change, reason):
    path = tmp_path / "train.json"
    good = {"qid": "a", "question": "q?", "answer": True, "facts": "One text.", "decomposition": None}
    path.write_text(json.dumps([good, {**good, "qid": "b", **change}]))
    problem, reject = read_problems("strategyqa", "train", str(path))
    assert (problem.facts, problem.steps, reject.reason) == (("One text.",), (), reason)


def test_a_file_without_a_valid_problem_is_a_user_error(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "something else"}\n{"text": "more"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl.*line 1: no_question.*Is it gsm8k data"):
        list(read_problems("gsm8k", "train", str(path)))
    path.write_text("\n\n")
    with pytest.raises(UserError, match=r"train\.jsonl.*empty"):
        list(read_problems("gsm8k", "train", str(path)))


def test_every_reason_is_explained():
    assert {reason for _, reason in BAD_LINES} <= set(REJECTION_REASONS) and all(REJECTION_REASONS.values())
