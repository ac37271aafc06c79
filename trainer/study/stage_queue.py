"""Order of a study's stages by their dependencies, and CUDA devices for stages that run in parallel."""

import math
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from trainer.study import status
from trainer.study.stages import Stage


class StageQueue:
    """Queue of the stages that are not started, in the study's order. The report runs last, even after failures."""

    def __init__(self, todo: Sequence[Stage], done: Iterable[Stage]) -> None:
        self._done = {stage.label for stage in done}
        # The report is queued even if it is done, because it is outdated as soon as another stage ends.
        self.waiting = [stage for stage in todo if stage.label not in self._done or stage.kind == "report"]
        self._all = {stage.label for stage in todo}
        self._failed: set[str] = set()

    def pop_ready(self, max_ranks: float = math.inf) -> Stage | None:
        """Remove and return the first stage of at most `max_ranks` ranks whose dependencies are done; None if there is none.

        Earlier stages that are done already or depend on a failed stage are also removed, and recorded as done or failed.
        """
        for stage in list(self.waiting):
            needs = self._all - {stage.label} if stage.kind == "report" else set(stage.needs)
            if stage.num_ranks > max_ranks or not needs <= self._done | self._failed:
                continue
            self.waiting.remove(stage)
            if status.is_done(stage):
                self._done.add(stage.label)
            elif stage.kind != "report" and needs & self._failed:
                self._failed.add(stage.label)
            else:
                return stage
        return None

    def mark_ended(self, stage: Stage, succeeded: bool) -> None:
        """Record the end of a stage that `pop_ready` returned."""
        (self._done if succeeded else self._failed).add(stage.label)


def visible_devices(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the devices in CUDA_VISIBLE_DEVICES if it is set, else the indices of all GPUs that nvidia-smi lists."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        devices = (device.strip() for device in environment["CUDA_VISIBLE_DEVICES"].split(","))
        return tuple(filter(None, devices))
    command = ["nvidia-smi", "-L"]  # faster than the import of torch
    try:
        listing = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ()
    # Count the lines of GPUs. Lines of MIG instances are indented.
    num_devices = sum(line.startswith("GPU ") for line in listing.splitlines())
    return tuple(map(str, range(num_devices)))


def least_used_devices(devices: Sequence[str], used: Iterable[Sequence[str]], count: int) -> tuple[str, ...]:
    """Return up to `count` devices; those that the fewest stages use come first. `used`: the devices of each running stage."""
    num_users = Counter(device for stage_devices in used for device in stage_devices)
    return tuple(sorted(devices, key=lambda device: num_users[device])[:count])
