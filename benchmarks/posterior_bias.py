"""How far restoration without training is from the true posterior, on data for which that is known.

    python benchmarks/posterior_bias.py [--samples 4000]

An image is two pixels, Gaussian with mean 0, variance 1 and a correlation. The first pixel is known to be 0.8, without
noise, so the second has the posterior N(0.8 correlation, 1 - correlation^2). The denoiser is exact and does not clip.
The schedule is the paper's, and DDNM and DPS visit its 1,000 levels. DDNM with time travel and RePaint visit 250, each
10 times, with jumps of 10. The table shows mean and standard deviation of the second pixel.
"""

import math

import record
import torch
from figures import table

from ddpm import schedule
from ddpm.denoiser import Denoiser
from ddpm.editing import inpaint
from ddpm.noise import generator
from ddpm.restoration import Mask, ddnm, dps

KNOWN, CORRELATIONS = 0.8, (0.0, 0.5, 0.9, 0.99)
HIDDEN = torch.tensor([False, True])
ZETAS = 0.01, 0.1, 1.0


def exact(correlations: torch.Tensor) -> Denoiser:
    """E[x_0 | x_t] = sqrt(abar) S (abar S + (1 - abar) I)^-1 x_t with S = [[1, r], [r, 1]], for image i r = r_i."""
    s, r = schedule.linear(), correlations.view(-1, 1, 1)

    def network(x: torch.Tensor, timestep: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        abar = s.alpha_bar[timestep[0] + 1].item()
        total, difference = x.sum(-1), x[..., 0] - x[..., 1]  # S has the eigenvalues 1 + r and 1 - r
        total = total * (1 + r) / (1 + abar * r) / 2
        difference = difference * (1 - r) / (1 - abar * r) / 2
        return math.sqrt(abar) * torch.stack([total + difference, total - difference], -1)

    return Denoiser(network, s, "x0", clip=False)


def second_pixels(samples: int) -> dict[str, torch.Tensor]:
    """The second pixels by method, [correlations, samples]."""
    size = len(CORRELATIONS) * samples, 1, 1, 2
    denoiser = exact(torch.tensor(CORRELATIONS).repeat_interleave(samples))
    noise = lambda k: torch.randn(size, generator=generator(k))  # noqa: E731
    y = torch.tensor([KNOWN, 0.0]).expand(size)
    paths = {
        "DDNM": ddnm(denoiser, Mask(HIDDEN), y, noise, steps=1000),
        "DDNM, time travel": ddnm(denoiser, Mask(HIDDEN), y, noise, steps=250, jump=10, resample=10),
        "RePaint": inpaint(denoiser, y, HIDDEN, noise, steps=250),
        **{f"DPS, zeta {zeta:g}": dps(denoiser, Mask(HIDDEN), y, noise, zeta) for zeta in ZETAS},
    }
    result = {}
    for name, path in paths.items():
        *_, last = path
        result[name] = last.x[:, 0, 0, 1].view(-1, samples)
        print(name, result[name].mean(1).tolist(), result[name].std(1).tolist(), flush=True)
    return result


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--samples", type=int, default=4000, help="samples of each figure (%(default)s)")
    args = parser.parse_args()
    with record.measuring(args):
        found = second_pixels(args.samples)
    values = {name: {"mean": x.mean(1).tolist(), "deviation": x.std(1).tolist()} for name, x in found.items()}
    truth = {"mean": [KNOWN * r for r in CORRELATIONS], "deviation": [math.sqrt(1 - r**2) for r in CORRELATIONS]}
    rows = [
        [name, *(f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in zip(v["mean"], v["deviation"], strict=True))]
        for name, v in {"posterior": truth, **values}.items()
    ]
    text = table(["mean ± standard deviation by correlation", *map(str, CORRELATIONS)], rows)
    text += (
        f"\n{args.samples:,} samples per figure: the standard error of a mean is at most {args.samples**-0.5:.3f}.\n"
    )
    about = {"correlations": CORRELATIONS, "posterior": truth, "values": values}
    record.write("posterior-bias", "Restoration and the true posterior", args, about, text, repeated=False)


if __name__ == "__main__":
    main()
