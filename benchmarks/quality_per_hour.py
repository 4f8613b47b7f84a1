"""Compare ours with diffusers' example recipe after the same minutes of training on CIFAR-10: samples and bits/dim.

    python benchmarks/quality_per_hour.py --data SOURCE [--quality PROGRAM] [--minutes 20] [--preset cifar10_fast]

Ours is `train` with a preset. Theirs is UNet2DModel with 64, 128, 128 channels, AdamW at 1e-4, linear warm-up and
cosine decay, a moving average with warm-up, batch 64 and flips, in float32 and in bf16. They run one after the other,
each in a process of its own. The clock runs from the end of the imports to the last saved weight and includes loading
the data. Each contestant first measures its rate for 30 s, which count, to plan the number of steps for the decay of
its learning rate; 3% of the time are kept in reserve. Three choices favour diffusers: images are decoded once and not
at every epoch, the warm-up of 500 steps is at most a tenth of the run, and its bf16 run has the fused optimiser.

Then each makes 1,000 images by 50 steps of DDIM, which PROGRAM scores, and the bound on the test images is estimated
from a few levels per image (`evaluate --levels-per-image`) with both fixed variances. Each part leaves a file under
--work. After a kill, the same command resumes with the part that was running.
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import figures
import numpy as np
import peers
import record
import torch
from diffusers import UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor

from ddpm import pixels, schedule
from ddpm.denoiser import Denoiser
from ddpm.files import atomic, images
from ddpm.files import data as datasets
from ddpm.files.opening import open_checkpoint
from ddpm.presets import PRESETS
from ddpm.run import evaluate
from ddpm.run import train as training
from ddpm.run.processes import Processes, pick_device

DIFFUSERS = {"diffusers-float32": {}, "diffusers-bf16": {"autocast": True, "quick": True}}
CONTESTANTS = ["ours", *DIFFUSERS]
PARTS = ["train", "sample", "bits", "quality"]
USABLE = 0.97
"""The share of the remaining time for which steps are planned."""
BATCH = 64
"""Images per step of diffusers' recipe."""


class Clock:
    """A clock that starts now and has a budget in seconds."""

    def __init__(self, budget: float) -> None:
        self.budget, self._start = budget, time.monotonic()

    def spent(self) -> float:
        return time.monotonic() - self._start

    def left(self) -> float:
        return self.budget - self.spent()

    def steps(self, seconds_a_step: float) -> int:
        """The number of steps that fit into the rest of the budget."""
        return max(1, math.floor(USABLE * self.left() / seconds_a_step))


# -- ours --------------------------------------------------------------------------------------------------------------


@contextmanager
def stopped_after(log: Path, seconds: float) -> Iterator[None]:
    """While the context is open, send SIGTERM to this process `seconds` after the first step is in the log."""
    closed = threading.Event()

    def watch() -> None:
        while not (log.exists() and '"loss"' in log.read_text()):
            if closed.wait(0.05):
                return
        if not closed.wait(seconds):
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the signal may come after `train` has returned
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def train_ours(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train for --probe seconds to measure the rate, then resume for as many steps as fit."""
    settings: dict[str, Any] = {"data": args.data, "sample_every": 0, "save_every": 10**9, "eval_images": 64}
    preset = replace(PRESETS[args.preset], **settings, log_every=1, steps=10**9)
    run = folder / "run"
    clock = Clock(60 * args.minutes)
    cached = functools.cache(datasets.load_pair)  # the resumed run does not load the images again
    with patch.object(datasets, "load_pair", cached):
        with stopped_after(run / "metrics.jsonl", args.probe):
            step = training.train(preset, run).step
        more = clock.steps(peers.seconds_a_step(peers.training_lines(run)))
        with stopped_after(run / "metrics.jsonl", clock.left()):
            result = training.train(replace(preset, steps=step + more, log_every=50), run)
    return {
        "seconds": clock.spent(),
        "steps": result.step,
        "planned_steps": step + more,
        "images": result.step * preset.batch_size,
        "parameters": sum(p.numel() for p in open_checkpoint(run).denoiser.network.parameters()),  # type: ignore[attr-defined]
    }


# -- theirs ------------------------------------------------------------------------------------------------------------


def batches(data: datasets.Images, seed: int) -> Any:
    """Batches x0 [64, C, H, W] without end. Each epoch has every image once; half of the images are mirrored."""
    g = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data), generator=g).split(BATCH):
            if len(rows) == BATCH:
                x0 = pixels.to_signal(data.batch(rows))
                mirror = torch.rand(BATCH, generator=g) < 0.5
                yield torch.where(mirror[:, None, None, None], x0.flip(-1), x0)


def train_theirs(folder: Path, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Train diffusers' network with its recipe, and save the averaged weights."""
    torch.manual_seed(0)
    device = pick_device("auto")
    clock = Clock(60 * args.minutes)
    data = datasets.load(args.data, peers.SMALL.size, peers.SMALL.channels, split="train")
    loop = peers.Theirs(peers.example_network(), device, **settings)
    steps = math.inf
    step, begun = 0, time.monotonic()
    for x0 in batches(data, 0):
        loss = loop.step(x0.to(device))
        step += 1
        if step == 1:
            first = time.monotonic()
        if steps == math.inf and step > 1 and time.monotonic() - begun > args.probe:
            steps = step + clock.steps((time.monotonic() - first) / (step - 1))
            warmup = min(500, steps // 10)
            loop.rate = get_cosine_schedule_with_warmup(loop.adam, warmup, steps, last_epoch=step - 1)
        if step % 50 == 0:
            print(f"step {step:,}, loss {loss:.4f}, {clock.spent():.0f} s", file=sys.stderr, flush=True)
        if step >= steps or clock.left() < 0:
            break
    loop.average.copy_to(loop.weights)
    loop.network.save_pretrained(folder / "model")  # type: ignore[operator]
    return {
        "seconds": clock.spent(),
        "steps": step,
        "planned_steps": None if steps == math.inf else steps,
        "images": step * BATCH,
        "parameters": sum(p.numel() for p in loop.weights),
    }


def load_theirs(folder: Path, settings: dict[str, Any]) -> peers.Theirs:
    """The network that `train_theirs` saved, for sampling and evaluation."""
    network = UNet2DModel.from_pretrained(folder / "model")
    loop = peers.Theirs(network, pick_device("auto"), autocast=settings.get("autocast", False))
    loop.network.eval().requires_grad_(False)
    return loop


# -- the parts, each in a process of its own ---------------------------------------------------------------------------


def do(part: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one part for one contestant. Returns its figures."""
    folder = args.work / name
    if part == "train":
        shutil.rmtree(folder, ignore_errors=True)  # a killed training may have left files
        folder.mkdir(parents=True)
        return train_ours(folder, args) if name == "ours" else train_theirs(folder, args, DIFFUSERS[name])
    if part == "sample":
        return sample(folder, name, args)
    if part == "bits":
        return bits(folder, name, args)
    words = [sys.executable, str(args.quality), str(folder / "samples.npz")]
    return numbers(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def numbers(text: str) -> dict[str, float]:
    """The numbers in a text by name: every NAME NUMBER or NAME: NUMBER.

    >>> numbers("N 1000  FRD 26.4000  RS 3.75")
    {'N': 1000.0, 'FRD': 26.4, 'RS': 3.75}
    """
    return {name: float(value) for name, value in re.findall(r"([A-Za-z]\w*)[ :]+(-?\d[\d.]*(?:e[+-]?\d+)?)", text)}


def sample(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Write samples.npz and a grid of the first 64 samples."""
    start = time.monotonic()
    out = folder / "samples.npz"
    if name == "ours":
        words = ["sample", folder / "run", "-n", args.samples, "--sampler", "ddim", "--steps", 50, "--out", out]
        command = [sys.executable, "-m", "ddpm", *map(str, words)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with np.load(out) as saved:
            samples = saved[saved.files[0]]
    else:
        torch.manual_seed(0)
        loop = load_theirs(folder, DIFFUSERS[name])
        counts = [min(BATCH, args.samples - first) for first in range(0, args.samples, BATCH)]
        samples = torch.cat([peers.ddim(loop, peers.SMALL, count, 50) for count in counts])
        samples = samples.permute(0, 2, 3, 1).contiguous().numpy()
        np.savez(out, images=samples)
    images.save(folder / "grid.png", images.grid(samples[:64]))
    return {"count": len(samples), "seconds": time.monotonic() - start}


def bits(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Bits/dim of the test images with both fixed variances, each with its standard error."""
    device = pick_device("auto")
    if name == "ours":
        denoiser = open_checkpoint(folder / "run").denoiser.to(device)
        shape = PRESETS[args.preset].shape
    else:
        loop = load_theirs(folder, DIFFUSERS[name])
        shape = peers.SMALL.shape

        def network(x: Tensor, timestep: Tensor, y: Tensor | None) -> Tensor:
            return loop.forward(x.float(), timestep)

        denoiser = Denoiser(network, schedule.linear(), "eps").to(device)
    data = datasets.load(args.data, (shape[1], shape[2]), shape[0], split="test", as_trained=True)
    results: dict[str, Any] = {}
    for variance in ("fixed_large", "fixed_small"):
        model: Any = SimpleNamespace(denoiser=replace(denoiser, variance=variance), preset=SimpleNamespace(shape=shape))
        processes = Processes(0, 1, device)
        results[variance] = evaluate.nll_sampled(model, data, args.levels, processes, args.nll_images)
    return results


def run_parts(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All parts of all contestants. A finished part is read from its file."""
    settings = {key: getattr(args, key) for key in ("minutes", "preset", "samples", "levels", "nll_images", "probe")}
    record.same_settings(args.work, settings)
    results: dict[str, dict[str, Any]] = {name: {} for name in args.contestants}
    for name in args.contestants:
        for part in PARTS if args.quality else PARTS[:-1]:
            file = args.work / name / f"{part}.json"
            if not file.exists():
                print(f"{name}: {part}", file=sys.stderr, flush=True)
                words = [sys.executable, __file__, *sys.argv[1:], "--do", part, name]
                subprocess.run(words, check=True)
            results[name][part] = json.loads(file.read_text())
    return results


def report(results: dict[str, dict[str, Any]]) -> str:
    """A table with one row per contestant."""
    names = list(dict.fromkeys(key for parts in results.values() for key in parts.get("quality", {}) if key != "N"))
    header = ["", "parameters", "minutes", "images seen", "images/s", *names, "bits/dim, fixed_large", "fixed_small"]
    rows = []
    for name, parts in results.items():
        trained = parts["train"]
        row = [name, f"{trained['parameters']:,}", f"{trained['seconds'] / 60:.1f}", f"{trained['images']:,}"]
        row += [f"{trained['images'] / trained['seconds']:.1f}"]
        row += [f"{parts['quality'][key]:.2f}" for key in names]
        for bound in parts["bits"].values():
            row.append(f"{bound['bits_per_dim']:.3f} ± {bound['standard_error']:.3f}")
        rows.append(row)
    return figures.table(header, rows)


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--data", required=True, help="SOURCE of CIFAR-10 as `ddpm train --data` takes it")
    parser.add_argument("--quality", type=Path, help="a program; PROGRAM SAMPLES.npz prints NAME NUMBER ...")
    parser.add_argument(
        "--minutes", type=float, default=20, help="minutes of training for each contestant (%(default)s)"
    )
    parser.add_argument(
        "--probe", type=float, default=30, help="seconds of the training that measure the rate (%(default)s)"
    )
    parser.add_argument("--preset", default="cifar10_fast", choices=PRESETS)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--samples", type=int, default=1000, help="number of samples (%(default)s)")
    parser.add_argument("--levels", type=int, default=5, help="levels per test image for bits/dim (%(default)s)")
    parser.add_argument("--nll-images", type=int, help="number of test images (all)")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(__file__).parent / "cache" / "quality",
        help="folder of finished parts (%(default)s)",
    )
    parser.add_argument("--do", nargs=2, metavar=("PART", "CONTESTANT"), help="run one part in this process")
    args = parser.parse_args()
    with record.measuring(args):
        if args.do:
            part, name = args.do
            atomic.write_json(args.work / name / f"{part}.json", do(part, name, args))
            return
        results = run_parts(args)
    work = args.work
    del args.do, args.work
    text = (
        f"{args.minutes:g} minutes of training each, one after the other; {args.samples:,} samples by 50 steps of "
        f"DDIM; bits/dim of the test images from {args.levels} levels each. Ours is the preset {args.preset}. FRD and "
        "RS, if they were measured, compare only with figures of the same program.\n\n" + report(results)
    )
    path = record.write(
        "quality-per-hour", "Quality for the same minutes of training", args, {"results": results}, text
    )
    for name in results:
        shutil.copy(work / name / "grid.png", path.with_name(f"{path.stem}_{name}.png"))


if __name__ == "__main__":
    main()
