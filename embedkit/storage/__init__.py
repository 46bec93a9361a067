"""Bytes at a URL: over HTTP, by fsspec, in a tar; bounded and resumable."""
