"""Every figure against a loop over its definition, against constants by hand, and against the library that set it."""

import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.evaluation.metrics import (
    clustering_scores,
    kmeans,
    knn_predict,
    pair_scores,
    rankme,
    retrieval,
    roc,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers(high, count, seed=0):
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed))


def cosine(a, b):
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


def at_angles(angles):
    angles = torch.as_tensor(angles, dtype=torch.float64)
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


# --- kNN --------------------------------------------------------------------------------------------------


def naive_knn(train, labels, test, k, temperature):
    predicted = []
    for query in test:
        ranked = sorted(range(len(train)), key=lambda i: -cosine(query, train[i]))
        votes = dict.fromkeys(range(int(labels.max()) + 1), 0.0)
        for i in ranked[:k]:
            votes[int(labels[i])] += math.exp(cosine(query, train[i]) / temperature)
        predicted.append(max(votes, key=votes.__getitem__))
    return predicted


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.1), (7, 1.0), (100, 0.5)])
def test_knn_is_the_loop(k, temperature):
    train, labels, test = noise(40, 6), numbers(4, 40), noise(25, 6, seed=1)
    found = knn_predict(train, labels, test, num_classes=4, k=k, temperature=temperature)
    assert found.tolist() == naive_knn(train, labels, test, k, temperature)


def test_knn_weighs_its_votes():
    # cosines 1, 0.9, 0.9: exp(10) = 22026 for class 0 against 2 exp(9) = 16206; at T = 1, 2.72 against 4.92
    train, test = at_angles([0.0, math.acos(0.9), -math.acos(0.9)]), at_angles([0.0])
    labels = torch.tensor([0, 1, 1])
    assert knn_predict(train, labels, test, num_classes=2).tolist() == [0]
    assert knn_predict(train, labels, test, num_classes=2, temperature=1.0).tolist() == [1]


def test_knn_knows_directions_not_lengths():
    train, labels, test = noise(60, 5), numbers(3, 60), noise(30, 5, seed=1)
    expected = knn_predict(train, labels, test, num_classes=3)
    stretched = train * torch.linspace(0.1, 9, 60)[:, None]
    assert torch.equal(knn_predict(stretched, labels, test * 7, num_classes=3), expected)


# --- retrieval --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "expected"), [((1,), 0.10), ((1, 10), 0.12), ((1, 2), 0.20), (range(1, 11), 1.0), ((2,), 0.05)]
)
def test_map_at_r_by_hand(hits, expected):
    """R = 10; relevant images that are not among the first ten stand behind them."""
    ranks = [*hits, *range(20, 30 - len(hits))]
    labels = torch.ones(31, dtype=torch.int64)
    labels[[0, *ranks]] = 0
    found = retrieval(at_angles(torch.arange(31) * 0.02), labels)
    assert found.map_at_r[0] == pytest.approx(expected, abs=1e-12)
    assert found.p_at_1[0] == (1 in hits)


def test_retrieval_is_pytorch_metric_learnings():
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import CosineSimilarity
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    from pytorch_metric_learning.utils.inference import CustomKNN

    sizes = (1, 1, 2, 3, 5, 8, 30)  # two images that nobody could find, and classes of very different sizes
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))] * 10 + 5
    features = noise(len(labels), 4) + 0.7 * noise(7, 4, seed=1)[labels // 10]
    theirs = AccuracyCalculator(
        include=("mean_average_precision_at_r", "precision_at_1"),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity()),
        kmeans_func=lambda *_: None,
    ).get_accuracy(features, labels)
    ours = retrieval(features, labels)
    assert len(ours.queries) == sum(sizes) - 2
    assert float(ours.map_at_r.mean()) == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-12)
    assert float(ours.p_at_1.mean()) == pytest.approx(theirs["precision_at_1"], abs=1e-12)
    assert 0.2 < theirs["mean_average_precision_at_r"] < 0.8


def test_retrieval_is_the_loop():
    features, labels = noise(50, 6), numbers(9, 50)
    found = retrieval(features, labels)
    expected = []
    for q in range(50):
        others = sorted(
            (i for i in range(50) if i != q), key=lambda i, q=q: -cosine(features[q], features[i])
        )
        relevant = [bool(labels[i] == labels[q]) for i in others]
        r = sum(relevant)
        if r:
            expected.append(sum(sum(relevant[: i + 1]) / (i + 1) for i in range(r) if relevant[i]) / r)
    assert found.map_at_r.numpy() == pytest.approx(np.array(expected), abs=1e-12)


def test_retrieval_without_any_pair():
    found = retrieval(noise(4, 3), torch.arange(4))
    assert len(found.queries) == len(found.map_at_r) == len(found.p_at_1) == 0


@pytest.mark.parametrize("block", [1, 130, 700])
def test_blocks_change_nothing(block):
    x, y, test = noise(60, 8), numbers(5, 60), noise(33, 8, seed=2)
    assert torch.equal(
        knn_predict(x, y, test, num_classes=5, block=block), knn_predict(x, y, test, num_classes=5)
    )
    found, whole = retrieval(x, y, block=block), retrieval(x, y)
    assert all(torch.equal(value, vars(whole)[name]) for name, value in vars(found).items())
    for part, all_at_once in zip(pair_scores(x, y, block=block), pair_scores(x, y), strict=True):
        np.testing.assert_allclose(part, all_at_once, atol=1e-6)


# --- clustering -------------------------------------------------------------------------------------------


def test_names_of_clusters_do_not_matter():
    labels = numbers(4, 100)
    found = clustering_scores(torch.tensor([7, 2, 9, 0])[labels], labels)
    assert (found.acc, found.nmi, found.ari) == (1.0, pytest.approx(1.0), 1.0)


@pytest.mark.parametrize(("clusters", "classes"), [(4, 4), (5, 3), (3, 5), (1, 4), (6, 1)])
def test_agreement_is_the_definition(clusters, classes):
    pytest.importorskip("sklearn")
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    labels = numbers(classes, 80)
    assigned = torch.where(numbers(3, 80, seed=2) > 0, labels % clusters, numbers(clusters, 80, seed=1))
    found = clustering_scores(assigned, labels)
    # one class a cluster and one cluster a class; clusters or classes that are left over get nothing
    names = [*range(classes), *[-1] * max(0, clusters - classes)]
    best = max(
        sum(match[int(a)] == int(y) for a, y in zip(assigned, labels, strict=True))
        for match in itertools.permutations(names, clusters)
    )
    assert found.acc == pytest.approx(best / 80)
    assert found.nmi == pytest.approx(normalized_mutual_info_score(labels, assigned), abs=1e-12)
    assert found.ari == pytest.approx(adjusted_rand_score(labels, assigned), abs=1e-12)


def test_kmeans_finds_directions():
    pytest.importorskip("sklearn")
    labels = torch.arange(3).repeat_interleave(20)
    features = at_angles([0.0, 2.0, 4.0])[labels] + 0.05 * noise(60, 2)
    stretched = features * torch.linspace(0.1, 50, 60)[:, None]  # length is not looked at
    clusters = kmeans(stretched, 3)
    assert clustering_scores(clusters, labels).acc == 1.0
    assert torch.equal(kmeans(stretched, 3), clusters)


# --- verification -----------------------------------------------------------------------------------------


def test_roc_by_hand():
    # 0.9 and 0.8 are above all three impostors, 0.4 above two: 8 of 9 pairs; at 0.7, FAR = FRR = 1/3
    curve = roc(np.array([0.9, 0.4, 0.8]), np.array([0.1, 0.7, 0.3]))
    assert curve.auc == pytest.approx(8 / 9)
    assert curve.eer == pytest.approx(1 / 3)
    assert curve.tar_at_far(0.5) is None  # of three impostors


def test_eer_between_two_thresholds():
    # all equal: nothing or everything is accepted, and the curve between (0, 0) and (1, 1) is a line
    curve = roc(np.ones(5), np.ones(7))
    assert (curve.auc, curve.eer) == (0.5, 0.5)
    # FAR, FRR: (0, 0.5) at 3, (0.25, 0.5) at 2, (0.25, 0) at 1
    assert roc(np.array([3, 1]), np.array([2, 0, 0, 0])).eer == pytest.approx(0.25)
    # FAR, FRR: (0, 1), then with five of ten equal scores accepted at once (0.2, 0.6), then (1, 0): with t from
    # the second to the third, 0.2 + 0.8 t = 0.6 - 0.6 t at t = 2/7
    curve = roc(np.array([2, 2, 1, 1, 1]), np.array([2, 1, 1, 1, 1]))
    assert curve.eer == pytest.approx(0.2 + 0.8 * 2 / 7)
    # perfect, and the reverse
    assert roc(np.array([2, 3]), np.array([0, 1])).eer == 0.0
    assert roc(np.array([0, 1]), np.array([2, 3])).eer == 1.0


def test_roc_is_scikit_learns_with_ties():
    pytest.importorskip("sklearn")
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    genuine, impostor = rng.normal(0.5, 0.4, 300).round(1), rng.normal(0, 0.4, 4000).round(1)
    curve = roc(genuine, impostor)
    truth = np.repeat([1, 0], [300, 4000])
    assert curve.auc == pytest.approx(roc_auc_score(truth, np.concatenate([genuine, impostor])), abs=1e-12)
    for far in (0.01, 0.1):
        thresholds = [t for t in np.unique(np.r_[genuine, impostor]) if (impostor >= t).mean() <= far]
        expected = max(((genuine >= t).mean() for t in thresholds), default=0.0)
        assert curve.tar_at_far(far) == pytest.approx(expected)


def test_equal_scores_are_not_taken_apart():
    genuine, impostor = np.array([0.9] * 5 + [0.5] * 5), np.full(100_000, 0.5)
    assert roc(genuine, impostor).tar_at_far(1e-3) == 0.5
    assert roc(genuine - 0.9, impostor).tar_at_far(1e-3) == 0.0


def test_a_rate_that_is_met_exactly_counts():
    impostor = np.arange(
        1000.0
    )  # 30 of them stand at 970 and above, so a threshold just above 969 gives 0.03
    assert roc(impostor + 0.5, impostor).tar_at_far(0.03) == pytest.approx(0.031)  # from 969.5 on
    assert roc(impostor, impostor).tar_at_far(0.0301) == pytest.approx(0.03)
    assert roc(impostor - 0.5, impostor).tar_at_far(0.03) == pytest.approx(0.03)  # from 969.5 on
    curve = roc(np.array([970.0, 0.0]), impostor)
    assert (curve.tar_at_far(0.03), curve.tar_at_far(0.0305)) == (0.5, 0.5)


def test_a_false_accept_rate_needs_enough_impostors():
    scores = np.random.default_rng(0).normal(size=29_999)
    assert roc(scores, scores).tar_at_far(1e-3) is None
    assert roc(scores, np.append(scores, 0.0)).tar_at_far(1e-3) == pytest.approx(1e-3, abs=1e-4)
    with pytest.raises(ConfigError, match="genuine and impostor"):
        roc(np.empty(0), scores)


def test_all_pairs_once():
    features, labels = noise(12, 4), numbers(4, 12)
    pairs = list(itertools.combinations(range(12), 2))
    for scores, same in zip(pair_scores(features, labels), (True, False), strict=True):
        expected = [cosine(features[i], features[j]) for i, j in pairs if (labels[i] == labels[j]) == same]
        np.testing.assert_allclose(np.sort(scores), np.sort(expected), atol=1e-6)


def test_sampled_pairs_are_drawn_evenly():
    labels = torch.tensor([3, 3, 0, 8, 8, 8, 3, 3, 8, 5])  # 6 + 0 + 6 + 0 genuine of 45 pairs
    features = noise(10, 6)
    genuine, impostor = pair_scores(features, labels)
    assert (len(genuine), len(impostor)) == (12, 33)
    drawn = pair_scores(features, labels, most=1, sample=60_000)
    for every, some in zip((genuine, impostor), drawn, strict=True):
        nearest = np.abs(some[:, None] - every[None]).argmin(1)
        assert np.abs(some - every[nearest]).max() < 1e-6
        share = np.bincount(nearest, minlength=len(every)) / len(some) * len(every)
        assert share.min() > 0.9 and share.max() < 1.1
    again = pair_scores(features, labels, most=1, sample=60_000)
    assert all(np.array_equal(one, two) for one, two in zip(drawn, again, strict=True))


def test_no_pairs_of_a_kind():
    assert [len(part) for part in pair_scores(noise(9, 3), torch.zeros(9).long(), most=1, sample=50)] == [
        50,
        0,
    ]
    assert [len(part) for part in pair_scores(noise(9, 3), torch.arange(9), most=1, sample=50)] == [0, 50]
    assert [len(part) for part in pair_scores(noise(2, 3), torch.arange(2))] == [0, 1]


# --- rank -------------------------------------------------------------------------------------------------


def with_spectrum(values, rows=40, seed=0):
    left, _ = torch.linalg.qr(noise(rows, len(values), seed=seed).double())
    right, _ = torch.linalg.qr(noise(len(values), len(values), seed=seed + 1).double())
    return (left * torch.tensor(values).double() @ right.T).float()


def test_rankme_of_known_spectra():
    assert rankme(with_spectrum([2.5] * 7)) == pytest.approx(7, rel=1e-4)
    assert rankme(with_spectrum([2.5] * 7 + [0.0] * 9)) == pytest.approx(7, rel=1e-3)
    p = np.array([8, 4, 2, 1]) / 15
    assert rankme(with_spectrum([8.0, 4.0, 2.0, 1.0])) == pytest.approx(
        np.exp(-(p * np.log(p)).sum()), rel=1e-4
    )
    assert rankme(with_spectrum([8.0, 4.0, 2.0, 1.0]) * 1000) == pytest.approx(
        np.exp(-(p * np.log(p)).sum()), rel=1e-4
    )


def test_rankme_does_not_centre():
    """A large common part is one direction, and centered features would have many."""
    features = noise(100, 10)
    assert rankme(features) > 9
    assert rankme(features + 1e4) == pytest.approx(1, abs=0.05)
