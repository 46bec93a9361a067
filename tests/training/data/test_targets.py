"""Accuracy and cross-entropy leave out what has no label."""

import math

import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F

from embedkit.training.data.targets import accuracy, cross_entropy, labeled_mean

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])


def test_accuracy_counts_labeled_rows_alone():
    assert accuracy(LOGITS, torch.tensor([0, -1, 1])) == 0.5
    assert (
        accuracy(LOGITS.argmax(1), torch.tensor([0, -1, -1])) == 1.0
    )  # with a tenth of the labels 1 can be reached
    assert accuracy(LOGITS, torch.tensor([-1, -1, -1])).isnan()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_over_the_labeled_rows(smoothing):
    labels = torch.tensor([0, -1, 1])
    expected = F.cross_entropy(LOGITS[[0, 2]], labels[[0, 2]], label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(LOGITS, labels, smoothing), expected)
    assert cross_entropy(torch.zeros(3, 2), labels, smoothing) == pytest.approx(math.log(2))


def test_without_any_label_the_loss_is_zero_and_so_is_its_gradient():
    logits = LOGITS.clone().requires_grad_()
    loss = cross_entropy(logits, torch.full((3,), -1))
    loss.backward()
    assert loss == 0 and not logits.grad.any()
    values = torch.tensor([1.0, float("inf"), 3.0])
    assert labeled_mean(values, torch.tensor([0, -1, 2])) == 2
