"""A classifier beside the embedding: `logits` in the entry, and `embedkit classify` without torch."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("onnxruntime")

from embedkit import load_encoder
from embedkit.authoring.golden import synthetic_images
from embedkit.authoring.onnx_export import export_onnx
from embedkit.errors import ConfigError, EntryError
from embedkit.hub.resolve import find_entry
from embedkit.images.transform import read_pixels
from embedkit.model.config import EntryConfig
from embedkit.training import recipes, run
from embedkit.training.build import build_method
from embedkit.training.config import Facts, with_overrides
from embedkit.training.export.from_run import export_run
from embedkit.training.export.head import with_head
from embedkit.training.parents import find_parent
from embedkit.training.run_folder import load_run
from embedkit.workflows.check_entry import verify_entry
from embedkit.workflows.classify import classify_images

IMAGES = list(synthetic_images(10))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, its entry with the classifier, and its entry without."""
    folder = tmp_path_factory.mktemp("head")
    settings = [
        "data.color=rgb",
        "data.image_size=32",
        "steps=30",
        "batch_size=32",
        "threads=1",
        "log_every=30",
    ]
    config = with_overrides(recipes.recipe("supervised"), settings)
    run.train(config, data="synthetic:200", out=folder / "run", progress=False)
    whole = export_run(folder / "run", "supervised-r10.toy", folder / "zoo", with_head=True)
    return folder / "run", whole, export_run(folder / "run", "supervised-r10.plain", folder / "zoo")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The images as files, and one that is no image."""
    folder = tmp_path_factory.mktemp("images")
    for index, image in enumerate(IMAGES):
        Image.fromarray(image).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def torch_probabilities(trained_run, entry):
    """What the run's own method says of the images."""
    _, method = load_run(trained_run)
    preprocess = find_entry(entry).config.preprocess
    pixels = np.stack([read_pixels(image, preprocess, decode="exact") for image in IMAGES])
    with torch.no_grad():
        return method.classifier(method.backbone(method.view(torch.from_numpy(pixels)))).softmax(1).numpy()


def test_classify_equals_torchs_softmax(trained):
    folder, whole, _ = trained
    encoder = load_encoder(whole, threads=1)
    found, expected = encoder.classify(IMAGES, decode="exact"), torch_probabilities(folder, whole)
    assert found.dtype == np.float32 and found.shape == (10, len(encoder.classes)) and found.shape[1] > 2
    assert np.ptp(expected, axis=0).max() > 0.05  # the classifier tells the images apart
    # the run holds float32 and the entry float16, which moves a probability by far less than the limit of the export
    stored = find_entry(whole).config.provenance["stored"]
    assert stored["probability_difference"] < 0.01
    np.testing.assert_allclose(found, expected, atol=1e-4 + 2 * stored["probability_difference"])
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_classify_equals_the_stored_weights_in_torch_by_timm(trained):
    _, whole, _ = trained
    import embedkit.training.models.backbones  # noqa: F401  registers r10

    network = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    preprocess = find_entry(whole).config.preprocess
    pixels = np.stack([read_pixels(image, preprocess, decode="exact") for image in IMAGES])
    mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    with torch.no_grad():
        expected = network((torch.from_numpy(pixels).float() / 255 - mean) / std).softmax(1).numpy()
    found = load_encoder(whole, threads=1).classify(IMAGES, decode="exact")
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_embedding_is_that_of_the_entry_without_a_classifier(trained):
    _, whole, plain = trained
    rows = [load_encoder(folder, threads=1).encode(IMAGES, normalize=False) for folder in (whole, plain)]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5, atol=1e-5)
    assert find_entry(plain).config.classes == () and set(find_entry(plain).config.outputs) == {"embedding"}


def test_golden_vectors_and_the_standalone_file_have_both_outputs(trained, tmp_path):
    _, whole, _ = trained
    assert verify_entry(whole, device="cpu").ok
    golden = np.load(whole / "golden.npz")
    np.testing.assert_allclose(golden["logits"].sum(1), 1, atol=1e-5)  # as probabilities, which are compared
    import onnxruntime

    session = onnxruntime.InferenceSession(
        export_onnx(whole, tmp_path / "one.onnx"), providers=["CPUExecutionProvider"]
    )
    assert [output.name for output in session.get_outputs()] == ["embedding", "logits"]


def test_the_card_shows_how_to_classify(trained):
    _, whole, plain = trained
    count = len(find_entry(whole).config.classes)
    assert (
        f"a classifier of {count} classes" in find_entry(whole).card
        and "encoder.classify(" in find_entry(whole).card
    )
    assert "classify" not in find_entry(plain).card


def test_the_classes_are_the_datas_in_order(trained):
    _, whole, _ = trained
    config = json.loads((whole / "config.json").read_text())
    classes = config["embedkit"]["classes"]
    assert classes == sorted(classes) and config["num_classes"] == len(classes)
    assert config["pretrained_cfg"]["classifier"] == "fc"
    changed = (whole / "config.json").read_text().replace(json.dumps(classes[0]), json.dumps(classes[1]), 1)
    with pytest.raises(EntryError, match="classes: expected a name for each of the logits"):
        EntryConfig.from_json(changed)


NO_TORCH = """
import sys
for name in ("torch", "timm", "lightning", "embedkit.training"):
    sys.modules[name] = None
from embedkit import cli
sys.argv = ["embedkit", *sys.argv[1:]]
cli.main()
"""


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


def test_the_command_prints_the_likeliest_without_torch_and_leaves_out_what_is_no_image(trained, files):
    _, whole, _ = trained
    done = command("classify", files, "--encoder", whole, "--top", "2", "--threads", "1")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines[0] == ["id", "label", "probability"] and len(lines) == 1 + 2 * len(IMAGES)
    encoder = load_encoder(whole, threads=1)
    expected = encoder.classify(IMAGES)
    for at, index in enumerate(range(10)):  # 0.png to 9.png in order of their names
        best = np.argsort(-expected[index], kind="stable")[:2]
        assert [line[0] for line in lines[1 + 2 * at : 3 + 2 * at]] == [f"{files}/{index}.png"] * 2
        assert [line[1] for line in lines[1 + 2 * at : 3 + 2 * at]] == [encoder.classes[k] for k in best]
        assert float(lines[1 + 2 * at][2]) == pytest.approx(expected[index, best[0]], abs=1e-4)
    assert "warning: 1 image of the sources is left out" in done.stderr and "broken.png" in done.stderr


def test_tables_in_files(trained, files, tmp_path):
    _, whole, _ = trained
    done = classify_images([files], encoder=whole, threads=1)
    done.save(tmp_path / "table.parquet")
    done.save(tmp_path / "table.csv")
    table = pq.read_table(tmp_path / "table.parquet")
    assert table.column_names == ["id", "label", "probability"] and table["id"].to_pylist() == done.ids
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[0] == "id,label,probability" and len(lines) == 11
    assert lines[1] == f"{done.ids[0]},{done.labels[0]},{done.probabilities[0]:.6f}"
    for arguments, status, message in (
        (["-o", tmp_path / "table.json"], 1, "expected .csv or .parquet"),
        (["-o", files / "0.png"], 2, "--output"),
        (["--top", "99"], 2, "--top: expected 1 to"),
    ):
        refused = command("classify", files / "0.png", "--encoder", whole, *arguments)
        assert refused.returncode == status and message in refused.stderr and refused.stderr.count("\n") == 1


def test_an_entry_without_a_classifier_says_so(trained):
    _, _, plain = trained
    with pytest.raises(EntryError, match="has no classifier; export its run again with --with-head"):
        load_encoder(plain, threads=1).classify(IMAGES)
    with pytest.raises(EntryError, match="has no classifier"):
        classify_images("nothing", encoder=plain)


def test_methods_without_a_classifier_and_networks_without_a_place_for_one(trained):
    head = torch.nn.Linear(256, 3)
    with pytest.raises(ConfigError, match="the method trains no classifier"):
        with_head(load_run(trained[0])[1].encoder(), None)
    facts = Facts(
        image_shape=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=3, batch_size=4, steps_per_epoch=1,
        total_steps=1,
    )  # fmt: skip
    config = with_overrides(recipes.recipe("supervised"), ["backbone=alexnet_bn"])
    with pytest.raises(
        ConfigError, match="timm puts no linear classifier on the features of embedkit_alexnet"
    ):
        with_head(build_method(config, facts).encoder(), head)


@pytest.mark.parametrize("name", ["fixmatch", "mean_teacher", "pseudo_label"])
def test_the_average_is_exported_with_its_own_classifier(name):
    facts = Facts(
        image_shape=(1, 28, 28),
        mean=(0.5,),
        std=(0.5,),
        num_classes=3,
        batch_size=4,
        steps_per_epoch=1,
        total_steps=1,
    )
    method = build_method(recipes.recipe(name), facts).eval()
    average = method.ema.module
    torch.nn.init.normal_(average[1].weight)
    network = with_head(method.encoder(), method.class_head())
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = network(x)
        torch.testing.assert_close(found["logits"], average(x))
        torch.testing.assert_close(found["embedding"], method.encoder()(x))


def test_a_run_may_start_from_an_entry_with_a_classifier(trained, capsys):
    config = with_overrides(recipes.recipe("simclr"), [f"init={trained[1]}", "steps=1", "batch_size=4"])
    run.train(config, data="synthetic:40", out=trained[0].parent / "next", progress=False)
    assert "left out: fc.bias, fc.weight" in capsys.readouterr().err
    assert find_parent(str(trained[1])).architecture == "embedkit_r10"
