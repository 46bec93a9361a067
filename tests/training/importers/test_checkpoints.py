"""Imports: each layout as its source writes it, holding a random network, gives that network; all else is refused."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import servers

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("onnxruntime")

from importing import (
    IMAGES,
    NON_COMMERCIAL,
    Dangerous,
    cosines,
    embed,
    random_network,
    read_config,
    sha256_of,
    under,
)
from safetensors.torch import save, save_file

from embedkit import load_encoder
from embedkit.authoring.contract import Contract
from embedkit.authoring.import_request import Request, decide_license
from embedkit.errors import ConfigError, EntryError, SourceError
from embedkit.hub.access import Access
from embedkit.hub.publish.publish import refresh
from embedkit.hub.resolve import find_entry
from embedkit.training.importers import checkpoints, foreign
from embedkit.training.importers.checkpoints import import_checkpoint
from embedkit.training.importers.layouts import LAYOUTS
from embedkit.training.methods import family_of

# torch.onnx warns of its own deprecations while it traces timm's ViTs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")


SMALL = Contract(image_size=32)


def head(*names):
    return {name: torch.randn(3, 3) for name in names}


def run_state(**more):
    """What stands beside the weights: optimizer state, options, numbers of numpy."""
    return {
        "epoch": 99,
        "arch": "resnet50",
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "args": argparse.Namespace(arch="vit_small", lr=0.1),
        "best": np.float64(0.5),
        "seen": np.int64(3),
        **more,
    }


def lightning(state):
    return run_state(state_dict=state, hyper_parameters={"lr": 0.1}, callbacks={}, global_step=5)


def sequential(state):
    """A torchvision ResNet as `nn.Sequential(*list(resnet.children())[:-1])` names it."""
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"{places[key.partition('.')[0]]}.{key.partition('.')[2]}": value for key, value in state.items()}


#: Layout and variant, the network, the entry's method, what the source writes, the prefix, and what is left out.
CASES = {
    "simsiam": (
        "resnet", "simsiam",
        lambda s: run_state(state_dict=under("module.encoder.", s)
                            | head("module.encoder.fc.0.weight", "module.predictor.0.weight")),
        "module.encoder.", ["module.encoder.fc.", "module.predictor."],
    ),
    "moco_v2": (
        "resnet", "moco_v2",
        lambda s: run_state(state_dict=under("module.encoder_q.", s) | under("module.encoder_k.", s)
                            | head("module.encoder_q.fc.0.weight", "module.queue", "module.queue_ptr")),
        "module.encoder_q.", ["module.encoder_k.", "module.encoder_q.fc.", "module.queue"],
    ),
    "moco_v3": (
        "resnet", "moco_v3",
        lambda s: run_state(state_dict=under("module.base_encoder.", s) | under("module.momentum_encoder.", s)
                            | head("module.base_encoder.fc.0.weight", "module.predictor.0.weight")),
        "module.base_encoder.", ["module.base_encoder.fc.", "module.momentum_encoder.", "module.predictor."],
    ),
    "moco_v3 vit": (
        "vit", "moco_v3",
        lambda s: run_state(state_dict=under("module.base_encoder.", s) | head("module.base_encoder.head.0.weight")),
        "module.base_encoder.", ["module.base_encoder.head."],
    ),
    "swav": (
        "resnet", "swav",
        lambda s: under("module.", s) | head("module.projection_head.0.weight", "module.prototypes.weight"),
        "module.", ["module.projection_head.", "module.prototypes."],
    ),
    "swav run": (
        "resnet", "deepcluster_v2",
        lambda s: run_state(state_dict=under("module.", s) | head("module.prototypes.prototypes0.weight")),
        "module.", ["module.prototypes."],
    ),
    "dino backbone": ("vit", "dino", lambda s: s, "", []),
    "dino run": (
        "vit", "dino",
        lambda s: run_state(
            student=under("module.backbone.", {k: v + 1 for k, v in s.items()}) | head("module.head.mlp.0.weight"),
            teacher=under("backbone.", s) | head("head.mlp.0.weight", "head.last_layer.weight_g"),
            dino_loss={"center": torch.zeros(1, 8)}, fp16_scaler={"scale": 1.0},
        ),
        "backbone.", ["head."],
    ),
    "dino": (
        "resnet", "dino",
        lambda s: run_state(teacher=under("module.backbone.", s) | head("module.head.mlp.0.weight")),
        "module.backbone.", ["module.head."],
    ),
    "barlow_twins": ("resnet", "barlow_twins", lambda s: s, "", []),
    "barlow_twins run": (
        "resnet", "barlow_twins",
        lambda s: run_state(model=under("module.backbone.", s)
                            | head("module.projector.0.weight", "module.bn.running_mean")),
        "module.backbone.", ["module.bn.", "module.projector."],
    ),
    "vicreg": ("resnet", "vicreg", lambda s: s, "", []),
    "vicreg run": (
        "resnet", "vicreg",
        lambda s: run_state(model=under("module.backbone.", s) | head("module.projector.0.weight")),
        "module.backbone.", ["module.projector."],
    ),
    "mae encoder": ("vit", "mae", lambda s: {"model": s}, "", []),
    "mae": (
        "vit", "mae",
        lambda s: run_state(model=s | head("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight")),
        "", ["decoder_", "mask_token"],
    ),
    "vissl": (
        "resnet", "rotnet",
        lambda s: {"phase_idx": 104, "loss": np.float32(1), "classy_state_dict": {"train": True, "base_model": {
            "model": {"trunk": under("_feature_blocks.", s), "heads": head("0.clf.0.weight")}}}},
        "_feature_blocks.", [],
    ),
    "vissl flat": (
        "resnet", "jigsaw",
        lambda s: {"classy_state_dict": {"base_model": {
            "model": under("trunk._feature_blocks.", s) | head("heads.0.clf.0.weight")}}},
        "trunk._feature_blocks.", ["heads."],
    ),
    "vissl converted": (
        "resnet", "jigsaw",
        # From caffe2, which counts no batches.
        lambda s: {"model_state_dict": under(
            "_feature_blocks.", {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")})},
        "_feature_blocks.", [],
    ),
    "vissl_colorization": (
        "lightness", "colorization",
        lambda s: {"model_state_dict": under("_feature_blocks.", s)}, "_feature_blocks.", [],
    ),
    "lightly": (
        "resnet", "simclr",
        lambda s: lightning(under("backbone.", s) | head("projection_head.layers.0.weight", "online_classifier.a")),
        "backbone.", ["online_classifier.", "projection_head"],
    ),
    "lightly sequential": (
        "resnet", "moco_v2",
        lambda s: lightning(under("backbone.", sequential(s)) | under("backbone_momentum.", sequential(s))
                            | head("projection_head.layers.0.weight", "projection_head_momentum.layers.0.weight")),
        "backbone.", ["backbone_momentum.", "projection_head"],
    ),
    "lightly vit": (
        "vit", "mae",
        lambda s: lightning(under("backbone.vit.", s) | head("backbone.mask_token", "decoder.mask_token")),
        "backbone.vit.", ["backbone.mask_token", "decoder."],
    ),
    "solo_learn": (
        "resnet", "byol",
        lambda s: lightning(under("backbone.", s) | under("momentum_backbone.", s)
                            | head("projector.0.weight", "predictor.0.weight", "classifier.weight")),
        "backbone.", ["classifier.", "momentum_", "predictor.", "projector."],
    ),
    "solo_learn old": (
        "resnet", "nnclr",
        lambda s: lightning(under("encoder.", s) | head("classifier.weight", "queue", "queue_y")),
        "encoder.", ["classifier.", "queue"],
    ),
}  # fmt: skip

ARCHITECTURE = {"resnet": "embedkit_r10", "vit": "embedkit_vit_t4", "lightness": "embedkit_r10"}


@pytest.mark.parametrize("case", CASES)
def test_every_layout_gives_the_network_that_is_in_it(case, request, tmp_path):
    """The first variant of each layout is written and loaded; of the others the network is looked at before that."""
    kind, method, write, prefix, removed = CASES[case]
    original, layout = request.getfixturevalue(kind), case.split()[0]
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(write(original.state_dict()), path)
    published = next(one for one in LAYOUTS if one.name == layout).license
    ask = Request(
        name=f"{method}-tiny.noise",
        zoo=tmp_path / "zoo",
        license=None if published else "MIT",
        origin="https://example.org/checkpoint.pth.tar",
        contract=SMALL,
    )
    written = case == layout
    kept = None if written else request.getfixturevalue("kept")
    done = import_checkpoint(path, ask, architecture=ARCHITECTURE[kind])
    if written:
        config = read_config(done.folder)
        provenance, preprocess = config.provenance, config.preprocess
        assert done.recognized.startswith(f"layout {layout},")
        assert provenance["source"] == "https://example.org/checkpoint.pth.tar"
        assert config.license == (published or "MIT") and config.method == method
        # What a table of the zoo says that the method learns from, where embedkit knows the method.
        assert provenance.get("family", "") == family_of(method)
        assert bool(config.timm) is (
            kind != "lightness"
        )  # the folder loads with timm, which write_entry has tried
        rows = load_encoder(done.folder, threads=1).encode(IMAGES, normalize=False, decode="exact")
    else:
        network, more = kept[0]
        provenance, preprocess = more["provenance"], more["preprocess"]
        rows = embed(network.eval(), preprocess)
    assert provenance["layout"].startswith(f"{layout}: ")
    assert (provenance["prefix"], provenance["removed"]) == (prefix, removed)
    assert provenance["sha256"] == sha256_of(path) and provenance["file"] == path.name
    expected = embed(original, preprocess)
    assert cosines(rows, expected).min() >= 0.9999
    np.testing.assert_allclose(rows, expected, atol=0.01 * np.abs(expected).max())


def test_every_layout_is_tried():
    assert {case for case in CASES if " " not in case} == {layout.name for layout in LAYOUTS}


def test_the_last_stage_of_colorization_is_not_timm_s(lightness, tmp_path, kept):
    path = tmp_path / "colorization.torch"
    torch.save({"model_state_dict": under("_feature_blocks.", lightness.state_dict())}, path)
    ask = Request(name="colorization-tiny.noise", zoo=tmp_path, contract=SMALL)
    import_checkpoint(path, ask, architecture="embedkit_r10")
    network, more = kept[0]
    preprocess = more["preprocess"]
    assert preprocess.color == "lab_l" and not more["in_timm"]
    # L* of 0..100 minus 50, from 0..255
    assert 255 * (1 / 255 / preprocess.std[0]) - preprocess.mean[0] / preprocess.std[0] == pytest.approx(50)
    twin = random_network("embedkit_r10", in_chans=1)
    twin.load_state_dict(network.state_dict())
    assert cosines(embed(network, preprocess), embed(lightness, preprocess)).min() > 0.99999
    assert cosines(embed(twin, preprocess), embed(lightness, preprocess)).min() < 0.99


# --- architectures by shape -------------------------------------------------------------------------------


def shapes_of(architecture, **arguments):
    """A state dict of the right shapes that takes no room: every tensor is one number, seen many times."""
    with torch.device("meta"):
        network = timm.create_model(architecture, num_classes=0, **arguments)
    return {
        name: torch.ones((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize(
    ("method", "architecture", "wrap"),
    [
        ("simsiam", "resnet50", lambda s: {"state_dict": under("module.encoder.", s)}),
        ("barlow_twins", "resnet50", lambda s: s),
        ("jigsaw", "resnet50", lambda s: {"model_state_dict": under("_feature_blocks.", s)}),
        ("byol", "resnet18", lambda s: {"state_dict": under("backbone.", s) | head("projector.0.weight")}),
        ("simclr", "resnet34", lambda s: {"state_dict": under("backbone.", s) | head("projection_head.a")}),
        ("dino", "vit_small_patch16_224", lambda s: s),
        ("dino", "vit_small_patch8_224", lambda s: {"teacher": under("backbone.", s)}),
        ("mae", "vit_base_patch16_224", lambda s: {"model": s}),
    ],
)
def test_the_shapes_tell_the_architecture(method, architecture, wrap, tmp_path, kept):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrap(shapes_of(architecture)), path)
    import_checkpoint(path, Request(name=f"{method}-x.in1k", zoo=tmp_path, license="MIT", origin="mine"))
    assert kept[0][1]["architecture"] == architecture
    assert kept[0][1]["preprocess"].size == (224, 224) and kept[0][1]["preprocess"].resize_size == 256
    smooth = "bicubic" if method in ("dino", "mae") else "bilinear"
    assert kept[0][1]["preprocess"].interpolation == smooth


def test_moco_v3_s_small_vit_has_twelve_heads(tmp_path, kept):
    # Six, as everywhere else, take the same tensors and give other features.
    original = random_network("vit_small_patch16_224", num_heads=12)
    with torch.no_grad():
        for block in original.blocks:
            block.attn.qkv.weight.normal_(0, 0.2)
    path = tmp_path / "vit-s.pth.tar"
    torch.save({"state_dict": under("module.base_encoder.", original.state_dict())}, path)
    import_checkpoint(path, Request(name="moco_v3-vit_s16.in1k", zoo=tmp_path))
    network, more = kept[0]
    assert more["architecture"] == "vit_small_patch16_224"
    assert more["model_args"] == {"in_chans": 3, "num_heads": 12, "global_pool": "token"}
    pixels = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        tokens = original.forward_features(pixels)
        torch.testing.assert_close(network.eval()(pixels), tokens[:, 0])  # the class token after the norm
        for block in network.blocks:
            block.attn.num_heads, block.attn.head_dim, block.attn.scale = 6, 64, 64**-0.5
        assert (network(pixels) - tokens[:, 0]).abs().max() > 0.1


# --- refused ----------------------------------------------------------------------------------------------


def simsiam(state, **changes):
    return {"state_dict": under("module.encoder.", state) | changes}


@pytest.fixture
def refuse(tmp_path):
    """`refuse(checkpoint, error, match, ...)`: the import fails so, and no entry is there."""

    def refuse(checkpoint, error, match, name="simsiam-tiny.noise", image_size=32, **options):
        path = tmp_path / "checkpoint.pth"
        torch.save(checkpoint, path)
        more = {key: options.pop(key) for key in ("license", "origin") if key in options}
        with pytest.raises(error, match=match) as caught:
            import_checkpoint(
                path,
                Request(name=name, zoo=tmp_path / "zoo", contract=Contract(image_size=image_size), **more),
                **{"architecture": "embedkit_r10", **options},
            )
        assert "\n" not in str(caught.value) and not (tmp_path / "zoo").exists()

    return refuse


def test_nothing_of_a_pickle_is_run(refuse, resnet, tmp_path):
    checkpoint = simsiam(resnet.state_dict()) | {"extra": Dangerous(tmp_path / "touched")}
    refuse(checkpoint, EntryError, r"asks for posix\.system, and nothing in it is run")
    assert not (tmp_path / "touched").exists()


class Options:
    """A harmless class, but not one that is known to be."""


def test_only_harmless_types_are_allowed(refuse, resnet):
    checkpoint = simsiam(resnet.state_dict())
    refuse({**checkpoint, "options": Options()}, EntryError, "asks for .*Options")
    refuse({**checkpoint, "objects": np.array([Options()])}, EntryError, "asks for ")
    # What was allowed for one file is not allowed for the process.
    before = torch.serialization.get_safe_globals()
    foreign.read_checkpoint(save({"a": torch.ones(1)}), "a.safetensors")
    assert torch.serialization.get_safe_globals() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04" + bytes(90), b"\x80\x02."])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_other_bytes(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EntryError, match=f"{name} is no checkpoint that can be read"):
        import_checkpoint(tmp_path / name, Request(name="simsiam-a.b", zoo=tmp_path))


def test_no_file(tmp_path):
    with pytest.raises(SourceError, match="No such file.*give a checkpoint file"):
        import_checkpoint(tmp_path / "a.pth", Request(name="simsiam-a.b", zoo=tmp_path))


def test_a_missing_tensor(refuse, resnet):
    state = resnet.state_dict()
    del state["layer3.0.conv2.weight"]
    refuse(
        simsiam(state),
        EntryError,
        r"1 tensor of the network is missing, such as 'layer3\.0\.conv2\.weight'",
    )


def test_a_tensor_that_belongs_nowhere(refuse, resnet):
    state = resnet.state_dict()
    stray = {"module.encoder.layer4.1.conv1.weight": torch.ones(2), "module.another": torch.ones(1)}
    refuse(
        simsiam(state, **stray),
        EntryError,
        r"2 tensors belong neither to the network nor to a head, such as 'module\.encoder\.layer4\.1",
    )


def test_a_wrong_shape(refuse, resnet):
    state = resnet.state_dict() | {"layer2.0.conv1.weight": torch.ones(64, 32, 1, 1)}
    refuse(
        simsiam(state),
        EntryError,
        r"layer2\.0\.conv1\.weight: the network has \(64, 32, 3, 3\), and the checkpoint \(64, 32, 1, 1\)",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(refuse, resnet, value):
    state = {key: tensor.clone() for key, tensor in resnet.state_dict().items()}
    state["layer1.0.bn1.running_mean"][3] = value
    refuse(simsiam(state), EntryError, r"layer1\.0\.bn1\.running_mean holds NaN or infinity")


@pytest.mark.parametrize(
    "value",
    [
        "text",
        torch.ones(32).to_sparse(),
        torch.empty(32, device="meta"),
        torch.ones(32, dtype=torch.complex64),
    ],
    ids=["text", "sparse", "meta", "complex"],
)
def test_tensors_of_another_kind(refuse, resnet, value):
    refuse(
        simsiam(resnet.state_dict() | {"bn1.weight": value}),
        EntryError,
        r"bn1\.weight: expected a plain tensor|no checkpoint that can be read",
    )


def test_a_stem_for_small_images(refuse):
    # solo-learn's for CIFAR: 3x3, and a padding of 2 that no shape shows
    state = shapes_of("resnet18") | {"conv1.weight": torch.ones(64, 3, 3, 3)}
    refuse(
        {"state_dict": under("backbone.", state) | head("classifier.weight")},
        EntryError,
        r"conv1\.weight: the network has \(64, 3, 7, 7\), and the checkpoint \(64, 3, 3, 3\)",
        name="byol-r18.cifar10",
        license="MIT",
        architecture=None,
    )


def test_two_keys_of_one_tensor(refuse, resnet):
    state = under("backbone.", sequential(resnet.state_dict()) | {"conv1.weight": torch.zeros(32, 3, 7, 7)})
    refuse(
        {"state_dict": state | head("projection_head.layers.0.weight")},
        EntryError,
        r"'backbone\.0\.weight' and 'backbone\.conv1\.weight' are both conv1\.weight of the network",
        name="simclr-tiny.noise",
        license="MIT",
    )


def test_values_with_a_shape_of_their_own(refuse, resnet):
    # Before any architecture is chosen: a shape that is no shape, and a tensor that has none.
    for value in (argparse.Namespace(shape=5), argparse.Namespace(shape=[[1]])):
        state = simsiam(resnet.state_dict() | {"bn1.weight": value})
        refuse(state, EntryError, r"bn1\.weight: expected a plain tensor")
        refuse(state, EntryError, r"is --architecture right\?", architecture=None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_not_plain(tmp_path):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert not foreign.is_plain(nested) and foreign.is_plain(torch.ones(2))
    found = checkpoints._find({"state_dict": {"module.encoder.conv1.weight": nested}}, LAYOUTS[0])
    assert found.channels == 0
    with pytest.raises(ConfigError, match="timm has no network of this name"):
        checkpoints._build(found, "none", Request(name="simsiam-a.b", zoo=tmp_path), "here")


def test_an_unknown_layout(refuse, resnet):
    refuse(
        run_state(net=under("net.encoder.", resnet.state_dict())),
        ConfigError,
        r"no layout is recognized in the keys 'epoch', .*in 'optimizer'.*known are simsiam, moco_v2, .*solo_learn: "
        "give --layout",
    )
    refuse([1, 2], ConfigError, "recognized in a list")
    refuse(
        simsiam(resnet.state_dict()),
        ConfigError,
        "expected timm, or one of simsiam, moco_v2",
        layout="simsima",
    )
    refuse(
        simsiam(resnet.state_dict()),
        ConfigError,
        r"expected keys module\.encoder_q\.\* in state_dict",
        layout="moco_v2",
    )


def test_an_ambiguous_layout(refuse, resnet):
    # Plain keys: DINO, Barlow Twins and VICReg all write such a file.
    refuse(
        resnet.state_dict(),
        ConfigError,
        "the keys 'conv1.weight', .* may be of dino, barlow_twins, vicreg: give --layout",
    )
    only_backbone = {"state_dict": under("backbone.", resnet.state_dict())}
    refuse(only_backbone, ConfigError, "may be of lightly, solo_learn", name="simclr-tiny.noise")


def test_channels_that_no_layout_explains(refuse, lightness):
    refuse(simsiam(lightness.state_dict()), ConfigError, "first convolution takes 1 channels")


def test_a_network_that_onnx_cannot_say(refuse, resnet, monkeypatch):
    def fails(*_, **__):
        raise torch.onnx.OnnxExporterError("a long story\nin lines")

    monkeypatch.setattr(foreign, "write_entry", fails)
    refuse(simsiam(resnet.state_dict()), EntryError, "cannot be written as ONNX .a long story in lines")


def test_a_name_of_another_method(refuse, resnet):
    refuse(
        simsiam(resnet.state_dict()),
        ConfigError,
        r"'byol-tiny\.noise'.*layout of SimSiam.*expected a name that begins with simsiam-",
        name="byol-tiny.noise",
    )
    with pytest.raises(ConfigError, match="'SimSiam': expected <method>-<arch>.<data>"):
        Request(name="SimSiam", zoo=Path())


def test_architectures_that_cannot_be(refuse, resnet, vit):
    state = simsiam(resnet.state_dict())
    refuse(state, ConfigError, "no network of this name; did you mean 'resnet50", architecture="resnet5O")
    refuse(state, EntryError, "tensors of the network are missing.*--architecture", architecture=None)
    refuse(
        {"model": vit.state_dict()},
        ConfigError,
        "expected a multiple of the patch, 4 pixels",
        name="mae-tiny.noise",
        architecture="embedkit_vit_t4",
        image_size=33,
    )
    refuse(  # position embeddings are never resampled in silence
        {"model": vit.state_dict()},
        EntryError,
        r"pos_embed: the network has \(1, 101, 192\), and the checkpoint \(1, 65, 192\)",
        name="mae-tiny.noise",
        architecture="embedkit_vit_t4",
        image_size=40,
    )


def test_a_failed_import_leaves_the_entry_that_is_there(resnet, tmp_path):
    ask = Request(name="simsiam-tiny.noise", zoo=tmp_path / "zoo", contract=SMALL)
    small = {"architecture": "embedkit_r10"}
    path = tmp_path / "a.pth"
    torch.save(simsiam(resnet.state_dict()), path)
    done = import_checkpoint(path, ask, **small)
    first = find_entry(done.folder).revision
    damaged = {key: value * float("nan") for key, value in resnet.state_dict().items()}
    torch.save(simsiam(damaged), path)
    with pytest.raises(EntryError):
        import_checkpoint(path, ask, **small)
    assert find_entry(done.folder).revision == first
    # As `embedkit export` has it: a new version of a name takes the place of the old one. This is a state dict saved
    # alone, and somebody's own weights.
    save_file(under("module.encoder.", resnet.state_dict()), tmp_path / "b.safetensors")
    own = dataclasses.replace(ask, license="MIT", origin="a run of ours")
    import_checkpoint(tmp_path / "b.safetensors", own, **small)
    assert find_entry(done.folder).revision != first
    assert json.loads((tmp_path / "zoo" / "index.json").read_text())["entries"].keys() == {ask.name}
    config = read_config(done.folder)
    assert config.license == "MIT" and config.provenance["published_license"] == NON_COMMERCIAL
    assert config.provenance["license_by"] == "the person who imported them"
    card = (done.folder / "README.md").read_text()
    assert f"published in this layout are under {NON_COMMERCIAL}" in card and "a run of ours" in card


# --- licenses ---------------------------------------------------------------------------------------------


def test_a_license_is_asked_for_and_never_guessed(refuse, resnet):
    state = {"model_state_dict": under("_feature_blocks.", resnet.state_dict())}
    refuse(state, ConfigError, "no license is known.*--license", name="jigsaw-tiny.noise")
    refuse(
        simsiam(resnet.state_dict()),
        ConfigError,
        "under CC-BY-NC-4.0: leave --license MIT out, or say with --origin",
        license="MIT",
    )


def test_a_license_is_one_line_of_known_characters(refuse, resnet):
    for text in ("MIT\nlicense: x", "mit\u202e", "x" * 101, "MIT: yes", "\udce9"):
        with pytest.raises(ConfigError, match="--license: .* is not the name of a license") as caught:
            Request(name="simsiam-a.b", zoo=Path(), license=text)
        str(caught.value).encode()
    state = {"model_state_dict": under("_feature_blocks.", resnet.state_dict())}
    for text in ("", "  ", "unknown", " Other ", "UNKNOWN"):
        refuse(state, ConfigError, "no license is known.*--license", name="jigsaw-tiny.noise", license=text)
    ask = Request(name="simsiam-a.b", zoo=Path(), license=" (MIT OR Apache-2.0+) ")
    assert decide_license(ask, None, stated=False, where="a").name == "(MIT OR Apache-2.0+)"


@pytest.mark.parametrize("words", ["two\nlines", "x" * 501, "\udce9", "\x1b[2J", "   "])
def test_words_are_one_printable_line(words):
    for option in ("origin", "data"):
        with pytest.raises(ConfigError, match="expected one line of at most 500 printable") as caught:
            Request(name="simsiam-a.b", zoo=Path(), **{option: words})
        assert "\n" not in str(caught.value)
        str(caught.value).encode()
    assert Request(name="simsiam-a.b", zoo=Path(), origin="https://example.org/é", data="x" * 500)


def test_a_presumed_license_is_told_from_a_given_one():
    def presumed(license=None, stated=False, known="MIT"):
        ask = Request(name="simsiam-a.b", zoo=Path(), license=license, origin="mine")
        return decide_license(ask, known, stated=stated, where="a").presumed

    assert presumed() and presumed(license="unknown")
    assert not presumed(license="mit") and not presumed(license="Apache-2.0") and not presumed(stated=True)
    assert not presumed(license="MIT", known=None)


def test_the_command_and_a_non_commercial_license(run, resnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(simsiam(resnet.state_dict()), "a.pth")
    words = (
        "import",
        "a.pth",
        "--name",
        "simsiam-tiny.noise",
        "--architecture",
        "embedkit_r10",
        "--image-size",
        "32",
    )
    assert run(*words, "--origin", "https://example.org/a.pth") == (
        0,
        f"{Path('zoo') / 'simsiam-tiny.noise'}\n",
        f"embedkit: layout simsiam, network embedkit_r10, license {NON_COMMERCIAL}\n"
        f"embedkit: The weights are under {NON_COMMERCIAL}, which forbids commercial use.\n"
        f"embedkit: {NON_COMMERCIAL} is the license of the published weights of this layout; for weights of your "
        "own, say otherwise with --license and --origin\n",
    )
    entry = tmp_path / "zoo" / "simsiam-tiny.noise"
    assert read_config(entry).license == NON_COMMERCIAL
    assert read_config(entry).provenance["license_by"] == "those who published this layout"
    card = (entry / "README.md").read_text()
    assert "\nlicense: cc-by-nc-4.0\n" in card and "forbids commercial use" in card
    refresh(str(tmp_path / "zoo"))
    site = servers.site(tmp_path / "zoo")
    try:
        with pytest.raises(ConfigError, match="forbids commercial use.*--accept-license"):
            find_entry(f"{site.url}/{entry.name}", access=Access(cache_dir=tmp_path / "cache"))
    finally:
        site.close()

    status, out, err = run("import", "a.pth", "--name", "simsiam-tiny.noise", "--layout", "mae")
    assert (
        (status, out) == (1, "")
        and err.startswith("embedkit: a.pth: expected keys ")
        and err.count("\n") == 1
    )
    status, out, err = run("import", "no-such.pth", "--name", "simsiam-tiny.noise")
    assert status == 1 and "neither a checkpoint file, nor hf-hub:org/name" in err and err.count("\n") == 1
    status, _, err = run("import", "resnet18", "--name", "supervised-r18.in1k", "--layout", "mae")
    assert status == 2 and "--layout is for a checkpoint file: leave it out here" in err
    assert run("import", "a.pth")[0] == 2  # no --name
