"""Fixtures for `python -m app tasks`: the command in this process, against a stand-in service."""

import sys
from collections.abc import Callable

import httpx2
import pytest

from app.terminal.commands import main
from tests.terminal.stand_in import StandIn

Run = Callable[..., int]


@pytest.fixture
def stand_in() -> StandIn:
    """A stand-in for the service, with the answers that a test gives it."""
    return StandIn()


@pytest.fixture
def run(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command against the stand-in, without a pause, and return its exit code."""
    monkeypatch.delenv("AFTERWARD_API_KEY", raising=False)
    monkeypatch.setattr("app.terminal.following.time.sleep", lambda _: None)

    def run(*arguments: str) -> int:
        url = () if "--url" in arguments else ("--url", "http://127.0.0.1:8000")
        return main([*arguments, *url], httpx2.MockTransport(stand_in))

    return run


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Let the captured output count as a terminal of 100 columns.

    Each phase of a test has other streams, but of the same class.
    """
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
