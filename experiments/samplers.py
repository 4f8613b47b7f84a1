"""Measure sample quality by network calls: each sampler and spacing on one model, as a table and a plot.

    python experiments/samplers.py MODEL OUT --quality cifar_quality.py [--only NAME ...] [--calls 5 10]

The program of --quality takes an .npz of samples and prints `FRD x  RS y`. All rows use the same seeds. A row is named
SAMPLER SPACING. Two spacings are optimised by dynamic programming. `bound` minimises the bound's terms; the model must
have been calibrated by `ddpm calibrate`, and ancestral sampling then uses the calibrated variance. `path` minimises the
error of DDIM's steps along 16 paths of all levels. Finished measurements stay in OUT, and the same command resumes. The
script writes samplers.json, samplers.md and samplers.png into OUT.
"""

import argparse
import json
import sys
from functools import cache
from pathlib import Path

import torch
from scores import scored
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import figures
import record

from ddpm import spacing
from ddpm.denoiser import Denoiser
from ddpm.files import atomic, images, plots
from ddpm.files.models import Checkpoint, read_calibration, with_variance
from ddpm.noise import per_image
from ddpm.run.processes import open_for_device, pick_device
from ddpm.run.sample import generate
from ddpm.samplers import SAMPLERS, ddim

CALLS = (5, 10, 20, 50, 100)
ROWS = [
    "ancestral uniform", "ancestral quadratic", "ancestral bound", "ddim uniform", "ddim quadratic", "ddim log_snr",
    "ddim karras", "ddim path", "dpmpp_2m uniform", "dpmpp_2m log_snr", "dpmpp_2m karras", "dpmpp_3m log_snr",
    "dpmpp_2m_sde karras", "unipc uniform", "unipc log_snr", "unipc karras", "unipc path", "unipc_3 karras",
    "heun karras", "flow karras",
]  # fmt: skip
SHOWN = [  # the rows of the plot
    "unipc path", "unipc uniform", "dpmpp_2m uniform", "ddim path", "ddim uniform", "ancestral bound",
    "ancestral uniform",
]  # fmt: skip
PAPER = {  # FID on CIFAR-10 in the paper of DDIM (Song et al. 2021, Table 1)
    "paper, DDIM": {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16, 1000: 4.04},
    "paper, DDPM's sampler": {10: 367.43, 20: 133.37, 50: 32.72, 100: 9.99, 1000: 3.17},
}


class Model:
    """A checkpoint, and the costs of steps that the optimised spacings need."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.denoiser, self.device = checkpoint, checkpoint.denoiser.to(device), device

    @cache  # noqa: B019
    def costs(self, name: str) -> Tensor:
        """The cost of each step between two levels, for the spacing `path` or `bound`."""
        if name == "path":
            s = self.denoiser.schedule
            x = per_image(range(1 << 41, (1 << 41) + 16), self.checkpoint.preset.shape, self.device)(s.T)
            return spacing.path_cost(s, x, ddim(self.denoiser, x, s.T))
        calibration = read_calibration(self.checkpoint)
        if calibration is None:
            raise SystemExit(f"{self.checkpoint.path} is not calibrated; run `ddpm calibrate` on it first")
        return spacing.bound_cost(self.denoiser.schedule, calibration[0])

    def prepared(self, name: str, steps: int) -> tuple[Denoiser, list[int]]:
        """The denoiser and the levels for the spacing of this name."""
        if name in spacing.SPACINGS:
            return self.denoiser, spacing.SPACINGS[name](self.denoiser.schedule, steps)
        levels = spacing.optimised(self.costs(name), steps)
        if name == "path":
            return self.denoiser, levels
        return with_variance(self.checkpoint, "calibrated").denoiser.to(self.device), levels


def table(results: list[dict], calls: list[int], key: str) -> str:
    """One row per sampler and spacing, one column per number of calls."""
    rows = []
    for name in dict.fromkeys(result["row"] for result in results):
        values = {result["calls"]: f"{result[key]:.2f}" for result in results if result["row"] == name}
        rows.append([name, *(values.get(n, "") for n in calls)])
    return figures.table([f"{key} by network calls", *map(str, calls)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run or file of weights")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--quality", type=Path, required=True, help="program that scores an .npz of samples")
    parser.add_argument("--samples", type=int, default=2000, help="samples per figure (%(default)s)")
    parser.add_argument("--only", nargs="+", default=ROWS, choices=ROWS, metavar="NAME", help="rows (all)")
    parser.add_argument("--calls", nargs="+", type=int, default=[*CALLS], help="network calls per image")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64, help="samples at a time (%(default)s)")
    args = parser.parse_args()

    device = pick_device(args.device)
    model = Model(open_for_device(args.model, device), device)
    for calls in args.calls:
        for row in args.only:
            name, spacing_name = row.split()
            sampler, file = SAMPLERS[name], args.out / f"{row.replace(' ', '-')}-{calls}.json"
            steps = (calls + 1) // 2 if sampler.twice else calls
            if file.is_file():
                continue
            denoiser, levels = model.prepared(spacing_name, steps)
            made = generate(
                denoiser,
                model.checkpoint.preset.shape,
                range(args.samples),
                sampler,
                levels,
                args.batch_size,
                device,
                True,
            )
            about = {"row": row, "calls": calls, "network_calls": sampler.calls(denoiser, levels), "levels": levels}
            found = scored(args.quality, images.channels_last(made), file.with_suffix(".npz"))
            atomic.write_json(file, about | found | {"samples": args.samples})
            print(row, calls, json.loads(file.read_text())["FRD"], flush=True)

    results = [json.loads(file.read_text()) for file in sorted(args.out.glob("*-*.json"))]
    best: dict[str, float] = {}  # the lowest FRD of each row within 20 calls
    for r in results:
        if r["calls"] <= 20:
            best[r["row"]] = min(r["FRD"], best.get(r["row"], r["FRD"]))
    results.sort(key=lambda r: (best.get(r["row"], 1e9), r["row"], r["calls"]))
    shown = sorted({r["calls"] for r in results})
    name, identity = model.checkpoint.path.name, model.checkpoint.identity
    settings = f"- {args.model}: {name}, identity {identity}; {args.samples} samples per figure"
    text = f"{record.header(record.provenance(), 'one run each')}\n{settings}\n\n{table(results, shown, 'FRD')}"
    paper = [{"row": row, "calls": n, "FID": v} for row, values in PAPER.items() for n, v in values.items()]
    text += f"\nThe paper of DDIM, with its network, FID:\n\n{table(paper, sorted({p['calls'] for p in paper}), 'FID')}"
    atomic.write(args.out / "samplers.md", text)
    atomic.write_json(args.out / "samplers.json", results)
    lines = {
        row: tuple(zip(*[(r["calls"], r["FRD"]) for r in results if r["row"] == row], strict=True))
        for row in SHOWN
        if row in best
    }
    panel = plots.Panel("Sample quality", lines, "network calls", "FRD", log_x=True, log_y=True)
    atomic.write(args.out / "samplers.png", plots.draw([panel]))
    print(text)


if __name__ == "__main__":
    main()
