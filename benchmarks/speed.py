"""Training step and forward of the same network: ours against diffusers, and other packages where they are.

    python benchmarks/speed.py [--networks paper small] [--batch 16] [--peer pytorch-ddpm=PATH]

`paper` is the CIFAR-10 network of the paper, `small` diffusers' example at 64, 128, 128 channels. All make their own
loop's whole step on the same images: noise, forward, backward, clipping, optimiser, average of the weights; `ddpm
train` is the program itself, with its data and log. diffusers' float32 row is its default; its bf16 rows have the fused
optimiser and average too. Nothing of pytorch-ddpm or improved-diffusion is here: --peer names a checkout of yours.
"""

import argparse
import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peers
import record
import torch
from torch import nn

from ddpm import kernels
from ddpm.presets import Preset

NETWORKS: dict[str, tuple[Preset, Callable[[Preset], nn.Module]]] = {
    "paper": (peers.PAPER, peers.paper_network),
    "small": (peers.SMALL, peers.example_network),
}
TRAINING = {
    "diffusers float32 (its default)": {},
    "diffusers bf16": {"autocast": True, "quick": True},
    "diffusers bf16 channels-last": {"autocast": True, "quick": True, "channels_last": True},
}


def others(checkouts: dict[str, Path]) -> tuple[dict[str, tuple[nn.Module, peers.Call]], dict[str, str]]:
    """Further networks like the paper's, and of those that are not here, why."""
    found = {name: peers.checkout(name, path) for name, path in checkouts.items()}
    lucid = peers.denoising_diffusion_pytorch()
    missing = {name: "no --peer" for name in ("pytorch-ddpm", "improved-diffusion") if name not in found}
    if isinstance(lucid, str):
        return found, missing | {"denoising-diffusion-pytorch": lucid}
    return found | {"denoising-diffusion-pytorch": lucid}, missing


def training_cases(preset: Preset, theirs: Callable[[Preset], nn.Module], count: int, steps: int = 4) -> dict[str, Any]:
    x0 = peers.batch(preset, count)
    cases: dict[str, record.Case] = {
        "ours float32": partial(peers.Ours(preset, "float32").step, x0),
        "ours bf16": partial(peers.Ours(preset, "bf16").step, x0),
        "ours bf16, `ddpm train`": partial(peers.trained, preset, count, steps),
    }
    for name, settings in TRAINING.items():
        cases[name] = partial(peers.Theirs(theirs(preset), **settings).step, x0)
    return cases


def forward_cases(preset: Preset, theirs: Callable[[Preset], nn.Module], count: int) -> dict[str, record.Case]:
    x, timestep = peers.batch(preset, count), torch.arange(count) * 999 // count
    cases: dict[str, record.Case] = {}
    for name in ("float32", "bf16"):
        ours = peers.Ours(preset, name)
        ours.network.eval()
        cases[f"ours {name}"] = partial(without_gradient, ours.forward, x, timestep)
    for name, settings in TRAINING.items():
        loop = peers.Theirs(theirs(preset), **settings)
        loop.network.eval()
        cases[name] = partial(without_gradient, loop.forward, x, timestep)
    for name, last in (("diffusers bf16 weights", False), ("diffusers bf16 weights channels-last", True)):
        loop = peers.Theirs(theirs(preset).to(torch.bfloat16), channels_last=last)
        loop.network.eval()
        cases[name] = partial(without_gradient, loop.forward, x.to(torch.bfloat16), timestep)
    return cases


@torch.no_grad()
def without_gradient(function: peers.Call, x: torch.Tensor, timestep: torch.Tensor) -> None:
    function(x, timestep)


def other_cases(found: dict[str, tuple[nn.Module, peers.Call]], count: int, forward: bool) -> dict[str, record.Case]:
    x, timestep, cases = peers.batch(peers.PAPER, count), torch.arange(count), {}
    for name, (network, call) in found.items():
        for kind, settings in (("float32", {}), ("bf16", {"autocast": True, "quick": True})):
            loop = peers.Theirs(network, call=call, **settings)
            loop.network.train(not forward)
            step = partial(without_gradient, loop.forward, x, timestep) if forward else partial(loop.step, x)
            cases[f"{name} {kind}"] = step
    return cases


def summary(found: dict[str, list[float]], count: int) -> tuple[dict[str, Any], str]:
    """JSON and a table: images/s, seconds a call, and how many times faster ours in bf16 is."""
    theirs = [name for name in found if not name.startswith("ours")]
    values = {
        name: {
            "seconds": seconds,
            "images_per_second": record.spread(count / s for s in seconds)._asdict(),
            "ours_bf16_is_faster_by": record.ratio(found, "ours bf16", name)._asdict(),
        }
        for name, seconds in found.items()
    }
    rows = [
        (name, record.spread(count / s for s in seconds), record.ratio(found, "ours bf16", name))
        for name, seconds in found.items()
    ]
    best = record.fastest(found, theirs)
    text = record.table(["", "images/s", "ours bf16 is faster by"], rows)
    return values, f"{text}\nOurs in bf16 against the fastest other, {best}: {record.ratio(found, 'ours bf16', best)}\n"


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--parts", nargs="+", choices=("training", "forward"), default=["training", "forward"])
    parser.add_argument("--batch", type=int, default=16, help="images (%(default)s)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="a checkout; may be repeated")
    args = parser.parse_args()
    checkouts = {name: Path(path) for name, _, path in (text.partition("=") for text in args.peer)}
    values: dict[str, Any] = {}
    text = ""
    with record.measuring(args):
        for name in args.networks:
            more, missing = others(checkouts) if name == "paper" else ({}, {})
            for part in args.parts:
                values[f"{part}_{name}"], found = measured(name, part, more, args)
                text += f"## {part}, {name} network, batch {args.batch}\n\n{found}\n"
            if missing:
                values["not_measured"] = missing
                text += "Not measured: " + "; ".join(f"{k} ({why})" for k, why in missing.items()) + ".\n\n"
    record.write("speed", "Training step and forward, against other packages", args, values, text)


def measured(
    name: str, part: str, more: dict[str, tuple[nn.Module, peers.Call]], args: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    cases = (training_cases if part == "training" else forward_cases)(*NETWORKS[name], args.batch)
    cases |= other_cases(more, args.batch, part == "forward")
    with kernels.frozen() if part == "forward" else nullcontext():  # as when sampling
        found = record.interleave(cases, args.repeats, args.seconds)
    cases.clear()
    gc.collect()
    return summary(found, args.batch)


if __name__ == "__main__":
    main()
