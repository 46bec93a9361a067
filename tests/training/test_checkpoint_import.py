"""Imports: each layout as its source writes it, holding a random network, gives that network; all else is refused."""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("onnxruntime")

from safetensors.torch import save, save_file  # noqa: E402

from embedkit import load_encoder  # noqa: E402
from embedkit.entry import EntryConfig  # noqa: E402
from embedkit.errors import ConfigError, EntryError, IntegrityError, PlaceError, SourceError  # noqa: E402
from embedkit.hub.access import Access  # noqa: E402
from embedkit.hub.publish import refresh  # noqa: E402
from embedkit.load import find_entry  # noqa: E402
from embedkit.preprocess import read_pixels  # noqa: E402
from embedkit.training.golden import synthetic_pictures  # noqa: E402
from embedkit.training.graph import PixelEncoder  # noqa: E402
from embedkit.training.importers import checkpoints, foreign, timm_models  # noqa: E402
from embedkit.training.importers.checkpoints import import_checkpoint  # noqa: E402
from embedkit.training.importers.foreign import Request  # noqa: E402
from embedkit.training.importers.layouts import LAYOUTS  # noqa: E402
from embedkit.training.importers.timm_models import import_timm, preprocess_of  # noqa: E402

# torch.onnx warns of its own deprecations while it traces timm's ViTs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

NON_COMMERCIAL = "CC-BY-NC-4.0"
PICTURES = list(synthetic_pictures(8, seed=5, height=40, width=52))


def random_network(architecture, seed=0, **arguments):
    """A timm network whose norms differ from the identity, so that every tensor matters."""
    torch.manual_seed(seed)
    network = timm.create_model(architecture, num_classes=0, **arguments).eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if "running_var" in name or (tensor.ndim == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.normal_(0, 0.1)
            elif "num_batches" in name:
                tensor.fill_(7)
    return network


@pytest.fixture(scope="module")
def resnet():
    return random_network("embedkit_r10", in_chans=3)


@pytest.fixture(scope="module")
def vit():
    network = random_network("embedkit_vit_t4", in_chans=3, img_size=32, global_pool="token", fc_norm=False)
    with torch.no_grad():
        network.pos_embed.normal_(0, 0.5)
    return network


@pytest.fixture(scope="module")
def lightness():
    """Of VISSL's colorization: one channel, and no stride in the last stage."""
    network = random_network("embedkit_r10", in_chans=1)
    network.layer4[0].conv1.stride = network.layer4[0].downsample[0].stride = (1, 1)
    return network


def embed(network, preprocess):
    """Rows (8, D) by torch, not normalised."""
    pixels = np.stack([read_pixels(picture, preprocess, decode="exact") for picture in PICTURES])
    with torch.inference_mode():
        return PixelEncoder(network, preprocess)(torch.from_numpy(pixels)).numpy()


def cosines(left, right):
    """Per row, around the mean row: untrained networks give nearly the same row for every picture."""
    left, right = (rows - rows.mean(axis=0) for rows in (np.float64(left), np.float64(right)))
    return (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


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


def read_config(folder):
    return EntryConfig.from_json((folder / "config.json").read_bytes())


@pytest.fixture
def kept(monkeypatch):
    """The arguments of `write_import`, which writes nothing: for what only its input shows."""
    calls = []
    for module in (checkpoints, timm_models):
        monkeypatch.setattr(
            module, "write_import", lambda request, network, **more: calls.append((network, more))
        )
    return calls


@pytest.mark.parametrize("case", CASES)
def test_every_layout_gives_the_network_that_is_in_it(case, request, tmp_path):
    """The first variant of each layout is written and loaded; of the others the network is looked at before that."""
    kind, method, write, prefix, removed = CASES[case]
    original, layout = request.getfixturevalue(kind), case.split()[0]
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(write(original.state_dict()), path)
    published = next(one for one in LAYOUTS if one.name == layout).licence
    ask = Request(
        name=f"{method}-tiny.noise",
        zoo=tmp_path / "zoo",
        licence=None if published else "MIT",
        origin="https://example.org/checkpoint.pth.tar",
    )
    written = case == layout
    kept = None if written else request.getfixturevalue("kept")
    done = import_checkpoint(path, ask, architecture=ARCHITECTURE[kind], image_size=32)
    if written:
        config = read_config(done.folder)
        provenance, preprocess = config.provenance, config.preprocess
        assert done.said.startswith(f"layout {layout},")
        assert provenance["source"] == "https://example.org/checkpoint.pth.tar"
        assert config.licence == (published or "MIT") and config.method == method
        assert bool(config.timm) is (
            kind != "lightness"
        )  # the folder loads with timm, which write_entry has tried
        rows = load_encoder(done.folder, threads=1).encode(PICTURES, normalize=False, decode="exact")
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


def sha256_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_every_layout_is_tried():
    assert {case for case in CASES if " " not in case} == {layout.name for layout in LAYOUTS}


def test_the_last_stage_of_colorization_is_not_timm_s(lightness, tmp_path, kept):
    path = tmp_path / "colorization.torch"
    torch.save({"model_state_dict": under("_feature_blocks.", lightness.state_dict())}, path)
    ask = Request(name="colorization-tiny.noise", zoo=tmp_path)
    import_checkpoint(path, ask, architecture="embedkit_r10", image_size=32)
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
    import_checkpoint(path, Request(name=f"{method}-x.in1k", zoo=tmp_path, licence="MIT", origin="mine"))
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

    def refuse(checkpoint, error, match, name="simsiam-tiny.noise", **options):
        path = tmp_path / "checkpoint.pth"
        torch.save(checkpoint, path)
        more = {key: options.pop(key) for key in ("licence", "origin") if key in options}
        with pytest.raises(error, match=match) as caught:
            import_checkpoint(
                path,
                Request(name=name, zoo=tmp_path / "zoo", **more),
                **{"architecture": "embedkit_r10", "image_size": 32, **options},
            )
        assert "\n" not in str(caught.value) and not (tmp_path / "zoo").exists()

    return refuse


class Dangerous:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


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


def test_a_stem_for_small_pictures(refuse):
    # solo-learn's for CIFAR: 3x3, and a padding of 2 that no shape shows
    state = shapes_of("resnet18") | {"conv1.weight": torch.ones(64, 3, 3, 3)}
    refuse(
        {"state_dict": under("backbone.", state) | head("classifier.weight")},
        EntryError,
        r"conv1\.weight: the network has \(64, 3, 7, 7\), and the checkpoint \(64, 3, 3, 3\)",
        name="byol-r18.cifar10",
        licence="MIT",
        architecture=None,
    )


def test_two_keys_of_one_tensor(refuse, resnet):
    state = under("backbone.", sequential(resnet.state_dict()) | {"conv1.weight": torch.zeros(32, 3, 7, 7)})
    refuse(
        {"state_dict": state | head("projection_head.layers.0.weight")},
        EntryError,
        r"'backbone\.0\.weight' and 'backbone\.conv1\.weight' are both conv1\.weight of the network",
        name="simclr-tiny.noise",
        licence="MIT",
    )


def test_values_with_a_shape_of_their_own(refuse, resnet):
    # Before any architecture is chosen: a shape that is no shape, and a tensor that has none.
    for value in (argparse.Namespace(shape=5), argparse.Namespace(shape=[[1]])):
        state = simsiam(resnet.state_dict() | {"bn1.weight": value})
        refuse(state, EntryError, r"bn1\.weight: expected a plain tensor")
        refuse(state, EntryError, r"is --architecture right\?", architecture=None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_not_plain():
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert not foreign.is_plain(nested) and foreign.is_plain(torch.ones(2))
    found = checkpoints._find({"state_dict": {"module.encoder.conv1.weight": nested}}, LAYOUTS[0])
    assert found.channels == 0
    with pytest.raises(ConfigError, match="timm knows no network of this name"):
        checkpoints._build(found, "none", None, "here")


def test_an_unknown_layout(refuse, resnet):
    refuse(
        run_state(net=under("net.encoder.", resnet.state_dict())),
        ConfigError,
        r"no layout is recognised in the keys 'epoch', .*in 'optimizer'.*known are simsiam, moco_v2, .*solo_learn: "
        "give --layout",
    )
    refuse([1, 2], ConfigError, "recognised in a list")
    refuse(simsiam(resnet.state_dict()), ConfigError, "expected one of simsiam, moco_v2", layout="simsima")
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
    refuse(state, ConfigError, "no network of this name; the nearest are resnet50", architecture="resnet5O")
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
    ask = Request(name="simsiam-tiny.noise", zoo=tmp_path / "zoo")
    small = {"architecture": "embedkit_r10", "image_size": 32}
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
    own = dataclasses.replace(ask, licence="MIT", origin="a run of ours")
    import_checkpoint(tmp_path / "b.safetensors", own, **small)
    assert find_entry(done.folder).revision != first
    assert json.loads((tmp_path / "zoo" / "index.json").read_text())["entries"].keys() == {ask.name}
    config = read_config(done.folder)
    assert config.licence == "MIT" and config.provenance["published_licence"] == NON_COMMERCIAL
    assert config.provenance["licence_by"] == "whoever imported them"
    card = (done.folder / "README.md").read_text()
    assert f"published in this layout are under {NON_COMMERCIAL}" in card and "a run of ours" in card


# --- licences ---------------------------------------------------------------------------------------------


def test_a_licence_is_asked_for_and_never_guessed(refuse, resnet):
    state = {"model_state_dict": under("_feature_blocks.", resnet.state_dict())}
    refuse(state, ConfigError, "no licence is known.*--licence", name="jigsaw-tiny.noise")
    refuse(
        simsiam(resnet.state_dict()),
        ConfigError,
        "under CC-BY-NC-4.0: leave --licence MIT out, or say with --source",
        licence="MIT",
    )


def test_a_licence_is_one_line_of_known_characters(refuse, resnet):
    for text in ("MIT\nlicense: x", "mit\u202e", "x" * 101, "MIT: yes", "\udce9"):
        with pytest.raises(ConfigError, match="--licence: .* is no name of a licence") as caught:
            Request(name="simsiam-a.b", zoo=Path(), licence=text)
        str(caught.value).encode()
    state = {"model_state_dict": under("_feature_blocks.", resnet.state_dict())}
    for text in ("", "  ", "unknown", " Other ", "UNKNOWN"):
        refuse(state, ConfigError, "no licence is known.*--licence", name="jigsaw-tiny.noise", licence=text)
    ask = Request(name="simsiam-a.b", zoo=Path(), licence=" (MIT OR Apache-2.0+) ")
    assert foreign.decide_licence(ask, None, stated=False, where="a").name == "(MIT OR Apache-2.0+)"


@pytest.mark.parametrize("words", ["two\nlines", "x" * 501, "\udce9", "\x1b[2J", "   "])
def test_words_are_one_printable_line(words):
    for option in ("origin", "data"):
        with pytest.raises(ConfigError, match="expected one line of at most 500 printable") as caught:
            Request(name="simsiam-a.b", zoo=Path(), **{option: words})
        assert "\n" not in str(caught.value)
        str(caught.value).encode()
    assert Request(name="simsiam-a.b", zoo=Path(), origin="https://example.org/é", data="x" * 500)


def test_a_presumed_licence_is_told_from_a_given_one():
    def presumed(licence=None, stated=False, known="MIT"):
        ask = Request(name="simsiam-a.b", zoo=Path(), licence=licence, origin="mine")
        return foreign.decide_licence(ask, known, stated=stated, where="a").presumed

    assert presumed() and presumed(licence="unknown")
    assert not presumed(licence="mit") and not presumed(licence="Apache-2.0") and not presumed(stated=True)
    assert not presumed(licence="MIT", known=None)


@pytest.fixture(scope="module")
def servers():
    path = Path(__file__).parents[1] / "hub" / "servers.py"
    spec = importlib.util.spec_from_file_location("embedkit_import_servers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_command_and_a_non_commercial_licence(run, servers, resnet, tmp_path, monkeypatch):
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
    assert run(*words, "--source", "https://example.org/a.pth") == (
        0,
        f"{Path('zoo') / 'simsiam-tiny.noise'}\n",
        f"embedkit: layout simsiam, network embedkit_r10, licence {NON_COMMERCIAL}\n"
        f"embedkit: {NON_COMMERCIAL} is the licence of the published weights of this layout; for weights of your "
        "own, say otherwise with --licence and --source\n",
    )
    entry = tmp_path / "zoo" / "simsiam-tiny.noise"
    assert read_config(entry).licence == NON_COMMERCIAL
    assert read_config(entry).provenance["licence_by"] == "those who published this layout"
    card = (entry / "README.md").read_text()
    assert "\nlicense: cc-by-nc-4.0\n" in card and "forbids commercial use" in card
    refresh(str(tmp_path / "zoo"))
    site = servers.site(tmp_path / "zoo")
    try:
        with pytest.raises(ConfigError, match="forbids commercial use.*--accept-licence"):
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
    assert status == 1 and "are for a checkpoint file" in err
    assert run("import", "a.pth")[0] == 2  # no --name


# --- timm -------------------------------------------------------------------------------------------------

CFG = {
    "tag": "noise", "custom_load": False, "input_size": [3, 32, 32], "fixed_input_size": False,
    "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center", "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4], "num_classes": 10, "classifier": "fc", "first_conv": "conv1", "license": "apache-2.0",
}  # fmt: skip


def timm_folder(folder, network, *, cfg=None, weights="model.safetensors", state=None, card=None, **config):
    """A folder of timm's layout, with a classifier."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = {key: value for key, value in {**CFG, **(cfg or {})}.items() if value is not None}
    config = {"architecture": "embedkit_r10", "num_classes": 10, "pretrained_cfg": cfg, **config}
    (folder / "config.json").write_text(json.dumps(config))
    state = {
        **network.state_dict(),
        "fc.weight": torch.ones(10, 256),
        "fc.bias": torch.ones(10),
        **(state or {}),
    }
    state = {key: value for key, value in state.items() if value is not None}
    (save_file if weights.endswith(".safetensors") else torch.save)(state, folder / weights)
    if card:
        (folder / "README.md").write_bytes(card.encode())
    return folder


def test_a_folder_of_timm_s_layout(resnet, tmp_path):
    folder = timm_folder(tmp_path / "there", resnet)
    done = import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path / "zoo"))
    config = read_config(done.folder)
    assert config.licence == "apache-2.0" and config.architecture == "embedkit_r10"
    assert config.preprocess.resize_size == 36 and config.preprocess.mean == (
        0.5,
        0.4,
        0.3,
    )  # floor(32 / 0.875)
    assert config.provenance["removed"] == ["fc.bias", "fc.weight"]
    assert config.provenance["sha256"] == sha256_of(folder / "model.safetensors")
    rows = load_encoder(done.folder, threads=1).encode(PICTURES, normalize=False, decode="exact")
    assert cosines(rows, embed(resnet, config.preprocess)).min() >= 0.9999


def test_an_entry_of_our_own_is_such_a_folder(resnet, tmp_path, request):
    torch.save({"teacher": under("backbone.", resnet.state_dict())}, tmp_path / "dino.pth")
    done = import_checkpoint(
        tmp_path / "dino.pth",
        Request(name="dino-tiny.noise", zoo=tmp_path / "zoo"),
        architecture="embedkit_r10",
        image_size=32,
    )
    kept = request.getfixturevalue("kept")
    import_timm(f"local-dir:{done.folder}", Request(name="dino-again.noise", zoo=tmp_path / "zoo"))
    config, (network, more) = read_config(done.folder), kept[0]
    assert more["preprocess"] == config.preprocess and more["architecture"] == config.architecture
    assert more["licence"].name == "apache-2.0"  # as timm writes it
    assert more["model_args"] == config.timm["model_args"] == {"global_pool": "avg", "in_chans": 3}
    rows = load_encoder(done.folder, threads=1).encode(PICTURES, normalize=False, decode="exact")
    np.testing.assert_allclose(
        embed(network.eval(), more["preprocess"]), rows, atol=1e-4 * np.abs(rows).max()
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"state": {"layer1.0.conv1.weight": None}}, "1 tensor of the network is missing, such"),
        (
            {"state": {"layer9.weight": torch.ones(1)}},
            "1 tensor belongs neither to the network nor to a head",
        ),
        ({"state": {"bn1.bias": torch.full((32,), float("nan"))}}, "bn1.bias holds NaN"),
        (
            {"model_args": {"checkpoint_path": "/etc/passwd"}},
            "model_args: checkpoint_path says what is loaded",
        ),
        ({"model_args": {"pretrained": True}}, "model_args: pretrained says what is loaded"),
        ({"model_args": {"no_such": 1}}, "timm cannot build embedkit_r10"),
        ({"model_args": {"in_chans": 1}}, "conv1.weight: the network has .32, 1, 3, 3."),
        ({"architecture": "resnet5O"}, "knows no network 'resnet5O'"),
        ({"architecture": 5}, "architecture: expected timm's name"),
        (
            {"cfg": {"classifier": 5}},
            "2 tensors belong neither to the network nor to a head, such as 'fc",
        ),
        ({"cfg": {"crop_mode": "squash"}}, "the preprocess contract cannot state this"),
        ({"cfg": {"crop_pct": 0}}, "crop_pct|cannot state"),
        ({"cfg": {"crop_mode": ["center"]}}, "the preprocess contract cannot state this"),
        ({"cfg": {"mean": 5}}, "pretrained_cfg is not timm's"),
        ({"cfg": {"mean": [0.5]}}, "preprocess.mean: expected 3 numbers"),
        ({"cfg": {"interpolation": "random"}}, "preprocess.interpolation: expected one of"),
    ],
)
def test_folders_that_are_not_what_they_say(changes, match, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, **changes)
    if changes == {"cfg": {"crop_pct": 0}}:  # timm takes 0 for "not said"
        import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
        assert kept[0][1]["preprocess"].resize_size == 36
        return
    with pytest.raises(EntryError, match=match) as caught:
        import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert "\n" not in str(caught.value) and not kept


def test_a_pickle_in_a_folder_runs_nothing(resnet, tmp_path):
    state = {"fc.weight": Dangerous(tmp_path / "touched")}
    folder = timm_folder(tmp_path / "there", resnet, weights="pytorch_model.bin", state=state)
    with pytest.raises(EntryError, match=r"asks for posix\.system"):
        import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert not (tmp_path / "touched").exists()


def test_the_stricter_of_two_stated_licences(resnet, tmp_path, kept):
    def licence(given=None, **changes):
        folder = timm_folder(tmp_path / "there", resnet, **changes)
        ask = Request(name="supervised-tiny.noise", zoo=tmp_path, licence=given, origin="somewhere")
        import_timm(f"local-dir:{folder}", ask)
        return kept[-1][1]["licence"].name

    card = "---\nlicense: cc-by-nc-4.0\n---\n# Weights\n"
    assert licence() == "apache-2.0"
    assert licence(card=card) == "cc-by-nc-4.0"
    assert licence(given="CC-BY-NC-4.0", card=card) == "cc-by-nc-4.0"
    assert kept[-1][1]["provenance"]["stated_licences"] == ["apache-2.0", "cc-by-nc-4.0"]
    with pytest.raises(ConfigError, match="state the licence cc-by-nc-4.0: leave --licence MIT out"):
        licence(given="MIT", card=card)
    (tmp_path / "there" / "README.md").unlink()
    with pytest.raises(ConfigError, match="no licence is known"):
        licence(cfg={"license": None})
    assert licence(given="MIT", cfg={"license": "unknown"}) == "MIT"


@pytest.mark.parametrize(
    "card",
    [
        "---\r\nlicense: cc-by-nc-4.0\r\n---\r\n# Weights\r\n",
        "---\rlicense: cc-by-nc-4.0\r---\r",
        "---\nlicense: [cc-by-nc-4.0]\n---\n",
        "---\nlicense:\n- mit\n- cc-by-nc-4.0\n---\n",
        "---\nlicense: other\nlicense_name: cc-by-nc-4.0\n---\n",
        "---\nlicense: cc-by-nc-4.0\n---",
        "\n\n---\nlicense: cc-by-nc-4.0\n---\n",
        "\ufeff--- \nlicense: cc-by-nc-4.0\n--- \n---\nlicense: mit\n",
    ],
)
def test_every_way_to_write_a_card_s_licence(card, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, card=card)
    import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert kept[0][1]["licence"].name == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    "card", ["# Weights\n---\nlicense: gpl\n---\n", "---\n---\n", "---\ntags: [a]\n---\n"]
)
def test_cards_that_state_no_licence(card, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, card=card)
    import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert kept[0][1]["licence"].name == "apache-2.0"


@pytest.mark.parametrize(
    "front",
    [
        "license: cc-by-nc-4.0\ntags: [a\n---\n",
        "license: cc-by-nc-4.0\nwhen: 2024-99-99\n---\n",
        "license: cc-by-nc-4.0\nnumber: !!int x\n---\n",
        "license: cc-by-nc-4.0\ndeep: " + "[" * 5000 + "\n---\n",
        "- license: cc-by-nc-4.0\n---\n",
        "license: cc-by-nc-4.0\n",
    ],
    ids=["syntax", "date", "number", "depth", "list", "open"],
)
def test_a_card_that_cannot_be_read(front, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, card=f"---\n{front}")
    with pytest.raises(
        EntryError, match="front matter of README.md cannot be read.*local-dir:PATH"
    ) as caught:
        import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert "\n" not in str(caught.value) and not kept


@pytest.mark.parametrize("config", [{"license": "cc-by-nc-4.0"}, {"license": ["CC-BY-NC-4.0"]}])
def test_a_licence_beside_pretrained_cfg(config, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, **config)
    import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert kept[0][1]["licence"].name.casefold() == "cc-by-nc-4.0"


def test_the_licence_of_an_entry_of_our_own(resnet, tmp_path, kept):
    contract = dataclasses.replace(LAYOUTS[0].preprocess, size=(32, 32), resize_size=36).to_json()
    folder = timm_folder(
        tmp_path / "there", resnet, embedkit={"licence": NON_COMMERCIAL, "preprocess": contract}
    )
    import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert kept[0][1]["licence"].name == NON_COMMERCIAL


@pytest.mark.parametrize("licence", [5, {"name": "mit"}, "mit: no", ["mit", 5]])
def test_a_stated_licence_that_is_none(licence, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, cfg={"license": licence})
    with pytest.raises(ConfigError, match="that is no text|is no name of a licence"):
        import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert not kept


@pytest.mark.parametrize("key", ["crop_pct", "input_size", "mean", "std"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e-320"])
def test_numbers_that_no_picture_has(key, number, resnet, tmp_path, kept):
    value = "NUMBER" if key == "crop_pct" else ["NUMBER"] * 3
    folder = timm_folder(tmp_path / "there", resnet, cfg={key: value})
    text = (folder / "config.json").read_text().replace('"NUMBER"', number)
    (folder / "config.json").write_text(text)
    try:
        import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    except EntryError as error:
        assert "\n" not in str(error) and not kept
    else:  # a mean of nearly nothing is one
        assert number == "1e-320" and key in ("mean", "std")


@pytest.mark.parametrize(
    "arguments",
    [
        '{"patch_size": 0}',
        '{"num_heads": 0}',
        '{"mlp_ratio": 1e999}',
        '{"img_size": [1]}',
        '{"img_size": 64}',
    ],
)
def test_arguments_that_no_network_has(arguments, vit, tmp_path):
    cfg = {"architecture": "embedkit_vit_t4", "pretrained_cfg": CFG, "model_args": {"img_size": 32}}
    text = json.dumps(cfg).replace('{"img_size": 32}', arguments)
    (tmp_path / "config.json").write_text(text)
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(
        EntryError, match="timm cannot build|the network has|tensors? of the network"
    ) as caught:
        import_timm(f"local-dir:{tmp_path}", Request(name="supervised-tiny.noise", zoo=tmp_path / "zoo"))
    assert "\n" not in str(caught.value) and not (tmp_path / "zoo").exists()


def test_a_network_of_another_picture_size(vit, tmp_path):
    cfg = {**CFG, "input_size": [3, 64, 64]}
    config = {"architecture": "embedkit_vit_t4", "pretrained_cfg": cfg}
    config["model_args"] = {"img_size": 32, "global_pool": "token", "fc_norm": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(EntryError, match="embedkit_vit_t4 does not take pictures of 3x64x64"):
        import_timm(f"local-dir:{tmp_path}", Request(name="supervised-tiny.noise", zoo=tmp_path / "zoo"))


def test_preprocessing_is_timm_s_own():
    """Against timm's transform, for what the table of its weights holds."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    picture = synthetic_pictures(1, height=300, width=420)[0]
    for changes in (
        {"input_size": (3, 224, 224), "crop_pct": 0.875},
        {"input_size": (3, 224, 224), "crop_pct": 0.95, "interpolation": "bicubic"},
        {"input_size": (3, 96, 128), "crop_pct": 1.0, "crop_mode": "squash"},
        {"input_size": (3, 160, 160), "crop_pct": 1.0, "crop_mode": "border", "mean": (0.5, 0.5, 0.5)},
    ):
        cfg = {**CFG, **changes}
        preprocess = preprocess_of(cfg, "here")
        transform = create_transform(**resolve_data_config({}, pretrained_cfg=cfg), is_training=False)
        theirs = transform(Image.fromarray(picture)).numpy()
        pixels = read_pixels(picture, preprocess, decode="exact")
        mean, std = (np.reshape(cfg[key], (3, 1, 1)) for key in ("mean", "std"))
        found = (pixels / 255 - mean) / std
        assert found.shape == theirs.shape
        # Equal but for a row or column of the crop, and the last digit of a resampled pixel.
        assert np.quantile(np.abs(found - theirs), 0.95) < 0.05, changes


def test_most_of_timm_s_weights_have_a_contract():
    kept, refused = 0, []
    for name in timm.list_models(pretrained=True):
        try:
            preprocess_of(timm.models.get_pretrained_cfg(name).to_dict(), name)
            kept += 1
        except EntryError as error:
            refused.append(str(error))
    assert kept > 50 * len(refused)
    assert all("cannot state this" in reason for reason in refused), refused


@pytest.fixture
def hub(servers, monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    server = servers.Hub()
    for variable in ("HF_TOKEN", "HF_HUB_OFFLINE", "EMBEDKIT_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("EMBEDKIT_TIMEOUT", "5")
    monkeypatch.setattr("embedkit.hub.download.PAUSE", 0.01)
    yield server
    server.close()


def put(hub, servers, repository, folder, private=False):
    repo = hub.repos[repository] = servers.Repo(private=private)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repo.commits.append(("a" * 40, files))
    repo.tags["v1"] = "a" * 40
    return repo


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_repository_of_the_hub(weights, hub, servers, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, weights=weights, card="---\nlicense: apache-2.0\n---\n")
    repo = put(hub, servers, "team/tiny", folder)
    repo.commits.append(("b" * 40, {"README.md": b"moved away"}))
    hub.cdn.faults = ["cut", "503"]
    ask = Request(name="supervised-tiny.noise", zoo=tmp_path)
    import_timm("hf-hub:team/tiny@v1", ask)
    network, more = kept[0]
    for key, value in resnet.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value)
    assert more["provenance"]["commit"] == "a" * 40 and more["licence"].name == "apache-2.0"
    assert more["provenance"]["sha256"] == sha256_of(folder / weights)
    with pytest.raises(EntryError, match="has no config.json: it is not of timm's layout"):
        import_timm("hf-hub:team/tiny", ask)


def test_a_repository_that_does_not_give(hub, servers, resnet, tmp_path, kept):
    ask = Request(name="supervised-tiny.noise", zoo=tmp_path)
    with pytest.raises(PlaceError, match="no such repository; a private one asks for a token"):
        import_timm("hf-hub:team/none", ask)
    put(hub, servers, "team/tiny", timm_folder(tmp_path / "there", resnet), private=True)
    with pytest.raises(PlaceError, match="no such repository"):
        import_timm("hf-hub:team/tiny", ask)
    import_timm("hf-hub:team/tiny", ask, token="hf_reader")
    assert len(kept) == 1
    hub.repos["team/tiny"].private = False
    with pytest.raises(PlaceError, match="no such repository at v9"):
        import_timm("hf-hub:team/tiny@v9", ask)
    hub.cdn.faults = ["corrupt"] * 9
    with pytest.raises(IntegrityError):
        import_timm("hf-hub:team/tiny", ask)
    for address in ("tiny", "a/b/c", "../a", "a/..", "a/b@", "-a/b", "a b/c"):
        with pytest.raises(ConfigError, match="expected hf-hub:org/name"):
            import_timm(f"hf-hub:{address}", ask)


NAMED = """
import sys
import torch
from embedkit import commands
torch.set_num_threads(1)
sys.argv = ["embedkit", "import", "test_resnet.r160_in1k", "--name", "supervised-test.in1k", "--zoo", sys.argv[1]]
commands.main()
"""


def test_a_name_of_timm_s_with_the_genuine_client(hub, servers, tmp_path):
    """timm takes the client's endpoint, which the client reads when it is imported: a process of its own."""
    network = random_network("test_resnet")
    state = {**network.state_dict(), "fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)}
    folder = tmp_path / "there"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    put(hub, servers, "timm/test_resnet.r160_in1k", folder)

    def importing():
        return subprocess.run(
            [sys.executable, "-c", NAMED, str(tmp_path / "zoo")],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    done = importing()
    assert done.returncode == 0, done.stderr
    config = read_config(tmp_path / "zoo" / "supervised-test.in1k")
    assert config.architecture == "test_resnet" and config.licence == "apache-2.0"
    assert config.preprocess.size == (160, 160) and config.preprocess.resize_size == 168  # floor(160 / 0.95)
    assert (
        config.provenance["weights"] == "timm/test_resnet.r160_in1k"
        and config.provenance["commit"] == "a" * 40
    )
    assert config.provenance["sha256"] == sha256_of(folder / "model.safetensors")
    rows = load_encoder(tmp_path / "zoo" / "supervised-test.in1k", threads=1).encode(
        PICTURES, normalize=False, decode="exact"
    )
    assert cosines(rows, embed(network, config.preprocess)).min() >= 0.9999


def test_names_without_weights(tmp_path):
    ask = Request(name="supervised-tiny.noise", zoo=tmp_path)
    with pytest.raises(ConfigError, match="nor a name of timm's; the nearest of timm's names are resnet"):
        import_timm("resnet5O.a1_in1k", ask)
    with pytest.raises(ConfigError, match="timm has no weights of this name"):
        import_timm("embedkit_r10", ask)
    with pytest.raises(SourceError, match="no such folder"):
        import_timm(f"local-dir:{tmp_path}/none", ask)
