"""Real ranks through the real launch paths: the same files as one process, also after killed or failed ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.test_dev_cluster import RANKS, batch, printed
from tests.distributed import REPOSITORY, run, run_well
from tests.evaluation.conftest import mpiexec
from tests.evaluation.test_evaluate import read, settings
from tests.slurm_cluster import Cluster
from trainer.evaluation.evaluate import evaluate
from trainer.evaluation.rank_files import read_rank_files
from trainer.runtime.distributed import without_launcher_variables
from trainer.runtime.exit_codes import EXIT_PEER_LOST
from trainer.runtime.process_group import free_port
from trainer.shards.read import Shards
from trainer.storage.run_directory import EvaluationDirectory

COMMAND = ["-m", "tests.evaluation.one_rank"]
TWO_HOSTS = {"MPIR_CVAR_NOLOCAL": "1"}


@pytest.fixture(scope="module")
def uninterrupted(
    export: Path, shards: Shards, tmp_path_factory: pytest.TempPathFactory
) -> EvaluationDirectory:
    """Results of one process without interruption."""
    directory = EvaluationDirectory(tmp_path_factory.mktemp("uninterrupted") / "evaluation")
    evaluate(settings(export, shards, output_dir=str(directory.path)))
    return directory


def flags(export: Path, shards: Shards, output_dir: Path) -> list[str]:
    return [
        "--model_name_or_path", str(export), "--shards", str(shards.path), "--output_dir", str(output_dir),
        "--batch_size", "2",
    ]  # fmt: skip


def test_three_ranks_by_environment(
    export: Path, shards: Shards, tmp_path: Path, uninterrupted: EvaluationDirectory
) -> None:
    output = run_well(["tools/evaluate.py", *flags(export, shards, tmp_path)], 3)
    assert "strict 100.0 % (10/10" in output and "3 x 2 slots" in output
    assert read(EvaluationDirectory(tmp_path)) == read(uninterrupted)


def test_two_ranks_under_mpi(
    export: Path, shards: Shards, tmp_path: Path, uninterrupted: EvaluationDirectory
) -> None:
    pytest.importorskip("mpi4py")
    status, output = mpiexec(["tools/evaluate.py", *flags(export, shards, tmp_path)], 2)
    assert status == 0 and output.count("strict 100.0 % (10/10") == 1, output
    assert read(EvaluationDirectory(tmp_path)) == read(uninterrupted)


@pytest.mark.parametrize("killed", [0, 1])
def test_evaluation_is_resumed_after_a_killed_rank(
    export: Path, shards: Shards, tmp_path: Path, uninterrupted: EvaluationDirectory, killed: int
) -> None:
    arguments = [*COMMAND, f"kill:{killed}:2", str(export), str(shards.path), str(tmp_path)]
    outcomes = run(arguments, 2, timeout=100)
    assert outcomes[killed].status == -signal.SIGKILL, outcomes
    assert outcomes[1 - killed].status == EXIT_PEER_LOST, outcomes
    directory = EvaluationDirectory(tmp_path)
    solved = {
        file.name[: len("rank-0")]: list(read_rank_files([file])) for file in directory.rank_files.iterdir()
    }
    assert len(solved[f"rank-{killed}"]) == 2 and not directory.results.exists()
    evaluate(settings(export, shards, output_dir=str(tmp_path)))
    assert read(directory) == read(uninterrupted)


def test_killed_rank_under_mpi(
    export: Path, shards: Shards, tmp_path: Path, uninterrupted: EvaluationDirectory
) -> None:
    pytest.importorskip("mpi4py")
    arguments = [*COMMAND, "kill:1:1", str(export), str(shards.path), str(tmp_path)]
    status, output = mpiexec(arguments, 2, **TWO_HOSTS)
    assert status != 0, output
    evaluate(settings(export, shards, output_dir=str(tmp_path)))
    assert read(EvaluationDirectory(tmp_path)) == read(uninterrupted)


def test_killed_rank_under_the_deepspeed_launcher(
    export: Path, shards: Shards, tmp_path: Path, uninterrupted: EvaluationDirectory
) -> None:
    """The launcher ends the other ranks; the repeated command resumes."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        launcher,
        "--num_gpus",
        "2",
        "--master_port",
        free_port(),
        "--no_local_rank",
        "--module",
        COMMAND[1],
    ]
    done = subprocess.run(
        [str(word) for word in (*command, "kill:1:2", export, shards.path, tmp_path)],
        cwd=REPOSITORY,
        env={**without_launcher_variables(os.environ), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0 and len(list(EvaluationDirectory(tmp_path).rank_files.iterdir())) == 2, done
    evaluate(settings(export, shards, output_dir=str(tmp_path)))
    assert read(EvaluationDirectory(tmp_path)) == read(uninterrupted)


def test_killed_rank_of_a_slurm_job(
    cluster: Cluster, export: Path, shards: Shards, tmp_path: Path, uninterrupted: EvaluationDirectory
) -> None:
    """The job is requeued automatically."""
    fault = '"$([[ ${SLURM_RESTART_COUNT:-0} = 0 ]] && echo kill:1:2 || echo none)"'
    command = [
        str(RANKS),
        sys.executable,
        *COMMAND,
        fault,
        str(export),
        str(shards.path),
        str(tmp_path / "out"),
    ]
    job = cluster.sbatch(batch(tmp_path, f"exec {' '.join(command)}"))
    cluster.wait(lambda: "a rank was killed, the job is requeued" in printed(tmp_path), "the job asks")
    cluster.start_now(job)
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.fact(job, "Restarts") == "1" and "solved before; resuming" in printed(tmp_path)
    assert read(EvaluationDirectory(tmp_path / "out")) == read(uninterrupted)


def test_error_on_one_rank_is_raised_by_all(export: Path, shards: Shards, tmp_path: Path) -> None:
    arguments = [*COMMAND, "fail:1:1", str(export), str(shards.path), str(tmp_path)]
    outcomes = run(arguments, 2, timeout=100)
    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert all("error: rank 1: ZeroDivisionError: a fault of ours" in o.output for o in outcomes), outcomes
    assert "Traceback" in outcomes[1].output and "Traceback" not in outcomes[0].output


def test_error_on_one_rank_under_mpi(export: Path, shards: Shards, tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    arguments = [*COMMAND, "unwritable:1", str(export), str(shards.path), str(tmp_path)]
    status, output = mpiexec(arguments, 2, **TWO_HOSTS)
    assert status != 0 and "error: rank 1: OSError: [Errno 28] No space left on device" in output
