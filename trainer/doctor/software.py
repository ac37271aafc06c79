"""Versions, compiler, MPI, Slurm: what is installed, and whether the parts fit each other."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

from packaging.version import InvalidVersion, Version

from trainer.doctor.check_result import FAIL, OK, WARN, CheckResult
from trainer.errors import UserError
from trainer.runtime import distributed

_TIMEOUT_SECONDS = 60
_LONGEST_BUILD_SECONDS = 1800
_MPI_PROGRAM = (
    "from mpi4py import MPI; w = MPI.COMM_WORLD; "
    "print('world', w.Get_rank(), w.Get_size(), MPI.Get_library_version().split(',')[0].split(chr(10))[0])"
)


def versions(known_good: str) -> list[CheckResult]:
    """Installed packages against the known-good ones: older is a failure, newer was not measured (a warning).

    Raises UserError if the file cannot be read.
    """
    if known_good:
        try:
            text = Path(known_good).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"known_good: cannot read {known_good}: {error}") from None
    else:
        text = files("trainer.doctor").joinpath("known_good.txt").read_text(encoding="utf-8")
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, _, wanted = line.partition("==")
        try:
            found.append(_version(name.strip(), Version(wanted.strip())))
        except InvalidVersion:
            raise UserError(
                f"known_good: {known_good}, line {number}: expected name==version, found {line!r}"
            ) from None
    ours = Version(platform.python_version())
    status = OK if ours >= Version("3.10") else FAIL
    found.append(
        CheckResult(
            "versions", "python", status, str(ours), "" if status == OK else "use Python 3.10 or newer"
        )
    )
    return found


def _version(name: str, wanted: Version) -> CheckResult:
    pip = f"pip install '{name}=={wanted}'"
    try:
        installed = Version(version(name))
    except PackageNotFoundError:
        return CheckResult("versions", name, FAIL, f"not installed (known good: {wanted})", pip)
    public = Version(installed.public)  # 2.13.0+cpu is 2.13.0
    if public == wanted:
        return CheckResult("versions", name, OK, str(installed))
    if public < wanted:
        return CheckResult("versions", name, FAIL, f"{installed} is older than the known-good {wanted}", pip)
    remedy = f"not measured with it: trust it if the gradient parity below is ok, or {pip}"
    return CheckResult("versions", name, WARN, f"{installed} is newer than the known-good {wanted}", remedy)


def compiler() -> CheckResult:
    """DeepSpeed compiles its CPU AdamW for the offload configurations; nothing else needs a compiler."""
    remedy = "install g++ (and ninja) before you use an offload ds_config; the others need no compiler"
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return CheckResult("compiler", "c++", WARN, "there is no g++ on the PATH", remedy)
    answer = _run([path, "-dumpfullversion", "-dumpversion"])
    if answer.returncode:
        return CheckResult("compiler", "c++", WARN, f"{path} does not run: {_last_line(answer)}", remedy)
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        return CheckResult(
            "compiler", "c++", WARN, f"{path} {answer.stdout.strip()}, but no ninja", "pip install ninja"
        )
    return CheckResult("compiler", "c++", OK, f"{path} {answer.stdout.strip()}")


def unfinished_builds(root: Path | None = None) -> list[CheckResult]:
    """Builds of DeepSpeed's C++ parts that were killed: every later start would wait for their lock without an end.

    `root`: torch's cache of extensions, by default where torch.utils.cpp_extension keeps it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache)
    locks = [path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)]
    old = [str(path) for path in locks if time.time() - path.stat().st_mtime > _LONGEST_BUILD_SECONDS]
    if not old:
        return []
    remedy = "remove it, unless something is being compiled right now"
    return [CheckResult("compiler", "builds", WARN, f"a build was killed and left {', '.join(old)}", remedy)]


def mpi() -> CheckResult:
    """Two processes under mpiexec must see a world of two. With another MPI's mpiexec each believes to be alone."""
    none = (
        "training needs no MPI; to evaluate under mpiexec: pip install mpich mpi4py, or your cluster's module"
    )
    try:
        version("mpi4py")
    except PackageNotFoundError:
        return CheckResult("mpi", "mpiexec", WARN, "mpi4py is not installed", none)
    beside = Path(sys.executable).parent / "mpiexec"
    path = shutil.which("mpiexec") or (str(beside) if beside.exists() else None)
    if path is None:
        return CheckResult("mpi", "mpiexec", WARN, "there is no mpiexec on the PATH", none)
    answer = _run([path, "-n", "2", sys.executable, "-c", _MPI_PROGRAM])
    worlds = [line.split(maxsplit=3) for line in answer.stdout.splitlines() if line.startswith("world ")]
    if answer.returncode or not worlds:
        detail = f"{path} -n 2 failed (status {answer.returncode}): {_last_line(answer)}"
        return CheckResult(
            "mpi", "mpiexec", FAIL, detail, "use the mpiexec of the MPI that mpi4py was built with"
        )
    sizes = sorted(int(size) for _, _, size, _ in worlds)
    if sizes != [2, 2]:
        detail = f"{path} -n 2 gives {len(worlds)} worlds of {sizes[0]}: it is not the MPI of mpi4py ({worlds[0][3]})"
        remedy = f"put the right mpiexec first on the PATH (e.g. {beside}), or rebuild mpi4py with this MPI"
        return CheckResult("mpi", "mpiexec", FAIL, detail, remedy)
    return CheckResult("mpi", "mpiexec", OK, f"{path}: a world of 2, {worlds[0][3]}")


def slurm() -> list[CheckResult]:
    """Is there a Slurm, does its controller answer, and does this job's environment make sense?"""
    found = []
    try:
        world = distributed.environment()
        if "SLURM_JOB_ID" in os.environ:
            detail = f"job {os.environ['SLURM_JOB_ID']}, {world.world_size} rank(s) by {world.launcher}"
            found.append(CheckResult("slurm", "environment", OK, detail))
    except UserError as error:
        found.append(
            CheckResult(
                "slurm", "environment", FAIL, str(error), "start with srun alone, or unset the variables"
            )
        )
    if shutil.which("sinfo") is None:
        return [*found, CheckResult("slurm", "controller", OK, "no Slurm here (none is needed)")]
    answer = _run(["sinfo", "--noheader", "--format=%P %D %t"])
    if answer.returncode:
        remedy = "is slurmctld running, and slurm.conf readable?"
        return [
            *found,
            CheckResult("slurm", "controller", WARN, f"sinfo failed: {_last_line(answer)}", remedy),
        ]
    partitions = "; ".join(" ".join(line.split()) for line in answer.stdout.splitlines())
    return [*found, CheckResult("slurm", "controller", OK, partitions)]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run without what a launcher left in the environment; a program that hangs or is missing is a failed one."""
    environment = distributed.without_launcher_variables(os.environ)
    if "SLURM_CONF" in os.environ:
        environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {_TIMEOUT_SECONDS} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _last_line(answer: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (answer.stderr + "\n" + answer.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"
