"""A teacher behind an OpenAI-compatible endpoint: OpenAI's, vLLM's, llama.cpp's, `transformers serve`'s, ...

The key comes from the environment (OPENAI_API_KEY) and goes into the request's header, nowhere else: what an endpoint
says in an error is shown with the key blotted out. One request a sample: not every server knows `n`.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any
from urllib.parse import urlsplit

import openai

from trainer.errors import UserError
from trainer.teacher.prompts import stop_texts
from trainer.teacher.rate_limiter import RateLimiter, backoff_seconds, retry_after_seconds
from trainer.teacher.responses import Request, Response
from trainer.teacher.settings import AnnotateSettings

API_KEY_VARIABLE = "OPENAI_API_KEY"
_PROBE_SECONDS = 10.0
_NO_KEY = "none"  # the client insists on one; a local server does not look at it
_RETRIED_STATUSES = (408, 409, 425, 429)
_PERMANENT_STATUSES = {
    401: f"give the right key in {API_KEY_VARIABLE}",
    403: f"the key in {API_KEY_VARIABLE} may not do this",
    404: "check base_url (it usually ends in /v1) and model",
}


class RequestFailed(Exception):
    """One request got no answer, whatever was tried; the message says why."""


class _MalformedResponse(Exception):
    """An answer that is none."""


class Endpoint:
    """Asks one request at a time, repeating what failed for a while. Make it and use it in one event loop."""

    def __init__(self, settings: AnnotateSettings) -> None:
        self._settings = settings
        key = os.environ.get(API_KEY_VARIABLE, "").strip()
        if not key.isascii() or not key.isprintable():
            raise UserError(f"{API_KEY_VARIABLE} holds characters that no key has; set it again")
        self._secret = key
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=key or _NO_KEY,
            max_retries=0,
            timeout=settings.timeout_seconds,
        )
        self._pace = RateLimiter(settings.requests_per_minute)
        self.stopped = False

    def stop(self) -> None:
        """From now on nothing is repeated: what is under way is the last."""
        self.stopped = True

    async def close(self) -> None:
        await self._client.close()

    async def probe(self) -> None:
        """Fail at once, with one message, where every request would fail: nobody there, or a wrong key.

        Asks for the list of models, which costs nothing; an endpoint need not have one.
        """
        where = self._settings.base_url
        try:
            await self._client.models.list(timeout=_PROBE_SECONDS)
        except openai.APITimeoutError:
            raise UserError(
                f"{where} did not answer within {_PROBE_SECONDS:.0f} s; is it still starting?"
            ) from None
        except openai.APIConnectionError as error:
            reason = error.__cause__ or error
            raise UserError(
                f"no endpoint at {where}: {self._without_key(str(reason))}; start the server, or mend base_url"
            ) from None
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._is_permanent(error) from None
        except (openai.OpenAIError, json.JSONDecodeError, UnicodeDecodeError):
            pass  # it has another list of models, or none; requests will show

    async def complete(self, request: Request) -> Response:
        """The endpoint's answer. Raises Unanswered, and UserError where no other request would be answered either."""
        problem = ""
        for attempt in range(1, self._settings.max_attempts + 1):
            if self.stopped:
                raise RequestFailed(problem or "not asked any more")
            await self._pace.acquire()
            try:
                return await self._request_once(request)
            except openai.APIStatusError as error:
                problem = self._error_text(error)
                if error.status_code in _PERMANENT_STATUSES or error.code == "insufficient_quota":
                    raise self._is_permanent(error) from None
                if error.status_code not in _RETRIED_STATUSES and error.status_code < 500:
                    raise RequestFailed(problem) from None
                wait = retry_after_seconds(error.response.headers)
                if wait is not None:
                    self._pace.back_off(wait)
            except openai.APITimeoutError:
                problem, wait = f"no answer within {self._settings.timeout_seconds:g} s", None
            except openai.APIConnectionError as error:
                problem, wait = self._without_key(f"no connection: {error.__cause__ or error}"), None
            except (openai.OpenAIError, _MalformedResponse) as error:
                problem, wait = f"malformed answer: {str(error)[:200]}", None
            if attempt < self._settings.max_attempts and not self.stopped:
                await asyncio.sleep(
                    backoff_seconds(attempt, self._settings.retry_seconds) if wait is None else 0
                )
        raise RequestFailed(f"{problem} (attempt {self._settings.max_attempts})")

    async def _request_once(self, request: Request) -> Response:
        """Raises the client's errors, and _Malformed."""
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
                return _read(await self._client.chat.completions.create(**options))
            options["max_tokens"] = self._settings.max_new_tokens
            return _read(await self._client.completions.create(prompt=request.prompt, **options))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise _MalformedResponse(f"its body is not JSON ({error})") from None

    def _error_text(self, error: openai.APIStatusError) -> str:
        detail = error.body if isinstance(error.body, str) else (error.body or error.message)
        return self._without_key(f"status {error.status_code}: {' '.join(str(detail).split())[:300]}")

    def _is_permanent(self, error: openai.APIStatusError) -> UserError:
        remedy = _PERMANENT_STATUSES.get(error.status_code, "mend that, then run the same command again")
        return UserError(f"{self._settings.base_url} refuses, {self._error_text(error)}; {remedy}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._secret, "***") if self._secret else text


def check_url(url: str) -> None:
    """Raises UserError for what is no http(s) address, and for one that carries a password."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises ValueError for a port that is no number
    except ValueError as error:
        raise UserError(f"base_url is {url!r}: {error}") from None
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"base_url holds a name, a password or a query; give the key in {API_KEY_VARIABLE} only"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"base_url is {url!r}; write http://host:port/v1")


def _read(answer: Any) -> Response:
    """Of an answer that says 200 but may be anything: the client checks no types. Raises _Malformed."""
    choices = None if isinstance(answer, str) else getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise _MalformedResponse("it holds no choices")
    text = (
        choices[0].message.content if getattr(choices[0], "message", None) else getattr(choices[0], "text", 0)
    )
    if text is not None and not isinstance(text, str):
        raise _MalformedResponse("its first choice holds no text")
    finish_reason = choices[0].finish_reason
    return Response(
        text or "",  # a refusal, or nothing but reasoning: an answer that was paid for
        finish_reason if isinstance(finish_reason, str) else "stop",
        _count(answer.usage, "prompt_tokens"),
        _count(answer.usage, "completion_tokens"),
    )


def _count(usage: Any, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and value >= 0 else None
