"""Thumbnails, of sound pictures and of hostile ones, and the process that makes them."""

import asyncio
import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from app.files.pictures import PictureRefused, Pictures, PictureWorkerDied, thumbnail
from tests.support.pictures import png

pytestmark = pytest.mark.anyio


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / "picture"


@pytest.fixture
def pictures() -> Iterator[Pictures]:
    pictures = Pictures()
    yield pictures
    pictures.close()


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png), formats=["PNG"])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_picture_is_scaled_down_in_proportion(source: Path, kind: str) -> None:
    Image.new("RGB", (1024, 512), "red").save(source, kind)
    small = opened(thumbnail(source))
    assert (small.size, small.mode) == ((256, 128), "RGB")
    red, green, blue = small.getpixel((9, 9))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(
    ("mode", "kind", "result"),
    [
        ("1", "PNG", "RGB"),
        ("L", "PNG", "RGB"),
        ("LA", "PNG", "RGBA"),
        ("P", "GIF", "RGB"),
        ("I;16", "PNG", "RGB"),
        ("CMYK", "JPEG", "RGB"),
        ("RGBA", "WEBP", "RGBA"),
    ],
)
def test_every_kind_of_colour_is_shown(source: Path, mode: str, kind: str, result: str) -> None:
    Image.new(mode, (300, 300)).save(source, kind)
    assert opened(thumbnail(source)).mode == result


def test_a_small_picture_is_not_enlarged(source: Path) -> None:
    Image.new("RGB", (3, 2)).save(source, "PNG")
    assert opened(thumbnail(source)).size == (3, 2)


def test_a_photograph_is_turned_upright_and_tells_nothing_else(source: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010F] = "A camera"
    Image.new("RGB", (600, 300)).save(source, "JPEG", exif=exif)
    small = opened(thumbnail(source))
    assert small.size == (128, 256)
    assert not small.getexif()


@pytest.mark.parametrize("edge", [7_100, 10_000, 100_000])
def test_a_flood_of_pixels_is_refused_by_its_header(source: Path, edge: int) -> None:
    source.write_bytes(png(edge, edge))
    began = time.process_time()  # of this process alone, however busy the machine is
    with pytest.raises(PictureRefused, match="too many pixels"):
        thumbnail(source)
    assert time.process_time() - began < 0.5


def zip_bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("bomb", bytes(10_000_000))
    return file.getvalue()


def bitmap() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "BMP")
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!DOCTYPE html><script>alert(1)</script>",
        b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        zip_bomb(),
        bitmap(),
    ],
)
def test_what_is_no_picture_of_ours_is_refused(source: Path, content: bytes) -> None:
    source.write_bytes(content)
    with pytest.raises(PictureRefused, match="not a PNG"):
        thumbnail(source)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_truncated_picture_is_refused(source: Path, kind: str) -> None:
    Image.effect_noise((300, 300), 50).convert("RGB").save(source, kind)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    with pytest.raises(PictureRefused):
        thumbnail(source)


def test_a_picture_that_takes_too_much_memory_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (9, 9)).save(source, "PNG")

    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "thumbnail", exhausted)
    with pytest.raises(PictureRefused, match="too much memory"):
        thumbnail(source)


def test_a_file_that_is_not_there_is_no_fault_of_the_picture(source: Path) -> None:
    with pytest.raises(FileNotFoundError):
        thumbnail(source)


def test_a_refusal_finds_its_way_out_of_the_process() -> None:
    assert str(pickle.loads(pickle.dumps(PictureRefused("Why.")))) == "Why."


# The process.


async def test_thumbnails_are_made_in_another_process_one_at_a_time(
    pictures: Pictures, source: Path
) -> None:
    Image.new("RGB", (1024, 512)).save(source, "PNG")
    broken = source.with_name("broken")
    broken.write_bytes(b"nothing")
    made = await asyncio.gather(
        pictures.thumbnail(source),
        pictures.thumbnail(broken),
        pictures.thumbnail(source),
        return_exceptions=True,
    )
    assert [type(result) for result in made] == [bytes, PictureRefused, bytes]


def child_of(pictures: Pictures) -> int:
    assert pictures._pool is not None
    (child,) = pictures._pool._processes
    return child


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # gone before, or while it is read
        return False


async def until(condition: Callable[[], object]) -> None:
    """Waits for what happens in a moment, and fails after five seconds."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("It did not happen.")


@pytest.fixture
async def stuck(pictures: Pictures, tmp_path: Path) -> AsyncIterator[asyncio.Task[bytes]]:
    """A picture that its process never finishes: a pipe that nobody writes to."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    task = asyncio.create_task(pictures.thumbnail(pipe))
    await until(lambda: pictures._pool and pictures._pool._processes)
    yield task
    task.cancel()
    await asyncio.wait([task])


async def test_a_picture_that_kills_its_process_can_be_tried_again(
    pictures: Pictures, source: Path, stuck: asyncio.Task[bytes]
) -> None:
    Image.new("RGB", (9, 9)).save(source, "PNG")
    next_one = asyncio.create_task(pictures.thumbnail(source))
    os.kill(child_of(pictures), signal.SIGKILL)
    with pytest.raises(PictureWorkerDied, match="Another attempt"):
        await stuck
    assert opened(await next_one).size == (9, 9)


async def test_a_process_that_died_while_idle_is_replaced(pictures: Pictures, source: Path) -> None:
    Image.new("RGB", (9, 9)).save(source, "PNG")
    await pictures.thumbnail(source)
    child = child_of(pictures)
    os.kill(child, signal.SIGKILL)
    await until(lambda: not alive(child))
    with suppress(PictureWorkerDied):
        await pictures.thumbnail(source)
    assert opened(await pictures.thumbnail(source)).size == (9, 9)


async def test_a_picture_that_takes_too_long_is_cancelled_together_with_its_process(
    pictures: Pictures, source: Path, stuck: asyncio.Task[bytes]
) -> None:
    Image.new("RGB", (9, 9)).save(source, "PNG")
    child = child_of(pictures)
    stuck.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stuck
    await until(lambda: not alive(child))
    assert opened(await pictures.thumbnail(source)).size == (9, 9)


async def test_closing_does_not_wait_for_a_picture(
    pictures: Pictures, source: Path, stuck: asyncio.Task[bytes]
) -> None:
    child = child_of(pictures)
    pictures.close()  # returns, though the picture is never finished
    pictures.close()
    with pytest.raises(PictureWorkerDied):
        await stuck
    with pytest.raises(PictureWorkerDied):
        await pictures.thumbnail(source)
    await until(lambda: not alive(child))


async def test_the_process_has_bounded_memory_and_leaves_control_c_to_its_parent(
    pictures: Pictures, source: Path
) -> None:
    Image.new("RGB", (9, 9)).save(source, "PNG")
    await pictures.thumbnail(source)
    child = child_of(pictures)
    assert resource.prlimit(child, resource.RLIMIT_AS) == (1024**3, 1024**3)
    os.kill(child, signal.SIGINT)
    assert opened(await pictures.thumbnail(source)).size == (9, 9)
    assert child_of(pictures) == child


async def test_the_event_loop_goes_on_while_a_picture_is_made(
    pictures: Pictures, source: Path
) -> None:
    Image.new("RGB", (4000, 4000)).save(source, "PNG")
    making = asyncio.create_task(pictures.thumbnail(source))
    ticks = 0
    while not making.done():
        await asyncio.sleep(0.005)
        ticks += 1
    assert opened(await making).size == (256, 256)
    assert ticks > 10


PARENT = """
import asyncio, sys
from pathlib import Path
from app.files.pictures import Pictures

async def main():
    pictures = Pictures()
    making = asyncio.create_task(pictures.thumbnail(Path(sys.argv[1])))
    while not (pictures._pool and pictures._pool._processes):
        await asyncio.sleep(0)
    print(*pictures._pool._processes, flush=True)
    await making
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("busy", [False, True])
async def test_the_process_does_not_outlive_a_parent_that_was_killed(
    tmp_path: Path, *, busy: bool
) -> None:
    picture = tmp_path / "picture"
    if busy:
        os.mkfifo(picture)
    else:
        Image.new("RGB", (9, 9)).save(picture, "PNG")
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(picture), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    # Long enough for it to have begun what it then waits for.
    await asyncio.sleep(0.5)
    assert alive(child)
    parent.kill()
    await parent.wait()
    await until(lambda: not alive(child))


def test_importing_the_package_loads_neither_pillow_nor_a_web_framework() -> None:
    program = (
        "import sys, app.files.pictures, app.files.local, app.files.multipart\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'PIL', 'fastapi', 'starlette', 'puremagic'}),"
        " sorted(name for name in sys.modules"
        " if name.startswith('app.') and not name.startswith('app.files')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"[] []\n"
