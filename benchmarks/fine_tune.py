"""Compare `--init digits` with training from nothing, on 8x8 letters drawn from the fonts of this machine.

    python benchmarks/fine_tune.py [--steps 300] [--every 10] [--seeds 3]

The images are capital and small letters of TrueType fonts, in 8x8 as the digits are: no digit is among them. Letters of
one font in five are held out. The runs that begin with digits have half of the steps of those from nothing, cooldown
included. Each way has the learning rate that is best for it: the one of lowest held-out loss at the end, for the first
seed. With it, each seed trains both ways. The held-out loss is measured on 600 noisy images, the same for all. The
result is the first measured step at which the model that began with digits is at least as good as the other one at its
end, as a share of that one's steps.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from PIL import Image, ImageDraw, ImageFont

import ddpm
from ddpm.files import images as pictures
from ddpm.run import log

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PLACES = ("/usr/share/fonts", "/usr/local/share/fonts")
RATES = {"nothing": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), "digits": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)}


def fonts() -> list[Path]:
    """TrueType fonts of this machine that have all letters, by name."""
    import matplotlib

    places = [*map(Path, PLACES), Path(matplotlib.get_data_path(), "fonts/ttf")]
    by_name = {file.name: file for place in reversed(places) for file in sorted(place.rglob("*.ttf"))}
    return [file for name, file in sorted(by_name.items()) if _has_letters(file)]


def _has_letters(file: Path) -> bool:
    """Whether all letters differ from each other, and from what the font draws for a missing one."""
    font = ImageFont.truetype(file, 32)
    drawn = {bytes(font.getmask(letter)) for letter in LETTERS}
    return len(drawn) > 48 and bytes(font.getmask("\ue123")) not in drawn


def draw(letter: str, file: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A letter, white on black, uint8 [8, 8]: as large as fits in height and width, as scikit-learn's digits are."""
    font = ImageFont.truetype(file, 64)
    left, top, right, bottom = font.getbbox(letter)
    side = max(right - left, bottom - top)
    image = Image.new("L", (side, side))
    at = ((side - right + left) // 2 - left, (side - bottom + top) // 2 - top)
    ImageDraw.Draw(image).text(at, letter, 255, font)
    return np.asarray(image.resize((8, 8), Image.Resampling.BOX))


def write_letters(folder: Path) -> tuple[int, int, int]:
    """Write the letters as a folder with the splits train and test. Returns the numbers of fonts and of images."""
    files = fonts()
    counts = [0, 0]
    for k, file in enumerate(files):
        held_out = k % 5 == 4
        for letter in LETTERS:
            split, case = "test" if held_out else "train", "upper" if letter.isupper() else "lower"
            pictures.save(folder / split / f"{case}-{letter}" / f"{file.stem}.png", draw(letter, file)[..., None])
            counts[held_out] += 1
    return len(files), *counts


def curve(data: Path, start: str, lr: float, seed: int, steps: int, every: int) -> dict[int, float]:
    """Held-out loss by step of a run that begins with `start`, which is "nothing" or a model."""
    with tempfile.TemporaryDirectory() as out:
        run = ddpm.train(
            "digits", str(data), out, steps=steps, lr=lr, seed=seed, save_every=every, save_minutes=0, sample_every=0,
            log_every=steps, eval_images=600, keep=1, classes=False, precision="float32",
            init="" if start == "nothing" else start,
        )  # fmt: skip
        losses = {
            line["step"]: line["held_out"] for line in log.read(run.folder / "metrics.jsonl") if "held_out" in line
        }
    print(f"{start}, lr {lr:g}, seed {seed}: {losses[0]:.4f} -> {losses[steps]:.4f}", flush=True)
    return losses


def share(fine: dict[int, float], nothing: dict[int, float]) -> float:
    """The steps until `fine` is as good as `nothing` at its end, divided by the steps of `nothing`; inf if it never is.

    >>> share({0: 3.0, 5: 1.0, 10: 0.5}, {0: 4.0, 5: 2.0, 10: 1.0})
    0.5
    """
    end = max(nothing)
    return min((step for step, loss in fine.items() if loss <= nothing[end]), default=float("inf")) / end


def main() -> None:
    p = record.parser(__doc__, repeats=1, seconds=0)
    p.add_argument("--steps", type=int, default=300, help="steps of a run from nothing (%(default)s)")
    p.add_argument("--every", type=int, default=10, help="steps between held-out losses (%(default)s)")
    p.add_argument("--seeds", type=int, default=3, help="seeds of each way (%(default)s)")
    args = p.parse_args()
    torch.set_num_threads(args.threads or 1)
    with record.measuring(args), tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "letters")
        count, trained_on, held_out = write_letters(data)
        rates: dict[str, dict[float, float]] = {}
        curves: dict[str, list[dict[int, float]]] = {}
        for start, candidates in RATES.items():
            steps = args.steps if start == "nothing" else args.steps // 2
            tried = {lr: curve(data, start, lr, 0, steps, args.every) for lr in candidates}
            rates[start] = {lr: losses[steps] for lr, losses in tried.items()}
            best = min(candidates, key=rates[start].__getitem__)
            rest = [curve(data, start, best, seed, steps, args.every) for seed in range(1, args.seeds)]
            curves[start] = [tried[best], *rest]
    shares = [share(fine, nothing) for fine, nothing in zip(curves["digits"], curves["nothing"], strict=True)]
    best_rates = {start: min(rates[start], key=rates[start].__getitem__) for start in rates}
    values = {
        "fonts": count, "train": trained_on, "held_out": held_out, "rates": rates, "best_rates": best_rates,
        "curves": curves, "shares": shares,
    }  # fmt: skip
    record.write(
        f"fine-tune-{args.steps}",
        f"Fine-tuning digits on letters, {args.steps} steps",
        args,
        values,
        table(values, args.steps),
        repeated=False,
    )


def _percent(part: float) -> str:
    return "more than 50%" if part > 0.5 else f"{part:.1%}"


def table(values: dict[str, Any], steps: int) -> str:
    shares, curves = values["shares"], values["curves"]
    lines = [
        f"{values['fonts']} fonts; {values['train']:,} letters to train on, {values['held_out']:,} held out; "
        f"{len(LETTERS)} letters, no digit; 8x8; {steps} steps of 64 images from nothing, "
        f"{steps // 2} from digits; preset digits without classes.",
        "",
        f"Steps that `--init digits` needs for the last held-out loss of training from nothing: "
        f"median {_percent(statistics.median(shares))} ({_percent(min(shares))} - {_percent(max(shares))}) over "
        f"{len(shares)} seeds.",
        "",
        "| seed | from nothing, at its end | from digits, step 0 | from digits, at its end | share of the steps |",
        "|---|---|---|---|---|",
    ]
    for seed, part in enumerate(shares):
        nothing, fine = curves["nothing"][seed], curves["digits"][seed]
        lines.append(f"| {seed} | {nothing[steps]:.4f} | {fine[0]:.4f} | {fine[steps // 2]:.4f} | {_percent(part)} |")
    lines += ["", "Held-out L_simple at the end by learning rate, seed 0; the lowest one is used for all seeds.", ""]
    lines += ["| begins with | " + " | ".join("lr and loss" for _ in range(6)) + " |", "|---" * 7 + "|"]
    for start, tried in values["rates"].items():
        cells = [f"{lr:g}: {loss:.4f}" for lr, loss in tried.items()]
        lines.append(f"| {start} | " + " | ".join([*cells, *[""] * (6 - len(cells))]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
