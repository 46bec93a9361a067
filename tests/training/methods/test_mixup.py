"""Mixed labels by a loop, plain cross-entropy bit for bit without mixing, lambda's moments, ICT by hand."""

import dataclasses
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, Labeled, load_images
from embedkit.training.data.targets import cross_entropy
from embedkit.training.methods import mixup
from embedkit.training.methods.mixup import (
    Config,
    MixUp,
    draw_lambdas,
    interpolation_loss,
    mix,
    mixup_loss,
)
from embedkit.training.models.backbones import create_backbone

NO_VIEW = Compose(steps=())


def build(total_steps=40, classes=10, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(1, 16, 16),
        mean=(0.3,),
        std=(0.3,),
        num_classes=classes,
        batch_size=16,
        steps_per_epoch=4,
        total_steps=total_steps,
    )
    method = MixUp(create_backbone("r10", in_chans=1, image_size=16), Config(**config), facts)
    for (
        module
    ) in method.modules():  # at zero, they leave of an image what a path of 1x1 kernels sees: its corner
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (method.classifier.weight, method.ema.module[1].weight):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return method.train()


def digits(n=16, labeled=16):
    images = load_images(DataConfig(path="sklearn:digits", image_size=16)).batch(torch.arange(n))
    labels = torch.where(torch.arange(n) < labeled, images.labels, -1)
    return Batch(images.images, labels, images.indices)


def example(n=6, k=4):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, k, generator=generator, dtype=torch.float64)
    labels, partners = torch.randint(k, (2, n), generator=generator)
    return logits, labels, partners


def with_lambda(monkeypatch, *values):
    """Draws of the given lambdas, one after another."""
    left = list(values)
    monkeypatch.setattr(mixup, "draw_lambdas", lambda alpha, n, generator: torch.full((n,), left.pop(0)))


def test_the_loss_by_a_loop_over_mixed_labels():
    logits, labels, partners = example()
    total = 0.0
    for row, y, other in zip(logits.tolist(), labels.tolist(), partners.tolist(), strict=True):
        target = [0.3 * (c == y) + 0.7 * (c == other) for c in range(4)]
        log_sum = math.log(sum(map(math.exp, row)))
        total -= sum(t * (v - log_sum) for t, v in zip(target, row, strict=True))
    found = mixup_loss(logits, labels, partners, torch.tensor([0.3], dtype=torch.float64))
    assert float(found) == pytest.approx(total / 6, rel=1e-12)
    # torch's cross-entropy with the mixed one-hot labels
    one_hot = mix(
        F.one_hot(labels, 4).double(), F.one_hot(partners, 4).double(), torch.tensor([0.3]).double()
    )
    torch.testing.assert_close(found, F.cross_entropy(logits, one_hot))


def test_by_hand():
    # p = (3/4, 1/4), labels 0 and 1 in parts 1/4 and 3/4: ln(4/3) / 4 + 3 ln 4 / 4
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    found = mixup_loss(logits, torch.tensor([0]), torch.tensor([1]), torch.tensor([0.25]).double())
    assert float(found) == pytest.approx(math.log(4 / 3) / 4 + 3 * math.log(4) / 4, rel=1e-12)
    assert mix(torch.tensor([[8.0], [0.0]]), torch.tensor([[0.0], [4.0]]), torch.tensor([0.25])).tolist() == [
        [2.0],
        [3.0],
    ]


def test_lambda_of_1_or_0_is_plain_cross_entropy_bit_for_bit():
    logits, labels, partners = example()
    logits = logits.float()
    for value, expected in ((1.0, labels), (0.0, partners)):
        assert torch.equal(
            mixup_loss(logits, labels, partners, torch.tensor([value])), cross_entropy(logits, expected)
        )
    x, other = torch.randn(2, 5, 1, 3, 3).unbind()
    assert torch.equal(mix(x, other, torch.ones(1)), x) and torch.equal(mix(x, other, torch.zeros(1)), other)


def test_without_alpha_the_method_is_plain_training_bit_for_bit():
    images, method = digits(), build(alpha=0.0, augment=NO_VIEW)
    loss = method.loss(images, method.generator())["loss"]
    loss.backward()
    twin = build(alpha=0.0, augment=NO_VIEW)
    plain = cross_entropy(twin.student()(twin.view(images.images)), images.labels)
    plain.backward()
    assert torch.equal(loss, plain)
    for p, q in zip(method.student().parameters(), twin.student().parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_vanishing_alpha_draws_0_or_1_and_no_image_is_mixed(monkeypatch):
    draws = draw_lambdas(1e-6, 1000, torch.Generator().manual_seed(0))
    assert ((draws == 0) | (draws == 1)).all() and 0.4 < float(draws.mean()) < 0.6
    assert draw_lambdas(0.0, 3, torch.Generator()).tolist() == [1.0] * 3
    images, method = digits(), build(alpha=1e-6, augment=NO_VIEW)
    inputs = []
    method.backbone.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    loss = method.loss(images, method.generator())["loss"]
    rows = [int((method.view(images.images) == x).flatten(1).all(1).nonzero()[0, 0]) for x in inputs[0]]
    assert sorted(rows) == list(range(16))  # every image once, whole
    logits = build().student()(method.view(images.images)[rows])
    assert torch.equal(loss, cross_entropy(logits, images.labels[rows]))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_moments_of_lambda(alpha):
    n = 20_000
    draws = draw_lambdas(alpha, n, torch.Generator().manual_seed(0)).double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(draws.mean()) == pytest.approx(0.5, abs=5 * math.sqrt(variance / n))
    assert float(draws.var()) == pytest.approx(variance, rel=0.05)
    again = draw_lambdas(alpha, n, torch.Generator().manual_seed(0)).double()
    assert torch.equal(draws, again)


def test_one_lambda_a_batch_and_images_and_labels_are_mixed_alike(monkeypatch):
    with_lambda(monkeypatch, 0.3)
    images, method = digits(), build(augment=NO_VIEW)
    inputs = []
    method.backbone.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    loss = method.loss(images, method.generator())["loss"]
    assert len(inputs) == 1  # only mixtures pass
    x = method.view(images.images)
    candidates = mix(x[:, None], x[None].expand(16, -1, -1, -1, -1), torch.tensor([0.3]))  # (16, 16, ...)
    distance = (candidates - inputs[0][:, None]).flatten(2).abs().amax(2)
    partners = distance.argmin(1)
    assert distance.amin(1).max() < 1e-5 and sorted(partners.tolist()) == list(range(16))
    logits = build().student()(inputs[0])
    one_hot = F.one_hot(images.labels, 10).float()
    torch.testing.assert_close(
        loss, F.cross_entropy(logits, 0.3 * one_hot + 0.7 * one_hot[partners]), rtol=1e-4, atol=1e-5
    )


def test_interpolation_by_a_loop_and_its_targets_are_constants():
    logits, *_ = example()
    targets = torch.rand(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        p = [math.exp(v) / sum(map(math.exp, row)) for v in row]
        total += sum((a - b) ** 2 for a, b in zip(p, target, strict=True)) / 4
    logits.requires_grad_()
    targets.requires_grad_()
    found = interpolation_loss(logits, targets)
    assert float(found.detach()) == pytest.approx(total / 6, rel=1e-12)
    found.backward()
    assert targets.grad is None and logits.grad.abs().sum() > 0


def test_ict_mixes_the_probabilities_of_the_teacher(monkeypatch):
    with_lambda(monkeypatch, 1.0, 0.25)
    images, method, twin = digits(labeled=8), *(build(ratio=1, augment=NO_VIEW) for _ in range(2))
    with torch.no_grad():  # so that answers of different images differ
        for own in (method, twin):
            own.ema.module[1].weight.mul_(3)
    inputs = []
    method.backbone.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    outputs = method.loss(images, method.generator())
    outputs["consistency"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.ema.parameters())
    with torch.no_grad():
        x = twin.view(images.images)
        answers = twin.ema(x[8:]).softmax(1)
        mixed = inputs[0][8:]
        candidates = mix(x[8:, None], x[None, 8:].expand(8, -1, -1, -1, -1), torch.tensor([0.25]))
        partners = (candidates - mixed[:, None]).flatten(2).abs().amax(2).argmin(1)
        assert (answers - answers[partners]).abs().max() > 0.1
        p = twin.student()(inputs[0])[8:].softmax(1)
        expected = (p - 0.25 * answers - 0.75 * answers[partners]).square().sum(1).mean() / 10
    assert len(inputs) == 1 and torch.equal(inputs[0][:8], x[:8])  # lambda 1: the labeled as they are
    torch.testing.assert_close(outputs["consistency"].detach(), expected, rtol=1e-4, atol=1e-7)


def test_the_weight_rises_and_the_teacher_is_a_true_mean_at_first():
    method = build(total_steps=100, ratio=1)
    assert method.consistency_weight() == pytest.approx(50 * math.exp(-5))
    method.batches_seen = 40
    assert method.consistency_weight() == 50.0
    assert [method.decay_of_update(k) for k in range(3)] == pytest.approx([1 / 2, 2 / 3, 3 / 4])


def test_bfloat16_logits_are_widened():
    logits, labels, partners = example()
    logits, lambdas = logits.bfloat16(), torch.tensor([0.3])
    with torch.autocast("cpu", torch.bfloat16):
        found = mixup_loss(logits, labels, partners, lambdas)
    torch.testing.assert_close(found, mixup_loss(logits.float(), labels, partners, lambdas))


def test_unlabeled_images_are_refused_where_labels_alone_teach():
    with pytest.raises(ConfigError, match="sampler be Labeled"):
        build().loss(digits(labeled=4), build().generator())
    with pytest.raises(ConfigError, match="alpha"):
        build(alpha=-1.0)
    with pytest.raises(ConfigError, match="ramp"):
        build(ramp=0.0)


def test_hidden_labels_are_never_used():
    images = digits(labeled=8)
    shown = images._replace(labels=torch.where(images.labels < 0, 7, images.labels))
    losses = [build(ratio=1).loss(b, build().generator())["loss"] for b in (images, shown)]
    assert torch.equal(*losses)


def test_the_recipes_share_labels_steps_views_and_average():
    config, ict = recipes.recipe("mixup"), recipes.recipe("mixup:ict")
    baseline = recipes.recipe("mixup:baseline")
    assert baseline.method == dataclasses.replace(config.method, alpha=0.0)
    assert dataclasses.replace(baseline, recipe="mixup", method=config.method) == config
    fixmatch = recipes.recipe("fixmatch").data
    for own in (config, ict):
        assert dataclasses.replace(own.data, sampler=fixmatch.sampler) == fixmatch
        assert own.batch_size // (1 + own.method.ratio) == baseline.batch_size  # labeled images a step
        assert (own.steps, own.seed, own.optimizer) == (baseline.steps, baseline.seed, baseline.optimizer)
        assert (own.method.augment, own.method.ema_decay) == (
            baseline.method.augment,
            baseline.method.ema_decay,
        )
    assert isinstance(config.data.sampler, Labeled) and ict.method.ratio == ict.data.sampler.ratio


def test_lambdas_follow_the_stream_and_not_numpys_state():
    np.random.seed(0)
    first = draw_lambdas(1.0, 4, torch.Generator().manual_seed(5))
    np.random.seed(1)
    assert torch.equal(first, draw_lambdas(1.0, 4, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, draw_lambdas(1.0, 4, torch.Generator().manual_seed(6)))
