"""Tests of endpoint faults: responses are kept, retries are bounded, and no response is requested twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.distributed import REPOSITORY
from tests.teacher.scripted_endpoint import Reply, chat, serving
from tests.teacher.test_annotate import lines, result_of, settings, summary_of
from trainer.errors import UserError
from trainer.problems.problem import Problem
from trainer.runtime.exit_codes import EXIT_INTERRUPTED
from trainer.runtime.process_group import free_port
from trainer.runtime.terminal import INTERRUPTED
from trainer.storage.run_directory import AnnotationDirectory
from trainer.teacher.annotate import annotate
from trainer.teacher.prompts import solution_text

Solved = dict[str, Problem]
KEY = "sk-this-is-secret"

TRANSIENT = {
    "429": Reply({"error": {"message": "slow down"}}, status=429),
    "429 with Retry-After": Reply({}, status=429, headers={"retry-after": "0.05"}),
    "500": Reply({"error": {"message": "oops"}}, status=500),
    "502 in HTML": Reply(b"<html>Bad gateway</html>", status=502),
    "too slow": Reply({}, seconds=3.0),
    "no JSON": Reply(b"{not json"),
    "no bytes": Reply(b""),
    "not UTF-8": Reply(b"\xff\xfe"),
    "a list": Reply([]),
    "no choices": Reply({"choices": []}),
    "null choices": Reply({"id": "x"}),
    "no message": Reply({"choices": [{"message": None}]}),
    "no text": Reply({"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}),
}


def correct(solved: Solved, question: str) -> Reply:
    return chat(solution_text(solved[question], "socratic"))


def responses(data_file: Path) -> list[dict]:
    path = AnnotationDirectory(data_file.parent / "out").responses
    return lines(path) if path.exists() else []


@pytest.mark.parametrize("fault", TRANSIENT)
def test_transient_faults_are_retried(data_file: Path, solved_problems: Solved, fault: str) -> None:
    def script(question: str, attempt: int, prompt: str) -> Reply:
        return TRANSIENT[fault] if attempt < 3 else correct(solved_problems, question)

    with serving(script) as endpoint:
        annotate(settings(data_file, endpoint.url, timeout_seconds=1.0, concurrency=12))
        assert set(Counter(endpoint.prompts).values()) == {3}
    assert summary_of(data_file)["samples"] == {"kept": 12, "rejected": 0}
    assert len(responses(data_file)) == 12


def test_retry_after_delays_all_requests(data_file: Path, solved_problems: Solved) -> None:
    def script(question: str, attempt: int, prompt: str) -> Reply:
        if attempt == 1 and question == next(iter(solved_problems)):
            return Reply({}, status=429, headers={"retry-after": "1.5"})
        return correct(solved_problems, question)

    with serving(script) as endpoint:
        annotate(settings(data_file, endpoint.url, concurrency=1))
        first, second, *_ = endpoint.arrivals
        assert endpoint.prompts[0] == endpoint.prompts[1]
    assert second - first >= 1.5


def test_one_request_that_is_never_answered(
    data_file: Path, solved_problems: Solved, capsys: pytest.CaptureFixture
) -> None:
    """No result is published without the flag; the next run sends the missing request only."""
    broken = [list(solved_problems)[3]]

    def script(question: str, attempt: int, prompt: str) -> Reply:
        if question in broken:
            return Reply({"error": {"message": "too long a context"}}, status=400)
        return correct(solved_problems, question)

    with serving(script) as endpoint:
        with pytest.raises(UserError, match=r"1 problems.*too long a context.*--allow_unanswered"):
            annotate(settings(data_file, endpoint.url))
        assert len(responses(data_file)) == 11 and not result_of(data_file).exists()
        assert len(endpoint.prompts) == 12

        annotate(settings(data_file, endpoint.url, allow_unanswered=True))
        assert len(endpoint.prompts) == 13
        assert summary_of(data_file)["rejected_by_reason"] == {"unanswered": 1}
        assert len(lines(result_of(data_file) / "unannotated.jsonl")) == 1

        broken.clear()
        annotate(settings(data_file, endpoint.url))  # a result with a gap is incomplete
        assert len(endpoint.prompts) == 14
    assert summary_of(data_file)["samples"] == {"kept": 12, "rejected": 0}


def test_an_endpoint_that_goes_down_ends_the_run(data_file: Path, solved_problems: Solved) -> None:
    down = [True]

    def script(question: str, attempt: int, prompt: str) -> Reply:
        index = list(solved_problems).index(question)
        if down and index >= 4:
            return Reply({"error": {"message": "out of memory"}}, status=503)
        return correct(solved_problems, question)

    with serving(script) as endpoint:
        with pytest.raises(UserError, match=r"none of 5 requests in a row.*out of memory.*4 answers"):
            annotate(settings(data_file, endpoint.url, concurrency=1, max_attempts=2))
        assert len(endpoint.prompts) == 4 + 5 * 2
        down.clear()
        annotate(settings(data_file, endpoint.url))
        assert len(endpoint.prompts) == 4 + 5 * 2 + 8
    assert summary_of(data_file)["samples"]["kept"] == 12


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "invalid_api_key", "OPENAI_API_KEY"),
        (403, "forbidden", "OPENAI_API_KEY"),
        (404, "model_not_found", "check base_url"),
        (429, "insufficient_quota", "insufficient_quota"),
    ],
)
def test_permanent_errors_are_not_retried_and_lose_nothing(
    data_file: Path,
    solved_problems: Solved,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    message: str,
) -> None:
    """Requests in flight are awaited. The key is in the request only."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    refused = list(solved_problems)[3]

    def script(question: str, attempt: int, prompt: str) -> Reply:
        if question == refused:
            return Reply({"error": {"message": f"not with {KEY}", "code": code}}, status=status)
        reply = correct(solved_problems, question)
        reply.seconds = 1.0
        return reply

    with serving(script) as endpoint:
        with pytest.raises(UserError, match=message) as fault:
            annotate(settings(data_file, endpoint.url, concurrency=4))
        assert len(endpoint.prompts) == 4
        assert endpoint.authorizations == {f"Bearer {KEY}"}
    assert len(responses(data_file)) == 3
    assert KEY not in str(fault.value)
    files = [path for path in data_file.parent.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in path.read_bytes() for path in files)


@pytest.mark.parametrize("key", ["sk-ü", "sk-\nx"])
def test_an_invalid_key_is_not_printed(data_file: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters") as fault:
        annotate(settings(data_file, "http://127.0.0.1:1/v1"))
    assert key not in str(fault.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "no.such.host.invalid"])
def test_no_server(data_file: Path, host: str) -> None:
    with pytest.raises(UserError, match=r"no endpoint at .*start the server, or correct base_url"):
        annotate(settings(data_file, f"http://{host}:{free_port()}/v1"))
    assert not responses(data_file) and not result_of(data_file).exists()


def test_ctrl_c_ends_a_run_with_one_line(data_file: Path, solved_problems: Solved) -> None:
    def script(question: str, attempt: int, prompt: str) -> Reply:
        reply = correct(solved_problems, question)
        reply.seconds = 0.5
        return reply

    with serving(script) as endpoint:
        command = [sys.executable, "tools/annotate.py", "--data", "jsonl", "--data_path", str(data_file)]
        command += ["--split", "mine", "--output_dir", str(data_file.parent / "out"), "--concurrency", "2"]
        command += ["--base_url", endpoint.url, "--model", "m"]
        environment = {**os.environ, "OPENAI_API_KEY": KEY}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 120
        while len(_whole_lines(data_file)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.splitlines()[1:]) == (EXIT_INTERRUPTED, [INTERRUPTED])
    assert 2 <= len(_whole_lines(data_file)) < 12


def test_a_killed_run_requests_no_response_twice(data_file: Path, solved_problems: Solved) -> None:
    def script(question: str, attempt: int, prompt: str) -> Reply:
        reply = correct(solved_problems, question)
        reply.seconds = 0.2
        return reply

    with serving(script) as endpoint:
        command = [sys.executable, "tools/annotate.py", "--data", "jsonl", "--data_path", str(data_file)]
        command += ["--split", "mine", "--output_dir", str(data_file.parent / "out"), "--concurrency", "2"]
        command += ["--base_url", endpoint.url, "--model", "m"]
        environment = {**os.environ, "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
        deadline = time.monotonic() + 120
        while len(_whole_lines(data_file)) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(UserError, match=f"host {socket.gethostname()}, pid {process.pid}"):
            annotate(settings(data_file, endpoint.url))
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = _whole_lines(data_file)
        with open(AnnotationDirectory(data_file.parent / "out").responses, "ab") as file:
            file.write(b'{"key": "half')
        id_of = {problem.question: problem.id for problem in solved_problems.values()}
        answered = {record["problem"] for record in before}
        num_before = len(endpoint.prompts)
        assert 4 <= len(before) < 12

        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "half written" in done.stdout and "took over" in done.stdout
        sent_again = {id_of[question_of(prompt)] for prompt in endpoint.prompts[num_before:]}
        assert len(endpoint.prompts) - num_before == len(sent_again) == 12 - len(before)
        assert not sent_again & answered
    assert summary_of(data_file)["samples"] == {"kept": 12, "rejected": 0}
    files = [path for path in data_file.parent.rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def question_of(prompt: str) -> str:
    return prompt.rpartition("Problem: ")[2].partition("\n")[0]


def _whole_lines(data_file: Path) -> list[dict]:
    path = AnnotationDirectory(data_file.parent / "out").responses
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]]
