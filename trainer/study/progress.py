"""Progress of a whole study: one bar on a terminal, or a line every 15 seconds if the output is not a terminal."""

import time
from collections.abc import Sequence

from trainer.runtime import terminal
from trainer.study.estimate import StageTimes, remaining_seconds
from trainer.study.stage_job import StageJob
from trainer.study.stages import Stage

_UPDATE_SECONDS = 1.0


class StudyProgress:
    """Number of ended stages, running stages, and estimated time left. Must be closed."""

    def __init__(self, num_stages: int, num_done: int, num_parallel: int, max_ranks: int) -> None:
        self.bars = terminal.ProgressBars()
        self._overall = self.bars.add("study", num_stages, num_done)
        self._times = StageTimes()
        self._num_parallel, self._max_ranks = num_parallel, max_ranks
        self._updated_at = 0.0
        self.num_ended = num_done

    def record(self, job: StageJob) -> None:
        """Record the end of a stage, and its duration if the stage did all of its work now."""
        self.num_ended += 1
        if job.child.returncode == 0 and not job.is_resumed:
            self._times.record(job.stage, job.seconds)
        self._updated_at = 0.0

    def update(self, waiting: Sequence[Stage], running: Sequence[StageJob]) -> None:
        """Update all bars, at most once a second."""
        if time.monotonic() - self._updated_at < _UPDATE_SECONDS:
            return
        self._updated_at = time.monotonic()
        for job in running:
            job.update()
        left = [(job.stage, job.seconds_left(self._times.predict(job.stage))) for job in running]
        known = [(stage, seconds) for stage, seconds in left if seconds is not None]
        seconds = None
        if len(known) == len(left):
            seconds = remaining_seconds(waiting, known, self._times, self._num_parallel, self._max_ranks)
        text = "" if seconds is None else f"about {terminal.duration_text(seconds)} left"
        self._overall.update(self.num_ended, f"running: {', '.join(map(str, running))}", time_left=text)

    def close(self) -> None:
        self.bars.close()
