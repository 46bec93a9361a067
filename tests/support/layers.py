"""The layers of a head, for comparison with how papers list them."""

from torch import nn


def layers_of(head: nn.Sequential) -> list[tuple]:
    """Every layer as the papers list them."""
    layers: list[tuple] = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            layers.append(("linear", layer.in_features, layer.out_features, layer.bias is not None))
        elif isinstance(layer, nn.BatchNorm1d):
            learns = [name for name, p in layer.named_parameters() if p.requires_grad]
            layers.append(("norm", layer.num_features, *learns))
        else:
            layers.append((type(layer).__name__,))
    return layers
