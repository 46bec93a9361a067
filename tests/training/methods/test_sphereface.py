"""psi at known angles, both losses by a loop, PyTorch Metric Learning's loss, gradients, and a run on identities."""

import io
import math

import pytest

torch = pytest.importorskip("torch")

import numpy as np
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.augment import Compose
from embedkit.training.config import Facts, with_overrides
from embedkit.training.data import Batch, DataConfig, IdentityBalanced, Loader, load_images
from embedkit.training.methods.sphereface import (
    Config,
    SphereFace,
    a_softmax,
    annealing,
    detached_margin,
    psi,
)
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer


def tensors(n=6, k=5, dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(n, dim, generator=generator, dtype=dtype)
    weights = torch.randn(k, dim, generator=generator, dtype=dtype)
    return x, weights, torch.arange(n) % k


def angles(steps=10_001):
    return torch.linspace(0, math.pi, steps, dtype=torch.float64)


def psi_by_its_definition(theta, m):
    k = next(k for k in range(100) if theta <= (k + 1) * math.pi / m + 1e-15)
    return (-1) ** k * math.cos(m * theta) - 2 * k


def test_psi_at_known_angles():
    theta = torch.tensor([0, 1 / 8, 1 / 4, 1 / 3, 1 / 2, 3 / 4, 1], dtype=torch.float64) * math.pi
    expected = torch.tensor([1.0, 0.0, -1.0, -1.5, -3.0, -5.0, -7.0], dtype=torch.float64)
    torch.testing.assert_close(psi(theta.cos(), 4), expected)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 1.35, 1.7])
def test_psi_is_its_definition_continuous_and_falls_all_the_way(m):
    theta = angles()
    found = psi(theta.cos(), m)
    expected = [psi_by_its_definition(float(t), m) for t in theta]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    steps = found.diff()
    assert (steps < 1e-9).all()  # it never rises ...
    assert steps.abs().max() < 1.1 * m * math.pi / 10_000  # ... and never jumps: its slope is at most m
    assert float(found[0]) == pytest.approx(1.0)
    if m == int(m):
        assert float(found[-1]) == pytest.approx(1 - 2 * m)


def test_psi_of_4_is_chebyshevs_polynomial():
    c = angles(101).cos()[1:-1]
    k = (4 * c.acos() / math.pi).floor()
    torch.testing.assert_close(psi(c, 4), (-1.0) ** k * (8 * c**4 - 8 * c**2 + 1) - 2 * k)


def test_gradient_of_psi_is_finite_at_0_and_at_pi():
    c = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    psi(c, 4).sum().backward()
    # d/dc cos(4 theta) = 4 sin(4 theta) / sin(theta) -> 16 at 0, and at pi -16 times (-1)^4
    assert c.grad[0] == pytest.approx(16.0) and abs(float(c.grad[1])) == pytest.approx(16.0)


def by_loop(x, weights, labels, target, length):
    """-log softmax over identities; `target` makes the own cosine's value, `length` is that of a row."""
    total = 0.0
    for row, label in zip(x.tolist(), labels.tolist(), strict=True):
        norm = math.sqrt(sum(v * v for v in row))
        logits = []
        for j, w in enumerate(weights.tolist()):
            c = sum(a * b for a, b in zip(row, w, strict=True)) / norm / math.sqrt(sum(b * b for b in w))
            logits.append(length(norm) * (target(c) if j == label else c))
        total -= logits[label] - math.log(sum(math.exp(v) for v in logits))
    return total / len(x)


@pytest.mark.parametrize("lambda_", [0.0, 5.0, 1000.0])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_equation_7_by_a_loop(m, lambda_):
    x, weights, labels = tensors()

    def target(c):
        return (lambda_ * c + psi_by_its_definition(math.acos(c), m)) / (1 + lambda_)

    expected = by_loop(x, weights, labels, target, lambda norm: norm)
    assert float(a_softmax(x, weights, labels, m, lambda_)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("m", [1.0, 1.35, 1.7, 4.0])
def test_the_detached_margin_by_a_loop(m):
    x, weights, labels = tensors()
    expected = by_loop(
        x, weights, labels, lambda c: psi_by_its_definition(math.acos(c), m), lambda norm: 16.0
    )
    assert float(detached_margin(x, weights, labels, m, 16.0)) == pytest.approx(expected, rel=1e-10)


def test_by_hand():
    # x of length 2 at 60 degrees from its identity and 30 from the other: psi = -1.5, the other cosine sqrt(3) / 2
    x = torch.tensor([[1.0, math.sqrt(3.0)]], dtype=torch.float64)
    weights, label = torch.eye(2, dtype=torch.float64), torch.tensor([0])
    expected = math.log(1 + math.exp(2 * (math.sqrt(3) / 2 + 1.5)))
    assert float(a_softmax(x, weights, label, 4, 0.0)) == pytest.approx(expected)
    # lambda = 1: half of the way from 1/2 to -1.5
    expected = math.log(1 + math.exp(2 * (math.sqrt(3) / 2 + 0.5)))
    assert float(a_softmax(x, weights, label, 4, 1.0)) == pytest.approx(expected)
    # a right angle to all K identities: ln(1 + (K - 1) exp(-s psi(pi / 2)))
    x, weights = torch.eye(4, dtype=torch.float64)[:1], torch.eye(4, dtype=torch.float64)[1:]
    expected = math.log(1 + 2 * math.exp(-10 * math.cos(1.7 * math.pi / 2)))
    assert float(detached_margin(x, weights, label, 1.7, 10.0)) == pytest.approx(expected)


@pytest.mark.parametrize("lambda_", [0.0, 7.0])
def test_without_a_margin_it_is_softmax_on_normalized_weights_without_bias(lambda_):
    x, weights, labels = tensors()
    expected = F.cross_entropy(x @ F.normalize(weights, dim=1).T, labels)
    torch.testing.assert_close(a_softmax(x, weights, labels, 1, lambda_), expected)
    cosine = F.normalize(x, dim=1) @ F.normalize(weights, dim=1).T
    torch.testing.assert_close(
        detached_margin(x, weights, labels, 1.0, 9.0), F.cross_entropy(9 * cosine, labels)
    )


def test_a_large_lambda_removes_the_margin_and_the_lengths_of_weights_do_not_count():
    x, weights, labels = tensors()
    plain = float(a_softmax(x, weights, labels, 1, 0.0))
    assert float(a_softmax(x, weights, labels, 4, 1e9)) == pytest.approx(plain)
    assert float(a_softmax(x, weights, labels, 4, 0.0)) > float(a_softmax(x, weights, labels, 4, 5.0)) > plain
    long = weights * torch.tensor([[1.0], [0.1], [9.0], [2.0], [3.0]])
    for loss, last in ((a_softmax, 0.0), (detached_margin, 16.0)):
        assert float(loss(x, long, labels, 4, last)) == pytest.approx(
            float(loss(x, weights, labels, 4, last))
        )
    # lengths of embeddings count in the paper's form alone
    assert float(a_softmax(3 * x, weights, labels, 4, 0.0)) != pytest.approx(
        float(a_softmax(x, weights, labels, 4, 0.0))
    )
    assert float(detached_margin(3 * x, weights, labels, 1.7, 16.0)) == pytest.approx(
        float(detached_margin(x, weights, labels, 1.7, 16.0))
    )


@pytest.mark.parametrize("lambda_", [0.0, 5.0])
def test_gradients_of_the_papers_form(lambda_):
    x, weights, labels = (t.clone() for t in tensors())
    theta = (F.normalize(x, dim=1) * F.normalize(weights, dim=1)[labels]).sum(1).acos()
    to_boundary = (theta / (math.pi / 4) - (theta / (math.pi / 4)).round()).abs()
    assert to_boundary.min() > 1e-3  # finite differences must not cross from one piece into the next
    x.requires_grad_()
    weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: a_softmax(a, b, labels, 4, lambda_), (x, weights))
    a_softmax(x, weights, labels, 4, lambda_).backward()
    # a direction has no gradient along itself: none is spent on the length of a weight
    torch.testing.assert_close((weights.grad * weights).sum(1), torch.zeros(5).double(), atol=1e-12, rtol=0)


def test_the_detached_margin_has_the_gradient_of_a_cosine():
    x, weights, labels = tensors()
    x.requires_grad_()
    cosine = F.normalize(x, dim=1) @ F.normalize(weights, dim=1).T
    own = cosine.gather(1, labels[:, None])
    p = (9 * cosine.scatter(1, labels[:, None], psi(own, 1.7))).softmax(1).detach()
    # d loss / d logit = p - onehot, and d logit / d cosine = s for all, the own one too
    weight = 9 * (p - F.one_hot(labels, 5)) / len(x)
    (expected,) = torch.autograd.grad((weight * cosine).sum(), x)
    (found,) = torch.autograd.grad(detached_margin(x, weights, labels, 1.7, 9.0), x)
    torch.testing.assert_close(found, expected)


# scipy's binomial on a tensor, in the library's own constructor
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_equals_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, weights, labels = tensors(n=16, k=7, dtype=torch.float32)
    theirs = losses.SphereFaceLoss(num_classes=7, embedding_size=8, margin=4, scale=1)
    with torch.no_grad():
        theirs.W.copy_(weights.T)
    x.requires_grad_()
    weights.requires_grad_()
    found, expected = a_softmax(x, weights, labels, 4, 0.0), theirs(x, labels)
    torch.testing.assert_close(found, expected)
    mine = torch.autograd.grad(found, (x, weights))
    other = torch.autograd.grad(expected, (x, theirs.W))
    torch.testing.assert_close(mine[0], other[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine[1], other[1].T, rtol=1e-4, atol=1e-6)


def test_bfloat16_embeddings_are_widened():
    x, weights, labels = tensors(dtype=torch.float32)
    for loss, settings in ((a_softmax, (4, 5.0)), (detached_margin, (1.7, 30.0))):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(x.bfloat16(), weights, labels, *settings)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, loss(x.bfloat16().float(), weights, labels, *settings))


def test_lambda_falls_to_its_minimum():
    assert annealing(0, 1000.0, 0.12, 5.0) == 1000.0
    assert annealing(10, 1000.0, 0.12, 5.0) == pytest.approx(1000 / 2.2)
    # 1 + 0.12 t = 200 at t = 1658.3
    assert annealing(1658, 1000.0, 0.12, 5.0) > 5.0 == annealing(1659, 1000.0, 0.12, 5.0)


def build(classes=8, total_steps=100, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(3, 16, 16),
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
        num_classes=classes,
        batch_size=16,
        steps_per_epoch=4,
        total_steps=total_steps,
    )
    return SphereFace(create_backbone("r10", in_chans=3, image_size=16), Config(**config), facts)


def images(n=16, classes=8):
    """Each identity a pattern of its own, with noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(40, 200, (classes, 3, 16, 16), generator=generator)
    labels = torch.arange(n) % classes
    noise = torch.randint(0, 30, (n, 3, 16, 16), generator=generator)
    return Batch((patterns[labels] + noise).to(torch.uint8), labels, torch.arange(n))


def test_the_margin_rises_over_the_first_tenth():
    method = build()
    for seen, expected in ((0, 1.0), (5, 1.35), (10, 1.7), (100, 1.7)):
        method.batches_seen = seen
        assert method.margin() == pytest.approx(expected)
    assert build(total_steps=None).margin() == 1.0
    assert build(margin_warmup=0.0).margin() == 1.7


@pytest.mark.parametrize("form", ["opensphere", "cvpr17"])
def test_the_first_loss_is_that_of_independent_directions(form):
    classes = 500
    method = build(classes, form=form, margin=4.0 if form == "cvpr17" else 1.7, margin_warmup=0.0)
    batch = images(64, 64)
    outputs = method.loss(batch, method.generator())
    # cosines of independent directions are about N(0, 1 / D): E exp(s c) = exp(s^2 / 2D)
    length = method._embed(batch).norm(dim=1).mean() if form == "cvpr17" else torch.tensor(30.0)
    s, own = float(length.detach()), psi_by_its_definition(math.pi / 2, method.config.margin)
    lambda_ = 1000.0 if form == "cvpr17" else 0.0
    own = own / (1 + lambda_)
    expected = math.log(math.exp(s * own) + (classes - 1) * math.exp(s * s / 2 / 256)) - s * own
    assert float(outputs["loss"].detach()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("form, margin", [("opensphere", 1.7), ("cvpr17", 4.0)])
def test_overfits_one_batch_on_the_sphere(form, margin):
    method, batch = build(form=form, margin=margin, lambda_base=10.0, augment=Compose(steps=())), images()
    optimizer = Optimizer(lr=5e-3, weight_decay=0.0).create(method)
    for step in range(40):
        method.batches_seen = step + 1
        outputs = method.loss(batch, method.generator())
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        method.on_train_batch_end(None, batch, step)
    for tensor in (method.identities, method.embedding.weight, method.backbone.net.conv1.weight):
        assert tensor.grad.abs().sum() > 0
    assert float(outputs["accuracy"]) > 0.9
    torch.testing.assert_close(method.identities.detach().norm(dim=1), torch.ones(8))
    with torch.no_grad():
        assert float(method.pretext_metric(batch, method.generator())["identified"]) > 0.9


def test_the_embedding_layer_is_exported_and_the_identities_are_not():
    method = build(embed_dim=24).eval()
    encoder = method.encoder()
    x = method.view(images().images)
    assert torch.equal(encoder(x), method.embedding(method.backbone(x))) and encoder(x).shape == (16, 24)
    names = set(encoder.state_dict())
    assert {"embedding.weight", "embedding.bias", "backbone.conv1.weight"} <= names
    assert not any("identities" in name for name in names)


def test_unusable_settings_are_refused():
    with pytest.raises(ConfigError, match="data.label"):
        build(classes=0)
    with pytest.raises(ConfigError, match="whole number"):
        build(form="cvpr17", margin=1.7)
    for margin in (0.5, 1e6):
        with pytest.raises(ConfigError, match="1 to 16"):
            build(margin=margin)
    with pytest.raises(ConfigError, match="opensphere or cvpr17"):
        build(form="arcface")


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """A Parquet file of 12 identities with 3 to 5 images, numbered with gaps, in the Hub's layout."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    rows, identities = [], []
    for identity in range(12):
        pattern = rng.integers(40, 200, (16, 16, 3))
        for _ in range(3 + identity % 3):
            file = io.BytesIO()
            Image.fromarray((pattern + rng.integers(0, 40, pattern.shape)).astype(np.uint8)).save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
            identities.append(10 * identity)
    folder = tmp_path_factory.mktemp("faces")
    pq.write_table(pa.table({"image": rows, "identity": identities}), folder / "train.parquet")
    return folder


@pytest.mark.parametrize("name", ["sphereface", "sphereface:cvpr17"])
def test_a_run_on_identities(name, faces, tmp_path):
    settings = ["threads=1", "batch_size=16", "steps=6", "data.image_size=16", "log_every=3"]
    config = with_overrides(recipes.recipe(name), settings)
    result = run.train(config, data=str(faces), out=tmp_path / "run", progress=False)
    _, method = run.load_run(result.run)
    assert method.facts.num_classes == 12 and method.config.form == (
        "cvpr17" if ":" in name else "opensphere"
    )
    torch.testing.assert_close(method.identities.detach().norm(dim=1), torch.ones(12))
    assert load_file(result.run / "encoder.safetensors")["embedding.weight"].shape == (256, 256)
    assert 0 <= result.metrics["validation_identified"] <= 1


def test_batches_hold_each_identity_twice(faces):
    config = recipes.recipe("sphereface")
    assert config.data.sampler == IdentityBalanced(images_per_identity=2) and config.data.label == "identity"
    data = load_images(DataConfig(path=str(faces), label="identity", color="rgb", image_size=16))
    for batch, _ in zip(Loader(data, config.data.sampler, batch_size=16, seed=0), range(5), strict=False):
        assert (batch.labels.view(8, 2)[:, 0] == batch.labels.view(8, 2)[:, 1]).all()
        assert len(batch.labels.unique()) == 8 and len(batch.indices.unique()) == 16
