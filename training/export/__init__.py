"""Export: a training run, or any torch network, to a zoo entry."""
