"""PostgreSQL starts late, stops, or hangs: the service refuses requests, and later goes on."""

import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from afterward.engines.postgres.connections import PATIENCE_SECONDS
from tests.support.postgres import PASSWORD, Postgres, with_tables
from tests.support.service import COMMAND, PATIENCE, Process, Service, free_port, until
from tests.support.smtp_server import SmtpServer
from tests.support.torture import form
from tests.support.workers import WORKER

SLOW_SMTP = (sys.executable, "-m", "tests.support.slow_smtp")
MIGRATE = (*COMMAND, "migrate")
SEND = "/send-notification/ada@example.com"


# Slow experiments run in threads while other tests run; the last tests read their results.


@pytest.fixture(scope="module")
def background() -> Iterator[Executor]:
    """Runs functions in threads while the tests go on."""
    with ThreadPoolExecutor() as background:
        yield background


@pytest.fixture(scope="module", autouse=True)
def given_up(background: Executor, tmp_path_factory: pytest.TempPathFactory) -> "Future[list[str]]":
    """The lines with which a service and a worker give up on a database that never answers."""
    directory = tmp_path_factory.mktemp("given-up")
    unreachable_url = f"postgresql://afterward:{PASSWORD}@127.0.0.1:{free_port()}/queue"

    def give_up() -> list[str]:
        with (
            Start(directory / "api", COMMAND, unreachable_url) as api,
            Start(directory / "worker", WORKER, unreachable_url) as worker,
        ):
            return [start.refusal(within=PATIENCE_SECONDS + PATIENCE) for start in (api, worker)]

    return background.submit(give_up)


@dataclass
class FrozenOut:
    """The responses while the database was frozen, and the seconds until each of them."""

    readiness: httpx2.Response
    ready_after: float
    refused: httpx2.Response
    refused_after: float
    stopped_after: float  # a worker, after SIGTERM


@pytest.fixture(scope="module", autouse=True)
def frozen_out(
    background: Executor, tmp_path_factory: pytest.TempPathFactory
) -> "Future[FrozenOut]":
    """Freeze the database for a while, and wait until all tasks are done afterwards."""
    directory = tmp_path_factory.mktemp("frozen-out")

    def freeze() -> FrozenOut:
        with Postgres() as postgres:
            url = with_tables(postgres)
            smtp = [*SLOW_SMTP, str(smtp_port := free_port()), "0.5"]
            settings: dict[str, Any] = {
                "queue_url": url,
                "catcher": False,
                "smtp_port": smtp_port,
                "lease_seconds": 2,
                "shutdown_grace_seconds": 1,
            }
            with (
                Process(directory / "smtp", command=smtp),
                Service(directory / "api", **settings, worker_concurrency=0) as service,
                Process(directory / "worker", command=WORKER, **settings) as worker,
            ):
                tasks = [service.post(SEND).json()["id"] for _ in range(60)]
                service.wait_for(tasks[0])
                with frozen(postgres), ThreadPoolExecutor() as others:
                    began = time.monotonic()
                    refused = others.submit(service.post, SEND, timeout=60)
                    stopped = others.submit(seconds_to_stop, worker)
                    readiness = service.get("/readyz", timeout=60)
                    ready_after = time.monotonic() - began
                    assert service.get("/livez").status_code == 200
                    refused.result()
                    refused_after = time.monotonic() - began
                    stopped.result()
                worker.start()
                for task_id in tasks:
                    service.wait_for(task_id)
        return FrozenOut(readiness, ready_after, refused.result(), refused_after, stopped.result())

    return background.submit(freeze)


def seconds_to_stop(process: Process) -> float:
    """Return the seconds from SIGTERM to the process's end; infinity if it has to be killed."""
    began = time.monotonic()
    try:
        process.stop(within=form(14 + PATIENCE, 14))
    except subprocess.TimeoutExpired:
        process.kill()
        return math.inf
    return time.monotonic() - began


@contextmanager
def frozen(postgres: Postgres) -> Iterator[None]:
    """Stop all processes of PostgreSQL with SIGSTOP while the block runs."""
    postgres.freeze()
    try:
        yield
    finally:
        postgres.thaw()


# Starting


@pytest.fixture
def url(mistreated: Postgres) -> str:
    """The URL of a new database with the service's tables."""
    return with_tables(mistreated)


@pytest.fixture
def service(tmp_path: Path, url: str, smtp_server: SmtpServer) -> Iterator[Service]:
    """An API with a worker inside."""
    with Service(
        tmp_path, queue_url=url, catcher=False, smtp_port=smtp_server.port, lease_seconds=2
    ) as service:
        yield service


def test_a_start_waits_for_the_database(service: Service, mistreated: Postgres) -> None:
    """After a power cut, both start at the same time."""
    service.kill()
    mistreated.stop()

    def come_up() -> None:
        until(lambda: '"waiting for the database"' in service.log, within=PATIENCE)
        mistreated.start()

    with ThreadPoolExecutor() as operator:
        coming_up = operator.submit(come_up)
        service.start()
        coming_up.result()
    service.wait_for(service.post(SEND).json()["id"])


def test_a_failing_start_says_why_in_one_line(
    tmp_path: Path, mistreated: Postgres, url: str
) -> None:
    """The line names QUEUE_URL. Even the most verbose log does not contain the password."""
    newer = with_tables(mistreated)
    mistreated.sql("UPDATE afterward.schema_version SET version = 1000", newer)
    cases = {
        "password authentication failed": url.replace(PASSWORD, "wrong-horse"),
        'database "nowhere" does not exist': mistreated.url("nowhere"),
        "Run `python -m app migrate`": mistreated.new_database(),
        "newer version (schema 1000": newer,
    }
    with ExitStack() as stack:
        started = {
            reason: stack.enter_context(Start(tmp_path / str(number), COMMAND, at))
            for number, (reason, at) in enumerate(cases.items())
        }
        for reason, start in started.items():
            assert reason in start.refusal(within=PATIENCE_SECONDS + PATIENCE)


def test_two_concurrent_migrations_both_succeed(tmp_path: Path, mistreated: Postgres) -> None:
    """This happens when two machines are deployed together."""
    url = mistreated.new_database()
    processes = [
        Process(tmp_path / name, command=MIGRATE, queue_url=url) for name in ("one", "other")
    ]
    for process in processes:
        process.start()
    for process in processes:
        assert process.wait() == 0, process.log
    assert mistreated.sql("SELECT count(*) FROM afterward.schema_version", url) == "1"


class Start(Process):
    """A start that must fail, with the most verbose log."""

    def __init__(self, directory: Path, command: Sequence[str], queue_url: str) -> None:
        super().__init__(
            directory,
            command=command,
            queue_url=queue_url,
            catcher=False,
            log_level="DEBUG",
            log_format="console",
            port=free_port(),
            pythondevmode=1,
        )

    def refusal(self, within: float) -> str:
        """Return the line that says why. The log must contain no password and no traceback."""
        assert self.wait(within) in {1, 3}
        lines = [line for line in self.log.splitlines() if "QUEUE_URL: " in line]
        assert len(lines) == 1, self.log
        for never in ("Traceback", PASSWORD, "wrong-horse"):
            assert never not in self.log
        return lines[0]


# Away, and back


def test_requests_are_refused_while_the_database_is_away_and_all_accepted_tasks_run_afterwards(
    service: Service, mistreated: Postgres, smtp_server: SmtpServer
) -> None:
    """No process has to be restarted."""
    smtp_server.delay["dot"] = 1.0  # so that some mails are being sent and some wait
    accepted = [service.post(SEND).json()["id"] for _ in range(15)]
    mistreated.stop()

    refused = service.post(SEND)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert refused.headers["content-type"] == "application/problem+json"
    readiness = service.get("/readyz")
    assert readiness.status_code == 503
    assert readiness.json()["checks"]["database"] == "failing"
    assert service.get("/livez").status_code == 200
    time.sleep(1.5)  # mails are sent meanwhile, but their success cannot be written

    mistreated.start()
    smtp_server.delay.clear()
    until(lambda: service.get("/readyz").status_code == 200, within=PATIENCE)
    accepted.append(service.post(SEND).json()["id"])
    for task_id in accepted:
        assert service.wait_for(task_id)["attempts"] == 1
    assert len(smtp_server.received) == len(accepted)
    assert "Traceback" not in service.log


# Results of the slow experiments


def test_a_start_gives_up_on_a_database_that_never_answers(given_up: "Future[list[str]]") -> None:
    for line in given_up.result():
        assert "does not answer: " in line


def test_a_request_during_a_freeze_of_the_database_is_refused_in_time(
    frozen_out: "Future[FrozenOut]",
) -> None:
    """A frozen server accepts connections and never answers. After the thaw, all tasks ran."""
    seen = frozen_out.result()
    print(f"refused after {seen.refused_after:.1f} s")
    assert seen.refused.status_code == 503
    assert seen.refused.headers["retry-after"]
    assert seen.refused_after < form(20 + PATIENCE, 20)


def test_readyz_soon_reports_a_frozen_database(
    frozen_out: "Future[FrozenOut]",
) -> None:
    """The check takes three seconds at most, and so does the response."""
    seen = frozen_out.result()
    print(f"readyz after {seen.ready_after:.1f} s")
    assert seen.readiness.status_code == 503
    assert seen.readiness.json()["checks"]["database"] == "failing"
    assert seen.ready_after < form(5 + PATIENCE, 5)


def test_a_worker_stops_even_if_the_database_is_frozen(frozen_out: "Future[FrozenOut]") -> None:
    """Its grace period is a second. Its leases expire, and its tasks are re-queued later."""
    seen = frozen_out.result()
    print(f"stopped after {seen.stopped_after:.1f} s")
    assert seen.stopped_after < math.inf
