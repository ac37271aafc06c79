"""Which stage may start next. Knows what is done, not how it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainer.study import status
from trainer.study.stages import Stage


class StageQueue:
    """The stages that wait, in the order they are to be done: of those whose needs are done the first one comes next.

    Stages that need a broken one break with it. The report waits for everything, and shows what there is.
    """

    def __init__(self, todo: Sequence[Stage], done: Iterable[Stage]) -> None:
        self._done = {stage.label for stage in done}
        # A report that is there is out of date as soon as anything else is done.
        self._waiting = [stage for stage in todo if stage.label not in self._done or stage.kind == "report"]
        self._all = {stage.label for stage in todo}
        self._broken: set[str] = set()

    def take_ready(self) -> Stage | None:
        """The next stage to start; it no longer waits. None: all that wait need one that has been started."""
        for stage in list(self._waiting):
            needs = self._all - {stage.label} if stage.kind == "report" else set(stage.needs)
            if not needs <= self._done | self._broken:
                continue
            self._waiting.remove(stage)
            if status.is_done(stage):
                self._done.add(stage.label)
            elif stage.kind != "report" and needs & self._broken:
                self._broken.add(stage.label)
            else:
                return stage
        return None

    def mark_ended(self, stage: Stage, well: bool) -> None:
        """Tell that a stage that was started has ended."""
        (self._done if well else self._broken).add(stage.label)
