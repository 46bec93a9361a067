"""DeepDPM: the method, and what serves it alone."""

from embedkit.training.methods.deepdpm.method import (
    FAMILY,
    SUMMARY,
    Config,
    DeepDPM,
    alternation_loss,
    alternation_plan,
)

__all__ = ["FAMILY", "SUMMARY", "Config", "DeepDPM", "alternation_loss", "alternation_plan"]
