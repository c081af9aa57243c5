"""Fixtures for all tests, and the choice of tests for `make test`, `make check`, `make torture`."""

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


# The short form tries the same examples each time, the long form random ones.
settings.register_profile(
    "afterward", max_examples=form(100, 10_000), deadline=None, derandomize=not LONG
)
settings.load_profile("afterward")


# Only `make check` runs these files, the tests with the mark `thorough`, and the tests that start a
# PostgreSQL server: faults, attacks, third-party programs, S3, the model test of the engines, HTTP
# clients that are old or break connections, and the rules of the source code. `make test` runs a
# test of both engines on SQLite.
THOROUGH = {
    Path(__file__).parent / path
    for path in (
        "faults",
        "attacks",
        "outside",
        "test_map.py",
        "uploads/test_s3.py",
        "api/test_uploads_in_s3.py",
        "api/test_postgres_away.py",
        "server/test_half_closed.py",
        "server/test_http_1_0.py",
        "library/test_callers_transaction.py",
        "library/test_engine_model.py",
    )
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--ordinary`, which `make test` uses and `make check` does not."""
    parser.addoption(
        "--ordinary", action="store_true", help="run only the tests of the ordinary behaviour"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--ordinary`, do not even import the files in THOROUGH: some need more packages."""
    return True if config.option.ordinary and collection_path in THOROUGH else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that only the long form runs, or only `make check`."""
    left_out = [item for item in items if _is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _is_left_out(item: pytest.Item) -> bool:
    if item.get_closest_marker("long_form"):
        return not LONG
    if not item.config.option.ordinary:
        return False
    return item.get_closest_marker("thorough") is not None or _needs_postgresql(item)


def _needs_postgresql(item: pytest.Item) -> bool:
    """Tell whether a test starts a server, through a fixture or through its engine parameter."""
    assert isinstance(item, pytest.Function)
    if hasattr(item, "callspec") and "postgresql" in item.callspec.params.values():
        return True
    return "postgres" in item.fixturenames or "mistreated" in item.fixturenames


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In the long form, print a table of the faults and attacks: the trials, and their outcome."""
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
    """Run the tests on asyncio only, because the service runs on nothing else."""
    return str(request.param)


@pytest.fixture(autouse=True)
def plain_log_lines() -> None:
    """Log as the service does; structlog's default takes seconds to draw a traceback."""
    configure_logging("INFO", "json")


@pytest.fixture
def logging_as_before() -> Iterator[None]:
    """Restore the configuration of the logs after a test that changes it."""
    root, before = logging.root, (logging.root.handlers[:], logging.root.level)
    yield
    root.handlers[:], root.level = before
    structlog.reset_defaults()


@pytest.fixture
def smtp_server() -> Iterator[SmtpServer]:
    """An SMTP server that accepts every mail unless the test tells it otherwise."""
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(SmtpServer()) as server,
    ):
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; a test that stops or disturbs its server must start its own."""
    with Postgres() as postgres:
        yield postgres


@pytest.fixture(scope="module")
def mistreated() -> Iterator[Postgres]:
    """A PostgreSQL server that tests may stop, crash and restart; it syncs as in production."""
    with Postgres() as postgres:
        yield postgres


@pytest.fixture(scope="session")
def migrated(postgres: Postgres) -> str:
    """The address of a database with the service's tables."""
    return with_tables(postgres)


@pytest.fixture
def database_url(postgres: Postgres, migrated: str) -> str:
    """The address of a PostgreSQL database with the service's tables, all of them empty."""
    postgres.empty(migrated)
    return migrated


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A server that speaks S3's protocol; a test that disturbs its server must start its own."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """An empty bucket; the AWS_* variables hold the address and the credentials of its server."""
    for name, value in credentials(s3_server.url).items():
        monkeypatch.setenv(name, value)
    return s3_server.new_bucket()


@pytest.fixture
def faulty_s3(
    s3_server: S3Server, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyS3]:
    """A proxy in front of the bucket's server, which fails as a test tells it to."""
    with FaultyS3(s3_server) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.url)
        yield faulty
