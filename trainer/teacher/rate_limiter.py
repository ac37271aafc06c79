"""Rate limit of requests, exponential backoff, and the header Retry-After."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import Mapping

MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 600.0


class RateLimiter:
    """Limiter that spaces the requests of this process evenly. 0 requests per minute: no limit."""

    def __init__(self, requests_per_minute: float) -> None:
        self._spacing = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0

    async def acquire(self) -> None:
        """Wait until one more request may be sent."""
        while True:
            now = time.monotonic()
            if now >= self._next:
                self._next = now + self._spacing
                return
            await asyncio.sleep(self._next - now)

    def back_off(self, seconds: float) -> None:
        """Delay all requests by `seconds`, as the endpoint demands."""
        self._next = max(self._next, time.monotonic() + seconds)


def backoff_seconds(attempt: int, first_seconds: float) -> float:
    """Return the wait after failed attempt number `attempt` (from 1): doubled each time, with jitter.

    The jitter of half the wait spreads requests that failed together ("equal jitter", M. Brooker, AWS Architecture
    Blog, 2015).
    """
    return min(MAX_BACKOFF_SECONDS, first_seconds * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of the header Retry-After, a number or a date (RFC 9110, 10.2.3), or None."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
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
