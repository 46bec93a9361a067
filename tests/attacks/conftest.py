"""The caches and the zoos of the hub's tests, for attacks that come over a connection."""

from zoos import always_cache, cache, hub, python, site, zoo  # noqa: F401
