"""The loss by a loop, by hand and by lightly's, where gradient stops, the layout of heads, collapse without it."""

import math

import pytest

torch = pytest.importorskip("torch")

from layers import layers_of
from torch import nn

from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.config import Facts, with_overrides
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods import simsiam
from embedkit.training.methods.simsiam import (
    Config,
    SimSiam,
    negative_cosine,
    relative_std,
    simsiam_loss,
)
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer


def tensors(n=5, dim=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, n, dim, generator=generator, dtype=dtype)


def build(**config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(1, 16, 16), mean=(0.3,), std=(0.3,), batch_size=16, steps_per_epoch=4, total_steps=40
    )
    settings = {"projection_dim": 128, "prediction_dim": 32, **config}
    return SimSiam(create_backbone("r10", in_chans=1, image_size=16), Config(**settings), facts)


def digits(n=16):
    return load_images(DataConfig(path="sklearn:digits", image_size=16)).batch(torch.arange(n))


def test_equations_1_to_4_by_a_loop():
    p1, p2, z1, z2 = tensors()
    total = 0.0
    for p, z in ((p1, z2), (p2, z1)):
        for a, b in zip(p.tolist(), z.tolist(), strict=True):
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            total -= dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
    assert float(simsiam_loss(p1, p2, z1, z2)) == pytest.approx(total / 2 / 5, rel=1e-6)


def test_by_hand_and_its_bounds():
    p = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[5.0, 0.0], [3.0, 4.0]])
    assert float(negative_cosine(p, z)) == pytest.approx(-(1 + 0.8) / 2)
    assert float(simsiam_loss(p, z, z, p)) == pytest.approx(-1.0)  # every prediction right, at any length
    assert float(simsiam_loss(p, z, -z, -p)) == pytest.approx(1.0)


def test_the_views_may_be_exchanged_and_the_order_of_images_too():
    p1, p2, z1, z2 = tensors()
    loss = float(simsiam_loss(p1, p2, z1, z2))
    assert float(simsiam_loss(p2, p1, z2, z1)) == pytest.approx(loss)
    assert float(simsiam_loss(*(t.flip(0) for t in (p1, p2, z1, z2)))) == pytest.approx(loss)
    assert float(simsiam_loss(p1, p2, z2, z1)) != pytest.approx(loss)  # each predicts the other view


def test_the_target_takes_no_gradient():
    p1, p2, z1, z2 = (t.clone().requires_grad_() for t in tensors())
    simsiam_loss(p1, p2, z1, z2).backward()
    assert z1.grad is None and z2.grad is None
    assert (p1.grad.norm(dim=1) > 0).all() and (p2.grad.norm(dim=1) > 0).all()


def test_equals_lightly():
    loss = pytest.importorskip("lightly.loss")
    ours = [t.clone().requires_grad_() for t in tensors(dtype=torch.float32)]
    theirs = [t.clone().requires_grad_() for t in tensors(dtype=torch.float32)]
    criterion = loss.NegativeCosineSimilarity()
    p1, p2, z1, z2 = theirs
    expected = 0.5 * (criterion(p1, z2.detach()) + criterion(p2, z1.detach()))
    found = simsiam_loss(*ours)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_bfloat16_is_widened():
    p, _, z, _ = tensors(dtype=torch.float32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = negative_cosine(p, z)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, negative_cosine(p.float(), z.float()))


def test_backbone_and_projector_learn_through_predictions_alone():
    method, images = build(), digits()
    parameters = [*method.backbone.parameters(), *method.projector.parameters()]

    def gradients(loss):
        return torch.autograd.grad(loss, [*parameters, *method.predictor.parameters()], retain_graph=True)

    p1, p2, z1, z2 = method._predict(images.images, method.generator())
    found = gradients(simsiam_loss(p1, p2, z1, z2))
    constants = z1.detach().clone(), z2.detach().clone()
    for one, other in zip(found, gradients(simsiam_loss(p1, p2, *constants)), strict=True):
        assert torch.equal(one, other)
    assert all(gradient.abs().sum() > 0 for gradient in found[:1] + found[-4:])
    # without the stop the same graph gives another gradient: the targets do depend on the backbone
    open_ended = (
        -(nn.functional.cosine_similarity(p1, z2) + nn.functional.cosine_similarity(p2, z1)).mean() / 2
    )
    assert not torch.allclose(gradients(open_ended)[0], found[0])


def test_heads_have_the_layout_of_the_authors_code():
    method = build(projector_layers=3, projection_dim=2048, prediction_dim=512)
    kinds = [type(layer).__name__ for layer in method.projector]
    assert kinds == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
    ]
    assert [type(layer).__name__ for layer in method.predictor] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert not method.projector[7].affine and method.projector[1].affine and method.predictor[1].affine
    assert all(method.projector[i].bias is None for i in (0, 3, 6)) and method.predictor[0].bias is None
    # Names and shapes as in their checkpoints, at our backbone's width; `fc.6.bias` is the one that they freeze.
    d, norm = 256, ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    shapes = {"encoder.fc.0.weight": (d, d), "encoder.fc.3.weight": (d, d), "encoder.fc.6.weight": (2048, d)}
    shapes |= {f"encoder.fc.{i}.{n}": (d,) for i in (1, 4) for n in norm[:4]}
    shapes |= {f"encoder.fc.7.{n}": (2048,) for n in norm[2:4]} | {"encoder.fc.6.bias": (2048,)}
    shapes |= {
        "predictor.0.weight": (512, 2048),
        "predictor.3.weight": (2048, 512),
        "predictor.3.bias": (2048,),
    }
    shapes |= {f"predictor.1.{n}": (512,) for n in norm[:4]}
    shapes |= {
        f"{head}.num_batches_tracked": ()
        for head in ("encoder.fc.1", "encoder.fc.4", "encoder.fc.7", "predictor.1")
    }
    checkpoint = {f"module.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    for head, prefix in ((method.projector, "module.encoder.fc."), (method.predictor, "module.predictor.")):
        state = {k.removeprefix(prefix): v for k, v in checkpoint.items() if k.startswith(prefix)}
        state.pop("6.bias", None)
        head.load_state_dict(state, strict=True)
    assert len(build(projector_layers=2).projector) == 5


def test_relative_std_is_one_for_even_directions_and_zero_in_collapse():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 64, generator=generator)
    assert float(relative_std(z)) == pytest.approx(1.0, abs=0.02)
    assert float(relative_std(z + 100)) < 0.02
    same = torch.randn(1, 64, generator=generator) * torch.rand(50, 1, generator=generator)
    assert float(relative_std(same)) == pytest.approx(0.0, abs=1e-6)  # lengths do not count
    # by hand: two opposite axes, each dimension's deviation is 1 or 0, and sqrt(2) is the unit
    assert float(relative_std(torch.tensor([[3.0, 0.0], [-1.0, 0.0]]))) == pytest.approx(2**0.5 / 2)


@pytest.mark.parametrize("missing", ["nothing", "stop-gradient", "predictor"])
def test_it_is_stop_gradient_and_predictor_that_prevent_collapse(missing, monkeypatch):
    if missing == "stop-gradient":
        monkeypatch.setattr(
            simsiam, "negative_cosine", lambda p, z: -nn.functional.cosine_similarity(p, z).mean()
        )
    torch.manual_seed(0)
    d = 32
    # no BatchNorm at the end, which would turn collapse onto a point into collapse onto a line
    hidden = [
        layer
        for fan_in in (20, 64)
        for layer in (nn.Linear(fan_in, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU())
    ]
    encoder = nn.Sequential(*hidden, nn.Linear(64, d))
    predictor = nn.Sequential(nn.Linear(d, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, d))
    predictor = nn.Identity() if missing == "predictor" else predictor
    optimizer = torch.optim.SGD([*encoder.parameters(), *predictor.parameters()], lr=0.3, momentum=0.9)
    x = torch.randn(256, 20)
    for _ in range(200):
        augment = torch.cat([x + 0.3 * torch.randn_like(x) for _ in range(2)])
        z = encoder(augment)
        loss = simsiam.simsiam_loss(*predictor(z).chunk(2), *z.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spread, loss = float(relative_std(z)), float(loss.detach())
    if missing == "nothing":
        assert spread > 0.8 and loss > -0.97
    else:
        assert spread < 0.15 and loss < -0.99


def test_overfits_one_batch_from_a_loss_near_zero():
    method, images = build(), digits()
    optimizer = Optimizer(lr=2e-3).create(method)
    losses = []
    for step in range(40):
        method.batches_seen = step % 2
        outputs = method.loss(images, method.generator())
        losses.append(float(outputs["loss"].detach()))
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
    # random predictions have no direction in common with their targets: 0 within 3 / sqrt(2N d)
    assert abs(losses[0]) < 0.15 and losses[-1] < -0.6
    assert float(outputs["z_std"]) > 0.5
    with torch.no_grad():  # in train mode: BatchNorm's running statistics need more steps than these
        metric = method.pretext_metric(images, method.generator())
    assert float(metric["prediction_is_nearest"]) > 0.25  # 1/16 by chance


def test_no_label_is_used_and_the_heads_are_not_exported():
    method, images = build(), digits()
    hidden = Batch(images.images, torch.full_like(images.labels, -1), images.indices)
    losses = [method.loss(batch, method.generator())["loss"] for batch in (images, hidden)]
    assert torch.equal(*losses)
    assert method.encoder() is method.backbone


SMALL = ("threads=1", "batch_size=16", "steps=8", "data.image_size=16", "log_every=4")


@pytest.mark.parametrize("constant", ["true", "false"])
def test_the_predictor_keeps_its_learning_rate(constant, tmp_path):
    heads = ("method.projection_dim=32", "method.prediction_dim=16")
    config = with_overrides(
        recipes.recipe("simsiam"), [*SMALL, *heads, f"method.constant_predictor_lr={constant}"]
    )
    result = run.train(config, data="sklearn:digits", out=tmp_path / "run", progress=False)
    checkpoint = torch.load(result.run / run.CHECKPOINT, weights_only=True)
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    peak = config.optimizer.lr
    last = config.optimizer.lr_at(7, 8)
    assert last < 0.1 * peak
    expected = [last, last, peak, peak] if constant == "true" else [last] * 4
    assert [group["lr"] for group in groups] == pytest.approx(expected)
    assert sum(len(group["params"]) for group in groups) == len(
        list(run.load_run(result.run)[1].parameters())
    )


def test_the_layers_of_projector_and_predictor():
    method = build(projector_layers=3, projection_dim=2048, prediction_dim=512)
    dim = method.backbone.dim
    hidden = [("linear", dim, dim, False), ("norm", dim, "weight", "bias"), ("ReLU",)]
    assert layers_of(method.projector) == [*hidden, *hidden, ("linear", dim, 2048, False), ("norm", 2048)]
    assert layers_of(method.predictor) == [
        ("linear", 2048, 512, False),
        ("norm", 512, "weight", "bias"),
        ("ReLU",),
        ("linear", 512, 2048, True),
    ]
    with pytest.raises(ConfigError, match="projection_dim.*of 1 or more, found 2, 0 and"):
        build(projection_dim=0)
