"""Faces: an encoder of aligned faces, a detector and 68 landmarks, from the npm package `@vladmandic/face-api`.

The package's `model/` folder holds each network as a manifest (tensors by name, shape and quantisation) and shards
of bytes that are one after the other. A quantised tensor is uint8 with a scale and a minimum: value x scale + min.
Architectures are rebuilt here from the tensors' shapes and from what is published of each network; timm has none of
them. Scales per channel, and the detector's BatchNorm, are constants at inference and folded into their convolutions.

Sources: dlib's `dnn_face_recognition` (King, Dlib-ml, JMLR 2009; the network's layers stand in the example
`dnn_face_recognition_ex.cpp`, its weights are in the public domain, CC0) after Deep Residual Learning (He et al.,
CVPR 2016, arXiv 1512.03385); SSD (Liu et al., ECCV 2016, arXiv 1512.02325, section 2) over MobileNets (Howard et al.,
arXiv 1704.04861); the landmark network is that of face-api.js by its author, depthwise separable convolutions with sums
of all earlier ones.

Differences from the package: dlib divides pixels by 256, as this does, and the package by 255, which moves a face's
row of length 1.5 by 0.002. The detector's third class, which nothing reads, is left out.

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
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.entry import EntryConfig, Manifest, Preprocess, sha256_hex
from embedkit.errors import EntryError, IntegrityError, SourceError
from embedkit.training.export import Card, update_index, write_entry
from embedkit.training.golden import sample_pixels

VERSION = "1.7.15"
ENCODER, DETECTOR, LANDMARKS = (
    "face-r29.dlib",
    "face_detector-ssd_mobilenet1.widerface",
    "face_landmarks-dense68.faceapi",
)

#: ImageNet's mean colour on 0..255, which dlib subtracts; the landmark network took it over.
MEAN = (122.782, 117.001, 104.298)
#: BatchNorm's epsilon in the detector.
EPSILON = 1e-3

#: The encoder's residual blocks, in order; those named `down` halve the map.
BLOCKS = (
    "conv32_1 conv32_2 conv32_3 conv64_down conv64_1 conv64_2 conv64_3 conv128_down conv128_1 conv128_2 "
    "conv256_down conv256_1 conv256_2 conv256_down_out"
).split()
#: The detector's depthwise layers with stride 2, and the one that its first head sees.
STRIDED, FIRST_HEAD = (2, 4, 6, 12), 11


def read_tensors(source: Path, network: str, *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of one network, dequantised.

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
        if source.is_dir():
            folder = source / "model" if (source / "model").is_dir() else source
            return (folder / name).read_bytes()
        with tarfile.open(source) as archive:
            member = archive.extractfile(f"package/model/{name}")
            return member.read() if member is not None else b""
    except (OSError, KeyError, tarfile.TarError) as error:
        raise SourceError(
            f"{source}: model/{name} cannot be read ({error}); give the file that "
            f"`npm pack @vladmandic/face-api@{VERSION}` writes, or its folder"
        ) from None


class _Tensors:
    """A manifest's tensors, each of which is to be taken once."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._left = dict(tensors)

    def take(self, name: str, *, like: tuple[int, ...] = ()) -> Tensor:
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise EntryError(f"the manifest has no tensor {name!r}; is it of version {VERSION}?")
        if like and tuple(tensor.shape) != like:
            raise EntryError(f"{name}: expected the shape {like}, found {tuple(tensor.shape)}")
        return tensor

    def filters(self, name: str, depthwise: bool = False) -> Tensor:
        """A kernel as torch has it: (out, in, height, width), or (channels, 1, height, width)."""
        kernel = self.take(name)
        if kernel.ndim != 4 or (depthwise and kernel.shape[3] != 1):
            raise EntryError(
                f"{name}: expected a {'depthwise ' * depthwise}kernel, found {tuple(kernel.shape)}"
            )
        return kernel.permute(2, 3, 0, 1) if depthwise else kernel.permute(3, 2, 0, 1)

    def done(self) -> None:
        if self._left:
            raise EntryError(
                f"{len(self._left)} tensors of the manifest have no place, such as {next(iter(self._left))!r}"
            )


def _conv(
    weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0, depthwise: bool = False
) -> nn.Conv2d:
    out, inner, *kernel = weight.shape
    groups = out if depthwise else 1
    conv = nn.Conv2d(
        inner * groups, out, tuple(kernel), stride, padding, groups=groups, bias=bias is not None
    )
    if bias is not None and tuple(bias.shape) != (out,):
        raise EntryError(f"expected a bias for each of {out} channels, found {tuple(bias.shape)}")
    with torch.no_grad():
        conv.weight.copy_(weight)
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
    return conv


def _padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """TensorFlow's `same` for a 3 x 3 kernel on an even side: with stride 2 it pads below and right alone."""
    return conv(F.pad(x, (0, 1, 0, 1) if conv.stride[0] == 2 else (1, 1, 1, 1)))


# -- the encoder -------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut.

    A `down` block has stride 2 and no padding; its shortcut is averaged over 2 x 2, and what the smaller one of the two
    lacks, channels of the shortcut or a last row and column of the convolutions, counts as zero.
    """

    def __init__(self, conv1: nn.Conv2d, conv2: nn.Conv2d):
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W')."""
        y = self.conv2(F.relu(self.conv1(x)))
        if self.conv1.stride[0] == 2:
            x = F.avg_pool2d(x, 2)
            x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
            y = F.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2]))
        return F.relu(x + y)


class FaceResNet(nn.Module):
    """dlib's face recognition network of 29 convolutions: an aligned face to a vector."""

    def __init__(self, stem: nn.Conv2d, blocks: list[Residual], head: nn.Linear):
        super().__init__()
        self.stem, self.blocks, self.head = stem, nn.Sequential(*blocks), head

    def forward(self, x: Tensor) -> Tensor:
        """Normalised (N, 3, 150, 150) to (N, 128)."""
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2)
        return self.head(self.blocks(x).mean(dim=(2, 3)))


def face_resnet(tensors: Mapping[str, Tensor]) -> FaceResNet:
    """The encoder that a manifest describes, in eval mode; widths are those of the tensors.

    Raises:
        EntryError: A tensor is missing, left over, or of a shape that does not fit.
    """
    given = _Tensors(tensors)

    def scaled(name: str, stride: int = 1, padding: int = 0) -> nn.Conv2d:
        kernel, bias = given.filters(f"{name}/conv/filters"), given.take(f"{name}/conv/bias")
        width = (len(kernel),)
        scale = given.take(f"{name}/scale/weights", like=width)
        shift = given.take(f"{name}/scale/biases", like=width)
        return _conv(
            kernel * scale[:, None, None, None], bias * scale + shift, stride=stride, padding=padding
        )

    stem = scaled("conv32_down", stride=2)
    blocks = []
    for name in BLOCKS:
        down = "down" in name
        first = scaled(f"{name}/conv1", 2 if down else 1, 0 if down else 1)
        blocks.append(Residual(first, scaled(f"{name}/conv2", padding=1)))
    matrix = given.take("fc")
    given.done()
    head = nn.Linear(*matrix.shape, bias=False)
    with torch.no_grad():
        head.weight.copy_(matrix.T)
    return FaceResNet(stem, blocks, head).eval()


# -- the landmarks -----------------------------------------------------------------------------------------------


class Separable(nn.Module):
    """A depthwise and a pointwise 3 x 3 convolution, without an activation between."""

    def __init__(self, depthwise: nn.Conv2d, pointwise: nn.Conv2d):
        super().__init__()
        self.depthwise, self.pointwise = depthwise, pointwise

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W')."""
        return self.pointwise(_padded(x, self.depthwise))


class DenseBlock(nn.Module):
    """Four convolutions, each of which sees the sum of all outputs before it; the first halves the map."""

    def __init__(self, convs: list[nn.Module]):
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H / 2, W / 2)."""
        first, *others = self.convs
        total = F.relu(_padded(x, first) if isinstance(first, nn.Conv2d) else first(x))
        for conv in others:
            total = total + conv(F.relu(total))  # F.relu leaves the first, which has passed one, as it is
        return F.relu(total)


class FaceLandmarks(nn.Module):
    """A face to 68 points, in the order of dlib's (iBUG 300-W): jaw, brows, nose, eyes, mouth."""

    def __init__(self, blocks: list[DenseBlock], head: nn.Linear):
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised (N, 3, 112, 112) to `points` (N, 68, 2), x and y as shares of the input's side."""
        x = self.blocks(x).mean(dim=(2, 3))
        return {"points": self.head(x).reshape(x.shape[0], -1, 2)}


def face_landmarks(tensors: Mapping[str, Tensor]) -> FaceLandmarks:
    """The landmark network that a manifest describes, in eval mode; widths are those of the tensors.

    Raises:
        EntryError: A tensor is missing, left over, or of a shape that does not fit.
    """
    given = _Tensors(tensors)

    def separable(name: str, stride: int) -> Separable:
        depthwise = _conv(
            given.filters(f"{name}/depthwise_filter", depthwise=True), None, stride=stride, depthwise=True
        )
        return Separable(
            depthwise, _conv(given.filters(f"{name}/pointwise_filter"), given.take(f"{name}/bias"))
        )

    blocks = []
    for block in range(4):
        convs: list[nn.Module] = []
        for index in range(4):
            name, stride = f"dense{block}/conv{index}", 1 if index else 2
            if block or index:
                convs.append(separable(name, stride))
            else:
                convs.append(_conv(given.filters(f"{name}/filters"), given.take(f"{name}/bias"), stride=2))
        blocks.append(DenseBlock(convs))
    matrix = given.take("fc/weights")
    head = nn.Linear(*matrix.shape)
    with torch.no_grad():
        head.weight.copy_(matrix.T)
        head.bias.copy_(given.take("fc/bias", like=(matrix.shape[1],)))
    given.done()
    return FaceLandmarks(blocks, head).eval()


# -- the detector ------------------------------------------------------------------------------------------------


class SeparableReLU6(nn.Module):
    """A depthwise 3 x 3 and a pointwise convolution, each followed by ReLU6."""

    def __init__(self, depthwise: nn.Conv2d, pointwise: nn.Conv2d):
        super().__init__()
        self.depthwise, self.pointwise = depthwise, pointwise

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W')."""
        return F.relu6(self.pointwise(F.relu6(_padded(x, self.depthwise))))


class FaceDetector(nn.Module):
    """SSD over MobileNet v1: a picture to boxes around priors on six maps, and how sure each is a face."""

    anchor_centers: Tensor
    anchor_sizes: Tensor

    def __init__(
        self,
        stem: nn.Conv2d,
        layers: list[SeparableReLU6],
        extras: list[nn.Conv2d],
        boxes: list[nn.Conv2d],
        scores: list[nn.Conv2d],
        anchors: Tensor,
    ):
        super().__init__()
        self.stem, self.layers, self.extras = stem, nn.ModuleList(layers), nn.ModuleList(extras)
        self.boxes, self.scores = nn.ModuleList(boxes), nn.ModuleList(scores)
        # Not persistent: they are a grid, not weights, and float16 would move a box by half a pixel.
        top_left, bottom_right = anchors[:, [1, 0]], anchors[:, [3, 2]]
        self.register_buffer("anchor_centers", (top_left + bottom_right) / 2, persistent=False)
        self.register_buffer("anchor_sizes", bottom_right - top_left, persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalised (N, 3, H, W) to `boxes` (N, A, 4) and `scores` (N, A).

        Boxes are left, top, right and bottom as shares of the input's width and height. They are decoded from
        offsets against the priors with SSD's variances 0.1 and 0.2 (equation 2 and its implementation).
        """
        x, maps = F.relu6(_padded(x, self.stem)), []
        for index, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if index == FIRST_HEAD:
                maps.append(x)
        maps.append(x)
        for index, conv in enumerate(self.extras):
            x = F.relu6(conv(x) if conv.kernel_size[0] == 1 else _padded(x, conv))
            if index % 2:
                maps.append(x)
        offsets = torch.cat([_rows(head(x), 4) for head, x in zip(self.boxes, maps, strict=True)], dim=1)
        logits = torch.cat([_rows(head(x), 1) for head, x in zip(self.scores, maps, strict=True)], dim=1)
        centers = offsets[..., [1, 0]] * 0.1 * self.anchor_sizes + self.anchor_centers  # (N, A, 2), x and y
        halves = torch.exp(offsets[..., [3, 2]] * 0.2) * self.anchor_sizes / 2
        boxes = torch.cat([centers - halves, centers + halves], dim=2)  # (N, A, 4)
        return {"boxes": boxes, "scores": torch.sigmoid(logits[..., 0])}


def _rows(x: Tensor, width: int) -> Tensor:
    """A head's map (N, K x width, H, W) as one row a prior, (N, H x W x K, width)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width)


def face_detector(tensors: Mapping[str, Tensor]) -> FaceDetector:
    """The detector that a manifest describes, in eval mode; widths and priors are those of the tensors.

    Raises:
        EntryError: A tensor is missing, left over, or of a shape that does not fit.
    """
    # Whole numbers are shapes and indices of the graph that the manifest was frozen from.
    given = _Tensors({name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()})
    for name, constant in (("Preprocessor/mul/x", 2 / 255), ("Preprocessor/sub/y", 1.0)):
        if not math.isclose(float(given.take(name, like=())), constant, rel_tol=1e-5):
            raise EntryError(f"{name}: expected pixels scaled to -1..1, found another constant")

    def pointwise(name: str, stride: int = 1) -> nn.Conv2d:
        return _conv(
            given.filters(f"{name}/weights"), given.take(f"{name}/convolution_bn_offset"), stride=stride
        )

    def depthwise(name: str, stride: int) -> nn.Conv2d:
        kernel = given.filters(f"{name}/depthwise_weights", depthwise=True)
        gamma, beta, mean, variance = (
            given.take(f"{name}/BatchNorm/{part}", like=(len(kernel),)).double()
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        scale = gamma / torch.sqrt(variance + EPSILON)
        weight = (kernel * scale[:, None, None, None]).float()
        return _conv(weight, (beta - mean * scale).float(), stride=stride, depthwise=True)

    stem = pointwise("MobilenetV1/Conv2d_0_pointwise", 2)
    layers = [
        SeparableReLU6(
            depthwise(f"MobilenetV1/Conv2d_{index}_depthwise", 2 if index in STRIDED else 1),
            pointwise(f"MobilenetV1/Conv2d_{index}_pointwise"),
        )
        for index in range(1, 14)
    ]
    extras = [pointwise(f"Prediction/Conv2d_{index}_pointwise", 1 + index % 2) for index in range(8)]
    boxes, scores = [], []
    for index in range(6):
        head = f"Prediction/BoxPredictor_{index}"
        boxes.append(
            _conv(
                given.filters(f"{head}/BoxEncodingPredictor/weights"),
                given.take(f"{head}/BoxEncodingPredictor/biases"),
            )
        )
        # Three classes a prior: background, face, and one that was never trained.
        weight, bias = (
            given.filters(f"{head}/ClassPredictor/weights"),
            given.take(f"{head}/ClassPredictor/biases"),
        )
        scores.append(_conv(weight[1::3], bias[1::3]))
    anchors = given.take("Output/extra_dim")
    given.done()
    if anchors.ndim != 3 or anchors.shape[2] != 4:
        raise EntryError(f"Output/extra_dim: expected priors (1, A, 4), found {tuple(anchors.shape)}")
    return FaceDetector(stem, layers, extras, boxes, scores, anchors[0]).eval()


# -- the entries -------------------------------------------------------------------------------------------------


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
from embedkit.pictures.faces import FaceEncoder

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
            data="about 3 million faces of 7,485 people (FaceScrub, VGG Face, pictures of the web), by dlib's author",
            licence="CC0-1.0",
            provenance={
                "origin": "dlib_face_recognition_resnet_model_v1 by Davis King, in the public domain (CC0 1.0); the "
                "package that carries it is MIT (Vladimir Mandic, after face-api.js by Vincent Muehler)",
                "changed": "scale layers folded into their convolutions",
                "verification": {"distance": 0.6, "mean_length": 1.466, "cosine": 0.916},
            },
        ),
        card=Card(
            summary="dlib's face recognition network: pictures of one person's aligned face lie close together. It "
            "takes chips of 150 x 150 pixels as `embedkit.pictures.faces` cuts them from photographs, not "
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
            licence="MIT",
            provenance={
                "origin": "SSD MobileNet v1 of github.com/yeephycho/tensorflow-face-detection, as face-api.js took it "
                "over; the package that carries it is MIT (Vladimir Mandic)",
                "changed": "BatchNorm folded into its convolutions; the third class left out",
            },
        ),
        card=Card(
            summary="Finds faces in photographs: 5118 boxes and how sure each is a face. "
            "`embedkit.pictures.faces` keeps the best of those that overlap.",
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
            licence="MIT",
            provenance={
                "origin": "face-api.js by Vincent Muehler, MIT; the package that carries it is MIT (Vladimir Mandic)",
                "changed": "nothing but the dequantisation",
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
    source: Path, zoo: Path, *, samples: str | os.PathLike[str] | None = None, said: str = "photographs"
) -> dict[str, Manifest]:
    """Write the entries of the encoder, the detector and the landmarks, and the zoo's index.

    Args:
        source: The package as npm packs it (`.tgz`), unpacked, or its `model` folder.
        zoo: The folder that holds the entries.
        samples: 64 or more pictures of single faces to measure rounding and parity on, as `embedkit embed` takes
            them; synthetic pictures by default, on which a detector has little to say.
        said: What those pictures are, for the cards.

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
            "compared_on": "synthetic pictures" if samples is None else said,
        }
        manifests[item.entry] = write_entry(
            zoo / item.entry,
            network=network,
            config=dataclasses.replace(item.config, provenance=provenance),
            samples=sample_pixels(item.config.preprocess, samples),
            card=item.card,
        )
    update_index(zoo)
    return manifests


def _main() -> None:
    parser = argparse.ArgumentParser(description="Write the entries of faces.")
    parser.add_argument("source", type=Path, help="the package: the .tgz that npm packs, or its folder")
    parser.add_argument("--zoo", type=Path, default=Path("zoo"), help="folder of the entries")
    parser.add_argument("--samples", help="64 or more pictures of faces: a folder or a Parquet file")
    parser.add_argument("--said", default="photographs", help="what the samples are, for the cards")
    arguments = parser.parse_args()
    manifests = import_face_api(
        arguments.source, arguments.zoo, samples=arguments.samples, said=arguments.said
    )
    for name, manifest in manifests.items():
        print(f"{arguments.zoo / name} {manifest.sha256[:12]}")


if __name__ == "__main__":
    _main()
