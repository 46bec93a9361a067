"""Contact sheets: images in rows under headings, as one HTML file or one PNG, for visual inspection.

The HTML holds its thumbnails and needs neither network nor script: its policy forbids both. All text in it comes
from untrusted sources such as file names, so every piece is escaped and control characters are made visible.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from embedkit._io.atomic import replacing
from embedkit.analysis.clustering.cluster import Clustering
from embedkit.analysis.duplicates import Duplicates
from embedkit.errors import ConfigError, OutputError
from embedkit.images.ids import check_no_image
from embedkit.images.originals import Originals, nothing_readable
from embedkit.workflows.visual.thumbnails import Thumbnail, thumbnails

if TYPE_CHECKING:
    from embedkit.workflows.search import Matches

__all__ = [
    "Section",
    "ContactSheet",
    "Tile",
    "check_sheet",
    "common_folder",
    "sheet_of_clusters",
    "sheet_of_duplicates",
    "sheet_of_matches",
    "visible",
    "write_contact_sheet",
]

#: Side of a thumbnail in pixels.
EDGE = 160
#: Images on one sheet: an HTML of about 15 MB, a PNG of about 12,000 pixels in height.
MOST = {".html": 2000, ".png": 400}
#: Images of one group of duplicates, and images of a cluster beside its exemplars.
MOST_OF_GROUP, MEMBERS = 12, 9


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One image of a sheet.

    Attributes:
        name: The id of an image, or the name of a row.
        title: The text below it; the name when empty.
        note: A second line, such as a cosine.
        badge: One word on the image, such as `query`.
    """

    name: str
    title: str = ""
    note: str = ""
    badge: str = ""


@dataclass(frozen=True)
class Section:
    """Images under one heading, with `note` beside it."""

    title: str
    tiles: list[Tile]
    note: str = ""


@dataclass(frozen=True)
class ContactSheet:
    """The contact sheet that was written.

    Attributes:
        path: The file.
        images: Number of images on it.
        missing: Names of the images that could not be read, each once.
        left_out: Number of sections that did not fit.
    """

    path: Path
    images: int
    missing: list[str] = field(default_factory=list)
    left_out: int = 0


def check_sheet(path: str | os.PathLike[str]) -> None:
    """Refuse an output that cannot be written, before the work starts.

    Raises:
        ConfigError: The name ends neither in .html nor in .png.
        OutputError: Its folder does not exist, or it is a folder itself.
    """
    path = Path(path)
    if path.suffix.lower() not in MOST:
        raise ConfigError(f"sheet: expected a name that ends in .html or .png, found {str(path)!r}")
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder; give the name of a file in it")
    if not os.path.isdir(path.absolute().parent):
        raise OutputError(f"the folder {path.absolute().parent} does not exist; create it first")


def write_contact_sheet(
    path: str | os.PathLike[str],
    title: str,
    content: Duplicates | Clustering | Sequence[Matches] | Sequence[Section],
    originals: Originals | None = None,
    *,
    note: str = "",
    threads: int | None = None,
) -> ContactSheet:
    """Write a contact sheet atomically.

    Args:
        path: `X.html`, one self-contained file, or `X.png`. An HTML shows up to 2,000 images and a PNG up to 400;
            further sections are left out, and the sheet says so.
        title: Of the whole.
        content: Duplicates, clusters or the matches of `search`; or sections of images, in order.
        originals: Where the images come from; ids as paths from the working folder when None.
        note: Below the title.
        threads: Number of threads for thumbnails; all cores when None.

    Raises:
        ConfigError: The name ends neither in .html nor in .png, or there is nothing to show.
        SourceError: None of the images can be read.
        OutputError: The file cannot be written, or is one of the images.

    Examples:
        >>> found = embedkit.find_duplicates("samples.parquet", threshold=0.9)
        >>> embedkit.write_contact_sheet("doubles.html", "Duplicates", found).images
        4
        >>> matches = embedkit.search("samples.parquet", "samples/cat.jpg", k=3)
        >>> embedkit.write_contact_sheet("found.png", "Like this cat", matches).images
        4
    """
    check_sheet(path)
    sections = _sections_of(content)
    originals = originals or Originals()
    tiles = (tile.name for section in sections for tile in section.tiles)
    check_no_image({"the sheet": path}, tiles, originals.root)
    path = Path(path)
    most = MOST[path.suffix.lower()]
    shown: list[Section] = []
    count = 0
    room = most
    for section in sections:
        taken = len(section.tiles)
        if path.suffix.lower() == ".png":
            taken = -(-taken // _COLUMNS) * _COLUMNS  # whole rows
        if shown and taken > room:
            break
        shown.append(Section(section.title, section.tiles[:most], section.note))
        count, room = count + len(shown[-1].tiles), room - taken
    if not count:
        raise ConfigError(f"{path}: there is no image to show")
    left_out = len(sections) - len(shown)
    if left_out:
        note = f"{note} {left_out:,} more did not fit onto this sheet.".strip()
    common = common_folder([tile.title or tile.name for section in shown for tile in section.tiles])
    if common:
        note = f"{note} Names are relative to {common}".strip()
    names = [tile.name for section in shown for tile in section.tiles]
    form = "webp" if path.suffix.lower() == ".html" else None
    small = thumbnails(names, originals, edge=EDGE, form=form, threads=threads)
    faults: dict[str, str] = {}

    def watched() -> Iterator[Thumbnail]:
        seen = 0
        for one in small:
            seen += 1
            if one.fault:
                faults[one.name] = one.fault
            if seen == count and len(faults) == len(set(names)):
                raise nothing_readable(len(faults), names[0], faults[names[0]])
            yield one

    write = _write_html if form else _write_png
    with replacing(path) as file:
        write(file, title, note, shown, watched(), common)
    return ContactSheet(path, count, list(faults), left_out)


def _sections_of(content: Duplicates | Clustering | Sequence[Matches] | Sequence[Section]) -> list[Section]:
    if isinstance(content, Duplicates):
        return sheet_of_duplicates(content)
    if isinstance(content, Clustering):
        return sheet_of_clusters(content)
    return [one if isinstance(one, Section) else sheet_of_matches([one])[0] for one in content]


def sheet_of_matches(matches: Sequence[Matches]) -> list[Section]:
    """One section per query: the query, then its matches."""
    sections = []
    for one in matches:
        # The path of a query image does not depend on the folder that ids are relative to.
        name = one.query if one.is_row else os.path.abspath(one.query)
        tiles = [Tile(name=name, title=one.query, badge="query")]
        tiles += [Tile(name=hit.name, note=f"cosine {hit.cosine:.4f}") for hit in one.found]
        sections.append(Section(one.query, tiles))
    return sections


def sheet_of_duplicates(found: Duplicates) -> list[Section]:
    """One section per group: the kept images, then the redundant ones, with their cosine to the kept one."""
    sections = []
    for number, group in enumerate(found.groups, 1):
        tiles = [Tile(name=found.names[row], badge="keep") for row in group.kept]
        kept = len(tiles)
        tiles = tiles[: max(1, MOST_OF_GROUP - len(group.redundant))]
        tiles += [
            Tile(name=found.names[row], note=f"cosine {cosine:.4f}")
            for row, cosine in zip(group.redundant, group.cosines.tolist(), strict=True)
        ][: MOST_OF_GROUP - len(tiles)]
        more = len(group) - len(tiles)
        note = f"{len(group):,} images, {kept:,} to keep" + (f"; {more:,} are not shown" if more else "")
        sections.append(Section(f"Group {number}", tiles, note))
    return sections


def sheet_of_clusters(found: Clustering, *, seed: int = 0) -> list[Section]:
    """One section per cluster: the rows nearest to its mean, then a sample of the others.

    Args:
        found: The clusters.
        seed: The seed of the sample.
    """
    rng = np.random.default_rng(seed)
    rows = len(found.labels)
    sections = []
    says_more = bool((found.probabilities[found.labels >= 0] < 0.995).any())  # those of k-means are 1
    order = np.argsort(found.labels, kind="stable")
    starts = np.searchsorted(found.labels[order], np.arange(-1, len(found) + 1))
    for cluster in [*range(len(found)), -1]:
        members = order[starts[cluster + 1] : starts[cluster + 2]]
        if not len(members):
            continue
        middle = found.exemplars[cluster] if cluster >= 0 else []
        others = np.setdiff1d(members, middle)
        drawn = np.sort(rng.choice(others, min(MEMBERS, len(others)), replace=False)).tolist()
        tiles = [
            Tile(
                name=f"{found.ids[row]}#{found.parts[row]}" if found.parts[row] else found.ids[row],
                note=f"probability {found.probabilities[row]:.2f}" if says_more and cluster >= 0 else "",
                badge="middle" if row in middle else "",
            )
            for row in [*middle, *drawn]
        ]
        size = len(members)
        word = "image" if size == 1 else "images"
        title = f"Cluster {cluster}" if cluster >= 0 else "In no cluster"
        sections.append(Section(title, tiles, f"{size:,} {word}, {size / rows:.1%}"))
    return sections


def common_folder(names: Sequence[str]) -> str:
    """The common prefix of all names, up to and including a `/` or `::`."""
    common = os.path.commonprefix(list(names)) if len(set(names)) > 1 else ""
    ends = [common.rfind(mark) + len(mark) for mark in ("/", "::") if mark in common]
    return common[: max(ends, default=0)]


def visible(text: str) -> str:
    """`text` with invisible characters, and those that change the writing direction, as escapes."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _write_html(
    file: IO[bytes],
    title: str,
    note: str,
    sections: Sequence[Section],
    small: Iterator[Thumbnail],
    common: str,
) -> None:
    def write(text: str) -> None:
        file.write(text.encode())

    write(_HEAD.format(title=_safe(title), note=f"<p>{_safe(note)}</p>" if note else ""))
    for section in sections:
        aside = f" <small>{_safe(section.note)}</small>" if section.note else ""
        write(f"<section>\n<h2><bdi>{_safe(section.title)}</bdi>{aside}</h2>\n<div>\n")
        for tile in section.tiles:
            write(_figure(tile, next(small), common))
        write("</div>\n</section>\n")
    write("</main>\n</html>\n")


def _figure(tile: Tile, one: Thumbnail, common: str) -> str:
    name = tile.title or tile.name
    note = f"{tile.note}; {one.fault}" if tile.note and one.fault else tile.note or one.fault
    data = base64.b64encode(one.data).decode()
    width, height = one.image.size
    badge = f"<b>{_safe(tile.badge)}</b>" if tile.badge else ""
    line = f"<i>{_safe(note)}</i>" if note else ""
    return (
        f'<figure{" class=lost" if one.fault else ""} title="{_safe(name)}">'
        f'<div><img src="data:image/webp;base64,{data}" width={width} height={height} alt="{_safe(name)}">{badge}</div>'
        f"<figcaption><bdi>{_breaking(_last_of(name.removeprefix(common)))}</bdi>{line}"
        "</figcaption></figure>\n"
    )


def _safe(text: str) -> str:
    return html.escape(visible(text))


def _breaking(name: str) -> str:
    """A name with line break opportunities after its separators."""
    return _safe(name).replace("/", "/<wbr>").replace("::", "::<wbr>")


def _last_of(name: str, length: int = 60) -> str:
    """The end of a long name, which distinguishes images of one folder."""
    return name if len(name) <= length else "…" + name[1 - length :]


_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --ink: #1c1c1c; --soft: #5c5c5c; --page: #fbfbfa; --card: #efefed; --mark: #1659b8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ededed; --soft: #a9a9a9; --page: #17181a; --card: #26282b; --mark: #2f6fce; }}
}}
body {{ margin: 0; font: 14px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--page); }}
main {{ max-width: 1500px; margin: 0 auto; padding: 24px; }}
h1 {{ font-size: 22px; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 16px; margin: 32px 0 8px; overflow-wrap: anywhere; }}
small, p {{ font-size: 14px; font-weight: normal; color: var(--soft); }}
section > div {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(172px, 1fr)); gap: 12px; }}
figure {{ margin: 0; padding: 6px; background: var(--card); border-radius: 6px; break-inside: avoid; min-width: 0; }}
figure > div {{ position: relative; height: 160px; display: flex; align-items: center; justify-content: center; }}
figure img {{ width: 100%; height: 100%; object-fit: contain; }}
figure b {{ position: absolute; left: 0; top: 0; padding: 0 6px; font-size: 12px; color: #fff; background: var(--mark);
  border-radius: 3px; }}
figcaption {{ margin-top: 4px; font-size: 12px; overflow-wrap: anywhere; }}
figcaption i {{ display: block; font-style: normal; color: var(--soft); }}
.lost img {{ opacity: .6; }}
</style>
<main>
<h1>{title}</h1>
{note}
"""

#: Measures of a PNG, in pixels: columns, margin, gap, and the heights of lines of text.
_COLUMNS, _MARGIN, _GAP, _LINE, _HEADING = 8, 24, 12, 15, 34
_INK, _SOFT, _PAGE, _CARD, _BADGE = (
    (28, 28, 28),
    (92, 92, 92),
    (251, 251, 250),
    (239, 239, 237),
    (22, 89, 184),
)


def _write_png(
    file: IO[bytes],
    title: str,
    note: str,
    sections: Sequence[Section],
    small: Iterator[Thumbnail],
    common: str,
) -> None:
    font = {size: ImageFont.load_default(size) for size in (12, 16, 22)}
    columns = min(_COLUMNS, max(len(section.tiles) for section in sections))
    columns = max(columns, 4)  # room for headings
    card_w, card_h = EDGE + _GAP, EDGE + 12 + 2 * _LINE
    width = 2 * _MARGIN + columns * (card_w + _GAP) - _GAP
    head = _MARGIN + 30 + (20 if note else 0)
    rows = [-(-len(section.tiles) // columns) for section in sections]
    height = head + sum(_HEADING + count * (card_h + _GAP) for count in rows) + _MARGIN
    canvas = Image.new("RGB", (width, height), _PAGE)
    pen = ImageDraw.Draw(canvas)

    def write(at: tuple[int, int], text: str, room: int, size: int, color: tuple[int, int, int]) -> float:
        text = _drawable(text, lambda line: pen.textlength(line, font[size]), room)
        pen.text(at, text, color, font[size])
        return pen.textlength(text, font[size])

    room = width - 2 * _MARGIN
    write((_MARGIN, _MARGIN - 4), title, room, 22, _INK)
    if note:
        write((_MARGIN, _MARGIN + 28), note, room, 12, _SOFT)
    top = head
    for section, count in zip(sections, rows, strict=True):
        end = write((_MARGIN, top + 8), section.title, room * 2 // 3, 16, _INK)
        write((int(_MARGIN + end + 12), top + 11), section.note, room // 3 - 12, 12, _SOFT)
        top += _HEADING
        for index, tile in enumerate(section.tiles):
            one = next(small)
            left = _MARGIN + index % columns * (card_w + _GAP)
            above = top + index // columns * (card_h + _GAP)
            pen.rounded_rectangle((left, above, left + card_w, above + card_h), 6, _CARD)
            image = ImageOps.contain(one.image, (EDGE, EDGE))  # enlarge tiny images
            at = (left + 6 + (EDGE - image.width) // 2, above + 6 + (EDGE - image.height) // 2)
            canvas.paste(image, at)
            if tile.badge:
                badge = _drawable(tile.badge, lambda line: pen.textlength(line, font[12]), EDGE - 10)
                wide = pen.textlength(badge, font[12]) + 10
                pen.rectangle((left + 6, above + 6, left + 6 + wide, above + 22), _BADGE)
                pen.text((left + 11, above + 6), badge, (255, 255, 255), font[12])
            name = (tile.title or tile.name).removeprefix(common)
            write((left + 6, above + EDGE + 7), name, EDGE, 12, _INK)
            write((left + 6, above + EDGE + 7 + _LINE), one.fault or tile.note, EDGE, 12, _SOFT)
        top += count * (card_h + _GAP)
    canvas.save(file, "PNG")


def _drawable(text: str, length: Callable[[str], float], room: int) -> str:
    """`text` in the letters of the font, and only its end if it is too long."""
    text = visible(text).encode("latin-1", "backslashreplace").decode("latin-1")
    if length(text) <= room:
        return text
    text = text[-room:]  # no letter is narrower than a pixel
    while text and length("..." + text) > room:
        text = text[1:]
    return "..." + text
