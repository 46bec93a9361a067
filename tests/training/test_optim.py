"""Schedules against their closed forms, LARS against its four lines by hand."""

import math

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from embedkit.errors import ConfigError
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import LARS, Optimizer


def test_cosine_has_a_linear_rise_and_ends_at_zero():
    optimizer = Optimizer(lr=2.0, schedule="cosine", warmup_steps=10)
    assert [optimizer.lr_at(step, 110) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert optimizer.lr_at(60, 110) == pytest.approx(1.0)  # half of the fall
    assert optimizer.lr_at(35, 110) == pytest.approx(1 + math.cos(math.pi / 4))
    assert optimizer.lr_at(110, 110) == pytest.approx(0.0)


def test_one_cycle_starts_at_a_25th_and_ends_near_zero():
    optimizer = Optimizer(lr=1.0, schedule="one_cycle", warmup_steps=20)
    rates = [optimizer.lr_at(step, 100) for step in range(100)]
    assert max(rates) == rates[19] == pytest.approx(1.0)
    assert rates[9] == pytest.approx((1 + 1 / 25) / 2)  # half of the rise
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert optimizer.lr_at(100, 100) == pytest.approx(1 / 25 / 1e4)


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "constant"])
def test_the_rise_does_not_depend_on_the_number_of_steps(schedule):
    optimizer = Optimizer(schedule=schedule, warmup_steps=50)
    for step in range(50):
        assert optimizer.lr_at(step, None) == optimizer.lr_at(step, 150) == optimizer.lr_at(step, 10_000)


def test_the_rise_takes_a_third_of_a_short_run():
    assert Optimizer(lr=1.0, schedule="cosine", warmup_steps=1000).lr_at(3, 12) == pytest.approx(1.0)


def test_set_lr_respects_the_scale_of_a_group():
    first, second = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2, 2))
    groups = [{"params": [first]}, {"params": [second], "lr_scale": 10.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    Optimizer(lr=0.5, schedule="constant", warmup_steps=0).set_lr(optimizer, 0, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 5.0]


def test_vectors_take_no_weight_decay_and_shared_weights_stand_once():
    layer, norm = torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    groups = Optimizer(weight_decay=0.1).create(layer, norm, layer, frozen).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]


def test_lars_by_hand():
    # w = (3, 4), g = (0.6, 0.8), wd 0.1: g' = (0.9, 1.2), |w| = 5, |g'| = 1.5, trust = 0.001 * 5 / 1.5 = 1/300
    # v = 0.3 * g' / 300 = (0.0009, 0.0012); second step from the same g: g'' = g + 0.1 w1
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    bias = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = LARS([weight, bias], lr=0.3, momentum=0.9, weight_decay=0.1)
    gradient = torch.tensor([0.6, 0.8], dtype=torch.float64)
    weight.grad, bias.grad = gradient[None].clone(), gradient.clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach()[0], torch.tensor([2.9991, 3.9988], dtype=torch.float64))
    torch.testing.assert_close(bias.detach(), torch.tensor([2.73, 3.64], dtype=torch.float64))  # not scaled
    optimizer.step()
    # |w1| = 4.9985, g'' = 1.49985 * (0.6, 0.8); v = 0.9 * 0.0015 + 0.3 * 0.001 * 4.9985 along (0.6, 0.8)
    length = 4.9985 - (0.9 * 0.0015 + 0.3 * 0.001 * 4.9985)
    expected = torch.tensor([0.6, 0.8], dtype=torch.float64) * length
    torch.testing.assert_close(weight.detach()[0], expected)


def test_lars_takes_a_plain_step_from_zero_weights():
    weight = torch.nn.Parameter(torch.zeros(1, 2))
    weight.grad = torch.tensor([[1.0, 2.0]])
    LARS([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[-0.1, -0.2]]))


@pytest.mark.parametrize("field", ["name", "schedule"])
def test_unknown_names_are_refused(field):
    optimizer = Optimizer(**{field: "adagrad"})
    with pytest.raises(ConfigError, match=f"optimizer.{field}: expected"):
        optimizer.create(torch.nn.Linear(1, 1)) if field == "name" else optimizer.lr_at(0, 1)


def test_adam_and_rmsprop_are_torchs():
    module = torch.nn.Linear(2, 2)
    adam = Optimizer(name="adam", betas=(0.5, 0.999), weight_decay=0.1).create(module)
    assert type(adam) is torch.optim.Adam and adam.param_groups[0]["betas"] == (0.5, 0.999)
    assert [group["weight_decay"] for group in adam.param_groups] == [0.1, 0.0]
    rmsprop = Optimizer(name="rmsprop", momentum=0.0).create(module)
    assert type(rmsprop) is torch.optim.RMSprop


def test_steps_and_exponential_end():
    steps = Optimizer(lr=1.0, schedule="step", milestones=(0.5, 0.75), gamma=0.1, warmup_steps=0)
    assert [round(steps.lr_at(step, 100), 6) for step in (0, 49, 50, 74, 75, 99)] == [
        1,
        1,
        0.1,
        0.1,
        0.01,
        0.01,
    ]
    falling = Optimizer(lr=2.0, schedule="exponential", end=0.01, warmup_steps=0)
    assert falling.lr_at(50, 100) == pytest.approx(0.2) and falling.lr_at(100, 100) == pytest.approx(0.02)
    assert Optimizer(lr=1.0, schedule="cosine", end=0.25, warmup_steps=0).lr_at(100, 100) == pytest.approx(
        0.25
    )


def test_learning_rates_fall_with_depth_by_hand():
    backbone = create_backbone("r10", in_chans=1, image_size=16)
    module = torch.nn.ModuleDict({"backbone": backbone, "classifier": torch.nn.Linear(256, 2)})
    settings = Optimizer(lr=1.0, layer_decay=0.5, schedule="constant", warmup_steps=0)
    optimizer = settings.create(module)
    settings.set_lr(optimizer, 0, 10)
    names = {parameter: name for name, parameter in module.named_parameters()}
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(names.values())
    expected = {
        "classifier": 1,
        "layer4": 1 / 2,
        "layer3": 1 / 4,
        "layer2": 1 / 8,
        "layer1": 1 / 16,
        "conv1": 1 / 32,
    }
    for part, rate in {**expected, "net.bn1": 1 / 32}.items():
        assert {rates[name] for name in rates if part in name.replace("backbone.net.layer", "layer")} >= {
            rate
        }
    assert rates["backbone.net.layer3.0.bn1.weight"] == 1 / 4 and rates["backbone.net.bn1.bias"] == 1 / 32
    assert optimizer.param_groups[0]["lr"] == 1.0  # what metrics.csv shows
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays["backbone.net.layer3.0.bn1.weight"] == 0.0 and decays["backbone.net.conv1.weight"] == 0.05


@pytest.mark.parametrize(
    "name", ["resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "convnext_atto"]
)
def test_the_factors_are_timms(name):
    from timm.optim import param_groups_layer_decay

    network = timm.create_model(name, num_classes=3)
    names = {parameter: key for key, parameter in network.named_parameters()}
    groups = param_groups_layer_decay(network, layer_decay=0.75)
    theirs = {names[p]: group["lr_scale"] for group in groups for p in group["params"]}
    backbone = create_backbone(name, in_chans=3, image_size=224, global_pool="avg")
    of = {parameter: key for key, parameter in backbone.net.named_parameters()}
    ours = {of[parameter]: scale for parameter, scale in backbone.lr_scales(0.75).items()}
    shared = set(ours) & set(theirs)
    assert len(shared) >= len(theirs) - 4  # all but the classifier
    assert {key: ours[key] for key in shared} == pytest.approx({key: theirs[key] for key in shared})


@pytest.mark.parametrize("name", ["mlp", "gru", "alexnet_bn"])
def test_plain_networks_have_depth_too(name):
    scales = create_backbone(name, in_chans=1, image_size=28).lr_scales(0.5)
    layers = {"mlp": 2, "gru": 1, "alexnet_bn": 5}[name]
    assert sorted(set(scales.values())) == [0.5**k for k in range(layers, 0, -1)]
