"""Clustering of embeddings.

`cluster` is the entry point to all methods: `kmeans`, HDBSCAN, and `dpmm` (over the prior of `niw`). `reduction`
reduces dimensions before clustering, and `scores` compares clusters with classes.
"""
