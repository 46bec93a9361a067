"""The base: randomness is a function of (seed, counter, purpose), memory is channels last, losses are float32."""

import pytest

torch = pytest.importorskip("torch")

from embedkit.training import methods
from embedkit.training.augment import Compose, GaussianNoise, RandomHorizontalFlip
from embedkit.training.config import Facts
from embedkit.training.method import Method, float32_loss
from embedkit.training.models.backbones import create_backbone

FACTS = Facts(
    image_shape=(1, 28, 28), mean=(0.25,), std=(0.5,), batch_size=4, steps_per_epoch=3, total_steps=12, seed=5
)


def build(facts=FACTS):
    torch.manual_seed(0)
    return Method(create_backbone("r10", in_chans=1, image_size=28), None, facts)


def drawn(method, purpose="views"):
    return torch.rand(4, generator=method.generator(purpose)).tolist()


def test_randomness_is_a_function_of_seed_counter_and_purpose():
    method = build()
    first = drawn(method)
    assert drawn(method) == first != drawn(method, "masks")
    method.batches_seen = 1
    second = drawn(method)
    assert second != first
    method.batches_seen = 0
    assert drawn(method) == first
    other = build(Facts(**{**FACTS.__dict__, "seed": 6}))
    assert drawn(other) != first


def test_the_counter_stands_in_the_state_dict():
    method, other = build(), build()
    method.batches_seen = 17
    other.load_state_dict(method.state_dict())
    assert other.batches_seen == 17 and drawn(other) == drawn(method)
    assert "mean" not in method.state_dict()


def test_a_batch_counts_seeds_torch_sets_the_rate_and_begins_epochs():
    method = build()
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    method._trainer = type("Trainer", (), {"optimizers": [optimizer]})()
    epochs, rates, dropout = [], [], []
    method.begin_epoch = epochs.append
    for _ in range(7):
        method.on_train_batch_start(None, 0)
        rates.append(optimizer.param_groups[0]["lr"])
        dropout.append(float(torch.rand(())))
    assert method.batches_seen == 7 and epochs == [0, 1, 2]
    assert rates == [FACTS.optimizer.lr_at(step, 12) for step in range(7)]
    assert len(set(dropout)) == 7
    assert method.progress == pytest.approx(7 / 12)
    method.batches_seen = 3
    method.on_train_batch_start(None, 0)
    assert float(torch.rand(())) == dropout[3]


def test_a_view_is_normalized_and_leaves_the_images_alone():
    method = build()
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    before = images.clone()
    plain = method.view(images)
    torch.testing.assert_close(plain, (images.float() / 255 - 0.25) / 0.5)
    augment = Compose(steps=(RandomHorizontalFlip(), GaussianNoise(sigma=(0.1, 0.1))))
    first, again = method.view(images, augment), method.view(images, augment)
    assert torch.equal(first, again) and not torch.equal(first, plain) and torch.equal(images, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.view(images, augment), first)


@pytest.mark.parametrize("channels", [1, 3])
def test_convolutions_run_channels_last(channels):
    torch.manual_seed(0)
    facts = Facts(**{**FACTS.__dict__, "mean": (0.5,) * channels, "std": (0.5,) * channels})
    method = Method(create_backbone("r10", in_chans=channels, image_size=28), None, facts)
    x = method.view(torch.zeros(4, channels, 28, 28, dtype=torch.uint8))
    maps = method.backbone.forward_features(x)
    assert maps.is_contiguous(memory_format=torch.channels_last) and not maps.is_contiguous()


def test_float32_loss_leaves_autocast_and_keeps_float64():
    @float32_loss
    def product(a, b, *, scale=1.0):
        return scale * (a @ b).sum()

    a, b = torch.rand(8, 8), torch.rand(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        result = product(a, b, scale=2.0)
        halves = product(a.bfloat16(), b=b.bfloat16())
    assert torch.equal(result, 2.0 * (a @ b).sum())
    assert torch.equal(halves, (a.bfloat16().float() @ b.bfloat16().float()).sum())
    assert product(a.double(), b.double()).dtype == torch.float64


def test_every_method_is_of_one_family():
    assert sorted(name for members in methods.families().values() for name in members) == methods.names()
    assert (methods.family_of("simsiam"), methods.family_of("moco_v2")) == ("views", "")


def test_the_sentence_of_a_card_is_a_constant_of_the_method(monkeypatch):
    """A reworded docstring must not change the digest of an entry."""
    summaries = [methods.summary_of(name) for name in methods.names()]
    assert len(set(summaries)) == len(summaries)
    for name, summary in zip(methods.names(), summaries, strict=True):
        assert summary.endswith(".") and "\n" not in summary and "  " not in summary and len(summary) < 200
        assert ": " in summary  # after the name of the method
        monkeypatch.setattr(methods._module(name), "__doc__", "Other words.")
    assert [methods.summary_of(name) for name in methods.names()] == summaries
