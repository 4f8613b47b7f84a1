"""Pixels and signal (Section 3.3), and the bins of Eq. 13."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import pixels

quick = settings(max_examples=200, derandomize=True)
ALL = torch.arange(256, dtype=torch.uint8)


def test_round_trip_of_all_pixels():
    """0..255 are scaled linearly to [-1, 1] and back, through float32 and float64."""
    signal = pixels.to_signal(ALL)
    assert signal.dtype == torch.float32
    np.testing.assert_allclose(signal.numpy(), np.linspace(-1, 1, 256), atol=1e-7)
    assert (signal[0], signal[255]) == (-1, 1)
    assert torch.equal(pixels.to_pixels(signal), ALL)
    assert torch.equal(pixels.to_pixels(signal.double()), ALL)
    for nudge in (-0.49, 0.49):  # anything within half a grey level is that grey level
        assert torch.equal(pixels.to_pixels(signal.double() + nudge * pixels.BIN), ALL)


@quick
@given(st.floats(-3, 3), st.sampled_from([torch.float32, torch.float64]))
def test_to_pixels_is_nearest_and_saturates(x, dtype):
    """No other pixel value is nearer. Values beyond [-1, 1] give 0 or 255."""
    x = torch.tensor(x, dtype=dtype)
    pixel = pixels.to_pixels(x)
    assert pixel.dtype == torch.uint8
    away = (torch.linspace(-1, 1, 256, dtype=torch.float64) - x.double()).abs()
    assert away[int(pixel)] <= away.min() + 1e-9
    if abs(x) >= 1:
        assert pixel == (255 if x > 0 else 0)


@pytest.mark.parametrize(("value", "pixel"), [(-1e30, 0), (-torch.inf, 0), (1e30, 255), (torch.inf, 255)])
def test_to_pixels_does_not_wrap(value, pixel):
    """A plain cast to uint8 would wrap."""
    assert pixels.to_pixels(torch.tensor([value])).item() == pixel


def test_to_signal_accepts_uint8_only():
    """So a signal is not scaled twice."""
    with pytest.raises(TypeError, match="uint8"):
        pixels.to_signal(torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bins(dtype):
    """The bin of a grey level x is x - 1/255 .. x + 1/255, without gaps or overlaps, and open at -1 and 1."""
    centre, lower, upper = pixels.bins(torch.zeros((), dtype=dtype))
    assert centre.dtype == lower.dtype == upper.dtype == dtype
    assert len(centre) == len(lower) == len(upper) == 256
    torch.testing.assert_close(centre, pixels.to_signal(ALL).to(dtype), rtol=0, atol=1e-7)
    assert torch.equal(lower[1:], upper[:-1])
    assert (lower[0], upper[255]) == (-torch.inf, torch.inf)
    torch.testing.assert_close(lower[1:], centre[1:] - 1 / 255, rtol=0, atol=2e-7)
    torch.testing.assert_close(upper[:-1], centre[:-1] + 1 / 255, rtol=0, atol=2e-7)
    assert pixels.BIN == 2 / 255
    inside = (centre > lower) & (centre < upper)
    assert inside.all()
