"""Contexts that see nothing from below, positives where they belong, rows that overlap, and a bound on information."""

import math

import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.augment import Compose
from embedkit.training.config import Facts
from embedkit.training.data import Batch
from embedkit.training.methods.cpc import CPC, Config, Context, KeepOneChannel, info_nce
from embedkit.training.models.backbones import create_backbone
from embedkit.training.optim import Optimizer


def build(size=28, channels=1, norm="layer", **config):
    torch.manual_seed(0)
    facts = Facts(
        image_shape=(channels, size, size),
        mean=(0.3,) * channels,
        std=(0.3,) * channels,
        batch_size=8,
        steps_per_epoch=4,
        total_steps=40,
    )
    small = {"patch": 8, "stride": 4, "hidden_dim": 16, "blocks": 3, "target_dim": 16}
    config = Config(**{**small, "norm": norm, **config})
    backbone = create_backbone("r10", in_chans=channels, image_size=config.patch, norm=norm, width=0.5)
    return CPC(backbone, config, facts)


def as_batch(images):
    rows = torch.arange(len(images))
    return Batch(images, rows, rows)


def noise(n=8, size=28, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


# --- causality -----------------------------------------------------------------------------------------------


def test_a_context_has_no_gradient_from_below_exactly():
    torch.manual_seed(0)
    context = Context(6, 8, blocks=4)
    z = torch.randn(2, 6, 7, 7, requires_grad=True)
    c = context(z)
    for row in range(7):
        (gradient,) = torch.autograd.grad(c[:, :, row].square().sum(), z, retain_graph=True)
        assert (gradient[:, :, row + 1 :] == 0).all()
        assert gradient[:, :, row].any(), "its own row is seen"
        seen = [above for above in range(row) if gradient[:, :, above].any()]
        assert seen == list(range(max(0, row - 4), row))  # a row above for each block


def test_in_every_direction_the_target_and_what_lies_behind_it_are_hidden_from_the_prediction():
    method = build()
    grid = torch.randn(2, method.backbone.dim, 6, 6, requires_grad=True)
    pairs = method._pairs(grid)
    # one (direction, offset) after another; where a positive lies in the grid that is not turned
    place = torch.arange(2 * 36).reshape(2, 1, 6, 6)
    index = 0
    for turns, offsets in zip((0, 2, 3, 1), method.offsets, strict=True):
        flat = place.rot90(turns, (2, 3)).flatten()
        for _ in offsets:
            predictions, _, positives = pairs[index]
            index += 1
            for m in (0, 7, len(predictions) - 1):
                (gradient,) = torch.autograd.grad(predictions[m].sum(), grid, retain_graph=True)
                image, cell = divmod(int(flat[positives[m]]), 36)
                row, column = divmod(cell, 6)
                assert not gradient[image, :, row, column].any(), "the context sees its target"
                assert not gradient[1 - image].any() and gradient[image].any()
                behind = {0: gradient[image, :, row:], 2: gradient[image, :, : row + 1]}
                behind |= {3: gradient[image, :, :, column:], 1: gradient[image, :, :, : column + 1]}
                assert not behind[turns].any()
    assert index == len(pairs) == 4 * 4


@pytest.mark.parametrize(("patch", "stride", "first"), [(8, 4, 2), (8, 8, 1), (9, 4, 3), (8, 3, 3)])
def test_rows_that_share_a_pixel_with_the_context_are_skipped(patch, stride, first):
    method = build(size=40, patch=patch, stride=stride, directions=1, steps=2)
    assert method.offsets == [(first, first + 1)]
    # whatever the pixels of the target are, the prediction stays: with every pixel below the context's last changed
    x = torch.rand(2, 1, 40, 40)
    changed = x.clone()
    changed[:, :, patch:] = torch.rand(2, 1, 40 - patch, 40)
    columns = (40 - patch) // stride + 1
    for k, ((before, _, positives), (after, _, _)) in enumerate(
        zip(method._pairs(method._encode(x)), method._pairs(method._encode(changed)), strict=True)
    ):
        torch.testing.assert_close(before[:columns], after[:columns], rtol=0, atol=1e-6)
        assert positives[0] == (first + k) * columns and stride * (first + k) >= patch


# --- the loss ------------------------------------------------------------------------------------------------


def test_the_definition_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    p, t = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 6))
    positives, total = [5, 0, 2, 2], 0.0
    for row, positive in zip(p.tolist(), positives, strict=True):
        logits = [sum(a * b for a, b in zip(row, other, strict=True)) for other in t.tolist()]
        total -= logits[positive] - math.log(sum(math.exp(value) for value in logits))
    found = float(info_nce(p, t, torch.tensor(positives)))
    assert found == pytest.approx(total / 4, rel=1e-12)
    assert float(info_nce(0 * p, t, torch.tensor(positives))) == pytest.approx(math.log(6), rel=1e-12)


def test_positives_are_the_patches_k_rows_below_in_the_same_column_of_the_same_image():
    method = build(directions=1, steps=4)
    numbers = torch.arange(3 * 36.0).reshape(3, 1, 6, 6).expand(3, method.backbone.dim, 6, 6)
    method.context[0] = torch.nn.Identity()
    method.target = torch.nn.Identity()
    method.predict[0] = torch.nn.ModuleList(torch.nn.Identity() for _ in method.predict[0])
    for k, (predictions, targets, positives) in zip(
        method.offsets[0], method._pairs(numbers.contiguous()), strict=True
    ):
        context, target = predictions[:, 0] / method.config.scale, targets[positives, 0]
        torch.testing.assert_close(target, context + 6 * k)  # k rows of six below
        assert len(targets) == 3 * 36 and len(positives) == 3 * (6 - k) * 6
        assert torch.equal(target.long() // 36, context.round().long() // 36)


def test_identical_vectors_are_found_where_they_were_planted():
    generator = torch.Generator().manual_seed(0)
    targets = torch.nn.functional.normalize(torch.randn(200, 32, generator=generator), dim=1)
    positives = torch.randperm(200, generator=generator)[:50]
    assert float(info_nce(100 * targets[positives], targets, positives)) < 1e-6
    assert float(info_nce(100 * targets[positives], targets, positives.roll(1))) > 30


def test_the_first_loss_is_the_log_of_all_patches_in_the_batch():
    method = build()
    outputs = method.loss(as_batch(noise()), method.generator())
    assert float(outputs["loss"].detach()) == pytest.approx(math.log(8 * 36), abs=0.05)
    assert float(outputs["information"].detach()) == pytest.approx(0.0, abs=0.05)


def test_the_bound_on_the_information_of_gaussians():
    """With the best critic, log L - loss lies below the true information and below log L, and near the smaller."""
    generator = torch.Generator().manual_seed(0)
    for rho in (0.5, 0.9, 0.99):
        information = -0.5 * math.log(1 - rho**2)
        bounds = []
        for _ in range(60):
            x, noise_ = torch.randn(2, 64, generator=generator, dtype=torch.float64)
            y = rho * x + math.sqrt(1 - rho**2) * noise_
            # log p(y | x) / p(y) without its constants: -rho^2 y^2 / 2 (1 - rho^2) + rho x y / (1 - rho^2)
            p = torch.stack([torch.full_like(x, -(rho**2) / 2), rho * x], 1) / (1 - rho**2)
            t = torch.stack([y**2, y], 1)
            bounds.append(math.log(64) - float(info_nce(p, t, torch.arange(64))))
        mean = sum(bounds) / len(bounds)
        error = torch.tensor(bounds).std() / math.sqrt(len(bounds))
        assert mean < information + 3 * error and max(bounds) <= math.log(64)
        assert mean > 0.85 * information
    # more information than log L cannot be told from L candidates
    x = torch.randn(8, 1, generator=generator, dtype=torch.float64)
    p, t = torch.cat([-0.5 * torch.ones_like(x), x], 1) * 1e6, torch.cat([x**2, x], 1)
    assert math.log(8) - float(info_nce(p, t, torch.arange(8))) == pytest.approx(math.log(8))


def test_targets_take_gradient_and_negatives_come_from_the_batch_and_the_image():
    method = build(directions=1, steps=1)
    grid = torch.randn(2, method.backbone.dim, 6, 6, requires_grad=True)
    predictions, targets, positives = method._pairs(grid)[0]
    (gradient,) = torch.autograd.grad(info_nce(predictions.detach(), targets, positives), grid)
    assert (gradient.flatten(2).abs().sum(1) > 0).all()  # every patch of both images is positive or negative


def test_bfloat16_logits_are_widened():
    generator = torch.Generator().manual_seed(0)
    p, t = (torch.randn(20, 64, generator=generator).bfloat16() * 4 for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(p, t, torch.arange(20))
    torch.testing.assert_close(found, info_nce(p.float(), t.float(), torch.arange(20)))


# --- the method ----------------------------------------------------------------------------------------------


def test_one_channel_is_kept_in_all_three():
    x = torch.rand(400, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = KeepOneChannel(p=0.5)(x, torch.Generator().manual_seed(1))
    same = (x == y).flatten(1).all(1)
    kept = [
        next((c for c in range(3) if torch.equal(b, a[c].expand(3, 4, 4))), None)
        for a, b in zip(x[~same], y[~same], strict=True)
    ]
    assert None not in kept and set(kept) == {0, 1, 2} and 150 < int(same.sum()) < 250
    gray = torch.rand(4, 1, 2, 2)
    assert torch.equal(KeepOneChannel(p=1.0)(gray, torch.Generator()), gray)


def test_patches_are_augmented_each_on_its_own():
    method = build(channels=3, patch_augment=KeepOneChannel(p=0.5))
    seen = []
    method.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    method.loss(as_batch(noise(2, channels=3)), method.generator())
    gray = (seen[0] == seen[0][:, :1]).flatten(1).all(1).reshape(2, 36)
    assert (gray.any(1) & ~gray.all(1)).all()


def test_batch_norm_is_refused_and_so_are_grids_without_a_row_to_predict():
    with pytest.raises(ConfigError, match="BatchNorm"):
        build(norm="batch")
    with pytest.raises(ConfigError, match="leave 2 rows"):
        build(size=12)
    with pytest.raises(ConfigError, match="1, 2 or 4 directions"):
        build(directions=3)
    build(norm="none", directions=1)


def test_patches_of_one_batch_do_not_see_each_other():
    method = build().train()
    images = torch.rand(4, 1, 28, 28)
    whole = method._encode(images)
    torch.testing.assert_close(method._encode(images[:1]), whole[:1], rtol=1e-4, atol=1e-5)


def test_exported_is_the_mean_of_the_patches():
    method = build().eval()
    x = method.view(noise(3))
    torch.testing.assert_close(method.encoder()(x), method._encode(x).mean((2, 3)))


def test_patches_below_are_found_on_held_out_images():
    # stripes of an image's own direction and width: every patch tells what the others look like
    def stripes(n, seed):
        generator = torch.Generator().manual_seed(seed)
        angle, width = torch.rand(2, n, 1, 1, generator=generator)
        phase = torch.arange(28)[:, None] * (3 * angle).sin() + torch.arange(28) * (3 * angle).cos()
        return (127 + 120 * (phase * (0.3 + width)).sin())[:, None].to(torch.uint8)

    method = build(
        directions=1, steps=2, scale=0.3, augment=Compose(steps=()), patch_augment=Compose(steps=())
    )
    optimizer = Optimizer(lr=2e-3, weight_decay=0.0).create(method.train())
    images = stripes(128, 0)
    for step in range(40):
        method.batches_seen = step + 1
        loss = method.loss(as_batch(images[(step * 16) % 128 :][:16]), method.generator())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    method.eval()
    with torch.no_grad():
        found = method.pretext_metric(as_batch(stripes(64, 1)), torch.Generator())["patch_accuracy"]
    assert float(found) > 4 / (32 * 36)  # by chance 1 / (32 * 36)
