"""Checks of one machine: disk, shared memory, CPU cores, GPUs."""

import functools
import os
import shutil
import tempfile
import time
from pathlib import Path

from trainer.doctor.check_result import FAIL, OK, WARN, CheckResult, ok_if
from trainer.errors import first_line
from trainer.runtime import terminal

_GB, _MB = 10**9, 10**6
_TEST_BYTES = 64 * _MB
_SMALL_WRITES = 5
_MIN_WRITE_SPEED = 50 * _MB  # bytes/s; at this speed a checkpoint of 1 GB takes 20 s
_MAX_RENAME_SECONDS = 1.0
_MIN_SHARED_MEMORY_BYTES = 1 * _GB


def disk(output_dir: str, min_free_gb: float) -> list[CheckResult]:
    """Check the free space and the speed of write, fsync and rename in `output_dir`. Delete the temporary files."""
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        detail = f"{terminal.size_text(free)} are free at {path}"
        remedy = f"free some, or write elsewhere (wanted: {min_free_gb:g} GB, --min_free_gb)"
        space = ok_if(free >= min_free_gb * _GB, "disk", "space", detail, remedy, FAIL)
        with tempfile.TemporaryDirectory(prefix=".doctor-", suffix=".tmp", dir=path) as folder:
            num_bytes = min(_TEST_BYTES, free // 2)
            return [space, _write_speed(Path(folder), num_bytes), _rename_speed(Path(folder))]
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "give an --output_dir on a file system you may write to, with space"
        return [CheckResult("disk", "write", FAIL, f"cannot write to {path}: {reason}", remedy)]


def _write_speed(folder: Path, num_bytes: int) -> CheckResult:
    block = os.urandom(4 * _MB)
    start = time.perf_counter()
    with open(folder / "data", "wb") as file:
        for _ in range(max(1, num_bytes // len(block))):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = file.tell()
    speed = written / (time.perf_counter() - start)
    remedy = "checkpoints will be slow here: choose a faster file system, or save less often"
    return ok_if(speed >= _MIN_WRITE_SPEED, "disk", "write", f"{speed / _MB:,.0f} MB/s, flushed", remedy)


def _rename_speed(folder: Path) -> CheckResult:
    """Measure the time to replace a small file. Check that the new content can be read immediately after the rename."""
    target = folder / "committed"
    start = time.perf_counter()
    for number in range(_SMALL_WRITES):
        staging = folder / f"staging-{number}"
        with open(staging, "w", encoding="utf-8") as file:
            file.write(str(number))
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, target)
        if target.read_text(encoding="utf-8") != str(number):
            detail = f"a renamed file at {folder} kept its old content"
            return CheckResult("disk", "rename", FAIL, detail, "do not use it")
    seconds = (time.perf_counter() - start) / _SMALL_WRITES
    detail = f"{seconds * 1000:.1f} ms to write, flush and rename a file"
    remedy = "publishing a file takes this long here: is it a busy network file system?"
    return ok_if(seconds < _MAX_RENAME_SECONDS, "disk", "rename", detail, remedy)


def shared_memory() -> CheckResult:
    """Check the size of /dev/shm, which NCCL and data loaders use. In a container, the default size is 64 MB."""
    path = "/dev/shm"
    if not os.path.isdir(path):
        remedy = "NCCL between the GPUs of a machine needs it"
        return CheckResult("memory", "shared", WARN, f"there is no {path}", remedy)
    size = shutil.disk_usage(path).total
    detail = f"{path} has {terminal.size_text(size)}"
    remedy = "start the container with --shm-size=8g (or --ipc=host)"
    return ok_if(size >= _MIN_SHARED_MEMORY_BYTES, "memory", "shared", detail, remedy)


def cpu_cores() -> CheckResult:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS", "")
    detail = f"{cores} usable" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    remedy = f"set OMP_NUM_THREADS to at most {cores}, or give the task more cores"
    return ok_if(not threads.isdigit() or int(threads) <= cores, "cpu", "cores", detail, remedy)


def accelerators() -> CheckResult:
    """Check that every visible GPU multiplies matrices correctly. If there is an NVIDIA driver, torch must have CUDA."""
    import torch

    result = functools.partial(CheckResult, "gpu", "cuda")
    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and Path("/proc/driver/nvidia").exists():
            detail = f"an NVIDIA driver is installed but torch {torch.__version__} has no CUDA"
            return result(FAIL, detail, "install the CUDA build of torch that fits the driver")
        return result(OK, "no GPU: training runs on the CPU")
    descriptions = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            ones = torch.ones(256, 256, device=f"cuda:{index}")
            is_correct = float((ones @ ones).sum()) == 256.0**3
        except RuntimeError as error:
            return result(FAIL, f"GPU {index}: {first_line(error)}", "is it in use, or broken?")
        if not is_correct:
            return result(FAIL, f"GPU {index} computes 256^3 wrongly", "take it out of service")
        descriptions.append(f"{properties.name} {properties.total_memory / _GB:.0f} GB")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    return result(OK, f"{', '.join(descriptions)}; CUDA {torch.version.cuda}, NCCL {nccl}")
