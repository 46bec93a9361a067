"""Holes, loss inside them alone, nothing hidden reaches the network, channels apart, and an adversary to order."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.augment import Compose
from embedkit.training.config import Facts, with_overrides
from embedkit.training.data import DataConfig, load_images
from embedkit.training.methods.context_encoder import (
    ChannelWise,
    Config,
    ContextEncoder,
    adversarial_losses,
    center_hole,
    inpainting_loss,
    random_blocks,
)
from embedkit.training.models.backbones import create_backbone

FACTS = Facts(
    image_shape=(3, 32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), batch_size=8, steps_per_epoch=4, total_steps=40
)  # fmt: skip


def build(name="r10", wake=True, **config):
    torch.manual_seed(0)
    backbone = create_backbone(name, in_chans=3, image_size=32, **({"width": 0.5} if name == "r10" else {}))
    method = ContextEncoder(backbone, Config(augment=Compose(steps=()), decoder_width=8, **config), FACTS)
    if wake:  # what is painted starts at the mean of the data
        torch.manual_seed(1)
        torch.nn.init.normal_(method.paint[1][-1].weight, std=0.1)
    return method


def batch(n=8):
    return load_images(DataConfig(path="synthetic:40", color="rgb", image_size=32)).batch(torch.arange(n))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_random_blocks_hide_a_fifth_to_a_quarter():
    hidden = random_blocks(600, 32, 32, 0.2, seeded())
    assert hidden.shape == (600, 1, 32, 32)
    shares = hidden.float().mean((1, 2, 3))
    assert 0.2 <= float(shares.min()) and float(shares.max()) < 0.2 + 1 / 16
    assert len({tuple(mask.flatten().tolist()) for mask in hidden}) == 600  # each image its own
    assert float(hidden.float().mean(0).min()) > 0  # every place is hidden in some image
    assert torch.equal(hidden, random_blocks(600, 32, 32, 0.2, seeded()))
    half = random_blocks(100, 48, 32, 0.5, seeded()).float().mean((1, 2, 3))
    assert 0.5 <= float(half.min()) and float(half.max()) < 0.5 + 64 / 1536


def test_the_center_has_a_visible_band_of_ten_times_the_weight():
    hidden, weight = center_hole(32, 32, 2, 10.0)
    for row in range(32):
        for column in range(32):
            in_hole = 8 <= row < 24 and 8 <= column < 24
            inside = 10 <= row < 22 and 10 <= column < 22
            assert bool(hidden[0, 0, row, column]) == inside
            assert float(weight[0, 0, row, column]) == (1.0 if inside else 10.0 if in_hole else 0.0)
    hidden, weight = center_hole(32, 32, 0, 10.0)
    assert torch.equal(weight, hidden.float()) and int(hidden.sum()) == 256


def test_the_loss_by_a_loop_and_by_hand():
    painted, x = torch.randn(2, 3, 2, 4, 4, generator=seeded(), dtype=torch.float64)
    weight = torch.tensor([0.0, 1.0, 10.0], dtype=torch.float64)[
        torch.randint(3, (3, 1, 4, 4), generator=seeded(1))
    ]
    total = 0.0
    for n in range(3):
        errors, pixels = 0.0, 0
        for r in range(4):
            for c in range(4):
                w = float(weight[n, 0, r, c])
                pixels += w > 0
                errors += w * sum(float(painted[n, k, r, c] - x[n, k, r, c]) ** 2 for k in range(2)) / 2
        total += errors / pixels / 3
    assert float(inpainting_loss(painted, x, weight)) == pytest.approx(total, rel=1e-12)
    # 12x12 hidden pixels off by 2, a band of 112 of ten times the weight off by 1
    hidden, weight = center_hole(32, 32, 2, 10.0)
    off = torch.where(hidden, 2.0, 1.0)
    assert float(inpainting_loss(off, torch.zeros(1, 1, 32, 32), weight)) == pytest.approx(
        (144 * 4 + 112 * 10) / 256
    )


def test_outside_the_hole_nothing_counts_and_inside_all():
    x = torch.randn(4, 3, 32, 32, generator=seeded())
    weight = random_blocks(4, 32, 32, 0.2, seeded(1)).float()
    hole = weight.expand_as(x) > 0
    wrong = x + torch.randn(x.shape, generator=seeded(2))
    outside = torch.where(hole, x, wrong)  # right in the hole, wrong around it
    assert float(inpainting_loss(outside, x, weight)) == 0.0
    loss = inpainting_loss(wrong, x, weight)
    assert torch.equal(inpainting_loss(torch.where(hole, wrong, 99.0), x, weight), loss)
    painted = wrong.requires_grad_()
    inpainting_loss(painted, x, weight).backward()
    assert torch.equal(painted.grad != 0, hole)
    with torch.autocast("cpu", torch.bfloat16):
        found = inpainting_loss(wrong.detach().bfloat16(), x, weight)
    torch.testing.assert_close(found, inpainting_loss(wrong.detach().bfloat16().float(), x, weight))


@pytest.mark.parametrize("hole", ["blocks", "center"])
def test_the_method_judges_its_hole_alone(hole):
    method, images = build(hole=hole), batch()
    x = method.view(images.images)
    hidden, weight = method._hole(8, method.generator("hole"))
    painted = method._painted(x, hidden)
    found = method.loss(images, method.generator())["loss"]
    torch.testing.assert_close(found, inpainting_loss(painted, x, weight))
    assert bool((hidden <= (weight > 0)).all())
    if hole == "blocks":
        assert torch.equal(weight, hidden.float())
    # what is painted around the hole changes nothing
    paint = method._painted
    method._painted = lambda x, hidden: paint(x, hidden) + 9.0 * (weight == 0)
    torch.testing.assert_close(method.loss(images, method.generator())["loss"], found)
    method._painted = lambda x, hidden: x
    assert float(method.loss(images, method.generator())["loss"]) == 0.0


def test_hidden_pixels_do_not_reach_the_network():
    method = build().eval()
    x = torch.randn(4, 3, 32, 32, generator=seeded(), requires_grad=True)
    hidden, _ = method._hole(4, method.generator("hole"))
    method._painted(x, hidden).square().sum().backward()
    assert not x.grad[hidden.expand_as(x)].any()
    assert x.grad[~hidden.expand_as(x)].any()
    other = torch.where(hidden, torch.randn(x.shape, generator=seeded(1)), x.detach())
    torch.testing.assert_close(method._painted(other, hidden), method._painted(x, hidden).detach())


def test_a_channel_knows_all_its_places_and_no_other_channel():
    layer = ChannelWise(5, 12)
    assert layer.weight.numel() == 5 * 12**2
    x = torch.randn(2, 5, 3, 4, generator=seeded(), requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y[0, 2].sum().backward()
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[0, 2] = True
    assert torch.equal(x.grad != 0, expected)
    by_loop = sum(
        float(w * v) for w, v in zip(layer.weight[2, 7].detach(), x[0, 2].detach().flatten(), strict=True)
    )
    assert float(y[0, 2].flatten()[7].detach()) == pytest.approx(by_loop, rel=1e-4)


def test_the_first_paint_is_the_mean_of_the_data():
    method, images = build(wake=False), batch()
    x = method.view(images.images)
    _, weight = method._hole(8, method.generator("hole"))
    expected = inpainting_loss(torch.zeros_like(x), x, weight)
    torch.testing.assert_close(method.loss(images, method.generator())["loss"].detach(), expected)
    assert float(method.pretext_metric(images, seeded())["hole_explained"].detach()) == pytest.approx(0.0)
    method._painted = lambda x, hidden: x
    assert float(method.pretext_metric(images, seeded())["hole_explained"]) == 1.0


def test_adversarial_losses_by_hand():
    zero, log_3 = torch.zeros(4), torch.full((4,), math.log(3))
    assert adversarial_losses(zero, zero).tolist() == pytest.approx([2 * math.log(2), math.log(2)])
    # D is right, 3/4 and 1/4
    assert adversarial_losses(log_3, -log_3).tolist() == pytest.approx([2 * math.log(4 / 3), math.log(4)])


def test_an_adversary_sees_the_hole_alone_and_can_be_left_out(monkeypatch):
    plain, images = build(hole="center"), batch()
    assert not hasattr(plain, "discriminator") and plain.automatic_optimization
    assert list(plain.networks()) == ["all"] and plain.loss(images, plain.generator()).keys() == {"loss"}
    method, seen, given = build(hole="center", adversarial_weight=0.5), [], {}
    method.discriminator.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    monkeypatch.setattr(method, "step", given.update)
    monkeypatch.setattr(method, "log_dict", lambda values: None)
    method.training_step(images, 0)
    x = method.view(images.images)
    hidden, weight = method._hole(8, method.generator("hole"))
    assert [len(images) for images in seen] == [8, 8] and not seen[1][(weight == 0).expand_as(x)].any()
    torch.testing.assert_close(seen[0], x * (weight > 0))
    torch.testing.assert_close(seen[1], build(hole="center")._painted(x, hidden) * (weight > 0))
    with torch.no_grad():
        logits = [method.discriminator(images) for images in tuple(seen)]
    d_loss, fooled = adversarial_losses(*logits)
    reconstruction = plain.loss(images, plain.generator())["loss"].detach()
    expected = {"painter": reconstruction + 0.5 * fooled, "discriminator": d_loss}
    assert given.keys() == method.networks().keys() == expected.keys()
    for name, loss in given.items():
        torch.testing.assert_close(loss.detach(), expected[name], rtol=1e-4, atol=1e-5)


def test_bad_settings_are_refused():
    for config, message in (
        ({"hole": "circle"}, "hole: expected blocks or center, found 'circle'"),
        ({"hidden_share": 0.95}, "hidden_share above 0 and below 0.9"),
        ({"overlap": 8}, "overlap of 0 to below 8 pixels"),
        ({"overlap_weight": 0.0}, "overlap_weight above 0"),
        ({"name": "vit_t4"}, "no last map"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**config)


def test_a_run_with_an_adversary(tmp_path):
    settings = [
        "threads=1", "batch_size=16", "data.image_size=32", "steps=8", "data.validation=0.2", "method.decoder_width=4",
        "backbone_args.width=0.25", "log_every=1",
    ]  # fmt: skip
    config = with_overrides(recipes.recipe("context_encoder:adversarial"), settings)
    result = run.train(config, data="synthetic:100", out=tmp_path / "run", progress=False)
    names = {"painter_loss", "discriminator_loss", "reconstruction", "validation_hole_explained"}
    assert result.finished and names <= result.metrics.keys()
