"""Pictures, sound ones and hostile ones."""

import struct
import zlib
from io import BytesIO

from PIL import Image


def picture(width: int = 600, height: int = 300) -> bytes:
    """A sound one, that does not compress well."""
    png = BytesIO()
    Image.effect_noise((width, height), 50).save(png, "PNG")
    return png.getvalue()


def png(width: int, height: int, *, pixels: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """One that claims to be of this size, whatever its pixels are; in RGB of 8 bits at first."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def black_and_white(width: int, height: int) -> bytes:
    """A sound one of one bit for each pixel: a thousandth of what it is in memory."""
    rows = bytes(height * (1 + (width + 7) // 8))
    return png(width, height, pixels=rows, depth=1, colour=0)


def compressed_text(size: int) -> bytes:
    """A small one with a remark of so many bytes, compressed."""
    small = png(9, 9, pixels=bytes(9 * (1 + 9 * 3)))
    head = len(b"\x89PNG\r\n\x1a\n") + len(_chunk(b"IHDR", bytes(13)))
    remark = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size)))
    return small[:head] + remark + small[head:]


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
