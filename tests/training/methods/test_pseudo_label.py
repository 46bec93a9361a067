"""The loss by a loop and by hand, alpha at its corners, guesses that take no gradient, BatchNorm of labeled images."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.pseudo_label import Config, PseudoLabel, alpha, pseudo_label_loss
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
    method = PseudoLabel(create_backbone("r10", in_chans=1, image_size=16), Config(**config), facts)
    for (
        module
    ) in method.modules():  # at zero, they leave of an image what a path of 1x1 kernels sees: its corner
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    with torch.no_grad():
        method.classifier.weight.copy_(
            0.3 * torch.randn(method.classifier.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    method.batches_seen = total_steps  # alpha has risen
    return method.train()


def digits(n=16, labeled=4):
    images = load_images(DataConfig(path="sklearn:digits", image_size=16)).batch(torch.arange(n))
    labels = torch.where(torch.arange(n) < labeled, images.labels, -1)
    return Batch(images.images, labels, images.indices)


def logits(n=12, k=4):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(n, k, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_the_loss_by_a_loop(threshold):
    total, confident = 0.0, 0
    for row in logits().tolist():
        largest = max(math.exp(v) for v in row) / sum(map(math.exp, row))
        if largest >= threshold:
            confident += 1
            total -= math.log(largest)
    assert confident == 12 if threshold == 0 else 0 < confident < 12
    loss, share = pseudo_label_loss(logits(), threshold)
    assert float(loss) == pytest.approx(total / 12, rel=1e-12)
    assert float(share) == confident / 12


def test_by_hand_the_mean_counts_the_masked():
    # p = (3/4, 1/4) and (1/2 + e, 1/2 - e): -ln(3/4) over two images
    rows = torch.tensor([[math.log(3), 0.0], [1e-9, 0.0]], dtype=torch.float64)
    assert float(pseudo_label_loss(rows, 0.7)[0]) == pytest.approx(math.log(4 / 3) / 2)
    assert float(pseudo_label_loss(rows)[0]) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_alpha_at_its_corners():
    # epochs 100 and 600 of 1,000, alpha_f = 3
    found = [alpha(done, 3.0, 0.1, 0.6) for done in (0.0, 0.1, 0.35, 0.6, 1.0)]
    assert found == pytest.approx([0.0, 0.0, 1.5, 3.0, 3.0])


def test_the_method_weighs_by_alpha():
    images = digits()
    for seen, weight in ((4, 0.0), (14, 1.5), (24, 3.0), (40, 3.0)):
        method = build(augment=NO_VIEW)
        method.batches_seen = seen
        outputs = {k: float(v.detach()) for k, v in method.loss(images, method.generator()).items()}
        assert outputs["loss"] == pytest.approx(
            outputs["supervised"] + weight * outputs["unlabeled"], rel=1e-5
        )
        assert outputs["unlabeled"] > 0.1 and 0.1 <= outputs["largest_class"] <= 1


def test_the_gradient_is_p_minus_the_guess_and_none_flows_through_the_guess():
    rows = logits().requires_grad_()
    pseudo_label_loss(rows, 0.7)[0].backward()
    p = rows.detach().softmax(1)
    sure = p.amax(1, keepdim=True) >= 0.7
    guess = torch.nn.functional.one_hot(p.argmax(1), 4)
    torch.testing.assert_close(rows.grad, (p - guess) * sure / 12)


def test_it_lowers_the_entropy():
    # of two classes the gradients of loss and entropy have one sign, entry by entry
    rows = logits(k=2).requires_grad_()
    (own,) = torch.autograd.grad(pseudo_label_loss(rows)[0], rows)
    p = rows.softmax(1)
    (entropy,) = torch.autograd.grad(-(p * p.log()).sum(1).mean(), rows)
    assert torch.equal(own.sign(), entropy.sign()) and own.abs().min() > 0
    # and of four they point the same way
    rows = logits().requires_grad_()
    (own,) = torch.autograd.grad(pseudo_label_loss(rows)[0], rows)
    p = rows.softmax(1)
    (entropy,) = torch.autograd.grad(-(p * p.log()).sum(1).mean(), rows)
    assert ((own * entropy).sum(1) > 0).all()


def test_bfloat16_logits_are_widened():
    rows = logits().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = pseudo_label_loss(rows, 0.7)
    torch.testing.assert_close(found, pseudo_label_loss(rows.float(), 0.7))


def test_running_statistics_are_those_of_the_labeled_images():
    images = digits()
    noise = torch.randint(0, 256, images.images.shape, dtype=torch.uint8)
    other = images._replace(images=torch.cat([images.images[:4], noise[4:]]))
    states = []
    for batch, only in ((images, False), (other, False), (images, True)):
        method = build(augment=NO_VIEW, supervised_only=only)
        method.loss(batch, method.generator())
        states.append(dict(method.backbone.named_buffers()))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) and torch.equal(value, states[2][name]), name
    assert states[0]["net.bn1.num_batches_tracked"] == 1
    assert states[0]["net.bn1.running_mean"].abs().sum() > 0


def test_unlabeled_images_are_normalized_by_their_own_batch():
    images, method = digits(), build(augment=NO_VIEW)
    found = method.loss(images, method.generator())["unlabeled"]
    twin = build(augment=NO_VIEW)
    expected = pseudo_label_loss(twin.student()(twin.view(images.images[4:])))[0]
    torch.testing.assert_close(found, expected)


def test_hidden_labels_and_in_the_baseline_unlabeled_images_are_never_used():
    images = digits()
    shown = images._replace(labels=torch.where(images.labels < 0, 7, images.labels))
    dark = images._replace(images=torch.cat([images.images[:4], 0 * images.images[4:]]))
    for only, batch in ((False, shown), (True, dark)):
        losses = [build(supervised_only=only).loss(b, build().generator())["loss"] for b in (images, batch)]
        assert torch.equal(*losses)
    assert not torch.equal(*[build().loss(b, build().generator())["loss"] for b in (images, dark)])


def test_bad_fields_are_refused():
    with pytest.raises(ConfigError, match="start < end"):
        build(start=0.6, end=0.6)
    with pytest.raises(ConfigError, match="data.label"):
        build(classes=1)


def test_the_recipes_differ_where_they_say():
    config = recipes.recipe("pseudo_label")
    for name, fields in (
        ("baseline", {"supervised_only": True}),
        ("thresholded", {"threshold": 0.95, "unlabeled_weight": 1.0, "start": 0.0, "end": 0.4}),
    ):
        other = recipes.recipe(f"pseudo_label:{name}")
        assert other.method == dataclasses.replace(config.method, **fields)
        assert dataclasses.replace(other, recipe="pseudo_label", method=config.method) == config
    fixmatch = recipes.recipe("fixmatch")
    assert dataclasses.replace(config.data, sampler=fixmatch.data.sampler) == fixmatch.data
    assert config.method.ratio == config.data.sampler.ratio and config.seed == fixmatch.seed
