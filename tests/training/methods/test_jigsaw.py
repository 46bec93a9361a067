"""Tiles that know nothing of each other, orders by their numbers, and the shortcuts by which a puzzle solves itself."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose, RandomGrayscale
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.jigsaw import Config, Jigsaw, cut_channels, jigsaw_loss
from embedkit.training.models.backbones import BackboneRequest
from embedkit.training.models.permutations import PermutationSet, reorder
from embedkit.training.models.tiles import TileGrid
from embedkit.training.optim import Optimizer

SMALL = {
    "tiles": TileGrid(grid=3, cell=10, tile=8),
    "tile_dim": 16,
    "hidden_dim": 32,
    "augment": Compose(steps=()),
}


def build(backbone="r10", size=32, channels=3, args=None, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(channels, size, size),
        mean=(0.4,) * channels,
        std=(0.25,) * channels,
        batch_size=16,
        steps_per_epoch=4,
        total_steps=40,
    )
    config = Config(**{**SMALL, **config})
    request = BackboneRequest(
        name=backbone,
        in_chans=channels,
        image_size=(size, size),
        args={"width": 0.25} if args is None else args,
    )
    return Jigsaw(Jigsaw.build_backbone(request, config, facts), config, facts)


def photos(rows, size=32):
    data = load_images(DataConfig(path="synthetic:120", image_size=size, color="rgb"))
    return data.batch(torch.as_tensor(rows))


def noise(n, channels=1, size=64, seed=0):
    """White noise, blurred a little: neighboring pixels are alike, those three pixels away are not."""
    x = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))
    for dim in (2, 3):
        x = (x + x.roll(1, dim) + x.roll(-1, dim)) / 3
    return x


def wake(method):
    """Weights of the classifier, which starts at zero."""
    torch.nn.init.normal_(method.classifier.weight, std=0.1)
    return method


# --- tiles ----------------------------------------------------------------------------------------------------


def test_a_tile_lies_in_its_own_cell_with_every_channel_and_channels_are_apart_by_the_shift():
    grid, shift = TileGrid(grid=3, cell=10, tile=6), 2
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    image = (100 * rows + columns).expand(40, 3, 32, 32)  # a pixel says where it is from
    tiles = cut_channels(image, grid, shift, torch.Generator().manual_seed(0))
    assert tiles.shape == (40, 9, 3, 6, 6)
    at_row, at_column = (
        tiles.div(100, rounding_mode="floor") - 1,
        tiles % 100 - 1,
    )  # the grid starts at pixel 1
    cells = torch.arange(9)
    for found, cell in ((at_row, cells // 3), (at_column, cells % 3)):
        inside = found - 10 * cell[None, :, None, None, None]
        assert inside.min() == 0 and inside.max() == 9  # everywhere in the cell, and in no other
        apart = found[:, :, 0, 0, 0] - found[:, :, 1, 0, 0]
        assert apart.min() == -shift and apart.max() == shift
    whole = cut_channels(image, grid, 0, torch.Generator().manual_seed(0))
    assert torch.equal(whole[:, :, 0], whole[:, :, 2])


def test_the_backbone_sees_each_tile_at_mean_0_and_deviation_1():
    method, inputs = build(), []
    method.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    method.loss(photos(range(6)), method.generator())
    (x,) = inputs
    assert x.shape == (6 * 9, 3, 8, 8)
    torch.testing.assert_close(x.mean((2, 3)), torch.zeros(54, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((2, 3), correction=0), torch.ones(54, 3), atol=1e-5, rtol=0)


def test_features_of_a_tile_hang_on_that_tile_alone_in_training():
    method = build().train()
    tiles = cut_channels(
        method.view(photos(range(3)).images), method.config.tiles, 0, method.generator("tiles")
    )
    tiles.requires_grad_()
    features = method.tile_features(tiles)
    for n, tile in ((0, 0), (2, 5)):
        (gradient,) = torch.autograd.grad(features[n, tile].square().sum(), tiles, retain_graph=True)
        assert gradient[n, tile].abs().sum() > 0
        gradient[n, tile] = 0
        assert not gradient.any()
    other = tiles.detach().clone()
    other[0, 1:] = torch.rand_like(other[0, 1:])
    assert torch.equal(method.tile_features(other)[0, 0], features[0, 0])
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in method.modules())


def test_constant_tiles_have_finite_features():
    method = build()
    black = Batch(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long(), torch.arange(4))
    method.loss(black, method.generator())["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


# --- shortcuts ------------------------------------------------------------------------------------------------


def solve_by_edges(tiles, permutations):
    """Which order makes the edges of neighbors most alike: no network, no knowledge of images."""

    def unlike(one, other):  # (N, T, C, t) twice -> (N, T, T)
        return (one[:, :, None] - other[:, None]).abs().flatten(3).mean(3)

    right, down = unlike(tiles[..., -1], tiles[..., 0]), unlike(tiles[..., -1, :], tiles[..., 0, :])
    place = permutations.argsort(1)  # (K, T), where tile i is shown
    score = 0
    for i in range(9):
        if i % 3 < 2:
            score = score + right[:, place[:, i], place[:, i + 1]]
        if i < 6:
            score = score + down[:, place[:, i], place[:, i + 3]]
    return score.argmin(1)


def solved_by_edges(tiles, permutations):
    labels = torch.arange(len(tiles)) * 7 % len(permutations)
    shown = reorder(tiles, permutations[labels])
    return float((solve_by_edges(shown, permutations) == labels).float().mean())


def test_edges_that_go_on_solve_a_puzzle_without_gaps_and_not_that_of_the_recipe():
    method = recipes.recipe("jigsaw").method
    permutations, x = method.permutations.build(9), noise(60)
    without = dataclasses.replace(method.tiles, tile=method.tiles.cell)
    generator = torch.Generator().manual_seed(0)
    assert solved_by_edges(cut_channels(x, without, 0, generator), permutations) > 0.95
    assert solved_by_edges(cut_channels(x, method.tiles, 0, generator), permutations) < 0.15
    assert (
        solved_by_edges(cut_channels(x, method.tiles, method.channel_shift, generator), permutations) < 0.15
    )


def column_by_aberration(tiles):
    """In which column a tile belongs, by how far its first channel is displaced from its second: -1, 0 or 1."""
    middle = tiles[:, :, 1, :, 3:-3]
    errors = [
        (tiles[:, :, 0, :, 3 + d : tiles.shape[-1] - 3 + d] - middle).square().mean((2, 3))
        for d in range(-3, 4)
    ]
    return (torch.stack(errors).argmin(0) - 3).sign()


def test_chromatic_aberration_tells_a_tiles_place_without_remedies_and_hardly_with_those_of_the_recipe():
    method = recipes.recipe("jigsaw").method
    green = noise(60)
    red = green.clone()
    red[..., :21], red[..., 43:] = (
        green.roll(-1, 3)[..., :21],
        green.roll(1, 3)[..., 43:],
    )  # outer columns, 1 pixel
    x = torch.cat([red, green, green], dim=1)
    (gray,) = [step for step in method.augment.steps if isinstance(step, RandomGrayscale)]
    generator = torch.Generator().manual_seed(0)
    tiles = dataclasses.replace(method.tiles, cell=20, tile=16)  # clear of the seams
    truth = torch.tensor([-1, 0, 1] * 3)

    def told(x, shift):
        return float((column_by_aberration(cut_channels(x, tiles, shift, generator)) == truth).float().mean())

    assert told(x, 0) > 0.9
    assert told(x, method.channel_shift) < 0.75  # by hand 2/3: two of three draws differ by a pixel
    assert told(gray(x, generator), method.channel_shift) < 0.55  # by chance 1/3


# --- orders ---------------------------------------------------------------------------------------------------


def test_tiles_shown_in_order_k_are_tiles_of_k():
    method = wake(build()).eval()
    tiles = cut_channels(
        method.view(photos(range(4)).images), method.config.tiles, 0, method.generator("tiles")
    )
    labels = torch.tensor([3, 100, 503, 0])
    shown = reorder(tiles, method.permutations[labels])
    assert torch.equal(shown[1, 4], tiles[1, method.permutations[100, 4]])
    identity = torch.zeros(4, dtype=torch.int64)
    assert method.permutations[0].tolist() == list(range(9))
    expected = method.logits(method.tile_features(shown), identity)  # the tower on shuffled pixels
    torch.testing.assert_close(method.logits(method.tile_features(tiles), labels), expected)
    assert not torch.allclose(method.logits(method.tile_features(tiles), identity), expected)


def test_the_definition_and_ln_k_at_the_start():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, 1, 2])
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total -= math.log(math.exp(row[label]) / sum(math.exp(value) for value in row))
    assert float(jigsaw_loss(logits, labels)) == pytest.approx(total / 5, rel=1e-12)
    method = build()
    assert float(method.loss(photos(range(6)), method.generator())["loss"].detach()) == pytest.approx(
        math.log(504)
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = jigsaw_loss(logits.bfloat16(), labels)
    torch.testing.assert_close(half, jigsaw_loss(logits.bfloat16().float(), labels))


def test_several_orders_of_an_image_share_its_features():
    method, seen = build(orders=5), []
    method.backbone.register_forward_hook(lambda *args: seen.append(args[2]))
    labels = method.draw_orders(200, method.generator("orders"))
    assert labels.shape == (1000,) and labels.min() >= 0 and labels.max() < 504 and len(labels.unique()) > 400
    outputs = method.loss(photos(range(6)), method.generator())
    assert len(seen) == 1 and len(seen[0]) == 6 * 9
    assert {"loss", "accuracy"} == outputs.keys()


def test_the_orders_are_in_the_checkpoint():
    method = build(permutations=PermutationSet(kind="agl"))
    assert torch.equal(method.state_dict()["permutations"], PermutationSet(kind="agl").build(9))
    assert method.classifier.out_features == 72


def test_solved_puts_tiles_back_where_the_order_is_known():
    method, images = build(orders=2), photos(range(5))
    generator = torch.Generator().manual_seed(3)
    tiles = cut_channels(
        images.images.float() / 255, method.config.tiles, 0, torch.Generator().manual_seed(3)
    )
    method.logits = lambda features, labels: torch.nn.functional.one_hot(labels, 504).float()
    found = method.solved(images, generator)
    torch.testing.assert_close(found["solved"], tiles)
    assert not torch.allclose(found["shuffled"], tiles)
    assert method.pretext_metric(images, generator)["jigsaw_accuracy"] == 1.0


def test_held_out_puzzles_are_solved_above_chance():
    method = build(
        tiles=TileGrid(grid=2, cell=16, tile=13),
        permutations=PermutationSet(kind="even"),
        args={"width": 0.5},
    )
    optimizer = Optimizer(lr=2e-3, weight_decay=0.0).create(method)
    held_out = photos(range(100, 120))
    generator = torch.Generator().manual_seed(0)
    before = method.eval().pretext_metric(held_out, generator)["jigsaw_accuracy"]
    for step in range(60):
        method.train().batches_seen = step
        loss = method.loss(photos(torch.arange(16) + 16 * step % 96), method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = method.eval().pretext_metric(held_out, generator)["jigsaw_accuracy"]
    assert before < 0.2 < 0.35 < after  # 1/12 by chance, 160 puzzles


def test_exported_is_the_backbone_on_whole_images():
    method = build().eval()
    assert method.encoder() is method.backbone
    assert method.encoder()(method.view(photos(range(2)).images)).shape == (2, method.backbone.dim)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backbone": "vit_t4", "args": {}}, "expected a convolutional backbone"),
        ({"channel_shift": 3}, "tile of 1 to the cell's 10 pixels, found 3 and 11"),
        ({"channel_shift": -1}, "channel_shift of 0 or more"),
        ({"tiles": TileGrid(grid=2, cell=16, tile=12)}, "pgl permutes 9 tiles, and there are 4"),
    ],
)
def test_settings_that_do_not_fit(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(**wrong)


def test_recipes():
    for name, size in (("jigsaw", 64), ("jigsaw:fmnist", 28)):
        config = recipes.recipe(name)
        grid = config.method.tiles
        assert config.recipe == name and config.data.image_size == size
        assert grid.grid * grid.cell <= size and grid.cell - grid.tile >= 2 and grid.jitter == "random"
