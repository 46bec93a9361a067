"""The writer of entries: what it promises of every file, and what it refuses."""

import copy
import io
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
timm = pytest.importorskip("timm")
yaml = pytest.importorskip("yaml")

from PIL import Image
from safetensors.torch import load_file, save
from torch import nn

from embedkit._io import atomic
from embedkit.authoring.golden import npz_bytes, sample_pixels, synthetic_images
from embedkit.authoring.onnx_export import export_onnx
from embedkit.cli.export import export
from embedkit.encoder import load_encoder
from embedkit.errors import (
    ConfigError,
    EntryError,
    MissingDependencyError,
    OutputError,
    ParityError,
)
from embedkit.images.transform import read_pixels
from embedkit.model.config import EntryConfig
from embedkit.model.layout import CARD, CONFIG, GOLDEN, GRAPH, INDEX, MANIFEST, WEIGHTS, sha256_hex
from embedkit.model.manifest import Manifest
from embedkit.model.onnx_guard import check_graph
from embedkit.model.preprocess import Preprocess
from embedkit.training.export import writer as exporter
from embedkit.training.export.writer import timm_config, update_index, write_entry

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESS = Preprocess(size=(32, 32), resize="squash", mean=MEAN, std=STD)
SAMPLES = sample_pixels(PREPROCESS)
GRAPHS: dict = {}


class Tiny(nn.Module):
    """Exports in a second: convolution, BatchNorm, an integer and a boolean buffer, Linear."""

    def __init__(self, dim: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=4, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, dim)
        self.register_buffer("order", torch.arange(dim, dtype=torch.int32).flip(0))
        self.register_buffer("flag", torch.tensor([True]))

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean(dim=(2, 3))
        return self.fc(x)[:, self.order.long()]


def randomised(network: nn.Module) -> nn.Module:
    """In eval mode, with BatchNorm statistics and affine parameters that are not those of a fresh layer."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.uniform_(low, high, generator=generator)
            module.num_batches_tracked.fill_(1000)
    return network.eval()


def config_of(dim: int = 8, **changes) -> EntryConfig:
    facts = {
        "architecture": "tiny",
        "outputs": {"embedding": (dim,)},
        "method": "supervised",
        "dim": dim,
        "preprocess": PREPROCESS,
        "data": "synthetic images",
        "license": "Apache-2.0",
    }
    return EntryConfig(**{**facts, **changes})


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(Tiny())


def write_tiny(
    zoo: Path, name: str = "supervised-tiny.synthetic", network: nn.Module | None = None, **changes
):
    folder = zoo / name
    write_entry(folder, network=network or tiny(), config=config_of(**changes), samples=SAMPLES)
    return folder


TIMM_NETWORKS = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24]}),
    "vit": (
        "vit_tiny_patch16_224",
        {
            "img_size": [32, 32],
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 2,
            "global_pool": "avg",
        },
    ),
}


@pytest.fixture(scope="module", params=sorted(TIMM_NETWORKS))
def written(request, tmp_path_factory):
    """An entry of a timm network: (folder, the network, its configuration)."""
    architecture, model_args = TIMM_NETWORKS[request.param]
    torch.manual_seed(0)
    network = randomised(timm.create_model(architecture, num_classes=0, **model_args))
    config = config_of(
        network.num_features,
        architecture=architecture,
        timm=timm_config(network, PREPROCESS, model_args=model_args, tag="synthetic", license="Apache-2.0"),
    )
    folder = tmp_path_factory.mktemp("zoo") / f"supervised-{request.param}.synthetic"
    write_entry(folder, network=network, config=config, samples=SAMPLES)
    return folder, network, config


@pytest.fixture
def quick(monkeypatch):
    """Exports equal weights once: for tests of what happens around the graph."""
    original = exporter.export_graph

    def cached(network, preprocess, weights, metadata):
        key = (type(network), sha256_hex(weights), str(metadata))
        if key not in GRAPHS:
            GRAPHS[key] = original(network, preprocess, weights, metadata)
        return GRAPHS[key]

    monkeypatch.setattr(exporter, "export_graph", cached)


@pytest.fixture(scope="module")
def tiny_entry(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def session(folder: Path):
    """ONNX Runtime's own way to external data, by path: not the one that the writer checked with."""
    return ort.InferenceSession(str(folder / GRAPH), providers=["CPUExecutionProvider"])


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def half(network: nn.Module) -> nn.Module:
    """The network with its weights rounded to float16, computing in float32."""
    return copy.deepcopy(network).half().float()


# -- the graph and its weights ---------------------------------------------------------------------------------


def test_every_floating_tensor_is_external_under_its_name(written):
    folder, network, _ = written
    graph, weights = (folder / GRAPH).read_bytes(), (folder / WEIGHTS).read_bytes()
    external = {tensor.name: tensor for tensor in check_graph(graph, weights, "entry")}
    floating = {name: t for name, t in network.state_dict().items() if t.is_floating_point()}
    assert set(external) == set(floating)
    for name, tensor in floating.items():
        place = external[name]
        stored = np.frombuffer(weights, "<f2", place.length // 2, place.offset).reshape(place.shape)
        np.testing.assert_array_equal(stored, tensor.half().numpy())
    assert len(graph) < 1_000_000


def test_versions_names_and_batch_axis(written):
    folder, _, config = written
    model = onnx.load(folder / GRAPH, load_external_data=False)
    assert model.ir_version == 10
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    (pixels,), (embedding,) = model.graph.input, model.graph.output
    assert pixels.name == "pixels" and pixels.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    dims = [d.dim_param or d.dim_value for d in pixels.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, 32, 32]
    assert embedding.name == "embedding" and embedding.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [d.dim_param or d.dim_value for d in embedding.type.tensor_type.shape.dim] == ["batch", config.dim]
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties == {
        "schema": "1",
        "method": "supervised",
        "dim": str(config.dim),
        "weights_sha256": sha256_hex((folder / WEIGHTS).read_bytes()),
        "torch": torch.__version__,
        "onnx": onnx.__version__,
    }


def test_graph_tells_nothing_of_the_machine(written):
    folder, _, _ = written
    model = onnx.load(folder / GRAPH, load_external_data=False)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert b".py" not in model.SerializeToString()


def test_normalizes_inside_and_does_not_depend_on_the_batch(written):
    folder, network, _ = written
    runtime = session(folder)
    # The definition, step by step, in float64: nothing of the writer's scale and shift.
    x = (SAMPLES[:32].astype(np.float64) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    with torch.inference_mode():
        expected = half(network)(torch.from_numpy(x).float()).numpy()
    rows = {
        size: np.concatenate(
            [runtime.run(None, {"pixels": SAMPLES[at : at + size]})[0] for at in range(0, 32, size)]
        )[:32]
        for size in (1, 2, 7, 32)
    }
    norms = np.linalg.norm(rows[32], axis=1)
    assert np.abs(norms - 1).min() > 1e-3, "the graph must not normalize its rows"
    np.testing.assert_allclose(unit(rows[32]), unit(expected), atol=1e-5)
    for size in (1, 2, 7):
        np.testing.assert_allclose(unit(rows[size]), unit(rows[32]), atol=1e-6)


def test_timm_loads_the_folder_strictly(written):
    folder, network, _ = written
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    expected = {
        name: (t.half().float() if t.is_floating_point() else t) for name, t in network.state_dict().items()
    }
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    # timm's own transform on an image of the contract's size, against the runtime from the same file.
    image = synthetic_images(1, seed=5, height=32, width=32)[0]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(loaded))
    with torch.inference_mode():
        theirs = loaded(transform(Image.fromarray(image))[None]).numpy()
    ours = load_encoder(str(folder)).encode(image)
    assert (unit(theirs) * unit(np.atleast_2d(ours))).sum() > 0.99999


def test_config_describes_the_network(written):
    folder, _, config = written
    data = json.loads((folder / CONFIG).read_bytes())
    assert data["num_classes"] == 0 and data["num_features"] == config.dim
    assert data["model_args"]["global_pool"] == data["global_pool"] == "avg"
    assert data["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert data["pretrained_cfg"]["fixed_input_size"] is (config.architecture != "resnet18")
    assert data["pretrained_cfg"]["custom_load"] is False and data["pretrained_cfg"]["num_classes"] == 0
    assert EntryConfig.from_json((folder / CONFIG).read_bytes()).preprocess == PREPROCESS


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        ({"resize": "shortest", "resize_size": 40}, (0.8, "center")),
        ({"resize": "longest", "resize_size": 32}, (1.0, "border")),
        ({"resize": "squash"}, (1.0, "squash")),
    ],
)
def test_timm_config_says_how_to_crop(resize, expected):
    preprocess = Preprocess(size=(32, 32), mean=MEAN, std=STD, **resize)
    cfg = timm_config(tiny(), preprocess, model_args={}, tag="x", license="MIT")["pretrained_cfg"]
    assert (cfg["crop_pct"], cfg["crop_mode"]) == expected


def test_integer_and_boolean_buffers_keep_their_type(tiny_entry):
    stored = load_file(tiny_entry / WEIGHTS)
    assert stored["bn.num_batches_tracked"].dtype == torch.int64 and stored["bn.num_batches_tracked"] == 1000
    assert stored["order"].dtype == torch.int32 and stored["order"].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert stored["flag"].dtype == torch.bool
    assert stored["conv.weight"].dtype == torch.float16


def test_a_value_may_be_called_as_a_weight(tmp_path):
    class Named(nn.Module):
        """torch calls the results of its two steps `mul` and `mean`."""

        def __init__(self):
            super().__init__()
            self.mul = nn.Parameter(torch.rand(3, 1, 1) + 0.5)
            self.mean = nn.Parameter(torch.rand(3))

        def forward(self, x):
            return (x * self.mul).mean(dim=(2, 3)) + self.mean

    folder = tmp_path / "supervised-named.synthetic"
    write_entry(folder, network=Named().eval(), config=config_of(3), samples=SAMPLES)
    assert {
        t.name for t in check_graph(*(folder.joinpath(f).read_bytes() for f in (GRAPH, WEIGHTS)), "")
    } == {
        "mul",
        "mean",
    }


# -- golden vectors, manifest, card ----------------------------------------------------------------------------


def test_golden_vectors_are_what_the_runtime_gives(written):
    folder, _, config = written
    golden = np.load(folder / GOLDEN)
    assert golden["images"].dtype == np.uint8 and golden["images"].shape == (4, 48, 64, 3)
    assert golden["embedding"].dtype == np.float32 and golden["embedding"].shape == (4, config.dim)
    np.testing.assert_allclose(np.linalg.norm(golden["embedding"], axis=1), 1, atol=1e-6)
    assert float(golden["tolerance_fp32"]) == pytest.approx(1e-4)
    assert golden["tolerance_fp32"] < golden["tolerance_fp16"] < golden["tolerance_int8"]
    pixels = np.stack([read_pixels(p, PREPROCESS, decode="exact") for p in golden["images"]])
    np.testing.assert_allclose(
        unit(session(folder).run(None, {"pixels": pixels})[0]), golden["embedding"], atol=1e-5
    )
    ours = load_encoder(str(folder)).encode(list(golden["images"]))
    np.testing.assert_allclose(ours, golden["embedding"], atol=1e-5)
    # A golden vector that any image meets would test nothing.
    assert np.abs(golden["embedding"][0] - golden["embedding"][1]).max() > golden["tolerance_fp32"]


def test_golden_file_depends_on_no_clock(monkeypatch):
    images = synthetic_images(4)
    np.testing.assert_array_equal(images, synthetic_images(6)[:4])
    assert np.abs(images - synthetic_images(4, seed=1)).max() > 0
    first = npz_bytes({"b": images, "a": np.ones((), np.float32)})
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    assert npz_bytes({"a": np.ones((), np.float32), "b": images}) == first
    infos = zipfile.ZipFile(io.BytesIO(first)).infolist()
    assert [i.filename for i in infos] == ["a.npy", "b.npy"]
    assert {i.date_time for i in infos} == {(1980, 1, 1, 0, 0, 0)}


def test_samples_are_taken_evenly_from_a_source(tmp_path):
    for shade in range(8):
        Image.new("RGB", (32, 32), (shade * 10,) * 3).save(tmp_path / f"{shade}.png")
    pixels = sample_pixels(PREPROCESS, tmp_path, count=4)
    assert pixels.shape == (4, 3, 32, 32) and pixels[:, 0, 0, 0].tolist() == [0, 20, 40, 60]
    with pytest.raises(ConfigError, match="at least 9 images, found 8"):
        sample_pixels(PREPROCESS, tmp_path, count=9)


def test_manifest_is_last_complete_and_equal_for_two_exports(tmp_path, tiny_entry):
    again = write_tiny(tmp_path)
    for folder in (tiny_entry, again):
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
        assert {p.name for p in folder.iterdir()} == {*manifest.files, MANIFEST}
        for name, record in manifest.files.items():
            content = (folder / name).read_bytes()
            assert (len(content), sha256_hex(content)) == (record.size, record.sha256)
    assert (again / MANIFEST).read_bytes() == (tiny_entry / MANIFEST).read_bytes()


def test_card_has_the_front_matter_and_the_metrics(tmp_path, quick):
    first = write_tiny(tmp_path)
    sha = sha256_hex((first / WEIGHTS).read_bytes())
    metrics = {
        "weights_sha256": sha,
        "protocol": "kNN on test.",
        "results": {"Fashion-MNIST": {"knn_top1": 0.84}},
    }
    cost = {"seconds": 12.5, "co2_grams": 3.25, "assumptions": {"watts": 30, "grams_per_kwh": 400}}
    folder = write_tiny(tmp_path, metrics=metrics, provenance={"source": "a run", "cost": cost})
    text = (folder / CARD).read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["library_name"] == "embedkit"  # timm cannot build this one
    assert front["pipeline_tag"] == "image-feature-extraction" and front["license"] == "apache-2.0"
    assert front["co2_eq_emissions"]["emissions"] == 3.25
    assert front["co2_eq_emissions"]["source"] == "an estimate by embedkit (watts 30, grams_per_kwh 400)"
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"]["name"] == "Fashion-MNIST"
    assert result["metrics"] == [{"type": "knn_top1", "value": 0.84, "name": "knn_top1"}]
    assert "### Fashion-MNIST" in body and "| knn_top1 | 0.8400 |  |" in body and "kNN on test." in body
    assert f'load_encoder("{folder.name}")' in body and "- source: a run" in body
    assert "stored in float16" in body

    with pytest.raises(ConfigError, match="metrics were measured on weights 000000000000"):
        write_tiny(tmp_path, metrics={**metrics, "weights_sha256": "0" * 64})


def test_card_of_a_timm_network_says_so(written):
    folder, _, config = written
    front = yaml.safe_load((folder / CARD).read_text().split("---\n")[1])
    assert front["library_name"] == "timm" and "timm" in front["tags"]
    assert "model-index" not in front and "co2_eq_emissions" not in front
    assert f"local-dir:path/to/{folder.name}" in (folder / CARD).read_text()


# -- what float16 costs ----------------------------------------------------------------------------------------


def test_rounding_cost_is_measured(written):
    folder, network, _ = written
    stored = json.loads((folder / CONFIG).read_bytes())["embedkit"]["provenance"]["stored"]
    x = (torch.from_numpy(SAMPLES).float() / 255 - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(
        STD
    ).reshape(3, 1, 1)
    with torch.inference_mode():
        cosine = (unit(network(x)) * unit(half(network)(x))).sum(axis=1)
    assert stored["dtype"] == "float16" and stored["images"] == len(SAMPLES)
    assert stored["min_cosine"] == pytest.approx(cosine.min(), abs=1e-6)
    assert stored["mean_cosine"] == pytest.approx(cosine.mean(), abs=1e-6)


@pytest.mark.parametrize("overflow", [False, True])
def test_float32_is_stored_where_float16_is_not_enough(tmp_path, overflow):
    network = tiny()
    with torch.no_grad():
        if overflow:  # beyond 65504
            network.fc.weight[0, 0] = 1e5
        else:  # below float16's normal numbers, where its steps of 6e-8 are as large as the values
            network.fc.weight.mul_(1e-6)
            network.fc.bias.zero_()
    folder = write_tiny(tmp_path, network=network)
    stored = load_file(folder / WEIGHTS)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(stored[name], tensor, rtol=0, atol=0)
    graph = onnx.load(folder / GRAPH, load_external_data=False).graph
    names = {t.name for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert names == {name for name, t in network.state_dict().items() if t.is_floating_point()}
    assert not any(node.op_type == "Cast" and node.input[0] in names for node in graph.node)
    record = json.loads((folder / CONFIG).read_bytes())["embedkit"]["provenance"]["stored"]
    assert record["dtype"] == "float32"
    assert record["min_cosine"] is None if overflow else record["min_cosine"] < 0.9999
    assert "stored in float32" in (folder / CARD).read_text()


# -- refusals --------------------------------------------------------------------------------------------------


def test_parity_is_refused_and_nothing_written(tmp_path, monkeypatch):
    def tampered(state, metadata):
        """One weight is changed after rounding: the file is no longer what torch holds."""
        state = dict(state)
        state["fc.weight"] = state["fc.weight"].clone()
        state["fc.weight"][3, 3] += 0.01
        return save(state, metadata)

    monkeypatch.setattr(exporter, "save", tampered)
    with pytest.raises(ParityError, match="ONNX Runtime and torch differ by"):
        write_tiny(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_depends_on_its_batch_is_refused(tmp_path):
    class Centered(Tiny):
        def forward(self, x):
            rows = super().forward(x)
            return rows - rows.mean(dim=0, keepdim=True) * 0.01

    with pytest.raises(ParityError):
        write_tiny(tmp_path, network=randomised(Centered()))
    assert list(tmp_path.iterdir()) == []


def test_train_mode_is_refused_by_the_module_s_name(tmp_path):
    network = tiny()
    network.bn.train()
    with pytest.raises(ConfigError, match="bn is in train mode"):
        write_tiny(tmp_path, network=network)


def test_a_tensor_outside_the_graph_is_refused_by_name(tmp_path):
    network = tiny()
    network.head = nn.Linear(8, 2).eval()
    with pytest.raises(EntryError, match=r"'head\.(weight|bias)' .* takes no part in the graph"):
        write_tiny(tmp_path, network=network)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_a_megabyte_is_refused_by_the_tensor_s_name(tmp_path):
    class Heavy(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(600, 8, 56), persistent=False)

        def forward(self, x):
            return super().forward(x) + torch.tanh(self.table.mean(dim=(0, 2)) * x.mean())

    network = Heavy().eval()
    with pytest.raises(EntryError, match="less than 1000000 bytes .* 'table'"):
        write_tiny(tmp_path, network=network)


def test_timm_that_builds_another_function_is_refused(tmp_path, quick):
    torch.manual_seed(0)
    network = timm.create_model(
        "resnet18", num_classes=0, layers=(1, 1, 1, 1), channels=(8, 8, 16, 24)
    ).eval()

    def config(**model_args):
        keys = timm_config(network, PREPROCESS, model_args=model_args, tag="x", license="MIT")
        return config_of(24, architecture="resnet18", timm=keys)

    # At 32 pixels the last map is 1 x 1 and max pooling the same function; another activation is not.
    for change, message in (
        ({"layers": [2, 1, 1, 1]}, "timm does not load"),
        ({"act_layer": "gelu"}, "another function"),
    ):
        model_args = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 24], **change}
        with pytest.raises(ParityError, match=message):
            write_entry(
                tmp_path / "supervised-r.x", network=network, config=config(**model_args), samples=SAMPLES
            )
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "changes", "samples", "message"),
    [
        ("tiny", {}, SAMPLES, "expected the name"),
        ("simclr-tiny.synthetic", {}, SAMPLES, "expected the name supervised-"),
        ("supervised-tiny.synthetic", {}, SAMPLES[:31], "N of 32 or more"),
        ("supervised-tiny.synthetic", {}, SAMPLES[:, :1], "samples: expected uint8"),
        ("supervised-tiny.synthetic", {"dim": 9}, SAMPLES, "says 9"),
        ("supervised-tiny.synthetic", {"outputs": {"embedding": (9,)}}, SAMPLES, "one output"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, name, changes, samples, message):
    with pytest.raises(ConfigError, match=message):
        write_entry(tmp_path / name, network=tiny(), config=config_of(**changes), samples=samples)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_entry(tmp_path, monkeypatch, quick):
    folder = write_tiny(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write, rename = Path.write_bytes, Path.rename

    def unchanged():
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]

    def full_disk(path, content):
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device")
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OutputError, match="the disk is full"):
            write_tiny(tmp_path, network=tiny(seed=1))
    unchanged()

    def interrupted(path, target):
        if (
            path.name.endswith(".partial")
            and Path(target) == folder
            and not path.name.endswith(".old.partial")
        ):
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_exchange", lambda left, right: False)  # a system that cannot
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_tiny(tmp_path, network=tiny(seed=1))
    unchanged()

    write_tiny(tmp_path, network=tiny(seed=1))
    assert (folder / WEIGHTS).read_bytes() != before[WEIGHTS]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("entry_first", [False, True])
def test_what_is_not_an_entry_s_is_not_replaced(tmp_path, quick, entry_first):
    folder = tmp_path / "supervised-tiny.synthetic"
    folder.mkdir()
    if entry_first:
        write_tiny(tmp_path)  # an empty folder is nobody's
    (folder / "thesis.txt").write_text("years of work")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = (
        "holds 'thesis.txt', which is not part of the entry: move"
        if entry_first
        else "is not an entry, and holds"
    )
    with pytest.raises(ConfigError, match=message):
        write_tiny(tmp_path, network=tiny(seed=1))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / MANIFEST).write_text("{}")  # tells nothing of what is the entry's
    with pytest.raises(ConfigError, match="manifest.json.*; move the folder away"):
        write_tiny(tmp_path, network=tiny(seed=1))
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_entry_s_place_stays(tmp_path):
    place = tmp_path / "supervised-tiny.synthetic"
    place.write_text("years of work")
    with pytest.raises(ConfigError, match="its content cannot be read"):
        write_tiny(tmp_path)
    assert place.read_text() == "years of work"


def test_the_caller_s_network_is_left_alone(tmp_path, quick):
    network = tiny().to(memory_format=torch.channels_last)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    write_tiny(tmp_path, network=network)
    assert all(p.requires_grad for p in network.parameters())
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


# -- one ordinary file, index, command --------------------------------------------------------------------------------


def test_an_export_to_onnx_is_one_ordinary_file(written, tmp_path):
    folder, network, _ = written
    out = export_onnx(folder, tmp_path / "encoder.onnx")
    model = onnx.load(out)
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert onnx.TensorProto.FLOAT16 not in kinds.values()
    assert not any(t.data_location == onnx.TensorProto.EXTERNAL for t in model.graph.initializer)
    assert {name for name, t in network.state_dict().items() if t.is_floating_point()} <= set(kinds)
    assert not any(node.op_type == "Cast" and node.input[0] in kinds for node in model.graph.node)
    alone = ort.InferenceSession(out.read_bytes(), providers=["CPUExecutionProvider"])
    for size in (1, 7):
        feed = {"pixels": SAMPLES[:size]}
        ours, theirs = alone.run(None, feed)[0], session(folder).run(None, feed)[0]
        np.testing.assert_allclose(unit(ours), unit(theirs), atol=1e-6)


def test_index_is_a_function_of_the_entries(tmp_path, tiny_entry, caplog):
    def put(name: str):
        shutil.copytree(tiny_entry, tmp_path / name)

    put("supervised-tiny.zzz")
    index = update_index(tmp_path)
    first = (tmp_path / INDEX).read_bytes()
    assert index["aliases"] == {"supervised-tiny": "supervised-tiny.zzz"}
    row = index["entries"]["supervised-tiny.zzz"]
    manifest = (tiny_entry / MANIFEST).read_bytes()
    assert row["manifest_sha256"] == sha256_hex(manifest)
    assert row["bytes"] == sum(path.stat().st_size for path in tiny_entry.iterdir())
    assert (row["method"], row["dim"], row["license"]) == ("supervised", 8, "Apache-2.0")
    update_index(tmp_path)
    assert (tmp_path / INDEX).read_bytes() == first

    put("supervised-tiny.aaa")  # earlier by name, but the alias is held
    assert update_index(tmp_path)["aliases"] == {"supervised-tiny": "supervised-tiny.zzz"}
    assert "[supervised-tiny.aaa](supervised-tiny.aaa/README.md)" in (tmp_path / "README.md").read_text()
    shutil.rmtree(tmp_path / "supervised-tiny.zzz")
    (tmp_path / ".supervised-tiny.bbb.1.partial").mkdir()  # left by a killed writer
    assert update_index(tmp_path)["aliases"] == {"supervised-tiny": "supervised-tiny.aaa"}

    config = tmp_path / "supervised-tiny.aaa" / CONFIG
    config.write_bytes(config.read_bytes().replace(b"synthetic", b"syntethic"))
    update_index(tmp_path)
    assert re.search(f"{CONFIG}.*its row of the index stays as it was", caplog.text)


def test_command(tiny_entry, tmp_path):
    with pytest.raises(ConfigError, match="is already an entry"):
        export(str(tiny_entry), name="supervised-tiny.b")
    with pytest.raises(ConfigError, match="neither an entry .* nor a training run"):
        export(str(tmp_path), name="supervised-tiny.b", to=str(tmp_path / "zoo"))


def test_command_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "embedkit.training.export.from_run")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install '\.\[train,cpu\]'"):
        export(str(tmp_path), name="supervised-tiny.b")


def test_config_round_trip_is_checked_before_writing(tmp_path):
    with pytest.raises(EntryError, match="data"):
        write_tiny(tmp_path, data="")
    assert list(tmp_path.iterdir()) == []
