"""Plain networks, registered with timm: AlexNet with BatchNorm, VGG, a perceptron and a recurrent net over rows.

Sources: ImageNet Classification with Deep Convolutional Neural Networks (Krizhevsky et al., NIPS 2012); Very Deep
Convolutional Networks (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556), configuration A. Both are cut to small
images: strides as the image's side allows, and no fully connected layer of 4096, whose place the pooling takes.
"""

from __future__ import annotations

import math
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.models.backbones.norms import norm_layer
from embedkit.training.models.backbones.small import small_cfg

__all__ = [
    "GRURows",
    "MLP",
    "StagedConvNet",
    "embedkit_alexnet",
    "embedkit_gru",
    "embedkit_mlp",
    "embedkit_vgg11",
]

_conv_cfg = small_cfg(first_conv="stages.0.0", classifier="head")
_flat_cfg = small_cfg(fixed_input_size=True, first_conv="", classifier="head")
default_cfgs = generate_default_cfgs(
    {
        "embedkit_alexnet": _conv_cfg,
        "embedkit_vgg11": _conv_cfg,
        "embedkit_mlp": _flat_cfg,
        "embedkit_gru": _flat_cfg,
    }
)


class _Plain(nn.Module):
    """What timm and `Backbone` ask of a network."""

    num_features: int
    global_pool: str = "avg"

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"blocks": [(r"^(?:stages|layers)\.(\d+)", None), (r"^gru", (0,))]}

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3)) if x.ndim == 4 else x

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> (N, num_features)."""
        return self.forward_head(self.forward_features(x))


class StagedConvNet(_Plain):
    """Stages of 3x3 (or larger) convolutions with a norm and ReLU; no fully connected layer; average pooling.

    Args:
        in_chans: Channels of the images.
        plan: Of each stage the convolutions, as (channels, kernel, stride), and whether a 2x2 max-pool comes first.
        norm: `batch`, `layer`, `group` or `none`.
        width: Factor of all channels.
        activation_slope: Of LeakyReLU; 0 is ReLU.
        num_classes: 0, for timm's sake.
        global_pool: `avg`, for timm's sake.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        plan: tuple[tuple[bool, tuple[tuple[int, int, int], ...]], ...],
        norm: str = "batch",
        width: float = 1.0,
        activation_slope: float = 0.0,
        num_classes: int = 0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        layer = norm_layer(norm)
        fan_in, stages = in_chans, []
        for pooled, convolutions in plan:
            stage: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if pooled else []
            for channels, kernel, stride in convolutions:
                fan_out = max(8, round(channels * width / 8) * 8)
                stage += [
                    nn.Conv2d(fan_in, fan_out, kernel, stride=stride, padding=kernel // 2, bias=False),
                    layer(fan_out),
                    nn.LeakyReLU(activation_slope) if activation_slope else nn.ReLU(),
                ]
                fan_in = fan_out
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.num_features = fan_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=activation_slope, nonlinearity="leaky_relu")

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> the last map (N, D, h, w)."""
        return self.stages(x)


class MLP(_Plain):
    """Flattened pixels -> hidden layers with BatchNorm (or none) and ReLU (or the logistic).

    Args:
        in_chans: Channels of the images.
        img_size: (height, width) of the images.
        hidden: Widths of the layers; the last is D.
        norm: `batch`, `layer` or `none`.
        activation: `relu`, or `sigmoid` as in the deep networks of 2006.
        num_classes: 0, for timm's sake.
        global_pool: For timm's sake.
    """

    def __init__(
        self,
        *,
        in_chans: int = 1,
        img_size: tuple[int, int] = (28, 28),
        hidden: tuple[int, ...] = (1024, 1024),
        norm: str = "batch",
        activation: str = "relu",
        num_classes: int = 0,
        global_pool: str = "",
    ) -> None:
        super().__init__()
        norm_layer(norm)
        activations = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}
        if activation not in activations:
            raise ConfigError(f"mlp: expected an activation relu or sigmoid, found {activation!r}")
        norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "group": nn.LayerNorm, "none": nn.Identity}
        dims = (in_chans * math.prod(img_size), *hidden)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(fan_in, fan_out), norms[norm](fan_out), activations[activation]())
                for fan_in, fan_out in zip(dims[:-1], dims[1:], strict=True)
            )
        )
        self.num_features = dims[-1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> (N, D)."""
        return self.layers(x.flatten(1))


class GRURows(_Plain):
    """A gated recurrent net that reads an image row by row, from the top; its features are the mean of its states.

    Args:
        in_chans: Channels of the images.
        img_size: (height, width) of the images.
        hidden: D.
        layers: Recurrent layers.
        norm: For the sake of the other networks; a recurrent net has none.
        num_classes: 0, for timm's sake.
        global_pool: For timm's sake.
    """

    def __init__(
        self,
        *,
        in_chans: int = 1,
        img_size: tuple[int, int] = (28, 28),
        hidden: int = 256,
        layers: int = 1,
        norm: str = "none",
        num_classes: int = 0,
        global_pool: str = "",
    ) -> None:
        super().__init__()
        self.gru = nn.GRU(in_chans * img_size[1], hidden, layers, batch_first=True)
        self.num_features = hidden

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> states (N, H, D), one after each row."""
        return self.gru(x.transpose(1, 2).flatten(2))[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """States (N, H, D) -> their mean (N, D)."""
        return x.mean(1)


@register_model
def embedkit_alexnet(pretrained: bool = False, **kwargs: Any) -> StagedConvNet:
    """AlexNet with BatchNorm, widths 96-256-384-384-256, first convolution 5x5 of stride 2: D = 256."""
    plan = (
        (False, ((96, 5, 2),)),
        (True, ((256, 5, 1),)),
        (True, ((384, 3, 1),)),
        (False, ((384, 3, 1),)),
        (False, ((256, 3, 1),)),
    )
    return build_model_with_cfg(StagedConvNet, "embedkit_alexnet", pretrained, **{"plan": plan, **kwargs})


@register_model
def embedkit_vgg11(pretrained: bool = False, **kwargs: Any) -> StagedConvNet:
    """VGG-11 with BatchNorm and no fully connected layer: D = 512, stride 16."""
    plan = (
        (False, ((64, 3, 1),)),
        (True, ((128, 3, 1),)),
        (True, ((256, 3, 1), (256, 3, 1))),
        (True, ((512, 3, 1), (512, 3, 1))),
        (True, ((512, 3, 1), (512, 3, 1))),
    )
    return build_model_with_cfg(StagedConvNet, "embedkit_vgg11", pretrained, **{"plan": plan, **kwargs})


@register_model
def embedkit_mlp(pretrained: bool = False, **kwargs: Any) -> MLP:
    """Two hidden layers of 1024 with BatchNorm, as in BiGAN's experiments on MNIST: D = 1024."""
    return build_model_with_cfg(MLP, "embedkit_mlp", pretrained, **kwargs)


@register_model
def embedkit_gru(pretrained: bool = False, **kwargs: Any) -> GRURows:
    """One recurrent layer over the rows of an image: D = 256."""
    return build_model_with_cfg(GRURows, "embedkit_gru", pretrained, **kwargs)
