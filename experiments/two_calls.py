"""Measure a model of `ddpm distill` in 1 and 2 network calls beside the model it was made of, by UniPC in 5, 10 and 20.

    python experiments/two_calls.py DISTILLED MODEL OUT --data CIFAR10 --quality cifar_quality.py [--last-sigma 80 40]

The program of --quality takes an .npz of samples and prints `FRD x  RS y`. All rows use the same seeds. --last-sigma
repeats the rows of DISTILLED with their first call at other noise levels. `brightness` is the standard deviation of the
images' means, in grey levels, which a first level that is too low makes smaller. Its first row is that of the held-out
images. Finished measurements stay in OUT, and the same command resumes. The script writes two_calls.json, two_calls.md
and a grid of the first 64 samples of each row into OUT.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from scores import scored

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import figures
import record

from ddpm.files import arrays, atomic, data, images
from ddpm.run.processes import open_for_device, pick_device
from ddpm.run.sample import generate
from ddpm.samplers import SAMPLERS

ROWS = [("consistency", 1), ("consistency", 2), ("unipc", 5), ("unipc", 10), ("unipc", 20)]
"""Samplers and calls: those of the distilled model, and those of the other."""


def brightness(shown: np.ndarray) -> float:
    """The standard deviation of the means of images [N, H, W, C], in grey levels."""
    return float(shown.mean((1, 2, 3)).std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("distilled", help="model of `ddpm distill`")
    parser.add_argument("model", help="the model that it was made of")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--data", required=True, help="source of held-out images")
    parser.add_argument("--quality", type=Path, required=True, help="program that scores an .npz of samples")
    parser.add_argument("--last-sigma", type=float, nargs="+", metavar="X", help="first levels (default: the model's)")
    parser.add_argument("--samples", type=int, default=2000, help="samples per figure (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first sample (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64, help="samples at a time (%(default)s)")
    args = parser.parse_args()

    device, results = pick_device(args.device), []
    models = {"consistency": open_for_device(args.distilled, device), "unipc": open_for_device(args.model, device)}
    preset = models["consistency"].preset
    levels = {"consistency": args.last_sigma or [preset.last_sigma], "unipc": [0.0]}
    for name, calls, sigma in [(*row, level) for row in ROWS for level in levels[row[0]]]:
        checkpoint, file = models[name], args.out / f"{name}-{calls}-{sigma:g}.json"
        about = {"sampler": name, "calls": calls, "last_sigma": sigma, "samples": args.samples}
        about |= {"first_seed": args.first_seed, "identity": checkpoint.identity}
        if not file.is_file() or not about.items() <= json.loads(file.read_text()).items():
            denoiser = checkpoint.denoiser.to(device)
            if sigma:
                denoiser = replace(denoiser, schedule=denoiser.schedule.up_to(sigma))
            seeds = range(args.first_seed, args.first_seed + args.samples)
            sampler = SAMPLERS[name]._replace(spacing="uniform")
            made = generate(denoiser, preset.shape, seeds, sampler, calls, args.batch_size, device, progress=True)
            grid = arrays.sheet(made[:64], arrays.view_of(preset, denoiser.values))
            images.save(file.with_suffix(".png"), images.grid(grid))
            shown = images.channels_last(made)
            about["brightness"] = brightness(shown)
            atomic.write_json(file, about | scored(args.quality, shown, file.with_suffix(".npz")))
        results.append(json.loads(file.read_text()))
        print(name, calls, sigma, results[-1]["FRD"], flush=True)

    held_out = data.load(args.data, preset.size, preset.channels, split="test")
    real = brightness(images.channels_last(held_out.batch(range(min(args.samples, len(held_out))))))
    rows = [["held-out images", "", "", "", "", f"{real:.1f}"]]
    for r in results:
        figure = f"{r['FRD']:.2f}", f"{r['RS']:.2f}", f"{r['brightness']:.1f}"
        rows.append([r["sampler"], f"{r['last_sigma']:g}" if r["last_sigma"] else "all", str(r["calls"]), *figure])
    settings = "".join(
        f"- {place}: step {model.step:,}, identity {model.identity}\n"
        for place, model in zip((args.distilled, args.model), models.values(), strict=True)
    )
    text = f"{record.header(record.provenance(), 'one run each')}\n{settings}"
    text += f"- {args.samples} samples per figure, from seed {args.first_seed:,}\n\n"
    text += figures.table(["sampler", "last_sigma", "network calls", "FRD", "RS", "brightness"], rows)
    atomic.write(args.out / "two_calls.md", text)
    atomic.write_json(args.out / "two_calls.json", {"held_out_brightness": real, "rows": results})
    print(text)


if __name__ == "__main__":
    main()
