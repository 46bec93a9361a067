"""Optimizers by name, and learning rates as functions of the step.

The learning rate is set before every batch from the step's number alone: there is no scheduler object whose
state a checkpoint would have to carry, and methods with two optimizers need nothing more.

Source: LARS, Large Batch Training of Convolutional Networks (You, Gitman and Ginsburg, 2017, arXiv 1708.03888,
algorithm 1). Schedules are defined in `embedkit.training.schedules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from embedkit.errors import ConfigError
from embedkit.training.models.backbones import Backbone
from embedkit.training.schedules import Schedule, lr_factor

__all__ = ["LARS", "Optimizer"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Which optimizer, and how its learning rate goes.

    Attributes:
        name: `adamw`, `adam` (coupled L2), `sgd` (Nesterov momentum), `rmsprop` or `lars`.
        lr: Peak learning rate.
        weight_decay: On matrices and kernels only: vectors (biases, BatchNorm, LayerNorm) take none.
        betas: Of Adam and AdamW.
        momentum: Of SGD, RMSprop and LARS.
        schedule: As `schedules.lr_factor` takes it; in one-cycle, momentum is left alone.
        warmup_steps: Steps of the rise, at most a third of all steps. It is not a share of them, so that the
            rise is the same before a time budget has fixed their number.
        milestones: Of `step`: shares of the run at which the rate is multiplied by `gamma`.
        gamma: Of `step`.
        end: Share of the peak at the end of `cosine` and `exponential`.
        clip_norm: Largest norm of the gradient of all that this optimizer moves; 0 for no limit.
        layer_decay: Factor of the learning rate per layer of a backbone, counted from its top, as timm's: what stands
            on the backbone has the full rate, its last block `layer_decay` of it, the block before the square of it; 1
            for none.
        accumulate: Batches whose gradients are added up (their mean) to one step.
    """

    name: Literal["adamw", "adam", "sgd", "rmsprop", "lars"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    schedule: Schedule = "one_cycle"
    warmup_steps: int = 200
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    end: float = 0.0
    clip_norm: float = 0.0
    layer_decay: float = 1.0
    accumulate: int = 1

    def create(self, *modules: nn.Module) -> torch.optim.Optimizer:
        """An optimizer over the trainable parameters of `modules`, each parameter once.

        Raises:
            ConfigError: An unknown name.
        """
        parameters = list(dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad))
        scales: dict[nn.Parameter, float] = {}
        if self.layer_decay != 1.0:
            for backbone in (found for m in modules for found in m.modules() if isinstance(found, Backbone)):
                scales |= backbone.lr_scales(self.layer_decay)
        by_kind: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_kind.setdefault((scales.get(parameter, 1.0), parameter.ndim > 1), []).append(parameter)
        # from the top down, so that the first group's learning rate is the run's
        groups: list[dict[str, Any]] = [
            {
                "params": by_kind[scale, matrices],
                "weight_decay": self.weight_decay if matrices else 0.0,
                **({"lr_scale": scale} if scale != 1.0 else {}),
            }
            for scale, matrices in sorted(by_kind, reverse=True)
        ]
        if self.name == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)
        if self.name == "adam":
            return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, fused=True)
        if self.name == "rmsprop":
            return torch.optim.RMSprop(groups, lr=self.lr, momentum=self.momentum)
        if self.name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0)
        if self.name == "lars":
            return LARS(groups, lr=self.lr, momentum=self.momentum)
        raise ConfigError(f"optimizer.name: expected adamw, adam, sgd, rmsprop or lars, found {self.name!r}")

    def lr_at(self, step: int, total_steps: int | None) -> float:
        """The learning rate of step `step`, counted from 0.

        Args:
            step: Batches seen before this one, in the run or in its stage.
            total_steps: Of the run or the stage; None while that is still being measured, which is within the rise.

        Raises:
            ConfigError: An unknown schedule.
        """
        return self.lr * lr_factor(
            self.schedule,
            step,
            total_steps,
            warmup_steps=self.warmup_steps,
            milestones=self.milestones,
            gamma=self.gamma,
            end=self.end,
        )

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int | None) -> None:
        """Give every group of `optimizer` the learning rate of `step`, times the group's own `lr_scale`."""
        lr = self.lr_at(step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)


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
