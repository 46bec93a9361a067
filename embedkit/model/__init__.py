"""What a zoo entry is, and what runs it.

`layout` names the files of an entry; `config`, `card`, `preprocess` and `manifest` parse and check them. `onnx_guard`
(over `onnx_proto`) checks a graph before anything runs it, `providers` chooses what runs it, and `engines` run it.
`mixture` is a fitted Gaussian mixture over embeddings.
"""
