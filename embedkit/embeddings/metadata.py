"""The metadata of embeddings: which encoder made them, in which space, in which runs; and the one space check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from embedkit._io.json import Fields, JsonFormat
from embedkit.errors import OutputError, SpaceMismatchError

__all__ = ["DTYPES", "MAX_DIM", "METADATA_KEY", "METADATA_VERSION", "Metadata", "Run", "check_same_space"]

#: The key of the metadata in an Arrow schema.
METADATA_KEY = b"embedkit"
METADATA_VERSION = 1
#: The widest embedding; entries have the same limit.
MAX_DIM = 1 << 20

#: How the numbers of rows may be stored; they are float32 wherever they are read.
DTYPES = ("float32", "float16")

_SHA256 = "[0-9a-f]{64}"
_FORMAT = JsonFormat(error=OutputError, step="was it written by another program?")


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

    @classmethod
    def _from_fields(cls, fields: Fields) -> Run:
        fields.only("provider", "precision", "decode", "threads", "batch_size", "versions")
        versions = fields.fields("versions")
        return cls(
            provider=fields.text("provider", empty=True),
            precision=fields.text("precision", empty=True),
            decode=fields.text("decode", empty=True),
            threads=fields.whole("threads"),
            batch_size=fields.whole("batch_size"),
            versions={name: versions.text(name, empty=True) for name in versions.keys()},
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
        dtype: How their numbers are stored: `float32` or `float16`. It does not change the space.

    Examples:
        >>> metadata = embedkit.Embeddings.load("samples.parquet").metadata
        >>> metadata.entry, metadata.dim, metadata.normalized
        ('supervised-efficientnet_lite0.in1k', 1280, True)
        >>> metadata.fingerprint == embedkit.load_encoder().fingerprint
        True
    """

    entry: str
    manifest_sha256: str
    fingerprint: str
    dim: int
    normalized: bool
    runs: tuple[Run, ...] = ()
    dtype: str = "float32"

    @property
    def space(self) -> str:
        """The space for a message: entry, start of the fingerprint, normalized or not."""
        return (
            f"{self.entry}, space {self.fingerprint[:12]}, "
            f"{'normalized' if self.normalized else 'not normalized'}"
        )

    def with_run(self, run: Run) -> Metadata:
        """The metadata after rows of `run` were added; a run that is listed already changes nothing.

        Examples:
            >>> metadata = embedkit.Embeddings.load("samples.parquet").metadata
            >>> metadata.with_run(metadata.runs[0]) == metadata
            True
        """
        return self if run in self.runs else replace(self, runs=(*self.runs, run))

    def to_json(self) -> str:
        """The metadata as JSON, as the Arrow schema of a file holds it.

        Examples:
            >>> metadata = embedkit.Embeddings.load("samples.parquet").metadata
            >>> import json
            >>> json.loads(metadata.to_json())["dim"]
            1280
        """
        return json.dumps({"version": METADATA_VERSION, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "the metadata") -> Metadata:
        """Parse metadata.

        Args:
            text: What `to_json` gave.
            where: How messages name the file.

        Raises:
            OutputError: The text is not metadata, or is of a later version.

        Examples:
            >>> metadata = embedkit.Embeddings.load("samples.parquet").metadata
            >>> embedkit.Metadata.from_json(metadata.to_json()) == metadata
            True
        """
        fields = _FORMAT.fields(_FORMAT.parse(text, where), where)
        fields.version("version", METADATA_VERSION)
        fields.only(
            "version", "entry", "manifest_sha256", "fingerprint", "dim", "normalized", "runs", "dtype"
        )
        return cls(
            entry=fields.text("entry"),
            manifest_sha256=fields.text("manifest_sha256", pattern=_SHA256),
            fingerprint=fields.text("fingerprint", pattern=_SHA256),
            dim=fields.whole("dim", 1, MAX_DIM),
            normalized=fields.flag("normalized"),
            runs=tuple(Run._from_fields(run) for run in fields.each("runs")),
            dtype=fields.text("dtype", choices=DTYPES) if "dtype" in fields else "float32",
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
