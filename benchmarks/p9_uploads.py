"""P9: the speed of a large upload, against the tutorial's route and against the limit.

The service has the file on disk, under its name and with its SHA-256, before it answers. The
tutorial's route copies Starlette's spooled file, and does not wait for the disk. The limit is a
loop with only the necessary steps: it reads the socket, hashes the bytes, writes them to the file,
and finally syncs it. All three write to the same disk, and receive the same bytes.
"""

import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from fastapi import FastAPI, UploadFile

from benchmarks.harness import Failed, Result, Spread, Target, compared, in_turn
from benchmarks.load import Server, fastapi_app, server
from tests.support.measures import Peak

PIECE = 64 << 20  # bytes; a file repeats this piece
BLOCK = 1 << 20  # bytes that the limit's loop reads at a time
PATIENCE = 60.0  # seconds

UPLOADED = Path("upload.bin")
RECEIVED = "var/uploads/received/*"

HEAD = (
    b"--b0undary\r\n"
    b'Content-Disposition: form-data; name="file"; filename="upload.bin"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n"
)
TAIL = b"\r\n--b0undary--\r\n"


def measure(quick: bool) -> Iterator[Result]:
    """Upload to the service, the tutorial and the limit, in turn."""
    pieces, rounds = (4, 3) if quick else (16, 7)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        piece = directory / "piece"
        piece.write_bytes(os.urandom(PIECE))
        settings = {"WORKER_CONCURRENCY": "0", "TMPDIR": str(directory)}  # where Starlette spools
        ours, tutorial, limit = map(
            stack.enter_context,
            (
                server(directory, "-m", "app", **settings),
                fastapi_app(directory, "benchmarks.p9_uploads:tutorial", **settings),
                server(directory, "-m", "benchmarks.p9_uploads"),
            ),
        )
        peak = Peak(ours.process.pid)
        seconds = in_turn(
            rounds,
            {
                "ours": partial(_upload, ours, piece, pieces),
                "the tutorial": partial(_upload, tutorial, piece, pieces),
                "the limit": partial(_upload, limit, piece, pieces),
            },
        )
        grown = peak.grown
    speeds = {
        who: [pieces * PIECE / 1e6 / each for each in several] for who, several in seconds.items()
    }
    for who, number in (("the tutorial", 2.0), ("the limit", 0.8)):
        yield compared(
            "P9",
            f"an upload of {pieces * PIECE >> 20:,} MiB, against {who}",
            speeds["ours"],
            speeds[who],
            target=Target("≥", number),
            unit="MB/s",
        )
    what = "the most memory that these uploads took, beyond that before the first"
    yield Result("P9", what, Spread.of([grown]), unit="MB", target=Target("≤", 16))


def _upload(to: Server, piece: Path, pieces: int) -> float:
    """Upload a file of `pieces` pieces; return the seconds. Delete the stored file afterwards."""
    began = time.perf_counter()
    with (
        piece.open("rb") as file,
        socket.create_connection(("127.0.0.1", to.port), PATIENCE) as connection,
    ):
        connection.sendall(_request_head(len(HEAD) + pieces * PIECE + len(TAIL)) + HEAD)
        for _ in range(pieces):
            connection.sendfile(file)
        connection.sendall(TAIL)
        answer = connection.recv(65_536)
        seconds = time.perf_counter() - began
    arrived = [*piece.parent.glob(RECEIVED), *piece.parent.glob(str(UPLOADED))]
    sizes = [path.stat().st_size for path in arrived]
    if not answer.startswith(b"HTTP/1.1 20") or sizes != [pieces * PIECE]:
        raise Failed(f"{sizes} bytes arrived, and the answer was: {answer.decode()}")
    arrived[0].unlink()
    return seconds


def _request_head(length: int) -> bytes:
    return (
        b"POST /upload HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: multipart/form-data; boundary=b0undary\r\n"
        b"Content-Length: %d\r\n\r\n" % length
    )


# The tutorial's route

tutorial = FastAPI()


@tutorial.post("/upload")
def upload(file: UploadFile) -> dict[str, str | None]:
    """Copy the spooled file."""
    with UPLOADED.open("wb") as kept:
        shutil.copyfileobj(file.file, kept)
    return {"filename": file.filename}


# The limit


def receive_all(port: int) -> None:
    """Store the file of each connection, one connection at a time."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            connection, _ = listener.accept()
            with connection:
                if head := _read_heads(connection):
                    _receive(connection, head)


def _read_heads(connection: socket.socket) -> bytes:
    """Read the request's head and the part's head; return b"" if the client closes before."""
    heads = b""
    while not heads.endswith(HEAD):
        if not (byte := connection.recv(1)):
            return b""
        heads += byte
    return heads


def _receive(connection: socket.socket, head: bytes) -> None:
    """Store the bytes between the heads and the tail, and answer with their SHA-256."""
    length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
    rest = length - len(HEAD) - len(TAIL)
    block = memoryview(bytearray(BLOCK))
    sha256 = hashlib.sha256()
    with UPLOADED.open("wb", buffering=0) as file:
        while rest:
            size = connection.recv_into(block, min(BLOCK, rest))
            rest -= size
            sha256.update(block[:size])
            file.write(block[:size])
        os.fsync(file.fileno())
    connection.recv(len(TAIL), socket.MSG_WAITALL)
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + sha256.hexdigest().encode())


if __name__ == "__main__":
    receive_all(int(os.environ["PORT"]))
