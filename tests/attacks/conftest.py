"""The caches and the places of the hub's tests, for attacks that come over a connection."""

from places import always_cache, cache, hub, python, site, zoo  # noqa: F401
