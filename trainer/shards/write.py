"""Write the files of a shard directory (layout: read.py)."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.problems.problem import Problem
from trainer.shards.methods import VIEWS, Role
from trainer.shards.read import PROBLEMS
from trainer.shards.segments import Segment

_BUFFER_BYTES = 1 << 20


class ShardWriter:
    """Writer of one shard directory: `add` appends a problem, `close` writes the index files."""

    def __init__(self, folder: Path, token_dtype: np.dtype):
        self._token_dtype = token_dtype
        # Large buffers: after each write to a file this thread waits for the GIL.
        self._tokens = open(folder / "tokens.bin", "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115 (closed by close)
        self._problems = open(folder / PROBLEMS, "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115
        self._folder = folder
        self._roles: list[int] = []
        self._ends: list[int] = []
        self._first_segment = [0]
        self._line_starts = [0]
        self._present: Counter[frozenset[Role]] = Counter()  # roles of a problem -> number of problems
        self._max_length = 0

    @property
    def num_problems(self) -> int:
        return len(self._line_starts) - 1

    def add(self, problem: Problem, segments: Sequence[Segment], length: int) -> None:
        """Append a problem; `length`: `example_length` of its segments."""
        end = self._ends[-1] if self._ends else 0
        joined = list(itertools.chain.from_iterable(segment.tokens for segment in segments))
        self._tokens.write(np.array(joined, dtype=self._token_dtype).tobytes())
        for segment in segments:
            end += len(segment.tokens)
            self._roles.append(segment.role)
            self._ends.append(end)
        self._first_segment.append(len(self._roles))
        self._max_length = max(self._max_length, length)
        # vars(): dataclasses.asdict would double the time of this method.
        record = {**vars(problem), "steps": [vars(step) for step in problem.steps]}
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        self._problems.write(line)
        self._line_starts.append(self._line_starts[-1] + len(line))
        self._present[frozenset(segment.role for segment in segments)] += 1

    def close(self) -> dict[str, Any]:
        """Write the remaining files and return the counts for the manifest."""
        self._tokens.close()
        self._problems.close()
        arrays = {"roles": (self._roles, "u1"), "ends": (self._ends, "<u8")}
        arrays |= {"segments": (self._first_segment, "<u8"), "lines": (self._line_starts, "<u8")}
        for name, (values, dtype) in arrays.items():
            np.array(values, dtype=dtype).tofile(self._folder / f"{name}.bin")
        return {
            "num_problems": self.num_problems,
            "num_segments": len(self._roles),
            "num_tokens": self._ends[-1] if self._ends else 0,
            "longest_example": self._max_length,
            "problems_per_method": {
                name: sum(count for roles, count in self._present.items() if view.required <= roles)
                for name, view in VIEWS.items()
            },
        }
