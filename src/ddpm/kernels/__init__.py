"""Norm, swish, dropout and convolution in one pass on x86-64 CPUs, in C that is compiled at first use.

amx.c computes in bfloat16 on AMX tiles. winograd.c computes in float32 or float64 and needs a quarter of the
multiplications of a 3x3 convolution. Nothing depends on these kernels: without such a CPU or without a C compiler,
`ready` returns False and unet.py uses PyTorch's operations (the plain path).
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

PLANE = 32  # the C code processes channels in planes of this many
MAX_CHANNELS, MAX_GROUPS = 4096, 32  # the largest number of channels, and of groups in a norm
FLAGS = (
    "-O3", "-fno-math-errno", "-fopenmp", "-fPIC", f"-DPLANE={PLANE}", f"-DMOST={MAX_CHANNELS}",
    f"-DMOST_GROUPS={MAX_GROUPS}",
)  # fmt: skip


class Source(NamedTuple):
    """A C file of this folder.

    file     its name
    flags    the compiler flags, besides FLAGS
    needs    the CPU capability that it needs, as `torch.cpu.get_capabilities` names it
    weights  the dtype of weights, of sums, and of the gradients of weights
    """

    file: str
    flags: tuple[str, ...]
    needs: str
    weights: torch.dtype


SOURCES = {
    torch.bfloat16: Source("amx.c", ("-march=sapphirerapids", "-mprefer-vector-width=512"), "amx_bf16", torch.float32),
    torch.float32: Source("winograd.c", ("-march=x86-64-v3",), "avx2", torch.float32),
    torch.float64: Source("winograd.c", ("-march=x86-64-v3", "-DDOUBLE"), "avx2", torch.float64),
}


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels that compute in `dtype`, or None if this machine cannot compile or run them."""
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
        except OSError:  # the file is missing or damaged
            _compile(source, path, compiler, flags)
            library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home folder
        warnings.warn(f"{file} cannot be used ({error}): {slow}", stacklevel=2)
        return None
    return library if library.ready() else None


def _compile(source: Path, path: Path, compiler: str, flags: Sequence[str]) -> None:
    """Compile a source to the library `path`, which is written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        subprocess.run([compiler, *flags, "-c", source, "-o", compiled], check=True, capture_output=True)
        # Without -fopenmp the linker takes PyTorch's OpenMP, so there is no second set of threads.
        subprocess.run([compiler, "-shared", compiled, "-o", linked], check=True, capture_output=True)
        ctypes.CDLL(str(linked))  # raises OSError if the library cannot be loaded; it is then not kept
        with linked.open("rb") as file:
            os.fsync(file.fileno())
        linked.rename(path)


def ready(dtype: torch.dtype | None) -> bool:
    """Whether there are kernels that compute in dtype and this machine can use them."""
    return dtype in SOURCES and _library(dtype) is not None


def identity(dtype: torch.dtype | None) -> str:
    """A name for the kernels that compute in dtype, from their source and compiler; empty if they are not `ready`."""
    library = _library(dtype) if dtype in SOURCES else None
    return "" if library is None else Path(library._name).stem


_disabled = ContextVar("_disabled", default=False)


@contextmanager
def disabled() -> Iterator[None]:
    """A context in which unet.py uses the plain path, as it does on other machines.

    With gradient checkpointing, call `backward` inside too, because it computes the forward pass again.
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution of x is computed."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _traced() -> bool:
    """Whether PyTorch records or transforms calls (compile, trace, functorch), which it cannot do with our kernels."""
    recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return recorded or transformed or torch._C._len_torch_dispatch_stack() > 0


def usable(x: Tensor, layer: nn.Conv2d, norm: nn.GroupNorm | None = None) -> bool:
    """Whether `convolution` can compute this layer. If not, PyTorch computes it, or reports what is wrong with it.

    It needs a dtype that is `ready`, a plain 3x3 or 1x1 convolution of x's channels, and a norm with weight and bias.
    """
    if x.device.type != "cpu" or _traced() or _disabled.get():
        return False
    dtype = _compute_dtype(x)
    if not ready(dtype):
        return False
    same = (layer.kernel_size[0] // 2,) * 2  # the padding that keeps H and W
    plain = layer.kernel_size in ((1, 1), (3, 3)) and layer.padding == same and layer.padding_mode == "zeros"
    plain = plain and layer.stride == layer.dilation == (1, 1) and layer.groups == 1
    plain = plain and max(layer.weight.shape[:2]) <= MAX_CHANNELS
    plain = plain and x.dim() == 4 and x.shape[1] == layer.in_channels and x.numel() > 0
    if norm is not None:
        plain = plain and norm.num_channels == x.shape[1] and x.shape[1] % PLANE == 0 and norm.num_groups <= MAX_GROUPS
    modules = [layer] if norm is None else [layer, norm]
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    parameters = [parameter for module in modules for parameter in (module.weight, module.bias)]
    weights = SOURCES[dtype].weights
    return plain and not hooked and all(p is not None and p.dtype == weights for p in parameters)


class _Before(ctypes.Structure):
    """The struct `before` of common.h: norm, swish and dropout before the convolution, or none if gamma is NULL."""

    _fields_ = (
        ("gamma", ctypes.c_void_p), ("beta", ctypes.c_void_p), ("mean", ctypes.c_void_p), ("rstd", ctypes.c_void_p),
        ("eps", ctypes.c_double), ("keep", ctypes.c_double), ("groups", ctypes.c_long), ("swish", ctypes.c_long),
        ("seed", ctypes.c_uint64),
    )  # fmt: skip


def _before(gamma: Tensor | None, beta: Tensor | None, stats: Tensor | None, *settings: Any) -> _Before:
    """The struct for a norm with these parameters, statistics and settings (eps, keep, groups, swish, seed)."""
    if gamma is None or beta is None or stats is None:
        return _Before(keep=1.0)
    mean = stats.data_ptr()
    rstd = mean + stats.numel() // 2 * stats.element_size()
    return _Before(gamma.data_ptr(), beta.data_ptr(), mean, rstd, *settings)


def _call(dtype: torch.dtype, name: str, *args: Tensor | _Before | int | None) -> int:
    """Call a function of the kernels that compute in `dtype` and return its result, if it has one.

    Tensors are passed as pointers, and None as NULL.
    """
    library = _library(dtype)
    assert library is not None
    converted: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            converted.append(ctypes.c_void_p(a.data_ptr()))
        elif isinstance(a, _Before):
            converted.append(ctypes.byref(a))
        else:
            converted.append(ctypes.c_void_p() if a is None else ctypes.c_long(a))
    result: int = getattr(library, name)(*converted)
    return result


def _run(dtype: torch.dtype, name: str, *args: Tensor | _Before | int | None) -> None:
    """Call a function of the kernels that returns 0, or FULL if the memory is full. Then raises RuntimeError."""
    if _call(dtype, name, *args):
        raise RuntimeError(f"can't allocate memory for a convolution ({name})")


Packed: TypeAlias = dict[tuple[int, torch.dtype, str], tuple[Tensor, Tensor]]
"""Weights and their packed form, by the weights' id, the dtype and the packing function (see `_pack`)."""
_frozen: ContextVar[Packed | None] = ContextVar("_frozen", default=None)


@contextmanager
def frozen(packed: Packed | None = None) -> Iterator[None]:
    """A context in which weights do not change, so that each is packed once and not in every call.

    The packed weights are kept in `packed`, if given. The caller must decide this because PyTorch cannot tell whether
    weights changed: fused optimisers and foreach functions do not raise a tensor's version.
    """
    outer = _frozen.get()
    token = _frozen.set(packed if packed is not None else {} if outer is None else outer)
    try:
        yield
    finally:
        _frozen.reset(token)


def _pack(w: Tensor, x: Tensor, name: str = "pack") -> tuple[Tensor, int]:
    """The weights [O, I, k, k] in the kernels' layout for images like x, and how many numbers it has for a [k, k]."""
    (O, I, kernel, _), (B, _, H, W) = w.shape, x.shape
    packed, taps = _frozen.get(), kernel * kernel
    numbers = _call(x.dtype, "packed", B, H, W, taps, packed is not None)
    key = id(w), x.dtype, name
    if packed is not None and key in packed and packed[key][0] is w:  # in a copied dict the id may be another tensor's
        return packed[key][1], numbers
    out = torch.empty(_round_up(O) * _round_up(I) * numbers, dtype=x.dtype, device="cpu")
    _call(x.dtype, name, w.contiguous(memory_format=torch.channels_last), out, O, I, taps, numbers)
    if packed is not None:
        packed[key] = w, out  # holding w keeps its id from being used again
    return out, numbers


def _round_up(channels: int) -> int:
    """The next multiple of PLANE."""
    return -(-channels // PLANE) * PLANE


def _planes(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert x to the kernels' layout: channels last, padded with zero channels to a multiple of PLANE."""
    if missing := -x.shape[1] % PLANE:
        x = F.pad(x, (0, 0, 0, 0, 0, missing))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _empty_like(x: Tensor, channels: int) -> Tensor:
    """An uninitialised tensor with x's batch size, height, width and dtype and this many channels."""
    B, _, H, W = x.shape
    return torch.empty((B, channels, H, W), dtype=x.dtype, device="cpu", memory_format=torch.channels_last)


def _zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    """Zeros in the dtype of sums and of gradients of weights, if convolutions are computed in `dtype`."""
    return torch.zeros(shape, dtype=SOURCES[dtype].weights, device="cpu")


def _forward(
    x: Tensor, w: Tensor, bias: Tensor, gamma: Tensor | None, beta: Tensor | None, add: Tensor | None,
    residual: Tensor | None, settings: tuple[float, float, int, bool, int],
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The result, x in the kernels' layout, and the norm's means and inverse deviations; `settings` as in `_before`."""
    dtype = _compute_dtype(x)
    x = _planes(x, dtype)
    (B, I, H, W), (count, _, kernel, _) = x.shape, w.shape
    O = _round_up(count)
    stats = None if gamma is None else _zeros(dtype, 2, B, settings[2])
    out = _empty_like(x, O)
    if O > count:
        bias = F.pad(bias, (0, O - count))
    added = None if add is None else add.to(w.dtype).contiguous()
    residual = None if residual is None else _planes(residual, dtype)
    weights, numbers = _pack(w, x)
    _run(dtype, "forward", x, out, weights, bias, added, residual, B, H, W, I, O, kernel * kernel, numbers,
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
        y, dx, transposed, numbers = x, None, None, 0
        if gamma is not None:
            y = _empty_like(x, I)
        if ctx.needs_input_grad[0] or gamma is not None:
            dx = _empty_like(x, I)
            transposed, numbers = _pack(w, x, "pack_transposed")
        norms, dadd = _zeros(dtype, 2, B, I), _zeros(dtype, B, O)
        _run(dtype, "backward_data", dout, x, dx, y, transposed, norms[0], norms[1], dadd, B, H, W, I, O, taps,
             numbers, before)  # fmt: skip
        dw = None
        if ctx.needs_input_grad[1]:
            dw = _zeros(dtype, O, *w.shape[2:], I).permute(0, 3, 1, 2)
            _run(dtype, "backward_weight", dout, y, dw, B, H, W, I, O, taps)
            dw = dw if dw.shape == w.shape else dw[: len(w), : w.shape[1]]  # PyTorch copies a slice, but not the whole
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
    """layer(dropout(swish(norm(x)))) + add + residual, as `unet.convolve`; only for layers that are `usable`.

    x                    [B, I, H, W]
    add                  [B or 1, O]
    residual and result  [B, O, H, W]

    With a norm, I must be a multiple of 32; with add or residual, O must be. swish needs a norm, and dropout needs
    both. The result for an image depends on nothing else, to the bit: neither on the rest of the batch nor on the
    number of threads.
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
    if not torch.is_grad_enabled() and not dropout:  # autograd's overhead is as large as a small convolution
        return _forward(x, w, bias, gamma, beta, add, residual, (eps, 1.0, groups, swish, 0))[0]
    out: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
        x, w, bias, gamma, beta, add, residual, groups, eps, swish, dropout
    )
    return out
