"""The database commits, but its answer is lost, so the client repeats the request.

Either the connection to PostgreSQL is cut after COMMIT, or the request is cancelled while it waits,
for example by a server that stops. The client sends the same request with the same Idempotency-Key
until it gets a 202. Then each request has been carried out exactly once, and each upload has its
file, also after the clean-up has removed abandoned files.
"""

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from afterward.fastapi import RequestUnitOfWork
from afterward.task import Writes
from app.main import create_app, run
from tests.support.cutting import CuttingProxy
from tests.support.postgres import Postgres
from tests.support.service import PATIENCE, files_below, settings_in, until
from tests.support.service import Service as Server
from tests.support.torture import Tried, form

pytestmark = pytest.mark.anyio

CUTS = form(10, 100)
MESSAGES = 12  # the most from the application to PostgreSQL during a request
LOOP_ITERATIONS = 400  # the most iterations of the event loop during a request
KINDS = ("upload", "batch", "retry")


@dataclass
class Service:
    """The service in this process, and the uploads and tasks that it has answered 202."""

    client: httpx2.AsyncClient
    state: dict[str, Any]
    contents: dict[str, bytes] = field(default_factory=dict)  # of uploads, by id
    tasks: set[str] = field(default_factory=set)

    async def send(self, kind: str, key: str) -> httpx2.Response:
        """Send a request of this kind. The same key always gives the same request."""
        headers = {"Idempotency-Key": key}
        if kind == "upload":
            files = {"file": (f"{key}.bin", key.encode())}
            return await self.client.post("/upload", files=files, headers=headers)
        if kind == "batch":
            body = {"recipients": ["ada@example.com", "grace@example.com"], "subject": key}
            return await self.client.post("/send-notifications", json=body, headers=headers)
        return await self.client.post(f"/tasks/{key}/retry", headers=headers)

    async def key_for(self, kind: str, number: int) -> str:
        """Return a new Idempotency-Key; for a retry, it is the id of a task to retry."""
        if kind != "retry":
            return f"{kind}-{number}"
        accepted = await self.client.post("/send-notification/ada@example.com")
        task_id = str(accepted.json()["id"])
        cancelled = await self.client.post(f"/tasks/{task_id}/cancel")
        assert cancelled.status_code == 200
        return task_id

    async def repeat(self, kind: str, key: str) -> None:
        """Send the request until it is answered 202, and keep the ids in the answer."""
        async with asyncio.timeout(PATIENCE):
            while (answer := await self.send(kind, key)).status_code != 202:
                assert answer.status_code in {409, 503}, answer.text
                assert answer.headers["retry-after"]
                await asyncio.sleep(0.01)
        promised = answer.json()
        if kind == "upload":
            self.contents[promised["upload"]["id"]] = key.encode()
        self.tasks |= {task["id"] for task in promised.get("tasks", [promised])}

    async def clean_up(self) -> None:
        """Remove abandoned uploads now, instead of after an hour."""
        await self.state["pending_uploads"].remove_abandoned(0)

    async def lost(self) -> set[str]:
        """Return the uploads that were answered 202 and cannot be read."""
        lost = set[str]()
        for upload_id, content in self.contents.items():
            answer = await self.client.get(f"/uploads/{upload_id}/content")
            if answer.status_code != 200 or answer.content != content:
                lost.add(upload_id)
        return lost

    async def work_until_done(self) -> None:
        """Wait until all tasks have ended. Mails go to the embedded catcher."""
        async with asyncio.timeout(PATIENCE * 2):
            while await self._unfinished():  # noqa: ASYNC110 -- a test may poll
                await asyncio.sleep(0.02)

    async def _unfinished(self) -> bool:
        waiting = ("queued", "running", "retrying")
        pages = [await self.client.get(f"/tasks?limit=1&status={status}") for status in waiting]
        return any(page.json()["data"] for page in pages)

    async def all_tasks(self) -> dict[str, str]:
        """Return the status of each task that a client requested."""
        found: list[dict[str, Any]] = []
        while True:
            after = f"&after={found[-1]['id']}" if found else ""
            page = (await self.client.get(f"/tasks?limit=100{after}")).json()
            found += page["data"]
            if not page["has_more"]:
                own = [task for task in found if task["kind"] != "remove_upload"]
                return {task["id"]: task["status"] for task in own}


@contextlib.asynccontextmanager
async def serving(
    directory: Path, queue_url: str, before: Service | None = None
) -> AsyncIterator[Service]:
    """Start the service in this process.

    Without `before` it runs no tasks. With the earlier service as `before` it first does all tasks.
    """
    at_once = 10 if before else 0
    settings = settings_in(directory, queue_url=queue_url, worker_concurrency=at_once)
    app = create_app(settings)
    async with run(settings, None) as state:

        async def with_state(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(state)}, receive, send)

        transport = httpx2.ASGITransport(with_state)
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", timeout=PATIENCE
        ) as client:
            service = Service(client, dict(state))
            if before:
                service.contents, service.tasks = before.contents, before.tasks
                await service.work_until_done()
            yield service


@pytest.fixture
def proxy(postgres: Postgres) -> Iterator[CuttingProxy]:
    with CuttingProxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
def proxied(database_url: str, postgres: Postgres, proxy: CuttingProxy) -> str:
    """The address of an empty database behind the proxy."""
    return database_url.replace(f":{postgres.port}/", f":{proxy.port}/")


# Two ways to lose an answer


async def cancel_once_written(
    service: Service, sending: Awaitable[httpx2.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancel a request after its commit is written and before the request learns of it."""
    engine, written = service.state["queue"].engine, asyncio.Event()

    def withhold_answer(real: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def write(*arguments: Any, **options: Any) -> Any:
            result = await real(*arguments, **options)
            if any(isinstance(a, Writes) and a.answer is not None for a in arguments):
                written.set()
                await asyncio.Event().wait()
            return result

        return write

    with monkeypatch.context() as patch:
        for verb in ("put", "retry"):
            patch.setattr(engine, verb, withhold_answer(getattr(engine, verb)))
        request = asyncio.ensure_future(sending)
        async with asyncio.timeout(PATIENCE):
            await written.wait()
        request.cancel()
        await assert_expected_end(request)


async def cancel_at_random(sending: Awaitable[httpx2.Response]) -> None:
    """Cancel a request after a random number of iterations of the event loop."""
    request = asyncio.ensure_future(sending)
    for _ in range(random.randrange(LOOP_ITERATIONS)):
        await asyncio.sleep(0)
    request.cancel()
    await assert_expected_end(request)


async def assert_expected_end(request: "asyncio.Future[httpx2.Response]") -> None:
    """Assert that the request is answered 202 or 503, or raises CancelledError."""
    with contextlib.suppress(asyncio.CancelledError):
        assert (await request).status_code in {202, 503}


# Deterministic: the answer to the request's own commit is lost


@pytest.mark.parametrize("kind", KINDS)
async def test_a_request_is_carried_out_once_if_the_connection_is_cut_after_its_commit(
    tmp_path: Path, proxied: str, proxy: CuttingProxy, kind: str
) -> None:
    async with serving(tmp_path, proxied) as service:
        key = await service.key_for(kind, 0)
        proxy.lose_commit_of(key.encode())
        answer = await service.send(kind, key)
        assert (proxy.cuts, answer.status_code) == (1, 503)
        again = await service.send(kind, key)
        assert again.headers["idempotency-replay"] == "true"
        await service.repeat(kind, key)
        await service.clean_up()
    async with serving(tmp_path, proxied, service) as service:
        assert await service.lost() == set()
        assert await service.all_tasks() == dict.fromkeys(service.tasks, "succeeded")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_request_is_carried_out_once_if_it_is_cancelled_after_its_commit(
    tmp_path: Path, queue_url: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with serving(tmp_path, queue_url) as service:
        key = await service.key_for(kind, 0)
        await cancel_once_written(service, service.send(kind, key), monkeypatch)
        again = await service.send(kind, key)
        assert again.headers["idempotency-replay"] == "true"
        await service.repeat(kind, key)
        await service.clean_up()
    async with serving(tmp_path, queue_url, service) as service:
        assert await service.lost() == set()
        assert await service.all_tasks() == dict.fromkeys(service.tasks, "succeeded")


async def test_a_request_that_is_cancelled_is_answered_503(
    tmp_path: Path, queue_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The problem advises the client to repeat it, because the commit may have happened."""
    async with serving(tmp_path, queue_url) as service:
        monkeypatch.setattr(service.state["queue"].engine, "put", wait_for_ever)
        request = asyncio.ensure_future(service.send("batch", "key"))
        for _ in range(LOOP_ITERATIONS):
            await asyncio.sleep(0)
        request.cancel()
        answer = await request
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) > 0
    assert answer.headers["x-request-id"]
    assert "Idempotency-Key" in answer.json()["detail"]


async def wait_for_ever(*_: object) -> None:
    await asyncio.Event().wait()


def test_a_server_that_stops_answers_an_unfinished_request_503(tmp_path: Path) -> None:
    """For example an upload with a client that pauses for longer than the grace period."""
    head = (
        b"POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    with (
        Server(tmp_path, shutdown_grace_seconds=1, client_timeout_seconds=60) as server,
        socket.create_connection(("127.0.0.1", server.port), PATIENCE) as client,
    ):
        client.sendall(head)
        until(lambda: files_below(tmp_path / "uploads"), within=PATIENCE)
        server.stop()
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"application/problem+json" in answer
    assert b"retry-after" in answer.lower()
    assert files_below(tmp_path / "uploads") == []


# Random: an answer is lost at any moment


async def test_a_connection_cut_at_a_random_message_loses_nothing(
    tmp_path: Path, proxied: str, proxy: CuttingProxy, tried: Tried
) -> None:
    async with serving(tmp_path, proxied) as service:
        requests = 0
        while proxy.cuts < CUTS:  # a request may end before its message to cut
            kind = KINDS[requests % len(KINDS)]
            key = await service.key_for(kind, requests)
            requests += 1
            proxy.lose_answer(random.randrange(1, MESSAGES))
            await service.send(kind, key)
            proxy.stop_cutting()
            await service.repeat(kind, key)
        await service.clean_up()
    async with serving(tmp_path, proxied, service) as service:
        lost, tasks = await service.lost(), await service.all_tasks()
    tried(f"PostgreSQL: {CUTS} cuts at random in {requests} requests", f"{len(lost)} lost")
    assert lost == set()
    assert tasks == dict.fromkeys(service.tasks, "succeeded")


async def test_a_request_cancelled_at_a_random_moment_loses_nothing(
    tmp_path: Path, queue_url: str, tried: Tried
) -> None:
    """Also, no task runs twice, and the store has no file too many."""
    async with serving(tmp_path, queue_url) as service:
        for number in range(CUTS):
            kind = KINDS[number % len(KINDS)]
            key = await service.key_for(kind, number)
            await cancel_at_random(service.send(kind, key))
            await service.repeat(kind, key)
        await service.clean_up()
    async with serving(tmp_path, queue_url, service) as service:
        lost, tasks = await service.lost(), await service.all_tasks()
    database = queue_url.partition(":")[0]
    tried(f"{database}: {CUTS} requests cancelled at random", f"{len(lost)} lost")
    assert lost == set()
    assert tasks == dict.fromkeys(service.tasks, "succeeded")
    published = {f"published/{upload_id}" for upload_id in service.contents}
    assert set(files_below(tmp_path / "uploads")) == published


async def test_control_deleting_the_file_after_any_error_loses_uploads(
    tmp_path: Path, queue_url: str, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """The control assumes that a commit that raises has written nothing."""
    nothing_written = property(lambda _: False, lambda *_: None)
    monkeypatch.setattr(RequestUnitOfWork, "may_be_written", nothing_written, raising=False)
    monkeypatch.setattr("app.api.routes.uploads._is_committed", no_record)
    async with serving(tmp_path, queue_url) as service:
        for number in range(3):
            key = await service.key_for("upload", number)
            await cancel_once_written(service, service.send("upload", key), monkeypatch)
            await service.repeat("upload", key)
    async with serving(tmp_path, queue_url, service) as service:
        lost = await service.lost()
    tried("the file is deleted after any error: 3 answers lost", f"{len(lost)} uploads lost")
    assert len(lost) == 3


async def test_control_if_a_commit_keeps_the_pending_record_the_clean_up_loses_uploads(
    tmp_path: Path, queue_url: str, monkeypatch: pytest.MonkeyPatch, tried: Tried
) -> None:
    """With the pending record left, the clean-up takes a committed upload for an abandoned one."""
    monkeypatch.setattr(RequestUnitOfWork, "remove_record", lambda *_: None)
    monkeypatch.setattr("app.tasks.uploads._find_record", no_record)
    async with serving(tmp_path, queue_url) as service:
        await service.repeat("upload", await service.key_for("upload", 0))
        await service.clean_up()
    async with serving(tmp_path, queue_url, service) as service:
        lost = await service.lost()
    tried("the commit of an upload leaves its pending record", f"{len(lost)} of 1 lost")
    assert len(lost) == 1


async def no_record(*_: object, **__: object) -> None:
    return None
