"""Optimizers: Adam for all weights, or Muon for those between hidden layers and Adam for the others.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the momentum U S V^T of a weight matrix by
about U V^T. So the weights move equally far in all directions, and not only in the few whose gradients are large.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTUM = 0.95
ROUNDS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024: steep at 0, so that small singular values grow fast

_ADAM, _MUON = ("exp_avg", "exp_avg_sq"), ("momentum",)  # the moments of a weight
_OUTER = ("conv_in", "conv_out", "time1", "time2", "label", "warp")
"""The layers of `UNet` that are not hidden: the outer convolutions, and what reads timesteps, classes and warps."""


def moments(network: nn.Module, optimizer: str) -> dict[str, tuple[str, ...]]:
    """The names of the moments that the optimizer adam or muon keeps of each weight of a network.

    Weights of convolutions and linear layers between hidden layers are Muon's, and have one moment. The first and the
    last convolution, embeddings, norms and biases are Adam's, and have two.

    >>> kept = moments(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)), "muon")
    >>> kept["0.weight"], kept["0.bias"], kept["1.weight"]
    (('momentum',), ('exp_avg', 'exp_avg_sq'), ('exp_avg', 'exp_avg_sq'))
    """

    def hidden(name: str, p: nn.Parameter) -> bool:
        return p.ndim > 1 and name.partition(".")[0] not in _OUTER

    named = network.named_parameters()
    return {name: _MUON if optimizer == "muon" and hidden(name, p) else _ADAM for name, p in named}


def make(network: nn.Module, optimizer: str, lr: float) -> list[Optimizer]:
    """The optimizers of a network for the setting `optimizer`, adam or muon. Each has one group of weights.

    >>> [type(each).__name__ for each in make(nn.Linear(2, 2), "muon", lr=1e-3)]
    ['Adam', 'Muon']
    """
    weights, kept = dict(network.named_parameters()), moments(network, optimizer)
    hidden, others = ([p for name, p in weights.items() if kept[name] == kind] for kind in (_MUON, _ADAM))
    adam = Adam(others, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=others[0].device.type != "mps")
    return [adam, Muon(hidden, lr)] if hidden else [adam]


def begin(optimizers: Iterable[Optimizer], step: int) -> None:
    """Give all weights moments of 0 after `step` steps. The moments of a checkpoint can then be copied into them.

    >>> (muon,) = found = [Muon([nn.Parameter(torch.ones(2, 2))], lr=1e-3)]
    >>> begin(found, step=100)
    >>> [state["momentum"].tolist() for state in muon.state.values()]
    [[[0.0, 0.0], [0.0, 0.0]]]
    """
    for optimizer in optimizers:
        muon = isinstance(optimizer, Muon)
        for p in optimizer.param_groups[0]["params"]:  # moments have the memory layout of the weights, for fused Adam
            optimizer.state[p] = {key: torch.zeros_like(p) for key in (_MUON if muon else _ADAM)}
            if not muon:
                optimizer.state[p]["step"] = torch.tensor(float(step), device=p.device if p.is_cuda else "cpu")


def _bare(method: Any) -> Any:
    """A method of torch's optimizers without the wrapper that imports torch's compiler, which takes seconds."""
    return getattr(method, "__wrapped__", method)


class _Bare(Optimizer):
    """The base of both optimizers, which start without torch's compiler."""

    add_param_group, zero_grad = _bare(Optimizer.add_param_group), _bare(Optimizer.zero_grad)


class Adam(_Bare, torch.optim.Adam):
    """torch's Adam (Kingma and Ba 2015), and the same updates.

    >>> p = nn.Parameter(torch.zeros(1))
    >>> p.grad = torch.tensor([3.0])
    >>> Adam([p], lr=0.1).step()
    >>> p.data
    tensor([-0.1000])
    """

    step = torch.no_grad()(_bare(torch.optim.Adam.step))


class Muon(_Bare):
    """Nesterov's momentum, made orthogonal, for weights [out, in] and [out, in, k, k]. There is no weight decay.

    A convolution is the matrix [out, in k k]. With the factor 0.2 sqrt(max(out, in k k)) the update has an RMS of about
    0.2 lr, as Adam's has. So both use one learning rate (Liu et al. 2025, Muon is Scalable for LLM Training, Eq. 4).

    >>> p = nn.Parameter(torch.zeros(2, 2))
    >>> p.grad = torch.tensor([[3.0, 0.0], [0.0, 0.3]])
    >>> Muon([p], lr=0.1).step()
    >>> (p.diag() / (0.1 * 0.2 * math.sqrt(2))).tolist()  # -1 and -1, within the error of five rounds
    [-0.70..., -0.70...]
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights by their gradients. Matrices of one shape are computed together."""
        if not self.state:
            begin([self], 0)
        (group,) = self.param_groups
        by_shape = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                by_shape[p.flatten(1).shape].append((p, p.grad, self.state[p]["momentum"]))
        for shape, found in by_shape.items():
            weights, gradients, momenta = map(list, zip(*found, strict=True))
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
            updates = orthogonal(torch.stack([each.flatten(1) for each in ahead]))
            shaped = [update.view_as(p) for update, p in zip(updates, weights, strict=True)]
            torch._foreach_add_(weights, shaped, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [N, rows, columns] with the same singular vectors, and singular values of about 1.

    This is the iteration of Newton and Schulz. A matrix X is first divided by its norm. A round then makes
    (a + b X X^T + c (X X^T)^2) X of it, which maps each singular value s to a s + b s^3 + c s^5. Five rounds bring the
    singular values from 0.0016 to 1 between 0.68 and 1.21. CUDA devices compute in bfloat16, as Jordan et al. do.

    >>> torch.linalg.svdvals(orthogonal(torch.tensor([[[5.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])))
    tensor([[0.79..., 0.72...]])
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # so that X X^T is the small one of the two products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    if x.dtype == torch.bfloat16:
        for _ in range(ROUNDS):
            xx = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
    else:  # the same rounds on X X^T alone, less than half of the work; bfloat16 is too coarse for that
        xx, one = x @ x.mT, torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        product = one
        for _ in range(ROUNDS):
            factor = a * one + torch.baddbmm(xx, xx, xx, beta=b, alpha=c)
            product, xx = factor @ product, factor @ xx @ factor  # polynomials of one matrix commute
        x = product @ x
    return (x.mT if tall else x).to(matrices.dtype).contiguous()
