"""timm's names, repositories and folders: their weights, contract and licenses, or one clear refusal."""

import dataclasses
import json
import os
import subprocess
import sys

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
from safetensors.torch import load_file, save_file

from embedkit import load_encoder
from embedkit.authoring.contract import Contract
from embedkit.authoring.golden import synthetic_images
from embedkit.authoring.import_request import Request
from embedkit.errors import ConfigError, EntryError, IntegrityError, SourceError, ZooError
from embedkit.images.transform import read_pixels
from embedkit.training.importers.checkpoints import import_checkpoint
from embedkit.training.importers.layouts import LAYOUTS
from embedkit.training.importers.timm_models import import_timm, preprocess_of

# torch.onnx warns of its own deprecations while it traces timm's ViTs.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

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
    assert config.license == "apache-2.0" and config.architecture == "embedkit_r10"
    assert config.preprocess.resize_size == 36 and config.preprocess.mean == (
        0.5,
        0.4,
        0.3,
    )  # floor(32 / 0.875)
    assert config.provenance["removed"] == ["fc.bias", "fc.weight"]
    assert config.provenance["sha256"] == sha256_of(folder / "model.safetensors")
    rows = load_encoder(done.folder, threads=1).encode(IMAGES, normalize=False, decode="exact")
    assert cosines(rows, embed(resnet, config.preprocess)).min() >= 0.9999


def test_an_entry_of_our_own_is_such_a_folder(resnet, tmp_path, request):
    torch.save({"teacher": under("backbone.", resnet.state_dict())}, tmp_path / "dino.pth")
    done = import_checkpoint(
        tmp_path / "dino.pth",
        Request(name="dino-tiny.noise", zoo=tmp_path / "zoo", contract=Contract(image_size=32)),
        architecture="embedkit_r10",
    )
    kept = request.getfixturevalue("kept")
    import_timm(f"local-dir:{done.folder}", Request(name="dino-again.noise", zoo=tmp_path / "zoo"))
    config, (network, more) = read_config(done.folder), kept[0]
    assert more["preprocess"] == config.preprocess and more["architecture"] == config.architecture
    assert more["license"].name == "apache-2.0"  # as timm writes it
    assert more["model_args"] == config.timm["model_args"] == {"global_pool": "avg", "in_chans": 3}
    rows = load_encoder(done.folder, threads=1).encode(IMAGES, normalize=False, decode="exact")
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


def test_the_stricter_of_two_stated_licenses(resnet, tmp_path, kept):
    def license(given=None, **changes):
        folder = timm_folder(tmp_path / "there", resnet, **changes)
        ask = Request(name="supervised-tiny.noise", zoo=tmp_path, license=given, origin="somewhere")
        import_timm(f"local-dir:{folder}", ask)
        return kept[-1][1]["license"].name

    card = "---\nlicense: cc-by-nc-4.0\n---\n# Weights\n"
    assert license() == "apache-2.0"
    assert license(card=card) == "cc-by-nc-4.0"
    assert license(given="CC-BY-NC-4.0", card=card) == "cc-by-nc-4.0"
    assert kept[-1][1]["provenance"]["stated_licenses"] == ["apache-2.0", "cc-by-nc-4.0"]
    with pytest.raises(ConfigError, match="state the license cc-by-nc-4.0: leave --license MIT out"):
        license(given="MIT", card=card)
    (tmp_path / "there" / "README.md").unlink()
    with pytest.raises(ConfigError, match="no license is known"):
        license(cfg={"license": None})
    assert license(given="MIT", cfg={"license": "unknown"}) == "MIT"


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
def test_every_way_to_write_a_card_s_license(card, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, card=card)
    import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert kept[0][1]["license"].name == "cc-by-nc-4.0"


@pytest.mark.parametrize(
    "card", ["# Weights\n---\nlicense: gpl\n---\n", "---\n---\n", "---\ntags: [a]\n---\n"]
)
def test_cards_that_state_no_license(card, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, card=card)
    import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert kept[0][1]["license"].name == "apache-2.0"


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
def test_a_license_beside_pretrained_cfg(config, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, **config)
    import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert kept[0][1]["license"].name.casefold() == "cc-by-nc-4.0"


def test_the_license_of_an_entry_of_our_own(resnet, tmp_path, kept):
    contract = dataclasses.replace(LAYOUTS[0].preprocess, size=(32, 32), resize_size=36).to_json()
    folder = timm_folder(
        tmp_path / "there", resnet, embedkit={"license": NON_COMMERCIAL, "preprocess": contract}
    )
    import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert kept[0][1]["license"].name == NON_COMMERCIAL


@pytest.mark.parametrize("license", [5, {"name": "mit"}, "mit: no", ["mit", 5]])
def test_a_stated_license_that_is_none(license, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, cfg={"license": license})
    with pytest.raises(ConfigError, match="that is no text|is not the name of a license"):
        import_timm(f"local-dir:{folder}", Request(name="supervised-tiny.noise", zoo=tmp_path))
    assert not kept


@pytest.mark.parametrize("key", ["crop_pct", "input_size", "mean", "std"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e-320"])
def test_numbers_that_no_image_has(key, number, resnet, tmp_path, kept):
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
        EntryError, match="timm cannot build|the network has|tensors? of the network|beyond any float"
    ) as caught:
        import_timm(f"local-dir:{tmp_path}", Request(name="supervised-tiny.noise", zoo=tmp_path / "zoo"))
    assert "\n" not in str(caught.value) and not (tmp_path / "zoo").exists()


def test_a_network_of_another_image_size(vit, tmp_path):
    cfg = {**CFG, "input_size": [3, 64, 64]}
    config = {"architecture": "embedkit_vit_t4", "pretrained_cfg": cfg}
    config["model_args"] = {"img_size": 32, "global_pool": "token", "fc_norm": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(EntryError, match="embedkit_vit_t4 does not take images of 3x64x64"):
        import_timm(f"local-dir:{tmp_path}", Request(name="supervised-tiny.noise", zoo=tmp_path / "zoo"))


def test_preprocessing_is_timm_s_own():
    """Against timm's transform, for what the table of its weights holds."""
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    image = synthetic_images(1, height=300, width=420)[0]
    for changes in (
        {"input_size": (3, 224, 224), "crop_pct": 0.875},
        {"input_size": (3, 224, 224), "crop_pct": 0.95, "interpolation": "bicubic"},
        {"input_size": (3, 96, 128), "crop_pct": 1.0, "crop_mode": "squash"},
        {"input_size": (3, 160, 160), "crop_pct": 1.0, "crop_mode": "border", "mean": (0.5, 0.5, 0.5)},
    ):
        cfg = {**CFG, **changes}
        preprocess = preprocess_of(cfg, "here")
        transform = create_transform(**resolve_data_config({}, pretrained_cfg=cfg), is_training=False)
        theirs = transform(Image.fromarray(image)).numpy()
        pixels = read_pixels(image, preprocess, decode="exact")
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


def put(hub, repository, folder, private=False):
    repo = hub.repos[repository] = servers.Repo(private=private)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    repo.commits.append(("a" * 40, files))
    repo.tags["v1"] = "a" * 40
    return repo


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_repository_of_the_hub(weights, hub, resnet, tmp_path, kept):
    folder = timm_folder(tmp_path / "there", resnet, weights=weights, card="---\nlicense: apache-2.0\n---\n")
    repo = put(hub, "team/tiny", folder)
    repo.commits.append(("b" * 40, {"README.md": b"moved away"}))
    hub.cdn.faults = ["cut", "503"]
    ask = Request(name="supervised-tiny.noise", zoo=tmp_path)
    import_timm("hf-hub:team/tiny@v1", ask)
    network, more = kept[0]
    for key, value in resnet.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value)
    assert more["provenance"]["commit"] == "a" * 40 and more["license"].name == "apache-2.0"
    assert more["provenance"]["sha256"] == sha256_of(folder / weights)
    with pytest.raises(EntryError, match="has no config.json: it is not of timm's layout"):
        import_timm("hf-hub:team/tiny", ask)


def test_a_repository_that_does_not_give(hub, resnet, tmp_path, kept):
    ask = Request(name="supervised-tiny.noise", zoo=tmp_path)
    with pytest.raises(ZooError, match="no such repository; a private one asks for a token"):
        import_timm("hf-hub:team/none", ask)
    put(hub, "team/tiny", timm_folder(tmp_path / "there", resnet), private=True)
    with pytest.raises(ZooError, match="no such repository"):
        import_timm("hf-hub:team/tiny", ask)
    import_timm("hf-hub:team/tiny", ask, token="hf_reader")
    assert len(kept) == 1
    hub.repos["team/tiny"].private = False
    with pytest.raises(ZooError, match="no such repository at v9"):
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
from embedkit import cli
torch.set_num_threads(1)
sys.argv = ["embedkit", "import", "test_resnet.r160_in1k", "--name", "supervised-test.in1k", "--to", sys.argv[1]]
cli.main()
"""


def test_a_name_of_timm_s_with_the_genuine_client(hub, tmp_path):
    """timm takes the client's endpoint, which the client reads when it is imported: a process of its own."""
    network = random_network("test_resnet")
    state = {**network.state_dict(), "fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)}
    folder = tmp_path / "there"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    put(hub, "timm/test_resnet.r160_in1k", folder)

    def importing():
        return subprocess.run(
            [sys.executable, "-c", NAMED, str(tmp_path / "zoo")],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    done = importing()
    assert done.returncode == 0, done.stderr
    config = read_config(tmp_path / "zoo" / "supervised-test.in1k")
    assert config.architecture == "test_resnet" and config.license == "apache-2.0"
    assert config.preprocess.size == (160, 160) and config.preprocess.resize_size == 168  # floor(160 / 0.95)
    assert (
        config.provenance["weights"] == "timm/test_resnet.r160_in1k"
        and config.provenance["commit"] == "a" * 40
    )
    assert config.provenance["sha256"] == sha256_of(folder / "model.safetensors")
    rows = load_encoder(tmp_path / "zoo" / "supervised-test.in1k", threads=1).encode(
        IMAGES, normalize=False, decode="exact"
    )
    assert cosines(rows, embed(network, config.preprocess)).min() >= 0.9999


def test_names_without_weights(tmp_path):
    ask = Request(name="supervised-tiny.noise", zoo=tmp_path)
    with pytest.raises(ConfigError, match="nor a name of timm's; did you mean 'resnet"):
        import_timm("resnet5O.a1_in1k", ask)
    with pytest.raises(ConfigError, match="timm has no weights of this name"):
        import_timm("embedkit_r10", ask)
    with pytest.raises(SourceError, match="no such folder"):
        import_timm(f"local-dir:{tmp_path}/none", ask)


STARTED = """
import sys
import torch
from safetensors.torch import load_file, save_file
from embedkit.training.parents import find_parent
parent = find_parent("timm:test_resnet.r160_in1k")
print(parent.record, parent.model_args, parent.preprocess.size)
save_file(dict(parent.state), sys.argv[1])
"""


def test_a_run_starts_from_a_name_of_timm_s(hub, tmp_path):
    network = random_network("test_resnet")
    state = {**network.state_dict(), "fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)}
    folder = tmp_path / "there"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    put(hub, "timm/test_resnet.r160_in1k", folder)
    done = subprocess.run(
        [sys.executable, "-c", STARTED, str(tmp_path / "found.safetensors")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    assert all(torch.equal(found[name], value) for name, value in state.items())
    for part in (
        "'license': 'apache-2.0'",
        sha256_of(folder / "model.safetensors"),
        "'global_pool': 'avg'",
        "(160, 160)",
    ):
        assert part in done.stdout
