"""A headless Chromium on the page. Skipped where playwright (the extra `browser`) or a Chromium is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .server import Answer, PageServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox"] if os.name == "posix" and os.geteuid() == 0 else []  # Chromium's sandbox refuses root


@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., PageServer]]:
    """Starts servers for one test."""
    servers: list[PageServer] = []

    def start(answer: Answer, **options: Any) -> PageServer:
        servers.append(PageServer(answer, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    """Opens a page in a browser profile of its own. The test fails where a script did, where the content policy was
    broken, or where anything was asked of another origin."""
    contexts, wrong = [], []

    def open_(server: PageServer | str, *, context: Any = None, **options: Any) -> Any:
        url = server if isinstance(server, str) else server.url
        if context is None:
            context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, **options})
            context.set_default_timeout(15_000)
            contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: "Content Security Policy" in m.text and wrong.append(m.text))
        page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or wrong.append(r.url))
        page.goto(url)
        page.wait_for_selector("body.ready")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not wrong
