"""Thumbnails of valid and hostile pictures, and the separate process that makes them."""

import asyncio
import io
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from app.uploads.pictures import PictureRefused, Pictures, PictureWorkerDied, thumbnail
from tests.support.pictures import (
    black_ink_profile,
    linear_grey_profile,
    png,
    swapped_profile,
)

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
def test_pictures_of_every_colour_mode_get_a_thumbnail(
    source: Path, mode: str, kind: str, result: str
) -> None:
    Image.new(mode, (300, 300)).save(source, kind)
    assert opened(thumbnail(source)).mode == result


# Colours


def shown(source: Path) -> list[tuple[int, ...]]:
    """Return the pixels of the thumbnail's middle row, in RGBA."""
    small = opened(thumbnail(source)).convert("RGBA")
    middle = small.height // 2
    return [small.getpixel((x, middle)) for x in range(small.width)]  # type: ignore[misc]


def nearly(pixel: tuple[int, ...], *colour: int) -> bool:
    return all(abs(a - b) <= 3 for a, b in zip(pixel, colour, strict=True))


def rows(row: bytes, height: int) -> bytes:
    return (b"\0" + row) * height


@pytest.mark.parametrize(
    ("colour", "unit", "opaque"),
    [
        (0, ">H", b""),
        (2, ">HHH", b""),
        (4, ">HH", b"\xff\xff"),
        (6, ">HHHH", b"\xff\xff"),
    ],
    ids=["grey", "RGB", "grey with alpha", "RGBA"],
)
@pytest.mark.parametrize("width", [4, 1024])
def test_sixteen_bits_per_channel_are_reduced_to_eight(
    source: Path, colour: int, unit: str, opaque: bytes, width: int
) -> None:
    count = len(unit) - 1 - bool(opaque)
    levels = [x * 65_535 // (width - 1) for x in range(width)]
    row = b"".join(struct.pack(">H", level) * count + opaque for level in levels)
    source.write_bytes(
        png(width, width // 4, pixels=rows(row, width // 4), depth=16, colour=colour)
    )
    found = shown(source)
    for place in (0, 1, 2, 3):
        red, green, blue, alpha = found[(len(found) - 1) * place // 3]
        assert red == green == blue
        assert abs(red - 85 * place) <= 4
        assert alpha == 255


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_is_read_in_the_depth_of_the_file(source: Path, depth: int) -> None:
    """The tRNS chunk gives the transparent value in the same depth as the pixels."""
    white = 2**depth - 1
    row = bytes(64) + b"\xff" * 64
    width = 8 * len(row) // depth
    transparent = struct.pack(">H", white)
    source.write_bytes(
        png(width, 8, pixels=rows(row, 8), depth=depth, colour=0, chunks=[(b"tRNS", transparent)])
    )
    found = shown(source)
    assert found[0] == (0, 0, 0, 255)
    assert found[-1][3] == 0


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_does_not_bleed_into_its_neighbours(
    source: Path, depth: int
) -> None:
    """Otherwise scaling would leave a magenta rim around the transparent area."""
    high = 2**depth - 1
    unit = ">HHH" if depth == 16 else ">BBB"
    magenta, green = struct.pack(unit, high, 0, high), struct.pack(unit, 0, high // 2 + 1, 0)
    row = magenta * 301 + green * 299
    key = struct.pack(">HHH", high, 0, high)
    source.write_bytes(png(600, 600, pixels=rows(row, 600), depth=depth, chunks=[(b"tRNS", key)]))
    found = shown(source)
    assert found[0][3] == 0
    assert nearly(found[-1], 0, 128, 0, 255)
    assert all(max(red, blue) <= 3 for red, _, blue, alpha in found if alpha)


def test_a_palette_with_transparency_keeps_it(source: Path) -> None:
    picture = Image.new("P", (600, 300), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(0, (300, 0, 600, 300))
    for kind in ("GIF", "PNG"):
        picture.save(source, kind, transparency=0)
        found = shown(source)
        assert found[0] == (0, 0, 255, 255)
        assert found[-1][3] == 0


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("RGB", "JPEG"),
        ("RGB", "WEBP"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("L", "JPEG"),
    ],
)
def test_colours_are_converted_from_the_profile_to_srgb(source: Path, mode: str, kind: str) -> None:
    red = Image.new("RGB", (300, 200), (255, 0, 0))
    colour = (54, 54, 54) if mode == "L" else (0, 255, 0)
    made = red.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else red.convert(mode)
    if mode == "L":
        made = Image.new("L", (300, 200), 54)
    made.save(source, kind, icc_profile=swapped_profile(), **lossless(kind))
    small = opened(thumbnail(source))
    assert nearly(shown(source)[0], *colour, 255)
    assert "icc_profile" not in small.info


def lossless(kind: str) -> dict[str, Any]:
    return {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_is_converted_from_its_profile(source: Path, mode: str) -> None:
    Image.new("LA", (300, 200), (128, 77)).convert(mode).save(
        source, "PNG", icc_profile=linear_grey_profile()
    )
    assert nearly(shown(source)[0], 188, 188, 188, 77 if mode == "LA" else 255)


def test_grey_of_sixteen_bits_with_alpha_is_converted_from_its_profile(source: Path) -> None:
    profile = (b"iCCP", b"x\0\0" + zlib.compress(linear_grey_profile()))
    pixels = rows(struct.pack(">HH", 128 * 257, 77 * 257) * 9, 9)
    source.write_bytes(png(9, 9, pixels=pixels, depth=16, colour=4, chunks=[profile]))
    assert nearly(shown(source)[0], 188, 188, 188, 77)


def test_cmyk_is_converted_from_its_profile(source: Path) -> None:
    cyan = Image.new("CMYK", (300, 200), (255, 0, 0, 0))
    cyan.save(source, "JPEG")
    assert nearly(shown(source)[0], 0, 255, 255, 255)
    cyan.save(source, "JPEG", icc_profile=black_ink_profile())
    assert nearly(shown(source)[0], 0, 0, 0, 255)


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"nothing",
        swapped_profile()[:300],
        swapped_profile()[:128] + bytes(500),
        linear_grey_profile(),
        black_ink_profile(),
        swapped_profile().replace(b"RGB ", b"Lab ", 1),
        swapped_profile().replace(b"mntr", b"link", 1),
    ],
    ids=["empty", "no", "cut", "zeros", "grey", "CMYK", "Lab", "link"],
)
def test_an_invalid_or_unsuitable_profile_is_ignored(source: Path, profile: bytes) -> None:
    chunks = [(b"iCCP", b"x\0\0" + zlib.compress(profile))]
    pixels = rows(bytes((255, 0, 0)) * 9, 9)
    source.write_bytes(png(9, 9, pixels=pixels, chunks=chunks))
    assert nearly(shown(source)[0], 255, 0, 0, 255)


@pytest.mark.parametrize(
    ("chunks", "grey"),
    [
        ([(b"gAMA", 100_000)], 186),
        ([(b"gAMA", 45_455)], 128),
        ([(b"gAMA", 0)], 128),
        ([(b"gAMA", 2**31 - 1)], 128),
        ([(b"sRGB", None), (b"gAMA", 100_000)], 128),
    ],
)
def test_a_gamma_chunk_is_applied_unless_srgb_overrides_it(
    source: Path, chunks: list[tuple[bytes, int | None]], grey: int
) -> None:
    data = [(name, b"\0" if value is None else struct.pack(">I", value)) for name, value in chunks]
    source.write_bytes(png(9, 9, pixels=rows(bytes([128]) * 9, 9), colour=0, chunks=data))
    assert nearly(shown(source)[0], grey, grey, grey, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_represented_by_its_first_frame(source: Path, kind: str) -> None:
    frames = [Image.new("RGB", (300, 200), colour) for colour in ("red", "blue")]
    frames[0].save(source, kind, save_all=True, append_images=frames[1:], **lossless(kind))
    assert nearly(shown(source)[0], 255, 0, 0, 255)


# Shapes


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize(
    ("size", "small"), [((1, 1), (1, 1)), ((10_000, 1), (256, 1)), ((1, 10_000), (1, 256))]
)
def test_a_picture_may_be_a_single_pixel_wide_or_high(
    source: Path, kind: str, size: tuple[int, int], small: tuple[int, int]
) -> None:
    Image.new("RGB", size, "red").save(source, kind)
    made = opened(thumbnail(source))
    assert made.size == small
    assert nearly(made.convert("RGB").getpixel((0, 0)), 254, 0, 0)  # type: ignore[arg-type]


def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    load = JpegImageFile.load

    def noted(picture: JpegImageFile) -> object:
        decoded.append(picture.size)
        return load(picture)

    Image.new("RGB", (4096, 2048), "red").save(source, "JPEG")
    monkeypatch.setattr(JpegImageFile, "load", noted)
    thumbnail(source)
    assert decoded[0] == (1024, 512)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12", b"Exif\0\0junk"]
)
def test_broken_exif_data_does_not_fail_the_picture(source: Path, exif: bytes) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        Image.new("RGB", (600, 300), "red").save(source, kind, exif=exif)
        assert opened(thumbnail(source)).size == (256, 128)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_by_its_exif_orientation(
    source: Path, orientation: int
) -> None:
    """The upright picture has a red corner at the top left."""
    upright = Image.new("RGB", (400, 200), "blue")
    upright.paste((255, 0, 0), (0, 0, 100, 50))
    exif = Image.Exif()
    exif[0x0112] = orientation
    rotated = {
        1: lambda picture: picture,
        2: lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda picture: picture.transpose(Image.Transpose.ROTATE_180),
        4: lambda picture: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda picture: picture.transpose(Image.Transpose.TRANSPOSE),
        6: lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
        7: lambda picture: picture.transpose(Image.Transpose.TRANSVERSE),
        8: lambda picture: picture.transpose(Image.Transpose.ROTATE_270),
    }[orientation](upright)
    for kind in ("JPEG", "PNG"):
        rotated.save(source, kind, exif=exif, **lossless(kind))
        small = opened(thumbnail(source))
        assert small.size == (256, 128)
        assert nearly(small.getpixel((8, 8)), 255, 0, 0)  # type: ignore[arg-type]


def test_a_small_picture_is_not_enlarged(source: Path) -> None:
    Image.new("RGB", (3, 2)).save(source, "PNG")
    assert opened(thumbnail(source)).size == (3, 2)


def test_a_thumbnail_keeps_no_exif_data(source: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by a quarter turn
    exif[0x010F] = "A camera"
    Image.new("RGB", (600, 300)).save(source, "JPEG", exif=exif)
    small = opened(thumbnail(source))
    assert small.size == (128, 256)
    assert not small.getexif()


@pytest.mark.parametrize("edge", [7_100, 10_000, 100_000])
def test_a_picture_with_too_many_pixels_is_refused_by_its_header(source: Path, edge: int) -> None:
    source.write_bytes(png(edge, edge))
    began = time.process_time()  # processor time, so that other processes do not matter
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
def test_a_file_of_another_format_is_refused(source: Path, content: bytes) -> None:
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


def test_a_missing_file_is_not_reported_as_a_refused_picture(source: Path) -> None:
    with pytest.raises(FileNotFoundError):
        thumbnail(source)


def test_a_refusal_can_be_pickled_for_the_parent_process() -> None:
    assert str(pickle.loads(pickle.dumps(PictureRefused("Why.")))) == "Why."


# The process


async def test_thumbnails_are_made_in_a_single_other_process(
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
    except (FileNotFoundError, ProcessLookupError):  # it ended before or during the read
        return False


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, and fail after five seconds."""
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("It did not happen.")


@pytest.fixture
async def stuck(pictures: Pictures, tmp_path: Path) -> AsyncIterator[asyncio.Task[bytes]]:
    """A thumbnail that never finishes, because its file is a pipe without a writer."""
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
    next_thumbnail = asyncio.create_task(pictures.thumbnail(source))
    os.kill(child_of(pictures), signal.SIGKILL)
    with pytest.raises(PictureWorkerDied, match="Another attempt"):
        await stuck
    assert opened(await next_thumbnail).size == (9, 9)


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


async def test_close_does_not_wait_for_a_thumbnail(
    pictures: Pictures, source: Path, stuck: asyncio.Task[bytes]
) -> None:
    child = child_of(pictures)
    pictures.close()  # returns, although the thumbnail never finishes
    pictures.close()
    with pytest.raises(PictureWorkerDied):
        await stuck
    with pytest.raises(PictureWorkerDied):
        await pictures.thumbnail(source)
    await until(lambda: not alive(child))


async def test_the_process_has_limited_memory_and_ignores_ctrl_c(
    pictures: Pictures, source: Path
) -> None:
    Image.new("RGB", (9, 9)).save(source, "PNG")
    await pictures.thumbnail(source)
    child = child_of(pictures)
    assert resource.prlimit(child, resource.RLIMIT_AS) == (1024**3, 1024**3)
    os.kill(child, signal.SIGINT)
    assert opened(await pictures.thumbnail(source)).size == (9, 9)
    assert child_of(pictures) == child


async def test_the_event_loop_runs_while_a_thumbnail_is_made(
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
from app.uploads.pictures import Pictures

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
@pytest.mark.thorough
async def test_the_process_ends_after_its_parent_was_killed(tmp_path: Path, *, busy: bool) -> None:
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
    # Long enough for the child to start, and then to block on the pipe or wait for work.
    await asyncio.sleep(0.5)
    assert alive(child)
    parent.kill()
    await parent.wait()
    await until(lambda: not alive(child))


@pytest.mark.thorough
def test_importing_the_package_loads_neither_pillow_nor_a_web_framework() -> None:
    program = (
        "import sys, app.uploads.pictures, app.uploads.local, app.uploads.multipart\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'PIL', 'fastapi', 'starlette', 'puremagic'}),"
        " sorted(name for name in sys.modules"
        " if name.startswith('app.') and not name.startswith('app.uploads')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"[] []\n"
