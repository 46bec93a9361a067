"""A run that goes on: longer, with data that moved, and never another run; and a run from another's configuration."""

import dataclasses
import json
import shutil

import pytest

torch = pytest.importorskip("torch")

import contract
import numpy as np
from PIL import Image

from embedkit.errors import ConfigError, EntryError, OutputError
from embedkit.training import recipes, run
from embedkit.training.build import check_numbers
from embedkit.training.config import Facts, read_config_file, to_json, with_overrides
from embedkit.training.run_folder import read_checkpoint, read_config, write_config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    rng = np.random.default_rng(0)
    for number in range(20):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[number % 2] / f"{number:02}.png")
    return folder


def config(*settings):
    base = ["steps=4", "batch_size=4", "data.validation=0.2"]
    return with_overrides(contract.tiny("supervised"), [*base, *settings])


@pytest.fixture
def short(pictures, tmp_path):
    return run.train(config(), data=str(pictures), out=tmp_path / "short", progress=False).run


def weights(folder):
    state = read_checkpoint(folder)["state_dict"]
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def equal(first, second):
    return all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


def test_a_longer_run_is_the_run_that_was_planned_so(short, pictures, tmp_path):
    longer = run.resume(short, overrides=["steps=7"], progress=False)
    assert longer.finished and longer.steps == 7
    planned = run.train(config("steps=7"), data=str(pictures), out=tmp_path / "planned", progress=False)
    assert equal(short, planned.run)  # at a constant learning rate
    stored, facts = read_config(short)
    assert (stored.steps, facts.total_steps) == (7, 7)
    epochs = run.resume(short, overrides=["epochs=3"], progress=False)
    assert epochs.steps == 3 * facts.steps_per_epoch == 12


def test_minutes_make_a_finished_run_longer_and_an_unfinished_one_not(short):
    result = run.resume(short, max_minutes=0.05, progress=False)
    _, facts = read_config(short)
    assert 4 < result.steps <= facts.total_steps
    run.resume(short, progress=False)
    more = run.resume(short, overrides=[f"steps={facts.total_steps + 2}"], max_minutes=5.0, progress=False)
    assert more.steps == facts.total_steps + 2


def test_patience_changes_no_plan(short):
    config, facts = read_config(short)
    # as where a time budget made the plan, which `epochs` would not
    write_config(short, dataclasses.replace(config, steps=0, epochs=100.0), facts)
    assert run.resume(short, overrides=["evaluation.patience=3"], progress=False).steps == 4


@pytest.mark.parametrize(
    "setting",
    [
        "seed=1",
        "batch_size=8",
        "backbone=r18s",
        "optimizer.lr=0.5",
        "optimizer.accumulate=2",
        "method.label_smoothing=0.2",
        "method.augment.steps.0.pixels=1",
        "data.image_size=32",
        "data.validation=0.5",
        "precision=bf16",
        "evaluation.every=2",
    ],
)
def test_what_would_be_another_run_is_refused_by_name(short, setting):
    before = (short / "config.json").read_bytes()
    with pytest.raises(
        ConfigError, match=f"--set {setting.partition('=')[0]}: this would make it another run"
    ):
        run.resume(short, overrides=[setting], progress=False)
    assert (short / "config.json").read_bytes() == before


def test_a_value_that_stays_is_no_change_and_fewer_steps_are_refused(short):
    assert run.resume(short, overrides=["batch_size=4", "log_every=3"], progress=False).steps == 4
    with pytest.raises(ConfigError, match="the run has made 4 steps, and 3 are asked for"):
        run.resume(short, overrides=["steps=3"], progress=False)


def test_data_may_move_but_not_change(short, pictures, tmp_path):
    planned = run.train(config("steps=6"), data=str(pictures), out=tmp_path / "planned", progress=False)
    moved = shutil.copytree(pictures, tmp_path / "moved")
    result = run.resume(short, data=str(moved), overrides=["steps=6"], progress=False)
    assert result.steps == 6 and equal(short, planned.run)
    assert read_config(short)[0].data.path == str(moved)
    changed = shutil.copytree(pictures, tmp_path / "changed")
    Image.new("L", (28, 28), 7).save(changed / "a" / "00.png")
    Image.new("L", (28, 28), 7).save(changed / "a" / "02.png")
    Image.new("L", (28, 28), 7).save(changed / "a" / "04.png")
    with pytest.raises(ConfigError, match="other images or labels"):
        run.resume(short, data=str(changed), progress=False)
    renamed = shutil.copytree(pictures, tmp_path / "renamed")
    (renamed / "b").rename(renamed / "c")
    with pytest.raises(ConfigError, match="other images or labels"):
        run.resume(short, data=str(renamed), progress=False)
    for number in range(0, 10, 2):
        (moved / "a" / f"{number:02}.png").unlink()
    with pytest.raises(ConfigError, match=r"has 12 training images and the run began with 16"):
        run.resume(short, data=str(moved), progress=False)


# --- a configuration that is given back -----------------------------------------------------------------------


def test_a_runs_configuration_makes_the_same_run(short, tmp_path):
    given = read_config_file(short / "config.json")
    assert given == read_config(short)[0]
    again = run.train(given, out=tmp_path / "again", progress=False)
    assert equal(short, again.run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": "many"}, "batch_size: expected a whole number, found 'many'"),
        ({"batch_size": True}, "batch_size: expected a whole number, found True"),
        ({"epochs": None}, "epochs: expected a number, found None"),
        ({"precision": "fp8"}, "precision"),
        ({"optimizer": {"type": "optim.Optimizer", "betas": [0.9]}}, "optimizer: betas"),
        ({"data": 3}, "data: expected DataConfig, found 3"),
        ({"sed": 1}, "did you mean 'seed'"),
        ({"method": {"type": "methods.supervised.Config", "augment": {"type": "augment.RandomShift", "pixels": "x"}}},
         "augment"),
    ],
)  # fmt: skip
def test_a_file_that_was_edited_wrongly_is_refused_by_field(change, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**to_json(recipes.recipe("supervised")), **change}))
    with pytest.raises(ConfigError, match=message):
        read_config_file(file)


def test_a_file_that_is_no_configuration_is_refused(tmp_path):
    file = tmp_path / "config.json"
    for content in ("", "[]", "{}", '{"type": "optim.Optimizer"}', "nan", '"text"'):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            read_config_file(file)
    with pytest.raises(ConfigError, match=r"none\.json"):
        read_config_file(tmp_path / "none.json")


@pytest.mark.parametrize("name", recipes.summaries())
def test_every_recipe_can_be_given_as_a_file(name, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(recipes.recipe(name))))
    assert read_config_file(file) == recipes.recipe(name)


def test_the_command_takes_a_file_and_makes_a_run_longer(tmp_path):
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from embedkit.cli.train import train

    app = typer.Typer()
    app.command()(train)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_json(config("data.path=synthetic:40"))))
    folder = str(tmp_path / "run")
    made = CliRunner().invoke(app, ["--config", str(file), "--set", "steps=2", "-o", folder])
    assert made.exit_code == 0 and made.stdout.strip() == folder
    longer = CliRunner().invoke(app, ["--resume", folder, "--set", "steps=3", "--json"])
    assert json.loads(longer.stdout)["steps"] == 3
    assert CliRunner().invoke(app, ["simclr", "--config", str(file)]).exit_code == 2


# --- files and fields that anybody may have written ---------------------------------------------------------


def stored(tmp_path, change):
    """A run's `config.json` with `change` applied to its text."""
    facts = Facts(
        image_shape=(1, 28, 28), mean=(0.5,), std=(0.2,), batch_size=4, steps_per_epoch=1, total_steps=1
    )
    value = {"config": to_json(contract.tiny("rotnet")), "facts": to_json(facts)}
    file = tmp_path / "config.json"
    file.write_text(change(json.dumps(value)))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "[" * 100_000, "config.json is not JSON .*nested deeper.*expected a run's config.json"),
        (lambda text: text.replace('"steps": ', '"steps": NaN, "n": '), "NaN is not JSON"),
        (
            lambda text: text.replace('"items": {}', '"items": {"head": 3}'),
            "(backbone_args|optimizers): expected Mapping",
        ),
        (
            lambda text: text.replace(
                '"optimizers": {"type": "mapping", "items": {}',
                '"optimizers": {"type": "mapping", "items": {"head": {"type": "optim.Optimizer", "lr": "fast"}}',
            ),
            "optimizers: lr: expected a number, found 'fast'",
        ),
    ],
)
def test_a_file_by_hand_is_refused_before_the_run(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        read_config_file(stored(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda text: "[]", OutputError, "expected a run folder with a readable config.json"),
        (lambda text: "[" * 100_000, OutputError, "nested deeper"),
        (lambda text: text.replace('"facts": {', '"facts": 5, "was": {'), ConfigError, "found other JSON"),
        (
            lambda text: text.replace('"batch_size": ', '"batch_size": "many", "n": '),
            ConfigError,
            "'n'",
        ),
        (
            lambda text: text.replace('"precision": "', '"precision": "half'),
            ConfigError,
            "precision: expected",
        ),
    ],
)
def test_a_changed_run_is_not_resumed(tmp_path, change, error, message):
    stored(tmp_path, change)
    with pytest.raises(error, match=message):
        run.resume(tmp_path)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps=1" + "0" * 400, "steps: expected a whole number"),
        ("optimizers.head=3", "optimizers.head: expected Optimizer, found '3'"),
        ("backbone_args.x=" + "[" * 100_000, None),
        ("epochs=1e308", "epochs: expected 0 to 1e"),
        ("batch_size=" + "9" * 30, "batch_size: expected 1 to"),
        ("optimizer.betas=2,2", "optimizer.betas.0: expected 0 to 1"),
        ("optimizer.momentum=-5", "optimizer.momentum: expected 0 to 1"),
        ("optimizer.warmup_steps=-1", "optimizer.warmup_steps: expected 0"),
    ],
    ids=lambda text: None if text is None else text[:20],
)
def test_numbers_that_no_run_can_have(assignment, message):
    if message is None:  # what is no JSON is a text
        assert with_overrides(contract.tiny("rotnet"), [assignment]).backbone_args["x"].startswith("[[")
        return
    with pytest.raises(ConfigError, match=message):
        check_numbers(with_overrides(contract.tiny("rotnet"), [assignment]))


@pytest.mark.parametrize("numbers", [{"mean": (0.5, 0.5)}, {"mean": (0.5,)}, {"mean": (0.5,), "std": (0.0,)}])
def test_mean_and_std_are_one_number_a_channel(tmp_path, numbers):
    config = contract.tiny("rotnet")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **numbers))
    with pytest.raises(EntryError, match="preprocess.(mean|std): expected"):
        run.train(config, out=tmp_path / "run", progress=False)


def test_the_folder_of_a_run_is_below_runs(tmp_path, monkeypatch):
    from embedkit.cli.train import train as command

    def stop(*_, out, **__):
        raise ConfigError(out)

    monkeypatch.setattr(run, "train", stop)
    file = tmp_path / "c.json"
    file.write_text(json.dumps(to_json(dataclasses.replace(contract.tiny("rotnet"), recipe="../../else:x"))))
    with pytest.raises(ConfigError, match=r"^runs/else-x-2\d+-\d+$"):
        command(config=str(file))
