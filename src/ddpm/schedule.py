"""The forward process's one table, abar_t, and the published ways to choose it (Section 4, Appendix B).

t is the paper's t: 1..T are noise levels, 0 is data.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ddpm.errors import InputError


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels 0..T: `alpha_bar` float64 [T+1] with alpha_bar[0] = 1, falling, never below 0.

    `timestep` int64 [T+1] is what the network is told at each level: 0..T-1 for levels 1..T of published
    networks. Level 0 is data, no network is called there, and timestep[0] is -1. Raises InputError for
    a table that is not a schedule.

    >>> s = linear()
    >>> s.T, float(s.alpha_bar[0]), f"{float(s.alpha_bar[-1]):.4e}", int(s.timestep[1000])
    (1000, 1.0, '4.0358e-05', 999)
    """

    alpha_bar: Tensor
    timestep: Tensor

    def __post_init__(self) -> None:
        a = self.alpha_bar
        t = self.timestep
        if a.dtype != torch.float64 or a.ndim != 1 or len(a) < 2 or t.dtype != torch.int64 or t.shape != a.shape:
            raise InputError("schedule: want alpha_bar float64 [T+1] and timestep int64 [T+1], T at least 1")
        if not (a[0] == 1 and (a.diff() < 0).all() and a[-1] >= 0):
            raise InputError("schedule: want alpha_bar to start at 1 and to fall at every level, to no less than 0")

    @property
    def T(self) -> int:
        """The number of noise levels."""
        return len(self.alpha_bar) - 1

    @functools.cached_property
    def beta(self) -> Tensor:
        """beta_t = 1 - abar_t / abar_{t-1} (Eq. 2), float64 [T+1]; beta[0] = 0: level 0 has no step before it."""
        beta = torch.zeros_like(self.alpha_bar)
        beta[1:] = 1 - self.alpha_bar[1:] / self.alpha_bar[:-1]
        return beta

    @functools.cached_property
    def half_log_snr(self) -> Tensor:
        """lambda_t = log(sqrt(abar_t) / sqrt(1 - abar_t)), float64 [T+1], from inf down (Lu et al. 2022)."""
        return self.alpha_bar.logit() / 2

    @functools.cached_property
    def ends_in_noise(self) -> bool:
        """Whether abar_T = 0, so that nothing of x_0 is left at level T."""  # cached: reading it waits for a GPU
        return bool(self.alpha_bar[-1] == 0)

    def levels(self, steps: int | Sequence[int], start: int | None = None) -> list[int]:
        """`steps` levels spread evenly over 1..start, rising, the last one `start` (None: T); or those given, checked.

        >>> linear(1000).levels(4), linear(1000).levels(4, start=500), linear(1000).levels([1, 10, 1000])
        ([250, 500, 750, 1000], [125, 250, 375, 500], [1, 10, 1000])
        """
        start = self.T if start is None else start
        if not 1 <= start <= self.T:
            raise InputError(f"start {start}: want a noise level, 1 to {self.T}")
        if not isinstance(steps, int):
            levels = [0, *steps]
            if levels[-1] != start or any(s >= t for s, t in pairwise(levels)):
                raise InputError(f"levels {levels[1:]}: want rising levels from 1 on, the last one {start}")
            return levels[1:]
        if not 1 <= steps <= start:
            what = "the number of noise levels" if start == self.T else "the levels up to the one it starts at"
            raise InputError(f"steps {steps}: want 1 to {start}, {what}")
        return [start - (start * i + steps // 2) // steps for i in range(steps - 1, -1, -1)]

    def respace(self, levels: Sequence[int]) -> "Schedule":
        """The schedule that visits only these levels of this one, rising within 1..T; the network is told the same.

        >>> s = linear(1000).respace([250, 500, 1000])
        >>> s.T, s.timestep.tolist(), bool(s.alpha_bar[2] == linear(1000).alpha_bar[500])
        (3, [-1, 249, 499, 999], True)
        """
        keep = torch.tensor([0, *levels])
        if len(keep) < 2 or (keep.diff() <= 0).any() or keep[-1] > self.T:
            raise InputError(f"levels {list(levels)}: want rising levels within 1..{self.T}")
        keep = keep.to(self.alpha_bar.device)
        return Schedule(self.alpha_bar[keep], self.timestep[keep])

    def to(self, device: torch.device | str) -> "Schedule":
        """The same tables on `device`, so that indexing them there does not wait for a transfer."""
        return Schedule(self.alpha_bar.to(device), self.timestep.to(device))


def from_beta(beta: Tensor) -> Schedule:
    """The schedule with beta_1..beta_T = `beta`, float64 [T] in (0, 1]; abar_t = prod_{s<=t} (1 - beta_s) (Eq. 4).

    >>> from_beta(torch.tensor([0.5, 0.5], dtype=torch.float64)).alpha_bar.tolist()
    [1.0, 0.5, 0.25]
    """
    T = len(beta)
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta.double(), 0)])
    return Schedule(alpha_bar, torch.arange(-1, T))


def _line(a: float, b: float, n: int) -> Tensor:
    return torch.linspace(a, b, n, dtype=torch.float64)


def linear(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """The paper's choice (Section 4): beta_t rises linearly from beta_1 to beta_T.

    >>> f"{float(linear().beta[2]):.6e}"
    '1.199199e-04'
    """
    return from_beta(_line(beta_1, beta_T, T))


def quad(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """sqrt(beta_t) rises linearly (official code).

    >>> bool(quad(100).beta[50] < linear(100).beta[50])
    True
    """
    return from_beta(_line(beta_1**0.5, beta_T**0.5, T) ** 2)


def const(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """beta_t = beta_T at every level; beta_1 is not used (official code, Appendix B).

    >>> const(3, beta_T=0.5).alpha_bar.tolist()
    [1.0, 0.5, 0.25, 0.125]
    """
    return from_beta(torch.full((T,), beta_T, dtype=torch.float64))


def _warmup(T: int, beta_1: float, beta_T: float, share: float) -> Schedule:
    rising = int(T * share)
    return from_beta(torch.cat([_line(beta_1, beta_T, rising), torch.full((T - rising,), beta_T, dtype=torch.float64)]))


def warmup10(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """beta_t rises linearly over the first tenth of the levels and then stays at beta_T (official code).

    >>> f"{float(warmup10().beta[100]):.2f} {float(warmup10().beta[1000]):.2f}"
    '0.02 0.02'
    """
    return _warmup(T, beta_1, beta_T, 0.1)


def warmup50(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """beta_t rises linearly over the first half of the levels and then stays at beta_T (official code).

    >>> bool(warmup50().beta[250] < warmup10().beta[250])
    True
    """
    return _warmup(T, beta_1, beta_T, 0.5)


def jsd(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """beta_t = 1/T, 1/(T-1) .. 1, the original diffusion paper's; abar_t = 1 - t/T, so abar_T = 0 (official code).

    beta_1 and beta_T are not used. At t = T nothing of x_0 is left, so eps prediction cannot give x_0 there.

    >>> [round(a, 2) for a in jsd(4).alpha_bar.tolist()]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return from_beta(1 / _line(T, 1, T))


def cosine(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02, s: float = 0.008) -> Schedule:
    """abar_t = f(t)/f(0), f(t) = cos^2((t/T + s)/(1 + s) pi/2), beta_t <= 0.999 (Nichol & Dhariwal 2021, Eq. 17).

    beta_1 and beta_T are not used.

    >>> round(float(cosine().alpha_bar[500]), 3)
    0.494
    """
    f = torch.cos((_line(0, 1, T + 1) + s) / (1 + s) * math.pi / 2) ** 2
    return from_beta((1 - f[1:] / f[:-1]).clamp(max=0.999))


SCHEDULES = {
    "linear": linear,
    "quad": quad,
    "const": const,
    "warmup10": warmup10,
    "warmup50": warmup50,
    "jsd": jsd,
    "cosine": cosine,
}
