"""An entry that was trained from weights: whose they are, under which license, and what the card says."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from embedkit import load_encoder
from embedkit.authoring.golden import synthetic_images
from embedkit.errors import ConfigError, EntryError
from embedkit.hub.markdown import escape
from embedkit.hub.resolve import find_entry
from embedkit.model.config import EntryConfig
from embedkit.training import recipes, run
from embedkit.training.config import with_overrides
from embedkit.training.export.from_run import export_run
from embedkit.training.export.licenses import license_of

DEFAULT = "supervised-efficientnet_lite0.in1k"
PHOTOS = Path(__file__).parents[3] / "zoo" / "simclr-r50.photos"


def named(*licenses):
    return [{"name": f"parent{index}", "license": license} for index, license in enumerate(licenses)]


@pytest.mark.parametrize(
    ("parents", "given", "expected"),
    [
        ([], None, "other"),
        ([], "MIT", "MIT"),
        (named("Apache-2.0"), None, "Apache-2.0"),
        (named("Apache-2.0"), "MIT", "MIT"),
        (named("Apache-2.0", "apache-2.0"), "Apache-2.0", "Apache-2.0"),
        (named("CC-BY-NC-4.0"), "LicenseRef-NonCommercial", "LicenseRef-NonCommercial"),
        ([{"name": "a run"}, *named("MIT")], None, "MIT"),
        (named("unknown"), "MIT", "MIT"),
    ],
)
def test_the_license_follows_the_parents(parents, given, expected):
    assert license_of(parents, given) == expected


@pytest.mark.parametrize(
    ("parents", "given", "message"),
    [
        (named("CC-BY-NC-4.0"), "MIT", "--license MIT is more open than that of parent0.*expected CC-BY-NC-4.0"),
        (named("MIT", "CC-BY-SA-4.0"), "MIT", "more open than that of parent1"),
        (named("GPL-3.0-only"), "Apache-2.0", "more open"),
        (named("MIT", "Apache-2.0"), None, r"parent0 \(MIT\), parent1 \(Apache-2.0\): .*give --license"),
        (named("unknown"), None, "give --license"),
    ],
)  # fmt: skip
def test_a_license_that_is_more_open_or_does_not_follow(parents, given, message):
    with pytest.raises(ConfigError, match=message):
        license_of(parents, given)


def test_a_frozen_encoder_is_exported_as_its_parent_with_its_name_and_license(tmp_path):
    """Nothing is trained: what leaves is what came in, so rows agree with the parent's."""
    settings = [f"init={DEFAULT}", "freeze=8", "steps=1", "batch_size=4", "threads=1", "precision=fp32"]
    config = with_overrides(recipes.recipe("supervised"), settings)
    run.train(config, data="synthetic:40", out=tmp_path / "run", progress=False)
    folder = export_run(tmp_path / "run", "supervised-lite0.toy", tmp_path / "zoo")
    found = find_entry(folder)
    assert found.config.preprocess == find_entry(DEFAULT).config.preprocess
    assert found.config.license == "Apache-2.0"
    revision = find_entry(DEFAULT).revision
    assert found.config.provenance["parents"] == [
        {"name": DEFAULT, "manifest_sha256": revision, "license": "Apache-2.0"}
    ]
    assert "parents" not in found.config.provenance["run"]
    assert f"- `{DEFAULT}`: {escape('manifest_sha256')} `{revision[:12]}`, license Apache-2.0" in found.card
    assert "training_type: fine-tuning" in found.card
    images = list(synthetic_images(6))
    rows, expected = (load_encoder(name, threads=1).encode(images) for name in (folder, DEFAULT))
    np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_the_license_of_a_parent_binds_the_export(tmp_path):
    settings = [f"init={PHOTOS}", "data.image_size=32", "steps=1", "batch_size=4", "threads=1"]
    config = with_overrides(recipes.recipe("simclr"), settings)
    run.train(config, data="synthetic:40", out=tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match="--license MIT is more open than that of simclr-r50.photos"):
        export_run(tmp_path / "run", "simclr-r50.toy", tmp_path / "zoo", license="MIT")
    assert not (tmp_path / "zoo").exists()


def test_parents_of_a_file_are_checked():
    text = (
        (PHOTOS / "config.json").read_text().replace('"provenance": {', '"provenance": {"parents": [3],', 1)
    )
    with pytest.raises(EntryError, match=r"provenance.parents.0: expected"):
        EntryConfig.from_json(text)
