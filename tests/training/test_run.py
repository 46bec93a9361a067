"""What a run promises: its folder, the same weights after kill -9, a kept time budget, and clear refusals."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from embedkit.errors import ConfigError, OutputError
from embedkit.training import callbacks, recipes, run
from embedkit.training.config import RunConfig, from_json, method_name, to_json, with_overrides
from embedkit.training.methods import method_class, names, simclr, supervised
from embedkit.training.run_folder import read_config

SMALL = [
    "threads=1",
    "batch_size=16",
    "data.image_size=16",
    "method.hidden_dim=32",
    "log_every=5",
    "checkpoint_seconds=0",
]


def small(name="simclr", *more):
    settings = [line for line in SMALL if name == "simclr" or not line.startswith("method.")]
    return with_overrides(recipes.recipe(name), [*settings, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A SimCLR run of 30 steps on 80 synthetic images: 6 epochs of 4 batches and a half."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return run.train(small("simclr", "steps=26"), data="synthetic:80", out=folder, progress=False)


def test_the_run_folder(finished):
    assert finished.finished and finished.steps == 26
    folder = finished.run
    stored = json.loads((folder / "config.json").read_text())
    assert stored["facts"]["total_steps"] == 26 and stored["facts"]["steps_per_epoch"] == 4  # 72 of 80 train
    assert stored["config"]["precision"] in ("bf16", "fp32") and stored["config"]["threads"] == 1
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["threads"] == 1 and environment["cpu"]
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20, 25, 26]
    assert all(float(row["loss"]) > 0 and float(row["images_per_second"]) > 0 for row in rows)
    assert list((folder / "tensorboard").glob("events*"))
    assert "validation_positive_is_nearest" in finished.metrics


def test_the_encoder_has_timm_names_and_the_runs_weights(finished):
    weights = load_file(finished.run / "encoder.safetensors")
    assert weights["conv1.weight"].shape == (32, 1, 3, 3) and not any("projector" in name for name in weights)
    config, method = run.load_run(finished.run)
    assert method_name(config) == "simclr" and method.batches_seen == 26 and not method.training
    for name, value in method.encoder().net.state_dict().items():
        assert torch.equal(value, weights[name])


def test_cost_counts_images_and_flops(finished):
    cost = json.loads((finished.run / "cost.json").read_text())
    assert cost["images"] == 26 * 16 and cost["training_flops"] == 26 * cost["flops_per_step"]
    # r10 at 16 px by hand, multiply-adds per image of its convolutions (side of the output, kernel, channels):
    at = {8: 9 * 1 * 32 + 2 * 9 * 32 * 32, 4: 9 * 32 * 64 + 9 * 64 * 64 + 32 * 64}
    at |= {2: 9 * 64 * 128 + 9 * 128 * 128 + 64 * 128, 1: 9 * 128 * 256 + 9 * 256 * 256 + 128 * 256}
    forward = sum(side * side * per_place for side, per_place in at.items())
    backbone = 3 * 2 * 32 * forward  # forward and twice backward, 2 FLOPs each, 32 views
    assert backbone * 0.99 < cost["flops_per_step"] < backbone * 1.02
    assert cost["energy_kwh"] * 3.6e6 == pytest.approx(cost["seconds"] * 10, rel=0.1, abs=4)


SCRIPT = """
import sys
from embedkit.training import recipes, run
from embedkit.training.run_folder import read_config
from embedkit.training.config import with_overrides
from embedkit.training.run_folder import read_config
run.train(with_overrides(recipes.recipe("simclr"), sys.argv[2:]), data="synthetic:80", out=sys.argv[1])
"""


def test_a_step_that_raises_leaves_no_counter_of_operations_behind(tmp_path, monkeypatch):
    def broken(self, batch, batch_idx):
        raise RuntimeError("broken step")

    monkeypatch.setattr(simclr.SimCLR, "training_step", broken)
    with pytest.raises(RuntimeError, match="broken step"):
        run.train(small("simclr", "steps=2"), data="synthetic:80", out=tmp_path / "run", progress=False)
    x = torch.ones(2, requires_grad=True)
    # a counter that is still open refuses the gradient of a leaf behind a module
    (gradient,) = torch.autograd.grad(torch.nn.Linear(2, 1)(x).square().sum(), x)
    assert gradient.shape == (2,)


def test_killed_and_resumed_gives_the_same_weights(finished, tmp_path):
    folder = tmp_path / "killed"
    # the same run, which would go on for long between the steps if it were not killed
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), *SMALL, "steps=26"],
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    metrics = folder / "metrics.csv"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)  # ten steps
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (folder / "encoder.safetensors").exists()
    seen = run.load_run(folder)[1].batches_seen
    assert 1 <= seen < 26
    result = run.resume(folder, progress=False)
    assert result.finished and result.steps == 26
    expected, found = (load_file(path / "encoder.safetensors") for path in (finished.run, folder))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    states = [torch.load(path / run.CHECKPOINT, weights_only=True) for path in (finished.run, folder)]
    assert_equal(*(state["state_dict"] for state in states))
    assert_equal(*(state["optimizer_states"] for state in states))
    with open(metrics, newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == [5, 10, 15, 20, 25, 26]
    # the order and the views go on too: a resumed run at the end changes nothing
    again = run.resume(folder, progress=False)
    assert again.finished and again.steps == 26


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.01)


def assert_equal(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    else:
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_a_time_budget_is_planned_stored_and_kept(tmp_path):
    folder = tmp_path / "run"
    begun = time.monotonic()
    result = run.train(small(), data="synthetic:80", out=folder, max_minutes=0.12, progress=False)
    assert time.monotonic() - begun < 0.12 * 60 + 1
    stored = json.loads((folder / "config.json").read_text())["facts"]["total_steps"]
    assert result.steps <= stored and result.steps > 5
    assert (folder / "encoder.safetensors").exists() and (folder / run.CHECKPOINT).exists()
    with open(folder / "metrics.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    if result.finished:  # else the machine slowed down, and the deadline came first
        assert rates[-1] < 0.01 * max(rates)
    assert run.load_run(folder)[1].total_steps == stored


def test_the_same_seed_gives_the_same_run_and_another_one_another(tmp_path):
    def weights(name, seed):
        config = small("supervised", "steps=3", f"seed={seed}")
        run.train(config, data="synthetic:80", out=tmp_path / name, progress=False)
        return load_file(tmp_path / name / "encoder.safetensors")["conv1.weight"]

    first = weights("a", 0)
    assert torch.equal(first, weights("b", 0)) and not torch.equal(first, weights("c", 1))


def test_a_run_is_never_overwritten_and_resume_needs_one(finished, tmp_path):
    with pytest.raises(OutputError, match="--resume"):
        run.train(small(), data="synthetic:80", out=finished.run)
    with pytest.raises(OutputError, match="config.json"):
        run.resume(tmp_path)
    (tmp_path / "config.json").write_bytes((finished.run / "config.json").read_bytes())
    with pytest.raises(OutputError, match="before its first checkpoint"):
        run.resume(tmp_path)
    with pytest.raises(OutputError, match="it has no checkpoint: remove it or choose another"):
        run.train(small(), data="synthetic:80", out=tmp_path)


def test_a_checkpoint_with_one_wrong_byte_is_damaged(finished, tmp_path):
    copy = shutil.copytree(finished.run, tmp_path / "run")
    data = bytearray((copy / run.CHECKPOINT).read_bytes())
    data[len(data) // 2] ^= 0xFF  # torch.load takes it for another weight
    (copy / run.CHECKPOINT).write_bytes(data)
    for act in (run.load_run, run.resume):
        with pytest.raises(OutputError, match="is damaged"):
            act(copy)


def test_a_folder_with_another_encoder_is_not_trained_into(tmp_path):
    (tmp_path / "encoder.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"encoder\.safetensors is there, and would be overwritten"):
        run.train(small(), data="synthetic:80", out=tmp_path)


def test_a_training_that_diverged_is_no_success(tmp_path):
    with pytest.raises(ConfigError, match=r"diverged.*lower optimizer\.lr"):
        run.train(
            small("supervised", "optimizer.lr=1e6", "steps=12"),
            data="synthetic:80",
            out=tmp_path,
            progress=False,
        )


def test_identities_need_labels(tmp_path):
    from PIL import Image

    for number in range(4):
        Image.new("L", (16, 16), number).save(tmp_path / f"{number}.png")
    config = small("sphereface", "data.validation=0", "batch_size=4", "steps=1")
    with pytest.raises(ConfigError, match=r"data\.label: batches of identities need labels"):
        run.train(config, data=str(tmp_path), out=tmp_path / "run")


def test_settings_that_are_refused_leave_the_folder_free(tmp_path):
    with pytest.raises(ConfigError, match="do not fit this machine"):
        run.train(small("supervised", "accelerator=tpu", "steps=1"), data="synthetic:80", out=tmp_path)
    done = run.train(small("supervised", "steps=1"), data="synthetic:80", out=tmp_path, progress=False)
    assert done.finished and done.steps == 1


@pytest.mark.parametrize("name", recipes.summaries())
def test_every_recipe_survives_json(name):
    config = recipes.recipe(name)
    assert isinstance(config, RunConfig) and config.recipe == name
    assert recipes.summaries()[name].endswith(".")
    text = json.dumps(to_json(config))
    assert from_json(json.loads(text)) == config
    assert method_name(config) in names() and method_class(method_name(config))


def test_json_makes_nothing_but_our_dataclasses():
    for kind in ("os.system", "run.train", "..errors.EmbedkitError", ""):
        with pytest.raises(ConfigError, match="type: this embedkit has no"):
            from_json({"type": kind})
    with pytest.raises(ConfigError, match="did you mean 'warmup_steps'"):
        from_json({"type": "optim.Optimizer", "warmup_step": 1})


def test_overrides_are_typed_by_the_dataclass():
    config = with_overrides(
        recipes.recipe("simclr"),
        ["method.temperature=0.5", "optimizer.betas=0.8,0.9", "epochs=3", "data.stream=true", "backbone=r18",
         "method.augment.steps.0.scale=0.3, 1"],
    )  # fmt: skip
    assert (config.method.temperature, config.optimizer.betas) == (0.5, (0.8, 0.9))
    assert (config.epochs, config.data.stream, config.backbone) == (3.0, True, "r18")
    assert config.method.augment.steps[0].scale == (0.3, 1.0)
    assert config.method == dataclasses.replace(
        simclr.Config(temperature=0.5), augment=config.method.augment
    )  # the rest is untouched
    assert recipes.recipe("simclr").method.temperature == 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method.temperatur=1", "did you mean 'temperature'"),
        ("lr=1", "RunConfig has no field 'lr'"),
        ("optimizer.lr=fast", "expected a number, found 'fast'"),
        ("optimizer.lr=nan", "expected a number"),
        ("batch_size=1.5", "expected a whole number"),
        ("data.stream=maybe", "expected true or false"),
        ("optimizer.betas=0.9", "expected 2 values"),
        ("precision=fp8", "expected one of auto, bf16, fp16, fp32"),
        ("optimizer=adam", "set one of its fields"),
        ("seed.x=1", "one name too many"),
        ("method.augment.steps.9.scale=0,1", "expected a number of 0 to 2"),
        ("seed", "expected field=value"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(recipes.recipe("simclr"), [text])


def test_unknown_names_give_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'simclr'"):
        recipes.recipe("simcrl")
    with pytest.raises(ConfigError, match="did you mean 'photos'"):
        recipes.recipe("simclr:photo")
    with pytest.raises(ConfigError, match="did you mean 'supervised'"):
        method_class("supervise")


def test_the_command_trains_resumes_and_refuses(tmp_path):
    typer = pytest.importorskip("typer")
    from typer.testing import CliRunner

    from embedkit.cli.train import train

    app = typer.Typer()
    app.command()(train)
    folder = str(tmp_path / "run")
    settings = [part for line in [*SMALL, "steps=2"] for part in ("--set", line)]
    made = CliRunner().invoke(app, ["simclr", "--data", "synthetic:80", "-o", folder, "--json", *settings])
    assert made.exit_code == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["run"] == folder and result["finished"] and result["cost"]["images"] == 32
    assert "step 2/2" in made.stderr and "images/s" in made.stderr and "min left" in made.stderr
    again = CliRunner().invoke(app, ["--resume", folder, "--quiet"])
    assert again.exit_code == 0 and (again.stdout.strip(), again.stderr) == (folder, "")
    shown = CliRunner().invoke(app, ["--list", "--json"])
    assert json.loads(shown.output) == recipes.summaries() and "simclr:photos" in recipes.summaries()
    assert CliRunner().invoke(app, []).exit_code == 2
    for more in (["-o", folder], ["--set", "seed=1"], ["--data", "synthetic:81"]):
        refused = CliRunner().invoke(app, ["--resume", folder, *more])
        assert isinstance(refused.exception, ConfigError)


def test_supervised_needs_labels(tmp_path):
    config = small("supervised", "steps=2")
    assert isinstance(config.method, supervised.Config)
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.new("L", (16, 16), number).save(tmp_path / "images" / f"{number}.png")
    with pytest.raises(ConfigError, match="expected labels of 2 or more classes"):
        run.train(config, data=str(tmp_path / "images"), out=tmp_path / "run")


def test_a_run_that_met_its_deadline_goes_on_to_the_same_weights(finished, tmp_path, monkeypatch):
    folder = tmp_path / "late"
    ended = callbacks.Budget.on_train_batch_end

    def late(budget, trainer, method, *rest):
        ended(budget, trainer, method, *rest)
        trainer.should_stop = trainer.should_stop or method.batches_seen == 11

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Budget, "on_train_batch_end", late)
        config, _ = read_config(finished.run)
        stopped = run.train(config, out=folder, progress=False)
    assert (stopped.finished, stopped.steps) == (False, 11)
    again = run.resume(folder, progress=False)
    assert (again.finished, again.steps) == (True, 26)
    weights = [load_file(path / "encoder.safetensors") for path in (finished.run, folder)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("damage", [b"", b"junk", None])
def test_a_damaged_checkpoint_is_said_to_be_damaged(finished, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(finished.run, folder)
    path = folder / run.CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000] if damage is None else damage)
    for act in (run.load_run, run.resume):
        with pytest.raises(OutputError, match="is damaged .*; train again into a new folder"):
            act(folder)


@pytest.mark.parametrize(
    "setting", ["seed=-1", "threads=-1", "log_every=0", "optimizer.lr=-1", "accelerator=cuda", "devices=0"]
)
def test_settings_that_no_run_can_have(tmp_path, setting):
    if setting == "accelerator=cuda" and torch.cuda.is_available():
        pytest.skip("there is such a device here")
    with pytest.raises(ConfigError, match=setting.partition("=")[0]):
        run.train(small("simclr", setting), data="synthetic:60", out=tmp_path / "run", progress=False)


def test_a_place_that_cannot_hold_a_run(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another --output"):
        run.train(small(), data="synthetic:60", out=tmp_path / "file" / "run", progress=False)
