"""Time `ddpm sample RUN -n 256` from end to end, and find the share of each of its parts.

    python benchmarks/sampling.py [-n 256] [--steps 10] [--networks paper fast]

The command runs in this process after the imports. The time of a part leaves out the parts that it calls. With few
steps, the parts that run once per image (conversion and saving) have a larger share than with 50 or 1000 steps. `fast`
is the preset cifar10_fast: 4M parameters, which work on 16x16.
"""

import contextlib
import io
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import peers
import record
import timing
import torch

import ddpm.files.images
import ddpm.noise
import ddpm.run.processes
import ddpm.run.sample
from ddpm import cli, pixels
from ddpm.denoiser import Denoiser
from ddpm.presets import PRESETS, Preset
from ddpm.run.train import train
from ddpm.unet import UNet

NETWORKS = {
    "paper": peers.PAPER,
    "fast": PRESETS["cifar10_fast"],
}
PLACES = [
    (UNet, "__call__", "network"),
    (ddpm.noise, "normal", "noise"),
    (Denoiser, "__call__", "denoiser (from the network's output to mean and variance)"),
    (pixels, "to_pixels", "conversion to uint8"),
    (ddpm.files.images, "save_many", "saving"),
    (ddpm.run.processes, "open_for_device", "loading the checkpoint"),
    (ddpm.run.sample, "generate", "sampler"),
]


def tiny_run(preset: Preset, out: Path) -> Path:
    """A run of one training step on one image. It has the preset's network, and its samples are noise."""
    once: dict[str, Any] = {"data": "digits", "steps": 1, "batch_size": 1, "eval_images": 1, "sample_every": 0}
    with contextlib.redirect_stderr(io.StringIO()):
        train(replace(preset, **once, ema_warmup=True), out)
    return out


def sampled(run: Path, out: Path, n: int, steps: int, sampler: str, batch_size: int = 64) -> dict[str, float]:
    """Seconds of one `ddpm sample` by part."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    parts = timing.Parts(sync)
    command = ["sample", run, "-n", n, "--steps", steps, "--sampler", sampler, "--batch-size", batch_size]
    command += ["--out", out, "--json"]
    with contextlib.redirect_stdout(io.StringIO()), parts.timing(*PLACES), parts("the rest"):
        code = cli.main([str(word) for word in command])
    if code:
        raise SystemExit(code)
    return parts.seconds


def main() -> None:
    parser = record.parser(__doc__, repeats=3, seconds=0)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("-n", type=int, default=256, help="number of images (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="network calls per image (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (%(default)s)")
    parser.add_argument(
        "--suffix", choices=(".png", ".npz"), default=".png", help="format of the samples (%(default)s)"
    )
    args = parser.parse_args()
    values: dict[str, Any] = {}
    text = f"{args.n} images, {args.steps} steps, {args.batch_size} at a time, to one {args.suffix}.\n\n"
    with record.measuring(args), tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            run = tiny_run(NETWORKS[name], Path(folder) / name)
            seconds_of: dict[str, list[dict[str, float]]] = {"ddim": [], "ancestral": []}
            out = Path(folder) / f"samples{args.suffix}"
            for sampler in seconds_of:  # warm up
                sampled(run, out, args.batch_size, 1, sampler, args.batch_size)
            for _ in range(args.repeats):
                for sampler, repeats in seconds_of.items():
                    repeats.append(sampled(run, out, args.n, args.steps, sampler, args.batch_size))
            for sampler, repeats in seconds_of.items():
                values[f"{name}, {sampler}"] = repeats
                text += f"## {name}, {sampler}\n\n{report(repeats, args.n)}\n"
    record.write("sampling", "Sampling from end to end", args, values, text)


def report(repeats: list[dict[str, float]], n: int) -> str:
    """A table of the parts, longest first, and the share of the time outside the network."""
    totals = [sum(parts.values()) for parts in repeats]
    names = sorted({name for parts in repeats for name in parts}, key=lambda name: -repeats[0].get(name, 0.0))
    rows = []
    for name in names:
        seconds = [parts.get(name, 0.0) for parts in repeats]
        share = figures.spread(100 * s / total for s, total in zip(seconds, totals, strict=True))
        rows.append((name, figures.spread(seconds), share))
    outside = figures.spread(100 * (1 - p.get("network", 0.0) / t) for p, t in zip(repeats, totals, strict=True))
    rate = figures.spread(n / total for total in totals)
    table = figures.table(["", "s", "share, %"], rows)
    return f"{rate} images/s; outside the network {outside} %\n\n{table}"


if __name__ == "__main__":
    main()
