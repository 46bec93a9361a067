"""Evaluation while training: values by hand, what is chosen, and a method that is left as it was."""

import pytest

torch = pytest.importorskip("torch")

import contract
from torch import nn

from embedkit.errors import ConfigError
from embedkit.training.config import Evaluation
from embedkit.training.data import ImageSet
from embedkit.training.evaluation.online import HeldOut, held_out


class Pixels(nn.Module):
    """A method whose features are the pixels."""

    device = torch.device("cpu")

    def encoder(self):
        return nn.Flatten()

    def view(self, images):
        return images.float()


def images(points, labels, classes=("a", "b")):
    pixels = torch.tensor(points, dtype=torch.uint8)[:, None, None]  # (N, 1, 1, 2)
    return ImageSet(pixels, torch.tensor(labels), tuple(classes), torch.arange(len(labels)))


def test_the_metrics_of_three_images_by_hand():
    bank = images([[100, 0], [0, 100]], [0, 1])
    queries = images([[100, 10], [10, 100], [100, 0]], [0, 0, 1])
    found = HeldOut(bank, queries, "knn_top1").evaluate(Pixels())
    # kNN says a, b, a. MAP@R: the nearest to the first is the third (another class), to the second the first (its own).
    assert found == {"knn_top1": pytest.approx(1 / 3), "map_at_r": 0.5, "p_at_1": 0.5}


def test_features_that_are_not_finite_are_no_score():
    class Broken(Pixels):
        def view(self, images):
            return images.float() * float("nan")

    pair = images([[1, 2], [3, 4]], [0, 0])
    found = HeldOut(None, pair, "map_at_r").evaluate(Broken())
    assert set(found) == {"map_at_r", "p_at_1"} and all(value != value for value in found.values())


def test_the_method_is_left_as_it_was():
    method, _ = contract.build(contract.tiny("supervised"))
    method.train()
    frozen = method.backbone.net.bn1.eval()  # a module that the method keeps in its own mode
    before = {name: value.clone() for name, value in method.state_dict().items() if torch.is_tensor(value)}
    modes = {name: module.training for name, module in method.named_modules()}
    generator = torch.get_rng_state()
    config = contract.tiny("supervised")
    from embedkit.training import run

    train, _ = run.open_data(config)
    HeldOut(train, train, "knn_top1").evaluate(method)
    assert {name: module.training for name, module in method.named_modules()} == modes
    assert not frozen.training and method.training
    after = method.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_which_metric_chooses():
    seen = held_out(Evaluation(every=1), images([[1, 0]] * 2, [0, 1]), images([[1, 0]] * 2, [0, 1]))
    assert seen.metric == "knn_top1" and len(seen.bank) == 2
    unseen = images([[1, 0]] * 4, [2, 2, 3, 3], "abcd")
    new = held_out(Evaluation(every=1), images([[1, 0]] * 2, [0, 1]), unseen)
    assert new.metric == "map_at_r" and new.bank is None
    # classes stay whole where not all images are taken
    some = held_out(Evaluation(every=1, images=2), images([[1, 0]] * 2, [0, 1]), unseen)
    assert len(some.queries) == 2 and len(some.queries.labels.unique()) == 1


@pytest.mark.parametrize(
    ("validation", "settings", "message"),
    [
        ([], {}, "no image is held out"),
        ([-1, -1], {}, "no image has a label"),
        ([2, 2], {"metric": "knn_top1"}, "kNN needs labeled training images"),
        ([0, 1], {"metric": "map_at_r"}, "no class has two held-out images"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(validation, settings, message):
    train = images([[1, 0]] * 2, [0, 1])
    queries = train.subset(torch.arange(0)) if not validation else images([[1, 0]] * 2, validation, "abc")
    with pytest.raises(ConfigError, match=message):
        held_out(Evaluation(every=1, **settings), train, queries)
