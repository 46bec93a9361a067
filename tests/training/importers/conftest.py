"""The networks that the importers' tests import, what they would have written, and a hub to take them from."""

import pytest
from zoos import cache, hub  # noqa: F401


@pytest.fixture(scope="session")
def random_network():
    """`importing.random_network`, where timm is installed."""
    pytest.importorskip("timm")
    from importing import random_network

    return random_network


@pytest.fixture(scope="session")
def resnet(random_network):
    return random_network("embedkit_r10", in_chans=3)


@pytest.fixture(scope="session")
def vit(random_network):
    network = random_network("embedkit_vit_t4", in_chans=3, img_size=32, global_pool="token", fc_norm=False)
    network.pos_embed.data.normal_(0, 0.5)
    return network


@pytest.fixture(scope="session")
def lightness(random_network):
    """Of VISSL's colorization: one channel, and no stride in the last stage."""
    network = random_network("embedkit_r10", in_chans=1)
    network.layer4[0].conv1.stride = network.layer4[0].downsample[0].stride = (1, 1)
    return network


@pytest.fixture
def kept(monkeypatch):
    """The arguments of `write_import`, which writes nothing: for what only its input shows."""
    calls = []
    for module in ("checkpoints", "state_dicts", "timm_models"):
        monkeypatch.setattr(
            f"embedkit.training.importers.{module}.write_import",
            lambda request, network, **more: calls.append((network, more)),
        )
    return calls
