"""Sharpening and both losses by loops and by hand, lambda' from one half on, interleaving, and who moves BatchNorm."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose, RandomInvert
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods import mixmatch
from embedkit.training.methods.mixmatch import (
    Config,
    MixMatch,
    guess_labels,
    interleave,
    larger_parts,
    mixed_loss,
    sharpen,
)
from embedkit.training.methods.mixup import draw_lambdas, mix, mixup_loss
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
    method = MixMatch(create_backbone("r10", in_chans=1, image_size=16), Config(**config), facts)
    for (
        module
    ) in method.modules():  # at zero, they leave of an image what a path of 1x1 kernels sees: its corner
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    with torch.no_grad():
        method.classifier.weight.copy_(
            0.3 * torch.randn(method.classifier.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    return method.train()


def digits(n=16, labeled=8):
    images = load_images(DataConfig(path="sklearn:digits", image_size=16)).batch(torch.arange(n))
    labels = torch.where(torch.arange(n) < labeled, images.labels, -1)
    return Batch(images.images, labels, images.indices)


def logits(*shape):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def watched(method, images, monkeypatch):
    """What a step hands to each of its parts: the guesses, lambda', targets of `mixed_loss`, inputs of the network."""
    seen = {"inputs": []}

    def keep(name, function):
        def wrapped(*args):
            seen[name] = (args, function(*args))
            return seen[name][1]

        monkeypatch.setattr(mixmatch, name, wrapped)

    for name in ("guess_labels", "mixed_loss", "interleave"):
        keep(name, getattr(mixmatch, name))
    handle = method.backbone.register_forward_pre_hook(lambda _, given: seen["inputs"].append(given[0]))
    seen["outputs"] = method.loss(images, method.generator())
    handle.remove()
    return seen


def test_sharpening_by_hand():
    found = sharpen(torch.tensor([[0.6, 0.4]], dtype=torch.float64), 0.5)
    assert found.tolist()[0] == pytest.approx([9 / 13, 4 / 13], rel=1e-12)  # 0.6923, 0.3077
    assert float(found.sum()) == pytest.approx(1.0)
    p = logits(5, 4).softmax(1)
    torch.testing.assert_close(sharpen(p, 1.0), p)
    assert (sharpen(p, 0.5).amax(1) > p.amax(1)).all() and (sharpen(p, 0.01).amax(1) > 0.99).any()


def test_guesses_by_a_loop_and_without_gradient():
    views = logits(3, 5, 4).requires_grad_()
    found = guess_labels(views, 0.5)
    assert not found.requires_grad
    for n, row in enumerate(found.tolist()):
        mean = [0.0] * 4
        for view in views.detach()[:, n].tolist():
            for c, value in enumerate(view):
                mean[c] += math.exp(value) / sum(map(math.exp, view)) / 3
        square = [m**2 for m in mean]
        assert row == pytest.approx([s / sum(square) for s in square], rel=1e-12)


def test_lambda_is_never_below_one_half():
    draws = draw_lambdas(0.75, 1000, torch.Generator().manual_seed(0))
    assert (draws < 0.5).any()
    found = larger_parts(draws)
    assert (found >= 0.5).all()
    assert ((found == draws) | (found == 1 - draws)).all()
    assert larger_parts(torch.tensor([0.2, 0.5, 0.9])).tolist() == pytest.approx([0.8, 0.5, 0.9])


def test_both_terms_by_a_loop():
    rows, targets = logits(6, 4), logits(6, 4).flip(0).softmax(1)
    p = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in rows.tolist()]
    supervised = squares = 0.0
    for n, (own, target) in enumerate(zip(p, targets.tolist(), strict=True)):
        for a, t in zip(own, target, strict=True):
            if n < 2:
                supervised -= t * math.log(a) / 2
            else:
                squares += (t - a) ** 2 / (4 * 4)  # over images and classes
    assert mixed_loss(rows, targets, 2).tolist() == pytest.approx([supervised, squares], rel=1e-12)


def test_by_hand_the_squares_are_meaned_over_classes():
    # sure of another class than the target: 2 / C; and ln C for equal logits
    rows = torch.zeros(2, 5, dtype=torch.float64)
    rows[1, 0] = 100.0
    targets = torch.eye(5, dtype=torch.float64)[[3, 1]]
    assert mixed_loss(rows, targets, 1).tolist() == pytest.approx([math.log(5), 2 / 5])


def test_the_supervised_term_is_that_of_mixup():
    rows, labels, partners = logits(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 2, 1, 0, 0])
    lambdas = torch.tensor([0.7], dtype=torch.float64)
    targets = mix(F.one_hot(labels, 4).double(), F.one_hot(partners, 4).double(), lambdas)
    torch.testing.assert_close(
        mixed_loss(torch.cat([rows, rows]), torch.cat([targets, targets]), 6)[0],
        mixup_loss(rows, labels, partners, lambdas),
    )
    method = build(unlabeled_weight=0.0)
    method.batches_seen = 30
    outputs = method.loss(digits(), method.generator())
    assert torch.equal(outputs["loss"], outputs["supervised"])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_interleaving_is_its_own_inverse_and_mixes_the_first_part_into_all(size):
    parts = [torch.arange(size) + 100 * k for k in range(3)]
    once = interleave(parts)
    for part, back in zip(parts, interleave(once), strict=True):
        assert torch.equal(part, back)
    assert [len(part) for part in once] == [size] * 3
    if size >= 3:
        assert [sorted({int(v) // 100 for v in part}) for part in once] == [[0, 1, 2], [0, 1], [0, 2]]


def test_a_step_by_hand(monkeypatch):
    images, method = digits(), build(augment=NO_VIEW, ramp=0.4)
    method.batches_seen = 8
    seen = watched(method, images, monkeypatch)
    x = method.view(images.images)
    # guesses: two passes over the unlabeled images, sharpened at T
    views, temperature = seen["guess_labels"][0]
    assert views.shape == (2, 8, 10) and temperature == 0.5
    twin = build(augment=NO_VIEW)
    with torch.no_grad():
        expected = sharpen(twin.student()(x[8:]).softmax(1), 0.5)
    guesses = seen["guess_labels"][1]
    torch.testing.assert_close(guesses, expected, rtol=1e-3, atol=1e-5)
    # every mixture: first image and its own target at lambda' >= 1/2, and one partner of all
    _, targets, labeled = seen["mixed_loss"][0]
    own = torch.cat([F.one_hot(images.labels[:8], 10).float(), guesses, guesses])
    everything = torch.cat([x[:8], x[8:], x[8:]])
    mixed = torch.cat(interleave(seen["inputs"][2:]))  # undone
    draws = method.generator("mixup")
    lambdas = draw_lambdas(0.75, 24, draws)
    lambdas = torch.maximum(lambdas, 1 - lambdas)
    partners = torch.randperm(24, generator=draws)
    assert labeled == 8 and lambdas.min() >= 0.5 and lambdas.unique().numel() == 24  # one for each image
    torch.testing.assert_close(mixed, mix(everything, everything[partners], lambdas))
    torch.testing.assert_close(targets, mix(own, own[partners], lambdas))
    assert (partners[:8] >= 8).any() and (partners[8:] < 8).any()  # both kinds mix with both
    # lambda_u: a fifth of the run is half of the ramp
    outputs = {name: float(value.detach()) for name, value in seen["outputs"].items()}
    assert outputs["loss"] == pytest.approx(outputs["supervised"] + 37.5 * outputs["unlabeled"], rel=1e-5)


def test_the_logits_of_a_mixture_meet_its_own_target(monkeypatch):
    # without BatchNorm's batches, logits are those of each mixture on its own, in the order of the targets
    images, method = digits(), build(augment=NO_VIEW)
    method.eval()
    seen = watched(method, images, monkeypatch)
    rows, _, _ = seen["mixed_loss"][0]
    mixed = torch.cat(interleave(seen["inputs"][2:]))
    torch.testing.assert_close(rows, method.student()(mixed), rtol=1e-3, atol=1e-4)


def test_only_the_first_sub_batch_moves_running_statistics(monkeypatch):
    images, method = digits(), build()
    seen = watched(method, images, monkeypatch)
    assert [len(x) for x in seen["inputs"]] == [8] * 5  # two views guessed, three sub-batches learned
    twin = build()
    twin.student()(seen["inputs"][2])
    for (name, found), expected in zip(method.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
    assert method.backbone.net.bn1.num_batches_tracked == 1


def test_guesses_take_no_gradient():
    # the gradient is that of the mixed part alone: with guesses from another copy it is the same
    images, method = digits(), build(augment=NO_VIEW)
    method.batches_seen = 20
    method.loss(images, method.generator())["loss"].backward()
    found = [p.grad.clone() for p in method.student().parameters()]
    twin = build(augment=NO_VIEW)
    twin.batches_seen = 20
    with torch.no_grad():
        guesses = guess_labels(twin.student()(twin.view(images.images[8:])).expand(2, -1, -1), 0.5)
    assert float(guesses.amax(1).mean()) < 0.99  # not all sure already
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixmatch, "guess_labels", lambda *_: guesses)
        twin = build(augment=NO_VIEW)
        twin.batches_seen = 20
        twin.loss(images, twin.generator())["loss"].backward()
    for gradient, parameter in zip(found, twin.student().parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_views_of_an_image_differ(monkeypatch):
    seen = watched(build(), digits(), monkeypatch)
    assert (seen["inputs"][0] != seen["inputs"][1]).flatten(1).any(1).sum() >= 7
    method = build(guesses=3, augment=RandomInvert(p=1.0))
    seen = watched(method, digits(), monkeypatch)
    assert len(seen["inputs"]) == 3 + 4
    inverted = method.view(digits().images[8:], RandomInvert(p=1.0), method.generator())
    torch.testing.assert_close(seen["inputs"][0], inverted)


def test_bfloat16_logits_are_widened():
    rows, targets = logits(6, 4).bfloat16(), logits(6, 4).softmax(1).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed_loss(rows, targets, 2), guess_labels(rows[None], 0.5)
    torch.testing.assert_close(found[0], mixed_loss(rows.float(), targets, 2))
    torch.testing.assert_close(found[1], guess_labels(rows.float()[None], 0.5))


def test_hidden_labels_and_in_the_baseline_unlabeled_images_are_never_used():
    images = digits()
    shown = images._replace(labels=torch.where(images.labels < 0, 7, images.labels))
    dark = images._replace(images=torch.cat([images.images[:8], 0 * images.images[8:]]))
    for only, batch in ((False, shown), (True, dark)):
        losses = [build(supervised_only=only).loss(b, build().generator())["loss"] for b in (images, batch)]
        assert torch.equal(*losses)


def test_bad_fields_are_refused():
    for field, value in (("guesses", 0), ("temperature", 0.0), ("temperature", 2.0), ("alpha", 0.0)):
        with pytest.raises(ConfigError, match="mixmatch"):
            build(**{field: value})
    with pytest.raises(ConfigError, match="ratio 1"):
        build().loss(digits(labeled=4), build().generator())


def test_the_baseline_differs_in_one_field_and_labels_are_those_of_fixmatch():
    config, baseline = recipes.recipe("mixmatch"), recipes.recipe("mixmatch:baseline")
    method = dataclasses.replace(baseline.method, supervised_only=False)
    assert dataclasses.replace(baseline, recipe="mixmatch", method=method) == config
    fixmatch = recipes.recipe("fixmatch")
    assert dataclasses.replace(config.data, sampler=fixmatch.data.sampler) == fixmatch.data
    assert config.data.sampler.ratio == 1 and config.seed == fixmatch.seed
