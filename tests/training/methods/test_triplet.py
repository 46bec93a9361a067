"""Triplets by three nested loops and by PyTorch Metric Learning, a constant by hand, gradients, and a collapse."""

import math

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.augment import Compose
from embedkit.training.config import Facts, with_overrides
from embedkit.training.data import Batch
from embedkit.training.methods.triplet import Config, Triplet, mine, triplet_loss
from embedkit.training.models.backbones import create_backbone

FACTS = Facts(
    image_shape=(1, 28, 28), mean=(0.3,), std=(0.35,), num_classes=5, batch_size=16, steps_per_epoch=4, total_steps=40
)  # fmt: skip
MARGIN = 0.3


def embeddings(n=18, dim=4, identities=5, dtype=torch.float64, seed=0):
    """Unit vectors that lie near enough to each other for triplets of every kind, in random labels."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, dim, generator=generator, dtype=dtype) + torch.tensor([1.5] + [0] * (dim - 1)).to(
        dtype
    )
    return F.normalize(z, dim=1), torch.randint(identities, (n,), generator=generator)


def triplets_by_loops(z, labels, margin, mining, fallback="farthest"):
    n, found = len(z), []
    d = [[float((z[i] - z[j]).square().sum()) for j in range(n)] for i in range(n)]
    for a in range(n):
        positives = [p for p in range(n) if p != a and labels[p] == labels[a]]
        negatives = [k for k in range(n) if labels[k] != labels[a]]
        if not positives or not negatives:
            continue
        if mining == "batch_hard":
            found.append((a, max(positives, key=lambda p: d[a][p]), min(negatives, key=lambda k: d[a][k])))
            continue
        for p in positives:
            semi_hard = [k for k in negatives if d[a][p] < d[a][k] < d[a][p] + margin]
            if mining == "all_semi_hard":
                found += [(a, p, k) for k in semi_hard]
            elif semi_hard:
                found.append((a, p, min(semi_hard, key=lambda k: d[a][k])))
            elif fallback == "farthest":
                found.append((a, p, max(negatives, key=lambda k: d[a][k])))
    return found, d


def masks(labels):
    equal = labels[:, None] == labels
    return equal & ~torch.eye(len(labels), dtype=torch.bool), ~equal


MINING = [
    ("semi_hard", "farthest"),
    ("semi_hard", "skip"),
    ("all_semi_hard", "skip"),
    ("batch_hard", "skip"),
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("mining", "fallback"), MINING)
def test_miner_and_loss_are_those_of_nested_loops(mining, fallback, seed):
    z, labels = embeddings(seed=seed)
    expected, d = triplets_by_loops(z, labels.tolist(), MARGIN, mining, fallback)
    found = mine(torch.cdist(z, z).square(), *masks(labels), MARGIN, mining, fallback)
    assert set(zip(*(index.tolist() for index in found), strict=True)) == set(expected)
    assert len(found[0]) == len(expected) > 10 and not bool((found[0] == found[1]).any())
    terms = [max(0.0, d[a][p] - d[a][n] + MARGIN) for a, p, n in expected]
    loss, active, spread = triplet_loss(z, labels, MARGIN, mining, fallback)
    above = [term for term in terms if term > 0]
    assert float(loss) == pytest.approx(sum(above) / len(above), rel=1e-9)
    assert float(active) == pytest.approx(len(above) / len(terms))
    assert float(spread) == pytest.approx(sum(math.sqrt(v) for row in d for v in row) / (18 * 17), rel=1e-9)


def test_cases_are_apart():
    """The nearest semi-hard negative, the hardest and the farthest are three: what follows tells them apart."""
    z, labels = embeddings()
    sets = {
        (mining, fallback): set(
            zip(
                *(
                    index.tolist()
                    for index in mine(torch.cdist(z, z).square(), *masks(labels), MARGIN, mining, fallback)
                ),
                strict=True,
            )
        )
        for mining, fallback in MINING
    }
    assert len({frozenset(found) for found in sets.values()}) == 4
    assert sets["semi_hard", "skip"] < sets["all_semi_hard", "skip"]


def test_triplets_and_loss_are_pytorch_metric_learnings():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner

    z, labels = embeddings(n=24, seed=5)
    squared = LpDistance(power=2, normalize_embeddings=True)
    theirs = TripletMarginMiner(MARGIN, "semihard", distance=squared)(z, labels)
    distances = torch.cdist(z, z).square()
    ours = mine(distances, *masks(labels), MARGIN, "all_semi_hard")
    both = [set(zip(*(index.tolist() for index in found), strict=True)) for found in (theirs, ours)]
    assert both[0] == both[1] and len(both[0]) > 100
    loss = TripletMarginLoss(MARGIN, distance=squared)(z, labels, theirs)
    torch.testing.assert_close(triplet_loss(z, labels, MARGIN, "all_semi_hard")[0], loss)
    # the default: of theirs, the nearest negative of each pair
    nearest: dict[tuple[int, int], int] = {}
    for a, p, n in both[0]:
        if (a, p) not in nearest or distances[a, n] < distances[a, nearest[a, p]]:
            nearest[a, p] = n
    ours = mine(distances, *masks(labels), MARGIN, "semi_hard", "skip")
    assert {(a, p): n for a, p, n in zip(*(i.tolist() for i in ours), strict=True)} == nearest
    # Hermans et al.: plain distances, a soft margin
    plain = LpDistance(normalize_embeddings=True)
    hard = BatchHardMiner(distance=plain)(z, labels)
    loss = TripletMarginLoss(0.0, smooth_loss=True, distance=plain)(z, labels, hard)
    ours = triplet_loss(z, labels, mining="batch_hard", squared=False, soft_margin=True)[0]
    torch.testing.assert_close(ours, loss)


def at(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_constants_by_hand():
    # on a circle |a - b|^2 = 2 - 2 cos: a at 0, p at 60 (1), negatives at 90 (2) and at 180 (4), both alone
    z, labels = at(0, 60, 90, 180), torch.tensor([0, 0, 1, 2])
    # a-p-90: 1 - 2 + 1.5; p-a: 90 is at 2 - sqrt 3 < 1, hard, 180 at 3 beyond the margin: the farthest, no loss
    loss, active, _ = triplet_loss(z, labels, 1.5)
    assert float(loss) == pytest.approx(0.5) and float(active) == pytest.approx(0.5)
    # the hardest negative of both is the one at 90: 0.5, and 1 - (2 - sqrt 3) + 1.5
    hard = triplet_loss(z, labels, 1.5, "batch_hard")[0]
    assert float(hard) == pytest.approx((0.5 + 0.5 + math.sqrt(3)) / 2)
    # plain distances: 1 and sqrt 2
    assert float(triplet_loss(z, labels, 0.5, squared=False)[0]) == pytest.approx(1.5 - math.sqrt(2))
    # nothing to learn is a loss of 0
    for none in (torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.full((4,), -1)):
        assert triplet_loss(z, none).tolist()[:2] == [0.0, 0.0]


def test_at_one_point_the_loss_is_the_margin_or_ln_2():
    z, labels = at(*[20] * 6), torch.tensor([0, 0, 0, 1, 1, 1])
    for mining in ("semi_hard", "batch_hard"):
        for squared in (True, False):
            assert float(triplet_loss(z, labels, MARGIN, mining, squared=squared)[0]) == pytest.approx(MARGIN)
        found = triplet_loss(z, labels, MARGIN, mining, squared=False, soft_margin=True)
        assert float(found[0]) == pytest.approx(math.log(2)) and float(found[2]) == 0.0
    z.requires_grad_()  # and the gradient is a number
    triplet_loss(z, labels, MARGIN, "batch_hard", squared=False)[0].backward()
    assert torch.isfinite(z.grad).all()


def test_invariances_and_images_without_an_identity():
    z, labels = embeddings()
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=z.dtype, generator=torch.Generator().manual_seed(1)))[0]
    order = torch.randperm(18, generator=torch.Generator().manual_seed(2))
    for mining, fallback in MINING:
        loss = triplet_loss(z, labels, MARGIN, mining, fallback)
        torch.testing.assert_close(triplet_loss(z @ turn, labels, MARGIN, mining, fallback), loss)
        torch.testing.assert_close(triplet_loss(z[order], labels[order], MARGIN, mining, fallback), loss)
        more, unknown = torch.cat([z, z[:5] + 0.01]), torch.cat([labels, torch.full((5,), -1)])
        torch.testing.assert_close(triplet_loss(more, unknown, MARGIN, mining, fallback)[:2], loss[:2])


def test_gradient_reaches_all_three_of_a_triplet():
    z, labels = at(0, 60, 90).requires_grad_(), torch.tensor([0, 0, 1])
    triplet_loss(z, labels, 1.5, fallback="skip")[0].backward()
    with torch.no_grad():  # of |a - p|^2 - |a - n|^2: 2 (n - p), 2 (p - a), 2 (a - n)
        expected = 2 * torch.stack([z[2] - z[1], z[1] - z[0], z[0] - z[2]])
    torch.testing.assert_close(z.grad, expected)
    z, labels = embeddings(n=8, seed=3)
    assert torch.autograd.gradcheck(lambda z: triplet_loss(z, labels, MARGIN)[0], (z.requires_grad_(),))


def test_bfloat16_embeddings_are_widened():
    z, labels = embeddings(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = triplet_loss(z.bfloat16(), labels)
    torch.testing.assert_close(found, triplet_loss(z.bfloat16().float(), labels))


def build(**config):
    torch.manual_seed(0)
    plain = Config(augment=Compose(steps=()), **config)
    return Triplet(create_backbone("r10", in_chans=1, image_size=28), plain, FACTS)


def images(n=16):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Batch(pixels, torch.arange(n) // 4, torch.arange(n))


def test_a_collapse_is_said():
    method, batch = build(mining="batch_hard"), images()
    method.loss(batch, method.generator())  # silent: warnings are errors here
    torch.nn.init.zeros_(method.embedding.weight)
    with pytest.warns(UserWarning, match="all embeddings are at one point.*mining=semi_hard"):
        outputs = method.loss(batch, method.generator())
    assert float(outputs["loss"].detach()) == pytest.approx(0.2) and float(outputs["mean_distance"]) == 0.0


def test_the_metric_counts_pairs_and_bad_settings_are_refused():
    method, batch = build(), images()
    twins = Batch(batch.images[:4].repeat(2, 1, 1, 1), torch.tensor([0, 1, 2, -1] * 2), torch.arange(8))
    assert float(method.eval().pretext_metric(twins, method.generator())["nearest_is_same"]) == 1.0
    # every image's twin is of another identity; image 3 and its twin are alone and do not count
    others = twins._replace(labels=torch.tensor([0, 1, 2, 4, 1, 2, 0, 5]))
    assert float(method.pretext_metric(others, method.generator())["nearest_is_same"]) == 0.0
    for config, message in (
        ({"margin": 0.0}, "margin above 0"),
        ({"mining": "hard"}, "mining: expected one of semi_hard"),
        ({"fallback": "none"}, "fallback: expected one of farthest"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**config)


def test_a_run_brings_identities_together(tmp_path):
    settings = [
        "threads=1", "batch_size=16", "data.image_size=16", "data.label=label", "steps=25", "method.embed_dim=16",
        "optimizer.warmup_steps=0", "backbone_args.width=0.5",
    ]  # fmt: skip
    config = with_overrides(recipes.recipe("triplet"), settings)
    result = run.train(config, data="synthetic:300", out=tmp_path / "run", progress=False)
    assert result.metrics["validation_nearest_is_same"] > 0.3  # 1/10 by chance
