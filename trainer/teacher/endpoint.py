"""Client of a teacher behind an OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, `transformers serve`, ...).

The API key (OPENAI_API_KEY in the environment) appears only in the header of requests, and is masked in the endpoint's
error messages. Each sample is one request, because not every server supports the parameter `n` (samples per request).
"""

import asyncio
import email.utils
import json
import os
import random
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import openai

from trainer.errors import UserError
from trainer.teacher.prompts import stop_texts
from trainer.teacher.responses import Response, TeacherRequest
from trainer.teacher.settings import AnnotateSettings

API_KEY_VARIABLE = "OPENAI_API_KEY"
MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 600.0
_PROBE_SECONDS = 10.0
_RETRIED_STATUSES = (408, 409, 425, 429)
_PERMANENT_STATUSES = {
    401: f"give the right key in {API_KEY_VARIABLE}",
    403: f"the key in {API_KEY_VARIABLE} has no permission for this",
    404: "check base_url (it usually ends in /v1) and model",
}


class RequestFailed(Exception):
    """A request has failed and is not retried, or is not sent because the run stops. The message has the reason."""


class _MalformedResponse(Exception):
    """The server's answer holds no valid completion. The message has the reason."""


class Endpoint:
    """Client that sends requests and retries failed requests. Must be created and used in one event loop.

    After `is_stopped` is set to True, no request is retried, and new calls of `complete` send no request. Requests in flight
    are completed. Requests that wait for the rate limiter are still sent.
    """

    def __init__(self, settings: AnnotateSettings) -> None:
        self._settings = settings
        key = os.environ.get(API_KEY_VARIABLE, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(f"{API_KEY_VARIABLE} holds characters that no key has; set it again")
        self._secret = key
        # The client requires a key. Servers without keys ignore the value.
        self.client = openai.AsyncOpenAI(
            base_url=settings.base_url, api_key=key or "none", max_retries=0, timeout=settings.timeout_seconds
        )
        self._rate_limiter = RateLimiter(settings.requests_per_minute)
        self.is_stopped = False

    async def probe(self) -> None:
        """Raise UserError if no server answers or the server rejects the API key.

        Requests the list of models, which is free of charge. An endpoint without a list of models passes the check.
        """
        where = self._settings.base_url
        try:
            await self.client.models.list(timeout=_PROBE_SECONDS)
        except openai.APITimeoutError:
            limit = f"{_PROBE_SECONDS:.0f} s"
            raise UserError(f"{where} did not answer within {limit}; is it still starting?") from None
        except openai.APIConnectionError as error:
            reason = self._without_key(str(error.__cause__ or error))
            remedy = "start the server, or correct base_url"
            raise UserError(f"no endpoint at {where}: {reason}; {remedy}") from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._permanent_error(error) from None
        except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError):
            pass  # the endpoint has no list of models

    async def complete(self, request: TeacherRequest) -> Response:
        """Return the response. Raises UserError if all requests would fail, RequestFailed if only this request fails."""
        problem = ""
        for attempt in range(1, self._settings.max_attempts + 1):
            if self.is_stopped:
                raise RequestFailed(problem or "not sent, because the run stops")
            await self._rate_limiter.acquire()
            try:
                return await self._request_once(request)
            except openai.APIStatusError as error:
                problem = self._error_text(error)
                if error.status_code in _PERMANENT_STATUSES or error.code == "insufficient_quota":
                    raise self._permanent_error(error) from None
                if error.status_code not in _RETRIED_STATUSES and error.status_code < 500:
                    raise RequestFailed(problem) from None
                wait = retry_after_seconds(error.response.headers)
                if wait is not None:
                    self._rate_limiter.back_off(wait)
            except openai.APITimeoutError:
                problem, wait = f"no answer within {self._settings.timeout_seconds:g} s", None
            except openai.APIConnectionError as error:
                problem, wait = self._without_key(f"no connection: {error.__cause__ or error}"), None
            except (openai.OpenAIError, _MalformedResponse) as error:
                problem, wait = f"malformed response: {str(error)[:200]}", None
            if attempt < self._settings.max_attempts and not self.is_stopped and wait is None:
                await asyncio.sleep(backoff_seconds(attempt, self._settings.retry_seconds))
        raise RequestFailed(f"{problem} (attempt {self._settings.max_attempts})")

    async def _request_once(self, request: TeacherRequest) -> Response:
        """Send the request once and return the response. Raises _MalformedResponse or `openai`'s errors on failure."""
        options: dict[str, Any] = {
            "model": self._settings.model,
            "temperature": self._settings.temperature,
            "top_p": self._settings.top_p,
        }
        if stop := stop_texts(self._settings):
            options["stop"] = stop
        try:
            if self._settings.api == "chat":
                options[self._settings.token_limit_field] = self._settings.max_new_tokens
                options["messages"] = [{"role": "user", "content": request.prompt}]
                return _parse_completion(await self.client.chat.completions.create(**options))
            options["max_tokens"] = self._settings.max_new_tokens
            return _parse_completion(await self.client.completions.create(prompt=request.prompt, **options))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _MalformedResponse(f"its body is not JSON ({error})") from None

    def _error_text(self, error: openai.APIStatusError) -> str:
        detail = error.body if isinstance(error.body, str) else (error.body or error.message)
        return self._without_key(f"status {error.status_code}: {' '.join(str(detail).split())[:300]}")

    def _permanent_error(self, error: openai.APIStatusError) -> UserError:
        remedy = _PERMANENT_STATUSES.get(error.status_code, "fix that, then run the same command again")
        refusal = f"{self._settings.base_url} refused the request, {self._error_text(error)}"
        return UserError(f"{refusal}; {remedy}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._secret, "***") if self._secret else text


def check_url(url: str) -> None:
    """Raise UserError for a URL that is not http(s), or that has a user name, a password or a query."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises ValueError for a port that is not a number)
    except ValueError as error:
        raise UserError(f"base_url is {url!r}: {error}") from None
    if parts.username or parts.password or parts.query:
        raise UserError(f"base_url holds a name, password or query; give the key in {API_KEY_VARIABLE} only")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"base_url is {url!r}; write http://host:port/v1")


def _parse_completion(answer: Any) -> Response:
    """Convert a completion to a Response. Raises _MalformedResponse for wrong types, which `openai` does not check."""
    choices = None if isinstance(answer, str) else getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise _MalformedResponse("it holds no choices")
    message = getattr(choices[0], "message", None)
    text = message.content if message else getattr(choices[0], "text", 0)
    if text is not None and not isinstance(text, str):
        raise _MalformedResponse("its first choice holds no text")
    finish_reason = choices[0].finish_reason
    return Response(
        text or "",  # a missing text is not an error: the model refused, or spent all tokens on reasoning
        finish_reason if isinstance(finish_reason, str) else "stop",
        _count(answer.usage, "prompt_tokens"),
        _count(answer.usage, "completion_tokens"),
    )


def _count(usage: Any, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and value >= 0 else None


class RateLimiter:
    """Rate limiter with a minimum interval between the requests of this process. A rate of 0 means no limit."""

    def __init__(self, requests_per_minute: float) -> None:
        self._spacing = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0

    async def acquire(self) -> None:
        """Wait until one more request may be sent."""
        while (now := time.monotonic()) < self._next:
            await asyncio.sleep(self._next - now)
        self._next = now + self._spacing

    def back_off(self, seconds: float) -> None:
        """Make all calls of `acquire` wait until at least `seconds` from now, as the header Retry-After requires."""
        self._next = max(self._next, time.monotonic() + seconds)


def backoff_seconds(attempt: int, first_seconds: float) -> float:
    """Return the seconds to wait after attempt number `attempt` (from 1).

    The wait doubles after each attempt, up to MAX_BACKOFF_SECONDS. Then it is shortened at random by up to half, so that
    requests that failed together are not repeated together ("equal jitter", AWS Architecture Blog, 2015).
    """
    return min(MAX_BACKOFF_SECONDS, first_seconds * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the seconds in the header Retry-After (RFC 9110, 10.2.3); None if the header is absent or malformed."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    if seconds != seconds:  # NaN
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)
