"""Export of a training run, or of any torch network, to a zoo entry: run, writer, graph, and checks before writing."""
