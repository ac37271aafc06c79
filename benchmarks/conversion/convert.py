"""One conversion: convert.py ours|zero_to_fp32 CHECKPOINT OUTPUT. Prints time, memory and a digest of all tensors.

Seconds are of the conversion alone, in a process that has loaded its libraries. Ours checks every byte it reads, digests
what it writes and waits until it is on the disk; DeepSpeed's does none of these.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

THREADS = 2


def memory(key: str) -> int:
    """Bytes that /proc says this process uses: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@contextlib.contextmanager
def measured() -> Iterator[dict[str, float]]:
    took: dict[str, float] = {}
    memory_before, cpu, start = memory("VmRSS"), time.process_time(), time.perf_counter()
    yield took
    took["seconds"], took["cpu_seconds"] = time.perf_counter() - start, time.process_time() - cpu
    took["extra_mb"] = (memory("VmHWM") - memory_before) / 1e6


def ours(checkpoint: Path, output: Path) -> dict[str, float]:
    from trainer.export import convert, safetensors_writer  # noqa: F401 (loaded before the clock starts)
    from trainer.settings import ConvertSettings
    from trainer.zero import layout  # noqa: F401

    with measured() as took:
        convert.convert(ConvertSettings(checkpoint_dir=str(checkpoint), output_dir=str(output)))
    return took


def zero_to_fp32(checkpoint: Path, output: Path) -> dict[str, float]:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    with measured() as took, contextlib.redirect_stdout(io.StringIO()):
        convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint.parent), str(output), tag=checkpoint.name)
    return took


def tensors(output: Path) -> Iterator[tuple[str, bytes]]:
    """Name and SHA-256 of every tensor; the alias of a tied one, which only DeepSpeed's files have, left out."""
    import torch
    from safetensors import safe_open

    for path in sorted(output.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, _digest(file.get_tensor(name))
    for path in sorted(output.glob("*.bin")):
        for name, tensor in torch.load(path, weights_only=True, mmap=True).items():
            if name != "lm_head.weight":
                yield name, _digest(tensor)


def _digest(tensor: object) -> bytes:
    return hashlib.sha256(tensor.numpy()).digest()  # type: ignore[attr-defined]


def main() -> None:
    import torch

    torch.set_num_threads(THREADS)
    name, checkpoint, output = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    shutil.rmtree(output, ignore_errors=True)
    try:
        took = {"ours": ours, "zero_to_fp32": zero_to_fp32}[name](checkpoint, output)
        found = sorted(tensors(output))
        whole = hashlib.sha256()
        for tensor_name, digest in found:
            whole.update(tensor_name.encode() + digest)
    finally:
        shutil.rmtree(output, ignore_errors=True)
    print(json.dumps({**took, "tensors": len(found), "digest": whole.hexdigest()}))


if __name__ == "__main__":
    main()
