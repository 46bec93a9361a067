"""Writing zoo entries without torch: card, golden vectors, ONNX files (extra `onnx`)."""
