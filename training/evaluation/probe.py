"""The linear probe: multinomial logistic regression on frozen features, its L2 strength chosen on held-out images.

The objective is the mean cross-entropy + l2 / 2 ||weight||^2 on features standardized by the training images'
mean and standard deviation; it is convex, so that the start and the steps do not matter, and the bias is free.
scikit-learn's LogisticRegression minimizes N times it, with C = 1 / (N l2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["STRENGTHS", "LinearProbe", "choose_probe", "fit_probe", "stratified_split"]

#: L2 strengths, from strong to weak.
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on standardized features.

    Attributes:
        mean: float32 (D,), of the features that it was fitted on.
        std: float32 (D,); 1 where a feature is constant.
        weight: float32 (K, D), of standardized features.
        bias: float32 (K,).
        l2: The strength that it was fitted with.
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor
    l2: float

    def predict(self, features: Tensor) -> Tensor:
        """float32 (N, D) -> int64 (N,), classes."""
        return ((features - self.mean) / self.std @ self.weight.T + self.bias).argmax(1)


def fit_probe(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    iterations: int = 300,
) -> Iterator[LinearProbe]:
    """Fit logistic regression at each strength, each from the solution before it.

    L-BFGS works in the eigenbasis of the features' covariance, each axis scaled by a bound on the objective's
    curvature there, 0.5 eigenvalue + l2 (Boehning, Multinomial Logistic Regression Algorithm, AISM 1992): without
    that, features as correlated as pixels take several times the steps.

    Args:
        features: float32 (N, D).
        labels: int64 (N,), 0..num_classes-1.
        num_classes: K.
        strengths: From strong to weak.
        iterations: At most, per strength: raw pixels without much L2 do not converge in fewer than 500, and are
            then a little more regularized than asked.

    Yields:
        A probe per strength.
    """
    std, mean = torch.std_mean(features, dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1.0)
    x = (features - mean) / std  # (N, D)
    variances, axes = torch.linalg.eigh((x.T @ x / len(x)).double())
    x = x @ axes.float()
    rows = torch.arange(len(x))
    weight = torch.zeros(num_classes, x.shape[1], dtype=torch.float64)
    bias = torch.zeros(num_classes, dtype=torch.float64)
    for l2 in strengths:
        scale = (0.5 * variances.clamp(min=0) + l2).rsqrt()
        point = torch.cat([weight / scale, bias[:, None]], dim=1)  # (K, D + 1)
        # torch's own: scipy's runs its vectors through a BLAS that starts threads for them, at 5 times the cost
        steps = torch.optim.LBFGS(
            [point],
            max_iter=iterations,
            max_eval=2 * iterations,
            history_size=20,
            tolerance_grad=1e-5,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )

        @torch.no_grad()
        def objective(point: Tensor = point, scale: Tensor = scale, l2: float = l2) -> Tensor:
            weight = point[:, :-1] * scale
            logp = torch.log_softmax(x @ weight.float().T + point[:, -1].float(), dim=1)  # (N, K)
            loss = -logp[rows, labels].double().mean() + l2 / 2 * weight.square().sum()
            slope = logp.exp_()
            slope[rows, labels] -= 1
            slope /= len(x)  # of the loss by the logits
            by_weight = ((slope.T @ x).double() + l2 * weight) * scale
            point.grad = torch.cat([by_weight, slope.double().sum(0)[:, None]], dim=1)
            return loss

        steps.step(objective)
        weight, bias = point[:, :-1] * scale, point[:, -1]
        yield LinearProbe(mean, std, (weight @ axes.T).float(), bias.float(), l2)


def choose_probe(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    validation: float = 0.1,
    seed: int = 0,
) -> LinearProbe:
    """Choose the L2 strength on a held-out part of the training images, then fit on all of them.

    Args:
        features: float32 (N, D), of training images alone.
        labels: int64 (N,), 0..num_classes-1.
        num_classes: K.
        strengths: From strong to weak; of equally accurate ones the strongest is taken.
        validation: Share of each class that is held out.
        seed: Of the split.

    Returns:
        The probe.
    """
    held_out = stratified_split(labels, validation, seed)
    x, y = features[held_out], labels[held_out]
    path = fit_probe(features[~held_out], labels[~held_out], num_classes=num_classes, strengths=strengths)
    right = [int((probe.predict(x) == y).sum()) for probe in path]
    best = strengths[right.index(max(right))]
    return next(fit_probe(features, labels, num_classes=num_classes, strengths=(best,)))


def stratified_split(labels: Tensor, share: float, seed: int) -> Tensor:
    """Bool (N,): `share` of each class, drawn by `seed`; of a class of one image, none."""
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    shuffled = labels.numpy()[order]
    for label in np.unique(shuffled):
        own = order[shuffled == label]
        chosen[torch.from_numpy(own[: round(len(own) * share)])] = True
    return chosen
