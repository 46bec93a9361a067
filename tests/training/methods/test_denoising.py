"""Noise at its rate, loss by a loop, optima in closed form, a clean target, and stages layer by layer."""

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.augment import Compose, RandomHorizontalFlip
from embedkit.training.config import Facts, with_overrides
from embedkit.training.data import DataConfig, load_images
from embedkit.training.methods.autoencoder import reconstruction_loss
from embedkit.training.methods.denoising import Config, Denoising, corrupt, denoising_loss
from embedkit.training.models.backbones import Backbone, create_backbone

MEAN, STD = 0.3, 0.35
KINDS = ("masking", "salt_and_pepper", "gaussian")


def facts(side=28, total_steps=100):
    return Facts(
        image_shape=(1, side, side), mean=(MEAN,), std=(STD,), batch_size=16, steps_per_epoch=4, total_steps=total_steps
    )  # fmt: skip


def build(name="r10", args=None, total_steps=100, **config):
    torch.manual_seed(0)
    backbone = create_backbone(name, in_chans=1, image_size=28, **(args or {}))
    return Denoising(backbone, Config(**config), facts(total_steps=total_steps))


def perceptron(**config):
    return build("mlp", {"hidden": (20, 15, 10), "norm": "none"}, stacked=True, **config)


def batch(n=16):
    return load_images(DataConfig(path="sklearn:digits", image_size=28)).batch(torch.arange(n))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("amount", [0.1, 0.4])
@pytest.mark.parametrize("noise", ["masking", "salt_and_pepper"])
def test_places_are_destroyed_at_their_rate_in_all_channels(noise, amount):
    x = 0.2 + 0.6 * torch.rand(20, 3, 40, 40, generator=seeded(1))
    found, destroyed = corrupt(x, noise, amount, seeded())
    count, n = int(destroyed.sum()), destroyed.numel()
    assert abs(count - n * amount) < 4 * math.sqrt(n * amount * (1 - amount))  # four standard deviations
    changed = found != x
    assert torch.equal(changed, destroyed.expand_as(x))
    values = found[destroyed.expand_as(x)]
    if noise == "masking":
        assert not values.any()
    else:
        white = found[:, :1][destroyed]
        assert set(white.unique().tolist()) == {0.0, 1.0} and abs(float(white.mean()) - 0.5) < 0.05
        assert torch.equal(found[:, 1:2][destroyed], white)
    again = corrupt(x, noise, amount, seeded(2))[1]
    assert not torch.equal(again, destroyed)  # each draw its own
    assert torch.equal(corrupt(x, noise, 0.0, seeded())[0], x)


def test_gaussian_noise_has_its_deviation_and_destroys_all():
    x = torch.rand(20, 1, 40, 40, generator=seeded(1))
    found, destroyed = corrupt(x, "gaussian", 0.3, seeded())
    assert bool(destroyed.all()) and float((found - x).std()) == pytest.approx(0.3, rel=0.03)
    with pytest.raises(ConfigError, match="expected masking, salt_and_pepper or gaussian, found 'blur'"):
        corrupt(x, "blur", 0.3, seeded())


def test_the_loss_by_a_loop_and_by_hand():
    y = torch.randn(3, 2, 2, 4, generator=seeded(), dtype=torch.float64)
    x = torch.rand(3, 2, 2, 4, generator=seeded(1), dtype=torch.float64)
    destroyed = torch.rand(3, 1, 2, 4, generator=seeded(2)) < 0.5
    entropy = error = 0.0
    where = destroyed.expand_as(x).flatten().tolist()
    for decoded, p, hit in zip(y.flatten().tolist(), x.flatten().tolist(), where, strict=True):
        q, weight = 1 / (1 + math.exp(-decoded)), 2.0 if hit else 0.5
        entropy -= weight * (p * math.log(q) + (1 - p) * math.log(1 - q))
        error += weight * (p - decoded) ** 2
    assert float(denoising_loss(y, x, destroyed, 2.0, 0.5)) == pytest.approx(entropy / 3, rel=1e-12)
    found = denoising_loss(y, x, destroyed, 2.0, 0.5, "squared_error")
    assert float(found) == pytest.approx(error / 3, rel=1e-12)
    # a destroyed white pixel and a kept black one, of which the logits ln 3 say 3/4
    y = torch.full((1, 1, 1, 2), math.log(3), dtype=torch.float64)
    x, destroyed = torch.tensor([1.0, 0.0]).double().reshape(1, 1, 1, 2), torch.tensor([True, False])
    expected = 3 * math.log(4 / 3) + 0.1 * math.log(4)
    assert float(denoising_loss(y, x, destroyed.reshape(1, 1, 1, 2), 3.0, 0.1)) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="cross_entropy or squared_error, found 'bce'"):
        denoising_loss(y, x, destroyed.reshape(1, 1, 1, 2), kind="bce")


def test_without_noise_or_emphasis_it_is_the_autoencoders_loss_bit_for_bit():
    y = torch.randn(4, 1, 6, 6, generator=seeded())
    x = torch.rand(4, 1, 6, 6, generator=seeded(1))
    for kind in ("cross_entropy", "squared_error"):
        for destroyed in (torch.zeros(4, 1, 6, 6, dtype=torch.bool), torch.rand(4, 1, 6, 6) < 0.5):
            assert torch.equal(denoising_loss(y, x, destroyed, kind=kind), reconstruction_loss(y, x, kind))
    with torch.autocast("cpu", torch.bfloat16):
        loss = denoising_loss(y.bfloat16(), x, destroyed)
    torch.testing.assert_close(loss, denoising_loss(y.bfloat16().float(), x, destroyed))


def linear_fit(x, destroyed_x, destroyed):
    """The linear map of least loss, by our loss."""
    n, d = x.shape[0], x.shape[-1]
    weight = torch.zeros(d, d, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        decoded = (destroyed_x.reshape(n, d) @ weight.T).reshape(x.shape)
        loss = denoising_loss(decoded, x, destroyed, kind="squared_error")
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def test_a_linear_map_finds_its_closed_form_under_masking():
    """W = E[x x~^T] E[x~ x~^T]^-1, of marginalized denoising autoencoders (Chen et al., ICML 2012)."""
    d, v = 5, 0.3
    mixing = torch.randn(d, d, generator=seeded(), dtype=torch.float64)
    x = (torch.randn(60_000, d, generator=seeded(1), dtype=torch.float64) @ mixing.T).reshape(-1, 1, 1, d)
    moments = x.flatten(1).T @ x.flatten(1) / len(x)
    keep = 1 - v
    noisy = moments * keep**2 + torch.diag(moments.diag()) * (keep - keep**2)
    expected = (moments * keep) @ torch.linalg.inv(noisy)
    found = linear_fit(x, *corrupt(x, "masking", v, seeded(2)))
    assert (found - expected).abs().max() < 2e-2 and (found - torch.eye(d)).abs().max() > 0.2


def test_the_best_denoiser_of_a_gaussian_shrinks():
    s, sigma = 0.7, 0.4
    x = s * torch.randn(60_000, 1, 1, 1, generator=seeded(), dtype=torch.float64)
    slope = linear_fit(x, *corrupt(x, "gaussian", sigma, seeded(1)))
    assert float(slope) == pytest.approx(s**2 / (s**2 + sigma**2), abs=0.01)


class Copy(nn.Module):
    """Normalized pixels, flat, back to what they were: a network that gives back what it sees."""

    def forward(self, code):
        return code.reshape(-1, 1, 28, 28) * STD + MEAN


@pytest.mark.parametrize("noise", KINDS)
def test_a_network_that_copies_has_exactly_the_noise_as_its_loss(noise):
    flat = Backbone(
        nn.Flatten(), architecture="flat", model_args={}, dim=784, in_chans=1, image_size=(28, 28)
    )
    method = Denoising(flat, Config(noise=noise, amount=0.3, reconstruction="squared_error"), facts())
    method.decoder, images = Copy(), batch()
    clean = images.images.float() / 255
    noisy, _ = corrupt(clean, noise, 0.3, method.generator("corruption"))
    expected = (noisy - clean).square().sum() / 16
    torch.testing.assert_close(method.loss(images, method.generator())["loss"], expected)
    assert (
        float(expected) > 1
    )  # the target is the clean image: against the noisy one this network has no loss
    removed = method.pretext_metric(images, seeded())["error_removed"]
    assert float(removed) == pytest.approx(0.0, abs=1e-5)
    method.decoder.forward = lambda code: clean
    assert float(method.pretext_metric(images, seeded())["error_removed"]) == pytest.approx(1.0)


def test_the_clean_image_is_the_view_and_the_encoder_sees_it_destroyed():
    flip = Compose(steps=(RandomHorizontalFlip(p=1.0),))
    method, images = build(augment=flip, amount=0.5), batch()
    seen = []
    method.backbone.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    loss = method.loss(images, method.generator())["loss"]
    assert float(loss.detach()) == pytest.approx(784 * math.log(2), rel=1e-6)
    flipped = images.images.flip(3).float() / 255
    noisy, destroyed = corrupt(flipped, "masking", 0.5, method.generator("corruption"))
    torch.testing.assert_close(seen[0], (noisy - MEAN) / STD, atol=1e-5, rtol=1e-5)
    # black, not the mean: what is masked is not 0 to the network
    torch.testing.assert_close(seen[0][destroyed], torch.tensor(-MEAN / STD).expand(int(destroyed.sum())))
    method.batches_seen += 1
    method.loss(images, method.generator())
    assert not torch.equal(seen[0], seen[1])  # other noise at the next step


def stage_names(method):
    return [name for name, length in method.plan() if length]


def test_plans():
    assert stage_names(build()) == ["whole", "calibrate"] and build().plan()[-1][1] == 2
    assert stage_names(build(args={"norm": "layer"})) == ["whole"]
    assert stage_names(perceptron()) == ["layer0", "layer1", "layer2", "whole"]
    for config, args, message in (
        ({"stacked": True}, {}, "backbone mlp, and masking or gaussian"),
        ({"calibration": 1.0}, {}, "shares that leave some of the run"),
        ({"amount": -0.1}, {}, "amount of 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(args=args, **config)
    with pytest.raises(ConfigError, match="masking or gaussian noise"):
        perceptron(noise="salt_and_pepper")


def test_a_layer_rebuilds_the_clean_output_of_the_layer_before():
    method, images = perceptron(amount=0.3), batch()
    method.batches_seen = 21  # the second layer
    assert method.stage.name == "layer1"
    loss = method.loss(images, method.generator())["loss"]
    hidden = method.layers[0](((images.images.float() / 255 - MEAN) / STD).flatten(1)).detach()
    noisy, destroyed = corrupt(hidden[:, None, None], "masking", 0.3, method.generator("corruption"))
    rebuilt = method.decoder[1](method.layers[1](noisy.flatten(1)))
    torch.testing.assert_close(loss, (rebuilt - hidden).square().sum() / 16)
    loss.backward()
    moved = {name for name, p in method.named_parameters() if p.grad is not None}
    assert moved == {
        "backbone.net.layers.1.0.weight", "backbone.net.layers.1.0.bias", "decoder.1.weight", "decoder.1.bias"
    }  # fmt: skip
    method.batches_seen = 61
    method.zero_grad()
    method.loss(images, method.generator())["loss"].backward()  # the whole: every layer and every decoder
    assert method.stage.name == "whole" and all(p.grad is not None for p in method.parameters())


def test_the_stacked_run_trains_one_layer_after_the_other(tmp_path, monkeypatch):
    moved: dict[str, set[str]] = {}
    whole = Denoising.training_step

    def watched(self, batch, batch_idx):
        before = {name: p.detach().clone() for name, p in self.named_parameters()}
        whole(self, batch, batch_idx)
        changed = {name for name, p in self.named_parameters() if not torch.equal(p, before[name])}
        moved.setdefault(self.stage.name, set()).update(name.rpartition(".")[0] for name in changed)

    monkeypatch.setattr(Denoising, "training_step", watched)
    settings = [
        "threads=1",
        "batch_size=16",
        "data.image_size=16",
        "steps=20",
        "backbone_args.hidden=[20,15,10]",
    ]
    config = with_overrides(recipes.recipe("denoising:stacked"), settings)
    result = run.train(config, data="synthetic:100", out=tmp_path / "run", progress=False)
    assert result.finished
    layers = [f"backbone.net.layers.{i}.0" for i in range(3)]
    expected = {f"layer{i}": {layers[i], f"decoder.{i}"} for i in range(3)}
    expected["whole"] = {*layers, *(f"decoder.{i}" for i in range(3))}
    assert moved == expected


def test_batch_norm_ends_with_the_statistics_of_clean_images():
    method, images = build(amount=0.5, total_steps=100), batch(64)
    norm = next(m for m in method.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    for _ in range(40):
        method.batches_seen = 10
        with torch.no_grad():
            method.loss(images, method.generator())
    of_noise = norm.running_mean.clone()
    method.batches_seen = 99
    assert method.stage.name == "calibrate"
    for _ in range(60):
        loss = method.loss(images, method.generator())["loss"]
    assert not loss.requires_grad
    clean = method.backbone.net.conv1(method.view(images.images)).mean((0, 2, 3)).detach()
    torch.testing.assert_close(norm.running_mean, clean, atol=2e-2, rtol=0)
    assert (of_noise - clean).abs().max() > 0.1


def test_no_weight_moves_while_statistics_are_taken(tmp_path, monkeypatch):
    last = {}
    whole = Denoising.training_step

    def watched(self, batch, batch_idx):
        before = {name: p.detach().clone() for name, p in self.named_parameters()}
        whole(self, batch, batch_idx)
        same = all(torch.equal(p, before[name]) for name, p in self.named_parameters())
        last.setdefault(self.stage.name, []).append(same)

    monkeypatch.setattr(Denoising, "training_step", watched)
    settings = [
        "threads=1", "batch_size=16", "data.image_size=16", "steps=20", "method.calibration=0.1",
        "method.decoder_width=4", "backbone_args.width=0.5", "optimizer.warmup_steps=0",
    ]  # fmt: skip
    config = with_overrides(recipes.recipe("denoising"), settings)
    result = run.train(config, data="synthetic:300", out=tmp_path / "run", progress=False)
    assert last == {"whole": [False] * 18, "calibrate": [True, True]}
    assert {"loss", "validation_error_removed"} <= result.metrics.keys()
