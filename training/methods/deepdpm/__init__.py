"""DeepDPM: the method, and what serves it alone."""

from embedkit.training.methods.deepdpm.method import Config, DeepDPM, Stage, alternation_loss, stage_at

__all__ = ["Config", "DeepDPM", "Stage", "alternation_loss", "stage_at"]
