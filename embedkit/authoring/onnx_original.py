"""An ONNX file of others in ONNX Runtime: which of its outputs is the embedding, and what it gives for pixels."""

from __future__ import annotations

import numpy as np

from embedkit.authoring.onnx_file import KINDS, Images
from embedkit.errors import ConfigError, EntryError
from embedkit.model.engines.onnx import open_session
from embedkit.model.preprocess import Preprocess
from embedkit.model.providers import CPU, available_cpus

__all__ = ["POOLS", "Original", "choose_pool", "sides"]

POOLS = ("mean", "cls", "none")
_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(double)": 11}


class Original:
    """The file itself in ONNX Runtime: what it gives for an entry's pixels."""

    def __init__(self, graph: bytes, weights: bytes, taken: Images, contract: Preprocess, where: str):
        self._taken, self._contract, self._where = taken, contract, where
        self.channels_last = taken.channels_last
        try:
            self._session = open_session(graph, weights, [(CPU, {})], available_cpus())
        except Exception as error:  # ONNX Runtime's errors have no common base class
            raise EntryError(f"{where}: ONNX Runtime refuses the graph ({_reason(error)})") from None

    def choose(self, wanted: str | None, pixels: np.ndarray) -> tuple[str, tuple[int, ...], int]:
        """The output that is the embedding: its name, its shape without the batch, and its TensorProto type."""
        types = {one.name: one.type for one in self._session.get_outputs()}
        names = [wanted] if wanted is not None else list(types)
        if self.channels_last is None:
            self.channels_last = False
            try:
                self._run(pixels[:1], names)
            except EntryError:
                self.channels_last = True
        shapes = {name: rows.shape[1:] for name, rows in zip(names, self._run(pixels, names), strict=True)}
        listed = ", ".join(f"{name} {sides(shape)}" for name, shape in shapes.items())
        if wanted is None and len(shapes) > 1:
            vectors = [name for name, shape in shapes.items() if len(shape) == 1]
            if len(vectors) != 1:
                raise ConfigError(f"{self._where}: give --node, one of {listed} (each for one image)")
            names = vectors
        [name] = names
        if types[name] not in _TYPES or not 1 <= len(shapes[name]) <= 3:
            raise EntryError(
                f"{self._where}: the output {listed} is {types[name]}: expected floats of 1 to 3 axes an image"
            )
        return name, shapes[name], _TYPES[types[name]]

    def rows(self, pixels: np.ndarray, name: str, pool: str) -> np.ndarray:
        """Float32 (N, D) for uint8 (N, C, H, W), pooled."""
        [found] = self._run(pixels, [name])
        values: np.ndarray = found.astype(np.float32)
        if pool == "cls":
            return values[:, 0]
        if pool == "mean":
            spatial = ((1, 2) if self.channels_last else (2, 3)) if values.ndim == 4 else 1
            means: np.ndarray = values.mean(spatial)
            return means
        return values.reshape(len(values), -1)

    def _run(self, pixels: np.ndarray, names: list[str]) -> list[np.ndarray]:
        images = pixels
        kind = KINDS[self._taken.kind]
        if kind is not np.uint8:
            mean, std = (
                np.array(values, np.float32).reshape(1, -1, 1, 1)
                for values in (self._contract.mean, self._contract.std)
            )
            images = ((pixels.astype(np.float32) / 255 - mean) / std).astype(kind)
        if self.channels_last:
            images = images.transpose(0, 2, 3, 1)
        size = self._taken.batch or 16
        parts: list[list[np.ndarray]] = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            missing = self._taken.batch - len(part)
            if missing > 0:
                part = np.concatenate([part, np.repeat(part[-1:], missing, 0)])
            try:
                given = self._session.run(names, {self._taken.name: np.ascontiguousarray(part)})
            except Exception as error:  # as above
                shape = sides(part.shape[1:])
                raise EntryError(
                    f"{self._where} does not take images of {shape} ({_reason(error)})"
                ) from None
            if any(rows.ndim < 2 or len(rows) != len(part) for rows in given):
                raise EntryError(f"{self._where}: an output has no axis for the images of a batch")
            parts.append([rows[: len(images) - start] for rows in given])
        return [np.concatenate(rows) for rows in zip(*parts, strict=True)]


def choose_pool(wanted: str | None, shape: tuple[int, ...], name: str, where: str) -> str:
    """How an output becomes one vector an image: as asked for, or `none` where it is one.

    Args:
        wanted: `mean`, `cls`, `none`, or None.
        shape: Of the output, without the batch.
        name: Of the output.
        where: For messages.

    Raises:
        ConfigError: It is to be said, or is not possible.
    """
    if wanted not in (None, *POOLS):
        raise ConfigError(f"--pool {wanted!r}: expected one of {', '.join(POOLS)}")
    if len(shape) == 1 or (len(shape) == 3 and shape.count(1) >= 2 and wanted is None):
        if wanted in ("mean", "cls"):
            raise ConfigError(f"{where}: the output {name} is one vector an image: leave --pool {wanted} out")
        return "none"
    if wanted is None:
        parts = "mean or cls (the first)" if len(shape) == 2 else "mean"
        raise ConfigError(
            f"{where}: the output {name} has {sides(shape)} numbers an image: give --pool {parts}, or another --node"
        )
    if wanted == "cls" and len(shape) != 2:
        raise ConfigError(f"{where}: the output {name}, {sides(shape)}, has no class token: give --pool mean")
    return wanted


def sides(shape: tuple[int, ...]) -> str:
    """A shape in words, such as 3x224x224."""
    return "x".join(map(str, shape))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
