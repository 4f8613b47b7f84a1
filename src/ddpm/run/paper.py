"""The paper's tables and figures, made for any model and set beside the paper's numbers.

Each experiment NAME writes NAME.csv, NAME.png or both. NAME.json records the model, the data and the settings.
"""

import csv
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm import editing, likelihood, metrics, pixels, samplers
from ddpm.errors import InputError, Stopped
from ddpm.files import arrays, atomic, checkpoints, data, features, images, models, plots
from ddpm.files.images import Pixels
from ddpm.gaussian import bits_per_dim
from ddpm.noise import mix, per_image
from ddpm.presets import Preset, to_json
from ddpm.run import evaluate, parts, quality, sample
from ddpm.run.processes import Processes
from ddpm.run.saved import Samples, read_samples
from ddpm.run.train import train

# Some of the numbers that the paper reports. None is a missing number; "unstable" is the paper's word.
Cell = float | str | None
# CIFAR-10: IS, its std, FID, NLL of test and training images
TABLE_1: list[tuple[str, Cell, Cell, Cell, Cell, Cell]] = [
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
"""Key of the figures' noise. It keeps their draws apart from those of samples with the same seed."""


@dataclass(frozen=True)
class Setup:
    """The model, the images and the settings of an experiment.

    checkpoint      the model
    images          from the name of a split to its images: "train" gives the training images
    out             folder for tables and pictures
    cache           folder for finished batches, so that a stopped experiment can resume
    network         opens the feature network for sample quality; called only by experiments that need it
    named_features  whether the user chose the feature network
    split           the split of held-out images
    n               number of images and of samples; None: the paper's number, or as many as a figure shows
    samples         a file or folder of saved samples to score; None: the experiment makes samples
    sampler, steps, spacing
                    how samples are made: a name, the levels or their number, and the name of the levels' spacing
    seed            of samples and noise
    batch_size      images at a time; no result depends on it
    """

    checkpoint: models.Checkpoint
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
        """The number of noise levels of the model."""
        return self.checkpoint.denoiser.schedule.T

    def pixels(self, x: Tensor) -> Tensor:
        """The signal in [-1, 1] as pixels of the model on the CPU."""
        return pixels.to_pixels(x, self.checkpoint.denoiser.values).cpu()

    def sheet(self, pixels: Tensor) -> Pixels:
        """Pixels [N, C, H, W] of the model as 8-bit pictures."""
        return arrays.sheet(pixels, arrays.view_of(self.checkpoint.preset, self.checkpoint.denoiser.values))

    def held_out(self, count: int) -> Tensor:
        """The first `count` images of the held-out split as x_0, [count, C, H, W].

        Raises InputError if there are fewer.
        """
        images = self.images(self.split)
        if len(images) < count:
            raise InputError(f"{images.name}: split {self.split} has {len(images)} images; want at least {count}")
        return parts.as_signal(images, range(count)).to(self.ranks.device)

    def noise(self, count: int, key: int, same: bool = False) -> Callable[[int], Tensor]:
        """Noise draws for `count` images, from a level t to [count, C, H, W]; with `same` all images share one draw."""
        seeds = [mix(self.seed, 0 if same else i, key, _FIGURE) for i in range(count)]
        return per_image(seeds, self.checkpoint.preset.shape, self.ranks.device)

    def levels(self, t: int | None = None) -> list[int]:
        """The noise levels that the sampler visits from T, rising. With t: those of them below t, and t itself."""
        visited = samplers.named(self.sampler).levels(self.checkpoint.denoiser, self.steps)
        return visited if t is None else [level for level in visited if level < t] + [t] * (t > 0)

    def about(self, *splits: str, **more: Any) -> dict[str, Any]:
        """What a result was made from: the model, the images of `splits`, the seed, and `more`; plain JSON values."""
        data = {}
        for split in splits:
            images = self.images(split)
            data[split] = {"name": images.name, "images": len(images), "fingerprint": images.fingerprint}
        return {**self.checkpoint.about(), "data": data, "n": self.n, "seed": self.seed, **more}

    def about_sampler(self) -> dict[str, Any]:
        """How samples are made."""
        return sample.describe_sampling(self.checkpoint.denoiser, self.sampler, self.levels(), self.spacing)

    def about_samples(self) -> dict[str, Any]:
        """Where samples come from: a file or folder, or how they are made."""
        return self.about_sampler() if self.samples is None else {"samples": self.samples.name}


# -- tables ------------------------------------------------------------------------------------------------------------


def table1(setup: Setup) -> None:
    """Table 1: Inception score, FID, and bits/dim of held-out and of training images."""
    quality.check_network(setup.network(), setup.images("train").batch([0]))  # before hours of likelihood
    held_out, training = (_nll(setup, split) for split in (setup.split, "train"))
    scores = _quality(setup, ("is", "fid"))
    name = f"this run, {setup.checkpoint.preset.loss}"
    ours = (name, *_scores(scores), held_out["bits_per_dim"], training["bits_per_dim"])
    nll_images = [held_out["count"], training["count"]]
    about = setup.about(setup.split, "train", **setup.about_samples(), **scores, nll_images=nll_images)
    header = ["model", "IS", "IS_std", _distance(scores), f"NLL_{setup.split}", "NLL_train"]
    _write_table(setup, "table1", header, [ours, *TABLE_1], about)


def table2(preset: Preset, out: Path, ranks: Processes, make_setup: Callable[[Path], Setup]) -> int:
    """Table 2, the ablation: six runs from one preset under out/table2, which it trains or resumes.

    `make_setup` makes the Setup of a run folder. A run stops if its loss is not finite. Its row then states this, and
    has the scores of its newest checkpoint. Returns the number of the signal that stopped the training, or 0.
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
        values: Sequence[Any] = [None] * 6
        if checkpoints.newest(run) is not None:  # a run may stop before its first checkpoint
            setup = make_setup(run)
            bound, scores = _nll(setup, setup.split), _quality(setup, ("is", "fid"))
            distance = _distance(scores)
            by_variance = json.dumps({name: round(value, 4) for name, value in bound["by_variance"].items()})
            values = [setup.checkpoint.step, *_scores(scores), bound["bits_per_dim"], by_variance]
            about.append(setup.about(setup.split, "train", **setup.about_samples(), **scores, nll=bound))
        rows.append([predict, loss, variance, state, *values, paper_is, paper_fid])
    if ranks.first:
        header = ["predict", "loss", "variance", "state", "step", "IS", "IS_std", distance, "NLL", "NLL_by_variance"]
        _write_csv(out / "table2.csv", [*header, "paper_IS", "paper_FID"], rows)
        atomic.write_json(out / "table2.json", {"settings": to_json(preset), "runs": about})
    return 0


def table3(setup: Setup) -> None:
    """Table 3: FID, beside the paper's on LSUN at 256x256."""
    scores = _quality(setup, ("fid",))
    distance = _distance(scores)
    ours = ("this run", setup.images("train").name, scores.get(distance))
    about = setup.about("train", **setup.about_samples(), **scores)
    _write_table(setup, "table3", ["model", "data", distance], [ours, *TABLE_3], about)


def table4(setup: Setup) -> None:
    """Table 4: rate and distortion of progressive lossy coding by reverse step.

    The rate is what x_t costs, and the distortion is the error of the x0^ that it gives.
    """
    curve = _rate_distortion(setup)
    rows = {}
    for paper_step, paper in TABLE_4.items():
        step = max(1, round(paper_step * setup.T / 1000))
        rows[step] = (step, *curve[setup.T - step + 1], *paper)
    header = ["reverse_step", "rate_bits_per_dim", "rmse_grey_levels", "paper_rate", "paper_rmse"]
    _write_table(setup, "table4", header, rows.values(), setup.about(setup.split))


def fig5(setup: Setup) -> None:
    """Figure 5: distortion against reverse steps, rate against reverse steps, and distortion against rate."""
    plots.check()  # before the measurement, which takes long
    curve = _rate_distortion(setup)
    steps = [setup.T - t + 1 for t in curve]
    rate, rmse = ([values[i] for values in curve.values()] for i in (0, 1))
    paper_steps = [step * setup.T / 1000 for step in TABLE_4]
    paper_rate, paper_rmse = ([values[i] for values in TABLE_4.values()] for i in (0, 1))
    ours, paper = "this run", "paper, CIFAR-10"
    reverse_steps, error, bits = "reverse steps", "RMSE, grey levels", "bits/dim"
    panels = [
        plots.Panel("Distortion", {ours: (steps, rmse), paper: (paper_steps, paper_rmse)}, reverse_steps, error),
        plots.Panel("Rate", {ours: (steps, rate), paper: (paper_steps, paper_rate)}, reverse_steps, bits),
        plots.Panel("Rate-distortion", {ours: (rate, rmse), paper: (paper_rate, paper_rmse)}, bits, error),
    ]
    header = ["reverse_step", "rate_bits_per_dim", "rmse_grey_levels"]
    _write_table(setup, "fig5", header, zip(steps, rate, rmse, strict=True), setup.about(setup.split))
    if setup.ranks.first:
        atomic.write(setup.out / "fig5.png", plots.draw(panels))


# -- pictures ----------------------------------------------------------------------------------------------------------


def fig6(setup: Setup) -> None:
    """Figure 6: x0^ during the reverse process, one row per sample, from left to right."""
    seeds = range(setup.seed, setup.seed + (setup.n or 10))
    strip = sample.progressive(
        setup.checkpoint.denoiser, setup.checkpoint.preset.shape, seeds, setup.sampler, setup.steps, columns=21,
        device=setup.ranks.device, progress=setup.progress,
    )  # fmt: skip
    _write_picture(setup, "fig6", strip, setup.about(**setup.about_sampler()))


def fig7(setup: Setup) -> None:
    """Figure 7: samples that share x_t. One row per level t: x_t, then samples of p(x_0 | x_t).

    The levels are those that the sampler visits nearest to T, 3T/4, T/2 and T/4. Raises InputError for a sampler
    without noise, because its samples would all be equal.
    """
    n, T, run = setup.n or 7, setup.T, samplers.named(setup.sampler).run
    if not samplers.SAMPLERS[setup.sampler].noisy:
        noisy = ", ".join(name for name, sampler in samplers.SAMPLERS.items() if sampler.noisy)
        raise InputError(f"sampler {setup.sampler}: draws no noise, so one x_t gives one image; want {noisy} for fig7")
    visited = setup.levels()
    levels = sorted({min(visited, key=lambda t, k=k: abs(t - T * k / 4)) for k in (4, 3, 2, 1)}, reverse=True)  # type: ignore[misc]
    noise = setup.noise(1, 0)
    latents = {T: noise(T)}
    for step in run(setup.checkpoint.denoiser, latents[T], noise, visited, None, None):
        if step.t in levels:
            latents[step.t] = step.x
    rows = []
    for t in levels:
        *_, last = editing.share_latent(
            setup.checkpoint.denoiser, latents[t][0], t, setup.noise(n, t), setup.levels(t), run=run
        )
        rows.append(torch.cat([latents[t], last.x]))
    about = setup.about(levels=levels, **setup.about_sampler())
    _write_picture(setup, "fig7", setup.pixels(torch.stack(rows)), about)


def fig8(setup: Setup) -> None:
    """Figure 8: interpolation between held-out images at t = T/2. One row per pair, whose images are at the ends."""
    n = setup.n or 5
    weights = torch.linspace(0, 1, 11)
    x0 = setup.held_out(2 * n)
    rows = [_interpolated(setup, x0[2 * i], x0[2 * i + 1], weights, setup.T // 2, i) for i in range(n)]
    about = setup.about(setup.split, t=setup.T // 2, mixed=weights.tolist(), **setup.about_sampler())
    _write_picture(setup, "fig8", setup.pixels(torch.stack(rows)), about)


def fig9(setup: Setup) -> None:
    """Figure 9: interpolation of one pair at many levels. One row per t, T first; at t = 0 the pixels are mixed."""
    weights = torch.linspace(0, 1, 9)
    a, b = setup.held_out(2)
    levels = [setup.T * k // 8 for k in range(8, -1, -1)]
    rows = [_interpolated(setup, a, b, weights, t, 0) for t in levels]
    about = setup.about(setup.split, levels=levels, mixed=weights.tolist(), **setup.about_sampler())
    _write_picture(setup, "fig9", setup.pixels(torch.stack(rows)), about)


def _interpolated(setup: Setup, a: Tensor, b: Tensor, weights: Tensor, t: int, pair: int) -> Tensor:
    """Image a, the interpolations at each weight, and image b: [len(weights) + 2, C, H, W].

    All weights share one noise, so that the images change smoothly.
    """
    eps_a, eps_b = setup.noise(2, mix(pair, t))(t)
    noise = setup.noise(len(weights), mix(pair, 1), same=True)
    levels, run = setup.levels(t), samplers.named(setup.sampler).run
    *_, last = editing.interpolate(setup.checkpoint.denoiser, a, b, weights, t, eps_a, eps_b, noise, levels, run=run)
    return torch.cat([a[None], last.x, b[None]])


def fig10(setup: Setup) -> None:
    """Figure 10: progressive lossy decompression. One row per image: x0^ of what was sent until t, for falling t.

    The last column is the image. The table has the cost of each picture under Algorithm 3 with an ideal entropy coder
    (Eq. 5), and its error.
    """
    n = setup.n or 6
    x0 = setup.held_out(n)
    shares = (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0)
    levels = sorted({max(1, round(setup.T * share)) for share in shares} | {0}, reverse=True)
    columns, rows = [], []
    for received in likelihood.progressive_coding(setup.checkpoint.denoiser, x0, setup.noise(n, 2)):
        if received.t in levels:
            columns.append(received.x0)
            bits = bits_per_dim(received.nats, x0[0].numel())
            rmse = (received.x0 - x0).square().flatten(1).mean(1).sqrt() / setup.checkpoint.denoiser.values.bin
            rows += [(i, received.t, float(bits[i]), float(rmse[i])) for i in range(n)]
    rows.sort(key=lambda row: (row[0], -row[1]))
    about = setup.about(setup.split, levels=levels)
    _write_table(setup, "fig10", ["image", "t", "sent_bits_per_dim", "rmse_grey_levels"], rows, about)
    _write_picture(setup, "fig10", setup.pixels(torch.stack(columns, dim=1)), about)


# -- nearest neighbours ------------------------------------------------------------------------------------------------


class _Neighbours(NamedTuple):
    """The nearest training images of N samples.

    distances  float64 [N, k], nearest first
    indices    int64 [N, k], of training images
    chance     float64 [N], the share of held-out images that are at least as near to their neighbours
    compared   the number of held-out images that are not also training images
    """

    distances: Tensor
    indices: Tensor
    chance: Tensor
    compared: int

    def duplicates(self) -> list[int]:
        """The samples that are copies of a training image, or nearer to one than 99% of held-out images are."""
        return [i for i in range(len(self.chance)) if self.distances[i, 0] == 0 or self.chance[i] <= 0.01]


def neighbours(setup: Setup) -> None:
    """Figures 13 and 15: the nearest training images of samples, by pixels and by features, and which are duplicates.

    Some images have nearer neighbours than others. So the distance to the nearest training image is divided by the mean
    distance to the next seven. A sample is a duplicate if this ratio is 0, or if at most 1% of the held-out images have
    a ratio that is as small; the model has never seen these. By chance, 1% of the samples are duplicates. If training
    mirrors images, mirrored training images are compared as well. Above 32x32, pixels are compared at 32x32.
    """
    training, held_out = setup.images("train"), setup.images(setup.split)
    if len(training) < 2:
        raise InputError(f"{training.name}: {len(training)} training images; want at least 2")
    if training.fingerprint == held_out.fingerprint:
        raise InputError(f"split {setup.split}: holds the images that the model was trained on; want held-out ones")
    spaces = _spaces(setup)
    n = setup.n or 64
    found = _samples(setup, n)
    if not setup.ranks.first:
        return
    samples = found.batch(range(min(n, len(found))))
    rows: list[tuple[Any, ...]] = []
    summary: dict[str, Any] = {}
    for space, embed in spaces.items():
        nearest = _nearest(setup, samples, training, held_out, embed)
        duplicates = nearest.duplicates()
        summary[space] = {
            "duplicates": duplicates, "by_chance": 0.01 * len(samples), "held_out_compared": nearest.compared,
            "held_out_also_in_training": len(held_out) - nearest.compared,
        }  # fmt: skip
        for i in range(len(samples)):
            pairs = zip(nearest.indices[i].tolist(), nearest.distances[i].tolist(), strict=True)
            chance, duplicate = float(nearest.chance[i]), i in duplicates
            rows += [(space, i, rank, j, d, chance, duplicate) for rank, (j, d) in enumerate(pairs, 1)]
        indices = nearest.indices[:10]
        pictures = training.batch(indices.flatten()).view(*indices.shape, *samples.shape[1:])
        _write_picture(setup, f"neighbours_{space}", torch.cat([samples[:10, None], pictures], dim=1), {})
    about = setup.about("train", setup.split, **setup.about_samples(), **summary)
    header = ["space", "sample", "rank", "training_image", "distance", "held_out_as_near", "duplicate"]
    _write_table(setup, "neighbours", header, rows, about)


def _spaces(setup: Setup) -> dict[str, Callable[[Tensor], Tensor]]:
    """The spaces in which images are compared, each a function from images [N, C, H, W] to points [N, D].

    Without a feature network there are only the pixels; but a network that the user chose must open.
    """
    try:
        network = setup.network()
    except InputError as reason:
        if setup.named_features:
            raise
        if setup.ranks.first:
            warnings.warn(f"neighbours: compared by pixels only ({reason})", stacklevel=2)
        return {"pixels": _pixels}

    def embed(x: Tensor) -> Tensor:
        return torch.from_numpy(features.measure(network, x, keep_features=True, progress=False).features)

    return {"pixels": _pixels, "features": embed}


def _nearest(
    setup: Setup, samples: Tensor, training: data.Images, held_out: data.Images, embed: Callable[[Tensor], Tensor]
) -> _Neighbours:
    """The nearest training images of `samples` in the space of `embed`, compared with those of held-out images."""
    k, device = min(8, len(training)), setup.ranks.device
    points = _embedded(training, embed)
    if setup.checkpoint.preset.flip:
        points = torch.cat([points, _embedded(training, lambda x: embed(_mirrored(x)))])
    distances, indices = metrics.nearest(embed(samples), points, k, device=device)
    expected = _relative_distance(metrics.nearest(_embedded(held_out, embed), points, k, device=device)[0])
    expected = expected[expected > 0]  # an image of both sets says nothing about chance
    chance = (1 + (expected <= _relative_distance(distances)[:, None]).sum(1)) / (len(expected) + 1)
    return _Neighbours(distances, indices % len(training), chance, len(expected))


def _mirrored(x: Tensor) -> Tensor:
    """The images mirrored left to right. torch cannot flip uint16, so their bits are flipped as int16."""
    return x.view(torch.int16).flip(-1).view(x.dtype) if x.dtype == torch.uint16 else x.flip(-1)


def _relative_distance(distances: Tensor) -> Tensor:
    """The nearest distance over the mean of the others, [N, k] -> [N]; 0 for a copy."""
    return distances[:, 0] / distances[:, 1:].mean(1).clamp(min=1e-300)


def _pixels(x: Tensor) -> Tensor:
    """Pixel values of images, at 32x32 if they are larger."""
    small = x.float() if max(x.shape[2:]) <= 32 else F.interpolate(x.float(), (32, 32), mode="area")
    return small.flatten(1)


def _embedded(images: data.Images, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """The points [N, D] of all images, computed in batches of 1000."""
    return torch.cat([embed(images.batch(range(i, min(i + 1000, len(images))))) for i in range(0, len(images), 1000)])


# -- the table of experiments ------------------------------------------------------------------------------------------


class Experiment(NamedTuple):
    """A table or figure of the paper.

    function    makes it from a `Setup`
    trains      whether it trains its own runs; then the function has the parameters of `table2`
    unlabelled  what it makes by calling the network without a label: nothing, samples, which saved ones replace, or
                pictures
    meaning     one line for help
    """

    function: Callable[..., Any]
    trains: bool = False
    unlabelled: Literal["", "samples", "pictures"] = ""
    meaning: str = ""


EXPERIMENTS = {
    "table1": Experiment(table1, unlabelled="samples", meaning="IS, FID and bits/dim"),
    "table2": Experiment(table2, trains=True, meaning="the ablation, six runs that are trained or resumed"),
    "table3": Experiment(table3, unlabelled="samples", meaning="FID"),
    "table4": Experiment(table4, meaning="rate and distortion by reverse step"),
    "fig5": Experiment(fig5, meaning="rate and distortion as curves"),
    "fig6": Experiment(fig6, unlabelled="pictures", meaning="progressive generation, x0^ during sampling"),
    "fig7": Experiment(fig7, unlabelled="pictures", meaning="samples that share x_t"),
    "fig8": Experiment(fig8, unlabelled="pictures", meaning="interpolation at t = T/2"),
    "fig9": Experiment(fig9, unlabelled="pictures", meaning="interpolation at many t"),
    "fig10": Experiment(fig10, unlabelled="pictures", meaning="progressive lossy decompression"),
    "neighbours": Experiment(
        neighbours, unlabelled="samples", meaning="the nearest training images of samples, and duplicates"
    ),
}


# -- shared parts ------------------------------------------------------------------------------------------------------


def _nll(setup: Setup, split: str) -> dict[str, Any]:
    """The bound of a split. Of training images it takes as many as there are held-out images."""
    count = setup.n if split != "train" else setup.n or len(setup.images(setup.split))
    return evaluate.nll(
        setup.checkpoint, setup.images(split), setup.out / f"nll-{split}", setup.cache, setup.ranks, count, 1,
        setup.seed, setup.batch_size, setup.progress,
    )  # fmt: skip


def _rate_distortion(setup: Setup) -> dict[int, tuple[float, float]]:
    """From a level t to (what x_t costs in bits/dim, RMSE of its x0^ in grey levels); T comes first."""
    _nll(setup, setup.split)
    with (setup.out / f"nll-{setup.split}" / "nll.csv").open() as file:
        rows = csv.DictReader(file)
        return {int(row["t"]): (float(row["rate_bits_per_dim"]), float(row["rmse_grey_levels"])) for row in rows}


def _samples(setup: Setup, count: int) -> Samples:
    """The saved samples, or `count` new ones."""
    if setup.samples is not None:
        return read_samples(setup.samples, setup.checkpoint.preset)
    return quality.samples(
        setup.checkpoint, setup.cache, setup.ranks, count, setup.seed, setup.sampler, setup.steps, setup.batch_size,
        progress=setup.progress,
    )  # fmt: skip


def _quality(setup: Setup, names: Sequence[str]) -> dict[str, Any]:
    """The metrics of `names`, as `quality.quality` gives them; {} on all processes but the first."""
    network, training = setup.network(), setup.images("train")  # mistakes show before hours of sampling
    samples = _samples(setup, setup.n or 50_000)
    if setup.ranks.first and setup.samples is None:
        first = samples.batch(range(min(64, len(samples))))
        images.save(setup.out / "samples.png", images.grid(setup.sheet(first)))
    return quality.quality(names, samples, training, network, setup.cache, setup.ranks, setup.seed, setup.progress)


def _distance(scores: dict[str, Any]) -> str:
    """The name of the Frechet distance among the scores: fid only for the Inception network of 2015."""
    return "frechet_distance" if "frechet_distance" in scores else "fid"


def _scores(scores: dict[str, Any]) -> list[float | None]:
    """IS, its standard deviation and the Frechet distance; None for a score that is missing."""
    return [scores.get(name) for name in ("inception_score", "inception_score_std", _distance(scores))]


def _write_table(setup: Setup, name: str, header: Sequence[str], rows: Any, about: dict[str, Any]) -> None:
    """Write NAME.csv and NAME.json on the first process."""
    if setup.ranks.first:
        _write_csv(setup.out / f"{name}.csv", header, rows)
        atomic.write_json(setup.out / f"{name}.json", about)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a table: None as an empty cell, and a float with six digits."""
    cells = (["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)
    atomic.write_csv(path, header, cells)


def _write_picture(setup: Setup, name: str, tiles: Tensor, about: dict[str, Any]) -> None:
    """Write NAME.png, a grid of tiles [rows, columns, C, H, W], and NAME.json unless `about` is empty."""
    if setup.ranks.first:
        flat = setup.sheet(tiles.flatten(0, 1))
        images.save(setup.out / f"{name}.png", images.grid(flat, columns=tiles.shape[1]))
        if about:
            atomic.write_json(setup.out / f"{name}.json", about)
