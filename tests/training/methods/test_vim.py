"""No token sees itself or what follows, the shift by one, a codec that rests and is rounded once, and its features."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.config import Facts
from embedkit.training.data import DataConfig, load_images
from embedkit.training.methods.vim import VIM, Config, Prior, token_loss
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer
from embedkit.training.stages import Stage

FACTS = Facts(
    image_shape=(1, 16, 16), mean=(0.3,), std=(0.35,), batch_size=16, steps_per_epoch=4, total_steps=40
)
SMALL = {
    "codes": 32, "code_dim": 4, "decoder_depth": 1, "discriminator_width": 4, "codec_share": 0.5, "dim": 24,
    "depth": 3, "heads": 2, "block": 2, "dropout": 0.0, "restart_after": 0,
}  # fmt: skip


def build(**config):
    torch.manual_seed(0)
    vit = create_backbone("vit_t4", in_chans=1, image_size=16, embed_dim=48, depth=2, num_heads=2)
    return VIM(vit, Config(**{**SMALL, **config}), FACTS)


def digits(rows):
    return load_images(DataConfig(path="sklearn:digits", image_size=16)).batch(torch.as_tensor(rows))


def woken(**config):
    """A prior whose head does not start at zero."""
    torch.manual_seed(0)
    prior = Prior(11, 9, Config(**{**SMALL, **config})).double().eval()
    torch.nn.init.normal_(prior.head.weight)
    return prior


# --- the prior -----------------------------------------------------------------------------------------------


def test_logits_of_a_token_do_not_change_with_it_or_with_what_follows_exactly():
    prior = woken()
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    logits = prior(tokens)
    for t in range(9):
        other = tokens.clone()
        other[:, t] = (tokens[:, t] + 1) % 11
        found = prior(other)
        assert torch.equal(found[:, : t + 1], logits[:, : t + 1]), "a token sees itself"
        assert t == 8 or not torch.equal(found[:, t + 1], logits[:, t + 1]), "the next one sees it"
        for later in range(t + 1, 9):
            assert (found[:, later] != logits[:, later]).any()


def test_token_loss_by_a_loop_and_by_hand():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, total = torch.tensor([[0, 3, 1], [2, 2, 0]]), 0.0
    for row, classes in zip(logits.tolist(), tokens.tolist(), strict=True):
        for values, k in zip(row, classes, strict=True):
            total -= (values[k] - math.log(sum(math.exp(value) for value in values))) / 6
    assert float(token_loss(logits, tokens)) == pytest.approx(total, rel=1e-12)
    assert float(token_loss(0 * logits, tokens)) == pytest.approx(math.log(4), rel=1e-12)
    half = token_loss(logits.bfloat16(), tokens)
    torch.testing.assert_close(half, token_loss(logits.bfloat16().float(), tokens))


def test_a_uniform_model_has_ln_k_and_a_sequence_can_be_learned():
    torch.manual_seed(0)
    prior = Prior(11, 9, Config(**SMALL))
    tokens = (torch.arange(9) + torch.arange(8)[:, None]) % 11  # each token is the one before it plus one
    assert float(token_loss(prior(tokens), tokens).detach()) == pytest.approx(math.log(11), rel=1e-5)
    optimizer = Optimizer(lr=5e-3, weight_decay=0.0).create(prior)
    for _ in range(60):
        loss = token_loss(prior(tokens), tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = prior(tokens).argmax(-1) == tokens
    assert right[:, 1:].float().mean() > 0.95  # the first can only be guessed: one of eight
    assert float(loss.detach()) < math.log(8) / 9 + 0.2


# --- stages --------------------------------------------------------------------------------------------------


def test_the_codec_learns_first_and_then_rests():
    method, batch = build(), digits(range(8))
    names = {"codec": {"codec", "discriminator"}, "prior": {"prior"}}
    optimizers = [
        torch.optim.SGD([p for m in ms for p in m.parameters()], lr=0.1) for ms in method.networks().values()
    ]
    method.optimizers, method.log_dict = lambda: optimizers, lambda values: None
    for seen, stage in ((20, "codec"), (21, "prior"), (40, "prior")):
        method.batches_seen = seen
        assert method.stage.name == stage
        before = {
            name: value.clone() for name, value in method.state_dict().items() if torch.is_tensor(value)
        }
        method.training_step(batch, 0)
        own = {
            name
            for name, modules in method.networks().items()
            for module in modules
            if any(not torch.equal(before[k], v) for k, v in _state(method, module).items())
        }
        assert own == names[stage]


def _state(method, module):
    prefix = next(name for name, child in method.named_children() if child is module)
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def test_what_makes_the_code_numbers_is_rounded_once_and_the_prior_is_not():
    method = build()
    method.begin_stage(Stage("codec", 0, 0, 20))
    before = [p.clone() for p in method.parameters()]
    assert any(not torch.equal(p, p.half().float()) for p in method.backbone.parameters())
    prior = [p.clone() for p in method.prior.parameters()]
    method.begin_stage(Stage("prior", 0, 0, 20))
    for module in (method.backbone, method.to_code, method.quantizer):
        assert all(torch.equal(p, p.half().float()) for p in module.parameters())
    assert all(torch.equal(p, q) for p, q in zip(method.prior.parameters(), prior, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(method.parameters(), before, strict=True))
    # an entry that stores halves has the same code numbers, whatever the prior loses
    x = method.view(digits(range(32)).images)
    twin = build()
    twin.load_state_dict(
        {k: v.half().float() if torch.is_tensor(v) else v for k, v in method.state_dict().items()}
    )
    assert torch.equal(twin.encoder().tokens(x), method.encoder().tokens(x))


def test_codes_take_no_gradient_from_the_prior():
    method = build()
    method.batches_seen = 30
    loss = method.loss(digits(range(8)), method.generator())["loss"]
    loss.backward()
    assert all(
        p.grad is None for m in (method.backbone, method.to_code, method.decode) for p in m.parameters()
    )
    assert method.quantizer.codebook.grad is None and method.prior.head.weight.grad.any()


# --- export --------------------------------------------------------------------------------------------------


def test_exported_is_the_mean_of_the_middle_block():
    method = build(dropout=0.5).eval()
    x = method.view(digits(range(5)).images)
    tokens = method.quantizer(method._encode(x))[1]
    encoder = method.encoder().eval()
    assert torch.equal(encoder.tokens(x), tokens)
    expected = method.prior.features(tokens, 2).mean(1)
    torch.testing.assert_close(encoder(x), expected)
    assert encoder(x).shape == (5, 24)
    names = encoder.state_dict()
    assert "blocks.1.qkv.weight" in names and not any(name.startswith(("blocks.2", "head")) for name in names)
    # the last token is never read
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 32
    assert torch.equal(method.prior.features(other, 2), method.prior.features(tokens, 2))


def test_tokens_of_held_out_images_are_told_above_their_frequencies():
    method, batch = build(), digits(range(48))
    codec = Optimizer(lr=2e-3, weight_decay=0.0).create(*method.networks()["codec"])
    prior = Optimizer(lr=5e-3, weight_decay=0.0).create(method.prior)
    for step in range(80):
        method.batches_seen = 10 if step < 30 else 30
        optimizer = codec if step < 30 else prior
        outputs = method.loss(batch, method.generator())
        optimizer.zero_grad()
        outputs.get("codec_loss", outputs["loss"]).backward()
        optimizer.step()
    method.eval()
    with torch.no_grad():
        found = {k: float(v) for k, v in method.pretext_metric(digits(range(100, 228)), None).items()}
    assert found["token_accuracy"] > found["token_accuracy_by_chance"] + 0.03
    assert found["nats"] < found["unigram_nats"] and found["narrow_margins"] < 0.05


def test_wrong_fields_are_refused():
    for wrong in ({"heads": 5}, {"block": 4}, {"block": 0}, {"codec_share": 1.0}, {"codec_share": 0.0}):
        with pytest.raises(ConfigError, match="vim: expected"):
            build(**wrong)
