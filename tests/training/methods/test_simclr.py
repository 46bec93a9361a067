"""NT-Xent against equation 1 by a double loop, constants by hand, two libraries, and two processes."""

import math

import pytest

torch = pytest.importorskip("torch")

from layers import layers_of

from embedkit.errors import ConfigError
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.simclr import Config, SimCLR, nt_xent
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer

FACTS = Facts(
    image_shape=(1, 28, 28), mean=(0.3,), std=(0.3,), batch_size=16, steps_per_epoch=4, total_steps=40
)


def projections(n=5, dim=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, dim, generator=generator, dtype=dtype)


def by_loop(z1, z2, tau):
    z = [row / row.norm() for row in torch.cat([z1, z2])]
    n, total = len(z1), 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = sum(math.exp(float(z[i] @ z[k]) / tau) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(float(z[i] @ z[j]) / tau) / others)
    return total / (2 * n)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_equation_1(tau):
    z1, z2 = projections()
    assert float(nt_xent(z1, z2, tau)) == pytest.approx(by_loop(z1, z2, tau), rel=1e-12)


def test_constants_by_hand():
    # z1 = unit axes; z2 = sums of two of them, length sqrt 2: every cosine of an anchor of z1 is 0 or 1/sqrt 2,
    # of z2 with z2 1/2. With a = exp(1 / (sqrt(2) tau)) and b = exp(1 / (2 tau)):
    #   anchors of z1: others = 2 of z1 (exp 0), two a and one exp 0 of z2;  anchors of z2: two b, two a, one exp 0
    z1, z2 = torch.eye(3, dtype=torch.float64), torch.tensor([[1.0, 1, 0], [0, 1, 1], [1, 0, 1]]).double()
    for tau, known in ((0.5, 1.137590852352), (0.1, 0.753330756887)):
        a, b = math.exp(1 / (math.sqrt(2) * tau)), math.exp(1 / (2 * tau))
        expected = (math.log((3 + 2 * a) / a) + math.log((1 + 2 * a + 2 * b) / a)) / 2
        assert expected == pytest.approx(known, abs=1e-11)
        assert float(nt_xent(z1, z2, tau)) == pytest.approx(expected, abs=1e-12)
    same = torch.ones(3, 4, dtype=torch.float64)
    assert float(nt_xent(same, same, 0.5)) == pytest.approx(math.log(5))


def test_order_of_images_of_views_and_length_do_not_matter():
    z1, z2 = projections()
    loss = float(nt_xent(z1, z2, 0.2))
    order = torch.randperm(len(z1), generator=torch.Generator().manual_seed(1))
    assert float(nt_xent(z1[order], z2[order], 0.2)) == pytest.approx(loss)
    assert float(nt_xent(z2, z1, 0.2)) == pytest.approx(loss)
    assert float(nt_xent(3 * z1, 0.1 * z2, 0.2)) == pytest.approx(loss)
    assert float(nt_xent(z1, z2[order], 0.2)) != pytest.approx(loss)


def test_gradient_reaches_both_views_and_all_negatives():
    z1, z2 = (z.clone().requires_grad_() for z in projections(n=3, dim=4))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5), (z1, z2))
    z = torch.cat([z1, z2])
    nt_xent(*z.chunk(2), 0.5).backward()
    assert (z1.grad.norm(dim=1) > 0).all() and (z2.grad.norm(dim=1) > 0).all()
    # a cosine does not change along its own row
    torch.testing.assert_close((z1.grad * z1).sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_equals_lightly_and_pytorch_metric_learning(tau):
    lightly = pytest.importorskip("lightly.loss")
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    z1, z2 = projections(n=8, dtype=torch.float32)
    ours = nt_xent(z1, z2, tau)
    torch.testing.assert_close(ours, lightly.NTXentLoss(temperature=tau)(z1, z2))
    labels = torch.arange(8).repeat(2)
    torch.testing.assert_close(ours, losses.NTXentLoss(temperature=tau)(torch.cat([z1, z2]), labels))


def test_bfloat16_projections_lose_no_more_than_their_own_rounding():
    z1, z2 = projections(n=16, dtype=torch.float32)
    exact = nt_xent(z1.bfloat16().float(), z2.bfloat16().float(), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent(z1.bfloat16(), z2.bfloat16(), 0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)  # the logits themselves are never rounded to 8 bits


def build(seed=0, **config):
    torch.manual_seed(seed)
    return SimCLR(create_backbone("r10", in_chans=1, image_size=28), Config(**config), FACTS)


def batch(n=16):
    images = load_images(DataConfig(path="sklearn:digits", image_size=28))
    return images.batch(torch.arange(n))


def test_overfits_one_batch():
    method, images = build(), batch()
    optimizer = Optimizer(lr=2e-3).create(method)
    losses = []
    for step in range(30):
        method.batches_seen = step % 2
        losses.append(method.loss(images, method.generator())["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    chance = math.log(2 * len(images.images) - 1)
    assert float(losses[0].detach()) > 0.7 * chance
    assert float(losses[-1].detach()) < 0.3 * chance
    with torch.no_grad():  # in train mode: BatchNorm's running statistics need more steps than these
        metric = method.pretext_metric(images, method.generator())["positive_is_nearest"]
    assert float(metric) > 0.5  # 1 / 31 by chance


def test_the_two_views_of_an_image_differ_and_no_label_is_used():
    method, images = build(), batch()
    x = method.view(torch.cat([images.images] * 2), method.config.augment, method.generator())
    first, second = x.chunk(2)
    assert (first != second).flatten(1).any(dim=1).all()
    hidden = Batch(images.images, torch.full_like(images.labels, -1), images.indices)
    losses = [method.loss(b, method.generator())["loss"] for b in (images, hidden)]
    assert torch.equal(*losses)


def test_the_projector_is_not_exported():
    method = build()
    assert method.encoder() is method.backbone
    assert len(method.projector) == 5  # Linear, BatchNorm, ReLU, Linear, BatchNorm
    assert not method.projector[-1].bias.requires_grad


def test_the_layers_of_the_projector():
    method = build(hidden_dim=64, projection_dim=16)
    dim = method.backbone.dim
    assert layers_of(method.projector) == [
        ("linear", dim, 64, False),
        ("norm", 64, "weight", "bias"),
        ("ReLU",),
        ("linear", 64, 16, False),
        ("norm", 16, "weight"),
    ]
    z = method.projector(torch.randn(64, dim))
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(16), atol=1e-5, rtol=0)
    z.sum().backward()
    assert method.projector[-1].bias.grad is None and torch.equal(method.projector[-1].bias, torch.zeros(16))
    with pytest.raises(ConfigError, match="hidden_dim.*found 0 and 128"):
        build(hidden_dim=0)
