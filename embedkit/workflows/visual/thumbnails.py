"""Thumbnails: upright, RGB, by the same decoding policy as for embeddings, many at a time.

A thumbnail keeps the aspect ratio of its image and is never larger. A missing or damaged image becomes a placeholder
with the reason, so that one image does not prevent the whole sheet.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from PIL import Image, ImageDraw

from embedkit.encoder import reason_of
from embedkit.errors import ConfigError, EmbedkitError
from embedkit.images.originals import Originals
from embedkit.images.transform import upright
from embedkit.model.providers import available_cpus

__all__ = ["Thumbnail", "encoded", "placeholder", "thumbnail", "thumbnails"]

#: The largest side that a thumbnail may have, in pixels.
LARGEST = 1024
#: Greatest number of pixels of an image: more than the default of `embed`, since these rows may exist thanks to a
#: raised limit.
_MAX_PIXELS = 400_000_000
#: Images in flight for each thread.
WINDOW = 4
#: How JPEG and WebP are written. WebP at 75 is a third smaller than JPEG at 80 and looks the same at this size.
_OPTIONS = {"webp": {"quality": 75, "method": 2}, "jpeg": {"quality": 80}}
#: Grays that are visible on a light and on a dark page.
_GRAY, _MARK = (158, 158, 158), (112, 112, 112)


@dataclass(frozen=True, eq=False)
class Thumbnail:
    """One small image.

    Attributes:
        name: The requested id.
        image: RGB; a gray square if there is no image.
        fault: The reason why there is none; empty if there is one.
        data: The encoded bytes, if requested.
    """

    name: str
    image: Image.Image
    fault: str = ""
    data: bytes = b""


def thumbnail(data: bytes, edge: int) -> Image.Image:
    """One image, upright, RGB, in sRGB and on white, its longer side at most `edge` pixels.

    Args:
        data: The bytes of an image file.
        edge: Pixels.

    Raises:
        ImageError: It cannot be read; one sentence without the image's name.
        ConfigError: `edge` is not 1 to 1024.
    """
    if not 1 <= edge <= LARGEST:
        raise ConfigError(f"edge: expected 1 to {LARGEST} pixels, found {edge}")
    return upright(data, longest=edge, max_pixels=_MAX_PIXELS)


def thumbnails(
    names: Iterable[str],
    originals: Originals,
    *,
    edge: int,
    form: str | None = None,
    threads: int | None = None,
) -> Iterator[Thumbnail]:
    """Thumbnails of many images, made in parallel and yielded in order.

    Memory holds a few images for each thread, however many there are.

    Args:
        names: Ids.
        originals: The source of the images.
        edge: The longer side in pixels.
        form: `webp` or `jpeg` to encode each of them too.
        threads: Number of threads; all cores when None.

    Raises:
        ConfigError: No such form, or an edge that cannot be one.
    """
    if form is not None and form not in _OPTIONS:
        raise ConfigError(f"form: expected webp or jpeg, found {form!r}")
    threads = available_cpus() if threads is None else threads

    def make(name: str) -> Thumbnail:
        fault = ""
        try:
            image = thumbnail(originals.read(name), edge)
        except ConfigError:
            raise
        except (EmbedkitError, OSError) as error:
            image, fault = placeholder(edge), reason_of(error)
        return Thumbnail(name, image, fault, encoded(image, form) if form else b"")

    return _in_order(make, names, threads)


def encoded(image: Image.Image, form: str) -> bytes:
    """An RGB image as the bytes of a `webp` or `jpeg` file."""
    file = io.BytesIO()
    image.save(file, form, **_OPTIONS[form])
    return file.getvalue()


def placeholder(edge: int) -> Image.Image:
    """The placeholder of a missing image: a gray square with a cross."""
    image = Image.new("RGB", (edge, edge), _GRAY)
    pen, last = ImageDraw.Draw(image), edge - 1
    width = max(1, edge // 48)
    pen.line((0, 0, last, last), _MARK, width)
    pen.line((0, last, last, 0), _MARK, width)
    pen.rectangle((0, 0, last, last), outline=_MARK, width=width)
    return image


def _in_order(make: Callable[[str], Thumbnail], names: Iterable[str], threads: int) -> Iterator[Thumbnail]:
    pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="thumbnails")
    source = iter(names)
    try:
        window: deque[Future[Thumbnail]] = deque(
            pool.submit(make, name) for name in islice(source, WINDOW * max(threads, 1))
        )
        while window:
            done = window.popleft().result()
            for name in islice(source, 1):
                window.append(pool.submit(make, name))
            yield done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
