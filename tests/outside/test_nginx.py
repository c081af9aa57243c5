"""The configuration of docs/nginx.conf in a real nginx, in front of the real service."""

import http.server
import os
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from app.settings import Settings
from app.uploads.multipart import largest_form
from tests.api.requests import problem_of
from tests.support.certificates import make_certificate
from tests.support.pages import BROWSER
from tests.support.service import PATIENCE, ROOT, Service, free_port, until, wait_for

CONFIGURATION = (ROOT / "docs" / "nginx.conf").read_text()
KEY = "key-of-ada"
MB = 1_000_000
HEAD = f"POST /process/ HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\n".encode()

# The main configuration around docs/nginx.conf. All its paths lie in the test's directory, so the
# system's own nginx is not touched.
AROUND = """\
daemon off;
pid {directory}/pid;
error_log {directory}/error.log;
{user}
events {{ }}
http {{
    access_log {directory}/access.log;
    client_body_temp_path {directory}/bodies;
    proxy_temp_path {directory}/proxied;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/afterward.conf;
}}
"""


class Nginx:
    """nginx with the recommended configuration, in front of a server at the port `behind`."""

    def __init__(self, program: str, directory: Path, behind: int, **changes: str) -> None:
        self.port = free_port()
        self.directory = directory
        certificate = make_certificate(directory)
        self.trust = ssl.create_default_context(cafile=str(certificate))
        changes = {
            "server 127.0.0.1:8000;": f"server 127.0.0.1:{behind};",
            "listen 443 ssl;": f"listen 127.0.0.1:{self.port} ssl;",
            "/etc/ssl/afterward/fullchain.pem": str(certificate),
            "/etc/ssl/afterward/privkey.pem": str(certificate),
        } | changes
        site = CONFIGURATION
        for old, new in changes.items():
            assert old in site
            site = site.replace(old, new)
        (directory / "afterward.conf").write_text(site)
        # As root, nginx's workers would run as another user, and could not read the directory.
        user = "user root;" if os.geteuid() == 0 else ""
        around = AROUND.format(directory=directory, user=user)
        (directory / "nginx.conf").write_text(around)
        self.command = [program, "-e", "stderr", "-c", str(directory / "nginx.conf")]

    def complaints(self) -> str:
        """Return the output of `nginx -t`, which must accept the configuration."""
        tested = subprocess.run([*self.command, "-t"], capture_output=True, check=True, text=True)
        return tested.stderr

    @contextmanager
    def running(self) -> Iterator["Nginx"]:
        """Run nginx during the `with` block."""
        process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        try:
            until(self._listens, within=PATIENCE)
            yield self
        finally:
            process.terminate()
            process.wait(PATIENCE)

    def client(self) -> httpx2.Client:
        """Return a client that trusts nginx's certificate."""
        url = f"https://127.0.0.1:{self.port}"
        return httpx2.Client(base_url=url, verify=self.trust, timeout=PATIENCE)

    def _listens(self) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("service")
    settings = {"api_keys": f"ada: {KEY}", "max_upload_bytes": 3 * MB}
    with Service(directory, **settings) as service:  # type: ignore[arg-type]
        yield service


@pytest.fixture(scope="module")
def proxy(
    nginx: str, service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Nginx]:
    with Nginx(nginx, tmp_path_factory.mktemp("nginx"), service.port).running() as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Nginx) -> Iterator[httpx2.Client]:
    """A client that sends an API key, through nginx.

    Each test has its own, because nginx may close a connection after it refused a body.
    """
    with proxy.client() as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        yield client


def test_nginx_accepts_the_configuration_without_a_warning(nginx: str, tmp_path: Path) -> None:
    found = Nginx(nginx, tmp_path, 8000).complaints()
    assert "test is successful" in found
    assert "[" not in found.replace("[notice]", "")


def test_its_limits_equal_those_of_the_service() -> None:
    settings = Settings(_env_file=None)
    whole, upload = re.findall(r"client_max_body_size (\d+);", CONFIGURATION)
    timeouts = re.findall(r"client_\w+_timeout (\d+)s;", CONFIGURATION)
    assert int(whole) == settings.max_body_bytes
    assert int(upload) == largest_form(settings.max_upload_bytes)
    assert [int(seconds) for seconds in timeouts] == [settings.client_timeout_seconds] * 2


def test_a_mail_is_sent_through_nginx(client: httpx2.Client, service: Service) -> None:
    queued = client.post("/send-notification/ada@example.com", json={"subject": "Through nginx"})
    assert queued.status_code == 202
    assert client.get(queued.headers["location"]).is_success
    wait_for(client, queued.json()["id"])
    assert [mail.subject for mail in service.mails] == ["Through nginx"]


def test_a_file_of_two_megabytes_is_uploaded_and_downloaded(client: httpx2.Client) -> None:
    content = os.urandom(2 * MB)
    queued = client.post("/upload", files={"file": ("noise.bin", content)})
    assert queued.status_code == 202
    wait_for(client, queued.json()["id"])
    assert client.get(f"/uploads/{queued.json()['upload']['id']}/content").content == content


def test_the_service_works_under_a_prefix(nginx: str, tmp_path: Path) -> None:
    """The configuration has the prefix in both of its locations, as docs/security.md says."""
    uploads = "(upload/?|board/uploads)$ {"
    prefixed = {
        "location / {": "location /afterward/ {",
        f"location ~ ^/{uploads}": f"location ~ ^/afterward/{uploads}",
    }
    (tmp_path / "nginx").mkdir()
    with (
        Service(tmp_path / "service", root_path="/afterward") as service,
        Nginx(nginx, tmp_path / "nginx", service.port, **prefixed).running() as proxy,
        proxy.client() as client,
    ):
        files = {"file": ("noise.bin", os.urandom(2 * MB))}
        queued = client.post("/afterward/upload", files=files)
        assert queued.status_code == 202
        assert client.get(queued.headers["location"]).json()["id"] == queued.json()["id"]
        sent = client.post("/afterward/send-notification/a%2Fb@example.com")
        assert sent.status_code == 202
        wait_for(service.client, sent.json()["id"])
        inbox = client.get("/afterward/inbox", headers=BROWSER).text
        (mail,) = set(re.findall('href="([^"]*/inbox/[^"?]+)"', inbox))
        assert client.get(mail, headers=BROWSER).is_success
        assert client.get("/tasks").status_code == 404


def test_events_are_not_buffered(client: httpx2.Client) -> None:
    with client.stream("GET", "/events") as events:
        queued = client.post("/send-notification/ada@example.com").json()
        data = next(line for line in events.iter_lines() if line.startswith("data:"))
    assert queued["id"] in data


def test_a_body_that_is_too_large_is_refused(client: httpx2.Client) -> None:
    refused_here = client.post("/process/", json={"x": "x" * (1 << 20)})
    refused_behind = client.post("/upload", files={"file": ("noise.bin", bytes(4 * MB))})
    for refused in (refused_here, refused_behind):
        assert refused.status_code == 413
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.json()["title"] == "Content Too Large"
    assert "instance" not in refused_here.json()
    problem_of(refused_behind, 413)


def test_a_client_without_a_valid_key_is_refused(client: httpx2.Client) -> None:
    for header in ("", "Bearer wrong", "Basic YWRhOg=="):
        refused = client.get("/tasks", headers={"Authorization": header})
        problem_of(refused, 401)
        assert refused.headers["www-authenticate"].startswith("Bearer")


def test_a_form_of_an_old_browser_is_accepted_at_any_port(proxy: Nginx) -> None:
    """The browser sends no Sec-Fetch-Site, so its Origin must be the Host, with the port."""
    with proxy.client() as browser:
        own = {"Accept": "text/html", "Origin": str(browser.base_url).rstrip("/")}
        signed_in = browser.post("/board/sign-in", data={"key": KEY}, headers=own)
        assert (signed_in.status_code, signed_in.headers["location"]) == (303, "/")
        assert "; Secure" in signed_in.headers["set-cookie"]
        assert browser.post("/board/sign-out", headers=own).status_code == 303
        foreign = {"Origin": "https://127.0.0.1:1"}
        assert browser.post("/board/sign-in", headers=own | foreign).status_code == 403


def test_nginx_passes_the_host_on_and_replaces_the_clients_forwarded_headers(
    nginx: str, tmp_path: Path
) -> None:
    heard: list[tuple[str, str]] = []

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.extend((name.lower(), value) for name, value in self.headers.items())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test output quiet."""

    claims = {
        "Host": "mail.example.com",
        "X-Forwarded-For": "10.0.0.1",
        "X-Forwarded-Proto": "http",
        "Forwarded": "for=10.0.0.1",
    }
    with http.server.HTTPServer(("127.0.0.1", 0), Listener) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with (
            Nginx(nginx, tmp_path, server.server_port).running() as proxy,
            proxy.client() as client,
        ):
            assert client.get("/tasks", headers=claims).status_code == 204
        server.shutdown()
        thread.join()
    told = {name: value for name, value in heard if "forwarded" in name or name == "host"}
    assert told == {
        "host": "mail.example.com",
        "x-forwarded-for": "127.0.0.1",
        "x-forwarded-proto": "https",
    }


def test_nginx_answers_503_while_the_service_is_down(nginx: str, tmp_path: Path) -> None:
    with Nginx(nginx, tmp_path, free_port()).running() as proxy, proxy.client() as client:
        answer = client.get("/tasks")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("sent", [HEAD, HEAD + b"Content-Length: 9\r\n\r\n{"], ids=["head", "body"])
def test_a_slow_client_is_disconnected_by_nginx(
    nginx: str, service: Service, tmp_path: Path, sent: bytes
) -> None:
    """The limit is a second in nginx, and ten in the service behind it."""
    soon = {"header_timeout 10s": "header_timeout 1s", "body_timeout 10s": "body_timeout 1s"}
    proxy = Nginx(nginx, tmp_path, service.port, **soon)
    with (
        proxy.running(),
        socket.create_connection(("127.0.0.1", proxy.port), timeout=7) as connection,
        proxy.trust.wrap_socket(connection, server_hostname="127.0.0.1") as slow_client,
    ):
        slow_client.sendall(sent)
        while slow_client.recv(4096):  # nginx may send an error first
            pass
