"""What runs a graph: the protocol (`base`), and one module for each engine (`onnx`)."""
