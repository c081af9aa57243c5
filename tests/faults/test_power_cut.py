"""The power is cut at random instants while 8 clients send. Unwritten data is lost.

Every row that was answered 202 is in the database, and the database is intact. The service starts
on it before the next cut. The disk is a loop-mounted ext4 (see tests/support/power.py).
"""

import random
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.support.power import Disk, cut_under_load, inspect_database, settings_on
from tests.support.service import Service
from tests.support.torture import Tried, form

CUTS = form(2, 100)
WEAKENED = (sys.executable, "-m", "tests.support.weakened_durability")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path) as disk:
        yield disk


def test_every_row_that_was_answered_202_is_in_the_database(
    disk: Disk, tmp_path: Path, tried: Tried
) -> None:
    """The first cut comes soon after the first row, while the file and its directory are new."""
    accepted: dict[str, str] = {}
    with Service(tmp_path, **settings_on(disk), worker_concurrency=0) as service:
        for _ in range(CUTS):
            accepted |= cut_under_load(disk, service, send)
            verdict, tasks, keys = inspect_database(disk)

            assert verdict == "ok"
            assert set(accepted) - tasks == set()
            assert set(accepted.values()) - keys == {""}
            service.start()

    tried(f"{CUTS} cuts, {len(accepted):,} rows answered 202", "0 lost, integrity ok each time")


def test_control_without_fsync_rows_are_lost(disk: Disk, tmp_path: Path, tried: Tried) -> None:
    """SQLite's synchronous = NORMAL, the usual setting with a WAL."""
    cuts = form(1, 15)
    losses = []
    with Service(
        tmp_path,
        command=WEAKENED,
        without="fsync of commits",
        **settings_on(disk),
        worker_concurrency=0,
    ) as service:
        for _ in range(cuts):
            accepted = cut_under_load(disk, service, send)
            _, tasks, _ = inspect_database(disk)
            losses.append(len(set(accepted) - tasks))
            service.start()

    lost = sum(loss > 0 for loss in losses)
    tried("synchronous = NORMAL", f"rows lost in {lost} of {cuts} cuts, {sum(losses):,} in all")
    assert lost == cuts


def send(client: httpx2.Client) -> tuple[str, str] | None:
    """Request a mail, at random with an Idempotency-Key; return the task's id and the key."""
    # Requests without a key share a statement, and requests with a key have their own.
    key = random.choice(["", str(uuid.uuid4())])
    headers = {"Idempotency-Key": key} if key else {}
    answer = client.post("/send-notification/ada@example.com", headers=headers)
    return (answer.json()["id"], key) if answer.status_code == httpx2.codes.ACCEPTED else None
