"""Soak test of a study on a two-node Slurm, disturbed at random for some minutes: python -m tests.faults.soak --minutes 20

The study is submitted twice with tools/study.py, first undisturbed, then disturbed. Every loss and gradient norm, the
exported weights and every prediction must be the same. After a disturbance that ends a job (cancelled, disk full) the
test runs `tools/study.py resubmit --failed`.

*Goodput* is the time of the steps (of a repeated step, the last one) divided by the time from the submission to the end
of the training. Restarts, waiting in the queue and repeated steps lower it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.faults import disturbances, oracle
from tests.faults.disturbances import Disturbance
from tests.slurm_cluster import DEV_CLUSTER, REPOSITORY, Cluster, start_cluster
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

RUN = "stories.cot.0.2m.s0"
TEST = "stories-test-cot"
PILOT_STEPS = 40
UNDISTURBED_SHARE = 0.5  # of the minutes, for the undisturbed training; the disturbed one takes longer
SHORT_WAITS = {
    "DEV_CLUSTER_GRACE": "60",
    "DEV_CLUSTER_KILL_WAIT": "10",
    "DEV_CLUSTER_NODE_LOST": "10",
    "DEV_CLUSTER_REQUEUE_WAIT": "15",
}
DISK_BYTES = 300 << 20
MAX_STEPS_BETWEEN = 120  # two disturbances
RESTART_SECONDS = 75.0  # for a disturbed job to start again; not every disturbance ends it
STUDY_TIMEOUT_SECONDS = 1800.0  # for a study to end without further disturbances


@dataclass
class Outcome:
    """Result of a soak test. `events`: (seconds since the submission, last finished step, disturbance).

    `seconds`: from the submission to the end of the training; `lost`: differences from the undisturbed study.
    """

    events: list[tuple[float, int, str]] = field(default_factory=list)
    starts: int = 0
    resubmitted: int = 0
    seconds: float = 0.0
    useful_seconds: float = 0.0
    steps: int = 0
    repeated_steps: int = 0
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SoakedStudy:
    """A study of one training on both nodes; its file is in `folder`, its runs are below `runs`."""

    cluster: Cluster
    folder: Path
    runs: Path

    def write(self, steps: int) -> None:
        train = {
            "max_steps": steps,
            "pack_length": 512,
            "save_steps": max(5, steps // 40),
            "heartbeat_timeout_seconds": 20,
        }
        values = {
            "study": "soak",
            "num_ranks": 2,
            "data": {"stories": {"train": {"num_problems": 400}, "test": {"num_problems": 24, "seed": 3}}},
            "models": {"0.2m": {"config_name": "stories-0.2m", "learning_rate": 3e-3}},
            "methods": ["cot"],
            "prepare": {"tokenizer_name": "stories", "num_processes": 1},
            "train": {**train, "deepspeed": str(REPOSITORY / "ds_configs" / "zero2.json")},
            "evaluate": {"max_new_tokens": 48},
        }
        site = {
            "PARTITION": "low", "GPUS_PER_NODE": 1, "GPU_TYPE": "pretended", "TIME_LIMIT": "01:00:00",
            "VENV": Path(sys.executable).parent.parent,
        }  # fmt: skip
        (self.folder / "soak.yaml").write_text(yaml.safe_dump(values))
        (self.folder / "cluster.env").write_text("".join(f"{key}={value}\n" for key, value in site.items()))

    def command(self, *words: str | Path) -> tuple[int, str]:
        tool = REPOSITORY / "tools" / "study.py"
        return self.cluster.run(
            sys.executable,
            tool,
            words[0],
            "soak.yaml",
            "--output_dir",
            self.runs,
            *words[1:],
            cwd=self.folder,
        )

    def submit(self) -> None:
        status, output = self.command("submit", "--cluster", "cluster.env")
        assert status == 0, output

    @property
    def run(self) -> RunDirectory:
        return RunDirectory(self.runs / "soak" / RUN)

    def logged(self) -> list[dict[str, Any]]:
        """Return all logged steps, repeated ones too, without corrupt lines."""
        found = []
        for line in self.run.metrics.read_text().splitlines() if self.run.metrics.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return [line for line in found if "loss" in line]

    def trained(self) -> bool:
        steps = [
            step for step in self.run.checkpoint_steps() if atomic_dir.is_complete(self.run.checkpoint(step))
        ]
        return bool(steps) and atomic_dir.read_manifest(self.run.checkpoint(steps[-1]))["facts"]["finished"]

    def step(self) -> int:
        lines = self.logged()
        return lines[-1]["step"] if lines else 0

    def starts(self) -> int:
        """Return the number of starts of the training's job."""
        log = self.run.log("train")
        return log.read_text(errors="replace").count("\n=== ") + 1 if log.exists() else 0

    def has_jobs(self) -> bool:
        """Return whether jobs are left; True while slurmctld does not answer."""
        status, output = self.cluster.run("squeue", "--noheader", "--partition=low")
        return status != 0 or bool(output.strip())

    def done(self) -> bool:
        return self.run.evaluation(TEST).results.exists() and not self.has_jobs()

    def result(self) -> dict[str, Any]:
        """Return all that must not depend on disturbances."""
        run = self.run
        return {
            "losses or gradient norms": oracle.trajectory(run),
            "weights or moments": oracle.state_digest(run.checkpoint(run.checkpoint_steps()[-1])),
            "export": atomic_dir.read_manifest(run.export)["files"]["model.safetensors"]["sha256"],
            "predictions": run.evaluation(TEST).predictions.read_bytes(),
        }


class Soak:
    """Disturbs a study until `minutes` are over or its training is finished, then waits for its end."""

    def __init__(self, study: SoakedStudy, minutes: float, seed: int, log: Callable[[str], None]):
        self.study, self.end, self.log = study, 60 * minutes, log
        self.choice = random.Random(seed)
        self.outcome = Outcome()
        self.start = time.monotonic()

    def __call__(self) -> Outcome:
        self.study.submit()
        waiting: list[Disturbance] = []
        while self._wait_for_steps(self.choice.randint(1, MAX_STEPS_BETWEEN)):
            if not waiting:  # all in turn, in another order each time
                waiting = self.choice.sample(self._disturbances(), len(self._disturbances()))
            self._disturb(waiting.pop())
        deadline = time.monotonic() + STUDY_TIMEOUT_SECONDS
        while not self.study.done():
            assert time.monotonic() < deadline, f"not done: {self.study.command('status')[1]}"
            self._poll()
        return self.outcome

    def _disturbances(self) -> list[Disturbance]:
        disk = [disturbances.fill_disk(self.study.runs)] if self.study.runs.is_mount() else []
        return [*disturbances.DISTURBANCES, *disk]

    def _disturb(self, disturbance: Disturbance) -> None:
        starts, event = self.study.starts(), (self._now(), self.study.step())
        try:
            description = disturbance(self.study.cluster, self.choice)
        except LookupError:
            return  # no rank is running
        self.outcome.events.append((*event, description))
        self.log(f"{event[0]:6.0f} s  step {event[1]:<6} {description}")
        # Most disturbances end the job, some of them after a while.
        deadline = time.monotonic() + RESTART_SECONDS
        while self.study.starts() == starts and time.monotonic() < deadline:
            self._poll()

    def _wait_for_steps(self, num_steps: int) -> bool:
        """Wait for steps; return False if the training, or the time for disturbances, is over."""
        before = len(self.study.logged())
        while len(self.study.logged()) < before + num_steps:
            if self.outcome.seconds or self._now() > self.end:
                return False
            self._poll()
        return True

    def _poll(self) -> None:
        """Record the end of the training, and resubmit ended jobs."""
        time.sleep(0.5)
        if not self.outcome.seconds and self.study.trained():
            self.outcome.seconds = self._now()
        # In this order: a job may end between the two queries.
        if not self.study.has_jobs() and not self.study.done():
            status, output = self.study.command("resubmit", "--failed")
            assert status == 0, output
            self.outcome.resubmitted += 1
            self.log(f"{self._now():6.0f} s  step {self.study.step():<6} -> resubmit --failed")

    def _now(self) -> float:
        return time.monotonic() - self.start


def count(study: SoakedStudy, outcome: Outcome, expected: dict[str, Any]) -> None:
    """Fill in the outcome from the run directory."""
    lines = study.logged()
    last = {line["step"]: line for line in lines}
    outcome.steps, outcome.repeated_steps = len(last), len(lines) - len(last)
    outcome.useful_seconds = sum(line["seconds"] for line in last.values())
    outcome.starts = study.starts()
    found = study.result()
    outcome.lost += [f"other {name}" for name in expected if found[name] != expected[name]]
    run = study.run
    outcome.lost += [f"left behind: {path}" for path in (run.lock, run.heartbeats) if path.exists()]


def soak(folder: Path, minutes: float, seed: int, log: Callable[[str], None] = print) -> Outcome:
    """Run the study undisturbed and disturbed on a cluster in `folder`, whose path must be short."""
    cluster = start_cluster(folder / "c", **SHORT_WAITS)
    try:
        steps = pilot(SoakedStudy(cluster, folder, folder / "pilot"), minutes, log)
        undisturbed = SoakedStudy(cluster, folder, folder / "undisturbed")
        undisturbed.write(steps)
        start = time.monotonic()
        undisturbed.submit()
        cluster.wait(undisturbed.done, "the undisturbed study is over", STUDY_TIMEOUT_SECONDS)
        log(f"undisturbed: {steps} steps, the whole study in {time.monotonic() - start:.0f} s")
        disturbed = SoakedStudy(cluster, folder, folder / "disturbed")
        if not disturbances.mount(disturbed.runs, DISK_BYTES):
            log("no separate file system (mount is not allowed): the disk is not filled")
        try:
            outcome = Soak(disturbed, minutes, seed, log)()
            count(disturbed, outcome, undisturbed.result())
        finally:
            disturbances.unmount(disturbed.runs)
    finally:
        cluster.run_well(DEV_CLUSTER, "down")
    outcome.lost += [f"still running: {process}" for process in cluster.processes()]
    return outcome


def pilot(study: SoakedStudy, minutes: float, log: Callable[[str], None]) -> int:
    """Return the number of steps that take `UNDISTURBED_SHARE` of the minutes on this machine."""
    study.write(PILOT_STEPS)
    study.submit()
    study.cluster.wait(study.trained, "the pilot has trained")
    study.command("cancel")
    study.cluster.wait(lambda: not study.has_jobs(), "the pilot is over")
    seconds = statistics.median(line["seconds"] for line in study.logged())
    log(f"pilot: {seconds * 1000:.0f} ms a step")
    return max(PILOT_STEPS, int(UNDISTURBED_SHARE * 60 * minutes / seconds))


def summary(outcome: Outcome) -> str:
    kinds = Counter(re.sub(r"\b(rank|node) \w+", r"a \1", text) for _, _, text in outcome.events)
    rows = [f"{count:5}  {kind}" for kind, count in sorted(kinds.items())]
    return "\n".join(
        [
            "times  disturbance",
            *rows,
            f"{len(outcome.events):5}  in all",
            f"{outcome.starts:5}  starts of the training, {outcome.resubmitted} submissions after a cancellation or failure",
            f"{outcome.steps:5}  steps, {outcome.repeated_steps} repeated",
            f"goodput {outcome.useful_seconds / outcome.seconds:.0%}: {outcome.useful_seconds:.0f} s of steps "
            f"in {outcome.seconds:.0f} s from submission to the last step",
            f"lost: {len(outcome.lost)}" + "".join(f"\n  {loss}" for loss in outcome.lost),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="duration of the disturbances [20]")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the disturbances [0]")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))  # a socket's path has at most 107 characters
    outcome = soak(folder, flags.minutes, flags.seed)
    print(summary(outcome))
    if outcome.lost:
        sys.exit(f"kept: {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
