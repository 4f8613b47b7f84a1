"""Norm, swish, dropout and convolution in one pass on x86-64 CPUs: C, compiled at first use.

amx.c computes in bfloat16 on AMX tiles, winograd.c in float32 or float64 with a quarter of a 3x3's multiplications.
Nothing needs them: where there is no such CPU or no C compiler, `ready` is false and unet.py's plain path runs.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.autograd.forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PLANE = 32  # channels that lie together; more come in multiples of it
MOST, MOST_GROUPS = 4096, 32  # channels, and groups of a norm
FLAGS = (
    "-O3", "-fno-math-errno", "-fopenmp", "-fPIC", f"-DPLANE={PLANE}", f"-DMOST={MOST}", f"-DMOST_GROUPS={MOST_GROUPS}",
)  # fmt: skip


class Source(NamedTuple):
    """A file here, how it is compiled, and for which CPUs."""

    file: str
    flags: tuple[str, ...]
    needs: str
    weights: torch.dtype  # of weights, sums and gradients of weights


SOURCES = {
    torch.bfloat16: Source("amx.c", ("-march=sapphirerapids", "-mprefer-vector-width=512"), "amx_bf16", torch.float32),
    torch.float32: Source("winograd.c", ("-march=x86-64-v3",), "avx2", torch.float32),
    torch.float64: Source("winograd.c", ("-march=x86-64-v3", "-DDOUBLE"), "avx2", torch.float64),
}


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels that compute in `dtype`; None where they cannot be had."""
    file, flags, needs, *_ = SOURCES[dtype]
    if sys.platform != "linux" or not torch.cpu.get_capabilities().get(needs):
        return None
    slow = f"{str(dtype).removeprefix('torch.')} is about half as fast on this CPU"
    compiler = shutil.which(os.environ.get("CC", "gcc")) or shutil.which("cc")
    if compiler is None:
        warnings.warn(f"no C compiler (CC, gcc, cc): {slow}", stacklevel=2)
        return None
    source, flags = Path(__file__).with_name(file), (*flags, *FLAGS)
    text = source.read_bytes() + source.with_name("common.h").read_bytes()
    try:
        release = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
        name = hashlib.sha256(text + release + " ".join((compiler, *flags)).encode()).hexdigest()[:16]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm"
        path = home / f"kernels-{name}.so"
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # not there, or damaged
            _compile(source, path, compiler, flags)
            library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home
        warnings.warn(f"{file} cannot be used ({error}): {slow}", stacklevel=2)
        return None
    return library if library.ready() else None


def _compile(source: Path, path: Path, compiler: str, flags: Sequence[str]) -> None:
    """`path`, the library of a source: whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        subprocess.run([compiler, *flags, "-c", source, "-o", made], check=True, capture_output=True)
        # Linked without -fopenmp: the threads are then those of torch's own OpenMP, not a second set.
        subprocess.run([compiler, "-shared", made, "-o", linked], check=True, capture_output=True)
        ctypes.CDLL(str(linked))  # what does not load is not kept
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        linked.rename(path)


def ready(dtype: torch.dtype | None) -> bool:
    """Whether there are kernels that compute in dtype, and this machine has them."""
    return dtype in SOURCES and _library(dtype) is not None


def identity(dtype: torch.dtype | None) -> str:
    """A name of the kernels that compute in dtype, by their source and compiler; empty where they are not `ready`."""
    library = _library(dtype) if dtype in SOURCES else None
    return "" if library is None else Path(library._name).stem


_disabled = ContextVar("_disabled", default=False)


@contextmanager
def disabled() -> Iterator[None]:
    """Run the plain path inside, as on other machines. With checkpointing `backward` belongs inside, too."""
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def _computes(x: Tensor) -> torch.dtype:
    """What a convolution of x is computed in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _watched() -> bool:
    """Whether calls are recorded or transformed, which sees operations of torch only."""
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return recorded or transformed or torch._C._len_torch_dispatch_stack() > 0


def usable(x: Tensor, layer: nn.Conv2d, norm: nn.GroupNorm | None = None) -> bool:
    """Whether `convolution` can do this: computation in a dtype that is `ready`, a plain 3x3 or 1x1 of x's channels,
    and a norm with factors. What it cannot do is left to torch, mistakes among it."""
    if x.device.type != "cpu" or _watched() or _disabled.get():
        return False
    dtype = _computes(x)
    if not ready(dtype):
        return False
    square, edge = layer.kernel_size, (layer.kernel_size[0] // 2,) * 2
    plain = square in ((1, 1), (3, 3)) and layer.padding == edge and layer.padding_mode == "zeros"
    plain = plain and layer.stride == layer.dilation == (1, 1) and layer.groups == 1
    plain = plain and max(layer.weight.shape[:2]) <= MOST
    plain = plain and x.dim() == 4 and x.shape[1] == layer.in_channels and x.numel() > 0
    if norm is not None:
        plain = plain and norm.num_channels == x.shape[1] and x.shape[1] % PLANE == 0 and norm.num_groups <= MOST_GROUPS
    used = [layer] if norm is None else [layer, norm]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in used)
    parts, weights = [part for module in used for part in (module.weight, module.bias)], SOURCES[dtype].weights
    return plain and not hooked and all(part is not None and part.dtype == weights for part in parts)


class _Before(ctypes.Structure):
    """What comes before the convolution; `before` of the C files. Without gamma nothing does."""

    _fields_ = (
        ("gamma", ctypes.c_void_p), ("beta", ctypes.c_void_p), ("mean", ctypes.c_void_p), ("rstd", ctypes.c_void_p),
        ("eps", ctypes.c_double), ("keep", ctypes.c_double), ("groups", ctypes.c_long), ("swish", ctypes.c_long),
        ("seed", ctypes.c_uint64),
    )  # fmt: skip


def _before(gamma: Tensor | None, beta: Tensor | None, stats: Tensor | None, *settings: Any) -> _Before:
    if gamma is None or beta is None or stats is None:
        return _Before(keep=1.0)
    mean = stats.data_ptr()
    rstd = mean + stats.numel() // 2 * stats.element_size()
    return _Before(gamma.data_ptr(), beta.data_ptr(), mean, rstd, *settings)


def _call(dtype: torch.dtype, name: str, *args: Tensor | _Before | int | None) -> int:
    """A function of the kernels that compute in `dtype`; tensors go as pointers, None as NULL. What it returns, if it
    does."""
    library = _library(dtype)
    assert library is not None
    plain: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            plain.append(ctypes.c_void_p(a.data_ptr()))
        elif isinstance(a, _Before):
            plain.append(ctypes.byref(a))
        else:
            plain.append(ctypes.c_void_p() if a is None else ctypes.c_long(a))
    found: int = getattr(library, name)(*plain)
    return found


def _run(dtype: torch.dtype, name: str, *args: Tensor | _Before | int | None) -> None:
    """The same of a function that says whether there was memory for it."""
    if _call(dtype, name, *args):
        raise RuntimeError(f"can't allocate memory for a convolution ({name})")


Packed: TypeAlias = dict[tuple[int, torch.dtype, str], tuple[Tensor, Tensor]]
"""Weights, and what `_pack` made of them."""
_frozen: ContextVar[Packed | None] = ContextVar("_frozen", default=None)


@contextmanager
def frozen(packed: Packed | None = None) -> Iterator[None]:
    """Weights do not change inside, so that each is packed once and not in every call; kept in `packed`, if given.

    Left to the caller because torch cannot tell: fused optimisers and foreach functions leave a tensor's version as is.
    """
    outer = _frozen.get()
    token = _frozen.set(packed if packed is not None else {} if outer is None else outer)
    try:
        yield
    finally:
        _frozen.reset(token)


def _pack(w: Tensor, x: Tensor, name: str = "pack") -> tuple[Tensor, int]:
    """The weights [O, I, k, k] as the kernels read them for images of the shape and dtype of x; and how many numbers
    each channel's kernel is."""
    (O, I, kernel, _), (B, _, H, W) = w.shape, x.shape
    kept, taps = _frozen.get(), kernel * kernel
    numbers = _call(x.dtype, "packed", B, H, W, taps, kept is not None)
    key = id(w), x.dtype, name
    if kept is not None and key in kept and kept[key][0] is w:  # of a copied `kept` it may be another's id
        return kept[key][1], numbers
    out = torch.empty(_up(O) * _up(I) * numbers, dtype=x.dtype, device="cpu")
    _call(x.dtype, name, w.contiguous(memory_format=torch.channels_last), out, O, I, taps, numbers)
    if kept is not None:
        kept[key] = w, out  # with w, so that its id stays its own
    return out, numbers


def _up(channels: int) -> int:
    """The next multiple of a plane."""
    return -(-channels // PLANE) * PLANE


def _planes(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the kernels read it: channels last, with zeros up to a multiple of a plane."""
    if missing := -x.shape[1] % PLANE:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _like(x: Tensor, channels: int) -> Tensor:
    """Room for an image of so many channels for each of x."""
    B, _, H, W = x.shape
    return torch.empty((B, channels, H, W), dtype=x.dtype, device="cpu", memory_format=torch.channels_last)


def _zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    """Zeros for what is summed or like weights, where convolutions are computed in dtype."""
    return torch.zeros(shape, dtype=SOURCES[dtype].weights, device="cpu")


def _forward(
    x: Tensor, w: Tensor, bias: Tensor, gamma: Tensor | None, beta: Tensor | None, add: Tensor | None,
    residual: Tensor | None, settings: tuple[float, float, int, bool, int],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The result, x as it was read, and the norm's means and deviations; `settings` as in `_Before`."""
    dtype = _computes(x)
    x = _planes(x, dtype)
    (B, I, H, W), (count, _, kernel, _) = x.shape, w.shape
    O = _up(count)
    stats = None if gamma is None else _zeros(dtype, 2, B, settings[2])
    out = _like(x, O)
    if O > count:
        bias = F.pad(bias, (0, O - count))
    added = None if add is None else add.to(w.dtype).contiguous()
    resident = None if residual is None else _planes(residual, dtype)
    weights, numbers = _pack(w, x)
    _run(dtype, "forward", x, out, weights, bias, added, resident, B, H, W, I, O, kernel * kernel, numbers,
         _before(gamma, beta, stats, *settings))  # fmt: skip
    return out if O == count else out[:, :count].contiguous(), x, stats


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor, gamma: Tensor | None, beta: Tensor | None, add: Tensor | None,
        residual: Tensor | None, groups: int, eps: float, swish: bool, dropout: float,
    ) -> Tensor:  # fmt: skip
        ctx.channels = x.shape[1]
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if dropout else 0
        ctx.settings = eps, 1 - dropout, groups, swish, seed
        out, x, stats = _forward(x, w, bias, gamma, beta, add, residual, ctx.settings)
        ctx.save_for_backward(x, w, gamma, beta, stats)
        ctx.has_add, ctx.has_residual = add is not None, residual is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, w, gamma, beta, stats = ctx.saved_tensors
        dtype = x.dtype
        dout = _planes(dout, dtype)
        (B, I, H, W), (O, taps) = x.shape, (dout.shape[1], w[0, 0].numel())
        before = _before(gamma, beta, stats, *ctx.settings)
        y, dx, back, numbers = x, None, None, 0
        if gamma is not None:
            y = _like(x, I)
        if ctx.needs_input_grad[0] or gamma is not None:
            dx = _like(x, I)
            back, numbers = _pack(w, x, "pack_transposed")
        norms, dadd = _zeros(dtype, 2, B, I), _zeros(dtype, B, O)
        _run(dtype, "backward_data", dout, x, dx, y, back, norms[0], norms[1], dadd, B, H, W, I, O, taps, numbers,
             before)  # fmt: skip
        dw = None
        if ctx.needs_input_grad[1]:
            dw = _zeros(dtype, O, *w.shape[2:], I).permute(0, 3, 1, 2)
            _run(dtype, "backward_weight", dout, y, dw, B, H, W, I, O, taps)
            dw = dw if dw.shape == w.shape else dw[: len(w), : w.shape[1]]  # a whole one is taken without a copy
        dgamma, dbeta = norms.sum(1) if gamma is not None else (None, None)
        return (
            None if dx is None else dx[:, : ctx.channels], dw, dadd.sum(0)[: len(w)], dgamma, dbeta,
            dadd if ctx.has_add else None, dout if ctx.has_residual else None, None, None, None, None,
        )  # fmt: skip


def convolution(
    x: Tensor,
    layer: nn.Conv2d,
    norm: nn.GroupNorm | None = None,
    swish: bool = False,
    dropout: float = 0.0,
    add: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """layer(dropout(swish(norm(x)))) + add + residual, as `unet.convolve`; where it is `usable`.

    x [B, I, H, W], add [B or 1, O], residual and result [B, O, H, W]; norm, add and residual want channels in
    multiples of 32, swish a norm, and dropout both. What each image comes to depends on nothing else, to the bit: not
    on the batch or the number of threads.
    """
    assert (add is None and residual is None) or len(layer.weight) % PLANE == 0
    assert norm is not None or not swish
    assert swish or not dropout
    if add is not None:
        add = add.expand(len(x), len(layer.weight))
    if residual is not None:
        residual = residual.expand(len(x), len(layer.weight), *x.shape[2:])
    gamma, beta, groups, eps = None, None, 1, 0.0
    if norm is not None:
        gamma, beta, groups, eps = norm.weight, norm.bias, norm.num_groups, norm.eps
    w, bias = layer.weight, layer.bias
    assert bias is not None
    if not torch.is_grad_enabled() and not dropout:  # what autograd does takes as long as a small convolution
        return _forward(x, w, bias, gamma, beta, add, residual, (eps, 1.0, groups, swish, 0))[0]
    out: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
        x, w, bias, gamma, beta, add, residual, groups, eps, swish, dropout
    )
    return out
