"""The preprocess contract as data: how a decoded image becomes the pixels that a graph takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from reprlib import repr as _short
from typing import Any

from embedkit.errors import EntryError
from embedkit.model.layout import _object

COLORS = ("rgb", "gray", "lab_l")


RESIZES = ("shortest", "longest", "squash")


INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a decoded image becomes the pixels that the graph takes.

    Attributes:
        color: `rgb` (3 channels), `gray` (1, ITU-R 601 luma) or `lab_l` (1, CIE L* of D65 scaled to 0..255).
        size: Height and width of the graph's input, in pixels.
        resize: `shortest` brings the shorter side to `resize_size`, `longest` the longer one, both keeping the
            aspect ratio; `squash` resizes to `size` directly.
        resize_size: Pixels for `shortest` and `longest`; unused by `squash`.
        interpolation: The resampling filter, by its Pillow name, antialiased.
        crop: `center` crops what is larger than `size` around the center; `none` if it already fits.
        pad: Fill value 0..255 around an image that is smaller than `size`; the image is centered.
        mean: Per channel, in units of [0, 1], subtracted inside the graph.
        std: Per channel, in units of [0, 1], divided by inside the graph.
        reduced_decoding: Whether a JPEG may be decoded at 1/2, 1/4 or 1/8 scale, if at least twice the needed
            resolution remains.
    """

    color: str = "rgb"
    size: tuple[int, int]
    resize: str = "shortest"
    resize_size: int = 0
    interpolation: str = "bicubic"
    crop: str = "center"
    pad: int = 0
    mean: tuple[float, ...]
    std: tuple[float, ...]
    reduced_decoding: bool = True

    @property
    def channels(self) -> int:
        """3 for `rgb`, else 1."""
        return 3 if self.color == "rgb" else 1

    def __post_init__(self) -> None:
        def need(ok: bool, key: str, expected: str, found: object) -> None:
            if not ok:
                raise EntryError(f"preprocess.{key}: expected {expected}, found {_short(found)}")

        need(self.color in COLORS, "color", f"one of {', '.join(COLORS)}", self.color)
        need(self.resize in RESIZES, "resize", f"one of {', '.join(RESIZES)}", self.resize)
        need(
            self.interpolation in INTERPOLATIONS,
            "interpolation",
            f"one of {', '.join(INTERPOLATIONS)}",
            self.interpolation,
        )
        need(self.crop in ("center", "none"), "crop", "'center' or 'none'", self.crop)
        need(
            len(self.size) == 2 and all(1 <= side <= 4096 for side in self.size),
            "size",
            "[height, width] of 1..4096 pixels",
            self.size,
        )
        need(
            self.resize == "squash" or 1 <= self.resize_size <= 4096,
            "resize_size",
            "1..4096 pixels",
            self.resize_size,
        )
        need(0 <= self.pad <= 255, "pad", "0..255", self.pad)
        for key, values in (("mean", self.mean), ("std", self.std)):
            need(len(values) == self.channels, key, f"{self.channels} numbers for {self.color}", values)
        need(all(value > 0 for value in self.std), "std", "numbers above 0", self.std)

    def to_json(self) -> dict[str, Any]:
        """The contract as in `config.json`."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, value: object, where: str = "preprocess") -> Preprocess:
        """Parse and check the contract. Unknown keys are refused, since each could change pixels."""
        data = _object(value, where)
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise EntryError(
                f"{where}: unknown key {unknown[0]!r}; this version supports {', '.join(sorted(known))}"
            )
        missing = sorted({"size", "mean", "std"} - set(data))
        if missing:
            raise EntryError(f"{where}: the key {missing[0]!r} is missing")
        for key in ("color", "resize", "interpolation", "crop"):
            if key in data and not isinstance(data[key], str):
                raise EntryError(f"{where}.{key}: expected text, found {_short(data[key])}")
        for key in ("resize_size", "pad"):
            if key in data and type(data[key]) is not int:
                raise EntryError(f"{where}.{key}: expected a whole number, found {_short(data[key])}")
        if type(data.get("reduced_decoding", True)) is not bool:
            raise EntryError(
                f"{where}.reduced_decoding: expected true or false, found {_short(data['reduced_decoding'])}"
            )
        numbers: dict[str, Any] = {}
        for key, kind in (("size", int), ("mean", float), ("std", float)):
            items = data[key]
            # JSON allows infinity (1e999) and whole numbers that no float can hold.
            if not isinstance(items, list) or not all(
                type(item) in (int, kind) and abs(item) < 1e6 for item in items
            ):
                raise EntryError(f"{where}.{key}: expected a list of numbers, found {_short(items)}")
            numbers[key] = tuple(kind(item) for item in items)
        return cls(**{**data, **numbers})
