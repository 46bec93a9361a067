"""The servers and the cache of `tests/hub`, for attacks that come over a connection."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "embedkit_hub_fixtures", Path(__file__).parents[1] / "hub" / "conftest.py"
)
_hub = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _hub
_spec.loader.exec_module(_hub)

servers, cache, zoo, site, hub, python = _hub.servers, _hub.cache, _hub.zoo, _hub.site, _hub.hub, _hub.python
