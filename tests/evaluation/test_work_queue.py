"""Every problem is taken exactly once, by one or several ranks, with a TCP store or an MPI window as counter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import run_well
from tests.evaluation.conftest import mpiexec
from tests.evaluation.drain_work_queue import NUM_FAILED, NUM_SLOW, SIZES, counts
from trainer.evaluation.work_queue import chunk_size, exhaust_queue, take_problems
from trainer.runtime.shared_counter import ProcessCounter

COMMAND = ["-m", "tests.evaluation.drain_work_queue"]


def check(folder: Path, counter: str, num_ranks: int) -> None:
    ranks = [json.loads((folder / f"{counter}-{rank}.json").read_text()) for rank in range(num_ranks)]
    for count in counts(num_ranks):
        for size in SIZES:
            taken = [problem for rank in ranks for problem in rank[f"{count}/{size}"]]
            assert sorted(taken) == list(range(count))
            assert all(rank[f"{count}/{size}"] == sorted(rank[f"{count}/{size}"]) for rank in ranks)
    assert sorted(problem for rank in ranks for problem in rank["slow"]) == list(range(NUM_SLOW))
    assert len(ranks[-1]["slow"]) < NUM_SLOW / num_ranks / 2  # ten times slower: far less than its share
    failed = [problem for rank in ranks for problem in rank["failed"]]
    assert len(ranks[-1]["failed"]) == 4 and len(set(failed)) == len(failed) < NUM_FAILED


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_queue_over_a_tcp_store(tmp_path: Path, num_ranks: int) -> None:
    run_well([*COMMAND, str(tmp_path)], num_ranks, timeout=100)
    check(tmp_path, "StoreCounter", num_ranks)


@pytest.mark.parametrize(
    ("num_ranks", "environment"),
    [(3, {}), (2, {"MPIR_CVAR_NOLOCAL": "1"})],
    ids=["shared memory", "as if on two hosts"],
)
def test_queue_over_an_mpi_window(tmp_path: Path, num_ranks: int, environment: dict[str, str]) -> None:
    pytest.importorskip("mpi4py")
    status, output = mpiexec([*COMMAND, str(tmp_path)], num_ranks, **environment)
    assert status == 0, output
    check(tmp_path, "MPICounter", num_ranks)


def test_queue_of_one_process() -> None:
    assert list(take_problems(ProcessCounter(), [5, 3, 9, 1], 3)) == [5, 3, 9, 1]
    counter = ProcessCounter()
    queue = take_problems(counter, range(100), 2)
    first = next(queue)
    exhaust_queue(counter)
    assert [first, *queue] == [0, 1]


def test_batches_are_small_enough_for_the_slots() -> None:
    assert chunk_size(10, 32) == 1
    assert chunk_size(1319, 8) == 8
    assert 8 * 32 * chunk_size(1319, 32) <= 1319
