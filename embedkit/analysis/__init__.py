"""What embeddings are for: clusters, similarity, calibrated matches, search, duplicates, leaks and lint.

Everything here takes `Embeddings`, their files or arrays; nothing here needs images, a model or torch.
"""
