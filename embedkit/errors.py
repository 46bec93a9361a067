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
    "UnreachableError",
    "ZooError",
]


class EmbedkitError(Exception):
    """The root of the tree: catches every error that embedkit raises on purpose."""


class MissingDependencyError(EmbedkitError, ImportError):
    """An optional package is not installed; the message holds the pip line that installs it."""


class ConfigError(EmbedkitError, ValueError):
    """An argument, an option or a setting is invalid."""


class EntryError(EmbedkitError):
    """A zoo entry is invalid: its schema, graph or preprocess contract."""


class IntegrityError(EntryError):
    """The bytes of an entry differ from the digest in its manifest or its pin."""


class SignatureError(EntryError):
    """An entry is not signed, or its signature is of another key or of other files."""


class EntryNotFoundError(EmbedkitError, LookupError):
    """None of the zoos has an entry of this name or revision."""


class DeviceError(EmbedkitError, RuntimeError):
    """The requested device, provider or precision is not available."""


class ImageError(EmbedkitError, ValueError):
    """One image cannot be read; the reason describes the image, not the decoder."""


class SourceError(EmbedkitError):
    """A source of images (folder, list, tar, Parquet) cannot be listed or read."""


class OutputError(EmbedkitError):
    """An output cannot be written, or cannot be continued."""


class SpaceMismatchError(EmbedkitError):
    """Embeddings of two different spaces would be mixed."""


class ParityError(EmbedkitError):
    """Two forms of one encoder (torch and ONNX, stored and computed) differ by more than the tolerance."""


class ZooError(EmbedkitError):
    """A remote zoo refuses a request, or its answer is not one of a zoo."""


class AccessError(ZooError):
    """A remote zoo refuses access: a token is missing, or lacks the right."""


class UnreachableError(ZooError):
    """A remote zoo does not answer: it is down, too slow or overloaded, or connections are turned off.

    Attributes:
        retry_after: Seconds after which the zoo allows another request.
    """

    def __init__(self, message: str, retry_after: float = 0.0):
        """Take the message and the seconds to wait."""
        super().__init__(message)
        self.retry_after = retry_after
