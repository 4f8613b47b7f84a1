"""Train a model that enlarges images, and measure it: FRD and PSNR of its samples beside bicubic's and real images'.

    python experiments/conditional.py OUT --data SOURCE [--condition lowres:4] [--minutes 55] [--quality PROGRAM]

The script trains the preset with the condition into OUT/run, and draws one sample for each of --images held-out images
(all, if there are fewer). It writes three files of as many images: samples.npz, condition.npz (for lowres:N, the
bicubic enlargement) and real.npz. The program of --quality takes such a file and prints `FRD x  RS y`. PSNR is measured
on --fidelity images, for one sample and for the mean of 8 samples. The figures go to OUT/conditional.json and
OUT/conditional.md, and some images to OUT/conditional.png: the condition, three samples and the real image of each. The
same command resumes.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scores import quality

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import record

from ddpm import conditions, pixels
from ddpm.files import atomic, data, images
from ddpm.files.models import Checkpoint
from ddpm.presets import find_preset
from ddpm.run import conditioning
from ddpm.run.fidelity import fidelity
from ddpm.run.parts import subset
from ddpm.run.processes import Processes, open_for_device, pick_device
from ddpm.run.quality import samples
from ddpm.run.sample import generate, sampler_levels
from ddpm.run.train import train

SHOWN = 12
"""Rows of the picture."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True, help="SOURCE of images")
    parser.add_argument("--preset", default="cifar10_fast")
    parser.add_argument("--condition", default="lowres:4")
    parser.add_argument("--minutes", type=float, default=55, help="time of training")
    parser.add_argument("--steps", type=int, help="steps of training, in place of --minutes")
    parser.add_argument("--images", type=int, default=2000, help="samples for FRD")
    parser.add_argument("--fidelity", type=int, default=500, help="images for PSNR")
    parser.add_argument("--split", default="test", help="split of the images that are enlarged; test is held out")
    parser.add_argument("--sampler", default="unipc")
    parser.add_argument("--calls", type=int, default=20, help="levels that the sampler visits")
    parser.add_argument("--quality", type=Path, help="program that takes an .npz of images and prints FRD and RS")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    run = args.out / "run"
    preset = replace(find_preset(args.preset), data=args.data, condition=args.condition, device=args.device)
    preset = preset if args.steps is None else replace(preset, steps=args.steps)
    trained = train(preset, run, None if args.steps else args.minutes)
    device = pick_device(args.device)
    model = open_for_device(run, device)
    model = replace(model, denoiser=model.denoiser.to(device))
    settings = data.settings_of(model.preset)
    held_out = data.load(
        args.data, model.preset.size, model.preset.channels, split=args.split, as_trained=True, **settings
    )
    found: dict[str, Any] = {
        "condition": args.condition, "steps": trained.step, "held_out_L_simple": trained.held_out,
        "sampler": args.sampler, "calls": args.calls, "split": held_out.split,
        "images": min(args.images, len(held_out)),
        "psnr": measure(model, held_out, args), "quality": write_sets(model, held_out, args),
    }  # fmt: skip
    draw(model, held_out, args)
    atomic.write_json(args.out / "conditional.json", {**record.provenance(), **found})
    atomic.write(args.out / "conditional.md", table(found).encode())
    print(table(found))


def measure(model: Checkpoint, held_out: data.Images, args: argparse.Namespace) -> dict[str, Any]:
    """PSNR of one sample, of the mean of samples, and of bicubic interpolation."""
    alone, levels = Processes(0, 1, pick_device(args.device)), sampler_levels(model, args.sampler, args.calls)
    count = min(args.fidelity, len(held_out))
    return fidelity(model, held_out, ["psnr"], args.out / "cache", alone, count, 0, args.sampler, levels)


def write_sets(model: Checkpoint, held_out: data.Images, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Write samples, what the condition shows, and real images of as many places, and score each set."""
    alone, n = Processes(0, 1, pick_device(args.device)), min(args.images, len(held_out))
    levels = sampler_levels(model, args.sampler, args.calls)
    drawn = samples(model, args.out / "cache", alone, n, 0, args.sampler, levels, given=held_out)
    real = held_out.batch(range(n))
    sets = {"samples": drawn.batch(range(n)), "condition": shown(model, held_out, range(n)), "real": real}
    scores: dict[str, dict[str, float]] = {}
    for name, pictures in sets.items():
        np.savez(args.out / f"{name}.npz", images.channels_last(pictures))
        if args.quality is not None:
            scores[name] = quality(args.quality, args.out / f"{name}.npz")
    return scores


def shown(model: Checkpoint, held_out: data.Images, places: range | list[int]) -> torch.Tensor:
    """What the network is told of these images, pixels [N, C, H, W]: for lowres:N the bicubic enlargement."""
    x0 = pixels.to_signal(held_out.batch(list(places)), held_out.values)
    condition = conditioning.of_images(model.preset, held_out, list(places), x0)
    assert condition is not None
    return pixels.to_pixels(conditions.shown(condition, model.preset.channels), held_out.values)


def draw(model: Checkpoint, held_out: data.Images, args: argparse.Namespace) -> None:
    """Write the picture."""
    places = subset(held_out, SHOWN)
    x0 = pixels.to_signal(held_out.batch(places), held_out.values)
    condition = conditioning.of_images(model.preset, held_out, places, x0)
    assert condition is not None
    made = generate(
        model.denoiser, model.preset.shape, range(3 * len(places)), args.sampler, args.calls,
        device=pick_device(args.device), condition=condition.repeat_interleave(3, dim=0),
    ).unflatten(0, (-1, 3))  # fmt: skip
    rows = torch.cat([shown(model, held_out, places)[:, None], made, held_out.batch(places)[:, None]], dim=1)
    images.save(args.out / "conditional.png", images.grid(images.channels_last(rows.flatten(0, 1)), columns=10))


def table(found: dict[str, Any]) -> str:
    psnr, scores = found["psnr"], found["quality"]
    lines = [
        f"# {found['condition']}, {found['steps']:,} steps", "",
        f"{found['images']:,} images of {found['split']}; {found['sampler']} with {found['calls']} levels. PSNR on "
        f"{psnr['count']:,} images.", "", "| | PSNR, dB | FRD | RS |", "|---|---|---|---|",
    ]  # fmt: skip
    rows = (("one sample", "psnr", "samples"), ("mean of 8 samples", "psnr_of_mean", ""))
    for title, key, name in (*rows, ("bicubic", "psnr_bicubic", "condition"), ("real images", "", "real")):
        values = scores.get(name, {})
        cells = [f"{psnr[key]:.2f}" if key in psnr else "", *(str(values.get(score, "")) for score in ("FRD", "RS"))]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
