"""A real browser for tests of the page: an installed Chromium, driven by playwright."""

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
    """The path of a Chromium: the one of the variable CHROMIUM, else the first on the PATH; "" if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), "")


@contextlib.contextmanager
def browser() -> Iterator:
    """A running browser (playwright's); skips the test, saying why, where there is none."""
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
