"""Backbones: timm networks by name, and the two small ones that the comparison table is made with.

`embedkit_r10` and `embedkit_vit_t4` are registered with timm when this module is imported, so that
`timm.create_model("local-dir:<entry>")` builds an entry of theirs. Both are timm's own classes, so parameter
names are timm's.

Sources: Deep Residual Learning for Image Recognition (He et al., CVPR 2016, arXiv 1512.03385); An Image is
Worth 16x16 Words (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929). Widths and depths of the two are ours,
chosen for pictures of 28 to 64 pixels on a few CPU cores.
"""

from __future__ import annotations

import difflib
from typing import Any, cast

import timm
import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model_in_modules,
    register_model,
)
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from embedkit.errors import ConfigError

__all__ = ["SHORT_NAMES", "Backbone", "SmallStemResNet", "create_backbone", "embedkit_r10", "embedkit_vit_t4"]

#: Our short names -> timm's. Any other name is timm's own.
SHORT_NAMES = {"r10": "embedkit_r10", "r18": "resnet18", "r50": "resnet50", "vit_t4": "embedkit_vit_t4"}


def _small_cfg(**changes: Any) -> dict[str, Any]:
    cfg = {"url": "", "num_classes": 0, "input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,)}
    return {**cfg, "interpolation": "bilinear", "crop_pct": 1.0, **changes}


# timm reads this name of the module in which a network is registered
default_cfgs = generate_default_cfgs(
    {
        "embedkit_r10": _small_cfg(pool_size=(2, 2), first_conv="conv1", classifier="fc"),
        "embedkit_vit_t4": _small_cfg(
            fixed_input_size=True, first_conv="patch_embed.proj", classifier="head"
        ),
    }
)


class SmallStemResNet(ResNet):
    """timm's ResNet with one 3x3 convolution of stride 2 as its stem, and no pooling after it.

    The 7x7 stride-2 stem and max-pool of the paper leave 7x7 positions of a 28-pixel picture before the first
    block; this stem, as wide as the first stage, leaves 14x14.
    """

    def __init__(self, *, channels: tuple[int, ...], in_chans: int = 3, **kwargs: Any) -> None:
        # timm fixes a one-convolution stem at 64 channels, while its deep stem has twice `stem_width`: that one
        # is asked for, and its three convolutions are replaced by one
        super().__init__(
            channels=channels, in_chans=in_chans, stem_type="deep", stem_width=channels[0] // 2, **kwargs
        )
        stem = nn.Conv2d(in_chans, channels[0], kernel_size=3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.conv1 = stem  # type: ignore[assignment]
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        for stage in self.feature_info[1:]:
            stage["reduction"] = cast(int, stage["reduction"]) // 2


@register_model
def embedkit_r10(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet of four BasicBlocks, widths 32-64-128-256, small stem: 1.2 M parameters, D = 256, stride 16."""
    args = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), **kwargs}
    return build_model_with_cfg(SmallStemResNet, "embedkit_r10", pretrained, **args)


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


class Backbone(nn.Module):
    """A timm network without its classifier.

    Attributes:
        net: The timm network (`num_classes=0`); its state dict has timm's own names.
        architecture: The timm name.
        model_args: What `timm.create_model(architecture, num_classes=0, **model_args)` needs to build the
            same module: JSON values, `global_pool` included.
        dim: Width D of the embedding.
    """

    def __init__(self, net: nn.Module, *, architecture: str, model_args: dict[str, Any], dim: int) -> None:
        super().__init__()
        self.net = net
        self.architecture = architecture
        self.model_args = model_args
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (N, C, H, W), normalised -> pooled features (N, D)."""
        return self.net(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Pictures (N, C, H, W), normalised -> the last map (N, D, h, w), or a ViT's tokens (N, L, D)."""
        return cast(Any, self.net).forward_features(x)


def create_backbone(
    name: str,
    *,
    in_chans: int,
    image_size: int | tuple[int, int],
    global_pool: str | None = None,
    small_stem: bool = False,
) -> Backbone:
    """Build a backbone at random initialisation, from torch's global seed.

    Args:
        name: `r10`, `r18`, `r50`, `vit_t4`, or any name that timm knows.
        in_chans: Channels C of the pictures.
        image_size: Side, or (height, width), of the pictures in pixels. It shapes networks of fixed input
            size (ViTs); others also take other sizes later.
        global_pool: timm's pooling (`avg`, `max`, `token`, ...); by default the network's own, and the mean
            of the patch tokens for a ViT.
        small_stem: Patches of 4 pixels for a ViT that has larger ones; `r10` and `vit_t4` are small already.

    Returns:
        The backbone, in train mode.

    Raises:
        ConfigError: timm knows no such name, a size that the network cannot take, a stem that timm's
            arguments cannot change, or a pooling that the network does not have.
    """
    architecture = SHORT_NAMES.get(name, name)
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(name, [*SHORT_NAMES, *timm.list_models()], n=4, cutoff=0.4)
        raise ConfigError(
            f"backbone {name!r}: timm knows no network of this name; "
            + (f"the nearest are {', '.join(near)}" if near else f"take one of {', '.join(SHORT_NAMES)}")
        )
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if in_chans < 1 or len(size) != 2 or min(size) < 1:
        raise ConfigError(
            f"backbone {name!r}: expected in_chans of 1 or more and image_size as pixels or (height, width), "
            f"found {in_chans} and {image_size!r}"
        )

    is_vit = architecture == "embedkit_vit_t4" or is_model_in_modules(architecture, {"vision_transformer"})
    model_args: dict[str, Any] = {"in_chans": in_chans}
    if small_stem and not architecture.startswith("embedkit_"):
        if not is_vit:
            raise ConfigError(
                f"backbone {name!r}: timm has no argument for a smaller stem of this network; take r10, "
                "vit_t4 or another ViT, or leave small_stem out"
            )
        model_args["patch_size"] = 4
    cfg = get_pretrained_cfg(architecture)
    if cfg is not None and cfg.fixed_input_size:
        model_args["img_size"] = list(size)
    if global_pool is not None:
        model_args["global_pool"] = global_pool
    elif is_vit:
        # one rule for every ViT, see `embedkit_vit_t4`
        model_args |= {"global_pool": "avg", "fc_norm": False}

    # One empty picture tells the width, and whether this network can take pictures of this size at all.
    try:
        net = timm.create_model(architecture, num_classes=0, **model_args)
        with torch.no_grad():
            features = net.eval()(torch.zeros(1, in_chans, *size))
        net.train()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"backbone {name!r} on pictures of {size[0]}x{size[1]} with {model_args}: timm refuses: {error}"
        ) from error
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if is_vit and patch is not None and (size[0] % patch[0] or size[1] % patch[1]):
        raise ConfigError(
            f"backbone {name!r}: patches of {patch[0]}x{patch[1]} do not tile a picture of "
            f"{size[0]}x{size[1]}; choose an image_size that is a multiple of the patch"
        )
    if features.ndim != 2:
        raise ConfigError(
            f"backbone {name!r}: with global_pool {global_pool!r} a picture gives {tuple(features.shape[1:])}, "
            "not one vector; choose a pooling such as avg"
        )
    if "global_pool" not in model_args and (pooling := _pooling(net)):
        model_args["global_pool"] = pooling  # written down, it holds whatever a later timm's default is
    return Backbone(net, architecture=architecture, model_args=model_args, dim=features.shape[1])


def _pooling(net: nn.Module) -> str | None:
    """The timm name of the pooling that a network chose for itself, where it tells."""
    pool = getattr(net, "global_pool", None) or getattr(getattr(net, "head", None), "global_pool", None)
    return pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
