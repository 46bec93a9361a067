"""DeepDPM on images: its stages, its alternation, its three kinds of codes, and a resumed run whose K changed."""

import csv
import dataclasses
import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
stats = pytest.importorskip("scipy.stats")

from safetensors.numpy import load
from safetensors.torch import load_file, save_file

from embedkit.errors import ConfigError
from embedkit.model.layout import CARD, MANIFEST, MIXTURE, sha256_hex
from embedkit.model.manifest import Manifest
from embedkit.training import recipes, run
from embedkit.training.config import with_overrides
from embedkit.training.export.from_run import export_run
from embedkit.training.methods import deepdpm
from embedkit.training.methods.deepdpm import (
    DeepDPM,
    alternation_loss,
    alternation_plan,
    clusters,
    reduction,
)
from embedkit.training.models.backbones import create_backbone
from embedkit.training.run_folder import read_config
from embedkit.training.stages import stage_at

SMALL = [
    *(
        "threads=1",
        "precision=fp32",
        "batch_size=16",
        "data.image_size=16",
        "log_every=1",
        "optimizer.warmup_steps=5",
    ),
    *("method.clusters.warm_epochs=1", "method.clusters.first_move=2", "method.clusters.move_every=2"),
    *("method.clusters.frozen_epochs=0", "method.clusters.init_k=2", "method.code_dim=4"),
]


def train(folder, *settings, data="synthetic:120"):
    config = with_overrides(recipes.recipe("deepdpm"), [*SMALL, *settings])
    return run.train(config, data=data, out=folder, progress=False)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """54 steps: 30 of the autoencoder, 6 that encode 96 of 108 images, 18 of the clusters."""
    return train(tmp_path_factory.mktemp("runs") / "whole", "steps=54", "method.rounds=1")


# ---- stages and losses -----------------------------------------------------------------------------------


def kinds(total, epoch, rounds, trained):
    plan = alternation_plan(total, epoch, rounds=rounds, trained=trained)
    return [stage_at(step, plan) for step in range(total)]


def test_a_round_trains_encodes_and_clusters():
    found = kinds(120, 10, 3, True)
    assert [s.name for s in found[:40]] == ["autoencoder"] * 20 + ["encode"] * 10 + ["cluster"] * 10
    assert [s.name for s in found] == [s.name for s in found[:40]] * 3
    assert [s.round for s in found] == [0] * 40 + [1] * 40 + [2] * 40
    assert [s.left for s in found[:40]] == [*range(19, -1, -1), *range(9, -1, -1), *range(9, -1, -1)]


def test_rounds_are_fewer_where_they_would_be_short_and_every_run_ends_with_clusters():
    assert {s.round for s in kinds(119, 10, 3, True)} == {0, 1}
    assert {s.round for s in kinds(12, 10, 3, True)} == {0}
    for total in (4, 5, 7, 12, 119, 121):
        found = kinds(total, 10, 3, True)
        assert found[-1].name == "cluster" and found[-1].left == 0
        for number in {s.round for s in found}:
            order = [s.name for s in found if s.round == number]
            assert order == sorted(order, key=["autoencoder", "encode", "cluster"].index)
    given = kinds(40, 10, 1, False)
    assert [s.name for s in given] == ["encode"] * 10 + ["cluster"] * 30
    # while a time budget is measured nothing but the first stage happens
    assert stage_at(49, alternation_plan(None, 10, rounds=3, trained=True)).name == "autoencoder"
    assert stage_at(49, alternation_plan(None, 10, rounds=3, trained=False)).name == "encode"


def test_alternation_loss_by_hand_and_no_gradient_to_the_means():
    decoded, x = torch.zeros(2, 1, 2, 2, requires_grad=True), torch.ones(2, 1, 2, 2)
    codes = torch.tensor([[0.0, 0.0], [3.0, 3.0]], requires_grad=True)
    means = torch.tensor([[1.0, 0.0], [3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    # 4 pixels off by 1; squared distances to the nearest mean 1 and 4
    loss = alternation_loss(decoded, x, codes, means, (0.005, 1.0))
    assert float(loss.detach()) == pytest.approx(0.005 * 4 + 0.5 * (1 + 4) / 2)
    loss.backward()
    assert means.grad is None
    # d/dz of 1/2 |z - mu|^2 over 2 rows: (z - mu) / 2
    torch.testing.assert_close(codes.grad, torch.tensor([[-0.5, 0.0], [0.0, 1.0]]))
    assert float(alternation_loss(decoded, x, codes, means, (1.0, 0.0)).detach()) == pytest.approx(4.0)


# ---- runs ------------------------------------------------------------------------------------------------


def test_a_run_has_its_stages_and_its_clusters_say_more_than_one_gaussian(finished):
    assert finished.finished
    found = rows(finished.run)
    assert [float(row["reconstruction"]) for row in found[:30]][-1] < 0.8 * float(found[0]["reconstruction"])
    clusters = [float(row["clusters"]) for row in found[36:]]
    assert clusters[0] == 2 and len(set(clusters)) > 1  # from init_k, and moved
    assert clusters[-1] == clusters[-2]  # nothing moves at the very end
    assert finished.metrics["validation_gain_over_one_gaussian"] > 0.1
    _, method = run.load_run(finished.run)
    assert method.known.sum() == 96  # six batches of 16
    assert torch.equal(method.known, method.labels >= 0)
    assert torch.equal(method.labels[method.known], method.clusters.assign(method.codes[method.known]))


def test_the_autoencoder_ends_its_stage_at_a_small_rate(finished):
    rates = [float(row["lr"]) for row in rows(finished.run)][:30]
    optimizer = run.load_run(finished.run)[0].optimizer
    assert rates == pytest.approx([optimizer.lr_at(step, 30) for step in range(30)], rel=1e-4)
    assert rates[-1] < 0.02 * max(rates)


def test_rounds_forget_the_labels_of_images_that_they_left_out(tmp_path):
    result = train(tmp_path / "run", "steps=72", "method.rounds=3")
    _, method = run.load_run(result.run)
    assert method.known.sum() == 96  # of 108, and others in every round
    assert torch.equal(method.known, method.labels >= 0)


def test_more_components_than_columns_are_refused(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"reduce_dim: 4 columns have 1 to 4 principal components, found 5; .*method\.weights",
    ):
        train(tmp_path / "run", "steps=54", "method.reduce=pca", "method.reduce_dim=5")


def test_overfits_one_batch(tmp_path):
    settings = ["steps=160", "method.rounds=1", "optimizer.lr=0.005", "data.validation=0"]
    result = train(
        tmp_path / "run", *settings, data="synthetic:16"
    )  # an epoch is one batch, so all but 41 steps train
    errors = [float(row["reconstruction"]) for row in rows(result.run) if row.get("reconstruction")]
    assert len(errors) > 100 and errors[118] < 0.1 * errors[0]
    _, method = run.load_run(result.run)
    assert method.known.all() and len(method.mixture()["weights"]) >= 1


def test_the_cost_of_each_kind_of_step_is_its_own(finished):
    cost = json.loads((finished.run / "cost.json").read_text())
    state = torch.load(finished.run / run.CHECKPOINT, weights_only=True)
    each = state["callbacks"]["Cost"]["flops_per_step"]
    assert each.keys() == {"autoencoder", "encode", "cluster"}
    assert each["encode"] < each["autoencoder"] / 3  # no decoder and nothing backward
    assert cost["training_flops"] == 30 * each["autoencoder"] + 6 * each["encode"] + 18 * each["cluster"]


def test_an_entry_of_the_run_holds_its_mixture(finished, tmp_path):
    folder = export_run(
        finished.run, "deepdpm-r10.synthetic", tmp_path, limits=["It knows\nsynthetic images alone."]
    )
    assert "\n- It knows synthetic images alone.\n" in (folder / CARD).read_text()
    assert (folder / MIXTURE).read_bytes() == run.load_run(finished.run)[1].files()[MIXTURE]
    manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
    assert manifest.files[MIXTURE].sha256 == sha256_hex((folder / MIXTURE).read_bytes())


def test_the_encoder_makes_the_codes_that_were_clustered(finished):
    _, method = run.load_run(finished.run)
    config, _ = read_config(finished.run)
    images, _ = run.open_data(config)
    batch = images.batch(method.known.nonzero()[:10, 0])
    with torch.no_grad():
        codes = method.encoder()(method.view(batch.images))
    assert codes.shape == (10, 4)
    torch.testing.assert_close(codes, method.codes[method.known][:10], atol=1e-5, rtol=1e-4)
    names = load_file(finished.run / "encoder.safetensors")
    assert "1.0.weight" in names and not any("decoder" in name or "clusters" in name for name in names)


KILLED = """
import os, signal, sys
from embedkit.training import recipes, run
from embedkit.training.run_folder import read_config
from embedkit.training.config import with_overrides
from embedkit.training.methods.deepdpm import DeepDPM
from embedkit.training.run_folder import read_config

folder, at, *settings = sys.argv[1:]
step = DeepDPM.training_step
def killing(method, batch, batch_idx):
    step(method, batch, batch_idx)
    if method.batches_seen == int(at) + 1:
        os.kill(os.getpid(), signal.SIGKILL)
DeepDPM.training_step = killing
if settings:
    config = with_overrides(recipes.recipe("deepdpm"), settings)
    run.train(config, data="synthetic:120", out=folder, progress=False)
else:
    run.resume(folder, progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is of POSIX")
def test_a_killed_run_goes_on_with_as_many_clusters_as_it_had(finished, tmp_path):
    sizes = [row["clusters"] for row in rows(finished.run)[36:]]
    assert sizes[1] != sizes[2] == sizes[3]  # the first split
    folder = tmp_path / "killed"
    settings = [*SMALL, "steps=54", "method.rounds=1", "checkpoint_seconds=0"]
    for at in (33, 39):  # half encoded, and after K changed
        command = [sys.executable, "-c", KILLED, str(folder), str(at), *settings]
        assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
        settings = []
        assert run.load_run(folder)[1].batches_seen == at
    assert len(run.load_run(folder)[1].clusters) == float(sizes[2])
    assert run.resume(folder, progress=False).finished
    states = [torch.load(path / run.CHECKPOINT, weights_only=True) for path in (finished.run, folder)]
    same(*(state["state_dict"] for state in states))
    same(*(state["optimizer_states"] for state in states))
    assert [row["clusters"] for row in rows(folder)[36:]] == sizes


def same(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            same(one, other)
    else:
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_labels_are_never_looked_at(finished, tmp_path):
    hidden = train(tmp_path / "hidden", "steps=54", "method.rounds=1", "data.labels_per_class=1")
    first, second = (load_file(path / "encoder.safetensors") for path in (finished.run, hidden.run))
    same(first, second)
    assert torch.equal(run.load_run(finished.run)[1].labels, run.load_run(hidden.run)[1].labels)


def test_the_mixture_as_arrays(finished):
    _, method = run.load_run(finished.run)
    data = method.files()[MIXTURE]
    arrays = load(data)
    assert b'"transform":"none"' in data[:2000]
    assert all(array.dtype == np.float64 for array in arrays.values())
    k, d = arrays["means"].shape
    assert arrays["weights"].sum() == pytest.approx(1) and (arrays["weights"] > 0).all()
    assert arrays["components"].shape == (4, d) and k == len(method.labels[method.known].unique())
    h = np.random.default_rng(0).standard_normal((5, 4))
    y = (h - arrays["center"]) @ arrays["components"]
    used = method.labels[method.known].unique()
    for row, number in enumerate(used.tolist()):
        root = arrays["precision_cholesky"][row]
        by_arrays = (
            -0.5 * (((y - arrays["means"][row]) @ root) ** 2).sum(1)
            + np.log(np.diag(root)).sum()
            - d / 2 * math.log(2 * math.pi)
        )
        by_scipy = stats.multivariate_normal(
            method.clusters.means[number].numpy(), method.clusters.covs[number].numpy()
        ).logpdf(y)
        np.testing.assert_allclose(by_arrays, by_scipy, rtol=1e-9)


def test_rounds_alternate_and_carry_their_clusters_over(tmp_path, monkeypatch):
    started = []
    start = clusters.Clusters.start

    def watched(self, codes, optimizer, labels=None):
        started.append(None if labels is None else labels.clone())
        start(self, codes, optimizer, labels)

    monkeypatch.setattr(clusters.Clusters, "start", watched)
    # 3 batches an epoch, so 48 steps are three rounds of 16: 9 train, 3 encode, 4 cluster, and so on
    result = train(tmp_path / "run", "steps=48", data="synthetic:60")
    assert result.finished and len(started) == 3
    assert started[0] is None and all((labels >= 0).all() and len(labels) > 40 for labels in started[1:])
    # lambda |x - x^|^2 over 256 pixels, and from the second round on the distances of codes to their means
    above = [float(row["loss"]) - 0.005 * 256 * float(row["reconstruction"]) for row in rows(result.run)]
    assert above[:9] == pytest.approx([0] * 9, abs=1e-4)
    assert min(above[16:23]) > 0.1


def test_a_given_encoder_stays_and_its_features_are_reduced(tmp_path):
    torch.manual_seed(3)
    backbone = create_backbone("r10", in_chans=1, image_size=16)
    weights = tmp_path / "encoder.safetensors"
    save_file({name: value.contiguous() for name, value in backbone.net.state_dict().items()}, weights)
    settings = ["steps=20", f"method.weights={tmp_path}", "method.reduce=pca", "method.reduce_dim=3"]
    result = train(tmp_path / "run", *settings, "method.transform=normalize")
    assert result.finished
    same(load_file(result.run / "encoder.safetensors"), load_file(weights))
    _, method = run.load_run(result.run)
    codes = method.codes[method.known]
    torch.testing.assert_close(method.reduction.points(codes).norm(dim=1), torch.ones(len(codes)))
    space = (codes - method.reduction.center) @ method.reduction.components
    covariance = torch.cov(space.T)  # principal components: centered, uncorrelated, the widest first
    torch.testing.assert_close(space.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(covariance, torch.diag(covariance.diagonal()), atol=1e-6, rtol=0)
    assert (covariance.diagonal().diff() <= 0).all()
    assert result.metrics["validation_gain_over_one_gaussian"] > -1
    # the file is needed at the start alone
    weights.unlink()
    run.load_run(result.run)
    with pytest.raises(ConfigError, match=f"{tmp_path} does not fit the backbone"):
        train(tmp_path / "other", *settings)


def test_umap_codes_are_clustered_and_exported_as_gaussians_of_the_codes(tmp_path, monkeypatch):
    asked = []

    def squeezed(codes, dim, seed):  # UMAP itself takes long to compile; see the next test
        asked.append((codes.shape, dim, seed))
        return torch.tanh(codes @ torch.linspace(-1, 1, codes.shape[1] * dim).reshape(-1, dim))

    monkeypatch.setattr(reduction, "_umap", squeezed)
    settings = ("steps=54", "method.reduce=umap", "method.reduce_dim=2", "method.transform=normalize")
    result = train(tmp_path / "run", *settings)
    assert asked == [((96, 4), 2, 0)]
    _, method = run.load_run(result.run)
    assert method.clusters.dim == 2 and method.encoder()[1][0].out_features == 4
    torch.testing.assert_close(
        method.reduction.points(method.codes[method.known]).norm(dim=1), torch.ones(96)
    )
    assert b'"transform":"none"' in method.files()[MIXTURE][:2000]  # of the codes, which are as they are
    arrays = method.mixture()
    labels, codes = method.labels[method.known].numpy(), method.codes[method.known].double().numpy()
    assert arrays["means"].shape == (len(np.unique(labels)), 4)
    for row, number in enumerate(np.unique(labels)):
        np.testing.assert_allclose(arrays["means"][row], codes[labels == number].mean(0), atol=1e-3)
        assert arrays["weights"][row] == pytest.approx((labels == number).mean())


def test_a_time_budget_too_short_for_a_whole_stage_still_ends_with_clusters(tmp_path):
    config = dataclasses.replace(with_overrides(recipes.recipe("deepdpm"), SMALL))
    result = run.train(config, data="synthetic:60", out=tmp_path / "run", max_minutes=0.1, progress=False)
    assert result.steps > 5 and (result.run / "encoder.safetensors").exists()
    if result.finished:
        assert "validation_gain_over_one_gaussian" in result.metrics


def test_several_devices_are_refused():
    torch.manual_seed(0)
    facts = run.Facts(
        image_shape=(1, 16, 16),
        mean=(0.3,),
        std=(0.3,),
        num_images=8,
        batch_size=4,
        steps_per_epoch=2,
        total_steps=9,
    )
    method = DeepDPM(create_backbone("r10", in_chans=1, image_size=16), deepdpm.Config(), facts)
    method._trainer = type("Trainer", (), {"world_size": 2})()
    with pytest.raises(ConfigError, match="one device, found 2"):
        method.on_fit_start()
