"""The methods HEAD and OPTIONS, which every path has in addition to its own methods."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from smtplib import SMTP
from threading import Thread

import httpx2
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.api.requests import problem_of
from tests.support.gate import bearing
from tests.support.pictures import picture
from tests.support.service import PATIENCE, Service, free_port, settings_in, until
from tests.support.wire import say

KEY = "key-of-ada"
ROUTES = [
    route for route in create_app(Settings(_env_file=None)).routes if isinstance(route, APIRoute)
]
READ = sorted({route.path for route in ROUTES if "GET" in (route.methods or ())})
# Headers that differ between two answers, or that say how the body is sent (RFC 9110, 9.3.2).
MOVING = {"x-request-id", "date", "transfer-encoding"}
PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")  # in a path, such as {email:recipient}

# The pages that need a query.
QUERIES = dict.fromkeys(("/board/tasks/retry", "/board/tasks/cancel"), "?kind=save_data")

PICTURE = picture(20, 10)


@dataclass(frozen=True)
class Published:
    """A service with an example of each thing that a path can have: a task, an upload, a mail."""

    service: Service
    places: dict[str, str]

    def address(self, path: str) -> str:
        """Return the path of a route, with the ids of existing things in it."""
        for name in PARAMETER.findall(path):
            assert name in self.places, f"add an example of {{{name}}} to the fixture `published`"
        address = PARAMETER.sub(lambda parameter: self.places[parameter[1]], path)
        return address + QUERIES.get(path, "")


def catch_a_mail_with_an_attachment(service: Service, port: int) -> str:
    """Send a mail with HTML and an attachment to the catcher, and return its id."""
    mail = EmailMessage()
    mail["Message-ID"] = "<7f3a@example.com>"
    mail.set_content("<p>Hello</p>", subtype="html")
    mail.add_attachment(PICTURE, "image", "png")
    with SMTP("127.0.0.1", port) as smtp:
        smtp.send_message(mail, "eve@example.com", ["ada@example.com"])
    return service.mails[0].id


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    port = free_port()
    with Service(tmp_path_factory.mktemp("published"), smtp_port=port) as service:
        batch = service.post("/send-notifications", json={"recipients": ["ada@example.com"]}).json()
        upload = service.post("/upload", files={"file": ("a.png", PICTURE, "image/png")}).json()
        saved = service.post("/save-data/?user_id=ada", json={"colour": "green"}).json()
        for task in (batch["tasks"][0], upload, saved):
            service.wait_for(task["id"])
        thumbnail = f"/uploads/{upload['upload']['id']}/thumbnail"
        until(lambda: service.get(thumbnail).is_success, within=PATIENCE)
        mail_id = catch_a_mail_with_an_attachment(service, port)
        places = {
            "task_id": upload["id"],
            "upload_id": upload["upload"]["id"],
            "batch_id": batch["id"],
            "user_id": "ada",
            "mail_id": mail_id,
            "number": "0",
            "message_id": "7f3a@example.com",
        }
        yield Published(service, places)


def stable_headers(response: httpx2.Response) -> dict[str, str]:
    """Return the headers of a response, without those that differ each time."""
    moving = set(MOVING)
    if response.headers.get("content-type", "").startswith("text/html"):
        moving.add("content-length")  # "9 s ago" becomes "10 s ago"
    return {name: value for name, value in response.headers.items() if name not in moving}


# Their bodies change or never end, or they are redirects.
SPECIAL = {
    "/metrics",
    "/events",
    "/board",
    "/board/",
    "/board/live",
    "/board/sign-in",
}


@pytest.mark.parametrize("path", [path for path in READ if path not in SPECIAL])
@pytest.mark.thorough
def test_head_has_the_status_and_the_headers_of_get(published: Published, path: str) -> None:
    client, address = published.service.client, published.address(path)
    got, head = client.get(address), client.head(address)
    assert got.status_code == head.status_code
    assert got.status_code in {200, 303}
    assert head.content == b""
    assert stable_headers(head) == stable_headers(got)
    # The connection is still usable: the next response belongs to the next request.
    assert client.get("/livez").text == "ok\n"


def test_head_of_the_metrics_has_their_media_type(published: Published) -> None:
    head = published.service.client.head("/metrics")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert int(head.headers["content-length"]) > 0


@pytest.mark.parametrize("path", ["/events", "/tasks/{task_id}/events", "/board/live"])
def test_head_of_an_event_stream_ends_at_once(published: Published, path: str) -> None:
    """A GET of the stream would go on until the service stops, because there are no events."""
    head = published.service.client.head(published.address(path))
    assert head.status_code == 200
    assert head.headers["content-type"].startswith("text/event-stream")
    assert head.content == b""


def test_head_of_an_event_stream_leaves_no_reader(client: TestClient) -> None:
    asking = Thread(target=client.head, args=["/events"])
    asking.start()
    asking.join(PATIENCE)
    assert not asking.is_alive()
    assert not client.app_state["event_stream"]._readers


def test_head_of_a_download_has_its_length_and_its_range(
    published: Published,
) -> None:
    client, address = published.service.client, published.address("/uploads/{upload_id}/content")
    whole, part = client.head(address), client.head(address, headers={"Range": "bytes=1-3"})
    assert (whole.status_code, whole.headers["content-length"]) == (200, str(len(PICTURE)))
    assert (part.status_code, part.headers["content-length"]) == (206, "3")
    assert part.headers["content-range"] == f"bytes 1-3/{len(PICTURE)}"
    etag = {"If-None-Match": whole.headers["etag"]}
    assert client.head(address, headers=etag).status_code == 304


def test_no_byte_of_a_body_follows_a_head_response(published: Published) -> None:
    """This holds for the responses of errors too."""
    for path in ("/livez", "/nowhere", "/tasks/none"):
        request = f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = say(published.service.port, request.encode())
        assert answer.raw.startswith(b"HTTP/1.1 ")
        assert answer.raw.partition(b"\r\n\r\n")[2] == b""


@pytest.mark.parametrize(
    ("path", "status"), [("/nowhere", 404), ("/tasks/none", 404), ("/send-email/", 405)]
)
def test_head_is_refused_in_the_same_way_as_get(client: TestClient, path: str, status: int) -> None:
    got, head = client.get(path), client.head(path)
    problem_of(got, status)
    assert (head.status_code, head.content) == (status, b"")
    assert stable_headers(head) == stable_headers(got)


PATHS = {route.path for route in ROUTES}


@pytest.mark.parametrize("path", sorted(PATHS))
@pytest.mark.thorough
def test_options_names_the_allowed_methods_of_a_path(client: TestClient, path: str) -> None:
    address = PARAMETER.sub("ada@example.com", path)
    response = client.options(address)
    assert (response.status_code, response.content) == (204, b"")
    assert "content-type" not in response.headers
    allowed = set(response.headers["allow"].split(", "))
    assert "OPTIONS" in allowed
    assert ("HEAD" in allowed) == ("GET" in allowed)
    for method in ("GET", "POST", "DELETE", "PUT"):
        if method not in allowed:
            refused = client.request(method, address, headers={"Sec-Fetch-Site": "same-origin"})
            problem_of(refused, 405)
            assert refused.headers["allow"] == response.headers["allow"]
    for route in ROUTES:
        assert route.path != path or allowed.issuperset(route.methods or ())


@pytest.mark.parametrize("route", [route for route in ROUTES if route.status_code == 204])
def test_a_route_without_content_has_no_content_type(route: APIRoute) -> None:
    """The default, JSONResponse, would have one."""
    assert getattr(route.response_class, "media_type", "not set") is None


def test_options_of_an_unknown_path_is_not_found(client: TestClient) -> None:
    problem_of(client.options("/nowhere"), 404)


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
def test_head_and_options_need_a_key_and_count_against_the_rate_limit(
    tmp_path: Path, method: str
) -> None:
    settings = settings_in(
        tmp_path, api_keys=f"ada: {KEY}", rate_limit="2/hour", worker_concurrency=0
    )
    with TestClient(create_app(settings)) as client:
        answers = [client.request(method, "/tasks")]
        answers += [client.request(method, "/tasks", headers=bearing(KEY)) for _ in range(3)]
    well = 200 if method == "HEAD" else 204
    assert [answer.status_code for answer in answers] == [401, well, well, 429]
    assert int(answers[-1].headers["retry-after"]) > 0


def test_the_openapi_document_names_neither_head_nor_options(client: TestClient) -> None:
    """They are the same for every path, and would only double the document's length."""
    paths = client.get("/openapi.json").json()["paths"]
    methods = {method for operations in paths.values() for method in operations}
    assert methods >= {"get", "post"}
    assert methods.isdisjoint({"head", "options"})
