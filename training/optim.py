"""Optimizers by name, and learning rates as functions of the step.

The learning rate is set before every batch from the step's number alone: there is no scheduler object whose
state a checkpoint would have to carry, and methods with two optimizers need nothing more.

Sources: LARS, Large Batch Training of Convolutional Networks (You, Gitman and Ginsburg, 2017, arXiv
1708.03888, algorithm 1); cosine, SGDR (Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983, equation 5);
one-cycle, Super-Convergence (Smith and Topin, 2018, arXiv 1708.07120).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from embedkit.errors import ConfigError

__all__ = ["LARS", "Optimizer"]

#: one-cycle starts at a 25th of the peak and ends at a 10,000th of that, as in fastai and PyTorch
_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = _ONE_CYCLE_START / 1e4


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Which optimizer, and how its learning rate goes.

    Attributes:
        name: `adamw`, `sgd` (Nesterov momentum) or `lars`.
        lr: Peak learning rate.
        weight_decay: On matrices and kernels only: vectors (biases, BatchNorm, LayerNorm) take none.
        betas: Of AdamW.
        momentum: Of SGD and LARS.
        schedule: `cosine`: linear warm-up, then half a cosine to 0. `one_cycle`: half a cosine up from lr / 25,
            half a cosine down to nearly 0, momentum left alone. `constant`: linear warm-up, then `lr`.
        warmup_steps: Steps of the rise, at most a third of all steps. It is not a share of them, so that the
            rise is the same before a time budget has fixed their number.
    """

    name: Literal["adamw", "sgd", "lars"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    schedule: Literal["cosine", "one_cycle", "constant"] = "one_cycle"
    warmup_steps: int = 200

    def create(self, *modules: nn.Module) -> torch.optim.Optimizer:
        """An optimizer over the trainable parameters of `modules`, each parameter once.

        Raises:
            ConfigError: An unknown name.
        """
        parameters = list(dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad))
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.name == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)
        if self.name == "lars":
            return LARS(groups, lr=self.lr, momentum=self.momentum)
        raise ConfigError(f"optimizer.name: expected adamw, sgd or lars, found {self.name!r}")

    def lr_at(self, step: int, total_steps: int | None) -> float:
        """The learning rate of step `step`, counted from 0.

        Args:
            step: Batches seen before this one.
            total_steps: Of the whole run; None while that is still being measured, which is within the rise.

        Raises:
            ConfigError: An unknown schedule.
        """
        if self.schedule not in ("cosine", "one_cycle", "constant"):
            raise ConfigError(
                f"optimizer.schedule: expected cosine, one_cycle or constant, found {self.schedule!r}"
            )
        start, end = (_ONE_CYCLE_START, _ONE_CYCLE_END) if self.schedule == "one_cycle" else (0.0, 0.0)
        warmup = self.warmup_steps if total_steps is None else min(self.warmup_steps, total_steps // 3)
        if step < warmup:
            done = (step + 1) / warmup
            return self.lr * (_cosine(start, 1.0, done) if self.schedule == "one_cycle" else done)
        if self.schedule == "constant" or total_steps is None:
            return self.lr
        return self.lr * _cosine(1.0, end, min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int | None) -> None:
        """Give every group of `optimizer` the learning rate of `step`, times the group's own `lr_scale`."""
        lr = self.lr_at(step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, per tensor, by the norm of the weights over that of the gradient.

        g' = g + weight_decay * w
        trust = trust_coefficient * |w| / |g'|        (1 where either norm is 0, and for vectors)
        v = momentum * v + lr * trust * g'
        w = w - v

    Differences from the source: the paper divides by |g| + weight_decay * |w|; SimCLR's code, whose learning
    rates we use, by |g'|. Vectors (biases, norms) are not scaled, as there.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        momentum: In [0, 1).
        weight_decay: L2 penalty, coupled.
        trust_coefficient: The paper's eta.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "trust_coefficient": trust_coefficient})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure`, if given, computes the loss first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if parameter.ndim > 1:
                    weight_norm, update_norm = parameter.norm(), update.norm()
                    usable = (weight_norm > 0) & (update_norm > 0)
                    trust = group["trust_coefficient"] * weight_norm / update_norm
                    update.mul_(torch.where(usable, trust, torch.ones_like(trust)))
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                velocity.mul_(group["momentum"]).add_(update, alpha=group["lr"])
                parameter.sub_(velocity)
        return loss
