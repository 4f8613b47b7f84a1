"""Peak memory of a training step at the paper's batch, for each way to save some.

    python benchmarks/memory.py [--networks cifar10 celebahq256] [--batch N] [--device cuda]

Each case is a process of its own: two small steps give a line (GiB against images), and where that says that the whole
batch fits, it is measured; else the record says so and gives the line's value. Counted are weights, gradients, Adam's
moments, the average and activations, in bf16 where the hardware has it, else in float32: on the CPU the process's peak
resident set less that of its imports, on a GPU what its allocator held. On the CPU the 256x256 network is measured
at batch 2, as 64 would take minutes a step; with `--accumulate` a batch has the peak of one of its parts, so that 2 is
also the paper's 64 in 32 parts.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import record

SAVING: dict[str, dict[str, Any]] = {
    "": {},
    ", accumulate 4": {"accumulate": 4},
    ", checkpointing": {"checkpointing": True},
    ", checkpointing, accumulate 4": {"checkpointing": True, "accumulate": 4},
}
PAPER = {"cifar10": 128, "celebahq256": 64}
CPU_BATCH = {"cifar10": 128, "celebahq256": 2}
GIB = 2**30


def cases(device: str) -> dict[str, dict[str, Any]]:
    """What is measured: plain float32, and in the precision that `ddpm train` takes here each way to save."""
    import torch

    from ddpm.run.processes import pick_precision

    precision = pick_precision("auto", torch.device(device))
    return {"float32": {"precision": "float32"}} | {
        f"{precision}{saving}": {"precision": precision, **settings} for saving, settings in SAVING.items()
    }


def line(batches: list[int], peaks: list[float], target: int) -> float:
    """The value at `target` of the line through two points."""
    slope = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
    return peaks[1] + slope * (target - batches[1])


def room(device: str) -> float:
    """Bytes that may be used: nine tenths of what is free."""
    if device == "cuda":
        import torch

        return 0.9 * float(torch.cuda.mem_get_info()[0])
    return 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def peak(device: str) -> float:
    """Bytes, the most so far."""
    if device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated())
    import resource

    kib = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib)


def child(case: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
    """Measure one case in this process: small batches first, then the target where it fits."""
    import peers

    from ddpm.presets import PRESETS

    device, target, accumulate = case["device"], case["batch"], case.get("accumulate", 1)
    preset = replace(PRESETS[case["network"]], gradient_checkpointing=case.get("checkpointing", False))
    base = peak(device) if device == "cpu" else 0.0
    ours = peers.Ours(preset, case["precision"], device)
    whole = target * accumulate if target <= 2 else target  # parts of the whole size where that is as small as can be
    part = whole // accumulate
    small = [max(1, part // 8), max(2, part // 4)]
    ours.step(peers.batch(preset, 1, device))  # Adam's moments exist from now on
    peaks = []
    for batch in small:
        ours.step(peers.batch(preset, batch, device))
        peaks.append(peak(device) - base)
    wanted = line(small, peaks, part)
    found: dict[str, Any] = {"part": part, "batch": whole, "small": small, "small_bytes": peaks, "line_bytes": wanted}
    if wanted < (limit or room(device)):
        ours.step(peers.batch(preset, whole, device), accumulate)
        found["bytes"] = peak(device) - base
    return found


def measure(case: dict[str, Any], threads: int | None = None) -> dict[str, Any]:
    """`child` in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--child", json.dumps(case)]
    if threads:
        command += ["--threads", str(threads)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        return {"failed": (out.stderr.strip().splitlines() or [f"exit {out.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return found


def row(name: str, found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [name, "", "", "", found["failed"]]
    (a, b), (low, high) = found["small"], found["small_bytes"]
    image = f"{(high - low) / (b - a) / 2**20:.0f}" if b > a else ""
    known = "bytes" in found
    total = f"{found['bytes' if known else 'line_bytes'] / GIB:.2f}"
    return [name, str(found["batch"]), total, image, "measured" if known else "not run: would not fit; by the line"]


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--networks", nargs="+", choices=PAPER, default=list(PAPER))
    parser.add_argument("--batch", type=int, help="images (the paper's; 2 for 256x256 on the CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--child", type=json.loads, help="one case, in this process")
    args = parser.parse_args()
    with record.measuring(args):
        if args.child:
            print(json.dumps(child(args.child)))
            return
        values: dict[str, Any] = {}
        text = ""
        for network in args.networks:
            batch = args.batch or (CPU_BATCH if args.device == "cpu" else PAPER)[network]
            rows = []
            for name, settings in cases(args.device).items():
                case = {"network": network, "batch": batch, "device": args.device, **settings}
                found = values[f"{network}, {name}"] = measure(case, args.threads)
                rows.append(row(name, found))
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            text += f"## {network}, batch {batch} (the paper's is {PAPER[network]})\n\n"
            header = ["", "images a step", "peak, GiB", "MiB an image of a part", ""]
            text += figures.table(header, rows) + "\n"
    record.write("memory", "Peak memory of a training step", args, values, text, args.device)


if __name__ == "__main__":
    main()
