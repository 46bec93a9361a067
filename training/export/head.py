"""A network with its classifier: `logits` beside `embedding`."""

from __future__ import annotations

from typing import Any, cast

import timm
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.models.backbones import Backbone

__all__ = ["classifier_name", "with_head"]


class _BothOutputs(nn.Module):
    """What timm's network gives before and behind its classifier."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Normalized images (N, C, H, W) -> `embedding` (N, D) and `logits` (N, K)."""
        net = cast(Any, self)
        embedding = net.forward_head(net.forward_features(x), pre_logits=True)
        return {"embedding": embedding, "logits": net.get_classifier()(embedding)}


def with_head(encoder: nn.Module, head: nn.Module | None) -> nn.Module:
    """The timm network of an encoder whose classifier is `head`, in eval mode.

    Args:
        encoder: What a method exports.
        head: The linear classifier on it (D -> K).

    Returns:
        A network with timm's names, so that timm loads it with and without its classifier.

    Raises:
        ConfigError: A method without a classifier on what it exports, or a network for which timm has none.
    """
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            "--with-head: the method trains no classifier on its encoder; export without it, or train supervised, "
            "fixmatch or another method of labels"
        )
    if not isinstance(encoder, Backbone) or encoder.model_args is None:
        raise ConfigError("--with-head: the encoder is more than a network of timm; export without it")
    net: Any = timm.create_model(encoder.architecture, num_classes=head.out_features, **encoder.model_args)
    classifier = net.get_classifier() if hasattr(net, "get_classifier") else None
    if not isinstance(classifier, nn.Linear) or classifier.weight.shape != head.weight.shape:
        raise ConfigError(
            f"--with-head: timm puts no linear classifier on the features of {encoder.architecture}; export without it"
        )
    state = {f"{classifier_name(net)}.{name}": value for name, value in head.state_dict().items()}
    net.load_state_dict({**encoder.net.state_dict(), **state}, strict=True)
    # a class and not a wrapper: a module around it would change the names of the tensors
    net.__class__ = type(f"{type(net).__name__}WithLogits", (_BothOutputs, type(net)), {})
    return cast(nn.Module, net.eval())


def classifier_name(net: nn.Module) -> str:
    """The name of the linear classifier in a timm network."""
    classifier: nn.Module = cast(Any, net).get_classifier()
    return next(name for name, module in net.named_modules() if module is classifier)
