"""Faces: how many pasted portraits are found, what images without a face give, and how long it takes.

    python benchmarks/faces.py pasted       # two portraits at 9 positions x 5 shapes x 4 sizes
    python benchmarks/faces.py lfw          # 100 small faces of LFW, and 100 patches beside them (scikit-image)
    python benchmarks/faces.py album        # 60 images of four people and none: embedded, and clustered by person
    python benchmarks/faces.py none DATA    # images without a face, by the ids of benchmarks/no_faces.csv

The portraits are in the public domain: Eileen Collins (`samples/`) and Grace Hopper (matplotlib). DATA is a folder with
`emoji/test.parquet` and `photos/test.parquet`, as the trainings of the zoo used them.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from embedkit.workflows.faces.encoder import ENCODER
from embedkit.workflows.faces.finder import DETECTOR, LANDMARKS, FaceFinder

ROOT = Path(__file__).parents[1]
SHAPES = {"1:1": (1, 1), "9:16": (9, 16), "16:9": (16, 9), "9:21": (9, 21), "21:9": (21, 9)}
#: The shorter side of a canvas, and the heights of faces on it, in pixels.
SHORT, HEIGHTS = 640, (80, 120, 180, 260)
POSITIONS = [(x, y) for y in (0, 0.5, 1) for x in (0, 0.5, 1)]


def portraits() -> list[tuple[Image.Image, tuple[float, float, float, float]]]:
    """Two portraits, each with the box of its face."""
    from matplotlib import get_data_path

    hopper = Image.open(Path(get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    astronaut = Image.open(ROOT / "samples" / "astronaut.jpg").convert("RGB")
    return [(astronaut, (170, 68, 248, 164)), (hopper, (173, 123, 349, 327))]


def pasted(
    portrait: Image.Image,
    box: tuple[float, float, float, float],
    height: float,
    shape: str,
    place: tuple[float, float],
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A portrait, with half a face's length around its face, on a gray canvas; and where its face is there."""
    left, top, right, bottom = box
    margin = (bottom - top) / 2
    edges = [max(0, round(left - margin)), max(0, round(top - margin))]
    edges += [min(portrait.width, round(right + margin)), min(portrait.height, round(bottom + margin))]
    scale = height / (bottom - top)
    size = round((edges[2] - edges[0]) * scale), round((edges[3] - edges[1]) * scale)
    part = portrait.crop(tuple(edges)).resize(size, Image.Resampling.LANCZOS)
    across, down = SHAPES[shape]
    unit = SHORT / min(across, down)
    canvas = Image.new("RGB", (round(across * unit), round(down * unit)), (140, 140, 140))
    x, y = round((canvas.width - part.width) * place[0]), round((canvas.height - part.height) * place[1])
    canvas.paste(part, (x, y))
    xs = [x + (edge - edges[0]) * scale for edge in (left, right)]
    ys = [y + (edge - edges[1]) * scale for edge in (top, bottom)]
    return canvas, (xs[0], ys[0], xs[1], ys[1])


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return width * height / (areas - width * height)


def measure_pasted(finder: FaceFinder) -> None:
    """Print for each shape and size how many of 18 faces are lost, and how many are found that are not there."""
    print("shape\theight\tlost\textra\tcore seconds per image")
    for shape in SHAPES:
        for height in HEIGHTS:
            lost = extra = 0
            started = time.process_time()
            for portrait, box in portraits():
                for place in POSITIONS:
                    canvas, true = pasted(portrait, box, height, shape, place)
                    right = [overlap(face.box, true) > 0.4 for face in finder.find(canvas)]
                    lost, extra = lost + (not any(right)), extra + max(0, len(right) - any(right))
            seconds = (time.process_time() - started) / 18
            print(f"{shape}\t{height}\t{lost}\t{extra}\t{seconds:.3f}", flush=True)


def measure_lfw(finder: FaceFinder) -> None:
    """Print how many of the small faces are found on a gray canvas, and how many of the patches."""
    found = [len(finder.find(on_page(chip))) for chip in lfw()]
    print(f"{np.count_nonzero(found[:100])} of 100 faces, {np.count_nonzero(found[100:])} of 100 patches")


def measure_none(finder: FaceFinder, data: Path) -> None:
    """Print which images without a face have one."""
    import pyarrow.parquet as pq

    with open(Path(__file__).parent / "no_faces.csv", newline="") as file:
        asked = [(row["file"], row["path"]) for row in csv.DictReader(file)]
    images = {}
    for name in dict.fromkeys(name for name, _ in asked):
        for image in pq.read_table(data / name, columns=["image"])["image"].to_pylist():
            images[name, image["path"]] = image["bytes"]
    started = time.process_time()
    found = {key: finder.examine(images[key]) for key in asked}
    seconds = (time.process_time() - started) / len(asked)
    faces = {key: one.faces for key, one in found.items() if one.faces}
    refused = sum(bool(one.refused) for one in found.values())
    print(
        f"{len(faces)} of {len(asked)} have a face, {refused} have a box refused; {seconds:.3f} core seconds an image"
    )
    for key, several in faces.items():
        print(*key, [(round(face.score, 2), [round(edge) for edge in face.box]) for face in several])


def lfw() -> np.ndarray:
    """Float (200, 25, 25): 100 faces of LFW, then 100 patches beside faces."""
    import skimage

    chips: np.ndarray = np.load(Path(skimage.__path__[0]) / "data" / "lfw_subset.npy")
    return chips


def on_page(chip: np.ndarray) -> Image.Image:
    """A small face of LFW, twice as large, on a gray page."""
    small = Image.fromarray((chip * 255).astype(np.uint8)).resize((50, 50), Image.Resampling.LANCZOS)
    page = Image.new("RGB", (300, 300), (128, 128, 128))
    page.paste(small.convert("RGB"), (125, 125))
    return page


def measure_album(finder: FaceFinder) -> None:
    """Embed the faces of an album, cluster them, and print the adjusted Rand index against who they are."""
    from tempfile import TemporaryDirectory

    from sklearn.metrics import adjusted_rand_score

    import embedkit
    from embedkit.workflows import FaceParts

    people = [portrait for portrait, _ in portraits()]
    people += [page for page in map(on_page, lfw()[:100]) if finder.find(page)][:2]
    changes = [(mirror, turn, light) for mirror in (0, 1) for turn in (-12, 0, 12) for light in (0.7, 1.2)]
    with TemporaryDirectory() as folder:
        for who, portrait in enumerate(people):
            for number, (mirror, turn, light) in enumerate(changes):
                image = ImageOps.mirror(portrait) if mirror else portrait
                image = image.rotate(turn, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))
                ImageEnhance.Brightness(image).enhance(light).save(Path(folder) / f"{who}-{number}.png")
        for number, name in enumerate(("cat.jpg", "cat-closer.jpg", "coffee.jpg", "rocket.jpg") * 3):
            image = Image.open(ROOT / "samples" / name).convert("RGB")
            image.resize((image.width - number, image.height)).save(Path(folder) / f"none-{number}.png")
        output = Path(folder) / "people.parquet"
        encoder = embedkit.load_encoder(ROOT / "zoo" / ENCODER, device="cpu", threads=1)
        embedkit.embed(folder, output, encoder=encoder, parts=FaceParts(finder), root=folder)
        rows = embedkit.Embeddings.load(output)
    who = [name.split("-")[0] for name in rows.ids]
    for clusters in (4, None):
        labels = embedkit.cluster(rows, "kmeans", clusters, seed=0).labels
        rand = adjusted_rand_score(who, labels)
        print(
            f"k={clusters}: {len(rows)} faces in 60 images, {len(set(labels.tolist()))} clusters, ARI {rand:.3f}"
        )
    print({name: who.count(name) for name in sorted(set(who))})


if __name__ == "__main__":
    zoo = ROOT / "zoo"
    loaded = FaceFinder(zoo / DETECTOR, zoo / LANDMARKS, device="cpu", threads=1)
    match sys.argv[1:]:
        case ["pasted"]:
            measure_pasted(loaded)
        case ["lfw"]:
            measure_lfw(loaded)
        case ["album"]:
            measure_album(loaded)
        case ["none", folder]:
            measure_none(loaded, Path(folder))
        case _:
            sys.exit(__doc__)
