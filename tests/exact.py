"""Exact denoisers: data whose posteriors, reverse chain and bound are known in closed form. Everything is float64.

This module uses only alpha_bar and Bayes' rule, and no formula of the package. t is the paper's noise level, 1..T.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ddpm.unet import UNet

PREDICTIONS = ("eps", "x0", "mu", "v")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Use one thread. Small tensors are then quicker, by a factor of ten on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(data, schedule, predict):
    """A network that computes E[x_0 | x_t] of `data` and predicts eps, x0, mu or v at the levels of `schedule`."""

    def call(x, timestep, y=None):
        t = torch.searchsorted(schedule.timestep, timestep)
        xt = x.double()
        abar, abar_prev = (schedule.alpha_bar[i].view(-1, *[1] * (x.ndim - 1)) for i in (t, t - 1))
        x0 = data.denoise(xt, abar)
        if predict == "x0":
            return x0
        residual = xt - abar.sqrt() * x0
        eps = residual / (1 - abar).sqrt()
        if predict == "eps":
            return eps
        if predict == "v":
            return abar.sqrt() * eps - (1 - abar).sqrt() * x0
        # mu~, as a Kalman update of N(sqrt(abar_{t-1}) x_0, 1 - abar_{t-1}) by x_t = sqrt(alpha) x_{t-1} + noise
        alpha, spread = abar / abar_prev, 1 - abar_prev
        return abar_prev.sqrt() * x0 + alpha.sqrt() * spread / (alpha * spread + 1 - alpha) * residual

    return call


def with_variance(network, raw):
    """`network` with 2C output channels: the second half is raw(xt, timestep), of xt's shape."""
    return lambda x, timestep, y=None: torch.cat([network(x, timestep, y), raw(x, timestep)], dim=1)


@dataclass(frozen=True)
class FiniteData:
    """x_0 is one of `images` [K, C, H, W], all equally likely."""

    images: Tensor

    def denoise(self, xt, abar):
        """E[x_0 | x_t] = sum_k softmax_k(-|x_t - sqrt(abar) x_k|^2 / (2 (1 - abar))) x_k; abar [B, 1, 1, 1]."""
        distance = (xt[:, None] - abar[:, None].sqrt() * self.images).square().flatten(2).sum(2)  # squared, [B, K]
        weight = torch.softmax(-distance / (2 * (1 - abar.flatten()[:, None])), dim=1)
        return torch.einsum("bk,kchw->bchw", weight, self.images)


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, covariance); mean [C, H, W], covariance [D, D], D = C H W."""

    mean: Tensor
    covariance: Tensor

    @property
    def D(self):
        return self.mean.numel()

    def denoise(self, xt, abar):
        """E[x_0|x_t] = mu + sqrt(abar) S (abar S + (1-abar) I)^-1 (x_t - sqrt(abar) mu), S the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        a = abar.reshape(-1, 1)
        gain = a.sqrt() * values / (a * values + 1 - a)  # [B, D]
        residual = (xt - abar.sqrt() * self.mean).flatten(1) @ vectors
        return self.mean + ((gain * residual) @ vectors.T).view_as(xt)

    def q_moments(self, abar):
        """Mean [D] and covariance [D, D] of q(x_t)."""
        return abar.sqrt() * self.mean.flatten(), abar * self.covariance + (1 - abar) * torch.eye(self.D).double()

    def x0_covariance(self, abar):
        """Cov[x_0 | x_t] [D, D], in precision form; it does not depend on x_t."""
        return torch.linalg.inv(torch.linalg.inv(self.covariance) + abar / (1 - abar) * torch.eye(self.D).double())

    def reverse(self, schedule, t):
        """The true q(x_{t-1} | x_t) = N(A x_t + b, P): A [D, D], b [D], P [D, D]."""
        abar, abar_prev = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
        alpha = abar / abar_prev
        mean, covariance = self.q_moments(abar_prev)
        P = torch.linalg.inv(torch.linalg.inv(covariance) + alpha / (1 - alpha) * torch.eye(self.D).double())
        A = P * alpha.sqrt() / (1 - alpha)
        return A, mean - alpha.sqrt() * A @ mean, P

    def variances(self, schedule):
        """A variance table [T+1]: the mean over dimensions of Var[x_{t-1} | x_t]. It is exact if S = s^2 I."""
        table = [self.reverse(schedule, t)[2].diagonal().mean() for t in range(1, schedule.T + 1)]
        return torch.stack([torch.ones(()).double(), *table])

    def chain(self, schedule, variance, last=True):
        """Mean and covariance of x_0 from Algorithm 2, run from N(0, I) with the exact mean and `variance` [T+1].

        With `last`, z = 0 at t = 1 as in the paper; without it, x_0 is drawn from p(x_0 | x_1).
        """
        mean, covariance = torch.zeros(self.D).double(), torch.eye(self.D).double()
        for t in range(schedule.T, 0, -1):
            A, b, _ = self.reverse(schedule, t)
            mean, covariance = A @ mean + b, A @ covariance @ A.T
            if t > 1 or not last:
                covariance = covariance + variance[t] * torch.eye(self.D).double()
        return mean, covariance

    def bound_kl(self, schedule, variance):
        """The expectation of L_1 .. L_{T-1}, nats [T-1], for the exact mean and `variance` [T+1]:

        D/2 (log(s^2/beta~) + beta~/s^2 - 1) + c_0^2 / (2 s^2) tr Cov[x_0 | x_t].
        """
        terms = []
        for t in range(2, schedule.T + 1):
            abar, abar_prev = schedule.alpha_bar[t], schedule.alpha_bar[t - 1]
            alpha, s2 = abar / abar_prev, variance[t]
            tilde = 1 / (1 / (1 - abar_prev) + alpha / (1 - alpha))
            c_0 = tilde * abar_prev.sqrt() / (1 - abar_prev)
            spread = self.D / 2 * ((s2 / tilde).log() + tilde / s2 - 1)
            terms.append(spread + c_0**2 / (2 * s2) * self.x0_covariance(abar).trace())
        return torch.stack(terms)

    def bound_prior(self, schedule):
        """The expectation of L_T, nats: E KL(N(sqrt(abar) x_0, (1 - abar) I) || N(0, I))."""
        abar = schedule.alpha_bar[-1]
        square = self.covariance.trace() + self.mean.square().sum()
        return 0.5 * (abar * square - self.D * abar - self.D * (1 - abar).log())

    def entropy(self):
        """The differential entropy of x_0, nats."""
        return 0.5 * (self.D * math.log(2 * math.pi * math.e) + torch.logdet(self.covariance))

    def sample(self, n, generator):
        """n draws [n, C, H, W]."""
        return self._from_normal(torch.randn(n, self.D, generator=generator, dtype=torch.float64))

    def cubature(self):
        """(x0, eps), each [4D, C, H, W]: points at which the average of a cubic is its expectation over (x_0, eps).

        The points +- sqrt(n) e_i integrate polynomials of degree 3 exactly against N(0, I_n), with n = 2D.
        """
        n = 2 * self.D
        points = math.sqrt(n) * torch.cat([torch.eye(n), -torch.eye(n)]).double()
        return self._from_normal(points[:, : self.D]), points[:, self.D :].reshape(-1, *self.mean.shape)

    def _from_normal(self, u):
        return self.mean + (u @ torch.linalg.cholesky(self.covariance).T).view(-1, *self.mean.shape)


def correlated():
    """Data of four dimensions, [1, 2, 2], with means and correlations of both signs."""
    factor = torch.tensor([[0.6, 0, 0, 0], [0.3, 0.4, 0, 0], [-0.2, 0.1, 0.3, 0], [0.1, -0.3, 0.2, 0.5]]).double()
    return GaussianData(torch.tensor([0.3, -0.2, 0.1, 0.5]).double().view(1, 2, 2), factor @ factor.T)


def isotropic(s=0.5):
    """Data of two dimensions, [2, 1, 1], with variance s^2. The true reverse chain then has one variance per level."""
    return GaussianData(torch.tensor([0.3, -0.4]).double().view(2, 1, 1), s**2 * torch.eye(2).double())


def normal(n, shape, seed=0):
    """noise(t), float64 [n, *shape]: a draw for each level, which is the same in every call."""
    return lambda t: torch.randn(n, *shape, generator=torch.Generator().manual_seed(1000 * seed + t)).double()


def z_score(x, mean, covariance):
    """The largest |z| over means and covariances of the sample x [n, ...], if it is drawn from N(mean, covariance)."""
    x, n = x.flatten(1), len(x)
    variance = covariance.diagonal()
    z_mean = (x.mean(0) - mean) / (variance / n).sqrt()
    z_covariance = (x.T.cov() - covariance) / ((covariance**2 + torch.outer(variance, variance)) / n).sqrt()
    return max(z_mean.abs().max().item(), z_covariance.abs().max().item())


def last(steps):
    """The last Step of a sampler."""
    *_, step = steps
    return step


def randomised_unet():
    """A small network whose output is not near zero, as it is after initialisation."""
    torch.manual_seed(0)
    net = UNet(1, width=32, channel_multipliers=(1, 2), num_res_blocks=1)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return net
