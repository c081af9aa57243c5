"""`make demo` against a stand-in, and against a real service with the embedded catcher."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.service import PATIENCE, ROOT, Service, environment, free_port
from tests.support.smtp_server import SmtpServer

DEMO = (sys.executable, "-m", "app.terminal.demo")


def demo(directory: Path, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run the demo, and return its output."""
    return subprocess.run(
        DEMO,
        cwd=directory,
        env=environment(**variables),
        check=False,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )


@pytest.mark.thorough
def test_the_demo_shows_mails_that_are_deferred_and_refused(tmp_path: Path) -> None:
    with Service(tmp_path, api_keys="the-key", root_path="/mail") as service:
        url = f"{service.url}/mail"
        shown = demo(tmp_path, url=url, afterward_api_key="the-key")
    assert shown.stderr == ""
    assert shown.returncode == 0
    assert "202 after" in shown.stdout
    assert "The end: 196 succeeded, 4 failed." in shown.stdout
    assert "attempt 1 failed after" in shown.stdout
    assert "The service answered 422: email: " in shown.stdout
    assert f"python -m app tasks list --status failed --url {url}" in shown.stdout


@pytest.mark.thorough
def test_without_the_catcher_every_mail_is_taken(tmp_path: Path, smtp_server: SmtpServer) -> None:
    """As with docker compose, where Mailpit takes the mail."""
    with Service(tmp_path, catcher=False, smtp_port=smtp_server.port) as service:
        shown = demo(tmp_path, port=service.port)
    assert shown.returncode == 0
    assert "The end: 200 succeeded." in shown.stdout
    assert "8025 with Docker" in shown.stdout
    assert "--status failed" not in shown.stdout


@pytest.mark.thorough
def test_the_demo_names_the_address_at_which_no_service_answers(tmp_path: Path) -> None:
    port = free_port()
    shown = demo(tmp_path, port=port)
    assert shown.returncode == 2
    line = f"Nothing answers at http://127.0.0.1:{port}. Start the service with: make run\n"
    assert shown.stderr == line


def test_make_demo_runs_this_program() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo: ")[2].partition("\n\n")[0]
    assert "python -m app.terminal.demo" in recipe
