"""The bound: analytic KL by sampling, exact likelihoods of a linear model, gradients of the draw, sums not means."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.config import Facts
from embedkit.training.data import DataConfig, load_images
from embedkit.training.methods.vae import (
    VAE,
    Config,
    active_units,
    kl_divergence,
    negative_log_likelihood,
    reparameterize,
)
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer

FACTS = Facts(
    image_shape=(1, 28, 28), mean=(0.3,), std=(0.3,), batch_size=16, steps_per_epoch=4, total_steps=40
)


def build(**config):
    torch.manual_seed(0)
    return VAE(create_backbone("r10", in_chans=1, image_size=28), Config(**config), FACTS)


def batch(n=16):
    return load_images(DataConfig(path="sklearn:digits", image_size=28)).batch(torch.arange(n))


def gaussians():
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    log_var = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return mu, log_var, generator


def test_kl_equals_torch_and_a_constant_by_hand():
    mu, log_var, _ = gaussians()
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mu, (0.5 * log_var).exp()), normal(torch.zeros_like(mu), torch.ones_like(mu))
    )
    torch.testing.assert_close(kl_divergence(mu, log_var), expected)
    # mu = 2, sigma^2 = e: (4 + e - 1 - 1) / 2
    by_hand = kl_divergence(torch.tensor(2.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    assert float(by_hand) == pytest.approx((2 + math.e) / 2, rel=1e-12)
    assert float(kl_divergence(torch.zeros(()), torch.zeros(()))) == 0.0


def test_kl_is_the_mean_of_log_q_minus_log_p():
    mu, log_var, generator = gaussians()
    noise = torch.randn(100_000, 4, 3, generator=generator, dtype=torch.float64)
    z = reparameterize(mu, log_var, noise)
    terms = log_normal(z, mu, log_var.exp()) - log_normal(z, 0.0, torch.ones(()))
    error = terms.std(0) / math.sqrt(len(terms))
    assert ((terms.mean(0) - kl_divergence(mu, log_var)).abs() < 3.5 * error).all()


def log_normal(z, mu, variance):
    return -0.5 * ((z - mu) ** 2 / variance + torch.log(2 * math.pi * variance))


def test_the_gradient_passes_through_the_draw():
    # E[z^2] = mu^2 + sigma^2. Noise of -1 and 1 has the moments of N(0, 1) up to the third: exact for a square.
    mu = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    log_var = torch.tensor([0.4, -0.9], dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    reparameterize(mu, log_var, noise).square().mean(0).sum().backward()
    torch.testing.assert_close(mu.grad, 2 * mu.detach())
    # d/dsigma = 2 sigma and dsigma/dlog_var = sigma / 2
    torch.testing.assert_close(log_var.grad, log_var.detach().exp())


def linear_model(side=5, dim=2, sigma=0.3):
    """x = W z + b + sigma noise with orthogonal columns of W: the true posterior is a diagonal Gaussian."""
    generator = torch.Generator().manual_seed(1)
    w = torch.linalg.qr(torch.randn(side, dim, generator=generator, dtype=torch.float64))[0]
    w = w * torch.tensor([1.5, 0.4], dtype=torch.float64)
    b = torch.randn(side, generator=generator, dtype=torch.float64)
    x = torch.randn(6, side, generator=generator, dtype=torch.float64)
    precision = 1 + (w**2).sum(0) / sigma**2
    mu, log_var = ((x - b) @ w / sigma**2) / precision, -precision.log().expand(6, dim)
    covariance = w @ w.T + sigma**2 * torch.eye(side, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(b, covariance).log_prob(x)
    return w, b, x, sigma, mu, log_var, exact


def bound(w, b, x, sigma, mu, log_var):
    """Our ELBO; the mean of log p(x|z), a square of the noise, is exact over the 2D points +-sqrt(D) e_j."""
    dim = mu.shape[1]
    points = math.sqrt(dim) * torch.cat([torch.eye(dim), -torch.eye(dim)]).double()
    terms = [
        negative_log_likelihood(reparameterize(mu, log_var, noise) @ w.T + b, x, "gaussian", sigma)
        for noise in points
    ]
    return -torch.stack(terms).mean(0) - kl_divergence(mu, log_var).sum(1)


def test_the_bound_is_the_exact_likelihood_at_the_true_posterior_and_below_it_elsewhere():
    w, b, x, sigma, mu, log_var, exact = linear_model()
    torch.testing.assert_close(bound(w, b, x, sigma, mu, log_var), exact, rtol=0, atol=1e-9)
    wrong_mu, wrong_log_var = mu + 0.1, log_var + 0.5
    # what is missing is KL(q || posterior)
    normal = torch.distributions.Normal
    gap = torch.distributions.kl_divergence(
        normal(wrong_mu, (0.5 * wrong_log_var).exp()), normal(mu, (0.5 * log_var).exp())
    ).sum(1)
    assert (gap > 0.01).all()
    torch.testing.assert_close(bound(w, b, x, sigma, wrong_mu, wrong_log_var), exact - gap)


def test_more_draws_tighten_the_bound():
    w, b, x, sigma, mu, log_var, exact = linear_model()
    mu, log_var = mu + 0.1, log_var + 0.5
    noise = torch.randn(64, 2000, *mu.shape, generator=torch.Generator().manual_seed(2)).double()
    z = reparameterize(mu, log_var, noise)  # (K, repeats, N, D)
    log_q = log_normal(z, mu, log_var.exp()).sum(-1)
    log_prior = log_normal(z, 0.0, torch.ones(())).sum(-1)
    decoded = z @ w.T + b
    pixels = x.expand_as(decoded)
    log_likelihood = -negative_log_likelihood(
        decoded.flatten(0, 2), pixels.flatten(0, 2), "gaussian", sigma
    ).reshape(log_q.shape)
    log_weight = log_likelihood + log_prior - log_q
    bounds = [(log_weight[:k].logsumexp(0) - math.log(k)).mean(0) for k in (1, 4, 16, 64)]
    error = log_weight[0].std(0) / math.sqrt(2000)
    assert ((bounds[0] - bound(w, b, x, sigma, mu, log_var)).abs() < 4 * error).all()
    for lower, higher in zip(bounds[:-1], bounds[1:], strict=True):
        assert (higher > lower).all()
    assert (bounds[-1] < exact + 2e-3).all() and (bounds[-1] > exact - 0.01).all()


def test_likelihoods_by_hand_summed_over_pixels():
    # bernoulli: q = 3/4 for a white and a black pixel; gaussian: one sigma off, and sigma^2 = 1 / (2 pi e)
    logits = torch.full((1, 1, 1, 2), math.log(3), dtype=torch.float64)
    pixels = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    expected = math.log(4 / 3) + math.log(4)
    assert negative_log_likelihood(logits, pixels).tolist() == pytest.approx([expected], rel=1e-12)
    sigma = 1 / math.sqrt(2 * math.pi * math.e)
    off = negative_log_likelihood(pixels + sigma, pixels, "gaussian", sigma)
    assert off.tolist() == pytest.approx([0.0], abs=1e-12)  # (1 - 1) / 2 for each
    for likelihood in ("bernoulli", "gaussian"):
        once = negative_log_likelihood(logits, pixels, likelihood)
        twice = negative_log_likelihood(logits.repeat(1, 1, 3, 1), pixels.repeat(1, 1, 3, 1), likelihood)
        torch.testing.assert_close(twice, 3 * once)  # a mean over pixels would stay the same
    for likelihood, width in (("laplace", 1.0), ("gaussian", 0.0)):
        with pytest.raises(ConfigError, match="expected bernoulli, or gaussian with a sigma above 0"):
            negative_log_likelihood(logits, pixels, likelihood, width)


def test_bfloat16_outputs_are_widened():
    decoded = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    pixels = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        nll = negative_log_likelihood(decoded, pixels)
    torch.testing.assert_close(nll, negative_log_likelihood(decoded.float(), pixels))


def test_the_first_loss_is_ln_2_a_pixel_and_beta_times_the_kl():
    method, images = build(), batch()
    outputs = method.loss(images, method.generator())
    assert method.beta == 0.0
    assert float(outputs["loss"].detach()) == pytest.approx(784 * math.log(2), rel=1e-6)
    assert float(outputs["kl"].detach()) > 0
    method.batches_seen = 4  # 4 of 40 batches, half of the fifth in which beta rises
    outputs = method.loss(images, method.generator())
    assert method.beta == pytest.approx(0.5)
    expected = 784 * math.log(2) + 0.5 * outputs["kl"]
    torch.testing.assert_close(outputs["loss"], expected)
    method.batches_seen = 30
    assert method.beta == 1.0 and build(kl_warmup=0.0, beta=4.0).beta == 4.0


def test_draws_are_a_function_of_the_batch_and_not_of_the_views():
    method, images = build(), batch()
    torch.nn.init.normal_(method.decoder.to_pixels.weight)

    def loss():
        return float(method.loss(images, torch.Generator().manual_seed(0))["loss"].detach())

    first = loss()
    torch.manual_seed(99)
    assert loss() == first
    method.batches_seen += 1
    assert method.beta == pytest.approx(0.125) and loss() != first


def test_overfits_one_batch_and_gradient_reaches_every_part():
    method, images = build(kl_warmup=0.0, beta=0.1), batch(8)
    optimizer = Optimizer(lr=4e-3, weight_decay=0.0).create(method)
    losses = []
    for step in range(80):
        method.batches_seen = step
        outputs = method.loss(images, method.generator())
        losses.append(float(outputs["reconstruction"].detach()))
        optimizer.zero_grad()
        outputs["loss"].backward()
        if step == 1:
            for weight in (method.backbone.net.conv1, method.mu, method.log_var, method.decoder.expand):
                assert weight.weight.grad.abs().sum() > 0
        optimizer.step()
    pixels = images.images.flatten(1).float() / 255
    entropy = torch.special.entr(torch.stack([pixels, 1 - pixels])).sum((0, 2)).mean()  # the least there is
    assert losses[-1] - entropy < 0.25 * (losses[0] - entropy)
    assert outputs["active_units"] > 2
    draws = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    assert method.decoder(draws).isfinite().all()


def test_units_that_do_not_vary_are_not_active():
    mu = torch.zeros(1000, 5)
    mu[:, 1] = torch.linspace(-1, 1, 1000)  # variance 1/3
    mu[:, 2] = torch.linspace(-0.1, 0.1, 1000)  # 0.0033
    mu[:, 3] = 7.0
    assert float(active_units(mu)) == 1


def test_exported_is_the_mean_and_never_a_draw():
    method = build(latent_dim=7, embedding="mu").eval()
    x = method.view(batch(4).images)
    encoder = method.encoder()
    with torch.no_grad():
        embedding = encoder(x)
        assert embedding.shape == (4, 7) and torch.equal(embedding, encoder(x))
        assert torch.equal(embedding, method._bound(x, torch.Generator())[2])
    features = build()
    assert features.encoder() is features.backbone


def test_extreme_variances_stay_finite():
    method, images = build(), batch(4)
    with torch.no_grad():
        method.log_var.bias.fill_(1e4)
    outputs = method.loss(images, method.generator())
    assert all(value.isfinite() for value in outputs.values())
    with pytest.raises(ConfigError, match="latent_dim of 1 or more"):
        build(latent_dim=0)
