"""The last stage of the codec: errors are predicted from earlier ones, in the same way on both sides."""

import numpy as np
import pytest

from ddpm.codec import residual


def correlated_errors(n=6, channels=3, size=12, seed=0):
    """Errors [n, C, H, W] with correlated neighbours and colours."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, channels, size + 1, size + 1))
    field = base[..., 1:, 1:] + 0.8 * base[..., :-1, 1:] + 0.8 * base[..., 1:, :-1]
    field[:, 1:] += 0.7 * field[:, :1]
    return field / 40


def test_prediction_reduces_correlated_errors_only():
    errors = correlated_errors()
    remaining = residual.remaining(residual.fit(errors), errors)
    assert (remaining**2).mean() < 0.7 * (errors**2).mean()
    white = np.random.default_rng(1).normal(size=(6, 3, 12, 12))
    assert (residual.remaining(residual.fit(white), white) ** 2).mean() == pytest.approx((white**2).mean(), rel=0.03)


def test_prediction_uses_earlier_errors_only():
    """A changed error changes only predictions of later ones: larger x + 2 y, or a later colour of the same pixel."""
    errors = correlated_errors(n=1)
    weights = residual.fit(errors)
    predicted = errors - residual.remaining(weights, errors)
    changed = errors.copy()
    changed[0, 1, 5, 6] += 1
    moved = np.argwhere(np.abs(predicted - (changed - residual.remaining(weights, changed))) > 1e-9)
    assert len(moved)
    for _, channel, y, x in moved:
        assert (x + 2 * y, channel) > (6 + 2 * 5, 1)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 4), (1, 1, 3, 9), (3, 3, 7, 2)])
def test_both_sides_use_the_same_frequencies(shape):
    """The decoder gets the frequencies that the encoder had, in the same order and for every coded pixel."""
    rng = np.random.default_rng(0)
    image, x0 = rng.integers(0, 256, shape, np.uint8), rng.uniform(-1, 1, shape)
    coded = rng.random(shape) < 0.7
    weights = tuple(tuple(rng.normal(size=count) / 9) for count in residual.counts(shape[1]))
    sigma = np.ones(shape[0])
    sent = []

    def put(frequency, at):
        sent.append((frequency, image[at]))
        return image[at]

    def means(mean, sigma):
        return np.stack([mean, sigma], 1)

    residual.walk(weights, x0, sigma, coded, means, put)
    queue = iter(sent)

    def get(frequency, at):
        expected, symbols = next(queue)
        assert np.array_equal(frequency, expected)
        return symbols

    decoded = residual.walk(weights, x0, sigma, coded, means, get)
    assert np.array_equal(decoded[coded], image[coded])
    assert sum(len(symbols) for _, symbols in sent) == coded.sum()


def test_walk_predicts_as_remaining_does():
    errors = correlated_errors(n=2, size=6)
    image = np.rint((errors + 1) * 127.5).astype(np.uint8)
    x0 = image / 127.5 - 1 - errors
    weights = residual.fit(errors)
    predicted = np.zeros(errors.shape)

    def put(mean, at):
        predicted[at] = mean[:, 0]
        return image[at]

    residual.walk(weights, x0, np.ones(2), np.ones(errors.shape, bool), lambda mean, sigma: mean[:, None], put)
    assert np.allclose(image / 127.5 - 1 - predicted, residual.remaining(weights, errors), atol=1e-12)
