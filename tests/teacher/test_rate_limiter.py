"""Tests of Retry-After, backoff and the rate limiter."""

from __future__ import annotations

import asyncio
import email.utils
import time

import pytest

from trainer.teacher.endpoint import (
    MAX_BACKOFF_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    RateLimiter,
    backoff_seconds,
    retry_after_seconds,
)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("0.25", 0.25),
        ("0", 0.0),
        ("-3", 0.0),
        ("1e9", MAX_RETRY_AFTER_SECONDS),
        ("inf", MAX_RETRY_AFTER_SECONDS),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after_seconds({"retry-after": value}) == seconds


def test_retry_after_a_date() -> None:
    seconds = retry_after_seconds({"retry-after": email.utils.formatdate(time.time() + 300, usegmt=True)})
    assert seconds is not None and 200 < seconds <= 300


def test_no_header() -> None:
    assert retry_after_seconds({}) is None


def test_waits_double_with_jitter_up_to_a_bound() -> None:
    for attempt in range(1, 60):
        longest = min(MAX_BACKOFF_SECONDS, 0.5 * 2 ** (attempt - 1))
        waits = [backoff_seconds(attempt, 0.5) for _ in range(20)]
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert len(set(waits)) > 1


def test_requests_per_minute_and_pauses_hold_for_all() -> None:
    async def acquire_five(limiter: RateLimiter) -> list[float]:
        async def acquire() -> float:
            await limiter.acquire()
            return time.monotonic()

        return sorted(await asyncio.gather(*(acquire() for _ in range(5))))

    begin = time.monotonic()
    limited = asyncio.run(acquire_five(RateLimiter(600)))  # one every 0.1 s
    assert [instant - begin >= 0.1 * number for number, instant in enumerate(limited)] == [True] * 5
    paused = RateLimiter(0)
    begin = time.monotonic()
    paused.back_off(0.3)
    paused.back_off(0.1)  # does not shorten it
    assert min(asyncio.run(acquire_five(paused))) - begin >= 0.3
