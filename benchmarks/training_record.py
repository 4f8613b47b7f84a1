"""A run's log as a record: settings, hardware, versions, loss curve and held-out loss by level, in markdown.

    python benchmarks/training_record.py RUN --commit HASH > benchmarks/results/NAME.md

Reads what the run left on disk; nothing is measured again.
"""

import argparse
import json
import statistics
from dataclasses import fields
from pathlib import Path

from machine import header

from ddpm.presets import PRESETS, from_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--commit", required=True, help="of the code that ran")
    parser.add_argument("--rows", type=int, default=12)
    args = parser.parse_args()

    preset = from_json(json.loads((args.run / "config.json").read_text()))
    lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out" in line]
    print(header(args.commit, "one run"))
    base = PRESETS[args.preset]
    changed = {
        f.name: getattr(preset, f.name) for f in fields(preset) if getattr(preset, f.name) != getattr(base, f.name)
    }
    changed.pop("data", None)
    print(f"- preset {args.preset} with " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    last = training[-1]
    print(f"- {last['step']:,} steps, {last['step'] * preset.batch_size:,} images, {last['seconds'] / 60:.0f} minutes")
    rates = sorted(line["images_per_second"] for line in training)
    print(f"- images/s by log line: median {statistics.median(rates):.2f}, least {rates[0]:.2f}, most {rates[-1]:.2f}")

    print("\n| step | minutes | loss | gradient norm | learning rate |\n|---|---|---|---|---|")
    for i in sorted({round(k * (len(training) - 1) / (args.rows - 1)) for k in range(args.rows)}):
        x = training[i]
        print(f"| {x['step']} | {x['seconds'] / 60:.1f} | {x['loss']:.4f} | {x['grad_norm']:.3f} | {x['lr']:.2e} |")

    print("\nHeld-out L_simple of the averaged weights; the ten ranges of t are of equal width, lowest first.\n")
    print("| step | all levels | by range of t |\n|---|---|---|")
    for i in sorted({round(k * (len(held_out) - 1) / (args.rows - 1)) for k in range(args.rows)}):
        x = held_out[i]
        print(f"| {x['step']} | {x['held_out']:.4f} | {' '.join(f'{v:.3f}' for v in x['held_out_by_level'])} |")


if __name__ == "__main__":
    main()
