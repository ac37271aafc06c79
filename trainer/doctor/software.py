"""Checks of installed software: package versions, compiler, MPI, Slurm."""

import functools
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

from trainer.doctor.check_result import FAIL, OK, WARN, CheckResult, ok_if
from trainer.errors import UserError
from trainer.runtime import distributed

_TIMEOUT_SECONDS = 60
_MAX_BUILD_SECONDS = 1800
# Use os.write, which writes the line in one call: with PYTHONUNBUFFERED, `print` could mix the lines of the two ranks.
_MPI_PROGRAM = (
    "import os; from mpi4py import MPI; world = MPI.COMM_WORLD; "
    "library = MPI.Get_library_version().split(',')[0].split(chr(10))[0]; "
    "os.write(1, f'world {world.Get_rank()} {world.Get_size()} {library}\\n'.encode())"
)


def versions(known_good: str) -> list[CheckResult]:
    """Compare Python and the installed packages with known-good versions. Return one result per package and one for Python.

    A missing package or an older version fails. A newer version gives a warning. `known_good`: file of `name==version`
    lines; "": the packaged known_good.txt. Raises UserError if the file cannot be read or has an invalid line.
    """
    if known_good:
        try:
            text = Path(known_good).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"known_good: cannot read {known_good}: {error}") from None
    else:
        text = files("trainer.doctor").joinpath("known_good.txt").read_text(encoding="utf-8")
    results = []
    for number, line in enumerate(text.splitlines(), 1):
        if line := line.partition("#")[0].strip():
            name, _, good = line.partition("==")
            try:
                results.append(_check_version(name.strip(), Version(good.strip())))
            except InvalidVersion:
                raise UserError(
                    f"known_good: {known_good}, line {number}: expected name==version, found {line!r}"
                ) from None
    python, remedy = platform.python_version(), "use Python 3.11 or newer"
    return [*results, ok_if(sys.version_info >= (3, 11), "versions", "python", python, remedy, FAIL)]


def _check_version(name: str, good: Version) -> CheckResult:
    pip = f"pip install '{name}=={good}'"
    try:
        installed = Version(version(name))
    except PackageNotFoundError:
        return CheckResult("versions", name, FAIL, f"not installed (known good: {good})", pip)
    public = Version(installed.public)  # without the local version: 2.13.0 for 2.13.0+cpu
    if public == good:
        return CheckResult("versions", name, OK, str(installed))
    if public < good:
        return CheckResult("versions", name, FAIL, f"{installed} is older than the known-good {good}", pip)
    remedy = f"not measured with it: trust it if the gradient parity below is ok, or {pip}"
    return CheckResult("versions", name, WARN, f"{installed} is newer than the known-good {good}", remedy)


def compiler() -> CheckResult:
    """Check for g++ and ninja. DeepSpeed needs both to compile its CPU AdamW, which only offload ds_configs use."""
    result = functools.partial(CheckResult, "compiler", "c++")
    remedy = "install g++ (and ninja) before you use an offload ds_config; other ds_configs need no compiler"
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return result(WARN, "there is no g++ on the PATH", remedy)
    done = _run([path, "-dumpfullversion", "-dumpversion"])
    if done.returncode:
        return result(WARN, f"{path} does not run: {_last_line(done)}", remedy)
    detail = f"{path} {done.stdout.strip()}"
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        return result(WARN, f"{detail}, but no ninja", "pip install ninja")
    return result(OK, detail)


def unfinished_builds() -> list[CheckResult]:
    """Return [a warning] if killed builds of C++ extensions left lock files, else []. These files block later builds."""
    # The cache that torch.utils.cpp_extension uses.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache)
    locks = [path for pattern in ("*/lock", "*/*/lock") for path in root.glob(pattern)]
    old = [str(path) for path in locks if time.time() - path.stat().st_mtime > _MAX_BUILD_SECONDS]
    if not old:
        return []
    remedy = "remove it, unless something is being compiled right now"
    return [CheckResult("compiler", "builds", WARN, f"a build was killed and left {', '.join(old)}", remedy)]


def mpi() -> CheckResult:
    """Check that `mpiexec -n 2` starts one MPI world of size 2. If mpi4py uses another MPI, two worlds of size 1 start."""
    result = functools.partial(CheckResult, "mpi", "mpiexec")
    remedy = "training needs no MPI; for mpiexec: pip install mpich mpi4py, or your cluster's module"
    try:
        version("mpi4py")
    except PackageNotFoundError:
        return result(WARN, "mpi4py is not installed", remedy)
    beside = Path(sys.executable).parent / "mpiexec"
    path = shutil.which("mpiexec") or (str(beside) if beside.exists() else None)
    if path is None:
        return result(WARN, "there is no mpiexec on the PATH", remedy)
    done = _run([path, "-n", "2", sys.executable, "-c", _MPI_PROGRAM])
    worlds = [line.split(maxsplit=3) for line in done.stdout.splitlines() if line.startswith("world ")]
    if done.returncode or not worlds:
        detail = f"{path} -n 2 failed (status {done.returncode}): {_last_line(done)}"
        return result(FAIL, detail, "use the mpiexec of the MPI that mpi4py was built with")
    sizes = sorted(int(size) for _, _, size, _ in worlds)
    if sizes != [2, 2]:
        detail = f"{path} -n 2 gives {len(worlds)} worlds of {sizes[0]}: it is not the MPI of mpi4py ({worlds[0][3]})"
        remedy = f"put the right mpiexec first on the PATH (e.g. {beside}), or rebuild mpi4py with this MPI"
        return result(FAIL, detail, remedy)
    return result(OK, f"{path}: a world of 2, {worlds[0][3]}")


def slurm() -> list[CheckResult]:
    """Check that Slurm's controller answers and that this job's environment variables are consistent."""
    results = []
    try:
        environment = distributed.environment()
        if "SLURM_JOB_ID" in os.environ:
            detail = f"job {os.environ['SLURM_JOB_ID']}, {environment.world_size} rank(s) by {environment.launcher}"
            results.append(CheckResult("slurm", "environment", OK, detail))
    except UserError as error:
        remedy = "start with srun alone, or unset the variables"
        results.append(CheckResult("slurm", "environment", FAIL, str(error), remedy))
    if shutil.which("sinfo") is None:
        return [*results, CheckResult("slurm", "controller", OK, "no Slurm here (none is needed)")]
    done = _run(["sinfo", "--noheader", "--format=%P %D %t"])
    if done.returncode:
        detail = f"sinfo failed: {_last_line(done)}"
    else:
        detail = "; ".join(" ".join(line.split()) for line in done.stdout.splitlines())
    remedy = "is slurmctld running, and slurm.conf readable?"
    return [*results, ok_if(done.returncode == 0, "slurm", "controller", detail, remedy)]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `command` without the launcher's variables. The status is 124 after a timeout, 127 if the command cannot start."""
    env = distributed.without_launcher_variables(os.environ, keep=("SLURM_CONF",))
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, env=env)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer within {_TIMEOUT_SECONDS} s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it printed nothing"
