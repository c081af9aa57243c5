"""A stand-in for the service: it gives fixed answers, and notes the requests."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx2

Json = dict[str, Any]
ID = "01a1f8ed-6e76-70fa-96de-2c8618644aa5"


class StandIn:
    """A handler for httpx2.MockTransport. Each answer is given once, in order."""

    def __init__(self) -> None:
        self.requests: list[httpx2.Request] = []
        self._answers: list[httpx2.Response | BaseException] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        """Answer a request."""
        self.requests.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def answers(self, *answers: httpx2.Response | BaseException | Json) -> None:
        """Add answers. An object is sent as JSON, with 200; an exception is raised instead."""
        self._answers += [
            httpx2.Response(200, json=answer) if isinstance(answer, dict) else answer
            for answer in answers
        ]

    @property
    def asked(self) -> list[str]:
        """The method, the path and the query of each request."""
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]

    def body(self, number: int) -> Any:
        """Return the JSON of a request."""
        return json.loads(self.requests[number].content)


def task(**changes: Any) -> Json:
    """Return a task as the API has it."""
    return {
        "id": ID,
        "kind": "send_email",
        "status": "succeeded",
        "created_at": "2026-11-28T14:00:00Z",
        "attempts": 1,
        "max_attempts": None,
        "gives_up_at": "2026-12-02T14:00:00Z",
        "updated_at": "2026-11-28T14:00:01Z",
        "started_at": "2026-11-28T14:00:00.5Z",
        "finished_at": "2026-11-28T14:00:01Z",
        "next_attempt_at": None,
        "progress": None,
        "result": {"reply": "250 OK"},
        "error": None,
        "about": "ada@example.com",
        "batch_id": None,
        "request_id": "r-1",
        "worker": "mail-1:4711:5f2a",
    } | changes


def failure(detail: str = "550 no such mailbox", **changes: Any) -> Json:
    """Return a failed task."""
    error = {"type": "PermanentError", "detail": detail, "smtp_code": 550}
    return task(status="failed", result=None, error=error) | changes


def page(*tasks: Json, has_more: bool = False) -> Json:
    """Return a page of a list."""
    return {"data": list(tasks), "has_more": has_more}


def problem(
    status: int, detail: str, retry_after: str | None = None, **more: Any
) -> httpx2.Response:
    """Return an error as the service describes it."""
    headers = {"Content-Type": "application/problem+json"}
    return httpx2.Response(
        status,
        json={"type": "about:blank", "status": status, "detail": detail} | more,
        headers=headers if retry_after is None else headers | {"Retry-After": retry_after},
    )


class _Stream(httpx2.SyncByteStream):
    """The body of an event stream, which may end with a lost connection."""

    def __init__(self, events: tuple[bytes, ...], *, breaks: bool) -> None:
        self._events = events
        self._breaks = breaks

    def __iter__(self) -> Iterator[bytes]:
        """Yield the events."""
        yield from self._events
        if self._breaks:
            raise httpx2.ReadError("connection reset")


def undecodable(status: int, kind: str) -> httpx2.Response:
    """Return a response that is not compressed as its header says."""
    headers = {"Content-Type": kind, "Content-Encoding": "gzip"}
    return httpx2.Response(status, headers=headers, stream=_Stream((b"junk",), breaks=False))


def stream(*events: bytes, breaks: bool = False) -> httpx2.Response:
    """Return an event stream that is closed after these events, or that breaks."""
    headers = {"Content-Type": "text/event-stream"}
    return httpx2.Response(200, headers=headers, stream=_Stream(events, breaks=breaks))


def event(name: str, data: Json, id: str = "1") -> bytes:  # noqa: A002 - as in the stream
    """Return an event as the service writes it."""
    return f"event: {name}\nid: {id}\ndata: {json.dumps(data)}\n\n".encode()


def without_styles(text: str) -> str:
    """Return a text without the colours of a terminal."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
