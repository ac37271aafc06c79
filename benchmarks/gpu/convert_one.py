"""One conversion: python -m benchmarks.gpu.convert_one make|ours|deepspeed STAGE [--tiny]

Makes the checkpoint if it is not there (`make`: that is all); converts it in a process of its own and digests the weights that come out. The
last line on stdout is JSON: seconds of that process, its peak memory, the weights' digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu import cases
from benchmarks.harness import REPOSITORY

_CHECKPOINT = "import sys; from benchmarks.gpu import materials; print(materials.checkpoint(int(sys.argv[1]), sys.argv[2] == '1'))"


def main() -> None:
    way, stage, tiny = sys.argv[1], sys.argv[2], "--tiny" in sys.argv
    start = time.perf_counter()
    # In a separate process: memory left by the training must not count for the converter.
    made = subprocess.run(
        [sys.executable, "-c", _CHECKPOINT, stage, str(int(tiny))],
        cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    checkpoint = Path(made.stdout.split()[-1])
    if way == "make":
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        print(json.dumps({"seconds": time.perf_counter() - start, "bytes": size}))
        return
    with tempfile.TemporaryDirectory(dir=cases.folder(tiny)) as folder:
        output = Path(folder) / "export"
        start = time.perf_counter()
        process = subprocess.Popen(command(way, checkpoint, output), cwd=REPOSITORY, stdout=sys.stderr)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            sys.exit(f"{way}: the converter failed")
        files = sorted(output.glob("*.safetensors"))
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "peak_bytes": usage.ru_maxrss * 1024,
                    "bytes": sum(path.stat().st_size for path in files),
                    "weights_sha256": weights_digest(files),
                }
            )
        )
        shutil.rmtree(output)


def command(way: str, checkpoint: Path, output: Path) -> list[str]:
    if way == "ours":
        flags = ["--output_dir", str(output), "--dtype", "fp32"]
        return [sys.executable, "tools/convert_checkpoint.py", str(checkpoint), *flags]
    flags = ["--tag", checkpoint.name, "--safe_serialization"]
    return [
        *[sys.executable, "-m", "deepspeed.utils.zero_to_fp32"],
        *[str(checkpoint.parent), str(output), *flags],
    ]


def weights_digest(files: list[Path]) -> str:
    """Return a digest of all names, dtypes and bytes in the order of the names; one tensor is in memory at a time."""
    from safetensors import safe_open

    hasher = hashlib.sha256()
    places = {}
    for path in files:
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    for name in sorted(places):
        with safe_open(places[name], "pt") as file:
            tensor = file.get_tensor(name)
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.contiguous().view(-1).numpy().data)
    return hasher.hexdigest()


if __name__ == "__main__":
    main()
