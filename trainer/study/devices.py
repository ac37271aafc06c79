"""Which CUDA devices a stage gets while others run beside it. Asks nvidia-smi, not torch, whose import takes seconds."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_ANSWERS_WITHIN_SECONDS = 60.0


def visible_devices(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Those of CUDA_VISIBLE_DEVICES where it is set, else the numbers of all that nvidia-smi lists; () without any."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        given = (device.strip() for device in environment["CUDA_VISIBLE_DEVICES"].split(","))
        return tuple(device for device in given if device)
    command = ["nvidia-smi", "-L"]
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWERS_WITHIN_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    num_devices = sum(
        line.startswith("GPU ") for line in told.splitlines()
    )  # parts of one (MIG) are indented
    return tuple(str(number) for number in range(num_devices))


def least_used_devices(devices: Sequence[str], used: Iterable[Sequence[str]], count: int) -> tuple[str, ...]:
    """The `count` devices (all, if there are fewer) that the fewest have; `used`: what each of the others has."""
    num_users = Counter(device for theirs in used for device in theirs)
    return tuple(sorted(devices, key=lambda device: num_users[device])[:count])  # among equals the first ones
