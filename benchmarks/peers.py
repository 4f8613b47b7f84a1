"""The networks that are compared, and one training step of each, with all parts of its own training loop.

`Ours` runs the step of `ddpm train`, the very function. `Theirs` makes the step of diffusers' train_unconditional.py,
without accelerate, which wraps it: add_noise, mean squared error, clipping, AdamW, EMAModel. Functions import diffusers
where they need it, so our own figures can be measured without diffusers.
"""

import importlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Timed
from torch import Tensor, nn

from ddpm import pixels
from ddpm.files import data
from ddpm.presets import PRESETS, Precision, Preset
from ddpm.run.device import GraphedGradient
from ddpm.run.processes import Processes
from ddpm.run.step import begin
from ddpm.run.train import train

PAPER = PRESETS["cifar10"]
PAPER_256 = PRESETS["celebahq256"]
SMALL = PRESETS["cifar10_small"]
"""A network of the size of `example_network`: 64, 128, 128 channels at 32x32."""

Call = Callable[[Tensor, Tensor], Tensor]  # (x_t, timestep) -> eps


def paper_network(preset: Preset) -> nn.Module:
    """The preset's network in diffusers, configured like google/ddpm-cifar10-32 and google/ddpm-celebahq-256."""
    from diffusers import UNet2DModel

    levels = range(len(preset.channel_multipliers))
    kinds = ["Attn" if level in preset.attention_levels else "" for level in levels]
    return UNet2DModel(
        sample_size=preset.size,
        in_channels=preset.channels,
        out_channels=preset.channels,
        layers_per_block=preset.num_res_blocks,
        block_out_channels=tuple(preset.width * m for m in preset.channel_multipliers),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        dropout=preset.dropout,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )


def example_network(preset: Preset = SMALL) -> nn.Module:
    """The network of diffusers' training example: two layers per block, attention in the last level but one.

    The example (docs, "Train a diffusion model") has 128, 128, 256, 256, 512, 512 channels for 128x128. This network
    has 64, 128, 128 channels for 32x32, and as many parameters as SMALL.
    """
    from diffusers import UNet2DModel

    kinds = [
        "Attn" if level == len(preset.channel_multipliers) - 2 else ""
        for level in range(len(preset.channel_multipliers))
    ]
    return UNet2DModel(
        sample_size=preset.size,
        in_channels=preset.channels,
        out_channels=preset.channels,
        layers_per_block=2,
        block_out_channels=tuple(preset.width * m for m in preset.channel_multipliers),
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
    )


def batch(preset: Preset, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random x0 [count, C, H, W] in [-1, 1]. Every caller gets the same values."""
    return torch.rand(count, *preset.shape, generator=torch.Generator().manual_seed(0)).to(device) * 2 - 1


class Ours:
    """The training of a preset, whose step is that of `ddpm train`, on `count` random images, which stay the same."""

    def __init__(
        self, preset: Preset, count: int, precision: Precision = "bf16", device: torch.device | str = "cpu",
        ranks: Processes | None = None,
    ) -> None:  # fmt: skip
        ranks = ranks or Processes(0, 1, torch.device(device))
        self.preset = replace(preset, batch_size=count * ranks.world, precision=precision)
        images, _ = data.load_pair(data.given(pixels.to_pixels(batch(preset, 2))), preset.size, preset.channels)
        self.training = begin(self.preset, images, ranks)
        self.batch = pixels.to_pixels(batch(preset, count)).to(ranks.device)

    def step(self) -> Tensor:
        return self.training.step(self.preset, self.batch)

    @property
    def captured(self) -> bool:
        """Whether the gradient is a CUDA graph by now."""
        return isinstance(self.training.gradient, GraphedGradient) and self.training.gradient.captured

    def without_graph(self) -> Tensor:
        """The same step, with the gradient that a CUDA graph would replay."""
        gradient = self.training.gradient
        plain = gradient.gradient if isinstance(gradient, GraphedGradient) else gradient
        return self.training._replace(gradient=plain).step(self.preset, self.batch)


class Theirs:
    """A network of another package, and a training step with the settings of diffusers' example.

    autocast: run the network in bf16. channels_last: the memory layout of the weights and the input. quick: the fused
    AdamW, and the moving average by torch._foreach; the example uses neither. compiled: run the network through
    torch.compile with `backend`. call: how to call the network (x_t, timestep) -> eps, if it is not diffusers'.
    """

    def __init__(
        self, network: nn.Module, device: torch.device | str = "cpu", *, autocast: bool = False,
        channels_last: bool = False, quick: bool = False, compiled: bool = False, backend: str = "inductor",
        call: Call | None = None,
    ) -> None:  # fmt: skip
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_cosine_schedule_with_warmup
        from diffusers.training_utils import EMAModel

        layout = torch.channels_last if channels_last else torch.preserve_format
        self.network = network.to(device, memory_format=layout).train()  # type: ignore[call-overload]
        self.device, self.autocast, self.layout = torch.device(device), autocast, layout
        run = torch.compile(network, backend=backend) if compiled else network
        self.call = call or (lambda x, timestep: run(x, timestep).sample)
        self.weights = list(network.parameters())
        self.adam = torch.optim.AdamW(
            self.weights, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=quick or None
        )
        self.average = EMAModel(self.weights, decay=0.9999, use_ema_warmup=True, power=3 / 4, foreach=quick)
        self.noising = DDPMScheduler(num_train_timesteps=1000)
        self.rate = get_cosine_schedule_with_warmup(self.adam, 500, 10**9)

    def step(self, x0: Tensor) -> float:
        eps = torch.randn_like(x0)
        timestep = torch.randint(0, 1000, (len(x0),), device=x0.device)
        loss = F.mse_loss(self.forward(self.noising.add_noise(x0, eps, timestep), timestep).float(), eps)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.adam.step()
        self.rate.step()
        self.average.step(self.weights)
        self.adam.zero_grad()
        return loss.item()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            return self.call(x.contiguous(memory_format=self.layout), timestep)


@torch.no_grad()
def ddim(loop: Theirs, preset: Preset, count: int, steps: int) -> Tensor:
    """`count` images by diffusers' DDIM, uint8 [count, C, H, W] on the CPU; noise from torch's global generator."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps, device=loop.device)
    x = torch.randn(count, *preset.shape).to(loop.device)
    for timestep in scheduler.timesteps:
        x = scheduler.step(loop.forward(x, timestep.expand(count)).float(), timestep, x).prev_sample
    return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def logged(
    preset: Preset, batch_size: int, steps: int, precision: Precision = "bf16", device: str = "cpu", log_every: int = 1
) -> list[dict[str, Any]]:
    """The log of a run of `train` itself: data, noise, log and all."""
    settings: dict[str, Any] = {"batch_size": batch_size, "steps": steps, "save_every": 10**9, "sample_every": 0}
    settings |= {"data": "digits", "eval_images": 1, "log_every": log_every, "ema_warmup": True, "warmup": 1}
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
        out = Path(folder) / "run"
        train(replace(preset, precision=precision, device=device, **settings), out)
        return training_lines(out)


def trained(preset: Preset, batch_size: int, steps: int, precision: Precision = "bf16", device: str = "cpu") -> Timed:
    """Seconds per step of `ddpm.run.train.train` itself, without the first step."""
    return Timed(seconds_a_step(logged(preset, batch_size, steps + 1, precision, device)))


def training_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log that are about training steps, without a last line that is still being written."""
    file = run / "metrics.jsonl"
    complete = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [line for line in map(json.loads, complete.splitlines()) if "loss" in line]


def seconds_a_step(lines: list[dict[str, Any]]) -> float:
    """Seconds per step by the lines of a log. The time before the first line is left out: it contains the start."""
    first, last = lines[0], lines[-1]
    return float((last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))


# -- checkouts of other packages ---------------------------------------------------------------------------------------


def checkout(name: str, path: Path) -> tuple[nn.Module, Call]:
    """The paper's CIFAR-10 network of a checkout: pytorch-ddpm (w86763777) or improved-diffusion (openai)."""
    sys.path.insert(0, str(path))
    try:
        if name == "pytorch-ddpm":
            network = importlib.import_module("model").UNet(1000, 128, [1, 2, 2, 2], [1], 2, 0.1)
        elif name == "improved-diffusion":
            module = importlib.import_module("improved_diffusion.unet")
            network = module.UNetModel(3, 128, 3, 2, attention_resolutions=(2,), dropout=0.1, channel_mult=(1, 2, 2, 2))
        else:
            raise SystemExit(f"--peer {name}: want pytorch-ddpm=PATH or improved-diffusion=PATH")
    finally:
        sys.path.remove(str(path))
    return network, network


def denoising_diffusion_pytorch() -> tuple[nn.Module, Call] | str:
    """The package's nearest network to the paper's, 128 x (1, 2, 2, 2), or the reason why there is none.

    The package imports torchvision. torchvision 0.29.2 of the index does not load with the CPU build of torch 2.13.0.
    """
    try:
        network = importlib.import_module("denoising_diffusion_pytorch").Unet(dim=128, dim_mults=(1, 2, 2, 2))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return network, network
