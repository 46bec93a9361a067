"""Every error that embedkit raises on purpose: one tree under `EmbedkitError`.

A message is one sentence: where, what was expected, what was found, and the next step. The command line prints that
sentence and nothing else.
"""

from __future__ import annotations

__all__ = [
    "AccessError",
    "ConfigError",
    "DeviceError",
    "EmbedkitError",
    "EntryError",
    "EntryNotFoundError",
    "ImageError",
    "IntegrityError",
    "MissingDependencyError",
    "OutputError",
    "ParityError",
    "SignatureError",
    "SourceError",
    "SpaceMismatchError",
    "TooManyFailuresError",
    "UnreachableError",
    "ZooError",
]


class EmbedkitError(Exception):
    """The root of the tree: catches every error that embedkit raises on purpose.

    Examples:
        >>> try:
        ...     encoder = embedkit.load_encoder("simclr-r99")
        ... except embedkit.EmbedkitError as error:
        ...     print(type(error).__name__)
        EntryNotFoundError
    """


class MissingDependencyError(EmbedkitError, ImportError):
    """An optional package is not installed; the message holds the pip line that installs it.

    Examples:
        >>> issubclass(embedkit.MissingDependencyError, ImportError)
        True
    """


class ConfigError(EmbedkitError, ValueError):
    """An argument, an option or a setting is invalid.

    Examples:
        >>> embedkit.SearchIndex.build(np.eye(3), kind="tree")
        Traceback (most recent call last):
            ...
        embedkit.errors.ConfigError: kind: expected one of auto, flat, ivf, hnsw, found 'tree'
    """


class EntryError(EmbedkitError):
    """A zoo entry is invalid: its schema, graph or preprocess contract.

    Examples:
        >>> embedkit.load_encoder("face_detector-ssd_mobilenet1")
        Traceback (most recent call last):
            ...
        embedkit.errors.EntryError: ... is a detector, not an encoder
    """


class IntegrityError(EntryError):
    """The bytes of an entry differ from the digest in its manifest or its pin.

    Examples:
        >>> from pathlib import Path
        >>> import shutil
        >>> entry = embedkit.list_encoders("simclr-r10")[0]
        >>> copy = Path(shutil.copytree(f"{entry.zoo}/{entry.name}", f"copies/{entry.name}"))
        >>> size = (copy / "model.onnx").write_bytes(b"another graph")
        >>> embedkit.load_encoder(copy)
        Traceback (most recent call last):
            ...
        embedkit.errors.IntegrityError: .../model.onnx: expected ... bytes of sha256 ..., found 13 bytes of ...
    """


class SignatureError(EntryError):
    """An entry is not signed, or its signature is of another key or of other files.

    Examples:
        >>> issubclass(embedkit.SignatureError, embedkit.EntryError)
        True
    """


class EntryNotFoundError(EmbedkitError, LookupError):
    """None of the zoos has an entry of this name or revision.

    Examples:
        >>> embedkit.load_encoder("simclr-r11")
        Traceback (most recent call last):
            ...
        embedkit.errors.EntryNotFoundError: there is no encoder 'simclr-r11' (did you mean 'simclr-r10'...
    """


class DeviceError(EmbedkitError, RuntimeError):
    """The requested device, provider or precision is not available.

    Examples:
        >>> embedkit.load_encoder(providers=["QuantumExecutionProvider"])
        Traceback (most recent call last):
            ...
        embedkit.errors.DeviceError: ...QuantumExecutionProvider...
    """


class ImageError(EmbedkitError, ValueError):
    """One image cannot be read; the reason describes the image, not the decoder.

    Examples:
        >>> embedkit.load_encoder().encode(["samples/cat.jpg", b"not an image"])
        Traceback (most recent call last):
            ...
        embedkit.errors.ImageError: image 1: not an image...
    """


class SourceError(EmbedkitError):
    """A source of images (folder, list, tar, Parquet) cannot be listed or read.

    Examples:
        >>> embedkit.embed("no/such/folder", "out.parquet")
        Traceback (most recent call last):
            ...
        embedkit.errors.SourceError: ...no/such/folder...
    """


class OutputError(EmbedkitError):
    """An output cannot be written, or cannot be continued.

    Examples:
        >>> embedkit.embed("samples/", "no/such/folder/out.parquet")
        Traceback (most recent call last):
            ...
        embedkit.errors.OutputError: ...
    """


class TooManyFailuresError(EmbedkitError):
    """More images failed than a job allowed; what it embedded is kept, and the same call continues it.

    Attributes:
        failed: How many failed.
        allowed: How many were allowed to.
        errors: The table of failures (`id`, `error`, `reason`).

    Examples:
        >>> np.save("broken.npy", [0])  # no image
        >>> try:
        ...     embedkit.embed(["samples/cat.jpg", "broken.npy"], "strict.parquet", max_failures=0)
        ... except embedkit.TooManyFailuresError as error:
        ...     print(error.failed, error.allowed, error.errors)
        1 0 strict.errors.parquet
    """

    def __init__(self, message: str, failed: int = 0, allowed: int = 0, errors: str = ""):
        """Take the message, both counts and the path of the table."""
        super().__init__(message)
        self.failed, self.allowed, self.errors = failed, allowed, errors


class SpaceMismatchError(EmbedkitError):
    """Embeddings of two different spaces would be mixed.

    Examples:
        >>> embedkit.embed("samples/", "samples.parquet", encoder="simclr-r10")
        Traceback (most recent call last):
            ...
        embedkit.errors.SpaceMismatchError: samples.parquet ...
    """


class ParityError(EmbedkitError):
    """Two forms of one encoder (torch and ONNX, stored and computed) differ by more than the tolerance.

    Examples:
        >>> issubclass(embedkit.ParityError, embedkit.EmbedkitError)
        True
    """


class ZooError(EmbedkitError):
    """A remote zoo refuses a request, or its answer is not one of a zoo.

    Examples:
        >>> try:
        ...     encoder = embedkit.load_encoder("http://127.0.0.1:9/zoo/simclr-r10.fmnist")
        ... except embedkit.ZooError as error:
        ...     print(type(error).__name__)
        UnreachableError
    """


class AccessError(ZooError):
    """A remote zoo refuses access: a token is missing, or lacks the right.

    Examples:
        >>> issubclass(embedkit.AccessError, embedkit.ZooError)
        True
    """


class UnreachableError(ZooError):
    """A remote zoo does not answer: it is down, too slow or overloaded, or connections are turned off.

    Attributes:
        retry_after: Seconds after which the zoo allows another request.

    Examples:
        >>> try:
        ...     encoder = embedkit.load_encoder("http://127.0.0.1:9/zoo/simclr-r10.fmnist")
        ... except embedkit.UnreachableError as error:
        ...     print(f"asked again after {error.retry_after:.0f} seconds")
        asked again after 0 seconds
    """

    def __init__(self, message: str, retry_after: float = 0.0):
        """Take the message and the seconds to wait."""
        super().__init__(message)
        self.retry_after = retry_after
