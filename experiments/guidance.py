"""Measure autoguidance: FRD and RS of a model's samples by the scale at which a weaker model guides them.

    python experiments/guidance.py MODEL GUIDE OUT --quality cifar_quality.py [--scales 1 1.5 2] [--samples 2000]

GUIDE is a model of the same noise schedule, prediction and classes: an earlier checkpoint, or a smaller run. Scale 1 is
MODEL alone. The program of --quality takes an .npz of samples and prints `FRD x  RS y`. All rows use the same seeds.
Finished measurements stay in OUT, and the same command resumes. The script writes guidance.json, guidance.md and
guidance.png into OUT. The picture shows the first samples: one row a scale, in the order of the table.
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

from ddpm.files import atomic, images
from ddpm.run.processes import open_for_device, pick_device
from ddpm.run.sample import generate

SHOWN = 12
"""Samples of a scale in the picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="run or file of weights")
    parser.add_argument("guide", help="run or file of weights of the weaker model")
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--quality", type=Path, required=True, help="program that scores an .npz of samples")
    parser.add_argument("--scales", nargs="+", type=float, default=[1, 1.25, 1.5, 2, 2.5], help="guidance scales")
    parser.add_argument("--samples", type=int, default=2000, help="samples per figure (%(default)s)")
    parser.add_argument("--sampler", default="unipc")
    parser.add_argument("--steps", type=int, default=20, help="levels that the sampler visits (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=64, help="samples at a time (%(default)s)")
    args = parser.parse_args()

    device = pick_device(args.device)
    model, guide = open_for_device(args.model, device), open_for_device(args.guide, device)
    settings = {"samples": args.samples, "sampler": args.sampler, "steps": args.steps}
    settings |= {"model": model.identity, "guide": guide.identity}
    record.same_settings(args.out, settings)
    strong, weak = model.denoiser.to(device), guide.denoiser.to(device)
    models = {scale: strong if scale == 1 else strong.guided(scale, guide=weak) for scale in args.scales}
    models |= {0.0: weak}  # the guide alone
    results, shown = [], []
    for scale, denoiser in sorted(models.items()):
        file, first = args.out / f"{scale:g}.json", args.out / f"{scale:g}.npy"
        if not file.is_file():
            shape, seeds, size = model.preset.shape, range(args.samples), args.batch_size
            made = images.channels_last(
                generate(denoiser, shape, seeds, args.sampler, args.steps, size, device, progress=True)
            )
            np.save(first, made[:SHOWN])
            atomic.write_json(file, {"scale": scale, **scored(args.quality, made, file.with_suffix(".npz"))})
        results.append(json.loads(file.read_text()))
        shown.append(np.load(first))
        print(scale, results[-1]["FRD"], flush=True)

    rows = [
        [f"{r['scale']:g}" if r["scale"] else "the guide alone", f"{r['FRD']:.2f}", f"{r['RS']:.2f}"] for r in results
    ]
    text = f"{record.header(record.provenance(), 'one run each')}\n- {args.model}, guided by {args.guide} "
    text += f"(step {guide.step:,}); {json.dumps(settings)}\n\n{figures.table(['scale', 'FRD', 'RS'], rows)}"
    atomic.write(args.out / "guidance.md", text)
    atomic.write_json(args.out / "guidance.json", results)
    images.save(args.out / "guidance.png", images.grid(np.concatenate(shown), columns=SHOWN))
    print(text)


if __name__ == "__main__":
    main()
