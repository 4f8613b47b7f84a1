"""What a CUDA device needs to be kept busy: stages compiled for training, CUDA graphs for sampling.

The rest of it stands where it is done: bf16 and channels-last weights in the network, the images of a data set on the
device in `datasets.batches`, draws of noise ahead of the sampler in `noise.ahead`. Matrix products of float32 keep all
of their bits: who wants speed has bf16.
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
    """auto -> on a CUDA device that Inductor compiles for, where Triton and the C compiler that it calls are there."""
    if name != "auto" or device.type != "cuda":
        return name == "on"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    triton = importlib.util.find_spec("triton") is not None
    return triton and compiler is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def compile_stages(network: nn.Module, backend: str = "inductor") -> None:
    """Have each Stage of `network` compiled when it is first called; names in its state_dict stay what they are.

    Stage by stage, since those of equal shapes are compiled once: the 22 of the paper's network are 12 kinds, and take
    a fraction of the time that the whole network would.
    """
    import torch._dynamo

    stages = [part for part in network.modules() if isinstance(part, Stage)]
    # All stages share one forward, and of one function Dynamo by default keeps 8 versions, then it stops compiling.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 2 * len(stages))
    for stage in stages:
        stage.compile(backend=backend, dynamic=False)


class Replayed:
    """A UNet that samples, as a CUDA graph for each shape of x it is called with: one launch in place of hundreds.

    A graph reads the weights where they are: they may change in place, but not move. A call costs some 4 calls more the
    first time.
    """

    def __init__(self, network: UNet) -> None:
        self.network = network
        self._graphs: dict[tuple[torch.Size, bool], tuple[list[Tensor], Tensor, Callable[[], None]]] = {}

    def __call__(self, x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
        """As the network: x float32 [B, C, H, W], timestep int64 [B], y int64 [B] or None -> [B, C or 2C, H, W]."""
        given = [x, timestep] if y is None else [x, timestep, y]
        key = x.shape, y is None
        if key not in self._graphs:
            self._graphs[key] = self._capture([tensor.clone() for tensor in given])
        inputs, out, replay = self._graphs[key]
        for there, tensor in zip(inputs, given, strict=True):
            there.copy_(tensor)
        replay()
        return out.clone()  # the next replay writes into it

    def _capture(self, inputs: list[Tensor]) -> tuple[list[Tensor], Tensor, Callable[[], None]]:
        """The graph's inputs and output, and what runs it (torch's notes on CUDA semantics, "CUDA Graphs")."""
        device = inputs[0].device
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their algorithms and workspaces
                self.network(*inputs)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that pin memory or watch over other processes meanwhile do no harm
        with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
            out: Tensor = self.network(*inputs)
        return inputs, out, graph.replay


def replayed(denoiser: Denoiser, device: torch.device | str) -> Denoiser:
    """The same, its network `Replayed` where it can be: a UNet on a CUDA device, in evaluation and without gradients.

    (Autocast keeps bf16 copies of weights that want gradients, in memory that is not the graph's.)
    """
    network = denoiser.network
    if isinstance(network, Guided):
        inner = replayed(replace(denoiser, network=network.network), device)
        return replace(denoiser, network=replace(network, network=inner.network))
    if torch.device(device).type != "cuda" or not isinstance(network, UNet):
        return denoiser
    if network.training or any(p.requires_grad for p in network.parameters()):
        return denoiser
    return replace(denoiser, network=Replayed(network))
