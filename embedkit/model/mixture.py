"""A fitted Gaussian mixture over embeddings: from a zoo entry of DeepDPM, or fitted by `dpmm`.

It requires only numpy and safetensors.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from embedkit._io.atomic import write_file
from embedkit._io.json import JsonFormat
from embedkit._io.reading import read_regular
from embedkit.errors import ConfigError, EntryError, SpaceMismatchError
from embedkit.model.layout import MIXTURE
from embedkit.model.manifest import space_fingerprint

if TYPE_CHECKING:
    from embedkit.hub.verified import VerifiedEntry

__all__ = ["Assignment", "Gaussians", "GaussianMixture", "blocks_of"]

#: Numbers in the result of one matrix product: 32 MB of float64.
_BLOCK = 1 << 22
#: The arrays of a file, and their axes: K clusters, d dimensions, D columns.
_ARRAYS = {"weights": "K", "means": "Kd", "precision_cholesky": "Kdd", "center": "D", "components": "Dd"}
_MOST_BYTES = 1 << 30
_HEADER = JsonFormat(
    error=EntryError, step="pull the entry again, or fit the mixture again", limit=1 << 20, depth=8
)
#: The largest embedding, float32's, and the largest number of a file: squares of their products stay finite.
_LARGEST, _LARGEST_STORED = float(np.finfo(np.float32).max), 1e30


class Assignment(NamedTuple):
    """The cluster of each embedding.

    Attributes:
        labels: int64 (N,), 0..K-1.
        probabilities: float64 (N,), of that cluster given the embedding.
    """

    labels: np.ndarray
    probabilities: np.ndarray


@dataclass(frozen=True, eq=False)
class Gaussians:
    """K Gaussians by the roots of their precisions: (x - mean) P is standard normal.

    Attributes:
        means: (K, D).
        roots: (K, D, D): P, with P P^T = Sigma^-1.
        log_dets: (K,), log |P|.
    """

    means: np.ndarray
    roots: np.ndarray
    log_dets: np.ndarray

    def log_densities(self, points: np.ndarray) -> np.ndarray:
        """The log of N(x; mu_k, Sigma_k) of every point under every Gaussian: (N, D) -> float64 (N, K)."""
        k, dim = self.means.shape
        wide = self.roots.transpose(1, 0, 2).reshape(dim, k * dim)  # one product for all roots
        z = (points @ wide).reshape(len(points), k, dim)
        z -= np.einsum("kd,kde->ke", self.means, self.roots)
        result: np.ndarray = (
            self.log_dets - dim / 2 * math.log(2 * math.pi) - 0.5 * np.einsum("nkd,nkd->nk", z, z)
        )
        return result


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Gaussians over embeddings h: with y = (h - center) @ components, of length 1 where `normalize` says so.

        log N(y; mu_k, Sigma_k) = -|(y - means[k]) P_k|^2 / 2 + log |P_k| - d / 2 log(2 pi)

    Attributes:
        weights: float64 (K,), of sum 1.
        means: float64 (K, d).
        precision_cholesky: float64 (K, d, d): P, upper triangular, P P^T = Sigma^-1.
        center: float64 (D,).
        components: float64 (D, d).
        normalize: Whether y is brought to length 1.
        spaces: Fingerprints of the spaces whose embeddings it accepts, 64 hex digits each; empty: any of width D.
        name: How messages name it.

    Examples:
        >>> mixture = embedkit.cluster("things.parquet", "dpmm", reduce="pca:4").mixture
        >>> mixture.dim, mixture.means.shape[1], len(mixture.weights) == len(mixture.means)
        (1280, 4, True)
    """

    weights: np.ndarray
    means: np.ndarray
    precision_cholesky: np.ndarray
    center: np.ndarray
    components: np.ndarray
    normalize: bool = False
    spaces: tuple[str, ...] = ()
    name: str = MIXTURE

    def __len__(self) -> int:
        """K."""
        return len(self.weights)

    @property
    def dim(self) -> int:
        """D, the width of the embeddings that it accepts."""
        return len(self.center)

    @classmethod
    def load(
        cls,
        source: bytes | str | os.PathLike[str],
        *,
        name: str | None = None,
    ) -> GaussianMixture:
        """Read `mixture.safetensors`.

        Args:
            source: The file's bytes, or its path.
            name: How messages name it; by default its path.

        Raises:
            EntryError: It cannot be read, or does not hold a mixture.

        Examples:
            >>> mixture = embedkit.cluster("things.parquet", "dpmm", reduce="pca:4").mixture
            >>> mixture.save("things.safetensors")
            >>> embedkit.GaussianMixture.load("things.safetensors").dim
            1280
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        where = name or (MIXTURE if isinstance(source, bytes) else os.fspath(source))
        try:
            data = source if isinstance(source, bytes) else read_regular(source, _MOST_BYTES)
            arrays = load(data)
        except OSError as error:
            raise EntryError(f"{where} cannot be read ({error.strerror})") from None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            reason = str(error).partition("\n")[0][:200]
            raise EntryError(f"{where} is truncated or not a mixture ({reason}); {_HEADER.step}") from None
        header = _HEADER.parse(data[8 : 8 + int.from_bytes(data[:8], "little")], f"{where}: header")
        metadata = _HEADER.fields(header.get("__metadata__", {}), f"{where}: header: __metadata__")
        transform = (
            metadata.text("transform", choices=("none", "normalize")) if "transform" in metadata else ""
        )
        spaces = metadata.text("spaces", empty=True) if "spaces" in metadata else ""
        weights, means, roots, center, components = _checked(arrays, where)
        return cls(
            weights, means, roots, center, components, transform == "normalize", tuple(spaces.split()), where
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that `load` reads.

        Raises:
            OutputError: The file cannot be written.

        Examples:
            >>> mixture = embedkit.cluster("things.parquet", "dpmm", reduce="pca:4").mixture
            >>> mixture.save("things.safetensors")
        """
        from safetensors.numpy import save

        metadata = {"transform": "normalize" if self.normalize else "none"}
        if self.spaces:
            metadata["spaces"] = " ".join(self.spaces)
        names = ("weights", "means", "precision_cholesky", "center", "components")
        content = save({key: np.ascontiguousarray(getattr(self, key)) for key in names}, metadata)
        write_file(Path(path), content)

    def take(self, order: np.ndarray) -> GaussianMixture:
        """The mixture of these clusters only, in this order.

        Examples:
            >>> mixture = embedkit.cluster("things.parquet", "dpmm", reduce="pca:4").mixture
            >>> mixture.take(np.array([0])).weights
            array([1.])
        """
        return dataclasses.replace(
            self,
            weights=self.weights[order] / self.weights[order].sum(),
            means=self.means[order],
            precision_cholesky=self.precision_cholesky[order],
        )

    @classmethod
    def _of_entry(cls, entry: VerifiedEntry) -> GaussianMixture:
        """The mixture of a zoo entry; it accepts embeddings of the spaces for which it was fitted.

        Raises:
            EntryError: The entry has none, or it is damaged.
        """
        if MIXTURE not in entry.manifest.files:
            raise EntryError(f"{entry.location} has no {MIXTURE}; use an entry of DeepDPM, or fit a mixture")
        mixture = cls.load(entry.read(MIXTURE), name=f"{entry.location}/{MIXTURE}")
        if mixture.dim != entry.config.dim:
            raise EntryError(
                f"{mixture.name} takes {mixture.dim} columns and the encoder gives {entry.config.dim}; "
                "pull the entry again"
            )
        # Training features are not normalized. If y is normalized and nothing is subtracted, lengths do not matter.
        scale_free = mixture.normalize and not mixture.center.any()
        spaces = tuple(
            space_fingerprint(entry.manifest, entry.config, normalized=normalized)
            for normalized in ((False, True) if scale_free else (False,))
        )
        return dataclasses.replace(mixture, spaces=spaces)

    def _check(self, dim: int, fingerprint: str | None, where: str = "the embeddings") -> None:
        """Refuse embeddings of another space.

        Args:
            dim: Their width.
            fingerprint: Of their space, None where it is not known.
            where: How messages name them.

        Raises:
            SpaceMismatchError: Of another width, or of a space that is not one of `spaces`.
        """
        if dim != self.dim:
            raise SpaceMismatchError(
                f"{self.name} takes embeddings of {self.dim} columns and {where} have {dim}; "
                "embed the images with the mixture's own encoder"
            )
        if self.spaces and fingerprint is not None and fingerprint not in self.spaces:
            raise SpaceMismatchError(
                f"{self.name} belongs to space {' or '.join(space[:12] for space in self.spaces)} and {where} to "
                f"{fingerprint[:12]}; embed the images with the mixture's own encoder; if that is an entry's, with "
                "--no-normalize"
            )

    def project(self, embeddings: np.ndarray) -> np.ndarray:
        """Project embeddings (N, D) to y, float64 (N, d).

        Examples:
            >>> mixture = embedkit.cluster("things.parquet", "dpmm", reduce="pca:4").mixture
            >>> mixture.project(embedkit.Embeddings.load("samples.parquet").vectors).shape
            (10, 4)
        """
        y: np.ndarray = (embeddings.astype(np.float64) - self.center) @ self.components
        if self.normalize:
            length = np.linalg.norm(y, axis=1, keepdims=True)
            y /= np.where(length > 0, length, 1)
        return y

    def assign(self, embeddings: np.ndarray) -> Assignment:
        """Assign every embedding to its most likely cluster, in blocks.

        Args:
            embeddings: float (N, D), as the encoder gives them (h).

        Raises:
            ConfigError: Not an array of rows, or numbers that are not finite.
            SpaceMismatchError: Of another width.

        Examples:
            >>> mixture = embedkit.cluster("things.parquet", "dpmm", reduce="pca:4").mixture
            >>> labels, probabilities = mixture.assign(embedkit.Embeddings.load("samples.parquet").vectors)
            >>> labels.shape, probabilities.shape
            ((10,), (10,))
        """
        try:
            embeddings = np.asarray(embeddings)
        except ValueError:
            raise ConfigError("assign: expected embeddings (N, D), found rows of unequal width") from None
        if embeddings.ndim != 2 or embeddings.dtype.kind not in "fiu":
            raise ConfigError(
                f"assign: expected embeddings (N, {self.dim}), found {embeddings.dtype} of shape {embeddings.shape}"
            )
        self._check(embeddings.shape[1], None)
        labels = np.empty(len(embeddings), np.int64)
        probabilities = np.empty(len(embeddings))
        gaussians = Gaussians(self.means, self.precision_cholesky, _log_diagonals(self.precision_cholesky))
        log_weights = np.log(self.weights)
        for rows in blocks_of(len(embeddings), len(self) * self.means.shape[1]):
            block = embeddings[rows]
            if not (float(block.max()) <= _LARGEST and float(block.min()) >= -_LARGEST):  # nor NaN
                raise ConfigError(
                    f"assign: the embeddings hold NaN, infinity or numbers above {_LARGEST:.3g}; "
                    "embed those images again"
                )
            joint = log_weights + gaussians.log_densities(self.project(block))  # (B, K)
            labels[rows] = joint.argmax(1)
            joint -= joint.max(1, keepdims=True)
            probabilities[rows] = 1 / np.exp(joint).sum(1)
        return Assignment(labels, probabilities)


def _checked(arrays: Mapping[str, np.ndarray], where: str) -> list[np.ndarray]:
    """The five arrays of a mixture as float64, with their shapes and values checked."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise EntryError(f"{where}: {what}; {_HEADER.step}")

    for key, axes in _ARRAYS.items():
        need(key in arrays, f"{key} is missing")
        kind, shape = arrays[key].dtype, arrays[key].shape
        need(kind.kind == "f", f"{key}: expected floating-point numbers, found {kind}")
        need(len(shape) == len(axes) and min(shape) > 0, f"{key}: expected shape ({axes}), found {shape}")
    found = {key: arrays[key].astype(np.float64) for key in _ARRAYS}
    letters: dict[str, int] = {}
    for key, axes in _ARRAYS.items():
        for letter, length in zip(axes, found[key].shape, strict=True):
            need(letters.setdefault(letter, length) == length, f"{key} has another shape than the others")
        most = np.abs(found[key]).max()
        need(most <= _LARGEST_STORED, f"{key}: expected numbers up to {_LARGEST_STORED:g}, found {most:g}")
    weights, roots = found["weights"], found["precision_cholesky"]
    need(
        bool((weights > 0).all()) and abs(weights.sum() - 1) < 1e-6,
        "its weights do not sum to 1, or one is not above 0",
    )
    need(
        bool((np.diagonal(roots, axis1=1, axis2=2) > 0).all()),
        "precision_cholesky: expected numbers above 0 on the diagonal",
    )
    return list(found.values())


def blocks_of(rows: int, width: int) -> Iterator[slice]:
    """Ranges of rows so small that a product of `width` columns stays below `_BLOCK` numbers."""
    step = max(1, _BLOCK // max(1, width))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _log_diagonals(roots: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(1)
    return result
