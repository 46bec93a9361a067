"""Tiles: of their own cell, with gaps; standardized apart; patches by the formula."""

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.models.tiles import TileGrid, overlapping_patches, standardize_tiles


def test_a_tile_is_the_pixels_of_its_own_cell():
    grid = TileGrid(grid=3, cell=9, tile=6)
    cells = torch.arange(9.0).reshape(3, 3).repeat_interleave(9, 0).repeat_interleave(9, 1)
    x = torch.nn.functional.pad(cells, (1, 0, 0, 1), value=-1.0).expand(
        50, 2, 28, 28
    )  # the grid is in the middle
    x = x.roll((0, -1), (2, 3))
    offsets = grid.draw(50, torch.Generator().manual_seed(0))
    assert offsets.min() == 0 and offsets.max() == 3
    tiles = grid.apply(x, offsets)
    assert tiles.shape == (50, 9, 2, 6, 6)
    assert torch.equal(tiles.unique(), torch.arange(9.0))  # none of the border
    for place in range(9):
        assert (tiles[:, place] == place).all()


def test_a_tile_stands_where_its_offset_says():
    x = torch.rand(2, 1, 8, 8)
    grid = TileGrid(grid=2, cell=4, tile=3)
    offsets = torch.tensor([[0, 1], [1, 0], [0, 0], [1, 1]]).expand(2, 4, 2)
    tiles = grid.apply(x, offsets)
    assert torch.equal(tiles[:, 0], x[:, :, 0:3, 1:4]) and torch.equal(tiles[:, 1], x[:, :, 1:4, 4:7])
    assert torch.equal(tiles[:, 2], x[:, :, 4:7, 0:3]) and torch.equal(tiles[:, 3], x[:, :, 5:8, 5:8])
    middle = TileGrid(grid=2, cell=4, tile=2, jitter="center").draw(2, torch.Generator())
    assert (middle == 1).all()


def test_tiles_are_standardized_each_by_itself_and_constant_ones_stay_finite():
    tiles = torch.rand(3, 4, 2, 5, 5, dtype=torch.float64) * 7 + 3
    tiles[0, 0] = 0.25
    found = standardize_tiles(tiles)
    assert found.mean((-2, -1)).abs().max() < 1e-9 and not found[0, 0].any()
    torch.testing.assert_close(
        found.var((-2, -1), correction=0)[1:], torch.ones(2, 4, 2, dtype=torch.float64)
    )
    other = tiles.clone()
    other[:, 1] *= 2
    assert torch.equal(standardize_tiles(other)[:, 0], found[:, 0])


def test_patches_overlap_by_the_formula():
    x = torch.rand(2, 3, 28, 28)
    patches = overlapping_patches(x, 8, 4)
    assert patches.shape == (2, 6, 6, 3, 8, 8)  # (28 - 8) / 4 + 1
    assert torch.equal(patches[1, 2, 3], x[1, :, 8:16, 12:20])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="tile of 1 to the cell"):
        TileGrid(cell=8, tile=9)
    with pytest.raises(ConfigError, match="do not fit an image of 28x28"):
        TileGrid(grid=3, cell=10, tile=8).apply(
            torch.zeros(1, 1, 28, 28), torch.zeros(1, 9, 2, dtype=torch.int64)
        )
    with pytest.raises(ConfigError, match="do not fit"):
        overlapping_patches(torch.zeros(1, 1, 8, 8), 9, 1)
