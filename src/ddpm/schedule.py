"""Noise schedules: the table abar_t of the forward process and the published ways to choose it (Section 4, Appendix B).

t is the paper's t: 1..T are noise levels and 0 is data.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ddpm.errors import InputError, is_scalar, whole_number


@dataclass(frozen=True, eq=False)
class Schedule:
    """The noise levels 0..T of a forward process.

    alpha_bar  float64 [T+1], abar_t; it starts at alpha_bar[0] = 1, falls at every level and is never below 0
    timestep   int64 [T+1], the number that the network is told at each level; published networks are told 0..T-1 at
               levels 1..T. Level 0 is data and no network is called there, so timestep[0] is -1

    Raises InputError if the tables do not have this form.

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
        """Whether abar_T = 0, so that x_T contains nothing of x_0."""
        # The value is cached because reading it from a GPU waits for the GPU.
        return bool(self.alpha_bar[-1] == 0)

    def levels(self, steps: int | Sequence[int], start: int | None = None) -> list[int]:
        """Choose the noise levels that a sampler visits, in rising order; the last one is `start` (None: T).

        steps  a number of levels, which are spread evenly over 1..start, or the levels themselves, which are checked

        Raises InputError if start is not in 1..T, if steps is not in 1..start, or if given levels do not rise to start.

        >>> linear(1000).levels(4), linear(1000).levels(4, start=500), linear(1000).levels([1, 10, 1000])
        ([250, 500, 750, 1000], [125, 250, 375, 500], [1, 10, 1000])
        """
        start = self.T if start is None else whole_number("start", start, 1, self.T)
        if not is_scalar(steps):
            levels = [0, *(whole_number("levels", level) for level in steps)]  # type: ignore[union-attr]
            if levels[-1] != start or any(s >= t for s, t in pairwise(levels)):
                raise InputError(f"levels {levels[1:]}: want rising levels, the first at least 1 and the last {start}")
            return levels[1:]
        steps = whole_number("steps", steps)
        if not 1 <= steps <= start:
            limit = "the number of noise levels" if start == self.T else "the level to start from"
            raise InputError(f"steps {steps}: want 1 to {start}, {limit}")
        return [start - (start * i + steps // 2) // steps for i in range(steps - 1, -1, -1)]

    def respace(self, levels: Sequence[int]) -> "Schedule":
        """The schedule that visits only the given levels; the network is told the same timesteps at them.

        Raises InputError unless the levels rise within 1..T.

        >>> s = linear(1000).respace([250, 500, 1000])
        >>> s.T, s.timestep.tolist(), bool(s.alpha_bar[2] == linear(1000).alpha_bar[500])
        (3, [-1, 249, 499, 999], True)
        """
        keep = torch.tensor([0, *(whole_number("levels", level) for level in levels)])
        if len(keep) < 2 or (keep.diff() <= 0).any() or keep[-1] > self.T:
            raise InputError(f"levels {list(levels)}: want levels that rise within 1..{self.T}")
        keep = keep.to(self.alpha_bar.device)
        return Schedule(self.alpha_bar[keep], self.timestep[keep])

    def up_to(self, sigma: float) -> "Schedule":
        """The schedule without the levels whose sqrt((1 - abar)/abar) is above `sigma`.

        Raises InputError if no level is left.

        >>> cosine().up_to(80).T
        991
        """
        last = int((self.half_log_snr >= -math.log(sigma)).sum()) - 1
        if last < 1:
            least = math.exp(-self.half_log_snr[1])
            raise InputError(f"last_sigma {sigma}: every level has more noise; want at least {least:.3g}")
        return self.respace(range(1, last + 1))

    def to(self, device: torch.device | str) -> "Schedule":
        """The same tables on `device`, where indexing them then needs no transfer."""
        return Schedule(self.alpha_bar.to(device), self.timestep.to(device))


def from_beta(beta: Tensor) -> Schedule:
    """Make a schedule from beta_1..beta_T, float64 [T] in (0, 1]: abar_t = prod_{s<=t} (1 - beta_s) (Eq. 4).

    >>> from_beta(torch.tensor([0.5, 0.5], dtype=torch.float64)).alpha_bar.tolist()
    [1.0, 0.5, 0.25]
    """
    T = len(beta)
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta.double(), 0)])
    return Schedule(alpha_bar, torch.arange(-1, T))


def _linspace(a: float, b: float, n: int) -> Tensor:
    return torch.linspace(a, b, n, dtype=torch.float64)


def linear(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """beta_t rises linearly from beta_1 to beta_T (Section 4, the paper's choice).

    >>> f"{float(linear().beta[2]):.6e}"
    '1.199199e-04'
    """
    return from_beta(_linspace(beta_1, beta_T, T))


def quad(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """sqrt(beta_t) rises linearly from sqrt(beta_1) to sqrt(beta_T) (official code).

    >>> bool(quad(100).beta[50] < linear(100).beta[50])
    True
    """
    return from_beta(_linspace(beta_1**0.5, beta_T**0.5, T) ** 2)


def const(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """beta_t is beta_T at every level (official code, Appendix B).

    beta_1 is not used.

    >>> const(3, beta_T=0.5).alpha_bar.tolist()
    [1.0, 0.5, 0.25, 0.125]
    """
    return from_beta(torch.full((T,), beta_T, dtype=torch.float64))


def _warmup(T: int, beta_1: float, beta_T: float, share: float) -> Schedule:
    rising = int(T * share)
    constant = torch.full((T - rising,), beta_T, dtype=torch.float64)
    return from_beta(torch.cat([_linspace(beta_1, beta_T, rising), constant]))


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
    """beta_t = 1/(T - t + 1), so that abar_t falls linearly from 1 to 0 (official code).

    This is the schedule of the original diffusion paper: 1/T, 1/(T-1) .. 1, and so abar_t = 1 - t/T. beta_1 and beta_T
    are not used. At t = T nothing of x_0 is left, so eps prediction cannot give x_0 there.

    >>> [round(a, 2) for a in jsd(4).alpha_bar.tolist()]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return from_beta(1 / _linspace(T, 1, T))


def cosine(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02, s: float = 0.008) -> Schedule:
    """abar_t = f(t)/f(0), where f is a squared cosine (Nichol & Dhariwal 2021, Eq. 17).

    f(t) = cos^2((t/T + s)/(1 + s) pi/2), and beta_t is at most 0.999. beta_1 and beta_T are not used.

    >>> round(float(cosine().alpha_bar[500]), 3)
    0.494
    """
    f = torch.cos((_linspace(0, 1, T + 1) + s) / (1 + s) * math.pi / 2) ** 2
    return from_beta((1 - f[1:] / f[:-1]).clamp(max=0.999))


def log_snr(T: int = 1000, beta_1: float = 1e-4, beta_T: float = 0.02) -> Schedule:
    """log(abar_t / (1 - abar_t)) falls linearly to -10 from t = 2, where the noise is twice beta_1.

    With 16-bit pixels beta_1 is near 1e-9. A rise of beta_t from there to 0.02 would make the second level thousands of
    times noisier than the first; here all steps are alike (Kingma et al. 2021). beta_T is not used.

    >>> s = log_snr(1000, 1e-9)
    >>> f"{1 - float(s.alpha_bar[1]):.1e} {1 - float(s.alpha_bar[2]):.1e} {float(s.alpha_bar[1000]):.1e}"
    '1.0e-09 2.0e-09 4.5e-05'
    """
    first = min(beta_1, 1 / 4)
    levels = torch.sigmoid(_linspace(math.log(0.5 / first - 1), -10, max(T - 1, 1)))
    alpha_bar = torch.cat([torch.tensor([1.0, 1 - first], dtype=torch.float64), levels[: T - 1]])
    return Schedule(alpha_bar, torch.arange(-1, T))


SCHEDULES = {
    "linear": linear,
    "quad": quad,
    "const": const,
    "warmup10": warmup10,
    "warmup50": warmup50,
    "jsd": jsd,
    "cosine": cosine,
    "log_snr": log_snr,
}
