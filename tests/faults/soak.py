"""A study on a two-node Slurm, disturbed at random for some minutes: python -m tests.faults.soak --minutes 20

The study is submitted as a user submits one, twice: once nobody disturbs it, then everybody does. What must be the same
is: every loss and gradient norm, the exported weights, every prediction. Where the disturbance ends a job for good (it
was cancelled, its disk is full), the same is done that a user does: `tools/study.py resubmit --failed`.

*Goodput* is the time of the steps that count (of a step that was done twice, the last one) over the time from the
submission to the end of the training: what is left after restarts, waiting in the queue and repeated steps.
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
from tests.slurm_cluster import DEV_CLUSTER, REPOSITORY, Cluster, make
from trainer.storage import atomic_dir
from trainer.storage.run_directory import RunDirectory

RUN = "stories.cot.0.2m.s0"
TEST = "stories-test-cot"
PILOT_STEPS = 40
SHARE = 0.5  # of the minutes an undisturbed training would take: disturbed, it shall take all of them
SHORT_WAITS = {
    "DEV_CLUSTER_GRACE": "60",
    "DEV_CLUSTER_KILL_WAIT": "10",
    "DEV_CLUSTER_NODE_LOST": "10",
    "DEV_CLUSTER_REQUEUE_WAIT": "15",
}
DISK_BYTES = 300 << 20
MOST_STEPS_BETWEEN = 120  # two disturbances
RESTART_SECONDS = 75.0  # within which a disturbed job begins again, or was not disturbed
PATIENCE_SECONDS = 1800.0  # for a study to end once it is left in peace


@dataclass
class Outcome:
    """What happened. `events`: seconds since the submission, the step that was done last, and what was done to it.

    `seconds`: from the submission to the end of the training; `lost`: what is not as in the undisturbed study.
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
    """A study of one training over both nodes, in `folder`; its runs are below `runs`."""

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
        """Every step as often as it was done; a line that was being written when its writer died is none."""
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
        """How often the training's job began."""
        log = self.run.log("train")
        return log.read_text(errors="replace").count("\n=== ") + 1 if log.exists() else 0

    def has_jobs(self) -> bool:
        """Also while slurmctld does not answer."""
        status, output = self.cluster.run("squeue", "--noheader", "--partition=low")
        return status != 0 or bool(output.strip())

    def done(self) -> bool:
        return self.run.evaluation(TEST).results.exists() and not self.has_jobs()

    def result(self) -> dict[str, Any]:
        """What must not depend on any disturbance."""
        run = self.run
        return {
            "losses or gradient norms": oracle.trajectory(run),
            "weights or moments": oracle.state_digest(run.checkpoint(run.checkpoint_steps()[-1])),
            "export": atomic_dir.read_manifest(run.export)["files"]["model.safetensors"]["sha256"],
            "predictions": run.evaluation(TEST).predictions.read_bytes(),
        }


class Soak:
    """One study that is disturbed until `minutes` are over or its training is done, and then left in peace."""

    def __init__(self, study: SoakedStudy, minutes: float, seed: int, say: Callable[[str], None]):
        self.study, self.end, self.say = study, 60 * minutes, say
        self.choice = random.Random(seed)
        self.outcome = Outcome()
        self.start = time.monotonic()

    def __call__(self) -> Outcome:
        self.study.submit()
        waiting: list[Disturbance] = []
        while self._goes_on(self.choice.randint(1, MOST_STEPS_BETWEEN)):
            if not waiting:  # everything in turn, in another order each time
                waiting = self.choice.sample(self._disturbances(), len(self._disturbances()))
            self._disturb(waiting.pop())
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.study.done():
            assert time.monotonic() < deadline, f"not done: {self.study.command('status')[1]}"
            self._look()
        return self.outcome

    def _disturbances(self) -> list[Disturbance]:
        disk = [disturbances.fill_disk(self.study.runs)] if self.study.runs.is_mount() else []
        return [*disturbances.DISTURBANCES, *disk]

    def _disturb(self, how: Disturbance) -> None:
        starts, event = self.study.starts(), (self._now(), self.study.step())
        try:
            what = how(self.study.cluster, self.choice)
        except LookupError:
            return  # nobody is there just now
        self.outcome.events.append((*event, what))
        self.say(f"{event[0]:6.0f} s  step {event[1]:<6} {what}")
        # Most of it ends the job, but not always, and not at once.
        deadline = time.monotonic() + RESTART_SECONDS
        while self.study.starts() == starts and time.monotonic() < deadline:
            self._look()

    def _goes_on(self, steps: int) -> bool:
        """Wait for so many steps; False if the training, or the time for disturbances, is over."""
        before = len(self.study.logged())
        while len(self.study.logged()) < before + steps:
            if self.outcome.seconds or self._now() > self.end:
                return False
            self._look()
        return True

    def _look(self) -> None:
        """As somebody who looks after the study now and then."""
        time.sleep(0.5)
        if not self.outcome.seconds and self.study.trained():
            self.outcome.seconds = self._now()
        if (
            not self.study.has_jobs() and not self.study.done()
        ):  # in this order: a job may end between the two looks
            status, output = self.study.command("resubmit", "--failed")
            assert status == 0, output
            self.outcome.resubmitted += 1
            self.say(f"{self._now():6.0f} s  step {self.study.step():<6} -> resubmit --failed")

    def _now(self) -> float:
        return time.monotonic() - self.start


def count(study: SoakedStudy, outcome: Outcome, expected: dict[str, Any]) -> None:
    """Fill in what the run directory tells."""
    lines = study.logged()
    last = {line["step"]: line for line in lines}
    outcome.steps, outcome.repeated_steps = len(last), len(lines) - len(last)
    outcome.useful_seconds = sum(line["seconds"] for line in last.values())
    outcome.starts = study.starts()
    found = study.result()
    outcome.lost += [f"other {name}" for name in expected if found[name] != expected[name]]
    run = study.run
    outcome.lost += [f"left behind: {path}" for path in (run.lock, run.heartbeats) if path.exists()]


def soak(folder: Path, minutes: float, seed: int, say: Callable[[str], None] = print) -> Outcome:
    """Start a cluster in `folder` (its path is short), run the study undisturbed and disturbed, end the cluster."""
    cluster = make(folder / "c", **SHORT_WAITS)
    try:
        steps = pilot(SoakedStudy(cluster, folder, folder / "pilot"), minutes, say)
        calm = SoakedStudy(cluster, folder, folder / "calm")
        calm.write(steps)
        start = time.monotonic()
        calm.submit()
        cluster.wait(calm.done, "the undisturbed study is over", PATIENCE_SECONDS)
        say(f"undisturbed: {steps} steps, the whole study in {time.monotonic() - start:.0f} s")
        disturbed = SoakedStudy(cluster, folder, folder / "disturbed")
        if not disturbances.mount(disturbed.runs, DISK_BYTES):
            say("no file system of its own (mount is not allowed): its disk is not filled")
        try:
            outcome = Soak(disturbed, minutes, seed, say)()
            count(disturbed, outcome, calm.result())
        finally:
            disturbances.unmount(disturbed.runs)
    finally:
        cluster.run_well(DEV_CLUSTER, "down")
    outcome.lost += [f"still running: {process}" for process in cluster.processes()]
    return outcome


def pilot(study: SoakedStudy, minutes: float, say: Callable[[str], None]) -> int:
    """How many steps take `SHARE` of the minutes here."""
    study.write(PILOT_STEPS)
    study.submit()
    study.cluster.wait(study.trained, "the pilot has trained")
    study.command("cancel")
    study.cluster.wait(lambda: not study.has_jobs(), "the pilot is over")
    seconds = statistics.median(line["seconds"] for line in study.logged())
    say(f"pilot: {seconds * 1000:.0f} ms a step")
    return max(PILOT_STEPS, int(SHARE * 60 * minutes / seconds))


def in_words(outcome: Outcome) -> str:
    kinds = Counter(re.sub(r"\b(rank|node) \w+", r"a \1", what) for _, _, what in outcome.events)
    rows = [f"{count:5}  {what}" for what, count in sorted(kinds.items())]
    return "\n".join(
        [
            "times  what was done to it",
            *rows,
            f"{len(outcome.events):5}  in all",
            f"{outcome.starts:5}  starts of the training, {outcome.resubmitted} submissions by hand after a cancellation or failure",
            f"{outcome.steps:5}  steps, {outcome.repeated_steps} done again",
            f"goodput {outcome.useful_seconds / outcome.seconds:.0%}: {outcome.useful_seconds:.0f} s of steps that count "
            f"in {outcome.seconds:.0f} s from submission to the last step",
            f"lost: {len(outcome.lost)}" + "".join(f"\n  {what}" for what in outcome.lost),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="disturb for so long [20]")
    parser.add_argument("--seed", type=int, default=0, help="of the disturbances [0]")
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))  # a socket's path has at most 107 characters
    outcome = soak(folder, flags.minutes, flags.seed)
    print(in_words(outcome))
    if outcome.lost:
        sys.exit(f"kept: {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
