"""A worker is cut off from the others while it works; each machine is a network of its own."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.scale.network import HERE, SUBNET, Machine, machines
from tests.scale.support import CUT_OFF, WORKER, until
from tests.support.postgres import Postgres, with_tables
from tests.support.service import COMMAND, Process, Service

SMTP_PORT = 2525
LEASE = 2.0
SECONDS = 3.0  # for a mail on the machine that is cut off: longer than its lease
LOCKED_AT_MOST = 12.0  # what nobody commits is given up after 10
SLOW_SMTP = (sys.executable, "-m", "tests.scale.slow_smtp", str(SMTP_PORT))
STUCK = (sys.executable, "-m", "tests.scale.stuck")
SEND = "/send-notification/ada@example.com"
FACTS = "SELECT * FROM afterward.tasks WHERE id <> '{}' ORDER BY seq"


@pytest.fixture
def network() -> Iterator[list[Machine]]:
    """Three machines; PostgreSQL is on this one."""
    with machines(3) as network:
        yield list(network)


@pytest.fixture
def postgres_here(network: list[Machine]) -> Iterator[Postgres]:
    """A PostgreSQL that the machines reach, and nobody else."""
    with Postgres(listen_addresses=f"127.0.0.1,{HERE}") as postgres:
        postgres.let_in(SUBNET)
        yield postgres


def test_the_tasks_of_a_worker_that_is_cut_off_are_done_by_another(
    tmp_path: Path, network: list[Machine], postgres_here: Postgres
) -> None:
    """What it finishes meanwhile changes nothing, and no lock that it held holds anybody up."""
    here = with_tables(postgres_here)
    url = here.replace("127.0.0.1", HERE)
    front, lonely, other = network

    def on(machine: Machine, name: str, *command: str) -> Process:
        return Process(
            tmp_path / name,
            command=(*machine.within, *command),
            queue_url=url,
            smtp_port=SMTP_PORT,
            lease_seconds=LEASE,
        )

    with ExitStack() as stack:
        api = stack.enter_context(
            Service(
                tmp_path / "api",
                command=(*front.within, *COMMAND),
                host=front.address,
                queue_url=url,
                catcher=False,
                worker_concurrency=0,
            )
        )
        for machine, name, seconds in ((lonely, "a", SECONDS), (other, "b", 0.1)):
            stack.enter_context(on(machine, f"smtp-{name}", *SLOW_SMTP, str(seconds)))

        half_claimed = api.post(SEND).json()["id"]
        stuck = stack.enter_context(on(lonely, "stuck", *STUCK))
        until(lambda: "locked" in stuck.log, within=10, what=stuck.log)
        held = [api.post(SEND).json()["id"] for _ in range(3)]
        cut_off = stack.enter_context(on(lonely, "cut-off", *WORKER))
        for task_id in held:
            api.wait_for(task_id, "running")
        lonely.unplug()
        began = time.monotonic()

        at_hand = stack.enter_context(on(other, "at-hand", *WORKER))
        for task_id in [api.post(SEND).json()["id"] for _ in range(3)]:
            assert api.wait_for(task_id)["attempts"] == 1
        free_after = time.monotonic() - began
        until(lambda: finished(api, held), within=60)
        done_after = time.monotonic() - began
        assert {api.get(f"/tasks/{task_id}").json()["attempts"] for task_id in held} == {2}
        assert at_hand.log.count('"task recovered"') == len(held)
        if CUT_OFF > LOCKED_AT_MOST:
            until(lambda: finished(api, [half_claimed]), within=LOCKED_AT_MOST)
        until(lambda: cut_off.log.count('"mail handed over"') == len(held), within=20)
        facts = postgres_here.sql(FACTS.format(half_claimed), here)
        time.sleep(max(0.0, began + CUT_OFF - time.monotonic()))

        lonely.plug_in()
        back = time.monotonic()
        until(lambda: cut_off.log.count('"task lost"') == len(held), within=30)
        noticed_after = time.monotonic() - back
        assert postgres_here.sql(FACTS.format(half_claimed), here) == facts

        at_hand.kill()
        api.wait_for(api.post(SEND).json()["id"], "running")  # it works again
        assert '"task succeeded"' not in cut_off.log
    print(
        f"new tasks done {free_after:.1f} s after the cut, all {done_after:.1f} s after it; "
        f"{noticed_after:.1f} s after it was back the late results were turned down"
    )


def finished(api: Service, ids: list[str]) -> bool:
    """Whether all of them have succeeded."""
    return all(api.get(f"/tasks/{task_id}").json()["status"] == "succeeded" for task_id in ids)
