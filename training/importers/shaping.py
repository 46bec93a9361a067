"""What a user may change of a timm network before its import, and what is easily missed about the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from embedkit.errors import ConfigError, EntryError
from embedkit.model.preprocess import Preprocess
from embedkit.training.importers.foreign import in_one_line

__all__ = ["heads_of", "pool_args", "set_image_size", "traps"]

#: `--pool` -> timm's name of it.
_POOLS = {"mean": "avg", "cls": "token"}
#: Networks whose last layer is the projection into the space of a text encoder.
_WITH_TEXT = ("clip", "pe_core", "tipsv2")
#: Above this side, in pixels, a network that also takes 224 is said to be slow.
_USUAL = 384


def heads_of(cfg: Mapping[str, Any], pooled: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that may be left out: those of the classifier, and of an attention pooling that was replaced.

    Args:
        cfg: timm's `pretrained_cfg`.
        pooled: What `pool_args` gave.
    """
    classifier = cfg.get("classifier")
    names = classifier if isinstance(classifier, list | tuple) else (classifier,) if classifier else ()
    heads = tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))
    return (*heads, "attn_pool.") if pooled else heads


def pool_args(network: nn.Module, pool: str | None, where: str) -> dict[str, Any]:
    """The arguments with which timm builds the same network with another pooling; empty for no change.

    The norm stays where it is: timm would otherwise move it behind a mean, where it has no weights.

    Args:
        network: As timm builds it by default.
        pool: `mean` (of the patches, without class token and registers) or `cls`.
        where: For messages.

    Raises:
        ConfigError: The network has no such pooling.
    """
    if pool is None:
        return {}
    if pool not in _POOLS:
        raise ConfigError(f"--pool {pool!r}: expected {' or '.join(_POOLS)} for a network of timm")
    wanted = _POOLS[pool]
    if isinstance(network, VisionTransformer | Eva):
        if network.global_pool == wanted:
            return {}
        if pool == "cls" and network.cls_token is None:
            raise ConfigError(f"{where} has no class token: leave --pool cls out, or give --pool mean")
        behind = not isinstance(network.fc_norm, nn.Identity)
        return {
            "global_pool": wanted,
            "use_fc_norm" if isinstance(network, Eva) else "fc_norm": behind,
        }
    kind = getattr(network, "global_pool", None) or getattr(getattr(network, "head", None), "global_pool", "")
    kind = kind if isinstance(kind, str) else getattr(kind, "pool_type", "")
    if kind != wanted:
        raise ConfigError(f"{where}: its pooling is {kind or 'its own'}, and --pool {pool} is not possible")
    return {}


def set_image_size(network: nn.Module, native: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """Let a filled network take another image size; position embeddings are resampled by timm.

    Args:
        network: Changed in place.
        native: Its size, in pixels.
        size: The wanted one.

    Returns:
        What timm needs to build it so.

    Raises:
        ConfigError: No multiple of the patch.
        EntryError: The network takes no other size.
    """
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    sides = patch if isinstance(patch, tuple) else (patch,) if isinstance(patch, int) else ()
    if any(side % one for side in size for one in sides):
        raise ConfigError(f"--image-size {size[0]}: expected a multiple of the patch, {sides[0]} pixels")
    if size == native or not hasattr(network, "set_input_size"):
        return {}
    try:
        network.set_input_size(img_size=size)
    except Exception as error:  # whatever a network makes of a size that is not its own
        raise EntryError(f"--image-size {size[0]}: the network refuses it ({in_one_line(error)})") from None
    return {"img_size": list(size)}


def traps(
    network: nn.Module,
    architecture: str,
    preprocess: Preprocess,
    *,
    native: tuple[int, int],
    pooled: bool,
    projection: int = 0,
) -> tuple[str, ...]:
    """What is easily missed about an imported network, a sentence each.

    Args:
        network: As it is stored.
        architecture: timm's name of it.
        preprocess: Its contract.
        native: The image size that its weights were made for.
        pooled: Whether the pooling was asked for.
        projection: Outputs of the last layer, which was left out; 0 where there was none.
    """
    found = []
    pool = getattr(network, "global_pool", "")
    has_token = getattr(network, "cls_token", None) is not None
    if pool == "map":
        found.append(
            "the embedding is that of the attention pooling, which was trained with these weights; --pool mean would "
            "give another space"
        )
    elif pool == "token" and has_token and not pooled:
        found.append("the embedding is the class token; --pool mean gives the mean of the patches")
    elif pool == "avg" and has_token and not pooled:
        theirs = ", which is what the authors of DINOv3 take" if "dinov3" in architecture else ""
        found.append(
            f"the embedding is the mean of the patches, as in timm; --pool cls gives the class token{theirs}"
        )
    if projection and any(word in architecture for word in _WITH_TEXT):
        found.append(
            f"the projection to {projection} numbers is left out (num_classes=0 in timm), so that these embeddings "
            "cannot be compared with those of its text encoder"
        )
    height, width = preprocess.size
    if preprocess.size != native and getattr(network, "pos_embed", None) is not None:
        found.append(
            f"position embeddings of {native[0]}x{native[1]} pixels were resampled for {height}x{width}"
        )
    elif max(height, width) > _USUAL and hasattr(network, "set_input_size"):
        found.append(
            f"images of {height} pixels cost about {(height / 224) ** 2:.1f} times as much as those of 224: "
            "--image-size 224 is what many mean"
        )
    if preprocess.resize == "squash":
        found.append(
            f"images are squashed to {height}x{width}, and not cropped, as these weights were evaluated; --resize "
            "shortest keeps the aspect ratio"
        )
    return tuple(found)
