"""Measure a model of `ddpm distill` in 1 and 2 network calls beside the model it was made of, by UniPC in 5, 10 and 20.

    python experiments/two_calls.py DISTILLED MODEL OUT --quality cifar_quality.py [--samples 2000]

The program of --quality takes an .npz of samples and prints `FRD x  RS y`. All rows use the same seeds. Finished
measurements stay in OUT, and the same command resumes. The script writes two_calls.json, two_calls.md and a grid of the
first 64 samples of each row into OUT.
"""

import argparse
import json
import sys
from pathlib import Path

from scores import scored

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import figures
import record

from ddpm.files import arrays, atomic, images
from ddpm.run.processes import open_for_device, pick_device
from ddpm.run.sample import generate
from ddpm.samplers import SAMPLERS

ROWS = [("consistency", 1), ("consistency", 2), ("unipc", 5), ("unipc", 10), ("unipc", 20)]
"""Samplers and calls: those of the distilled model, and those of the other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("distilled", help="model of `ddpm distill`")
    parser.add_argument("model", help="the model that it was made of")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--quality", type=Path, required=True, help="program that scores an .npz of samples")
    parser.add_argument("--samples", type=int, default=2000, help="samples per figure (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64, help="samples at a time (%(default)s)")
    args = parser.parse_args()

    device, results = pick_device(args.device), []
    models = {"consistency": open_for_device(args.distilled, device), "unipc": open_for_device(args.model, device)}
    for name, calls in ROWS:
        checkpoint, file = models[name], args.out / f"{name}-{calls}.json"
        about = {"sampler": name, "calls": calls, "samples": args.samples, "identity": checkpoint.identity}
        if not file.is_file() or not about.items() <= json.loads(file.read_text()).items():
            denoiser, shape, seeds = checkpoint.denoiser.to(device), checkpoint.preset.shape, range(args.samples)
            sampler = SAMPLERS[name]._replace(spacing="uniform")
            made = generate(denoiser, shape, seeds, sampler, calls, args.batch_size, device, progress=True)
            grid = arrays.sheet(made[:64], arrays.view_of(checkpoint.preset, denoiser.values))
            images.save(file.with_suffix(".png"), images.grid(grid))
            atomic.write_json(file, about | scored(args.quality, images.channels_last(made), file.with_suffix(".npz")))
        results.append(json.loads(file.read_text()))
        print(name, calls, results[-1]["FRD"], flush=True)

    rows = [[r["sampler"], str(r["calls"]), f"{r['FRD']:.2f}", f"{r['RS']:.2f}"] for r in results]
    settings = "".join(
        f"- {place}: step {model.step:,}, identity {model.identity}\n"
        for place, model in zip((args.distilled, args.model), models.values(), strict=True)
    )
    text = f"{record.header(record.provenance(), 'one run each')}\n{settings}- {args.samples} samples per figure\n\n"
    text += figures.table(["sampler", "network calls", "FRD", "RS"], rows)
    atomic.write(args.out / "two_calls.md", text)
    atomic.write_json(args.out / "two_calls.json", results)
    print(text)


if __name__ == "__main__":
    main()
