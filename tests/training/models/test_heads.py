import pytest

torch = pytest.importorskip("torch")

from embedkit.errors import ConfigError
from embedkit.training.models.heads import ConvDecoder, l2_normalize


@pytest.mark.parametrize(("size", "start"), [(28, 7), (32, 4), (64, 4), (24, 6)])
def test_decoder_starts_small_and_ends_at_the_image(size, start):
    decoder = ConvDecoder(16, out_chans=3, image_size=size, width=4)
    assert decoder.start == start
    image = decoder(torch.randn(2, 16))
    assert image.shape == (2, 3, size, size)
    image.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters() if p.ndim > 1)


@pytest.mark.parametrize("size", [3, 22, 44, 36])
def test_decoder_refuses_sizes_it_cannot_double_to(size):
    with pytest.raises(ConfigError, match="power of 2"):
        ConvDecoder(16, out_chans=1, image_size=size)


def test_decoder_output_is_not_bounded():
    decoder = ConvDecoder(4, out_chans=1, image_size=28, width=4)
    with torch.no_grad():
        decoder.to_pixels.bias.fill_(7.0)
    assert decoder(torch.randn(3, 4)).mean() > 5.0


def test_grouped_decoders_are_independent_decoders():
    torch.manual_seed(0)
    one = ConvDecoder(5, out_chans=2, image_size=28, width=3)
    other = ConvDecoder(5, out_chans=2, image_size=28, width=3)
    both = ConvDecoder(5, out_chans=2, image_size=28, width=3, groups=2)
    # parameters and buffers of two decoders one after another are those of the grouped one
    stacked = {
        name: value if value.ndim == 0 else torch.cat([value, other.state_dict()[name]])
        for name, value in one.state_dict().items()
    }
    both.load_state_dict(stacked)
    codes = torch.randn(6, 10)
    images = both(codes)
    torch.testing.assert_close(images[:, :2], one(codes[:, :5]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images[:, 2:], other(codes[:, 5:]), atol=1e-5, rtol=1e-5)


def test_l2_normalize_is_float32_under_autocast():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(l2_normalize(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = l2_normalize(torch.randn(32, 64).bfloat16())
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(32), atol=1e-6, rtol=0)
