"""An SVG plot of the encoders on one data set: quality over training cost."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from embedkit._io.text import plain_line
from embedkit.hub.leaderboard import METRICS, Comparison, Row

__all__ = ["drawable", "plot_bytes"]

_WIDTH, _HEIGHT = 840, 440
#: Far above any training, and far below the largest float.
_MOST_FLOPS = 1e40
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 240, 34, 40
#: Positions of a label around its dot, the best first: x, y of its base line, anchor.
_AROUND = [(8, 4, "start"), (-8, 4, "end"), (0, -9, "middle"), (0, 18, "middle")] + [
    (dx, 4 + sign * step, anchor)
    for step in range(14, 113, 14)
    for sign in (-1, 1)
    for dx, anchor in ((8, "start"), (-8, "end"))
]


def plot_bytes(comparison: Comparison, metric: str) -> bytes:
    """Quality over training FLOPs as an SVG, the same bytes for the same rows; baselines are dashed lines.

    Args:
        comparison: Rows that are not `drawable` are left out.
        metric: Key of `METRICS`.

    Raises:
        ValueError: No row to draw.
    """
    dots = [
        (row.flops or 0.0, row.metrics[metric], row.name) for row in comparison.rows if drawable(row, metric)
    ]
    lines = [
        (row.metrics[metric], row.name)
        for row in comparison.rows
        if not row.method and _is_share(row, metric)
    ]
    if not dots:
        raise ValueError(f"no encoder has {metric} and a known cost")
    ticks = _ticks(min(x for x, _, _ in dots), max(x for x, _, _ in dots))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])
    least, most = _span([y for _, y, _ in dots] + [y for y, _ in lines], step=0.05)

    def at_pixel(x: float, y: float) -> tuple[float, float]:
        inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + (x - low) / (high - low) * inner_w, _TOP + (most - y) / (most - least) * inner_h

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20" font-size="14">{_text(METRICS[metric])} on {_text(comparison.data)}, '
        "over training FLOPs</text>",
    ]
    for tick in ticks:
        x, _ = at_pixel(math.log10(tick), least)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#e4e4e4"/>')
        text = f"{tick:.0e}".replace("e+", "e")
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{text}</text>')
    for index in range(round((most - least) / 0.05) + 1):
        y = at_pixel(low, least + index * 0.05)[1]
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e4e4e4"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{least + index * 0.05:.2f}</text>'
        )
    heights = [at_pixel(low, value)[1] for value, _ in lines]
    inputs = {name.rpartition(", ")[2] for _, name in lines}
    for (_, name), y, at in zip(lines, heights, _apart(heights, _HEIGHT - _BOTTOM), strict=True):
        title = name.rpartition(", ")[0] if len(inputs) == 1 else name
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#777" stroke-dasharray="5 4"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 6}" y="{at + 4:.1f}" fill="#555">{_text(title)}</text>')
    points = [at_pixel(math.log10(x), y) for x, y, _ in dots]
    names = [name.partition(".")[0] for _, _, name in dots]
    for (x, y), name, (dx, dy, anchor) in zip(points, names, _beside(points, names), strict=True):
        if abs(dy - 4) > 14:
            parts.append(f'<path d="M{x:.1f} {y:.1f}l{dx} {dy - 4}" stroke="#9ab4dd"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="#1f5fbf"/>')
        parts.append(
            f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}" paint-order="stroke" stroke="#fff" '
            f'stroke-width="3">{_text(name)}</text>'
        )
    return ("\n".join([*parts, "</svg>"]) + "\n").encode()


def _text(text: str) -> str:
    """Text escaped for XML: one line without control characters, cut to what fits the frame."""
    return html.escape(plain_line(text)[:120])


def drawable(row: Row, metric: str) -> bool:
    """Whether a row can be drawn: its FLOPs are known and above 0, its metric is between -1 and 1."""
    return row.flops is not None and 1 <= row.flops <= _MOST_FLOPS and _is_share(row, metric)


def _is_share(row: Row, metric: str) -> bool:
    return -1 <= row.metrics.get(metric, math.inf) <= 1


def _ticks(low: float, high: float) -> list[float]:
    """The numbers 1, 2 and 5 times a power of ten around low..high, two or more."""
    found = [
        m * 10.0**e
        for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
        for m in (1, 2, 5)
    ]
    first = max(index for index, tick in enumerate(found) if tick <= low * (1 + 1e-9))
    last = next(index for index, tick in enumerate(found) if tick >= high * (1 - 1e-9))
    return found[first : max(last, first + 1) + 1]


def _span(values: Iterable[float], *, step: float) -> tuple[float, float]:
    """The multiples of `step` around the values, two different ones."""
    values = list(values)
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    return low, high if high > low else low + step


def _apart(wanted: Sequence[float], bottom: float, gap: float = 14.0) -> list[float]:
    """Heights of labels near `wanted` and `gap` apart: moved down, then up where one would be below `bottom`."""
    found = list(wanted)
    order = sorted(range(len(found)), key=lambda index: found[index])
    last = -math.inf
    for index in order:
        last = found[index] = max(found[index], last + gap)
    last = bottom + gap
    for index in reversed(order):
        last = found[index] = min(found[index], last - gap)
    return found


def _beside(dots: Sequence[tuple[float, float]], names: Sequence[str]) -> list[tuple[int, int, str]]:
    """For each dot, the first position of `_AROUND` where its name is in the frame and covers nothing, or the last."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    found = []
    for (x, y), name in zip(dots, names, strict=True):
        width = 6.6 * len(name)
        for dx, dy, anchor in _AROUND:
            left = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
            box = left, y + dy - 11, left + width, y + dy + 3
            inside = (
                left > _LEFT and box[2] < _WIDTH - _RIGHT and box[1] > _TOP and box[3] < _HEIGHT - _BOTTOM
            )
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        found.append((dx, dy, anchor))
    return found


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
