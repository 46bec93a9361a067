"""The package's three networks, rebuilt from the tensors of a manifest: an encoder of faces, a detector, 68 landmarks.

Architectures come from the tensors' shapes and from what is published of each network; timm has none of them. Scales
per channel, and the detector's BatchNorm, are constants at inference and folded into their convolutions.

Sources: dlib's `dnn_face_recognition` (King, Dlib-ml, JMLR 2009; the network's layers stand in the example
`dnn_face_recognition_ex.cpp`, its weights are in the public domain, CC0) after Deep Residual Learning (He et al.,
CVPR 2016, arXiv 1512.03385); SSD (Liu et al., ECCV 2016, arXiv 1512.02325, section 2) over MobileNets (Howard et al.,
arXiv 1704.04861); the landmark network is that of face-api.js by its author, depthwise separable convolutions with sums
of all earlier ones.

Differences from the package: the detector's third class, which nothing reads, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import EntryError

__all__ = ["VERSION", "face_detector", "face_landmarks", "face_resnet"]

#: Of the package whose tensors these networks take.
VERSION = "1.7.15"

#: BatchNorm's epsilon in the detector.
EPSILON = 1e-3

#: The encoder's residual blocks, in order; those named `down` halve the map.
BLOCKS = (
    "conv32_1 conv32_2 conv32_3 conv64_down conv64_1 conv64_2 conv64_3 conv128_down conv128_1 conv128_2 "
    "conv256_down conv256_1 conv256_2 conv256_down_out"
).split()
#: The detector's depthwise layers with stride 2, and the one that its first head sees.
STRIDED, FIRST_HEAD = (2, 4, 6, 12), 11


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
        """Normalized (N, 3, 150, 150) to (N, 128)."""
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
        """Normalized (N, 3, 112, 112) to `points` (N, 68, 2), x and y as shares of the input's side."""
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
    """SSD over MobileNet v1: an image to boxes around priors on six maps, and how sure each is a face."""

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
        """Normalized (N, 3, H, W) to `boxes` (N, A, 4) and `scores` (N, A).

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
