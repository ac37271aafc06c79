"""Send the missing requests to an endpoint concurrently; each response is written to disk as it arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.teacher.endpoint import Endpoint, RequestFailed
from trainer.teacher.job import AnnotationJob
from trainer.teacher.responses import Response, ResponseLog, TeacherRequest

_MAX_CONSECUTIVE_FAILURES = 5  # then the endpoint counts as down


def query_endpoint(job: AnnotationJob, queues: Sequence[Sequence[TeacherRequest]], log: ResponseLog) -> None:
    """Process the queues: the next request of a queue is sent unless the previous response satisfies.

    Raises UserError if the endpoint is unreachable, refuses or stops answering, and, without `allow_unanswered`, if any
    request has no response. Requests in flight at an error are awaited, so that the log has every response.
    """
    asyncio.run(_query(job, queues, log))


async def _query(job: AnnotationJob, queues: Sequence[Sequence[TeacherRequest]], log: ResponseLog) -> None:
    endpoint = Endpoint(job.settings)
    async with endpoint.client:
        await endpoint.probe()
        with terminal.progress_bar("annotate", len(queues)) as bar:
            workers = _Workers(job, endpoint, queues, log, bar)
            await asyncio.gather(*(workers.work() for _ in range(job.settings.concurrency)))
    workers.report()


class _Workers:
    """State shared by the concurrent workers."""

    def __init__(
        self,
        job: AnnotationJob,
        endpoint: Endpoint,
        queues: Sequence[Sequence[TeacherRequest]],
        log: ResponseLog,
        bar: terminal.ProgressBar,
    ) -> None:
        self._job, self._settings, self._endpoint, self._log, self._bar = (
            job,
            job.settings,
            endpoint,
            log,
            bar,
        )
        self._queues = iter(queues)
        self._in_flight: dict[str, asyncio.Task[Response | None]] = {}
        self._num_done = self._num_answered = self._num_consecutive_failures = 0
        self._unanswered: dict[str, str] = {}  # problem id -> reason
        self._error: UserError | None = None

    async def work(self) -> None:
        for queue in self._queues:
            for request in queue:
                if self._endpoint.is_stopped:
                    return
                response = self._log.get(request.key) or await self._respond(request)
                if response is not None and self._job.is_satisfied(request, response):
                    break
                if response is None and not self._settings.allow_unanswered:
                    break  # this sample may still succeed in the next run
            self._num_done += 1
            self._bar.update(
                self._num_done, f"{self._num_answered} answers, {len(self._unanswered)} unanswered"
            )

    def report(self) -> None:
        """Raise the error of the run, or warn of requests without a response, after all workers have ended."""
        if self._error:
            raise UserError(f"{self._error} ({self._num_answered} answers of this run are kept)")
        if not self._unanswered:
            return
        id, reason = next(iter(self._unanswered.items()))
        message = f"{len(self._unanswered)} problems have requests without an answer, first {id}: {reason}"
        if not self._settings.allow_unanswered:
            raise UserError(
                f"{message}. {self._num_answered} answers of this run are kept; run the same command again for the rest "
                "only, or give --allow_unanswered to finish without them"
            )
        terminal.warning(message)

    async def _respond(self, request: TeacherRequest) -> Response | None:
        """Return the response, or None after recording the failure; requests with equal keys are sent once."""
        if request.key not in self._in_flight:
            self._in_flight[request.key] = asyncio.ensure_future(self._send(request))
        response = await self._in_flight[request.key]
        self._in_flight.pop(request.key, None)
        return response

    async def _send(self, request: TeacherRequest) -> Response | None:
        try:
            response = await self._endpoint.complete(request)
            self._log.append(request, self._settings.model, response)
        except UserError as error:
            self._stop(error)
            return None
        except RequestFailed as error:
            if not self._endpoint.is_stopped:
                self._unanswered.setdefault(request.problem_id, str(error))
                self._num_consecutive_failures += 1
                if self._num_consecutive_failures >= _MAX_CONSECUTIVE_FAILURES:
                    url, count = self._settings.base_url, self._num_consecutive_failures
                    self._stop(UserError(f"{url} answered none of {count} requests in a row: {error}"))
            return None
        self._num_consecutive_failures = 0
        self._num_answered += 1
        return response

    def _stop(self, error: UserError) -> None:
        self._error = self._error or error
        self._endpoint.is_stopped = True
