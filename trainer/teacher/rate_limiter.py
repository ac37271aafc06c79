"""When the next request may be sent: a limit per minute, and pauses that the endpoint asks for."""

from __future__ import annotations

import asyncio
import email.utils
import random
import time
from collections.abc import Mapping

MAX_BACKOFF_SECONDS = 60.0
MAX_RETRY_AFTER_SECONDS = 600.0


class RateLimiter:
    """Hands out starting times, evenly spaced over a minute, to all requests of this process."""

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
        """Nobody sends anything for so long: the endpoint said that we are too fast."""
        self._next = max(self._next, time.monotonic() + seconds)


def backoff_seconds(attempt: int, first_seconds: float) -> float:
    """Seconds to wait after failed attempt number `attempt` (from 1): doubled each time, with jitter.

    Between half and all of it, so that requests that failed together do not come back together ("equal jitter",
    M. Brooker, AWS Architecture Blog, 2015).
    """
    return min(MAX_BACKOFF_SECONDS, first_seconds * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """What the header Retry-After asks for, in seconds: a number or a date (RFC 9110, 10.2.3). None without one."""
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
