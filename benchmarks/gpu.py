"""On a CUDA GPU: training step, share of the card's matrix rate, memory, and sampling, against diffusers.

    python benchmarks/gpu.py [--networks cifar10 celebahq256] [--batch 128] [--repeats 5]

Ours is `ddpm train` by its own log, the default path with all that it does, and its step alone; diffusers is eager and
compiled, float32 and bf16 (fused AdamW and average). Model FLOP utilisation: the operations in convolutions and matrix
products, counted on a forward pass and times three for forward and backward, a second, over the card's dense bf16 rate:
the maker's figure where PEAK has the card, else what a large product reaches, which is in the record anyway.
Exits with code 2 where there is no GPU.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import peers
import record
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm.presets import PRESETS, Preset, build
from ddpm.run.generate import generate

BATCH = {"cifar10": 128, "celebahq256": 64}
PEAK = {  # name -> dense bf16 TFLOP/s with float32 accumulation by NVIDIA's data sheets; the first that matches
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "RTX 4090": 165,
}
DIFFUSERS = {
    "diffusers float32": {},
    "diffusers bf16": {"autocast": True},
    "diffusers bf16 channels-last": {"autocast": True, "channels_last": True},
    "diffusers float32, compiled": {"compiled": True},
    "diffusers bf16, compiled": {"autocast": True, "compiled": True},
    "diffusers bf16 channels-last, compiled": {"autocast": True, "channels_last": True, "compiled": True},
}


def peak(name: str) -> float | None:
    """TFLOP/s by the data sheet of the card of this name.

    >>> peak("NVIDIA H100 80GB HBM3"), peak("NVIDIA L40S"), peak("NVIDIA Z1")
    (989, 362, None)
    """
    return next((rate for card, rate in PEAK.items() if card in name), None)


def flops(preset: Preset) -> float:
    """Floating-point operations of a training step an image: three times those of a forward pass, on the CPU."""
    network = build(replace(preset, precision="float32")).network
    with record.plain(), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *preset.shape), torch.zeros(1, dtype=torch.int64))
    return 3.0 * counter.get_total_flops()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def product_rate(device: torch.device, side: int, repeats: int = 5, seconds: float = 0.5) -> record.Spread:
    """TFLOP/s of a bf16 product of two square matrices."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    found = record.interleave({"": partial(torch.mm, a, a)}, repeats, seconds, partial(wait, device))
    return record.spread(2 * side**3 / 1e12 / s for s in found[""])


def fitting(
    makers: dict[str, Callable[[], record.Case]], device: torch.device
) -> tuple[dict[str, record.Case], dict[str, float], dict[str, str]]:
    """Make each case and run it twice: those that run, the most bytes that each had, and why the others do not."""
    cases: dict[str, record.Case] = {}
    memory: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        held = 0
        if device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        try:
            case = make()
            case(), case()  # compiles, and makes the optimiser's state
            wait(device)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}" if str(error) else repr(error)
            continue
        cases[name] = case
        if device.type == "cuda":
            memory[name] = torch.cuda.max_memory_allocated(device) - held
    return cases, memory, failed


def training_makers(preset: Preset, count: int, device: torch.device, steps: int) -> dict[str, Any]:
    x0 = peers.batch(preset, count, device)

    def ours(precision: Any) -> record.Case:
        return partial(peers.Ours(preset, precision, device).step, x0)

    def theirs(settings: dict[str, Any]) -> record.Case:
        return partial(peers.Theirs(peers.paper_network(preset), device, quick=True, **settings).step, x0)

    makers = {
        "ours bf16, `ddpm train`": lambda: partial(peers.trained, preset, count, steps, "bf16", device.type),
        "ours bf16, step": partial(ours, "bf16"),
        "ours float32, step": partial(ours, "float32"),
    }
    return makers | {name: partial(theirs, settings) for name, settings in DIFFUSERS.items()}


def sampling_makers(preset: Preset, count: int, device: torch.device, steps: int) -> dict[str, Any]:
    """`count` images by DDIM."""

    def ours() -> record.Case:
        own = peers.Ours(preset, "bf16", device)
        own.network.eval().requires_grad_(False)  # or it is not replayed
        return partial(generate, own.denoiser, preset.shape, range(count), "ddim", steps, count, device)

    def theirs(settings: dict[str, Any]) -> record.Case:
        loop = peers.Theirs(peers.paper_network(preset), device, **settings)
        loop.network.eval()
        return partial(peers.ddim, loop, preset, count, steps)

    return {"ours bf16": ours} | {name: partial(theirs, settings) for name, settings in DIFFUSERS.items()}


def measured(
    makers: dict[str, Any], count: int, work: float, rate: float, device: torch.device, args: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    """JSON and a table; `work` is FLOP an image, `rate` the card's FLOP a second."""
    wanted = {name: make for name, make in makers.items() if name in args.only or name not in DIFFUSERS}
    cases, memory, failed = fitting(wanted, device)
    found = record.interleave(cases, args.repeats, args.seconds, partial(wait, device))
    ours = next(name for name in found if name.startswith("ours"))
    rows, values = [], dict[str, Any](failed=failed, memory=memory, seconds=found)
    for name, seconds in found.items():
        held = f"{memory[name] / 2**30:.1f}" if name in memory else ""
        used = record.spread(100 * work * count / s / rate for s in seconds)
        speed = record.spread(count / s for s in seconds)
        rows.append(
            (name, record.spread(1000 * s for s in seconds), speed, used, held, record.ratio(found, ours, name))
        )
    header = ["", "ms", "images/s", "FLOP utilisation, %", "peak, GiB", "the first is faster by"]
    text = record.table(header, rows) + "".join(f"\n{name}: {why}\n" for name, why in failed.items())
    return values, text


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=BATCH, default=list(BATCH))
    parser.add_argument("--batch", type=int, help="images (the paper's)")
    parser.add_argument("--sampling-batch", type=int, default=64, help="images (%(default)s)")
    parser.add_argument("--sampling-steps", type=int, default=50, help="of DDIM (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=DIFFUSERS, default=list(DIFFUSERS), metavar="CASE", help="(all)")
    parser.add_argument("--steps", type=int, default=30, help="timed, of each `ddpm train` (%(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu.py: this machine has no CUDA GPU that PyTorch can use", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    card = torch.cuda.get_device_name()
    sheet, product = peak(card), product_rate(device, 8192)
    rate = 1e12 * (sheet or product.median)
    basis = f"its data sheet, {sheet} TFLOP/s" if sheet else "that product (no data sheet's figure here)"
    text = f"{card}: a bf16 product of 8192 x 8192 runs at {product} TFLOP/s; utilisation is of {basis}.\n\n"
    values: dict[str, Any] = {"product_tflops": product._asdict(), "peak_tflops": sheet}
    with record.measuring(args):
        for name in args.networks:
            preset, count = PRESETS[name], args.batch or BATCH[name]
            work = values[f"flop_an_image_{name}"] = flops(preset)
            makers = training_makers(preset, count, device, args.steps)
            found, table = measured(makers, count, work, rate, device, args)
            values[f"training_{name}"] = found
            text += f"## Training step, {name}, batch {count}, {work / 1e9:.1f} GFLOP an image\n\n{table}\n"
            torch.compiler.reset()
            torch.cuda.empty_cache()
            count, steps = args.sampling_batch, args.sampling_steps
            makers = sampling_makers(preset, count, device, steps)
            found, table = measured(makers, count, work / 3 * steps, rate, device, args)
            values[f"sampling_{name}"] = found
            text += f"## Sampling, {name}, {count} images by {steps} steps of DDIM\n\n{table}\n"
            torch.compiler.reset()
            torch.cuda.empty_cache()
    record.write("gpu", "On a GPU", args, values, text, "cuda")
    return 0


if __name__ == "__main__":
    sys.exit(main())
