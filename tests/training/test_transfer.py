"""Starting from weights: what is loaded from where, under which contract, and which methods cannot."""

import dataclasses
import json
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("onnx")

from safetensors.torch import load_file

from embedkit.errors import ConfigError, EntryNotFoundError, UnreachableError
from embedkit.hub.resolve import find_entry
from embedkit.training import recipes, run
from embedkit.training.build import build_method
from embedkit.training.config import Facts, with_overrides
from embedkit.training.importers import timm_models
from embedkit.training.parents import find_parent
from embedkit.training.transfer import adapt_channels, load_weights, starting_from

ZOO = Path(__file__).parents[2] / "zoo"
DEFAULT, GRAY = "supervised-efficientnet_lite0.in1k", str(ZOO / "supervised-r10.fmnist")


@pytest.fixture(scope="module")
def default():
    return find_parent(DEFAULT)


@pytest.fixture(scope="module")
def gray():
    return find_parent(GRAY)


def started(parent, *settings, name="supervised"):
    """The configuration of a run that starts from `parent`, and its method, filled."""
    config = with_overrides(recipes.recipe(name), ["init=given", *settings])
    config = starting_from(config, parent)
    facts = Facts(
        image_shape=(len(config.data.mean), config.data.image_size, config.data.image_size),
        mean=config.data.mean, std=config.data.std, num_classes=3, num_images=8, batch_size=4, steps_per_epoch=2,
        total_steps=4, targets={}, optimizer=config.optimizer,
    )  # fmt: skip
    return config, build_method(config, facts, parent)


def test_every_tensor_is_the_default_entrys_under_its_contract(default, capsys):
    config, method = started(default)
    stored = load_file(ZOO / DEFAULT / "model.safetensors")
    loaded = method.backbone.net.state_dict()
    assert set(loaded) == set(stored) and any(name.endswith("running_var") for name in stored)
    assert all(torch.equal(loaded[name], value.to(loaded[name].dtype)) for name, value in stored.items())
    assert config.data.preprocess(config.data.mean, config.data.std) == find_entry(DEFAULT).config.preprocess
    said = capsys.readouterr().err
    assert "the backbone is tf_efficientnet_lite0" in said and "instead of r10" in said
    assert f"all {len(stored)} tensors of tf_efficientnet_lite0 loaded" in said and "left out" not in said
    assert config.parents == (
        {"name": DEFAULT, "manifest_sha256": find_entry(DEFAULT).revision, "license": "Apache-2.0"},
    )


def test_a_size_that_is_set_stands_in_the_contract_and_the_resize_rule_keeps_its_proportion(default):
    config, method = started(default, "data.image_size=96")
    preprocess = config.data.preprocess(config.data.mean, config.data.std)
    assert preprocess.size == (96, 96) and preprocess.resize == "shortest"
    assert preprocess.resize_size == 110  # 256 * 96 / 224 = 109.7
    assert preprocess.interpolation == find_entry(DEFAULT).config.preprocess.interpolation
    assert method.backbone.image_size == (96, 96)


def test_a_recipe_with_an_init_keeps_its_size_and_color_and_another_loses_them():
    own = recipes.recipe("supervised")
    with_init = dataclasses.replace(own, init="one", data=dataclasses.replace(own.data, image_size=64))
    assert with_overrides(with_init, ["init=other"]).data.image_size == 64
    stored = dataclasses.replace(own, data=dataclasses.replace(own.data, load_size=32))
    assert with_overrides(stored, ["init=other"]).data.load_size == 0
    assert with_overrides(stored, ["init=other", "data.load_size=256"]).data.load_size == 256
    data = with_overrides(own, ["init=other"]).data
    assert (data.image_size, data.color) == (0, "auto")
    with pytest.raises(ConfigError, match="data.mean: with init it is as in the given encoder"):
        with_overrides(own, ["init=one", "data.mean=0.5"])
    with pytest.raises(ConfigError, match="auto and 0 stand for those of an encoder that init names"):
        run.train(with_overrides(own, ["data.color=auto"]), data="synthetic:80", out="never")


def test_the_sum_of_three_kernels_and_a_third_of_one_by_hand():
    weight = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)
    assert adapt_channels(weight, 1).flatten().tolist() == [7.0]
    assert adapt_channels(torch.full((1, 1, 1, 1), 6.0), 3).flatten().tolist() == [2.0, 2.0, 2.0]


def test_a_gray_image_keeps_its_features_with_one_channel_more_or_less(default, gray):
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for parent, channels in ((default, "data.color=gray"), (gray, "data.color=rgb")):
        original = started(parent, "data.image_size=64")[1].eval()
        adapted = started(parent, "data.image_size=64", channels)[1].eval()
        rows = []
        for method in (original, adapted):
            seen = image.expand(-1, method.mean.shape[1], -1, -1)
            with torch.no_grad():
                rows.append(method.backbone(method.normalize(seen)))
        assert rows[0].abs().max() > 0.1
        torch.testing.assert_close(rows[1], rows[0], rtol=1e-3, atol=1e-3)


def test_a_vits_positions_are_resized():
    parent = find_parent(str(ZOO / "mae-vit_t4.fmnist"))
    positions = parent.state["pos_embed"].float()
    flat = positions.clone()
    flat[:, 1:] = positions[:, 1:2]  # every patch stands at one place: resized, it still does
    parent = dataclasses.replace(parent, state={**parent.state, "pos_embed": flat})
    _, method = started(parent, "data.image_size=40")
    found = method.backbone.net.pos_embed.detach()
    assert found.shape[1] == 1 + 10 * 10
    torch.testing.assert_close(found[:, :1], flat[:, :1])
    torch.testing.assert_close(found[:, 1:], flat[:, 1:2].expand(-1, 100, -1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="patches of 4x4 do not tile an image of 30x30"):
        started(parent, "data.image_size=30")


def test_a_teacher_starts_from_the_same_weights(gray):
    _, method = started(gray, name="mean_teacher")
    stored = {name: value.float() for name, value in gray.state.items()}
    copies = {
        name: value
        for name, value in method.state_dict().items()
        if name.endswith("net.conv1.weight") or name.endswith("net.bn1.running_var")
    }
    assert len(copies) == 4  # of the student and of the teacher
    assert all(torch.equal(value, stored[name.rpartition("net.")[2]]) for name, value in copies.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jigsaw", "jigsaw builds embedkit_r10 in another form .* tensors fit nowhere"),
        ("split_brain", "split_brain has no backbone of one whole network"),
        ("gan", "gan trains networks against each other"),
        ("bigan", "bigan trains networks against each other"),
    ],
)
def test_methods_that_cannot_start_from_weights(name, message, gray):
    with pytest.raises(ConfigError, match=message):
        started(gray, "data.color=rgb", "data.image_size=64", name=name)


def test_a_method_that_is_given_an_encoder_takes_no_other(tmp_path):
    config = with_overrides(recipes.recipe("deepdpm"), [f"init={GRAY}", f"method.weights={GRAY}"])
    with pytest.raises(ConfigError, match=r"init: method.weights gives deepdpm its encoder"):
        run.train(config, data="synthetic:40", out=tmp_path / "run", progress=False)


def test_what_is_no_encoder_that_timm_builds():
    with pytest.raises(ConfigError, match=r"face_detector.* is a detector"):
        find_parent(str(ZOO / "face_detector-ssd_mobilenet1.widerface"))
    with pytest.raises(ConfigError, match="dlib_face_resnet29, which timm cannot build"):
        find_parent(str(ZOO / "face-r29.dlib"))
    with pytest.raises(EntryNotFoundError, match="did you mean"):
        find_parent("supervised-efficientnet_lite1")


def test_an_encoder_of_a_backbone_and_a_layer_gives_its_backbone(capsys):
    _, method = started(find_parent(str(ZOO / "sphereface-r10.emoji")))
    stored = load_file(ZOO / "sphereface-r10.emoji" / "model.safetensors")
    assert torch.equal(method.backbone.net.conv1.weight, stored["backbone.conv1.weight"].float())
    assert "left out: embedding.bias, embedding.weight" in capsys.readouterr().err


def test_a_diverged_parent_is_refused(gray):
    bad = {**gray.state, "bn1.weight": torch.full_like(gray.state["bn1.weight"], float("nan"))}
    method = started(gray)[1]
    with pytest.raises(ConfigError, match=r"bn1.weight holds NaN or infinity"):
        load_weights(method.backbone, dataclasses.replace(gray, state=bad), "supervised")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A run of three steps from an entry."""
    config = with_overrides(
        recipes.recipe("supervised"), [f"init={GRAY}", "data.image_size=16", "steps=3", "batch_size=16", "threads=1"]
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    return run.train(config, data="synthetic:80", out=folder, progress=False).run


def trained(folder, *settings):
    """The encoder's tensors of a run of three steps from the gray entry."""
    config = with_overrides(
        recipes.recipe("supervised"),
        [f"init={GRAY}", "data.image_size=16", "steps=3", "batch_size=16", "threads=1", *settings],
    )
    run.train(config, data="synthetic:80", out=folder, progress=False)
    return load_file(folder / "encoder.safetensors")


@pytest.mark.parametrize(("parts", "frozen"), [(2, ("conv1", "bn1", "layer1")), (5, ("",))])
def test_frozen_parts_keep_parameters_and_statistics_bit_for_bit(parts, frozen, gray, tmp_path):
    found = trained(tmp_path / "run", f"freeze={parts}")
    for name, value in found.items():
        same = torch.equal(value, gray.state[name].to(value.dtype))
        assert same == name.startswith(frozen), name
    assert {"bn1.running_mean", "layer1.0.bn1.running_var", "layer2.0.bn1.running_mean"} <= set(found)


def test_freeze_that_the_network_does_not_have_or_without_weights(gray):
    with pytest.raises(ConfigError, match="freeze: expected 0 to 5 for embedkit_r10, 5 for the whole"):
        started(gray, "freeze=6")
    with pytest.raises(ConfigError, match="freeze: it keeps the weights that init names"):
        run.train(with_overrides(recipes.recipe("supervised"), ["freeze=1"]), data="synthetic:80", out="no")


def test_frozen_layers_of_a_teacher_and_of_the_default_encoder(default):
    _, method = started(default, "freeze=8", "data.image_size=32", name="mean_teacher")
    method.train()
    modes = {module.training for module in method.backbone.net.modules()}
    assert modes == {False} and method.training
    assert not any(parameter.requires_grad for parameter in method.backbone.parameters())


def test_a_resumed_run_never_loads_again(tuned, monkeypatch):
    before = (tuned / "encoder.safetensors").read_bytes()

    def never(*arguments):
        raise AssertionError("loaded again")

    monkeypatch.setattr(run, "find_parent", never)
    monkeypatch.setattr("embedkit.training.build.load_weights", never)
    assert run.resume(tuned, progress=False).finished
    assert (tuned / "encoder.safetensors").read_bytes() == before


def test_a_run_starts_from_a_run_and_names_its_ancestors(tuned):
    parent = find_parent(str(tuned))
    assert parent.preprocess.size == (16, 16)
    config, method = started(parent)
    stored = load_file(tuned / "encoder.safetensors")
    assert all(torch.equal(method.backbone.net.state_dict()[name], value) for name, value in stored.items())
    assert [record["name"] for record in config.parents] == ["tuned", "supervised-r10.fmnist"]
    assert "license" not in config.parents[0] and config.parents[1]["license"] == "MIT"
    (tuned / "encoder.safetensors").rename(tuned / "away")
    with pytest.raises(ConfigError, match="the run has not finished"):
        find_parent(str(tuned))
    (tuned / "away").rename(tuned / "encoder.safetensors")


def test_the_stored_configuration_names_the_parent(tuned):
    stored = json.loads((tuned / "config.json").read_text())["config"]
    assert stored["init"] == GRAY and stored["backbone"] == "r10"
    assert stored["parents"][0]["items"]["manifest_sha256"] == find_entry(GRAY).revision


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"])
def test_a_network_of_timm_gives_what_timm_gives(name, monkeypatch):
    """Pooling and norms are timm's own, not what embedkit chooses for a network that it starts at random."""
    network = timm.create_model(name, num_classes=5).eval()
    cfg = {**timm.get_pretrained_cfg(name).to_dict(), "license": "mit"}
    source = timm_models.Source(
        where=name, architecture=name, model_args={}, cfg=cfg, state=network.state_dict(),
        preprocess=timm_models.preprocess_of(cfg, name), licenses=("mit",), provenance={},
    )  # fmt: skip
    monkeypatch.setattr(timm_models, "from_name", lambda name: source)
    _, method = started(find_parent(f"timm:{name}"))
    size = source.preprocess.size
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(x), pre_logits=True)
        torch.testing.assert_close(method.eval().backbone(x), expected, rtol=1e-4, atol=1e-4)
    _, smaller = started(find_parent(f"timm:{name}"), "data.image_size=64", "data.color=gray")
    assert smaller.backbone.image_size == (64, 64) and smaller.backbone.in_chans == 1


def test_timm_without_a_network_is_one_sentence_in_seconds(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    begun = time.monotonic()
    with pytest.raises(
        UnreachableError, match="timm's test_resnet.r160_in1k: its weights are not in the cache"
    ):
        find_parent("timm:test_resnet.r160_in1k")
    assert time.monotonic() - begun < 20
    with pytest.raises(ConfigError, match="nor a name of timm's; did you mean 'resnet"):
        find_parent("timm:resnet5O.a1_in1k")
