"""Requests to the service over its HTTP API. Errors become `Trouble`, with a message to print."""

import contextlib
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx2

from app.listening import is_loopback
from app.terminal.output import NOTHING_MATCHED, TROUBLE, Json, Trouble

TIMEOUT = 30.0  # seconds for each step of a request
SILENCE = 60.0  # seconds without a heartbeat, after which an event stream counts as lost
LARGEST_PAGE = 100  # tasks in one response
_LARGEST_INTEGER = 2**53  # a larger one is not exact in JSON (RFC 8259, 6)

# Exit codes of some statuses of a response. 404: there is no such task. 409: the task has a status
# that does not allow the action.
_EXIT_CODES_OF_ONE_TASK = {404: NOTHING_MATCHED, 409: NOTHING_MATCHED}
_NO_SPECIAL_EXIT_CODES: Mapping[int, int] = {}

# A request without a usable answer. UnicodeError: a bad host name.
_UNUSABLE = httpx2.RequestError, UnicodeError


class Lost(Exception):
    """The connection to the service was lost, or the service is away for a while."""


class Client:
    """A client of the service at `url`. `transport` stands in for the network in tests."""

    def __init__(
        self, url: str, key: str | None = None, transport: httpx2.BaseTransport | None = None
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise Trouble(
                f"{url} is not a valid service URL: it must begin with http:// or https://"
            )
        self.url = url.rstrip("/")
        self._has_key = key is not None
        self._is_local = _is_local(self.url)
        try:
            self._http = httpx2.Client(
                base_url=self.url,
                headers={} if key is None else {"Authorization": f"Bearer {_checked(key)}"},
                timeout=TIMEOUT,
                transport=transport,
                trust_env=not self._is_local,  # no proxy of HTTP_PROXY stands before this machine
            )
        except httpx2.InvalidURL as error:
            raise Trouble(f"{url} is not a valid service URL: {error}") from error

    def __enter__(self) -> Self:
        """Return the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close its connections."""
        self._http.close()

    # One task

    def task(self, task_id: str) -> Json:
        """Read a task, with its failed attempts."""
        return self._request("GET", task_path(task_id), _EXIT_CODES_OF_ONE_TASK)

    def act_on_task(self, action: str, task_id: str) -> Json:
        """Retry or cancel a task."""
        return self._request("POST", f"{task_path(task_id)}/{action}", _EXIT_CODES_OF_ONE_TASK)

    # Several tasks

    def tasks(self, filters: Mapping[str, str], limit: int | None) -> Iterator[Json]:
        """Yield the newest tasks, at most `limit` of them. The pages are read one by one."""
        after: dict[str, str] = {}
        while limit is None or limit > 0:
            size = LARGEST_PAGE if limit is None else min(limit, LARGEST_PAGE)
            page = self.get("/tasks", **filters, **after, limit=str(size))
            tasks = objects(page, "data")
            yield from tasks
            if not (tasks and page.get("has_more")):
                return
            limit = None if limit is None else limit - len(tasks)
            after = {"after": str(tasks[-1].get("id"))}

    def count(self, action: str, filters: Mapping[str, str]) -> int:
        """Return how many tasks an action would change now."""
        answer = self.post(f"/tasks/{action}", {"filter": filters, "dry_run": True})
        return integer(answer, "matches")

    def act_on_tasks(self, action: str, filters: Mapping[str, str]) -> Json:
        """Start an action on many tasks. Return the task that carries it out."""
        return self.post(f"/tasks/{action}", {"filter": filters})

    # Requests

    def get(self, path: str, **params: str) -> Json:
        """Read an object."""
        return self._request("GET", path, params=params)

    def post(self, path: str, body: Json | None = None, **options: Any) -> Json:
        """Post an object, and return the service's answer."""
        return self._request("POST", path, json=body, **options)

    def exists(self, path: str) -> bool:
        """Return whether the service has a page at this path."""
        with self._explained_errors():
            return self._http.get(path).is_success

    def _request(
        self,
        method: str,
        path: str,
        exit_codes: Mapping[int, int] = _NO_SPECIAL_EXIT_CODES,
        **options: Any,
    ) -> Json:
        """Send a request. `exit_codes` has the exit codes of some statuses."""
        with self._explained_errors():
            response = self._http.request(method, path, **options)
        if not response.is_success:
            raise self._trouble(response, exit_codes)
        return _object(response)

    @contextlib.contextmanager
    def events(self, path: str, last_event_id: str | None) -> Iterator[httpx2.EventSource]:
        """Open an event stream. Raises Lost if the service is away, or goes away."""
        headers = {} if last_event_id is None else {"Last-Event-ID": last_event_id}
        timeout = httpx2.Timeout(TIMEOUT, read=SILENCE)
        try:
            with self._http.sse(path, headers=headers, timeout=timeout) as events:
                response = events.response
                if not response.is_success:
                    response.read()
                    trouble = self._trouble(response, _EXIT_CODES_OF_ONE_TASK)
                    raise Lost(str(trouble)) if _is_temporary(response) else trouble
                yield events
        except httpx2.SSEError as error:
            raise Trouble(f"{self.url} does not answer like this service: {error}") from error
        except httpx2.TransportError as error:
            raise Lost(self._reason(error)) from error
        except _UNUSABLE as error:
            raise Trouble(self._reason(error)) from error

    # Errors

    @contextlib.contextmanager
    def _explained_errors(self) -> Iterator[None]:
        try:
            yield
        except _UNUSABLE as error:
            raise Trouble(self._reason(error)) from error

    def _reason(self, error: Exception) -> str:
        """Return a sentence about a request that got no answer."""
        if isinstance(error, httpx2.TimeoutException):
            return f"{self.url} did not answer in time."
        # With https there may be an answer, but a certificate that this machine does not trust.
        is_plain = self.url.startswith("http:")
        if isinstance(error, httpx2.ConnectError) and self._is_local and is_plain:
            return f"Nothing answers at {self.url}. Start the service with: make run"
        return f"Cannot reach {self.url}: {error}"

    def _trouble(self, response: httpx2.Response, exit_codes: Mapping[int, int]) -> Trouble:
        """Return the error for an unsuccessful response of the service."""
        status, problem = response.status_code, _problem(response)
        if status == HTTPStatus.UNAUTHORIZED:
            return Trouble(
                "The service does not know this API key."
                if self._has_key
                else "The service asks for an API key: set the variable AFTERWARD_API_KEY."
            )
        if not problem:
            return Trouble(
                f"{self.url} does not answer like this service: {status} {response.reason_phrase}"
            )
        message = f"The service answered {status}: {_details(problem)}"
        if pause := response.headers.get("retry-after"):  # the detail speaks of this header
            message += f" (Retry-After: {pause})"
        return Trouble(message, exit_codes.get(status, TROUBLE))


def task_path(task_id: str) -> str:
    """Return the path of a task, whatever its id contains."""
    return f"/tasks/{quote(task_id, safe='')}"


def _is_temporary(response: httpx2.Response) -> bool:
    return response.is_server_error or response.status_code == HTTPStatus.TOO_MANY_REQUESTS


def _is_local(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def _checked(key: str) -> str:
    """Return the key if it can stand in a header. The message must not contain the key."""
    if not (key.isascii() and key.isprintable() and key.strip() == key):
        raise Trouble("The API key has characters that no API key has, such as a line break.")
    return key


def as_object(value: Any) -> Json:
    """Return a part of an answer that must be an object. Raises Trouble if it is not."""
    if isinstance(value, dict):
        return value
    raise Trouble("The service has answered with JSON that is not an object.")


def _object(response: httpx2.Response) -> Json:
    """Return the object in the body of a response."""
    try:
        return as_object(response.json())
    except (ValueError, RecursionError) as error:  # the body is not JSON, not text, or very deep
        raise Trouble(f"{response.url} does not answer with JSON, as this service does.") from error


def objects(answer: Json, name: str) -> list[Json]:
    """Return a list of objects in an answer of the service. Raises Trouble if there is none."""
    found = answer.get(name)
    if isinstance(found, list) and all(isinstance(item, dict) for item in found):
        return found
    raise Trouble(f"The service's answer has no list of objects {name}.")


def integer(answer: Json, name: str) -> int:
    """Return a number in an answer of the service. Raises Trouble if there is none."""
    found = answer.get(name)
    if isinstance(found, int) and abs(found) <= _LARGEST_INTEGER:
        return found
    raise Trouble(f"The service's answer has no number {name}.")


def instant(answer: Json, name: str, later: timedelta) -> datetime:
    """Return a moment later than a time in an answer. Raises Trouble if there is none."""
    with contextlib.suppress(ValueError, OverflowError):
        return datetime.fromisoformat(str(answer.get(name))) + later
    raise Trouble(f"The service's answer has no time {name}.")


def _problem(response: httpx2.Response) -> Json:
    """Return the problem that describes an error (RFC 9457), or {} if there is none."""
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        with contextlib.suppress(Trouble):
            return _object(response)
    return {}


def _details(problem: Json) -> str:
    """Return the detail of a problem, and each invalid field with its reason."""
    errors = problem.get("errors")
    if not isinstance(errors, list):
        return str(problem.get("detail"))
    return "; ".join(
        f"{_field_name(error.get('pointer'))}: {error.get('detail')}"
        for error in errors
        if isinstance(error, dict)
    )


def _field_name(pointer: object) -> str:
    """Return a JSON pointer as a name: `/filter/status` is about the option --status."""
    return str(pointer).removeprefix("/filter").removeprefix("/")
