"""Faces: an encoder of aligned faces, a detector and 68 landmarks, from the npm package `@vladmandic/face-api`.

The package's `model/` folder holds each network as a manifest (tensors by name, shape and quantization) and shards
of bytes that are one after the other. A quantized tensor is uint8 with a scale and a minimum: value x scale + min.
The networks that take these tensors, and their sources, stand in `embedkit.training.importers.face_networks`.

Differences from the package: dlib divides pixels by 256, as this does, and the package by 255, which moves a face's
row of length 1.5 by 0.002.

    npm pack @vladmandic/face-api@1.7.15
    python -m embedkit.training.importers.face_api vladmandic-face-api-1.7.15.tgz --zoo zoo
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from embedkit.authoring.golden import sample_pixels
from embedkit.errors import EntryError, IntegrityError, SourceError
from embedkit.model.card import Card
from embedkit.model.config import EntryConfig
from embedkit.model.layout import sha256_hex
from embedkit.model.manifest import Manifest
from embedkit.model.preprocess import Preprocess
from embedkit.training.export.writer import update_index, write_entry
from embedkit.training.importers.face_networks import VERSION, face_detector, face_landmarks, face_resnet

ENCODER, DETECTOR, LANDMARKS = (
    "face-r29.dlib",
    "face_detector-ssd_mobilenet1.widerface",
    "face_landmarks-dense68.faceapi",
)

#: ImageNet's mean color on 0..255, which dlib subtracts; the landmark network took it over.
MEAN = (122.782, 117.001, 104.298)


def read_tensors(source: Path, network: str, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of one network, dequantized.

    Args:
        source: The package as npm packs it (`.tgz`), unpacked, or its `model` folder.
        network: The name before `-weights_manifest.json`.
        sha256: What the shards, one after the other, must hash to.

    Returns:
        float32 and int32 tensors by name; convolutions are (kernel height, kernel width, in, out).

    Raises:
        SourceError: No such package, or a file of it is missing.
        EntryError: A manifest that is none, or that does not fit its shards.
        IntegrityError: Other weights than those that this importer was written for.
    """
    where = f"{network}-weights_manifest.json"
    tensors: dict[str, Tensor] = {}
    shards = b""
    try:
        for group in json.loads(_read(source, where)):
            data = b"".join(_read(source, path) for path in group["paths"])
            shards += data
            at = 0
            for spec in group["weights"]:
                name, shape, stored = spec["name"], spec["shape"], spec.get("quantization")
                dtype = np.dtype({"float32": "<f4", "int32": "<i4"}[spec["dtype"]])
                width = np.dtype({"uint8": "u1", "uint16": "<u2"}[stored["dtype"]]) if stored else dtype
                count = math.prod(shape)
                values = np.frombuffer(data, width, count, at)
                if stored:
                    values = values * np.float64(stored["scale"]) + np.float64(stored["min"])
                tensors[name] = torch.from_numpy(values.astype(dtype).reshape(shape))
                at += count * width.itemsize
            if at != len(data):
                raise ValueError(f"its tensors take {at} bytes of {len(data)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EntryError(f"{source}: {where} is damaged ({error}); pack version {VERSION} again") from None
    if sha256 is not None and sha256_hex(shards) != sha256:
        raise IntegrityError(
            f"{source}: the weights of {network} are not those of version {VERSION}: "
            f"npm pack @vladmandic/face-api@{VERSION}"
        )
    return tensors


def _read(source: Path, name: str) -> bytes:
    """One file of the package's `model` folder."""
    if Path(name).name != name:
        raise EntryError(f"{source}: {name[:80]!r} is not the name of a file in the package's model folder")
    try:
        if os.path.isdir(source):
            folder = source / "model" if os.path.isdir(source / "model") else source
            return (folder / name).read_bytes()
        with tarfile.open(source) as archive:
            member = archive.extractfile(f"package/model/{name}")
            return member.read() if member is not None else b""
    except (OSError, KeyError, tarfile.TarError) as error:
        raise SourceError(
            f"{source}: model/{name} cannot be read ({error}); give the file that "
            f"`npm pack @vladmandic/face-api@{VERSION}` writes, or its folder"
        ) from None


@dataclass(frozen=True, kw_only=True)
class _Import:
    """What one of the package's networks becomes."""

    entry: str
    network: str
    sha256: str
    build: Callable[[Mapping[str, Tensor]], nn.Module]
    config: EntryConfig
    card: Card


def _scaled_to(size: int, resize: str, divisor: float) -> Preprocess:
    """(x - mean) / divisor on 0..255, in units of [0, 1]."""
    return Preprocess(
        size=(size, size),
        resize=resize,
        resize_size=0 if resize == "squash" else size,
        interpolation="bilinear",
        crop="none",
        mean=tuple(value / 255 for value in MEAN),
        std=(divisor / 255,) * 3,
    )


_NO_TIMM = "timm does not have this architecture: the entry is loaded by embedkit, or as plain ONNX."
_PHOTOGRAPHS = """```python
from embedkit import FaceEncoder

faces = FaceEncoder()
found, rows = faces.encode("photograph.jpg")  # Face (box, score, points, chip), largest first; float32 (F, 128)
```

On the command line: `embedkit verify --faces a.jpg b.jpg`."""

IMPORTS = (
    _Import(
        entry=ENCODER,
        network="face_recognition_model",
        sha256="b413e420d6840b2775fba32008db6f3cddb07d485967fb42cfcf379c16a8c589",
        build=face_resnet,
        config=EntryConfig(
            architecture="dlib_face_resnet29",
            outputs={"embedding": (128,)},
            method="face",
            dim=128,
            preprocess=_scaled_to(150, "squash", 256),
            data="about 3 million faces of 7,485 people (FaceScrub, VGG Face, images of the web), by dlib's author",
            license="CC0-1.0",
            provenance={
                "origin": "dlib_face_recognition_resnet_model_v1 by Davis King, in the public domain (CC0 1.0); the "
                "package that carries it is MIT (Vladimir Mandic, after face-api.js by Vincent Muehler)",
                "changed": "scale layers folded into their convolutions",
                "verification": {"distance": 0.6, "mean_length": 1.466, "cosine": 0.916},
            },
        ),
        card=Card(
            summary="dlib's face recognition network: images of one person's aligned face lie close together. It "
            "takes chips of 150 x 150 pixels as `embedkit.FaceEncoder` cuts them from photographs, not "
            "photographs.",
            tags=("face-recognition", "dlib"),
            use=_PHOTOGRAPHS,
            limits=(
                "Its input is an aligned face (dlib's chip: 68 landmarks, padding 0.25). Of a whole photograph, "
                "squashed to 150 x 150, it says nothing.",
                "dlib's rule, a Euclidean distance below 0.6 between raw rows, is a cosine above 0.916 for the rows' "
                "mean length n of 1.466 (24 faces, standard deviation 0.032), since d^2 = 2 n^2 (1 - cosine); the "
                "two rules agreed on 273 of their 276 pairs. Unlike most encoders, unrelated faces have cosines of "
                "0.8 to 0.9, and people of like age, sex and origin higher ones: calibrate on people like yours.",
                "dlib reports 99.38 % on LFW, whose people are mostly white, male and adult; errors are known to be "
                "more frequent for other groups and for children. Look at the error rates of each group.",
                _NO_TIMM,
                "A face is biometric data: in many places you need the person's consent to process it.",
            ),
        ),
    ),
    _Import(
        entry=DETECTOR,
        network="ssd_mobilenetv1_model",
        sha256="2835640602d53718aa6ae9a42896327eaa21beefed056c218d32ca7d79e1e2f8",
        build=face_detector,
        config=EntryConfig(
            architecture="ssd_mobilenet_v1",
            kind="detector",
            outputs={"boxes": (5118, 4), "scores": (5118,)},
            method="face_detector",
            dim=5118 * 5,
            preprocess=Preprocess(
                size=(512, 512),
                resize="longest",
                resize_size=512,
                interpolation="bilinear",
                crop="none",
                mean=(0.5,) * 3,
                std=(0.5,) * 3,
            ),
            data="WIDER FACE (32,203 photographs with 393,703 faces)",
            license="MIT",
            provenance={
                "origin": "SSD MobileNet v1 of github.com/yeephycho/tensorflow-face-detection, as face-api.js took it "
                "over; the package that carries it is MIT (Vladimir Mandic)",
                "changed": "BatchNorm folded into its convolutions; the third class left out",
            },
        ),
        card=Card(
            summary="Finds faces in photographs: 5118 boxes and how sure each is a face. "
            "`embedkit.FaceEncoder` keeps the best of those that overlap.",
            tags=("face-detection",),
            use=_PHOTOGRAPHS,
            limits=(
                "Small faces are missed. Of 22 faces it found 21 where they were 67 pixels high (the photograph's "
                "longer side being 512), 18 at 34, 17 at 24, 13 at 17 and 6 at 10.",
                "A cat's face may be taken for one: among 62 photographs and drawings without a person's face that "
                "was the one false find at a score of 0.5.",
                _NO_TIMM,
            ),
        ),
    ),
    _Import(
        entry=LANDMARKS,
        network="face_landmark_68_model",
        sha256="4611ef65c87d836d03d684b30eec4d195d8b219fa1dd58fc58945831c6b9299b",
        build=face_landmarks,
        config=EntryConfig(
            architecture="face_api_dense68",
            kind="landmarks",
            outputs={"points": (68, 2)},
            method="face_landmarks",
            dim=136,
            preprocess=_scaled_to(112, "longest", 255),
            data="about 35,000 faces with 68 points each, by the author of face-api.js",
            license="MIT",
            provenance={
                "origin": "face-api.js by Vincent Muehler, MIT; the package that carries it is MIT (Vladimir Mandic)",
                "changed": "nothing but the dequantization",
            },
        ),
        card=Card(
            summary="68 points on a face that was cut out of a photograph, in dlib's order (iBUG 300-W).",
            tags=("face-landmarks",),
            use=_PHOTOGRAPHS,
            limits=(
                "It wants the box of a detector, not the whole photograph, and always gives 68 points, whether there "
                "is a face or not.",
                "Points of a profile, and those that are covered, are guesses.",
                _NO_TIMM,
            ),
        ),
    ),
)


def import_face_api(
    source: Path, zoo: Path, *, samples: str | os.PathLike[str] | None = None, described: str = "photographs"
) -> dict[str, Manifest]:
    """Write the entries of the encoder, the detector and the landmarks, and the zoo's index.

    Args:
        source: The package as npm packs it (`.tgz`), unpacked, or its `model` folder.
        zoo: The folder that holds the entries.
        samples: 64 or more images of single faces to measure rounding and parity on, as `embedkit embed` takes
            them; synthetic images by default, on which a detector has little to say.
        described: What those images are, for the cards.

    Returns:
        The manifests by entry.

    Raises:
        SourceError: No such package.
        IntegrityError: Another version's weights.
        ParityError: ONNX Runtime and torch disagree; that entry is not written.
    """
    manifests = {}
    for item in IMPORTS:
        network = item.build(read_tensors(source, item.network, sha256=item.sha256))
        provenance = {
            "source": f"npm @vladmandic/face-api {VERSION}",
            "file": f"model/{item.network}",
            "sha256": item.sha256,
            **item.config.provenance,
            "importer": "embedkit.training.importers.face_api",
            "compared_on": "synthetic images" if samples is None else described,
        }
        manifests[item.entry] = write_entry(
            zoo / item.entry,
            network=network,
            config=dataclasses.replace(item.config, provenance=provenance, card=item.card),
            samples=sample_pixels(item.config.preprocess, samples),
        )
    update_index(zoo)
    return manifests


def _main() -> None:
    parser = argparse.ArgumentParser(description="Write the entries of faces.")
    parser.add_argument("source", type=Path, help="the package: the .tgz that npm packs, or its folder")
    parser.add_argument("--zoo", type=Path, default=Path("zoo"), help="folder of the entries")
    parser.add_argument("--samples", help="64 or more images of faces: a folder or a Parquet file")
    parser.add_argument("--described", default="photographs", help="what the samples are, for the cards")
    arguments = parser.parse_args()
    manifests = import_face_api(
        arguments.source, arguments.zoo, samples=arguments.samples, described=arguments.described
    )
    for name, manifest in manifests.items():
        print(f"{arguments.zoo / name} {manifest.sha256[:12]}")


if __name__ == "__main__":
    _main()
