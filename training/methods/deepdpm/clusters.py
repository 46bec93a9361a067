"""Clusters whose number changes while they are learned: DeepDPM's two nets, its EM step, its splits and merges.

The clustering net says which cluster a code belongs to. It is trained towards the responsibilities of a Gaussian
mixture, whose parameters in turn come from the net. For every cluster a sub-clustering net says into which two
halves the cluster would fall, and Hastings ratios under a normal-inverse-Wishart prior decide whether it does.

Source: DeepDPM: Deep Clustering With an Unknown Number of Clusters (Ronen, Finder and Freifeld, CVPR 2022, arXiv
2203.14309), sections 4.1 to 4.3, and the authors' code where the paper leaves something open. Differences from it
stand in `embedkit.training.methods.deepdpm`.

A little over 400 lines: learning and surgery work on the same ten tensors, and apart neither could be followed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.methods.deepdpm.niw import (
    TorchMoments,
    TorchNIW,
    hard_moments,
    log_densities,
    merge_pairs,
    moments,
    precision_cholesky,
    union,
    worth_splitting,
)

__all__ = ["Clusters", "ClustersConfig", "cluster_loss", "fit", "principal_halves", "subcluster_loss"]

#: Added to probabilities before they are compared, as in the authors' code: no logarithm of 0.
_SMOOTHING = 1e-5


@dataclass(frozen=True, kw_only=True)
class ClustersConfig:
    """How clusters are learned. An epoch is one pass over all codes.

    Attributes:
        init_k: Clusters at the start, from k-means.
        alpha: Concentration of the Dirichlet process: how readily clusters split.
        kappa: Points that the prior's mean is worth.
        extra_nu: The prior's degrees of freedom above D.
        psi: `isotropic`: Psi = psi_scale * I. `data_std`: psi_scale times the codes' standard deviations.
        psi_scale: See there.
        hidden_dim: Of both nets; the sub-clustering nets have so many units for each cluster.
        batch_size: Codes of one step of the nets; a tenth of all where that is less, so that an epoch has 10 steps.
        lr: Adam's, of the clustering net.
        sub_lr: Adam's, of the sub-clustering nets.
        divergence: `estep`: KL(r_E || r), as in the authors' code; `net`: KL(r || r_E).
        warm_epochs: Epochs at the start in which the nets learn the first clusters, and these stay.
        first_move: The epoch of the first split.
        move_every: Epochs from one move to the next; splits and merges alternate.
        frozen_epochs: Epochs after a move in which the nets learn the new clusters, and all clusters stay.
    """

    init_k: int = 1
    alpha: float = 10.0
    kappa: float = 1e-4
    extra_nu: float = 2.0
    psi: Literal["isotropic", "data_std"] = "isotropic"
    psi_scale: float = 0.005
    hidden_dim: int = 50
    batch_size: int = 1024
    lr: float = 1e-2
    sub_lr: float = 2e-2
    divergence: Literal["estep", "net"] = "estep"
    warm_epochs: int = 5
    first_move: int = 10
    move_every: int = 10
    frozen_epochs: int = 3

    def prior(self, codes: Tensor) -> TorchNIW:
        """The prior of clusters of codes (N, D)."""
        codes = codes.double()
        scale = codes.std(0).clamp(min=1e-6) if self.psi == "data_std" else torch.ones_like(codes[0])
        nu = codes.shape[1] + self.extra_nu
        return TorchNIW(codes.mean(0), self.kappa, torch.diag(scale * self.psi_scale), nu)


def cluster_loss(logits: Tensor, targets: Tensor, divergence: str = "estep") -> Tensor:
    """KL divergence between the mixture's responsibilities and the net's, both smoothed, meaned over rows.

    Args:
        logits: (N, K), of r, the net's.
        targets: (N, K), r_E, the mixture's (the E-step's); no gradient is needed.
        divergence: `estep`: KL(r_E || r); `net`: KL(r || r_E).

    Returns:
        A scalar, in nats.
    """
    r, target = (p + _SMOOTHING for p in (logits.softmax(1), targets))
    r, target = r / r.sum(1, keepdim=True), target / target.sum(1, keepdim=True)
    p, q = (target, r) if divergence == "estep" else (r, target)
    return (p * (p.log() - q.log())).sum(1).mean()


def subcluster_loss(logits: Tensor, codes: Tensor, sub_means: Tensor) -> Tensor:
    """Mean over rows of sum_j r_ij |c_i - mu_j|^2, over the two halves j of a row's cluster.

    Args:
        logits: (N, 2), of r.
        codes: (N, D).
        sub_means: (N, 2, D), of each row's own cluster.
    """
    return (logits.softmax(1) * (codes[:, None] - sub_means).square().sum(2)).sum(1).mean()


def principal_halves(codes: Tensor) -> Tensor:
    """The cut in two along the first principal axis that k-means would end with: bool (N,), exact."""
    centerd = codes.double() - codes.double().mean(0)
    place = centerd @ torch.linalg.eigh(centerd.T @ centerd)[1][:, -1]  # (N,)
    order = place.argsort()
    left = torch.arange(1, len(codes), device=codes.device, dtype=place.dtype)
    # what a cut takes off the squared distances: the halves' squared sums over their sizes
    gain = place[order].cumsum(0)[:-1].square() * (1 / left + 1 / (len(codes) - left))
    halves = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    halves[order[int(gain.argmax()) + 1 :]] = True
    return halves


class Clusters(nn.Module):
    """K clusters of codes. Randomness comes from torch's own generator, which a method seeds for every batch.

    Args:
        dim: Width D of the codes.
        config: How they are learned.

    Attributes:
        weights: (K,), float64: pi.
        means: (K, D), float64: mu.
        covs: (K, D, D), float64: Sigma.
        sub_means: (K, 2, D): the means of each cluster's halves.
    """

    #: Parameters and buffers whose first axis is K.
    CLUSTERWISE = (
        *("logit_weight", "logit_bias", "sub_weight1", "sub_bias1", "sub_weight2", "sub_bias2"),
        *("weights", "means", "covs", "sub_means"),
    )

    weights: Tensor
    means: Tensor
    covs: Tensor
    sub_means: Tensor
    prior_mean: Tensor
    codes_std: Tensor
    prior_psi: Tensor

    def __init__(self, dim: int, config: ClustersConfig) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        self.epoch, self.moves, self.last_move = 0, 0, -(10**9)
        self.hidden = nn.Linear(dim, config.hidden_dim)
        for name, value in self._nets(1).items():
            self.register_parameter(name, nn.Parameter(value))
        self.register_buffer("weights", torch.ones(1).double())
        self.register_buffer("means", torch.zeros(1, dim).double())
        self.register_buffer("covs", torch.eye(dim)[None].double())
        self.register_buffer("sub_means", torch.zeros(1, 2, dim))
        self.register_buffer("prior_mean", torch.zeros(dim).double())
        self.register_buffer("codes_std", torch.ones(dim))
        self.register_buffer("prior_psi", torch.eye(dim).double())

    def __len__(self) -> int:
        """K."""
        return len(self.weights)

    @property
    def prior(self) -> TorchNIW:
        """Of the codes that the clusters were started on."""
        return TorchNIW(self.prior_mean, self.config.kappa, self.prior_psi, self.dim + self.config.extra_nu)

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over the clustering net and, at their own rate, the sub-clustering nets."""
        nets: list[list[nn.Parameter]] = [[], []]
        for name, parameter in self.named_parameters():
            nets[name.startswith("sub_")].append(parameter)
        rates = (self.config.lr, self.config.sub_lr)
        return torch.optim.Adam(
            [{"params": p, "lr": lr} for p, lr in zip(nets, rates, strict=True)], fused=True
        )

    def logits(self, codes: Tensor) -> Tensor:
        """The clustering net: codes (N, D) -> logits of r (N, K)."""
        hidden = self.hidden((codes - self.prior_mean.float()) / self.codes_std)
        return F.linear(F.relu(hidden), self.logit_weight, self.logit_bias)

    def sub_logits(self, codes: Tensor, labels: Tensor) -> Tensor:
        """The sub-clustering net of each code's own cluster: codes (N, D), labels (N,) -> logits (N, 2)."""
        radius = self.covs.diagonal(dim1=1, dim2=2).mean(1).sqrt()
        codes = (codes - self.means.float()[labels]) / radius.float()[labels, None]
        # the codes of each cluster side by side, with zeros behind them: K small nets in two products
        order = labels.argsort(stable=True)
        own = labels[order]
        count = torch.bincount(labels, minlength=len(self))
        place = own, torch.arange(len(codes), device=codes.device) - (count.cumsum(0) - count)[own]
        x = codes.new_zeros(len(self), int(count.max()), self.dim)
        x[place] = codes[order]
        hidden = F.relu(torch.baddbmm(self.sub_bias1[:, None], x, self.sub_weight1.mT))
        logits = torch.baddbmm(self.sub_bias2[:, None], hidden, self.sub_weight2.mT)
        return logits[place][order.argsort()]

    @torch.no_grad()
    def log_joint(self, codes: Tensor) -> Tensor:
        """The mixture's log(pi_k N(c; mu_k, Sigma_k)): codes (N, D) -> float64 (N, K)."""
        return self.weights.log() + log_densities(codes, self.means, precision_cholesky(self.covs))

    @torch.no_grad()
    def assign(self, codes: Tensor) -> Tensor:
        """The cluster of each code by the net: int64 (N,)."""
        return self.logits(codes).argmax(1)

    @torch.no_grad()
    def start(self, codes: Tensor, optimizer: torch.optim.Optimizer, labels: Tensor | None = None) -> None:
        """Begin again: nets at random, prior and clusters from the codes.

        Args:
            codes: (N, D).
            optimizer: As `optimizer` made it; what it remembers is dropped.
            labels: int64 (N,), the first clusters; by default `init_k` of them by k-means.

        Raises:
            ConfigError: Fewer codes than clusters.
        """
        if not 1 <= self.config.init_k <= len(codes):
            raise ConfigError(
                f"clusters.init_k: expected 1 to {len(codes)}, the codes; found {self.config.init_k}"
            )
        if labels is None:
            labels = _k_means(codes, self.config.init_k)
        labels = labels.unique(return_inverse=True)[1]
        self.epoch, self.moves, self.last_move = 0, 0, -(10**9)
        prior = self.config.prior(codes)
        self.prior_mean, self.prior_psi = prior.mean, prior.psi
        self.codes_std = codes.std(0).clamp(min=1e-6)
        self.hidden.reset_parameters()
        optimizer.state.clear()
        k = int(labels.max()) + 1
        new = self._new_clusters(codes, labels, hard_moments(codes, labels, k))
        new["weights"] = torch.bincount(labels) / len(labels)
        self._rebuild(optimizer, torch.empty(0, dtype=torch.long), new)

    def learn(
        self, codes: Tensor, optimizer: torch.optim.Optimizer, *, moves: bool = True
    ) -> dict[str, float]:
        """One epoch: a pass of the nets over the codes, the mixture's parameters, perhaps a move.

        Args:
            codes: (N, D).
            optimizer: As `optimizer` made it.
            moves: Whether clusters may split or merge; false at the end, so that what moved settles.

        Returns:
            `cluster_loss`, `subcluster_loss` (means over the epoch) and `clusters`.
        """
        targets = self.log_joint(codes).softmax(1).float()  # (N, K)
        sums, steps = torch.zeros(2, device=codes.device), 0
        size = min(self.config.batch_size, -(-len(codes) // 10))
        for rows in torch.randperm(len(codes), device=codes.device).split(size):
            losses = self._losses(codes[rows], targets[rows])
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            sums, steps = sums + losses.detach(), steps + 1
        with torch.no_grad():
            rested = self.epoch - self.last_move > self.config.frozen_epochs
            if rested and self.epoch >= self.config.warm_epochs:
                self._maximize(codes)
            since = self.epoch - self.config.first_move
            if moves and since >= 0 and since % self.config.move_every == 0:
                self._move(codes, optimizer)
        self.epoch += 1
        first, second = (sums / steps).tolist()
        return {"cluster_loss": first, "subcluster_loss": second, "clusters": float(len(self))}

    def resize(self, clusters: int) -> None:
        """Make room for K clusters, before the weights of a checkpoint are loaded."""
        for name in self.CLUSTERWISE:
            old = getattr(self, name)
            new = old.new_zeros(clusters, *old.shape[1:])
            setattr(self, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)

    def get_extra_state(self) -> dict[str, int]:
        """Where the schedule stands, for the checkpoint."""
        return {"epoch": self.epoch, "moves": self.moves, "last_move": self.last_move}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Where the schedule stands, from the checkpoint."""
        self.epoch, self.moves, self.last_move = state["epoch"], state["moves"], state["last_move"]

    def _losses(self, codes: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(codes)
        labels = logits.detach().argmax(1)
        sub = subcluster_loss(self.sub_logits(codes, labels), codes, self.sub_means[labels])
        return torch.stack([cluster_loss(logits, targets, self.config.divergence), sub])

    def _maximize(self, codes: Tensor) -> None:
        """The M-step: the most likely mixture for the net's responsibilities, and the means of the halves."""
        r = self.logits(codes).softmax(1)  # (N, K)
        found = moments(codes, r)
        self.means, self.covs = self.prior.mode(found)
        # the symmetric Dirichlet that tends to the process: no cluster's weight is 0
        alpha, k = self.config.alpha, len(self)
        self.weights = (found.count + alpha / k) / (len(codes) + alpha)
        labels = r.argmax(1)
        sub_r = self.sub_logits(codes, labels).softmax(1)
        total = torch.zeros(k, 2, device=codes.device).index_add_(0, labels, sub_r)
        weighted = sub_r[:, :, None] * codes[:, None]  # (N, 2, D)
        sums = torch.zeros_like(self.sub_means).index_add_(0, labels, weighted)
        self.sub_means = torch.where(total[:, :, None] > 1e-3, sums / total[:, :, None], self.sub_means)

    def _move(self, codes: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Drop empty clusters, then split or merge, in turn."""
        before = self.means
        labels = self.assign(codes)
        used = labels.unique()
        if len(used) < len(self):
            self._rebuild(optimizer, used, {})
            labels = torch.searchsorted(used, labels)
        (self._split, self._merge)[self.moves % 2](codes, labels, optimizer)
        self.moves += 1
        if self.means is not before:
            self.last_move = self.epoch

    def _split(self, codes: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> None:
        halves = 2 * labels + self.sub_logits(codes, labels).argmax(1)  # halves of k: 2k and 2k + 1
        found = hard_moments(codes, halves, 2 * len(self))
        chance = torch.rand(len(self), device=codes.device)
        split = worth_splitting(self.prior, found[::2], found[1::2], self.config.alpha, chance)
        children = split.repeat_interleave(2).nonzero()[:, 0]
        if not len(children):
            return
        parents = children // 2
        share = found.count[children] / (found.count[::2] + found.count[1::2])[parents]
        number = torch.full_like(split.repeat_interleave(2), -1, dtype=torch.long)
        number[children] = torch.arange(len(children), device=codes.device)
        new = self._new_clusters(codes, number[halves], found[children])
        new["logit_weight"] = self.logit_weight[parents]
        # the children's exponentials add up to the parent's: no other cluster's responsibility changes
        new["logit_bias"] = self.logit_bias[parents] + share.log()
        new["weights"] = self.weights[parents] * share
        self._rebuild(optimizer, (~split).nonzero()[:, 0], new)

    def _merge(self, codes: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> None:
        found = hard_moments(codes, labels, len(self))
        chance = torch.rand(len(self), len(self), device=codes.device)
        pairs = merge_pairs(self.prior, found, self.config.alpha, chance)
        if not pairs:
            return
        a, b = torch.tensor(pairs, device=codes.device).T
        worth = self.prior.log_marginal(found)
        heir = torch.where(worth[a] > worth[b], a, b)
        number = torch.full((len(self),), -1, device=codes.device)
        number[a] = number[b] = torch.arange(len(pairs), device=codes.device)
        new = self._new_clusters(codes, number[labels], union(found[a], found[b]))
        new["logit_weight"], new["logit_bias"] = self.logit_weight[heir], self.logit_bias[heir]
        new["weights"] = self.weights[a] + self.weights[b]
        self._rebuild(optimizer, (number < 0).nonzero()[:, 0], new)

    def _new_clusters(self, codes: Tensor, number: Tensor, found: TorchMoments) -> dict[str, Tensor]:
        """What clusters with these moments begin with; `number` (N,) says whose each code is, -1: no one's."""
        means, covs = self.prior.mode(found)
        sub_means = found.mean[:, None].repeat(1, 2, 1)
        for k in range(len(means)):
            own = codes[number == k]
            if len(own) > 1:
                halves = principal_halves(own)
                sub_means[k] = torch.stack([own[~halves].mean(0), own[halves].mean(0)])
        return {"means": means, "covs": covs, "sub_means": sub_means, **self._nets(len(means))}

    def _rebuild(self, optimizer: torch.optim.Optimizer, keep: Tensor, new: dict[str, Tensor]) -> None:
        """Keep some clusters bit for bit, in their order, and put new ones behind them.

        The optimizer gets the new parameters in the places of the old, and forgets what it knew of these.
        """
        for name in self.CLUSTERWISE:
            old = getattr(self, name)
            value = old.detach()[keep]
            if name in new:
                value = torch.cat([value, new[name].to(old)])
            if isinstance(old, nn.Parameter):
                value = nn.Parameter(value)
                optimizer.state.pop(old, None)
                for group in optimizer.param_groups:
                    group["params"] = [value if p is old else p for p in group["params"]]
            setattr(self, name, value)

    def _nets(self, k: int) -> dict[str, Tensor]:
        """The output layers of the clustering net and k sub-clustering nets, at random as `nn.Linear` is."""
        h, d = self.config.hidden_dim, self.dim
        shapes = {"logit_weight": (k, h), "logit_bias": (k,), "sub_weight1": (k, h, d), "sub_bias1": (k, h)}
        shapes |= {"sub_weight2": (k, 2, h), "sub_bias2": (k, 2)}
        fan_in = {"sub_weight1": d, "sub_bias1": d}
        device = self.hidden.weight.device
        return {
            name: torch.empty(shape, device=device).uniform_(-1, 1) / fan_in.get(name, h) ** 0.5
            for name, shape in shapes.items()
        }


def fit(codes: Tensor, config: ClustersConfig, *, epochs: int = 120) -> Clusters:
    """Cluster codes alone, without images: the embeddings of any encoder, or points of a plane.

    Randomness is torch's own: call `torch.manual_seed` before.

    Args:
        codes: float32 (N, D); D of about 128 at most.
        config: How.
        epochs: Passes over the codes; the last `config.move_every` are without a move.

    Returns:
        The clusters; `assign` says whose each code is.
    """
    clusters = Clusters(codes.shape[1], config).to(codes.device)
    optimizer = clusters.optimizer()
    clusters.start(codes, optimizer)
    for epoch in range(epochs):
        clusters.learn(codes, optimizer, moves=epoch < epochs - config.move_every)
    return clusters


def _k_means(codes: Tensor, k: int) -> Tensor:
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31, ()))
    found = KMeans(k, n_init=1, random_state=seed).fit_predict(codes.cpu().numpy())
    return torch.from_numpy(found).long().to(codes.device)
