"""DeepDPM's clusters: losses by hand, surgery that touches no one else, and 15 Gaussians found from every start."""

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
metrics = pytest.importorskip("sklearn.metrics")

from embedkit.errors import ConfigError
from embedkit.training.methods.deepdpm.clusters import (
    Clusters,
    ClustersConfig,
    cluster_loss,
    fit,
    principal_halves,
    subcluster_loss,
)
from embedkit.training.methods.deepdpm.niw import hard_moments, log_hastings_split

NETS = ("logit_weight", "logit_bias", "sub_weight1", "sub_bias1", "sub_weight2", "sub_bias2")


def fifteen_gaussians(seed, n=10_000):
    """The authors' set: means {-5, 0, 5} x {-5, -3, 0, 3, 5}, covariances A A^T, A = I / 2 + U(-0.3, 0.2)."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % 15)
    means = np.array([(x, y) for x in (-5, 0, 5) for y in (-5, -3, 0, 3, 5)], float)
    roots = 0.5 * np.eye(2) + rng.uniform(-0.3, 0.2, (15, 2, 2))
    noise = np.einsum("nij,nj->ni", roots[labels], rng.standard_normal((n, 2)))
    return torch.from_numpy(means[labels] + noise).float(), labels


def blobs(centers, n=60, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor(centers, dtype=torch.float32)
    labels = torch.arange(n * len(centers)) % len(centers)
    return centers[labels] + scale * torch.randn(len(labels), centers.shape[1], generator=generator), labels


def started(codes, labels, **changes):
    torch.manual_seed(0)
    clusters = Clusters(codes.shape[1], ClustersConfig(**changes))
    optimizer = clusters.optimizer()
    clusters.start(codes, optimizer, labels)
    return clusters, optimizer


def obey(clusters, codes, labels):
    """Train the clustering net until it says `labels`."""
    optimizer = torch.optim.Adam(
        [clusters.logit_weight, clusters.logit_bias, *clusters.hidden.parameters()], lr=0.05
    )
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(clusters.logits(codes), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clusters.zero_grad()
    assert torch.equal(clusters.assign(codes), labels)


# ---- losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["estep", "net"])
def test_cluster_loss_by_hand_and_its_gradient(divergence):
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    # r = (1/4, 3/4), (1/2, 1/2); every probability + 1e-5, over 1 + 2e-5
    s = 1e-5
    rows = []
    for r, t in (((0.25, 0.75), (0.5, 0.5)), ((0.5, 0.5), (1.0, 0.0))):
        r, t = [(p + s) / (1 + 2 * s) for p in r], [(p + s) / (1 + 2 * s) for p in t]
        p, q = (t, r) if divergence == "estep" else (r, t)
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert float(cluster_loss(logits, targets, divergence).detach()) == pytest.approx(
        sum(rows) / 2, rel=1e-12
    )
    if divergence == "estep":  # 1/2 ln(4/3) and ln 2, but for the smoothing
        assert rows == pytest.approx([0.5 * math.log(4 / 3), math.log(2)], abs=3e-4)
    assert torch.autograd.gradcheck(lambda x: cluster_loss(x, targets, divergence), logits)


def test_cluster_loss_is_least_where_the_net_agrees():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    targets = logits.softmax(1)
    for divergence in ("estep", "net"):
        assert float(cluster_loss(logits, targets, divergence)) == pytest.approx(0, abs=1e-12)
        assert float(cluster_loss(logits.flip(1), targets, divergence)) > 0.01


def test_subcluster_loss_by_hand():
    # distances 4 and 9 at r = 1/2, 1/2; distances 0 and 2 at r = 1/4, 3/4
    codes = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    sub_means = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [2.0, 2.0]]])
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    assert float(subcluster_loss(logits, codes, sub_means)) == pytest.approx((6.5 + 1.5) / 2)
    a, b = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (2, 4))
    c = torch.randn(3, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: subcluster_loss(x, y, c), (a, b))


def test_gradient_stays_in_the_nets_and_in_a_codes_own_cluster():
    codes, labels = blobs([(-4.0, 0.0), (4.0, 0.0), (0.0, 6.0)])
    clusters, _ = started(codes, labels)
    obey(clusters, codes, labels)
    codes = codes[labels == 1]
    clusters._losses(codes, torch.full((len(codes), 3), 1 / 3))[1].backward()
    assert float(clusters.sub_weight1.grad[1].norm()) > 0
    assert float(clusters.sub_weight1.grad[[0, 2]].norm()) == 0  # three nets side by side, each with its own
    assert float(clusters.hidden.weight.grad.norm()) == 0 == float(clusters.logit_weight.grad.norm())


# ---- cutting in two --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_principal_cut_is_the_best_of_all_cuts(seed):
    codes = torch.randn(30, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([5.0, 1.0, 1.0])
    halves = principal_halves(codes)
    axis = torch.linalg.svd((codes - codes.mean(0)).double())[2][0]
    order = (codes.double() @ axis).argsort()
    place = (codes.double() @ axis)[order]

    def spread(cut):
        return sum(float((part - part.mean()).square().sum()) for part in (place[:cut], place[cut:]))

    best = min(range(1, 30), key=spread)
    assert sorted([{*order[:best].tolist()}, {*order[best:].tolist()}], key=min) == sorted(
        [{*halves.nonzero()[:, 0].tolist()}, {*(~halves).nonzero()[:, 0].tolist()}], key=min
    )


def test_equal_codes_are_cut_somewhere():
    assert principal_halves(torch.ones(5, 2)).sum() in range(1, 5)


# ---- surgery ---------------------------------------------------------------------------------------------


def snapshot(clusters, codes):
    state = {name: getattr(clusters, name).detach().clone() for name in Clusters.CLUSTERWISE}
    with torch.no_grad():
        labels = clusters.assign(codes)
        return state, {
            "r": clusters.logits(codes).softmax(1),
            "joint": clusters.log_joint(codes),
            "sub": clusters.sub_logits(codes, labels).softmax(1),
            "labels": labels,
        }


def test_a_split_leaves_the_others_bit_for_bit():
    # cluster 1 holds two blobs, 0 and 2 one each; its sub-clustering net is told the cut
    codes, blob = blobs([(-6.0, 0.0), (4.0, 0.0), (8.0, 0.0), (0.0, 8.0)])
    labels = torch.tensor([0, 1, 1, 2])[blob]
    clusters, optimizer = started(codes, labels)
    obey(clusters, codes, labels)
    for _ in range(3):
        clusters.learn(codes, optimizer, moves=False)
    remembered = dict(optimizer.state)
    before, said = snapshot(clusters, codes)
    clusters._split(codes, labels, optimizer)
    assert len(clusters) == 4
    after, says = snapshot(clusters, codes)
    for name in Clusters.CLUSTERWISE:  # 0 and 2 keep their order, the halves of 1 stand behind them
        assert torch.equal(after[name][:2], before[name][[0, 2]]), name
    assert torch.equal(says["joint"][:, :2], said["joint"][:, [0, 2]])
    untouched = labels != 1
    # by the same weights; only the rounding of a product depends on how many rows it has
    torch.testing.assert_close(says["sub"][untouched], said["sub"][untouched], atol=1e-6, rtol=0)
    assert torch.equal(says["labels"][untouched], torch.tensor([0, -1, 1])[labels[untouched]])
    # responsibilities: the halves share what the cluster had, so all others have what they had
    torch.testing.assert_close(says["r"][:, :2], said["r"][:, [0, 2]], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(says["r"][:, 2:].sum(1), said["r"][:, 1], atol=1e-6, rtol=1e-5)
    assert float(after["weights"].sum()) == pytest.approx(float(before["weights"].sum()))
    # the halves are the two blobs
    halves = sorted(after["means"][2:, 0].tolist())
    assert halves == pytest.approx([4.0, 8.0], abs=0.2)
    # the optimizer trains the new parameters, and what it knew of the shared layer is still there
    known = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in known} == {id(p) for p in clusters.parameters()}
    assert optimizer.state[clusters.hidden.weight] is remembered[clusters.hidden.weight]
    assert clusters.logit_weight not in optimizer.state
    assert len(optimizer.param_groups[1]["params"]) == 4 and len(optimizer.state) == 2
    clusters.learn(codes, optimizer, moves=False)


def test_a_merge_leaves_the_others_bit_for_bit():
    # clusters 0 and 2 are halves of one blob
    codes, blob = blobs([(-6.0, 0.0), (4.0, 0.0), (0.0, 8.0)])
    labels = torch.where((blob == 0) & (codes[:, 1] > 0), 3, blob)[:, None][:, 0]
    labels = torch.tensor([0, 1, 3, 2])[labels]  # the halves are 0 and 2
    clusters, optimizer = started(codes, labels)
    obey(clusters, codes, labels)
    before, said = snapshot(clusters, codes)
    clusters._merge(codes, labels, optimizer)
    assert len(clusters) == 3
    after, says = snapshot(clusters, codes)
    for name in Clusters.CLUSTERWISE:
        assert torch.equal(after[name][:2], before[name][[1, 3]]), name
    assert torch.equal(says["joint"][:, :2], said["joint"][:, [1, 3]])
    untouched = (labels == 1) | (labels == 3)
    torch.testing.assert_close(says["sub"][untouched], said["sub"][untouched], atol=1e-6, rtol=0)
    # the logits of the others and of the likelier half are those that were
    found = hard_moments(codes, labels, 4)
    worth = clusters.prior.log_marginal(found)
    heir = 0 if worth[0] > worth[2] else 2
    assert torch.equal(after["logit_weight"][2], before["logit_weight"][heir])
    assert float(after["weights"][2]) == pytest.approx(float(before["weights"][[0, 2]].sum()))
    torch.testing.assert_close(after["means"][2].float(), codes[blob == 0].mean(0), atol=1e-3, rtol=0)
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in clusters.parameters()
    }


def test_empty_clusters_are_dropped_and_nothing_else_happens_to_the_rest():
    codes, labels = blobs([(-6.0, 0.0), (4.0, 0.0)])
    clusters, optimizer = started(codes, labels)
    obey(clusters, codes, labels)
    clusters._rebuild(
        optimizer, torch.tensor([0, 1]), {n: getattr(clusters, n).detach()[:1] for n in Clusters.CLUSTERWISE}
    )
    with torch.no_grad():
        clusters.logit_bias[2] = -1e9
    before, _ = snapshot(clusters, codes)
    clusters.moves = 1  # a merge is next: of far blobs, so none
    clusters._move(codes, optimizer)
    assert len(clusters) == 2
    after, _ = snapshot(clusters, codes)
    for name in Clusters.CLUSTERWISE:
        assert torch.equal(after[name], before[name][:2])


def test_resize_makes_room_for_a_checkpoint():
    codes, labels = blobs([(-6.0, 0.0), (4.0, 0.0), (0.0, 8.0)])
    clusters, optimizer = started(codes, labels)
    clusters.learn(codes, optimizer, moves=False)
    other = Clusters(2, clusters.config)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(clusters.state_dict())
    other.resize(3)
    other.load_state_dict(clusters.state_dict())
    assert other.epoch == 1 and torch.equal(other.logits(codes), clusters.logits(codes))
    fresh = other.optimizer()
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch.manual_seed(5)
    clusters.learn(codes, optimizer)
    torch.manual_seed(5)
    other.learn(codes, fresh)
    for name, value in clusters.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]) if isinstance(value, torch.Tensor) else True


# ---- learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init_k", [1, 5, 15, 30])
def test_fifteen_gaussians_from_every_start(init_k):
    codes, labels = fifteen_gaussians(seed=0)
    torch.manual_seed(0)
    clusters = fit(codes, ClustersConfig(init_k=init_k))
    found = clusters.assign(codes)
    assert 14 <= len(found.unique()) <= 16
    assert metrics.normalized_mutual_info_score(labels, found.numpy()) > 0.93
    # the mixture says the same as the net
    assert (clusters.log_joint(codes).argmax(1) == found).float().mean() > 0.97


def test_far_blobs_on_another_scale_far_from_the_origin():
    points, labels = blobs([(0.0, 0.0), (3.0, 0.0), (0.0, 3.0), (9.0, 9.0)], n=200)
    points = 100 * points + 5e3
    torch.manual_seed(0)
    found = fit(points, ClustersConfig(psi_scale=50.0), epochs=80).assign(points)
    assert metrics.adjusted_rand_score(labels, found) > 0.99


def test_a_schedule_is_kept():
    codes, labels = blobs([(-6.0, 0.0), (4.0, 0.0), (0.0, 8.0)])
    clusters, optimizer = started(
        codes, labels.clamp(max=1), warm_epochs=3, first_move=6, move_every=4, frozen_epochs=2
    )
    sizes, means = [], [clusters.means]
    for _ in range(20):
        clusters.learn(codes, optimizer)
        sizes.append(len(clusters))
        means.append(clusters.means)
    assert sizes[5] == 2 and sizes[6] == 3  # the split of epoch 6
    moved = [not torch.equal(a, b) for a, b in zip(means[:-1], means[1:], strict=True)]
    assert moved[:3] == [False] * 3 and moved[3]  # learned by the nets first
    assert moved[6:9] == [True, False, False]  # the split itself, then two epochs of rest
    assert clusters.moves == 4 and clusters.epoch == 20  # epochs 6, 10, 14, 18


def test_labels_start_the_clusters_and_their_numbers_do_not_matter():
    codes, labels = blobs([(-6.0, 0.0), (4.0, 0.0), (0.0, 8.0)])
    one, _ = started(codes, labels)
    other, _ = started(codes, labels * 7 + 2)
    for name in ("weights", "means", "covs", "sub_means"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    torch.testing.assert_close(one.means[2].float(), codes[labels == 2].mean(0), atol=1e-3, rtol=0)


def test_more_clusters_than_codes_are_refused():
    with pytest.raises(ConfigError, match="1 to 5, the codes; found 9"):
        fit(torch.randn(5, 2), ClustersConfig(init_k=9))


def test_ratios_of_a_fit_speak_for_it():
    # what was found is a rest point: no pair would gain by merging
    codes, labels = blobs([(-6.0, 0.0), (4.0, 0.0), (0.0, 8.0)], n=100)
    torch.manual_seed(0)
    clusters = fit(codes, ClustersConfig(), epochs=60)
    found = hard_moments(codes, clusters.assign(codes), len(clusters))
    first, second = torch.triu_indices(len(clusters), len(clusters), 1)
    assert (log_hastings_split(clusters.prior, found[first], found[second], 10.0) > 0).all()
