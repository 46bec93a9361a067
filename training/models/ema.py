"""An exponential moving average of a module's weights: the teacher, or the weights that are exported.

Sources: Mean teachers are better role models (Tarvainen and Valpola, NeurIPS 2017, arXiv 1703.01780, section
2); the warm-up of the decay is TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedkit.errors import ConfigError

__all__ = ["EMA", "decay_of_a_run"]


class EMA(nn.Module):
    """A shadow copy whose parameters follow `shadow = decay * shadow + (1 - decay) * parameter`.

    It is a module: it moves with its owner and stands in its state dict. Its parameters take no gradient.

    Args:
        module: What is followed; copied, never changed.
        decay: In [0, 1]: how much of the shadow one update keeps.
        buffers: `copy` takes BatchNorm's running statistics (and every other buffer) as they are, as
            FixMatch's code does; `average` treats floating-point buffers as parameters. Integer buffers are
            always copied.

    Attributes:
        module: The shadow, in eval mode until its owner's `train()` is called.

    Raises:
        ConfigError: A decay outside [0, 1], or another policy.
    """

    def __init__(
        self, module: nn.Module, decay: float, *, buffers: Literal["copy", "average"] = "copy"
    ) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise ConfigError(f"EMA: expected a decay of 0 to 1, found {decay}")
        if buffers not in ("copy", "average"):
            raise ConfigError(f"EMA: expected buffers of 'copy' or 'average', found {buffers!r}")
        self.decay = decay
        self.buffer_policy = buffers
        self.module = copy.deepcopy(module).requires_grad_(False).eval()

    def forward(self, *args: Any) -> Any:
        """What the shadow makes of the arguments."""
        return self.module(*args)

    def decay_at(self, step: int | None) -> float:
        """The decay of update `step` (from 0): min(decay, (1 + step) / (10 + step)); `None`: no warm-up."""
        return self.decay if step is None else min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, module: nn.Module, step: int | None = None) -> None:
        """Follow `module`, the one that was copied, after an optimizer step.

        Args:
            module: Same parameter and buffer names and shapes as the shadow.
            step: Updates so far, for the warm-up of the decay; `None` uses the full decay.

        Raises:
            ConfigError: The module has other parameters or buffers than the shadow.
        """
        weight = 1.0 - self.decay_at(step)
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        shadows, shadow_buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        other = (parameters.keys() ^ shadows.keys()) | (buffers.keys() ^ shadow_buffers.keys())
        if other:
            raise ConfigError(
                f"EMA.update: {min(other)!r} stands in one of module and shadow alone; pass the same module"
            )
        for name, shadow in shadows.items():
            _follow(shadow, parameters[name], weight)
        for name, buffer in shadow_buffers.items():
            averaged = self.buffer_policy == "average" and buffer.is_floating_point()
            _follow(buffer, buffers[name], weight if averaged else 1.0)


def _follow(shadow: Tensor, value: Tensor, weight: float) -> None:
    if weight == 1.0:  # exact, and also for integers
        shadow.copy_(value)
    else:
        shadow.lerp_(value.to(shadow.dtype), weight)


def decay_of_a_run(decay: float, steps: int) -> float:
    """`decay`, or less in a short run: the average looks back at most a twentieth of it, 1 / (1 - decay) updates.

    What an average takes off the noise of SGD depends on the updates that it holds, whatever the run's length, so
    the decay of a long run stays until its window would reach back to weights that were hardly trained: 0.999 from
    20,000 steps on, 0.995 over 4,000.

    Args:
        decay: In [0, 1].
        steps: Updates of the run, 1 or more.
    """
    return min(decay, max(0.0, 1 - 20 / steps))
