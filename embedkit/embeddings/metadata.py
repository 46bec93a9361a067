"""The metadata of embeddings: which encoder made them, in which space, in which runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedkit.errors import OutputError, SpaceMismatchError

METADATA_KEY = b"embedkit"


METADATA_VERSION = 1


#: The widest embedding; entries have the same limit.
MOST_DIM = 1 << 20


_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How rows were computed. Runs of one file may differ: they change the last digits, not the space.

    Attributes:
        provider: ONNX Runtime's name of what ran.
        precision: `fp32`, `tf32` or `fp16`.
        decode: `auto` or `exact`.
        threads: Cores that were kept busy.
        batch_size: Images in one batch.
        versions: Package name -> version.
    """

    provider: str
    precision: str
    decode: str
    threads: int
    batch_size: int
    versions: Mapping[str, str]

    def _is_sound(self) -> bool:
        return (
            all(isinstance(text, str) for text in (self.provider, self.precision, self.decode))
            and all(type(number) is int for number in (self.threads, self.batch_size))
            and isinstance(self.versions, dict)
            and all(isinstance(version, str) for version in self.versions.values())
        )


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a file of embeddings says of itself.

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

    def with_run(self, run: Run) -> Metadata:
        """The metadata after rows of `run` were added; a run like one that it has changes nothing."""
        return self if run in self.runs else replace(self, runs=(*self.runs, run))

    def check_same_space(self, other: Metadata, where: str) -> None:
        """Refuse to mix two spaces.

        Raises:
            SpaceMismatchError: Naming both.
        """
        if self.fingerprint != other.fingerprint:
            raise SpaceMismatchError(
                f"{where} holds embeddings of {self.entry} (space {self.fingerprint[:12]}, "
                f"{'normalized' if self.normalized else 'not normalized'}), which cannot be mixed with those of "
                f"{other.entry} (space {other.fingerprint[:12]}, "
                f"{'normalized' if other.normalized else 'not normalized'}); "
                "write to another file, or start this one again with --overwrite"
            )

    def to_json(self) -> str:
        """The metadata as it stands in the schema metadata."""
        return json.dumps({"version": METADATA_VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Metadata:
        """Parse metadata.

        Raises:
            OutputError: It is not one, or of a later version.
        """
        try:
            data = json.loads(text)
            version = data.pop("version")
            if type(version) is int and version != METADATA_VERSION:
                raise OutputError(f"{where}: metadata of version {version}; upgrade embedkit")
            found = cls(**data | {"runs": tuple(Run(**run) for run in data["runs"])})
            if type(version) is not int or not found._is_sound():
                raise ValueError
            return found
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise OutputError(
                f"{where}: its metadata is damaged; was it written by another program?"
            ) from None

    def _is_sound(self) -> bool:
        """Whether every value is of its type and in its range: a file may say anything."""
        return (
            isinstance(self.entry, str)
            and all(
                isinstance(name, str) and _SHA256.fullmatch(name)
                for name in (self.manifest_sha256, self.fingerprint)
            )
            and type(self.dim) is int
            and 1 <= self.dim <= MOST_DIM
            and isinstance(self.normalized, bool)
            and all(run._is_sound() for run in self.runs)
        )


def first_line(error: BaseException) -> str:
    """The begin of a library's message, for a sentence of ours."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON text, for the small files that stand beside embeddings."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
