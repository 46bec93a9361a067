"""DeepDPM: the method, and what serves it alone."""

from embedkit.training.methods.deepdpm.method import (
    FAMILY,
    Config,
    DeepDPM,
    alternation_loss,
    alternation_plan,
)

__all__ = ["FAMILY", "Config", "DeepDPM", "alternation_loss", "alternation_plan"]
