"""The image of the pretext task: what stands where, its size, and what it shows of a network that makes no mistake."""

import dataclasses
import io
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import contract
from PIL import Image

from embedkit.errors import ConfigError, OutputError
from embedkit.model.layout import CARD, CONFIG, MANIFEST, PRETEXT_IMAGE
from embedkit.training import methods, run
from embedkit.training.export.from_run import export_run
from embedkit.training.methods.egomotion import Motion
from embedkit.training.pretext_image import MOST_BYTES, draw_panels, pretext_png, write_pretext_image

#: Methods whose pretext task is nothing to look at: labels, identities, and the agreement of views.
WITHOUT = set(
    """contrastive deepdpm fixmatch mean_teacher mixmatch mixup pseudo_label simclr simsiam sphereface supervised
    triplet""".split()
)
GAP, TITLE, BACKGROUND = 8, 20, 221


def panel_of(image, row, column, size):
    """The pixels (size, size, 3) of one panel of a drawn sheet."""
    left, top = GAP + column * (size + GAP), TITLE + row * (TITLE + size + GAP)
    return np.asarray(image)[top : top + size, left : left + size]


def enlarged(images, factor):
    """uint8 (N, C, H, W) -> (N, factor H, factor W, 3)."""
    pixels = images.expand(-1, 3, -1, -1).movedim(1, 3).numpy()
    return pixels.repeat(factor, 1).repeat(factor, 2)


def test_panels_are_enlarged_by_a_whole_number_and_stand_in_rows():
    gray = torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8)
    color = torch.randint(256, (2, 3, 14, 14), dtype=torch.uint8)
    image = draw_panels({"gray": gray / 255, "color": color / 255})
    assert image.mode == "RGB" and image.size == (3 * GAP + 2 * 112, 2 * (TITLE + 112 + GAP))
    for column in range(2):
        assert (panel_of(image, 0, column, 112) == enlarged(gray, 4)[column]).all()
        assert (panel_of(image, 1, column, 112) == enlarged(color, 8)[column]).all()


def test_tiles_have_a_line_between_them():
    tiles = torch.randint(256, (1, 9, 3, 16, 16), dtype=torch.uint8)
    shown = panel_of(draw_panels({"tiles": tiles / 255}), 0, 0, 100)  # 3 * 16 + 2 lines, twice as large
    lines = np.zeros(50, bool)
    lines[[16, 33]] = True
    assert (shown[::2][lines] == BACKGROUND).all() and (shown[:, ::2][:, lines] == BACKGROUND).all()
    assert (shown[34:66:2, 68::2] == tiles[0, 5].movedim(0, 2).numpy()).all()  # second row, third column


def test_large_panels_are_reduced():
    halves = torch.zeros(1, 3, 512, 256)
    halves[:, :, 256:] = 1
    image = draw_panels({"large": halves})
    assert image.size == (2 * GAP + 64, TITLE + 128 + GAP)
    shown = np.asarray(image)[TITLE : TITLE + 128, GAP : GAP + 64]
    assert (shown[:64] == 0).all() and (shown[64:] == 255).all()


def test_panels_that_are_no_images_are_refused():
    with pytest.raises(ConfigError, match="'codes'.*no image"):
        draw_panels({"codes": torch.zeros(2, 7)})
    with pytest.raises(ConfigError, match="as many images"):
        draw_panels({"a": torch.zeros(2, 1, 4, 4), "b": torch.zeros(3, 1, 4, 4)})


def built(name, **fields):
    """A method in its tiny configuration, and the images that its picture is made of."""
    config = contract.tiny(name)
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, **fields))
    method, _ = contract.build(config)
    return method.eval(), run.open_data(config)[0]


@pytest.mark.parametrize("name", methods.names())
def test_every_method_with_a_pretext_task_to_look_at_draws_it(name):
    method, images = built(name)
    before = {key: value.clone() for key, value in method.state_dict().items() if torch.is_tensor(value)}
    png = pretext_png(method, images)
    assert (png is None) == (name in WITHOUT)
    after = method.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert png == pretext_png(method, images)
    if png is not None:
        image = Image.open(io.BytesIO(png))
        assert image.format == "PNG" and 1000 < len(png) <= MOST_BYTES
        # images that are stored larger than the run's are drawn at its size
        stored = images.images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        larger = pretext_png(method, dataclasses.replace(images, images=stored))
        assert Image.open(io.BytesIO(larger)).size == image.size


def test_columns_are_left_out_of_a_file_that_would_be_too_large(monkeypatch):
    method, images = built("autoencoder")
    noise = torch.rand(8, 3, 128, 128)  # 49 kB each, which no PNG makes smaller
    monkeypatch.setattr(type(method), "solved", lambda self, batch, generator: {"a": noise, "b": noise})
    png = pretext_png(method, images)
    width, height = Image.open(io.BytesIO(png)).size
    assert (width, height) == (GAP + 3 * (128 + GAP), 2 * (TITLE + 128 + GAP))
    assert 290_000 < len(png) <= MOST_BYTES


class Says(torch.nn.Module):
    """In place of a head: what it is told to say."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


def panels(method, images):
    batch = images.batch(torch.arange(8))
    with torch.no_grad():
        return batch, method.solved(batch, torch.Generator().manual_seed(3))


def test_a_solved_puzzle_is_the_image(monkeypatch):
    method, images = built("jigsaw")
    right = method.config.orders * 8, len(method.permutations)
    monkeypatch.setattr(method, "logits", lambda _, labels: torch.eye(right[1])[labels])
    grid = dataclasses.replace(method.config.tiles, jitter="center")
    method.config = dataclasses.replace(method.config, tiles=grid)
    batch, found = panels(method, images)
    tiles = grid.apply(batch.images, grid.draw(8, torch.Generator()))
    assert not torch.equal((found["shuffled"] * 255).round().byte(), tiles)
    assert torch.equal((found["solved"] * 255).round().byte(), tiles)
    # and in the drawing: the first tile of the first image, in the second row
    factor = 128 // (3 * (grid.tile + 1) - 1)
    shown = panel_of(draw_panels(found), 1, 0, factor * (3 * (grid.tile + 1) - 1))
    corner = slice(0, grid.tile * factor, factor)
    assert (shown[corner, corner] == tiles[0, 0].movedim(0, 2).numpy()).all()


def test_a_right_prediction_turns_the_image_back():
    method, images = built("rotnet")
    batch, found = panels(method, images)
    true = batch.images.float() / 255
    turned = [torch.rot90(true, k, (2, 3)) for k in range(4)]
    errors = torch.stack([(x - found["rotated"]).abs().amax((1, 2, 3)) for x in turned])  # (4, N)
    turns = errors.argmin(0)
    assert errors.amin(0).max() < 1e-5 and len(set(turns.tolist())) > 1
    method.classifier = Says(lambda _: torch.eye(4)[turns])
    torch.testing.assert_close(panels(method, images)[1]["rotated back by the prediction"], true)


def test_only_the_hole_is_painted(monkeypatch):
    method, images = built("context_encoder")
    batch, found = panels(method, images)
    true, kept = batch.images.float() / 255, found["hole"] == found["true"]
    assert 0.5 < kept.float().mean() < 0.9
    torch.testing.assert_close(found["true"], true)
    assert torch.equal(found["painted"][kept], found["true"][kept])
    monkeypatch.setattr(method, "_painted", lambda x, hidden: x)
    assert torch.equal(panels(method, images)[1]["painted"], found["true"])


def test_only_hidden_patches_are_predicted(monkeypatch):
    method, images = built("mae")
    _, found = panels(method, images)
    kept = found["given"] == found["true"]
    assert 0.2 < kept.float().mean() < 0.4 and torch.equal(found["predicted"][kept], found["true"][kept])
    predict = method._predict
    monkeypatch.setattr(method, "_predict", lambda x, g: (predict(x, g)[1], *predict(x, g)[1:]))
    torch.testing.assert_close(panels(method, images)[1]["predicted"], found["true"], atol=1e-4, rtol=0)


def test_the_true_motion_gives_the_second_view(monkeypatch):
    method, images = built("egomotion")
    config = method.config
    motion = Motion.draw(8, config, torch.Generator().manual_seed(3))
    labels = motion.labels(config)
    told = motion.moved_by(*labels, config)
    # the first pose stays, exactly; the motion is the middle of its class
    torch.testing.assert_close(told.matrices(0), motion.matrices(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(told.shift, motion.shift)
    assert (told.turn - motion.turn).abs().max() <= np.radians(config.degrees / config.bins) + 1e-6
    middle = motion._replace(turn=told.turn)
    torch.testing.assert_close(
        middle.moved_by(*labels, config).matrices(1), middle.matrices(1), atol=1e-5, rtol=1e-5
    )
    right = [torch.eye(k)[c] for k, c in zip(method.classes, labels, strict=True)]
    monkeypatch.setattr(method, "_compare", lambda _: right)
    _, found = panels(method, images)
    second = found["second view"]
    error, moved = ((found[name] - second).abs().mean() for name in ("predicted second view", "first view"))
    assert error < 0.25 * moved


def test_patches_that_are_found_again_complete_the_image(monkeypatch):
    method, images = built("cpc")
    rows = method.facts.image_shape[1] // method.config.stride - 1
    grid = torch.randn(8, 16, rows, rows, generator=torch.Generator().manual_seed(0))
    grid = grid / grid.norm(dim=1, keepdim=True)
    last = rows - 1 - method.offsets[0][-1]
    monkeypatch.setattr(method, "_encode", lambda x: grid)
    method.target, method.context = torch.nn.Identity(), torch.nn.ModuleList([torch.nn.Identity()])
    layers = [Says(lambda _, k=k: grid[:, :, last + k : last + k + 1]) for k in method.offsets[0]]
    method.predict = torch.nn.ModuleList([torch.nn.ModuleList(layers)])
    _, found = panels(method, images)
    given, below = found["given"], last * method.config.stride + method.config.patch
    assert (given[:, :, below:] == 0).all()
    assert torch.equal(given[:, :, :below], found["true"][:, :, :below])
    assert torch.equal(found["nearest patches of all images"], found["true"])


def test_a_prior_that_knows_the_codes_continues_to_the_image(monkeypatch):
    method, images = built("vim")
    encoder, codes = method.encoder(), method.config.codes
    tokens = encoder.tokens(method.view(images.batch(torch.arange(8)).images))
    _, other = panels(method, images)
    assert not torch.allclose(other["continued"], other["through the codec"], atol=1e-3)
    monkeypatch.setattr(method, "encoder", lambda: encoder)  # it holds the prior
    method.prior = Says(lambda _: 1000.0 * torch.nn.functional.one_hot(tokens, codes))
    _, found = panels(method, images)
    whole, patch = found["through the codec"], method.decode.patch
    torch.testing.assert_close(found["continued"], whole)
    upper = whole.shape[2] // patch // 2 * patch
    assert (found["given"][:, :, upper:] == 0).all()
    assert torch.equal(found["given"][:, :, :upper], whole[:, :, :upper])


def test_one_color_a_code():
    method, images = built("vqgan")
    batch, found = panels(method, images)
    with torch.no_grad():
        indices = method.quantizer(method._encode(method.view(batch.images)))[1].flatten()
    colors = found["codes"].flatten(2).mT.flatten(0, 1)  # one row a token
    same = (colors[:, None] == colors[None]).all(2)
    assert torch.equal(same, indices[:, None] == indices[None]) and len(indices.unique()) > 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run that held images out."""
    folder = tmp_path_factory.mktemp("pretext") / "run"
    config = contract.tiny("rotnet")
    data = dataclasses.replace(config.data, path="synthetic:64", validation=0.25)
    run.train(dataclasses.replace(config, data=data, steps=2), out=folder, progress=False)
    return folder


def test_a_run_ends_with_the_image_and_an_entry_shows_it(finished, tmp_path):
    png = (finished / PRETEXT_IMAGE).read_bytes()
    (finished / PRETEXT_IMAGE).unlink()
    assert write_pretext_image(finished) == finished / PRETEXT_IMAGE
    assert (finished / PRETEXT_IMAGE).read_bytes() == png
    (finished / PRETEXT_IMAGE).unlink()  # a run that ended without it
    folder = export_run(finished, "rotnet-tiny.synthetic", tmp_path, license="CC0-1.0")
    assert (folder / PRETEXT_IMAGE).read_bytes() == png
    assert json.loads((folder / MANIFEST).read_text())["files"][PRETEXT_IMAGE]["size"] == len(png)
    assert f"]({PRETEXT_IMAGE})" in (folder / CARD).read_text()
    provenance = json.loads((folder / CONFIG).read_text())["embedkit"]["provenance"]
    assert provenance["pretext"]["rotation_accuracy_by_chance"] == 0.25
    assert "pretext_intervals" not in provenance  # of 20 images held out
    (finished / PRETEXT_IMAGE).write_bytes(png)


def test_nothing_held_out_nothing_drawn(tmp_path):
    result = run.train(
        dataclasses.replace(contract.tiny("rotnet"), steps=1), out=tmp_path / "run", progress=False
    )
    assert result.finished and not (tmp_path / "run" / PRETEXT_IMAGE).exists()
    assert write_pretext_image(tmp_path / "run") is None
    folder = export_run(tmp_path / "run", "rotnet-tiny.synthetic", tmp_path / "zoo", license="CC0-1.0")
    assert not (folder / PRETEXT_IMAGE).exists() and PRETEXT_IMAGE not in (folder / CARD).read_text()


def test_an_image_that_is_there_is_not_overwritten_by_a_new_run(tmp_path):
    (tmp_path / PRETEXT_IMAGE).write_bytes(b"mine")
    with pytest.raises(OutputError, match=PRETEXT_IMAGE):
        run.train(contract.tiny("rotnet"), out=tmp_path, progress=False)
