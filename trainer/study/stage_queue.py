"""Order of the stages of a study by their dependencies, and CUDA devices of stages that run in parallel."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from trainer.study import status
from trainer.study.stages import Stage

_TIMEOUT_SECONDS = 60.0


class StageQueue:
    """Stages that have not been started, in the order of the study.

    Stages that depend on a failed stage fail with it. The report runs last, even after failures.
    """

    def __init__(self, todo: Sequence[Stage], done: Iterable[Stage]) -> None:
        self._done = {stage.label for stage in done}
        # An existing report is outdated as soon as another stage ends.
        self._waiting = [stage for stage in todo if stage.label not in self._done or stage.kind == "report"]
        self._all = {stage.label for stage in todo}
        self._failed: set[str] = set()

    def take_ready(self) -> Stage | None:
        """Remove and return the first stage whose dependencies are done; None if there is none now."""
        for stage in list(self._waiting):
            needs = self._all - {stage.label} if stage.kind == "report" else set(stage.needs)
            if not needs <= self._done | self._failed:
                continue
            self._waiting.remove(stage)
            if status.is_done(stage):
                self._done.add(stage.label)
            elif stage.kind != "report" and needs & self._failed:
                self._failed.add(stage.label)
            else:
                return stage
        return None

    def mark_ended(self, stage: Stage, succeeded: bool) -> None:
        """Record the end of a stage that `take_ready` returned."""
        (self._done if succeeded else self._failed).add(stage.label)


def visible_devices(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the devices in CUDA_VISIBLE_DEVICES if it is set, else the indices of all GPUs that nvidia-smi lists.

    Importing torch instead takes seconds.
    """
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
