"""A run with evaluation while training: the same weights, the best ones kept, and an end where nothing improves."""

import csv
import json
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import contract
import lightning
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

from embedkit.errors import ConfigError
from embedkit.model.config import EntryConfig
from embedkit.training import callbacks, run
from embedkit.training.config import with_overrides
from embedkit.training.evaluation.online import HeldOut
from embedkit.training.export.from_run import export_run
from embedkit.training.run_folder import BEST, CHECKPOINT, read_checkpoint


def config(*settings):
    base = ["data.path=synthetic:80", "data.validation=0.2", "steps=13", "evaluation.every=4"]
    return with_overrides(contract.tiny("supervised"), [*base, *settings])


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def scores_of(folder):
    return {
        int(row["step"]): row["validation_knn_top1"] for row in rows_of(folder) if row["validation_knn_top1"]
    }


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name])
        if torch.is_tensor(first[name])
        else first[name] == second[name]
        for name in first
    )


class Fails(lightning.Callback):
    """Ends the process's work within a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, method, optimizer):
        if method.batches_seen == self.step:
            raise RuntimeError("killed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return run.train(config(), out=folder, progress=False)


def test_evaluation_changes_nothing_of_the_training(whole, tmp_path):
    run.train(config("evaluation.every=0"), out=tmp_path / "plain", progress=False)
    assert same(read_checkpoint(whole.run)["state_dict"], read_checkpoint(tmp_path / "plain")["state_dict"])
    assert not (tmp_path / "plain" / BEST).exists()
    costs = [json.loads((folder / "cost.json").read_text()) for folder in (whole.run, tmp_path / "plain")]
    assert costs[0]["training_flops"] == costs[1]["training_flops"]


def test_the_best_weights_are_the_result(whole):
    scores = scores_of(whole.run)
    assert list(scores) == [0, 4, 8, 12, 13]  # before the first step, every fourth, after the last
    best = max(scores.values(), key=float)
    assert whole.best_step == next(step for step, score in scores.items() if score == best)
    assert whole.metrics["validation_knn_top1"] == pytest.approx(float(best), rel=1e-5)
    assert whole.steps == 13 and whole.finished
    _, method = run.load_run(whole.run)
    assert method.batches_seen == whole.best_step
    assert same(method.encoder().net.state_dict(), load_file(whole.run / "encoder.safetensors"))
    _, last = run.load_run(whole.run, "last")
    assert last.batches_seen == 13


def test_tensorboard_has_the_evaluations(whole):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(whole.run / "tensorboard")).Reload().Scalars("validation_knn_top1")
    assert [event.step for event in found] == [0, 4, 8, 12, 13]
    assert [event.value for event in found] == pytest.approx(
        [float(s) for s in scores_of(whole.run).values()], rel=1e-5
    )


@pytest.mark.parametrize("step", [4, 7, 13])  # beside an evaluation, between two, and in the last step
def test_resume_makes_the_same_choices(whole, step, tmp_path):
    folder = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="killed"):
        run.train(config(), out=folder, progress=False, callbacks=[Fails(step)])
    result = run.resume(folder, progress=False)
    assert (result.best_step, result.steps) == (whole.best_step, 13)
    assert scores_of(folder) == scores_of(whole.run)
    for name in (CHECKPOINT, BEST):
        assert same(
            read_checkpoint(folder, name)["state_dict"], read_checkpoint(whole.run, name)["state_dict"]
        )
    states = [read_checkpoint(path)["callbacks"]["Best"] for path in (folder, whole.run)]
    assert states[0] == states[1]


def scripted(monkeypatch, *scores):
    left = list(scores)
    monkeypatch.setattr(HeldOut, "evaluate", lambda self, method: {"knn_top1": left.pop(0)})
    return left


def test_patience_ends_a_run_that_stopped_improving(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    left = scripted(monkeypatch, 0.1, 0.5, 0.5, 0.2, 0.9)
    settings = config("evaluation.patience=2", "evaluation.every=2", "steps=40")
    result = run.train(settings, out=folder)
    # evaluated before steps 1, 3, 5 and 7; an equal score is no better one; the step that began is still made
    assert (result.best_step, result.steps, result.finished) == (2, 7, True) and left == [0.9]
    assert "stopped: no better knn_top1 in 2 evaluations since step 2" in capsys.readouterr().err
    again = run.resume(folder, progress=False)
    assert (again.steps, again.finished, left) == (7, True, [0.9])
    # a run that is made longer is no longer over
    longer = run.resume(folder, overrides=["steps=8"], progress=False)
    assert (longer.steps, longer.best_step, left) == (8, 8, [])


def test_export_takes_the_best_and_says_so(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    scripted(monkeypatch, 0.1, 0.5, 0.3)
    run.train(config("evaluation.every=2", "steps=4"), out=folder, progress=False)
    entry = export_run(folder, "supervised-r10.toy", tmp_path / "zoo", license="CC0-1.0")
    assert "exported are the best weights, of step 2 of 4" in capsys.readouterr().err
    stored = EntryConfig.from_json((entry / "config.json").read_bytes())
    assert stored.provenance["weights"] == {"kept": "best", "step": 2}
    last = export_run(folder, "supervised-r10.last", tmp_path / "zoo", license="CC0-1.0", checkpoint="last")
    assert capsys.readouterr().err == ""
    weights = [load_file(path / "model.safetensors")["conv1.weight"] for path in (entry, last)]
    assert not torch.equal(*weights)
    with pytest.raises(ConfigError, match="--checkpoint: expected best or last, found 'first'"):
        export_run(folder, "supervised-r10.other", tmp_path / "zoo", checkpoint="first")


def test_a_budget_leaves_time_for_evaluations(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock.now)
    pauses = SimpleNamespace(every=5, seconds=0.0, count=0, due=lambda step: 10.0 * (step % 5 == 0))
    budget = callbacks.Budget(1000.0, lambda facts: None, pauses=pauses)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(broadcast=lambda value: value), is_global_zero=True, should_stop=False
    )
    method = SimpleNamespace(batches_seen=0, total_steps=None, facts=contract.build(config())[0].facts)
    budget.on_train_start(trainer, method)
    while method.total_steps is None:
        if method.batches_seen % 5 == 0:  # an evaluation of ten seconds
            clock.now, pauses.seconds, pauses.count = clock.now + 10, pauses.seconds + 10, pauses.count + 1
        budget.on_train_batch_start(trainer, method, None, 0)
        clock.now, method.batches_seen = clock.now + 1, method.batches_seen + 1
    # Planned at step 50, after 50 s of steps and 11 evaluations: 0.95 (1000 - 5 - 160) s less a last evaluation are
    # 783.25 s, and a step takes 1 + 10 / 5 s. Measured with the pauses in it, it would take 5 s, without them 1 s.
    assert method.total_steps == 50 + 261
    # the evaluation before the next step would end after the deadline
    clock.now, method.batches_seen = 990.0, 300
    budget.on_train_batch_end(trainer, method, None, None, 0)
    assert trainer.should_stop


def test_nothing_reads_the_test_part(tmp_path, monkeypatch):
    from embedkit.training.data import config as data

    splits = []
    monkeypatch.setattr(
        data,
        "open_source",
        lambda path, split, _open=data.open_source, **more: (
            splits.append(split) or _open(path, split, **more)
        ),
    )
    run.train(config("steps=1"), out=tmp_path / "run", progress=False)
    assert set(splits) == {"train"}


class Counts(lightning.Callback):
    """A callback of a user's own, with a state."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, trainer, method, outputs, batch, batch_idx):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state_dict):
        self.batches = state_dict["batches"]


def test_callbacks_and_loggers_of_ones_own(tmp_path):
    logger, counts = CSVLogger(tmp_path / "logs"), Counts()
    run.train(config("steps=4"), out=tmp_path / "run", progress=False, callbacks=[counts], logger=logger)
    assert counts.batches == 4
    logged = next((tmp_path / "logs").rglob("metrics.csv")).read_text()
    assert "loss" in logged and "validation_knn_top1" in logged
    more = Counts()
    run.resume(tmp_path / "run", overrides=["steps=6"], progress=False, callbacks=[more], logger=[logger])
    assert more.batches == 6
