"""Two halves between which nothing passes: exact zeros, both targets by hand, and what is exported."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.split_brain import Config, SplitBrain, cross_channel_loss, lightness_bins
from embedkit.training.models.backbones import BackboneRequest, create_backbone
from embedkit.training.models.color import ABBins, lab_to_rgb, rgb_to_lab
from embedkit.training.optim import Optimizer


def build(channels=3, seen=2, args=None, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(channels, 32, 32),
        mean=(0.5, 0.4, 0.45)[:channels],
        std=(0.25, 0.2, 0.3)[:channels],
        batch_size=16,
        steps_per_epoch=4,
        total_steps=40,
    )
    config = Config(**{"grid": 25, "size": 8, "hidden_dim": 32, "augment": Compose(steps=()), **config})
    args = {"width": 0.25} if args is None else args
    request = BackboneRequest(name="r10", in_chans=channels, image_size=(32, 32), args=args)
    method = SplitBrain(SplitBrain.build_backbone(request, config, facts), config, facts)
    method.batches_seen = seen
    return method


def photos(rows):
    return load_images(DataConfig(path="synthetic:120", image_size=32, color="rgb")).batch(
        torch.as_tensor(rows)
    )


def as_batch(images):
    rows = torch.arange(len(images))
    return Batch(images, rows, rows)


def wake(method):
    for head in method.heads:
        torch.nn.init.normal_(head[-1].weight, std=0.3)
    return method


def test_nothing_passes_between_the_halves():
    method = wake(build()).train()
    lab = method.to_lab(method.view(photos(range(4)).images)).requires_grad_()
    color, lightness = method.predict(lab)
    (of_color,) = torch.autograd.grad(color.square().sum(), lab, retain_graph=True)
    (of_lightness,) = torch.autograd.grad(lightness.square().sum(), lab)
    assert of_color[:, 0].any() and not of_color[:, 1:].any()
    assert not of_lightness[:, 0].any()
    assert of_lightness[:, 1].any() and of_lightness[:, 2].any()
    # and no parameter is learned by both
    outputs = method.loss(photos(range(4)), method.generator())
    parameters = list(method.parameters())
    touched = []
    for name in ("color", "lightness"):
        found = torch.autograd.grad(outputs[name], parameters, retain_graph=True, allow_unused=True)
        touched.append({index for index, gradient in enumerate(found) if gradient is not None})
    assert not touched[0] & touched[1] and touched[0] | touched[1] == set(range(len(parameters)))


def test_the_embedding_has_both_halves_and_each_its_part_of_the_image():
    method = build().eval()
    generator = torch.Generator().manual_seed(0)
    lab = torch.cat(
        [40 + 20 * torch.rand(4, 1, 32, 32, generator=generator), torch.zeros(4, 2, 32, 32)], dim=1
    )
    bright, warm = lab.clone(), lab.clone()
    bright[:, 0] += 10
    warm[:, 1:] = torch.tensor([15.0, 10.0])[:, None, None]
    plain, bright, warm = (method.encoder()(method.normalize(lab_to_rgb(x))) for x in (lab, bright, warm))
    first = method.backbone[0].dim
    assert plain.shape == (4, first + method.backbone[1].dim) == (4, 2 * first)
    for other, same, changed in (
        (bright, slice(first, None), slice(first)),
        (warm, slice(first), slice(first, None)),
    ):
        torch.testing.assert_close(other[:, same], plain[:, same], atol=1e-3, rtol=1e-3)
        assert (other[:, changed] - plain[:, changed]).abs().max() > 0.02


def test_both_halves_together_are_about_half_of_the_whole():
    halves = build(args={}).backbone
    whole = create_backbone("r10", in_chans=3, image_size=32)
    count = [sum(p.numel() for p in module.parameters()) for module in (halves, whole)]
    assert count[0] / count[1] == pytest.approx(0.5, abs=0.02)
    assert sum(half.dim for half in halves) == whole.dim


def test_targets_by_hand():
    lightness = torch.tensor([0.0, 1.9, 2.0, 57.3, 99.9, 100.0])
    assert lightness_bins(lightness, 50).tolist() == [0, 0, 1, 28, 49, 49]
    # the left half of the image dark red, the right half light blue, at 2x2 places
    method = build(size=2, grid=10)
    lab = torch.empty(1, 3, 32, 32)
    lab[..., :16], lab[..., 16:] = torch.tensor([[30.6, 40, 30], [70.6, -10, -20]])[:, :, None, None]
    (color, lightness), colored = method.targets(method.normalize(lab_to_rgb(lab)))
    centers = ABBins(10).centers
    assert lightness.tolist() == [[[15, 35]] * 2] and colored.tolist() == [True]
    assert centers[color[0, 0, 0]].tolist() == [40, 30] and centers[color[0, 1, 1]].tolist() == [-10, -20]
    # a place is the mean of its pixels: (30.6 + 70.6) / 2 = 50.6
    (_, lightness), _ = build(size=1).targets(method.normalize(lab_to_rgb(lab)))
    assert lightness.tolist() == [[[25]]]


def test_the_definition_and_the_first_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64)
    classes = torch.randint(3, (2, 2, 2), generator=generator)
    total = 0.0
    for h in range(2):
        for w in range(2):
            exps = [math.exp(float(v)) for v in logits[1, :, h, w]]
            total -= math.log(exps[int(classes[1, h, w])] / sum(exps))
    loss = cross_channel_loss(logits, classes, torch.tensor([False, True]))
    assert float(loss) == pytest.approx(total / 4, rel=1e-12)
    method = build()
    outputs = method.loss(photos(range(8)), method.generator())
    assert float(outputs["loss"].detach()) == pytest.approx(
        math.log(len(method.bins)) + math.log(50), rel=1e-6
    )
    assert float(outputs["lightness"].detach()) == pytest.approx(math.log(50), rel=1e-6)


def test_gray_images_are_left_out_and_gray_data_is_refused():
    method, images = wake(build()).eval(), photos(range(4)).images
    gray = images[:, :1].expand(-1, 3, -1, -1)
    alone = method.loss(as_batch(images), method.generator())["loss"]
    torch.testing.assert_close(
        method.loss(as_batch(torch.cat([images, gray])), method.generator())["loss"], alone
    )
    assert float(method.loss(as_batch(gray), method.generator())["loss"].detach()) == 0
    with pytest.raises(ConfigError, match="all gray"):
        build(seen=1).loss(as_batch(gray), method.generator())
    with pytest.raises(ConfigError, match="data.color=rgb"):
        build(channels=1)
    with pytest.raises(ConfigError, match="2 lightness_bins or more"):
        build(lightness_bins=1)


def dark_red_or_light_blue(n, seed):
    """Either tells the other."""
    generator = torch.Generator().manual_seed(seed)
    kind = (torch.rand(n, generator=generator) < 0.5)[:, None, None]
    lightness = torch.where(kind, 45.0, 65.0) + 3 * torch.randn(n, 32, 32, generator=generator)
    shade = 0.8 + 0.2 * torch.rand(n, 32, 32, generator=generator)
    lab = torch.stack([lightness, torch.where(kind, 38, 2) * shade, torch.where(kind, 25, -28) * shade], 1)
    return as_batch((lab_to_rgb(lab).clamp(0, 1) * 255).round().to(torch.uint8))


def test_color_and_lightness_of_held_out_images_are_told_above_chance():
    method, held_out = build(lightness_bins=10), dark_red_or_light_blue(40, 1)
    optimizer = Optimizer(lr=3e-3, weight_decay=0.0).create(method)
    for step in range(60):
        method.train().batches_seen = step + 2
        loss = method.loss(dark_red_or_light_blue(16, step + 2), method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = method.eval().pretext_metric(held_out, method.generator())
    for name in ("color", "lightness"):
        assert found[f"{name}_accuracy"] > 1.6 * found[f"{name}_accuracy_by_chance"], found
    images = method.solved(held_out, method.generator())
    torch.testing.assert_close(images["true"], held_out.images.float() / 255, atol=1e-2, rtol=0)
    lab = {name: rgb_to_lab(image) for name, image in images.items()}
    assert (lab["colored"] - lab["true"])[:, 1:].abs().mean() < 0.6 * lab["true"][:, 1:].abs().mean()
    truth = lab["true"][:, :1]
    assert (lab["lit"][:, :1] - truth).abs().mean() < 0.8 * (truth - truth.mean()).abs().mean()


def test_recipe():
    config = recipes.recipe("split_brain")
    assert config.method == Config() and config.method.lightness_bins == 50 and config.data.color == "rgb"
