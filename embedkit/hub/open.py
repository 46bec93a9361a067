"""From a path or a URL to a zoo: folders directly, all others through the cache."""

from __future__ import annotations

import os
from pathlib import Path

from embedkit.hub.access import Access
from embedkit.hub.base import RemoteZoo, Zoo
from embedkit.hub.cached import CachedZoo
from embedkit.hub.folder import FolderZoo
from embedkit.hub.urls import Address, file_path, is_url, parse_zoo


def open_zoo(uri: str, access: Access | None = None) -> Zoo:
    """The zoo at a path or a URL; no connection is opened yet.

    Args:
        uri: A folder, `file://`, a `.tar` of `embedkit zoo bundle`, `https://host/zoo`, `hf://organization`, or any
            URL of fsspec, as `s3://bucket/zoo`.
        access: How to read it.

    Raises:
        ConfigError: Not a folder, or an invalid URL.
        MissingDependencyError: This kind of zoo needs a package that is not installed.
    """
    access = access or Access()
    if is_url(uri) and not uri.startswith("file://"):
        return CachedZoo(open_remote(parse_zoo(uri), access.token), access)
    path = file_path(uri)
    if path.endswith(".tar") and os.path.isfile(path):
        from embedkit.hub.static import StaticZoo
        from embedkit.storage.tar import ArchiveStorage

        return CachedZoo(StaticZoo(ArchiveStorage(Path(path))), access, local=True)
    return FolderZoo(path)


def open_remote(address: Address, token: str | None = None) -> RemoteZoo:
    """The remote zoo at an address."""
    if address.scheme == "hf":
        from embedkit.hub.hf import HubZoo

        return HubZoo(address.zoo.removeprefix("hf://"), token)
    from embedkit.hub.static import StaticZoo

    if address.scheme in ("http", "https"):
        from embedkit.storage.http import WebStorage

        return StaticZoo(WebStorage(address.zoo, token))
    from embedkit.storage.fsspec import BucketStorage

    return StaticZoo(BucketStorage(address.zoo))
