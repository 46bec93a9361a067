"""Colors as classes: both losses by a loop, gray images without effect, and a network that never sees a color."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.colorization import (
    ABClasses,
    Colorization,
    Config,
    HueChroma,
    class_loss,
    hue_chroma_loss,
)
from embedkit.training.models.backbones import BackboneRequest
from embedkit.training.models.color import ABBins, lab_to_rgb, rgb_to_lab
from embedkit.training.optim import Optimizer

SOFT = ABClasses(grid=25, neighbors=5, mix=0.5)
FORMS = pytest.mark.parametrize("target", [SOFT, HueChroma(bins=8, locations=20)], ids=["zhang", "larsson"])


def build(channels=3, seen=2, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(channels, 32, 32),
        mean=(0.5, 0.4, 0.45)[:channels],
        std=(0.25, 0.2, 0.3)[:channels],
        batch_size=16,
        steps_per_epoch=4,
        total_steps=40,
    )
    config = Config(**{"size": 8, "hidden_dim": 32, "augment": Compose(steps=()), **config})
    request = BackboneRequest(name="r10", in_chans=channels, image_size=(32, 32), args={"width": 0.25})
    method = Colorization(Colorization.build_backbone(request, config, facts), config, facts)
    method.batches_seen = seen
    return method


def photos(rows):
    return load_images(DataConfig(path="synthetic:120", image_size=32, color="rgb")).batch(
        torch.as_tensor(rows)
    )


def as_batch(images):
    rows = torch.arange(len(images))
    return Batch(images, rows, rows)


def recolored(n=6, seed=0):
    """Pairs of images of one lightness and different colors, normalized by `method`, not rounded."""
    generator = torch.Generator().manual_seed(seed)
    lab = torch.cat(
        [40 + 20 * torch.rand(n, 1, 32, 32, generator=generator), torch.zeros(n, 2, 32, 32)], dim=1
    )
    one, other = lab.clone(), lab.clone()
    one[:, 1], other[:, 2] = 20, -15
    return lab_to_rgb(one), lab_to_rgb(other)


# --- losses ---------------------------------------------------------------------------------------------------


def test_equation_2_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 2, 2, generator=generator, dtype=torch.float64)
    target = torch.rand(3, 4, 2, 2, generator=generator, dtype=torch.float64)
    target = target / target.sum(1, keepdim=True)
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
    total = 0.0
    for n in (0, 2):  # image 1 is gray
        for h in range(2):
            for w in range(2):
                exps = [math.exp(float(v)) for v in logits[n, :, h, w]]
                z = target[n, :, h, w].tolist()
                v = weights[z.index(max(z))]
                total -= float(v) * sum(a * math.log(e / sum(exps)) for a, e in zip(z, exps, strict=True))
    loss = class_loss(logits, target, weights, torch.tensor([True, False, True]))
    assert float(loss) == pytest.approx(total / 8, rel=1e-12)


def test_hue_and_chroma_by_hand():
    # a = 50, b = 0: hue 0 is the middle of the circle, chroma a half; with 4 bins both are bin 2
    ab = torch.tensor([[50.0, 0.0]], dtype=torch.float64)[..., None]
    hue = torch.tensor([[0.0, 0.0, math.log(3), 0.0]], dtype=torch.float64)[..., None]  # 3/6
    chroma = torch.zeros(1, 4, 1, dtype=torch.float64)
    known = torch.tensor([True])
    loss = hue_chroma_loss(hue, chroma, ab, 5.0, known)
    assert float(loss) == pytest.approx(math.log(4) + 5 * 0.5 * math.log(2), rel=1e-12)
    # what has no chroma has no hue
    hue.requires_grad_()
    hue_chroma_loss(hue, chroma, 0 * ab, 5.0, known).backward()
    assert not hue.grad.any()
    # b = -50 is a quarter turn down: bin 1
    down = torch.tensor([[0.0, -50.0]], dtype=torch.float64)[..., None]
    expected = math.log(4) + 5 * 0.5 * math.log(6)
    assert float(hue_chroma_loss(hue.detach(), chroma, down, 5.0, known)) == pytest.approx(
        expected, rel=1e-12
    )


def test_gray_images_have_no_effect_and_gray_data_is_refused():
    method, images = build(target=SOFT), photos(range(4)).images
    gray = images[:, :1].expand(-1, 3, -1, -1)
    prior = {}
    for name, batch in {"colors": images, "both": torch.cat([images, gray])}.items():
        twin = build(target=SOFT).eval()  # BatchNorm sees all images
        twin.prior += torch.arange(len(twin.prior)) + 1.0
        prior[name] = float(twin.loss(as_batch(batch), twin.generator())["loss"].detach())
    assert prior["colors"] == pytest.approx(prior["both"], rel=1e-5)
    loss = method.loss(as_batch(gray), method.generator())["loss"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(
        torch.isfinite(p.grad).all() and not p.grad.any() for p in method.parameters() if p.grad is not None
    )
    with pytest.raises(ConfigError, match="all gray"):
        first = build(seen=1)
        first.loss(as_batch(gray), first.generator())
    with pytest.raises(ConfigError, match="data.color=rgb"):
        build(channels=1)


def test_the_first_losses():
    one = build(target=ABClasses(grid=25))
    loss = float(one.loss(photos(range(8)), one.generator())["loss"].detach())
    assert loss == pytest.approx(math.log(len(one.bins)), rel=1e-6)
    # weights have a mean of 1 over the places that they were counted on
    hard = build(target=ABClasses(grid=25, mix=0.5))
    loss = float(hard.loss(photos(range(8)), hard.generator())["loss"].detach())
    assert loss == pytest.approx(math.log(len(hard.bins)), rel=1e-4)


# --- what the network sees ------------------------------------------------------------------------------------


@FORMS
def test_color_never_enters_the_network(target):
    method = build(target=target).eval()
    one, other = (method.normalize(x) for x in recolored())
    torch.nn.init.normal_(method.head[-1].weight)
    a, b = (method.head(method.features(x)) for x in (one, other))
    torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
    assert not torch.allclose(method.colors(one)[0], method.colors(other)[0], atol=5)
    assert next(method.backbone.parameters()).shape[1] == 1
    # and exactly: the gradient of what the network sees, with respect to a and b at fixed L, is 0
    lab = rgb_to_lab(recolored()[0]).requires_grad_()
    method.lightness.lab = lambda x: x
    (gradient,) = torch.autograd.grad(method.features(lab).square().sum(), lab)
    assert gradient[:, 0].abs().sum() > 0 and not gradient[:, 1:].any()


@FORMS
def test_a_loss_that_sees_colors_through_the_target_alone(target):
    """The same lightness with other colors: another loss, by the same logits."""
    method = build(target=target)
    one, other = (
        Batch((x.clamp(0, 1) * 255).round().to(torch.uint8), *[torch.arange(6)] * 2) for x in recolored()
    )
    torch.nn.init.normal_(method.head[-1].weight)
    losses = [float(method.loss(batch, method.generator())["loss"].detach()) for batch in (one, other)]
    assert abs(losses[0] - losses[1]) > 0.05


def test_exported_takes_rgb_and_computes_lightness():
    method = build().eval()
    x = method.view(photos(range(3)).images)
    lightness = (rgb_to_lab(photos(range(3)).images.float() / 255)[:, :1] - 50) / 50
    torch.testing.assert_close(method.encoder()(x), method.backbone(lightness), atol=1e-4, rtol=1e-4)


def test_hypercolumns_give_every_stage_gradient_of_its_own():
    method = build(target=HueChroma(bins=8, locations=20))
    x = method.view(photos(range(3)).images)
    features = method.features(x)
    widths = [1, *(m.shape[1] for m in method.backbone.maps(method.lightness(x)))]
    assert len(widths) == 5 and features.shape == (3, sum(widths), 8, 8)
    torch.nn.init.normal_(method.head[-1].weight, std=0.1)
    with torch.no_grad():  # without the part of the last stage, the others still learn
        method.head[1].weight[:, -widths[-1] :] = 0
    method.loss(photos(range(8)), method.generator())["loss"].backward()
    assert not method.backbone.net.layer4[0].bn2.weight.grad.any()
    assert method.backbone.net.layer1[0].bn2.weight.grad.any()


# --- the prior ------------------------------------------------------------------------------------------------


def test_the_prior_counts_batches_in_training_alone():
    method, images = build(target=SOFT), photos(range(8))
    method.loss(images, method.generator())
    assert float(method.prior.sum()) == pytest.approx(8 * 64, rel=1e-4)
    once = method.prior.clone()
    method.loss(images, method.generator())
    torch.testing.assert_close(method.prior, 2 * once)
    method.eval().loss(images, method.generator())
    torch.testing.assert_close(method.prior, 2 * once)
    assert "prior" in method.state_dict()
    weights = method._weights(torch.zeros(0, len(once), 8, 8), torch.zeros(0, dtype=torch.bool))
    assert float((weights * once / once.sum()).sum()) == pytest.approx(1.0, abs=1e-5)
    assert weights[once.argmin()] > 1 > weights[once.argmax()]


def test_soft_targets_sum_to_1_and_their_mean_is_within_half_a_bin():
    bins = ABBins(10)
    ab = torch.tensor([[3.0, -7.0], [22.0, 41.0], [-14.9, 0.1]]).T[None, :, :, None]
    soft = bins.soft(ab, 5, 5.0)
    torch.testing.assert_close(soft.sum(1), torch.ones(1, 3, 1))
    assert (soft > 0).sum(1).max() == 5
    assert (torch.einsum("nqhw,qc->nchw", soft, bins.centers) - ab).abs().max() < 5


# --- learning -------------------------------------------------------------------------------------------------


def colored_by_texture(n, seed):
    """Stripes are red and checkers are blue, of the same lightness: what can be learned."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(32)[:, None].expand(32, 32)
    stripes, checkers = (rows // 4 % 2).float(), ((rows // 4 + rows.T // 4) % 2).float()
    kind = torch.rand(n, generator=generator) < 0.5
    lightness = 45 + 15 * torch.where(kind[:, None, None], stripes, checkers)
    lightness = lightness + 2 * torch.randn(n, 32, 32, generator=generator)
    ab = torch.where(kind[:, None], torch.tensor([30.0, 20.0]), torch.tensor([5.0, -30.0]))
    lab = torch.cat([lightness[:, None], ab[:, :, None, None].expand(-1, -1, 32, 32)], dim=1)
    return as_batch((lab_to_rgb(lab).clamp(0, 1) * 255).round().to(torch.uint8))


@FORMS
def test_colors_of_held_out_images_are_told_above_chance(target):
    method, held_out = build(target=target), colored_by_texture(40, 1)
    optimizer = Optimizer(lr=3e-3, weight_decay=0.0).create(method)
    for step in range(70):
        method.train().batches_seen = step + 2
        loss = method.loss(colored_by_texture(16, step + 2), method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = method.eval().pretext_metric(held_out, method.generator())
    assert found["color_accuracy_by_chance"] < 0.75 and found["color_accuracy"] > 0.9
    images = method.solved(held_out, method.generator())
    assert {name: tuple(x.shape) for name, x in images.items()} == dict.fromkeys(
        ("gray", "colored", "true"), (40, 3, 32, 32)
    )
    torch.testing.assert_close(images["true"], held_out.images.float() / 255, atol=1e-2, rtol=0)
    error = {name: (images[name] - images["true"]).square().mean() for name in ("gray", "colored")}
    assert error["colored"] < 0.5 * error["gray"]


def test_the_annealed_mean_lies_between_mean_and_mode():
    method = build(target=ABClasses(grid=25))
    logits = torch.full((1, len(method.bins), 1, 1), -30.0)
    logits[0, 3], logits[0, 9] = 1.0, 0.5
    share = math.exp(1 / 0.38) / (math.exp(1 / 0.38) + math.exp(0.5 / 0.38))
    expected = share * method.bins.centers[3] + (1 - share) * method.bins.centers[9]
    torch.testing.assert_close(method.decode(logits)[0, :, 0, 0], expected)


def test_recipes():
    assert recipes.recipe("colorization").method.target == ABClasses(neighbors=1, mix=1.0)
    assert recipes.recipe("colorization:eccv16").method.target == ABClasses(neighbors=5, sigma=5.0, mix=0.5)
    assert recipes.recipe("colorization:larsson").method.target == HueChroma(
        bins=32, locations=128, hue_weight=5.0
    )
