"""The small networks of the comparison table, registered with timm: ResNets with a small stem, and a ViT of patch 4.

They are timm's own classes, so parameter names are timm's, and `timm.create_model("local-dir:<entry>")` builds an
entry of theirs once this module is imported.

Sources: Deep Residual Learning for Image Recognition (He et al., CVPR 2016, arXiv 1512.03385); An Image is Worth
16x16 Words (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929). Widths and depths of r10 and vit_t4 are ours, chosen for
images of 28 to 64 pixels on a few CPU cores; r18s and r50s are ResNet-18 and ResNet-50 behind SimCLR's CIFAR stem.
"""

from __future__ import annotations

from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from embedkit.training.models.backbones.norms import norm_layer

__all__ = [
    "SmallStemResNet",
    "embedkit_r10",
    "embedkit_r18s",
    "embedkit_r50s",
    "embedkit_vit_t4",
    "small_cfg",
]


def small_cfg(**changes: Any) -> dict[str, Any]:
    """Timm's description of a network for small images, which has no weights of its own."""
    cfg = {"url": "", "num_classes": 0, "input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,)}
    return {**cfg, "interpolation": "bilinear", "crop_pct": 1.0, **changes}


_resnet_cfg = small_cfg(pool_size=(2, 2), first_conv="conv1", classifier="fc")

# timm reads this name of the module in which a network is registered
default_cfgs = generate_default_cfgs(
    {
        "embedkit_r10": _resnet_cfg,
        "embedkit_r18s": _resnet_cfg,
        "embedkit_r50s": _resnet_cfg,
        "embedkit_vit_t4": small_cfg(fixed_input_size=True, first_conv="patch_embed.proj", classifier="head"),
    }
)


class SmallStemResNet(ResNet):
    """timm's ResNet with one 3x3 convolution as its stem, and no pooling after it.

    The 7x7 stride-2 stem and max-pool of the paper leave 7x7 positions of a 28-pixel image before the first
    block; this stem, as wide as the first stage, leaves 14x14 at stride 2 and all 28x28 at stride 1.

    Args:
        channels: Widths of the four stages (before a Bottleneck's expansion).
        in_chans: Channels of the images.
        stem_stride: 1 or 2.
        norm: `batch`, `layer`, `group` or `none`.
        width: Factor of all channels, rounded to a multiple of 8.
        **kwargs: Of timm's `ResNet`.
    """

    def __init__(
        self,
        *,
        channels: tuple[int, ...],
        in_chans: int = 3,
        stem_stride: int = 2,
        norm: str = "batch",
        width: float = 1.0,
        **kwargs: Any,
    ) -> None:
        channels = tuple(max(8, round(c * width / 8) * 8) for c in channels)
        # timm fixes a one-convolution stem at 64 channels, while its deep stem has twice `stem_width`: that one
        # is asked for, and its three convolutions are replaced by one
        super().__init__(
            channels=channels,
            in_chans=in_chans,
            stem_type="deep",
            stem_width=channels[0] // 2,
            norm_layer=norm_layer(norm),
            **kwargs,
        )
        stem = nn.Conv2d(in_chans, channels[0], kernel_size=3, stride=stem_stride, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.conv1 = stem  # type: ignore[assignment]
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        for index, stage in enumerate(self.feature_info):
            stage["reduction"] = cast(int, stage["reduction"]) * stem_stride // (4 if index else 2)


def _small_resnet(name: str, pretrained: bool, **args: Any) -> ResNet:
    return build_model_with_cfg(SmallStemResNet, name, pretrained, **args)


@register_model
def embedkit_r10(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet of four BasicBlocks, widths 32-64-128-256, stem of stride 2: 1.2 M parameters, D = 256, stride 16."""
    args = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), **kwargs}
    return _small_resnet("embedkit_r10", pretrained, **args)


@register_model
def embedkit_r18s(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 with a 3x3 stem of stride 1 and no max-pool: 11.2 M parameters, D = 512, stride 8."""
    args = {"block": BasicBlock, "layers": (2, 2, 2, 2), "channels": (64, 128, 256, 512), "stem_stride": 1}
    return _small_resnet("embedkit_r18s", pretrained, **{**args, **kwargs})


@register_model
def embedkit_r50s(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-50 with a 3x3 stem of stride 1 and no max-pool: 23.5 M parameters, D = 2048, stride 8."""
    args = {"block": Bottleneck, "layers": (3, 4, 6, 3), "channels": (64, 128, 256, 512), "stem_stride": 1}
    return _small_resnet("embedkit_r50s", pretrained, **{**args, **kwargs})


@register_model
def embedkit_vit_t4(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT of patch 4, D = 192, 6 blocks of 3 heads, with a class token: 2.7 M parameters.

    The last LayerNorm stands before the mean over patch tokens (`fc_norm=False`): masked pretraining, which
    never pools, then trains every weight that the pooled encoder uses.
    """
    args = {
        "patch_size": 4,
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "global_pool": "avg",
        "fc_norm": False,
    }
    return build_model_with_cfg(VisionTransformer, "embedkit_vit_t4", pretrained, **{**args, **kwargs})
