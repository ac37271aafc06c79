"""Ask an endpoint for everything that has no answer yet, several requests at a time; every answer is on the disk at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.teacher.endpoint import Endpoint, RequestFailed
from trainer.teacher.responses import Request, Response, ResponseLog
from trainer.teacher.settings import AnnotateSettings

_GIVE_UP_AFTER = 5  # requests in a row without an answer: the endpoint is down, not the request odd

IsSatisfied = Callable[[Request, Response], bool]


def query_endpoint(
    settings: AnnotateSettings, queues: Sequence[Sequence[Request]], log: ResponseLog, satisfied: IsSatisfied
) -> None:
    """Work through the queues: the next request of a queue is sent if the answer before it did not satisfy.

    Raises UserError if the endpoint is not there or refuses, if it stops answering, and, without `allow_unanswered`,
    if it left any request unanswered. What was answered is in the log in any case: requests that are under way when
    something goes wrong are waited for.
    """
    asyncio.run(_ask(settings, queues, log, satisfied))


async def _ask(
    settings: AnnotateSettings, queues: Sequence[Sequence[Request]], log: ResponseLog, satisfied: IsSatisfied
) -> None:
    endpoint = Endpoint(settings)
    try:
        await endpoint.probe()
        with terminal.progress("annotate", len(queues)) as bar:
            workers = _Workers(settings, endpoint, queues, log, satisfied, bar)
            await asyncio.gather(*(workers.work() for _ in range(settings.concurrency)))
    finally:
        await endpoint.close()
    workers.report()


class _Workers:
    """What the workers share."""

    def __init__(
        self,
        settings: AnnotateSettings,
        endpoint: Endpoint,
        queues: Sequence[Sequence[Request]],
        log: ResponseLog,
        satisfied: IsSatisfied,
        bar: terminal.ProgressBar,
    ) -> None:
        self._settings, self._endpoint, self._log, self._bar = settings, endpoint, log, bar
        self._waiting, self._satisfied = iter(queues), satisfied
        self._under_way: dict[str, asyncio.Task[Response | None]] = {}
        self._num_done = self._num_answered = self._in_a_row = 0
        self._unanswered: dict[str, str] = {}  # problem id -> why
        self._fault: UserError | None = None

    async def work(self) -> None:
        for queue in self._waiting:
            for request in queue:
                if self._endpoint.stopped:
                    return
                response = self._log.get(request.key) or await self._answer(request)
                if response is not None and self._satisfied(request, response):
                    break
                if response is None and not self._settings.allow_unanswered:
                    break  # the next sample is not paid for while this one may still turn out good
            self._num_done += 1
            self._bar.update(
                self._num_done, f"{self._num_answered} answers, {len(self._unanswered)} unanswered"
            )

    def report(self) -> None:
        """Raise what went wrong, now that nothing is under way."""
        if self._fault:
            raise UserError(f"{self._fault} ({self._num_answered} answers of this run are kept)")
        if not self._unanswered:
            return
        id, why = next(iter(self._unanswered.items()))
        what = f"{len(self._unanswered)} problems have requests without an answer, first {id}: {why}"
        if not self._settings.allow_unanswered:
            raise UserError(
                f"{what}. {self._num_answered} answers of this run are kept; run the same command again to ask for "
                "the rest only, or give --allow_unanswered to finish without them"
            )
        terminal.warning(what)

    async def _answer(self, request: Request) -> Response | None:
        """Ask; requests with one key (the same question twice) are asked once. None: no answer, noted."""
        if request.key not in self._under_way:
            self._under_way[request.key] = asyncio.ensure_future(self._ask(request))
        response = await self._under_way[request.key]
        self._under_way.pop(request.key, None)
        return response

    async def _ask(self, request: Request) -> Response | None:
        try:
            response = await self._endpoint.complete(request)
            self._log.append(request, self._settings.model, response)
        except UserError as error:
            self._stop(error)
            return None
        except RequestFailed as error:
            if not self._endpoint.stopped:
                self._unanswered.setdefault(request.problem_id, str(error))
                self._in_a_row += 1
                if self._in_a_row >= _GIVE_UP_AFTER:
                    where = self._settings.base_url
                    self._stop(
                        UserError(f"{where} answered none of {self._in_a_row} requests in a row: {error}")
                    )
            return None
        self._in_a_row = 0
        self._num_answered += 1
        return response

    def _stop(self, fault: UserError) -> None:
        self._fault = self._fault or fault
        self._endpoint.stop()
