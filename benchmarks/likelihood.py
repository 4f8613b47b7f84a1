"""The bound of some images by all levels and from few: value, error, time, and the speed-up at equal error.

    python benchmarks/likelihood.py RUN --data SOURCE -n 500 --commit HASH > benchmarks/results/NAME.md

The error is that of a data set's mean: the spread over images, noise and levels. At equal error the estimate that
needs fewer network calls wins; the speed-up is the ratio of calls x error^2, and of seconds x error^2.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from machine import header

from ddpm.files import data as datasets
from ddpm.files.opening import open_checkpoint
from ddpm.run import evaluate
from ddpm.run.processes import Processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--checkpoint", default="last")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("-n", type=int, default=500)
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 5, 10, 20, 50])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--commit", required=True)
    args = parser.parse_args()

    found = open_checkpoint(args.run, which=args.checkpoint)
    preset, alone = found.preset, Processes(0, 1, torch.device("cpu"))
    images = datasets.load(args.data, preset.size, preset.channels, split=args.split, progress=False)
    n = min(args.n, len(images))
    print(header(args.commit, f"{args.seeds} seeds of the estimates from few levels, one of all levels"))
    print(
        f"- step {found.step:,} of a run with loss {preset.loss}, {preset.size[0]}x{preset.size[1]}, {preset.precision}"
    )
    print(f"- {n} images of {Path(args.data).name} ({args.split})\n", flush=True)

    print("| levels an image | bits/dim | standard error | seconds | calls | speed-up by calls | by seconds |")
    print("|---|---|---|---|---|---|---|")
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        exact = evaluate.nll(found, images, Path(folder), Path(folder), alone, n)
    seconds = time.time() - start
    T = found.denoiser.schedule.T
    values = f"{exact['bits_per_dim']:.4f} | {exact['standard_error']:.4f} | {seconds:.0f} | {exact['network_calls']:,}"
    print(f"| all {T} | {values} | 1 | 1 |", flush=True)
    for levels in args.levels:
        for seed in range(args.seeds):
            start = time.time()
            few = evaluate.nll_sampled(found, images, levels, alone, n, seed)
            took = time.time() - start
            ratio = (exact["standard_error"] / few["standard_error"]) ** 2
            values = f"{few['bits_per_dim']:.4f} | {few['standard_error']:.4f} | {took:.1f} | {few['network_calls']:,}"
            by = ratio * exact["network_calls"] / few["network_calls"], ratio * seconds / took
            print(f"| {levels} | {values} | {by[0]:.1f} | {by[1]:.1f} |", flush=True)
    print(f"\nOf all levels: rate {exact['rate']:.4f}, distortion {exact['distortion']:.4f}, L_T {exact['prior']:.2e};")
    print("by variance: " + ", ".join(f"{name} {value:.4f}" for name, value in exact["by_variance"].items()) + ".")


if __name__ == "__main__":
    main()
