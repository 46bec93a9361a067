"""How deep in a network a parameter stands, as timm groups them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from timm.models import group_parameters
from torch import nn

from embedkit.errors import ConfigError

__all__ = ["depths"]

#: A name that no layer has: of what a method puts on the network.
_ON_TOP = ""


def depths(net: nn.Module, *, coarse: bool) -> tuple[dict[str, int], int]:
    """The depth of every parameter by name, from 0 at the input, and that of a head on the network.

    A last norm or pooling that timm counts to the classifier has the depth of the head.

    Args:
        net: A network of timm's form.
        coarse: By the stem and whole stages (a ResNet's four, a ViT's blocks); else by single blocks.

    Raises:
        ConfigError: A network that does not tell.
    """
    matcher: Any = getattr(net, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"freeze, optimizer.layer_decay: timm does not say which layers {type(net).__name__} has; leave them out"
        )
    with_head: Any = SimpleNamespace(named_parameters=lambda: [*net.named_parameters(), (_ON_TOP, None)])
    found: dict[str, int] = group_parameters(with_head, matcher(coarse=coarse), reverse=True)
    return found, found.pop(_ON_TOP)
