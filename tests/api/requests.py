"""A valid request for each route that queues tasks, and a check of the form of every problem."""

from dataclasses import dataclass, field, replace
from typing import Any

import httpx2

MAX_UPLOAD_BYTES = 200_000
LARGEST_PROBLEM = 4096  # bytes


@dataclass(frozen=True)
class Call:
    """A POST request that is answered 202."""

    path: str
    options: dict[str, Any] = field(default_factory=dict)
    kind: str | None = None  # the kind of the queued task; None for a courtesy
    ends: str = "succeeded"  # the last status of the task

    def send(self, client: httpx2.Client, **headers: str) -> httpx2.Response:
        """Send the request with additional headers."""
        options = self.options | {"headers": self.options.get("headers", {}) | headers}
        return client.post(self.path, **options)

    def with_other_slash(self) -> "Call":
        """Return the same request with a trailing slash added, or removed if there is one."""
        path, question_mark, query = self.path.partition("?")
        path = path[:-1] if path.endswith("/") else path + "/"
        return replace(self, path=path + question_mark + query)


def upload_of(content: bytes = b"Hello", name: str = "hello.txt", kind: str = "text/plain") -> Call:
    """Make an upload of one file."""
    return Call("/upload", {"files": {"file": (name, content, kind)}}, "save_upload")


PROMISES = [
    Call("/send-notification/ada@example.com", kind="send_email"),
    Call("/send-email/?email=ada@example.com", kind="send_email"),
    Call("/save-data/?user_id=ada", {"json": {"colour": "green"}}, "save_data"),
    Call("/items/7", kind="send_email"),
    upload_of(),
    Call("/tasks/retry", {"json": {"filter": {"kind": "send_email"}}}, "retry_tasks"),
    Call("/tasks/cancel", {"json": {"filter": {"kind": "save_data"}}}, "cancel_tasks"),
]
COURTESIES = [
    Call("/multiple-tasks/"),
    Call("/process/", {"json": {"colour": "green"}}),
    Call("/test-task/"),
]


def problem_of(response: httpx2.Response, *statuses: int) -> dict[str, Any]:
    """Return the problem of a response, which must be small and have one of these statuses."""
    assert response.status_code in statuses, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) <= LARGEST_PROBLEM
    problem: dict[str, Any] = response.json()
    assert problem.keys() - {"errors"} == {"type", "title", "status", "detail", "instance"}
    assert problem["status"] == response.status_code
    return problem
