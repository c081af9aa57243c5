"""The hour of tasks and mails from which `make screenshots` takes its pictures."""

import asyncio
import time
from pathlib import Path

import pytest

from scripts.showcase import write_hour
from tests.support.gate import served
from tests.support.pages import BROWSER


@pytest.mark.thorough
def test_a_service_that_starts_on_the_hour_shows_it(tmp_path: Path) -> None:
    """It has tasks in each minute, mails in the inbox, and a mail that waits after three 4xx."""
    asyncio.run(write_hour(tmp_path, time.time()))
    with served(tmp_path, worker_concurrency=0) as client:
        assert "5 in the last 60 minutes" in client.get("/", headers=BROWSER).text
        (task,) = client.get("/tasks?about=ada@example.com").json()["data"]
        assert (task["status"], task["attempts"]) == ("retrying", 3)
        assert len(client.get("/inbox").json()["data"]) == 8
