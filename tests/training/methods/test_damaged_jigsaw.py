"""What is damaged stays unknown: no pixel of the missing tile, no color, no brightness; and three losses by others."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.colorization import class_loss
from embedkit.training.methods.damaged_jigsaw import (
    Config,
    DamagedJigsaw,
    color_loss,
    painting_loss,
)
from embedkit.training.methods.jigsaw import jigsaw_loss
from embedkit.training.models.backbones import BackboneRequest
from embedkit.training.models.permutations import PermutationSet, hamming_distances, reorder
from embedkit.training.models.tiles import TileGrid
from embedkit.training.optim import Optimizer

SMALL = {"tiles": TileGrid(grid=3, cell=10, tile=8), "tile_dim": 16, "hidden_dim": 32, "shuffled": 0.25}


def build(channels=3, seen=30, backbone="r10", args=None, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(channels, 32, 32),
        mean=(0.5, 0.4, 0.45)[:channels],
        std=(0.25, 0.2, 0.3)[:channels],
        batch_size=16,
        steps_per_epoch=4,
        total_steps=40,
    )
    config = Config(**{**SMALL, "augment": Compose(steps=()), **config})
    args = {"width": 0.25} if args is None else args
    request = BackboneRequest(name=backbone, in_chans=channels, image_size=(32, 32), args=args)
    method = DamagedJigsaw(DamagedJigsaw.build_backbone(request, config, facts), config, facts)
    method.batches_seen = seen  # 10 of 40 are of the first stage
    return method


def wake(method):
    for layer in (method.classifier, method.painter.to_pixels, method.colorist.to_pixels):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return method


def photos(rows):
    return load_images(DataConfig(path="synthetic:120", image_size=32, color="rgb")).batch(
        torch.as_tensor(rows)
    )


def puzzle_of(method, rows=range(6), damaged=True):
    return method.puzzle(method.view(photos(rows).images), damaged, method.generator)


def outputs(method, puzzle):
    hidden, features, stats = method.look(puzzle)
    color = method.color(hidden, features, stats).unflatten(0, puzzle.tiles.shape[:2])
    return {"order": method.classifier(hidden), "painting": method.paint(hidden, stats), "color": color}


# --- what the network does not see ----------------------------------------------------------------------------


def test_no_pixel_of_the_missing_tile_reaches_any_branch():
    method = wake(build()).train()
    puzzle = puzzle_of(method)
    tiles = puzzle.tiles.clone().requires_grad_()
    found = outputs(method, puzzle._replace(tiles=tiles))
    rows = torch.arange(len(tiles))
    for name, value in found.items():
        (gradient,) = torch.autograd.grad(value.square().sum(), tiles, retain_graph=True)
        assert not gradient[rows, puzzle.missing].any(), name
        assert gradient.flatten(2).any(2).sum() == 8 * len(tiles), name  # and every other tile does
    other = puzzle.tiles.clone()
    other[rows, puzzle.missing] = torch.randn_like(other[rows, puzzle.missing])
    for name, value in outputs(method, puzzle._replace(tiles=other)).items():
        assert torch.equal(value, found[name]), name


def test_no_color_reaches_any_branch_and_no_brightness_the_order():
    method = wake(build())
    puzzle = puzzle_of(method)
    lab = method.to_lightness.lab(puzzle.tiles.flatten(0, 1)).unflatten(0, puzzle.tiles.shape[:2])
    method.to_lightness.lab = lambda x: x  # from here on tiles are L, a and b
    lab.requires_grad_()
    found = outputs(method, puzzle._replace(tiles=lab))
    for name, value in found.items():
        (gradient,) = torch.autograd.grad(value.square().sum(), lab, retain_graph=True)
        assert gradient[:, :, 0].any() and not gradient[:, :, 1:].any(), name
    scale = 0.5 + torch.rand(*lab.shape[:2], 1, 1, 1, generator=torch.Generator().manual_seed(0))
    brighter = outputs(method, puzzle._replace(tiles=lab.detach() * scale + 5))
    torch.testing.assert_close(brighter["order"], found["order"], atol=1e-4, rtol=1e-4)
    for name in ("painting", "color"):  # who paint and color are told
        assert not torch.allclose(brighter[name], found[name], atol=1e-2), name


def test_features_of_a_tile_hang_on_that_tile_alone_in_training():
    method = build().train()
    puzzle = puzzle_of(method, range(3))
    tiles = puzzle.tiles.clone().requires_grad_()
    features = method.look(puzzle._replace(tiles=tiles, missing=torch.full((3,), 8)))[1]
    (gradient,) = torch.autograd.grad(features[1, 4].square().sum(), tiles)
    assert gradient[1, 4].any()
    gradient[1, 4] = 0
    assert not gradient.any()


def test_eight_tiles_are_enough_to_tell_the_order():
    permutations = build().permutations
    for missing in range(9):
        visible = torch.arange(9) != missing
        distances = hamming_distances(permutations[:, visible]).fill_diagonal_(9)
        assert distances.min() == 6
    with pytest.raises(ConfigError, match="found two that differ in 2"):
        build(tiles=TileGrid(grid=2, cell=16, tile=12), permutations=PermutationSet(kind="all"))


def test_the_missing_place_is_uniform_and_says_nothing_of_the_order():
    method = build(tiles=TileGrid(grid=2, cell=16, tile=12), permutations=PermutationSet(kind="even"))
    counts = torch.zeros(12, 4)
    x = torch.zeros(600, 3, 32, 32)
    for step in range(3):
        method.batches_seen = step
        puzzle = method.puzzle(x, True, method.generator)
        counts += torch.bincount(4 * puzzle.labels + puzzle.missing, minlength=48).view(12, 4)
    expected = 1800 / 48
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 47 + 4 * math.sqrt(2 * 47)


# --- losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", ["order", "painting", "color"])
def test_with_two_weights_of_0_the_loss_is_that_of_the_one_task(only):
    weights = {f"{name}_weight": float(name == only) for name in ("order", "painting", "color")}
    method = wake(build(**weights))
    puzzle = puzzle_of(method)
    found = outputs(method, puzzle)
    seen = torch.arange(9) != puzzle.missing[:, None]
    missing = puzzle.tiles[~seen]
    lab = method.to_lightness.lab(puzzle.tiles[seen])
    target = method.bins.soft(torch.nn.functional.adaptive_avg_pool2d(lab[:, 1:], 4), 1)
    expected = {
        "order": jigsaw_loss(found["order"], puzzle.labels),
        "painting": (found["painting"] - missing).square().mean(),
        "color": class_loss(
            found["color"][seen],
            target,
            torch.ones(len(method.bins)),
            torch.ones(len(target), dtype=torch.bool),
        ),
    }
    loss = method.loss(photos(range(6)), method.generator())["loss"]
    torch.testing.assert_close(loss, expected[only])


def test_weights_are_of_the_sum_and_the_first_losses_are_known():
    method = build(order_weight=2.0, painting_weight=3.0, color_weight=0.5)
    found = {
        name: float(value.detach())
        for name, value in method.loss(photos(range(8)), method.generator()).items()
    }
    assert found["order"] == pytest.approx(math.log(504), rel=1e-6)
    assert found["color"] == pytest.approx(math.log(len(method.bins)), rel=1e-6)
    missing = method.missing_tiles(puzzle_of(method, range(8)))
    assert found["painting"] == pytest.approx(float(missing.square().mean()), rel=1e-5)
    assert found["loss"] == pytest.approx(
        2 * found["order"] + 3 * found["painting"] + 0.5 * found["color"], rel=1e-6
    )


def test_pure_losses_by_hand():
    painted = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 0.0]]]], dtype=torch.float64)
    assert float(painting_loss(painted, torch.zeros_like(painted))) == pytest.approx(5 / 4)
    assert float(painting_loss(painted[:0], painted[:0])) == 0
    logits = torch.tensor([[0.0, math.log(3)], [5.0, 0.0], [0.0, 0.0]], dtype=torch.float64)[..., None, None]
    classes = torch.tensor([1, -1, 0])[:, None, None]
    assert float(color_loss(logits, classes)) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-12)


def test_gray_images_are_ordered_and_painted_but_not_colored():
    method, images = wake(build()), photos(range(4)).images
    gray = images[:, :1].expand(-1, 3, -1, -1)
    batch = Batch(torch.cat([images, gray]), torch.zeros(8).long(), torch.arange(8))
    puzzle = method.puzzle(method.view(batch.images), True, method.generator)
    classes = method.color_classes(puzzle).unflatten(0, (8, 9))
    assert (classes[4:] == -1).all() and (classes[:4].flatten(2) >= 0).all(2).sum() == 4 * 8
    assert torch.isfinite(method.loss(batch._replace(images=gray), method.generator())["loss"])
    with pytest.raises(ConfigError, match="all gray"):
        build(seen=1).loss(batch._replace(images=gray), method.generator())
    with pytest.raises(ConfigError, match="data.color=rgb"):
        build(channels=1)


# --- stages ---------------------------------------------------------------------------------------------------


def test_first_a_puzzle_is_only_shuffled():
    method = build(seen=10)
    assert method.plan() == [("shuffled", 10), ("damaged", 30)]
    found = method.loss(photos(range(6)), method.generator())
    assert found.keys() == {"loss", "order", "accuracy"} and torch.equal(found["loss"], found["order"])
    assert (puzzle_of(method, damaged=False).missing == -1).all()
    hidden = method.look(puzzle_of(method, damaged=False))[2]
    assert hidden.flatten(1).all()  # the statistics of all nine tiles
    method.batches_seen = 11
    assert {"painting", "color"} < method.loss(photos(range(6)), method.generator()).keys()
    assert [name for name, _ in build(shuffled=0.0).plan()] == ["damaged"]
    with pytest.raises(ConfigError, match="share shuffled of 0 to below 1"):
        build(shuffled=1.0)


def quarters(n, seed):
    """Each quarter of an image has a texture and a color of its own."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    phase = torch.randint(4, (n, 1, 1, 1), generator=generator)
    textures = torch.stack([row, column, row + column, 0 * row], dim=0)[None] + phase  # (N, 4, 16, 16)
    textures = 0.3 + 0.4 * (textures // 2 % 2) + 0.05 * torch.randn(n, 4, 16, 16, generator=generator)
    textures[:, 3] = 0.3 + 0.4 * torch.rand(n, 16, 16, generator=generator)
    colors = torch.tensor([[1.0, 0.6, 0.6], [0.6, 1, 0.6], [0.6, 0.6, 1], [1, 1, 0.5]])
    x = textures[:, :, None] * colors[:, :, None, None]  # (N, 4, 3, 16, 16)
    x = torch.cat([torch.cat([x[:, 0], x[:, 1]], 3), torch.cat([x[:, 2], x[:, 3]], 3)], 2)
    rows = torch.arange(n)
    return Batch((x.clamp(0, 1) * 255).to(torch.uint8), rows, rows)


def test_held_out_puzzles_are_ordered_painted_and_colored_above_chance():
    method = build(tiles=TileGrid(grid=2, cell=16, tile=12), permutations=PermutationSet(kind="even"))
    optimizer = Optimizer(lr=4e-3, weight_decay=0.0).create(method)
    for step in range(70):
        method.train().batches_seen = 1 + step * 39 // 70
        method.facts = dataclasses.replace(method.facts, seed=step)
        loss = method.loss(quarters(32, step), method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = method.eval().pretext_metric(quarters(100, 1000), torch.Generator().manual_seed(0))
    assert found["order_accuracy"] > 0.25, found  # 1/12 by chance
    assert found["painting_ratio"] < 0.9, found
    assert found["color_accuracy"] > 1.2 * found["color_accuracy_by_chance"], found


def test_solved_shows_what_was_told():
    method, images = build().eval(), photos(range(4))
    generator = torch.Generator().manual_seed(5)
    puzzle = method.puzzle(method.view(images.images), True, lambda _: generator)  # what `solved` draws
    look, order = method.look, torch.nn.functional.one_hot(puzzle.labels, 504).float()
    method.look, method.classifier = lambda p: (order, *look(p)[1:]), torch.nn.Identity()
    method.paint = lambda hidden, stats: torch.zeros(4, 3, 8, 8)
    method.color = lambda hidden, features, stats: torch.zeros(36, len(method.bins), 4, 4)
    found = method.solved(images, torch.Generator().manual_seed(5))
    true = reorder(puzzle.tiles * method.std + method.mean, method.permutations[puzzle.labels].argsort(1))
    torch.testing.assert_close(found["true"], true, atol=1e-5, rtol=0)
    black = found["damaged"].flatten(2).abs().sum(2) == 0
    assert torch.equal(black.nonzero()[:, 1], puzzle.missing)
    rows = torch.arange(4)
    place = method.permutations[puzzle.labels][rows, puzzle.missing]  # where the tile belongs
    painted = method.mean.expand(4, -1, 8, 8)
    torch.testing.assert_close(found["solved"][rows, place], painted, atol=1e-5, rtol=0)


def test_exported_takes_rgb():
    method = build().eval()
    x = method.view(photos(range(2)).images)
    torch.testing.assert_close(method.encoder()(x), method.backbone(method.to_lightness(x)))
    with pytest.raises(ConfigError, match="expected a convolutional backbone"):
        build(backbone="vit_t4", args={})


def test_recipe():
    config = recipes.recipe("damaged_jigsaw")
    assert config.method.permutations == PermutationSet(kind="pgl") and config.data.color == "rgb"
    assert 3 * config.method.tiles.cell <= config.data.image_size
