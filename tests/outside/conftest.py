"""Fixtures for third-party programs: browsers, SMTP servers and clients, a proxy, Prometheus."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, expect, sync_playwright

from tests.support.postfix import Postfix
from tests.support.service import PATIENCE, Service
from tests.support.tools import skip_or_fail, tool

NewPage = Callable[..., Page]
Serve = Callable[..., Service]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, for all tests of a file."""
    path = tool("chromium")
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A function that starts a service with these settings. It runs until the pages are closed."""
    with ExitStack() as services:
        yield lambda **settings: services.enter_context(Service(tmp_path / "service", **settings))


@pytest.fixture
def complaints() -> list[str]:
    """The messages in the console of the browser, its errors, and its requests to other servers.

    One of them fails the test, unless the test removes it from the list. So does a violation of the
    Content-Security-Policy, which the browser reports in its console.
    """
    return []


@pytest.fixture
def answers() -> dict[str, bool]:
    """The answer to each question (`confirm`) that the test expects. Others are complaints."""
    return {}


@pytest.fixture
def new_page(
    browser: Browser,
    serve: Serve,
    complaints: list[str],
    answers: dict[str, bool],
) -> Iterator[NewPage]:
    """A function that opens a page in a new profile, with these options.

    It depends on `serve`, because the pages must be closed before the services end.
    """
    profiles: list[BrowserContext] = []

    def check_address(url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:")):
            complaints.append(f"loads {url}")

    def note(message: str) -> None:
        # A browser notes each error of a server, also those that a test makes on purpose.
        if not message.startswith("Failed to load resource: the server responded with"):
            complaints.append(message)

    def answer(dialog: Dialog) -> None:
        if dialog.message not in answers:
            complaints.append(f"asks {dialog.message}")
        if answers.pop(dialog.message, False):
            dialog.accept()
        else:
            dialog.dismiss()

    def open_page(**options: Any) -> Page:
        profile = browser.new_context(**{"viewport": {"width": 1100, "height": 900}} | options)
        profiles.append(profile)
        profile.set_default_timeout(1000 * PATIENCE)
        profile.on("console", lambda message: note(message.text))
        profile.on("weberror", lambda error: complaints.append(str(error.error)))
        profile.on("request", lambda request: check_address(request.url))
        profile.on("dialog", answer)
        return profile.new_page()

    yield open_page
    for profile in profiles:
        profile.close()
    assert complaints == []
    assert answers == {}, "questions that were not asked"


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
