"""A cache of its own for each test, and places of every kind on loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from places import always_cache, cache, hub, python, s3, s3_server, site, zoo  # noqa: F401


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            # huggingface_hub 2.x passes a file to its HTTP library by the older of two argument names.
            item.add_marker(pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"))
