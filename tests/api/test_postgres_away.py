"""PostgreSQL is late, away, or frozen: what the service says meanwhile, and that it goes on."""

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


# What mostly waits goes on beside the other tests; its own are the last.


@pytest.fixture(scope="module")
def beside() -> Iterator[Executor]:
    """Runs functions while the tests go on."""
    with ThreadPoolExecutor() as beside:
        yield beside


@pytest.fixture(scope="module", autouse=True)
def given_up(beside: Executor, tmp_path_factory: pytest.TempPathFactory) -> "Future[list[str]]":
    """How the service and a worker give up on a database that never answers."""
    directory = tmp_path_factory.mktemp("given-up")
    nobody = f"postgresql://afterward:{PASSWORD}@127.0.0.1:{free_port()}/queue"

    def give_up() -> list[str]:
        with (
            Start(directory / "api", COMMAND, nobody) as api,
            Start(directory / "worker", WORKER, nobody) as worker,
        ):
            return [start.refusal(within=PATIENCE_SECONDS + PATIENCE) for start in (api, worker)]

    return beside.submit(give_up)


@dataclass
class FrozenOut:
    """What was answered while the database stood still, and after how many seconds."""

    readiness: httpx2.Response
    ready_after: float
    refused: httpx2.Response
    refused_after: float
    stopped_after: float  # a worker that was told to


@pytest.fixture(scope="module", autouse=True)
def frozen_out(beside: Executor, tmp_path_factory: pytest.TempPathFactory) -> "Future[FrozenOut]":
    """What the service does while the database stands still; and that it goes on afterwards."""
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

    return beside.submit(freeze)


def seconds_to_stop(process: Process) -> float:
    """How long it takes from SIGTERM to its end; endless if it has to be killed."""
    began = time.monotonic()
    try:
        process.stop(within=form(14 + PATIENCE, 14))
    except subprocess.TimeoutExpired:
        process.kill()
        return math.inf
    return time.monotonic() - began


@contextmanager
def frozen(postgres: Postgres) -> Iterator[None]:
    """Let it stand still."""
    postgres.freeze()
    try:
        yield
    finally:
        postgres.thaw()


# Starting


@pytest.fixture
def url(mistreated: Postgres) -> str:
    """A database of its own, with the service's tables."""
    return with_tables(mistreated)


@pytest.fixture
def service(tmp_path: Path, url: str, smtp_server: SmtpServer) -> Iterator[Service]:
    """The API with a worker inside."""
    with Service(
        tmp_path, queue_url=url, catcher=False, smtp_port=smtp_server.port, lease_seconds=2
    ) as service:
        yield service


def test_a_start_waits_for_the_database(service: Service, mistreated: Postgres) -> None:
    """As after a power cut, when everything starts at once."""
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


def test_a_start_that_cannot_succeed_says_why_in_one_line(
    tmp_path: Path, mistreated: Postgres, url: str
) -> None:
    """It names QUEUE_URL, and never the password, even where everything is logged."""
    newer = with_tables(mistreated)
    mistreated.sql("UPDATE afterward.schema_version SET version = 1000", newer)
    cases = {
        "password authentication failed": url.replace(PASSWORD, "wrong-horse"),
        'database "nowhere" does not exist': mistreated.url("nowhere"),
        "run `python -m app migrate`": mistreated.new_database(),
        "newer version (schema 1000": newer,
    }
    with ExitStack() as stack:
        started = {
            reason: stack.enter_context(Start(tmp_path / str(number), COMMAND, at))
            for number, (reason, at) in enumerate(cases.items())
        }
        for reason, start in started.items():
            assert reason in start.refusal(within=PATIENCE_SECONDS + PATIENCE)


def test_two_migrations_at_once_both_succeed(tmp_path: Path, mistreated: Postgres) -> None:
    """As when two machines are deployed together."""
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
    """A start that is to fail, with everything logged that can be."""

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
        """The one line that says why; there is no password in it, nor anywhere else."""
        assert self.wait(within) in {1, 3}
        lines = [line for line in self.log.splitlines() if "QUEUE_URL: " in line]
        assert len(lines) == 1, self.log
        for never in ("Traceback", PASSWORD, "wrong-horse"):
            assert never not in self.log
        return lines[0]


# Away, and back


def test_while_the_database_is_away_nothing_is_accepted_and_afterwards_all_is_done(
    service: Service, mistreated: Postgres, smtp_server: SmtpServer
) -> None:
    """Nobody has to start anything again."""
    smtp_server.delay["dot"] = 1.0  # so that some is under way, and some waits
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
    time.sleep(1.5)  # mails are sent meanwhile, and nobody can note it

    mistreated.start()
    smtp_server.delay.clear()
    until(lambda: service.get("/readyz").status_code == 200, within=PATIENCE)
    accepted.append(service.post(SEND).json()["id"])
    for task_id in accepted:
        assert service.wait_for(task_id)["attempts"] == 1
    assert len(smtp_server.received) == len(accepted)
    assert "Traceback" not in service.log


# Neither there nor away


def test_a_start_gives_up_on_a_database_that_never_answers(given_up: "Future[list[str]]") -> None:
    for line in given_up.result():
        assert "does not answer: " in line


def test_a_frozen_database_holds_no_request_up_for_ever(frozen_out: "Future[FrozenOut]") -> None:
    """Nothing is refused at the socket, and nothing comes back; thawed, all was done."""
    seen = frozen_out.result()
    print(f"refused after {seen.refused_after:.1f} s")
    assert seen.refused.status_code == 503
    assert seen.refused.headers["retry-after"]
    assert seen.refused_after < form(20 + PATIENCE, 20)


def test_who_asks_whether_it_is_ready_hears_soon_that_the_database_is_frozen(
    frozen_out: "Future[FrozenOut]",
) -> None:
    """The check takes three seconds at most, and so does the answer."""
    seen = frozen_out.result()
    print(f"readyz after {seen.ready_after:.1f} s")
    assert seen.readiness.status_code == 503
    assert seen.readiness.json()["checks"]["database"] == "failing"
    assert seen.ready_after < form(5 + PATIENCE, 5)


def test_a_worker_stops_though_the_database_is_frozen(frozen_out: "Future[FrozenOut]") -> None:
    """Its grace is a second; what it cannot note, its lease tells."""
    seen = frozen_out.result()
    print(f"stopped after {seen.stopped_after:.1f} s")
    assert seen.stopped_after < math.inf
