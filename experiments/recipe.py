"""Compare variants of a preset, one change each, after the same number of images: FRD, RS, bits/dim and minutes.

    python experiments/recipe.py OUT --data SOURCE [--quality cifar_quality.py] [--only NAME ...] [--seeds 0 1]
    python experiments/recipe.py OUT --data SOURCE --only NAME ... --minutes M ... [--seeds 0 1]

The script trains each variant into OUT/NAME-sSEED and samples by DDIM. It estimates the bound of held-out images from
a few levels per image, with the preset's variance and with the calibrated one. It writes these figures to recipe.json
in the variant's folder, and the figures of all folders to OUT/recipe.json and OUT/recipe.md, best first. The same
command resumes after a kill and skips finished variants. All variants use the same seeds of samples, so a difference
between two rows comes from the networks.

--minutes compares them after so many minutes of training instead, one number for each variant of --only. All runs are
then trained in turns, before any of them is measured, so that nothing else runs beside a training.

--quality is a program that takes an .npz of samples and prints `FRD x  RS y`. Without it the rows are sorted by bits.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scores import quality
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import figures
import record

from ddpm import kernels
from ddpm.files import atomic
from ddpm.files import data as datasets
from ddpm.files.models import Checkpoint, with_variance
from ddpm.presets import PRESETS, Preset, build
from ddpm.run import calibrate, evaluate
from ddpm.run.processes import Processes, open_for_device, pick_device
from ddpm.run.sample import generate
from ddpm.run.train import train

# cifar10_fast until 2026-11-29, when it was the base of all other rows
ADAM = {"optimizer": "adam", "lr": 2e-3, "warmup": 200, "batch_size": 64, "ema_decay": 0.999}
# The learning rate is half of ADAM's: at 2e-3 a run with the loss L had a gradient that was not finite.
PAPER = {**ADAM, "predict": "eps", "schedule": "linear", "timestep_sampling": "uniform", "cooldown": 0.0, "lr": 1e-3}
# The settings that each variant changes. A function computes the value from the preset.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    # noise levels in training, prediction and weighting
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
    "adam": ADAM,
    # optimisation
    "batch-16": {"lr": 2.8e-3, "warmup": 100, "batch_size": 16},
    "endless": {"cooldown": 0.0, "lr_ref_steps": lambda p: p.steps // 4},
    "lr-double": {"lr": lambda p: 2 * p.lr},
    "lr-half": {"lr": lambda p: p.lr / 2},
    "batch-double": {"batch_size": lambda p: 2 * p.batch_size},
    "batch-half": {"batch_size": lambda p: p.batch_size // 2},
    "cooldown-none": {"cooldown": 0.0},
    "cooldown-whole": {"cooldown": 1.0},
    "ema-shorter": {"ema_decay": lambda p: 1 - 30 / p.steps},  # averages over 1/30 of the run; ema_warmup over 1/9
    "ema-longer": {"ema_decay": lambda p: 1 - 5 / p.steps, "ema_warmup": False},
    "dropout": {"dropout": 0.1},
    "flip-none": {"flip": False},
    "nearest": {"noise_assignment": "nearest"},
    "augment": {"augment": 0.12},  # EDM's rate for CIFAR-10
    # networks that cost about as much as that of cifar10_fast
    "attention-none": {"attention_resolutions": (0,)},
    "attention-everywhere": {"attention_resolutions": (8, 16)},
    "patch-1": {"patch": 1, "width": 32, "channel_multipliers": (1, 2, 4)},
    "narrow-deep": {"width": 64, "num_res_blocks": 3},
    "narrow-then-wide": {"width": 64, "channel_multipliers": (1, 2)},
    "narrow-then-wide-twice": {"width": 64, "channel_multipliers": (1, 2, 2)},
    # half of its cost
    "narrow": {"width": 64},
}


def variant(base: Preset, name: str, seed: int, images: int) -> Preset:
    """The preset of a variant for this many images. Images that fill no batch are left out."""
    base = replace(base, seed=seed, steps=images // base.batch_size)
    changes = {key: change(base) if callable(change) else change for key, change in VARIANTS[name].items()}
    changed = replace(base, **changes)
    return replace(changed, steps=images // changed.batch_size)


def mflop(preset: Preset) -> float:
    """Millions of operations of one forward pass for one image. A multiply-add counts as two."""
    network = build(replace(preset, precision="float32")).network
    with kernels.disabled(), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *preset.shape), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops() / 1e6


def bits(
    checkpoint: Checkpoint, data: tuple[datasets.Images, datasets.Images], args: argparse.Namespace
) -> dict[str, Any]:
    """Bits/dim of held-out images and the standard error, with the preset's variance and with the calibrated one.

    data: training images, which calibrate the variance, and held-out images.
    """
    processes = Processes(0, 1, pick_device(args.device))

    def on_device(source: Checkpoint) -> Checkpoint:
        return replace(source, denoiser=source.denoiser.to(processes.device))

    own = evaluate.nll_sampled(on_device(checkpoint), data[1], args.levels, processes, args.nll_images)
    calibrate.calibrate(on_device(checkpoint), data[0], checkpoint.home / "cache", processes, args.calibrate, codec=0)
    calibrated = on_device(with_variance(checkpoint, "calibrated"))
    best = evaluate.nll_sampled(calibrated, data[1], args.levels, processes, args.nll_images)
    means = {"bits_per_dim": own["bits_per_dim"], "bits_calibrated": best["bits_per_dim"]}
    return means | {"bits_error": own["standard_error"], "bits_calibrated_error": best["standard_error"]}


def measure(run: Path, data: tuple[datasets.Images, datasets.Images], args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a trained run, as JSON values."""
    device = pick_device(args.device)
    checkpoint = open_for_device(run, device)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training, held_out = ([line for line in log if key in line] for key in ("loss", "held_out"))
    samples = run / f"samples-{checkpoint.step}-{args.samples}-{args.calls}.npz"
    if not samples.is_file():
        shape, size = checkpoint.preset.shape, args.batch_size
        denoiser = checkpoint.denoiser.to(device)
        images = generate(denoiser, shape, range(args.samples), "ddim", args.calls, size, device, progress=True)
        with atomic.temporary(samples) as part, part.open("wb") as file:
            np.savez(file, images.permute(0, 2, 3, 1).numpy())
    result = {
        "parameters": sum(p.numel() for p in checkpoint.denoiser.network.parameters()),
        "mflop": mflop(checkpoint.preset),
        "steps": checkpoint.step,
        "batch_size": checkpoint.preset.batch_size,
        "minutes": training[-1]["seconds"] / 60,
        "images": checkpoint.step * checkpoint.preset.batch_size,
        "held_out": held_out[-1]["held_out"],
    }
    return result | bits(checkpoint, data, args) | (quality(args.quality, samples) if args.quality else {})


def table(results: list[dict[str, Any]]) -> str:
    """One row per variant, best first: the mean over its seeds and half their range."""
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
        rows.append((order, [name, *cells, *size]))
    header = ["variant", *columns, "parameters", "MFLOP per call", "seeds"]
    return figures.table(header, [row for _, row in sorted(rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--data", required=True, help="SOURCE as `ddpm train --data` takes it")
    parser.add_argument("--preset", default="cifar10_fast", choices=PRESETS)
    parser.add_argument("--only", nargs="+", default=[*VARIANTS], choices=VARIANTS, metavar="NAME", help="(all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the runs (0)")
    parser.add_argument("--images", type=int, default=64_000, help="training images over all steps (%(default)s)")
    parser.add_argument("--minutes", type=float, nargs="+", help="minutes of training, one number for each of --only")
    parser.add_argument("--samples", type=int, default=1000, help="samples per run (%(default)s)")
    parser.add_argument("--calls", type=int, default=50, help="network calls per sample (%(default)s)")
    parser.add_argument("--quality", type=Path, help="program that scores an .npz of samples")
    parser.add_argument("--levels", type=int, default=5, help="levels per image for the bound (%(default)s)")
    parser.add_argument("--nll-images", type=int, default=500, help="held-out images for the bound (%(default)s)")
    parser.add_argument("--calibrate", type=int, default=16, help="images that calibrate the variance (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64, help="samples at a time (%(default)s)")
    args = parser.parse_args()

    if args.minutes and len(args.minutes) != len(args.only):
        parser.error(f"--minutes: {len(args.minutes)} numbers for the {len(args.only)} variants of --only")

    base = replace(PRESETS[args.preset], data=args.data, save_every=500, keep=1, sample_every=0, device=args.device)
    data = datasets.load_pair(base.data, base.size, base.channels)
    minutes = dict(zip(args.only, args.minutes, strict=True)) if args.minutes else {}

    def unmeasured(name: str, seed: int) -> bool:
        file, steps = args.out / f"{name}-s{seed}/recipe.json", variant(base, name, seed, args.images).steps
        return not file.is_file() or (not minutes and json.loads(file.read_text())["steps"] != steps)

    def fit(name: str, seed: int) -> None:
        preset = variant(base, name, seed, args.images)
        if train(preset, args.out / f"{name}-s{seed}", minutes.get(name)).interrupted:
            sys.exit(130)

    order = [(name, seed) for seed in args.seeds for name in args.only if unmeasured(name, seed)]
    for one in order if minutes else []:
        fit(*one)
    for name, seed in order:
        run = args.out / f"{name}-s{seed}"
        if not minutes:
            fit(name, seed)
        about = {"variant": name, "seed": seed, "samples": args.samples, "calls": args.calls}
        about |= {"commit": record.commit(), "minutes_given": minutes.get(name)}
        atomic.write_json(run / "recipe.json", about | measure(run, data, args))
        results = [json.loads(one.read_text()) for one in sorted(args.out.glob("*/recipe.json"))]
        atomic.write_json(args.out / "recipe.json", results)
        amount = "minutes as given" if minutes else f"{args.images:,} images"
        settings = (
            f"- {args.preset}, {amount} per run; {args.samples} samples by DDIM in {args.calls} "
            f"calls; bits/dim of {args.nll_images} held-out images from {args.levels} levels of each"
        )
        head = record.header(record.provenance(), "one run per seed, ± half the range")
        text = f"{head}\n{settings}\n\n{table(results)}"
        atomic.write(args.out / "recipe.md", text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
