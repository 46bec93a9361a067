"""The space that clusters live in: codes as they are, their principal components, or their UMAP embedding.

A mixture is exported over a space that a product alone reaches from the codes. UMAP gives none, so there what is
clustered (`points`) and where the mixture is exported (`space`) differ.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from embedkit._io.optional import requires
from embedkit.errors import ConfigError
from embedkit.training.models.heads import l2_normalize

__all__ = ["CodeReduction"]

Kind = Literal["none", "pca", "umap"]
Transform = Literal["none", "normalize"]


class CodeReduction(nn.Module):
    """Brings codes (N, D) to what is clustered (N, d).

    Args:
        kind: `none`, `pca` or `umap`.
        dim: D.
        reduced: d, unless `kind` is `none`.
        transform: `normalize` brings what is clustered to length 1.

    Attributes:
        width: d.
        center: (D,).
        components: (D, d), the identity unless `kind` is `pca`.
        embedded: (N, d) of the codes that it was fitted to, by UMAP; (0, d) otherwise.

    Raises:
        ConfigError: More principal components than columns.
    """

    center: Tensor
    components: Tensor
    embedded: Tensor

    def __init__(self, kind: Kind, dim: int, reduced: int, transform: Transform) -> None:
        super().__init__()
        if kind == "pca" and not 1 <= reduced <= dim:
            raise ConfigError(
                f"method.reduce_dim: {dim} columns have 1 to {dim} principal components, found {reduced}; change it, "
                "or name the run or the entry of a wider encoder by method.weights"
            )
        self.kind, self.transform = kind, transform
        self.width = dim if kind == "none" else reduced
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("components", torch.eye(dim, reduced if kind == "pca" else dim))
        self.register_buffer("embedded", torch.zeros(0, self.width))

    @property
    def linear(self) -> bool:
        """Whether a product reaches what is clustered, so that its Gaussians are those of `space`."""
        return self.kind != "umap"

    @property
    def space_transform(self) -> Transform:
        """What `space` does behind its product."""
        return self.transform if self.linear else "none"

    @torch.no_grad()
    def fit(self, codes: Tensor, seed: int) -> None:
        """Learn from codes (N, D) what there is to learn; `seed` is UMAP's."""
        if self.kind == "pca":
            self.center = codes.mean(0)
            centerd = codes.double() - self.center
            axes = torch.linalg.eigh(centerd.T @ centerd)[1].flip(1)  # the widest first
            self.components = axes[:, : self.width].float().contiguous()
        if self.kind == "umap":
            self.embedded = _umap(codes, self.width, seed)

    def resize(self, codes: int) -> None:
        """Make room for the UMAP embedding of so many codes, before the weights of a checkpoint are loaded."""
        self.embedded = self.embedded.new_zeros(codes, self.width)

    def space(self, codes: Tensor) -> Tensor:
        """Where a mixture is exported: (N, D) -> (N, d), or (N, D) for UMAP."""
        reduced = (codes - self.center) @ self.components
        return l2_normalize(reduced) if self.space_transform == "normalize" else reduced

    def points(self, codes: Tensor) -> Tensor:
        """What is clustered: the codes (N, D) that it was fitted to -> (N, d)."""
        if self.linear:
            return self.space(codes)
        return l2_normalize(self.embedded) if self.transform == "normalize" else self.embedded


def _umap(codes: Tensor, dim: int, seed: int) -> Tensor:
    """UMAP with 20 neighbors and no minimal distance, as in the authors' code; one thread, so that it repeats."""
    with requires("reduce=umap", "train,cpu", package="umap-learn"):
        from umap import UMAP
    threads = torch.get_num_threads()
    found = UMAP(n_neighbors=20, min_dist=0.0, n_components=dim, random_state=seed, n_jobs=1)
    embedded = found.fit_transform(codes.cpu().numpy())
    # numba's start of its own threads changes OpenMP's number, which is torch's too
    torch.set_num_threads(threads)
    return torch.from_numpy(embedded).float().to(codes.device)
