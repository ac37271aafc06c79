"""Read a shard directory through memory maps. Opening a million examples takes milliseconds.

Files (the .bin files are little-endian and have no headers; the manifest has num_tokens, num_segments and num_problems):

    tokens.bin       uint16 or uint32 [num_tokens]    all segments of all problems, one after another
    roles.bin        uint8  [num_segments]            role of every segment
    ends.bin         uint64 [num_segments]            end of every segment in tokens.bin; the next segment starts there
    segments.bin     uint64 [num_problems + 1]        index of the first segment of every problem, then num_segments
    problems.jsonl   one problem per line: question, steps, gold answer, id, facts
    lines.bin        uint64 [num_problems + 1]        byte offset of every line of problems.jsonl, then the file size
    rejects.jsonl    rejected records: source, line, reason
    tokenizer/       the tokenizer, as saved by transformers
"""

import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.errors import UserError
from trainer.problems.problem import Problem, Step
from trainer.shards.methods import SegmentRole, View
from trainer.storage import atomic_dir
from trainer.storage.manifest import Manifest, ShardFacts

KIND = "shards"
_ABSENT, _INPUT, _TARGET = 0, 1, 2
TOKENIZER = "tokenizer"
PROBLEMS = "problems.jsonl"
REJECTS = "rejects.jsonl"


class Shards:
    """Random access to the examples of one shard directory. Problems are numbered 0..len-1 in source order."""

    def __init__(self, path: Path, manifest: Manifest, fingerprint: str):
        self.path = path
        self.manifest = manifest
        self.facts: ShardFacts = manifest["facts"]
        self.fingerprint = fingerprint  # SHA-256 of the manifest, which has the digests of all files
        self.tokens = self._map("tokens.bin", self.facts["token_dtype"], self.facts["num_tokens"])
        self.roles = self._map("roles.bin", "uint8", self.facts["num_segments"])
        # uint64 files are mapped as int64, because numpy converts a mix of uint64 and int64 to float.
        self._ends = self._map("ends.bin", "int64", self.facts["num_segments"])
        self._first_segment = self._map("segments.bin", "int64", len(self) + 1)
        self._line_starts = self._map("lines.bin", "int64", len(self) + 1)

    @classmethod
    def open(cls, directory: str | Path, verify: bool = False) -> "Shards":
        """Check the sizes of the files and open a shard directory. `verify`: also check the digests of the files.

        Raises UserError if the directory is incomplete, corrupt, or not a shard directory.
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
        """Largest token id of the shards, computed from all tokens (one second for 10^9 tokens)."""
        # Not stored in the manifest: a new field would change the fingerprint, and with it the data order of every run.
        return int(self.tokens.max(initial=0))

    def problem(self, index: int) -> Problem:
        """Return the problem's text, steps and gold answer."""
        with open(self.path / PROBLEMS, "rb") as file:
            start, end = self._line_starts[index : index + 2].tolist()
            file.seek(start)
            record = json.loads(file.read(end - start))
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
        """Return the concatenated tokens of all segments of one role; empty if the problem has no such segment."""
        parts = [tokens for segment_role, tokens in self.segments(index) if segment_role == role]
        return np.concatenate([self.tokens[:0], *parts])

    def prompt(self, index: int) -> np.ndarray:
        """Return the tokens of the prompt: the problem segment."""
        first = int(self._first_segment[index])
        start, end = self._bounds(first, first + 1).tolist()
        return self.tokens[start:end]

    def example(self, index: int, view: View) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [n] (int64) of a problem in a view, and the loss mask [n] (bool, True for target tokens)."""
        return self.examples([index], view)[0]

    def examples(self, indices: Sequence[int], view: View) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return `example(index, view)` for each index. One call is much faster than one call per index."""
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
        """Return the number of tokens of every problem, summed over all segments [num_problems] (int64)."""
        return np.diff(self._ends[self._first_segment[1:] - 1].astype(np.int64), prepend=0)

    def lengths(self, view: View) -> np.ndarray:
        """Return the number of tokens of every problem in a view [num_problems] (int64); 0 if a required role is absent."""
        lengths = self._num_tokens(view.inputs)
        for role in view.required:
            lengths[np.add.reduceat(self.roles == role, self._first_segment[:-1], dtype=np.int64) == 0] = 0
        return lengths

    def target_lengths(self, view: View) -> np.ndarray:
        """Return the number of target tokens of every problem in a view [num_problems] (int64)."""
        return self._num_tokens(view.targets)

    def _num_tokens(self, roles: frozenset[SegmentRole]) -> np.ndarray:
        segment_lengths = np.diff(self._ends, prepend=0) * np.isin(self.roles, list(roles))
        return np.add.reduceat(segment_lengths, self._first_segment[:-1])

    def _bounds(self, first: int, last: int) -> np.ndarray:
        """Return the starts of segments first..last - 1, then the end of segment last - 1, [last - first + 1] (int64)."""
        if first:
            return self._ends[first - 1 : last]
        return np.concatenate([np.zeros(1, self._ends.dtype), self._ends[:last]])

    def _map(self, name: str, dtype: str, count: int) -> np.ndarray:
        expected = count * np.dtype(dtype).itemsize
        if self.manifest["files"][name]["bytes"] != expected:
            raise UserError(f"{self.path / name} is not {count} {dtype} values; prepare the shards again")
        if count == 0:
            return np.empty(0, dtype=dtype)
        mapped = np.memmap(self.path / name, np.dtype(dtype).newbyteorder("<"), mode="r", shape=(count,))
        return mapped.view(np.ndarray)  # slicing a memmap takes several times as long as slicing an array


def _ranges(starts: np.ndarray, counts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the concatenated ranges starts[i]..starts[i] + counts[i] - 1 (int64). `ends` is counts.cumsum()."""
    numbers: np.ndarray = (starts - ends + counts).repeat(counts)
    numbers += np.arange(len(numbers))
    return numbers


@functools.cache
def _role_use(view: View) -> np.ndarray:
    """Return an array [256] (uint8), indexed by role, of the values _ABSENT, _INPUT and _TARGET."""
    uses = np.full(256, _ABSENT, np.uint8)
    uses[[int(role) for role in view.inputs]] = _INPUT
    uses[[int(role) for role in view.inputs & view.targets]] = _TARGET
    return uses
