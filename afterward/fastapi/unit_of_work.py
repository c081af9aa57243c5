"""The unit of work of one request: its durable tasks, and its idempotency key."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from starlette.exceptions import HTTPException

from afterward.errors import (
    CommitUnknown,
    KeyTaken,
    QueueUnavailable,
    RecordNotFound,
    TaskNotFound,
    TaskNotGivenUp,
)
from afterward.fastapi.idempotency import IdempotencyKeyReused, answer_to_store, read_key, replay
from afterward.queue import Queue
from afterward.task import Answer, Task, Writes, storable_text
from afterward.unit_of_work import UnitOfWork

# After these errors of a commit, nothing was written. After CommitUnknown, which extends
# QueueUnavailable, everything may be written, so its handler stands before theirs.
_NOTHING_WRITTEN = (QueueUnavailable, RecordNotFound, TaskNotFound, TaskNotGivenUp)

_NO_QUEUE = (
    "DurableRoute finds no queue in the state of the request. Give the app the lifespan of an "
    "Afterward object, FastAPI(lifespan=afterward.lifespan), or yield {'queue': queue} from a "
    "lifespan of your own."
)
_NO_DURABLE_ROUTE = (
    "DurableTasks needs a route that commits: APIRouter(route_class=DurableRoute). For routes of "
    "the app itself, set app.router.route_class = DurableRoute before you add them."
)

_NO_BODY_DIGEST = (
    "With an Idempotency-Key, a route that reads a form or a stream must set "
    "durable_tasks.body_digest, so that a repeated request can be recognised."
)
_NO_STORABLE_RESPONSE = (
    "With an Idempotency-Key, the response is stored, so it cannot be a stream or a file."
)


class RequestUnitOfWork(UnitOfWork[Any]):
    """Collects the durable tasks of a request. DurableRoute commits it once the route has returned.

    A middleware may set `request.state.client` and `request.state.request_id` to a str. Then the
    tasks belong to this client, and their log lines name this request id, up to its 255th
    character. Raises RuntimeError without a queue, HTTPException 400 for a malformed idempotency
    key.
    """

    # This object keeps no reference to the request, because the request's state already refers to
    # this object. In such a cycle, each request would live until the garbage collector runs.
    def __init__(self, request: Request) -> None:
        state = request.scope.get("state", {})
        if not isinstance(queue := state.get("queue"), Queue):
            raise RuntimeError(_NO_QUEUE)  # noqa: TRY004 -- no argument
        self._queue: Queue[Any] = queue
        super().__init__(
            queue.registry,
            policy_of=queue.policy_of,
            now=queue.now,
            trace_context=queue.tracing.trace_context,
            request_id=storable_text(_text(state, "request_id")) or None,
            client=_text(state, "client"),
        )
        self._key = read_key(request, self._client)
        self._retried: Task | None = None
        self.body_digest: bytes | None = None
        """A digest of the request's body, set by a route that reads the body as a stream."""
        self.may_be_written = False
        """True once the commit has begun, unless it is certain that it wrote nothing.

        It stays true if the outcome of the commit is unknown, or if the request was cancelled.
        """

    def retry_task(self, task: Task) -> None:
        """Let the commit queue a failed or cancelled task again, and nothing else."""
        self._retried = task

    def hold_key(self) -> None:
        """Reserve the request's idempotency key.

        Raises HTTPException 409 if another request with this key is under way.
        """
        if self._key is None:
            return
        if self._key in self._queue.keys_in_flight:
            raise HTTPException(
                409,
                "The first request with this Idempotency-Key is under way.",
                {"Retry-After": "1"},
            )
        self._queue.keys_in_flight.add(self._key)

    def release_key(self) -> None:
        """Release the key. Later requests with it find the stored response, if there is one."""
        if self._key is not None:
            self._queue.keys_in_flight.discard(self._key)

    async def commit(self, request: Request, response: Response) -> Response:
        """Write all that was collected, and the response too if the request has a key.

        Returns the response to send. For a repeated request, this is the stored first response, and
        nothing is written. Raises IdempotencyKeyReused if an earlier, different request had the
        same key; BacklogFull, QueueUnavailable, RecordNotFound, TaskNotFound and TaskNotGivenUp as
        `Queue.commit` and `Queue.retry` do; ValueError for a retry together with new tasks or
        records; RuntimeError for a response that cannot be stored. `may_be_written` tells whether
        the commit may have succeeded in spite of an error.
        """
        if response.status_code == HTTPStatus.ACCEPTED:
            self._set_location(response)
        answer = None if self._key is None else await self._answer(self._key, request, response)
        writes = self.collected(answer)
        if self._retried is not None and writes != Writes(answer=answer):
            raise ValueError("a retry is a transaction of its own: add the new tasks in another")
        self.may_be_written = True
        try:
            if self._retried is not None:
                await self._queue.retry(self._retried, answer)
            else:
                await self._queue.commit(writes)
        except KeyTaken as taken:
            self.may_be_written = False
            if answer is not None and taken.answer.fingerprint == answer.fingerprint:
                return replay(taken.answer)
            raise IdempotencyKeyReused from None
        except CommitUnknown:
            raise  # `may_be_written` stays True
        except _NOTHING_WRITTEN:
            self.may_be_written = False
            raise
        return response

    def _set_location(self, response: Response) -> None:
        """Add the path of the task or the batch, unless the route has set a Location of its own."""
        if "Location" in response.headers:
            return
        if self._batch_id is not None:
            response.headers["Location"] = f"/batches/{self._batch_id}"
        elif queued := [self._retried] if self._retried else self._tasks:
            response.headers["Location"] = f"/tasks/{queued[0].id}"

    async def _answer(self, key: str, request: Request, response: Response) -> Answer | None:
        """Return the response in the form in which it is stored; None if it is no 202."""
        if response.status_code != HTTPStatus.ACCEPTED:  # only a 202 is repeated
            return None
        if not isinstance(getattr(response, "body", None), bytes | memoryview):
            raise RuntimeError(_NO_STORABLE_RESPONSE)  # noqa: TRY004 -- no argument
        try:
            body = self.body_digest or await request.body()
        except RuntimeError:  # Starlette's: the route has read the body as a stream, or as a form
            raise RuntimeError(_NO_BODY_DIGEST) from None
        return answer_to_store(key, request, body, response, self._now())


def _text(state: dict[str, Any], name: str) -> str:
    """Return a value of the state if it is a str, else ""."""
    # An app may use the name for something else: `state.client` is often an HTTP client.
    value = state.get(name)
    return value if isinstance(value, str) else ""


async def _unit_of_work_of(request: Request) -> RequestUnitOfWork:
    try:
        return request.scope["state"]["durable_tasks"]  # type: ignore[no-any-return]
    except KeyError:
        raise RuntimeError(_NO_DURABLE_ROUTE) from None


DurableTasks = Annotated[RequestUnitOfWork, Depends(_unit_of_work_of)]
"""The type of a route's parameter `durable_tasks`.

The commit comes before the exits of dependencies with `yield`: if one raises an error, the tasks
are committed all the same.
"""
