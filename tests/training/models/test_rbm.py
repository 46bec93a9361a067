"""Restricted Boltzmann machines so small that all their states can be listed."""

import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.training.models.rbm import RBM, contrastive_divergence

VISIBLE, HIDDEN = 6, 4


def states(units):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)))


def machine(visible=VISIBLE, hidden=HIDDEN, *, linear=False, spread=5.0):
    """One whose units depend on each other: weights of deviation 0.5, and biases."""
    torch.manual_seed(0)
    rbm = RBM(visible, hidden, linear=linear)
    with torch.no_grad():
        rbm.weight.mul_(spread)
        rbm.visible_bias.normal_(std=0.5)
        rbm.hidden_bias.normal_(std=0.5)
    return rbm


@torch.no_grad()
def energy(rbm, v, h):
    """E(v, h), one pair, term by term."""
    total = -sum(float(a) * float(x) for a, x in zip(rbm.visible_bias, v, strict=True))
    for j, y in enumerate(h):
        b = float(rbm.hidden_bias[j])
        total += (float(y) - b) ** 2 / 2 if rbm.linear else -b * float(y)
        total -= float(y) * sum(float(w) * float(x) for w, x in zip(rbm.weight[j], v, strict=True))
    return total


def test_the_free_energy_sums_over_all_hidden_states():
    rbm, v = machine(), states(VISIBLE)[[0, 5, 37, 63]]
    expected = [-math.log(sum(math.exp(-energy(rbm, x, h)) for h in states(HIDDEN))) for x in v]
    assert rbm.free_energy(v).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_free_energy_integrates_over_a_linear_unit():
    rbm, v = machine(3, 1, linear=True, spread=8.0), states(3)
    grid = [-12 + 0.01 * i for i in range(2401)]
    exact = [-math.log(sum(math.exp(-energy(rbm, x, [h])) for h in grid) * 0.01) for x in v]
    free = rbm.free_energy(v)
    # up to one constant
    assert (free - free[0]).tolist() == pytest.approx([e - exact[0] for e in exact], abs=1e-4)


@pytest.mark.parametrize("linear", [False, True])
def test_the_rule(linear):
    """The gradient is -(<h v'>_data - <h v'>_k), and the difference of the means for the biases."""
    rbm = machine(linear=linear)
    v = torch.rand(50, VISIBLE, generator=torch.Generator().manual_seed(1))
    loss, chain = contrastive_divergence(rbm, v, torch.Generator().manual_seed(2))
    loss.backward()
    h, h_k = rbm.up(v).detach(), rbm.up(chain).detach()
    torch.testing.assert_close(rbm.weight.grad, -(h.mT @ v - h_k.mT @ chain) / 50, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(rbm.visible_bias.grad, -(v - chain).mean(0), atol=1e-6, rtol=1e-4)
    if linear:  # b counts as the mean of h, whose own term is W v
        h, h_k = h - rbm.hidden_bias, h_k - rbm.hidden_bias
    torch.testing.assert_close(rbm.hidden_bias.grad, -(h - h_k).mean(0).detach(), atol=1e-6, rtol=1e-4)
    assert not chain.requires_grad and chain.min() > 0 and chain.max() < 1  # expectations, not draws


def test_a_long_chain_gives_the_gradient_of_the_likelihood():
    """Of 6 visible and 4 hidden units, against the partition function summed over all 64 states."""
    rbm = machine()
    generator = torch.Generator().manual_seed(3)
    data = states(VISIBLE)[torch.randint(0, 64, (5,), generator=generator)].repeat(8000, 1)
    everything = states(VISIBLE)
    (rbm.free_energy(data[:5]).mean() + torch.logsumexp(-rbm.free_energy(everything), 0)).backward()
    exact = torch.cat([p.grad.flatten() for p in rbm.parameters()])

    def estimated(steps):
        rbm.zero_grad()
        contrastive_divergence(rbm, data, generator, steps=steps, draw_visible=True)[0].backward()
        return torch.cat([p.grad.flatten() for p in rbm.parameters()])

    long, short = estimated(40), estimated(1)
    # 40,000 chains: a mean of zeros and ones has a deviation of at most 0.5 / 200
    assert (long - exact).abs().max() < 5 * 0.5 / 200
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(long, exact, dim=0) > 0.99 and cosine(short, exact, dim=0) > 0.7
    assert (short - exact).norm() > 3 * (long - exact).norm()  # CD-1 is biased


@pytest.mark.parametrize("linear", [False, True])
def test_hidden_units_are_drawn_from_their_distribution(linear):
    rbm = machine(linear=linear)
    v = states(VISIBLE)[29].repeat(20_000, 1)
    drawn, mean = rbm.draw(v, torch.Generator().manual_seed(4)), rbm.up(v)[0]
    assert (drawn.mean(0) - mean).abs().max() < 4 / 20_000**0.5
    variance = torch.ones(HIDDEN) if linear else mean * (1 - mean)
    assert (drawn.var(0) - variance).abs().max() < 0.05
    assert linear or set(drawn.unique().tolist()) == {0.0, 1.0}
