"""Several devices: two processes compute what one does, and groups stay whole on a rank."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training import methods, run
from embedkit.training.data import IdentityBalanced, LabeledAndUnlabeled, Shuffled


def test_two_processes_are_one(tmp_path):
    script = Path(__file__).parent / "two_processes.py"
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, script, str(tmp_path)], check=True, timeout=120, env=environment)
    one = torch.load(tmp_path / "one.pt")
    assert set(methods.families()) <= set(one)
    for rank in range(2):
        both = torch.load(tmp_path / f"rank{rank}.pt")
        assert both.keys() == one.keys()
        for name, (loss, gradients) in one.items():
            torch.testing.assert_close(both[name][0], loss, rtol=1e-6, atol=1e-7, msg=name)
            assert any(g.abs().max() > 1e-6 for g in gradients), name
            for found, expected in zip(both[name][1], gradients, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_batch_and_groups_stay_whole(world):
    for sampler in (Shuffled(), IdentityBalanced(images_per_identity=4), LabeledAndUnlabeled(ratio=3)):
        columns = [sampler.columns(32, rank, world) for rank in range(world)]
        assert sorted(torch.cat(columns).tolist()) == list(range(32))
        assert {len(own) for own in columns} == {32 // world}
    identities = torch.arange(8).repeat_interleave(4)
    for rank in range(world):
        own = identities[IdentityBalanced(images_per_identity=4).columns(32, rank, world)]
        assert (own.bincount(minlength=8) % 4 == 0).all()
        own = LabeledAndUnlabeled(ratio=3).columns(32, rank, world)
        assert (own[: len(own) // 4] < 8).all() and (own[len(own) // 4 :] >= 8).all()


def test_groups_that_devices_cannot_share_are_refused():
    with pytest.raises(ConfigError, match="3 identities"):
        IdentityBalanced(images_per_identity=4).columns(12, 0, 2)
    with pytest.raises(ConfigError, match="3 labeled"):
        LabeledAndUnlabeled(ratio=3).columns(12, 1, 2)


def test_a_run_on_two_devices_is_that_on_one(tmp_path):
    script = Path(__file__).parent / "two_devices.py"
    runpy.run_path(str(script))["train"](tmp_path / "one", 1)
    done = subprocess.run(
        [sys.executable, script, str(tmp_path / "two")],
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # evaluated is on the first rank, and both ranks act on it
    scores = []
    for name in ("one", "two"):
        with open(tmp_path / name / "metrics.csv", newline="") as file:
            scores.append({row["step"]: row["validation_knn_top1"] for row in csv.DictReader(file)})
    assert scores[0] == scores[1] and list(scores[0]) == ["0", "2", "4"] and all(scores[0].values())
    kept = [run.load_run(tmp_path / name)[1].batches_seen for name in ("one", "two")]
    assert kept[0] == kept[1]
    one, two = (run.load_run(tmp_path / name, "last")[1].state_dict() for name in ("one", "two"))
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[key], value, atol=2e-5, rtol=1e-4, msg=key)
