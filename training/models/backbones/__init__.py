"""Backbones: timm networks by name, and small ones of our own that timm builds too.

The networks of `small` and `plain` are registered with timm when this package is imported, so that
`timm.create_model("local-dir:<entry>")` builds an entry of theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import timm
import torch
from timm.models import get_pretrained_cfg, is_model_in_modules
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from embedkit._io.text import did_you_mean
from embedkit.errors import ConfigError
from embedkit.training.models.backbones.arguments import args_from_file
from embedkit.training.models.backbones.depth import depths
from embedkit.training.models.backbones.norms import NORMS, ChannelAffine, Norm, norm_layer
from embedkit.training.models.backbones.plain import (
    MLP,
    GRURows,
    StagedConvNet,
    embedkit_alexnet,
    embedkit_gru,
    embedkit_mlp,
    embedkit_vgg11,
)
from embedkit.training.models.backbones.small import (
    SmallStemResNet,
    embedkit_r10,
    embedkit_r18s,
    embedkit_r50s,
    embedkit_vit_t4,
)

__all__ = [
    "MLP",
    "NORMS",
    "SHORT_NAMES",
    "Backbone",
    "BackboneRequest",
    "ChannelAffine",
    "GRURows",
    "Norm",
    "SmallStemResNet",
    "StagedConvNet",
    "args_from_file",
    "create_backbone",
    "embedkit_alexnet",
    "embedkit_gru",
    "embedkit_mlp",
    "embedkit_r10",
    "embedkit_r18s",
    "embedkit_r50s",
    "embedkit_vgg11",
    "embedkit_vit_t4",
    "norm_layer",
]

#: Our short names -> timm's. Any other name is timm's own.
SHORT_NAMES = {
    "r10": "embedkit_r10",
    "r18s": "embedkit_r18s",
    "r50s": "embedkit_r50s",
    "r18": "resnet18",
    "r50": "resnet50",
    "vit_t4": "embedkit_vit_t4",
    "alexnet_bn": "embedkit_alexnet",
    "vgg11": "embedkit_vgg11",
    "mlp": "embedkit_mlp",
    "gru": "embedkit_gru",
}
#: Networks that know the arguments `norm` and `width`.
_WITH_NORM = {f"embedkit_{name}" for name in ("r10", "r18s", "r50s", "alexnet", "vgg11", "mlp")}
_WITH_WIDTH = _WITH_NORM - {"embedkit_mlp"}


class Backbone(nn.Module):
    """A timm network without its classifier.

    Attributes:
        net: The timm network (`num_classes=0`); its state dict has timm's own names.
        architecture: The timm name.
        model_args: What `timm.create_model(architecture, num_classes=0, **model_args)` needs to build the
            same module: JSON values, `global_pool` included. None for part of a network, which timm cannot build.
        dim: Width D of the embedding.
        in_chans: Channels C of the images.
        image_size: (height, width) that it was built for.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        architecture: str,
        model_args: dict[str, Any] | None,
        dim: int,
        in_chans: int,
        image_size: tuple[int, int],
    ) -> None:
        super().__init__()
        self.net = net
        self.architecture = architecture
        self.model_args = model_args
        self.dim = dim
        self.in_chans, self.image_size = in_chans, image_size
        self._frozen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized -> pooled features (N, D)."""
        return self.net(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized -> the last map (N, D, h, w), or a ViT's tokens (N, L, D)."""
        return cast(Any, self.net).forward_features(x)

    def pool(self, features: Tensor) -> Tensor:
        """What `forward_features` gives -> pooled features (N, D)."""
        return cast(Any, self.net).forward_head(features, pre_logits=True)

    def freeze(self, parts: int) -> None:
        """Keep the first parts of the network as they are: parameters, and BatchNorm's statistics, in eval mode.

        Args:
            parts: Counted from the input: the stem is the first, each stage of a ResNet or block of a ViT another one;
                0 for none.

        Raises:
            ConfigError: More than the network has.
        """
        if not parts:
            return
        depth, count = depths(self.net, coarse=True)
        if not 0 <= parts <= count:
            raise ConfigError(
                f"freeze: expected 0 to {count} for {self.architecture}, {count} for the whole network; found {parts}"
            )
        for name, parameter in self.net.named_parameters():
            if min(depth[name], count - 1) < parts:
                parameter.requires_grad_(False)
        # by name, since modules are replaced where BatchNorm is shared by several devices
        for name, module in self.net.named_modules():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                self._frozen.append(name)
        self.train(self.training)

    def train(self, mode: bool = True) -> Backbone:
        """As of any module; what is frozen stays in eval mode."""
        super().train(mode)
        for name in self._frozen:
            self.net.get_submodule(name).eval()
        return self

    def lr_scales(self, decay: float) -> dict[nn.Parameter, float]:
        """Factors of the learning rate: `decay` for the last layer, and once more for each layer below it.

        What stands on the backbone has the factor 1. Layers are timm's finest groups, such as one residual block.
        """
        depth, top = depths(self.net, coarse=False)
        return {parameter: decay ** (top - depth[name]) for name, parameter in self.net.named_parameters()}

    @property
    def num_stages(self) -> int:
        """Stages that `maps` and `until` count: 4 of a ResNet, the blocks of a ViT; 0 where there are none."""
        net: Any = self.net
        if isinstance(net, ResNet):
            return 4
        stages = net.blocks if isinstance(net, VisionTransformer) else getattr(net, "stages", ())
        return len(stages)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Images (N, C, H, W), normalized -> the map (N, D_k, h_k, w_k) behind every stage, from the first.

        Raises:
            ConfigError: A network without stages.
        """
        self._stage(1)
        net: Any = self.net
        if isinstance(net, StagedConvNet):
            found = []
            for stage in net.stages:
                x = stage(x)
                found.append(x)
            return found
        found = net.forward_intermediates(x, intermediates_only=True)
        return found[-self.num_stages :]

    def until(self, stage: int) -> Backbone:
        """A copy of the network up to a stage, pooled: a mid-level encoder.

        Args:
            stage: 1 is the first; `num_stages` gives a copy of the whole.

        Raises:
            ConfigError: A network without stages, or a stage that it does not have.
        """
        stage = self._stage(stage)
        net: Any = copy.deepcopy(self.net)
        if isinstance(net, ResNet):
            for later in range(stage + 1, 5):
                setattr(net, f"layer{later}", nn.Sequential())
        elif isinstance(net, VisionTransformer):
            net.blocks = net.blocks[:stage]
        else:
            net.stages = net.stages[:stage]
        training = net.training
        with torch.no_grad():
            weight = next(net.parameters())
            dim = net.eval()(weight.new_zeros(1, self.in_chans, *self.image_size)).shape[1]
        whole = stage == self.num_stages
        return Backbone(
            net.train(training),
            architecture=self.architecture,
            model_args=self.model_args if whole else None,
            dim=dim,
            in_chans=self.in_chans,
            image_size=self.image_size,
        )

    def _stage(self, stage: int) -> int:
        if not 1 <= stage <= self.num_stages:
            raise ConfigError(
                f"stage: expected 1 to {self.num_stages} of {self.architecture}, found {stage}"
                if self.num_stages
                else f"stage: {self.architecture} has no stages; take a ResNet, a ViT, alexnet_bn or vgg11"
            )
        return stage


@dataclass(frozen=True, kw_only=True)
class BackboneRequest:
    """What a run offers its method to build backbones with; called, it builds one.

    Attributes:
        name: `RunConfig.backbone`.
        in_chans: Channels C of the data's images.
        image_size: (height, width) of the data's images, in pixels.
        args: `RunConfig.backbone_args`: for timm, and `norm` and `width`.
    """

    name: str
    in_chans: int
    image_size: tuple[int, int]
    args: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self,
        *,
        name: str | None = None,
        in_chans: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        **args: Any,
    ) -> Backbone:
        """A backbone at random initialization; what is not given is as the run says.

        Args:
            name: Of another network.
            in_chans: Where the method's input has other channels than the data.
            image_size: Where it has another size: that of a tile.
            **args: As `create_backbone` takes them (`norm`, `width`, ...); the run's `backbone_args` come last, so
                that a user has the last word.
        """
        return create_backbone(
            name or self.name,
            in_chans=in_chans or self.in_chans,
            image_size=image_size or self.image_size,
            **{**args, **self.args},
        )


def create_backbone(
    name: str,
    *,
    in_chans: int,
    image_size: int | tuple[int, int],
    global_pool: str | None = None,
    small_stem: bool = False,
    norm: Norm | None = None,
    width: float = 1.0,
    **args: Any,
) -> Backbone:
    """Build a backbone at random initialization, from torch's global seed.

    Args:
        name: `r10`, `r18s`, `r50s`, `vit_t4`, `alexnet_bn`, `vgg11`, `mlp`, `gru` (small ones of ours), `r18`, `r50`,
            or any name that timm knows.
        in_chans: Channels C of the images.
        image_size: Side, or (height, width), of the images in pixels. It shapes networks of fixed input
            size (ViTs); others also take other sizes later.
        global_pool: timm's pooling (`avg`, `max`, `token`, ...); by default the network's own, and the mean
            of the patch tokens for a ViT.
        small_stem: Patches of 4 pixels for a ViT that has larger ones; `r10` and `vit_t4` are small already.
        norm: `batch`, `layer` (over one image, CPC's), `group` or `none`; by default the network's own. timm's ResNets
            and the convolutional networks of ours can be asked for another.
        width: Factor of all channels, for the convolutional networks of ours: one half of split-brain is 0.5.
        **args: Further arguments of the network for timm, such as `drop_path_rate` or `stem_stride`.

    Returns:
        The backbone, in train mode.

    Raises:
        ConfigError: timm knows no such name, a size that the network cannot take, a stem that timm's
            arguments cannot change, or a pooling that the network does not have.
    """
    architecture = SHORT_NAMES.get(name, name)
    if not timm.is_model(architecture):
        otherwise = f"choose one of {', '.join(SHORT_NAMES)}"
        near = did_you_mean(name, [*SHORT_NAMES, *timm.list_models()], most=4, otherwise=otherwise)
        raise ConfigError(f"backbone {name!r}: timm has no network of this name; {near}")
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
    model_args |= _own_args(name, architecture, norm, width, is_vit)
    cfg = get_pretrained_cfg(architecture)
    if cfg is not None and cfg.fixed_input_size:
        model_args["img_size"] = list(size)
    if global_pool is not None:
        model_args["global_pool"] = global_pool
    elif is_vit:
        # one rule for every ViT, see `embedkit_vit_t4`
        model_args |= {"global_pool": "avg", "fc_norm": False}
    model_args |= args

    # One empty image tells the width, and whether this network can take images of this size at all.
    try:
        net = timm.create_model(architecture, num_classes=0, **model_args)
        with torch.no_grad():
            features = net.eval()(torch.zeros(1, in_chans, *size))
        net.train()
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"backbone {name!r} on images of {size[0]}x{size[1]} with {model_args}: timm refuses: {error}"
        ) from error
    patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if is_vit and patch is not None and (size[0] % patch[0] or size[1] % patch[1]):
        raise ConfigError(
            f"backbone {name!r}: patches of {patch[0]}x{patch[1]} do not tile an image of "
            f"{size[0]}x{size[1]}; choose an image_size that is a multiple of the patch"
        )
    if features.ndim != 2:
        raise ConfigError(
            f"backbone {name!r}: with global_pool {global_pool!r} an image gives {tuple(features.shape[1:])}, "
            "not one vector; choose a pooling such as avg"
        )
    if "global_pool" not in model_args and (pooling := _pooling(net)):
        model_args["global_pool"] = pooling  # written down, it holds whatever a later timm's default is
    return Backbone(
        net,
        architecture=architecture,
        model_args=model_args,
        dim=features.shape[1],
        in_chans=in_chans,
        image_size=(size[0], size[1]),
    )


#: timm's names of our norms, for timm's own ResNets.
_TIMM_NORMS = {"batch": "batchnorm2d", "layer": "groupnorm1", "group": "groupnorm"}


def _own_args(name: str, architecture: str, norm: str | None, width: float, is_vit: bool) -> dict[str, Any]:
    """The arguments that say which norm and width."""
    found: dict[str, Any] = {}
    if norm is not None:
        norm_layer(norm)
        if architecture in _WITH_NORM:
            found["norm"] = norm
        elif norm in _TIMM_NORMS and is_model_in_modules(architecture, {"resnet"}):
            found["norm_layer"] = _TIMM_NORMS[norm]
        elif not (is_vit and norm == "layer") and not (architecture == "embedkit_gru" and norm == "none"):
            raise ConfigError(
                f"backbone {name!r}: it has no norm {norm!r}; take r10, r18s, r50s or alexnet_bn"
            )
    if width != 1.0:
        if architecture not in _WITH_WIDTH or width <= 0:
            raise ConfigError(
                f"backbone {name!r}: its width cannot be multiplied by {width:g}; take r10, r18s, r50s or alexnet_bn"
            )
        found["width"] = width
    return found


def _pooling(net: nn.Module) -> str | None:
    """The timm name of the pooling that a network chose for itself, where it tells."""
    pool = getattr(net, "global_pool", None) or getattr(getattr(net, "head", None), "global_pool", None)
    return pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
