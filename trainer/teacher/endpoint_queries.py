"""Send requests to an endpoint concurrently. Each response is written to disk as it arrives."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trainer.errors import UserError
from trainer.runtime import terminal
from trainer.teacher.endpoint import Endpoint, RequestFailed
from trainer.teacher.job import AnnotationJob
from trainer.teacher.responses import Response, ResponseLog, TeacherRequest

_MAX_CONSECUTIVE_FAILURES = 5  # after this many failed requests in a row, the run ends


def query_endpoint(job: AnnotationJob, queues: Sequence[Sequence[TeacherRequest]], log: ResponseLog) -> None:
    """Send the requests of every queue and append the responses to the log. Requests with a logged response are not sent.

    The requests of a queue are for one problem. They are sent one by one until this problem needs no more samples. Raises
    UserError if the endpoint is unreachable, refuses requests or stops answering. Without `allow_unanswered`, also raises
    UserError if a request has no response. After an error, the responses to requests in flight are still logged.
    """

    async def query() -> None:
        endpoint = Endpoint(job.settings)
        async with endpoint.client:
            await endpoint.probe()
            with terminal.progress_bar("annotate", len(queues)) as bar:
                workers = _Workers(job, endpoint, iter(queues), log, bar)
                await asyncio.gather(*(workers.work() for _ in range(job.settings.concurrency)))
        workers.report()

    asyncio.run(query())


@dataclass
class _Workers:
    job: AnnotationJob
    endpoint: Endpoint
    queues: Iterator[Sequence[TeacherRequest]]
    log: ResponseLog
    bar: terminal.ProgressBar
    in_flight: dict[str, asyncio.Task[Response | None]] = field(default_factory=dict)
    unanswered: dict[str, str] = field(default_factory=dict)  # problem id -> reason
    num_done: int = 0
    num_answered: int = 0
    num_consecutive_failures: int = 0
    error: UserError | None = None

    async def work(self) -> None:
        for queue in self.queues:
            for request in queue:
                if self.endpoint.is_stopped:
                    return
                response = self.log.get(request.key) or await self._respond(request)
                if response is not None and self.job.needs_no_more_samples(request, response):
                    break
                if response is None and not self.job.settings.allow_unanswered:
                    break  # the next run retries this request; with its response, later requests may be unnecessary
            self.num_done += 1
            text = f"{self.num_answered} answers, {len(self.unanswered)} unanswered"
            self.bar.update(self.num_done, text)

    def report(self) -> None:
        """Raise UserError after a fatal error or failed requests. With `allow_unanswered`, failed requests only cause a warning."""
        if self.error:
            raise UserError(f"{self.error} ({self.num_answered} answers of this run are kept)")
        if not self.unanswered:
            return
        id, reason = next(iter(self.unanswered.items()))
        message = f"{len(self.unanswered)} problems have requests without an answer, first {id}: {reason}"
        if not self.job.settings.allow_unanswered:
            raise UserError(
                f"{message}. {self.num_answered} answers of this run are kept; run the same command again for the missing "
                "answers only, or give --allow_unanswered to finish without them"
            )
        terminal.warning(message)

    async def _respond(self, request: TeacherRequest) -> Response | None:
        """Return the response, or None if the request fails. Concurrent requests with equal keys are sent once."""
        if request.key not in self.in_flight:
            self.in_flight[request.key] = asyncio.ensure_future(self._send(request))
        response = await self.in_flight[request.key]
        self.in_flight.pop(request.key, None)
        return response

    async def _send(self, request: TeacherRequest) -> Response | None:
        try:
            response = await self.endpoint.complete(request)
            self.log.append(request, self.job.settings.model, response)
        except UserError as error:
            self._stop(error)
            return None
        except RequestFailed as error:
            if not self.endpoint.is_stopped:
                self.unanswered.setdefault(request.problem_id, str(error))
                self.num_consecutive_failures += 1
                if self.num_consecutive_failures >= _MAX_CONSECUTIVE_FAILURES:
                    url, count = self.job.settings.base_url, self.num_consecutive_failures
                    self._stop(UserError(f"{url} answered none of {count} requests in a row: {error}"))
            return None
        self.num_consecutive_failures = 0
        self.num_answered += 1
        return response

    def _stop(self, error: UserError) -> None:
        self.error = self.error or error
        self.endpoint.is_stopped = True
