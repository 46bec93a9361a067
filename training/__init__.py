"""Training: an image encoder from every representation-learning method, one file per method.

Imported as `embedkit.training`, whatever the working directory: at the root of a checkout this folder could
also be found under the bare name `training`, which would be a second copy of every class in it.
"""

if __name__ != "embedkit.training":
    raise ImportError(
        f"this package was imported as {__name__!r}; import embedkit.training instead "
        "(pip install -e '.[train,cpu]' in the checkout)"
    )
