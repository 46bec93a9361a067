"""The protocol of an engine: pixels in, embeddings or other outputs out, and the provider that runs."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Engine(Protocol):
    """What an encoder requires from a runtime."""

    @property
    def provider(self) -> str:
        """The provider that runs, by ONNX Runtime's name."""

    @property
    def concurrency(self) -> int:
        """How many concurrent calls of `run` are useful."""

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, C, H, W) -> float32 (N, D); called from several threads at once."""

    def run_all(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (N, C, H, W) -> float32 (N, ...) by the name of each output; called as `run` is."""
