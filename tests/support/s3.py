"""An S3 server (moto) as a separate process, and a proxy that injects faults."""

import re
import subprocess
import sys
import threading
import time
import uuid
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import httpx2
import pytest

from tests.support.service import PATIENCE, free_port

SECRET = "do-not-repeat-me"
_SIGNATURE = (
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
)


class S3Server:
    """Listens on loopback, and keeps its objects in memory.

    It requires a signature but accepts any, so a test can inspect the buckets with plain requests.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._client = httpx2.Client(
            base_url=self.url, headers={"Authorization": _SIGNATURE}, timeout=PATIENCE
        )

    def __enter__(self) -> Self:  # noqa: D105
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail("There is no S3 server.")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:  # noqa: D105
        self.stop()

    def stop(self) -> None:
        """Kill the server. All its objects are lost."""
        self._process.kill()
        self._process.wait(PATIENCE)
        self._client.close()

    def _answers(self) -> bool:
        try:
            return self._client.get("/").is_success
        except httpx2.TransportError:
            return False

    def new_bucket(self) -> "Bucket":
        """Create an empty bucket."""
        name = f"bucket-{uuid.uuid4()}"
        self._client.put(f"/{name}").raise_for_status()
        return Bucket(self._client, name)


class Bucket:
    """The contents of a bucket, as S3 itself lists them."""

    def __init__(self, client: httpx2.Client, name: str) -> None:
        self._client = client
        self.name = name

    @property
    def keys(self) -> list[str]:
        """The keys of its objects."""
        return self._listed("list-type=2", "Key")

    @property
    def unfinished(self) -> list[str]:
        """The keys of unfinished multipart uploads."""
        return self._listed("uploads", "Key")

    def _listed(self, query: str, tag: str) -> list[str]:
        answer = self._client.get(f"/{self.name}?{query}").raise_for_status().text
        return re.findall(f"<{tag}>(.*?)</{tag}>", answer)

    def put(self, key: str, content: bytes) -> None:
        """Store an object directly, without the service."""
        self._client.put(f"/{self.name}/{key}", content=content).raise_for_status()

    def get(self, key: str) -> httpx2.Response:
        """Fetch an object with its headers."""
        return self._client.get(f"/{self.name}/{key}").raise_for_status()


def credentials(endpoint: str) -> dict[str, str]:
    """Return environment variables that direct the S3 client to `endpoint` alone."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


@dataclass
class Fault:
    """A fault for requests that match `pattern`, for example "PUT .*partNumber=2".

    With a `status`, the proxy answers with it, and the request does not reach S3. Without a status,
    S3 carries the request out, and the proxy drops the answer. With `held`, the proxy delays the
    request until `go_on` is set, then passes it and its answer on. `begun` is set when a request
    matches.
    """

    pattern: str
    status: int | None = None
    code: str = "InternalError"
    held: bool = False
    begun: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)


class FaultyS3(ThreadingHTTPServer):
    """A proxy between the service and an S3 server. It applies `faults`, and logs `requests`."""

    daemon_threads = False

    def __init__(self, behind: S3Server) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.behind = behind.port
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.faults: list[Fault] = []
        self.requests: list[str] = []

    def __enter__(self) -> Self:  # noqa: D105
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:  # noqa: D105
        for fault in self.faults:
            fault.go_on.set()
        self.shutdown()
        self.server_close()
        self._thread.join()


class _Exchange(BaseHTTPRequestHandler):
    """Forwards the requests of one connection, and applies the faults."""

    server: FaultyS3

    def _forward(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # the client closed the connection early
            return
        line = f"{self.command} {self.path}"
        self.server.requests.append(line)
        fault = next((fault for fault in self.server.faults if re.match(fault.pattern, line)), None)
        if fault:
            fault.begun.set()
        if fault and fault.status:
            self._answer(fault.status, {}, f"<Error><Code>{fault.code}</Code></Error>".encode())
            return
        if fault and fault.held:
            fault.go_on.wait(PATIENCE)
        with closing(HTTPConnection("127.0.0.1", self.server.behind)) as behind:
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            content = answer.read()
        if not fault or fault.held:
            self._answer(answer.status, dict(answer.headers), content)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = _forward  # noqa: N815

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # the client may have closed the connection
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Keep the test output quiet."""
