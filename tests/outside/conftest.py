"""Fixtures for third-party programs: browsers, SMTP servers and clients, a proxy, Prometheus."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from tests.support.postfix import Postfix
from tests.support.service import PATIENCE
from tests.support.tools import skip_or_fail, tool

NewPage = Callable[..., Page]


@pytest.fixture
def chromium() -> str:
    """The path of Debian's Chromium."""
    return tool("chromium")


@pytest.fixture
def new_page(chromium: str) -> Iterator[NewPage]:
    """A function that opens a page with these options.

    A message in its console, an unexpected dialog, an error, or a request to another server fails
    the test.
    """
    complaints: list[str] = []
    contexts: list[BrowserContext] = []

    def check_address(url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "data:")):
            complaints.append(f"loads {url}")

    def note(message: str) -> None:
        # A browser notes each error of a server, also those that a test makes on purpose.
        if not message.startswith("Failed to load resource: the server responded with"):
            complaints.append(message)

    def open_page(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * PATIENCE)
        page.on("console", lambda message: note(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: check_address(request.url))
        return page

    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield open_page
        browser.close()
    assert complaints == []


@pytest.fixture
def smtp_sink() -> str:
    """The path of smtp-sink, Postfix's test server, which accepts any mail."""
    return tool("smtp-sink")


@pytest.fixture(scope="module")
def postfix() -> Iterator[Postfix]:
    """A private Postfix with strict settings."""
    path = tool("postfix")
    if os.geteuid() != 0:
        skip_or_fail("Postfix needs root")
    with Postfix(path) as postfix:
        yield postfix


@pytest.fixture(scope="module")
def swaks() -> str:
    """The path of swaks, the Swiss Army Knife for SMTP, a scriptable client."""
    return tool("swaks")


@pytest.fixture
def maildev() -> str:
    """The path of maildev, an SMTP server for development, from npm."""
    return tool("maildev")


@pytest.fixture(scope="module")
def nginx() -> str:
    """The path of nginx, used as a proxy."""
    return tool("nginx")


@pytest.fixture(scope="module")
def promtool() -> str:
    """The path of promtool, which comes with Prometheus."""
    return tool("promtool")
