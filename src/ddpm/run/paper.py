"""The paper's tables and figures for a run of one's own, each beside the paper's numbers.

An experiment NAME leaves NAME.csv, NAME.png or both, and NAME.json, which says what they are of.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm import editing, likelihood, metrics, pixels, samplers
from ddpm.errors import InputError, Stopped
from ddpm.files import atomic, checkpoints, data, features, images, models, plots
from ddpm.gaussian import bits_per_dim
from ddpm.noise import mix, per_image
from ddpm.presets import Preset, to_json
from ddpm.run import evaluate, parts, quality, sample
from ddpm.run.processes import Processes
from ddpm.run.train import train

# What the paper reports, in part; None where we have no figure of it, "unstable" as it says.
Cell = float | str | None
TABLE_1: list[tuple[str, Cell, Cell, Cell, Cell, Cell]] = [  # CIFAR-10: IS and its std, FID, NLL of test and training
    ("Original diffusion (2015)", None, None, None, 5.40, None),
    ("Gated PixelCNN", None, None, None, 3.03, None),
    ("Sparse Transformer", None, None, None, 2.80, None),
    ("NCSN", 8.87, None, 25.32, None, None),
    ("StyleGAN2 + ADA", 9.74, None, 3.26, None, None),
    ("DDPM, L, fixed isotropic Sigma", 7.67, 0.13, 13.51, 3.70, 3.69),
    ("DDPM, L_simple", 9.46, 0.11, 3.17, 3.75, 3.72),
]
TABLE_2: dict[tuple[str, str, str], tuple[Cell, Cell]] = {  # (prediction, loss, Sigma) -> IS, FID
    ("mu", "vlb", "learned"): (7.28, 23.69),
    ("mu", "vlb", "fixed"): (8.06, 13.22),
    ("mu", "simple", "fixed"): ("unstable", "unstable"),
    ("eps", "vlb", "learned"): ("unstable", "unstable"),
    ("eps", "vlb", "fixed"): (7.67, 13.51),
    ("eps", "simple", "fixed"): (9.46, 3.17),
}
TABLE_3: list[tuple[str, str, float]] = [  # FID at 256x256
    ("DDPM, L_simple", "LSUN Bedroom", 6.36),
    ("DDPM, L_simple, large", "LSUN Bedroom", 4.90),
    ("DDPM, L_simple", "LSUN Church", 7.89),
    ("DDPM, L_simple", "LSUN Cat", 19.75),
    ("ProgressiveGAN", "LSUN Bedroom", 8.34),
    ("ProgressiveGAN", "LSUN Church", 6.42),
    ("ProgressiveGAN", "LSUN Cat", 37.52),
]
TABLE_4: dict[int, tuple[float, float]] = {  # reverse step -> rate in bits/dim, RMSE in grey levels
    1000: (1.77581, 0.95136),
    900: (0.11994, 12.02277),
    800: (0.05415, 18.47482),
    700: (0.02866, 24.43656),
    600: (0.01507, 30.80948),
    500: (0.00716, 38.03236),
    400: (0.00282, 46.12765),
    300: (0.00081, 54.18826),
    200: (0.00013, 60.97170),
    100: (0.00000, 67.60125),
}

_FIGURE = 0xF16
"""Keeps the draws of figures apart from those of samples with the same seed."""


@dataclass(frozen=True)
class Setup:
    """What an experiment works on.

    found     the model
    images    a split of its data: "train", what it was trained on, or another, `split` where it was not
    out       the folder for tables and pictures
    cache     the folder for what is made bit by bit, so that it goes on where it stopped
    n         images and samples to use; None: as many as the paper, or as fit on a picture
    samples   saved samples to score instead of making some
    network   the feature network for sample quality, only opened where it is needed; named_features: whether the
              user named one
    """

    found: models.Checkpoint
    images: Callable[[str], data.Images]
    out: Path
    cache: Path
    ranks: Processes
    network: Callable[[], features.Network]
    named_features: bool = False
    split: str = "test"
    n: int | None = None
    samples: Path | None = None
    sampler: str = "ancestral"
    steps: samplers.Levels | None = None
    spacing: str | None = None
    seed: int = 0
    batch_size: int = 64
    progress: bool = True

    @property
    def T(self) -> int:
        return self.found.denoiser.schedule.T

    def signal(self, count: int) -> Tensor:
        """The first `count` images of the split, x_0."""
        held_out = self.images(self.split)
        if len(held_out) < count:
            raise InputError(f"{held_out.name}: {len(held_out)} images of split {self.split}; want at least {count}")
        return parts.as_signal(held_out, range(count)).to(self.ranks.device)

    def noise(self, count: int, key: int, same: bool = False) -> Callable[[int], Tensor]:
        """Draws for `count` images; the same ones for each if `same`."""
        seeds = [mix(self.seed, 0 if same else i, key, _FIGURE) for i in range(count)]
        return per_image(seeds, self.found.preset.shape, self.ranks.device)

    def about(self, *splits: str, **more: Any) -> dict[str, Any]:
        """What a result is of: the model, the images, the seed, and `more`."""
        data = {}
        for split in splits:
            images = self.images(split)
            data[split] = {"name": images.name, "images": len(images), "fingerprint": images.fingerprint}
        return {**self.found.about(), "data": data, "n": self.n, "seed": self.seed, **more}

    def sampling(self) -> dict[str, Any]:
        """Where samples come from."""
        if self.samples is not None:
            return {"samples": self.samples.name}
        return self.sampled()

    def levels(self, t: int | None = None) -> list[int]:
        """Those that the sampler visits from t (None: T) on, rising: of those from T on the ones below t, and t."""
        visited = samplers.named(self.sampler).levels(self.found.denoiser, self.steps)
        return visited if t is None else [s for s in visited if s < t] + [t] * (t > 0)

    def sampled(self) -> dict[str, Any]:
        """How samples are made."""
        return sample.sampled(self.found.denoiser, self.sampler, self.levels(), self.spacing)


# -- tables ------------------------------------------------------------------------------------------------------------


def table1(s: Setup) -> None:
    """Inception score, FID, and bits/dim of held-out and of training images."""
    quality.check_network(s.network(), s.images("train"))  # a mistake shows before hours of likelihood
    held_out, seen = (_nll(s, split) for split in (s.split, "train"))
    found = _quality(s, ("is", "fid"))
    ours = (f"this run, {s.found.preset.loss}", *_scores(found), held_out["bits_per_dim"], seen["bits_per_dim"])
    about = s.about(s.split, "train", **s.sampling(), **found, nll_images=[held_out["count"], seen["count"]])
    header = ["model", "IS", "IS_std", _distance(found), f"NLL_{s.split}", "NLL_train"]
    _table(s, "table1", header, [ours, *TABLE_1], about)


def table2(preset: Preset, out: Path, ranks: Processes, setup: Callable[[Path], Setup]) -> int:
    """The ablation: six runs from one preset, trained here or gone on with; returns a signal that stopped it, or 0.

    A run whose loss is not finite stops and says so in its row; what it came to before is scored all the same.
    """
    rows: list[Sequence[Any]] = []
    about: list[dict[str, Any]] = []
    distance = "fid"
    fixed = preset.variance if preset.variance.startswith("fixed") else "fixed_large"
    for (predict, loss, sigma), (paper_is, paper_fid) in TABLE_2.items():
        variance = fixed if sigma == "fixed" else sigma
        run = out / "table2" / f"{predict}-{loss}-{variance}"
        state = "finished"
        try:
            result = train(replace(preset, predict=predict, loss=loss, variance=variance), run)  # type: ignore[arg-type]
            if result.interrupted:
                return result.interrupted
        except Stopped as reason:
            state = str(reason)
        scored: Sequence[Any] = [None] * 6
        if checkpoints.newest(run) is not None:  # else it stopped before its first
            s = setup(run)
            bound, found = _nll(s, s.split), _quality(s, ("is", "fid"))
            distance = _distance(found)
            by_variance = json.dumps({name: round(value, 4) for name, value in bound["by_variance"].items()})
            scored = [s.found.step, *_scores(found), bound["bits_per_dim"], by_variance]
            about.append(s.about(s.split, "train", **s.sampling(), **found, nll=bound))
        rows.append([predict, loss, variance, state, *scored, paper_is, paper_fid])
    if ranks.first:
        header = ["predict", "loss", "variance", "state", "step", "IS", "IS_std", distance, "NLL", "NLL_by_variance"]
        _csv(out / "table2.csv", [*header, "paper_IS", "paper_FID"], rows)
        atomic.write_json(out / "table2.json", {"settings": to_json(preset), "runs": about})
    return 0


def table3(s: Setup) -> None:
    """FID, beside those on LSUN 256x256."""
    found = _quality(s, ("fid",))
    ours = ("this run", s.images("train").name, found.get(_distance(found)))
    _table(
        s, "table3", ["model", "data", _distance(found)], [ours, *TABLE_3], s.about("train", **s.sampling(), **found)
    )


def table4(s: Setup) -> None:
    """Rate and distortion of progressive lossy coding by reverse step: what x_t has cost, and the error of its x0^."""
    curve = _rate_distortion(s)
    rows = {}
    for step, paper in TABLE_4.items():
        ours = max(1, round(step * s.T / 1000))
        rows[ours] = (ours, *curve[s.T - ours + 1], *paper)
    header = ["reverse_step", "rate_bits_per_dim", "rmse_grey_levels", "paper_rate", "paper_rmse"]
    _table(s, "table4", header, rows.values(), s.about(s.split))


def fig5(s: Setup) -> None:
    """Distortion against reverse steps, rate against reverse steps, and rate against distortion."""
    plots.check()  # before the measurement, not after it
    curve = _rate_distortion(s)
    steps = [s.T - t + 1 for t in curve]
    rate, rmse = ([values[i] for values in curve.values()] for i in (0, 1))
    p_steps = [step * s.T / 1000 for step in TABLE_4]
    p_rate, p_rmse = ([values[i] for values in TABLE_4.values()] for i in (0, 1))
    panel = plots.Panel
    paper = "paper, CIFAR-10"
    panels = [
        panel(
            "Distortion", {"this run": (steps, rmse), paper: (p_steps, p_rmse)}, "reverse steps", "RMSE, grey levels"
        ),
        panel("Rate", {"this run": (steps, rate), paper: (p_steps, p_rate)}, "reverse steps", "bits/dim"),
        panel("Rate-distortion", {"this run": (rate, rmse), paper: (p_rate, p_rmse)}, "bits/dim", "RMSE, grey levels"),
    ]
    header = ["reverse_step", "rate_bits_per_dim", "rmse_grey_levels"]
    _table(s, "fig5", header, zip(steps, rate, rmse, strict=True), s.about(s.split))
    if s.ranks.first:
        atomic.write(s.out / "fig5.png", plots.draw(panels))


# -- pictures ----------------------------------------------------------------------------------------------------------


def fig6(s: Setup) -> None:
    """x0^ as the reverse process goes on: a row a sample, from left to right."""
    n = s.n or 10
    strip = sample.progressive(
        s.found.denoiser, s.found.preset.shape, range(s.seed, s.seed + n), s.sampler, s.steps, columns=21,
        device=s.ranks.device, progress=s.progress,
    )  # fmt: skip
    _picture(s, "fig6", strip, s.about(**s.sampled()))


def fig7(s: Setup) -> None:
    """Samples that share x_t: a row a level, x_t first, then what it becomes."""
    n, T, run = s.n or 7, s.T, samplers.named(s.sampler).run
    if not samplers.SAMPLERS[s.sampler].noisy:
        noisy = ", ".join(name for name, sampler in samplers.SAMPLERS.items() if sampler.noisy)
        raise InputError(f"--sampler {s.sampler}: draws no noise, one x_t is one image; want {noisy} for fig7")
    visited = s.levels()
    levels = sorted({min(visited, key=lambda t, k=k: abs(t - T * k / 4)) for k in (4, 3, 2, 1)}, reverse=True)  # type: ignore[misc]
    draws = s.noise(1, 0)
    latents = {T: draws(T)}
    for step in run(s.found.denoiser, latents[T], draws, visited, None, None):
        if step.t in levels:
            latents[step.t] = step.x
    rows = []
    for t in levels:
        *_, last = editing.share_latent(s.found.denoiser, latents[t][0], t, s.noise(n, t), s.levels(t), run=run)
        rows.append(torch.cat([latents[t], last.x]))
    _picture(s, "fig7", _uint8(torch.stack(rows)), s.about(levels=levels, **s.sampled()))


def fig8(s: Setup) -> None:
    """Interpolation between held-out images, both at t = T/2: a row a pair, its images outermost."""
    n = s.n or 5
    weights = torch.linspace(0, 1, 11)
    x0 = s.signal(2 * n)
    rows = [_interpolated(s, x0[2 * i], x0[2 * i + 1], weights, s.T // 2, i) for i in range(n)]
    about = s.about(s.split, t=s.T // 2, mixed=weights.tolist(), **s.sampled())
    _picture(s, "fig8", _uint8(torch.stack(rows)), about)


def fig9(s: Setup) -> None:
    """The same pair of images over many t: a row a level, T first, and plain mixing of pixels, t = 0, last."""
    weights = torch.linspace(0, 1, 9)
    a, b = s.signal(2)
    levels = [s.T * k // 8 for k in range(8, -1, -1)]
    rows = [_interpolated(s, a, b, weights, t, 0) for t in levels]
    about = s.about(s.split, levels=levels, mixed=weights.tolist(), **s.sampled())
    _picture(s, "fig9", _uint8(torch.stack(rows)), about)


def _interpolated(s: Setup, a: Tensor, b: Tensor, weights: Tensor, t: int, pair: int) -> Tensor:
    """[len(weights) + 2, C, H, W]: a, what is between, b. One noise for all weights, so that they change smoothly."""
    eps_a, eps_b = s.noise(2, mix(pair, t))(t)
    noise = s.noise(len(weights), mix(pair, 1), same=True)
    steps, run = s.levels(t), samplers.named(s.sampler).run
    *_, last = editing.interpolate(s.found.denoiser, a, b, weights, t, eps_a, eps_b, noise, steps, run=run)
    return torch.cat([a[None], last.x, b[None]])


def fig10(s: Setup) -> None:
    """Progressive lossy decompression: a row an image, x0^ of what has been sent at falling t, the image itself last.

    The table has what each picture cost by Algorithm 3 (Eq. 5, no entropy coder), and its error.
    """
    n = s.n or 6
    x0 = s.signal(n)
    shown = sorted({max(1, round(s.T * share)) for share in (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0)} | {0})
    strip, rows = [], []
    for received in likelihood.progressive_coding(s.found.denoiser, x0, s.noise(n, 2)):
        if received.t in shown:
            strip.append(received.x0)
            bits = bits_per_dim(received.nats, x0[0].numel())
            rmse = (received.x0 - x0).square().flatten(1).mean(1).sqrt() / pixels.BIN
            rows += [(i, received.t, float(bits[i]), float(rmse[i])) for i in range(n)]
    rows.sort(key=lambda row: (row[0], -row[1]))
    about = s.about(s.split, levels=shown[::-1])
    _table(s, "fig10", ["image", "t", "sent_bits_per_dim", "rmse_grey_levels"], rows, about)
    _picture(s, "fig10", _uint8(torch.stack(strip, dim=1)), about)


def neighbours(s: Setup) -> None:
    """The nearest training images of samples, by pixels and by features (Figures 13 and 15), and which are copies.

    How near is near depends on the picture, so the nearest distance is taken over the mean of the next seven. A sample
    is called a duplicate where this ratio is 0 or is undercut by at most 1% of held-out images, which no model has
    seen: by chance 1% of samples are. Mirrored images count where training mirrors them; above 32x32, pixels are
    compared at 32x32.
    """
    seen, held_out = s.images("train"), s.images(s.split)
    k = min(8, len(seen))
    if k < 2:
        raise InputError(f"{seen.name}: {len(seen)} training images; want at least 2")
    if seen.fingerprint == held_out.fingerprint:
        raise InputError(f"--split {s.split}: the images that the run was trained on; want held-out ones")
    spaces: dict[str, Callable[[Tensor], Tensor]] = {"pixels": _pixels}
    try:
        network = s.network()
        spaces["features"] = lambda x: torch.from_numpy(
            features.measure(network, x, keep_features=True, progress=False).features
        )
    except InputError as reason:
        if s.named_features:
            raise
        if s.ranks.first:
            print(f"neighbours: by pixels only ({reason})", file=sys.stderr)
    made = _samples(s, s.n or 64)[: s.n or 64]
    if not s.ranks.first:
        return
    rows: list[tuple[Any, ...]] = []
    summary: dict[str, Any] = {}
    for space, of in spaces.items():
        data = _by_parts(seen, of)
        if s.found.preset.flip:
            data = torch.cat([data, _by_parts(seen, lambda x, of=of: of(x.flip(-1)))])  # type: ignore[misc]
        distances, indices = metrics.nearest(of(made), data, k, device=s.ranks.device)
        usual = _nearness(metrics.nearest(_by_parts(held_out, of), data, k, device=s.ranks.device)[0])
        usual = usual[usual > 0]  # an image that is in both sets says nothing
        chance = (1 + (usual <= _nearness(distances)[:, None]).sum(1)) / (len(usual) + 1)
        copies = [i for i in range(len(made)) if distances[i, 0] == 0 or chance[i] <= 0.01]
        summary[space] = {
            "duplicates": copies, "by_chance": 0.01 * len(made), "held_out_compared": len(usual),
            "held_out_also_in_training": len(held_out) - len(usual),
        }  # fmt: skip
        indices %= len(seen)
        for i, (near, at) in enumerate(zip(distances.tolist(), indices.tolist(), strict=True)):
            found = zip(near, at, strict=True)
            rows += [(space, i, rank, j, d, float(chance[i]), i in copies) for rank, (d, j) in enumerate(found, 1)]
        top = indices[:10]
        nearest = seen.batch(top.flatten()).view(*top.shape, *made.shape[1:])
        _picture(s, f"neighbours_{space}", torch.cat([made[:10, None], nearest], dim=1), {})
    about = s.about("train", s.split, **s.sampling(), **summary)
    header = ["space", "sample", "rank", "training_image", "distance", "held_out_as_near", "duplicate"]
    _table(s, "neighbours", header, rows, about)


def _nearness(distances: Tensor) -> Tensor:
    """The nearest distance over the mean of the others: [N, k] -> [N]; 0 for a copy."""
    return distances[:, 0] / distances[:, 1:].mean(1).clamp(min=1e-300)


def _pixels(x: Tensor) -> Tensor:
    small = x.float() if max(x.shape[2:]) <= 32 else F.interpolate(x.float(), (32, 32), mode="area")
    return small.flatten(1)


def _by_parts(images: data.Images, of: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([of(images.batch(range(i, min(i + 1000, len(images))))) for i in range(0, len(images), 1000)])


class Experiment(NamedTuple):
    """A table or figure of the paper by name: the function that makes it, and one line for help.

    trains  whether it trains its own runs: it is called as `table2` is, and not with a `Setup`
    """

    function: Callable[..., Any]
    trains: bool = False
    meaning: str = ""


EXPERIMENTS = {
    "table1": Experiment(table1, meaning="IS, FID and bits/dim"),
    "table2": Experiment(table2, trains=True, meaning="the ablation: six runs, which it trains or resumes"),
    "table3": Experiment(table3, meaning="FID"),
    "table4": Experiment(table4, meaning="rate and distortion by reverse step"),
    "fig5": Experiment(fig5, meaning="rate and distortion as curves"),
    "fig6": Experiment(fig6, meaning="progressive generation, x0^ on the way"),
    "fig7": Experiment(fig7, meaning="samples that share x_t"),
    "fig8": Experiment(fig8, meaning="interpolation at t = T/2"),
    "fig9": Experiment(fig9, meaning="interpolation over many t"),
    "fig10": Experiment(fig10, meaning="progressive lossy decompression"),
    "neighbours": Experiment(neighbours, meaning="the nearest training images of samples, and duplicates"),
}


# -- what they share ---------------------------------------------------------------------------------------------------


def _nll(s: Setup, split: str) -> dict[str, Any]:
    count = s.n if split != "train" else s.n or len(s.images(s.split))
    out = s.out / f"nll-{split}"
    return evaluate.nll(s.found, s.images(split), out, s.cache, s.ranks, count, 1, s.seed, s.batch_size, s.progress)


def _rate_distortion(s: Setup) -> dict[int, tuple[float, float]]:
    """t -> bits/dim until the receiver has x_t, and RMSE of the x0^ that it makes of it, grey levels; T first."""
    _nll(s, s.split)
    with (s.out / f"nll-{s.split}" / "nll.csv").open() as file:
        rows = csv.DictReader(file)
        return {int(row["t"]): (float(row["rate_bits_per_dim"]), float(row["rmse_grey_levels"])) for row in rows}


def _samples(s: Setup, count: int) -> Tensor:
    """uint8 [N, C, H, W], on the first process: those that were given, or `count` new ones."""
    if s.samples is not None:
        return quality.read_samples(s.samples, s.found.preset.shape)
    return quality.samples(
        s.found, s.cache, s.ranks, count, s.seed, s.sampler, s.steps, s.batch_size, progress=s.progress
    )


def _quality(s: Setup, wanted: Sequence[str]) -> dict[str, Any]:
    """`quality.quality`, on the first process; nothing on others."""
    network, real = s.network(), s.images("train")  # a mistake shows before hours of sampling
    made = _samples(s, s.n or 50_000)
    if not s.ranks.first:
        return {}
    if s.samples is None:
        images.save(s.out / "samples.png", images.grid(images.channels_last(made[:64])))
    return quality.quality(wanted, made, real, network, s.cache, s.seed, s.ranks.device, s.progress)


def _distance(found: dict[str, Any]) -> str:
    return "frechet_distance" if "frechet_distance" in found else "fid"


def _scores(found: dict[str, Any]) -> list[float | None]:
    return [found.get(name) for name in ("inception_score", "inception_score_std", _distance(found))]


def _table(s: Setup, name: str, header: Sequence[str], rows: Any, about: dict[str, Any]) -> None:
    if s.ranks.first:
        _csv(s.out / f"{name}.csv", header, rows)
        atomic.write_json(s.out / f"{name}.json", about)


def _csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """None is an empty cell, and a number has six digits."""
    cells = (["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    atomic.write_csv(path, header, cells)


def _picture(s: Setup, name: str, tiles: Tensor, about: dict[str, Any]) -> None:
    """A grid of tiles uint8 [rows, columns, C, H, W]."""
    if s.ranks.first:
        flat = images.channels_last(tiles.flatten(0, 1))
        images.save(s.out / f"{name}.png", images.grid(flat, columns=tiles.shape[1]))
        if about:
            atomic.write_json(s.out / f"{name}.json", about)


def _uint8(x: Tensor) -> Tensor:
    return pixels.to_pixels(x).cpu()
