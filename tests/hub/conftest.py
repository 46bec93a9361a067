"""A cache of its own for each test, and zoos of every kind on loopback."""

from zoos import always_cache, cache, hub, python, s3, s3_server, site, zoo  # noqa: F401
