"""Restricted Boltzmann machines, trained by contrastive divergence: layers of a deep network before back-propagation.

Sources: Training Products of Experts by Minimizing Contrastive Divergence (Hinton, Neural Computation 14, 2002), for
the rule; Reducing the Dimensionality of Data with Neural Networks (Hinton and Salakhutdinov, Science 313, 2006) and
its public code, for what is drawn and what is an expectation; A Practical Guide to Training Restricted Boltzmann
Machines (Hinton, 2010), equations 1 to 13.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

__all__ = ["RBM", "contrastive_divergence"]


class RBM(nn.Module):
    """Binary visible units v, and hidden units h that are binary, or linear with Gaussian noise of variance 1.

        E(v, h) = -a.v - b.h - h.(W v)              binary h
        E(v, h) = -a.v + |h - b|^2 / 2 - h.(W v)    linear h

    Args:
        visible: Number of visible units.
        hidden: Number of hidden units.
        linear: Which of the two.

    Attributes:
        weight: W (hidden, visible), drawn from N(0, 0.1^2).
        visible_bias: a (visible,), 0 at first.
        hidden_bias: b (hidden,), 0 at first.
    """

    def __init__(self, visible: int, hidden: int, *, linear: bool = False) -> None:
        super().__init__()
        self.linear = linear
        self.weight = nn.Parameter(0.1 * torch.randn(hidden, visible))
        self.visible_bias = nn.Parameter(torch.zeros(visible))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))

    def up(self, v: Tensor) -> Tensor:
        """E[h | v] (N, hidden) of v (N, visible): the logistic of W v + b, or W v + b itself."""
        total = F.linear(v, self.weight, self.hidden_bias)
        return total if self.linear else total.sigmoid()

    def down(self, h: Tensor) -> Tensor:
        """E[v | h] (N, visible) of h (N, hidden): the logistic of W' h + a."""
        return F.linear(h, self.weight.mT, self.visible_bias).sigmoid()

    def draw(self, v: Tensor, generator: Generator) -> Tensor:
        """Hidden units (N, hidden), drawn from p(h | v)."""
        mean, size, device = self.up(v), (len(v), len(self.hidden_bias)), generator.device
        if self.linear:
            return mean + torch.randn(size, generator=generator, device=device)
        return (torch.rand(size, generator=generator, device=device) < mean).to(v.dtype)

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v) = -log sum_h exp(-E(v, h)) (N,), of linear units up to a constant; exp(-F) is p(v) up to Z.

        Its gradient by W is -E[h | v] v', which is what contrastive divergence needs of both sides.
        """
        visible = v @ self.visible_bias
        total = F.linear(v, self.weight)
        if self.linear:
            return -visible - (total * self.hidden_bias + total.square() / 2).sum(1)
        return -visible - F.softplus(total + self.hidden_bias).sum(1)


def contrastive_divergence(
    rbm: RBM, v: Tensor, generator: Generator, *, steps: int = 1, draw_visible: bool = False
) -> tuple[Tensor, Tensor]:
    """A loss whose gradient is the rule CD-k: -(<h v'>_data - <h v'>_k) for W, and likewise for both biases.

    Args:
        rbm: The machine.
        v: Data (N, visible) in [0, 1]: binary, or probabilities of the units to be 1.
        generator: Of the draws; on its device.
        steps: k, of the chain that begins at the data.
        draw_visible: Whether visible units are drawn too, as in Gibbs sampling; the source's code takes their
            expectation, which has less noise.

    Returns:
        The loss, mean over images of F(v) - F(v_k) with v_k held constant; and v_k (N, visible). The loss itself is no
        measure of how well a machine fits: it is 0 where a chain does not leave the data.
    """
    with torch.autocast(v.device.type, enabled=False):
        v = v.float()
        with torch.no_grad():
            chain = v
            for _ in range(steps):
                chain = rbm.down(rbm.draw(chain, generator))
                if draw_visible:
                    noise = torch.rand(v.shape, generator=generator, device=generator.device)
                    chain = (noise < chain).to(v.dtype)
        return (rbm.free_energy(v) - rbm.free_energy(chain)).mean(), chain
