"""Codes at length 1, a straight-through gradient, who moves codes and who the encoder, and codes that do not die."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.config import Facts
from embedkit.training.data import Batch, DataConfig, load_images
from embedkit.training.methods.vqgan import VQGAN, Config, Quantizer, codebook_loss, perplexity
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer

FACTS = Facts(
    image_shape=(1, 16, 16), mean=(0.3,), std=(0.35,), batch_size=16, steps_per_epoch=4, total_steps=40
)


def build(facts=FACTS, **config):
    torch.manual_seed(0)
    small = {"codes": 32, "code_dim": 4, "decoder_depth": 1, "discriminator_width": 4}
    vit = create_backbone("vit_t4", in_chans=1, image_size=16, embed_dim=48, depth=2, num_heads=2)
    return VQGAN(vit, Config(**{**small, **config}), facts)


def digits(rows):
    return load_images(DataConfig(path="sklearn:digits", image_size=16)).batch(torch.as_tensor(rows))


# --- the codebook --------------------------------------------------------------------------------------------


def test_the_code_is_that_of_the_largest_cosine():
    generator = torch.Generator().manual_seed(0)
    quantizer = Quantizer(20, 5)
    with torch.no_grad():  # codes and encodings of any length
        quantizer.codebook.mul_(torch.rand(20, 1, generator=generator) * 9 + 0.1)
    z = 3 * torch.randn(4, 6, 5, generator=generator)
    _, indices, unit, e = quantizer(z)
    for row, index in zip(z.flatten(0, 1), indices.flatten().tolist(), strict=True):
        cosines = [
            float(row.double() @ code.double() / row.double().norm() / code.double().norm())
            for code in quantizer.codebook.detach()
        ]
        assert max(range(20), key=cosines.__getitem__) == index
    for length in (unit.norm(dim=-1), e.norm(dim=-1)):
        torch.testing.assert_close(length, torch.ones(4, 6))
    # of vectors at length 1 the nearest is that of the largest cosine
    distances = torch.cdist(unit.flatten(0, 1), quantizer.lookup(torch.arange(20)))
    assert torch.equal(distances.argmin(1), indices.flatten())


def test_only_directions_count():
    """By hand: a long code in another direction does not win."""
    quantizer = Quantizer(2, 2)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.1, 0.0], [50.0, 50.0]]))
    assert quantizer(torch.tensor([[7.0, 0.1]]))[1].item() == 0


def test_the_gradient_goes_straight_through():
    quantizer = Quantizer(8, 3)
    z = torch.nn.functional.normalize(torch.randn(5, 3), dim=1).requires_grad_()
    quantized, _, unit, e = quantizer(z)
    torch.testing.assert_close(quantized, e)  # the values are the codes'
    weights = torch.randn(5, 3)
    (gradient,) = torch.autograd.grad((quantized * weights).sum(), unit, retain_graph=True)
    assert torch.equal(gradient, weights)  # d quantized / d z is the identity
    (none,) = torch.autograd.grad((quantized * weights).sum(), quantizer.codebook, allow_unused=True)
    assert none is None or not none.any()


def test_each_term_moves_its_own_side():
    z, e = (torch.randn(4, 3, requires_grad=True, dtype=torch.float64) for _ in range(2))
    loss = codebook_loss(z, e, 0.25)
    square = sum((a - b) ** 2 for a, b in zip(z.flatten().tolist(), e.flatten().tolist(), strict=True)) / 12
    assert float(loss.detach()) == pytest.approx(1.25 * square, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(e.grad, 2 * (e - z).detach() / 12)
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z - e).detach() / 12)
    only_codes = codebook_loss(z, e, 0.0)
    assert not torch.autograd.grad(only_codes, z)[0].any()


def test_perplexity_by_hand():
    assert float(perplexity(torch.zeros(9, dtype=torch.long), 8)) == pytest.approx(1.0)
    assert float(perplexity(torch.arange(8).repeat(3), 8)) == pytest.approx(8.0, rel=1e-6)
    assert float(perplexity(torch.tensor([0, 0, 1, 2]), 8)) == pytest.approx(math.sqrt(8), rel=1e-6)


# --- the method ----------------------------------------------------------------------------------------------


def test_the_codec_and_its_adversary_learn_from_their_own_losses():
    method = build(adversarial_start=0.0)
    method.batches_seen = 5
    outputs = method.loss(digits(range(8)), method.generator())
    networks = {name: [p for m in ms for p in m.parameters()] for name, ms in method.networks().items()}
    found = torch.autograd.grad(
        outputs["discriminator_loss"], networks["codec"], retain_graph=True, allow_unused=True
    )
    assert all(g is None for g in found)
    adversary = torch.autograd.grad(
        outputs["discriminator_loss"], networks["discriminator"], retain_graph=True
    )
    assert all(g.any() for g in adversary[::2])
    used = torch.autograd.grad(outputs["codec_loss"], method.decode.to_pixels.weight, retain_graph=True)[0]
    plain = torch.autograd.grad(
        outputs["reconstruction"] + outputs["codebook"], method.decode.to_pixels.weight, retain_graph=True
    )[0]
    assert not torch.allclose(used, plain)  # the adversary's judgment reaches the decoder
    assert torch.autograd.grad(outputs["codec_loss"], method.backbone.net.patch_embed.proj.weight)[0].any()


def test_the_adversary_begins_when_the_run_says():
    method = build(adversarial_start=0.5)
    for seen, judged in ((20, False), (21, True)):  # steps 19 and 20 of 40
        method.batches_seen = seen
        assert ("discriminator_loss" in method.loss(digits(range(4)), method.generator())) == judged
    method = build(adversarial=0.0, adversarial_start=0.0)
    assert "discriminator_loss" not in method.loss(digits(range(4)), method.generator())


def train(method, batch, steps=120):
    optimizer = Optimizer(lr=2e-3, weight_decay=0.0).create(*method.networks()["codec"])
    for step in range(steps):
        method.batches_seen = step + 1
        outputs = method.loss(batch, method.generator())
        optimizer.zero_grad()
        outputs["codec_loss"].backward()
        optimizer.step()
        method.on_train_batch_end(None, batch, step)
    return outputs


def test_held_out_images_are_drawn_from_many_codes():
    method = build(adversarial=0.0, restart_after=10)
    outputs = train(method, digits(range(64)))
    assert outputs["reconstruction"] < 0.5 * torch.tensor(1.0)
    method.eval()
    with torch.no_grad():
        found = {k: float(v) for k, v in method.pretext_metric(digits(range(100, 164)), None).items()}
    assert found["unexplained"] < 0.7 and found["perplexity"] > 0.1 * 32
    assert 0.1 < found["codebook_used"] <= 1.0 and found["narrow_margins"] < 0.05


def test_the_decoder_draws_from_code_numbers_what_it_drew_from_encodings():
    method = build().eval()
    x = method.view(digits(range(4)).images)
    quantized, indices, _, _ = method.quantizer(method._encode(x))
    assert indices.shape == (4, 16) and method.decode(quantized).shape == x.shape
    torch.testing.assert_close(method.decode_indices(indices), method.decode(quantized), rtol=1e-4, atol=1e-5)
    # and encoding a code's own vector gives its number
    numbers = torch.arange(32)
    assert torch.equal(method.quantizer.nearest(method.quantizer.lookup(numbers)), numbers)


def test_codes_that_are_long_unused_are_put_where_encodings_lie():
    method, batch = build(restart_after=2), digits(range(8))
    with torch.no_grad():  # all encodings lie on the other side of all codes but one
        method.quantizer.codebook[1:] = method.quantizer.codebook[1]
    before = method.quantizer.codebook.detach().clone()
    indices = []
    for step in range(2):
        method.loss(batch, method.generator())
        z, used = method._last
        indices.append(used)
        method.on_train_batch_end(None, batch, step)
    alive = torch.bincount(torch.cat(indices).flatten(), minlength=32) > 0
    moved = (method.quantizer.codebook != before).any(1)
    assert torch.equal(moved, ~alive) and moved.any()
    cosines = method.quantizer.codebook.detach()[moved] @ z.flatten(0, 1).T
    torch.testing.assert_close(cosines.max(1).values, torch.ones(int(moved.sum())))
    assert not method.unused[moved].any()
    still = build(restart_after=0)
    still.loss(batch, still.generator())
    still.on_train_batch_end(None, batch, 0)
    assert not still.unused.any()


def test_exported_is_the_encoder_alone():
    method = build()
    assert method.encoder() is method.backbone


def test_other_networks_and_wrong_fields_are_refused():
    with pytest.raises(ConfigError, match="expected a ViT"):
        VQGAN(create_backbone("r10", in_chans=1, image_size=16), Config(), FACTS)
    for wrong in ({"codes": 1}, {"code_dim": 0}, {"decoder_depth": 0}, {"restart_after": -1}):
        with pytest.raises(ConfigError, match="vqgan: expected"):
            build(**wrong)
    hidden = Batch(digits([0]).images, torch.tensor([-1]), torch.tensor([0]))
    assert build().loss(hidden, build().generator())["loss"].isfinite()
