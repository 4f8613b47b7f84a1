"""Compare a training step and a forward pass of the same network with diffusers and other packages.

    python benchmarks/speed.py [--networks paper small] [--batch 16] [--compiled] [--peer pytorch-ddpm=PATH]

`paper` is the CIFAR-10 network of the paper, `small` is diffusers' example with 64, 128, 128 channels. Each package
makes the whole step of its own training loop on the same images: noise, forward, backward, clipping, optimiser, moving
average. The row `ddpm train` is the program itself, with its data and log. bf16 is measured if the CPU can multiply it.
diffusers' first row is its default. Its other rows use the fused optimiser and the fused average, and --compiled adds
torch.compile, which takes minutes. This repository holds no code of pytorch-ddpm or improved-diffusion: --peer names a
checkout.
"""

import argparse
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import figures
import peers
import record
import timing
import torch
from torch import nn

from ddpm import kernels
from ddpm.presets import Precision, Preset, build
from ddpm.run.processes import pick_precision

NETWORKS: dict[str, tuple[Preset, Callable[[Preset], nn.Module]]] = {
    "paper": (peers.PAPER, peers.paper_network),
    "small": (peers.SMALL, peers.example_network),
}
BEST = pick_precision("auto", torch.device("cpu"))
"""The precision that `ddpm train` chooses on this machine."""
OURS: tuple[Precision, ...] = ("float32", "bf16") if BEST == "bf16" else ("float32",)
MAIN = f"ours {BEST}"


def theirs_settings(compiled: bool = False) -> dict[str, dict[str, bool]]:
    """Settings of `peers.Theirs` by name: diffusers' default first, then settings that should be faster."""
    settings = {"diffusers float32 (its default)": {}}
    for precision in OURS:
        quick = {"quick": True, "autocast": precision == "bf16"}
        settings[f"diffusers {precision}" + (", fused" if precision == "float32" else "")] = quick
        settings[f"diffusers {precision} channels-last"] = quick | {"channels_last": True}
    if compiled:
        settings[f"diffusers {BEST} compiled"] = {"quick": True, "autocast": BEST == "bf16", "compiled": True}
    return settings


def others(checkouts: dict[str, Path]) -> tuple[dict[str, tuple[nn.Module, peers.Call]], dict[str, str]]:
    """Networks like the paper's of other packages, and for each missing package the reason."""
    networks = {name: peers.checkout(name, path) for name, path in checkouts.items()}
    lucid = peers.denoising_diffusion_pytorch()
    missing = {name: "no --peer" for name in ("pytorch-ddpm", "improved-diffusion") if name not in networks}
    if isinstance(lucid, str):
        return networks, missing | {"denoising-diffusion-pytorch": lucid}
    return networks | {"denoising-diffusion-pytorch": lucid}, missing


def training_cases(
    preset: Preset, theirs: Callable[[Preset], nn.Module], count: int, compiled: bool = False, steps: int = 4
) -> dict[str, Any]:
    x0 = peers.batch(preset, count)
    cases: dict[str, timing.Case] = {f"ours {name}": peers.Ours(preset, count, name).step for name in OURS}
    cases[f"{MAIN}, `ddpm train`"] = partial(peers.trained, preset, count, steps, BEST)
    for name, settings in theirs_settings(compiled).items():
        cases[name] = partial(peers.Theirs(theirs(preset), **settings).step, x0)
    return cases


def forward_cases(
    preset: Preset, theirs: Callable[[Preset], nn.Module], count: int, compiled: bool = False
) -> dict[str, timing.Case]:
    x, timestep = peers.batch(preset, count), torch.arange(count) * 999 // count
    cases: dict[str, timing.Case] = {}
    for name in OURS:
        network = build(replace(preset, precision=name)).network.eval()  # type: ignore[attr-defined]
        cases[f"ours {name}"] = partial(without_gradient, network, x, timestep)
    for name, settings in theirs_settings(compiled).items():
        loop = peers.Theirs(theirs(preset), **settings)
        loop.network.eval()
        cases[name] = partial(without_gradient, loop.forward, x, timestep)
    if BEST == "bf16":
        for name, last in (("diffusers bf16 weights", False), ("diffusers bf16 weights channels-last", True)):
            loop = peers.Theirs(theirs(preset).to(torch.bfloat16), channels_last=last)
            loop.network.eval()
            cases[name] = partial(without_gradient, loop.forward, x.to(torch.bfloat16), timestep)
    return cases


@torch.no_grad()
def without_gradient(function: peers.Call, x: torch.Tensor, timestep: torch.Tensor) -> None:
    function(x, timestep)


def other_cases(networks: dict[str, tuple[nn.Module, peers.Call]], count: int, forward: bool) -> dict[str, timing.Case]:
    x, timestep, cases = peers.batch(peers.PAPER, count), torch.arange(count), {}
    for name, (network, call) in networks.items():
        for kind in OURS:
            loop = peers.Theirs(network, call=call, quick=True, autocast=kind == "bf16")
            loop.network.train(not forward)
            step = partial(without_gradient, loop.forward, x, timestep) if forward else partial(loop.step, x)
            cases[f"{name} {kind}"] = step
    return cases


def summary(times: dict[str, list[float]], count: int) -> tuple[dict[str, Any], str]:
    """Seconds, images/s and the speed of MAIN relative to each case, as JSON values and as a table."""
    theirs = [name for name in times if not name.startswith("ours")]
    values = {
        name: {
            "seconds": seconds,
            "images_per_second": figures.spread(count / s for s in seconds)._asdict(),
            "ours_is_faster_by": timing.ratio(times, MAIN, name)._asdict(),
        }
        for name, seconds in times.items()
    }
    rows = [
        (name, figures.spread(count / s for s in seconds), timing.ratio(times, MAIN, name))
        for name, seconds in times.items()
    ]
    best = timing.fastest(times, theirs)
    text = figures.table(["", "images/s", f"{MAIN} is faster by"], rows)
    return values, f"{text}\n{MAIN.capitalize()} against the fastest other, {best}: {timing.ratio(times, MAIN, best)}\n"


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--parts", nargs="+", choices=("training", "forward"), default=["training", "forward"])
    parser.add_argument("--batch", type=int, default=16, help="images per call (%(default)s)")
    parser.add_argument("--compiled", action="store_true", help="also run diffusers through torch.compile")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="a checkout of that package; may be repeated"
    )
    args = parser.parse_args()
    checkouts = {name: Path(path) for name, _, path in (text.partition("=") for text in args.peer)}
    values: dict[str, Any] = {}
    text = ""
    with record.measuring(args):
        for name in args.networks:
            more, missing = others(checkouts) if name == "paper" else ({}, {})
            for part in args.parts:
                values[f"{part}_{name}"], rows = measured(name, part, more, args)
                text += f"## {part}, {name} network, batch {args.batch}\n\n{rows}\n"
            if missing:
                values["not_measured"] = missing
                text += "Not measured: " + "; ".join(f"{k} ({why})" for k, why in missing.items()) + ".\n\n"
    record.write("speed", "Training step and forward, against other packages", args, values, text)


def measured(
    name: str, part: str, more: dict[str, tuple[nn.Module, peers.Call]], args: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    cases = (training_cases if part == "training" else forward_cases)(*NETWORKS[name], args.batch, args.compiled)
    cases |= other_cases(more, args.batch, part == "forward")
    with kernels.frozen() if part == "forward" else nullcontext():  # as in sampling
        times = timing.interleave(cases, args.repeats, args.seconds)
    cases.clear()
    gc.collect()
    return summary(times, args.batch)


if __name__ == "__main__":
    main()
