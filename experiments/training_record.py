"""Print the log of a run as a record in markdown: settings, loss curve and held-out loss by level.

    python experiments/training_record.py RUN --commit HASH > benchmarks/results/NAME.md

The script reads what the run left on disk and measures nothing. Run it on the machine that trained, because the record
names the hardware and versions of the machine that runs the script.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import record

from ddpm.presets import PRESETS, from_json


def spaced(lines: Sequence[dict[str, Any]], rows: int) -> list[dict[str, Any]]:
    """At most `rows` of the lines, at equal distances, with the first and the last."""
    return [lines[i] for i in sorted({round(k * (len(lines) - 1) / (rows - 1)) for k in range(rows)})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--preset", default="cifar10", help="preset to compare the settings with (%(default)s)")
    parser.add_argument("--commit", required=True, help="commit of the code that trained the run")
    parser.add_argument("--rows", type=int, default=12, help="rows of each table (%(default)s)")
    args = parser.parse_args()

    preset, base = from_json(json.loads((args.run / "config.json").read_text())), PRESETS[args.preset]
    lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out" in line]
    print(record.header({**record.provenance(), "commit": args.commit}, "one run"))
    names = [f.name for f in fields(preset) if f.name != "data" and getattr(preset, f.name) != getattr(base, f.name)]
    print(f"- preset {args.preset} with " + ", ".join(f"{name} {getattr(preset, name)}" for name in names))
    last = training[-1]
    print(f"- {last['step']:,} steps, {last['step'] * preset.batch_size:,} images, {last['seconds'] / 60:.0f} minutes")
    rates = sorted(line["images_per_second"] for line in training)
    print(f"- images/s by log line: median {statistics.median(rates):.2f}, least {rates[0]:.2f}, most {rates[-1]:.2f}")

    print("\n| step | minutes | loss | gradient norm | learning rate |\n|---|---|---|---|---|")
    for x in spaced(training, args.rows):
        print(f"| {x['step']} | {x['seconds'] / 60:.1f} | {x['loss']:.4f} | {x['grad_norm']:.3f} | {x['lr']:.2e} |")

    print("\nHeld-out L_simple of the averaged weights; the ten ranges of t have equal width, lowest first.\n")
    print("| step | all levels | by range of t |\n|---|---|---|")
    for x in spaced(held_out, args.rows):
        print(f"| {x['step']} | {x['held_out']:.4f} | {' '.join(f'{v:.3f}' for v in x['held_out_by_level'])} |")


if __name__ == "__main__":
    main()
