"""Both losses by hand and at their optimum, who learns from what, real and generated batches apart, a ring of modes."""

import math

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.config import Facts, from_json, to_json, with_overrides
from embedkit.training.data import DataConfig, load_images
from embedkit.training.methods.gan import GAN, Config, discriminator_loss, generator_loss
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer

MEAN, STD = 0.3, 0.35
FACTS = Facts(
    image_shape=(1, 28, 28), mean=(MEAN,), std=(STD,), batch_size=16, steps_per_epoch=4, total_steps=40,
    optimizer=Optimizer(lr=1e-3, weight_decay=0.0, schedule="constant", warmup_steps=0),
)  # fmt: skip


def build(wake=True, **config):
    torch.manual_seed(0)
    backbone = create_backbone("r10", in_chans=1, image_size=28, width=0.5)
    method = GAN(backbone, Config(generator_width=8, **config), FACTS)
    if wake:  # the logit starts at zero, where D has no opinion
        nn.init.normal_(method.logit.weight, std=0.1)
    return method


def batch(n=16):
    return load_images(DataConfig(path="sklearn:digits", image_size=28)).batch(torch.arange(n))


def test_losses_are_binary_cross_entropies():
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(discriminator_loss(real, generated), bce(real, ones) + bce(generated, zeros))
    torch.testing.assert_close(generator_loss(generated), bce(generated, ones))
    by_loop = 0.0
    for a, b in zip(real.tolist(), generated.tolist(), strict=True):
        by_loop -= (math.log(1 / (1 + math.exp(-a))) + math.log(1 - 1 / (1 + math.exp(-b)))) / 7
    assert float(discriminator_loss(real, generated)) == pytest.approx(by_loop, rel=1e-12)


def test_constants_by_hand():
    zero, log_3 = torch.zeros(3), torch.full((3,), math.log(3))
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    assert float(generator_loss(zero)) == pytest.approx(math.log(2))
    # D is right, 3/4 and 1/4
    assert float(discriminator_loss(log_3, -log_3)) == pytest.approx(2 * math.log(4 / 3))
    assert float(generator_loss(-log_3)) == pytest.approx(math.log(4))
    # it teaches the generator most where D is right; ln(1 - D) would not teach it at all
    logit = torch.tensor([-20.0], requires_grad=True)
    generator_loss(logit).backward()
    assert float(logit.grad) == pytest.approx(-1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert generator_loss(log_3.bfloat16()).dtype == torch.float32


def test_the_best_discriminator_of_a_table():
    """Three symbols: a table of logits comes to D = p / (p + g), and the value there is 2 JSD - ln 4."""
    p, g = torch.tensor([5, 3, 2]), torch.tensor([1, 4, 5])  # in tenths
    table = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([table], lr=4.0)
    for _ in range(500):
        optimizer.zero_grad()
        loss = discriminator_loss(table.repeat_interleave(p), table.repeat_interleave(g))
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(table.detach().sigmoid(), p / (p + g), atol=1e-2, rtol=0)
    p, g = p / 10, g / 10
    m = (p + g) / 2
    jsd = ((p * (p / m).log()).sum() + (g * (g / m).log()).sum()) / 2
    assert -float(loss.detach()) == pytest.approx(2 * float(jsd) - math.log(4), abs=1e-4)


def test_the_first_losses():
    outputs = build(wake=False).loss(batch(), torch.Generator())
    assert float(outputs["discriminator_loss"].detach()) == pytest.approx(2 * math.log(2), rel=1e-6)
    assert float(outputs["generator_loss"].detach()) == pytest.approx(math.log(2), rel=1e-6)


def test_each_net_moves_by_its_own_loss_alone(monkeypatch):
    """A step of G leaves D's weights as they are and no gradient behind, and the other way round."""
    images = batch()
    for name, still, loss in (
        ("generator", "discriminator", "generator_loss"),
        ("discriminator", "generator", "discriminator_loss"),
    ):
        method = build()
        optimizers = method.configure_optimizers()
        monkeypatch.setattr(GAN, "optimizers", lambda self, found=optimizers: found)
        before = {key: value.detach().clone() for key, value in method.named_parameters()}
        method.step({name: method.loss(images, method.generator())[loss]})
        moved = {key for key, value in method.named_parameters() if not torch.equal(value, before[key])}
        nets = method.networks()
        of = {net: {id(p) for m in nets[net] for p in m.parameters()} for net in (name, still)}
        own, other = ({k for k, p in method.named_parameters() if id(p) in of[net]} for net in (name, still))
        assert moved and moved <= own and not own & other
        assert all(p.grad is None for p in method.parameters())


def test_a_training_step_gives_each_net_its_own_loss(monkeypatch):
    method, images, given = build(), batch(), {}
    monkeypatch.setattr(method, "step", given.update)
    monkeypatch.setattr(method, "log_dict", lambda values: None)
    method.training_step(images, 0)
    expected = build().loss(images, method.generator())
    assert given.keys() == method.networks().keys()
    for name, loss in given.items():
        assert float(loss.detach()) == pytest.approx(float(expected[f"{name}_loss"].detach()), rel=1e-5)
    assert len({float(loss.detach()) for loss in given.values()}) == 2


def test_gradients_are_those_of_separate_passes():
    """D's with generated images as constants, G's with D's weights as constants."""
    method, images = build(), batch()
    nets = method.networks()
    weights = {name: [p for m in modules for p in m.parameters()] for name, modules in nets.items()}
    outputs = method.loss(images, method.generator())
    found = [
        torch.autograd.grad(outputs[f"{name}_loss"], weights[name], retain_graph=True) for name in weights
    ]
    x = method._real(images.images, method.generator())
    fake = method._images(method._prior(16, method.generator("prior")))
    d = torch.autograd.grad(
        discriminator_loss(method._logits(x), method._logits(fake.detach())), weights["discriminator"]
    )
    for p in weights["discriminator"]:
        p.requires_grad_(False)
    g = torch.autograd.grad(generator_loss(method._logits(fake)), weights["generator"])
    for one, other in zip((*found[0], *found[1]), (*d, *g), strict=True):
        torch.testing.assert_close(one, other)


def test_real_and_generated_batches_are_apart_and_only_real_ones_leave_statistics():
    images = batch()
    states = []
    for scale in (1.0, 30.0):  # other generated images
        method = build()
        with torch.no_grad():
            method.generate.to_pixels.weight.mul_(scale)
        given = []
        method.backbone.register_forward_pre_hook(lambda _, x, given=given: given.append(x[0]))
        method.loss(images, method.generator())
        assert [len(x) for x in given] == [16, 16]
        states.append({name: b.clone() for name, b in method.backbone.named_buffers()})
    assert states[0] and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    torch.testing.assert_close(
        states[0]["net.bn1.running_mean"], 0.1 * method.backbone.net.conv1(given[0]).mean((0, 2, 3)).detach()
    )
    assert all(m.track_running_stats for m in method.modules() if isinstance(m, nn.BatchNorm2d))


def test_real_values_are_continuous_and_within_their_gray_value():
    method, images = build(), batch()
    real = method._real(images.images, method.generator()) * STD + MEAN
    value = (real * 256).floor()
    assert ((value - images.images).abs() <= (((real * 256) % 1 < 1e-3) | ((real * 256) % 1 > 0.999))).all()
    black = real[images.images == 0]
    assert float(black.min()) > -1e-6 and float(black.max()) < 1 / 256 + 1e-6
    assert float(black.mean()) == pytest.approx(0.5 / 256, rel=0.02) and len(black.unique()) > len(black) / 4
    plain = build(dequantize=False)._real(images.images, method.generator())
    torch.testing.assert_close(plain, method.view(images.images))
    generated = method._images(method._prior(16, method.generator("prior"))).detach() * STD + MEAN
    assert 0 < float(generated.min()) and float(generated.max()) < 1


def test_codes_are_uniform_and_exported_is_the_discriminator():
    method = build()
    z = method._prior(400, method.generator("prior"))
    assert z.shape == (400, 100) and z.abs().max() <= 1
    assert abs(float(z.mean())) < 0.01 and float(z.square().mean()) == pytest.approx(1 / 3, abs=0.005)
    assert method.encoder() is method.backbone
    with pytest.raises(ConfigError, match="latent_dim of 1 or more, found 0"):
        build(latent_dim=0)


def test_the_recipe_dcgan_is_built_and_written_down():
    config = recipes.recipe("gan:dcgan")
    assert from_json(to_json(config)) == config
    net = create_backbone(config.backbone, in_chans=1, image_size=28, **config.backbone_args).net
    kinds = [type(m).__name__ for m in net.modules() if not list(m.children())]
    assert kinds == ["Conv2d", "BatchNorm2d", "LeakyReLU"] * 3
    assert all(m.stride == (2, 2) for m in net.modules() if isinstance(m, nn.Conv2d))
    assert [m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)] == [0.2] * 3


def test_a_run_logs_both_losses(tmp_path):
    settings = [
        "threads=1", "batch_size=16", "data.image_size=16", "steps=12", "method.latent_dim=8",
        "method.generator_width=4", "backbone_args.width=0.5", "log_every=1",
    ]  # fmt: skip
    config = with_overrides(recipes.recipe("gan"), settings)
    result = run.train(config, data="synthetic:100", out=tmp_path / "run", progress=False)
    assert result.finished and result.steps == 12
    names = {"discriminator_loss", "generator_loss", "told_apart", "validation_taken_for_real"}
    assert names <= result.metrics.keys()


def test_eight_gaussians_on_a_ring_are_all_found():
    """Two small perceptrons that move at once, by our losses and by the way the method takes their gradients."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    angles = torch.arange(8) * math.pi / 4
    centers = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
    g = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    d = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizers = [
        torch.optim.Adam(g.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        torch.optim.Adam(d.parameters(), lr=4e-3, betas=(0.5, 0.999)),
    ]
    weights = [list(g.parameters()), list(d.parameters())]
    for _ in range(600):
        rows = torch.randint(8, (256,), generator=generator)
        real = centers[rows] + 0.2 * torch.randn(256, 2, generator=generator)
        made = g(2 * torch.randn(256, 2, generator=generator))
        logits = d(real)[:, 0], d(made)[:, 0]
        losses = generator_loss(logits[1]), discriminator_loss(*logits)
        for loss, own in zip(losses, weights, strict=True):
            for weight, gradient in zip(own, torch.autograd.grad(loss, own, retain_graph=True), strict=True):
                weight.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        made = g(2 * torch.randn(2000, 2, generator=generator))
    distance, mode = torch.cdist(made, centers).min(1)
    near = distance < 0.6  # three deviations
    assert float(near.float().mean()) > 0.7
    assert int((torch.bincount(mode[near], minlength=8) >= 20).sum()) >= 7
