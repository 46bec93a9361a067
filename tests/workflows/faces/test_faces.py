"""Faces: the geometry against naive forms of it, and detection, alignment and decisions on real photographs.

The photographs are in the public domain: NASA's portrait of Eileen Collins, cropped in `samples/` and whole in
scikit-image, and, from matplotlib, the portrait of Grace Hopper by James S. Davis for the United States Navy.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from embedkit.cli.verify import verify as verify_command
from embedkit.encoder import load_encoder
from embedkit.errors import ConfigError, EntryError, ImageError, OutputError, SpaceMismatchError
from embedkit.images.transform import read_pixels, upright
from embedkit.model.preprocess import Preprocess
from embedkit.workflows.faces import alignment
from embedkit.workflows.faces.alignment import chip_of, sharpness_of, similarity_transform
from embedkit.workflows.faces.boxes import MOST, View, best_boxes, merged_boxes, page, views_of
from embedkit.workflows.faces.encoder import ENCODER, FaceEncoder
from embedkit.workflows.faces.finder import (
    DETECTOR,
    LANDMARKS,
    FaceFinder,
    choose_face,
    draw_faces,
)
from embedkit.workflows.faces.landmarks import from_input
from embedkit.workflows.verify import entry_threshold, verify

ROOT = Path(__file__).parents[3]
ZOO = ROOT / "zoo"
ASTRONAUT, COFFEE = ROOT / "samples" / "astronaut.jpg", ROOT / "samples" / "coffee.jpg"


@pytest.fixture(scope="module")
def people():
    return FaceEncoder(
        load_encoder(ZOO / ENCODER, device="cpu", threads=1),
        FaceFinder(ZOO / DETECTOR, ZOO / LANDMARKS, device="cpu", threads=1),
    )


@pytest.fixture(scope="module")
def astronaut():
    return Image.open(ASTRONAUT).convert("RGB")


@pytest.fixture(scope="module")
def hopper():
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from matplotlib import get_data_path

    return Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")


# -- geometry ----------------------------------------------------------------------------------------------------


def overlap(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    common = width * height
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (sum(area) - common)


def test_best_boxes_by_hand():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [5, 0, 15, 10], [20, 20, 30, 30]], float)
    scores = np.array([0.8, 0.9, 0.7, 0.6])
    # Box 1 first; 0 overlaps it by 90/110; 2 by 60/140 = 0.43.
    assert best_boxes(boxes, scores, 0.4) == [1, 3]
    assert best_boxes(boxes, scores, 0.5) == [1, 2, 3]
    assert best_boxes(boxes[:0], scores[:0]) == []


def test_best_boxes_as_a_naive_loop():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 80, (60, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (60, 2))], axis=1)
    scores = rng.uniform(size=60)
    kept = []
    for index in sorted(range(60), key=lambda i: -scores[i]):
        if all(overlap(boxes[index], boxes[other]) <= 0.3 for other in kept):
            kept.append(index)
    assert best_boxes(boxes, scores, 0.3) == kept


@pytest.mark.parametrize("size", [(970, 2204), (2204, 970), (900, 500), (5000, 3)])
def test_squares_of_a_long_image_cover_it_and_overlap(size):
    whole, *squares = views_of(size)
    assert whole == View((0, 0, *size)) and len(squares) <= MOST
    along = size.index(max(size))
    edges = [(view.box[along], view.box[along + 2]) for view in squares]
    assert edges[0][0] == 0 and edges[-1][1] == max(size)
    for (first, last), (begin, end) in zip(edges, edges[1:], strict=False):
        assert last - first == end - begin >= min(size)
        # A face of half the side lies whole in one of them, to a pixel of rounding.
        assert last - begin >= 0.5 * (last - first) - 1
    assert views_of((400, 300)) == [View((0, 0, 400, 300))]


@pytest.mark.parametrize("turn", range(4))
def test_places_in_a_turned_view_are_those_of_the_image(turn):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[11:15, 31:37] = 255  # top 11, left 31
    image = Image.fromarray(pixels)
    for view in (View((20, 5, 50, 35), turn), page(image.size, turn)):
        y, x = np.nonzero(np.asarray(view.pixels(image))[..., 0])
        box = np.array([[x.min(), y.min(), x.max() + 1, y.max() + 1]], float)
        np.testing.assert_array_equal(view.boxes(box), [[31, 11, 37, 15]])


def test_a_face_that_two_views_show_is_one():
    upper, lower = View((0, 0, 100, 100)), View((0, 50, 100, 150))
    whole, half, other = [10.0, 60, 50, 110], [10.0, 60, 50, 100], [60.0, 20, 90, 50]
    boxes, scores = merged_boxes(
        [
            (
                upper,
                np.array([half, other]),
                np.array([0.9, 0.8]),
            ),  # the first ends at an edge inside the image
            (lower, np.array([[10.0, 10, 50, 60]]), np.array([0.6])),
        ],
        (100, 150),
    )
    # The whole face wins over the cut one, whatever their scores, and is the larger one.
    assert boxes.tolist() == [whole, other] and scores.tolist() == [0.6, 0.8]
    # A cut box stays where no other view shows more.
    assert merged_boxes([(upper, np.array([half]), np.array([0.9]))], (100, 150))[0].tolist() == [half]


def test_the_similarity_is_found_again():
    rng = np.random.default_rng(0)
    source = rng.normal(0, 3, (9, 2))
    angle, scale, shift = 2.3, 0.4, np.array([5.0, -7.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = similarity_transform(source, scale * source @ turn.T + shift)
    np.testing.assert_allclose(found, np.column_stack([scale * turn, shift]), atol=1e-12)


def test_the_similarity_is_the_least_squares_one_and_never_mirrors():
    rng = np.random.default_rng(1)
    source = rng.normal(0, 3, (20, 2))
    for target in (source * 1.5 + rng.normal(0, 1, (20, 2)), source * [-1.0, 1.0]):
        # x' = a x - b y + u, y' = b x + a y + v is linear in (a, b, u, v).
        x, y = source.T
        ones, zeros = np.ones(20), np.zeros(20)
        design = np.concatenate(
            [np.stack([x, -y, ones, zeros], axis=1), np.stack([y, x, zeros, ones], axis=1)]
        )
        a, b, u, v = np.linalg.lstsq(design, target.T.ravel())[0]
        np.testing.assert_allclose(similarity_transform(source, target), [[a, -b, u], [b, a, v]], atol=1e-9)
    with pytest.raises(ImageError, match="all in one place"):
        similarity_transform(np.ones((4, 2)), source[:4])


def test_the_mean_face_is_symmetric_as_dlib_s():
    # About the bridge of the nose at x = 0.490127: left corner of the left eye (36) and right one of the right (45).
    places = dict(zip(alignment._POINTS, alignment._MEAN_FACE, strict=True))
    for left, right in ((36, 45), (39, 42), (48, 54), (31, 35), (60, 64)):
        assert places[left][0] + places[right][0] == pytest.approx(2 * 0.490127, abs=2e-5)
        assert places[left][1] == pytest.approx(places[right][1], abs=1e-6)
    assert len(alignment._POINTS) == len(alignment._MEAN_FACE) == 33


def face_points(scale, angle, shift):
    """68 points of the mean face, turned, and what does not align (jaw, brows, lower lip) anywhere."""
    points = np.random.default_rng(0).uniform(0, 500, (68, 2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points[alignment._POINTS] = scale * alignment._MEAN_FACE @ turn.T + shift
    return points


@pytest.mark.parametrize(
    ("scale", "angle"), [(100.0, 0.0), (60.0, 0.7), (400.0, -2.0)], ids=["as is", "small", "large"]
)
def test_a_chip_has_every_point_in_its_place(scale, angle):
    points = face_points(scale, angle, np.array([400.0, 450.0]))
    image = np.zeros((900, 900, 3), np.uint8)
    radius = max(2, round(scale / 30))
    y, x = np.mgrid[:900, :900] + 0.5
    for index, channel in ((36, 0), (45, 1), (33, 2)):
        px, py = points[index]
        image[(x - px) ** 2 + (y - py) ** 2 <= radius**2, channel] = 255
    chip = chip_of(Image.fromarray(image), points)
    assert chip.shape == (150, 150, 3) and chip.dtype == np.uint8
    places = dict(zip(alignment._POINTS, alignment._MEAN_FACE, strict=True))
    for index, channel in ((36, 0), (45, 1), (33, 2)):
        weight = chip[..., channel].astype(float)
        rows, columns = np.mgrid[:150, :150] + 0.5
        center = [(columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()]
        # dlib: a margin of 0.25 on each side of the unit square, over 150 pixels.
        np.testing.assert_allclose(center, (places[index] + 0.25) / 1.5 * 150, atol=0.5)


def test_a_chip_is_black_beyond_the_image():
    points = face_points(100.0, 0.0, np.array([0.0, 20.0]))  # the margin of 25 pixels lies outside
    chip = chip_of(Image.new("RGB", (300, 300), "white"), points)
    assert chip[75, 5].tolist() == [0, 0, 0] and chip[75, 60].tolist() == [255, 255, 255]


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (77, 512), (1000, 999), (40, 30)])
def test_places_are_mapped_back_from_the_networks_input(size):
    preprocess = Preprocess(
        size=(128, 128), resize="longest", resize_size=128, crop="none", mean=(0.5,) * 3, std=(0.5,) * 3
    )
    width, height = size
    y, x = np.mgrid[:height, :width] + 0.5
    place = np.array([0.3 * width, 0.6 * height])
    radius = max(width, height) / 20
    image = np.where(((x - place[0]) ** 2 + (y - place[1]) ** 2 <= radius**2)[..., None], 255, 0)
    image = np.repeat(image, 3, axis=2).astype(np.uint8)
    pixels = read_pixels(image, preprocess)[0].astype(float)
    rows, columns = np.mgrid[:128, :128] + 0.5
    share = np.array([(columns * pixels).sum(), (rows * pixels).sum()]) / pixels.sum() / 128
    found = from_input(share, size, preprocess)
    np.testing.assert_allclose(found, place, atol=0.01 * max(size))


def test_images_are_turned_upright_once():
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    file = io.BytesIO()
    plain.save(file, "PNG", exif=exif)
    found = upright(file.getvalue())
    assert found.size == (40, 30)
    np.testing.assert_array_equal(np.asarray(found), np.rot90(np.asarray(plain), -1))
    np.testing.assert_array_equal(np.asarray(upright(found)), np.asarray(found))
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(upright(clear)).min() == 255
    with pytest.raises(ConfigError, match="an image must be"):
        upright(3)
    with pytest.raises(ImageError, match="empty"):
        upright(b"")


# -- photographs -------------------------------------------------------------------------------------------------


def test_one_face_where_there_is_one(people, astronaut):
    (face,) = people.finder.find(astronaut)
    assert face.score > 0.9 and face.points.shape == (68, 2) and face.chip.shape == (150, 150, 3)
    left, top, right, bottom = face.box
    assert 0 <= left < right <= astronaut.width and 0 <= top < bottom <= astronaut.height
    # Eyes above nose above mouth, the left eye of the image on the left, all inside or close to the box.
    eye_left, eye_right = face.points[36:42].mean(axis=0), face.points[42:48].mean(axis=0)
    nose, mouth = face.points[30], face.points[48:68].mean(axis=0)
    assert left < eye_left[0] < nose[0] < eye_right[0] < right
    assert top < eye_left[1] < nose[1] < mouth[1] < bottom
    # The similarity leaves little: the points lie where dlib's mean face has them, within 5 of 150 pixels.
    places = (alignment._MEAN_FACE + 0.25) / 1.5 * 150
    matrix = similarity_transform(face.points[alignment._POINTS], places)
    moved = face.points[alignment._POINTS] @ matrix[:, :2].T + matrix[:, 2]
    assert np.sqrt(((moved - places) ** 2).sum(axis=1).mean()) < 5


def test_scikit_image_s_astronaut_is_the_same_person(people, astronaut):
    data = pytest.importorskip("skimage.data", reason="pip install scikit-image")
    result = verify(people, astronaut, data.astronaut())
    assert result.is_match and result.score > 0.95
    faces = people.finder.find(data.astronaut())
    assert len(faces) == 1
    # The face is between columns 170 and 280 and rows 60 and 190 of the 512.
    left, top, right, bottom = faces[0].box
    assert 160 < left < 210 and 50 < top < 100 and 240 < right < 290 and 150 < bottom < 200
    assert people.finder.find(data.coffee()) == []


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


#: The boxes of the two faces, by the size of their photographs.
FACES = {(480, 480): (170, 68, 248, 164), (512, 600): (173, 123, 349, 327)}
CHANGES = {
    "mirrored": ImageOps.mirror,
    "turned": lambda p: p.rotate(15, Image.Resampling.BICUBIC, expand=True),
    "turned by 30 degrees": lambda p: p.rotate(30, Image.Resampling.BICUBIC, expand=True),
    "on its left side": lambda p: p.transpose(Image.Transpose.ROTATE_90),
    "on its right side": lambda p: p.transpose(Image.Transpose.ROTATE_270),
    "upside down": lambda p: p.transpose(Image.Transpose.ROTATE_180),
    "cropped tightly": lambda p: p.crop(FACES[p.size]),
    "darker": lambda p: ImageEnhance.Brightness(p).enhance(0.5),
    "gray": lambda p: p.convert("L"),
    "half": lambda p: p.resize((p.width // 2, p.height // 2), Image.Resampling.LANCZOS),
    "compressed": lambda p: jpeg(p, 25),
    "on a large page": lambda p: ImageOps.expand(p, p.width // 2, "gray"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_portrait_is_the_same_person(people, astronaut, hopper, change):
    rows = []
    for person in (astronaut, hopper):
        before, after = (
            people.encode_faces([choose_face(people.finder.find(image))], normalize=False)[0]
            for image in (person, CHANGES[change](person))
        )
        assert np.linalg.norm(before - after) < 0.6  # dlib's rule
        assert verify(people, person, CHANGES[change](person)).is_match
        rows.append(after)
    assert np.linalg.norm(rows[0] - rows[1]) > 0.6


@pytest.mark.parametrize("degrees", [0, 30, 90, 180, 270])
def test_how_far_a_face_is_turned(people, astronaut, degrees):
    (face,) = people.finder.find(astronaut.rotate(degrees, Image.Resampling.BICUBIC, expand=True))
    upright_roll = -2.2  # of the photograph itself
    assert abs((face.roll - degrees - upright_roll + 180) % 360 - 180) < 6


@pytest.mark.parametrize("name", ["cat.jpg", "cat-closer.jpg"])
def test_a_cat_has_no_face_and_is_told_why(people, astronaut, name):
    found = people.finder.examine(ROOT / "samples" / name)
    assert found.faces == [] and found.refused[0].score > 0.5
    with pytest.raises(ImageError, match=r"no face was found; what scores 0\.\d\d at .* its landmarks move"):
        verify(people, astronaut, ROOT / "samples" / name)


@pytest.mark.parametrize("shape", [(640, 1138), (1493, 640)], ids=["9:16", "21:9"])
@pytest.mark.parametrize("height", [80, 180])
def test_no_pasted_portrait_is_lost_and_none_is_found_twice(people, astronaut, hopper, shape, height):
    for portrait in (astronaut, hopper):
        left, top, right, bottom = FACES[portrait.size]
        margin = (bottom - top) // 2
        part = portrait.crop((max(0, left - margin), max(0, top - margin), right + margin, bottom + margin))
        scale = height / (bottom - top)
        part = part.resize((round(part.width * scale), round(part.height * scale)), Image.Resampling.LANCZOS)
        for x, y in ((0, 0), (0.5, 0.5), (1, 1)):
            canvas = Image.new("RGB", shape, (140, 140, 140))
            at = round((shape[0] - part.width) * x), round((shape[1] - part.height) * y)
            canvas.paste(part, at)
            (face,) = people.finder.find(canvas)
            middle = (face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2
            true = [at[0] + (min(left, margin) + (right - left) / 2) * scale]
            true += [at[1] + (min(top, margin) + (bottom - top) / 2) * scale]
            assert np.hypot(middle[0] - true[0], middle[1] - true[1]) < height / 3


def test_landmarks_of_small_faces_hold_still_and_those_of_patches_do_not(people):
    skimage = pytest.importorskip("skimage", reason="pip install scikit-image")
    chips = np.load(Path(skimage.__path__[0]) / "data" / "lfw_subset.npy")  # (200, 25, 25), 100 faces first
    still = []
    for chip in chips[::10]:
        large = Image.fromarray((chip * 255).astype(np.uint8)).resize((150, 150), Image.Resampling.LANCZOS)
        (marked,) = people.finder._landmarker.mark(large.convert("RGB"), np.array([[5.0, 0, 145, 150]]))
        still.append(marked.is_face and marked.turn == 0)
    assert sum(still[:10]) >= 9 and sum(still[10:]) == 0


def test_scores_and_sizes_of_faces_can_be_asked_for(people, astronaut):
    finder = people.finder
    (face,) = finder.find(astronaut)
    assert finder.find(astronaut, min_score=0.999) == [] and face.score > 0.9
    small = FaceFinder(ZOO / DETECTOR, ZOO / LANDMARKS, min_size=60, device="cpu", threads=1)
    assert len(small.find(astronaut)) == 1  # 78 by 96 pixels
    found = small.examine(astronaut.resize((240, 240), Image.Resampling.LANCZOS))
    assert found.faces == [] and "below the least size of 60" in found.refused[0].reason
    with pytest.raises(ConfigError, match="min_size: .* from 0 on"):
        FaceFinder(ZOO / DETECTOR, ZOO / LANDMARKS, min_size=-1)


def test_a_blurred_chip_is_less_sharp(people, astronaut):
    (sharp,), (blurred,) = (
        people.finder.find(image) for image in (astronaut, astronaut.filter(ImageFilter.GaussianBlur(1.5)))
    )
    assert sharp.sharpness > 2 * blurred.sharpness
    # By hand: one bright pixel of 9 gray levels in 4 x 4, whose Laplacians are -36, 9, 9, 0: variance 364.5 - 20.25.
    chip = np.zeros((4, 4, 3), np.uint8)
    chip[1, 1] = 9
    assert sharpness_of(chip) == pytest.approx((36**2 + 9**2 + 9**2) / 4 - ((9 + 9 - 36) / 4) ** 2)


def test_two_people_are_two(people, astronaut, hopper):
    result = verify(people, astronaut, hopper)
    assert not result.is_match and result.threshold == pytest.approx(0.916)
    assert result.expected_fmr is None and result.probability is None
    # The cosine that the entry names is dlib's distance of 0.6 at the mean length of a row.
    rule = people.encoder.config.provenance["verification"]
    assert 1 - rule["distance"] ** 2 / (2 * rule["mean_length"] ** 2) == pytest.approx(
        rule["cosine"], abs=5e-4
    )


@pytest.fixture(scope="module")
def couple(astronaut, hopper):
    """Two people side by side, the second one larger."""
    sheet = Image.new("RGB", (astronaut.width + hopper.width, max(astronaut.height, hopper.height)))
    sheet.paste(astronaut, (0, 0))
    sheet.paste(hopper, (astronaut.width, 0))
    return sheet


def test_parts_are_numbered_by_size(people, couple, astronaut, hopper, tmp_path):
    faces, rows = people.encode(couple)
    assert len(faces) == 2 and rows.shape == (2, 128)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (face.box for face in faces)]
    assert areas[0] > areas[1]
    couple.save(tmp_path / "couple.png")
    paths = [str(tmp_path / "couple.png"), str(COFFEE), str(ASTRONAUT)]
    embeddings = people.embed(paths)
    assert embeddings.ids == [paths[0], paths[0], paths[2]]
    assert embeddings.parts.tolist() == [0, 1, 0] and embeddings.parts.dtype == np.int32
    np.testing.assert_allclose(embeddings.vectors[:2], rows, atol=1e-6)
    assert embeddings.metadata.fingerprint == people.encoder.fingerprint
    assert embeddings.labels["score"][:2] == [face.score for face in faces]
    # The larger face is the second person's.
    for part, person in enumerate((hopper, astronaut)):
        assert verify(people, faces[part], person).is_match
    assert len(people.embed([str(COFFEE)])) == 0


# -- bad input ---------------------------------------------------------------------------------------------------


def test_no_face_and_several(people, couple, astronaut):
    with pytest.raises(ImageError, match=r"coffee\.jpg: no face was found"):
        verify(people, astronaut, COFFEE)
    found = verify(people, astronaut, couple)
    assert found.is_match and (found.part_a, found.part_b, found.pairs) == (
        0,
        1,
        2,
    )  # the smaller face is hers
    faces = people.finder.find(couple)
    with pytest.raises(ImageError, match=r"2 faces were found .* part="):
        choose_face(faces)
    assert choose_face(faces, 1) is faces[1]
    with pytest.raises(ImageError, match="there is no face 2; the last one is 1"):
        choose_face(faces, 2)


@pytest.mark.parametrize(
    "image", [Image.new("RGB", (1, 1)), Image.new("L", (5000, 3)), np.zeros((3, 900), np.uint8)]
)
def test_images_of_odd_shapes_have_no_face(people, image):
    assert people.finder.find(image) == []


def test_images_that_cannot_be_read(people, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("text")
    with pytest.raises(ImageError, match=r"text\.jpg: not an image"):
        people.finder.find(text)
    with pytest.raises(ImageError, match=r"nothing\.jpg: No such file"):
        verify(people, tmp_path / "nothing.jpg", ASTRONAUT)
    with pytest.raises(ImageError, match="damaged|not an image"):
        people.finder.find(ASTRONAUT.read_bytes()[:300])
    with pytest.raises(ConfigError, match=r"min_score: .* \[0, 1\]"):
        people.finder.find(ASTRONAUT, min_score=2)
    with pytest.raises(OutputError, match=r"give a \.png file"):
        draw_faces([(ASTRONAUT, [])], tmp_path / "out.xyz")


def test_entries_of_another_kind(encoder):
    with pytest.raises(EntryError, match="expected a detector with boxes and scores, found a landmarks"):
        FaceFinder(ZOO / LANDMARKS, ZOO / LANDMARKS)
    with pytest.raises(EntryError, match="is a detector, not an encoder"):
        load_encoder(ZOO / DETECTOR)
    with pytest.raises(ConfigError, match="none of its own"):
        entry_threshold(encoder)


def test_a_threshold_or_a_calibration_decides(people, encoder, astronaut):
    assert not verify(people, astronaut, ImageOps.mirror(astronaut), threshold=0.9999999).is_match
    assert verify(encoder, ASTRONAUT, ASTRONAUT, threshold=0.99).score == pytest.approx(1, abs=1e-6)

    class Other:
        """Stands for a calibration; only the check of its space is asked for."""

        def _check_space(self, metadata, where):
            raise SpaceMismatchError(f"{metadata.entry} {metadata.fingerprint[:12]} {where}")

    with pytest.raises(SpaceMismatchError, match="face-r29.dlib"):
        verify(people, astronaut, astronaut, calibration=Other())


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch):
    app = typer.Typer()
    app.command()(verify_command)
    monkeypatch.setenv("EMBEDKIT_ZOO", str(ZOO))
    common = ["--device", "cpu", "--threads", "1"]
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments), *common])


def test_the_command_compares_faces_and_draws(run, couple, tmp_path):
    couple.save(tmp_path / "couple.png")
    drawn = tmp_path / "drawn.png"
    several = run(ASTRONAUT, tmp_path / "couple.png", "--faces", "--draw-faces", drawn)
    heading, row = (line.split("\t") for line in several.stdout.splitlines())
    assert row[0] == "match" and row[heading.index("face of B")] == "1"
    pixels = np.asarray(Image.open(drawn))  # the numbers to choose by
    assert (pixels == (0, 255, 0)).all(axis=2).sum() > 500
    for part, word in ((1, "match"), (0, "no match")):
        done = run(ASTRONAUT, tmp_path / "couple.png", "--faces", "--part-b", part)
        assert done.exit_code == 0 and done.stdout.splitlines()[1].startswith(f"{word}\t0.")
    told = run(ASTRONAUT, ASTRONAUT, "--faces", "--json")
    data = json.loads(told.stdout)
    assert data["is_match"] and data["encoder"] == ENCODER and len(data["faces"][1]) == 1


def test_the_command_compares_whole_images(run):
    done = run(ASTRONAUT, COFFEE, "--threshold", 0.5)
    assert done.exit_code == 0 and done.stdout.splitlines()[1].startswith("no match\t")
    assert run(ASTRONAUT, COFFEE, "--threshold", 0.5, "--exit-status").exit_code == 3
    assert run(ASTRONAUT, ASTRONAUT, "--threshold", 0.5, "--exit-status").exit_code == 0
    assert "uncalibrated" in done.stderr
    assert run(ASTRONAUT, COFFEE, "--draw-faces", "x.png").exit_code == 2
    assert isinstance(run(ASTRONAUT, COFFEE).exception, ConfigError)
