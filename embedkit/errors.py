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


class EntryNotFoundError(EmbedkitError, LookupError):
    """No place that was asked has an entry of this name or revision."""


class DeviceError(EmbedkitError, RuntimeError):
    """What was asked to run (device, provider, precision) is not what would run."""


class ImageError(EmbedkitError, ValueError):
    """One picture cannot be read: the reason names the picture's fault, not the decoder's."""


class SourceError(EmbedkitError):
    """A source of pictures (folder, list, tar, Parquet) cannot be listed or read."""


class OutputError(EmbedkitError):
    """An output cannot be written, or is not one that can be continued."""


class SpaceMismatchError(EmbedkitError):
    """Embeddings of two different spaces were about to be mixed."""


class ParityError(EmbedkitError):
    """Two forms of one encoder (torch and ONNX, stored and run) disagree by more than is allowed."""
