"""HTTP server with the API of OpenAI that replies from a script with correct chains or faults.

To try the tool by hand: python tests/teacher/scripted_endpoint.py --data svamp --data_path FOLDER --port 8123
"""

from __future__ import annotations

import argparse
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trainer.problems.problem import Problem
from trainer.problems.sources import read_problems


@dataclass
class Reply:
    """One HTTP response; a `body` of bytes is sent unchanged, anything else as JSON."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # delay


def chat(text: str | None, finish_reason: str = "stop", **usage: int) -> Reply:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = usage or {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return Reply({"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage})


class ScriptedEndpoint:
    """`script(question, attempt, prompt)` -> Reply; attempt counts the requests with the same prompt, from 1."""

    def __init__(self, script: Callable[[str, int, str], Reply], port: int = 0) -> None:
        self.script = script
        self.prompts: list[str] = []  # of every request, in the order of arrival
        self.authorizations: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.arrivals: list[float] = []
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self._send(Reply({"object": "list", "data": [{"id": "m", "object": "model"}]}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
                with endpoint._lock:
                    endpoint.prompts.append(prompt)
                    endpoint.bodies.append(body)
                    endpoint.arrivals.append(time.monotonic())
                    endpoint.authorizations.add(self.headers.get("authorization", ""))
                    attempt = Counter(endpoint.prompts)[prompt]
                question = prompt.rpartition("Problem: ")[2].partition("\n")[0]
                self._send(endpoint.script(question, attempt, prompt))

            def _send(self, reply: Reply) -> None:
                time.sleep(reply.seconds)
                content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                try:
                    self.send_response(reply.status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(content)))
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client did not wait
                    self.close_connection = True

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(script: Callable[[str, int, str], Reply]) -> Iterator[ScriptedEndpoint]:
    endpoint = ScriptedEndpoint(script)
    try:
        yield endpoint
    finally:
        endpoint.close()


def solved(problem: Problem) -> str:
    """Return a correct Socratic chain: the problem's own solutions, or one line with the answer."""
    solutions = [step.solution for step in problem.steps if step.solution] or [f"So it is {problem.answer}."]
    lines = [line for solution in solutions for line in ("What comes next?", solution)]
    return "\n".join([*lines, f"#### {problem.answer}"])


def main() -> None:
    """Answer most questions of a data set correctly, and every fifth wrongly, until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="svamp")
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--seconds", type=float, default=0.05, help="delay of a response")
    flags = parser.parse_args()
    records = read_problems(flags.data, flags.split, flags.data_path)
    problems = {p.question: p for p in records if isinstance(p, Problem)}

    def script(question: str, attempt: int, prompt: str) -> Reply:
        problem = problems.get(question)
        draw = hashlib.sha256(f"{question} {attempt}".encode()).digest()[0] % 20
        if problem is None:
            return Reply({"error": {"message": "unknown problem"}}, status=400)
        if draw == 0:
            return Reply({"error": {"message": "slow down"}}, status=429, headers={"retry-after": "0.2"})
        if draw == 1:
            return Reply(b"<html>Bad gateway</html>", status=502)
        text = solved(problem)
        if draw in (2, 3):
            text = text.rpartition("####")[0] + "#### 7"
        if draw == 4:
            text = "Let me think about this."
        reply = chat(
            text, "length" if draw == 5 else "stop", prompt_tokens=len(prompt) // 4, completion_tokens=60
        )
        reply.seconds = flags.seconds
        return reply

    endpoint = ScriptedEndpoint(script, flags.port)
    print(f"serving {len(problems)} problems at {endpoint.url}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
