"""The same minutes of training on CIFAR-10: ours against diffusers' example recipe, by samples and bits/dim.

    python benchmarks/quality_per_hour.py --data SOURCE [--quality PROGRAM] [--minutes 20] [--preset cifar10_fast]

Ours is `train` with a preset; theirs is UNet2DModel 64, 128, 128 with AdamW 1e-4, linear warm-up and cosine decay, EMA
with warm-up, batch 64, flips, in float32 and in bf16. One after the other, each alone in a process; the clock runs from
the end of the imports to the last saved weight, data loading included. Each first measures its rate (30 s, which count)
to know how many steps its decay of the learning rate is for; 3% are kept in hand. Kind to the peer: images are decoded
once, not at every epoch; the warm-up of 500 steps is at most a tenth of the run; its bf16 has the fused optimiser.

Then 1,000 images by 50 steps of DDIM, what PROGRAM prints of them, and the bound on the test images from a few levels
of each (`evaluate --levels`) with both fixed variances. Every part leaves a file under --work; the same command goes on
after a kill, from the part that was under way.
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
IN_HAND = 0.97
BATCH = 64


class Clock:
    """Seconds since its making, of a budget."""

    def __init__(self, budget: float) -> None:
        self.budget, self._start = budget, time.monotonic()

    def spent(self) -> float:
        return time.monotonic() - self._start

    def left(self) -> float:
        return self.budget - self.spent()

    def steps(self, seconds_a_step: float) -> int:
        """How many more steps fit."""
        return max(1, math.floor(IN_HAND * self.left() / seconds_a_step))


# -- ours --------------------------------------------------------------------------------------------------------------


@contextmanager
def stopped_after(log: Path, seconds: float) -> Iterator[None]:
    """Within it `train` is asked to stop so long after the log's first step (at once where it is there)."""
    quiet = threading.Event()

    def watch() -> None:
        while not (log.exists() and '"loss"' in log.read_text()):
            if quiet.wait(0.05):
                return
        if not quiet.wait(seconds):
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # for one that comes when `train` listens no more
    thread.start()
    try:
        yield
    finally:
        quiet.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)


def train_ours(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`train` for a little while, and then on, for as many steps as its rate allows."""
    settings: dict[str, Any] = {"data": args.data, "sample_every": 0, "save_every": 10**9, "eval_images": 64}
    preset = replace(PRESETS[args.preset], **settings, log_every=1, steps=10**9)
    run = folder / "run"
    clock = Clock(60 * args.minutes)
    once = functools.cache(datasets.load_pair)  # the second call has the images of the first
    with patch.object(datasets, "load_pair", once):
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
    """x_0 [64, C, H, W] without end: every image once an epoch, half of them mirrored."""
    g = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(data), generator=g).split(BATCH):
            if len(rows) == BATCH:
                x0 = pixels.to_signal(data.batch(rows))
                mirror = torch.rand(BATCH, generator=g) < 0.5
                yield torch.where(mirror[:, None, None, None], x0.flip(-1), x0)


def train_theirs(folder: Path, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
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


def opened(folder: Path, settings: dict[str, Any]) -> peers.Theirs:
    network = UNet2DModel.from_pretrained(folder / "model")
    loop = peers.Theirs(network, pick_device("auto"), autocast=settings.get("autocast", False))
    loop.network.eval().requires_grad_(False)
    return loop


# -- the parts, each in a process of its own ---------------------------------------------------------------------------


def do(part: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One part for one contestant; its figures."""
    folder = args.work / name
    if part == "train":
        shutil.rmtree(folder, ignore_errors=True)  # what a killed training left
        folder.mkdir(parents=True)
        return train_ours(folder, args) if name == "ours" else train_theirs(folder, args, DIFFUSERS[name])
    if part == "sample":
        return sample(folder, name, args)
    if part == "bits":
        return bits(folder, name, args)
    words = [sys.executable, str(args.quality), str(folder / "samples.npz")]
    return numbers(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def numbers(text: str) -> dict[str, float]:
    """Every NAME NUMBER of a line.

    >>> numbers("N 1000  FRD 26.4000  RS 3.75")
    {'N': 1000.0, 'FRD': 26.4, 'RS': 3.75}
    """
    return {name: float(value) for name, value in re.findall(r"([A-Za-z]\w*)[ :]+(-?\d[\d.]*(?:e[+-]?\d+)?)", text)}


def sample(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    out = folder / "samples.npz"
    if name == "ours":
        words = ["sample", folder / "run", "-n", args.samples, "--sampler", "ddim", "--steps", 50, "--out", out]
        command = [sys.executable, "-m", "ddpm", *map(str, words)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with np.load(out) as saved:
            made = saved[saved.files[0]]
    else:
        torch.manual_seed(0)
        loop = opened(folder, DIFFUSERS[name])
        counts = [min(BATCH, args.samples - first) for first in range(0, args.samples, BATCH)]
        made = torch.cat([peers.ddim(loop, peers.SMALL, count, 50) for count in counts])
        made = made.permute(0, 2, 3, 1).contiguous().numpy()
        np.savez(out, images=made)
    images.save(folder / "grid.png", images.grid(made[:64]))
    return {"count": len(made), "seconds": time.monotonic() - start}


def bits(folder: Path, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Bits/dim of the test images by variance, each with its standard error."""
    device = pick_device("auto")
    if name == "ours":
        denoiser = open_checkpoint(folder / "run").denoiser.to(device)
        shape = PRESETS[args.preset].shape
    else:
        loop = opened(folder, DIFFUSERS[name])
        shape = peers.SMALL.shape

        def network(x: Tensor, timestep: Tensor, y: Tensor | None) -> Tensor:
            return loop.forward(x.float(), timestep)

        denoiser = Denoiser(network, schedule.linear(), "eps").to(device)
    data = datasets.load(args.data, (shape[1], shape[2]), shape[0], split="test", as_trained=True)
    found: dict[str, Any] = {}
    for variance in ("fixed_large", "fixed_small"):
        model: Any = SimpleNamespace(denoiser=replace(denoiser, variance=variance), preset=SimpleNamespace(shape=shape))
        alone = Processes(0, 1, device)
        found[variance] = evaluate.nll_sampled(model, data, args.levels, alone, args.nll_images)
    return found


def run_parts(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All parts of all contestants, those that are done already from their files."""
    settings = {key: getattr(args, key) for key in ("minutes", "preset", "samples", "levels", "nll_images", "probe")}
    record.same_settings(args.work, settings)
    found: dict[str, dict[str, Any]] = {name: {} for name in args.contestants}
    for name in args.contestants:
        for part in PARTS if args.quality else PARTS[:-1]:
            file = args.work / name / f"{part}.json"
            if not file.exists():
                print(f"{name}: {part}", file=sys.stderr, flush=True)
                words = [sys.executable, __file__, *sys.argv[1:], "--do", part, name]
                subprocess.run(words, check=True)
            found[name][part] = json.loads(file.read_text())
    return found


def report(found: dict[str, dict[str, Any]]) -> str:
    names = list(dict.fromkeys(key for parts in found.values() for key in parts.get("quality", {}) if key != "N"))
    header = ["", "parameters", "minutes", "images seen", "images/s", *names, "bits/dim, fixed_large", "fixed_small"]
    rows = []
    for name, parts in found.items():
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
    parser.add_argument("--quality", type=Path, help="a program: PROGRAM SAMPLES.npz prints NAME NUMBER ...")
    parser.add_argument("--minutes", type=float, default=20, help="of training each (%(default)s)")
    parser.add_argument("--probe", type=float, default=30, help="seconds of them to measure the rate (%(default)s)")
    parser.add_argument("--preset", default="cifar10_fast", choices=PRESETS)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--samples", type=int, default=1000, help="images (%(default)s)")
    parser.add_argument("--levels", type=int, default=5, help="of each test image, for bits/dim (%(default)s)")
    parser.add_argument("--nll-images", type=int, help="test images (all)")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "cache" / "quality", help="(%(default)s)")
    parser.add_argument("--do", nargs=2, metavar=("PART", "CONTESTANT"), help="one part, in this process")
    args = parser.parse_args()
    with record.measuring(args):
        if args.do:
            part, name = args.do
            atomic.write_json(args.work / name / f"{part}.json", do(part, name, args))
            return
        found = run_parts(args)
    work = args.work
    del args.do, args.work
    text = (
        f"{args.minutes:g} minutes of training each, one after the other; {args.samples:,} samples by 50 steps of "
        f"DDIM; bits/dim of the test images from {args.levels} levels each. Ours is the preset {args.preset}. FRD and "
        "RS, where they are there, compare with figures of the same program only.\n\n" + report(found)
    )
    path = record.write("quality-per-hour", "Quality for the same minutes of training", args, {"results": found}, text)
    for name in found:
        shutil.copy(work / name / "grid.png", path.with_name(f"{path.stem}_{name}.png"))


if __name__ == "__main__":
    main()
