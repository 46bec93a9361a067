"""The model card: what a reader needs before using an entry, in the places where one looks for it."""

import json

import pytest

from embedkit.model.config import EntryConfig
from embedkit.model.layout import MIXTURE, PRETEXT_IMAGE
from embedkit.model.preprocess import Preprocess

pytest.importorskip("yaml")  # the runtime does without
from embedkit.authoring.card import render_card

NAME = "deepdpm-r10.digits"
PROVENANCE = {
    "stored": {
        "dtype": "float16",
        "min_cosine": 0.9999,
        "mean_cosine": 1.0,
        "threshold": 0.9999,
        "images": 64,
    },
    "parity": {"max_difference": 4e-7, "limit": 1e-4},
}


def card(*, files=(), metrics=None, **provenance):
    config = EntryConfig(
        architecture="r10",
        outputs={"embedding": (10,)},
        method="deepdpm",
        dim=10,
        preprocess=Preprocess(size=(28, 28), resize_size=28, color="gray", mean=(0.3,), std=(0.4,)),
        data="digits",
        license="MIT",
        metrics=metrics or {},
        provenance=PROVENANCE | provenance,
    )
    return render_card(NAME, config, files)


def table(text):
    """The rows of the only table of a card, as lists of cells."""
    lines = (line for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def test_figures_stand_beside_their_intervals_and_the_baselines():
    text = card(
        metrics={
            "protocol": "Protocol 9.",
            "results": {"digits": {"probe_top1": 0.9, "rankme": 7.25}},
            "intervals": {"digits": {"probe_top1": [0.88, 0.92]}},
            "baselines": {
                # in the order of every table; a figure that a baseline lacks stays empty
                "digits": {
                    "pca": {"probe_top1": 0.8},
                    "pixels": {"rankme": 3.0},
                    "random": {"probe_top1": 0.7},
                }
            },
            "images": {"digits": {"train": 60000, "test": 1000}},
        }
    )
    head, _, probe, rank = table(text)
    assert head == ["metric", "this encoder", "95 %", "random", "pixels", "pca"]
    assert probe == [
        "probe_top1",
        "0.9000",
        "0.8800 to 0.9200",
        "0.7000",
        "",
        "0.8000",
    ]
    assert rank == ["rankme", "7.2500", "", "", "3.0000", ""]
    assert (
        text.index("Protocol 9.")
        < text.index("### digits")
        < text.index("60,000 training images, 1,000 test")
    )


def test_figures_alone_need_no_baselines():
    head, _, row = table(card(metrics={"results": {"digits": {"auc": 0.5}}}))
    assert head == ["metric", "this encoder", "95 %"]
    assert row[:2] == ["auc", "0.5000"]


def test_what_timm_does_not_build_can_still_be_one_onnx_file():
    assert f"embedkit export-onnx {NAME} -o" in card() and "timm.create_model" not in card()


def test_a_mixture_is_shown_in_use():
    assert "encoder.assign(" in card(files={MIXTURE}) and "encoder.assign(" not in card()


def test_the_pretext_task_is_shown_where_the_entry_has_its_image():
    assert f"]({PRETEXT_IMAGE})" in card(files={PRETEXT_IMAGE}) and PRETEXT_IMAGE not in card()


def test_the_metrics_of_the_pretext_task_stand_beside_their_intervals_and_chance():
    metrics = {"accuracy": 0.5, "nats": 2.0, "accuracy_by_chance": 0.1}
    text = card(pretext=metrics, pretext_intervals={"accuracy": [0.4, 0.6]})
    assert table(text) == [
        ["metric", "value", "95 %", "by chance"],
        ["---"] * 4,
        ["accuracy", "0.5000", "0.4000 to 0.6000", "0.1000"],
        ["nats", "2.0000", "", ""],
    ]
    assert "## The pretext task" in text and "pretext" not in text.partition("## Provenance")[2]
    # an entry that was exported without intervals lists its metrics as before
    text = card(pretext=metrics)
    assert "- pretext.nats: 2" in text and "## The pretext task" not in text


def test_the_run_is_json_that_can_be_taken_from_the_card():
    run = {"recipe": "deepdpm", "method": {"views": [{"p": 0.5}]}, "steps": 10}
    text = card(run=run, source="a run")
    assert json.loads(text.partition("```json\n")[2].partition("```")[0]) == run
    assert "- source: a run" in text and "- run" not in text


def test_no_field_of_a_configuration_is_more_than_text():
    """A card is rendered again from a configuration that came with somebody's entry."""
    evil = "x |\n\n# Moved [here](https://evil.example) <script>alert(1)</script>"
    config = EntryConfig(
        architecture=evil,
        outputs={"embedding": (10,)},
        method=evil,
        dim=10,
        preprocess=Preprocess(size=(28, 28), resize_size=28, color="gray", mean=(0.3,), std=(0.4,)),
        data=evil,
        license=evil,
        metrics={"results": {evil: {evil: 0.5}}, "protocol": evil},
        provenance={**PROVENANCE, evil: evil, "cost": {evil: evil}, "run": {evil: f"{evil}\n```\n{evil}"}},
    )
    body = render_card(NAME, config).partition("\n---\n")[2]
    markdown_it = pytest.importorskip("markdown_it")
    page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    assert "<a " not in page and "<script" not in page and page.count("<h1>") == 1
