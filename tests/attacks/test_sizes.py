"""Bodies just below, at and above their limits, with right, missing and false lengths.

The service accepts bodies up to the limit, and refuses larger ones with 413 and broken ones with
400, whether Content-Length is right or not. Its memory grows by 32 MB at most. A refused request
and a client that disconnects leave no file, no task, and no error in the log.
"""

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.requests import LARGEST_PROBLEM
from tests.support.forms import file_part, form_of, posted
from tests.support.measures import MB, Peak
from tests.support.service import PATIENCE, Service, files_below, until
from tests.support.target import MARK, NOTIFICATION, Target, attacked
from tests.support.torture import Tried, form
from tests.support.wire import Said, say

NAIVE = (sys.executable, "-m", "tests.support.unbounded_uploads")

LIMIT = form(32, 1_024) * MB  # the limit of an upload
BODY_LIMIT = 1 << 20  # the limit of any other body
MEGABYTES = 32
JSON = b"application/json"

FILE = form_of(file_part())
TOO_SMALL = [0, 1, len(FILE) // 2, len(FILE) - 3]
TOO_LARGE = [LIMIT + MB, 10**18, 10**19, 2**64 - 1]
CUTS = range(0, len(FILE) - 2, form(5, 1))  # the line end after the last boundary is optional


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server for this module only, because the tests measure its memory."""
    with attacked(tmp_path_factory.mktemp("sizes"), max_upload_bytes=LIMIT) as target:
        yield target


def form_of_size(size: int) -> bytes:
    return form_of(file_part(content=bytes(size)))


def assert_refused(said: Said, *statuses: int) -> None:
    """Check that the first response is a problem with such a status, and any further one a 4xx."""
    assert said.closed
    assert said.responses
    assert said.responses[0].status in statuses
    for response in said.responses:
        assert 400 <= response.status < 500
        assert response.headers["content-type"] == "application/problem+json"
        assert len(response.body) <= LARGEST_PROBLEM


@pytest.mark.parametrize("chunked", [False, True], ids=["a length", "chunks"])
def test_an_upload_has_a_size_limit_and_needs_little_memory(
    target: Target, tried: Tried, *, chunked: bool
) -> None:
    server = Peak(target.service.pid)
    port = target.service.port
    for size in (LIMIT - 1, LIMIT):
        said = say(port, posted("/upload", form_of_size(size), chunked=chunked), patience=60)
        assert said.statuses == [202]
    with target.unmoved():
        for size in (LIMIT + 1, LIMIT + MB, 2 * LIMIT):
            said = say(port, posted("/upload", form_of_size(size), chunked=chunked), patience=60)
            assert_refused(said, 413)
    tried(
        f"uploads around {LIMIT / MB:,.0f} MB, {'in chunks' if chunked else 'of a length'}",
        f"2 accepted, 3 refused with 413; memory + {server.grown:.0f} MB",
    )
    assert server.grown <= MEGABYTES


def json_of_size(size: int) -> bytes:
    around = b'{"%b": ""}' % MARK.encode()
    return around.replace(b'""', b'"%b"' % (b"x" * (size - len(around))))


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("path", ["/process/", "/save-data/?user_id=ada", NOTIFICATION])
@pytest.mark.parametrize("chunked", [False, True], ids=["a length", "chunks"])
def test_any_other_body_has_a_smaller_limit(target: Target, path: str, *, chunked: bool) -> None:
    server = Peak(target.service.pid)
    for size in (BODY_LIMIT + 1, 2 * BODY_LIMIT, 32 * BODY_LIMIT):
        request = posted(path, json_of_size(size), JSON, chunked=chunked)
        said = say(target.service.port, request)
        assert_refused(said, 413)
        assert MARK.encode() not in said.raw
    assert server.grown <= MEGABYTES


@pytest.mark.parametrize("size", [BODY_LIMIT - 1, BODY_LIMIT])
@pytest.mark.parametrize("chunked", [False, True], ids=["a length", "chunks"])
def test_any_other_body_is_accepted_up_to_that_limit(
    target: Target, size: int, *, chunked: bool
) -> None:
    request = posted("/process/", json_of_size(size), JSON, chunked=chunked)
    assert say(target.service.port, request).statuses == [202]


# False lengths, and clients that disconnect


@pytest.mark.usefixtures("leaves_no_traces")
def test_a_form_that_is_cut_short_is_refused(target: Target) -> None:
    for cut in CUTS:
        target.refused(target.upload(FILE[:cut]), 400)


@pytest.mark.usefixtures("leaves_no_traces")
def test_a_form_with_a_too_small_content_length_is_refused(target: Target) -> None:
    """The rest of the form is not run as a request."""
    for length in TOO_SMALL:
        assert_refused(say(target.service.port, posted("/upload", FILE, length=length)), 400)


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("path", ["/upload", "/process/"])
def test_a_far_too_large_content_length_is_refused_at_once(target: Target, path: str) -> None:
    """The service does not wait for the body."""
    for length in TOO_LARGE:
        began = time.monotonic()
        assert_refused(say(target.service.port, posted(path, FILE, length=length)), 413, 400)
        assert time.monotonic() - began < 4  # less than the timeout of a slow client


def test_a_content_length_with_5000_leading_zeros_causes_no_error(target: Target) -> None:
    request = posted("/upload", FILE)
    length = b"Content-Length: "
    padded = request.replace(length, length + b"0" * 5_000, 1)
    said = say(target.service.port, padded)
    assert said.statuses in ([202], [400])


@pytest.mark.usefixtures("leaves_no_traces")
@pytest.mark.parametrize("gently", [False, True], ids=["reset", "half-closed"])
@pytest.mark.parametrize("chunked", [False, True], ids=["a length", "chunks"])
@pytest.mark.parametrize("size", [1_000, 5 * MB])
def test_a_client_that_disconnects_leaves_no_file_and_no_error(
    target: Target, size: int, *, chunked: bool, gently: bool
) -> None:
    incoming = target.service.directory / "uploads" / "incoming"
    body = form_of_size(size)
    whole = posted("/upload", body, length=len(body) + MB, chunked=chunked)
    with socket.create_connection(("127.0.0.1", target.service.port)) as connection:
        connection.sendall(whole[:-20])
        until(lambda: files_below(incoming), within=PATIENCE)
        if gently:
            connection.shutdown(socket.SHUT_WR)
            until(lambda: not files_below(incoming), within=PATIENCE)
    until(lambda: not files_below(incoming), within=PATIENCE)


def test_report_the_number_of_false_lengths(tried: Tried) -> None:
    lies = len(TOO_SMALL) + 2 * len(TOO_LARGE)
    what = f"{len(CUTS)} forms cut short, {lies} lies, 8 clients that went away"
    tried(what, "0 files, 0 tasks, 0 errors")


# The negative control


def test_control_a_route_that_reads_a_whole_file_needs_as_much_memory(
    tmp_path: Path, tried: Tried
) -> None:
    """Tutorials use `await file.read()`, without a limit."""
    with Service(tmp_path, command=NAIVE) as naive:
        server = Peak(naive.pid)
        said = say(naive.port, posted("/upload", form_of_size(2 * LIMIT)), patience=60)
        grown = server.grown
    assert said.statuses == [202]
    tried(f"plain FastAPI, {2 * LIMIT / MB:,.0f} MB", f"202; memory + {grown:,.0f} MB")
    assert grown > MEGABYTES
