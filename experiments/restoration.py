"""Measure restoration without training on test images: PSNR and FRD by operator and method, and a picture.

    python experiments/restoration.py MODEL OUT --data CIFAR10 --quality cifar_quality.py [--images 500]
        [--only superresolution:4 grey ...] [--methods ddnm dps]

The first images of the test split are degraded with noise of rounding and restored, one result each. The program of
--quality takes an .npz of images and prints `FRD x  RS y`; it also scores the clean images, which shows what FRD this
number of real images has, and the degraded ones. Finished parts of 50 images stay in OUT, and the same command resumes.
The script writes restoration.json, restoration.md and restoration.png into OUT.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scores import scored

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import figures
import record

from ddpm.files import atomic, data, images
from ddpm.files.models import Checkpoint
from ddpm.run.edit import SamplingSettings
from ddpm.run.processes import open_for_device, pick_device
from ddpm.run.restore import Restoration, restore

TASKS = ["superresolution:2", "superresolution:4", "blur:1.5", "grey", "half"]
"""Operators; `half` is a mask of the right half."""
PART = 50


def restored(
    checkpoint: Checkpoint, clean: np.ndarray, operator: str, method: str, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Degraded and restored images [N, H, W, C], and the residual of each part."""
    folder = args.out / f"{operator.replace(':', '-')}-{method}"
    spec = f"mask:{args.out / 'half.png'}" if operator == "half" else operator
    settings = Restoration(method, sampling=SamplingSettings(steps=args.steps, batch_size=args.batch_size))
    parts = []
    for start in range(0, len(clean), PART):
        file = folder / f"{start:05d}.npz"
        if not file.is_file():
            sources = [images.to_png(image) for image in clean[start : start + PART]]
            made = restore(checkpoint, sources, spec, settings=settings, seed=start, degrade=True)
            degraded, result = (images.channels_last(x) for x in (made.degraded, made.restored))
            with atomic.temporary(file) as part, part.open("wb") as opened:
                np.savez(opened, degraded=degraded, restored=result, residual=made.residual)
        parts.append(dict(np.load(file)))
        print(operator, method, start, f"residual {parts[-1]['residual']:.2f}", flush=True)
    return {name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in parts[0]}


def psnr(clean: np.ndarray, other: np.ndarray) -> float:
    """The mean over images of 10 log10(255^2 / mean squared error), dB."""
    error = ((clean.astype(float) - other) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / error)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run or file of weights")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--data", required=True, help="SOURCE of the test images")
    parser.add_argument("--quality", type=Path, required=True, help="program that scores an .npz of images")
    parser.add_argument("--images", type=int, default=500, help="images per figure (%(default)s)")
    parser.add_argument("--only", nargs="+", default=TASKS, choices=TASKS, metavar="X", help="operators (all)")
    parser.add_argument("--methods", nargs="+", default=["ddnm", "dps"], choices=["ddnm", "dps"], help="methods (both)")
    parser.add_argument("--steps", type=int, default=100, help="noise levels (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=PART, help="images at a time (%(default)s)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    device = pick_device(args.device)
    checkpoint = open_for_device(args.model, device)
    size = checkpoint.preset.size
    settings = {"images": args.images, "steps": args.steps, "model": checkpoint.identity}
    record.same_settings(args.out, settings)
    test = data.load(args.data, size, checkpoint.preset.channels, split="test", progress=False)
    clean = images.channels_last(test.batch(range(args.images)))
    half = np.zeros((*size, 1), np.uint8)
    half[:, size[1] // 2 :] = 255
    images.save(args.out / "half.png", half)

    file = args.out / "scored.npz"
    results: list[dict] = [{"operator": "none", "what": "clean", **scored(args.quality, clean, file)}]
    shown = [clean[:10]]
    for operator in args.only:
        for method in args.methods:
            made = restored(checkpoint, clean, operator, method, args)
            if method == args.methods[0]:
                about = {"operator": operator, "what": "degraded", "psnr": psnr(clean, made["degraded"])}
                results.append(about | scored(args.quality, made["degraded"], file))
                shown.append(made["degraded"][:10])
            residual = float(np.sqrt((made["residual"] ** 2).mean()))
            about = {"operator": operator, "what": method, "psnr": psnr(clean, made["restored"]), "residual": residual}
            results.append(about | scored(args.quality, made["restored"], file))
            shown.append(made["restored"][:10])
    rows = [
        [r["operator"], r["what"], *(f"{r[key]:.2f}" if key in r else "" for key in ("psnr", "residual", "FRD", "RS"))]
        for r in results
    ]
    text = f"{record.header(record.provenance(), 'one run')}\n- {checkpoint.path.name}; {json.dumps(settings)}\n\n"
    text += figures.table(["operator", "images", "PSNR, dB", "residual, grey levels", "FRD", "RS"], rows)
    atomic.write(args.out / "restoration.md", text)
    atomic.write_json(args.out / "restoration.json", results)
    images.save(args.out / "restoration.png", images.grid(np.concatenate(shown), columns=len(shown[0])))
    print(text)


if __name__ == "__main__":
    main()
