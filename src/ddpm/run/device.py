"""Keep a CUDA device busy: compiled stages in training, and CUDA graphs in sampling.

Other modules do the rest: the network has bf16 and channels-last weights, `files.data.batches` puts the images of a
data set on the device, and `noise.ahead` draws noise before the sampler needs it. Float32 matrix products stay exact
(no TF32), since bf16 is there for speed.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ddpm.catalog import Compile
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


class GraphedUNet:
    """A UNet that runs as a CUDA graph, one for each shape of x: one launch instead of hundreds.

    A graph reads the weights at their addresses, so weights may change in place but not move. The first call of a shape
    takes as long as about 5 calls.
    """

    def __init__(self, network: UNet) -> None:
        self.network = network
        self._graphs: dict[tuple[torch.Size, bool], tuple[list[Tensor], Tensor, Callable[[], None]]] = {}

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
        """Like the network: x float32 [B, C, H, W], timestep int64 [B], y int64 [B] or None -> [B, C or 2C, H, W]."""
        arguments = [x, timestep] if y is None else [x, timestep, y]
        key = x.shape, y is None
        if key not in self._graphs:
            self._graphs[key] = self._capture([tensor.clone() for tensor in arguments])
        inputs, out, replay = self._graphs[key]
        for graph_input, argument in zip(inputs, arguments, strict=True):
            graph_input.copy_(argument)
        replay()
        return out.clone()  # the next replay overwrites `out`

    def _capture(self, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor, Callable[[], None]]:
        """The graph's inputs, its output, and its replay function (PyTorch's notes on CUDA, "CUDA Graphs")."""
        device = inputs[0].device
        side_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side_stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side_stream):
            for _ in range(3):  # warm up: libraries choose their algorithms and workspaces
                self.network(*inputs)
        torch.cuda.current_stream(device).wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may pin memory or watch processes during the capture
        with torch.cuda.graph(graph, stream=side_stream, capture_error_mode="thread_local"):
            out: Tensor = self.network(*inputs)
        return inputs, out, graph.replay


def use_cuda_graphs(denoiser: Denoiser, device: torch.device | str) -> Denoiser:
    """The denoiser with its network as a `GraphedUNet`; unchanged if the network cannot be captured.

    It can be if it is a UNet in evaluation mode on a CUDA device and no weight requires a gradient. For weights that
    do, autocast would keep bf16 copies in memory outside the graph.
    """
    network = denoiser.network
    if isinstance(network, Guided):
        inner = use_cuda_graphs(replace(denoiser, network=network.network), device)
        return replace(denoiser, network=replace(network, network=inner.network))
    if torch.device(device).type != "cuda" or not isinstance(network, UNet):
        return denoiser
    if network.training or any(p.requires_grad for p in network.parameters()):
        return denoiser
    return replace(denoiser, network=GraphedUNet(network))
