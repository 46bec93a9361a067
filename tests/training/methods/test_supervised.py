"""Cross-entropy against its definition, ln K at the start, and one batch learned by heart."""

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from embedkit import load_encoder
from embedkit.errors import ConfigError
from embedkit.training import recipes, run
from embedkit.training.config import Facts
from embedkit.training.data import DataConfig, load_images
from embedkit.training.export.from_run import export_run
from embedkit.training.methods.supervised import Config, Supervised, smoothed_cross_entropy
from embedkit.training.models.backbones import create_backbone


def build(classes=10, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(1, 28, 28),
        mean=(0.3,),
        std=(0.3,),
        num_classes=classes,
        batch_size=32,
        steps_per_epoch=4,
        total_steps=40,
    )
    return Supervised(create_backbone("r10", in_chans=1, image_size=28), Config(**config), facts)


def batch(n=20):
    return load_images(DataConfig(path="sklearn:digits", image_size=28)).batch(torch.arange(n))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_definition(smoothing):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1, -1, 2, 2])
    terms = []
    for row, label in zip(logits, labels.tolist(), strict=True):
        if label >= 0:
            log_p = [float(v) - math.log(sum(math.exp(float(w)) for w in row)) for v in row]
            q = [smoothing / 4 + (1 - smoothing) * (k == label) for k in range(4)]
            terms.append(-sum(a * b for a, b in zip(q, log_p, strict=True)))
    loss = smoothed_cross_entropy(logits, labels, smoothing)
    assert float(loss) == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_by_hand():
    # softmax of (ln 3, 0) is (3/4, 1/4); smoothing 0.2 makes the target (0.9, 0.1)
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    expected = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25))
    assert float(smoothed_cross_entropy(logits, torch.tensor([0]), 0.2)) == pytest.approx(expected)


def test_bfloat16_logits_are_widened():
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = smoothed_cross_entropy(logits, torch.arange(8) % 5, 0.1)
    torch.testing.assert_close(loss, smoothed_cross_entropy(logits.float(), torch.arange(8) % 5, 0.1))


@pytest.mark.parametrize("classes", [10, 37])
def test_the_first_loss_is_ln_k(classes):
    method = build(classes)
    outputs = method.loss(batch(), method.generator())
    assert float(outputs["loss"].detach()) == pytest.approx(math.log(classes), rel=1e-5)


def test_no_labels_are_refused_with_the_next_step():
    with pytest.raises(ConfigError, match="data.label"):
        build(classes=0)


@pytest.mark.parametrize(
    ("name", "dim", "operator"), [("alexnet", 128, "Conv"), ("vgg11", 256, "Conv"), ("gru", 256, "GRU")]
)
def test_the_encoders_of_2012_to_2014_from_recipe_to_runtime(name, dim, operator, tmp_path):
    config = recipes.recipe(f"supervised:{name}")
    data = dataclasses.replace(config.data, path="synthetic:32")
    config = dataclasses.replace(config, data=data, steps=2, batch_size=16, threads=1, precision="fp32")
    run.train(config, out=tmp_path / "run", progress=False)
    folder = export_run(tmp_path / "run", f"supervised-{name}.synthetic", tmp_path / "zoo", license="CC0-1.0")
    method = run.load_run(tmp_path / "run")[1]
    images = run.open_data(config)[0].batch(torch.arange(8)).images
    found = load_encoder(folder).encode(list(images.movedim(1, 3).squeeze(3).numpy()), normalize=False)
    with torch.inference_mode():
        expected = method.encoder()(method.view(images))
    assert found.shape == (8, dim) and (folder / "model.safetensors").stat().st_size < 5_000_000
    assert torch.nn.functional.cosine_similarity(torch.from_numpy(found), expected).min() > 0.9995
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert operator in {node.op_type for node in graph.node}
    # slices of weights stay nodes: what is folded of them would be a second copy, inside the graph
    inside = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    large = [onnx.numpy_helper.to_array(t) for t in inside if math.prod(t.dims) > 4]
    assert not any(values.any() for values in large)  # biases of zeros, before a BatchNorm
