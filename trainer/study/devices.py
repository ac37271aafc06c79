"""Assignment of CUDA devices to stages that run in parallel. Uses nvidia-smi because importing torch takes seconds."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_TIMEOUT_SECONDS = 60.0


def visible_devices(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the devices in CUDA_VISIBLE_DEVICES if it is set, else the indices of all GPUs that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        given = (device.strip() for device in environment["CUDA_VISIBLE_DEVICES"].split(","))
        return tuple(device for device in given if device)
    command = ["nvidia-smi", "-L"]
    try:
        listing = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    # Lines of MIG instances are indented.
    num_devices = sum(line.startswith("GPU ") for line in listing.splitlines())
    return tuple(str(number) for number in range(num_devices))


def least_used_devices(devices: Sequence[str], used: Iterable[Sequence[str]], count: int) -> tuple[str, ...]:
    """Return up to `count` devices with the fewest users; `used`: the devices of each running stage."""
    num_users = Counter(device for stage_devices in used for device in stage_devices)
    return tuple(sorted(devices, key=lambda device: num_users[device])[:count])
