"""Cross-entropy against its definition, ln K at the start, and one batch learned by heart."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.config import Facts
from embedkit.training.data import DataConfig, load_images
from embedkit.training.methods.supervised import Config, Supervised, smoothed_cross_entropy
from embedkit.training.models.backbones import create_backbone


def build(classes=10, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(1, 28, 28),
        mean=(0.3,),
        std=(0.3,),
        num_classes=classes,
        batch_size=32,
        steps_per_epoch=4,
        total_steps=40,
    )
    return Supervised(create_backbone("r10", in_chans=1, image_size=28), Config(**config), facts)


def batch(n=20):
    return load_images(DataConfig(path="sklearn:digits", image_size=28)).batch(torch.arange(n))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_definition(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, -1, 2, 2])
    terms = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        if label >= 0:
            log_p = [float(v) - math.log(sum(math.exp(float(w)) for w in row)) for v in row]
            q = [smoothing / 4 + (1 - smoothing) * (k == label) for k in range(4)]
            terms.append(-sum(a * b for a, b in zip(q, log_p, strict=True)))
    loss = smoothed_cross_entropy(logits, labels, smoothing)
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_by_hand():
    # softmax of (ln 3, 0) is (3/4, 1/4); smoothing 0.2 makes the target (0.9, 0.1)
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    expected = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert float(smoothed_cross_entropy(logits, torch.tensor([0]), 0.2)) == pytest.approx(expected)


def test_bfloat16_logits_are_widened():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = smoothed_cross_entropy(logits, torch.arange(8) % 5, 0.1)
    torch.testing.assert_close(loss, smoothed_cross_entropy(logits.float(), torch.arange(8) % 5, 0.1))


@pytest.mark.parametrize("classes", [10, 37])
def test_the_first_loss_is_ln_k(classes):
    method = build(classes)
    outputs = method.loss(batch(), method.generator())
    assert float(outputs["loss"].detach()) == pytest.approx(math.log(classes), rel=1e-5)


def test_no_labels_are_refused_with_the_next_step():
    with pytest.raises(ConfigError, match="data.label"):
        build(classes=0)
