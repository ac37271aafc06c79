"""Read a shard directory through memory maps: opening takes milliseconds for a million examples.

Files (all little-endian, without headers; counts are in the manifest):

    tokens.bin       uint16 or uint32 [num_tokens]    all segments of all problems, one after another
    roles.bin        uint8  [num_segments]            role of every segment
    ends.bin         uint64 [num_segments]            end of every segment in tokens.bin, where the next one starts
    segments.bin     uint64 [num_problems + 1]        first segment of every problem, and the total
    problems.jsonl   one problem per line: text, steps, gold answer, id
    lines.bin        uint64 [num_problems + 1]        start of every line of problems.jsonl in bytes, and the total
    rejects.jsonl    records that were set aside: source, line, reason
    tokenizer/       the tokenizer, as saved by transformers
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
from trainer.shards.methods import SegmentRole, View
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
        # Read as signed: numpy converts to float when it mixes int64 and uint64.
        self._ends = self._map("ends.bin", "int64", self.facts["num_segments"])
        self._first_segment = self._map("segments.bin", "int64", len(self) + 1)
        self._line_starts = self._map("lines.bin", "int64", len(self) + 1)

    @classmethod
    def open(cls, directory: str | Path, verify: bool = False) -> Shards:
        """Open a complete shard directory and check its files' sizes, with `verify` their digests.

        Raises UserError if the directory is incomplete, corrupt, or no shard directory.
        """
        path = Path(directory)
        manifest = atomic_dir.read_manifest(path, KIND)
        if verify:
            atomic_dir.verify_digests(path)
        else:
            atomic_dir.verify_sizes(path, manifest["files"], manifest["files"])
        return cls(path, manifest, atomic_dir.manifest_digest(path))

    def __len__(self) -> int:
        return int(self.facts["num_problems"])

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @functools.cached_property
    def max_token_id(self) -> int:
        """Largest token id of the shards. Computed from all tokens (a second for 10^9): a fact in the manifest would change
        the fingerprint, and with it the data order of every run."""
        return int(self.tokens.max(initial=0))

    def problem(self, index: int) -> Problem:
        """Return the problem's text, steps and gold answer."""
        with open(self.path / PROBLEMS, "rb") as file:
            file.seek(int(self._line_starts[index]))
            record = json.loads(file.read(int(self._line_starts[index + 1]) - int(self._line_starts[index])))
        steps = tuple(Step(step["question"], step["solution"]) for step in record["steps"])
        return Problem(record["id"], record["question"], record["answer"], steps, tuple(record["facts"]))

    def segments(self, index: int) -> list[tuple[SegmentRole, np.ndarray]]:
        """Return (role, tokens [n]) of every segment of a problem, in order."""
        first, last = self._first_segment[index : index + 2].tolist()
        bounds = self._bounds(first, last).tolist()
        return [
            (SegmentRole(role), self.tokens[start:end])
            for role, start, end in zip(self.roles[first:last].tolist(), bounds, bounds[1:], strict=False)
        ]

    def segment_tokens(self, index: int, role: SegmentRole) -> np.ndarray:
        """Return the tokens of all segments of one role, concatenated; empty if the problem has none."""
        found = [tokens for found_role, tokens in self.segments(index) if found_role == role]
        return np.concatenate(found) if found else self.tokens[:0]

    def prompt(self, index: int) -> np.ndarray:
        """Return the tokens of the prompt: the problem segment."""
        first = int(self._first_segment[index])
        start, end = self._bounds(first, first + 1).tolist()
        return self.tokens[start:end]

    def example(self, index: int, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Return a problem's tokens [n] (int64) in a view, and whether each is a target [n] (bool)."""
        return self.examples([index], view)[0]

    def examples(self, indices: Sequence[int], view: View) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return `example` of several problems, in little more time than of one."""
        numbers = np.asarray(indices, np.int64)
        first = self._first_segment.take(numbers)
        counts = self._first_segment.take(numbers + 1) - first
        last = counts.cumsum()
        segments = _ranges(first, counts, last)
        starts = self._ends.take(segments - 1)
        starts[segments == 0] = 0
        use = _role_use(view).take(self.roles.take(segments))
        lengths = (self._ends.take(segments) - starts) * (use != _ABSENT)
        ends = lengths.cumsum()
        tokens = self.tokens.take(_ranges(starts, lengths, ends)).astype(np.int64)
        is_target = (use == _TARGET).repeat(lengths)
        bounds = [0, *ends.take(last - 1).tolist()]
        return [(tokens[a:b], is_target[a:b]) for a, b in itertools.pairwise(bounds)]

    def total_lengths(self) -> np.ndarray:
        """Return the number of tokens of every problem, over all its segments [num_problems] (int64)."""
        return np.diff(self._ends[self._first_segment[1:] - 1].astype(np.int64), prepend=0)

    def lengths(self, view: View) -> np.ndarray:
        """Return the number of tokens of every problem in a view [num_problems] (int64); 0 if it lacks a required role."""
        lengths = self._num_tokens(view.inputs)
        for role in view.required:
            lengths[np.add.reduceat(self.roles == role, self._first_segment[:-1], dtype=np.int64) == 0] = 0
        return lengths

    def target_lengths(self, view: View) -> np.ndarray:
        """Return the number of target tokens of every problem in a view [num_problems] (int64)."""
        return self._num_tokens(view.targets)

    def _num_tokens(self, roles: frozenset[SegmentRole]) -> np.ndarray:
        """Return the number of tokens of every problem in segments of some roles."""
        segment_lengths = np.diff(self._ends, prepend=0) * np.isin(self.roles, list(roles))
        return np.add.reduceat(segment_lengths, self._first_segment[:-1])

    def _bounds(self, first: int, last: int) -> np.ndarray:
        """Return the starts of segments [first, last) in tokens.bin and the end of the last [last - first + 1] (int64)."""
        if first:
            return self._ends[first - 1 : last]
        return np.concatenate([np.zeros(1, self._ends.dtype), self._ends[:last]])

    def _map(self, name: str, dtype: str, count: int) -> np.ndarray:
        expected = count * np.dtype(dtype).itemsize
        if self.manifest["files"][name]["bytes"] != expected:
            raise UserError(
                f"{self.path / name} does not hold {count} {dtype} values; prepare the shards again"
            )
        if count == 0:
            return np.empty(0, dtype=dtype)
        mapped = np.memmap(
            self.path / name, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", shape=(count,)
        )
        return mapped.view(np.ndarray)  # slicing a memmap costs several times as much as slicing an array


def _ranges(starts: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the concatenated ranges starts[i]..starts[i] + counts[i] - 1 (int64); ends: counts.cumsum()."""
    numbers: np.ndarray = (starts - ends + counts).repeat(counts)
    numbers += np.arange(len(numbers))
    return numbers


@functools.cache
def _role_use(view: View) -> np.ndarray:
    """Return _ABSENT, _INPUT or _TARGET for every role [256] (uint8)."""
    uses = np.full(256, _ABSENT, np.uint8)
    uses[[int(role) for role in view.inputs]] = _INPUT
    uses[[int(role) for role in view.inputs & view.targets]] = _TARGET
    return uses
