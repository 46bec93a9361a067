"""Check the facts of an entry before they enter a zoo's index: text that fits the pages, and possible numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from reprlib import repr as _short
from typing import Any

from embedkit.errors import EntryError
from embedkit.hub.leaderboard import METRICS

#: Greatest number of characters of a text field, and of the name of a data set, a baseline or a metric.
_LONGEST_WORDS, _LONGEST_NAME = 2000, 120
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
#: Greatest cost of a training: images, FLOPs, and seconds (a century).
_MOST = {"images": 1e15, "training_flops": 1e40, "seconds": 3.2e9}


def check_facts(facts: Mapping[str, Any], where: str) -> None:
    """Refuse text that does not fit a page, and impossible numbers.

    Args:
        facts: As `embedkit.hub.publish.index.build_facts` gives them.
        where: The entry, for messages.

    Raises:
        EntryError: Text with line breaks or control characters, or too long; a negative cost; a share above 1.
    """
    for key in ("method", "architecture", "data", "license", "family"):
        _check_words(facts[key], f"{where}: {key}", _LONGEST_WORDS)
    metrics = facts["metrics"]
    _check_words(str(metrics.get("protocol", "")), f"{where}: metrics.protocol", _LONGEST_WORDS)
    for at, number in _shares(metrics, where):
        if not -1 <= number <= 1:
            raise EntryError(f"{at}: expected a share of -1..1, found {_short(number)}")
    for name in facts["pretext"]:
        _check_words(name, f"{where}: a name in provenance.pretext", _LONGEST_NAME)
    for key, most in _MOST.items():
        value = facts["cost"].get(key, 0)
        if not 0 <= value <= most:
            raise EntryError(
                f"{where}: provenance.cost.{key}: expected a number of 0..{most:g}, found {_short(value)}"
            )


def _shares(metrics: Mapping[str, Any], where: str) -> Iterator[tuple[str, float]]:
    """Each metric that a table shows as a share, with where it stands; checks the names too."""
    shares = METRICS.keys() - {"rankme"}

    def shares_of(values: Mapping[str, Any], at: str) -> Iterator[tuple[str, float]]:
        for key, value in values.items():
            _check_words(key, f"{where}: a name in {at}", _LONGEST_NAME)
            if key in shares:
                for number in value if isinstance(value, list) else [value]:
                    yield f"{where}: {at}.{key}", number

    for part in ("results", "intervals"):
        for data, values in metrics.get(part, {}).items():
            _check_words(data, f"{where}: a data set of metrics.{part}", _LONGEST_NAME)
            yield from shares_of(values, f"metrics.{part}.{data}")
    for data, baselines in metrics.get("baselines", {}).items():
        _check_words(data, f"{where}: a data set of metrics.baselines", _LONGEST_NAME)
        for name, values in baselines.items():
            _check_words(name, f"{where}: a baseline of metrics.baselines.{data}", _LONGEST_NAME)
            yield from shares_of(values, f"metrics.baselines.{data}.{name}")


def _check_words(text: str, where: str, longest: int) -> None:
    if len(text) > longest:
        raise EntryError(f"{where}: expected at most {longest} characters, found {len(text)}")
    if _CONTROL.search(text):
        raise EntryError(
            f"{where}: expected one line of text without control characters, found {_short(text)}"
        )
