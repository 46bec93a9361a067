"""What the house does for a method: budgets, optimizers by network, clipping and accumulation, stages, contracts."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import contract

from embedkit.errors import ConfigError
from embedkit.model.preprocess import Preprocess
from embedkit.training import recipes, run
from embedkit.training.config import from_json, to_json, with_overrides
from embedkit.training.data import DataConfig
from embedkit.training.evaluation.features import open_model
from embedkit.training.export.from_run import export_run
from embedkit.training.optim import Optimizer


def changed(name, **fields):
    return dataclasses.replace(contract.tiny(name), **fields)


def trained(folder, config):
    result = run.train(config, out=folder, progress=False)
    return result, run.load_run(folder)[1]


# --- budgets ------------------------------------------------------------------------------------------------


def test_a_budget_of_images_ends_a_run(tmp_path):
    result, method = trained(tmp_path / "run", changed("rotnet", max_images=100))
    assert result.finished and result.steps == 6 and result.cost["images"] == 96  # 100 // 16
    assert method.total_steps == 6
    with pytest.raises(ConfigError, match="max_images: 15 are less than one batch"):
        trained(tmp_path / "other", changed("rotnet", max_images=15))


def test_a_budget_of_operations_is_planned_from_the_first_step(tmp_path):
    one = trained(tmp_path / "one", changed("rotnet", steps=1))[0].cost["flops_per_step"]
    result, method = trained(tmp_path / "run", changed("rotnet", steps=100, max_flops=5.5 * one))
    assert result.finished and result.steps == method.total_steps == 5
    assert result.cost["training_flops"] == 5 * one
    few, _ = trained(tmp_path / "few", changed("rotnet", steps=3, max_flops=5.5 * one))
    assert few.steps == 3  # the smaller of two limits
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["facts"]["total_steps"] == 5


# --- optimizers ---------------------------------------------------------------------------------------------


def test_networks_have_the_optimizers_that_are_named_for_them(tmp_path):
    own = Optimizer(name="adam", lr=1e-4, betas=(0.5, 0.999), schedule="constant", warmup_steps=0)
    config = changed("bigan", optimizers={"discriminator": own}, steps=2)
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, discriminator_lr=1.0))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    _, method = trained(tmp_path / "run", config)
    first, second = method.configure_optimizers()
    assert type(first) is torch.optim.AdamW and type(second) is torch.optim.Adam
    assert second.param_groups[0]["betas"] == (0.5, 0.999)
    assert with_overrides(config, ["optimizers.discriminator.lr=0.5"]).optimizers["discriminator"].lr == 0.5
    with pytest.raises(ConfigError, match="there is no 'critic'"):
        with_overrides(config, ["optimizers.critic.lr=0.5"])


def test_backbone_args_reach_timm(tmp_path):
    config = with_overrides(
        changed("rotnet", steps=1), ["backbone_args.norm=group", "backbone_args.drop_path_rate=0.1"]
    )
    assert config.backbone_args == {"norm": "group", "drop_path_rate": 0.1}
    _, method = trained(tmp_path / "run", config)
    assert method.backbone.model_args["norm"] == "group"
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in method.modules())


def gradients(config, folder, monkeypatch):
    """The norm of each step's gradient as the optimizer sees it, and the weights at the end."""
    norms = []
    step = torch.optim.SGD.step

    def watched(self, closure=None):
        loss = closure() if closure is not None else None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))
        step(self)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", watched)
        _, method = trained(folder, config)
    return norms, method.state_dict()


def test_gradients_are_clipped_and_accumulated(tmp_path, monkeypatch):
    sgd = Optimizer(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant", warmup_steps=0)
    free, _ = gradients(changed("rotnet", optimizer=sgd, steps=4), tmp_path / "free", monkeypatch)
    limit = 0.5 * min(free)
    clipped, _ = gradients(
        changed("rotnet", optimizer=dataclasses.replace(sgd, clip_norm=limit), steps=4),
        tmp_path / "clip",
        monkeypatch,
    )
    assert clipped == pytest.approx([limit] * 4, rel=1e-3)
    two = dataclasses.replace(sgd, accumulate=2)
    config = changed("rotnet", optimizer=two, steps=4)
    joined, _ = gradients(config, tmp_path / "two", monkeypatch)
    assert len(joined) == 2
    with pytest.raises(ConfigError, match="bigan moves several networks"):
        trained(tmp_path / "bigan", changed("bigan", optimizer=two, steps=2))


def test_a_named_step_moves_its_network_by_its_own_loss_alone():
    method, _ = contract.build(contract.tiny("bigan"))
    names = list(method.networks())
    optimizers = [
        torch.optim.SGD([p for m in method.networks()[name] for p in m.parameters()], lr=1.0)
        for name in names
    ]
    method.optimizers = lambda: optimizers
    before = {name: value.clone() for name, value in method.named_parameters()}
    weight, bias = method.to_latent.weight, method.discriminator.logit.bias
    shared = weight.sum() * 2 + bias.sum() * 3
    method.step({"encoder_generator": shared, "discriminator": shared * 10})
    after = dict(method.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"to_latent.weight", "discriminator.logit.bias"}
    torch.testing.assert_close(after["to_latent.weight"], before["to_latent.weight"] - 2)
    torch.testing.assert_close(after["discriminator.logit.bias"], before["discriminator.logit.bias"] - 30)
    method.step({"discriminator": bias.sum()})
    assert all(p.grad is None for p in method.parameters())


# --- few labels ---------------------------------------------------------------------------------------------


def test_with_few_labels_nothing_is_nan_and_accuracy_is_of_the_labeled(tmp_path):
    config = contract.tiny("supervised")
    data = dataclasses.replace(config.data, path="synthetic:200", validation=0.2, labels_per_class=1)
    result, _ = trained(tmp_path / "run", dataclasses.replace(config, data=data, batch_size=4, steps=40))
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert "nan" not in rows  # batches of four images, of which one in twenty has a label
    assert 0 <= result.metrics["validation_accuracy"] <= 1


# --- what is given ------------------------------------------------------------------------------------------


def test_a_given_encoder_brings_its_contract(tmp_path):
    source = changed("rotnet", steps=1)
    data = dataclasses.replace(source.data, resize="squash", image_size=20, mean=(0.25,), std=(0.2,))
    trained(tmp_path / "first", dataclasses.replace(source, data=data))
    for given in (tmp_path / "first", export_run(tmp_path / "first", "rotnet-r10.toy", tmp_path / "zoo")):
        config = with_overrides(
            recipes.recipe("deepdpm:encoder"), [f"method.weights={given}", "batch_size=16", "steps=4"]
        )
        config = dataclasses.replace(config, precision="fp32", threads=1)
        folder = tmp_path / f"clusters-{given.name}"
        run.train(config, data="synthetic:64", out=folder, progress=False)
        found, method = run.load_run(folder)
        assert (method.facts.mean, method.facts.std) == ((0.25,), (0.2,))
        assert found.data.preprocess(method.facts.mean, method.facts.std) == Preprocess(
            color="gray", size=(20, 20), resize="squash", resize_size=20, mean=(0.25,), std=(0.2,)
        )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rotnet", ["method.stage=2"]),
        ("autoencoder", []),
        ("vae", ["method.embedding=mu"]),
        ("mixae", ["method.embedding=codes"]),
        ("sphereface", []),
    ],
)
def test_the_random_baseline_is_the_encoder_that_is_exported(name, settings, tmp_path):
    config = with_overrides(changed(name, steps=1), settings)
    _, method = trained(tmp_path / "run", config)
    expected = {key: tuple(value.shape) for key, value in method.encoder().state_dict().items()}
    model = open_model(tmp_path / "run")
    torch.manual_seed(7)
    fresh = model.create()
    assert {key: tuple(value.shape) for key, value in fresh.state_dict().items()} == expected
    own = method.encoder().state_dict()
    assert any(not torch.equal(value, own[key]) for key, value in fresh.state_dict().items())
    folder = export_run(tmp_path / "run", f"{name}-r10.toy", tmp_path / "zoo", license="CC0-1.0")
    entry = open_model(folder)
    with torch.inference_mode():
        made = entry.create().eval()(torch.zeros(2, *method.facts.image_shape))
    assert entry.recreated and made.shape == (2, model.dim) == (2, entry.dim)


def test_color_images_that_are_trained_gray_are_said_to_be(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(20):
        (tmp_path / "data" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / "ab"[number % 2] / f"{number}.png")
    config = changed("rotnet", steps=1)
    for color, said in (("gray", True), ("rgb", False)):
        data = dataclasses.replace(config.data, path=str(tmp_path / "data"), color=color)
        trained(tmp_path / color, dataclasses.replace(config, data=data))
        assert ("trained gray at 28x28 pixels; data.color=rgb keeps it" in capsys.readouterr().err) == said


def test_data_and_facts_go_through_json():
    config = DataConfig(targets=("a", "b"), mean=(0.5,), std=(0.5,))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
