import json

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from safetensors.torch import save_file

from embedkit.errors import ConfigError
from embedkit.training.models.backbones import BackboneRequest, create_backbone


def r10_parameters(in_chans: int) -> int:
    """Counted by hand: convolutions without bias, two values for each channel of a BatchNorm."""
    total, fan_in = in_chans * 9 * 32 + 2 * 32, 32
    for width in (32, 64, 128, 256):
        total += 9 * fan_in * width + 9 * width * width + 2 * 2 * width
        if fan_in != width:
            total += fan_in * width + 2 * width
        fan_in = width
    return total


@pytest.mark.parametrize("in_chans", [1, 3])
def test_r10_is_the_network_of_the_design(in_chans):
    backbone = create_backbone("r10", in_chans=in_chans, image_size=28)
    assert backbone.architecture == "embedkit_r10" and backbone.dim == 256
    assert sum(p.numel() for p in backbone.parameters()) == r10_parameters(in_chans)
    assert 1.2e6 < r10_parameters(in_chans) < 1.25e6
    stem = backbone.net.conv1
    assert (stem.kernel_size, stem.stride, stem.out_channels) == ((3, 3), (2, 2), 32)
    assert not any(isinstance(module, torch.nn.MaxPool2d) for module in backbone.modules())
    x = torch.rand(2, in_chans, 28, 28)
    assert backbone(x).shape == (2, 256)
    assert backbone.forward_features(x).shape == (2, 256, 2, 2)  # 28 -> 14 -> 14 -> 7 -> 4 -> 2
    # timm's own names: what a plain timm ResNet of this depth calls its layers
    names = {name.split(".")[0] for name in backbone.net.state_dict()}
    assert names == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


def test_feature_info_of_r10_tells_the_true_strides():
    net = timm.create_model("embedkit_r10", in_chans=1, features_only=True)
    x = torch.rand(1, 1, 64, 64)
    assert [64 // tuple(f.shape)[-1] for f in net(x)] == net.feature_info.reduction() == [2, 2, 4, 8, 16]


def test_vit_t4_pools_the_patch_tokens_alone():
    backbone = create_backbone("vit_t4", in_chans=1, image_size=28).eval()
    assert backbone.dim == 192 and len(backbone.net.blocks) == 6
    assert backbone.net.blocks[0].attn.num_heads == 3
    x = torch.rand(2, 1, 28, 28)
    tokens = backbone.forward_features(x)
    assert tokens.shape == (2, 1 + 49, 192)
    torch.testing.assert_close(backbone(x), tokens[:, 1:].mean(dim=1))
    # the norm that a masked pretraining trains is the one that the pooled encoder uses
    assert isinstance(backbone.net.norm, torch.nn.LayerNorm)
    assert isinstance(backbone.net.fc_norm, torch.nn.Identity)


@pytest.mark.parametrize(
    ("name", "in_chans", "size", "dim"),
    [
        ("r10", 1, 28, 256),
        ("vit_t4", 3, (32, 24), 192),
        ("r18", 1, 28, 512),
        ("vit_tiny_patch16_224", 3, 64, 192),
        ("mobilenetv3_small_050", 3, 32, 1024),
    ],
)
def test_an_entry_loads_with_timm(tmp_path, name, in_chans, size, dim):
    backbone = create_backbone(name, in_chans=in_chans, image_size=size).eval()
    config = {
        "architecture": backbone.architecture,
        "num_classes": 0,
        "num_features": backbone.dim,
        "model_args": backbone.model_args,
        "pretrained_cfg": {"num_classes": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(backbone.net.state_dict(), tmp_path / "model.safetensors")
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    height, width = (size, size) if isinstance(size, int) else size
    x = torch.rand(2, in_chans, height, width)
    assert backbone.dim == dim and "global_pool" in backbone.model_args
    assert torch.equal(net(x), backbone(x))


def test_initialization_is_a_function_of_the_global_seed_alone():
    torch.manual_seed(3)
    first = create_backbone("r10", in_chans=1, image_size=28)
    after = torch.rand(1)
    torch.manual_seed(3)
    second = timm.create_model("embedkit_r10", num_classes=0, in_chans=1)
    # the look at one image neither draws random numbers nor touches BatchNorm's statistics
    assert torch.equal(after, torch.rand(1))
    assert first.training and first.net.training
    for (name, a), (other, b) in zip(
        first.net.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b), name


def test_small_stem_is_patches_of_four_pixels():
    backbone = create_backbone("vit_tiny_patch16_224", in_chans=1, image_size=28, small_stem=True)
    assert backbone.net.patch_embed.patch_size == (4, 4)
    assert backbone.model_args["global_pool"] == "avg"
    assert isinstance(backbone.net.norm, torch.nn.LayerNorm)  # before the mean, as in vit_t4
    assert json.loads(json.dumps(backbone.model_args)) == backbone.model_args
    assert create_backbone("r10", in_chans=1, image_size=28, small_stem=True).dim == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet1"}, "did you mean .*resnet"),
        ({"name": "zzzzzzzz"}, "choose one of r10"),
        ({"name": "r18", "small_stem": True}, "take r10"),
        ({"name": "vit_t4", "image_size": 30}, "do not tile"),
        ({"name": "r10", "global_pool": ""}, "choose a pooling"),
        ({"name": "r10", "global_pool": "token"}, "timm refuses"),
        ({"name": "convnext_atto", "image_size": 16}, "16x16"),
        ({"name": "r10", "in_chans": 0}, "in_chans of 1 or more"),
        ({"name": "r10", "image_size": (1, 2, 3)}, "image_size as pixels"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_next_step(arguments, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(**{"in_chans": 1, "image_size": 28, **arguments})


@pytest.mark.parametrize("name", ["r18s", "r50s", "alexnet_bn", "vgg11", "mlp", "gru"])
def test_the_other_small_networks_are_built_again_by_timm(name):
    torch.manual_seed(0)
    backbone = create_backbone(name, in_chans=2, image_size=(16, 12)).eval()
    twin = timm.create_model(backbone.architecture, num_classes=0, **backbone.model_args).eval()
    twin.load_state_dict(backbone.net.state_dict())
    x = torch.randn(3, 2, 16, 12)
    features = backbone(x)
    assert features.shape == (3, backbone.dim)
    torch.testing.assert_close(twin(x), features)
    torch.testing.assert_close(backbone.pool(backbone.forward_features(x)), features)


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
@pytest.mark.parametrize("name", ["r10", "alexnet_bn"])
def test_without_batch_norm_a_row_does_not_depend_on_its_batch(name, norm):
    torch.manual_seed(0)
    backbone = create_backbone(name, in_chans=1, image_size=12, norm=norm).train()
    x = torch.randn(4, 1, 12, 12)
    torch.testing.assert_close(backbone(x)[:2], backbone(x[:2]), atol=1e-5, rtol=1e-4)
    assert backbone.model_args["norm"] == norm


def test_norms_and_widths_that_a_network_does_not_have():
    assert (
        create_backbone("r18", in_chans=1, image_size=32, norm="layer").model_args["norm_layer"]
        == "groupnorm1"
    )
    half = create_backbone("r10", in_chans=1, image_size=28, width=0.5)
    assert half.dim == 128 and sum(p.numel() for p in half.parameters()) < 0.3 * 1.2e6
    with pytest.raises(ConfigError, match="norm: expected one of batch"):
        create_backbone("r10", in_chans=1, image_size=28, norm="instance")
    with pytest.raises(ConfigError, match="no norm 'batch'"):
        create_backbone("vit_t4", in_chans=1, image_size=28, norm="batch")
    with pytest.raises(ConfigError, match="width cannot be multiplied"):
        create_backbone("r18", in_chans=1, image_size=28, width=0.5)


@pytest.mark.parametrize("name", ["r10", "alexnet_bn", "vit_t4"])
def test_a_mid_level_encoder_is_the_pooled_map_of_its_stage(name):
    torch.manual_seed(0)
    backbone = create_backbone(name, in_chans=1, image_size=16).eval()
    x = torch.randn(2, 1, 16, 16)
    maps = backbone.maps(x)
    assert len(maps) == backbone.num_stages
    for stage in (1, 2, backbone.num_stages):
        part = backbone.until(stage).eval()
        assert part(x).shape == (2, part.dim) and (part.model_args is None) == (stage < backbone.num_stages)
        if name != "vit_t4":  # whose last norm stands before the pooling
            torch.testing.assert_close(part(x), maps[stage - 1].mean((2, 3)))
    torch.testing.assert_close(backbone.until(backbone.num_stages)(x), backbone(x))
    next(part.parameters()).data.zero_()
    assert any(p.any() for p in backbone.parameters())  # a copy
    with pytest.raises(ConfigError, match=f"expected 1 to {backbone.num_stages}"):
        backbone.until(0)
    with pytest.raises(ConfigError, match="has no stages"):
        create_backbone("mlp", in_chans=1, image_size=8).until(1)


def test_a_request_is_the_runs_with_what_the_method_asks_for():
    request = BackboneRequest(name="r10", in_chans=3, image_size=(28, 28), args={"norm": "group"})
    assert request().in_chans == 3 and request().model_args["norm"] == "group"
    tile = request(in_chans=1, image_size=12, norm="layer")  # the user has the last word
    assert (tile.in_chans, tile.image_size, tile.model_args["norm"]) == (1, (12, 12), "group")
    assert request(name="vgg11", norm="none").architecture == "embedkit_vgg11"
