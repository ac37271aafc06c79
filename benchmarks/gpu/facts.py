"""Facts about the GPU of a measurement, from nvidia-smi, because importing torch takes seconds."""

from __future__ import annotations

import functools
import re
import subprocess
from typing import Any

from benchmarks import machine

QUERY = ("name", "memory.total", "driver_version")


@functools.cache
def device() -> str:
    """`NVIDIA H200, 143771 MiB, driver 580.159.04`, or `CPU`."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "CPU"
    name, memory, driver = (part.strip() for part in output.splitlines()[0].split(","))
    return f"{name}, {memory}, driver {driver}"


def facts() -> dict[str, Any]:
    """Return the facts of the machine and the device; `machine` is the device's name if there is one."""
    found = {**machine.facts(), "device": device()}
    if device() != "CPU":
        found["machine"] = re.sub(r"\W+", "-", device().split(",")[0]).strip("-").lower()
    return found
