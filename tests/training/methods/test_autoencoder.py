"""Reconstruction against its definition, a linear autoencoder against PCA, and one batch learned by heart."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")

import contract
from torch import nn

from embedkit import load_encoder
from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.augment import Compose, RandomHorizontalFlip
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.export.from_run import export_run
from embedkit.training.methods import autoencoder as module
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


def hinton(**fields):
    """The recipe of 2006 in small, on synthetic images."""
    base = contract.tiny("autoencoder")
    full = recipes.recipe("autoencoder:hinton2006")
    method = dataclasses.replace(full.method, **{"code_dim": 5, **fields})
    return dataclasses.replace(
        base,
        method=method,
        backbone="mlp",
        backbone_args={**full.backbone_args, "hidden": (40, 20)},
        data=dataclasses.replace(base.data, path="synthetic:64", validation=0.25),
        optimizers={name: full.optimizers[name] for name in ("rbm0", "rbm1")}
        | {"rbm2": full.optimizers["rbm3"]},
        batch_size=11,
        steps=40,
    )


def test_the_recipe_of_2006():
    config = recipes.recipe("autoencoder:hinton2006")
    images = load_images(dataclasses.replace(config.data, path="synthetic:200"))
    method = run.build_method(config, run.facts_of(config, images, total_steps=1000))
    assert [tuple(rbm.weight.shape) for rbm in method.machines] == [
        (1000, 784),
        (500, 1000),
        (250, 500),
        (30, 250),
    ]
    assert [rbm.linear for rbm in method.machines] == [False, False, False, True]
    assert list(method.plan()) == [*((f"rbm{i}", 100) for i in range(4)), ("unrolled", 600)]
    assert {name: method.optimizer_of(name).lr for name in method.networks()} == {
        "rbm0": 0.1,
        "rbm1": 0.1,
        "rbm2": 0.1,
        "rbm3": 0.001,
        "unrolled": 0.001,
    }


def test_the_unrolled_network_is_what_goes_up_and_down_the_machines():
    method, batch = contract.build(hinton())
    method.unroll()
    pixels = batch.images.flatten(1).float() / 255
    h = pixels
    for rbm in method.machines:
        h = torch.nn.functional.linear(h, rbm.weight, rbm.hidden_bias)
        h = h if rbm.linear else h.sigmoid()
    code = method.encoder()(method.view(batch.images))
    torch.testing.assert_close(code, h, atol=1e-4, rtol=1e-4)
    for rbm in reversed(method.machines):
        h = torch.nn.functional.linear(h, rbm.weight.T, rbm.visible_bias).sigmoid()
    given, decoded = method._rebuild(batch.images, None, torch.Generator())
    torch.testing.assert_close(given.flatten(1), pixels, atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded.sigmoid().flatten(1), h, atol=1e-4, rtol=1e-4)


def test_each_machine_sees_what_the_ones_below_expect_and_only_it_moves(monkeypatch, tmp_path):
    seen = []
    original = module.contrastive_divergence
    monkeypatch.setattr(
        module, "contrastive_divergence", lambda rbm, v, g: seen.append((rbm, v)) or original(rbm, v, g)
    )
    method, batch = contract.build(hinton())
    method.total_steps = 30
    for stage in range(3):
        method.batches_seen = 3 * stage + 1
        method.zero_grad()
        method.loss(batch, method.generator())["loss"].backward()
        moved = {name.split(".")[1] for name, p in method.named_parameters() if p.grad is not None}
        assert moved == {str(stage)}
    v = batch.images.flatten(1).float() / 255
    for rbm, below in seen:
        torch.testing.assert_close(below, v, atol=1e-5, rtol=1e-4)
        v = rbm.up(v)


def test_pretraining_is_resumed_bit_for_bit_and_ends_beside_the_principal_components(monkeypatch, tmp_path):
    config = hinton()
    result = run.train(config, out=tmp_path / "run", progress=False)
    contract.check_streams(config)
    contract.check_resume(config, tmp_path / "run", tmp_path / "again", monkeypatch)
    images, held_out = run.open_data(config)
    x, test = (
        part.batch(torch.arange(len(part))).images.flatten(1).double() / 255 for part in (images, held_out)
    )
    assert len(images) == 4 * config.batch_size  # one epoch, which the first machine saw
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:5]
    left = (test - x.mean(0)) - (test - x.mean(0)) @ axes.T @ axes
    assert result.metrics["validation_pca_squared_error"] == pytest.approx(
        float(left.square().sum(1).mean()), rel=1e-3
    )
    folder = export_run(tmp_path / "run", "autoencoder-mlp.synthetic", tmp_path / "zoo", license="CC0-1.0")
    method = run.load_run(tmp_path / "run")[1]
    shown = held_out.batch(torch.arange(8)).images
    rows = load_encoder(folder).encode(list(shown.movedim(1, 3).squeeze(3).numpy()), normalize=False)
    with torch.inference_mode():
        expected = method.encoder()(method.view(shown))
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(rows), expected)
    assert rows.shape == (8, 5) and cosine.min() > 0.999


def test_what_pretraining_needs():
    for fields, args, message in (
        ({}, {"activation": "relu"}, "activation sigmoid"),
        ({}, {"norm": "batch"}, "norm none"),
        ({"layer_share": 0.4}, {}, "leaves some of the run to 3 layers"),
        ({"pretraining": "dbn"}, {}, "none or rbm, found 'dbn'"),
    ):
        config = hinton(**fields)
        config = dataclasses.replace(config, backbone_args={**config.backbone_args, **args})
        with pytest.raises(ConfigError, match=message):
            contract.build(config)
