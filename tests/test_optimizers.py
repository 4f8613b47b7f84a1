"""Muon against linear algebra and against PyTorch's; which weights it gets."""

import math

import pytest
import torch
from torch import Tensor, nn

from ddpm import optimizers
from ddpm.optimizers import Muon, orthogonal
from ddpm.unet import UNet


def round_by_round(s: Tensor) -> Tensor:
    """What five rounds make of singular values whose squares sum to 1, by the polynomial of Jordan et al. 2024."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def matrices(singular: Tensor, n: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random orthonormal U [n, rows, r] and V^T [n, r, columns], and U S V^T."""
    u = torch.linalg.qr(torch.randn(n, rows, len(singular), dtype=singular.dtype))[0]
    v = torch.linalg.qr(torch.randn(n, columns, len(singular), dtype=singular.dtype))[0].mT
    return u, v, u * singular @ v


def gradients_on(weights: list[nn.Parameter], step: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=g) for p in weights]


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (24, 216), (96, 24)])
@pytest.mark.parametrize(
    ("dtype", "condition", "error"),
    [(torch.float64, 1e3, 1e-8), (torch.float32, 1e3, 3e-3), (torch.bfloat16, 10, 0.06)],
)
def test_singular_vectors_stay_and_singular_values_become_the_polynomials(
    rows: int, columns: int, dtype: torch.dtype, condition: float, error: float
) -> None:
    """For wide and tall matrices, in both ways of computing. Five rounds multiply rounding errors by up to 485."""
    torch.manual_seed(0)
    s = torch.logspace(0, -math.log10(condition), 24, dtype=torch.float64)
    u, v, x = matrices(s, 3, rows, columns)
    expected = u * round_by_round(s / s.norm()) @ v
    difference = torch.linalg.matrix_norm(orthogonal(x.to(dtype)).double() - expected, ord=2)
    assert float(difference.max()) < error


def test_singular_values_above_0_0016_come_between_0_68_and_1_21() -> None:
    """Of [[s, 0], [0, sqrt(1 - s^2)]], whose norm is 1. Smaller ones become smaller, and none becomes larger."""
    s = torch.logspace(-6, -1e-9, 20_001, dtype=torch.float64)
    values = orthogonal(torch.diag_embed(torch.stack([s, (1 - s**2).sqrt()], 1)))
    after = values[:, 0, 0]
    assert bool((after > 0).all())
    assert float(after.max()) < 1.21
    assert float(after[s >= 0.0016].min()) > 0.68
    assert float(after[s < 0.0013].max()) > 0.5
    assert float(after[s < 1e-4].max()) < 0.05
    assert float(values[:, 0, 1].abs().max()) == 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon is not in this release of PyTorch")
def test_steps_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps on matrices of several shapes. PyTorch's computes in bfloat16, which is switched off here."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(*shape)) for shape in ((8, 72), (16, 4), (8, 72), (5, 5))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon(ours, lr=0.01)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for p, q, g in zip(ours, theirs, gradients_on(ours, step), strict=True):
            p.grad, q.grad = g, g.clone()
        muon.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.01 * (step + 1)
        muon.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)
        assert torch.allclose(muon.state[p]["momentum"], other.state[q]["momentum_buffer"], rtol=0, atol=1e-6)


def test_a_step_on_a_quadratic() -> None:
    """The gradient of |W - Q|^2 at 0 is -2 Q. For a rotation Q the step is along Q, and as long as Adam's."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(16, 16))[0]
    weight = nn.Parameter(torch.zeros(16, 16))
    (weight - q).square().sum().backward()
    Muon([weight], lr=0.5).step()
    s = float(round_by_round(torch.tensor(1 / 4, dtype=torch.float64)))
    assert torch.allclose(weight, 0.5 * 0.2 * math.sqrt(16) * s * q, atol=1e-5)
    assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.5 * 0.2 * s, rel=1e-4)


def test_a_convolution_is_a_matrix_in_any_memory_layout() -> None:
    """[out, in, 3, 3] is updated as [out, in 9], to the bit."""
    torch.manual_seed(0)
    start = torch.randn(8, 4, 3, 3)
    plain, last = (nn.Parameter(start.clone(memory_format=f)) for f in (torch.contiguous_format, torch.channels_last))
    matrix = nn.Parameter(start.flatten(1).clone())
    optimizer = [Muon([p], lr=0.1) for p in (plain, last, matrix)]
    for step in range(3):
        g = gradients_on([plain], step)[0]
        plain.grad, last.grad, matrix.grad = g, g.contiguous(memory_format=torch.channels_last), g.flatten(1)
        for each in optimizer:
            each.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert optimizer[1].state[last]["momentum"].stride() == last.stride()
    assert not torch.equal(plain, start)
    assert torch.equal(plain, last)
    assert torch.equal(plain.flatten(1), matrix)


def test_matrices_without_a_gradient_stay() -> None:
    """One has none, and one has a gradient of 0, which has no direction."""
    without, zero = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    zero.grad = torch.zeros(3, 3)
    Muon([without, zero], lr=0.1).step()
    assert torch.equal(without, torch.ones(3, 3))
    assert torch.equal(zero, torch.ones(3, 3))


HIDDEN = """
    down.0.conv down.1.block.conv1 down.1.block.time down.1.block.conv2 down.1.attention.qkv down.1.attention.out
    middle.0.block.conv1 middle.0.block.time middle.0.block.conv2 middle.0.attention.qkv middle.0.attention.out
    middle.1.block.conv1 middle.1.block.time middle.1.block.conv2
    up.0.block.conv1 up.0.block.time up.0.block.conv2 up.0.block.shortcut up.0.attention.qkv up.0.attention.out
    up.1.block.conv1 up.1.block.time up.1.block.conv2 up.1.block.shortcut up.1.attention.qkv up.1.attention.out
    up.2.conv up.3.block.conv1 up.3.block.time up.3.block.conv2 up.3.block.shortcut
"""


def test_muon_gets_the_weights_between_hidden_layers() -> None:
    """Of a network with classes, warps, attention and patches: these, and Adam gets each of the others once."""
    network = UNet(3, None, 32, (1,), 1, (0,), num_classes=5, patch=2, warped=True)
    name_of = {p: name for name, p in network.named_parameters()}
    adam, muon = optimizers.make(network, "muon", lr=1e-3)
    assert isinstance(muon, Muon)
    hidden, others = ([name_of[p] for p in each.param_groups[0]["params"]] for each in (muon, adam))
    assert hidden == [f"{name}.weight" for name in HIDDEN.split()]
    assert sorted(hidden + others) == sorted(name_of.values())
    outer = {name for name in others if network.get_parameter(name).ndim > 1}
    assert outer == {"warp", *(f"{name}.weight" for name in ("time1", "time2", "label", "conv_in", "conv_out"))}
    (alone,) = optimizers.make(network, "adam", lr=1e-3)
    assert [name_of[p] for p in alone.param_groups[0]["params"]] == [*name_of.values()]


def test_the_moments_that_are_announced_are_those_that_are_kept() -> None:
    """For both optimizers, when they begin by themselves and when they are given a checkpoint's moments."""
    for name in ("adam", "muon"):
        network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))
        names = {p: each for each, p in network.named_parameters()}
        for given in (False, True):
            found = optimizers.make(network, name, lr=1e-3)
            if given:
                optimizers.begin(found, step=3)
            else:
                network(torch.randn(1, 2, 8, 8)).square().sum().backward()
                for each in found:
                    each.step()
            kept = {names[p]: tuple(s) for each in found for p, s in each.state.items()}
            kept = {each: tuple(key for key in keys if key != "step") for each, keys in kept.items()}
            assert kept == optimizers.moments(network, name)
