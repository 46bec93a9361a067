"""Metrics of features and labels, each a pure function of tensors: what the protocol reports.

Features are float32 (N, D) as an encoder gives them; where cosine is meant, functions normalize rows themselves.
Nothing here is centered or whitened with statistics of the test images. Whatever compares all
images with all others goes through them in blocks, so that memory grows with N and not with its square.

Sources: kNN: Unsupervised Feature Learning via Non-Parametric Instance Discrimination (Wu et al., CVPR 2018,
arXiv 1805.01978, section 3.4). MAP@R: A Metric Learning Reality Check (Musgrave, Belongie and Lim, ECCV 2020,
arXiv 2003.08505, section 3.2). Clustering accuracy: Unsupervised Deep Embedding for Clustering Analysis (Xie,
Girshick and Farhadi, ICML 2016, arXiv 1511.06335, equation 10). RankMe: Assessing the Downstream Performance of
Pretrained Self-Supervised Representations by Their Rank (Garrido et al., ICML 2023, arXiv 2210.02885, equation 1).
Rule of thirty: The NIST Speaker Recognition Evaluation (Doddington et al., Speech Communication 2000).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from embedkit.analysis.clustering import scores
from embedkit.errors import ConfigError

__all__ = [
    "ClusterAgreement",
    "Retrieval",
    "Roc",
    "clustering_scores",
    "kmeans",
    "knn_predict",
    "pair_scores",
    "rankme",
    "retrieval",
    "roc",
]

#: Similarities that are held at once (64 MB of float32).
_BLOCK = 1 << 24
#: A false accept rate is only reported where so many false accepts are expected (the rule of thirty).
FALSE_ACCEPTS = 30


def knn_predict(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.1,
    block: int = _BLOCK,
) -> Tensor:
    """Classify by a weighted vote of the k nearest training images.

    The class with the largest sum of exp(cosine / temperature) over its images among the k wins.

    Args:
        train: float32 (N, D).
        train_labels: int64 (N,), 0..num_classes-1.
        test: float32 (M, D).
        num_classes: K.
        k: Neighbors; all N where there are fewer.
        temperature: tau, above 0.
        block: Similarities held at once.

    Returns:
        int64 (M,), classes.
    """
    train = F.normalize(train, dim=1)
    predicted = []
    for part in F.normalize(test, dim=1).split(max(1, block // len(train))):
        cosine, nearest = (part @ train.T).topk(min(k, len(train)), dim=1)  # (B, k)
        votes = torch.zeros(len(part), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, train_labels[nearest], (cosine.double() / temperature).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


@dataclass(frozen=True)
class Retrieval:
    """Retrieval of the images of a query's class from all other images.

    Attributes:
        queries: int64 (Q,), the images whose class has another image; the others cannot be asked for.
        map_at_r: float64 (Q,), average precision over the first R neighbors, R the other images of the class.
        p_at_1: float64 (Q,), 1 where the nearest image has the query's class.
    """

    queries: Tensor
    map_at_r: Tensor
    p_at_1: Tensor


def retrieval(features: Tensor, labels: Tensor, *, block: int = _BLOCK) -> Retrieval:
    """MAP@R and precision at 1 by cosine, each image once as the query among all others.

        MAP@R = 1/R sum_{i <= R} P(i) rel(i),   P(i) the precision of the first i neighbors

    Args:
        features: float32 (N, D).
        labels: int64 (N,).
        block: Similarities held at once.
    """
    features = F.normalize(features, dim=1)
    _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
    others = counts[classes] - 1  # (N,)
    queries = torch.nonzero(others)[:, 0]
    deepest = int(others.max()) if len(others) else 0
    ranks = torch.arange(1, deepest + 1, dtype=torch.float64)
    mean_precision, first = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.float64)]
    for part in queries.split(max(1, block // len(features))) if deepest else ():
        cosine = features[part] @ features.T
        cosine[torch.arange(len(part)), part] = -torch.inf
        nearest = cosine.topk(deepest, dim=1).indices  # (B, R of the largest class)
        r = others[part, None]
        relevant = (classes[nearest] == classes[part, None]) & (ranks <= r)
        precision = relevant.cumsum(1) / ranks
        mean_precision.append((precision * relevant).sum(1) / r[:, 0])
        first.append(relevant[:, 0].double())
    return Retrieval(queries, torch.cat(mean_precision), torch.cat(first))


def kmeans(features: Tensor, clusters: int, *, seed: int = 0, starts: int = 10) -> Tensor:
    """k-means on L2-normalized rows, the best of several k-means++ starts.

    Always scikit-learn's: a metric must not depend on which other packages are installed.

    Args:
        features: float32 (N, D).
        clusters: K, at most N.
        seed: Of the starts.
        starts: How many.

    Returns:
        int64 (N,), clusters 0..K-1.
    """
    from sklearn.cluster import KMeans

    rows = F.normalize(features, dim=1).numpy()
    return torch.from_numpy(KMeans(clusters, n_init=starts, random_state=seed).fit_predict(rows)).long()


@dataclass(frozen=True)
class ClusterAgreement:
    """How well clusters and classes agree.

    Attributes:
        acc: Share of images in the cluster that is matched to their class, one to one, the best such matching.
            Clusters beyond the number of classes have no class, so that their images count as errors.
        nmi: Mutual information over the arithmetic mean of both entropies, in [0, 1].
        ari: Adjusted Rand index: 1 for equal partitions, 0 on average for random ones.
    """

    acc: float
    nmi: float
    ari: float


def clustering_scores(clusters: Tensor, labels: Tensor) -> ClusterAgreement:
    """Compare two partitions, int64 (N,) each; the numbers of clusters and classes may differ."""
    found = scores.clustering_scores(clusters.numpy(), labels.numpy())
    return ClusterAgreement(acc=found.acc, nmi=found.nmi, ari=found.ari)


@dataclass(frozen=True)
class Roc:
    """Accepting pairs above a threshold, at every distinct score, from the strictest threshold to the mildest.

    Attributes:
        far: float64 (T,), share of impostor pairs that are accepted: begins with 0 (none), ends with 1 (all).
        tar: float64 (T,), share of genuine pairs that are accepted.
        impostors: Impostor pairs that were counted.
    """

    far: np.ndarray
    tar: np.ndarray
    impostors: int

    @property
    def auc(self) -> float:
        """Area under the curve: how often a genuine pair scores above an impostor one, equal scores half."""
        return float(np.trapezoid(self.tar, self.far))

    @property
    def eer(self) -> float:
        """Equal error rate: where FAR = 1 - TAR, linear between two thresholds."""
        gap = self.far - (1 - self.tar)  # rises from -1 to 1
        after = int(np.argmax(gap >= 0))
        t = -gap[after - 1] / (gap[after] - gap[after - 1])
        return float(self.far[after - 1] + t * (self.far[after] - self.far[after - 1]))

    def tar_at_far(self, far: float) -> float | None:
        """TAR at the mildest threshold whose FAR is at most `far`; None with too few impostor pairs to tell."""
        if self.impostors * far < FALSE_ACCEPTS:
            return None
        return float(self.tar[np.searchsorted(self.far, far, side="right") - 1])


def roc(genuine: np.ndarray, impostor: np.ndarray) -> Roc:
    """The exact curve of two sets of scores, higher meaning more alike; equal scores are accepted together.

    Args:
        genuine: (G,), of pairs of one identity, G above 0.
        impostor: (I,), of pairs of two identities, I above 0.

    Raises:
        ConfigError: One of the sets is empty.
    """
    if not len(genuine) or not len(impostor):
        raise ConfigError(
            f"verification: expected genuine and impostor pairs, found {len(genuine)} and {len(impostor)}"
        )
    scores = np.concatenate([genuine, impostor])
    order = np.argsort(-scores, kind="stable")
    scores, accepted = scores[order], order < len(genuine)
    last = np.append(scores[1:] != scores[:-1], True)  # of its group of equal scores
    tar = np.concatenate([[0], np.cumsum(accepted)[last]]) / len(genuine)
    far = np.concatenate([[0], np.cumsum(~accepted)[last]]) / len(impostor)
    return Roc(far, tar, len(impostor))


def pair_scores(
    features: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    most: int = 1 << 23,
    sample: int = 1 << 20,
    block: int = _BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of genuine and of impostor pairs: of all pairs, or of a sample of each kind where they are many.

    Args:
        features: float32 (N, D).
        labels: int64 (N,), the identities.
        seed: Of the sample.
        most: Pairs up to which all are taken.
        sample: Genuine and impostor pairs that are drawn otherwise, each evenly and with replacement.
        block: Numbers held at once.

    Returns:
        float32 (G,) and (I,); empty where there is no such pair.
    """
    features = F.normalize(features, dim=1)
    n = len(features)
    if n * (n - 1) // 2 <= most:
        genuine, impostor = [torch.empty(0)], [torch.empty(0)]
        for part in torch.arange(n).split(max(1, block // max(1, n))):
            cosine = features[part] @ features.T
            later, same = part[:, None] < torch.arange(n), labels[part, None] == labels
            genuine.append(cosine[later & same])
            impostor.append(cosine[later & ~same])
        return torch.cat(genuine).numpy(), torch.cat(impostor).numpy()

    rng = np.random.default_rng(seed)
    order = np.argsort(labels.numpy(), kind="stable")  # classes stand side by side
    _, starts, classes, counts = np.unique(
        labels.numpy()[order], return_index=True, return_inverse=True, return_counts=True
    )
    start, count = starts[classes], counts[classes]  # of each place's class

    def draw(partners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A place in proportion to its number of partners, and which of them."""
        ends = np.cumsum(partners)
        if not ends[-1]:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        ticket = rng.integers(0, ends[-1], sample)
        first = np.searchsorted(ends, ticket, side="right")
        return first, ticket - (ends - partners)[first]

    first, which = draw(count - 1)
    second = start[first] + which
    second += second >= first  # an image is no partner of itself
    genuine_pairs = order[first], order[second]
    first, which = draw(n - count)
    second = which + np.where(which >= start[first], count[first], 0)  # past the image's own class
    pairs = (genuine_pairs, (order[first], order[second]))
    found = []
    for left, right in pairs:
        parts = torch.arange(len(left)).split(max(1, (1 << 20) // features.shape[1]))
        cosines = [(features[left[p]] * features[right[p]]).sum(1) for p in parts]
        found.append(torch.cat([torch.empty(0), *cosines]).numpy())
    return found[0], found[1]


def rankme(features: Tensor, epsilon: float = 1e-7) -> float:
    """Effective rank: exp of the entropy of the singular values, scaled to sum 1.

        exp(-sum_k p_k log p_k),   p_k = sigma_k / ||sigma||_1 + epsilon

    Args:
        features: float32 (N, D), as the encoder gives them: neither normalized nor centered.
        epsilon: The paper's, for float32.

    Returns:
        1 for features on one line, min(N, D) for as many equal singular values.
    """
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum() + epsilon
    return float((-(p * p.log()).sum()).exp())
