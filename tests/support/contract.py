"""What every method promises, as checks of one method: `test_contract.py` runs them over all, and over mutants.

A method is checked in the configuration of its recipe's `tiny()`, or of `recipe()` with batches of 16.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
from dataclasses import dataclass

import torch

from embedkit.training import run
from embedkit.training.augment import Augmentation
from embedkit.training.config import RunConfig
from embedkit.training.optim import Optimizer

#: Images of the one batch that is seen again and again.
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Inverted(Augmentation):
    """A probe: what it is put in place of is seen to have been applied."""

    def apply(self, x, parameters):
        return 1 - x


def tiny(name: str) -> RunConfig:
    """The smallest run of a method, over one batch of synthetic images."""
    module = importlib.import_module(f"embedkit.training.recipes.{name}")
    given = hasattr(module, "tiny")
    config = (module.tiny if given else module.recipe)()
    size = min(config.batch_size, BATCH)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            path=f"synthetic:{BATCH}",
            validation=0.0,
            labels_per_class=min(config.data.labels_per_class, 1),
            stream=False,
        ),
        optimizer=Optimizer(name="adamw", lr=2e-3, weight_decay=0.0, schedule="constant", warmup_steps=0),
        optimizers={},
        batch_size=size,
        steps=16,
        precision="fp32",
        threads=1,
        log_every=1,
        checkpoint_seconds=0.0,
    )


def build(config: RunConfig, seen: int = 3):
    """The method with weights off their starting point, in the middle of a run, and its batch."""
    images, _ = run.open_data(config)
    facts = run.facts_of(config, images, total_steps=8)
    method = run.build_method(config, facts)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in method.parameters():
            # what starts at zero is moved far, so that no branch or class is without effect
            spread = float(parameter.std()) if parameter.ndim > 1 else 0.1
            parameter.add_((0.3 * spread or 0.5) * torch.randn_like(parameter))
    method.batches_seen = seen
    rows = config.data.sampler.epoch(images, config.batch_size, 0, 0)[0]
    return method, images.batch(rows)


def loss_of(method, batch) -> torch.Tensor:
    """The loss of a batch, which leaves the method as it was."""
    torch.manual_seed(0)
    twin = copy.deepcopy(method).train()
    return twin.loss(batch, twin.generator())["loss"]


def augmentations(config) -> list[str]:
    """The fields of a method's Config that are augmentations."""
    return [f.name for f in dataclasses.fields(config) if isinstance(getattr(config, f.name), Augmentation)]


def check_augmentations_reach_the_backbone(config: RunConfig) -> None:
    def seen_by_backbone(run_config):
        method, batch = build(run_config)
        inputs: list[torch.Tensor] = []
        leaves = [m for m in method.backbone.modules() if not list(m.children())]
        for leaf in leaves:
            leaf.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
        method.train().loss(batch, method.generator())
        assert inputs, "no module of the backbone is called"
        return inputs

    def first(inputs, shape):  # what the first layer sees, in all passes
        return [x for x in inputs if x.shape[1:] == shape]

    plain = seen_by_backbone(config)
    for name in augmentations(config.method):
        changed = dataclasses.replace(config.method, **{name: Inverted()})
        found = seen_by_backbone(dataclasses.replace(config, method=changed))
        shape = plain[0].shape[1:]
        before, after = first(plain, shape), first(found, shape)
        same = len(before) == len(after) and all(
            a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)
        )
        assert not same, f"{name}: the backbone sees the same images whatever this augmentation is"


def check_labels(config: RunConfig) -> None:
    """Labels change nothing where the method says that it uses none, and something where it does."""
    method, batch = build(config)
    generator = torch.Generator().manual_seed(0)
    others = (batch.labels + torch.randint(1, 10, batch.labels.shape, generator=generator)) % 10
    labels = torch.where(batch.labels >= 0, others, batch.labels)
    other = batch._replace(labels=labels, targets={k: v.flip(0) for k, v in batch.targets.items()})
    if method.uses_labels:
        assert loss_of(method, batch) != loss_of(method, other), "labels change nothing"
        return
    hidden = batch._replace(labels=torch.full_like(batch.labels, -1), targets={})
    for changed in (other, hidden):
        assert torch.equal(loss_of(method, batch), loss_of(method, changed)), "the loss depends on labels"


def check_streams(config: RunConfig) -> None:
    """The randomness that the method says it has, and no other, changes the loss."""
    method, batch = build(config)
    asked: set[str] = set()
    shifted: str = ""
    kind = type(method)

    def generator(self, purpose="views"):
        asked.add(purpose)
        return torch.Generator().manual_seed(self._seed(purpose + ("?" if purpose == shifted else "")))

    patched = type("Watched", (kind,), {"generator": generator})
    method.__class__ = patched
    before = loss_of(method, batch)
    assert torch.equal(before, loss_of(method, batch)), "the same seed gives another loss"
    assert asked - {"views"} == set(method.streams), f"streams: {sorted(asked)} are asked for"
    for shifted in method.streams:
        assert not torch.equal(before, loss_of(method, batch)), f"the draw of {shifted!r} changes nothing"


def check_gradient(config: RunConfig, monkeypatch) -> None:
    """Nothing in the loss is held constant, or something is, where the method says so.

    The gradient is taken twice: as it is, and with `detach` and `no_grad` of no effect.
    """
    method, batch = build(config)

    def gradient() -> dict[str, torch.Tensor]:
        twin = copy.deepcopy(method).train()
        parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        with monkeypatch.context() as patch:
            if not stops:
                patch.setattr(torch.Tensor, "detach", lambda self: self)
                patch.setattr(torch, "no_grad", contextlib.nullcontext)
            torch.manual_seed(0)
            loss = twin.loss(batch, twin.generator())["loss"]
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}

    stops = True
    own = gradient()
    assert any(g.any() for g in own.values()), "no gradient"
    stops = False
    open_ = gradient()
    differs = own.keys() != open_.keys() or any(
        not torch.allclose(own[name], open_[name], rtol=1e-3, atol=1e-5 * float(own[name].abs().max()))
        for name in own
    )
    assert differs == method.stops_gradient, (
        f"without any detach the gradient {'differs' if differs else 'is the same'}; "
        f"stops_gradient is {method.stops_gradient}"
    )


def check_fields(config: RunConfig) -> None:
    """Every number of the Config changes the loss, its gradient or the network, unless it is listed as inert."""
    method, batch = build(config)

    def outcome(run_config):
        try:
            method, batch = build(run_config)
        except Exception as error:
            return str(error)
        values = [loss_of(method, batch).detach().double()]
        other, _ = build(run_config, seen=6)
        values.append(loss_of(other, batch).detach().double())
        encoder = {name: tuple(value.shape) for name, value in method.encoder().state_dict().items()}
        state = {
            name: tuple(value.shape) for name, value in method.state_dict().items() if hasattr(value, "shape")
        }
        return [float(v) for v in values], encoder, state, [str(m) for m in method.modules()]

    before = outcome(config)
    for field in dataclasses.fields(config.method):
        value = getattr(config.method, field.name)
        if type(value) not in (int, float) or field.name in method.inert:
            continue
        others = (
            (value + 1, 2 * value) if type(value) is int else (0.7 * value + 0.11, 0.1 * value, 5 * value)
        )
        changed = (dataclasses.replace(config.method, **{field.name: other}) for other in others)
        differs = any(outcome(dataclasses.replace(config, method=method)) != before for method in changed)
        assert differs, f"{field.name}: {value} or any of {others} make no difference"


def check_overfits(config: RunConfig) -> None:
    """The loss of one batch, in one view of it, falls."""
    images, _ = run.open_data(config)
    method = run.build_method(config, run.facts_of(config, images, total_steps=8)).train()
    batch = images.batch(config.data.sampler.epoch(images, config.batch_size, 0, 0)[0])
    optimizer = torch.optim.Adam((p for p in method.parameters() if p.requires_grad), lr=2e-3)
    losses = []
    for _ in range(30):
        method.batches_seen = 3
        torch.manual_seed(0)
        loss = method.loss(batch, method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    first, last = losses[0], losses[-1]
    falls = last < first - 0.03 * max(0.3, abs(first))  # a cross-entropy of pixels has a floor
    assert falls or not method.overfits, f"the loss of one batch goes from {first:.4g} to {last:.4g}"


def check_resume(config: RunConfig, finished, folder, monkeypatch) -> None:
    """Killed in the middle and resumed, a run has the weights that it would have had, bit for bit."""
    kind = run.method_class(run.method_name(config))
    whole, steps = kind.training_step, []

    def stopping(self, batch, batch_idx):
        steps.append(1)
        if len(steps) == 9:
            raise RuntimeError("killed")
        return whole(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "training_step", stopping)
        try:
            run.train(config, out=folder, progress=False)
        except RuntimeError as error:
            assert str(error) == "killed"
    run.resume(folder, progress=False)
    resumed, expected = run.load_run(folder)[1].state_dict(), run.load_run(finished)[1].state_dict()
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        same = (
            torch.equal(value, resumed[name]) if isinstance(value, torch.Tensor) else value == resumed[name]
        )
        assert same, f"{name} differs after a resume"
