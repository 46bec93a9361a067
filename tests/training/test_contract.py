"""What every method promises, over all methods as they are discovered; and that the checks fail for broken ones."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import contract

from embedkit import load_encoder
from embedkit.training import methods, run
from embedkit.training.export.from_run import export_run

each_method = pytest.mark.parametrize("name", methods.names())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """`finished(name)`: the folder of a finished tiny run, made once."""
    made = {}

    def finished(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "run"
            run.train(contract.tiny(name), out=made[name], progress=False)
        return made[name]

    return finished


@each_method
def test_augmentations_reach_the_backbone(name):
    contract.check_augmentations_reach_the_backbone(contract.tiny(name))


@each_method
def test_labels(name):
    contract.check_labels(contract.tiny(name))


@each_method
def test_streams(name):
    contract.check_streams(contract.tiny(name))


@each_method
def test_gradient(name, monkeypatch):
    contract.check_gradient(contract.tiny(name), monkeypatch)


@each_method
def test_fields(name):
    contract.check_fields(contract.tiny(name))


@each_method
def test_one_batch_is_learned(name):
    contract.check_overfits(contract.tiny(name))


@each_method
def test_resume_is_bit_equal(name, finished, tmp_path, monkeypatch):
    contract.check_resume(contract.tiny(name), finished(name), tmp_path / "run", monkeypatch)


@each_method
def test_run_export_and_runtime_agree(name, finished, tmp_path):
    folder = export_run(finished(name), f"{name}-tiny.synthetic", tmp_path, license="CC0-1.0")
    config, method = run.load_run(finished(name))
    images, _ = run.open_data(config)
    batch = images.batch(torch.arange(8))
    with torch.inference_mode():
        expected = method.encoder().eval()(method.view(batch.images)).numpy()
    pixels = batch.images.movedim(1, 3).squeeze(3).numpy()
    found = load_encoder(folder).encode(list(pixels), normalize=False)
    # the entry's weights are rounded to float16
    cosine = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert found.shape == expected.shape and cosine.min() > 0.9995


# --- mutants ------------------------------------------------------------------------------------------------


def test_a_method_that_drops_its_augmentations_is_caught(monkeypatch):
    for name in ("supervised", "sphereface", "mixae", "bigan", "simclr"):
        kind = methods.method_class(name)
        view = kind.view
        with monkeypatch.context() as patch:
            patch.setattr(kind, "view", lambda self, images, *_, view=view: view(self, images))
            with pytest.raises(AssertionError, match="the backbone sees the same"):
                contract.check_augmentations_reach_the_backbone(contract.tiny(name))


def test_simsiam_without_its_stop_gradient_is_caught(monkeypatch):
    from embedkit.training.methods import simsiam

    def leaky(p, z):
        return -(simsiam.l2_normalize(p) * simsiam.l2_normalize(z)).sum(1).mean()

    monkeypatch.setattr(simsiam, "negative_cosine", leaky)
    with pytest.raises(AssertionError, match="stops_gradient"):
        contract.check_gradient(contract.tiny("simsiam"), monkeypatch)


def test_a_gradient_that_is_lost_by_accident_is_caught(monkeypatch):
    from embedkit.training.methods import simclr

    def lossy(z1, z2, temperature, nt_xent=simclr.nt_xent):
        return nt_xent(z1, z2.detach(), temperature)

    monkeypatch.setattr(simclr, "nt_xent", lossy)
    with pytest.raises(AssertionError, match="stops_gradient"):
        contract.check_gradient(contract.tiny("simclr"), monkeypatch)


def test_labels_that_leak_into_an_unsupervised_loss_are_caught(monkeypatch):
    kind = methods.method_class("simclr")
    loss = kind.loss

    def leaky(self, batch, generator):
        outputs = loss(self, batch, generator)
        return {"loss": outputs["loss"] + 1e-3 * (batch.labels == 3).float().mean()}

    monkeypatch.setattr(kind, "loss", leaky)
    with pytest.raises(AssertionError, match="depends on labels"):
        contract.check_labels(contract.tiny("simclr"))


def test_a_resume_that_forgets_a_buffer_is_caught(finished, tmp_path, monkeypatch):
    def forget(self, checkpoint):
        checkpoint["state_dict"]["unit"].zero_()

    expected = finished("mixae")
    monkeypatch.setattr(methods.method_class("mixae"), "on_load_checkpoint", forget)
    with pytest.raises(AssertionError, match="differs after a resume"):
        contract.check_resume(contract.tiny("mixae"), expected, tmp_path / "run", monkeypatch)


def test_a_vae_without_its_draw_is_caught(monkeypatch):
    from embedkit.training.methods import vae

    monkeypatch.setattr(vae, "reparameterize", lambda mu, log_var, noise: mu)
    with pytest.raises(AssertionError, match="'posterior' changes nothing"):
        contract.check_streams(contract.tiny("vae"))


def test_simclr_with_a_fixed_temperature_is_caught(monkeypatch):
    from embedkit.training.methods import simclr

    def fixed(z1, z2, temperature, nt_xent=simclr.nt_xent):
        return nt_xent(z1, z2, 0.2)

    monkeypatch.setattr(simclr, "nt_xent", fixed)
    with pytest.raises(AssertionError, match="temperature"):
        contract.check_fields(contract.tiny("simclr"))
