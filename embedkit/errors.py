"""Every error that embedkit raises on purpose: one tree under `EmbedkitError`.

A message says where, what was expected, what was found, and the next step, in one sentence. The command
line prints that sentence and nothing else.
"""

from __future__ import annotations

__all__ = [
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
    "SourceError",
    "SpaceMismatchError",
]


class EmbedkitError(Exception):
    """The root: catch this to catch whatever embedkit refuses."""


class MissingDependencyError(EmbedkitError, ImportError):
    """An optional package is not installed; the message holds the pip line that installs it."""


class ConfigError(EmbedkitError, ValueError):
    """An argument, an option or a setting is not usable."""


class EntryError(EmbedkitError):
    """A zoo entry is not what its files promise: wrong schema, graph or contract."""


class IntegrityError(EntryError):
    """The bytes of an entry are not the bytes that its manifest, or its pin, names."""


class SignatureError(EntryError):
    """An entry is not signed, or by another key, or what is signed is something else."""


class EntryNotFoundError(EmbedkitError, LookupError):
    """No place that was asked has an entry of this name or revision."""


class DeviceError(EmbedkitError, RuntimeError):
    """What was asked to run (device, provider, precision) is not what would run."""


class ImageError(EmbedkitError, ValueError):
    """One image cannot be read: the reason names the image's fault, not the decoder's."""


class SourceError(EmbedkitError):
    """A source of images (folder, list, tar, Parquet) cannot be listed or read."""


class OutputError(EmbedkitError):
    """An output cannot be written, or is not one that can be continued."""


class SpaceMismatchError(EmbedkitError):
    """Embeddings of two different spaces were about to be mixed."""


class ParityError(EmbedkitError):
    """Two forms of one encoder (torch and ONNX, stored and run) disagree by more than is allowed."""


class ZooError(EmbedkitError):
    """A remote place refuses, or does not answer as a zoo does."""


class AccessError(ZooError):
    """A remote place refuses whoever asks: a token is missing, or does not reach so far."""


class UnreachableError(ZooError):
    """A remote place gives no answer: it is down, too slow, overloaded, or may not be asked offline.

    Attributes:
        retry_after: Seconds after which the place says that it may be asked again.
    """

    def __init__(self, message: str, retry_after: float = 0.0):
        """Take the sentence, and the seconds to wait."""
        super().__init__(message)
        self.retry_after = retry_after
