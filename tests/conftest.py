"""What every test shares."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from anyio.from_thread import start_blocking_portal
from hypothesis import settings

from app.observability.logs import configure_logging
from tests.support.postgres import Postgres, with_tables
from tests.support.s3 import Bucket, FaultyS3, S3Server, credentials
from tests.support.smtp_server import SmtpServer
from tests.support.torture import LONG, form, table, tried

__all__ = ["tried"]


# The short form tries the same examples each time, the long form others.
settings.register_profile(
    "afterward", max_examples=form(100, 10_000), deadline=None, derandomize=not LONG
)
settings.load_profile("afterward")


# `make test` leaves these to `make check`, and whatever has the mark `thorough`: faults, attacks,
# other people's programs, S3, a PostgreSQL that stops and freezes, engines against their model, old
# and rude HTTP clients. What holds on both engines is tried on SQLite, and where the engines'
# contract is tested on PostgreSQL as well.
THOROUGH = {
    Path(__file__).parent / path
    for path in (
        "faults",
        "attacks",
        "outside",
        "files/test_s3.py",
        "api/test_uploads_in_s3.py",
        "api/test_postgres_away.py",
        "server/test_half_closed.py",
        "server/test_http_1_0.py",
        "queue/test_engine_model.py",
    )
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that tells `make test` from `make check`."""
    parser.addoption(
        "--ordinary", action="store_true", help="run only the tests of the ordinary behaviour"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import what is left out: some of it needs more packages."""
    return True if config.option.ordinary and collection_path in THOROUGH else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that belong to a larger run: the long form, or `make check`."""
    left_out = [item for item in items if _is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_left_out(item: pytest.Item) -> bool:
    if item.get_closest_marker("long_form"):
        return not LONG
    return item.get_closest_marker("thorough") is not None and item.config.option.ordinary


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In the long form, say of each fault and attack what was tried and whether it held."""
    reports = [
        report
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
    ]
    if LONG and (lines := table(reports)):
        terminalreporter.section("faults and attacks")
        terminalreporter.write("\n".join(lines) + "\n")


@pytest.fixture(params=["asyncio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """The service runs on asyncio, and so do its tests."""
    return str(request.param)


@pytest.fixture(autouse=True)
def plain_log_lines() -> None:
    """As the service writes them; structlog's own default draws tracebacks, which takes seconds."""
    configure_logging("INFO", "json")


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """What a test configures ends with it."""
    root, before = logging.root, (logging.root.handlers[:], logging.root.level)
    yield
    root.handlers[:], root.level = before
    structlog.reset_defaults()


@pytest.fixture
def smtp_server() -> Iterator[SmtpServer]:
    """An SMTP server that takes everything, until it is told otherwise."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(SmtpServer()) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL for tests that leave it as it is; those that disturb it start their own."""
    with Postgres() as postgres:
        yield postgres


@pytest.fixture(scope="module")
def mistreated() -> Iterator[Postgres]:
    """One for tests that stop it, crash it and start it again; it writes as in production."""
    with Postgres() as postgres:
        yield postgres


@pytest.fixture(scope="session")
def migrated(postgres: Postgres) -> str:
    """The address of a database with the service's tables."""
    return with_tables(postgres)


@pytest.fixture
def database_url(postgres: Postgres, migrated: str) -> str:
    """The service's tables on PostgreSQL, with nothing in them."""
    postgres.empty(migrated)
    return migrated


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A server that speaks S3's protocol; those who disturb it start their own."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket with nothing in it, which the AWS_* variables lead to."""
    for name, value in credentials(s3_server.url).items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()


@pytest.fixture
def faulty_s3(
    s3_server: S3Server, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyS3]:
    """The same bucket, behind a server that does as it is told."""
    with FaultyS3(s3_server) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
        yield faulty
