"""Rotations against numpy, flips before them, ln 4 at the start, and upright images told from turned ones."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training import recipes
from embedkit.training.augment import Compose, RandomHorizontalFlip
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.rotnet import Config, RotNet, rotation_loss, rotations
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer


def build(size=16, backbone="r10", **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(1, size, size),
        mean=(0.3,),
        std=(0.3,),
        batch_size=16,
        steps_per_epoch=4,
        total_steps=40,
    )
    return RotNet(create_backbone(backbone, in_chans=1, image_size=size), Config(**config), facts)


def digits(rows, size=16):
    return load_images(DataConfig(path="sklearn:digits", image_size=size)).batch(torch.as_tensor(rows))


def seen_by(method, call):
    """What the backbone is given while `call` runs."""
    inputs = []
    handle = method.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    call()
    handle.remove()
    return inputs


def test_rotations_are_numpys_bit_for_bit():
    x = torch.rand(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    turned, labels = rotations(x)
    for k in range(4):
        expected = np.rot90(x.numpy(), k, axes=(2, 3))
        assert np.array_equal(turned[3 * k : 3 * k + 3].numpy(), expected)
        assert labels[3 * k : 3 * k + 3].tolist() == [k] * 3
    # by hand: counter-clockwise the right column becomes the top row
    one = rotations(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))[0][1, 0]
    assert one.tolist() == [[2.0, 4.0], [1.0, 3.0]]
    assert torch.bincount(labels).tolist() == [3, 3, 3, 3]


def test_four_quarter_turns_are_none():
    x = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    y = x
    for _ in range(4):
        y = rotations(y)[0][2:4]
    assert torch.equal(y, x)


def test_images_that_are_not_square_are_refused():
    with pytest.raises(ConfigError, match="square"):
        rotations(torch.zeros(1, 1, 4, 5))


def test_all_four_copies_of_one_view_stand_in_one_batch():
    method, images = build(), digits(range(5))
    inputs = seen_by(method, lambda: method.loss(images, method.generator()))
    assert len(inputs) == 1 and inputs[0].shape == (20, 1, 16, 16)
    copies = inputs[0].chunk(4)
    for k, copy in enumerate(copies):
        assert torch.equal(torch.rot90(copy, -k, (2, 3)), copies[0])
    assert not torch.equal(copies[0], method.view(images.images))  # the view acted


def test_flips_come_before_the_turn():
    always = Compose(steps=(RandomHorizontalFlip(p=1.0),))
    method, images = build(augment=always), digits(range(4))
    (inputs,) = seen_by(method, lambda: method.loss(images, method.generator()))
    flipped = Batch(images.images.flip(3), images.labels, images.indices)
    assert torch.equal(inputs, rotations(method.view(flipped.images))[0])
    # The other order would exchange the quarter turns to either side ...
    left = torch.rot90(images.images, 1, (2, 3))
    assert torch.equal(left.flip(3), torch.rot90(flipped.images, 3, (2, 3)))
    # ... so that of a mirror-symmetric image the inputs of both labels would be the same set. Here they differ.
    half = images.images[:, :, :, :8]
    symmetric = torch.cat([half, half.flip(3)], dim=3)
    batch = Batch(symmetric, images.labels, images.indices)
    for p in (0.0, 1.0):
        method = build(augment=RandomHorizontalFlip(p=p))
        (inputs,) = seen_by(method, lambda m=method: m.loss(batch, m.generator()))
        assert torch.equal(inputs, rotations(method.view(symmetric))[0])
        assert (inputs[4:8] != inputs[12:16]).flatten(1).any(dim=1).all()


def test_the_definition():
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(4).repeat_interleave(2)
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        total -= math.log(math.exp(row[label]) / sum(math.exp(value) for value in row))
    assert float(rotation_loss(logits, labels)) == pytest.approx(total / 8, rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        half = rotation_loss(logits.bfloat16(), labels)
    torch.testing.assert_close(half, rotation_loss(logits.bfloat16().float(), labels))


def test_the_first_loss_is_ln_4_and_no_label_is_used():
    method, images = build(), digits(range(8))
    hidden = Batch(images.images, torch.full_like(images.labels, -1), images.indices)
    losses = [method.loss(batch, method.generator())["loss"] for batch in (images, hidden)]
    assert float(losses[0].detach()) == pytest.approx(1.3862944, rel=1e-6)
    assert torch.equal(*losses)


def train(method, batches, lr=2e-3):
    optimizer = Optimizer(lr=lr, weight_decay=0.0).create(method)
    for step, batch in enumerate(batches):
        method.batches_seen = step
        outputs = method.loss(batch, method.generator())
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
    return outputs


def test_overfits_one_batch_and_gradient_reaches_the_stem():
    method, images = build(augment=Compose(steps=())), digits([1, 2, 4, 7, 3])  # none looks the same turned
    outputs = train(method, [images] * 25)
    assert method.backbone.net.conv1.weight.grad.abs().sum() > 0
    assert float(outputs["loss"].detach()) < 0.2 * math.log(4)
    assert float(outputs["accuracy"]) == 1.0


def test_turns_of_held_out_images_are_told_above_chance():
    # upright has a meaning here: bright above, dark below
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(160, 60, 16)[None, None, :, None]
    images = (ramp + 20 * torch.randn(96, 1, 16, 16, generator=generator)).clamp(0, 255).to(torch.uint8)
    rows = torch.arange(96)
    batches = [Batch(images[part], rows[part], part) for part in rows[:64].split(16)]
    method = build()
    before = float(
        method.eval().pretext_metric(Batch(images[64:], rows[64:], rows[64:]), None)[METRIC].detach()
    )
    assert before == pytest.approx(0.25)  # equal logits: the first class for all
    train(method.train(), batches * 10)
    after = float(
        method.eval().pretext_metric(Batch(images[64:], rows[64:], rows[64:]), None)[METRIC].detach()
    )
    assert after > 0.8


METRIC = "rotation_accuracy"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_earlier_stage_is_its_pooled_map(stage):
    method = build(stage=stage).eval()
    x = method.view(digits(range(3)).images)
    maps = method.backbone.net.forward_intermediates(x, intermediates_only=True)
    encoder = method.encoder()
    torch.testing.assert_close(encoder(x), maps[stage].mean(dim=(2, 3)))
    assert not any(name.startswith(f"layer{stage + 1}") for name in encoder.state_dict())
    assert "layer4.0.conv1.weight" in method.backbone.net.state_dict()  # the run's own network stays whole


def test_the_last_stage_is_the_backbone_and_others_need_a_resnet():
    method = build()
    assert method.encoder() is method.backbone
    with pytest.raises(ConfigError, match="ResNet"):
        build(backbone="vit_t4", stage=2)
    with pytest.raises(ConfigError, match="stage of 1 to 4"):
        build(stage=0)


def test_the_recipe_draws_images_not_copies():
    config = recipes.recipe("rotnet")
    assert config.recipe == "rotnet" and isinstance(config.method, Config) and config.batch_size == 128
