"""Equation 4 by a loop and by hand, where gradient must not flow, one pass for BatchNorm, the exported average."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.augment import Compose, RandAugment, RandomInvert
from embedkit.training.augment.randaugment import RANDAUGMENT_RANGES
from embedkit.training.config import Facts, with_overrides
from embedkit.training.data import (
    Batch,
    DataConfig,
    LabeledAndUnlabeled,
    Loader,
    keep_labels,
    load_images,
)
from embedkit.training.methods.fixmatch import Config, FixMatch, consistency_loss, lr_factor
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer


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
        optimizer=Optimizer(name="sgd", lr=0.03, schedule="constant", warmup_steps=0),
    )
    return FixMatch(create_backbone("r10", in_chans=1, image_size=16), Config(**config), facts)


def digits(n=16, labeled=4):
    """The first `labeled` have labels."""
    images = load_images(DataConfig(path="sklearn:digits", image_size=16)).batch(torch.arange(n))
    labels = torch.where(torch.arange(n) < labeled, images.labels, -1)
    return Batch(images.images, labels, images.indices)


def logits(n=6, k=4, spread=4.0):
    generator = torch.Generator().manual_seed(0)
    return spread * torch.randn(2, n, k, generator=generator, dtype=torch.float64)


def test_equation_4_by_a_loop():
    weak, strong = logits()
    total, confident = 0.0, 0
    for w, s in zip(weak.tolist(), strong.tolist(), strict=True):
        q = [math.exp(v) / sum(math.exp(u) for u in w) for v in w]
        if max(q) >= 0.9:
            confident += 1
            label = q.index(max(q))
            total -= math.log(math.exp(s[label]) / sum(math.exp(u) for u in s))
    assert 0 < confident < 6  # both cases occur
    loss, share = consistency_loss(weak, strong, 0.9)
    assert float(loss) == pytest.approx(total / 6, rel=1e-12)
    assert float(share) == confident / 6


def test_by_hand_the_mean_counts_the_masked():
    # q = (0.9, 0.1) is confident at 0.8 and q = (0.6, 0.4) is not; the strong view gives 1/4 to the first's label
    weak = torch.tensor([[math.log(9), 0.0], [math.log(1.5), 0.0]], dtype=torch.float64)
    strong = torch.tensor([[0.0, math.log(3)], [5.0, -5.0]], dtype=torch.float64)
    loss, share = consistency_loss(weak, strong, 0.8)
    assert float(loss) == pytest.approx(math.log(4) / 2) and float(share) == 0.5  # of 2 images, not of 1
    assert consistency_loss(weak, strong, 0.95).tolist() == [0.0, 0.0]
    assert float(consistency_loss(weak, strong, 0.6)[1]) == 1.0  # the threshold itself counts


def test_pseudo_labels_take_no_gradient():
    weak, strong = (t.clone().requires_grad_() for t in logits())
    consistency_loss(weak, strong, 0.9).sum().backward()  # the share adds nothing to it
    assert weak.grad is None
    confident = weak.detach().softmax(1).amax(1) >= 0.9
    assert ((strong.grad.abs().sum(1) > 0) == confident).all()


def test_bfloat16_logits_are_widened():
    weak, strong = logits().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = consistency_loss(weak, strong, 0.9)
    torch.testing.assert_close(found, consistency_loss(weak.float(), strong.float(), 0.9))


def test_the_first_loss_is_ln_k_and_nothing_is_confident():
    method = build()
    outputs = method.loss(digits(), method.generator())
    assert float(outputs["loss"].detach()) == pytest.approx(math.log(10), rel=1e-5)
    assert float(outputs["confident"]) == 0.0 and float(outputs["consistency"].detach()) == 0.0


def test_without_its_weight_the_loss_is_the_labeled_cross_entropy():
    method = build(unlabeled_weight=0.0, threshold=0.0)
    torch.nn.init.normal_(method.classifier.weight)
    outputs = method.loss(digits(), method.generator())
    assert float(outputs["consistency"].detach()) > 0
    assert torch.equal(outputs["loss"], outputs["supervised"])
    with torch.no_grad():
        whole = build(unlabeled_weight=2.0, threshold=0.0)
        whole.load_state_dict(method.state_dict())
        other = whole.loss(digits(), whole.generator())
    expected = float(outputs["supervised"].detach() + 2 * outputs["consistency"].detach())
    assert float(other["loss"]) == pytest.approx(expected, rel=1e-4)


def test_no_gradient_reaches_the_network_through_the_weak_branch():
    method = build(threshold=0.0, weak=Compose(steps=()), strong=RandomInvert(p=1.0))
    torch.nn.init.normal_(method.classifier.weight)
    images = digits()
    rows = {}

    def keep(_, args, output):
        output.retain_grad()
        rows["features"] = output

    handle = method.backbone.register_forward_hook(keep)
    method.loss(images, method.generator())["loss"].backward()
    handle.remove()
    labeled, weak, strong = rows["features"].grad.split([4, 12, 12])
    assert (weak == 0).all()
    assert (labeled.abs().sum(1) > 0).all() and (strong.abs().sum(1) > 0).all()


def test_labeled_weak_and_strong_views_pass_at_once():
    method = build(weak=Compose(steps=()), strong=RandomInvert(p=1.0))
    images, inputs = digits(), []
    handle = method.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    method.loss(images, method.generator())
    handle.remove()
    assert len(inputs) == 1  # so BatchNorm's statistics are those of all three
    labeled, weak, strong = inputs[0].split([4, 12, 12])
    x = method.view(images.images)
    assert torch.equal(labeled, x[:4]) and torch.equal(weak, x[4:])
    inverted = method.view(images.images[4:], RandomInvert(p=1.0), method.generator())
    torch.testing.assert_close(strong, inverted)


def test_views_of_an_image_are_drawn_one_by_one():
    method, inputs = build(), []
    handle = method.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    method.loss(digits(), method.generator())
    handle.remove()
    _, weak, strong = inputs[0].split([4, 12, 12])
    assert (weak != strong).flatten(1).any(dim=1).all()
    assert set(method.config.strong.steps[1].ops) < set(RANDAUGMENT_RANGES)
    assert isinstance(method.config.strong.steps[1], RandAugment)


def test_hidden_labels_are_never_used():
    images = digits()
    shown = Batch(images.images, torch.where(images.labels < 0, 7, images.labels), images.indices)
    losses = []
    for batch in (images, shown):
        method = build(threshold=0.0)
        losses.append(method.loss(batch, method.generator())["loss"])
    assert torch.equal(*losses)


def test_the_baseline_sees_no_unlabeled_image_and_strong_views_of_the_labeled():
    images = digits()
    noise = torch.randint(0, 256, images.images.shape, dtype=torch.uint8)
    other = Batch(torch.cat([images.images[:4], noise[4:]]), images.labels, images.indices)
    losses = {}
    for only in (True, False):
        for name, batch in (("images", images), ("noise", other)):
            method = build(supervised_only=only, threshold=0.0)
            torch.nn.init.normal_(method.classifier.weight, generator=torch.Generator().manual_seed(1))
            losses[only, name] = method.loss(batch, method.generator())["loss"]
    assert torch.equal(losses[True, "images"], losses[True, "noise"])
    assert not torch.equal(losses[False, "images"], losses[False, "noise"])
    method, inputs = build(supervised_only=True, strong=RandomInvert(p=1.0), weak=Compose(steps=())), []
    handle = method.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    outputs = method.loss(images, method.generator())
    handle.remove()
    assert inputs[0].shape[0] == 8
    torch.testing.assert_close(
        inputs[0][4:], method.view(images.images[:4], RandomInvert(p=1.0), method.generator())
    )
    assert float(outputs["loss"].detach()) == pytest.approx(2 * math.log(10), rel=1e-5)


def test_the_learning_rate_ends_at_its_cosine_of_7_sixteenths():
    assert lr_factor(0.0) == 1.0
    assert lr_factor(1.0) == pytest.approx(0.195090322, abs=1e-9)
    assert lr_factor(4 / 7) == pytest.approx(math.sqrt(0.5))  # a quarter of pi


def test_the_average_looks_back_as_far_as_the_sources_or_a_twentieth_of_the_run():
    assert build(total_steps=2**20).ema_decay() == build(total_steps=20_000).ema_decay() == 0.999
    assert build(total_steps=4000).ema_decay() == pytest.approx(0.995)  # 200 updates
    assert build(total_steps=None).ema_decay() == 0.999


def test_overfits_one_batch():
    method, images = build(total_steps=60, threshold=0.5), digits(20, labeled=5)
    optimizer = Optimizer(lr=2e-3).create(method)
    names = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not any(id(p) in names for p in method.ema.parameters())
    for step in range(40):
        method.batches_seen = step % 2 + 1
        outputs = method.loss(images, method.generator())
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        method.on_train_batch_end(None, images, step)
    assert method.backbone.net.conv1.weight.grad.abs().sum() > 0
    assert float(outputs["supervised"].detach()) < 0.2
    assert float(outputs["confident"]) > 0.25


def test_the_average_is_exported_and_follows_the_equation():
    method = build()
    assert method.encoder() is method.ema.module[0] and method.encoder() is not method.backbone
    start = method.backbone.net.conv1.weight.detach().clone()
    method.batches_seen = 30
    with torch.no_grad():
        method.backbone.net.conv1.weight.add_(1.0)
        method.backbone.net.bn1.running_mean.fill_(3.0)
    method.on_train_batch_end(None, None, 0)
    decay = min(1 - 20 / 40, 30 / 39)  # of a run of 40 steps, or its warm-up at update 29
    found = method.encoder().net.conv1.weight
    torch.testing.assert_close(found, decay * start + (1 - decay) * (start + 1.0))
    assert (method.encoder().net.bn1.running_mean == 3.0).all()  # BatchNorm's statistics are copied
    assert not any(p.requires_grad for p in method.ema.parameters())


def test_two_ratios_that_differ_are_refused():
    method = build(ratio=1)
    with pytest.raises(ConfigError, match="ratio"):
        method.loss(digits(16, labeled=4), method.generator())
    with pytest.raises(ConfigError, match="ratio"):
        build(ratio=3).loss(digits(15, labeled=4), build().generator())


def test_no_labels_are_refused_with_the_next_step():
    with pytest.raises(ConfigError, match="data.label"):
        build(classes=0)


def test_streams_fit_the_method():
    config = recipes.recipe("fixmatch")
    assert config.method.ratio == config.data.sampler.ratio
    assert isinstance(config.data.sampler, LabeledAndUnlabeled)
    images = keep_labels(load_images(DataConfig(path="sklearn:digits", image_size=16)), 2, seed=0)
    loader = Loader(images, config.data.sampler, batch_size=32, seed=0)
    for batch, _ in zip(loader, range(3), strict=False):
        assert (batch.labels[:8] >= 0).all() and (batch.labels[8:] < 0).any()


def test_the_baseline_differs_from_the_recipe_in_one_field():
    config, baseline = recipes.recipe("fixmatch"), recipes.recipe("fixmatch:baseline")
    assert baseline.method.supervised_only and baseline.recipe == "fixmatch:baseline"
    method = dataclasses.replace(baseline.method, supervised_only=False)
    assert dataclasses.replace(baseline, recipe="fixmatch", method=method) == config


@pytest.mark.parametrize("name", ["fixmatch", "fixmatch:baseline"])
def test_a_run_exports_the_average_and_resumes_with_it(name, tmp_path):
    settings = [
        "threads=1",
        "batch_size=32",
        "steps=24",
        "data.image_size=16",
        "data.labels_per_class=4",
        "log_every=3",
    ]
    config = with_overrides(recipes.recipe(name), settings)
    result = run.train(config, data="sklearn:digits", out=tmp_path / "run", progress=False)
    _, method = run.load_run(result.run)
    weights = load_file(result.run / "encoder.safetensors")
    average, student = method.ema.module[0].net.state_dict(), method.backbone.net.state_dict()
    assert torch.equal(weights["conv1.weight"], average["conv1.weight"])
    assert not torch.equal(weights["conv1.weight"], student["conv1.weight"])
    assert torch.equal(weights["bn1.running_mean"], student["bn1.running_mean"])
    assert method.ema_decay() == pytest.approx(1 - 20 / 24)
    checkpoint = torch.load(result.run / run.CHECKPOINT, weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        # of the last of 24 steps
        assert group["lr"] == pytest.approx(config.optimizer.lr * lr_factor(23 / 24))
    assert 0 <= result.metrics["validation_accuracy"] <= 1
