"""Compare the bound from all levels with its estimates from few levels: value, error, time and speed-up at equal error.

    python experiments/likelihood.py RUN --data SOURCE -n 500 > benchmarks/results/NAME.md

The error is the standard error of a dataset's mean: it contains the spread over images, noise and levels. The speed-up
is the ratio of calls x error^2, and of seconds x error^2.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import record

from ddpm.files import data as datasets
from ddpm.files.opening import open_checkpoint
from ddpm.run import evaluate
from ddpm.run.processes import Processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the run, or a file of weights")
    parser.add_argument("--checkpoint", default="last", help="(%(default)s)")
    parser.add_argument("--data", required=True, help="SOURCE as `ddpm train --data` takes it")
    parser.add_argument("--split", default="test", help="(%(default)s)")
    parser.add_argument("-n", type=int, default=500, help="number of images (%(default)s)")
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 5, 10, 20, 50], help="noise levels per image")
    parser.add_argument("--seeds", type=int, default=3, help="estimates for each number of levels (%(default)s)")
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.run, which=args.checkpoint)
    preset, processes = checkpoint.preset, Processes(0, 1, torch.device("cpu"))
    images = datasets.load(args.data, preset.size, preset.channels, split=args.split, progress=False)
    n = min(args.n, len(images))
    repeats = f"{args.seeds} seeds of the estimates from few levels, one of all levels"
    print(record.header(record.provenance(), repeats))
    size = f"{preset.size[0]}x{preset.size[1]}"
    print(f"- step {checkpoint.step:,} of a run with loss {preset.loss}, {size}, {preset.precision}")
    print(f"- {n} images of {Path(args.data).name} ({args.split})\n", flush=True)

    print("| levels per image | bits/dim | standard error | seconds | calls | speed-up by calls | by seconds |")
    print("|---|---|---|---|---|---|---|")
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        exact = evaluate.nll(checkpoint, images, Path(folder), Path(folder), processes, n)
    seconds = time.time() - start
    T = checkpoint.denoiser.schedule.T
    values = f"{exact['bits_per_dim']:.4f} | {exact['standard_error']:.4f} | {seconds:.0f} | {exact['network_calls']:,}"
    print(f"| all {T} | {values} | 1 | 1 |", flush=True)
    for levels in args.levels:
        for seed in range(args.seeds):
            start = time.time()
            estimate = evaluate.nll_sampled(checkpoint, images, levels, processes, n, seed)
            took = time.time() - start
            calls, error = estimate["network_calls"], estimate["standard_error"]
            ratio = (exact["standard_error"] / error) ** 2
            by_calls, by_seconds = ratio * exact["network_calls"] / calls, ratio * seconds / took
            values = f"{estimate['bits_per_dim']:.4f} | {error:.4f} | {took:.1f} | {calls:,}"
            print(f"| {levels} | {values} | {by_calls:.1f} | {by_seconds:.1f} |", flush=True)
    print(f"\nOf all levels: rate {exact['rate']:.4f}, distortion {exact['distortion']:.4f}, L_T {exact['prior']:.2e};")
    print("by variance: " + ", ".join(f"{name} {value:.4f}" for name, value in exact["by_variance"].items()) + ".")


if __name__ == "__main__":
    main()
