from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.evaluation.rank_files import (
    RankFile,
    any_error_on_all_ranks,
    list_rank_files,
    merge_predictions,
    read_rank_files,
    remove_rank_files,
)


def prediction(name: str) -> dict[str, Any]:
    return {"id": name, "correct_strict": True, "text": "zwölf \u2028 über\n#### 12"}


def test_lines_are_flushed_and_files_of_other_jobs_are_kept(tmp_path: Path) -> None:
    with RankFile(tmp_path, "a" * 64) as file, RankFile(tmp_path, "b" * 64):
        file.append(prediction("one"))
        assert list(read_rank_files([file.path])) == [prediction("one")]
    assert list_rank_files(tmp_path, "a" * 64) == [file.path]
    remove_rank_files(list_rank_files(tmp_path, "a" * 64))
    assert tmp_path.is_dir() and len(list(tmp_path.iterdir())) == 1
    remove_rank_files(list_rank_files(tmp_path, "b" * 64))
    assert not tmp_path.exists()


@pytest.mark.parametrize("cut", [1, 20, len('{"id": "two"')])
def test_truncated_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    with RankFile(tmp_path, "a") as file:
        file.append(prediction("one"))
        file.append(prediction("two"))
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    assert [p["id"] for p in read_rank_files([file.path])] == ["one"]


@pytest.mark.parametrize("line", [b"{not json}\n", b'{"id": "x"}\n', b'"text"\n', b"\xff\xfe\n"])
def test_corrupt_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rank-0-a-1.jsonl"
    path.write_bytes(b'{"id": "one", "correct_strict": true}\n' + line)
    with pytest.raises(UserError, match=r"rank-0-a-1\.jsonl, line 2 is corrupt"):
        list(read_rank_files([path]))


def test_merge_has_every_id_once_in_order() -> None:
    made = [prediction(name) for name in "cab"]
    assert [p["id"] for p in merge_predictions(made, ["a", "b", "c"])] == ["a", "b", "c"]
    for predictions, message in (
        (made[:2], "'b' are missing"),
        ([*made, made[0]], "'c' occur more than once"),
        ([*made, prediction("z")], "'z' are not of these problems"),
    ):
        with pytest.raises(UserError, match=message):
            merge_predictions(predictions, ["a", "b", "c"])
    with pytest.raises(UserError, match="'0', '1', '2', '3', '4' and 5 more are missing"):
        merge_predictions([], [str(i) for i in range(10)])


def test_errors_keep_their_message(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="line 3: fix it"), any_error_on_all_ranks():
        raise UserError("line 3: fix it")
    with pytest.raises(UserError, match="ZeroDivisionError"), any_error_on_all_ranks():
        print(1 / 0)
    assert "1 / 0" in capfd.readouterr().err  # the traceback of an unexpected error is printed
    with pytest.raises(KeyboardInterrupt), any_error_on_all_ranks():
        raise KeyboardInterrupt
