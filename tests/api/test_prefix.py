"""Behind a proxy that shows the service under a prefix, and strips it or leaves it there."""

import os
import re
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.routing import Route

from app.main import create_app
from app.settings import BadSettings
from tests.api.requests import PROMISES, Call, problem_of
from tests.support.gate import bearing
from tests.support.service import PATIENCE, Service, settings_in, wait_for

PREFIX = "/afterward"
KEY = "key-of-ada"
UVICORN = (sys.executable, "-m", "uvicorn", "app.main:app", "--port", "{port}")
LIMITS: dict[str, Any] = {"max_upload_bytes": 200_000, "max_body_bytes": 2_000}

# How it is told of the prefix, and whether the proxy strips it.
BY_SETTING: dict[str, Any] = {"root_path": PREFIX}
BY_UVICORN: dict[str, Any] = {"command": (*UVICORN, "--root-path", PREFIX)}
WAYS = {
    "ROOT_PATH, stripped": (BY_SETTING, ""),
    "ROOT_PATH, left": (BY_SETTING, PREFIX),
    "uvicorn --root-path, stripped": (BY_UVICORN, ""),
    "uvicorn --root-path, left": (BY_UVICORN, PREFIX),
}


def the_ways() -> Iterator[Any]:
    """Each way as a parameter; `make test` takes the first."""
    for position, (name, way) in enumerate(WAYS.items()):
        yield pytest.param(way, id=name, marks=pytest.mark.thorough if position else ())


@pytest.fixture(scope="module", params=list(the_ways()))
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx2.Client]:
    """A client behind the proxy: the paths that it names are those that arrive at the service."""
    settings, arrives_under = request.param
    directory = tmp_path_factory.mktemp("service")
    with (
        Service(directory, **LIMITS, **settings) as service,
        httpx2.Client(base_url=service.url + arrives_under, timeout=PATIENCE) as client,
    ):
        yield client


def behind(address: str) -> str:
    """The part of an address of the proxy that the client adds to its own address."""
    assert address.startswith(PREFIX), address
    return address.removeprefix(PREFIX)


@pytest.mark.parametrize("call", PROMISES, ids=lambda call: call.path)
def test_the_location_has_the_prefix(client: httpx2.Client, call: Call) -> None:
    response = call.send(client)
    assert response.status_code == 202
    location = response.headers["location"]
    assert location == f"{PREFIX}/tasks/{response.json()['id']}"
    assert client.get(behind(location)).json()["id"] == response.json()["id"]


def test_an_upload_has_its_own_limit(client: httpx2.Client) -> None:
    files = {"file": ("noise.bin", os.urandom(100_000))}
    for path in ("/upload", "/upload/"):
        assert client.post(path, files=files).status_code == 202
    problem = problem_of(client.post("/process/", json={"x": "x" * 3_000}), 413)
    assert problem["instance"] == f"{PREFIX}/process/"


def test_a_problem_names_the_path_that_the_client_asked_for(client: httpx2.Client) -> None:
    for path, status in (("/nowhere", 404), ("/tasks/none", 404), ("/tasks?limit=0", 422)):
        problem = problem_of(client.get(path), status)
        assert problem["instance"] == PREFIX + path.partition("?")[0]


PAGES = ["/", "/inbox", "/docs", "/redoc"]
ADDRESS = re.compile(r"""(?:href|src|data-document|spec-url)="([^"]*)\"""")


@pytest.mark.parametrize("page", PAGES)
def test_every_address_on_a_page_leads_somewhere(client: httpx2.Client, page: str) -> None:
    wait_for(client, client.post("/send-notification/ada@example.com").json()["id"])
    addresses = ADDRESS.findall(client.get(page).text)
    assert addresses
    for address in map(unescape, addresses):
        assert client.head(behind(address)).status_code == 200


def test_a_mail_is_found_from_its_page(client: httpx2.Client) -> None:
    wait_for(client, client.post("/send-notification/ada@example.com").json()["id"])
    mail = re.findall(f'href="({PREFIX}/inbox/[^"]+)"', client.get("/inbox").text)[0]
    page = client.get(behind(mail)).text
    (frame,) = re.findall('<iframe sandbox src="([^"]+)"', page)
    assert client.get(behind(frame)).is_success


def test_the_document_names_the_prefix_as_its_server(client: httpx2.Client) -> None:
    assert client.get("/openapi.json").json()["servers"] == [{"url": PREFIX}]


def test_what_is_public_is_public_and_nothing_else(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, root_path=PREFIX, api_keys=f"ada: {KEY}", worker_concurrency=0)
    with TestClient(create_app(settings)) as client:
        for before in ("", PREFIX):
            for path in ("/livez", "/readyz", "/docs", "/docs/start.js", "/openapi.json"):
                assert client.get(before + path).status_code == 200
            for path in ("/tasks", "/metrics", "/livez/x", "/"):
                problem_of(client.get(before + path), 401)
            assert client.get(before + "/tasks", headers=bearing(KEY)).status_code == 200


def test_a_path_that_only_begins_like_the_prefix_is_another(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, root_path=PREFIX, worker_concurrency=0)
    with TestClient(create_app(settings)) as client:
        assert client.get(PREFIX).text == client.get("/").text
        problem_of(client.get(f"{PREFIX}livez"), 404)
        problem_of(client.get(f"{PREFIX}{PREFIX}/livez"), 404)


def test_a_repeated_request_gets_the_prefix_of_now(tmp_path: Path) -> None:
    """Also where it came under another prefix first: it is the same request."""
    locations = []
    for prefix in (None, "/old", "/new"):
        settings = settings_in(tmp_path, root_path=prefix, worker_concurrency=0)
        with TestClient(create_app(settings)) as client:
            path = f"{prefix or ''}/send-notification/ada@example.com"
            answer = client.post(path, headers={"Idempotency-Key": "k1"})
            assert answer.status_code == 202
            assert answer.headers.get("idempotency-replay") == ("true" if prefix else None)
            task = answer.json()["id"]
            locations.append(answer.headers["location"])
    assert locations == [f"/tasks/{task}", f"/old/tasks/{task}", f"/new/tasks/{task}"]


def test_an_address_elsewhere_stays_as_it_is(tmp_path: Path) -> None:
    """Such as that of signed content."""
    elsewhere = "https://bucket.example.com/key?signed=1"
    app = create_app(settings_in(tmp_path, root_path=PREFIX, worker_concurrency=0))

    async def redirect(_: Request) -> RedirectResponse:
        return RedirectResponse(elsewhere)

    app.router.routes.append(Route("/elsewhere", redirect))
    with TestClient(app, follow_redirects=False) as client:
        assert client.get("/elsewhere").headers["location"] == elsewhere


@pytest.mark.parametrize("prefix", ["/tasks", "/docs/api", "/upload", "/livez"])
def test_a_prefix_that_is_a_path_of_the_service_is_refused(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two could not be told apart."""
    with pytest.raises(BadSettings):
        create_app(settings_in(tmp_path, root_path=prefix))
    assert "ROOT_PATH: must not begin with /" in capsys.readouterr().err
