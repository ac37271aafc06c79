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

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.problems.problem import Problem, Step
from trainer.shards.methods import Role, View
from trainer.storage import atomic_dir

KIND = "shards"
_ABSENT, _INPUT, _TARGET = 0, 1, 2
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
        # Read as signed: numpy counts with int64, and mixes it with uint64 only by way of floats.
        self._ends = self._map("ends.bin", "int64", self.facts["num_segments"])
        self._first_segment = self._map("segments.bin", "int64", len(self) + 1)
        self._line = self._map("lines.bin", "int64", len(self) + 1)

    @classmethod
    def open(cls, directory: str | Path, verify: bool = False) -> Shards:
        """Open finished shards. With `verify` every byte is compared with its digest, else only sizes are.

        Raises UserError if the directory is unfinished, damaged, or not shards.
        """
        path = Path(directory)
        manifest = atomic_dir.read_manifest(path, KIND)
        if verify:
            atomic_dir.verify_digests(path)
        else:
            atomic_dir.verify_sizes(path, manifest["files"], manifest["files"])
        return cls(path, manifest, atomic_dir.manifest_digest(path))

    def __len__(self) -> int:
        return self.facts["num_problems"]

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @functools.cached_property
    def max_token_id(self) -> int:
        """The largest token id that occurs. Looked up in all tokens (a second for a thousand million): a fact in the
        manifest would change the fingerprint, and with it the data order of every run."""
        return int(self.tokens.max(initial=0))

    def problem(self, index: int) -> Problem:
        """The problem's text and gold answer."""
        with open(self.path / PROBLEMS, "rb") as file:
            file.seek(int(self._line[index]))
            record = json.loads(file.read(int(self._line[index + 1]) - int(self._line[index])))
        steps = tuple(Step(step["question"], step["solution"]) for step in record["steps"])
        return Problem(record["id"], record["question"], record["answer"], steps, tuple(record["facts"]))

    def segments(self, index: int) -> list[tuple[Role, np.ndarray]]:
        """(role, tokens [n]) of every segment of a problem, in order."""
        first, last = self._first_segment[index : index + 2].tolist()
        bounds = self._bounds(first, last).tolist()
        return [
            (Role(role), self.tokens[start:end])
            for role, start, end in zip(self.roles[first:last].tolist(), bounds, bounds[1:], strict=False)
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

    def example(self, index: int, method: View) -> tuple[np.ndarray, np.ndarray]:
        """A method's view of a problem: tokens [n] (int64) and learned [n] (bool; True: this token is a target)."""
        return self.examples([index], method)[0]

    def examples(self, indices: Sequence[int], method: View) -> list[tuple[np.ndarray, np.ndarray]]:
        """`example` of several problems: most of the work does not grow with their number."""
        numbers = np.asarray(indices, np.int64)
        first = self._first_segment.take(numbers)
        counts = self._first_segment.take(numbers + 1) - first
        last = counts.cumsum()
        segments = _ranges(first, counts, last)
        starts = self._ends.take(segments - 1)
        starts[segments == 0] = 0
        use = _role_use(method).take(self.roles.take(segments))
        lengths = (self._ends.take(segments) - starts) * (use != _ABSENT)
        ends = lengths.cumsum()
        tokens = self.tokens.take(_ranges(starts, lengths, ends)).astype(np.int64)
        learned = (use == _TARGET).repeat(lengths)
        bounds = [0, *ends.take(last - 1).tolist()]
        return [(tokens[a:b], learned[a:b]) for a, b in itertools.pairwise(bounds)]

    def total_lengths(self) -> np.ndarray:
        """Tokens of every problem, all its segments together [num_problems] (int64)."""
        return np.diff(self._ends[self._first_segment[1:] - 1].astype(np.int64), prepend=0)

    def lengths(self, method: View) -> np.ndarray:
        """Tokens of every problem in a method's view [num_problems] (int64); 0 where the problem lacks what it needs."""
        bounds = self._first_segment
        segment_lengths = np.diff(self._ends, prepend=0)
        lengths = np.add.reduceat(segment_lengths * self._has(method.inputs), bounds[:-1])
        for role in method.required:
            lengths[np.add.reduceat(self._has({role}), bounds[:-1]) == 0] = 0
        return lengths

    def target_lengths(self, method: View) -> np.ndarray:
        """Tokens that carry loss in every problem of a method's view [num_problems] (int64)."""
        segment_lengths = np.diff(self._ends, prepend=0)
        return np.add.reduceat(segment_lengths * self._has(method.targets), self._first_segment[:-1])

    def _has(self, roles: set[Role] | frozenset[Role]) -> np.ndarray:
        return np.isin(self.roles, list(roles)).astype(np.int64)

    def _bounds(self, first: int, last: int) -> np.ndarray:
        """Where segments [first, last) begin in tokens.bin, and where the last one ends [last - first + 1] (int64)."""
        if first:
            return self._ends[first - 1 : last]
        return np.concatenate([np.zeros(1, self._ends.dtype), self._ends[:last]])

    def _map(self, name: str, dtype: str, count: int) -> np.ndarray:
        expected = count * np.dtype(dtype).itemsize
        if self.manifest["files"][name]["bytes"] != expected:
            raise UserError(f"{self.path / name} does not hold {count} {dtype} values; make the shards again")
        if count == 0:
            return np.empty(0, dtype=dtype)
        mapped = np.memmap(
            self.path / name, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", shape=(count,)
        )
        return mapped.view(np.ndarray)  # a slice of a memmap costs several times one of a plain array


def _ranges(starts: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (counts[0] numbers), then those from starts[1], ... (int64); ends: counts.cumsum()."""
    numbers = (starts - ends + counts).repeat(counts)
    numbers += np.arange(len(numbers))
    return numbers


@functools.cache
def _role_use(method: View) -> np.ndarray:
    """What a method does with the tokens of a role [256] (uint8)."""
    uses = np.full(256, _ABSENT, np.uint8)
    uses[[int(role) for role in method.inputs]] = _INPUT
    uses[[int(role) for role in method.inputs & method.targets]] = _TARGET
    return uses
