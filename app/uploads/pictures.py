"""Makes thumbnails of strangers' pictures, in a process that may be lost without harm."""

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
    """Makes thumbnails off the event loop, one at a time.

    Decoding is work for a processor, and it is where hostile input does its harm. So it happens
    in a child process with bounded memory, which is started when the first picture comes and
    replaced when one kills it.
    """

    def __init__(self) -> None:
        # One picture in the child at a time: whatever happens to it, happens to that picture.
        self._turn = asyncio.Lock()
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False

    async def thumbnail(self, source: Path) -> bytes:
        """See the function `thumbnail`. Cancelling it ends its work at once.

        Raises PictureRefused, which is final, and PictureWorkerDied, after which another attempt
        may succeed.
        """
        async with self._turn:
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
        """Ends the child, whatever it is doing. Pictures in the queue raise PictureWorkerDied."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            # Python 3.14 has kill_workers() for this; up to then nothing public ends a busy child.
            children = list((pool._processes or {}).values())  # noqa: SLF001
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.kill()


def _new_pool() -> ProcessPoolExecutor:
    # A forked child would inherit locks and sockets in the middle of their use.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_prepare_worker)


def _prepare_worker() -> None:
    # Control-C goes to every process of the terminal; only the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_WORKER_MEMORY, _WORKER_MEMORY))
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Ends this process when its parent is gone, even by SIGKILL, which tells nobody."""
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


def thumbnail(source: Path) -> bytes:
    """Returns a picture scaled down to at most `EDGE` x `EDGE` pixels and turned upright, as PNG.

    Its colours are sRGB. Of an animation it is the first frame. Raises PictureRefused for anything
    but a sound picture in one of `FORMATS` with at most `MAX_PIXELS` pixels, and OSError if the
    file cannot be opened.
    """
    # Loaded in the child only: the service starts sooner, and never decodes by accident.
    from PIL import Image, UnidentifiedImageError

    with source.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what surrounds the picture, such as EXIF data
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
        except Exception as error:  # decoders of broken input raise anything at all
            raise PictureRefused("The picture is damaged.") from error


def _small(picture: "ImageFile") -> bytes:
    from app.uploads.colours import in_eight_bits, in_srgb

    small = in_eight_bits(picture)
    # Decodes a JPEG at a fraction of its size already (Image.draft).
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
    """There is no thumbnail for this file, and there never will be; the message says why."""


class PictureWorkerDied(Exception):
    """The process that made the thumbnail has ended. Another attempt may succeed."""

    def __init__(self) -> None:
        super().__init__(self.__doc__)
