"""The durable tasks of a request: on disk before its answer, and once for each idempotency key."""

import hashlib
import re
from http import HTTPStatus
from typing import Annotated

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
from afterward.task import Answer, Task
from afterward.unit_of_work import DurableTasks
from app.api.dependencies import RequestState
from app.api.errors import InvalidRequest
from app.api.paths import route_path
from app.tasks.tools import Tools

# 1 to 255 visible ASCII characters, bare or as a quoted string
# (draft-ietf-httpapi-idempotency-key-header).
_KEY = re.compile(r'"([!#-~]{1,255})"|([!#-~][!-~]{0,254})')

# After each of these errors of a commit it is certain that nothing was written. The exception is
# CommitUnknown, which is a QueueUnavailable too.
_NOTHING_WRITTEN = (QueueUnavailable, RecordNotFound, TaskNotFound, TaskNotGivenUp)


class Promises(DurableTasks[Tools]):
    """`durable_tasks` in a route. The route class commits it once the route has answered."""

    # It must not hold the request, whose state holds it: a cycle would leave every request to the
    # garbage collector.
    def __init__(self, request: Request) -> None:
        state: RequestState = request.scope["state"]
        self._queue = state["queue"]
        super().__init__(
            self._queue.catalogue,
            policy_of=self._queue.policy_of,
            now=self._queue.now,
            request_id=state["request_id"],
            client=state["client"],
        )
        self._key = _idempotency_key(request)
        self._keys_in_flight = state["keys_in_flight"]
        self._retried: Task | None = None
        self.body_digest: bytes | None = None
        """Stands for the body where that was read as a stream."""
        self.may_be_written = False
        """True once the commit has begun, unless it has certainly written nothing.

        It stays true if the answer to the commit was lost, or if the request was cancelled.
        """

    def retry_task(self, task: Task) -> None:
        """Collect the retry of a failed or cancelled task, instead of new ones."""
        self._retried = task

    def hold_key(self) -> None:
        """Hold the request's idempotency key; HTTPException 409 if another request holds it."""
        if self._key is None:
            return
        if self._key in self._keys_in_flight:
            raise HTTPException(
                409,
                "The first request with this Idempotency-Key is under way.",
                {"Retry-After": "1"},
            )
        self._keys_in_flight.add(self._key)

    def let_go_of_key(self) -> None:
        """Let other requests use the key: they find the answer to this one, if there is any."""
        if self._key is not None:
            self._keys_in_flight.discard(self._key)

    async def commit(self, request: Request, response: Response) -> None:
        """Write what was collected, and the answer if the request has a key.

        Raises Replay or InvalidRequest if the key was used before, QueueUnavailable if the
        database refuses. `may_be_written` tells whether something may have been written.
        """
        if response.status_code == HTTPStatus.ACCEPTED:
            self._name_what_was_queued(response)
        answer = None if self._key is None else await self._answer(self._key, request, response)
        writes = self.collected(answer)
        self.may_be_written = True
        try:
            if self._retried is not None:
                await self._queue.retry(self._retried, writes)
            else:
                await self._queue.commit(writes)
        except KeyTaken as taken:
            self.may_be_written = False
            if answer is not None and taken.answer.fingerprint == answer.fingerprint:
                raise Replay(taken.answer) from None
            raise InvalidRequest(
                "/Idempotency-Key", "This key was used before, for another request."
            ) from None
        except _NOTHING_WRITTEN as error:
            self.may_be_written = isinstance(error, CommitUnknown)
            raise

    def _name_what_was_queued(self, response: Response) -> None:
        if self._batch_id is not None:
            response.headers["Location"] = f"/batches/{self._batch_id}"
        elif promised := [self._retried] if self._retried else self._tasks:
            response.headers["Location"] = f"/tasks/{promised[0].id}"

    async def _answer(self, key: str, request: Request, response: Response) -> Answer | None:
        if response.status_code != HTTPStatus.ACCEPTED:  # nothing was queued
            return None
        body = self.body_digest or await request.body()
        asked = f"{request.method} {route_path(request.scope)}?{request.url.query}\n".encode()
        return Answer(
            key=key,
            fingerprint=hashlib.sha256(asked + body).hexdigest(),
            body=bytes(response.body).decode(),
            location=response.headers.get("Location", ""),
            created_at=self._now(),
        )


async def _promises(request: Request) -> Promises:
    return request.state.promises  # type: ignore[no-any-return]


DurableTasksDep = Annotated[Promises, Depends(_promises)]


class Replay(Exception):
    """The request was answered before; it is answered the same again, and nothing is done."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


async def replayed(_: Request, replay: Exception) -> Response:
    """The first answer to a request with this key, marked as a repetition."""
    assert isinstance(replay, Replay)
    headers = {"Idempotency-Replay": "true"}
    if replay.answer.location:
        headers["Location"] = replay.answer.location
    return Response(replay.answer.body, 202, headers, media_type="application/json")


def _idempotency_key(request: Request) -> str | None:
    header = request.headers.get("idempotency-key")
    if header is None:
        return None
    match = _KEY.fullmatch(header)
    if match is None:
        raise HTTPException(
            400, "An Idempotency-Key is 1 to 255 visible ASCII characters, quoted or bare."
        )
    # Each client has its own; what a name and a key have between them, neither holds.
    return f"{request.state.client} {match[1] or match[2]}".lstrip()
