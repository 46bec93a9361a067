"""The sentences of a model card, as fields of `config.json`: a card is rendered from them and never parsed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedkit.errors import EntryError

_LISTS = ("datasets", "tags", "limits")


@dataclass(frozen=True, kw_only=True)
class Card:
    """The sentences of a model card that do not follow from other fields of the entry.

    Attributes:
        summary: One or two sentences: what this encoder is and what it is good for.
        use: Markdown that shows how to use it, if that is not to encode whole images.
        datasets: Ids of the training data on the Hub, for example `imagenet-1k`.
        tags: Further tags of the Hub.
        limits: One sentence per known limit.
    """

    summary: str = ""
    use: str = ""
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields that are not empty."""
        fields = {"summary": self.summary, "use": self.use}
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        return {name: value for name, value in {**fields, **lists}.items() if value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> Card:
        """Read the fields.

        Args:
            data: The object under `embedkit.card`.
            where: Its name in messages.

        Raises:
            EntryError: An unknown field, or one of the wrong type.
        """
        unknown = sorted(set(data) - {"summary", "use", *_LISTS})
        if unknown:
            raise EntryError(f"{where}: unknown field {unknown[0][:80]!r}; upgrade embedkit, or leave it out")
        for name, value in data.items():
            if name in _LISTS:
                if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                    raise EntryError(f"{where}.{name}: expected a list of texts; export the entry again")
            elif not isinstance(value, str):
                raise EntryError(f"{where}.{name}: expected a text; export the entry again")
        fields: dict[str, Any] = {
            name: tuple(value) if name in _LISTS else value for name, value in data.items()
        }
        return cls(**fields)
