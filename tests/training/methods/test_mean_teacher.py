"""Consistency by a loop and by hand, a teacher that no gradient reaches, its true average, and two moons."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")

from sklearn.datasets import make_moons

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose, GaussianNoise
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.mean_teacher import (
    Config,
    MeanTeacher,
    consistency_loss,
    true_average,
)
from embedkit.training.models.backbones import create_backbone

NO_VIEW = Compose(steps=())


def build(total_steps=40, classes=10, backbone=None, image_shape=(1, 16, 16), seed=0, **config):
    torch.manual_seed(seed)
    facts = Facts(
        image_shape=image_shape,
        mean=(0.3,),
        std=(0.3,),
        num_classes=classes,
        batch_size=16,
        steps_per_epoch=4,
        total_steps=total_steps,
        seed=seed,
    )
    backbone = backbone or create_backbone("r10", in_chans=1, image_size=16)
    method = MeanTeacher(backbone, Config(**config), facts)
    for (
        module
    ) in method.modules():  # at zero, they leave of an image what a path of 1x1 kernels sees: its corner
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return method


def awake(method):
    """With a classifier off zero, and a teacher that differs."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (method.classifier.weight, method.ema.module[1].weight):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return method


def digits(n=16, labeled=4):
    images = load_images(DataConfig(path="sklearn:digits", image_size=16)).batch(torch.arange(n))
    labels = torch.where(torch.arange(n) < labeled, images.labels, -1)
    return Batch(images.images, labels, images.indices)


def logits(n=6, k=4):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(2, n, k, generator=generator, dtype=torch.float64)


def test_consistency_by_a_loop():
    student, teacher = logits()
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(v) / sum(map(math.exp, s)) for v in s]
        q = [math.exp(v) / sum(map(math.exp, t)) for v in t]
        total += sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / len(p)
    assert float(consistency_loss(student, teacher)) == pytest.approx(total / 6, rel=1e-12)


def test_consistency_by_hand_is_a_mean_over_classes():
    # (3/4, 1/4) and (1/2, 1/2): 2 / 16 over two classes; certain and opposite: 2 over K
    student = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    assert float(consistency_loss(student, torch.zeros_like(student))) == pytest.approx(1 / 16)
    one, other = 100 * torch.eye(5, dtype=torch.float64)[:2]
    assert float(consistency_loss(one[None], other[None])) == pytest.approx(2 / 5)
    assert float(consistency_loss(student, student + 7.0)) == pytest.approx(0.0, abs=1e-30)


def test_the_pure_loss_gives_the_teacher_no_gradient():
    student, teacher = (t.clone().requires_grad_() for t in logits())
    consistency_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_bfloat16_logits_are_widened():
    student, teacher = logits().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = consistency_loss(student, teacher)
    torch.testing.assert_close(found, consistency_loss(student.float(), teacher.float()))


def test_no_gradient_reaches_the_teacher_and_the_students_is_that_of_both_terms():
    method = awake(build(augment=NO_VIEW)).train()
    # a constant for a teacher gives the same gradient: nothing flows through it
    method.batches_seen = 16  # the weight has risen
    images = digits()
    with torch.no_grad():
        twin = awake(build(augment=NO_VIEW)).train()
        target = twin.ema(twin.view(images.images))
    method.loss(images, method.generator())["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.ema.parameters())
    found = [p.grad for p in method.backbone.parameters()]

    twin.batches_seen = 16
    student = twin.student()(twin.view(images.images))
    difference = student.softmax(1) - target.softmax(1)
    supervised = torch.nn.functional.cross_entropy(student[:4], images.labels[:4])
    (supervised + 50 * difference.square().sum(1).mean() / 10).backward()
    for gradient, parameter in zip(found, twin.backbone.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


def test_consistency_is_zero_for_the_same_views_and_weights_alone():
    method = awake(build(augment=NO_VIEW)).train()
    images = digits()
    with torch.no_grad():
        method.classifier.weight.mul_(0.1)
        method.ema.module[1].weight.copy_(method.classifier.weight)
    assert float(method.loss(images, method.generator())["consistency"].detach()) == 0.0
    other = build().train()  # the same weights, views of their own
    other.load_state_dict(method.state_dict())
    assert float(other.loss(images, other.generator())["consistency"].detach()) > 1e-6
    with torch.no_grad():
        method.ema.module[1].weight[0].add_(0.1)
    assert float(method.loss(images, method.generator())["consistency"].detach()) > 1e-6


def test_labeled_images_count_in_the_consistency():
    images = digits()
    method = awake(build(augment=NO_VIEW)).train()
    inputs = []
    method.ema.module[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    found = method.loss(images, method.generator())["consistency"]
    assert torch.equal(inputs[0], method.view(images.images))  # all 16, the labeled first
    with torch.no_grad():
        twin = awake(build(augment=NO_VIEW)).train()
        x = twin.view(images.images)
        expected = consistency_loss(twin.student()(x), twin.ema(x))
    torch.testing.assert_close(found.detach(), expected)


def test_the_weight_rises_from_e_to_the_minus_5():
    method = build(total_steps=100, consistency_weight=50.0, ramp=0.4)
    assert method.consistency_weight() == pytest.approx(50 * 0.006737947, rel=1e-6)
    method.batches_seen = 20  # half of the ramp
    assert method.consistency_weight() == pytest.approx(50 * math.exp(-1.25))
    for seen in (40, 100):
        method.batches_seen = seen
        assert method.consistency_weight() == 50.0
    for ramp in (0.0, 1.5):
        with pytest.raises(ConfigError, match="ramp"):
            build(ramp=ramp)


def test_the_teacher_is_the_true_mean_of_all_weights_at_first():
    method, weight = build(total_steps=10**6), None
    values = [method.backbone.net.conv1.weight.detach().clone()]
    for step in range(7):
        method.batches_seen = step + 1
        weight = torch.full_like(values[0], float(step**2))
        values.append(weight)
        with torch.no_grad():
            method.backbone.net.conv1.weight.copy_(weight)
        method.on_train_batch_end(None, None, step)
    found = method.encoder().net.conv1.weight
    torch.testing.assert_close(found, torch.stack(values).mean(0))
    assert method.encoder() is method.ema.module[0] and method.encoder() is not method.backbone


def test_the_decay_ends_at_its_own():
    # a^n theta_0 + (1 - a^n) theta after n steps at constant theta
    method = build(total_steps=40)  # of which the average looks back a twentieth: a = 1/2
    start = method.backbone.net.conv1.weight.detach().clone()
    with torch.no_grad():
        method.backbone.net.conv1.weight.add_(1.0)
    for step in range(100, 105):
        method.batches_seen = step
        method.on_train_batch_end(None, None, step)
    torch.testing.assert_close(method.encoder().net.conv1.weight, start + 1 - 0.5**5)
    assert true_average(0) == 0.5 and true_average(998) == pytest.approx(0.999)
    assert build(total_steps=20_000).decay_of_update(10**6) == 0.999


def test_hidden_labels_are_never_used():
    images = digits()
    shown = images._replace(labels=torch.where(images.labels < 0, 7, images.labels))
    losses = [awake(build()).loss(batch, build().generator())["loss"] for batch in (images, shown)]
    assert torch.equal(*losses)


def test_the_baseline_sees_no_unlabeled_image():
    images = digits()
    noise = torch.randint(0, 256, images.images.shape, dtype=torch.uint8)
    other = images._replace(images=torch.cat([images.images[:4], noise[4:]]))
    outputs = [
        awake(build(supervised_only=True)).train().loss(batch, build().generator())
        for batch in (images, other)
    ]
    assert torch.equal(outputs[0]["loss"], outputs[1]["loss"]) and "consistency" not in outputs[0]


def test_batches_without_labels_in_front_are_refused():
    with pytest.raises(ConfigError, match="ratio 1"):
        build(ratio=1).loss(digits(16, labeled=4), build().generator())
    with pytest.raises(ConfigError, match="data.label"):
        build(classes=0)


def test_the_baseline_differs_in_one_field_and_labels_are_those_of_fixmatch():
    config, baseline = recipes.recipe("mean_teacher"), recipes.recipe("mean_teacher:baseline")
    method = dataclasses.replace(baseline.method, supervised_only=False)
    assert dataclasses.replace(baseline, recipe="mean_teacher", method=method) == config
    assert config.method.ratio == config.data.sampler.ratio
    fixmatch = recipes.recipe("fixmatch")
    assert dataclasses.replace(config.data, sampler=fixmatch.data.sampler) == fixmatch.data
    assert config.seed == fixmatch.seed


class Plane(torch.nn.Sequential):
    """Points of a plane, as images of two pixels -> 64 features."""

    dim = 64

    def __init__(self):
        linear, relu = torch.nn.Linear, torch.nn.ReLU
        super().__init__(torch.nn.Flatten(), linear(2, 64), relu(), linear(64, 64), relu())


def two_moons(supervised_only, seed=0, steps=1000):
    """Accuracy on two moons of 200 points each with two labels in each."""
    points, labels = make_moons(400, noise=0.05, random_state=0)
    points = torch.from_numpy((points - points.min(0)) / (points.max(0) - points.min(0)) * 0.7 + 0.15)
    images = (255 * points).round().to(torch.uint8).reshape(-1, 1, 1, 2)
    labels = torch.from_numpy(labels)
    known = []
    for k in range(2):
        own = torch.nonzero(labels == k)[:, 0]
        own = own[points[own, 0].argsort()]
        known += [own[len(own) // 5], own[4 * len(own) // 5]]
    known = torch.stack(known)
    torch.manual_seed(seed)
    method = build(
        total_steps=steps,
        classes=2,
        backbone=Plane(),
        image_shape=(1, 1, 2),
        seed=seed,
        ratio=16,
        consistency_weight=10.0,
        supervised_only=supervised_only,
        augment=GaussianNoise(sigma=(0.05, 0.05)),
    ).train()
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=2e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(400, (64,), generator=generator)
        hidden = torch.full((64,), -1)
        batch = Batch(
            torch.cat([images[known], images[rows]]), torch.cat([labels[known], hidden]), torch.empty(0)
        )
        method.batches_seen = step + 1
        loss = method.loss(batch, method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.on_train_batch_end(None, batch, step)
    with torch.no_grad():
        whole = Batch(images, labels, torch.arange(400))
        return float(method.eval().pretext_metric(whole, None)["accuracy"])


def test_unlabeled_points_of_two_moons_help():
    baseline, found = two_moons(True), two_moons(False)
    assert found > 0.9 and found > baseline + 0.04
