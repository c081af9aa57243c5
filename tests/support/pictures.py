"""Valid and hostile pictures."""

import struct
import zlib
from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageCms


def picture(width: int = 600, height: int = 300) -> bytes:
    """Return a valid PNG of noise, which compresses badly."""
    png = BytesIO()
    Image.effect_noise((width, height), 50).save(png, "PNG")
    return png.getvalue()


def png(
    width: int,
    height: int,
    *,
    pixels: bytes = b"",
    depth: int = 8,
    colour: int = 2,
    chunks: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Return a PNG with this size in its header, whether or not the pixels match it.

    By default it is RGB (colour type 2) with 8 bits for each channel.
    """
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in every)


def black_and_white(width: int, height: int) -> bytes:
    """Return a valid PNG of one bit per pixel, about a thousandth of its size in memory."""
    rows = bytes(height * (1 + (width + 7) // 8))
    return png(width, height, pixels=rows, depth=1, colour=0)


def compressed_text(size: int) -> bytes:
    """Return a small PNG with a compressed comment (zTXt) that expands to `size` bytes."""
    small = png(9, 9, pixels=bytes(9 * (1 + 9 * 3)))
    head = len(b"\x89PNG\r\n\x1a\n") + len(_chunk(b"IHDR", bytes(13)))
    remark = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size)))
    return small[:head] + remark + small[head:]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


# Minimal ICC profiles (ICC.1:2001-04) with colours different from sRGB's.


def swapped_profile() -> bytes:
    """Return an sRGB profile with red and green swapped."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return srgb.replace(b"rXYZ", b"****", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"****", b"gXYZ")


def linear_grey_profile() -> bytes:
    """Return a grey profile with values proportional to the light."""
    return _profile(b"GRAY", b"XYZ ", b"mntr", kTRC=b"curv" + bytes(8))


def black_ink_profile() -> bytes:
    """Return a CMYK profile in which every ink is black."""
    linear = bytes(range(256))
    white, black = bytes((255, 128, 128)), bytes((0, 128, 128))
    identity = b"".join(_fixed(float(number % 4 == 0)) for number in range(9))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + linear * 4
    return _profile(b"CMYK", b"Lab ", b"prtr", A2B0=table + white + black * 15 + linear * 3)


def _profile(space: bytes, connection: bytes, kind: bytes, **tags: bytes) -> bytes:
    white = b"".join(map(_fixed, (0.9642, 1.0, 0.8249)))
    entries, data = b"", b""
    every = {"wtpt": b"XYZ " + bytes(4) + white, **tags}
    for name, value in every.items():
        start = 128 + 4 + 12 * len(every) + len(data)
        entries += name.encode() + struct.pack(">II", start, len(value))
        data += value + bytes(-len(value) % 4)
    table = struct.pack(">I", len(every)) + entries + data
    date = struct.pack(">6H", 2025, 1, 1, 0, 0, 0)
    size = struct.pack(">I", 128 + len(table))
    head = size + b"none\x02\x40\0\0" + kind + space + connection + date + b"acsp" + bytes(28)
    return (head + white).ljust(128, b"\0") + table


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))
