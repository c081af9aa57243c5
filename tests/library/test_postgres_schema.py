"""The start on PostgreSQL: connection, tables, settings. A failed start says why in one line."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import asyncpg
import pytest

from afterward.engines import make_tables, open_engine
from afterward.engines.postgres import connections as postgres_connections
from afterward.errors import CannotStart
from tests.library.support import a_task, put
from tests.support.certificates import make_certificate, server_context
from tests.support.postgres import PASSWORD, Postgres
from tests.support.service import free_port

pytestmark = pytest.mark.anyio


@pytest.fixture
def empty_url(postgres: Postgres) -> str:
    """A database with no tables."""
    return postgres.new_database()


async def refusal(url: str) -> str:
    """Start on this database, which must fail, and return the reason."""
    with pytest.raises(CannotStart) as raised:
        await open_engine(url).start()
    message = str(raised.value)
    assert "QUEUE_URL" not in message  # a setting of the service, not of the library
    assert "\n" not in message
    assert PASSWORD not in message
    return message


async def refusal_of_migration(url: str) -> str:
    """Make the tables in this database, which must fail, and return the reason."""
    with pytest.raises(CannotStart) as raised:
        await make_tables(url)
    return str(raised.value)


async def start_and_put_a_task(url: str) -> None:
    engine = open_engine(url)
    await engine.start()
    await put(engine, a_task())
    await engine.stop()


# Tables


async def test_a_start_without_tables_names_the_migration_command(empty_url: str) -> None:
    assert "Call afterward.engines.make_tables(url)." in await refusal(empty_url)
    await make_tables(empty_url)
    await start_and_put_a_task(empty_url)


async def test_a_migration_can_be_repeated(postgres: Postgres, empty_url: str) -> None:
    """Several may run at once; the tasks in the tables stay."""
    await asyncio.gather(*(make_tables(empty_url) for _ in range(3)))
    await start_and_put_a_task(empty_url)
    await make_tables(empty_url)
    assert postgres.sql("SELECT count(*) FROM afterward.tasks", empty_url) == "1"


async def test_a_migration_may_take_longer_than_the_statement_timeout(
    empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it waits for a second session that makes the same schema, and then rolls back."""
    monkeypatch.setattr(postgres_connections, "STATEMENT_SECONDS", 0.3)
    second_session = await asyncpg.connect(empty_url)
    await second_session.execute("BEGIN; CREATE SCHEMA afterward")
    migrating = asyncio.create_task(make_tables(empty_url))
    await asyncio.sleep(0.6)
    assert not migrating.done()
    await second_session.execute("ROLLBACK")
    await second_session.close()
    await migrating
    monkeypatch.undo()
    await start_and_put_a_task(empty_url)


async def test_tables_of_a_newer_version_are_refused_and_left_unchanged(
    postgres: Postgres, empty_url: str
) -> None:
    await make_tables(empty_url)
    postgres.sql("UPDATE afterward.schema_version SET version = 1000", empty_url)
    assert "newer version (schema 1000" in await refusal(empty_url)
    with pytest.raises(CannotStart, match="newer version"):
        await make_tables(empty_url)


async def test_tables_from_before_the_first_release_are_refused_and_left_unchanged(
    postgres: Postgres, empty_url: str
) -> None:
    """They have the version number 1 too, but different columns."""
    postgres.sql(
        "CREATE SCHEMA afterward; CREATE TABLE afterward.pgqueuer (id int); "
        "CREATE TABLE afterward.schema_version (version int); "
        "INSERT INTO afterward.schema_version VALUES (1)",
        empty_url,
    )
    assert "ALTER SCHEMA afterward RENAME TO afterward_old" in await refusal(empty_url)
    with pytest.raises(CannotStart, match="older than the first release"):
        await make_tables(empty_url)
    postgres.sql("ALTER SCHEMA afterward RENAME TO afterward_old", empty_url)
    await make_tables(empty_url)
    await start_and_put_a_task(empty_url)


@pytest.mark.parametrize(
    ("hosts", "told"),
    [
        ("h1,h2", "h1:5432, h2:5432"),
        ("h1:1,h2:2", "h1:1, h2:2"),
        ("ada:secret@[::1],h2", "[::1]:5432, h2:5432"),
        ("", "its socket:5432"),
    ],
)
def test_the_address_in_a_message_names_each_host_and_no_password(hosts: str, told: str) -> None:
    assert postgres_connections._place(f"postgresql://{hosts}/queue") == f"PostgreSQL at {told}"


async def test_the_second_host_of_a_url_is_tried_if_the_first_does_not_answer(
    postgres: Postgres, empty_url: str
) -> None:
    several = empty_url.replace("@", f"@127.0.0.1:{free_port()},")
    await make_tables(several)
    await start_and_put_a_task(several)


async def test_the_host_that_accepts_writes_is_chosen(postgres: Postgres, empty_url: str) -> None:
    """After a failover, the first host may come back as a standby, which is read-only."""
    name = empty_url.rpartition("/")[2]
    with Postgres() as standby:
        standby.sql(f"CREATE DATABASE {name}")
        standby.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        several = empty_url.replace("@", f"@127.0.0.1:{standby.port},")
        await make_tables(several)
        await start_and_put_a_task(several)


async def test_a_role_that_may_not_make_tables_is_refused_the_migration(
    postgres: Postgres, empty_url: str
) -> None:
    postgres.sql(f"CREATE ROLE guest LOGIN PASSWORD '{PASSWORD}'")
    with pytest.raises(CannotStart, match="refuses the migration: permission denied"):
        await make_tables(empty_url.replace("//afterward", "//guest"))
    assert "make_tables" in await refusal(empty_url)


async def test_a_role_without_rights_on_the_tables_is_refused(
    postgres: Postgres, empty_url: str
) -> None:
    await make_tables(empty_url)
    postgres.sql(f"CREATE ROLE limited LOGIN PASSWORD '{PASSWORD}'")
    message = await refusal(empty_url.replace("//afterward", "//limited"))
    assert "refuses: permission denied for schema afterward" in message


async def test_a_migration_that_loses_its_connection_is_refused_in_one_line(
    postgres: Postgres, empty_url: str
) -> None:
    second_session = await asyncpg.connect(empty_url)
    await second_session.execute("BEGIN; CREATE SCHEMA afterward")
    migrating = asyncio.create_task(make_tables(empty_url))
    end = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    async with asyncio.timeout(5):
        while postgres.sql(end, empty_url) == "0":  # noqa: ASYNC110 - no event tells of a lock
            await asyncio.sleep(0.01)
    with pytest.raises(CannotStart, match="refuses the migration") as raised:
        await migrating
    assert "\n" not in str(raised.value)
    await second_session.close()


@pytest.mark.thorough
@pytest.mark.parametrize("setting", ["fsync", "synchronous_commit"])
async def test_a_database_that_does_not_sync_commits_is_refused(setting: str) -> None:
    """A power cut could lose commits that it has confirmed."""
    with Postgres(**{setting: "off"}) as postgres:
        await make_tables(url := postgres.new_database())
        assert f"{setting} = off" in await refusal(url)


async def test_sqlite_needs_no_migration() -> None:
    await make_tables("sqlite:///nowhere.db")


async def test_the_tables_have_autovacuum_settings_that_keep_up_with_the_tasks(
    postgres: Postgres, migrated: str
) -> None:
    """Each task is updated twice, and by default autovacuum waits for a fifth of the table."""
    for table in ("tasks", "counts"):
        named = f"SELECT reloptions::text FROM pg_class WHERE oid = 'afterward.{table}'::regclass"
        assert "autovacuum_vacuum_scale_factor=0" in postgres.sql(named, migrated)


# Connections


async def test_a_wrong_password_is_refused_at_once(postgres: Postgres) -> None:
    """The message names the user. To wait would not help."""
    message = await refusal(postgres.url(password="secret"))
    assert 'password authentication failed for user "afterward"' in message
    assert "secret" not in message


@pytest.mark.parametrize(
    "address", ["ada:secret@localhost:abc", "ada:secret@[::1", "ada:secret/word@localhost"]
)
async def test_a_url_that_cannot_be_read_is_refused_without_its_password(address: str) -> None:
    for ask in (refusal, refusal_of_migration):
        message = await ask(f"postgresql://{address}/queue")
        assert "the URL of PostgreSQL cannot be read" in message
        assert "secret" not in message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("sslmode=wrong", "`sslmode` parameter must be one of"),
        ("sslmode=verify-full", '/.postgresql/root.crt" does not exist'),
    ],
)
async def test_a_wrong_option_in_the_url_is_named_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, reason: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    message = await refusal(f"postgresql://ada:secret@127.0.0.1:{free_port()}/queue?{options}")
    assert reason in message
    assert "secret" not in message


async def test_a_certificate_that_is_not_trusted_is_named_at_once(tmp_path: Path) -> None:
    """The server begins TLS with a certificate of its own, and the URL trusts another one."""
    (tmp_path / "other").mkdir()
    certificate, other = make_certificate(tmp_path), make_certificate(tmp_path / "other")

    async def begin_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # the request for TLS
        writer.write(b"S")
        with contextlib.suppress(OSError):
            await writer.start_tls(server_context(certificate))
        writer.close()

    async with await asyncio.start_server(begin_tls, "127.0.0.1", 0) as server:
        at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        options = f"sslmode=verify-full&sslrootcert={other}"
        message = await refusal(f"postgresql://ada:secret@{at}/queue?{options}")
    assert at in message
    assert "certificate verify failed" in message


async def test_a_missing_database_is_refused_at_once(postgres: Postgres) -> None:
    assert 'database "nowhere" does not exist' in await refusal(postgres.url("nowhere"))


@pytest.mark.thorough
async def test_a_migration_waits_longer_than_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may come with the first start of the server, which creates a cluster then."""
    monkeypatch.setattr(postgres_connections, "PATIENCE_SECONDS", 0.0)
    with Postgres() as postgres:
        url = postgres.new_database()
        postgres.stop()
        assert "does not answer" in await refusal(url)
        Timer(0.5, postgres.start).start()
        await make_tables(url)
        await start_and_put_a_task(url)


@pytest.mark.thorough
async def test_a_start_waits_for_a_server_that_does_not_answer_yet() -> None:
    with Postgres() as postgres:
        url = postgres.new_database()
        await make_tables(url)
        postgres.stop()
        Timer(0.5, postgres.start).start()
        await start_and_put_a_task(url)


async def test_a_start_gives_up_on_a_server_that_never_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postgres_connections, "PATIENCE_SECONDS", 0.5)
    message = await refusal(f"postgresql://afterward:{PASSWORD}@127.0.0.1:{free_port()}/queue")
    assert "does not answer" in message
    assert "Connection refused" in message or "Connect call failed" in message


# The extra


@pytest.mark.parametrize("ask", [open_engine, lambda url: asyncio.run(make_tables(url))])
def test_without_asyncpg_the_start_names_the_extra_to_install(
    ask: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("afterward.engines.postgres")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(CannotStart, match=r"needs asyncpg: run pip install '\.\[postgres\]' in"):
        ask("postgresql://localhost/queue")
