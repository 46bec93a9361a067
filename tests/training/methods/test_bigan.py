"""Who learns from what: both losses by hand, swapped labels, constants where they belong, and a killed run."""

import math

import pytest

torch = pytest.importorskip("torch")


from embedkit.errors import ConfigError
from embedkit.training.config import Facts
from embedkit.training.data import DataConfig, load_images
from embedkit.training.methods.bigan import (
    BiGAN,
    Config,
    Discriminator,
    discriminator_loss,
    encoder_generator_loss,
)
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer

FACTS = Facts(
    image_shape=(1, 28, 28),
    mean=(0.3,),
    std=(0.35,),
    batch_size=16,
    steps_per_epoch=4,
    total_steps=40,
    optimizer=Optimizer(lr=1e-3, weight_decay=0.0, betas=(0.5, 0.999), schedule="constant", warmup_steps=0),
)


def build(wake=True, **config):
    torch.manual_seed(0)
    method = BiGAN(create_backbone("r10", in_chans=1, image_size=28), Config(**config), FACTS)
    if wake:  # D starts at zero, where it has no opinion of x and z
        torch.nn.init.normal_(method.discriminator.logit.weight, std=0.1)
    return method


def batch(n=16):
    return load_images(DataConfig(path="sklearn:digits", image_size=28)).batch(torch.arange(n))


def logits(n=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, n, generator=generator, dtype=torch.float64).unbind()


def test_both_losses_by_a_loop():
    real, generated = logits()
    d = eg = 0.0
    for a, b in zip(real.tolist(), generated.tolist(), strict=True):
        d_real, d_generated = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
        d -= (math.log(d_real) + math.log(1 - d_generated)) / 6
        eg -= (math.log(1 - d_real) + math.log(d_generated)) / 6
    assert float(discriminator_loss(real, generated)) == pytest.approx(d, rel=1e-12)
    assert float(encoder_generator_loss(real, generated)) == pytest.approx(eg, rel=1e-12)


def test_constants_by_hand():
    zero, log_3 = torch.zeros(5, dtype=torch.float64), torch.full((5,), math.log(3), dtype=torch.float64)
    for loss in (discriminator_loss, encoder_generator_loss):
        assert float(loss(zero, zero)) == pytest.approx(2 * math.log(2), rel=1e-12)
    # D says 3/4 of both: -ln(3/4) - ln(1/4), whichever way
    for loss in (discriminator_loss, encoder_generator_loss):
        assert float(loss(log_3, log_3)) == pytest.approx(math.log(16 / 3), rel=1e-12)
    # D is right, 3/4 and 1/4
    assert float(discriminator_loss(log_3, -log_3)) == pytest.approx(2 * math.log(4 / 3), rel=1e-12)
    assert float(encoder_generator_loss(log_3, -log_3)) == pytest.approx(2 * math.log(4), rel=1e-12)


def test_the_best_discriminator_measures_the_jensen_shannon_divergence():
    # two distributions over four pairs, in eighths; the best logit is ln(p / q), and the value 2 JSD - ln 4
    p, q = torch.tensor([4, 2, 1, 1]), torch.tensor([1, 1, 2, 4])
    best = (p.double() / q).log()
    value = -discriminator_loss(best.repeat_interleave(p), best.repeat_interleave(q))
    p, q = p.double() / 8, q.double() / 8
    middle = (p + q) / 2
    jsd = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    assert float(value) == pytest.approx(2 * float(jsd) - math.log(4), rel=1e-12)
    worse = best + torch.tensor([0.1, -0.2, 0.3, 0.1])
    assert (
        -discriminator_loss(worse.repeat_interleave((8 * p).long()), worse.repeat_interleave((8 * q).long()))
        < value
    )


def test_swapped_labels_turn_the_gradient_around_at_logits_of_zero():
    gradients = {}
    for loss in (discriminator_loss, encoder_generator_loss):
        real, generated = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        loss(real, generated).backward()
        gradients[loss] = float(real.grad), float(generated.grad)
    assert gradients[discriminator_loss] == (-0.5, 0.5)
    assert gradients[encoder_generator_loss] == (0.5, -0.5)
    # where D is right beyond doubt the swapped loss still teaches, the value itself would not
    real = torch.full((1,), 20.0, dtype=torch.float64, requires_grad=True)
    encoder_generator_loss(real, -real.detach()).backward()
    assert float(real.grad) == pytest.approx(1.0)


def test_bfloat16_logits_are_widened():
    real, generated = (value.bfloat16() for value in logits(64))
    with torch.autocast("cpu", torch.bfloat16):
        loss = discriminator_loss(real, generated)
    torch.testing.assert_close(loss, discriminator_loss(real.float(), generated.float()))


def test_the_first_losses_are_2_ln_2():
    method = build(wake=False)
    outputs = method.loss(batch(), method.generator())
    for name in ("discriminator_loss", "encoder_generator_loss"):
        assert float(outputs[name].detach()) == pytest.approx(2 * math.log(2), rel=1e-6)


def parts(method):
    return {
        "encoder": [*method.backbone.parameters(), *method.to_latent.parameters()],
        "generator": list(method.generate.parameters()),
        "discriminator": list(method.discriminator.parameters()),
    }


def gradients(method, name, images):
    method.zero_grad()
    method.loss(images, method.generator())[name].backward()
    return {part: [parameter.grad for parameter in parameters] for part, parameters in parts(method).items()}


def test_each_loss_moves_its_own_nets_alone():
    method, images = build(), batch()
    of_d = gradients(method, "discriminator_loss", images)
    of_eg = gradients(method, "encoder_generator_loss", images)
    assert all(g is None for part in ("encoder", "generator") for g in of_d[part])
    assert all(g is None for g in of_eg["discriminator"])
    assert all(g is not None and g.abs().sum() > 0 for g in of_d["discriminator"])
    for part in ("encoder", "generator"):
        assert sum(g.abs().sum() for g in of_eg[part]) > 0
    # the sum that is differentiated gives every net its own gradient, and nothing of the other's
    both = gradients(method, "loss", images)
    for part, expected in {**of_eg, "discriminator": of_d["discriminator"]}.items():
        for found, value in zip(both[part], expected, strict=True):
            torch.testing.assert_close(found, value)


def test_gradients_are_those_of_two_plain_steps():
    """The same by the usual way: the whole graph with the weights of the other nets switched off."""
    method, images = build(), batch()
    found = gradients(method, "loss", images)
    x = method.view(images.images)
    z = torch.rand(16, 50, generator=method.generator("prior")) * 2 - 1

    def pairs():
        image = (method.generate(z).sigmoid() - method.mean) / method.std
        code = (method.to_latent(method.backbone(x)) / 2).tanh()
        return method.discriminator(x, code), method.discriminator(image, z)

    named = parts(method)
    d = torch.autograd.grad(discriminator_loss(*pairs()), named["discriminator"])
    real, generated = pairs()
    swapped = torch.nn.functional.binary_cross_entropy_with_logits  # labels: real 0, generated 1
    loss = swapped(real, torch.zeros(16)) + swapped(generated, torch.ones(16))
    eg = torch.autograd.grad(loss, named["encoder"] + named["generator"], allow_unused=True)
    for one, other in zip(found["discriminator"], d, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(found["encoder"] + found["generator"], eg, strict=True):
        torch.testing.assert_close(one, other)


def test_the_encoder_learns_from_real_pairs_and_the_generator_from_generated_ones():
    method, images = build(), batch()
    named = parts(method)
    before = [g.clone() for g in gradients(method, "encoder_generator_loss", images)["generator"]]
    with torch.no_grad():
        for parameter in named["encoder"]:
            parameter.mul_(0.5)
    after = gradients(method, "encoder_generator_loss", images)["generator"]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)


def test_codes_are_uniform_and_not_of_the_views_generator():
    method, images = build(), batch()
    z, code = method._prior(4000, method.generator("prior")), method._codes(method.view(images.images))
    assert code.shape == (16, 50) and code.abs().max() <= 1  # E's range is z's
    assert z.shape == (4000, 50) and z.abs().max() <= 1
    assert z.mean().abs() < 0.01 and z.square().mean() == pytest.approx(1 / 3, abs=0.005)
    losses = [method.loss(images, torch.Generator().manual_seed(seed))["loss"].item() for seed in (1, 2)]
    assert losses[0] == losses[1]  # no views here: nothing else is drawn from their generator
    method.batches_seen += 1
    assert method.loss(images, method.generator())["loss"].item() != losses[0]


def test_the_discriminator_sees_image_and_code_at_every_place_and_keeps_nothing_of_a_batch():
    torch.manual_seed(0)
    d = Discriminator(3, (28, 20), latent_dim=5, width=8)
    torch.nn.init.normal_(d.logit.weight)
    x = torch.randn(6, 3, 28, 20, requires_grad=True)
    z = torch.randn(6, 5, requires_grad=True)
    out = d(x, z)
    assert out.shape == (6,)
    out[0].backward()
    assert (x.grad[0] != 0).all() and (z.grad[0] != 0).all()
    # real and generated batches are normalized apart: another batch in between changes nothing
    d(torch.randn(6, 3, 28, 20) * 9, z)
    assert torch.equal(d(x, z), out) and torch.equal(d.eval()(x, z), out) and not list(d.buffers())


def test_two_optimizers_and_the_discriminators_own_rate():
    method = build(discriminator_lr=0.5)
    eg, d = method.configure_optimizers()
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in (eg, d)]
    named = {part: {id(p) for p in parameters} for part, parameters in parts(method).items()}
    assert held == [named["encoder"] | named["generator"], named["discriminator"]]
    for optimizer, rate in ((eg, 1e-3), (d, 5e-4)):
        FACTS.optimizer.set_lr(optimizer, 0, 40)
        assert {group["lr"] for group in optimizer.param_groups} == {rate}
    assert not method.automatic_optimization


def step(method, optimizers, images):
    outputs = method.loss(images, method.generator())
    for optimizer in optimizers:
        optimizer.zero_grad()
    outputs["loss"].backward()
    for optimizer in optimizers:
        optimizer.step()
    return {name: float(value.detach()) for name, value in outputs.items()}


def test_each_side_overfits_one_batch_while_the_other_stands_still():
    images = batch(8)
    for side, name, share in ((1, "discriminator_loss", 0.1), (0, "encoder_generator_loss", 0.5)):
        method = build()
        only = method.configure_optimizers()[side]
        first = step(method, [only], images)[name]
        for _ in range(30):
            last = step(method, [only], images)[name]
        assert last < share * first


def test_exported_is_what_stands_before_the_code():
    method = build()
    assert method.encoder() is method.backbone


def test_the_metric_compares_with_another_image():
    method, images = build(wake=False), batch()
    ratio = method.pretext_metric(images, method.generator())["reconstruction_ratio"]
    assert float(ratio.detach()) == pytest.approx(1.0, abs=0.1)  # nothing learned
    x = method.view(images.images)
    method._images = lambda z: x + 0.5  # every pixel off by a half: a norm of 14
    ratio = method.pretext_metric(images, method.generator())["reconstruction_ratio"]
    others = (x.roll(1, 0) - x - 0.5).flatten(1).norm(dim=1).mean()
    assert float(ratio.detach()) == pytest.approx(float(14 / others), rel=1e-5)
    with pytest.raises(ConfigError, match="latent_dim of 1 or more"):
        build(latent_dim=0)
