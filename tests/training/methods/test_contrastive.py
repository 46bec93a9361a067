"""Pairs by a loop and by PyTorch Metric Learning, values at known distances, and the gradient at a distance of 0."""

import math

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.augment import Compose
from embedkit.training.config import Facts, with_overrides
from embedkit.training.data import DataConfig, load_images
from embedkit.training.methods.contrastive import Config, Contrastive, contrastive_loss
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer

FORMS = ("hadsell", "hinge")


def embeddings(n=14, dim=4, identities=4, dtype=torch.float64, seed=0):
    """Unit vectors, of which dissimilar pairs lie on both sides of a margin of 1; labels at random."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, dim, generator=generator, dtype=dtype) + torch.tensor([1.0] + [0] * (dim - 1)).to(
        dtype
    )
    return F.normalize(z, dim=1), torch.randint(identities, (n,), generator=generator)


def by_loop(z, labels, margin, form):
    terms = {True: [], False: []}
    for i, a in enumerate(z.tolist()):
        for j, b in enumerate(z.tolist()):
            if i == j:
                continue
            distance = math.sqrt(sum((u - v) ** 2 for u, v in zip(a, b, strict=True)))
            same = bool(labels[i] == labels[j])
            term = distance if same else max(0.0, margin - distance)
            terms[same].append(term**2 / 2 if form == "hadsell" else term)
    if form == "hinge":
        terms = {same: [term for term in found if term > 0] for same, found in terms.items()}
    return [sum(terms[same]) / len(terms[same]) for same in (True, False)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_equation_4_by_a_loop(form, seed):
    z, labels = embeddings(seed=seed)
    expected = by_loop(z, labels, 1.0, form)
    assert contrastive_loss(z, labels, 1.0, form).tolist() == pytest.approx(expected, rel=1e-9)
    assert expected != by_loop(z, labels, 0.8, form)


def test_the_papers_mean_over_all_pairs_is_a_weight():
    z, labels = embeddings()
    equal = labels[:, None] == labels
    similar, dissimilar = int(equal.sum()) - len(z), int((~equal).sum())
    distances = torch.cdist(z, z)
    terms = torch.where(equal, distances.square(), F.relu(1 - distances).square()) / 2  # 0 on the diagonal
    means = contrastive_loss(z, labels)
    found = (similar * means[0] + dissimilar * means[1]) / (similar + dissimilar)
    torch.testing.assert_close(found, terms.sum() / (similar + dissimilar))


@pytest.mark.parametrize("margin", [0.5, 1.0, 1.6])
def test_equals_pytorch_metric_learning(margin):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.reducers import MeanReducer

    z, labels = embeddings(n=20, seed=4)
    theirs = losses.ContrastiveLoss(neg_margin=margin, distance=LpDistance())(z, labels)
    torch.testing.assert_close(contrastive_loss(z, labels, margin, "hinge").sum(), theirs)
    # the paper's similar pairs: half of squared distances, meaned over all
    squared = losses.ContrastiveLoss(neg_margin=0, distance=LpDistance(power=2), reducer=MeanReducer())
    torch.testing.assert_close(contrastive_loss(z, labels, margin)[0], squared(z, labels) / 2)


@pytest.mark.parametrize("m", [1.0, 3.0])
def test_values_at_known_distances(m):
    for share in (0.0, 0.5, 1.0, 2.0):
        distance, left = share * m, max(0.0, 1 - share) * m
        z = torch.tensor([[0.0, 0.0], [0.6 * distance, 0.8 * distance]], dtype=torch.float64)
        for labels, index, size in (([0, 0], 0, distance), ([0, 1], 1, left)):
            squares = contrastive_loss(z, torch.tensor(labels), m)
            assert float(squares[index]) == pytest.approx(size**2 / 2) and float(squares[1 - index]) == 0.0
            plain = contrastive_loss(z, torch.tensor(labels), m, "hinge")
            assert float(plain[index]) == pytest.approx(size) and float(plain[1 - index]) == 0.0


def test_at_one_point_it_is_half_a_squared_margin():
    z, labels = torch.ones(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])
    assert contrastive_loss(z, labels, 1.2).tolist() == pytest.approx([0.0, 0.72])


@pytest.mark.parametrize("form", FORMS)
def test_gradient_at_a_distance_of_0_is_0_and_else_right(form):
    z = torch.zeros(3, 2, dtype=torch.float64)
    z[2, 0] = 0.5
    z.requires_grad_()
    # 0 and 1 are equal, dissimilar; 2 is of the identity of 0, and within the margin of 1
    contrastive_loss(z, torch.tensor([0, 1, 0]), 1.0, form).sum().backward()
    assert torch.isfinite(z.grad).all() and not z.grad[:, 1].any()
    # of 4 ordered dissimilar pairs two are 1-2: half of max(0, 1 - D)^2 / 2, or of max(0, 1 - D)
    push = 0.5 * (0.5 if form == "hadsell" else 1.0)
    pull = 0.5 if form == "hadsell" else 1.0
    assert z.grad[:, 0].tolist() == pytest.approx([-pull, push, pull - push])
    other, labels = embeddings(n=6, seed=2)
    assert torch.autograd.gradcheck(
        lambda z: contrastive_loss(z, labels, 1.0, form), (other.requires_grad_(),)
    )


def test_invariances_missing_identities_and_no_pairs():
    z, labels = embeddings()
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=z.dtype, generator=torch.Generator().manual_seed(1)))[0]
    for form in FORMS:
        loss = contrastive_loss(z, labels, 1.0, form)
        torch.testing.assert_close(contrastive_loss(z @ turn + 3, labels.flip(0).flip(0), 1.0, form), loss)
        torch.testing.assert_close(contrastive_loss(z.flip(0), labels.flip(0), 1.0, form), loss)
        more, unknown = torch.cat([z, z[:5] + 0.01]), torch.cat([labels, torch.full((5,), -1)])
        torch.testing.assert_close(contrastive_loss(more, unknown, 1.0, form), loss)
        for none in (torch.full((14,), -1), torch.arange(14)):
            assert float(contrastive_loss(z, none, 1.0, form)[0]) == 0.0
    with pytest.raises(ConfigError, match="hadsell or hinge, found 'squared'"):
        contrastive_loss(z, labels, 1.0, "squared")


def test_bfloat16_embeddings_are_widened():
    z, labels = embeddings(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = contrastive_loss(z.bfloat16(), labels)
    torch.testing.assert_close(found, contrastive_loss(z.bfloat16().float(), labels))


def build(**config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(1, 28, 28), mean=(0.3,), std=(0.35,), num_classes=10, batch_size=32, steps_per_epoch=4,
        total_steps=40,
    )  # fmt: skip
    plain = Config(augment=Compose(steps=()), **config)
    return Contrastive(create_backbone("r10", in_chans=1, image_size=28, width=0.5), plain, facts)


def test_two_dimensions_hold_the_digits_apart():
    """The paper's experiment, small: a free plane of two dimensions, in which neighbors are of one digit."""
    images = load_images(DataConfig(path="sklearn:digits", image_size=28))
    method = build(embed_dim=2, normalize=False, margin=2.0)
    optimizer = Optimizer(lr=4e-3).create(method)
    rows = torch.Generator().manual_seed(0)
    for step in range(80):
        batch = images.batch(torch.randperm(1000, generator=rows)[:64])
        loss = method.loss(batch, method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        Optimizer(lr=4e-3, warmup_steps=10).set_lr(optimizer, step, 80)
        optimizer.step()
    held_out = images.batch(torch.arange(1000, 1256))
    with torch.no_grad():
        found = method.eval().pretext_metric(held_out, method.generator())["nearest_is_same"]
    assert float(found) > 0.6  # 1/10 by chance


def test_bad_settings_are_refused():
    for config, message in (
        ({"margin": 0.0}, "margin above 0"),
        ({"margin": 2.5}, "at most 2 for unit vectors"),
        ({"form": "l2"}, "hadsell or hinge, found 'l2'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**config)
    assert build(margin=2.5, normalize=False).config.margin == 2.5


def test_a_run_brings_identities_together(tmp_path):
    settings = [
        "threads=1", "batch_size=16", "data.image_size=16", "data.label=label", "steps=25", "method.embed_dim=16",
        "optimizer.warmup_steps=0", "backbone_args.width=0.5",
    ]  # fmt: skip
    config = with_overrides(recipes.recipe("contrastive"), settings)
    result = run.train(config, data="synthetic:300", out=tmp_path / "run", progress=False)
    assert result.metrics["validation_nearest_is_same"] > 0.3  # 1/10 by chance
    assert {"loss", "similar", "dissimilar"} <= result.metrics.keys()
