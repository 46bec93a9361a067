"""An entry is written again from its `config.json`: card, manifest and index follow, and weights stay untouched."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("yaml")  # the runtime does without
from embedkit import load_encoder
from embedkit.authoring.reissue import reissue_entry, reissue_zoo
from embedkit.errors import EntryError, IntegrityError
from embedkit.hub.publish.index import update_index
from embedkit.model.layout import CARD, CONFIG, GOLDEN, GRAPH, INDEX, MANIFEST, WEIGHTS

NAME = "fixmatch-r10.fmnist"
OTHER = "rotnet-r10.fmnist"


@pytest.fixture
def zoo(tmp_path):
    """Two entries of this checkout's zoo, and their index."""
    for name in (NAME, OTHER):
        shutil.copytree(Path(__file__).parents[2] / "zoo" / name, tmp_path / "zoo" / name)
    update_index(tmp_path / "zoo")
    return tmp_path / "zoo"


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit(folder, **card):
    config = json.loads((folder / CONFIG).read_bytes())
    config["embedkit"]["card"] |= card
    (folder / CONFIG).write_text(json.dumps(config))


def test_an_entry_in_todays_form_stays_as_it_is(zoo):
    before = content(zoo)
    assert reissue_zoo(zoo) == []
    assert content(zoo) == before


def test_a_changed_field_of_the_card_changes_card_manifest_and_index_alone(zoo):
    before = content(zoo)
    edit(zoo / NAME, summary="Another sentence.")
    assert reissue_zoo(zoo) == [NAME]
    after = content(zoo)
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert {f"{NAME}/{CARD}", f"{NAME}/{CONFIG}", f"{NAME}/{MANIFEST}", INDEX} <= changed
    assert not changed & {f"{NAME}/{name}" for name in (WEIGHTS, GRAPH, GOLDEN)}
    assert not any(name.startswith(OTHER) for name in changed)
    assert b"Another sentence." in after[f"{NAME}/{CARD}"]
    assert load_encoder(zoo / NAME).config.card.summary == "Another sentence."
    assert reissue_zoo(zoo) == [] and content(zoo) == after


def test_a_card_is_written_where_it_is_missing_or_edited(zoo):
    before = content(zoo)
    (zoo / NAME / CARD).unlink()
    (zoo / OTHER / CARD).write_text("by hand")
    (zoo / NAME / "notes.txt").write_text("not in the manifest")
    assert reissue_zoo(zoo) == [NAME, OTHER]
    assert content(zoo) == before | {f"{NAME}/notes.txt": b"not in the manifest"}


def test_other_files_must_be_those_of_the_manifest(zoo):
    edit(zoo / NAME, summary="Another sentence.")
    weights = (zoo / NAME / WEIGHTS).read_bytes()
    (zoo / NAME / WEIGHTS).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    before = content(zoo)
    with pytest.raises(IntegrityError, match=WEIGHTS):
        reissue_entry(zoo / NAME)
    (zoo / OTHER / CONFIG).write_text("{}")
    with pytest.raises(EntryError, match=CONFIG):
        reissue_entry(zoo / OTHER)
    assert content(zoo) == before | {f"{OTHER}/{CONFIG}": b"{}"}


def test_a_reworded_docstring_changes_no_digest(zoo, monkeypatch):
    pytest.importorskip("torch")
    from embedkit.training import methods
    from embedkit.training.methods import fixmatch

    before, summary = content(zoo), methods.summary_of("fixmatch")
    monkeypatch.setattr(fixmatch, "__doc__", "Other words.")
    assert methods.summary_of("fixmatch") == summary
    assert json.loads((zoo / NAME / CONFIG).read_bytes())["embedkit"]["card"]["summary"] == summary
    assert reissue_zoo(zoo) == [] and content(zoo) == before
