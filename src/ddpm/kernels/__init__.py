"""Norm, swish, dropout and convolution in one pass on x86-64 CPUs, in C that is compiled at first use.

amx.c computes in bfloat16 on AMX tiles. winograd.c computes in float32 or float64 and needs a quarter of the
multiplications of a 3x3 convolution. Nothing depends on these kernels: without such a CPU or without a C compiler,
`ready` returns False and unet.py uses PyTorch's operations (the plain path). The environment variable DDPM_KERNELS=off
switches them off.
"""

import ctypes
import functools
import hashlib
import os
import secrets
import shutil
import stat
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

from ddpm.errors import InputError

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


class Library(ctypes.CDLL):
    """Compiled kernels from an open file. `build` names their source and compiler."""

    def __init__(self, descriptor: int, build: str) -> None:
        super().__init__(f"/proc/self/fd/{descriptor}")
        self.build = build


@functools.cache
def _library(dtype: torch.dtype) -> Library | None:
    """The compiled kernels that compute in `dtype`, or None if this machine cannot compile or run them."""
    if (setting := os.environ.get("DDPM_KERNELS", "on")) not in ("on", "off"):
        raise InputError(f"DDPM_KERNELS {setting!r}: want on or off")
    file, flags, needs, *_ = SOURCES[dtype]
    if setting == "off" or sys.platform != "linux" or not torch.cpu.get_capabilities().get(needs):
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
        _make_private(home)
        path = home / f"kernels-{name}.so"
        try:
            library = _load(path)
        except OSError:  # the file is missing or damaged, or somebody else put it there
            _write(path, _compile(source, compiler, flags))
            library = _load(path)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # RuntimeError: there is no home folder
        warnings.warn(f"{file} cannot be used ({error}): {slow}", stacklevel=2)
        return None
    return library if library.ready() else None


def _is_mine(about: os.stat_result) -> bool:
    """Whether a file or folder belongs to this user or to root, and nobody else can write to it."""
    return about.st_uid in (0, os.geteuid()) and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _make_private(folder: Path) -> None:
    """Make the folder of the libraries. Raises OSError if it is another user's, who could put any code there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.stat()
    if about.st_uid == os.geteuid():
        folder.chmod(stat.S_IMODE(about.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))
    if not _is_mine(folder.stat()):
        raise PermissionError(f"{folder} belongs to another user; XDG_CACHE_HOME names another place")


def _load(path: Path) -> Library:
    """The library that `_write` has written. Raises OSError if it is damaged or another user's.

    What was checked is what is loaded: the file is named by its descriptor, so that nobody can exchange it meanwhile.
    The descriptor stays open, because the loader takes a second file of the same name for the first one.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or not _is_mine(about):
            raise PermissionError(f"{path} is not this user's file")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read()
        if hashlib.sha256(content[:-_DIGEST]).digest() != content[-_DIGEST:]:
            raise OSError(f"{path} is damaged")
        return Library(descriptor, path.stem)
    except OSError:
        os.close(descriptor)
        raise


_DIGEST = 32  # the bytes of a SHA-256, which stands at the end of a library's file, where the loader does not look


def _write(path: Path, library: bytes) -> None:
    """Write a library with its SHA-256, completely or not at all."""
    part = path.with_name(f".{path.stem}-{secrets.token_hex(8)}.part")
    try:
        with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(library + hashlib.sha256(library).digest())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _compile(source: Path, compiler: str, flags: Sequence[str]) -> bytes:
    """The library of a source, which can be loaded. Raises OSError or CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        subprocess.run([compiler, *flags, "-c", source, "-o", compiled], check=True, capture_output=True)
        # Without -fopenmp the linker takes PyTorch's OpenMP, so there is no second set of threads.
        subprocess.run([compiler, "-shared", compiled, "-o", linked], check=True, capture_output=True)
        return linked.read_bytes()


def ready(dtype: torch.dtype | None) -> bool:
    """Whether there are kernels that compute in dtype and this machine can use them."""
    return dtype in SOURCES and _library(dtype) is not None


def identity(dtype: torch.dtype | None) -> str:
    """A name for the kernels that compute in dtype, from their source and compiler; empty if they are not `ready`."""
    library = _library(dtype) if dtype in SOURCES else None
    return "" if library is None else library.build


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


def _is_observed(modules: Sequence[nn.Module]) -> bool:
    """Whether something is to see the calls of PyTorch's own modules and operations, which our kernels replace.

    These are hooks, a `forward` that was replaced, and what records or transforms calls (trace, functorch, modes).
    PyTorch has no public names for some of them. A release without one of the names used here: True.
    """
    try:
        all_modules, C = torch.nn.modules.module, torch._C
        return bool(
            C._get_tracing_state() is not None
            or C._are_functorch_transforms_active()
            or torch.autograd.forward_ad._current_level >= 0
            or C._len_torch_dispatch_stack()
            or (C._len_torch_function_stack() and _is_in_function_mode())
            or all_modules._global_forward_hooks
            or all_modules._global_forward_pre_hooks
            or all_modules._global_backward_hooks
            or all_modules._global_backward_pre_hooks
            or any(map(_is_hooked, modules))
        )
    except AttributeError:
        return True


def _is_in_function_mode() -> bool:
    """Whether a mode may change calls. torch.set_default_device is a mode that does not."""
    modes = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(type(mode) is not torch.utils._device.DeviceContext for mode in modes)


def _is_hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _is_plain(tensor: object) -> bool:
    """Whether the numbers of a tensor lie in this machine's memory, and nothing else is to be done with them."""
    if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
        return False
    return tensor.is_cpu and tensor.layout is torch.strided and not tensor.is_nested


def usable(
    x: Tensor, layer: nn.Conv2d, norm: nn.GroupNorm | None = None, *others: Tensor | None, halving: bool = False
) -> bool:
    """Whether `convolution` can compute this layer. If not, PyTorch computes it, or reports what is wrong with it.

    others   add and residual
    halving  the layer has stride 2. Its result is every second one of `convolution`: from the first on if its padding
             is 1, and from the second on if it has none and x is padded with zeros at the right and the bottom

    It needs a dtype that is `ready`, exactly PyTorch's Conv2d and GroupNorm without hooks, a plain 3x3 or 1x1
    convolution of x's channels, a norm with weight and bias, and everything on the CPU.
    """
    if torch.compiler.is_compiling() or _disabled.get():  # first: a compiler stops at what it cannot follow below
        return False
    if type(layer) is not nn.Conv2d or (norm is not None and type(norm) is not nn.GroupNorm):
        return False
    modules = [layer] if norm is None else [layer, norm]
    parameters: list[Any] = [parameter for module in modules for parameter in (module.weight, module.bias)]
    if not all(map(_is_plain, parameters)) or not _is_plain(x) or not all(o is None or _is_plain(o) for o in others):
        return False
    dtype = _compute_dtype(x)
    if not ready(dtype) or _is_observed(modules):
        return False
    same = (layer.kernel_size[0] // 2,) * 2  # the padding that keeps H and W
    stride, paddings = ((2, 2), ((0, 0), same)) if halving else ((1, 1), (same,))
    plain = layer.kernel_size in ((1, 1), (3, 3)) and layer.padding in paddings and layer.padding_mode == "zeros"
    plain = plain and layer.stride == stride and layer.dilation == (1, 1) and layer.groups == 1
    O, I = layer.out_channels, layer.in_channels
    plain = plain and layer.weight.shape == (O, I, *layer.kernel_size) and max(O, I) <= MAX_CHANNELS
    plain = plain and x.dim() == 4 and x.shape[1] == I and x.numel() > 0
    if norm is not None:
        plain = plain and norm.num_channels == I and I % PLANE == 0 and norm.num_groups <= MAX_GROUPS
    sizes = [O] if norm is None else [O, I, I]  # of all parameters but the weight of the convolution
    plain = plain and [p.numel() for p in parameters[1:]] == sizes
    weights = SOURCES[dtype].weights
    return plain and all(p.dtype is weights for p in parameters)


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
    """Call a function of the kernels that returns 0, or OUT_OF_MEMORY. Then raises RuntimeError."""
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
