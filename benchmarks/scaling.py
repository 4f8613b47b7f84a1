"""Time a training step by batch size, by image size, and by number of processes.

    python benchmarks/scaling.py [--network small] [--parts batch size processes exchange]

Batches of 1 to 128 at 32x32, and sides of 32 to 128 at one batch size, are steps in this process. The part `processes`
times `ddpm train` by its log with the same global batch: one process with one thread, one process with two threads, and
two and four processes under torchrun with one thread each. Four processes on two cores show the overhead, not a speed.

The part `exchange` is the share of a step of the paper's network that the exchange of gradients takes: two processes
with one thread each, gloo on the loopback, and DistributedDataParallel. Steps with and without the exchange (`no_sync`)
take turns. For other links there is only arithmetic.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
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
import torch.distributed as dist
from speed import BEST
from torch.nn.parallel import DistributedDataParallel

from ddpm.run.processes import Processes

PARTS = ["batch", "size", "processes", "exchange"]
NETWORKS = {"paper": peers.PAPER, "small": peers.SMALL}
PROCESSES = {
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
    "4 processes, 1 thread each": (4, 1),
}
"""(processes, threads of each) by name."""


def by_batch(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step for each batch size."""
    preset = NETWORKS[args.network]
    cases: dict[str, timing.Case] = {str(n): peers.Ours(preset, n, BEST).step for n in args.batches}
    return timing.interleave(cases, args.repeats, args.seconds)


def by_size(args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds per step for each side of the images."""
    presets = {side: replace(NETWORKS[args.network], size=(side, side)) for side in args.sides}
    cases: dict[str, timing.Case] = {
        str(side): peers.Ours(preset, args.size_batch, BEST).step for side, preset in presets.items()
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
            words = [*torchrun(processes), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
        return timing.Timed(peers.seconds_a_step(peers.training_lines(Path(folder) / "run")))


def torchrun(processes: int) -> list[str]:
    """The words that start so many processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), *meet]


def by_exchange(batch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per step of two processes of `batch` images each, with and without the exchange of gradients."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        words = [*torchrun(2), __file__, "--exchange-child", str(file), "--exchange-batch", str(batch)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *words, "--repeats", str(repeats)], env=environment, check=True)
        times: dict[str, list[float]] = json.loads(file.read_text())
        return times


def exchange_child(file: Path, batch: int, repeats: int) -> None:
    """One of the processes of `by_exchange`. The first one writes the times."""
    dist.init_process_group("gloo")
    ranks = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    ours = peers.Ours(peers.PAPER, batch, BEST, ranks=ranks)
    network = ours.training.network
    assert isinstance(network, DistributedDataParallel)

    def step(exchanges: bool) -> None:
        with nullcontext() if exchanges else network.no_sync():
            ours.step()
        dist.barrier()

    cases: dict[str, timing.Case] = {name: partial(step, name == "with") for name in ("with", "without")}
    gradient = torch.zeros(sum(weight.numel() for weight in ours.training.model.weights))
    cases["gradient"] = partial(dist.all_reduce, gradient)
    times = timing.interleave(cases, repeats, 0)  # one call each: the processes must make as many
    if dist.get_rank() == 0:
        file.write_text(json.dumps(times))
    dist.destroy_process_group()


PAPER_STEP = 10.6 * 3600 / 800_000
"""Seconds of a step of 128 images on the paper's TPU v3-8 (800,000 steps in 10.6 hours)."""


def exchange_report(times: dict[str, list[float]], batch: int) -> str:
    share = [1 - without / both for both, without in zip(times["with"], times["without"], strict=True)]
    rows: list[list[object]] = [
        ["step with the exchange, s", figures.spread(times["with"])],
        ["step without it, s", figures.spread(times["without"])],
        ["share of the exchange in a step", figures.spread(share)],
        ["the exchange alone (all_reduce of all gradients), s", figures.spread(times["gradient"])],
    ]
    text = f"## Exchange of gradients, paper's network, 2 processes of {batch} images, gloo on the loopback\n\n"
    text += figures.table(["", ""], rows)
    size = 4 * 35_746_307
    text += "\nArithmetic, nothing measured: a ring of 8 processes moves 2 x 7/8 of the gradient's 143 MB through each "
    text += (
        f"link. Beside it stands a step of the paper's TPU v3-8, {1000 * PAPER_STEP:.1f} ms for 128 images. Nothing "
    )
    text += "of the exchange is hidden behind the computation here.\n\n"
    links = [(gbit, 2 * 7 / 8 * size * 8 / (gbit * 1e9)) for gbit in (10, 100, 400)]
    return text + figures.table(
        ["link", "exchange, ms", "share of a step"],
        [[f"{gbit} Gbit/s", f"{1000 * s:.0f}", f"{s / (s + PAPER_STEP):.0%}"] for gbit, s in links],
    )


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="small")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--sides", nargs="+", type=int, default=[32, 48, 64, 96, 128])
    parser.add_argument("--size-batch", type=int, default=8, help="images per step in the part size (%(default)s)")
    parser.add_argument(
        "--process-batch", type=int, default=64, help="global batch in the part processes (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=5, help="timed steps of `ddpm train` (%(default)s)")
    parser.add_argument("--exchange-batch", type=int, default=4, help="images a process in the part exchange")
    parser.add_argument("--exchange-child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.exchange_child:
        exchange_child(args.exchange_child, args.exchange_batch, args.repeats)
        return
    del args.exchange_child
    parts = args.parts
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
            text += f"{two[3]} against {two[2]}: {timing.ratio(times, two[3], two[2])} times as fast.\n\n"
        if "exchange" in parts:
            times = values["exchange"] = by_exchange(args.exchange_batch, args.repeats)
            text += exchange_report(times, args.exchange_batch)
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
