import json
import math

import pytest

torch = pytest.importorskip("torch")
tv = pytest.importorskip("torchvision.transforms.v2")
stats = pytest.importorskip("scipy.stats")
import torchvision.transforms.v2.functional as TF

from embedkit.errors import ConfigError
from embedkit.training import augment as V
from embedkit.training.augment import operations as O
from embedkit.training.augment import randaugment
from embedkit.training.config import from_json, to_json

BILINEAR = tv.InterpolationMode.BILINEAR

ALL = [
    V.RandomResizedCrop(scale=(0.2, 1.0)),
    V.RandomHorizontalFlip(),
    V.RandomVerticalFlip(),
    V.RandomAffine(degrees=20, translate=(0.1, 0.2), scale=(0.8, 1.2), shear=10, fill=0.3, p=0.7),
    V.RandomShift(pixels=3),
    V.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    V.RandomGrayscale(p=0.5),
    V.GaussianBlur(),
    V.RandomErasing(),
    V.GaussianNoise(),
    V.RandomSolarize(),
    V.RandomInvert(),
    V.Rotate90(k=3),
    V.RandAugment(),
]
RANDOM = [view for view in ALL if not isinstance(view, V.Rotate90)]


def generator(seed: int = 0):
    return torch.Generator().manual_seed(seed)


def images(n: int = 8, channels: int = 3, height: int = 28, width: int = 24, seed: int = 0):
    """Random images with smooth parts, flat parts, grays and equal channels."""
    x = torch.rand(n, channels, height, width, generator=generator(seed))
    x[:, :, : height // 2] = torch.linspace(0.1, 0.9, width)
    x[:, :, :4, :4] = 0.5
    if channels == 3:
        x[:, 1, -4:] = x[:, 0, -4:]
        x[:, 2, -8:-4] = x[:, 1, -8:-4]
    return x


def name_of(view) -> str:
    return type(view).__name__


# ---- what holds for every view --------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("view", ALL, ids=name_of)
def test_a_view_is_a_pure_function_of_batch_and_generator(view, channels):
    x = images(channels=channels).requires_grad_(True)
    before = x.detach().clone()
    first, again = view(x, generator(1)), view(x, generator(1))
    assert torch.equal(first, again)
    assert torch.equal(x, before)
    assert not first.requires_grad and first.dtype == torch.float32
    assert first.min() >= 0.0 and first.max() <= 1.0 + 1e-6 and first.isfinite().all()
    if not isinstance(view, V.Rotate90):
        assert first.shape == x.shape


@pytest.mark.parametrize("view", RANDOM, ids=name_of)
def test_images_of_a_batch_and_batches_of_a_run_get_their_own_parameters(view):
    x = images(n=1).expand(64, -1, -1, -1)
    run = generator(2)
    first, second = view(x, run), view(x, run)
    assert len(first.unique(dim=0)) >= 2
    assert not torch.equal(first, second)
    # what an image gets does not depend on what the others show
    other = torch.cat([x[:1], 1.0 - x[1:]])
    assert torch.equal(view(other, generator(2))[0], first[0])


@pytest.mark.parametrize("view", ALL, ids=name_of)
def test_autocast_does_not_reach_into_a_view(view):
    x = images()
    plain = view(x, generator(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = view(x, generator(3))
    assert under.dtype == torch.float32 and torch.equal(under, plain)


@pytest.mark.parametrize("view", ALL, ids=name_of)
def test_views_go_through_json(view):
    chain = V.Compose(steps=(V.RandomHorizontalFlip(p=0.25), view))
    text = json.dumps(to_json(chain))
    assert from_json(json.loads(text)) == chain
    # No word of the file that a class stands in: runs outlive it.
    kinds = [one["type"] for one in (json.loads(text), *json.loads(text)["steps"])]
    assert kinds == ["augment.Compose", "augment.RandomHorizontalFlip", f"augment.{type(view).__name__}"]


@pytest.mark.parametrize(
    "batch", [torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, 8, 8)], ids=["uint8", "one image"]
)
def test_what_is_no_batch_of_images_is_refused(batch):
    with pytest.raises(ConfigError, match="divide uint8 pixels by 255"):
        V.RandomInvert()(batch, generator())


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: V.RandomHorizontalFlip(p=1.5), "RandomHorizontalFlip.p"),
        (lambda: V.RandomResizedCrop(scale=(0.5, 0.2)), "RandomResizedCrop.scale"),
        (lambda: V.RandomResizedCrop(ratio=(0.0, 1.0)), "RandomResizedCrop.ratio"),
        (lambda: V.RandomResizedCrop(size=(0, 3)), "RandomResizedCrop.size"),
        (lambda: V.RandomShift(pixels=-1), "RandomShift.pixels"),
        (lambda: V.RandomShift(pixels=1, pad="wrap"), "RandomShift.pad"),
        (lambda: V.RandomAffine(degrees=200), "RandomAffine.degrees"),
        (lambda: V.RandomAffine(translate=(0.1, 1.1)), "RandomAffine.translate"),
        (lambda: V.RandomAffine(shear=90), "RandomAffine.shear"),
        (lambda: V.ColorJitter(hue=0.6), "ColorJitter.hue"),
        (lambda: V.ColorJitter(contrast=-0.1), "ColorJitter.contrast"),
        (lambda: V.GaussianBlur(kernel_size=4), "GaussianBlur.kernel_size"),
        (lambda: V.GaussianNoise(sigma=(-1.0, 0.0)), "GaussianNoise.sigma"),
        (lambda: V.RandAugment(ops=("Blur",)), "RandAugment.ops"),
        (lambda: V.RandAugment(magnitude=(0.0, 2.0)), "RandAugment.magnitude"),
    ],
)
def test_settings_out_of_range_are_refused(make, field):
    with pytest.raises(ConfigError, match=field):
        make()


def test_images_too_small_for_a_view_are_refused():
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ConfigError, match="cannot be reflected"):
        V.RandomShift(pixels=4)(x, generator())
    with pytest.raises(ConfigError, match="too large for 4x4"):
        V.GaussianBlur(kernel_size=9)(x, generator())
    with pytest.raises(ConfigError, match="1 or 3 channels"):
        V.RandomGrayscale()(torch.zeros(1, 2, 4, 4), generator())


# ---- crops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(28, 28), (20, 60)])
def test_crop_boxes_have_torchvisions_distribution(height, width):
    n, scale, ratio = 4000, (0.2, 1.0), (3 / 4, 4 / 3)
    view = V.RandomResizedCrop(scale=scale, ratio=ratio)
    top, left, h, w = (box.double().numpy() for box in view.boxes(view.draw(n, generator(4)), height, width))
    assert (top >= 0).all() and (top + h <= height).all() and (left >= 0).all() and (left + w <= width).all()
    torch.manual_seed(5)
    theirs = tv.RandomResizedCrop((height, width), scale=scale, ratio=ratio)
    image = torch.zeros(1, height, width)
    made = [theirs.make_params([image]) for _ in range(n)]
    for ours, key in ((top, "top"), (left, "left"), (h, "height"), (w, "width")):
        assert stats.ks_2samp(ours, [float(box[key]) for box in made]).pvalue > 1e-3, key
    areas, ratios = h * w / (height * width), w / h
    their_areas = [box["height"] * box["width"] / (height * width) for box in made]
    their_ratios = [box["width"] / box["height"] for box in made]
    assert stats.ks_2samp(areas, their_areas).pvalue > 1e-3
    assert stats.ks_2samp(ratios, their_ratios).pvalue > 1e-3


@pytest.mark.parametrize(
    ("height", "width", "ratio", "box"),
    [
        # no box of the whole area and another aspect ratio fits: the largest central one of the nearest ratio
        (20, 60, (0.5, 1.5), (0, 15, 20, 30)),
        (60, 20, (0.5, 1.5), (10, 0, 40, 20)),
        (30, 30, (2.0, 3.0), (7, 0, 15, 30)),
    ],
)
def test_where_no_box_fits_the_central_one_is_taken(height, width, ratio, box):
    crop = V.RandomResizedCrop(scale=(1.0, 1.0), ratio=ratio)
    boxes = crop.boxes(crop.draw(50, generator()), height, width)
    for value, expected in zip(boxes, box, strict=True):
        assert value.unique().tolist() == [float(expected)]
    theirs = tv.RandomResizedCrop((8, 8), scale=(1.0, 1.0), ratio=ratio)
    made = theirs.make_params([torch.zeros(1, height, width)])
    assert tuple(made[key] for key in ("top", "left", "height", "width")) == box


@pytest.mark.parametrize("size", [None, (40, 17), (9, 12)], ids=["same", "larger", "smaller"])
def test_crop_pixels_are_torchvisions_antialiased_ones(size):
    x = images(n=12)
    view = V.RandomResizedCrop(size=size, scale=(0.08, 1.0))
    boxes = view.boxes(view.draw(12, generator(6)), 28, 24)
    ours = view(x, generator(6))
    for index, (top, left, h, w) in enumerate(torch.stack(boxes, dim=1).int().tolist()):
        theirs = TF.resized_crop(x[index], top, left, h, w, list(size or (28, 24)), BILINEAR, antialias=True)
        torch.testing.assert_close(ours[index], theirs, atol=1e-5, rtol=0)


# ---- flips, turns and shifts ----------------------------------------------------------------------------------


def test_flips_and_turns_are_exact():
    x = images(n=400, channels=1, height=6, width=5)
    for view, axis in ((V.RandomHorizontalFlip(p=0.3), 3), (V.RandomVerticalFlip(p=0.3), 2)):
        y = view(x, generator(7))
        flipped = (y == x.flip(axis)).flatten(1).all(dim=1)
        assert ((y == x).flatten(1).all(dim=1) | flipped).all()
        assert 0.2 < flipped.float().mean() < 0.4  # four standard errors of 400 draws are 0.09
    for k in range(5):
        assert torch.equal(V.Rotate90(k=k)(x, generator()), torch.rot90(x, k, (2, 3)))


@pytest.mark.parametrize("pad", ["reflect", "replicate", "constant"])
def test_shift_is_one_of_the_padded_windows_and_each_is_as_likely(pad):
    x = images(n=1, channels=2, height=7, width=6).expand(900, -1, -1, -1)
    padded = torch.nn.functional.pad(x[:1], [1] * 4, mode=pad)
    windows = [padded[0, :, i : i + 7, j : j + 6] for i in range(3) for j in range(3)]
    y = V.RandomShift(pixels=1, pad=pad)(x, generator(8))
    which = torch.stack([(y == window).flatten(1).all(dim=1) for window in windows], dim=1)
    assert torch.equal(which.sum(dim=1), torch.ones(900, dtype=torch.long))
    assert stats.chisquare(which.sum(dim=0)).pvalue > 1e-3


# ---- affine ---------------------------------------------------------------------------------------------------


def test_affine_is_torchvisions():
    x = images(n=6)
    draw = generator(9)
    angle = torch.rand(6, generator=draw) * 360 - 180
    shift_x, shift_y = torch.randint(-5, 6, (2, 6), generator=draw).float()
    scale = torch.rand(6, generator=draw) + 0.5
    shear = torch.rand(6, generator=draw) * 60 - 30
    matrix = O.affine_matrix(
        angle=angle.deg2rad(), shift_x=shift_x, shift_y=shift_y, scale=scale, shear=shear.deg2rad()
    )
    ours = O.warp(x, matrix, 0.0)
    for i in range(6):
        translate, skew = [float(shift_x[i]), float(shift_y[i])], [float(shear[i]), 0.0]
        theirs = TF.affine(x[i], float(angle[i]), translate, float(scale[i]), skew, BILINEAR, fill=None)
        torch.testing.assert_close(ours[i], theirs, atol=2e-4, rtol=0)


def test_affine_fills_what_it_uncovers_and_draws_within_its_ranges():
    x = torch.full((200, 1, 16, 16), 0.7)
    y = V.RandomAffine(translate=(0.25, 0.0), fill=0.2)(x, generator(10))
    columns = (y[:, 0, 0] - 0.2).abs() < 1e-6  # uncovered columns stand on one side, the same in every row
    assert torch.allclose(y, y[:, :, :1].expand_as(y))
    assert ((y - 0.7).abs().lt(1e-6) | (y - 0.2).abs().lt(1e-6)).all()
    assert set(columns.sum(dim=1).tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(V.RandomAffine()(x, generator()), x)
    kept = (
        (V.RandomAffine(degrees=90, p=0.5)(images(n=200), generator(11)) == images(n=200)).flatten(1).all(1)
    )
    assert 0.35 < kept.float().mean() < 0.65


# ---- erasing --------------------------------------------------------------------------------------------------


def test_erased_boxes_have_torchvisions_distribution():
    n, scale, ratio = 3000, (0.02, 0.6), (0.3, 3.3)
    x = torch.ones(n, 1, 28, 28)
    y = V.RandomErasing(p=1.0, scale=scale, ratio=ratio, value=0.25)(x, generator(12))
    erased = y[:, 0] == 0.25
    assert (erased | (y[:, 0] == 1.0)).all()
    h, w = erased.any(dim=2).sum(dim=1), erased.any(dim=1).sum(dim=1)
    assert torch.equal(h * w, erased.flatten(1).sum(dim=1))  # a full box
    top = erased.any(dim=2).int().argmax(dim=1)
    torch.manual_seed(13)
    theirs = tv.RandomErasing(p=1.0, scale=scale, ratio=ratio, value=[0.0])
    made = [theirs.make_params([x[0]]) for _ in range(n)]
    for ours, key in ((h, "h"), (w, "w"), (top, "i")):
        assert stats.ks_2samp(ours.numpy(), [float(box[key]) for box in made]).pvalue > 1e-3, key
    # a box as high or as wide as the image is no box: of 4x4 pixels at a ratio of 1, all ten tries are
    whole = V.RandomErasing(p=1.0, scale=(0.9, 1.0), ratio=(1.0, 1.0))(x[:9, :, :4, :4], generator(13))
    assert torch.equal(whole, x[:9, :, :4, :4])
    left_alone = V.RandomErasing(p=0.25)(x, generator(14)).flatten(1).amin(dim=1) == 1.0
    assert 0.7 < left_alone.float().mean() < 0.8


# ---- color ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (O.adjust_brightness, TF.adjust_brightness),
        (O.adjust_contrast, TF.adjust_contrast),
        (O.adjust_saturation, TF.adjust_saturation),
        (O.adjust_sharpness, TF.adjust_sharpness),
    ],
    ids=["brightness", "contrast", "saturation", "sharpness"],
)
def test_adjustments_are_torchvisions(ours, theirs, channels):
    x = images(channels=channels)
    factors = torch.tensor([0.0, 0.05, 0.4, 0.95, 1.0, 1.3, 1.9, 3.0])
    y = ours(x, factors)
    for i, factor in enumerate(factors.tolist()):
        torch.testing.assert_close(y[i], theirs(x[i], factor), atol=1e-6, rtol=1e-5)


def test_hue_is_torchvisions():
    x = images()
    turns = torch.tensor([-0.5, -0.3, -0.1, 0.0, 0.05, 0.2, 0.4, 0.5])
    y = O.adjust_hue(x, turns)
    for i, turn in enumerate(turns.tolist()):
        torch.testing.assert_close(y[i], TF.adjust_hue(x[i], turn), atol=1e-5, rtol=0)
    # a third of a turn is an exchange of channels, half a turn twice is nothing
    red = torch.tensor([0.9, 0.1, 0.2]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(O.adjust_hue(red, torch.tensor([1 / 3])), red[:, [2, 0, 1]])


def test_pixel_operations_are_torchvisions():
    x = images()
    thresholds = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.5, 0.7, 0.9, 1.0])
    bits = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    solarized, posterized = O.solarize(x, thresholds), O.posterize(x, bits)
    contrasted = O.autocontrast(x * 0.5 + 0.2)
    for i in range(8):
        torch.testing.assert_close(solarized[i], TF.solarize(x[i], float(thresholds[i])))
        torch.testing.assert_close(posterized[i], TF.posterize(x[i], int(bits[i])))
        torch.testing.assert_close(contrasted[i], TF.autocontrast(x[i] * 0.5 + 0.2), atol=1e-6, rtol=0)
    flat = torch.full((1, 1, 8, 8), 0.3)
    assert torch.equal(O.autocontrast(flat), flat)


@pytest.mark.parametrize("channels", [1, 3])
def test_equalize_is_torchvisions(channels):
    x = images(n=6, channels=channels) ** 2
    x[0] = 0.4  # one level alone
    x[1] = (x[1] > 0.5).float()  # two levels
    x[2] = x[2] * 0.2  # narrow
    x = torch.nn.functional.interpolate(x, scale_factor=3)  # so that a level has several pixels
    y = O.equalize(x)
    for i in range(6):
        torch.testing.assert_close(y[i], TF.equalize(x[i]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel_size", [3, 5, 9])
def test_blur_is_torchvisions(kernel_size):
    x = images()
    sigma = torch.linspace(0.1, 2.5, 8)
    y = O.gaussian_blur(x, sigma, kernel_size)
    for i in range(8):
        theirs = TF.gaussian_blur(x[i], [kernel_size] * 2, [float(sigma[i])] * 2)
        torch.testing.assert_close(y[i], theirs, atol=1e-5, rtol=0)


def test_blur_takes_a_tenth_of_the_side_as_its_kernel():
    x = torch.zeros(1, 1, 96, 128)
    x[0, 0, 48, 64] = 1.0
    y = V.GaussianBlur(sigma=(5.0, 5.0), p=1.0)(x, generator())
    assert (y > 0).sum() == 9 * 9  # 96 // 10 = 9 is odd


def test_grayscale_invert_and_solarize_choose_images():
    x = images(n=300)
    for view, change in (
        (V.RandomGrayscale(p=0.3), TF.rgb_to_grayscale(x, num_output_channels=3)),
        (V.RandomInvert(p=0.3), 1.0 - x),
        (V.RandomSolarize(threshold=0.6, p=0.3), TF.solarize(x, 0.6)),
    ):
        y = view(x, generator(15))
        changed = ((y - change).abs() < 1e-6).flatten(1).all(dim=1)
        assert ((y == x).flatten(1).all(dim=1) ^ changed).all(), view
        assert 0.2 < changed.float().mean() < 0.4


def test_jitter_factors_are_uniform_over_torchvisions_interval():
    x = torch.full((4000, 1, 1, 2), 0.25)
    factor = V.ColorJitter(brightness=0.4)(x, generator(16))[:, 0, 0, 0] / 0.25
    assert stats.kstest(factor.numpy(), "uniform", args=(0.6, 0.8)).pvalue > 1e-3
    # above 1 the interval is cut off at 0
    factor = V.ColorJitter(brightness=2.0)(x, generator(17))[:, 0, 0, 0] / 0.25
    assert stats.kstest(factor.numpy(), "uniform", args=(0.0, 3.0)).pvalue > 1e-3
    # about the mean of 0.5: 0.4 apart before, 0.4 * factor after
    x = torch.tensor([0.3, 0.7]).expand(4000, 1, 1, 2)
    y = V.ColorJitter(contrast=0.5)(x, generator(18))
    factor = (y[..., 1] - y[..., 0]).flatten() / 0.4
    assert stats.kstest(factor.numpy(), "uniform", args=(0.5, 1.0)).pvalue > 1e-3


def test_jitter_takes_brightness_and_contrast_in_either_order():
    # 0.2 and 0.8 doubled and then spread about their mean are cut off elsewhere than the other way round
    x = torch.tensor([0.2, 0.8]).reshape(1, 1, 1, 2)
    view = V.ColorJitter(brightness=0.9, contrast=0.9)
    seen = set()
    for seed in range(60):
        draw = generator(seed)
        order = torch.randperm(4, generator=draw).tolist()
        torch.rand(1, generator=draw)  # whether the image is jittered at all
        expected = x
        for index in order:
            u = torch.rand(1, generator=draw)
            if index < 2:
                adjust = (O.adjust_brightness, O.adjust_contrast)[index]
                expected = adjust(expected, 0.1 + 1.8 * u)
        torch.testing.assert_close(view(x, generator(seed)), expected)
        seen.add(order.index(0) < order.index(1))
    assert seen == {True, False}


def test_jitter_leaves_images_out_and_gray_has_no_color():
    color = images(n=400)
    y = V.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)(color, generator(19))
    kept = ((y - color).abs() < 1e-6).flatten(1).all(dim=1)
    assert 0.1 < kept.float().mean() < 0.3
    gray = images(channels=1)
    assert torch.equal(V.ColorJitter(saturation=0.9, hue=0.5)(gray, generator(20)), gray)


def test_noise_has_its_standard_deviation_and_stays_in_range():
    x = torch.full((50, 1, 40, 40), 0.5)
    y = V.GaussianNoise(sigma=(0.1, 0.1))(x, generator(21))
    assert float((y - x).std()) == pytest.approx(0.1, rel=0.02)
    assert float((y - x).mean()) == pytest.approx(0.0, abs=0.002)
    cut = V.GaussianNoise(sigma=(2.0, 2.0))(x, generator(22))
    assert cut.min() == 0.0 and cut.max() == 1.0
    spread = V.GaussianNoise(sigma=(0.0, 0.1))(x, generator(23)).flatten(1).std(dim=1)
    assert spread.min() < 0.02 and spread.max() > 0.08


# ---- RandAugment ----------------------------------------------------------------------------------------------


def sampled(image, place):
    """Naive bilinear sampling of one image: `place` maps a pixel center of the result to one of the source."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x, y = place(column + 0.5, row + 0.5)
            x, y = x - 0.5, y - 0.5
            for j in (math.floor(y), math.floor(y) + 1):
                for i in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < width and 0 <= j < height:
                        result[:, row, column] += (1 - abs(x - i)) * (1 - abs(y - j)) * image[:, j, i]
    return result


@pytest.mark.parametrize(
    ("op", "place"),
    [
        # as Pillow's AFFINE of the source: about the top left corner, places of the result to places of the source
        ("ShearX", lambda v, x, y, height, width: (x + v * y, y)),
        ("ShearY", lambda v, x, y, height, width: (x, y + v * x)),
        ("TranslateX", lambda v, x, y, height, width: (x + v * width, y)),
        ("TranslateY", lambda v, x, y, height, width: (x, y + v * height)),
    ],
)
def test_geometry_of_the_pool_is_the_sources(op, place):
    x = images(n=3, height=12, width=10)
    values = torch.tensor([-0.3, 0.1, 0.27])
    y = randaugment._augment(op, x, values, 0.0)
    for i, v in enumerate(values.tolist()):
        naive = sampled(x[i], lambda a, b, v=v: place(v, a, b, 12, 10))
        torch.testing.assert_close(y[i], naive, atol=1e-5, rtol=0)


def test_rotation_of_the_pool_is_torchvisions():
    x = images(n=3)
    degrees = torch.tensor([-30.0, 7.0, 30.0])
    y = randaugment._augment("Rotate", x, degrees, 0.0)
    for i, angle in enumerate(degrees.tolist()):
        theirs = TF.rotate(x[i], angle, BILINEAR, fill=None)
        torch.testing.assert_close(y[i], theirs, atol=2e-4, rtol=0)


def test_the_pool_and_its_ranges_are_fixmatchs():
    assert len(randaugment.RANDAUGMENT_RANGES) == 14
    share = torch.tensor([0.0, 0.5, 1.0])
    expected = {
        "Brightness": [0.05, 0.5, 0.95],
        "Rotate": [-30.0, 0.0, 30.0],
        "ShearX": [-0.3, 0.0, 0.3],
        "Solarize": [0.0, 0.5, 1.0],
        "Posterize": [4.0, 6.0, 8.0],
    }
    for op, values in expected.items():
        torch.testing.assert_close(randaugment._magnitude_of(op, share), torch.tensor(values))
    bits = randaugment._magnitude_of("Posterize", torch.rand(5000, generator=generator(24)))
    assert stats.chisquare(bits.long().bincount(minlength=9)[4:]).pvalue > 1e-3


@pytest.mark.parametrize("op", list(randaugment.RANDAUGMENT_RANGES))
def test_a_pool_of_one_operation_is_that_operation(op):
    x = images()
    y = V.RandAugment(num_ops=1, p=1.0, ops=(op,), magnitude=(0.8, 0.8), cutout=0.0, fill=0.1)(
        x, generator(25)
    )
    value = randaugment._magnitude_of(op, torch.full((8,), 0.8))
    expected = x if op == "Identity" else randaugment._augment(op, x, value, 0.1)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=0)
    if op != "Identity":
        assert not torch.equal(y, x)


def test_every_image_goes_through_the_operation_that_it_drew():
    x = images(n=600)
    ops = ("Solarize", "Identity", "TranslateX")
    y = V.RandAugment(num_ops=1, p=1.0, ops=ops, magnitude=(0.9, 0.9), cutout=0.0)(x, generator(26))
    outcomes = [
        x
        if op == "Identity"
        else randaugment._augment(op, x, randaugment._magnitude_of(op, torch.full((600,), 0.9)), 0.0)
        for op in ops
    ]
    which = torch.stack([((y - o).abs() < 1e-6).flatten(1).all(dim=1) for o in outcomes], dim=1)
    assert torch.equal(which.sum(dim=1), torch.ones(600, dtype=torch.long))
    assert stats.chisquare(which.sum(dim=0)).pvalue > 1e-3
    # two rounds apply two operations: of Identity and Solarize, a quarter goes through neither
    twice = V.RandAugment(num_ops=2, p=1.0, ops=("Solarize", "Identity"), magnitude=(0.9, 0.9), cutout=0.0)
    untouched = (twice(x, generator(27)) == x).flatten(1).all(dim=1)
    assert 0.15 < untouched.float().mean() < 0.35
    # a drawn operation is applied half of the time: 0.75 becomes 0.25 in the first that is, and stays so
    for rounds in (1, 2):
        view = V.RandAugment(num_ops=rounds, ops=("Solarize",), magnitude=(0.5, 0.5), cutout=0.0)
        left = (view(torch.full((4000, 1, 2, 2), 0.75), generator(30)) == 0.75).flatten(1).all(dim=1)
        assert abs(float(left.float().mean()) - 0.5**rounds) < 0.03


def test_cutout_is_a_square_of_half_a_side_anywhere():
    x = torch.ones(2000, 1, 28, 28)
    y = V.RandAugment(num_ops=0, cutout=0.5, cutout_value=0.5)(x, generator(28))
    erased = y[:, 0] == 0.5
    h, w = erased.any(dim=2).sum(dim=1), erased.any(dim=1).sum(dim=1)
    assert torch.equal(h * w, erased.flatten(1).sum(dim=1))
    assert h.max() == w.max() == 14 and h.min() == w.min() == 7
    # the center is uniform: half of all squares are whole along a side, and both borders are as likely
    assert 0.45 < (h == 14).float().mean() < 0.6
    assert abs(float(erased[:, 0].any(dim=1).float().mean() - erased[:, -1].any(dim=1).float().mean())) < 0.06
    assert torch.equal(V.RandAugment(num_ops=0, cutout=0.0)(x, generator(29)), x)


def test_what_was_drawn_can_be_applied_again_at_another_size():
    crop = V.RandomResizedCrop(scale=(0.3, 0.6))
    small = torch.rand(6, 3, 16, 16)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    drawn = crop.draw(6, generator(3))
    tops = [box / side for side in (16, 64) for box in crop.boxes(drawn, side, side)]
    for one, other in zip(tops[:4], tops[4:], strict=True):
        assert (one - other).abs().max() <= 1.5 / 16  # the same boxes, in whole pixels
    means = [crop.apply(x, drawn).mean((2, 3)) for x in (small, large)]
    assert (
        (means[0] - means[1]).abs().max()
        < 0.06
        < (means[0] - crop(small, generator(4)).mean((2, 3))).abs().max()
    )


def test_an_affine_map_tells_what_it_did():
    affine = V.RandomAffine(degrees=30.0, translate=(0.2, 0.1), scale=(0.9, 1.1))
    drawn = affine.draw(200, generator(1))
    assert drawn["angle"].abs().max() <= math.radians(30) < 1.2 * drawn["angle"].abs().max()
    assert drawn["shift_x"].abs().max() <= 0.2 and drawn["shift_y"].abs().max() <= 0.1
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 10] = 1
    moved = {
        **{k: v[:1] * 0 for k, v in drawn.items()},
        "scale": torch.ones(1),
        "shift_x": torch.tensor([3 / 21]),
    }
    assert affine.apply(x, moved)[0, 0, 10, 13] == 1  # to the right
    quarter = {
        **{k: v * 0 for k, v in moved.items()},
        "scale": torch.ones(1),
        "angle": torch.tensor([math.pi / 2]),
    }
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 15] = 1
    assert affine.apply(x, quarter)[0, 0, :, 10].argmax() == 15  # clockwise, as torchvision turns
