"""Accumulated gradients, fp16's scaled gradients, and a compiled backbone."""

import dataclasses
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

import contract
from torch import nn

from embedkit.errors import ConfigError
from embedkit.training import build, callbacks, run
from embedkit.training.augment import Compose
from embedkit.training.build import planned_steps, resolve_precision
from embedkit.training.config import with_overrides
from embedkit.training.models.backbones import Backbone
from embedkit.training.optim import Optimizer
from embedkit.training.run_folder import read_checkpoint


def plain(name, *settings, **optimizer):
    """A run without randomness of views, and without BatchNorm, which would see the smaller batches."""
    config = contract.tiny(name)
    method = dataclasses.replace(config.method, augment=Compose(steps=()))
    given = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "schedule": "constant"}
    config = dataclasses.replace(
        config, method=method, optimizer=Optimizer(**{**given, "warmup_steps": 0, **optimizer})
    )
    return with_overrides(config, ["data.path=synthetic:64", "backbone_args.norm=group", *settings])


def weights(folder):
    state = read_checkpoint(folder)["state_dict"]
    return torch.cat([value.flatten() for value in state.values() if torch.is_tensor(value)])


@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_accumulated_gradients_are_those_of_the_large_batch(clip_norm, tmp_path):
    # the order of an epoch is one permutation, cut into batches: two of 8 are one of 16
    large = plain("supervised", "batch_size=16", "steps=6", clip_norm=clip_norm)
    small = plain("supervised", "batch_size=8", "steps=12", clip_norm=clip_norm, accumulate=2)
    other = plain("supervised", "batch_size=8", "steps=12", clip_norm=clip_norm)
    for name, config in (("large", large), ("small", small), ("other", other)):
        run.train(config, out=tmp_path / name, progress=False)
    expected = weights(tmp_path / "large")
    torch.testing.assert_close(weights(tmp_path / "small"), expected, rtol=1e-4, atol=1e-6)
    assert (weights(tmp_path / "other") - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["supervised", "simclr", "triplet", "contrastive"])
def test_which_losses_are_not_means_over_images_is_said(name, tmp_path):
    # the batch in two halves, with the same views in both: none, and a backbone that normalizes each image alone
    config = plain(name, "batch_size=16")
    method, batch = contract.build(config)
    order = batch.labels.argsort(stable=True)  # some images of a half are of one class
    parts = [
        type(batch)(batch.images[rows], batch.labels[rows], batch.indices[rows])
        for rows in (order, order[:8], order[8:])
    ]
    if name == "simclr":  # its projector has BatchNorm
        method.eval()
    with torch.no_grad():
        whole, *halves = (float(method.loss(part, method.generator())["loss"]) for part in parts)
    equal = whole == pytest.approx(sum(halves) / 2, rel=1e-4)
    assert equal == (not method.compares_images)
    said = build.check_method(with_overrides(config, ["optimizer.accumulate=4"]), method)
    assert said == "" if equal else "4 batches of 16 make one step" in said and "one batch of 64" in said


def test_a_run_ends_after_whole_steps(tmp_path):
    config = plain("supervised", "batch_size=8", "steps=11", accumulate=4)
    assert planned_steps(config, 8) == 8
    with pytest.raises(ConfigError, match="3 batches are less than one step of 4"):
        planned_steps(with_overrides(config, ["steps=3"]), 8)
    with pytest.raises(
        ConfigError, match=r"evaluation\.every: expected a multiple of optimizer\.accumulate, 4"
    ):
        run.train(with_overrides(config, ["evaluation.every=6"]), out=tmp_path / "run", progress=False)


def test_a_deadline_within_a_step_loses_no_gradient(tmp_path, monkeypatch):
    config = plain("supervised", "batch_size=8", "steps=12", accumulate=3)
    whole = run.train(config, out=tmp_path / "whole", progress=False)

    ended = callbacks.Budget.on_train_batch_end

    def late(budget, trainer, method, *rest):
        budget.deadline = 0.0 if method.batches_seen >= 4 else None
        ended(budget, trainer, method, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Budget, "on_train_batch_end", late)
        cut = run.train(config, out=tmp_path / "cut", progress=False)
    assert (cut.steps, cut.finished) == (6, False)
    run.resume(tmp_path / "cut", progress=False)
    assert torch.equal(weights(tmp_path / "cut"), weights(whole.run))


# --- fp16 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_scaled_gradients_are_clipped_by_their_true_norm(kind):
    config = plain(
        "supervised", "batch_size=16", f"optimizer.name={kind}", "optimizer.weight_decay=0", clip_norm=0.01
    )
    method, batch = contract.build(config)
    optimizer = method.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    method._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    scaler.scale(method.loss(batch, method.generator())["loss"]).backward()
    if kind == "sgd":  # as Lightning does for an optimizer that does not do it by itself
        scaler.unscale_(optimizer)
    method.configure_gradient_clipping(optimizer)
    scaler.step(optimizer)
    # what the optimizer saw: the first gradient is SGD's momentum, and a tenth of it is Adam's first moment
    name, share = ("momentum_buffer", 1.0) if kind == "sgd" else ("exp_avg", 0.1)
    seen = torch.stack([state[name].norm() for state in optimizer.state.values()]).norm() / share
    assert float(seen) == pytest.approx(0.01, rel=1e-3)


def test_fp16_needs_a_gpu_and_one_optimizer(monkeypatch):
    config = with_overrides(contract.tiny("supervised"), ["precision=fp16", "accelerator=cpu"])
    with pytest.raises(ConfigError, match="fp16 is for GPUs; on a CPU take bf16 or fp32"):
        resolve_precision(config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "multiplies_bf16", lambda accelerator: False)
    automatic = with_overrides(config, ["precision=auto", "accelerator=auto"])
    assert resolve_precision(automatic) == "fp16"
    assert resolve_precision(with_overrides(automatic, ["accelerator=cpu"])) == "fp32"
    method, _ = contract.build(contract.tiny("bigan"))
    with pytest.raises(ConfigError, match="several networks, which fp16 cannot"):
        build.check_method(with_overrides(contract.tiny("bigan"), ["precision=fp16"]), method)


# --- compilation ----------------------------------------------------------------------------------------------


def test_a_compiled_backbone_is_the_backbone(tmp_path, monkeypatch):
    import torch._dynamo as dynamo

    compiled = []

    def compile_eagerly(self):  # traced as by the real one, and then run without a compiler
        compiled.append(type(self))
        nn.Module.compile(self, backend="aot_eager")

    monkeypatch.setattr(Backbone, "compile", compile_eagerly)
    dynamo.reset()
    dynamo.utils.counters.clear()
    results = {}
    for setting in ("false", "true"):
        config = plain("supervised", "batch_size=16", "steps=3", f"compile={setting}")
        results[setting] = run.train(config, out=tmp_path / setting, progress=False)
    assert compiled == [Backbone] and dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    torch.testing.assert_close(weights(tmp_path / "true"), weights(tmp_path / "false"), rtol=1e-3, atol=1e-5)
    flops = [result.cost["training_flops"] for result in results.values()]
    assert flops[0] == flops[1]
    names = [set(read_checkpoint(tmp_path / setting)["state_dict"]) for setting in results]
    assert names[0] == names[1]
