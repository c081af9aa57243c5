"""The service behind a proxy under a path prefix, which the proxy strips or leaves."""

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
from tests.support.pages import BROWSER
from tests.support.service import PATIENCE, Service, settings_in, wait_for

PREFIX = "/afterward"
KEY = "key-of-ada"
UVICORN = (sys.executable, "-m", "uvicorn", "app.main:app", "--port", "{port}")
LIMITS: dict[str, Any] = {"max_upload_bytes": 200_000, "max_body_bytes": 2_000}

# How the service learns the prefix, and whether the proxy strips it.
BY_SETTING: dict[str, Any] = {"root_path": PREFIX}
BY_UVICORN: dict[str, Any] = {"command": (*UVICORN, "--root-path", PREFIX)}
WAYS = {
    "ROOT_PATH, stripped": (BY_SETTING, ""),
    "ROOT_PATH, left": (BY_SETTING, PREFIX),
    "uvicorn --root-path, stripped": (BY_UVICORN, ""),
    "uvicorn --root-path, left": (BY_UVICORN, PREFIX),
}


def the_ways() -> Iterator[Any]:
    """Yield each of WAYS as a parameter; `make test` uses the first only."""
    for position, (name, way) in enumerate(WAYS.items()):
        yield pytest.param(way, id=name, marks=pytest.mark.thorough if position else ())


@pytest.fixture(scope="module", params=list(the_ways()))
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx2.Client]:
    """A client in the place of the proxy: it sends the paths that the proxy would pass on."""
    settings, arrives_under = request.param
    directory = tmp_path_factory.mktemp("service")
    with (
        Service(directory, **LIMITS, **settings) as service,
        httpx2.Client(base_url=service.url + arrives_under, timeout=PATIENCE) as client,
    ):
        yield client


def behind(address: str) -> str:
    """Return a public path without the prefix, as `client` needs it."""
    assert address.startswith(PREFIX), address
    return address.removeprefix(PREFIX)


@pytest.mark.parametrize("call", PROMISES, ids=lambda call: call.path)
def test_the_location_has_the_prefix(client: httpx2.Client, call: Call) -> None:
    response = call.send(client)
    assert response.status_code == 202
    location = response.headers["location"]
    assert location == f"{PREFIX}/tasks/{response.json()['id']}"
    assert client.get(behind(location)).json()["id"] == response.json()["id"]


def test_uploads_keep_their_own_size_limit_behind_a_prefix(client: httpx2.Client) -> None:
    files = {"file": ("noise.bin", os.urandom(100_000))}
    for path in ("/upload", "/upload/"):
        assert client.post(path, files=files).status_code == 202
    problem = problem_of(client.post("/process/", json={"x": "x" * 3_000}), 413)
    assert problem["instance"] == f"{PREFIX}/process/"


def test_a_problem_names_the_path_with_the_prefix(client: httpx2.Client) -> None:
    for path, status in (("/nowhere", 404), ("/tasks/none", 404), ("/tasks?limit=0", 422)):
        problem = problem_of(client.get(path), status)
        assert problem["instance"] == PREFIX + path.partition("?")[0]


PAGES = ["/", "/inbox", "/docs", "/redoc"]
ADDRESS = re.compile(r"""(?:href|src|data-document|spec-url)="([^"]*)\"""")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_on_a_page_works(client: httpx2.Client, page: str) -> None:
    wait_for(client, client.post("/send-notification/ada@example.com").json()["id"])
    addresses = ADDRESS.findall(client.get(page, headers=BROWSER).text)
    assert addresses
    for address in set(map(unescape, addresses)) - {"#main"}:
        assert client.head(behind(address)).status_code == 200


def test_every_link_on_the_pages_of_a_mail_works(client: httpx2.Client) -> None:
    wait_for(client, client.post("/send-notification/ada@example.com").json()["id"])
    inbox = client.get("/inbox", headers=BROWSER).text
    mail = re.findall(f'href="({PREFIX}/inbox/[^"]+)"', inbox)[0]
    page = client.get(behind(mail), headers=BROWSER).text
    addresses = set(map(unescape, ADDRESS.findall(page))) - {"#main"}
    assert f"{mail}/html" in addresses
    for address in addresses:
        assert client.get(behind(address), headers=BROWSER).is_success
    message_id = client.get(behind(mail)).json()["headers"]
    (found,) = (value for name, value in message_id if name == "Message-ID")
    assert client.get(f"/inbox/by-message-id/{found}").headers["location"] == mail


def test_the_document_names_the_prefix_as_its_server(client: httpx2.Client) -> None:
    assert client.get("/openapi.json").json()["servers"] == [{"url": PREFIX}]


def test_only_the_public_paths_need_no_key(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, root_path=PREFIX, api_keys=f"ada: {KEY}", worker_concurrency=0)
    with TestClient(create_app(settings)) as client:
        for before in ("", PREFIX):
            for path in ("/livez", "/readyz", "/docs", "/docs/start.js", "/openapi.json"):
                assert client.get(before + path).status_code == 200
            for path in ("/tasks", "/metrics", "/livez/x", "/"):
                problem_of(client.get(before + path), 401)
            assert client.get(before + "/tasks", headers=bearing(KEY)).status_code == 200


def test_a_path_that_only_begins_with_the_characters_of_the_prefix_is_not_found(
    tmp_path: Path,
) -> None:
    settings = settings_in(tmp_path, root_path=PREFIX, worker_concurrency=0)
    with TestClient(create_app(settings)) as client:
        assert client.get(PREFIX).text == client.get("/").text
        problem_of(client.get(f"{PREFIX}livez"), 404)
        problem_of(client.get(f"{PREFIX}{PREFIX}/livez"), 404)


def test_the_location_of_a_replay_has_the_present_prefix(tmp_path: Path) -> None:
    """A request under a new prefix is still the same request."""
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


def test_a_redirect_to_a_different_server_gets_no_prefix(tmp_path: Path) -> None:
    """The service redirects to signed URLs of S3, for example."""
    elsewhere = "https://bucket.example.com/key?signed=1"
    app = create_app(settings_in(tmp_path, root_path=PREFIX, worker_concurrency=0))

    async def redirect(_: Request) -> RedirectResponse:
        return RedirectResponse(elsewhere)

    app.router.routes.append(Route("/elsewhere", redirect))
    with TestClient(app, follow_redirects=False) as client:
        assert client.get("/elsewhere").headers["location"] == elsewhere


@pytest.mark.thorough
@pytest.mark.parametrize("prefix", ["/tasks", "/docs/api", "/upload", "/livez"])
def test_a_prefix_that_is_a_path_of_the_service_is_refused(
    tmp_path: Path, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service could not tell the prefix and its own path apart."""
    with pytest.raises(BadSettings):
        create_app(settings_in(tmp_path, root_path=prefix))
    assert "ROOT_PATH: must not begin with /" in capsys.readouterr().err
