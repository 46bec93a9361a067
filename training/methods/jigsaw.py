"""Jigsaw: an image is cut into tiles, and the network is told in which of K orders they are shown.

Each tile goes through the backbone alone; only a small head sees all of them, so what tells where a part belongs must
be in the features of that part.

Source: Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles (Noroozi and Favaro, ECCV 2016, arXiv
1603.09246), section 3 (the context-free network) and section 4.2 (shortcuts).

Differences from the source:
- Tiles are 16 pixels of cells of 21, theirs 64 of 75 in the paper (of 85 in their released configuration): as large a
  part of an image of 64 pixels, with the same share of it left between tiles.
- Permutations are the group PGL(2,8), 504 that differ in 7 places or more. The authors' greedy sets have 64 to 1000
  members which differ in 2 or 3 places at least; `greedy` sets of ours look at the smallest distance first.
- Several orders of each image are asked for in one step, over the same features, as in Revisiting Self-Supervised
  Visual Representation Learning (Kolesnikov et al., CVPR 2019). The authors ask for one.
- No BatchNorm: its statistics would join the tiles. The backbone has LayerNorm over each tile (the authors' AlexNet has
  local response normalization), the head none and no dropout.
- Against chromatic aberration channels are cut apart by a pixel and two thirds of the images lose their color, as in a
  public benchmark suite (VISSL). The authors' code shifts by up to 2 of 64 pixels, takes the color of half of the
  images, and projects half of the others onto a plane that holds no green and magenta.
- The exported encoder takes whole images, which no step has shown it: LayerNorm has no statistics that would need
  calibration, and images normalized by the data's mean and deviation are about as wide as standardized tiles.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.jigsaw`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.resnet import ResNet
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Augmentation, Compose, RandomGrayscale, RandomHorizontalFlip
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import accuracy
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import Backbone, BackboneRequest, StagedConvNet
from embedkit.training.models.permutations import PermutationSet, reorder
from embedkit.training.models.tiles import TileGrid, standardize_tiles

__all__ = ["FAMILY", "SUMMARY", "Config", "Jigsaw", "cut_channels", "jigsaw_loss"]

#: The supervision that the method learns from.
FAMILY = "a pretext task"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "Jigsaw: an image is cut into tiles, and a head over the features of all tiles predicts the "
    "order in which they are shown. The network of one tile is exported, and takes whole images."
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Of `jigsaw`.

    Attributes:
        tiles: The grid; what a cell has more than a tile is the gap.
        permutations: The K orders. They are stored in the checkpoint, since the labels are their numbers.
        channel_shift: Channels of a tile are cut apart by up to so many pixels in each direction.
        orders: In how many orders each image is shown in a step.
        tile_dim: Width of a tile's features in the head.
        hidden_dim: Width of the layer over all tiles.
        augment: What a whole image goes through.
    """

    tiles: TileGrid = TileGrid(grid=3, cell=21, tile=16)
    permutations: PermutationSet = PermutationSet(kind="pgl")
    channel_shift: int = 1
    orders: int = 8
    tile_dim: int = 128
    hidden_dim: int = 1024
    augment: Augmentation = Compose(steps=(RandomHorizontalFlip(), RandomGrayscale(p=2 / 3)))


def cut_channels(x: Tensor, grid: TileGrid, shift: int, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W) -> tiles (N, T, C, t, t), every channel of a tile from a place of its own.

    Args:
        x: Images.
        grid: Where cells and tiles are.
        shift: Greatest distance of two channels in pixels, along rows and along columns; all stay within the cell.
        generator: Of places.
    """
    offsets = dataclasses.replace(grid, tile=grid.tile + shift).draw(len(x), generator)  # (N, T, 2)
    size = (x.shape[1], *offsets.shape)
    apart = torch.randint(shift + 1, size, generator=generator, device=generator.device)  # (C, N, T, 2)
    channels = [grid.apply(x[:, c : c + 1], offsets + apart[c]) for c in range(x.shape[1])]
    return torch.cat(channels, dim=2)


@float32_loss
def jigsaw_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of -log softmax(logits)_label over all puzzles.

    Args:
        logits: (M, K).
        labels: int64 (M,), numbers of permutations.

    Returns:
        A scalar, in nats; ln K for equal logits.
    """
    return F.cross_entropy(logits, labels)


class Jigsaw(Method):
    """Backbone on each tile, a linear layer on its features, two layers over all tiles in the order shown."""

    permutations: Tensor
    streams = ("tiles", "orders")

    @classmethod
    def build_backbone(cls, request: BackboneRequest, config: Config, facts: Facts) -> nn.Module:
        """One without statistics over a batch, for tiles here and whole images later."""
        return request(norm="layer")

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if not isinstance(backbone.net, (ResNet, StagedConvNet)):
            raise ConfigError(
                f"jigsaw: expected a convolutional backbone, which takes tiles and whole images, found "
                f"{backbone.architecture}; take r10, r18s, r50s, alexnet_bn or vgg11"
            )
        if config.channel_shift < 0 or config.orders < 1:
            raise ConfigError(
                f"jigsaw: expected a channel_shift of 0 or more and 1 order or more, found "
                f"{config.channel_shift} and {config.orders}"
            )
        dataclasses.replace(config.tiles, tile=config.tiles.tile + config.channel_shift)  # fits the cell
        self.register_buffer("permutations", config.permutations.build(config.tiles.tiles))
        self.to_tile = nn.Sequential(nn.Linear(backbone.dim, config.tile_dim), nn.ReLU())
        self.to_hidden = nn.Sequential(
            nn.Linear(config.tiles.tiles * config.tile_dim, config.hidden_dim), nn.ReLU()
        )
        self.classifier = nn.Linear(config.hidden_dim, len(self.permutations))
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Cross-entropy over K orders, of several orders of each image."""
        x = self.view(batch.images, self.config.augment, generator)
        tiles = cut_channels(x, self.config.tiles, self.config.channel_shift, self.generator("tiles"))
        features, labels = self.tile_features(tiles), self.draw_orders(len(x), self.generator("orders"))
        logits = self.logits(features.repeat_interleave(self.config.orders, 0), labels)
        return {"loss": jigsaw_loss(logits, labels), "accuracy": accuracy(logits, labels)}

    def tile_features(self, tiles: Tensor) -> Tensor:
        """Tiles (N, T, C, t, t), in their own order or another -> features (N, T, E), each of its tile alone."""
        return self.to_tile(self.backbone(standardize_tiles(tiles).flatten(0, 1))).unflatten(
            0, tiles.shape[:2]
        )

    def draw_orders(self, n: int, generator: torch.Generator) -> Tensor:
        """Numbers of permutations for n images: int64 (n * orders,), those of one image side by side."""
        size = (n * self.config.orders,)
        return torch.randint(len(self.permutations), size, generator=generator, device=generator.device)

    def logits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Features (M, T, E) of tiles from top left, shown in the orders `labels` (M,) -> logits (M, K)."""
        return self.classifier(self.to_hidden(reorder(features, self.permutations[labels]).flatten(1)))

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Share of puzzles of images as they are that are solved; 1 / K by chance."""
        _, features, labels = self._puzzles(batch, generator)
        return {"jigsaw_accuracy": accuracy(self.logits(features, labels), labels)}

    def pretext_chance(self) -> dict[str, float]:
        """One of K orders."""
        return {"jigsaw_accuracy": 1 / len(self.permutations)}

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """One puzzle of each image for people to look at.

        Returns:
            `shuffled` and `solved`: tiles (N, T, C, t, t) in [0, 1] as shown, and put back by the predicted order.
        """
        tiles, features, labels = self._puzzles(batch, generator)
        logits = self.logits(features, labels)
        first = slice(None, None, self.config.orders)
        pixels = self.denormalize(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
        shuffled = reorder(pixels, self.permutations[labels[first]])
        return {
            "shuffled": shuffled,
            "solved": reorder(shuffled, self.permutations[logits[first].argmax(1)].argsort(1)),
        }

    def _puzzles(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        tiles = cut_channels(self.view(batch.images), self.config.tiles, 0, generator)
        labels = self.draw_orders(len(tiles), generator)
        return tiles, self.tile_features(tiles).repeat_interleave(self.config.orders, 0), labels
