"""Writing zoo entries without torch (extra `onnx`).

`card` renders the model card, `golden` makes golden vectors, `onnx_export` writes a self-contained ONNX file, and
`reissue` writes card, index and manifest of entries again from their `config.json`.
"""
