"""The durable tasks of a request: on disk before its answer, and once for each idempotency key."""

import hashlib
import re
from collections.abc import AsyncIterator
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request, Response
from starlette.exceptions import HTTPException

from app.api.problems import InvalidRequest
from app.api.schemas import Queued
from app.queue.durable import DurableTasks
from app.queue.errors import KeyTaken
from app.queue.queue import Queue
from app.queue.task import Answer, Batch, Task
from app.tasks.tools import Tools

# 1 to 255 visible ASCII characters, bare or as a quoted string
# (draft-ietf-httpapi-idempotency-key-header).
_KEY = re.compile(r'"([!#-~]{1,255})"|([!#-~][!-~]{0,254})')

QueuedT = TypeVar("QueuedT", bound=Queued)


class Promises(DurableTasks[Tools]):
    """`durable_tasks` in a route: collects tasks, and remembers what the request is answered."""

    def __init__(self, queue: Queue[Tools], request: Request, response: Response) -> None:
        super().__init__(
            queue.catalogue,
            max_attempts=queue.policy.attempts,
            now=queue.now,
            request_id=request.state.request_id,
        )
        self._request = request
        self._response = response
        self._queued: Queued | None = None
        self.key: str | None = None
        self.body_digest: bytes | None = None
        """Stands for the body where that was read as a stream."""

    def accepted(self, queued: QueuedT) -> QueuedT:
        """Answer with `queued`, and with a Location header that leads to the task."""
        self._response.headers["Location"] = _location(queued)
        self._queued = queued
        return queued

    async def to_commit(self) -> Batch:
        """Everything collected, and the answer if the request has a key."""
        if self.key is None or self._queued is None:
            return self.batch()
        answer = Answer(
            key=self.key,
            fingerprint=await self.fingerprint(),
            body=self._queued.model_dump_json(),
            location=_location(self._queued),
            created_at=self._now(),
        )
        return self.batch(answer)

    def committed(self) -> None:
        """The route has committed for itself: nothing is left to be done after it."""
        self._queued = None

    async def fingerprint(self) -> str:
        """The same for two requests exactly if they ask for the same."""
        url = self._request.url
        body = self.body_digest or hashlib.sha256(await self._request.body()).digest()
        asked = f"{self._request.method} {url.path}?{url.query}".encode()
        return hashlib.sha256(asked + b"\n" + body).hexdigest()


async def _promises(
    request: Request,
    response: Response,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="The same key with the same request is carried out once, "
            "and answered as the first time. 1 to 255 visible ASCII characters.",
        ),
    ] = None,
) -> AsyncIterator[Promises]:
    # Each dependency of a dependency costs a tenth of the request: this one takes the state itself.
    queue: Queue[Tools] = request.state.queue
    promises = Promises(queue, request, response)
    if idempotency_key is None:
        yield promises
        await queue.commit(promises.batch())
        return
    promises.key = _checked(idempotency_key)
    in_flight: set[str] = request.state.keys_in_flight
    if promises.key in in_flight:
        raise HTTPException(
            409, "The first request with this Idempotency-Key is under way.", {"Retry-After": "1"}
        )
    in_flight.add(promises.key)
    try:
        yield promises
        await queue.commit(await promises.to_commit())
    except KeyTaken as taken:
        if taken.answer.fingerprint != await promises.fingerprint():
            raise InvalidRequest(
                "/Idempotency-Key", "This key was used before, for another request."
            ) from None
        raise Replay(taken.answer) from None
    finally:
        in_flight.discard(promises.key)


# Function scope: what stands after the `yield` runs before the response is sent. With the default
# scope it would run afterwards, and a commit that fails would have been answered 202.
DurableTasksDep = Annotated[Promises, Depends(_promises, scope="function")]


class Replay(Exception):
    """The request was answered before; it is answered the same again, and nothing is done."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


async def replayed(_: Request, replay: Exception) -> Response:
    """The first answer to a request with this key, marked as a repetition."""
    assert isinstance(replay, Replay)
    return Response(
        replay.answer.body,
        202,
        {"Location": replay.answer.location, "Idempotency-Replay": "true"},
        media_type="application/json",
    )


def _checked(header: str) -> str:
    match = _KEY.fullmatch(header)
    if match is None:
        raise HTTPException(
            400, "An Idempotency-Key is 1 to 255 visible ASCII characters, quoted or bare."
        )
    return match[1] or match[2]


def _location(task: Task | Queued) -> str:
    return f"/tasks/{task.id}"
