"""Reading of JSON Lines files with partial and foreign lines, from the beginning and from the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.storage.json_lines import read_json_lines


def test_unreadable_lines_are_none_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\n[2]\n{"text": "\xff"}\n{"text": "\xe2\x80\xa8"}\r\n\0\0\0\n{"step": 3')
    found = [(1, {"step": 1}), (3, None), (4, None), (5, {"text": "\u2028"}), (6, None), (7, None)]
    assert list(read_json_lines(path)) == found


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert list(read_json_lines(tmp_path / "missing.jsonl")) == []


@pytest.mark.parametrize(
    ("tail_bytes", "steps"),
    [(0, []), (11, []), (12, [3]), (13, [3]), (23, [3]), (24, [2, 3]), (36, [1, 2, 3]), (99, [1, 2, 3])],
)
def test_only_complete_lines_of_the_tail_are_read(tmp_path: Path, tail_bytes: int, steps: list[int]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n')  # 12 bytes a line
    expected = [(number, {"step": step}) for number, step in enumerate(steps, 1)]
    assert list(read_json_lines(path, tail_bytes)) == expected
