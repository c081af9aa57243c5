"""A service to attack, and checks that an attack had no effect."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from app.api.routes.notifications import RecipientConvertor
from tests.api.requests import problem_of
from tests.support.forms import FORM
from tests.support.service import PATIENCE, Json, Service, files_below, until
from tests.support.smtp_server import Received, SmtpServer, in_a_thread

MARK = "do-not-repeat-me"  # part of the input; an answer must not contain it
JSON = {"Content-Type": "application/json"}
NOTIFICATION = "/send-notification/ada@example.com"


@dataclass(frozen=True)
class Traces:
    """The effects that an attack could have had."""

    tasks: list[Json]
    files: list[str]
    smtp_commands: int


class Target:
    """A real server with a worker. Its SMTP server receives every mail that is accepted."""

    def __init__(self, service: Service, smtp_server: SmtpServer) -> None:
        self.service = service
        self.smtp_server = smtp_server
        self._document = service.get("/openapi.json").json()
        self._newest: list[Json] = []

    def post(self, path: str, **options: Any) -> httpx2.Response:
        """Send a POST request."""
        return self.service.post(path, **options)

    def upload(self, body: bytes, **headers: str) -> httpx2.Response:
        """Upload a form with the boundary `b`."""
        return self.service.post("/upload", content=body, headers=FORM | headers)

    def traces(self) -> Traces:
        """Wait for all accepted tasks to end, then return the present effects."""
        until(lambda: all(task["finished_at"] for task in self._tasks()), within=PATIENCE)
        return Traces(
            tasks=self._newest,
            files=[
                name
                for name in files_below(self.service.directory)
                if not name.startswith(("queue.db", "service.log"))
            ],
            # The mailer sends QUIT when it closes an idle connection.
            smtp_commands=sum(command != "QUIT" for command in self.smtp_server.commands),
        )

    def _tasks(self) -> list[Json]:
        self._newest = self.service.get("/tasks?limit=20").json()["data"]
        return self._newest

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Assert that the requests of the `with` block leave no trace."""
        before = self.traces()
        yield
        assert self.traces() == before

    def refused(self, response: httpx2.Response, *statuses: int) -> Json:
        """Return the problem document of a refusal.

        Its status must be among `statuses` and documented in /openapi.json, and it must not repeat
        the input.
        """
        request = response.request
        about = (
            f"{response} {response.text[:300]} to {request.url!s:.200} {request.content[:200]!r}"
        )
        assert response.status_code in statuses, about
        documented = self._documented(request.method, request.url.path)
        assert str(response.status_code) in documented, about
        problem = problem_of(response, *statuses)
        # `instance` may contain the path (RFC 9457, section 3.1.5).
        assert MARK not in str(problem | {"instance": ""})
        assert MARK not in str(response.headers)
        return problem

    def _documented(self, method: str, path: str) -> set[str]:
        """Return the statuses that the OpenAPI document names for this method and path."""
        for template, operations in self._document["paths"].items():
            pattern = template.rstrip("/").replace("{email}", f"(?:{RecipientConvertor.regex})")
            pattern = re.sub(r"\{\w+\}", "[^/]+", pattern) + "/?"
            if re.fullmatch(pattern, path, re.DOTALL) and method.lower() in operations:
                return set(operations[method.lower()]["responses"])
        return {"404", "405"}

    def mail_of(self, response: httpx2.Response) -> Received:
        """Wait for the task of an accepted request, and return the mail that it sent."""
        task_id = response.raise_for_status().json()["id"]
        self.service.wait_for(task_id)
        message_id = f"\r\nMessage-ID: <{task_id}@".encode()
        (mail,) = (mail for mail in self.smtp_server.received if message_id in mail.content)
        return mail


@contextmanager
def attacked(directory: Path, **settings: Any) -> Iterator[Target]:
    """Yield a target with its data in `directory`. At the end its log must contain no error."""
    with (
        in_a_thread(smtp_server := SmtpServer()),
        Service(
            directory,
            catcher=False,
            smtp_port=smtp_server.port,
            client_timeout_seconds=5,
            **settings,
        ) as service,
    ):
        yield Target(service, smtp_server)
        assert errors_in(service.log) == []


def errors_in(log: str) -> list[str]:
    """Return the log lines about unexpected errors. A task's final failure is not unexpected."""
    return [
        line
        for line in log.splitlines()
        if line.startswith("Traceback")
        or ('"level":"error"' in line and '"event":"task failed"' not in line)
    ]
