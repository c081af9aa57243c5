"""Bodies just below, at and over their limits, with lengths that are told, untold, or lies.

Up to the limit they are taken; above it they are refused with 413, broken ones with 400, whatever
Content-Length says. Memory grows by 32 MB at most, and nothing is kept of what was refused or of a
client that went away: no file, no task, no error in the log.
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

LIMIT = form(32, 1_024) * MB  # of an upload
BODY_LIMIT = 1 << 20  # of anything else
MEGABYTES = 32
JSON = b"application/json"

FILE = form_of(file_part())
TOO_SMALL = [0, 1, len(FILE) // 2, len(FILE) - 3]
TOO_LARGE = [LIMIT + MB, 10**18, 10**19, 2**64 - 1]
CUTS = range(0, len(FILE) - 2, form(5, 1))  # the line end after the end does not matter


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One of its own, whose memory is to be read."""
    with attacked(tmp_path_factory.mktemp("sizes"), max_upload_bytes=LIMIT) as target:
        yield target


def form_of_size(size: int) -> bytes:
    return form_of(file_part(content=bytes(size)))


def assert_refused(said: Said, *statuses: int) -> None:
    """The first answer is such a problem; what follows in the connection was no request."""
    assert said.closed
    assert said.responses
    assert said.responses[0].status in statuses
    for response in said.responses:
        assert 400 <= response.status < 500
        assert response.headers["content-type"] == "application/problem+json"
        assert len(response.body) <= LARGEST_PROBLEM


@pytest.mark.parametrize("chunked", [False, True], ids=["a length", "chunks"])
def test_an_upload_has_a_limit_and_takes_no_memory(
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
        f"2 taken, 3 refused with 413; memory + {server.grown:.0f} MB",
    )
    assert server.grown <= MEGABYTES


def json_of_size(size: int) -> bytes:
    around = b'{"%b": ""}' % MARK.encode()
    return around.replace(b'""', b'"%b"' % (b"x" * (size - len(around))))


@pytest.mark.usefixtures("unmoved")
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
def test_any_other_body_is_taken_up_to_it(target: Target, size: int, *, chunked: bool) -> None:
    request = posted("/process/", json_of_size(size), JSON, chunked=chunked)
    assert say(target.service.port, request).statuses == [202]


# Lies, and what breaks off


@pytest.mark.usefixtures("unmoved")
def test_a_form_that_is_cut_short_is_malformed(target: Target) -> None:
    for cut in CUTS:
        target.refused(target.upload(FILE[:cut]), 400)


@pytest.mark.usefixtures("unmoved")
def test_a_length_that_is_too_small_cuts_the_form_short(target: Target) -> None:
    """What it leaves over is no request."""
    for length in TOO_SMALL:
        assert_refused(say(target.service.port, posted("/upload", FILE, length=length)), 400)


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("path", ["/upload", "/process/"])
def test_a_length_that_is_far_too_large_is_believed_at_once(target: Target, path: str) -> None:
    """Nobody waits for such a body."""
    for length in TOO_LARGE:
        began = time.monotonic()
        assert_refused(say(target.service.port, posted(path, FILE, length=length)), 413, 400)
        assert time.monotonic() - began < 4  # less than the time that a slow client has


def test_a_length_may_begin_with_more_zeros_than_python_reads(target: Target) -> None:
    request = posted("/upload", FILE)
    length = b"Content-Length: "
    padded = request.replace(length, length + b"0" * 5_000, 1)
    said = say(target.service.port, padded)
    assert said.statuses in ([202], [400])


@pytest.mark.usefixtures("unmoved")
@pytest.mark.parametrize("gently", [False, True], ids=["reset", "half-closed"])
@pytest.mark.parametrize("chunked", [False, True], ids=["a length", "chunks"])
@pytest.mark.parametrize("size", [1_000, 5 * MB])
def test_a_client_that_goes_away_leaves_nothing_and_is_no_error(
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


def test_how_many_were_tried(tried: Tried) -> None:
    lies = len(TOO_SMALL) + 2 * len(TOO_LARGE)
    what = f"{len(CUTS)} forms cut short, {lies} lies, 8 clients that went away"
    tried(what, "0 files, 0 tasks, 0 errors")


# The negative control


def test_control_a_file_that_is_read_whole_takes_as_much_memory(
    tmp_path: Path, tried: Tried
) -> None:
    """`await file.read()`, as tutorials do; and there is no limit."""
    with Service(tmp_path, command=NAIVE) as naive:
        server = Peak(naive.pid)
        said = say(naive.port, posted("/upload", form_of_size(2 * LIMIT)), patience=60)
        grown = server.grown
    assert said.statuses == [202]
    tried(f"plain FastAPI, {2 * LIMIT / MB:,.0f} MB", f"202; memory + {grown:,.0f} MB")
    assert grown > MEGABYTES
