import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.models.masking import patchify, random_masking, unpatchify


def generator(seed: int = 0):
    return torch.Generator().manual_seed(seed)


def test_patches_hold_rows_columns_and_channels_in_that_order():
    x = torch.arange(2 * 3 * 8 * 12).reshape(2, 3, 8, 12).float()
    patches = patchify(x, 4)
    assert patches.shape == (2, 6, 48)
    for n in range(2):
        for index in range(6):
            row, column = 4 * (index // 3), 4 * (index % 3)
            values = [x[n, c, row + p, column + q] for p in range(4) for q in range(4) for c in range(3)]
            assert patches[n, index].tolist() == values


@pytest.mark.parametrize(("shape", "patch"), [((2, 1, 28, 28), 4), ((1, 3, 32, 16), 8), ((2, 2, 6, 6), 1)])
def test_unpatchify_is_the_inverse(shape, patch):
    x = torch.rand(shape)
    assert torch.equal(unpatchify(patchify(x, patch), patch, image_size=shape[2:]), x)
    patches = torch.rand(patchify(x, patch).shape)
    assert torch.equal(patchify(unpatchify(patches, patch, image_size=shape[2:]), patch), patches)


def test_patches_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="do not tile an image of 28x30"):
        patchify(torch.rand(1, 1, 28, 30), 4)
    with pytest.raises(ConfigError, match="48 patches of 16 values"):
        unpatchify(torch.rand(1, 48, 16), 4, image_size=28)
    with pytest.raises(ConfigError, match="29x29"):
        unpatchify(torch.rand(1, 49, 16), 4, image_size=29)
    with pytest.raises(ConfigError, match="49 patches of 15 values"):
        unpatchify(torch.rand(1, 49, 15), 4, image_size=28)


@pytest.mark.parametrize(
    ("tokens", "ratio", "keep"), [(49, 0.75, 12), (64, 0.75, 16), (196, 0.75, 49), (7, 0, 7)]
)
def test_exactly_so_many_tokens_stay(tokens, ratio, keep):
    x = torch.rand(5, tokens, 3)
    kept, mask, ids_restore = random_masking(x, ratio, generator())
    assert kept.shape == (5, keep, 3) and mask.shape == ids_restore.shape == (5, tokens)
    assert torch.equal(mask.sum(dim=1), torch.full((5,), float(tokens - keep)))
    assert mask.dtype == torch.float32 and set(mask.unique().tolist()) <= {0.0, 1.0}


def test_ids_restore_puts_every_kept_token_where_it_was():
    x = torch.rand(6, 49, 8)
    kept, mask, ids_restore = random_masking(x, 0.75, generator(1))
    hole = torch.full((6, 49 - kept.shape[1], 8), -1.0)
    restored = torch.cat([kept, hole], dim=1).gather(1, ids_restore[..., None].expand(-1, -1, 8))
    stays = mask == 0
    assert torch.equal(restored[stays], x[stays])
    assert (restored[~stays] == -1.0).all()
    assert torch.equal(ids_restore.sort(dim=1).values, torch.arange(49).expand(6, -1))


def test_masks_are_uniform_over_tokens_and_pairs_and_differ_between_rows():
    rows = 4000
    _, mask, _ = random_masking(torch.zeros(rows, 16, 1), 0.75, generator(2))
    kept = 1 - mask
    # a token stays with probability 1/4; five standard errors of 4000 draws
    assert (kept.mean(dim=0) - 0.25).abs().max() < 5 * (0.25 * 0.75 / rows) ** 0.5
    # two given tokens stay together with probability (4 * 3) / (16 * 15) = 0.05
    together = kept.T @ kept / rows
    pairs = together[~torch.eye(16, dtype=torch.bool)]
    assert (pairs - 0.05).abs().max() < 5 * (0.05 * 0.95 / rows) ** 0.5
    # C(16, 4) = 1820 masks are possible; one mask for the whole batch would give 1
    assert 1400 < len(mask.unique(dim=0)) <= 1820


def test_masks_are_a_function_of_the_generator_and_gradient_reaches_kept_tokens_alone():
    x = torch.rand(3, 20, 4, requires_grad=True)
    kept, mask, _ = random_masking(x, 0.5, generator(3))
    again = random_masking(x, 0.5, generator(3))
    assert torch.equal(kept, again[0]) and torch.equal(mask, again[1])
    assert not torch.equal(mask, random_masking(x, 0.5, generator(4))[1])
    kept.sum().backward()
    assert torch.equal(x.grad, (1 - mask)[..., None].expand(-1, -1, 4))


@pytest.mark.parametrize("ratio", [1.0, -0.1, 0.99])
def test_a_ratio_that_leaves_nothing_is_refused(ratio):
    with pytest.raises(ConfigError, match="mask_ratio"):
        random_masking(torch.rand(1, 20, 4), ratio, generator())
