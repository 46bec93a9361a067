"""What is hidden stays hidden, what is predicted stands in its place, and only hidden patches count."""

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from embedkit.errors import ConfigError
from embedkit.training.augment import Compose, GaussianNoise
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.mae import MAE, Config, masked_loss, patch_targets, sincos_table
from embedkit.training.models.backbones import create_backbone
from embedkit.training.models.masking import patchify, unpatchify
from embedkit.training.optim import Optimizer

PLAIN = Compose(steps=())


def build(channels=1, **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(channels, 28, 28),
        mean=(0.3,) * channels,
        std=(0.3,) * channels,
        batch_size=8,
        steps_per_epoch=4,
        total_steps=40,
    )
    return MAE(create_backbone("vit_t4", in_chans=channels, image_size=28), Config(**config), facts)


def batch(n=8):
    return load_images(DataConfig(path="sklearn:digits", image_size=28)).batch(torch.arange(n))


def noise(n=3, channels=1, seed=0):
    return torch.randn(n, channels, 28, 28, generator=torch.Generator().manual_seed(seed))


def fixed():
    return torch.Generator().manual_seed(7)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_by_loops(norm_pix):
    x, eps = noise(2, channels=2).double(), 1e-6
    generator = torch.Generator().manual_seed(1)
    pred = torch.randn(2, 49, 32, generator=generator, dtype=torch.float64)
    mask = (torch.rand(2, 49, generator=generator) < 0.75).double()
    total = 0.0
    for n in range(2):
        for place in range(49):
            row, column = 4 * (place // 7), 4 * (place % 7)
            patch = [
                float(x[n, c, row + p, column + q]) for p in range(4) for q in range(4) for c in range(2)
            ]
            if norm_pix:
                mean = sum(patch) / 32
                variance = sum((value - mean) ** 2 for value in patch) / 31  # unbiased
                patch = [(value - mean) / math.sqrt(variance + eps) for value in patch]
            errors = [(float(a) - b) ** 2 for a, b in zip(pred[n, place], patch, strict=True)]
            total += float(mask[n, place]) * sum(errors) / 32
    loss = masked_loss(pred, patch_targets(x, 4, norm_pix, eps), mask)
    assert float(loss) == pytest.approx(total / float(mask.sum()), rel=1e-10)


def test_by_hand():
    # a patch of 0, 0, 0, 4: mean 1, unbiased variance (1 + 1 + 1 + 9) / 3 = 4
    x = torch.tensor([[0.0, 0.0], [0.0, 4.0]]).reshape(1, 1, 2, 2)
    assert patch_targets(x, 2, True, 0.0)[0, 0].tolist() == [-0.5, -0.5, -0.5, 1.5]
    assert patch_targets(x, 2, False)[0, 0].tolist() == [0.0, 0.0, 0.0, 4.0]
    assert (
        patch_targets(torch.full((1, 1, 2, 2), 3.0), 2)[0, 0].tolist() == [0.0] * 4
    )  # not a number without eps
    # two hidden patches, errors 1 and 9 / 2, and a visible one of any error
    pred = torch.tensor([[[1.0, 1.0], [3.0, 0.0], [1e6, 1e6]]])
    loss = masked_loss(pred, torch.zeros(1, 3, 2), torch.tensor([[1.0, 1.0, 0.0]]))
    assert float(loss) == pytest.approx((1 + 4.5) / 2)


def test_no_gradient_of_visible_patches():
    generator = torch.Generator().manual_seed(2)
    pred, target = torch.randn(2, 3, 49, 16, generator=generator).unbind()
    mask = (torch.rand(3, 49, generator=generator) < 0.75).float()
    pred.requires_grad_(), target.requires_grad_()
    masked_loss(pred, target, mask).backward()
    for gradient in (pred.grad, target.grad):
        assert not gradient[mask == 0].any()
        assert (gradient[mask == 1].abs().sum(1) > 0).all()


def test_bfloat16_predictions_are_widened():
    pred, target = (
        noise(49, 1, 3).flatten(1)[None, :, :16].bfloat16(),
        noise(49, 1, 4).flatten(1)[None, :, :16],
    )
    mask = torch.ones(1, 49)
    with torch.autocast("cpu", torch.bfloat16):
        loss = masked_loss(pred, target, mask)
    torch.testing.assert_close(loss, masked_loss(pred.float(), target, mask))


def test_the_position_table_is_the_formula():
    table = sincos_table(16, 3, 5)
    assert table.shape == (1, 16, 16) and not table[0, 0].any()
    for row in range(3):
        for column in range(5):
            for half, place in enumerate((column, row)):
                for i in range(4):
                    angle = place / 10000 ** (i / 4)
                    values = table[0, 1 + 5 * row + column, 8 * half :]
                    assert float(values[i]) == pytest.approx(math.sin(angle), abs=1e-6)
                    assert float(values[4 + i]) == pytest.approx(math.cos(angle), abs=1e-6)
    with pytest.raises(ConfigError, match="multiple of 4, found 18"):
        sincos_table(18, 7, 7)


def test_positions_are_fixed():
    method = build()
    assert torch.equal(method.backbone.net.pos_embed, sincos_table(192, 7, 7))
    trained = {id(p) for group in Optimizer().create(method).param_groups for p in group["params"]}
    assert id(method.backbone.net.pos_embed) not in trained
    assert id(method.backbone.net.cls_token) in trained and id(method.mask_token) in trained


@pytest.mark.parametrize("channels", [1, 3])
def test_layers_start_xavier_uniform(channels):
    method = build(channels)
    for weight in (
        method.backbone.net.patch_embed.proj.weight.flatten(1),
        method.backbone.net.blocks[0].attn.qkv.weight,
        method.to_patch.weight,
    ):
        limit = math.sqrt(6 / sum(weight.shape))
        assert 0.95 * limit < float(weight.detach().abs().max()) <= limit
        assert float(weight.detach().std()) == pytest.approx(limit / math.sqrt(3), rel=0.05)


def test_the_encoder_sees_the_patches_that_stay_and_no_other():
    method, x = build().eval(), noise()
    with torch.no_grad():
        latent, mask, _ = method.forward_encoder(x, 0.75, fixed())
        assert latent.shape == (3, 1 + 12, 192) and mask.sum(1).tolist() == [37.0] * 3
        assert len(mask.unique(dim=0)) == 3  # each image has a mask of its own
        hidden = unpatchify(mask[:, :, None].expand(-1, -1, 16), 4, image_size=28)
        other = torch.where(hidden == 1, noise(seed=9), x)
        assert torch.equal(method.forward_encoder(other, 0.75, fixed())[0], latent)
        other = torch.where(hidden == 0, noise(seed=9), x)
        assert not torch.isclose(method.forward_encoder(other, 0.75, fixed())[0], latent).all(2).any()


def test_with_nothing_hidden_it_is_timms_forward_and_the_embedding_is_the_mean_of_the_patch_tokens():
    method, x = build().eval(), noise()
    with torch.no_grad():
        latent, mask, ids_restore = method.forward_encoder(x, 0.0, fixed())
        assert not mask.any() and not torch.equal(ids_restore, torch.arange(49).expand(3, -1))
        restored = latent[:, 1:].gather(1, ids_restore[:, :, None].expand(-1, -1, 192))
        tokens = method.backbone.forward_features(x)
        torch.testing.assert_close(torch.cat([latent[:, :1], restored], 1), tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(method.encoder()(x), restored.mean(1), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(
            method.encoder()(x), tokens.mean(1), atol=1e-3
        )  # the class token is left out
    assert method.encoder() is method.backbone


def test_predictions_stand_where_their_patches_were():
    method = build(decoder_depth=0).eval()  # without blocks a place is decoded from its own token alone
    with torch.no_grad():
        latent, mask, ids_restore = method.forward_encoder(noise(), 0.75, fixed())
        before = method.forward_decoder(latent, ids_restore)
        for token in range(12):
            changed = latent.clone()
            changed[:, 1 + token] += torch.randn(192, generator=fixed())
            moved = (method.forward_decoder(changed, ids_restore) != before).any(2)
            assert torch.equal(moved, ids_restore == token)
            assert not (moved & (mask == 1)).any()
        # what is hidden is the mask token and its place: the same for every image
        hidden = (mask == 1).all(0)
        assert hidden.any() and torch.equal(before[0, hidden], before[1, hidden])
        same = before[0][:, None] == before[0][None]
        assert not same.all(2).fill_diagonal_(False).any()  # places are told apart


def test_the_first_loss_of_a_silent_decoder():
    # saying 0 of a target of mean 0 and unbiased variance 1 costs (P - 1) / P, on the hidden patches
    method = build(augment=PLAIN, norm_pix_eps=0.0)
    nn.init.zeros_(method.to_patch.weight)
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8, generator=fixed())
    found = Batch(images, torch.zeros(8), torch.arange(8))
    assert float(method.loss(found, method.generator())["loss"].detach()) == pytest.approx(15 / 16, rel=1e-5)
    metric = method.pretext_metric(found, method.generator())
    assert float(metric["explained_energy"].detach()) == pytest.approx(0.0, abs=1e-6)
    plain = build(augment=PLAIN, norm_pix_loss=False)
    nn.init.zeros_(plain.to_patch.weight)
    mask = plain.forward_encoder(plain.view(images), 0.75, plain.generator("masks"))[1]
    squares = patchify(plain.view(images), 4).square().mean(2)[mask == 1].mean()
    torch.testing.assert_close(plain.loss(found, plain.generator())["loss"].detach(), squares)


def test_masks_have_randomness_of_their_own():
    method, x = build(augment=Compose(steps=(GaussianNoise(sigma=(0.1, 0.1)),))), batch()
    seen = []
    encode = method.forward_encoder
    method.forward_encoder = lambda *arguments: seen.append(encode(*arguments)) or seen[-1]
    for seed in (1, 2):
        method.loss(x, torch.Generator().manual_seed(seed))
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][0], seen[1][0])
    method.batches_seen += 1
    method.loss(x, torch.Generator().manual_seed(1))
    assert not torch.equal(seen[0][1], seen[2][1])


def test_overfits_one_batch_and_gradient_reaches_every_weight_but_the_places():
    method, images = build(augment=PLAIN, norm_pix_loss=False), batch(2)
    optimizer = Optimizer(lr=2e-3, weight_decay=0.0, betas=(0.9, 0.95)).create(method)
    losses = []
    for step in range(80):
        losses.append(method.loss(images, method.generator())["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        if step == 0:
            silent = [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()]
            assert silent == ["backbone.net.pos_embed"]
        optimizer.step()
    assert float(losses[-1].detach()) < 0.15 * float(losses[0].detach())


def test_plain_attention_is_the_same_function():
    method, x = build().eval(), noise()
    with torch.no_grad():
        fused = method.encoder()(x)
        method.on_fit_start()
        assert not any(block.attn.fused_attn for block in method.backbone.net.blocks)
        torch.testing.assert_close(method.encoder()(x), fused, rtol=1e-5, atol=1e-5)


def test_a_backbone_without_tokens_is_refused():
    facts = Facts(
        image_shape=(1, 28, 28), mean=(0.3,), std=(0.3,), batch_size=8, steps_per_epoch=4, total_steps=40
    )
    with pytest.raises(ConfigError, match="found embedkit_r10; take vit_t4"):
        MAE(create_backbone("r10", in_chans=1, image_size=28), Config(), facts)
