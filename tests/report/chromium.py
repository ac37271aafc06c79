"""An installed Chromium, driven by playwright, for tests of the page."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-component-update", "--disable-sync"),
)


def find_chromium() -> str:
    """Return the path in the variable CHROMIUM, else of the first Chromium on the PATH; "" without one."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), "")


@contextlib.contextmanager
def browser() -> Iterator:
    """Context manager with a running browser (playwright's); skips the test without Chromium or playwright."""
    path = find_chromium()
    if not path:
        pytest.skip("no Chromium on this machine; install one, or name it in CHROMIUM")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (extra 'dev')"
    )
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=list(_FLAGS), timeout=120_000)
        yield running
        running.close()
