"""The pages of a zoo: no entry keeps others from being listed, and no text of an entry is more than text."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedkit.errors import EntryError
from embedkit.hub.listing import list_encoders
from embedkit.hub.markdown import escape
from embedkit.hub.publish.fitness import check_facts
from embedkit.hub.publish.index import build_index, index_bytes, make_index, pages, update_index
from embedkit.hub.publish.pages import TABLE
from embedkit.hub.publish.publish import publish, refresh
from embedkit.hub.resolve import find_entry
from embedkit.model.layout import CONFIG, INDEX

NAME = "linear-tiny.noise"


def facts(**changes) -> dict:
    base = {
        "manifest_sha256": "0" * 64, "method": "a", "architecture": "r10", "data": "digits", "dim": 4,
        "license": "MIT", "bytes": 5, "kind": "encoder", "family": "", "input": "rgb 8x8", "cost": {}, "pretext": {},
        "metrics": {},
    }  # fmt: skip
    return {**base, **changes}


def measured(
    value: float = 0.5, flops: object = 1e15, data: str = "digits", name: str = "probe_top1"
) -> dict:
    return facts(cost={"training_flops": flops}, metrics={"results": {data: {name: value}}, "protocol": "p"})


def changed(by_hand, folder, **changes):
    """An entry whose configuration has other keys of ours; `architecture` is timm's."""
    tiny = by_hand.TinyEntry()
    config = json.loads(tiny.files()[CONFIG])
    config["architecture"] = changes.pop("architecture", config["architecture"])
    config["embedkit"].update(changes)
    return tiny.write(folder, {**tiny.files(), CONFIG: json.dumps(config).encode()})


NONSENSE = {
    "negative FLOPs": {"provenance": {"cost": {"training_flops": -1}}},
    "too many FLOPs": {"provenance": {"cost": {"training_flops": 1e299}}},
    "negative seconds": {"provenance": {"cost": {"seconds": -5}}},
    "a share of 1e9": {"metrics": {"results": {"d": {"probe_top1": 1e9}}}},
    "a baseline of 1e9": {"metrics": {"results": {"d": {}}, "baselines": {"d": {"pca": {"map_at_r": -1e9}}}}},
    "an interval of 1e9": {"metrics": {"intervals": {"d": {"knn_top1": [0, 1e9]}}}},
    "a name of 300 letters": {"metrics": {"results": {"d" * 300: {"probe_top1": 0.5}}}},
    "a name of two lines": {"metrics": {"results": {"d\n\n# Moved": {"probe_top1": 0.5}}}},
    "an escape": {"data": "d\x1b[31m"},
    "half of a character": {"data": "d\ud800"},
    "half of a character as a key": {"metrics": {"results": {"\udfff": {"probe_top1": 0.5}}}},
    "a license of a page": {"license": "MIT " * 1000},
}


@pytest.mark.parametrize("change", NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("kind", ["folder", "s3", "hub"])
def test_an_entry_that_no_page_can_show_is_refused_before_anything_is_placed(
    change, kind, request, zoo, by_hand, tmp_path
):
    """They were placed first, and then no index of that zoo could be written again."""
    to = str(tmp_path / "to") if kind == "folder" else "hf://team"
    if kind == "s3":
        to = request.getfixturevalue("s3")
    hub = request.getfixturevalue("hub") if kind == "hub" else None
    token = "hf_writer" if hub else None
    publish(find_entry(zoo / NAME), to, token=token)
    repos = dict(hub.repos) if hub else {}
    bad = changed(by_hand, tmp_path / "linear-bad.noise", **change)
    with pytest.raises(EntryError):
        publish(find_entry(bad), to, token=token)
    assert [row.name for row in list_encoders(zoo=to)] == [NAME]
    if kind == "folder":
        assert sorted(path.name for path in (tmp_path / "to").iterdir()) == [TABLE, INDEX, NAME]
        refresh(to)
    if hub:
        assert hub.repos == repos


def test_an_entry_that_is_damaged_in_a_zoo_keeps_its_row_and_others_are_published(
    zoo, by_hand, tmp_path, caplog
):
    publish(find_entry(zoo / NAME), str(tmp_path / "to"))
    row = json.loads((tmp_path / "to" / INDEX).read_bytes())["entries"][NAME]
    (tmp_path / "to" / NAME / CONFIG).write_bytes(b"{")
    (tmp_path / "to" / "linear-empty.noise").mkdir()
    other = by_hand.TinyEntry(seed=3).write(tmp_path / "linear-other.noise")
    publish(find_entry(other), str(tmp_path / "to"))
    assert "the other entries are not affected" in caplog.text
    entries = json.loads((tmp_path / "to" / INDEX).read_bytes())["entries"]
    assert set(entries) == {NAME, "linear-other.noise"} and entries[NAME] == row


def test_pages_stand_whatever_the_figures_are(tmp_path):
    """Entries that lie in a zoo already, from before their figures were checked."""
    index = make_index(
        {
            "a-x.d": measured(),
            "b-x.d": measured(0.7, 1e16),
            "c-x.d": measured(1e9, 1e16),
            "d-x.d": measured(0.6, -1e16),
            "e-x.d": measured(0.6, 0),
            "f-x.d": measured(0.6, 1e299),
            "g-x.d": measured(-1e299, 1e16),
        },
        {},
    )
    found = pages(index)
    assert set(found) == {TABLE, "quality-digits.svg"} and len(found["quality-digits.svg"]) < 20_000
    dots = ET.fromstring(found["quality-digits.svg"]).iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(dots)) == 2


def test_each_data_set_has_a_plot_of_its_own():
    """Names that are too long for a file, of other letters, or equal but for their signs."""
    names = ["x" * 300, "x" * 299 + "y", "日本", "中文", "a b", "a-b", "A B"]
    entries = {
        f"{letter}-x.d": facts(
            cost={"training_flops": 10.0**power},
            metrics={"results": {name: {"probe_top1": 0.5} for name in names}, "protocol": "p"},
        )
        for letter, power in (("a", 15), ("b", 16))
    }
    found = pages(make_index(entries, {}))
    plots = found.keys() - {TABLE}
    assert len(plots) == len(names) and all(len(name) <= 120 and name.isascii() for name in plots)
    assert all(f"({name})".encode() in found[TABLE] for name in plots)


def test_an_index_that_no_reader_would_take_is_not_written():
    with pytest.raises(EntryError, match="expected at most 16777216 bytes"):
        index_bytes(make_index({"a-x.d": facts(data="x" * (17 << 20))}, {}))


# --- text -------------------------------------------------------------------------------------------------

EVIL = (
    "r50 |\n\n# Moved\nNow here: [the new tool](https://evil.example/x.sh)\n\n<img src=x onerror=alert(1)>",
    "MIT | <script>alert(2)</script>",
    "![x](https://evil.example/track.png)",
    "[x]: https://evil.example\n\n[x]",
    "\\[x](y) \\\\[x](y) \\| &lt;b&gt;",
    "`` ` ``<b>` `",
    "# a", "- a", "1. a", "12) a", "> a", "---", "===", "```", "~~~", "***", "    code", "<!-- ", "<https://evil.example>",
)  # fmt: skip


class Text(html.parser.HTMLParser):
    """The text and the tags of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def plain(text: str) -> str:
    return " ".join(re.sub("[\x00-\x1f\x7f-\x9f]", " ", text).split())


@settings(deadline=None, max_examples=300)
@given(st.text("ab1 |\\`*_[]()<>&!#+-=~.:\n", max_size=40))
@example("`<b>`")
@pytest.mark.filterwarnings("ignore")
def test_escaped_text_is_shown_as_it_is(text):
    """By another reading of CommonMark with tables: no tag but those of the page itself, and the words again."""
    markdown_it = pytest.importorskip("markdown_it")
    renderer = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    paragraph = Text(renderer.render(f"before {escape(text)}"))
    assert set(paragraph.tags) <= {"p", "code", "em", "strong", "s"}
    table = Text(renderer.render(f"| a | b |\n|---|---|\n| {escape(text)} | end |"))
    assert set(table.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code", "em", "strong", "s"}
    assert table.tags.count("td") == 2 and table.text.split()[-1] == "end"
    block = Text(renderer.render(f"{escape(text)}\n"))
    assert set(block.tags) <= {"p", "code", "em", "strong", "s"}
    if not re.search("[_~`]", text):
        assert plain(block.text) == plain(text)


@pytest.mark.parametrize("evil", EVIL)
def test_no_field_of_an_entry_is_more_than_text_on_a_page(evil):
    markdown_it = pytest.importorskip("markdown_it")
    entry = facts(
        method=evil, architecture=evil, data=evil, license=evil, family=evil, input=evil, pretext={evil: 1.0},
        cost={"training_flops": 1e15},
        metrics={"results": {evil: {"probe_top1": 0.5}}, "protocol": evil, "baselines": {evil: {evil: {"auc": 0.5}}}},
    )  # fmt: skip
    found = pages(make_index({"a-x.d": entry, "b-x.d": {**entry, "cost": {"training_flops": 1e16}}}, {}))
    renderer = markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    page = Text(renderer.render(found.pop(TABLE).decode()))
    usual = {
        "h1",
        "h2",
        "p",
        "code",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "a",
        "img",
        "em",
        "strong",
        "s",
    }
    assert set(page.tags) <= usual
    assert page.tags.count("a") == 4 and page.tags.count("img") == 1 and page.tags.count("h1") == 1
    for plot in found.values():
        tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(plot).iter()}
        assert tags == {"svg", "rect", "text", "path", "circle"}


def test_checks_pass_what_is_usual(zoo):
    check_facts(measured(), "x")
    check_facts(facts(metrics={"results": {"naïve 日本": {"rankme": 700.5, "psnr": 31.0}}}), "x")
    update_index(zoo)
    assert (zoo / INDEX).read_bytes() == index_bytes(build_index(zoo))
    shutil.rmtree(zoo / NAME)
    assert update_index(zoo)["entries"] == {}
