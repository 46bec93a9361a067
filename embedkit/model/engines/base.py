"""The protocol of an engine: pixels in, embeddings or other outputs out, and the truth about what runs."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Engine(Protocol):
    """What the encoder needs of a runtime."""

    @property
    def provider(self) -> str:
        """The provider that really runs, by ONNX Runtime's name."""

    @property
    def concurrency(self) -> int:
        """How many calls of `run` are worth having in flight at once."""

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (N, C, H, W) -> float32 (N, D); called from several threads at once."""
