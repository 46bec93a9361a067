"""VIM: a decoder-only transformer predicts an image's code numbers one after another, as a language model does words.

To say what comes next it must know what it has seen; the features are those of a block in its middle.

Source: Vector-quantized Image Modeling with Improved VQGAN (Yu et al., ICLR 2022, arXiv 2110.04627), section 4; the
average of a middle block: Generative Pretraining from Pixels (Chen et al., ICML 2020), section 3.

Differences from the source:
- Both stages are one run: the codec of `vqgan`, whose differences are there, and then the prior over its frozen codes.
- Six blocks of width 192 for theirs of 24 and 36. Which block they probe we could not check: `block` says which one
  is exported; that before the last half is the default, and a sweep costs one probe for each.
- Exported is the plain mean over positions of a block's output; the second source takes the LayerNorm before it.
- The last token is predicted and never read, as in training; the features know of it only through what it follows.
- AdamW and a cosine, no label to condition on.

How runtimes agree, since a code number jumps where two codes are equally near: when the prior begins, the weights that
make the numbers are rounded to half precision, once. An entry that stores halves then has exactly the codec that the
prior was trained on, and in float32 another order of sums moves only numbers whose two cosines differ by less than
about 1e-6; `narrow_margins` says how many tokens have less than 1e-5.

Recipe, expected metrics, data, time and command: `embedkit.training.recipes.vim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedkit.errors import ConfigError
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.data.targets import accuracy
from embedkit.training.method import float32_loss
from embedkit.training.methods import vqgan
from embedkit.training.methods.vqgan import VQGAN, Quantizer
from embedkit.training.models.backbones import Backbone
from embedkit.training.stages import Plan, Stage, share_steps

__all__ = ["FAMILY", "SUMMARY", "VIM", "CausalBlock", "Config", "Prior", "TokenFeatures", "token_loss"]

#: The supervision that the method learns from.
FAMILY = "reconstruction"
#: The sentence that the card of an entry shows.
SUMMARY = (
    "VIM: a transformer predicts the code numbers of an image one after another, as a language "
    "model predicts words. The mean output of one of its middle blocks is exported."
)


@dataclass(frozen=True, kw_only=True)
class Config(vqgan.Config):
    """Of `vim`: that of its codec, and of the prior.

    Attributes:
        codec_share: Share of the run in which the codec is trained.
        dim: Width of the prior; of the embedding.
        depth: Its blocks.
        heads: Attention heads of a block.
        dropout: After attention and perceptron, and of the input.
        block: Which block's output is exported, 1 to depth.
    """

    codec_share: float = 0.4
    dim: int = 192
    depth: int = 6
    heads: int = 3
    dropout: float = 0.1
    block: int = 3


@float32_loss
def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p(t_i | t_<i), the mean over positions and images.

    Args:
        logits: (N, L, K), of position i from the tokens before it alone.
        tokens: int64 (N, L).

    Returns:
        A scalar, in nats for a token; ln K for equal logits.
    """
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class CausalBlock(nn.Module):
    """Attention to this position and those before it, and a perceptron, each behind a LayerNorm."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, L, D) -> the same shape."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (N, L, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.proj(seen.transpose(1, 2).flatten(2)))
        return x + self.drop(self.mlp(self.norm2(x)))


class Prior(nn.Module):
    """Tokens (N, L) -> logits (N, L, K) of each from those before it; position 0 has a start of its own.

    Args:
        codes: K.
        length: L.
        config: Of width, depth, heads and dropout.
    """

    def __init__(self, codes: int, length: int, config: Config) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(codes, config.dim))
        self.start = nn.Parameter(0.02 * torch.randn(1, 1, config.dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, length, config.dim))
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            CausalBlock(config.dim, config.heads, config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, codes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def features(self, tokens: Tensor, block: int) -> Tensor:
        """The output of a block, (N, L, D); of block 1 the first."""
        before = F.embedding(tokens[:, :-1], self.token)
        start = self.start.expand(tokens.shape[0], -1, -1)  # len() would fix the exported graph's batch
        x = torch.cat([start, before], dim=1)  # shifted by one
        x = self.drop(x + self.position)
        for layer in self.blocks[:block]:
            x = layer(x)
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position."""
        return self.head(self.norm(self.features(tokens, len(self.blocks))))


class TokenFeatures(nn.Module):
    """Images -> codes -> the mean over positions of a block's output: what is exported.

    Args:
        backbone: The codec's encoder.
        to_code: Its projection.
        quantizer: And its codebook.
        prior: Copied up to the block.
        block: From 1.
    """

    def __init__(
        self, backbone: Backbone, to_code: nn.Linear, quantizer: Quantizer, prior: Prior, block: int
    ) -> None:
        super().__init__()
        self.backbone, self.to_code, self.quantizer = backbone, to_code, quantizer
        self.token, self.start, self.position = prior.token, prior.start, prior.position
        self.blocks = prior.blocks[:block]
        self.drop = nn.Identity()

    def tokens(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized -> code numbers int64 (N, L), row by row."""
        tokens = self.backbone.forward_features(x)[:, self.backbone.net.num_prefix_tokens :]
        return self.quantizer.nearest(F.normalize(self.to_code(tokens).float(), dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W), normalized -> (N, D)."""
        features: Tensor = Prior.features(self, self.tokens(x), len(self.blocks))  # type: ignore[arg-type]
        return features.mean(1)


class VIM(VQGAN):
    """The codec in the first stage, a causal transformer over its frozen codes in the second."""

    def __init__(self, backbone: Backbone, config: Config, facts: Facts) -> None:
        super().__init__(backbone, config, facts)
        if config.depth < 1 or config.heads < 1 or config.dim % config.heads:
            raise ConfigError(
                "vim: expected a depth of 1 or more and a dim that heads divide, found "
                f"{config.depth}, {config.dim} and {config.heads}"
            )
        if not 1 <= config.block <= config.depth or not 0 < config.codec_share < 1:
            raise ConfigError(
                f"vim: expected a block of 1 to {config.depth} and a codec_share between 0 and 1, found "
                f"{config.block} and {config.codec_share:g}"
            )
        length = backbone.net.patch_embed.num_patches
        self.prior = Prior(config.codes, length, config)

    def plan(self) -> Plan:
        """The codec, then the prior."""
        share = self.config.codec_share
        return share_steps(self.total_steps, (("codec", share), ("prior", 1 - share)))

    def begin_stage(self, stage: Stage) -> None:
        """Before the prior, round what makes the code numbers to half precision: see the module's docstring."""
        if stage.name == "prior":
            with torch.no_grad():
                for module in (self.backbone, self.to_code, self.quantizer):
                    for parameter in module.parameters():
                        parameter.copy_(parameter.half())

    def networks(self) -> dict[str, Sequence[nn.Module]]:
        """Those of the codec, and the prior."""
        return {**super().networks(), "prior": (self.prior,)}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A step of the stage's own networks."""
        if self.stage.name == "codec":
            super().training_step(batch, batch_idx)
            return
        outputs = self.loss(batch, self.generator())
        self.step({"prior": outputs["loss"]})
        self.log_dict({name: value.detach() for name, value in outputs.items()})

    def loss(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The codec's losses, or the prior's."""
        x = self.view(batch.images, self.config.augment, generator)
        if self.stage.name == "codec":
            return self._codec_losses(x)
        with torch.no_grad():
            tokens = self.encoder().tokens(x)
        loss = token_loss(self.prior(tokens), tokens)
        return {"loss": loss, "perplexity": vqgan.perplexity(tokens, self.config.codes)}

    def encoder(self) -> TokenFeatures:
        """The codec's half that makes code numbers, and the prior up to the block."""
        return TokenFeatures(self.backbone, self.to_code, self.quantizer, self.prior, self.config.block)

    def pretext_metric(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """The codec's, and how well the next token is told: `token_accuracy` against that of the most frequent code.

        `nats` is the mean loss of a token, `unigram_nats` that of a model that knows their frequencies alone.
        """
        tokens = self.encoder().tokens(self.view(batch.images))
        logits, flat = self.prior(tokens), tokens.flatten()
        return {
            **super().pretext_metric(batch, generator),
            "nats": token_loss(logits, tokens),
            "unigram_nats": vqgan.perplexity(tokens, self.config.codes).log(),
            "token_accuracy": accuracy(logits.flatten(0, 1), flat),
            "token_accuracy_by_chance": torch.bincount(flat).max() / flat.numel(),
        }

    def solved(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Images through the codec, the codes of their upper half, and what the prior draws below it."""
        tokens = self.encoder().tokens(self.view(batch.images))
        rows, columns = self.backbone.net.patch_embed.grid_size
        whole = self.denormalize(self.decode_indices(tokens))
        continued, half = tokens.clone(), rows // 2 * columns
        for place in range(half, tokens.shape[1]):
            logits = self.prior(continued)[:, place].float()
            noise = torch.rand(logits.shape, generator=generator, device=generator.device)
            # the largest of logits + Gumbel noise is a draw of their distribution
            continued[:, place] = (logits - (-noise.clamp(min=1e-20).log()).log()).argmax(1)
        upper = whole.clone()
        upper[:, :, whole.shape[2] * (rows // 2) // rows :] = 0
        return {
            "through the codec": whole,
            "given": upper,
            "continued": self.denormalize(self.decode_indices(continued)),
        }
