"""The encoder: a verified entry, an engine that runs it, and images in, embeddings out."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from embedkit.embeddings.metadata import Metadata
from embedkit.errors import (
    ConfigError,
    EmbedkitError,
    EntryError,
    ImageError,
)
from embedkit.hub.access import Access, default_cache_dir
from embedkit.hub.folder import FolderEntry
from embedkit.hub.resolve import find_entry
from embedkit.hub.verified import VerifiedEntry
from embedkit.images.transform import ImageLike, ReusedBlocks, read_pixels
from embedkit.model.config import EntryConfig
from embedkit.model.engines.base import Engine
from embedkit.model.engines.onnx import OnnxEngine
from embedkit.model.layout import GRAPH, WEIGHTS
from embedkit.model.manifest import space_fingerprint
from embedkit.model.mixture import Assignment, GaussianMixture
from embedkit.model.preprocess import Preprocess
from embedkit.model.providers import EngineOptions, Provider, available_cpus

_LOGGER = logging.getLogger(__name__)

#: Images in one batch. On the CPU a small batch stays in the cache of the core that works on it.
CPU_BATCH_SIZE = 4
GPU_BATCH_SIZE = 64

#: Batches in flight for each worker. Hides the latency of writing a shard.
WINDOW = 8

#: An image, or a function that gives its encoded bytes when a worker is ready for them.
Readable: TypeAlias = "ImageLike | Callable[[], bytes]"
_T = TypeVar("_T")


@dataclass(frozen=True)
class EncodedBatch:
    """One batch of a stream, in source order.

    Attributes:
        ids: One per row.
        embeddings: float32 (n, D).
        errors: (id, error) of the images of this batch that could not be read; they have no row.

    Examples:
        >>> batch = next(embedkit.load_encoder().stream("samples/", batch_size=4))
        >>> batch.ids[:2], batch.embeddings.shape, batch.errors
        (['samples/astronaut.jpg', 'samples/bricks.jpg'], (4, 1280), [])
    """

    ids: list[str]
    embeddings: np.ndarray
    errors: list[tuple[str, EmbedkitError | OSError]] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"<EncodedBatch: {len(self.ids)} rows of {self.embeddings.shape[-1]}, {len(self.errors)} errors>"
        )


class Encoder:
    """Images -> embeddings. Thread-safe. A pickled encoder opens its session again where it is unpickled.

    Attributes:
        name: The entry's folder name, `<method>-<arch>.<data>`.
        dim: Width D of an embedding.
        config: The entry's configuration.
        preprocess: The contract that turns an image into the graph's pixels.
        revision: The manifest's sha256, 64 hex digits.
        card: The model card, Markdown.
        note: One sentence when `device="auto"` could not use the GPU that it found, else empty.

    Examples:
        >>> encoder = embedkit.load_encoder()
        >>> encoder.name, encoder.dim, encoder.preprocess.size
        ('supervised-efficientnet_lite0.in1k', 1280, (224, 224))
        >>> len(encoder.fingerprint), encoder.card.startswith("---")
        (64, True)
    """

    def __init__(self, entry: VerifiedEntry, options: EngineOptions):
        """Open a verified entry.

        Args:
            entry: The entry. Its graph and weights are read, hashed and passed on in memory.
            options: Device, providers, precision and threads.

        Raises:
            EntryError: The entry is not an encoder, or its graph does not do what its configuration says.
            IntegrityError: Bytes that do not match the manifest.
            DeviceError: The requested device, provider or precision cannot run.
        """
        config = entry.config
        if config.kind != "encoder":
            raise EntryError(f"{entry.location} is a {config.kind}, not an encoder")
        self._entry = entry
        self._options = options
        self.name = entry.name
        self.config: EntryConfig = config
        self.dim: int = config.dim
        self.preprocess: Preprocess = config.preprocess
        self.revision: str = entry.revision
        engine = open_engine(entry, options)
        self._engine: Engine = engine
        self.note: str = engine.note
        self._mixture: GaussianMixture | None = None
        _LOGGER.info(
            "loaded %s@%s from %s, on %s", self.name, self.revision[:12], entry.location, self.provider
        )
        if self.note:
            _LOGGER.warning("%s", self.note)

    def __repr__(self) -> str:
        return f"<Encoder {self.name}@{self.revision[:12]} dim={self.dim} provider={self.provider}>"

    def __getstate__(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "location": self._entry.location,
            "revision": self.revision,
            "options": self._options,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = FolderEntry(Path(state["location"]))
        entry = VerifiedEntry(state["name"], files, manifest_sha256=state["revision"])
        self.__init__(entry, state["options"])  # type: ignore[misc]

    @property
    def provider(self) -> str:
        """The provider that runs, by ONNX Runtime's name."""
        return self._engine.provider

    @property
    def threads(self) -> int:
        """Number of cores in use."""
        return self._options.threads

    @property
    def precision(self) -> str:
        """`fp32`, `tf32` or `fp16`."""
        return self._options.precision

    @property
    def card(self) -> str:
        """The model card, Markdown with YAML front matter."""
        return self._entry.card

    @property
    def fingerprint(self) -> str:
        """The identity of the space of normalized embeddings, 64 hex digits."""
        return self._space(normalized=True)

    def _space(self, *, normalized: bool) -> str:
        """The space fingerprint of normalized or raw embeddings, 64 hex digits."""
        return space_fingerprint(self._entry.manifest, self.config, normalized=normalized)

    def metadata(self, *, normalize: bool = True) -> Metadata:
        """What a file says of this encoder's rows, with no run recorded: for rows that were computed elsewhere.

        Args:
            normalize: Whether the rows have Euclidean length 1, as for `encode`.

        Examples:
            >>> encoder = embedkit.load_encoder()
            >>> metadata = encoder.metadata()
            >>> metadata.fingerprint == encoder.fingerprint, metadata.normalized
            (True, True)
        """
        return Metadata(
            entry=self.name,
            manifest_sha256=self.revision,
            fingerprint=self._space(normalized=normalize),
            dim=self.dim,
            normalized=normalize,
        )

    @property
    def default_batch_size(self) -> int:
        """Images in one batch by default."""
        return CPU_BATCH_SIZE if self._engine.concurrency > 1 or "CPU" in self.provider else GPU_BATCH_SIZE

    def encode(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int | None = None,
        normalize: bool = True,
        decode: str = "auto",
        max_pixels: int | None = None,
        show_progress: bool = False,
    ) -> np.ndarray:
        """Embed one image or many.

        Args:
            images: A path, bytes, an open file, a Pillow image, a uint8 array (H, W, C) or (H, W), or any iterable of
                these. A uint8 array (N, H, W, C) and an array (N,) of paths are N images.
            batch_size: Images in one batch; chosen for the device when None.
            normalize: Whether rows have Euclidean length 1.
            decode: `auto` or `exact`, see `embedkit.images.transform.read_pixels`.
            max_pixels: Greatest number of pixels of an image file; 179 million when None.
            show_progress: Whether to draw a progress bar on stderr.

        Returns:
            float32 (N, D), one row per image in order; N is 1 for one image.

        Raises:
            ImageError: An image cannot be read; the message names it by path or position. Use `stream`, or
                `embedkit.embed` for a folder, to skip such images.

        Examples:
            >>> encoder = embedkit.load_encoder()
            >>> names = ["samples/cat.jpg", "samples/cat-closer.jpg", "samples/rocket.jpg"]
            >>> cat, closer, rocket = encoder.encode(names)
            >>> bool(cat @ closer > 0.8 > cat @ rocket)
            True
            >>> encoder.encode(np.zeros((5, 64, 48, 3), np.uint8)).shape
            (5, 1280)
        """
        return self._rows(
            images,
            "embedding",
            batch_size=batch_size,
            normalize=normalize,
            decode=decode,
            max_pixels=max_pixels,
            show_progress=show_progress,
        )

    def _rows(
        self,
        images: ImageLike | Iterable[ImageLike],
        output: str,
        *,
        batch_size: int | None,
        decode: str,
        max_pixels: int | None,
        normalize: bool = True,
        show_progress: bool = False,
    ) -> np.ndarray:
        """One output for every image, in order; the first image that cannot be read is an error."""
        if isinstance(images, np.ndarray) and images.dtype.kind in "UO" and images.ndim < 2:
            images = images.tolist()  # paths, for example a column of a table
        many: Iterable[ImageLike] = [images] if _is_image(images) else images  # type: ignore[assignment, list-item]
        if not isinstance(many, Iterable):
            raise ConfigError(f"expected an image or an iterable of images, found {type(images).__name__}")
        if batch_size is None:
            batch_size = self.default_batch_size
            if isinstance(many, (Sequence, np.ndarray)):
                # Few images are spread evenly, so that no core waits for the full batch of another core.
                batch_size = max(1, min(batch_size, -(-len(many) // self._engine.concurrency)))
        blocks: list[np.ndarray] = []
        first = 0
        flow = self._flow(
            _chunks(many, batch_size),
            normalize=normalize,
            decode=decode,
            max_pixels=max_pixels,
            output=output,
        )
        with closing(flow):  # a stored traceback would otherwise keep the workers alive
            for block, faults in _progress(flow, many, batch_size) if show_progress else flow:
                if faults:
                    index = min(faults)
                    name = _name_of(many, first + index)
                    raise ImageError(f"{name}: {reason_of(faults[index])}") from None
                blocks.append(block)
                first += len(block)
        return np.concatenate(blocks) if blocks else np.empty((0, self._width(output)), np.float32)

    def assign(
        self, images: ImageLike | Iterable[ImageLike], *, batch_size: int | None = None, decode: str = "auto"
    ) -> Assignment:
        """Embed images, and assign each to the most likely cluster of the entry's fitted mixture.

        Args:
            images: As for `encode`.
            batch_size: As for `encode`.
            decode: As for `encode`.

        Returns:
            Cluster and probability of each image, in order of the images.

        Raises:
            EntryError: The entry has no mixture, or a damaged one.
            ImageError: An image cannot be read.

        Examples:
            >>> encoder = embedkit.load_encoder("deepdpm-r10")
            >>> labels, probabilities = encoder.assign(["samples/cat.jpg", "samples/rocket.jpg"])
            >>> labels.shape, bool((probabilities <= 1).all())
            ((2,), True)
        """
        if self._mixture is None:
            self._mixture = GaussianMixture._of_entry(self._entry)
        return self._mixture.assign(
            self.encode(images, batch_size=batch_size, normalize=False, decode=decode)
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that `classify` tells apart, in order; empty for an entry without a classifier."""
        return self.config.classes

    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int | None = None,
        decode: str = "auto",
        max_pixels: int | None = None,
    ) -> np.ndarray:
        """The probability of each class, for one image or many.

        Args:
            images: As for `encode`.
            batch_size: As for `encode`.
            decode: As for `encode`.
            max_pixels: As for `encode`.

        Returns:
            float32 (N, K), the softmax of the logits; columns are in the order of `classes`.

        Raises:
            EntryError: The entry has no classifier.
            ImageError: An image cannot be read.

        Examples:
            >>> encoder = embedkit.load_encoder()  # exported without its classifier
            >>> encoder.classes
            ()
            >>> encoder.classify("samples/cat.jpg")
            Traceback (most recent call last):
            embedkit.errors.EntryError: ... has no classifier; export its run again with --with-head, or name ...
        """
        self._check_head()
        return self._rows(images, "logits", batch_size=batch_size, decode=decode, max_pixels=max_pixels)

    def _width(self, output: str) -> int:
        return self.dim if output == "embedding" else len(self.classes)

    def _check_head(self) -> None:
        if not self.classes:
            raise EntryError(
                f"{self._entry.location} has no classifier; export its run again with --with-head, or name an entry "
                "that has one"
            )

    def stream(
        self,
        source: str | os.PathLike[str] | Iterable[ImageLike],
        *,
        batch_size: int | None = None,
        normalize: bool = True,
        decode: str = "auto",
        max_pixels: int | None = None,
        recursive: bool = True,
    ) -> Iterator[EncodedBatch]:
        """Embed a source of any size lazily, in bounded memory.

        Args:
            source: A folder, a file, a glob, a `.tar` or a Parquet file, or an iterable of images.
            batch_size: Images in one batch; chosen for the device when None.
            normalize: Whether rows have Euclidean length 1.
            decode: `auto` or `exact`.
            max_pixels: As for `encode`.
            recursive: Whether subfolders are included.

        Yields:
            Batches in source order; an image that cannot be read is in `errors` and has no row.

        Examples:
            >>> for batch in embedkit.load_encoder().stream("samples/", batch_size=4):
            ...     print(batch.embeddings.shape)
            (4, 1280)
            (4, 1280)
            (2, 1280)
        """
        items: Iterable[tuple[str, Readable]]
        if isinstance(source, (str, os.PathLike)):
            from embedkit.images.sources import list_sources

            items = ((item.id, item.read) for item in list_sources([source], recursive=recursive).items)
        else:
            items = (
                (os.fspath(image) if isinstance(image, (str, os.PathLike)) else str(index), image)
                for index, image in enumerate(source)
            )
        size = self.default_batch_size if batch_size is None else batch_size
        pending: deque[list[str]] = deque()

        def batches() -> Iterator[list[Readable]]:
            for chunk in _chunks(items, size):
                pending.append([name for name, _ in chunk])
                yield [image for _, image in chunk]

        with closing(
            self._flow(batches(), normalize=normalize, decode=decode, max_pixels=max_pixels)
        ) as flow:
            for block, faults in flow:
                names = pending.popleft()
                good = [index for index in range(len(names)) if index not in faults]
                errors = [(names[index], fault) for index, fault in sorted(faults.items())]
                yield EncodedBatch([names[index] for index in good], block[good], errors)

    def _flow(
        self,
        batches: Iterable[Sequence[Readable]],
        *,
        normalize: bool = True,
        decode: str = "auto",
        max_pixels: int | None = None,
        pad_to: int = 0,
        output: str = "embedding",
    ) -> Generator[tuple[np.ndarray, dict[int, EmbedkitError | OSError]], None, None]:
        """Embed batches in a pool of workers, and yield them in order.

        Each worker decodes a batch into a buffer of its own and then runs it, so that decoding and inference
        overlap. On the CPU every core alternates between the two. On a device the workers decode while one of them
        uses the device. The number of batches in flight is bounded, and pixels stay in the workers' buffers.

        Args:
            batches: Batches of images, consumed lazily.
            normalize: Whether rows have Euclidean length 1.
            decode: `auto` or `exact`.
            max_pixels: As for `encode`.
            pad_to: Pad every batch to this size, so that the last one is computed exactly like the others.
            output: `embedding`, or `logits` for the probabilities of classes.

        Yields:
            float32 (n, D) with a row for every image, zeros where it failed, and the errors by row.
        """
        workers = max(self._options.threads, 1) + (0 if self._engine.concurrency > 1 else 1)
        buffers = threading.local()
        shape = (self.preprocess.channels, *self.preprocess.size)

        def work(sources: Sequence[Readable]) -> tuple[np.ndarray, dict[int, EmbedkitError | OSError]]:
            rows = max(len(sources), pad_to)
            pixels = getattr(buffers, "pixels", None)
            if pixels is None or len(pixels) < rows:
                pixels = buffers.pixels = np.zeros((rows, *shape), np.uint8)
            pixels = pixels[:rows]
            faults: dict[int, EmbedkitError | OSError] = {}
            for index, source in enumerate(sources):
                try:
                    image = source() if callable(source) else source
                    read_pixels(
                        image, self.preprocess, decode=decode, max_pixels=max_pixels, out=pixels[index]
                    )
                except ConfigError:
                    raise
                except (EmbedkitError, OSError, MemoryError) as fault:
                    faults[index] = fault if not isinstance(fault, MemoryError) else _no_memory()
                    pixels[index] = 0
            pixels[len(sources) :] = 0
            if len(faults) == len(sources):
                return np.zeros((len(sources), self._width(output)), np.float32), faults
            embeds = output == "embedding"
            block = self._engine.run(pixels) if embeds else self._engine.run_all(pixels)[output]
            block = block[: len(sources)]
            if faults:
                block[list(faults)] = 0
            return comparable(output, block) if normalize or not embeds else block, faults

        source = iter(batches)
        first = list(islice(source, 2))
        if len(first) < 2:  # one batch needs no pool
            yield from map(work, first)
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="embedkit")
        window: deque[Future[tuple[np.ndarray, dict[int, EmbedkitError | OSError]]]] = deque(
            pool.submit(work, batch) for batch in first
        )
        with ReusedBlocks(workers):
            try:
                for batch in source:
                    window.append(pool.submit(work, batch))
                    if len(window) >= WINDOW * workers:
                        yield window.popleft().result()
                while window:
                    yield window.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def open_engine(entry: VerifiedEntry, options: EngineOptions) -> OnnxEngine:
    """Open the engine of a verified entry of any kind, and check its graph against the entry's configuration.

    Args:
        entry: The entry. Its graph and weights are read, hashed and passed on in memory.
        options: Device, providers, precision and threads.

    Raises:
        EntryError: The graph does not do what the configuration says.
        IntegrityError: Bytes that do not match the manifest.
        DeviceError: The requested device, provider or precision cannot run.
    """
    config = entry.config
    engine = OnnxEngine(
        entry.read(GRAPH),
        entry.read(WEIGHTS),
        options,
        where=f"{entry.location}/{GRAPH}",
        outputs=sorted(config.outputs, key=lambda name: name != "embedding"),  # `run` gives the first
    )
    expected = (config.preprocess.channels, *config.preprocess.size)
    if engine.input_shape != expected:
        raise EntryError(
            f"{entry.location}: the graph takes {engine.input_shape} and the preprocess contract gives {expected}"
        )
    for name, shape in config.outputs.items():
        if engine.output_shapes[name] != shape:
            raise EntryError(
                f"{entry.location}: the graph gives {engine.output_shapes[name]} and the configuration says {shape}"
            )
    return engine


def comparable(name: str, rows: np.ndarray) -> np.ndarray:
    """An output as it is used: `embedding` L2-normalized, `logits` as probabilities, any other output unchanged."""
    if name == "logits":
        return softmax(rows)
    return l2_normalize(rows) if name == "embedding" else rows


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits float32 (N, K) -> probabilities float32 (N, K), which sum to 1."""
    powers = np.exp(logits - logits.max(1, keepdims=True), dtype=np.float32)
    probabilities: np.ndarray = powers / powers.sum(1, keepdims=True)
    return probabilities


def l2_normalize(rows: np.ndarray) -> np.ndarray:
    """Scale rows to Euclidean length 1, float32 (N, D); a row of zeros is unchanged."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1).astype(np.float32)


def _is_image(images: object) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim != 4
    kinds = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
    return isinstance(images, kinds) or hasattr(images, "read")  # an open file is one image, not its lines


def _no_memory() -> ImageError:
    return ImageError("not enough memory to read the image")


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    if size < 1:
        raise ConfigError(f"batch_size: expected at least 1, found {size}")
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _name_of(images: Iterable[ImageLike], index: int) -> str:
    image = images[index] if isinstance(images, Sequence) else None
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"


def reason_of(fault: Exception) -> str:
    """Why an image could not be read, as one sentence without its name."""
    if isinstance(fault, OSError) and not isinstance(fault, EmbedkitError):
        return fault.strerror or str(fault)
    return str(fault)


def _progress(flow: Iterable[_T], images: Iterable[ImageLike], batch_size: int) -> Iterable[_T]:
    from rich.console import Console
    from rich.progress import track

    total = -(-len(images) // batch_size) if isinstance(images, (Sequence, np.ndarray)) else None
    return track(flow, "embedding", total=total, console=Console(stderr=True))


def load_encoder(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    lock: bool = False,
    device: str = "auto",
    providers: Sequence[Provider] | None = None,
    precision: str = "fp32",
    threads: int | str = "auto",
) -> Encoder:
    """Load an encoder by name, by the URL of an entry, or from an entry's folder.

    A bare name (`simclr-r50`) is never a path. It is looked up in the zoos of the environment variable `EMBEDKIT_ZOO`
    (separated by commas), then in those of `config.toml` in the user's configuration folder, then in the package, then
    in the default zoo. If the package's index lists the name, the entry must have the indexed digest; write
    `name@latest` to take what the zoo holds. A remote entry is pulled into the cache first, once, with a progress bar
    where stderr is a terminal. Last, a `zoo/` folder of the working directory, as a checkout has it, gives the entries
    whose digests the package's index lists, and nothing else.

    Args:
        name: A name, `name@revision`, a URL such as `hf://org/name@revision` or `https://host/zoo/name`, or the
            path of an entry's folder; the default encoder when None.
        revision: At least 12 hex digits of the manifest's sha256; on the Hub also a tag or a commit.
        cache_dir: Folder of downloads and compiled engines; the user's cache folder when None.
        local_files_only: Never open a connection.
        token: Credential of a remote zoo; it is sent to no other origin.
        lock: Pin the entry in `embedkit.lock`, in place of an older pin; without it, the file is only read.
        device: `auto`, `cpu`, `cuda` or `cuda:<index>`.
        providers: ONNX Runtime providers, in order; overrides `device`.
        precision: `fp32`, `tf32` (CUDA) or `fp16` (TensorRT).
        threads: Cores to keep busy, or `auto` for all that this process may use.

    Returns:
        The encoder.

    Raises:
        EntryNotFoundError: No zoo has it; the message gives the nearest names.
        IntegrityError: The bytes do not match the manifest or the pin.
        ConfigError: The name is not valid, or the license requires `embedkit zoo pull --accept-license` first.
        ZooError: A remote zoo refuses, or is down and the entry is not in the cache.
        DeviceError: The requested device, provider or precision cannot run.

    Examples:
        >>> embedkit.load_encoder().name
        'supervised-efficientnet_lite0.in1k'
        >>> embedkit.load_encoder("simclr-r10", device="cpu", threads=1)
        <Encoder simclr-r10.fmnist@... dim=256 provider=CPUExecutionProvider>
    """
    if isinstance(providers, str):
        raise ConfigError(f"providers: expected a list of names, found {providers!r}; write [{providers!r}]")
    options = EngineOptions(
        device=device,
        providers=tuple(providers) if providers is not None else None,
        precision=precision,
        threads=resolve_threads(threads),
        cache_dir=os.fspath(cache_dir) if cache_dir is not None else default_cache_dir(),
    )
    access = Access(cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    return Encoder(find_entry(name, revision=revision, access=access, lock=lock), options)


def resolve_threads(threads: int | str) -> int:
    """The number of cores behind `threads`: itself, or for `auto` all that this process may use.

    Raises:
        ConfigError: Neither `auto` nor a whole number above 0.
    """
    if threads == "auto":
        return available_cpus()
    try:
        count = int(threads)
    except (ValueError, TypeError, OverflowError):
        count = 0
    if count < 1:
        raise ConfigError(f"threads: expected 'auto' or a whole number above 0, found {threads!r}")
    return count
