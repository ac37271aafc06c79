"""Tests of the response log: durability, partial lines, and keys."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.teacher.responses import Response, ResponseLog, TeacherRequest, make_request

TEACHER = {"model": "m", "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "stop": []}
ANSWERS = [Response("x\n#### 1", "stop", 3, 4), Response("\ud83d", "length"), Response("", "stop", 0, 0)]


def request(prompt: str, sample: int = 0) -> TeacherRequest:
    return make_request("p", sample, prompt, TEACHER)


def open_log(folder: Path, **options: bool) -> ResponseLog:
    return ResponseLog(folder / "responses.jsonl", folder / "damaged.txt", **options)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder with a log of ANSWERS to the prompts "0", "1", "2"."""
    log = open_log(tmp_path)
    for number, answer in enumerate(ANSWERS):
        log.append(request(str(number)), "m", answer)
    log.close()
    return tmp_path


def test_written_responses_are_read(written: Path) -> None:
    log = open_log(written)
    assert [log.get(request(str(number)).key) for number in range(4)] == [*ANSWERS, None]
    assert len(log) == 3 and log.num_unused([request("0").key]) == 2
    log.close()


def test_a_key_depends_on_everything_that_decides_a_response() -> None:
    keys = {
        request("a").key,
        request("b").key,
        request("a", sample=1).key,
        *(make_request("p", 0, "a", {**TEACHER, name: 7}).key for name in TEACHER),
    }
    assert len(keys) == 3 + len(TEACHER)
    assert make_request("another problem", 0, "a", TEACHER).key == request("a").key


def test_a_log_cut_off_anywhere_loses_the_last_answer_at_most(
    written: Path, capsys: pytest.CaptureFixture
) -> None:
    file = written / "responses.jsonl"
    content = file.read_bytes()
    last_line = content.rindex(b"\n", 0, len(content) - 1) + 1
    for length in range(last_line, len(content)):
        file.write_bytes(content[:length])
        (written / "damaged.txt").unlink(missing_ok=True)
        log = open_log(written)
        assert [log.get(request(str(number)).key) for number in range(3)] == [*ANSWERS[:2], None]
        log.append(request("2"), "m", ANSWERS[2])
        log.close()
        assert file.read_bytes() == content
        if length > last_line:
            assert (written / "damaged.txt").read_bytes() == content[last_line:length] + b"\n"
            assert "half written" in capsys.readouterr().out


def test_reading_changes_nothing(written: Path) -> None:
    file = written / "responses.jsonl"
    file.write_bytes(file.read_bytes()[:-3])
    before = file.read_bytes()
    assert len(open_log(written, read_only=True)) == 2
    assert file.read_bytes() == before and not (written / "damaged.txt").exists()
    assert not (written / "other").exists() and len(open_log(written / "other", read_only=True)) == 0
    assert not (written / "other").exists()


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"key": "x"}', b"\xff\xfe", b'{"key": 1, "text": 2}', b"null"]
)
def test_an_unreadable_line_costs_one_response(
    written: Path, line: bytes, capsys: pytest.CaptureFixture
) -> None:
    file = written / "responses.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], line + b"\n", *lines[1:]]))
    log = open_log(written)
    log.close()
    assert len(log) == 3 and log.num_unreadable == 1
    assert "1 lines are no responses" in capsys.readouterr().out
    assert line in file.read_bytes()


def test_the_first_response_counts(written: Path) -> None:
    file = written / "responses.jsonl"
    other = json.loads(file.read_text().splitlines()[0]) | {"text": "other"}
    file.write_text(file.read_text() + json.dumps(other) + "\n")
    log = open_log(written)
    log.close()
    assert log.get(request("0").key) == ANSWERS[0]


def test_a_log_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").mkdir()
    with pytest.raises(UserError, match="cannot use"):
        open_log(tmp_path)


@pytest.mark.parametrize("room", [0, 10])
def test_a_full_disk(written: Path, room: int, capsys: pytest.CaptureFixture) -> None:
    """The file may grow by `room` bytes only: the response is not in the log and can be requested again."""
    log = open_log(written)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((written / "responses.jsonl").stat().st_size + room, hard))
    try:
        with pytest.raises(UserError, match="cannot write"):
            log.append(request("3"), "m", ANSWERS[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.get(request("3").key) is None
    log.close()
    again = open_log(written)
    again.close()
    assert len(again) == 3 and again.num_unreadable == 0
    assert ("half written" in capsys.readouterr().out) is bool(room)
