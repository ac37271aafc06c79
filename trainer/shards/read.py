"""Open a shard directory: memory maps, nothing parsed, milliseconds for a million examples.

Files (all little-endian, without headers; counts are in the manifest):

    tokens.bin       uint16 or uint32 [num_tokens]    all segments of all problems, one after another
    roles.bin        uint8  [num_segments]            role of every segment
    ends.bin         uint64 [num_segments]            where a segment ends in tokens.bin (it starts where the last ended)
    segments.bin     uint64 [num_problems + 1]        first segment of every problem, and the total
    problems.jsonl   one problem a line: text, steps, gold answer, id
    lines.bin        uint64 [num_problems + 1]        where a line of problems.jsonl starts, and the total
    rejects.jsonl    records that were set aside: source, line, reason
    tokenizer/       the tokenizer itself
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from trainer import commit
from trainer.errors import UserError
from trainer.problems.problem import Problem, Step
from trainer.shards.methods import Method, Role

KIND = "shards"
TOKENIZER = "tokenizer"
PROBLEMS = "problems.jsonl"
REJECTS = "rejects.jsonl"


class Shards:
    """Random access to the examples of one shard directory. Problems are numbered 0..len-1 in source order."""

    def __init__(self, path: Path, manifest: dict[str, Any], fingerprint: str):
        self.path = path
        self.manifest = manifest
        self.facts: dict[str, Any] = manifest["facts"]
        self.fingerprint = fingerprint  # digest of the manifest, hence of every byte
        self.tokens = self._map("tokens.bin", self.facts["token_dtype"], self.facts["num_tokens"])
        self.roles = self._map("roles.bin", "uint8", self.facts["num_segments"])
        self._ends = self._map("ends.bin", "uint64", self.facts["num_segments"])
        self._first_segment = self._map("segments.bin", "uint64", len(self) + 1)
        self._line = self._map("lines.bin", "uint64", len(self) + 1)

    @classmethod
    def open(cls, directory: str | Path, verify: bool = False) -> Shards:
        """Open finished shards. With `verify` every byte is compared with its digest, else only sizes are.

        Raises UserError if the directory is unfinished, damaged, or not shards.
        """
        path = Path(directory)
        manifest = commit.read_manifest(path, KIND)
        if verify:
            commit.verify(path)
        else:
            commit.verify_sizes(path, manifest["files"], manifest["files"])
        return cls(path, manifest, commit.manifest_digest(path))

    def __len__(self) -> int:
        return self.facts["num_problems"]

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    def problem(self, index: int) -> Problem:
        """The problem's text and gold answer."""
        with open(self.path / PROBLEMS, "rb") as file:
            file.seek(int(self._line[index]))
            record = json.loads(file.read(int(self._line[index + 1]) - int(self._line[index])))
        steps = tuple(Step(step["question"], step["solution"]) for step in record["steps"])
        return Problem(record["id"], record["question"], record["answer"], steps, tuple(record["facts"]))

    def segments(self, index: int) -> list[tuple[Role, np.ndarray]]:
        """(role, tokens [n]) of every segment of a problem, in order."""
        first, last = int(self._first_segment[index]), int(self._first_segment[index + 1])
        starts = self._starts(first, last)
        ends = self._ends[first:last]
        return [
            (Role(int(self.roles[segment])), self.tokens[int(start) : int(end)])
            for segment, start, end in zip(range(first, last), starts, ends, strict=True)
        ]

    def segment_tokens(self, index: int, role: Role) -> np.ndarray:
        """Tokens of all segments of one role, joined; empty if the problem has none."""
        found = [tokens for found_role, tokens in self.segments(index) if found_role == role]
        return np.concatenate(found) if found else self.tokens[:0]

    def prompt(self, index: int) -> np.ndarray:
        """Tokens a student is given: the problem segment."""
        first = int(self._first_segment[index])
        start = int(self._ends[first - 1]) if first else 0
        return self.tokens[start : int(self._ends[first])]

    def example(self, index: int, method: Method) -> tuple[np.ndarray, np.ndarray]:
        """A method's view of a problem: tokens [n] (int64) and learned [n] (bool; True: this token is a target)."""
        parts = [
            (tokens, role in method.learns) for role, tokens in self.segments(index) if role in method.reads
        ]
        tokens = np.concatenate([part for part, _ in parts]).astype(np.int64)
        learned = np.concatenate([np.full(len(part), is_learned) for part, is_learned in parts])
        return tokens, learned

    def lengths(self, method: Method) -> np.ndarray:
        """Tokens of every problem in a method's view [num_problems] (int64); 0 where the problem lacks what it needs."""
        bounds = self._first_segment.astype(np.int64)
        segment_lengths = np.diff(self._ends.astype(np.int64), prepend=0)
        lengths = np.add.reduceat(segment_lengths * self._has(method.reads), bounds[:-1])
        for role in method.needs:
            lengths[np.add.reduceat(self._has({role}), bounds[:-1]) == 0] = 0
        return lengths

    def learned_lengths(self, method: Method) -> np.ndarray:
        """Tokens that carry loss in every problem of a method's view [num_problems] (int64)."""
        segment_lengths = np.diff(self._ends.astype(np.int64), prepend=0)
        return np.add.reduceat(
            segment_lengths * self._has(method.learns), self._first_segment.astype(np.int64)[:-1]
        )

    def _has(self, roles: set[Role] | frozenset[Role]) -> np.ndarray:
        return np.isin(self.roles, list(roles)).astype(np.int64)

    def _starts(self, first: int, last: int) -> np.ndarray:
        before = self._ends[first - 1] if first else np.uint64(0)
        return np.concatenate([[before], self._ends[first : last - 1]])

    def _map(self, name: str, dtype: str, count: int) -> np.ndarray:
        expected = count * np.dtype(dtype).itemsize
        if self.manifest["files"][name]["bytes"] != expected:
            raise UserError(f"{self.path / name} does not hold {count} {dtype} values; make the shards again")
        if count == 0:
            return np.empty(0, dtype=dtype)
        return np.memmap(self.path / name, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", shape=(count,))
