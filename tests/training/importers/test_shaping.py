"""Networks of timm's own names: state dicts, another pooling, another image size, and what is told about them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

import numpy as np
from importing import IMAGES, random_network, read_config
from timm.layers import resample_abs_pos_embed

from embedkit.authoring.contract import Contract
from embedkit.authoring.import_request import Request
from embedkit.authoring.recommended import RECOMMENDED
from embedkit.encoder import load_encoder
from embedkit.errors import ConfigError, EntryError, UnreachableError
from embedkit.hub.licenses import is_open
from embedkit.images.transform import read_pixels
from embedkit.model.preprocess import Preprocess
from embedkit.training.importers.checkpoints import import_checkpoint
from embedkit.training.importers.shaping import pool_args, set_image_size, traps
from embedkit.training.importers.timm_models import import_timm

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

#: timm's own for tests: 160 pixels, patches of 16, a class token, D = 64.
VIT = "test_vit"
SQUASH = Contract(mean=(0.5,), std=(0.25,), resize="squash")


@pytest.fixture(scope="module")
def vit():
    network = random_network(VIT)
    network.pos_embed.data.normal_(0, 0.5)
    return network


def request(folder, **more):
    facts = {"name": "own-vit.noise", "license": "MIT", "contract": SQUASH}
    return Request(zoo=folder / "zoo", **{**facts, **more})


def saved(folder, network, *, prefix="", place="", **more):
    state = {prefix + key: value for key, value in network.state_dict().items()}
    path = folder / "model_best.pth.tar"
    torch.save({place: state, "epoch": 3, **more} if place else state, path)
    return path


def inputs(preprocess):
    """Normalized pixels by hand."""
    pixels = np.stack([read_pixels(image, preprocess, decode="exact") for image in IMAGES])
    mean, std = (np.float32(values).reshape(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return torch.from_numpy((pixels / np.float32(255) - mean) / std)


def assert_rows(done, expected):
    rows = load_encoder(done.folder, threads=1).encode(IMAGES, normalize=False, decode="exact")
    np.testing.assert_allclose(rows, expected.numpy(), atol=2e-3 * float(expected.abs().max()))


# --- state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "prefix"), [("", ""), ("state_dict", "module."), ("state_dict_ema", "module._orig_mod.")]
)
def test_where_training_scripts_put_their_state_dict(place, prefix, resnet, tmp_path, kept):
    head = {"fc.weight": torch.ones(10, 256), "fc.bias": torch.ones(10)}
    state = {prefix + key: value for key, value in {**resnet.state_dict(), **head}.items()}
    path = tmp_path / "a.pth"
    other = {"state_dict": {"module.x": torch.ones(1)}} if place == "state_dict_ema" else {}
    torch.save({**other, place: state} if place else state, path)
    import_checkpoint(path, request(tmp_path), layout="timm", architecture="embedkit_r10")
    network, more = kept[0]
    for key, value in resnet.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value)
    assert more["preprocess"].size == (28, 28) and more["preprocess"].resize == "squash"
    assert more["license"].name == "MIT" and more["provenance"]["removed"] == ["fc.bias", "fc.weight"]


def test_the_mean_of_the_patches_in_place_of_the_class_token(vit, tmp_path):
    """timm would put a norm without weights behind its mean: here the norm stays before it."""
    path = saved(tmp_path, vit, place="model")
    arguments = {"layout": "timm", "architecture": VIT}
    done = import_checkpoint(path, request(tmp_path, pool="mean"), **arguments)
    config = read_config(done.folder)
    with torch.inference_mode():
        tokens = vit.forward_features(inputs(config.preprocess))
    assert tokens.shape == (8, 101, 64)
    assert_rows(done, tokens[:, 1:].mean(1))
    assert config.timm["model_args"]["global_pool"] == "avg" and config.timm["model_args"]["fc_norm"] is False
    other = import_checkpoint(path, request(tmp_path, pool="cls", name="own-cls.noise"), **arguments)
    assert_rows(other, tokens[:, 0])


def test_position_embeddings_are_resampled_for_another_size(vit, tmp_path):
    folder = tmp_path / "timm"
    folder.mkdir()
    from safetensors.torch import save_file

    cfg = {
        "input_size": [3, 160, 160],
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "num_classes": 0,
        "license": "mit",
        "classifier": "head",
    }
    config = {"architecture": VIT, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(vit.state_dict(), folder / "model.safetensors")
    done = import_timm(
        f"local-dir:{folder}", request(tmp_path, license=None, contract=Contract(image_size=96))
    )
    assert "position embeddings of 160x160 pixels were resampled for 96x96" in done.notes
    found = read_config(done.folder)
    assert found.preprocess.size == (96, 96) and found.timm["model_args"]["img_size"] == [96, 96]
    twin = random_network(VIT, img_size=96)
    state = vit.state_dict()
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [6, 6], [10, 10])
    twin.load_state_dict(state, strict=True)
    with torch.inference_mode():
        assert_rows(done, twin(inputs(found.preprocess)))


def test_what_does_not_fit_is_refused(vit, resnet, tmp_path):
    path = saved(tmp_path, vit)

    def refuse(match, error=ConfigError, *, layout="timm", architecture=VIT, **more):
        with pytest.raises(error, match=match) as caught:
            import_checkpoint(path, request(tmp_path, **more), layout=layout, architecture=architecture)
        assert "\n" not in str(caught.value) and not (tmp_path / "zoo").exists()

    refuse("give --architecture, timm's name of the network", architecture=None)
    refuse("no license is known", license=None)
    refuse("expected a multiple of the patch, 16 pixels", contract=Contract(image_size=33))
    refuse("expected mean or cls for a network of timm", pool="none")
    refuse("--layout 'tim': expected timm, or one of simsiam", layout="tim")
    refuse("--resize 'fit': expected shortest, longest, squash", contract=Contract(resize="fit"))
    refuse("tensors of the network are missing", EntryError, architecture="embedkit_r10")
    torch.save({"epoch": 3}, path)
    refuse("expected tensors by name", EntryError)
    with pytest.raises(ConfigError, match="its pooling is avg, and --pool cls is not possible"):
        pool_args(resnet, "cls", "a")


# --- licenses, and no network -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("license", "what"), [("cc-by-nc-4.0", "forbids commercial use"), ("dinov3-license", "has custom terms")]
)
def test_weights_under_a_closed_license_are_asked_for_first(license, what, hub, resnet, tmp_path, kept):
    from tests.training.importers.test_timm_models import put, timm_folder

    put(hub, "team/tiny", timm_folder(tmp_path / "there", resnet, cfg={"license": license}))
    ask = {"license": None, "contract": Contract(), "name": "supervised-tiny.noise"}
    with pytest.raises(ConfigError, match=f"under {license}, which {what}.*give --accept-license"):
        import_timm("hf-hub:team/tiny", request(tmp_path, **ask))
    assert not [path for path in hub.paths() if "model.safetensors" in path], (
        "no byte of weights was asked for"
    )
    import_timm("hf-hub:team/tiny", request(tmp_path, **ask, accept_license=True))
    assert kept[0][1]["license"].name == license


def test_a_name_of_timm_s_under_a_closed_license(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing may be asked for
    with pytest.raises(ConfigError, match="under dinov3-license, which has custom terms"):
        import_timm("vit_small_patch16_dinov3.lvd1689m", request(tmp_path, license=None))


def test_no_network_is_said_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="127.0.0.1:9|no answer"):
        import_timm("hf-hub:team/tiny", request(tmp_path, license=None))
    # Three pauses of 1.75 seconds in all; the client of the Hub would try for minutes.
    assert time.monotonic() - began < 30


def test_offline_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("hf-hub:team/tiny", "test_vit.r160_in1k"):
        with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids"):
            import_timm(source, request(tmp_path, license=None))


# --- what is told -----------------------------------------------------------------------------------------


def told(architecture, *, size=None, pooled=False, **facts):
    cfg = timm.models.get_pretrained_cfg(architecture)
    with torch.device("meta"):
        network = timm.create_model(architecture, num_classes=0)
    native = tuple(cfg.input_size[1:])
    preprocess = Preprocess(
        size=size or native, resize_size=native[0], mean=(0.5,) * 3, std=(0.5,) * 3, **facts
    )
    sentences = traps(
        network, architecture, preprocess, native=native, pooled=pooled, projection=cfg.num_classes
    )
    return " | ".join(sentences)


def test_traps_of_the_networks_that_have_them():
    dino = told("vit_small_patch14_reg4_dinov2")
    assert "the embedding is the class token; --pool mean" in dino and "--image-size 224" in dino
    assert "5.3 times as much" in dino  # (518 / 224) ** 2 = 5.35
    assert "class token" not in told("vit_small_patch14_reg4_dinov2", pooled=True)
    small = told("vit_small_patch14_reg4_dinov2", size=(224, 224))
    assert "embeddings of 518x518 pixels were resampled for 224x224" in small and "times as" not in small
    assert "--pool cls gives the class token, which is what the authors of DINOv3 take" in told(
        "vit_small_patch16_dinov3"
    )
    siglip = told("vit_base_patch16_siglip_224")
    assert "attention pooling" in siglip and "projection" not in siglip
    pe = told("vit_pe_core_tiny_patch16_384")
    assert "the projection to 512 numbers is left out" in pe
    assert "squashed to 512x512, and not cropped" in told("vit_small_patch16_lingbot", resize="squash")
    assert told("mobilenetv4_conv_medium") == told("tiny_vit_5m_224") == ""


@pytest.mark.parametrize("one", RECOMMENDED, ids=lambda one: one.name)
def test_the_list_says_what_timm_says(one):
    cfg = timm.models.get_pretrained_cfg(one.name)
    with torch.device("meta"):
        network = timm.create_model(one.architecture, num_classes=0)
    assert (cfg.license, cfg.input_size) == (one.license, (3, one.native, one.native))
    assert network.num_features == one.dim
    count = sum(tensor.numel() for tensor in network.parameters()) / 1e6
    assert abs(count - one.parameters) <= 0.051
    pool = getattr(network, "global_pool", None) or network.head.global_pool
    pool = pool if isinstance(pool, str) else pool.pool_type
    assert {"avg": "mean", "token": "class token", "map": "attention"}[pool] == one.pooling
    if one.pixels != one.native:
        patch = network.patch_embed.patch_size[0]
        assert one.pixels % patch == 0 and hasattr(network, "set_input_size")


def test_the_list_has_a_dozen_of_all_sizes(run):
    assert len(RECOMMENDED) == len({one.name for one in RECOMMENDED}) == 12
    assert sum(is_open(one.license) for one in RECOMMENDED) == 11
    status, out, _ = run("import", "--list", "--json")
    assert status == 0 and [one["name"] for one in json.loads(out)] == [one.name for one in RECOMMENDED]
    status, out, err = run("import", "--list")
    assert out.count("\n") == 13 and "224 of 518" in out and "--image-size 224" in err
    assert run("import")[0] == 2 and run("import", "a.onnx")[0] == 2


def test_the_list_needs_no_torch(tmp_path):
    code = (
        "import sys; sys.modules.update(torch=None, timm=None, onnx=None)\n"
        "from embedkit.cli import main; sys.argv = ['embedkit', 'import', '--list']; main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ)
    )
    assert ran.returncode == 0 and "vit_small_patch14_reg4_dinov2.lvd142m" in ran.stdout, ran.stderr


def test_a_network_of_convolutions_takes_any_size(resnet):
    assert set_image_size(resnet, (32, 32), (48, 48)) == {}
