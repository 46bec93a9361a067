"""A pass in between leaves no trace in the running statistics, and is normalized by its own batch."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn

from embedkit.training.models.batch_norm import running_statistics_kept


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))


def test_statistics_stay_and_the_batch_normalizes():
    module, x = net(), torch.randn(4, 1, 5, 5)
    module(x)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    expected = net()(10 * x)  # in training mode the output depends on the batch alone
    with running_statistics_kept(module):
        found = module(10 * x)
    torch.testing.assert_close(found, expected)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    module(10 * x)
    assert not torch.equal(module[1].running_var, before["1.running_var"])  # it moves again
    assert module[1].num_batches_tracked == 2 and not module[2].track_running_stats


def test_eval_mode_is_left_alone_and_an_error_ends_it():
    module, x = net().eval(), torch.randn(4, 1, 5, 5)
    expected = module(x)
    with running_statistics_kept(module):
        assert torch.equal(module(x), expected)
    module.train()
    with pytest.raises(RuntimeError), running_statistics_kept(module):
        raise RuntimeError
    assert module[1].track_running_stats
