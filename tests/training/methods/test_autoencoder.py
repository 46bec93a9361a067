"""Reconstruction against its definition, a linear autoencoder against PCA, and one batch learned by heart."""

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Compose, RandomHorizontalFlip
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.autoencoder import Autoencoder, Config, reconstruction_loss
from embedkit.training.models.backbones import Backbone, create_backbone
from embedkit.training.optim import Optimizer


def facts(side=28):
    return Facts(
        image_shape=(1, side, side), mean=(0.3,), std=(0.3,), batch_size=16, steps_per_epoch=4, total_steps=40
    )


def build(**config):
    torch.manual_seed(0)
    return Autoencoder(create_backbone("r10", in_chans=1, image_size=28), Config(**config), facts())


def batch(n=16):
    return load_images(DataConfig(path="sklearn:digits", image_size=28)).batch(torch.arange(n))


def test_the_definitions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 2, 4, generator=generator, dtype=torch.float64)
    pixels = torch.rand(3, 2, 2, 4, generator=generator, dtype=torch.float64)
    entropy = error = 0.0
    for decoded, p in zip(logits.flatten().tolist(), pixels.flatten().tolist(), strict=True):
        q = 1 / (1 + math.exp(-decoded))
        entropy -= p * math.log(q) + (1 - p) * math.log(1 - q)
        error += (p - decoded) ** 2
    assert float(reconstruction_loss(logits, pixels)) == pytest.approx(entropy / 3, rel=1e-12)
    assert float(reconstruction_loss(logits, pixels, "squared_error")) == pytest.approx(error / 3, rel=1e-12)


def test_by_hand_and_summed_over_pixels():
    # a logit of ln 3 says 3/4: a white pixel costs -ln(3/4), a black one -ln(1/4)
    logits = torch.full((1, 1, 1, 2), math.log(3), dtype=torch.float64)
    pixels = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    expected = math.log(4 / 3) + math.log(4)
    assert float(reconstruction_loss(logits, pixels)) == pytest.approx(expected, rel=1e-12)
    twice = [tensor.repeat(1, 1, 2, 1) for tensor in (logits, pixels)]
    assert float(reconstruction_loss(*twice)) == pytest.approx(2 * expected, rel=1e-12)
    batch = [tensor.repeat(5, 1, 1, 1) for tensor in (logits, pixels)]
    assert float(reconstruction_loss(*batch)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ConfigError, match="cross_entropy or squared_error, found 'bce'"):
        reconstruction_loss(logits, pixels, "bce")


def test_bfloat16_outputs_are_widened():
    generator = torch.Generator().manual_seed(1)
    decoded = torch.randn(4, 1, 8, 8, generator=generator).bfloat16()
    pixels = torch.rand(4, 1, 8, 8, generator=generator)
    for kind in ("cross_entropy", "squared_error"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = reconstruction_loss(decoded, pixels, kind)
        torch.testing.assert_close(loss, reconstruction_loss(decoded.float(), pixels, kind))


def test_the_first_loss_is_ln_2_a_pixel():
    method, images = build(), batch()
    outputs = method.loss(images, method.generator())
    assert float(outputs["loss"].detach()) == pytest.approx(784 * math.log(2), rel=1e-6)
    # and every pixel is said to be one half
    squares = (images.images.float() / 255 - 0.5).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(outputs["squared_error"], squares)


def test_what_is_rebuilt_are_the_pixels_that_the_encoder_saw():
    method, images = build(augment=Compose(steps=(RandomHorizontalFlip(p=1.0),))), batch()
    pixels, _ = method._rebuild(images.images, method.config.augment, method.generator())
    torch.testing.assert_close(pixels, images.images.flip(3).float() / 255)


def test_a_linear_autoencoder_spans_the_principal_subspace():
    k, side = 3, 8
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(side * side, k, generator=generator))[0]
    factors = torch.randn(300, k, generator=generator) * torch.tensor([0.6, 0.45, 0.35])
    values = 0.5 + factors @ basis.T + 0.04 * torch.randn(300, side * side, generator=generator)
    images = (255 * values.clamp(0, 1)).round().to(torch.uint8).reshape(300, 1, side, side)
    rows = torch.arange(300)

    torch.manual_seed(0)
    flat = Backbone(
        nn.Flatten(), architecture="flat", model_args={}, dim=side * side, in_chans=1, image_size=(side, side)
    )
    method = Autoencoder(flat, Config(code_dim=k, reconstruction="squared_error"), facts(side))
    method.decoder = nn.Sequential(nn.Linear(k, side * side), nn.Unflatten(1, (1, side, side)))
    found = Batch(images, torch.zeros(300, dtype=torch.int64), rows)
    optimizer = torch.optim.LBFGS(
        method.parameters(), max_iter=600, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = method.loss(found, method.generator())["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    pixels = images.flatten(1).double() / 255
    centerd = pixels - pixels.mean(0)
    eigenvalues, vectors = torch.linalg.eigh(centerd.T @ centerd / len(pixels))
    loss = method.loss(found, method.generator())["loss"].detach()
    assert float(loss) == pytest.approx(float(eigenvalues[:-k].sum()), rel=1e-4)
    learned = torch.linalg.qr(method.decoder[0].weight.detach().double())[0]
    cosines = torch.linalg.svdvals(learned.T @ vectors[:, -k:])
    assert float(cosines.min().clamp(max=1).acos()) < 1e-2  # the largest principal angle, in radians


def test_overfits_one_batch_by_the_squared_error_too():
    method, images = build(reconstruction="squared_error"), batch(8)
    optimizer = Optimizer(lr=1e-2, weight_decay=0.0).create(method)
    for step in range(80):
        outputs = method.loss(images, method.generator())
        optimizer.zero_grad()
        outputs["loss"].backward()
        if step == 1:  # in the first step only the layer of zeros has a gradient
            assert method.backbone.net.conv1.weight.grad.abs().sum() > 0
        optimizer.step()
    pixels = images.images.flatten(1).float() / 255
    variance = (pixels - pixels.mean(0)).square().sum(1).mean()
    assert float(outputs["squared_error"]) < 0.1 * float(variance)


def test_the_metric_is_zero_for_the_mean_image_and_one_for_a_copy():
    method, images = build(reconstruction="squared_error"), batch()
    pixels = images.images.float() / 255
    for decoded, expected in ((pixels.mean(0).expand_as(pixels), 0.0), (pixels, 1.0)):
        method.decoder = Fixed(decoded)
        metric = method.pretext_metric(images, method.generator())
        assert float(metric["explained_variance"]) == pytest.approx(expected, abs=1e-5)


class Fixed(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, code):
        return self.value


def test_exported_is_the_code_or_what_stands_before_it():
    method = build(code_dim=12).eval()
    x = method.view(batch(4).images)
    with torch.no_grad():
        code = method.encoder()(x)
        assert code.shape == (4, 12)
        assert torch.equal(code, method.code(method.backbone(x)))
        assert not (code >= 0).all()  # linear, not rectified
    features = build(embedding="features")
    assert features.encoder() is features.backbone


@pytest.mark.parametrize("code_dim", [0, 784, 1000])
def test_a_code_without_a_bottleneck_is_refused(code_dim):
    with pytest.raises(ConfigError, match="784 values"):
        build(code_dim=code_dim)
