"""Measure how the memory of a process grows with the number of images: the slope in bytes an image.

    python benchmarks/scale_memory.py [--only WORD ...] [--scale X] [--work DIR]

Each command runs in a process of its own with three numbers of images. Its memory is the most that it had resident
(VmHWM; ru_maxrss would begin at what this script holds, since a process inherits it). Linux only. The slope is that
of the least-squares line through the three. Beside it is the size of an image, or of what a table in memory would
hold for it: a program that holds everything has at least that slope. The models are the package's digits, and two of
random weights (one step of training on random images): 8x8 grey with 1,000 noise levels, and 128x128 RGB with 20. nll
and calibrate run with random errors in place of the network's, since thousands of images at 1,000 levels take hours
otherwise. Samples take one step of ddim. --scale multiplies all numbers of images.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import figures
import numpy as np
import record
from PIL import Image

QUICK = ["--sampler", "ddim", "--steps", "1", "--batch-size", "16"]
FEATURES = "import numpy as np\nW = np.random.default_rng(0).normal(size=(64, 2048))\n"
FEATURES += "def few(x):\n    return x[:, ::4, ::4].reshape(len(x), -1)[:, :64] / 255.0\n"
FEATURES += "def many(x):\n    return np.tanh(few(x) @ W[: few(x).shape[1]])\n"
TINY = "--width 32 --channel-multipliers 1 --num-res-blocks 1 --attention-resolutions 0 --batch-size 4 --steps 1"


class Case(NamedTuple):
    """A command with {n}, {out} and the names of `made`; numbers of images; bytes of an image, or of its table."""

    words: str
    counts: tuple[int, int, int]
    size: int
    without_network: bool = False


SMALL, BIG, MANY = (200, 400, 800), (256, 512, 1024), (2000, 4000, 8000)
CASES = {
    "sample 8x8, folder": Case("sample digits -n {n} --out {out}/s/", SMALL, 64),
    "sample 8x8, shards": Case("sample digits -n {n} --shard 256 --out {out}/s", SMALL, 64),
    "sample 128x128, folder": Case("sample {big} -n {n} --out {out}/s/", BIG, 49152),
    "sample 128x128, tar": Case("sample {big} -n {n} --out {out}/s.tar", BIG, 49152),
    "sample 128x128, npy": Case("sample {big} -n {n} --out {out}/s.npy", (512, 1536, 3072), 49152),
    "sample 128x128, npz": Case("sample {big} -n {n} --out {out}/s.npz", BIG, 49152),
    "evaluate nll, T 1,000, no network": Case("evaluate {small} -n {n} --split train --out {out}", MANY, 16000, True),
    "calibrate, T 1,000, no network": Case("calibrate {small} -n {n} --codec 0", MANY, 8000, True),
    "evaluate fid, 128x128": Case("evaluate {big} --metrics fid --features {f}:few -n {n} --out {out}", BIG, 49152),
    "evaluate fid, 128x128, saved npz": Case(
        "evaluate {big} --metrics fid --features {f}:few --samples {npz}-{n}.npz --out {out}", (500, 1000, 2000), 49152
    ),
    "evaluate kid, 8x8, 2,048 features": Case(
        "evaluate {small} --metrics kid --features {f}:many -n {n} --out {out}", (1200, 2400, 4800), 16384
    ),
    "compress, 32x32": Case("compress digits {pictures:n} --chunk-bits 8 --out {out}/c", (8, 16, 32), 1024),
}
WITHOUT_NETWORK = """
import sys, torch
from ddpm import likelihood
from ddpm.cli import main
def vlb(denoiser, x0, noise, y=None):
    b, T = len(x0), denoiser.schedule.T
    return likelihood.Bound(*(torch.rand(shape, dtype=torch.float64) for shape in ((b,), (b, T - 1), (b,), (b, T))), 64)
likelihood.vlb, likelihood.vlb_with_variance = vlb, lambda bound, *_: bound
"""
PROGRAM = """
import re, sys
from ddpm.cli import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(code)
"""


def ddpm(*words: str, without_network: bool = False) -> float:
    """Run a command in a process of its own, and return the most memory that it had, in bytes."""
    program = (WITHOUT_NETWORK if without_network else "") + PROGRAM
    done = subprocess.run([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"ddpm {' '.join(words)}: exit {done.returncode}")
    return 1024 * float(done.stdout.splitlines()[-1])


def made(work: Path, most: int) -> dict[str, str]:
    """Models and images of the cases, in a folder."""
    rng = np.random.default_rng(0)
    for name, shape, T in (("small", (12_000, 8, 8), 1000), ("big", (40, 128, 128, 3), 20)):
        np.save(work / f"{name}.npy", rng.integers(0, 256, shape, dtype=np.uint8))
        words = f"train --data {work}/{name}.npy --size {shape[1]} --channels {3 if len(shape) == 4 else 1} {TINY}"
        words += f" --num-timesteps {T} --eval-images 2 --sample-every 0 --sample-steps 5 --out {work}/{name}"
        ddpm(*words.split())
    for n in {n for case in CASES.values() if "{npz}" in case.words for n in case.counts}:
        np.savez(work / f"npz-{n}.npz", rng.integers(0, 256, (n, 128, 128, 3), dtype=np.uint8))
    (work / "p").mkdir()
    for i in range(most):
        small = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(work / "p" / f"{i}.png")
    (work / "f.py").write_text(FEATURES)
    return {"small": f"{work}/small", "big": f"{work}/big", "f": f"{work}/f.py", "npz": f"{work}/npz"}


def words_of(case: Case, n: int, places: dict[str, str], out: Path) -> list[str]:
    """The command of a case for n images."""
    pictures = " ".join(str(out.parent / "p" / f"{i}.png") for i in range(n))
    text = case.words.replace("{pictures:n}", pictures).format(n=n, out=out, **places)
    sampled = "sample" in case.words.split()[:1] or ("--metrics" in case.words and "--samples" not in case.words)
    return [*text.split(), *(QUICK if sampled else [])]


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--only", nargs="+", help="cases with one of these words (all)")
    parser.add_argument("--scale", type=float, default=1, help="factor of all numbers of images (%(default)s)")
    args = parser.parse_args()
    values: dict[str, Any] = {"load": os.getloadavg()[0]}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        places = made(work, max(round(args.scale * n) for n in CASES["compress, 32x32"].counts))
        for name, case in CASES.items():
            if args.only and not any(word in name for word in args.only):
                continue
            counts = [n if "{npz}" in case.words else round(args.scale * n) for n in case.counts]
            peaks = []
            for n in counts:
                (out := work / "out").mkdir()
                peaks.append(ddpm(*words_of(case, n, places, out), without_network=case.without_network))
                shutil.rmtree(out)
                for run in ("small", "big"):
                    shutil.rmtree(work / run / "cache", ignore_errors=True)
            slope = float(np.polyfit(counts, peaks, 1)[0])
            values[name] = {"counts": counts, "bytes": peaks, "slope": slope, "size": case.size}
            mib = ", ".join(f"{peak / 2**20:.1f}" for peak in peaks)
            rows.append([name, ", ".join(map(str, counts)), mib, f"{slope:,.0f}", f"{case.size:,}"])
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    text = f"Load average at the start: {values['load']:.1f} on {os.cpu_count()} cores.\n\n"
    text += figures.table(
        ["command", "images", "most memory, MiB", "slope, bytes an image", "an image, or its row, bytes"], rows
    )
    text += "\nThe rows of kid are mapped from a file, and the pages that are in memory count as resident.\n"
    record.write("scale-memory", "Memory by the number of images", args, values, text, repeated=False)


if __name__ == "__main__":
    main()
