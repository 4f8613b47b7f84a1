"""Keep a CUDA device busy: compiled stages and a graph of the gradient in training, and CUDA graphs in sampling.

Other modules do the rest: the network has bf16 and channels-last weights, `files.data.batches` puts the images of a
dataset on the device, and `noise.ahead` draws noise before the sampler needs it. Float32 matrix products stay exact
(no TF32), since bf16 is there for speed.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ddpm.catalog import Compile
from ddpm.conditions import Given
from ddpm.denoiser import Denoiser
from ddpm.guidance import Guided
from ddpm.unet import Stage, UNet


def pick_compile(name: Compile, device: torch.device) -> bool:
    """Whether to compile. auto: on a CUDA device that Inductor supports, if Triton and a C compiler are installed."""
    if name != "auto" or device.type != "cuda":
        return name == "on"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    triton = importlib.util.find_spec("triton") is not None
    return triton and compiler is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def compile_stages(network: nn.Module, backend: str = "inductor") -> None:
    """Set each Stage of `network` to be compiled on its first call. The names in its state_dict stay the same.

    Stages of equal shapes are compiled once. The paper's network has 22 stages of 12 shapes, and they compile in a
    fraction of the time that the whole network takes.
    """
    import torch._dynamo

    stages = [part for part in network.modules() if isinstance(part, Stage)]
    # All stages share one forward. By default Dynamo keeps 8 versions of a function and then stops compiling it.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 2 * len(stages))
    for stage in stages:
        stage.compile(backend=backend, dynamic=False)


CAPTURES = 4
"""The call of a GraphedGradient that captures it."""

Gradient: TypeAlias = Callable[..., Tensor]
"""(tensors, each [B, ...] or None) -> the loss, after its gradient was added to the weights' `grad`."""


class GraphedGradient:
    """A `Gradient` that runs as one CUDA graph: one launch in place of thousands, so that small networks do not wait.

    The first calls run `gradient` itself: they compile, and libraries choose their algorithms. The next call captures
    it, and compares a replay with `gradient` on the same tensors and draws. If the capture fails or a bit differs, so
    that a resumed run would be another one, `say` gets one line with the reason, and `gradient` runs from then on.
    All tensors must keep their shapes. A call sets `grad`; it does not add to it. `captured` tells whether the graph
    runs.
    """

    def __init__(self, gradient: Gradient, weights: Sequence[nn.Parameter], say: Callable[[str], None]) -> None:
        self.gradient, self.captured = gradient, False
        self._weights, self._say = weights, say
        self._calls, self._replay = 0, self._eager

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The loss; the weights have its gradient."""
        self._calls += 1
        if self._calls != CAPTURES:
            return self._replay(*inputs)
        device = self._weights[0].device
        state = torch.cuda.get_rng_state(device)
        loss = self._eager(*inputs)
        grads = [p.grad for p in self._weights]
        try:
            replay = self._capture(inputs)
            torch.cuda.set_rng_state(state, device)
            same = torch.equal(replay(*inputs), loss)
            pairs = zip(self._weights, grads, strict=True)
            if not (same and all(torch.equal(p.grad, grad) for p, grad in pairs)):  # type: ignore[arg-type]
                raise RuntimeError("its gradient is another one")
            self._replay, self.captured = replay, True
        except Exception as error:
            reason = str(error).partition("\n")[0]
            self._say(f"training goes on without a CUDA graph: {reason}")
        for p, grad in zip(self._weights, grads, strict=True):
            p.grad = grad
        return loss

    def _eager(self, *inputs: Tensor | None) -> Tensor:
        for p in self._weights:
            p.grad = None
        return self.gradient(*inputs)

    def _capture(self, inputs: Sequence[Tensor | None]) -> Callable[..., Tensor]:
        """Capture `gradient`, and return a function that copies its inputs and replays it."""
        own = [None if tensor is None else tensor.clone() for tensor in inputs]
        run, loss = _capture(lambda: self._eager(*own), self._weights[0].device, warm_up=1)
        grads = [p.grad for p in self._weights]  # memory of the graph, into which each replay writes

        def replay(*inputs: Tensor | None) -> Tensor:
            for mine, given in zip(own, inputs, strict=True):
                if mine is not None and given is not None:
                    mine.copy_(given)
            run()
            for p, grad in zip(self._weights, grads, strict=True):
                p.grad = grad
            return loss.clone()

        return replay


def _capture(function: Callable[[], Tensor], device: torch.device, warm_up: int) -> tuple[Callable[[], None], Tensor]:
    """Capture `function` as a CUDA graph, after `warm_up` calls (PyTorch's notes on CUDA, "CUDA Graphs").

    Returns the replay, and the result, which each replay overwrites.
    """
    side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side_stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side_stream):
        for _ in range(warm_up):  # libraries choose their algorithms and workspaces
            function()
    torch.cuda.current_stream(device).wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may pin memory or watch processes during the capture
    with torch.cuda.graph(graph, stream=side_stream, capture_error_mode="thread_local"):
        out = function()
    return graph.replay, out


class GraphedUNet:
    """A UNet that runs as a CUDA graph, one for each shape of x: one launch instead of hundreds.

    A graph reads the weights at their addresses, so weights may change in place but not move. The first call of a shape
    takes as long as about 5 calls.
    """

    def __init__(self, network: UNet) -> None:
        self.network = network
        self._graphs: dict[tuple[object, ...], tuple[dict[str, Tensor], Tensor, Callable[[], None]]] = {}

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Like the network: x float32 [B, C, H, W], timestep int64 [B], y int64 [B] or None -> [B, C or 2C, H, W]."""
        given = {"x": x, "timestep": timestep, "y": y, "condition": condition}
        arguments = {name: value for name, value in given.items() if value is not None}
        key = x.shape, *arguments
        if key not in self._graphs:
            own = {name: tensor.clone() for name, tensor in arguments.items()}
            replay, out = _capture(lambda: self.network(**own), x.device, warm_up=3)
            self._graphs[key] = own, out, replay
        inputs, out, replay = self._graphs[key]
        for name, argument in arguments.items():
            inputs[name].copy_(argument)
        replay()
        return out.clone()  # the next replay overwrites `out`


def use_cuda_graphs(denoiser: Denoiser, device: torch.device | str) -> Denoiser:
    """The denoiser with its network as a `GraphedUNet`; unchanged if the network cannot be captured.

    It can be if it is a UNet in evaluation mode on a CUDA device and no weight requires a gradient. For weights that
    do, autocast would keep bf16 copies in memory outside the graph.
    """
    network = denoiser.network
    if isinstance(network, Given):
        return use_cuda_graphs(replace(denoiser, network=network.network), device).given(network.condition)
    if isinstance(network, Guided):
        inner = use_cuda_graphs(replace(denoiser, network=network.network), device)
        guide = network.guide and use_cuda_graphs(replace(denoiser, network=network.guide), device).network
        return replace(denoiser, network=replace(network, network=inner.network, guide=guide))
    if torch.device(device).type != "cuda" or not isinstance(network, UNet):
        return denoiser
    if network.training or any(p.requires_grad for p in network.parameters()):
        return denoiser
    return replace(denoiser, network=GraphedUNet(network))
