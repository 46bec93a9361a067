import pytest

torch = pytest.importorskip("torch")
from torch import nn

from embedkit.errors import ConfigError
from embedkit.training.models.ema import EMA, decay_of_a_run


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_updates_follow_the_closed_form():
    module, decay, steps = net(), 0.9, 12
    ema = EMA(module, decay)
    start = module[0].weight.detach().clone()
    values = [torch.randn(4, 3) for _ in range(steps)]
    for value in values:
        module[0].weight.data.copy_(value)
        ema.update(module)
    # s_T = d^T s_0 + (1 - d) sum_t d^(T - t) v_t
    expected = decay**steps * start
    for t, value in enumerate(values, start=1):
        expected = expected + (1 - decay) * decay ** (steps - t) * value
    torch.testing.assert_close(ema.module[0].weight, expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(module[0].weight, values[-1])


def test_warm_up_starts_at_a_tenth_and_ends_at_the_decay():
    ema = EMA(net(), 0.99)
    assert ema.decay_at(0) == 0.1
    assert ema.decay_at(8) == 0.5
    assert ema.decay_at(889) == pytest.approx(890 / 899) and ema.decay_at(10**6) == 0.99
    assert ema.decay_at(None) == 0.99
    module = net()
    ema, start = EMA(module, 0.99), module[0].weight.detach().clone()
    module[0].weight.data.zero_()
    for step in range(3):
        ema.update(module, step)
    torch.testing.assert_close(ema.module[0].weight, start * (1 / 10) * (2 / 11) * (3 / 12))


@pytest.mark.parametrize(("policy", "expected"), [("copy", 8.0), ("average", 2.0)])
def test_buffers_follow_their_policy(policy, expected):
    module = net()
    ema = EMA(module, 0.75, buffers=policy)
    module[1].running_mean.fill_(8.0)  # from 0: a quarter of the way is 2
    module[1].num_batches_tracked.fill_(5)
    ema.update(module)
    torch.testing.assert_close(ema.module[1].running_mean, torch.full((4,), expected))
    assert ema.module[1].num_batches_tracked == 5


def test_no_gradient_reaches_the_shadow():
    module = net()
    ema = EMA(module, 0.5)
    x = torch.randn(8, 3, requires_grad=True)
    assert not any(p.requires_grad for p in ema.parameters())
    assert all(p.requires_grad for p in module.parameters())
    module(x).sum().backward()
    ema.update(module)
    assert all(p.grad is None for p in ema.parameters())
    assert not ema.module[0].weight.requires_grad
    assert not ema.module.training  # BatchNorm of the shadow uses running statistics
    assert torch.equal(ema(x), ema.module(x))


def test_it_goes_on_from_a_checkpoint():
    module = net()
    ema = EMA(module, 0.9)
    module[0].weight.data.normal_()
    ema.update(module)
    resumed = EMA(net(), 0.9)
    resumed.load_state_dict(ema.state_dict())
    for copy in (ema, resumed):
        copy.update(module, step=40)
    assert torch.equal(ema.module[0].weight, resumed.module[0].weight)
    assert {"module.0.weight", "module.1.running_mean"} <= set(ema.state_dict())


def test_a_decay_of_zero_copies_and_of_one_keeps():
    module = net()
    copies, keeps = EMA(module, 0.0), EMA(module, 1.0)
    start = module[0].weight.detach().clone()
    module[0].weight.data.normal_()
    copies.update(module)
    keeps.update(module)
    assert torch.equal(copies.module[0].weight, module[0].weight)
    assert torch.equal(keeps.module[0].weight, start)


def test_an_average_looks_back_at_most_a_twentieth_of_the_run():
    assert decay_of_a_run(0.999, 2**20) == decay_of_a_run(0.999, 20_000) == 0.999
    assert 1 / (1 - decay_of_a_run(0.999, 4000)) == pytest.approx(200)
    assert decay_of_a_run(0.9, 4000) == 0.9 and decay_of_a_run(0.999, 5) == 0.0


def test_refusals():
    with pytest.raises(ConfigError, match="decay of 0 to 1"):
        EMA(net(), 1.5)
    with pytest.raises(ConfigError, match="buffers of 'copy' or 'average'"):
        EMA(net(), 0.9, buffers="mean")
    with pytest.raises(ConfigError, match="stands in one of module and shadow"):
        EMA(net(), 0.9).update(nn.Linear(3, 4))
