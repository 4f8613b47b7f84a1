"""Time a training step by batch size, by image size, and by number of processes.

    python benchmarks/scaling.py [--network small] [--parts batch size processes]

Batches of 1 to 128 at 32x32, and sides of 32 to 128 at one batch size, are steps in this process. The part `processes`
times `ddpm train` by its log with the same global batch: one process with one thread, one process with two threads, and
two processes under torchrun with one thread each.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import figures
import peers
import record
import timing
from speed import BEST

NETWORKS = {"paper": peers.PAPER, "small": peers.SMALL}
PROCESSES = {
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
}
"""(processes, threads of each) by name."""


def by_batch(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step for each batch size."""
    preset = NETWORKS[args.network]
    ours = peers.Ours(preset, BEST)
    cases: dict[str, timing.Case] = {str(n): partial(ours.step, peers.batch(preset, n)) for n in args.batches}
    return timing.interleave(cases, args.repeats, args.seconds)


def by_size(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step for each side of the images."""
    presets = {side: replace(NETWORKS[args.network], size=(side, side)) for side in args.sides}
    ours = peers.Ours(NETWORKS[args.network], BEST)  # convolutions take any size
    cases: dict[str, timing.Case] = {
        str(side): partial(ours.step, peers.batch(preset, args.size_batch)) for side, preset in presets.items()
    }
    return timing.interleave(cases, args.repeats, args.seconds)


def by_processes(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step of `ddpm train` for each number of processes and threads."""
    cases: dict[str, timing.Case] = {
        name: partial(program, args.network, args.process_batch, args.steps, *counts)
        for name, counts in PROCESSES.items()
    }
    return timing.interleave(cases, args.repeats)


def program(network: str, batch: int, steps: int, processes: int, threads: int) -> timing.Timed:
    """Seconds per step of one `ddpm train` by its log, without the first step."""
    with tempfile.TemporaryDirectory() as folder:
        name = "cifar10" if network == "paper" else "cifar10_small"
        words = ["-m", "ddpm", "train", name, "--data", "digits", "--eval-images", "1", "--sample-every", "0"]
        words += ["--steps", str(steps + 1), "--log-every", "1", "--save-every", "1000000", "--batch-size", str(batch)]
        words += ["--ema-warmup", "--device", "cpu", "--out", f"{folder}/run"]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            meet = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
            words = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *meet, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
        return timing.Timed(peers.seconds_a_step(peers.training_lines(Path(folder) / "run")))


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="small")
    parser.add_argument("--parts", nargs="+", choices=("batch", "size", "processes"), default=None)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 48, 64, 96, 128])
    parser.add_argument("--size-batch", type=int, default=8, help="images per step in the part size (%(default)s)")
    parser.add_argument(
        "--process-batch", type=int, default=64, help="global batch in the part processes (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of `ddpm train` (%(default)s)")
    args = parser.parse_args()
    parts = args.parts or ["batch", "size", "processes"]
    values: dict[str, Any] = {}
    text = f"The {args.network} network, bf16 where the hardware has it. Milliseconds per image and images/s.\n\n"
    with record.measuring(args):
        if "batch" in parts:
            times = values["batch"] = by_batch(args)
            text += f"## Batch, 32x32\n\n{report('batch', times, {name: int(name) for name in times})}\n"
        if "size" in parts:
            times = values["size"] = by_size(args)
            counts = dict.fromkeys(times, args.size_batch)
            text += f"## Image side, batch {args.size_batch}\n\n{report('side', times, counts, pixels=True)}\n"
        if "processes" in parts:
            times = values["processes"] = by_processes(args)
            counts = dict.fromkeys(times, args.process_batch)
            text += f"## Processes, batch {args.process_batch} in all\n\n{report('', times, counts)}\n"
            two = list(PROCESSES)
            for other in two[:2]:
                text += f"{two[2]} against {other}: {timing.ratio(times, two[2], other)} times as fast. "
    record.write("scaling", "Time by batch, image size and processes", args, values, text + "\n")


def report(name: str, times: dict[str, list[float]], counts: dict[str, int], pixels: bool = False) -> str:
    """A table of seconds per step; counts: images per step of each row; pixels: add the time per pixel."""
    rows: list[list[object]] = []
    for key, seconds in times.items():
        per_image = figures.spread(1000 * s / counts[key] for s in seconds)
        rate = figures.spread(counts[key] / s for s in seconds)
        row: list[object] = [key, per_image, rate]
        if pixels:
            row.append(figures.spread(1e9 * s / counts[key] / int(key) ** 2 for s in seconds))
        rows.append(row)
    header = [name, "ms per image", "images/s", "ns per pixel"]
    return figures.table(header if pixels else header[:3], rows)


if __name__ == "__main__":
    main()
