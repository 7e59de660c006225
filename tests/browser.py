"""A headless Chromium that opens pages from files; a machine without one skips, and says so."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass
class Opened:
    """A page of the browser, and what it did that it should not: errors, requests, dialogs."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # of the requests, those that the page's policy stopped
    dialogs: list[str] = field(default_factory=list)

    def failed(self, request: Any) -> None:
        if request.failure == "csp":
            self.refused.append(request.url)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser with a fresh profile, from $CHROMIUM or the path."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("needs chromium on the path, or in $CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Opened]:
    """A file in a context of its own."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
    try:
        page = context.new_page()
        shown = Opened(page)
        page.on("console", lambda message: message.type in ("error", "warning") and shown.errors.append(message.text))
        page.on("pageerror", lambda error: shown.errors.append(str(error)))
        page.on("request", lambda request: shown.requests.append(request.url))
        page.on("requestfailed", shown.failed)
        page.on("dialog", lambda dialog: (shown.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        yield shown
    finally:
        context.close()
