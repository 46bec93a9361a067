"""The preprocessing of foreign encoders: as given, as `preprocessor_config.json` states it, or as our exports do."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedkit._io.json import JsonFormat
from embedkit.errors import ConfigError, EntryError
from embedkit.model.preprocess import RESIZES, Preprocess

__all__ = ["PROCESSOR", "Contract", "from_processor"]

#: The file in which Hugging Face's exports state the preprocessing.
PROCESSOR = "preprocessor_config.json"

#: Pillow's numbers of its filters, which `resample` names.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_JSON = JsonFormat(error=EntryError, step="fix it, or give the preprocessing by options")


@dataclass(frozen=True, kw_only=True)
class Contract:
    """The parts of a preprocess contract that a user gives; None leaves a part as the weights state it.

    Attributes:
        image_size: Side of the images in pixels.
        mean: Per channel, or one for all, in units of [0, 1].
        std: The same.
        resize: `squash`, `shortest` or `longest`, or `RULE:PIXELS`, such as `shortest:256`.
        crop: `center` or `none`.
        interpolation: As in `Preprocess`.
        color: As in `Preprocess`.
    """

    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: str | None = None
    crop: str | None = None
    interpolation: str | None = None
    color: str | None = None

    def __bool__(self) -> bool:
        """Whether anything is given."""
        return any(getattr(self, field.name) is not None for field in dataclasses.fields(self))

    def applied(self, base: Preprocess) -> Preprocess:
        """A contract with the given parts replaced.

        At another image size the share that is cropped away stays the same.

        Raises:
            ConfigError: A part is not one of a contract, or does not fit the others.
        """
        facts = base.to_json()
        if self.image_size is not None:
            facts["size"] = [self.image_size] * 2
            facts["resize_size"] = round(base.resize_size * self.image_size / max(base.size))
        for key in ("crop", "interpolation", "color"):
            if getattr(self, key) is not None:
                facts[key] = getattr(self, key)
        channels = 3 if facts["color"] == "rgb" else 1
        for key in ("mean", "std"):
            values = getattr(self, key)
            if values is not None:
                facts[key] = list(values) * (channels if len(values) == 1 else 1)
        if self.resize is not None:
            rule, _, pixels = self.resize.partition(":")
            if rule not in RESIZES or (pixels and (not pixels.isdecimal() or rule == "squash")):
                raise ConfigError(
                    f"--resize {self.resize!r}: expected {', '.join(RESIZES)}, or such as shortest:256"
                )
            same = rule == base.resize and facts["resize_size"]
            facts["resize"] = rule
            facts["resize_size"] = int(pixels) if pixels else same or min(facts["size"])
            if rule == "squash":
                facts["resize_size"] = 0
        try:
            return Preprocess.from_json(facts, "the preprocessing")
        except EntryError as error:
            raise ConfigError(f"{error}; give it with --mean, --std, --resize, --color and so on") from None


def from_processor(text: bytes, where: str) -> Preprocess:
    """The contract that a `preprocessor_config.json` states.

    Its `size` is one number, or `shortest_edge`, or `longest_edge`, or `height` and `width`; one number is the shorter
    side where a crop follows, and both sides otherwise.

    Args:
        text: The file.
        where: For messages.

    Raises:
        EntryError: Not such a file, or it states what a contract cannot.
    """
    facts = _JSON.parse(text, where)
    if not isinstance(facts, dict):
        raise EntryError(f"{where}: expected an object, found {type(facts).__name__}")

    def need(ok: bool, key: str) -> None:
        if not ok:
            raise EntryError(
                f"{where}: {key} {json.dumps(facts.get(key))[:80]} is not understood; move the file away and give the "
                "preprocessing by options"
            )

    need(facts.get("do_resize", True) is not False, "do_resize")
    crops = facts.get("do_center_crop", "crop_size" in facts) is True
    cut = _sides(facts["crop_size"]) if crops and "crop_size" in facts else None
    size = facts.get("size")
    edges = size if isinstance(size, dict) else {}
    short, long = edges.get("shortest_edge"), edges.get("longest_edge")
    if type(size) is int and crops:
        short = size
    resample = facts.get("resample", 2)
    need(type(resample) is int and resample in _RESAMPLE, "resample")
    if type(short) is int and long is None:
        share = facts.get("crop_pct")
        if isinstance(share, float) and 0 < share <= 1 and cut is None:  # ConvNeXt's
            # From 384 pixels on its processor squashes the image, and crops nothing.
            cut, short = (short, short), int(short / share) if short < 384 else 0
        rule: dict[str, Any] = {"resize": "shortest", "resize_size": short} if short else {"resize": "squash"}
        sides = cut
    else:
        both = _sides(size)
        need(both is not None and (cut is None or cut == both) and long is None, "size")
        rule, sides = {"resize": "squash"}, both
    need(sides is not None, "crop_size" if crops else "size")
    mean, std = _normalization(facts, need)
    try:
        return Preprocess(size=sides or (0, 0), interpolation=_RESAMPLE[resample], mean=mean, std=std, **rule)
    except EntryError as error:
        raise EntryError(f"{where}: {error}") from None


def _normalization(facts: Mapping[str, Any], need: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std in units of [0, 1], whatever the factor by which 0..255 are rescaled."""
    factor = facts.get("rescale_factor", 1 / 255) if facts.get("do_rescale", True) else 1.0
    need(isinstance(factor, float | int) and factor > 0, "rescale_factor")
    shift = 1.0 if facts.get("rescale_offset") is True else 0.0
    found: list[tuple[float, ...]] = []
    for key, plain in (("image_mean", 0.0), ("image_std", 1.0)):
        values = facts.get(key, [plain] * 3) if facts.get("do_normalize", True) else [plain] * 3
        need(
            isinstance(values, list)
            and len(values) == 3
            and all(type(value) in (int, float) and math.isfinite(value) for value in values),
            key,
        )
        found.append(tuple(float(value) for value in values))
    means, stds = found
    # (x * factor - shift - mean) / std, for x of 0..255, as (x / 255 - mean') / std'
    scale = 255 * factor
    # The usual factor is 1 / 255 but for rounding, and then the numbers stay as they are written.
    scale = 1.0 if math.isclose(scale, 1, rel_tol=1e-9) else scale
    return tuple((value + shift) / scale for value in means), tuple(value / scale for value in stds)


def _sides(size: object) -> tuple[int, int] | None:
    """Height and width of one number, or of both; None where it is neither."""
    if type(size) is int:
        return size, size
    if isinstance(size, dict) and type(size.get("height")) is int and type(size.get("width")) is int:
        return size["height"], size["width"]
    return None
