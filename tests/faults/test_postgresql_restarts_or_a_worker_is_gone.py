"""PostgreSQL restarts under load, a worker dies, or the network isolates a worker.

The other workers finish the tasks within 60 seconds, and no task that was answered 202 is lost.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.kills import disturb_under_load
from tests.support.marks import leave_a_mark
from tests.support.network import HERE, SUBNET, Machine, machines
from tests.support.postgres import Postgres, Sql, with_tables
from tests.support.service import COMMAND, PATIENCE, Process, Service, until
from tests.support.smtp_server import SmtpServer
from tests.support.torture import LONG, Tried, form
from tests.support.workers import UNFINISHED, WORKER, put, runs, workers

RESTARTS = form(2, 20)
CRASHES = 4  # of the control: a crash loses nothing if all commits have just been written out
LEASE = form(1.0, 30.0)  # seconds, of the worker that dies
CUT_OFF = form(3.0, 60.0)  # seconds of a worker's isolation
GOES_ON_WITHIN = 60.0
SEND = "/send-notification/ada@example.com"


# PostgreSQL restarts


@pytest.fixture
def url(mistreated: Postgres) -> str:
    """The URL of a new database with the service's tables."""
    return with_tables(mistreated)


@pytest.fixture
def service(tmp_path: Path, url: str, smtp_server: SmtpServer) -> Iterator[Service]:
    """The API with an embedded worker."""
    with Service(
        tmp_path,
        queue_url=url,
        catcher=False,
        smtp_port=smtp_server.port,
        worker_concurrency=form(4, 10),
        lease_seconds=2,
    ) as service:
        yield service


def test_restarts_of_postgresql_under_load_lose_no_mail(
    service: Service, mistreated: Postgres, smtp_server: SmtpServer, tried: Tried
) -> None:
    """Every other restart is a crash, the others are an operator's fast shutdown."""
    ways = [mistreated.stop, mistreated.kill] * RESTARTS

    def restart() -> None:
        ways.pop()()
        mistreated.start()

    tally = disturb_under_load(
        service, smtp_server, restart, times=RESTARTS, accepted=100 * RESTARTS
    )
    tried(f"{RESTARTS} restarts, {len(tally.accepted):,} answered 202", str(tally))
    assert tally.lost == tally.given_up == set()
    assert tally.renamed == 0


def test_control_with_asynchronous_commits_a_crash_loses_mail(
    service: Service, mistreated: Postgres, smtp_server: SmtpServer, url: str, tried: Tried
) -> None:
    """With synchronous_commit = off, PostgreSQL confirms commits before they are on disk.

    The service refuses to start with this setting. But ALTER DATABASE affects only new
    connections, so the running service meets it after the first crash.
    """
    mistreated.sql(f"ALTER DATABASE {url.rpartition('/')[2]} SET synchronous_commit = off")
    smtp_server.delay["dot"] = 0.1  # so that most accepted tasks are waiting at a crash

    def crash() -> None:
        mistreated.kill()
        mistreated.start()

    tally = disturb_under_load(service, smtp_server, crash, times=CRASHES, accepted=40 * CRASHES)
    tried(
        f"synchronous_commit = off: {CRASHES} crashes, {len(tally.accepted)} answered 202",
        f"{len(tally.lost)} lost",
    )
    assert tally.lost


# A worker dies


def test_other_workers_finish_the_tasks_of_a_worker_that_dies(
    tmp_path: Path, database_url: str, sql: Sql, tried: Tried
) -> None:
    """Each task that the worker was running is started a second time."""
    count = form(40, 200)  # enough for a worker that starts late
    held = "SELECT count(*) FROM afterward.tasks WHERE status = 'running' AND owner LIKE '%:{}:%'"
    ids = put(database_url, leave_a_mark, count, seconds=0.5)
    settings = {"queue_url": database_url, "lease_seconds": LEASE, "worker_concurrency": 4}
    with workers(tmp_path, 3, **settings) as (victim, *others):
        until(lambda: sql(held.format(victim.pid)) != "0", within=PATIENCE)
        victim.kill()
        left = int(sql(held.format(victim.pid)))
        took = until(lambda: sql(UNFINISHED) == "0", within=GOES_ON_WITHIN)
        assert [other.stop() for other in others] == [0, 0]

    done = runs(tmp_path)
    tried(
        f"a worker of three dies with {left} tasks, lease {LEASE:g} s",
        f"{len(ids - set(done))} of {count} lost, all done after {took:.1f} s",
    )
    assert set(done) == ids
    assert done.total() - len(ids) <= left
    assert left > 0
    assert sql("SELECT attempts, count(*) FROM afterward.tasks GROUP BY attempts ORDER BY 1") == (
        f"1|{len(ids) - left}\n2|{left}"
    )


# The network isolates a worker: each machine is a network namespace


SMTP_PORT = 2525
CUT_OFF_LEASE = 2.0
SECONDS = 3.0  # that a mail takes on the isolated machine: longer than its lease
LOCKED_AT_MOST = 12.0  # PostgreSQL ends an idle transaction after 10 s
SLOW_SMTP = (sys.executable, "-m", "tests.support.slow_smtp", str(SMTP_PORT))
STUCK_WORKER = (sys.executable, "-m", "tests.support.stuck_worker")
FACTS = "SELECT * FROM afterward.tasks WHERE id <> '{}' ORDER BY seq"


@pytest.fixture
def network() -> Iterator[list[Machine]]:
    """Three machines. PostgreSQL runs on this machine."""
    with machines(3) as network:
        yield list(network)


@pytest.fixture
def postgres_here(network: list[Machine]) -> Iterator[Postgres]:
    """A PostgreSQL that only the machines can reach."""
    with Postgres(listen_addresses=f"127.0.0.1,{HERE}") as postgres:
        postgres.let_in(SUBNET)
        yield postgres


def test_another_worker_finishes_the_tasks_of_an_isolated_worker(
    tmp_path: Path, network: list[Machine], postgres_here: Postgres, tried: Tried
) -> None:
    """The isolated worker's outcomes change no row, and its locks delay no other worker."""
    here = with_tables(postgres_here)
    url = here.replace("127.0.0.1", HERE)
    front, lonely, other = network

    def on(machine: Machine, name: str, *command: str) -> Process:
        return Process(
            tmp_path / name,
            command=(*machine.within, *command),
            queue_url=url,
            smtp_port=SMTP_PORT,
            lease_seconds=CUT_OFF_LEASE,
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
        stuck = stack.enter_context(on(lonely, "stuck", *STUCK_WORKER))
        until(lambda: "locked" in stuck.log, within=PATIENCE, what=stuck.log)
        held = [api.post(SEND).json()["id"] for _ in range(3)]
        cut_off = stack.enter_context(on(lonely, "cut-off", *WORKER))
        for task_id in held:
            api.wait_for(task_id, "running")
        lonely.unplug()
        began = time.monotonic()
        # PostgreSQL may still run a claim that the isolated worker has sent before.
        time.sleep(0.5)

        at_hand = stack.enter_context(on(other, "at-hand", *WORKER))
        for task_id in [api.post(SEND).json()["id"] for _ in range(3)]:
            assert api.wait_for(task_id)["attempts"] == 1, at_hand.log
        free_after = time.monotonic() - began
        until(lambda: finished(api, held), within=GOES_ON_WITHIN)
        done_after = time.monotonic() - began
        assert {api.get(f"/tasks/{task_id}").json()["attempts"] for task_id in held} == {2}
        assert at_hand.log.count('"task recovered"') == len(held)
        if LONG:
            until(lambda: finished(api, [half_claimed]), within=LOCKED_AT_MOST)
        until(lambda: cut_off.log.count('"mail handed over"') == len(held), within=PATIENCE)
        facts = postgres_here.sql(FACTS.format(half_claimed), here)
        time.sleep(max(0.0, began + CUT_OFF - time.monotonic()))

        lonely.plug_in()
        back = time.monotonic()
        until(lambda: cut_off.log.count('"task lost"') == len(held), within=30)
        noticed_after = time.monotonic() - back
        assert postgres_here.sql(FACTS.format(half_claimed), here) == facts

        at_hand.kill()
        api.wait_for(api.post(SEND).json()["id"], "running")  # the isolated worker works again
        assert '"task succeeded"' not in cut_off.log
    tried(
        f"a worker cut off for {CUT_OFF:g} s with {len(held)} tasks, lease {CUT_OFF_LEASE:g} s",
        f"new tasks done {free_after:.1f} s after the cut, all {done_after:.1f} s after it; "
        f"its late results turned down {noticed_after:.1f} s after it was back",
    )


def finished(api: Service, ids: list[str]) -> bool:
    """Return whether all these tasks have succeeded."""
    return all(api.get(f"/tasks/{task_id}").json()["status"] == "succeeded" for task_id in ids)
