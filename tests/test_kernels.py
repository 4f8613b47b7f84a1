"""The kernels against PyTorch's operations in float64 (the plain path), and what else they guarantee."""

import copy
import functools
import os
import resource
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from several import printed
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from ddpm import kernels
from ddpm.errors import InputError
from ddpm.unet import Downsample, UNet, convolve

# On a CPU without AMX tiles, amx.c is compiled with tests/amx, which emulates them in plain C.
SOFTWARE = kernels.Source(
    "amx.c", ("-march=x86-64-v3", "-Wno-psabi", f"-I{Path(__file__).with_name('amx')}"), "avx2", torch.float32
)
anywhere = pytest.mark.skipif(not kernels.ready(torch.float32), reason="no avx2, or no C compiler")
KINDS = [pytest.param(dtype, marks=anywhere, id=str(dtype).removeprefix("torch.")) for dtype in kernels.SOURCES]
both = pytest.mark.parametrize("dtype", KINDS)
# The allowed relative error: the spacing of bfloat16; for the others, the rounding error of F(4x4, 3x3) and of sums of
# thousands of terms.
ERROR = {torch.bfloat16: 2.0**-8, torch.float32: 2e-6, torch.float64: 4e-15}


def computing(dtype: torch.dtype) -> AbstractContextManager[Any]:
    """A context in which convolutions are computed in dtype."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


@pytest.fixture(autouse=True, scope="module")
def _tiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not kernels.ready(torch.bfloat16):
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("kernels")))
            patch.setitem(kernels.SOURCES, torch.bfloat16, SOFTWARE)
            kernels._library.cache_clear()
        yield
    kernels._library.cache_clear()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def layers(c_in: int, c_out: int, kernel: int, dtype: torch.dtype) -> tuple[nn.Conv2d, nn.GroupNorm]:
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    norm = nn.GroupNorm(min(32, c_in // 4) if c_in % 32 == 0 else 1, c_in, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return conv.to(kernels.SOURCES[dtype].weights), norm.to(kernels.SOURCES[dtype].weights)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@both
@settings(max_examples=40)
@given(
    batch=st.integers(1, 5), height=st.integers(1, 20), width=st.integers(1, 36),
    c_in=st.sampled_from([3, 32, 64, 96, 160]), c_out=st.sampled_from([1, 6, 32, 64, 96]),
    kernel=st.sampled_from([1, 3]), normed=st.booleans(), swish=st.booleans(), added=st.booleans(),
    resident=st.booleans(), last=st.booleans(), threads=st.integers(1, 3), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_equals_the_plain_path_in_float64(
    dtype: torch.dtype, batch: int, height: int, width: int, c_in: int, c_out: int, kernel: int, normed: bool,
    swish: bool, added: bool, resident: bool, last: bool, threads: int, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    conv, norm = layers(c_in, c_out, kernel, dtype)
    if last:
        conv.to(memory_format=torch.channels_last)
    normed = normed and c_in % 32 == 0
    swish = swish and normed
    added, resident = added and c_out % 32 == 0, resident and c_out % 32 == 0
    x = (2 * torch.randn(batch, c_in, height, width) + 0.5).to(dtype)
    add = torch.randn(batch, c_out, dtype=conv.weight.dtype) if added else None
    residual = torch.randn(batch, c_out, height, width).to(dtype) if resident else None
    dout = torch.randn(batch, c_out, height, width).to(dtype)

    def run(exact: bool) -> list[Tensor]:
        c, n = (copy.deepcopy(layer).to(torch.float64 if exact else layer.weight.dtype) for layer in (conv, norm))
        assert isinstance(c, nn.Conv2d)
        assert isinstance(n, nn.GroupNorm)
        inputs = [
            None if i is None else i.clone().to(torch.float64 if exact else i.dtype).requires_grad_()
            for i in (x, add, residual)
        ]
        with kernels.disabled() if exact else computing(dtype):
            assert inputs[0] is not None
            assert kernels.usable(inputs[0], c) != exact
            out = convolve(c, inputs[0], n if normed else None, swish, add=inputs[1], residual=inputs[2])
        out.backward(dout.to(out.dtype))
        wanted = [*inputs, c.weight, c.bias, *([n.weight, n.bias] if normed else [])]
        grads = [i.grad for i in wanted if i is not None]
        assert all(g is not None for g in grads)
        return [out.detach(), *(g for g in grads if g is not None)]

    # The output and the gradients of norms are sums of terms of these sizes, which may cancel.
    size = float(conv.weight.detach().norm()) / c_out**0.5
    of_out, of_a_norm = size * (batch * height * width * c_out) ** 0.5, size * float(dout.float().norm())
    for i, (ours, plain) in enumerate(zip(run(False), run(True), strict=True)):
        terms = of_out if i == 0 else of_a_norm if normed and plain.shape == norm.bias.shape else 0.0
        assert (ours - plain).norm() < 4 * ERROR[dtype] * max(float(plain.norm()), terms)


@both
@given(
    batch=st.integers(2, 8), size=st.sampled_from([4, 8, 16]), threads=st.integers(1, 3), rows=st.data(),
    kernel=st.sampled_from([1, 3]),
)  # fmt: skip
@settings(max_examples=20)
def test_the_result_for_an_image_depends_on_the_image_only(
    dtype: torch.dtype, batch: int, size: int, threads: int, rows: st.DataObject, kernel: int
) -> None:
    """It does not depend on the batch, on its place in the batch or on the number of threads. The codec needs that."""
    torch.manual_seed(batch)
    conv, norm = layers(64, 96, kernel, dtype)
    x = torch.randn(batch, 64, size, size).to(dtype)
    with torch.no_grad(), computing(dtype):
        torch.set_num_threads(1)
        whole = convolve(conv, x, norm, swish=True)
        torch.set_num_threads(threads)
        one = rows.draw(st.integers(0, batch - 1))
        assert torch.equal(convolve(conv, x, norm, swish=True), whole)
        assert torch.equal(convolve(conv, x[one : one + 1], norm, swish=True), whole[one : one + 1])
        with kernels.frozen():  # weights are then transformed when they are packed
            assert torch.equal(convolve(conv, x[one : one + 1], norm, swish=True), whole[one : one + 1])


@both
def test_dropout_has_the_right_share_mean_and_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv, norm = layers(64, 64, 1, dtype)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(64)[:, :, None, None])
        conv.bias.zero_()  # type: ignore[union-attr]
        norm.weight.zero_()
        norm.bias.fill_(2.0)  # the input of dropout is then swish(2) everywhere
    x = torch.randn(32, 64, 16, 16).to(dtype).requires_grad_()
    with computing(dtype):
        torch.manual_seed(1)
        out = convolve(conv, x, norm, swish=True, dropout=0.3)
        torch.manual_seed(1)
        again = convolve(conv, x, norm, swish=True, dropout=0.3)
        other = convolve(conv, x, norm, swish=True, dropout=0.3)
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    dropped = (out == 0).float()
    n = dropped.numel()
    assert abs(float(dropped.mean()) - 0.3) < 5 * (0.21 / n) ** 0.5
    assert torch.allclose(out[out != 0].double(), F.silu(torch.tensor(2.0).double()) / 0.7, rtol=2 * ERROR[dtype])
    flat = dropped - dropped.mean()
    for axis in (0, 1, 2, 3):  # neighbours are independent
        correlation = float((flat * flat.roll(1, axis)).mean() / flat.square().mean())
        assert abs(correlation) < 5 / n**0.5
    out.float().sum().backward()
    assert norm.bias.grad is not None
    at_2 = torch.tensor(2.0, dtype=norm.weight.dtype).sigmoid()
    slope = at_2 * (1 + 2 * (1 - at_2))
    kept = (1 - dropped).to(slope).sum((0, 2, 3))
    assert torch.allclose(norm.bias.grad, kept * slope / 0.7, rtol=4 * ERROR[dtype])


def network(dtype: torch.dtype) -> UNet:
    torch.manual_seed(0)
    net = UNet(
        3, width=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), bf16=dtype == torch.bfloat16
    )
    net.to(kernels.SOURCES[dtype].weights)
    for p in net.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return net


@both
def test_the_networks_error_is_that_of_the_plain_path(dtype: torch.dtype) -> None:
    net = network(dtype)
    x, t = torch.randn(4, 3, 16, 16), torch.arange(4)

    def run(net: UNet) -> list[Tensor]:
        net.zero_grad()
        out = net(x, t)
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    truth, ours = run(network(torch.float32).double()), run(net)
    with kernels.disabled():
        plain = run(net)
    most = max(float(a.norm()) for a in truth)
    for a, b, c in zip(truth, ours, plain, strict=True):  # a bias ahead of a norm of one channel has no gradient
        assert (b - a).norm() < 1.5 * (c - a).norm() + ERROR[dtype] * max(float(a.norm()), 1e-3 * most)


@both
def test_packed_weights_are_used_only_while_frozen(dtype: torch.dtype) -> None:
    net, x, t = network(dtype), torch.randn(1, 3, 8, 8), torch.ones(1, dtype=torch.int64)
    weights = list(net.parameters())

    def change() -> None:  # in place, without a change of torch's version counters
        adam = torch.optim.Adam(weights, lr=0.1, fused=True)
        for p in weights:
            p.grad = torch.ones_like(p)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(weights, [torch.zeros_like(p) for p in weights], 0.1)

    with torch.no_grad():
        first = net(x, t)
        with kernels.frozen():
            assert torch.equal(net(x, t), first)
            with kernels.frozen():
                assert torch.equal(net(x, t), first)
            assert kernels._frozen.get()
        assert kernels._frozen.get() is None
        change()
        with kernels.frozen():
            assert torch.equal(net(x, t), copy.deepcopy(net)(x, t))
            assert not torch.equal(net(x, t), first)


@both
def test_a_mean_far_from_zero_costs_no_digits(dtype: torch.dtype) -> None:
    """E[x^2] - mean^2 in float32 would: with a mean of 100 standard deviations, 1%."""
    torch.manual_seed(0)
    conv, norm = layers(64, 32, 1, dtype)
    x = (torch.randn(2, 64, 16, 16) + 100 * torch.randn(64)[:, None, None].sign()).to(dtype)
    with torch.no_grad(), computing(dtype):
        ours = convolve(conv, x, norm)
    plain = conv.double()(norm.double()(x.double()))
    unavoidable = (
        100 * torch.finfo(dtype).eps + 100**2 * torch.finfo(torch.float64).eps
    )  # rounding of x and of float64 sums
    assert relative(ours, plain.detach()) < 4 * ERROR[dtype] + unavoidable


def test_frozen_weights_belong_to_one_thread() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with kernels.frozen():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    assert kernels._frozen.get() is None
    with kernels.frozen():
        leave.set()
        thread.join()
        assert kernels._frozen.get() == {}
    assert kernels._frozen.get() is None


@both
def test_only_needed_gradients_are_computed_and_none_of_second_order(dtype: torch.dtype) -> None:
    conv, norm = layers(32, 32, 3, dtype)
    x = torch.randn(1, 32, 4, 4).to(dtype).requires_grad_()
    with computing(dtype):
        conv.requires_grad_(False)
        out = convolve(conv, x, norm, swish=True)
        (first,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        assert conv.weight.grad is None
        with pytest.raises(RuntimeError):
            first.sum().backward()


@both
def test_other_layers_run_on_the_plain_path(dtype: torch.dtype) -> None:
    x = torch.randn(1, 32, 8, 8)
    others: list[dict[str, Any]] = [
        {"stride": 2}, {"padding": 0}, {"padding_mode": "circular"}, {"groups": 2}, {"dilation": 2}, {"bias": False},
        {"kernel_size": 5, "padding": 2}, {"dtype": torch.bfloat16}, {"out_channels": kernels.MAX_CHANNELS + 1},
    ]  # fmt: skip
    with computing(dtype):
        for settings in others:
            conv = nn.Conv2d(**{"in_channels": 32, "out_channels": 32, "kernel_size": 3, "padding": 1, **settings})
            input = x.to(conv.weight.dtype)
            assert not kernels.usable(input, conv), settings
            assert torch.equal(convolve(conv, input), conv(input)), settings
        layer = nn.Conv2d(32, 32, 3, padding=1).to(kernels.SOURCES[dtype].weights)
        input = x.to(dtype)
        assert kernels.usable(input, layer, nn.GroupNorm(8, 32).to(layer.weight))
        for norm in (nn.GroupNorm(8, 32, affine=False), nn.GroupNorm(8, 32).to(torch.float16)):
            assert not kernels.usable(input, layer, norm)
        wide = nn.Conv2d(64, 32, 1).to(layer.weight)
        assert not kernels.usable(input.repeat(1, 2, 1, 1), wide, nn.GroupNorm(64, 64).to(layer.weight))
        with pytest.raises(RuntimeError, match="channels"):
            convolve(layer, input[:, :1])
        with pytest.raises(RuntimeError, match="expand"):
            convolve(layer, input, residual=input[..., 1:])
        assert torch.equal(
            convolve(layer, input, residual=input[..., :1]),
            convolve(layer, input, residual=input[..., :1].expand(input.shape)),
        )
        seen: list[Any] = []
        layer.register_forward_hook(lambda *_: seen.append(1))
        convolve(layer, input)
        assert seen
        nothing = x[:0]
        assert convolve(nn.Conv2d(32, 32, 3, padding=1), nothing).shape == nothing.shape


@pytest.mark.parametrize("dtype", KINDS[:2])
def test_tracing_and_transforms_use_operations_of_torch(dtype: torch.dtype) -> None:
    net, x, t = network(dtype), torch.randn(2, 3, 8, 8), torch.ones(2, dtype=torch.int64)
    x = x.to(kernels.SOURCES[dtype].weights)

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            net(x, t)
        return counter.get_total_flops()

    def results() -> list[Any]:
        traced = torch.jit.trace(net, (x, t), check_trace=False)
        graph = make_fx(net)(x, t)
        found = [traced(2 * x, t), graph(2 * x, t)]
        if dtype != torch.bfloat16:  # autocast and forward derivatives do not go together
            found.append(torch.func.jvp(lambda x: net(x, t), (x,), (x,))[1])
        return [*found, counted()]

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = results()
        with kernels.disabled():
            plain = results()
    assert ours.pop() == plain.pop()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@both
def test_the_result_is_an_ordinary_tensor(dtype: torch.dtype) -> None:
    net, x, t = network(dtype), torch.randn(2, 3, 8, 8), torch.ones(2, dtype=torch.int64)
    out = net(x.to(kernels.SOURCES[dtype].weights), t)
    assert out.untyped_storage().nbytes() == out.nbytes
    out.view(2, -1)
    out.clamp_(-1, 1).sum().backward()
    down = Downsample(32, 32).to(kernels.SOURCES[dtype].weights)(torch.randn(1, 32, 8, 8).to(out.dtype))
    assert down.untyped_storage().nbytes() == down.nbytes


@both
def test_copied_packed_weights_are_not_used_for_other_weights(dtype: torch.dtype) -> None:
    """A new object may get the id of a deleted one."""
    x = torch.randn(1, 32, 4, 4).to(dtype)
    packed: kernels.Packed = {}
    with torch.no_grad(), computing(dtype):
        for _ in range(20):
            with kernels.frozen(packed):
                convolve(layers(32, 32, 1, dtype)[0], x)
        copied = copy.deepcopy(packed)
        packed.clear()
        for _ in range(20):
            conv = layers(32, 32, 1, dtype)[0]
            with kernels.frozen(copied):
                ours = convolve(conv, x)
            assert torch.equal(ours, convolve(conv, x))


@both
def test_a_thread_that_ends_gives_its_memory_back(dtype: torch.dtype) -> None:
    conv, norm = layers(32, 32, 1, dtype)
    x = torch.randn(1, 32, 256, 256).to(dtype)

    def run() -> None:
        torch.set_num_threads(1)
        with torch.no_grad(), computing(dtype):
            convolve(conv, x, norm, swish=True)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    def in_threads(count: int) -> None:
        for _ in range(count):
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()

    in_threads(3)
    before = resident()
    in_threads(20)
    assert resident() - before < 10 * x.nbytes


@anywhere
def test_a_full_memory_is_an_error_like_torchs_own(tmp_path: Path) -> None:
    code = """if True:
        import resource, torch
        from pathlib import Path
        from torch import nn
        from ddpm.unet import convolve
        conv, norm = nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32)
        def run(size, limit=None):
            x = torch.zeros(1, 32, size, size)
            if limit:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + int(limit * x.nbytes),) * 2)
            with torch.no_grad():
                convolve(conv, x, norm, swish=True)
        run(64)
        try:
            run(1024, 2.5)  # enough for x in the kernels' layout and the result, but not for their buffers
        except RuntimeError as error:
            print(error)
    """
    assert "can't allocate memory for a convolution" in printed(code, tmp_path)


compiled = functools.cache(kernels._compile)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Path]]:
    """A function that loads the float32 kernels anew, in a cache of their own, and returns the library's file.

    The compiler runs once for all tests, and its result is taken again.
    """
    monkeypatch.setattr(kernels, "FLAGS", ("-O1", *kernels.FLAGS[1:]))  # not those that are loaded already
    monkeypatch.setattr(kernels, "_compile", compiled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def load() -> Path:
        kernels._library.cache_clear()
        return tmp_path / "cache" / "ddpm" / f"{kernels.identity(torch.float32)}.so"

    yield load
    kernels._library.cache_clear()


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _replace_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@anywhere
@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink, lambda p: p.write_bytes(b""), lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
        lambda p: _flip(p, p.stat().st_size // 2), lambda p: _flip(p, -1), lambda p: p.chmod(0o666), _replace_by_link,
        _replace_by_pipe,
    ],
    ids=["missing", "empty", "cut", "altered", "another hash", "all may write", "link", "pipe"],
)  # fmt: skip
def test_a_library_that_is_not_as_it_was_written_is_compiled_again(
    damage: Callable[[Path], Any], built: Callable[[], Path]
) -> None:
    path = built()
    whole = path.read_bytes()
    damage(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert built() == path
    assert stat.S_ISREG(path.lstat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == len(whole)
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".moved"] == [path.name]


@anywhere
def test_another_users_folder_is_not_used(built: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor another user's file. This process pretends to be a third user, who is not root."""
    path = built()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for owned in (path, path.parent):
        if os.geteuid() == 0:
            os.chown(owned, 12345, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.warns(UserWarning, match="cannot be used .*ddpm belongs to another user"):
        built()
    assert not kernels.ready(torch.float32)
    with pytest.raises(PermissionError, match="not this user's file"):
        kernels._load(path)


@anywhere
def test_a_folder_of_ones_own_that_others_may_write_to_is_closed(built: Callable[[], Path]) -> None:
    path = built()
    path.parent.chmod(0o777)
    assert built() == path
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


@anywhere
def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._library.cache_clear()
    try:
        monkeypatch.setenv("DDPM_KERNELS", "off")
        assert not kernels.ready(torch.float32)
        assert kernels.identity(torch.float32) == ""
        kernels._library.cache_clear()
        monkeypatch.setenv("DDPM_KERNELS", "0")
        with pytest.raises(InputError, match="DDPM_KERNELS '0': want on or off"):
            kernels.ready(torch.float32)
        monkeypatch.setenv("DDPM_KERNELS", "on")
        assert kernels.ready(torch.float32)
    finally:
        kernels._library.cache_clear()


def test_without_a_compiler_the_plain_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CC", "no-such-compiler")
    kernels._library.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for dtype in kernels.SOURCES:
                assert not kernels.ready(dtype)
        for dtype in kernels.SOURCES:
            assert network(dtype)(torch.randn(1, 3, 8, 8), torch.ones(1, dtype=torch.int64)).isfinite().all()
    finally:
        kernels._library.cache_clear()


# -- beside what PyTorch promises --------------------------------------------------------------------------------------


class Doubled(nn.Conv2d):
    """A subclass, as those of LoRA and of quantisation are."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Shifted(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@anywhere
def test_subclasses_compute_what_they_say() -> None:
    conv, norm = layers(32, 32, 3, torch.float32)
    x = torch.randn(2, 32, 8, 8)
    doubled, shifted = Doubled(32, 32, 3, padding=1), Shifted(norm.num_groups, 32, norm.eps)
    doubled.load_state_dict(conv.state_dict())
    shifted.load_state_dict(norm.state_dict())
    with torch.no_grad():
        assert torch.equal(convolve(doubled, x, norm), 2 * conv(norm(x)))
        assert torch.equal(convolve(conv, x, shifted), conv(norm(x) + 1))
        down, twice = Downsample(32, 32), Downsample(32, 32)
        twice.conv = Doubled(32, 32, 3, stride=2)
        twice.load_state_dict(down.state_dict())
        assert relative(twice(x), 2 * down(x)) < 4 * ERROR[torch.float32]


@anywhere
def test_a_convolution_of_stride_2_is_every_second_result() -> None:
    """With padding at all sides from the first on, and with padding at the right and the bottom from the second on."""
    x = torch.randn(2, 32, 8, 12)
    for padding in (0, 1):
        conv = nn.Conv2d(32, 64, 3, stride=2, padding=padding)
        assert kernels.usable(x, conv, halving=True)
        assert not kernels.usable(x, conv)
        with torch.no_grad():
            plain = conv(x if padding else F.pad(x, (0, 1, 0, 1)))
            first = 1 - padding
            ours = kernels.convolution(x, conv)[:, :, first::2, first::2]
        assert relative(ours, plain) < 4 * ERROR[torch.float32]


@anywhere
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_every_hook_is_called_as_often_as_on_the_plain_path(kind: str, everywhere: bool) -> None:
    """Of convolutions and norms, those of a network's Downsample too, and those of all modules."""
    net = network(torch.float32)
    x, t = torch.randn(1, 3, 8, 8, requires_grad=True), torch.ones(1, dtype=torch.int64)
    calls: list[nn.Module] = []

    def hook(module: nn.Module, *_: Any) -> None:
        calls.append(module)

    def run() -> int:
        calls.clear()
        net(x, t).sum().backward()
        return sum(isinstance(module, (nn.Conv2d, nn.GroupNorm)) for module in calls)

    if everywhere:
        handles = [getattr(torch.nn.modules.module, f"register_module_{kind}_hook")(hook)]
    else:
        leaves = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.GroupNorm))]
        handles = [getattr(m, f"register_{kind}_hook")(hook) for m in leaves]
    try:
        ours = run()
        with kernels.disabled():
            assert run() == ours == sum(isinstance(m, (nn.Conv2d, nn.GroupNorm)) for m in net.modules())
    finally:
        for handle in handles:
            handle.remove()
    assert run() == 0


@anywhere
def test_a_forward_that_was_replaced_and_a_mode_are_seen() -> None:
    """accelerate replaces forward; a mode may count or change every call."""
    conv, _ = layers(32, 32, 3, torch.float32)
    x, seen = torch.randn(1, 32, 8, 8), []
    original = conv.forward
    conv.forward = lambda x: seen.append(1) or original(x)  # type: ignore[method-assign, func-returns-value]
    convolve(conv, x)
    assert seen
    del conv.forward

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **kwargs or {})

    with Counting():
        convolve(conv, x)
    assert torch.conv2d in seen
    with torch.device("cpu"):
        assert kernels.usable(x, conv)


@anywhere
def test_weights_elsewhere_are_errors_of_torch() -> None:
    """On the meta device they have no memory; so has what is added."""
    conv, norm = layers(32, 32, 3, torch.float32)
    x, add, residual = torch.randn(1, 32, 8, 8), torch.randn(1, 32), torch.randn(1, 32, 8, 8)
    assert kernels.usable(x, conv, norm, add, residual)
    for broken in (conv, norm):
        for name in ("weight", "bias"):
            parameter = getattr(broken, name)
            setattr(broken, name, nn.Parameter(parameter.to("meta")))
            assert not kernels.usable(x, conv, norm)
            setattr(broken, name, parameter)
            setattr(broken, name, nn.Parameter(parameter.detach()[:16]))  # of another shape than the layer says
            assert not kernels.usable(x, conv, norm)
            setattr(broken, name, parameter)
    assert not kernels.usable(x.to("meta"), conv, norm)
    assert not kernels.usable(x, conv, norm, add.to("meta"))
    assert not kernels.usable(x, conv, norm, add, residual.to_sparse())
    with pytest.raises((RuntimeError, NotImplementedError)):
        convolve(conv, x, norm, residual=residual.to("meta"))


@anywhere
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (torch._C, "_are_functorch_transforms_active"),
        (torch._C, "_len_torch_dispatch_stack"), (torch._C, "_len_torch_function_stack"),
        (torch.autograd.forward_ad, "_current_level"),
    ],
)  # fmt: skip
def test_a_torch_without_a_private_name_runs_the_plain_path(
    place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next release may have moved it."""
    conv, norm = layers(32, 32, 3, torch.float32)
    x = torch.randn(1, 32, 8, 8)
    with kernels.disabled():
        plain = convolve(conv, x, norm)
    assert kernels.usable(x, conv, norm)
    with monkeypatch.context() as patch:
        patch.delattr(place, name)
        usable, out = kernels.usable(x, conv, norm), convolve(conv, x, norm)
    assert not usable
    assert torch.equal(out, plain)


@anywhere
def test_memory_of_large_calls_is_given_back(tmp_path: Path) -> None:
    """As PyTorch gives its tensors back, and not only when the thread ends."""
    code = """if True:
        import resource, torch
        from pathlib import Path
        from torch import nn
        from ddpm.unet import convolve
        conv, norm = nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(8, 32)
        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        def run(size):
            x = torch.zeros(1, 32, size, size, requires_grad=True)
            convolve(conv, x, norm, swish=True).sum().backward()
            return x.nbytes
        run(64)
        before = resident()
        large = run(1024)
        print((resident() - before) / large)
    """
    assert float(printed(code, tmp_path)) < 0.3
