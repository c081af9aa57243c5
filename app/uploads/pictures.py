"""Makes thumbnails in a child process, because a hostile picture may crash the decoder."""

import asyncio
import multiprocessing
import os
import resource
import signal
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
MEDIA_TYPES = {f"image/{name.lower()}" for name in FORMATS}
MAX_PIXELS = 50_000_000
EDGE = 256  # pixels, of the longer side of a thumbnail

_WORKER_MEMORY = 1024**3  # bytes of address space


class Pictures:
    """Makes thumbnails in a child process, one at a time.

    Decoding would block the event loop, and hostile pictures attack decoders. So a child process
    with bounded memory does it. It starts with the first picture. If a picture kills it, the next
    picture starts another.
    """

    def __init__(self) -> None:
        # The child works on one picture at a time. So if it dies, no other picture fails with it.
        self._one_at_a_time = asyncio.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False

    async def thumbnail(self, source: Path) -> bytes:
        """Run the function `thumbnail` in the child. A cancellation kills the child at once.

        Raises PictureRefused, which is permanent, or PictureWorkerDied, which is temporary.
        """
        async with self._one_at_a_time:
            if self._closed:
                raise PictureWorkerDied
            if self._pool is None:
                self._pool = _new_pool()
            try:
                return await asyncio.wrap_future(self._pool.submit(thumbnail, source))
            except BrokenProcessPool:
                self._stop()
                raise PictureWorkerDied from None
            except asyncio.CancelledError:
                self._stop()
                raise

    def close(self) -> None:
        """Kill the child. Calls that wait for it raise PictureWorkerDied."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            # Python 3.14 has kill_workers() for this. Before, no public method ends a busy child.
            children = list((pool._processes or {}).values())  # noqa: SLF001
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.kill()


def _new_pool() -> ProcessPoolExecutor:
    # Spawned, because a forked child would inherit locked locks and open sockets.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_prepare_worker)


def _prepare_worker() -> None:
    # Control-C in a terminal reaches the child too. The parent decides when the child ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY, _WORKER_MEMORY))
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """End this process when its parent has ended, even if SIGKILL ended it without a clean-up."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def thumbnail(source: Path) -> bytes:
    """Return a thumbnail as PNG: upright, in sRGB, at most `EDGE` x `EDGE` pixels.

    An animation gives its first frame. Raises PictureRefused for a file that is damaged, is not in
    one of `FORMATS`, or has more than `MAX_PIXELS` pixels; OSError if the file cannot be opened.
    """
    # Imported in the child only. So the service starts sooner, and cannot decode a picture itself.
    from PIL import Image, UnidentifiedImageError

    with source.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as those about broken EXIF data
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(file, formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise PictureRefused("The picture has too many pixels.")
                return _small(picture)
        except PictureRefused:
            raise
        except UnidentifiedImageError:
            raise PictureRefused("The file is not a PNG, JPEG, GIF or WebP picture.") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise PictureRefused("The picture has too many pixels.") from None
        except MemoryError:
            raise PictureRefused("The picture takes too much memory.") from None
        except Exception as error:  # a decoder may raise any error for broken input
            raise PictureRefused("The picture is damaged.") from error


def _small(picture: "ImageFile") -> bytes:
    from app.uploads.colours import in_eight_bits, in_srgb

    small = in_eight_bits(picture)
    # Image.thumbnail lets the JPEG decoder scale the picture down already (Image.draft).
    small.thumbnail((EDGE, EDGE))
    png = BytesIO()
    in_srgb(_upright(small), picture.info).save(png, "PNG", icc_profile=None)
    return png.getvalue()


def _upright(picture: "Image") -> "Image":
    from PIL import ImageOps

    with suppress(Exception):  # broken EXIF data
        return ImageOps.exif_transpose(picture)
    return picture


class PictureRefused(Exception):
    """No thumbnail can ever be made of this file. The message says why."""


class PictureWorkerDied(Exception):
    """The process that made the thumbnail has ended. Another attempt may succeed."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)
