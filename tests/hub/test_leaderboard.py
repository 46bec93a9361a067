"""Entries side by side: the table holds what the entries say, and the plot puts it where it belongs."""

import itertools
import json
import random
import re
import xml.etree.ElementTree as ET

import pytest

from embedkit.hub.leaderboard import COLUMNS, compare, with_protocols
from embedkit.hub.publish.index import TABLE, make_index, pages
from embedkit.hub.publish.plot import _apart, plot_bytes


def facts(method="rotnet", *, probe=0.8, flops=1e15, data="digits", protocol="p", **more):
    metrics = {
        "protocol": protocol,
        "results": {data: {"probe_top1": probe, "rankme": 31.4}},
        "intervals": {data: {"probe_top1": [probe - 0.01, probe + 0.01]}},
        "baselines": {data: {"random": {"probe_top1": 0.5}, "pca": {"probe_top1": 0.6}}},
    }
    row = {"method": method, "architecture": "r10", "dim": 7, "input": "gray 28x28", "metrics": metrics}
    row |= {
        "data": "digits",
        "license": "MIT",
        "bytes": 1,
        "manifest_sha256": "0" * 64,
        "family": "a pretext task",
    }
    return (
        row
        | {
            "cost": {"images": 1_500_000, "training_flops": flops, "seconds": 90},
            "pretext": {"accuracy": 0.9},
        }
        | more
    )


def test_one_table_for_each_data_set_and_protocol():
    entries = {
        "a-x.d": facts(),
        "b-x.d": facts(data="letters"),
        "c-x.d": facts(protocol="another"),
        "d-x.d": facts(),
    }
    found = [
        (table.data, table.protocol, [row.name for row in table.rows if row.method])
        for table in compare(entries)
    ]
    assert found == [
        ("digits", "another", ["c-x.d"]),
        ("digits", "p", ["a-x.d", "d-x.d"]),
        ("letters", "p", ["b-x.d"]),
    ]


def test_the_protocol_is_said_once_where_there_is_one():
    same = compare({"a-x.d": facts(protocol="one way"), "b-x.d": facts(data="letters", protocol="one way")})
    assert [(table.data, said) for table, said in with_protocols(same)] == [
        ("digits", ""),
        ("letters", f"one way {COLUMNS}"),
    ]
    two = compare({"a-x.d": facts(protocol="one"), "b-x.d": facts(data="letters", protocol="another")})
    assert [(table.data, said) for table, said in with_protocols(two)] == [
        ("digits", f"one {COLUMNS}"),
        ("letters", f"another {COLUMNS}"),
    ]


def test_the_table_in_words():
    table = compare({"a-x.d": facts(), "b-x.d": facts("vae", probe=0.75, cost={})})[0]
    lines = table.markdown(links=True).splitlines()
    assert (
        lines[0]
        == "| encoder | method | supervision | images | FLOPs | minutes | probe | RankMe | pretext task |"
    )
    assert lines[2] == (
        "| [a-x.d](a-x.d/README.md) | rotnet | a pretext task | 1.50 M | 1.0e+15 | 2 | 0.800 | 31 | accuracy 0.9 |"
    )
    assert "| 0.750 |" in lines[3] and "|  |  |  |" in lines[3]  # what is not known stays empty
    # equal baselines stand there once
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        "| pca (7), gray 28x28",
        "| r10 at random, gray 28x28",
    ]
    assert "0.800 [0.790, 0.810]" in table.markdown(intervals=True)


def test_the_level_by_chance_stands_beside_the_metric_of_the_pretext_task():
    pretext = {"accuracy": 0.5, "loss": 0.25, "accuracy_by_chance": 0.1}
    line = compare({"a-x.d": facts(pretext=pretext)})[0].markdown().splitlines()[2]
    assert line.endswith("| accuracy 0.5 (chance 0.1), loss 0.25 |")


def test_the_plot_is_ordered_as_its_figures_are():
    table = compare(
        {"a-x.d": facts(flops=1e14), "b-x.d": facts(probe=0.9, flops=1e16), "c-x.d": facts(cost={})}
    )[0]
    content = plot_bytes(table, "probe_top1")
    root = ET.fromstring(content)
    dots = [
        (float(dot.get("cx")), float(dot.get("cy")))
        for dot in root.iter("{http://www.w3.org/2000/svg}circle")
    ]
    assert len(dots) == 2  # without a known cost there is no zoo
    (x1, y1), (x2, y2) = dots
    assert x1 < x2 and y1 > y2
    # two decades apart on an axis of 1e14..1e16: the left and the right end
    ticks = re.findall(rb'<text x="([\d.]+)"[^>]*>1e(\d+)<', content)
    assert {int(power): float(x) for x, power in ticks}[14] == x1
    assert plot_bytes(table, "probe_top1") == content
    with pytest.raises(ValueError, match="known cost"):
        plot_bytes(compare({"c-x.d": facts(cost={})})[0], "probe_top1")


def test_no_label_covers_another_or_a_dot():
    rng = random.Random(0)
    crowd = {
        f"method{n}-r10.d": facts(probe=0.84 + rng.random() / 30, flops=10 ** (14 + rng.random() / 4))
        for n in range(12)
    }
    root = ET.fromstring(plot_bytes(compare(crowd)[0], "probe_top1"))
    dots, names = [], []
    for dot in root.iter("{http://www.w3.org/2000/svg}circle"):
        x, y = float(dot.get("cx")), float(dot.get("cy"))
        dots.append((x - 4.5, y - 4.5, x + 4.5, y + 4.5))
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        if (text.text or "").startswith("method"):
            width, x, y = 6 * len(text.text), float(text.get("x")), float(text.get("y"))
            left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
            names.append((left, y - 9, left + width, y + 2))
    assert len(dots) == len(names) == 12
    for a, b in [*itertools.combinations(names, 2), *itertools.product(names, dots)]:
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_labels_of_lines_keep_apart_and_above_the_bottom():
    assert _apart([50.0, 52.0, 90.0], 400.0) == [50.0, 64.0, 90.0]
    assert _apart([399.0, 395.0, 100.0, 398.0], 400.0) == [400.0, 372.0, 100.0, 386.0]


def test_pages_of_an_index():
    index = make_index({"a-x.d": facts(), "b-x.d": facts(flops=1e16)}, {})
    found = pages(json.loads(json.dumps(index)))
    assert set(found) == {TABLE, "quality-digits.svg"} and b"(quality-digits.svg)" in found[TABLE]
    assert set(pages(make_index({"a-x.d": facts()}, {}))) == {TABLE}  # one dot is no comparison
