"""Scores hinged one by one, who learns from what, a drawn code, and spectral norm that the export folds away."""

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.config import Facts, with_overrides
from embedkit.training.data import DataConfig, load_images
from embedkit.training.methods.bigbigan import (
    BigBiGAN,
    Config,
    JointDiscriminator,
    SpectralNorm,
    discriminator_loss,
    encoder_generator_loss,
    without_spectral_norm,
)
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer

SMALL = {"latent_dim": 8, "generator_width": 4, "discriminator_width": 8}


def build(**config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(1, 28, 28), mean=(0.3,), std=(0.35,), batch_size=16, steps_per_epoch=4, total_steps=40
    )
    backbone = create_backbone("r10", in_chans=1, image_size=28, width=0.5)
    return BigBiGAN(backbone, Config(**{**SMALL, **config}), facts)


def batch(n=16):
    return load_images(DataConfig(path="sklearn:digits", image_size=28)).batch(torch.arange(n))


# --- losses --------------------------------------------------------------------------------------------------


def test_both_losses_by_a_loop():
    real, generated = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    d = e = g = 0.0
    for a, b in zip(real.tolist(), generated.tolist(), strict=True):
        for score_real, score_generated in zip(a, b, strict=True):
            d += (max(0.0, 1 - score_real) + max(0.0, 1 + score_generated)) / 6
            e, g = e + score_real / 6, g - score_generated / 6
    assert float(discriminator_loss(real, generated)) == pytest.approx(d, rel=1e-12)
    assert [float(x) for x in encoder_generator_loss(real, generated)] == pytest.approx([e, g], rel=1e-12)


def test_each_score_is_hinged_on_its_own():
    """By hand: one sure score cannot pay for two that are wrong."""
    real = torch.tensor([[5.0, -1.0, -1.0]], dtype=torch.float64)
    # h(5) + h(-1) + h(-1) = 0 + 2 + 2; the hinge of the sum, 3, would be 0
    assert float(discriminator_loss(real, torch.full((1, 3), -9.0))) == 4.0
    assert float(discriminator_loss(torch.zeros(2, 3), torch.zeros(2, 3))) == 6.0
    assert float(discriminator_loss(torch.zeros(2, 1), torch.zeros(2, 1))) == 2.0


def test_a_sure_discriminator_has_no_gradient_and_its_opponents_have():
    real = torch.tensor([[3.0, 0.5, -2.0]], requires_grad=True)
    generated = torch.tensor([[-3.0, -0.5, 2.0]], requires_grad=True)
    discriminator_loss(real, generated).backward()
    assert real.grad.tolist() == [[0.0, -1.0, -1.0]] and generated.grad.tolist() == [[0.0, 1.0, 1.0]]
    real.grad = generated.grad = None
    torch.stack(encoder_generator_loss(real, generated)).sum().backward()
    assert real.grad.tolist() == [[1.0, 1.0, 1.0]] and generated.grad.tolist() == [[-1.0, -1.0, -1.0]]


def test_bfloat16_scores_are_widened():
    real, generated = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = discriminator_loss(real, generated)
    torch.testing.assert_close(loss, discriminator_loss(real.float(), generated.float()))


# --- the discriminator ---------------------------------------------------------------------------------------


def test_scores_see_what_they_are_of():
    torch.manual_seed(0)
    d = JointDiscriminator(1, (28, 28), 8, 8, unary=True).eval()
    x, z = torch.randn(4, 1, 28, 28, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    scores = d(x, z)
    assert scores.shape == (4, 3)
    for column, (of_x, of_z) in enumerate(((True, False), (False, True), (True, True))):
        found = torch.autograd.grad(scores[:, column].sum(), (x, z), retain_graph=True, allow_unused=True)
        assert [g is not None and bool(g.any()) for g in found] == [of_x, of_z]
    assert JointDiscriminator(1, (28, 28), 8, 8, unary=False)(x, z).shape == (4, 1)


def test_every_layer_of_the_discriminator_has_spectral_norm_one():
    d = build().discriminator
    layers = [m for m in d.modules() if isinstance(m, SpectralNorm)]
    plain = [m for m in d.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(layers) == 3 + 3 * 5 + 3 and [m.layer for m in layers] == plain
    x, z = torch.randn(2, 1, 28, 28), torch.randn(2, 8)
    for _ in range(100):  # one power iteration each
        d(x, z)
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight().detach().flatten(1), 2)
        assert float(norm) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_spectral_norm_is_torchs(kind):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5) if kind is nn.Linear else nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():  # one singular value far above the others: both iterations come to their end
        layer.weight += torch.ones(len(layer.weight), *[1] * (layer.weight.ndim - 1))
    own, theirs = SpectralNorm(layer), torch.nn.utils.parametrizations.spectral_norm(copy.deepcopy(layer))
    x = torch.randn(2, 6) if kind is nn.Linear else torch.randn(2, 3, 5, 5)
    for _ in range(200):
        found, expected = own(x), theirs(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradient = theirs.parametrizations.weight.original.grad
    torch.testing.assert_close(own.layer.weight.grad, gradient, rtol=1e-3, atol=1e-4)
    before = own.u.clone()
    own.eval()(x)
    assert torch.equal(own.u, before)


# --- the method ----------------------------------------------------------------------------------------------


def parameters(method):
    return {name: [p for m in modules for p in m.parameters()] for name, modules in method.networks().items()}


def test_each_network_moves_by_its_own_loss_alone(tmp_path):
    """One step of the run, against gradients that are taken one network at a time."""
    method, images = build(), batch()
    assert sorted(p.data_ptr() for ps in parameters(method).values() for p in ps) == sorted(
        p.data_ptr() for p in method.parameters()
    )
    torch.manual_seed(1)
    twin = build()
    optimizers = [torch.optim.SGD(ps, lr=0.1) for ps in parameters(method).values()]
    method.optimizers, method.log_dict = lambda: optimizers, lambda values: None
    method.batches_seen = twin.batches_seen = 1
    method.training_step(images, 0)
    outputs = twin.loss(images, twin.generator())
    for name, own in parameters(twin).items():
        gradients = torch.autograd.grad(outputs[f"{name}_loss"], own, retain_graph=True)
        for before, gradient, after in zip(own, gradients, parameters(method)[name], strict=True):
            torch.testing.assert_close(before - 0.1 * gradient, after)


def test_encoder_and_generator_wait_for_the_discriminator():
    method, images = build(discriminator_steps=2), batch()
    optimizers = [torch.optim.SGD(ps, lr=0.1) for ps in parameters(method).values()]
    method.optimizers, method.log_dict = lambda: optimizers, lambda values: None
    for seen, moved in ((1, {"discriminator"}), (2, {"discriminator", "encoder", "generator"})):
        before = {name: [p.detach().clone() for p in ps] for name, ps in parameters(method).items()}
        method.batches_seen = seen
        method.training_step(images, 0)
        found = {
            name
            for name, ps in parameters(method).items()
            if any(not torch.equal(p, q) for p, q in zip(ps, before[name], strict=True))
        }
        assert found == moved


def test_the_code_is_drawn_around_its_mean():
    method = build().eval()
    x = method.view(batch(4).images)
    noise = torch.randn(2, 4, 8)
    draws = [method._codes(x, one) for one in noise]
    torch.testing.assert_close(draws[0][0], draws[0][1] + draws[0][2] * noise[0])
    assert not torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][1], draws[1][1])
    assert (draws[0][2] > 0).all() and torch.equal(method._codes(x, None)[0], draws[0][1])
    z = method._normal(4000, "prior")
    assert z.mean().abs() < 0.03 and z.square().mean() == pytest.approx(1.0, abs=0.03)
    # the deviation learns too: D sees the draw
    loss = method.train().loss(batch(), method.generator())["encoder_loss"]
    (gradient,) = torch.autograd.grad(loss, method.to_latent[2].weight)
    assert (gradient[8:].abs().sum(1) > 0).all()


def test_the_unary_scores_can_be_left_out():
    for unary, scores in ((True, 3), (False, 1)):
        method, seen = build(unary=unary), []
        method.discriminator.register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
        loss = method.loss(batch(), method.generator())["discriminator_loss"]
        assert [s.shape for s in seen] == [(16, scores)] * 2
        torch.testing.assert_close(loss, discriminator_loss(*seen))


def test_the_discriminator_overfits_one_batch_while_its_opponents_stand_still():
    method, images = build(), batch(8)
    only = Optimizer(lr=2e-3, weight_decay=0.0, betas=(0.5, 0.999)).create(method.discriminator)
    losses = []
    for _ in range(40):
        loss = method.loss(images, method.generator())["discriminator_loss"]
        only.zero_grad()
        loss.backward()
        only.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


# --- export --------------------------------------------------------------------------------------------------


def test_spectral_norm_is_folded_into_the_exported_weights():
    method, x = build(spectral_encoder=True), batch().images
    plain = create_backbone("r10", in_chans=1, image_size=28, width=0.5)
    method.train()
    for _ in range(3):
        method.backbone(method.view(x))
    assert isinstance(method.backbone.net.conv1, SpectralNorm)
    before = {name: value.clone() for name, value in method.state_dict().items() if torch.is_tensor(value)}
    encoder = method.encoder()
    # a plain timm network: no u and no other name, and every weight within its norm
    assert list(encoder.net.state_dict()) == list(plain.net.state_dict())
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            norm = torch.linalg.matrix_norm(module.weight.detach().flatten(1), 2)
            assert 0.5 < float(norm) < 2.0
    plain.load_state_dict(encoder.state_dict())
    method.eval()
    expected = method.backbone(method.view(x))
    torch.testing.assert_close(encoder.eval()(method.view(x)), expected)
    torch.testing.assert_close(plain.eval()(method.view(x)), expected)
    # and the run's own network stays as it was
    assert isinstance(method.backbone.net.conv1, SpectralNorm)
    assert all(torch.equal(value, method.state_dict()[name]) for name, value in before.items())
    plain = build()
    assert plain.encoder() is plain.backbone


def test_a_module_without_spectral_norm_is_copied_as_it_is():
    layer = nn.Linear(3, 2)
    assert torch.equal(without_spectral_norm(layer).weight, layer.weight)


def test_the_encoder_has_a_rate_of_its_own_and_wrong_fields_are_refused():
    config = recipes.recipe("bigbigan")
    assert config.optimizers["encoder"].lr == pytest.approx(3 * config.optimizer.lr)
    for wrong in ({"latent_dim": 0}, {"discriminator_steps": 0}):
        with pytest.raises(ConfigError, match="bigbigan: expected"):
            build(**wrong)


def test_a_short_run_keeps_its_numbers_finite(tmp_path):
    settings = ["threads=1", "batch_size=8", "data.image_size=16", "steps=5", "log_every=1"]
    settings += [f"method.{name}={value}" for name, value in SMALL.items()]
    config = with_overrides(recipes.recipe("bigbigan"), settings)
    result = run.train(config, data="synthetic:30", out=tmp_path / "run", progress=False)
    names = {"discriminator_loss", "encoder_loss", "generator_loss", "code_square", "mean_spread"}
    assert result.finished and names <= result.metrics.keys()
