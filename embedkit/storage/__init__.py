"""Files at a URL, read with bounds and from any byte.

`base` is the protocol; `http` (with `answer`, one request, and `origins`, the allowed addresses), `fsspec` (S3 and
other stores, which can be written to as well) and `tar` follow it.
"""
