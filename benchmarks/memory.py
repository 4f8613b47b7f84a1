"""Measure the peak memory of a training step at the paper's batch size, with and without the options that save memory.

    python benchmarks/memory.py [--networks cifar10 celebahq256] [--batch N] [--device cuda]

Each case runs in a process of its own. Two small steps give a line through (images, bytes). If the whole batch fits by
that line, it is measured; if not, the record says so and gives the line's value. The figure contains weights,
gradients, Adam's moments, the moving average and activations, in bf16 if the hardware has it, otherwise in float32. On
the CPU it is the peak resident set minus that of the imports; on a GPU it is what the allocator held. On the CPU the
256x256 network is measured at batch 2, because a step of 64 images takes minutes. A batch with `--accumulate` has the
peak of one of its parts, so batch 2 is also the paper's 64 in 32 parts.
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
    """Settings by name: float32, and each option in SAVING with the precision that `ddpm train` chooses."""
    import torch

    from ddpm.run.processes import pick_precision

    precision = pick_precision("auto", torch.device(device))
    return {"float32": {"precision": "float32"}} | {
        f"{precision}{saving}": {"precision": precision, **settings} for saving, settings in SAVING.items()
    }


def line(batches: list[int], peaks: list[float], target: int) -> float:
    """The value at `target` of the line through two points (batch, peak)."""
    slope = (peaks[1] - peaks[0]) / (batches[1] - batches[0])
    return peaks[1] + slope * (target - batches[1])


def room(device: str) -> float:
    """Bytes that a case may use: nine tenths of the free memory."""
    if device == "cuda":
        import torch

        return 0.9 * float(torch.cuda.mem_get_info()[0])
    return 0.9 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def peak(device: str) -> float:
    """The peak memory of this process so far, in bytes."""
    if device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated())
    import resource

    kib = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib)


def child(case: dict[str, Any], limit: float | None = None) -> dict[str, Any]:
    """Measure one case in this process: two small batches, then the whole batch if it fits."""
    import peers

    from ddpm.presets import PRESETS

    device, target, accumulate = case["device"], case["batch"], case.get("accumulate", 1)
    preset = replace(PRESETS[case["network"]], gradient_checkpointing=case.get("checkpointing", False))
    base = peak(device) if device == "cpu" else 0.0
    ours = peers.Ours(preset, case["precision"], device)
    whole = target * accumulate if target <= 2 else target  # a batch of 2 cannot be split
    part = whole // accumulate
    small = [max(1, part // 8), max(2, part // 4)]
    ours.step(peers.batch(preset, 1, device))  # this step creates Adam's moments
    peaks = []
    for batch in small:
        ours.step(peers.batch(preset, batch, device))
        peaks.append(peak(device) - base)
    wanted = line(small, peaks, part)
    result: dict[str, Any] = {
        "part": part,
        "batch": whole,
        "small": small,
        "small_bytes": peaks,
        "line_bytes": wanted,
    }
    if wanted < (limit or room(device)):
        ours.step(peers.batch(preset, whole, device), accumulate)
        result["bytes"] = peak(device) - base
    return result


def measure(case: dict[str, Any], threads: int | None = None) -> dict[str, Any]:
    """`child` in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--child", json.dumps(case)]
    if threads:
        command += ["--threads", str(threads)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        return {"failed": (out.stderr.strip().splitlines() or [f"exit {out.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def row(name: str, result: dict[str, Any]) -> list[str]:
    """A row of the table for the figures of `child`."""
    if "failed" in result:
        return [name, "", "", "", result["failed"]]
    (a, b), (low, high) = result["small"], result["small_bytes"]
    per_image = f"{(high - low) / (b - a) / 2**20:.0f}" if b > a else ""
    known = "bytes" in result
    total = f"{result['bytes' if known else 'line_bytes'] / GIB:.2f}"
    return [
        name,
        str(result["batch"]),
        total,
        per_image,
        "measured" if known else "not run: would not fit; value of the line",
    ]


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--networks", nargs="+", choices=PAPER, default=list(PAPER))
    parser.add_argument("--batch", type=int, help="images per step (the paper's; 2 for 256x256 on the CPU)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--child", type=json.loads, help="measure one case in this process")
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
                result = values[f"{network}, {name}"] = measure(case, args.threads)
                rows.append(row(name, result))
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
            text += f"## {network}, batch {batch} (the paper's is {PAPER[network]})\n\n"
            header = ["", "images per step", "peak, GiB", "MiB per image of a part", ""]
            text += figures.table(header, rows) + "\n"
    record.write("memory", "Peak memory of a training step", args, values, text, args.device)


if __name__ == "__main__":
    main()
