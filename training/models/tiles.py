"""Tiles and patches of images: a grid of cells with a tile cut out of each, or overlapping patches.

Sources: the geometry of tiles, Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles (Noroozi and
Favaro, ECCV 2016, arXiv 1603.09246), section 4.2; that of overlapping patches, Contrastive Predictive Coding (van den
Oord et al., 2018, arXiv 1807.03748), section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from embedkit.errors import ConfigError

__all__ = ["TileGrid", "overlapping_patches", "standardize_tiles"]


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """A square grid of cells in the middle of an image, and a tile at a place of its own in each cell.

    Between two neighbors lie 0 to 2 * (cell - tile) pixels, so that no edge goes on from tile to tile.

    Attributes:
        grid: Cells on each side.
        cell: Side of a cell in pixels.
        tile: Side of a tile in pixels, at most that of the cell.
        jitter: `random`: anywhere in the cell; `center`: in its middle.
    """

    grid: int = 3
    cell: int = 21
    tile: int = 16
    jitter: Literal["random", "center"] = "random"

    def __post_init__(self) -> None:
        if self.grid < 1 or not 1 <= self.tile <= self.cell:
            raise ConfigError(
                f"TileGrid: expected a grid of 1 or more and a tile of 1 to the cell's {self.cell} pixels, "
                f"found {self.grid} and {self.tile}"
            )
        if self.jitter not in ("random", "center"):
            raise ConfigError(f"TileGrid.jitter: expected random or center, found {self.jitter!r}")

    @property
    def tiles(self) -> int:
        """T, of an image."""
        return self.grid**2

    def draw(self, n: int, generator: Generator) -> Tensor:
        """Where tiles stand in their cells: int64 (n, T, 2) of rows and columns, on the generator's device."""
        free = self.cell - self.tile
        if self.jitter == "center":
            return torch.full((n, self.tiles, 2), free // 2, device=generator.device)
        return torch.randint(free + 1, (n, self.tiles, 2), generator=generator, device=generator.device)

    def apply(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Images (N, C, H, W) and offsets (N, T, 2) -> tiles (N, T, C, tile, tile), row by row.

        Raises:
            ConfigError: An image smaller than the grid.
        """
        n, _, height, width = x.shape
        side = self.grid * self.cell
        if side > min(height, width):
            raise ConfigError(
                f"TileGrid: {self.grid} cells of {self.cell} pixels do not fit an image of {height}x{width}"
            )
        rows, columns = torch.meshgrid(torch.arange(self.grid), torch.arange(self.grid), indexing="ij")
        corner = torch.stack([rows.flatten(), columns.flatten()], dim=1) * self.cell  # (T, 2)
        corner = corner + torch.tensor([(height - side) // 2, (width - side) // 2])
        place = corner.to(x.device) + offsets.to(x.device)  # (N, T, 2)
        steps = torch.arange(self.tile, device=x.device)
        at_row = (place[..., 0, None] + steps)[..., :, None]  # (N, T, tile, 1)
        at_column = (place[..., 1, None] + steps)[..., None, :]  # (N, T, 1, tile)
        image = torch.arange(n, device=x.device)[:, None, None, None]
        return x.movedim(1, -1)[image, at_row, at_column].movedim(-1, 2)


def standardize_tiles(tiles: Tensor, least: float = 1e-4) -> Tensor:
    """Every channel of every tile (..., h, w) at mean 0 and variance 1, which takes brightness away as a shortcut.

    Args:
        tiles: (..., C, h, w).
        least: Below this standard deviation a tile is constant; it is only centered.
    """
    centered = tiles - tiles.mean((-2, -1), keepdim=True)
    std = centered.square().mean((-2, -1), keepdim=True).sqrt()
    return centered / torch.where(std < least, torch.ones_like(std), std)


def overlapping_patches(x: Tensor, size: int, stride: int) -> Tensor:
    """Images (N, C, H, W) -> patches (N, rows, columns, C, size, size), rows = (H - size) // stride + 1.

    Raises:
        ConfigError: A patch that is larger than the image.
    """
    if not 1 <= size <= min(x.shape[2:]) or stride < 1:
        raise ConfigError(
            f"patches of {size} pixels every {stride} do not fit an image of {tuple(x.shape[2:])}"
        )
    return x.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)
