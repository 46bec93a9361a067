"""Pairs that share no pixel, a score that is the mutual information of a known world, and nothing between patches."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.cooccurrence import (
    Config,
    Cooccurrence,
    PairScore,
    cooccurrence_loss,
    cut,
    draw_pairs,
)
from embedkit.training.models.backbones import BackboneRequest
from embedkit.training.optim import Optimizer

SMALL = {"patch": 8, "gap": 2, "reach": 6, "pairs": 3, "projection_dim": 16, "hidden_dim": 32}


def build(backbone="r10", size=32, args=None, batch_size=16, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(3, size, size),
        mean=(0.5, 0.4, 0.45),
        std=(0.25, 0.2, 0.3),
        batch_size=batch_size,
        steps_per_epoch=4,
        total_steps=40,
    )
    config = Config(**{**SMALL, "augment": Compose(steps=()), "patch_augment": Compose(steps=()), **config})
    args = {"width": 0.25} if args is None else args
    request = BackboneRequest(name=backbone, in_chans=3, image_size=(size, size), args=args)
    return Cooccurrence(Cooccurrence.build_backbone(request, config, facts), config, facts)


def photos(rows):
    return load_images(DataConfig(path="synthetic:120", image_size=32, color="rgb")).batch(
        torch.as_tensor(rows)
    )


def as_batch(images):
    rows = torch.arange(len(images))
    return Batch(images, rows, rows)


# --- the score is the mutual information ----------------------------------------------------------------------

#: How often symbols meet, in 40ths: a symmetric joint distribution of four.
JOINT = torch.tensor([[8, 1, 2, 1], [1, 4, 1, 2], [2, 1, 3, 4], [1, 2, 4, 3]]).double() / 40
MARGINAL = JOINT.sum(1)
PMI = (JOINT / (MARGINAL[:, None] * MARGINAL)).log()  # the closed form


def world():
    """Every pair as often as it occurs: symbols of 40 true pairs, and of all 1,600 combinations of their parts."""
    counts = (JOINT * 40).round().long().flatten()
    pairs = torch.arange(16).repeat_interleave(counts)
    a, b = pairs // 4, pairs % 4
    return a, b, a.repeat_interleave(40), b.repeat(40)


def kept(n):
    return torch.ones(n, dtype=torch.bool)


def test_the_learned_score_is_the_pointwise_mutual_information_of_a_known_world():
    torch.manual_seed(0)
    score, symbols = PairScore(4, 16, 64).double(), torch.eye(4, dtype=torch.float64)
    a, b, a0, b0 = world()
    optimizer = torch.optim.Adam(score.parameters(), lr=0.01)
    for _ in range(400):
        optimizer.zero_grad()
        positive, negative = score(symbols[a], symbols[b]), score(symbols[a0], symbols[b0])
        cooccurrence_loss(positive, negative, kept(40), kept(1600)).backward()
        optimizer.step()
    found = score(symbols[:, None].expand(4, 4, 4), symbols[None].expand(4, 4, 4)).detach()
    torch.testing.assert_close(found, PMI, atol=0.02, rtol=0)
    x, y = found.flatten() - found.mean(), PMI.flatten() - PMI.mean()
    assert float((x * y).sum() / x.norm() / y.norm()) > 0.999
    assert float((x * y).sum() / (y * y).sum()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("times", [1, 3])
def test_the_loss_is_least_at_the_mutual_information_however_many_pairs_are_by_chance(times):
    a, b, a0, b0 = world()
    a0, b0 = a0.repeat(times), b0.repeat(times)
    table = PMI.clone().requires_grad_()
    loss = cooccurrence_loss(table[a, b], table[a0, b0], kept(40), kept(len(a0)))
    (gradient,) = torch.autograd.grad(loss, table)
    torch.testing.assert_close(gradient, torch.zeros_like(table), atol=1e-12, rtol=0)
    # the plain mean over all pairs would be least log(n_negative / n_positive) below
    logits = torch.cat([table[a, b], table[a0, b0]]) - math.log(len(a0) / 40)
    truth = torch.cat([torch.ones(40), torch.zeros(len(a0))]).double()
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
    (gradient,) = torch.autograd.grad(plain, table)
    torch.testing.assert_close(gradient, torch.zeros_like(table), atol=1e-12, rtol=0)


def test_the_definition():
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    keep = torch.tensor([True, True, False, True, True, False])
    mine = [math.log(1 + math.exp(-v)) for v, k in zip(positive.tolist(), keep.tolist(), strict=True) if k]
    theirs = [math.log(1 + math.exp(v)) for v in negative.tolist()]
    expected = (sum(mine) / 4 + sum(theirs) / 6) / 2
    assert float(cooccurrence_loss(positive, negative, keep, kept(6))) == pytest.approx(expected, rel=1e-12)
    method = build()
    found = method.loss(photos(range(8)), method.generator())
    assert float(found["loss"].detach()) == pytest.approx(math.log(2), rel=1e-6)


def test_the_score_does_not_know_which_patch_comes_first():
    torch.manual_seed(0)
    score = PairScore(5, 8, 16)
    torch.nn.init.normal_(score.score.weight)
    a, b = torch.randn(2, 7, 5)
    torch.testing.assert_close(score(a, b), score(b, a), atol=1e-6, rtol=0)
    assert not torch.allclose(score(a, b), score(a, a))


# --- pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
def test_pairs_share_no_pixel_keep_the_gap_and_lie_in_the_image(size):
    config = Config(**SMALL)
    corners = draw_pairs(4000, size, config, torch.Generator().manual_seed(0))
    assert corners.shape == (4000, 2, 2) and corners.min() == 0
    assert corners[..., 0].max() == size[0] - 8 and corners[..., 1].max() == size[1] - 8
    step = corners[:, 1] - corners[:, 0]
    apart = step.abs().max(1).values - 8
    assert apart.min() == 2 and apart.max() == 6
    assert step.abs().min(1).values.max() == 4  # half a patch aside
    for axis in range(2):  # all four directions
        main = step[:, axis].abs() >= 10
        assert 0.4 < main.float().mean() < 0.6 and 0.4 < (step[main, axis] > 0).float().mean() < 0.6


def test_a_patch_is_what_lies_at_its_corner():
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    x = (100 * rows + columns).expand(2, 3, 12, 10)
    patches = cut(x, torch.tensor([[[0, 0], [8, 6]], [[3, 2], [1, 5]]]), 4)
    assert patches.shape == (2, 2, 3, 4, 4)
    assert patches[0, 1, 0, 0, 0] == 806 and patches[1, 0, 2, 3, 3] == 605


def test_chance_pairs_are_of_two_images_and_of_the_same_patches():
    method = build(negatives=3)
    patches = torch.rand(7, 3, 2, 3, 8, 8)
    number = torch.arange(7)[:, None, None].expand(7, 3, 2)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        positive, negative = method._pairs_of(number, patches, generator)
        assert torch.equal(positive[0], positive[1])
        assert len(negative[0]) == 3 * len(positive[0]) and (negative[0] != negative[1]).all()
        for part in range(2):
            assert torch.equal(torch.bincount(negative[part]), 3 * torch.bincount(positive[part]))
        partners = negative[1].view(3, 7, 3)
        assert all(len(set(partners[:, n, 0].tolist())) == 3 for n in range(7))


def test_pairs_with_a_patch_without_content_are_left_out():
    method, images = build(), photos(range(6)).images.clone()
    images[:3] = 255
    torch.nn.init.normal_(method.score.score.weight)
    x = images.float() / 255
    patches = method.pairs(x, method.generator("pairs"))
    positive, negative = method._pairs_of(patches, patches, torch.Generator().manual_seed(0))
    assert positive[2].view(6, 3).all(1).tolist() == [False] * 3 + [True] * 3
    kept_pairs = negative[2].view(6, 3)
    assert not kept_pairs[:3].any()
    blank = method.loss(as_batch(torch.full_like(images, 255)), method.generator())["loss"]
    assert float(blank.detach()) == 0
    blank.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


# --- what the network sees ------------------------------------------------------------------------------------


def test_features_of_a_patch_hang_on_that_patch_alone_and_not_on_its_color():
    method = build().train()
    patches = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    features = method.patch_features(patches)
    (gradient,) = torch.autograd.grad(features[2].square().sum(), patches)
    assert gradient[2].any() and not gradient[[0, 1, 3, 4]].any()
    tinted = (
        patches * torch.tensor([0.5, 1.0, 0.7])[:, None, None] + torch.tensor([0.1, 0.0, 0.3])[:, None, None]
    )
    torch.testing.assert_close(method.patch_features(tinted), features, atol=1e-4, rtol=1e-3)
    assert method.encoder() is method.backbone


def test_affinities_are_the_scores_of_all_pairs():
    method, images = build().eval(), photos(range(2))
    torch.nn.init.normal_(method.score.score.weight)
    affinities = method.affinities(images.images, 8)
    assert affinities.shape == (2, 16, 16)
    torch.testing.assert_close(affinities, affinities.transpose(1, 2), atol=1e-5, rtol=1e-5)
    x = images.images.float() / 255
    one, other = x[1, :, 0:8, 8:16], x[1, :, 24:32, 16:24]  # patches 1 and 14
    expected = method.score(*method.patch_features(torch.stack([one, other])).unbind(0))
    torch.testing.assert_close(affinities[1, 1, 14], expected, atol=1e-5, rtol=1e-5)
    found = method.solved(images, method.generator())
    assert found["image"].shape == (2, 3, 32, 32) and found["affinity"].shape == (2, 1, 13, 13)
    assert 0 <= found["affinity"].min() and found["affinity"].max() <= 1
    middle = method.affinities(images.images, 2)[:, 6 * 13 + 6].sigmoid()
    torch.testing.assert_close(found["affinity"].flatten(1), middle, atol=1e-5, rtol=1e-5)


def striped(n, seed):
    """Stripes along rows or columns, of random colors: their direction tells, their colors do not."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(32)[:, None].expand(32, 32)
    kind = torch.rand(n, generator=generator) < 0.5
    lines = torch.where(kind[:, None, None], place, place.T) // 2 % 2
    color = torch.rand(n, 3, 1, 1, generator=generator)
    x = 0.2 + 0.3 * color + 0.3 * lines[:, None] + 0.05 * torch.randn(n, 3, 32, 32, generator=generator)
    return as_batch((x.clamp(0, 1) * 255).to(torch.uint8))


def test_pairs_of_held_out_images_are_told_above_chance():
    method = build()
    optimizer = Optimizer(lr=3e-3, weight_decay=0.0).create(method)
    for step in range(50):
        method.train().batches_seen = step
        loss = method.loss(striped(16, step), method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = method.eval().pretext_metric(striped(100, 1000), torch.Generator().manual_seed(0))
    assert 0.65 < found["pair_accuracy"] < 0.85  # half of the chance pairs have one direction: at most 3/4
    assert found["pair_accuracy_by_color"] > 0.8  # and how much color would have told


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"backbone": "vit_t4", "args": {}}, "expected a convolutional backbone"),
        ({"gap": 0}, "expected a gap of 1 to the reach"),
        ({"reach": 17}, r"room for two patches and the reach \(33 pixels\) in images of 32"),
        ({"negatives": 16}, "negatives of 1 to below the batch of 16"),
    ],
)
def test_settings_that_do_not_fit(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build(**wrong)


def test_recipe():
    config = recipes.recipe("cooccurrence")
    assert (
        config.method.gap >= config.method.patch // 4 and config.method.patch == config.data.image_size // 4
    )
