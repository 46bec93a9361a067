"""The metadata of embeddings: which encoder made them, in which space, in which runs; and the one space check."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedkit.errors import OutputError, SpaceMismatchError

__all__ = ["MAX_DIM", "METADATA_KEY", "METADATA_VERSION", "Metadata", "Run", "check_same_space"]

#: The key of the metadata in an Arrow schema.
METADATA_KEY = b"embedkit"
METADATA_VERSION = 1
#: The widest embedding; entries have the same limit.
MAX_DIM = 1 << 20

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How rows were computed. Runs of one file may differ: they change the last digits, not the space.

    Attributes:
        provider: The provider that ran, by ONNX Runtime's name.
        precision: `fp32`, `tf32` or `fp16`.
        decode: `auto` or `exact`.
        threads: Number of cores in use.
        batch_size: Images in one batch.
        versions: Package name -> version.
    """

    provider: str
    precision: str
    decode: str
    threads: int
    batch_size: int
    versions: Mapping[str, str]

    def _is_valid(self) -> bool:
        return (
            all(isinstance(text, str) for text in (self.provider, self.precision, self.decode))
            and all(type(number) is int for number in (self.threads, self.batch_size))
            and isinstance(self.versions, dict)
            and all(isinstance(version, str) for version in self.versions.values())
        )


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Which encoder made a set of embeddings, and in which space they are.

    Attributes:
        entry: The zoo entry's name.
        manifest_sha256: The entry's identity, 64 hex digits.
        fingerprint: The space's identity, 64 hex digits: files of different fingerprints never mix.
        dim: Width D.
        normalized: Whether rows have Euclidean length 1.
        runs: The different ways in which the rows were computed.
    """

    entry: str
    manifest_sha256: str
    fingerprint: str
    dim: int
    normalized: bool
    runs: tuple[Run, ...] = ()

    @property
    def space(self) -> str:
        """The space for a message: entry, start of the fingerprint, normalized or not."""
        return (
            f"{self.entry}, space {self.fingerprint[:12]}, "
            f"{'normalized' if self.normalized else 'not normalized'}"
        )

    def with_run(self, run: Run) -> Metadata:
        """The metadata after rows of `run` were added; a run that is listed already changes nothing."""
        return self if run in self.runs else replace(self, runs=(*self.runs, run))

    def to_json(self) -> str:
        """The metadata as JSON, as the Arrow schema of a file holds it."""
        return json.dumps({"version": METADATA_VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "the metadata") -> Metadata:
        """Parse metadata.

        Args:
            text: What `to_json` gave.
            where: How messages name the file.

        Raises:
            OutputError: The text is not metadata, or is of a later version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            version = data.pop("version")
            if type(version) is int and version != METADATA_VERSION:
                raise OutputError(f"{where}: metadata of version {version}; upgrade embedkit")
            found = cls(**data | {"runs": tuple(Run(**run) for run in data["runs"])})
            if type(version) is not int or not found._is_valid():
                raise ValueError
            return found
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise OutputError(
                f"{where}: its metadata is damaged; was it written by another program?"
            ) from None

    def _is_valid(self) -> bool:
        """Whether every value has the right type and range: a file may hold anything."""
        return (
            isinstance(self.entry, str)
            and all(
                isinstance(name, str) and _SHA256.fullmatch(name) is not None
                for name in (self.manifest_sha256, self.fingerprint)
            )
            and type(self.dim) is int
            and 1 <= self.dim <= MAX_DIM
            and isinstance(self.normalized, bool)
            and all(run._is_valid() for run in self.runs)
        )


def check_same_space(
    a: Metadata | None,
    b: Metadata | None,
    where_a: str,
    where_b: str,
    step: str = "embed one of them again with the other's encoder",
) -> None:
    """Refuse to compare or to mix embeddings of two spaces.

    Args:
        a: Metadata; None for a plain array, which has none and is not checked.
        b: As `a`.
        where_a: How messages name the first embeddings.
        where_b: How messages name the second ones.
        step: What the message tells the user to do.

    Raises:
        SpaceMismatchError: Naming both.
    """
    if a is not None and b is not None and a.fingerprint != b.fingerprint:
        raise SpaceMismatchError(
            f"{where_a} ({a.space}) and {where_b} ({b.space}) are different spaces and cannot be compared or "
            f"mixed; {step}"
        )
