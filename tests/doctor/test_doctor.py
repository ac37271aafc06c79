"""Checks of the doctor against real faults."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.distributed import run, run_well
from trainer.doctor import gradient_parity, machine, rank_checks, software
from trainer.doctor.check_result import FAIL, OK, WARN, CheckResult
from trainer.doctor.run_checks import print_report
from trainer.errors import UserError
from trainer.runtime import distributed


def test_each_difference_is_the_largest_of_any_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    of_ranks = [(1e-5, 1e-7), (1e-7, 0.5)]  # of the gradient, of the loss
    monkeypatch.setattr(gradient_parity, "_compare", lambda case: of_ranks[0])
    monkeypatch.setattr(
        distributed, "gather_objects", lambda mine: of_ranks if isinstance(mine, tuple) else [""]
    )
    result = gradient_parity._check(gradient_parity.ParityCase(1, torch.float32, False))
    assert result.status == FAIL and "gradient off by 1.0e-05, loss after a step by 5.0e-01" in result.detail


def one(results: list[CheckResult], name: str) -> CheckResult:
    found = [result for result in results if result.name == name]
    assert len(found) == 1, results
    return found[0]


def test_the_shipped_versions_are_those_of_the_constraints() -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    shipped = (REPOSITORY / "trainer/doctor/known_good.txt").read_text(encoding="utf-8").splitlines()
    named = [line for line in shipped if not line.startswith("#")]
    assert len(named) >= 5 and set(named) <= set(constraints)
    assert {result.status for result in software.versions("")} == {OK}


def test_an_older_version_fails_and_a_newer_one_warns(tmp_path: Path) -> None:
    file = tmp_path / "known.txt"
    file.write_text("deepspeed==99.1  # older than this is installed\nnumpy==1.0\nno-such-package==1\n")
    found = software.versions(str(file))
    assert one(found, "deepspeed").status == FAIL
    assert one(found, "deepspeed").detail == f"{version('deepspeed')} is older than the known-good 99.1"
    assert one(found, "numpy").status == WARN
    assert one(found, "no-such-package").detail == "not installed (known good: 1)"
    file.write_text("torch 2.0\n")
    with pytest.raises(UserError, match="line 1: expected name==version"):
        software.versions(str(file))


def test_the_mpiexec_of_another_mpi_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "mpiexec"
    program.write_text('#!/bin/sh\nshift 2\n"$@" && "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = software.mpi()
    assert found.status == FAIL
    assert f"{program} -n 2 gives 2 worlds of 1" in found.detail


def test_a_rank_of_the_mpi_check_writes_its_line_in_one_piece() -> None:
    """Every write to a datagram socket is one message, also where Python does not buffer its output."""
    receiver, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with receiver, sender:
        subprocess.run(
            [sys.executable, "-c", software._MPI_PROGRAM],
            stdout=sender,
            check=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert re.fullmatch(rb"world 0 1 [^\n]+\n", receiver.recv(4096))


def test_missing_mpiexec_and_compiler_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(
        sys, "executable", str(python)
    )  # the virtual environment's mpiexec is beside the real one
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (software.mpi().status, software.mpi().detail) == (WARN, "there is no mpiexec on the PATH")
    assert software.compiler().detail == "there is no g++ on the PATH"


def test_contradictory_slurm_environment_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    found = one(software.slurm(), "environment")
    assert found.status == FAIL and "SLURM_NTASKS=4" in found.detail


def test_a_healthy_disk_is_left_as_it_was(tmp_path: Path) -> None:
    found = machine.disk(str(tmp_path / "runs"), min_free_gb=0)
    assert [result.name for result in found] == ["space", "write", "rename"]
    assert one(found, "rename").status in (OK, WARN)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_full_disk_fails(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        found = machine.disk(str(tmp_path), min_free_gb=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found[0].status == FAIL and "cannot write to" in found[0].detail
    assert list(tmp_path.iterdir()) == []
    assert one(machine.disk("/proc/runs", 0), "write").status == FAIL
    assert one(machine.disk(str(tmp_path), 1e9), "space").status == FAIL


def test_wrong_gradients_of_a_stage_are_found() -> None:
    output = run_well(["-m", "tests.doctor.wrong_gradients", "parity"], 2, timeout=600)
    line = next(line for line in output.splitlines() if line.startswith(rank_checks.RESULTS_PREFIX))
    results = json.loads(line.removeprefix(rank_checks.RESULTS_PREFIX))
    found = {values["name"]: values for values in results}
    statuses = {name: values["status"] for name, values in found.items()}
    assert statuses == {
        "ZeRO 0 fp32": OK,
        "ZeRO 1 fp32": FAIL,
        "ZeRO 2 fp32": FAIL,
        "ZeRO 3 fp32": OK,
        "ZeRO 0 bf16": OK,  # known to be wrong, refused by training
    }
    assert "gradient off by 1.0e-02" in found["ZeRO 1 fp32"]["detail"]
    assert "training refuses it" in found["ZeRO 0 bf16"]["detail"]


def test_launched_ranks_check_each_other(tmp_path: Path) -> None:
    skip = ["--skip", "parity", "mpi", "slurm", "versions", "--json"]
    ranks = run(
        ["tools/doctor.py", "--output_dir", str(tmp_path), "--min_free_gb", "0", *skip], 2, timeout=600
    )
    assert [rank.status for rank in ranks] == [0, 0], ranks
    report = json.loads(ranks[0].output)
    assert ranks[1].output == ""
    found = {(result["group"], result["name"]): result for result in report["findings"]}
    assert "between 2 ranks on 1 machine" in found["clock", "skew"]["detail"]
    assert "2 ranks" in found["network", "all-reduce"]["detail"]
    assert ("disk", "write") in found and ("parity", "ZeRO 1 fp32") not in found


def test_the_command_line_fails_with_status_1_and_the_line(tmp_path: Path) -> None:
    (tmp_path / "known.txt").write_text("torch==99.0\n")
    flags = ["--known_good", str(tmp_path / "known.txt"), "--output_dir", str(tmp_path), "--min_free_gb", "0"]
    skip = ["--skip", "parity", "network", "clock", "mpi", "slurm"]
    done = subprocess.run(
        [sys.executable, "tools/doctor.py", *flags, *skip], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 1, done
    assert f"fail  versions: torch: {version('torch')} is older than the known-good 99.0" in done.stdout
    assert "-> pip install 'torch==99.0'" in done.stdout
    unknown = subprocess.run(
        [sys.executable, "tools/doctor.py", "--skip", "pairity"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert unknown.returncode == 2 and "did you mean 'parity'?" in unknown.stdout


def test_ranks_that_do_not_start_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.doctor import run_checks

    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = run_checks._start_ranks(["clock"])
    assert [result.status for result in found] == [FAIL]
    assert "two ranks did not finish" in found[0].detail


def test_warnings_do_not_fail(capsys: pytest.CaptureFixture[str]) -> None:
    results = [CheckResult("a", "b", OK, "fine"), CheckResult("a", "c", WARN, "look", "there")]
    assert print_report(results, 1.0, as_json=False)
    assert "2 checks in 1 s: 0 failed, 1 warning(s)" in capsys.readouterr().out
    assert not print_report([*results, CheckResult("a", "d", FAIL, "broken", "mend")], 1.0, as_json=True)


def test_a_killed_build_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert software.unfinished_builds() == []  # a build may be running
    os.utime(lock, (0, 0))
    (result,) = software.unfinished_builds()
    assert result.status == WARN and str(lock) in result.detail and "remove it" in result.remedy
