"""MIXAE's objective by hand, its weights' schedule, three lines told apart, and what happens without the third term."""

import math

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.config import Facts, with_overrides
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods import mixae
from embedkit.training.methods.mixae import MIXAE, Config, Decoders, entropy, mixae_terms, term_weights
from embedkit.training.models.backbones import create_backbone

FACTS = Facts(
    image_shape=(1, 16, 16), mean=(0.3,), std=(0.3,), batch_size=32, steps_per_epoch=4, total_steps=40
)


def tensors(n=6, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(n, k, generator=generator, dtype=torch.float64)
    return errors, torch.randn(n, k, generator=generator, dtype=torch.float64).softmax(1)


def build(**changes):
    torch.manual_seed(0)
    return MIXAE(
        create_backbone("r10", in_chans=1, image_size=16), Config(**{"clusters": 3, **changes}), FACTS
    )


# ---- the three terms -------------------------------------------------------------------------------------


def test_terms_by_loop():
    errors, p = tensors()
    n, k = errors.shape
    rec = sum(float(p[i, j] * errors[i, j]) for i in range(n) for j in range(k)) / n
    sample = -sum(float(p[i, j] * p[i, j].log()) for i in range(n) for j in range(k)) / n
    mean = [sum(float(p[i, j]) for i in range(n)) / n for j in range(k)]
    batch = -sum(m * math.log(m) for m in mean)
    assert mixae_terms(errors, p).tolist() == pytest.approx([rec, sample, batch], rel=1e-12)


def test_terms_by_hand():
    errors = torch.arange(100.0, dtype=torch.float64).reshape(10, 10)
    # every image its own autoencoder: the diagonal 0, 11, ..., 99; no doubt, and all ten in use
    rec, sample, batch = mixae_terms(errors, torch.eye(10, dtype=torch.float64)).tolist()
    assert (rec, sample) == (49.5, 0.0) and batch == pytest.approx(2.302585, abs=1e-6)
    # no idea at all: the mean over autoencoders, and ln 10 twice
    rec, sample, batch = mixae_terms(errors, torch.full((10, 10), 0.1, dtype=torch.float64)).tolist()
    assert rec == pytest.approx(49.5) and sample == pytest.approx(math.log(10)) == batch
    # one autoencoder for all: no entropy of either kind
    p = torch.zeros(10, 10, dtype=torch.float64)
    p[:, 3] = 1
    assert mixae_terms(errors, p).tolist() == [48.0, 0.0, 0.0]
    assert float(entropy(torch.tensor([0.5, 0.25, 0.25, 0.0]))) == pytest.approx(1.5 * math.log(2))


def test_gradients_of_every_term_are_those_of_the_formula():
    errors, p = tensors()
    errors.requires_grad_()
    p.requires_grad_()
    for term in range(3):
        assert torch.autograd.gradcheck(lambda e, q, term=term: mixae_terms(e, q)[term], (errors, p))
    n = len(p)
    expected = {
        0: errors.detach() / n,  # the assignment is taught by the errors
        1: -(p.detach().log() + 1) / n,
        2: -(p.detach().mean(0).log() + 1).expand(n, -1) / n,
    }
    for term, gradient in expected.items():
        torch.testing.assert_close(torch.autograd.grad(mixae_terms(errors, p)[term], p)[0], gradient)
    weighted = torch.autograd.grad(mixae_terms(errors, p)[0], errors)[0]
    torch.testing.assert_close(weighted, p.detach() / n)  # an autoencoder learns what it is given


def test_the_batch_entropy_is_of_all_ranks_together(monkeypatch):
    errors, p = tensors(n=8)
    mine, theirs = p[:4], p[4:]
    monkeypatch.setattr(mixae, "gather", lambda rows: torch.cat([rows, theirs]))
    assert float(mixae_terms(errors[:4], mine)[2]) == pytest.approx(float(entropy(p.mean(0))))


def test_an_assignment_of_certainty_has_an_entropy_of_zero_and_a_finite_slope():
    logits = torch.tensor([[0.0, 120.0]], requires_grad=True)  # in float32 the first share is 0
    entropy(logits.softmax(1)).sum().backward()
    assert float(entropy(logits.detach().softmax(1))) < 1e-30 and logits.grad.abs().max() < 1e-30


def test_bfloat16_is_widened():
    errors, p = tensors(n=64)
    expected = mixae_terms(errors.bfloat16().float(), p.bfloat16().float())
    found = mixae_terms(errors.bfloat16(), p.bfloat16())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


# ---- the weights -----------------------------------------------------------------------------------------


def test_weights_of_every_schedule():
    terms, unit = torch.tensor([2.0, 0.5, 1.25]), torch.tensor(3.0)

    def weights(progress, **changes):
        config = Config(alpha=0.2, beta=1.0, beta_end=0.4, **changes)
        return tuple(float(w) for w in term_weights(config, terms, progress, unit))

    assert weights(0.0) == pytest.approx((0.0, 3.0))  # keep all clusters in use first
    assert weights(0.25) == pytest.approx((0.3, 2.1))
    assert weights(0.5) == weights(1.0) == pytest.approx((0.6, 1.2))  # then be sure
    assert weights(0.0, schedule="constant") == weights(1.0, schedule="constant") == pytest.approx((0.6, 3.0))
    # alpha * sample = 0.2 rec, beta * batch = rec + alpha * sample
    alpha, beta = weights(0.7, schedule="balanced")
    assert alpha * 0.5 == pytest.approx(0.4) and beta * 1.25 == pytest.approx(2.4)
    with pytest.raises(ConfigError, match="linear, constant or balanced"):
        weights(0.0, schedule="cosine")


def test_the_unit_is_the_error_of_the_first_steps_per_nat():
    method = build()
    batch = Batch(
        torch.randint(0, 255, (8, 1, 16, 16), dtype=torch.uint8), torch.zeros(8).long(), torch.arange(8)
    )
    seen = []
    for step in range(1, 104):
        method.batches_seen = step
        with torch.no_grad():
            method.codes.bias.add_(0.01)
            seen.append(float(method.loss(batch, method.generator())["reconstruction"]))
    assert float(method.unit) == pytest.approx(sum(seen[:100]) / 100 / math.log(3), rel=1e-4)
    assert "unit" in method.state_dict()  # a resumed run goes on with it


def test_no_gradient_through_the_weights():
    terms = torch.tensor([2.0, 0.5, 1.25], requires_grad=True)
    assert not any(
        w.requires_grad for w in term_weights(Config(schedule="balanced"), terms, 0.3, torch.tensor(1.0))
    )


# ---- what it is for --------------------------------------------------------------------------------------


def three_lines(seed, n=600):
    generator = torch.Generator().manual_seed(seed)
    axes = torch.nn.functional.normalize(torch.randn(3, 10, generator=generator), dim=1)
    labels = torch.arange(n) % 3
    place = (0.5 + 1.5 * torch.rand(n, generator=generator)) * (
        2 * (torch.rand(n, generator=generator) > 0.5) - 1
    )
    return place[:, None] * axes[labels], labels


def share_out(x, beta, seed, steps=400):
    """Three linear autoencoders of one-number codes, by `mixae_terms` and `term_weights` alone."""
    torch.manual_seed(seed)
    encoder, decoders = torch.nn.Linear(10, 3, bias=False), torch.nn.Parameter(torch.randn(3, 10) / 3)
    assignment = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    optimizer = torch.optim.Adam(
        [*encoder.parameters(), decoders, *assignment.parameters()], lr=1e-2, fused=True
    )
    config, unit = Config(clusters=3, beta=beta, beta_end=beta / 10), torch.zeros(())
    for step in range(steps):
        z = encoder(x)
        p = assignment(z).softmax(1)
        terms = mixae_terms((z[:, :, None] * decoders - x[:, None]).square().mean(2), p)
        if step < 100:
            unit += (terms[0].detach() / math.log(3) - unit) / (step + 1)
        alpha, beta_now = term_weights(config, terms, step / steps, unit)
        loss = terms[0] + alpha * terms[1] - beta_now * terms[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return terms.tolist(), p.detach()


def test_three_lines_are_told_apart():
    x, labels = three_lines(seed=0)
    runs = [share_out(x, beta=1.0, seed=seed) for seed in range(3)]
    terms, p = min(runs, key=lambda result: result[0][0])  # the one that reconstructs best: no label chooses
    table = torch.zeros(3, 3).index_put_((labels, p.argmax(1)), torch.ones(len(x)), accumulate=True).numpy()
    rows, columns = linear_sum_assignment(-table)
    assert table[rows, columns].sum() / len(x) > 0.95
    assert terms[0] < 1e-3 and terms[1] < 0.1 and math.exp(terms[2]) > 2.9


def test_without_the_batch_entropy_one_autoencoder_takes_all():
    terms, _ = share_out(three_lines(seed=0)[0], beta=0.0, seed=0)
    assert math.exp(terms[2]) < 1.1


# ---- on images -----------------------------------------------------------------------------------------


def test_decoders_are_k_networks_side_by_side():
    torch.manual_seed(0)
    decoders = Decoders(3, (2, 5, 7))
    codes = torch.randn(4, 3, 2)
    first, second = decoders.weights
    for k in range(3):
        hidden = torch.relu(codes[:, k] @ first[k, 1:] + first[k, 0])
        torch.testing.assert_close(decoders(codes)[:, k], hidden @ second[k, 1:] + second[k, 0])
    decoders(codes)[:, 1].sum().backward()
    assert all(w.grad[[0, 2]].abs().sum() == 0 < w.grad[1].abs().sum() for w in decoders.weights)


def test_errors_are_those_of_the_clean_image():
    method = build().eval()
    images = load_images(DataConfig(path="synthetic:20", image_size=16))
    batch = images.batch(torch.arange(4))
    with torch.no_grad():
        errors, p = method._mixture(batch.images, None, method.generator())
        x = method.view(batch.images)
        z = method.codes(method.backbone(x)).reshape(4, 3, 10)
        for k in range(3):
            rebuilt = method.decoders(z)[:, k].reshape(4, 1, 16, 16)
            torch.testing.assert_close(errors[:, k], (rebuilt - x).square().mean((1, 2, 3)))
    torch.testing.assert_close(p.sum(1), torch.ones(4))
    assert torch.equal(method.assign(batch.images), p.argmax(1))


@pytest.mark.parametrize(("embedding", "dim"), [("features", 256), ("codes", 30)])
def test_what_is_exported(embedding, dim):
    method = build(embedding=embedding).eval()
    assert method.encoder()(torch.zeros(2, 1, 16, 16)).shape == (2, dim)


def test_one_batch_is_learned_and_shared_out():
    method = build(clusters=4)
    batch = load_images(DataConfig(path="synthetic:40", image_size=16)).batch(torch.arange(40))
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3, fused=True)
    with torch.no_grad():
        before = method.pretext_metric(batch, method.generator())
    for step in range(1, 61):
        method.batches_seen = step
        outputs = method.loss(batch, method.generator())
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        after = method.pretext_metric(batch, method.generator())
    assert float(before["explained_variance"]) < 0.1 < 0.5 < float(after["explained_variance"])
    assert float(after["used_clusters"]) > 2
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_a_run(tmp_path):
    settings = ["threads=1", "batch_size=24", "data.image_size=16", "steps=40", "optimizer.warmup_steps=5"]
    config = with_overrides(recipes.recipe("mixae"), settings)
    result = run.train(config, data="synthetic:320", out=tmp_path / "run", progress=False)
    assert result.finished and result.metrics["validation_explained_variance"] > 0.1  # the mean image: 0
    assert result.metrics["validation_used_clusters"] > 2
    names = load_file(result.run / "encoder.safetensors")
    assert "conv1.weight" in names and not any("decoder" in name for name in names)


def test_one_cluster_is_refused():
    with pytest.raises(ConfigError, match="2 or more clusters, found 1"):
        build(clusters=1)
