"""Which recipe is best for the same images? Variants of a preset, one change each: FRD, RS, bits/dim and minutes.

    python benchmarks/recipe.py OUT --data SOURCE [--quality cifar_quality.py] [--only NAME ...] [--seeds 2]

Trains each variant into OUT/NAME-sSEED, samples by DDIM, measures the bound of held-out images from a few levels
each, with the preset's variance and with the calibrated one, and leaves recipe.json there. Then writes all that there
are, of other calls too, into OUT/recipe.json and, sorted, OUT/recipe.md. What is done is passed over, what was killed
goes on: the same command again. Seeds of samples are the same for all, so that differences are those of the networks.

--quality is a program that takes an .npz of samples and prints `FRD x  RS y`; without it the rows are sorted by bits.
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import header
from torch.utils.flop_counter import FlopCounterMode

from ddpm import kernels
from ddpm.files import atomic
from ddpm.files import data as datasets
from ddpm.files.models import Checkpoint, with_variance
from ddpm.presets import PRESETS, Preset, build
from ddpm.run import calibrate, evaluate
from ddpm.run.processes import Processes, opened, pick_device
from ddpm.run.sample import generate
from ddpm.run.train import train

# Half the preset's rate: at 2e-3 a run by L met a gradient that was not finite.
PAPER = {"predict": "eps", "schedule": "linear", "timestep_sampling": "uniform", "cooldown": 0.0, "lr": 1e-3}
# What each row changes; a function of the preset where the change is relative to it.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    # which noise levels are trained, and how
    "times-uniform": {"timestep_sampling": "uniform"},
    "times-stratified": {"timestep_sampling": "stratified"},
    "times-lognormal": {"timestep_sampling": "lognormal"},
    "times-bound": {"timestep_sampling": "bound"},
    "bound-eps": {"timestep_sampling": "bound", "predict": "eps"},
    "bound-linear": {"timestep_sampling": "bound", "schedule": "linear"},
    "bound-lr-double": {"timestep_sampling": "bound", "lr": lambda p: 2 * p.lr},
    "bound-patch-1": {"timestep_sampling": "bound", "patch": 1, "width": 32, "channel_multipliers": (1, 2, 4)},
    "predict-eps": {"predict": "eps"},
    "predict-x0": {"predict": "x0"},
    "schedule-linear": {"schedule": "linear"},
    "weighting-min_snr": {"weighting": "min_snr"},
    "weighting-p2": {"weighting": "p2"},
    # the paper's recipe for the same network, by L_simple and by L (Table 2)
    "paper": PAPER,
    "paper-L": {**PAPER, "loss": "vlb"},
    # optimisation
    "lr-double": {"lr": lambda p: 2 * p.lr},
    "lr-half": {"lr": lambda p: p.lr / 2},
    "batch-double": {"batch_size": lambda p: 2 * p.batch_size},
    "batch-half": {"batch_size": lambda p: p.batch_size // 2},
    "cooldown-none": {"cooldown": 0.0},
    "cooldown-whole": {"cooldown": 1.0},
    "ema-shorter": {"ema": lambda p: 1 - 30 / p.steps},  # over a thirtieth of the run; ema_warmup's is a ninth
    "ema-longer": {"ema": lambda p: 1 - 5 / p.steps, "ema_warmup": False},
    "dropout": {"dropout": 0.1},
    "flip-none": {"flip": False},
    # the network, at about the cost of cifar10_fast's
    "attention-none": {"attention_resolutions": (0,)},
    "attention-everywhere": {"attention_resolutions": (8, 16)},
    "patch-1": {"patch": 1, "width": 32, "channel_multipliers": (1, 2, 4)},
    "narrow-deep": {"width": 64, "channel_multipliers": (1, 1), "num_res_blocks": 6},
    "wide-shallow": {"width": 128, "channel_multipliers": (1,), "num_res_blocks": 1, "attention_resolutions": (16,)},
    "narrow-then-wide": {"width": 64, "channel_multipliers": (1, 2), "num_res_blocks": 1},
    "three-levels": {"channel_multipliers": (1, 1, 1), "num_res_blocks": 1},
}


def variant(base: Preset, name: str, seed: int, images: int) -> Preset:
    """The preset of a row, for so many images: what a batch leaves over is not seen."""
    base = replace(base, seed=seed, steps=images // base.batch_size)
    changes = {key: change(base) if callable(change) else change for key, change in VARIANTS[name].items()}
    changed = replace(base, **changes)
    return replace(changed, steps=images // changed.batch_size)


def mflop(preset: Preset) -> float:
    """Of one network call for one image, forward, in millions of operations; a multiply-add is two."""
    network = build(replace(preset, precision="float32")).network
    with kernels.disabled(), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *preset.shape), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops() / 1e6


def quality(program: Path, samples: Path) -> dict[str, float]:
    """FRD and RS of an .npz of samples, as the program prints them."""
    printed = subprocess.run([sys.executable, program, samples], check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in re.findall(r"(FRD|RS) ([\d.]+)", printed)}


def bits(found: Checkpoint, data: tuple[datasets.Images, datasets.Images], args: argparse.Namespace) -> dict[str, Any]:
    """Bits/dim of held-out images, the standard error, and the same with the variance calibrated on training images."""
    alone = Processes(0, 1, pick_device(args.device))

    def there(one: Checkpoint) -> Checkpoint:
        return replace(one, denoiser=one.denoiser.to(alone.device))

    few = evaluate.nll_sampled(there(found), data[1], args.levels, alone, args.nll_images)
    calibrate.calibrate(there(found), data[0], found.home / "cache", alone, args.calibrate, codec=0)
    best = there(with_variance(found, "calibrated"))
    best = evaluate.nll_sampled(best, data[1], args.levels, alone, args.nll_images)
    names = {"bits_per_dim": few["bits_per_dim"], "bits_calibrated": best["bits_per_dim"]}
    return names | {"bits_error": few["standard_error"], "bits_calibrated_error": best["standard_error"]}


def measure(run: Path, data: tuple[datasets.Images, datasets.Images], args: argparse.Namespace) -> dict[str, Any]:
    """What a trained run came to, plain JSON values."""
    device = pick_device(args.device)
    found = opened(run, device)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training, held_out = ([line for line in log if key in line] for key in ("loss", "held_out"))
    samples = run / f"samples-{found.step}-{args.samples}-{args.calls}.npz"
    if not samples.is_file():
        shape, size = found.preset.shape, args.batch_size
        denoiser = found.denoiser.to(device)
        made = generate(denoiser, shape, range(args.samples), "ddim", args.calls, size, device, progress=True)
        with atomic.whole(samples) as part, part.open("wb") as file:
            np.savez(file, made.permute(0, 2, 3, 1).numpy())
    result = {
        "parameters": sum(p.numel() for p in found.denoiser.network.parameters()),
        "mflop": mflop(found.preset),
        "steps": found.step,
        "batch_size": found.preset.batch_size,
        "minutes": training[-1]["seconds"] / 60,
        "held_out": held_out[-1]["held_out"],
    }
    return result | bits(found, data, args) | (quality(args.quality, samples) if args.quality else {})


def table(results: list[dict[str, Any]]) -> str:
    """A row a variant, the best first: the mean over its seeds, and half their range."""
    columns = {
        "FRD": ".2f", "RS": ".2f", "bits_per_dim": ".3f", "bits_calibrated": ".3f", "held_out": ".4f", "minutes": ".1f",
    }  # fmt: skip
    rows = []
    for name in dict.fromkeys(result["variant"] for result in results):
        runs = [result for result in results if result["variant"] == name]
        values = {key: [run[key] for run in runs if key in run] for key in columns}
        order = np.mean(values["FRD"] or [1e9]), np.mean(values["bits_per_dim"])
        cells = [
            f"{np.mean(v):{form}}" + (f" ± {(max(v) - min(v)) / 2:{form}}" if len(v) > 1 else "") if v else ""
            for v, form in zip(values.values(), columns.values(), strict=True)
        ]
        size = [f"{runs[0]['parameters'] / 1e6:.2f} M", f"{runs[0]['mflop']:.0f}", str(len(runs))]
        rows.append((order, "| " + " | ".join([name, *cells, *size]) + " |"))
    head = ["variant", *columns, "parameters", "MFLOP a call", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(row for _, row in sorted(rows))]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="cifar10_fast", choices=PRESETS)
    parser.add_argument("--only", nargs="+", default=[*VARIANTS], choices=VARIANTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=64_000, help="trained on, over all steps")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=50, help="of the network a sample, by DDIM")
    parser.add_argument("--quality", type=Path)
    parser.add_argument("--levels", type=int, default=5, help="an image, that the bound is estimated from")
    parser.add_argument("--nll-images", type=int, default=500)
    parser.add_argument("--calibrate", type=int, default=16, help="images, all levels of each")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64, help="of samples; of training it is the preset's")
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args()

    base = replace(PRESETS[args.preset], data=args.data, save_every=500, keep=1, sample_every=0, device=args.device)
    data = datasets.load_pair(base.data, base.size, base.channels)
    for seed in args.seeds:
        for name in args.only:
            run, preset = args.out / f"{name}-s{seed}", variant(base, name, seed, args.images)
            file = run / "recipe.json"
            if file.is_file() and json.loads(file.read_text())["steps"] == preset.steps:
                continue
            if train(preset, run).interrupted:
                sys.exit(130)
            about = {"variant": name, "seed": seed, "samples": args.samples, "calls": args.calls, "commit": args.commit}
            atomic.write_json(file, about | measure(run, data, args))
            results = [json.loads(one.read_text()) for one in sorted(args.out.glob("*/recipe.json"))]
            atomic.write_json(args.out / "recipe.json", results)
            settings = (
                f"- {args.preset}, {args.images:,} images a run; {args.samples} samples by DDIM in {args.calls} calls; "
                f"bits/dim of {args.nll_images} held-out images from {args.levels} levels of each"
            )
            record = f"{header(args.commit, 'a seed a run, ± half the range')}\n{settings}\n\n{table(results)}"
            atomic.write(args.out / "recipe.md", record)
            print(record, flush=True)


if __name__ == "__main__":
    main()
