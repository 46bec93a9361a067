"""ONNX files of others as entries: what they give is what ONNX Runtime makes of the file itself."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper

from embedkit.authoring.contract import Contract
from embedkit.authoring.golden import synthetic_images
from embedkit.authoring.import_request import Request, is_onnx
from embedkit.authoring.onnx_export import export_onnx
from embedkit.authoring.onnx_import import import_onnx
from embedkit.encoder import load_encoder
from embedkit.errors import ConfigError, EntryError, ParityError, SourceError
from embedkit.images.transform import read_pixels
from embedkit.model.config import EntryConfig
from embedkit.workflows.check_entry import verify_entry

MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)
SIZE = 8
IMAGES = list(synthetic_images(6, seed=3))
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(0, 0.1, (5, 3, 3, 3)).astype(np.float32)


def contract(**more):
    return Contract(**{"image_size": SIZE, "mean": MEAN, "std": STD, **more})


def request(folder, *, name="own-net.photos", license="MIT", **more):
    return Request(name=name, zoo=folder / "zoo", license=license, **{"contract": contract(), **more})


def floats(values, name):
    return numpy_helper.from_array(np.asarray(values, np.float32), name)


def whole(values, name):
    return numpy_helper.from_array(np.asarray(values, np.int64), name)


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def save(path, nodes, inputs, outputs, initializers=(), *, opset=17, domains=(), **more):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(one, 1) for one in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, path, **more)
    return path


def conv(path, *, batch="n", pool=True, size=SIZE, **more):
    """Channels first, floats: a convolution with WEIGHT, ReLU, and the mean over the map."""
    nodes = [
        helper.make_node("Conv", ["images", "stem.weight"], ["map"], name="stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["map"], ["features"]),
        *([helper.make_node("GlobalAveragePool", ["features"], ["pooled"])] if pool else []),
    ]
    last = value("pooled", [batch, 5, 1, 1]) if pool else value("features", [batch, 5, size, size])
    return save(
        path,
        nodes,
        [value("images", [batch, 3, size, size])],
        [last],
        [floats(WEIGHT, "stem.weight")],
        **more,
    )


def pixels_of(done):
    preprocess = EntryConfig.from_json((done.folder / "config.json").read_bytes()).preprocess
    return np.stack([read_pixels(image, preprocess) for image in IMAGES])


def normalized(pixels):
    shape = (1, 3, 1, 1)
    return (pixels / np.float32(255) - np.float32(MEAN).reshape(shape)) / np.float32(STD).reshape(shape)


def genuine(path, images, output=None):
    """The file itself by plain ONNX Runtime, one image at a time."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    [taken] = session.get_inputs()
    return np.concatenate([session.run(output and [output], {taken.name: one[None]})[0] for one in images])


def assert_same(done, expected):
    rows = load_encoder(done.folder, device="cpu", threads=1).encode(IMAGES)
    expected = expected.reshape(len(expected), -1).astype(np.float64)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert rows.shape == expected.shape
    assert (rows * expected).sum(1).min() >= 0.99999
    # Not merely parallel to one direction: the rows of different images differ.
    assert (rows[0] * expected[1]).sum() < 0.9999
    check = verify_entry(done.folder, device="cpu")
    assert check.ok, check.detail


def test_channels_first_and_a_free_batch(tmp_path):
    path = conv(tmp_path / "net.onnx")
    done = import_onnx(path, request(tmp_path))
    assert_same(done, genuine(path, normalized(pixels_of(done))))
    encoder = load_encoder(done.folder)
    assert (encoder.dim, encoder.preprocess.mean, encoder.preprocess.size) == (5, MEAN, (SIZE, SIZE))
    from safetensors.numpy import load_file

    stored = load_file(done.folder / "model.safetensors")
    np.testing.assert_array_equal(stored["stem.weight"], WEIGHT)
    assert [name for name in stored if name.startswith("stem")] == ["stem.weight"]
    config = EntryConfig.from_json((done.folder / "config.json").read_bytes())
    assert (
        config.provenance["output"] == "pooled" and config.license == "MIT" and config.architecture == "net"
    )


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8, TensorProto.FLOAT16])
@pytest.mark.parametrize("batch", ["n", 1, 4])
def test_channels_last_by_hand(kind, batch, tmp_path):
    """embedding = (mean over the image of each channel) @ matrix, in a graph that takes (N, H, W, C)."""
    matrix = RNG.normal(0, 1, (3, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["m"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    shape = [batch, SIZE, SIZE, 3]
    path = save(
        tmp_path / "a.onnx", nodes, [value("x", shape, kind)], [value("y", [batch, 4])], [floats(matrix, "w")]
    )
    plain = kind == TensorProto.UINT8
    given = Contract(resize="squash") if plain else contract(resize="squash")
    done = import_onnx(path, request(tmp_path, contract=given))
    pixels = pixels_of(done)
    images = pixels if plain else normalized(pixels)
    assert_same(done, images.astype(np.float64).mean((2, 3)) @ matrix)
    preprocess = load_encoder(done.folder).preprocess
    assert preprocess.resize == "squash" and preprocess.mean == ((0.0,) * 3 if plain else MEAN)


def test_free_sides_take_the_size_that_is_given(tmp_path):
    path = conv(tmp_path / "net.onnx", size="side")
    with pytest.raises(ConfigError, match="any size: give --image-size"):
        import_onnx(path, request(tmp_path, contract=contract(image_size=None)))
    done = import_onnx(path, request(tmp_path, contract=contract(image_size=12)))
    assert_same(done, genuine(path, normalized(pixels_of(done))))
    assert load_encoder(done.folder).preprocess.size == (12, 12)


@pytest.mark.parametrize(("pool", "dim"), [("mean", 5), ("none", 5 * SIZE * SIZE)])
def test_a_map_is_pooled_as_asked(pool, dim, tmp_path):
    path = conv(tmp_path / "net.onnx", pool=False)
    with pytest.raises(ConfigError, match="features has 5x8x8 numbers an image: give --pool mean"):
        import_onnx(path, request(tmp_path))
    with pytest.raises(ConfigError, match="no class token"):
        import_onnx(path, request(tmp_path, pool="cls"))
    done = import_onnx(path, request(tmp_path, pool=pool))
    rows = genuine(path, normalized(pixels_of(done)))
    assert_same(done, rows.mean((2, 3)) if pool == "mean" else rows)
    assert load_encoder(done.folder).dim == dim


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_tokens_are_pooled_as_asked(pool, opset, tmp_path):
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["map"], strides=[4, 4]),
        helper.make_node("Reshape", ["map", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
    ]
    parts = [floats(RNG.normal(0, 1, (5, 3, 4, 4)), "w"), whole([0, 5, 4], "shape")]
    ends = [value("images", ["n", 3, SIZE, SIZE])], [value("tokens", ["n", 4, 5])]
    path = save(tmp_path / "net.onnx", nodes, *ends, parts, opset=opset)
    done = import_onnx(path, request(tmp_path, pool=pool))
    tokens = genuine(path, normalized(pixels_of(done)))
    assert_same(done, tokens[:, 0] if pool == "cls" else tokens.mean(1))
    assert ("over all tokens" in " ".join(done.notes)) is (pool == "mean")


def classifier(path):
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["gap"], name="gap"),
        helper.make_node("Flatten", ["gap"], ["features"]),
        helper.make_node("Gemm", ["features", "fc.weight"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    ends = (
        [value("images", ["n", 3, SIZE, SIZE])],
        [value("logits", ["n", 7]), value("probabilities", ["n", 7])],
    )
    return save(path, nodes, *ends, [floats(RNG.normal(0, 1, (7, 3)), "fc.weight")])


@pytest.mark.parametrize("output", ["features", "gap"])
def test_a_value_inside_leaves_the_classifier_out(output, tmp_path):
    path = classifier(tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match="give --node, one of logits 7, probabilities 7"):
        import_onnx(path, request(tmp_path))
    with pytest.raises(ConfigError, match="neither a value nor a node of the graph; did you mean 'features'"):
        import_onnx(path, request(tmp_path), output="featuers")
    done = import_onnx(path, request(tmp_path), output=output)
    assert_same(done, normalized(pixels_of(done)).mean((2, 3)))
    assert b"fc.weight" not in (done.folder / "model.safetensors").read_bytes()


def test_weights_beside_the_file(tmp_path):
    path = conv(tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    assert (tmp_path / "net.data").is_file()
    done = import_onnx(path, request(tmp_path))
    assert_same(done, genuine(path, normalized(pixels_of(done))))
    (tmp_path / "net.data").write_bytes(b"short")
    with pytest.raises(EntryError, match=r"'stem.weight' are not whole in net.data"):
        import_onnx(path, request(tmp_path))


def test_an_export_of_ours_comes_back(by_hand, tmp_path):
    entry = by_hand.TinyEntry(preprocess={"mean": MEAN, "std": STD, "interpolation": "box"})
    folder = entry.write(tmp_path / entry.name)
    for float_input in (False, True):
        path = export_onnx(folder, tmp_path / "encoder.onnx", float_input=float_input)
        done = import_onnx(path, request(tmp_path, contract=Contract()))
        assert load_encoder(done.folder).preprocess == entry.config.preprocess
        assert_same(done, load_encoder(folder).encode(IMAGES))
        assert "as embedkit wrote it" in done.notes[0]


# --- exported by torch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", [True, False])
def test_a_vision_transformer_exported_by_torch(free, tmp_path):
    """With a fixed batch its class token is a constant that torch concatenates."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    from importing import random_network

    import embedkit.training.models.backbones  # noqa: F401  registers the network

    network = random_network("embedkit_vit_t4", in_chans=3, img_size=32, global_pool="token", fc_norm=False)
    network.pos_embed.data.normal_(0, 0.5)
    path = tmp_path / "vit.onnx"
    shapes = {"x": {0: torch.export.Dim("batch")}} if free else None
    torch.onnx.export(
        network,
        (torch.zeros(2 if free else 1, 3, 32, 32),),
        path,
        dynamo=True,
        dynamic_shapes=shapes,
        verbose=False,
    )
    done = import_onnx(path, request(tmp_path, contract=contract(image_size=None)))
    assert_same(done, genuine(str(path), normalized(pixels_of(done))))
    from safetensors.numpy import load_file

    assert {"patch_embed.proj.weight", "pos_embed"} <= set(load_file(done.folder / "model.safetensors"))


# --- what is refused --------------------------------------------------------------------------------------


def test_without_torch_from_the_command_line(tmp_path):
    """A process in which torch cannot be imported."""
    path = conv(tmp_path / "net.onnx")
    code = (
        "import sys; sys.modules.update(torch=None, timm=None, torchvision=None)\n"
        "from embedkit.cli import main; main()"
    )
    words = (
        f"import {path} --name own-net.photos --license MIT --mean 0.5,0.25,0.125 --std 0.25,0.5,1 --resize squash "
        f"--to {tmp_path / 'zoo'}"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "zoo" / "own-net.photos"
    assert ran.stdout == f"{folder}\n" and "output pooled" in ran.stderr
    verify = [sys.executable, "-c", code, "zoo", "verify", "own-net.photos", "--zoo", str(tmp_path / "zoo")]
    ran = subprocess.run(verify, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0 and "\town-net.photos\t" in ran.stdout, ran.stderr
    assert load_encoder(folder).preprocess.resize == "squash"


def refused(path, folder, error=EntryError, **more):
    with pytest.raises(error) as caught:
        import_onnx(path, request(folder, **more))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and not (folder / "zoo").exists()
    return message


def test_operators_of_others_control_flow_and_sequences(tmp_path):
    ends = [value("x", ["n", 3, SIZE, SIZE])], [value("y", ["n", 3, SIZE, SIZE])]
    path = tmp_path / "net.onnx"
    save(
        path, [helper.make_node("Mish2", ["x"], ["y"], domain="org.example")], *ends, domains=["org.example"]
    )
    assert "operators of 'org.example', which are not built into ONNX Runtime" in refused(path, tmp_path)
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["z"])], "b", [], [value("z", None)])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body)
    yes = numpy_helper.from_array(np.array(True), "yes")
    save(path, [node], *ends, [yes])
    assert "'If' holds a graph, and control flow" in refused(path, tmp_path)
    engine = helper.make_node(
        "EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context="/etc/passwd"
    )
    save(path, [engine], *ends, domains=["com.microsoft"])
    assert "'EPContext'" in refused(path, tmp_path)


@pytest.mark.parametrize(
    "location", ["../net.data", "/etc/passwd", "sub/net.data", "..\\net.data", "c:net.data"]
)
def test_weights_elsewhere(location, tmp_path):
    (tmp_path / "in").mkdir()
    path = conv(tmp_path / "in" / "net.onnx")
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("length", str(WEIGHT.nbytes))):
        tensor.external_data.add(key=key, value=text)
    path.write_bytes(model.SerializeToString())
    assert "expected a file of the same folder" in refused(path, tmp_path)


def test_a_link_as_the_file_of_the_weights(tmp_path):
    path = conv(tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=0)
    (tmp_path / "net.data").rename(tmp_path / "there")
    (tmp_path / "net.data").symlink_to(tmp_path / "there")
    assert "expected a file of the same folder" in refused(path, tmp_path)


def test_files_that_are_no_encoder_of_images(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x08\x09 not a model")
    assert "is not an ONNX model that can be read" in refused(path, tmp_path)
    path.write_bytes(b"")
    assert "is not an ONNX model that can be read (it holds no operators)" in refused(path, tmp_path)
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    save(path, [node], [value("a", [1, 2]), value("b", [2, 3])], [value("y", [1, 3])])
    assert "expected one input, the images, found 'a', 'b'" in refused(path, tmp_path)
    save(path, [helper.make_node("Relu", ["a"], ["y"])], [value("a", ["n", 7])], [value("y", ["n", 7])])
    assert "'a' is FLOAT ?x7: expected images of 1 or 3 channels" in refused(path, tmp_path)
    save(path, [helper.make_node("Shape", ["a"], ["y"])], [value("a", ["n", 3, 8, 8])], [value("y", [4], 7)])
    assert "has no axis for the images of a batch" in refused(path, tmp_path)
    with pytest.raises(SourceError, match="cannot be read"):
        import_onnx(tmp_path / "none.onnx", request(tmp_path))


def test_a_row_that_depends_on_its_batch(tmp_path):
    """The mean of the batch is taken away from each image: in a batch of one nothing is left."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["all"], axes=[0], keepdims=1),
        helper.make_node("Mul", ["all", "half"], ["part"]),
        helper.make_node("Sub", ["x", "part"], ["rest"]),
        helper.make_node("GlobalAveragePool", ["rest"], ["y"]),
    ]
    ends = [value("x", ["n", 3, SIZE, SIZE])], [value("y", ["n", 3, 1, 1])]
    path = save(tmp_path / "net.onnx", nodes, *ends, [floats(0.5, "half")])
    assert "a row depends on its batch" in refused(path, tmp_path, ParityError)


def test_what_is_not_known_is_asked_for(tmp_path):
    path = conv(tmp_path / "net.onnx")
    assert "no license is known" in refused(path, tmp_path, ConfigError, license=None)
    assert "give --mean and --std" in refused(path, tmp_path, ConfigError, contract=Contract(image_size=SIZE))
    assert "images of 8x8 pixels, and not of 9x9" in refused(
        path, tmp_path, ConfigError, contract=contract(image_size=9)
    )
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=1)]
    ends = [value("x", ["n", 3, SIZE, SIZE], TensorProto.UINT8)], [value("y", ["n", 3, SIZE, SIZE])]
    save(path, nodes, *ends)
    assert "takes uint8 and normalizes itself" in refused(path, tmp_path, ConfigError)


def test_onnx_files_are_told_by_their_beginning(tmp_path):
    path = conv(tmp_path / "net.onnx")
    other = tmp_path / "net.bin"
    other.write_bytes(path.read_bytes())
    assert is_onnx(path) and is_onnx(other)
    for content in (b"\x80\x02}q\x00.......", b"PK\x03\x04........", b"\x08\0\0\0\0\0\0\0{}      ", b""):
        other.write_bytes(content)
        assert not is_onnx(other)


# --- preprocessing that lies beside -----------------------------------------------------------------------


def test_a_preprocessor_config_beside_the_file(tmp_path):
    path = conv(tmp_path / "net.onnx", size="side")
    facts = {"size": {"shortest_edge": 10}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True}
    text = {**facts, "resample": 3, "image_mean": list(MEAN), "image_std": list(STD)}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(text))
    done = import_onnx(path, request(tmp_path, contract=Contract()))
    preprocess = load_encoder(done.folder).preprocess
    assert (preprocess.resize, preprocess.resize_size, preprocess.size) == ("shortest", 10, (8, 8))
    assert (preprocess.interpolation, preprocess.mean, preprocess.std) == ("bicubic", MEAN, STD)
    assert_same(done, genuine(path, normalized(pixels_of(done))))
    assert "preprocessor_config.json beside the file" in done.notes[0]
