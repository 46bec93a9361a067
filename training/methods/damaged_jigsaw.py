"""Damaged jigsaw: a shuffled puzzle without colors and with one tile missing is put in order, completed and colored.

Each of the three tasks alone leaves shortcuts to the network; all at once need features that serve all three.

Source: Learning Image Representations by Completing Damaged Jigsaw Puzzles (Kim, Cho, Yoo and Kweon, WACV 2018, arXiv
1802.01880). We had its abstract, and surveys that cite it; how branches are laid out, the weights of the losses and the
order of training are ours.

Differences from the source (as far as it could be read), and what was chosen where it could not:
- Stages: for a share of the run the puzzle is only shuffled (and without color, as the tower never sees any), then it
  is damaged in full: the tower can tell parts before it is asked to paint and color them.
- The missing tile is black in the standardized input, its place is drawn without regard to the order, and the orders
  are PGL(2,8), of which two still differ in six places when any tile is missing.
- The order is told from one hidden layer over the tiles as shown, and the missing tile is painted from that same layer:
  the painter knows the order only by what the network knows. It minimizes the squared error without an adversary.
- Each other tile is colored at 4x4 places, from its features and the same hidden layer, with the classes of
  `colorization`, one a place and not weighted.
- Standardized tiles have lost brightness and contrast. Painter and colorist are told mean and deviation of the tiles
  that are there; the classifier is not, for they would be a shortcut.
- All losses are means, so that their weights are near 1: the squared error is that of normalized pixels, 1 for a
  painter of the mean color. Published weights of sums over pixels would be small.
- No BatchNorm, gaps, and whole images at export as in `jigsaw`, on lightness that the exported encoder computes.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.damaged_jigsaw`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomHorizontalFlip
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import accuracy, cross_entropy, labeled_mean
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone, BackboneRequest, StagedConvNet
from embedkit.training.models.color import ABBins, LabInput, is_gray, lab_to_rgb, rgb_to_lab
from embedkit.training.models.heads import ConvDecoder
from embedkit.training.models.permutations import PermutationSet, hamming_distances, reorder
from embedkit.training.models.tiles import TileGrid, standardize_tiles
from embedkit.training.stages import Plan, share_steps

__all__ = ["FAMILY", "SUMMARY", "Config", "DamagedJigsaw", "Puzzle", "color_loss", "painting_loss"]

#: The supervision that the method learns from.
FAMILY = "a pretext task"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Damaged jigsaw: from shuffled gray tiles of which one is missing, the network predicts the "
    "order, the missing tile and the colors. The network of one tile is exported, and takes whole "
    "images."
)

#: Places of a tile that are colored, along each side.
_PLACES = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `damaged_jigsaw`.

    Attributes:
        tiles: The grid; what a cell has more than a tile is the gap.
        permutations: The orders; any two differ in 3 places or more, so that 2 are left without the missing tile.
        shuffled: Share of the run in which no tile is missing and nothing is painted or colored.
        order_weight: Of telling the order.
        painting_weight: Of painting the missing tile.
        color_weight: Of coloring the others.
        grid: Distance of two bins of color.
        tile_dim: Width of a tile's features in the heads.
        hidden_dim: Width of the layer over all tiles.
        augment: What a whole image goes through; it should leave colors as they are.
    """

    tiles: TileGrid = TileGrid(grid=3, cell=21, tile=16)
    permutations: PermutationSet = PermutationSet(kind="pgl")
    shuffled: float = 0.3
    order_weight: float = 1.0
    painting_weight: float = 1.0
    color_weight: float = 0.5
    grid: int = 25
    tile_dim: int = 128
    hidden_dim: int = 1024
    augment: Augmentation = Compose(steps=(RandomHorizontalFlip(),))


class Puzzle(NamedTuple):
    """Tiles of N images as shown, clean; what is damaged of them is not taken away yet.

    Attributes:
        tiles: (N, T, 3, t, t), normalized RGB.
        labels: int64 (N,), in which order they are shown.
        missing: int64 (N,), at which place the tile is missing; -1 where none is.
        colored: bool (N,), whether the image has color.
    """

    tiles: Tensor
    labels: Tensor
    missing: Tensor
    colored: Tensor


@float32_loss
def painting_loss(painted: Tensor, truth: Tensor) -> Tensor:
    """The squared error of normalized pixels (N, C, t, t), meaned over all; no image, no loss."""
    return (painted - truth).square().sum() / max(1, truth.numel())


@float32_loss
def color_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy at every place of every tile that is there and has color, meaned over those tiles.

    Args:
        logits: (M, Q, h, w), one row for each tile.
        classes: int64 (M, h, w), -1 for a tile that is left out.

    Returns:
        A scalar, in nats: ln Q for equal logits.
    """
    each = F.cross_entropy(logits, classes, ignore_index=-1, reduction="none").mean((1, 2))
    return labeled_mean(each, classes[:, 0, 0])


class DamagedJigsaw(Method):
    """Backbone on the lightness of each tile; a hidden layer over all tiles; classifier, painter and colorist."""

    permutations: Tensor
    streams = ("tiles", "orders", "missing")

    @classmethod
    def build_backbone(cls, request: BackboneRequest, config: Config, facts: Facts) -> nn.Module:
        """One for lightness, without statistics over a batch, for tiles here and whole images later."""
        return request(in_chans=1, norm="layer")

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if not isinstance(backbone.net, (ResNet, StagedConvNet)):
            raise ConfigError(
                f"damaged_jigsaw: expected a convolutional backbone, which takes tiles and whole images, found "
                f"{backbone.architecture}; take r10, r18s, r50s, alexnet_bn or vgg11"
            )
        if not 0 <= config.shuffled < 1:
            raise ConfigError(
                f"damaged_jigsaw: expected a share shuffled of 0 to below 1, found {config.shuffled:g}"
            )
        self.register_buffer("permutations", config.permutations.build(config.tiles.tiles))
        distances = hamming_distances(self.permutations).fill_diagonal_(config.tiles.tiles)
        if distances.min() < 3:
            raise ConfigError(
                f"damaged_jigsaw: expected permutations that differ in 3 places or more, found two that differ in "
                f"{int(distances.min())}, which may hang on the missing tile; take pgl, agl or even"
            )
        self.to_lightness = LabInput(facts.mean, facts.std, "l")
        self.bins = ABBins(config.grid)
        count, tile, hidden = config.tiles.tiles, config.tiles.tile, config.hidden_dim
        self.to_tile = nn.Sequential(nn.Linear(backbone.dim, config.tile_dim), nn.ReLU())
        self.to_hidden = nn.Sequential(nn.Linear(count * config.tile_dim, hidden), nn.ReLU())
        self.classifier = nn.Linear(hidden, len(self.permutations))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.painter = ConvDecoder(
            hidden + 2 * count, out_chans=3, image_size=tile, width=32, start_at_zero=True
        )
        code = hidden + config.tile_dim + 2
        self.colorist = ConvDecoder(
            code, out_chans=len(self.bins), image_size=_PLACES, width=128, start_at_zero=True
        )

    def plan(self) -> Plan:
        """The shuffled puzzle, then the damaged one."""
        share = self.config.shuffled
        return share_steps(self.total_steps, (("shuffled", share), ("damaged", 1 - share)))

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The three losses, weighted; that of the order alone in the first stage."""
        x, damaged = self.view(batch.images, self.config.augment, generator), self.stage.name == "damaged"
        puzzle = self.puzzle(x, damaged, self.generator)
        if self.batches_seen <= 1 and not puzzle.colored.any():
            raise ConfigError(
                "damaged_jigsaw: the first images are all gray, and there is no color to be told"
            )
        hidden, features, stats = self.look(puzzle)
        logits = self.classifier(hidden)
        order = cross_entropy(logits.float(), puzzle.labels)
        found = {"loss": self.config.order_weight * order, "order": order}
        found["accuracy"] = accuracy(logits, puzzle.labels)
        if damaged:
            found["painting"] = painting_loss(self.paint(hidden, stats), self.missing_tiles(puzzle))
            found["color"] = color_loss(self.color(hidden, features, stats), self.color_classes(puzzle))
            found["loss"] = found["loss"] + self.config.painting_weight * found["painting"]
            found["loss"] = found["loss"] + self.config.color_weight * found["color"]
        return found

    def puzzle(self, x: Tensor, damaged: bool, generator: Callable[[str], torch.Generator]) -> Puzzle:
        """Normalized images (N, 3, H, W) -> a puzzle of each, by the generators of three purposes."""
        n, grid, device = len(x), self.config.tiles, x.device
        tiles = grid.apply(x, grid.draw(n, generator("tiles")))
        labels = torch.randint(len(self.permutations), (n,), generator=generator("orders"), device=device)
        missing = torch.randint(grid.tiles, (n,), generator=generator("missing"), device=device)
        return Puzzle(
            reorder(tiles, self.permutations[labels]),
            labels,
            missing if damaged else torch.full_like(missing, -1),
            ~is_gray(self.to_lightness.lab(x)),
        )

    def look(self, puzzle: Puzzle) -> tuple[Tensor, Tensor, Tensor]:
        """What the network knows of a puzzle: hidden (N, H), features (N, T, E), mean and deviation (N, T, 2)."""
        there = self._there(puzzle)[..., None]  # (N, T, 1)
        lightness = self.to_lightness(puzzle.tiles.flatten(0, 1)).unflatten(0, puzzle.tiles.shape[:2])
        shown = standardize_tiles(lightness) * there[..., None, None]
        features = self.to_tile(self.backbone(shown.flatten(0, 1))).unflatten(0, shown.shape[:2])
        flat = lightness.flatten(2)
        stats = torch.stack([flat.mean(2), flat.std(2, correction=0)], dim=2) * there
        return self.to_hidden(features.flatten(1)), features, stats

    def paint(self, hidden: Tensor, stats: Tensor) -> Tensor:
        """The missing tile (N, 3, t, t) of each puzzle, in normalized RGB."""
        return self.painter(torch.cat([hidden, stats.flatten(1)], dim=1))

    def color(self, hidden: Tensor, features: Tensor, stats: Tensor) -> Tensor:
        """Logits of colors of all tiles (N T, Q, 4, 4), also of the missing one, which nobody asks for."""
        every = hidden[:, None].expand(-1, features.shape[1], -1)
        return self.colorist(torch.cat([every, features, stats], dim=2).flatten(0, 1))

    def missing_tiles(self, puzzle: Puzzle) -> Tensor:
        """What is to be painted, (N, 3, t, t)."""
        return puzzle.tiles[torch.arange(len(puzzle.tiles), device=puzzle.tiles.device), puzzle.missing]

    @torch.no_grad()
    def color_classes(self, puzzle: Puzzle) -> Tensor:
        """Bins of the tiles' colors (N T, 4, 4); -1 for missing tiles and those of images without color."""
        lab = self.to_lightness.lab(puzzle.tiles.flatten(0, 1))
        classes = self.bins.nearest(F.adaptive_avg_pool2d(lab[:, 1:], _PLACES))
        known = (self._there(puzzle) & puzzle.colored[:, None]).flatten()
        return classes.masked_fill(~known[:, None, None], -1)

    def encoder(self) -> nn.Module:
        """The backbone behind the lightness of RGB."""
        return nn.Sequential(LabInput(self.facts.mean, self.facts.std, "l"), self.backbone)

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Of damaged puzzles: orders told (1 / K by chance), painting error, places colored right.

        The painting error is over that of the mean color of all images, so 1 is that of a painter who saw nothing.
        Chance of colors is the share of the most frequent bin.
        """
        puzzle = self.puzzle(self.view(batch.images), True, lambda _: generator)
        hidden, features, stats = self.look(puzzle)
        truth, classes = self.missing_tiles(puzzle), self.color_classes(puzzle)
        told, known = self.color(hidden, features, stats).argmax(1), classes >= 0
        return {
            "order_accuracy": accuracy(self.classifier(hidden), puzzle.labels),
            "painting_ratio": painting_loss(self.paint(hidden, stats), truth) / truth.square().mean(),
            "color_accuracy": accuracy(told.flatten(), classes.flatten()),
            "color_accuracy_by_chance": torch.bincount(classes[known], minlength=1).max() / known.sum(),
        }

    def pretext_chance(self) -> dict[str, float]:
        """One of K orders, and the mean color of all images."""
        return {"order_accuracy": 1 / len(self.permutations), "painting_ratio": 1.0}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Puzzles for people to look at.

        Returns:
            `damaged`, `solved` and `true`: tiles (N, T, 3, t, t) in [0, 1]: as the network sees them, put back by the
            predicted order with the colors and the tile as told, and put back by the true order.
        """
        puzzle = self.puzzle(self.view(batch.images), True, lambda _: generator)
        hidden, features, stats = self.look(puzzle)
        rows = torch.arange(len(puzzle.tiles), device=puzzle.tiles.device)
        there = self._there(puzzle)[..., None, None, None]
        size = puzzle.tiles.shape[:2]
        pixels = self.denormalize(puzzle.tiles.flatten(0, 1)).unflatten(0, size)
        lightness = rgb_to_lab(pixels.flatten(0, 1))[:, :1]
        ab = self.bins.decode(self.color(hidden, features, stats))
        ab = F.interpolate(ab, pixels.shape[-2:], mode="bilinear", align_corners=False)
        gray, colored = (
            lab_to_rgb(torch.cat([lightness, c], 1)).clamp(0, 1).unflatten(0, size) for c in (0 * ab, ab)
        )
        colored[rows, puzzle.missing] = self.denormalize(self.paint(hidden, stats))
        told = self.permutations[self.classifier(hidden).argmax(1)].argsort(1)
        true = self.permutations[puzzle.labels].argsort(1)
        return {"damaged": gray * there, "solved": reorder(colored, told), "true": reorder(pixels, true)}

    def _there(self, puzzle: Puzzle) -> Tensor:
        """Which tiles are not missing: bool (N, T)."""
        return torch.arange(puzzle.tiles.shape[1], device=puzzle.missing.device) != puzzle.missing[:, None]
