"""`--noise-assignment nearest`: the least sum of distances, standard normal noise for what the network is told."""

import itertools
from pathlib import Path

import pytest
import torch
from conftest import assert_close, assert_same, losses, tensors, train
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm import noise

NEAREST = ("--noise-assignment", "nearest", "--flip")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 6), classes=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_the_sum_of_squared_distances_is_the_least_of_all_orders(n: int, classes: int, seed: int) -> None:
    """Every order of the noises is tried that keeps what the network is told."""
    g = noise.generator(seed)
    x, eps = torch.randn(2, n, 5, generator=g, dtype=torch.float64)
    told = torch.randint(-1, classes - 1, (n,), generator=g)
    allowed = [list(order) for order in itertools.permutations(range(n)) if torch.equal(told[list(order)], told)]
    least = min(float((x - eps[order]).square().sum()) for order in allowed)
    order = noise.assign(x @ eps.T, told[:, None])
    assert order.tolist() in allowed
    assert float((x - eps[order]).square().sum()) == pytest.approx(least, rel=1e-12)


def test_the_noise_of_a_class_is_standard_normal() -> None:
    """Two classes, at -1 and at 1. Within 5 standard deviations, the noise of each has mean 0 and variance 1.

    An exchange across classes would give the upper class the higher noises, and samples begin with noise that is
    independent of the class.
    """
    told = torch.tensor([0, 1] * 8)
    x = (2.0 * told - 1)[:, None] + 0.1 * torch.randn(16, 1, generator=noise.generator(1))
    within, across = [], []
    for step in range(500):
        eps = torch.randn(16, 1, generator=noise.generator(2, step))
        within.append(eps[noise.assign(x @ eps.T, told[:, None])][told == 1])
        across.append(eps[noise.assign(x @ eps.T, torch.zeros(16, 0))][told == 1])
    upper = torch.cat(within)
    assert abs(float(upper.mean())) < 5 / len(upper) ** 0.5
    assert abs(float(upper.var()) - 1) < 5 * (2 / len(upper)) ** 0.5
    assert float(torch.cat(across).mean()) > 0.5


def test_parts_and_resuming_change_nothing(tmp_path: Path) -> None:
    """A resumed run is the same to the bit, and a batch in two parts is the same within float error."""
    assert train(tmp_path / "whole", *NEAREST, "--steps", 4) == 0
    assert train(tmp_path / "halves", *NEAREST, "--steps", 2) == 0
    assert train(tmp_path / "halves", *NEAREST, "--steps", 4) == 0
    assert_same(tensors(tmp_path / "whole", 4), tensors(tmp_path / "halves", 4))
    assert train(tmp_path / "parts", *NEAREST, "--steps", 4, "--accumulate", 2) == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert_close(tensors(tmp_path / "parts", 4), tensors(tmp_path / "whole", 4))
    assert train(tmp_path / "plain", *NEAREST, "--noise-assignment", "independent", "--steps", 4) == 0
    assert losses(tmp_path / "plain") != pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
