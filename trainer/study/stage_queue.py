"""Queue of the stages of a study, ordered by their dependencies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainer.study import status
from trainer.study.stages import Stage


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
