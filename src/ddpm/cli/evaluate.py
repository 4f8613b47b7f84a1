"""`ddpm evaluate`."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddpm import catalog
from ddpm.cli.options import (
    MODEL,
    Commands,
    add_classes,
    add_clip,
    add_data,
    add_features,
    add_guide,
    add_model,
    add_sampler,
    check_features,
    check_numbers,
    check_sampler,
    command,
    feature_network,
    guided,
    importing,
    loader,
    number,
    open_model,
    out_folder,
)
from ddpm.errors import InputError, parse_json
from ddpm.presets import check

if TYPE_CHECKING:
    from ddpm.files import data, features

LIKELIHOODS = ("nll", "ode")
ODE_STEPS = 100


def add(commands: Commands) -> None:
    metrics = catalog.describe(catalog.metrics())
    parser = command(
        commands, "evaluate", run, "measure bits per dimension and sample quality",
        f"Measure a model by these metrics:\n\n{metrics}\n\nnll and ode measure held-out images. psnr and ssim compare "
        "samples of a model with a condition with the held-out images that the conditions are made of. The others "
        "compare samples, as they are saved, with the training images. After a stop, the same command takes over the "
        "samples and the batches of nll, psnr and ssim that were finished.",
        "ddpm evaluate digits --metrics nll --levels-per-image 20",
    )  # fmt: skip
    parser.add_argument("run", metavar="MODEL", help=MODEL)
    group = parser.add_argument_group("measurement", "what is measured, and how exactly")
    metric = "metrics of the table above, one or more (default: nll)"
    group.add_argument("--metrics", nargs="+", default=["nll"], metavar="NAME", help=metric)
    count = "number of images for nll, ode, psnr and ssim (default: all), or of samples for the others (default: 50000)"
    group.add_argument("-n", **number(int, None), help=count)
    folder = "folder for results and finished parts (default: RUN/evaluate/STEP-WEIGHTS, and RUN/cache for the parts)"
    group.add_argument("--out", metavar="FOLDER", help=folder)
    levels = "estimate nll from N random noise levels per image, after 4 images at all levels (default: all levels)"
    group.add_argument("--levels-per-image", **number(int, None), help=levels)
    draws = "number of noise draws per level for nll (default: %(default)s)"
    group.add_argument("--draws", **number(int, 1), help=draws)
    steps = "number of noise levels that the solver of ode visits (default: %(default)s)"
    group.add_argument("--ode-steps", **number(int, ODE_STEPS), help=steps)
    add_data(parser)
    features = add_features(parser)
    reference = (
        "compare the samples with this .npz file in place of the training images; it holds features, or mu and sigma "
        "as pytorch-fid, clean-fid, torch-fidelity and guided-diffusion write them"
    )
    features.add_argument("--reference", metavar="FILE", help=reference)
    add_classes(parser)
    add_clip(sampler := add_sampler(parser))
    add_guide(sampler)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    for metric in args.metrics:
        check("--metrics", metric, Literal[tuple(catalog.metrics())])
    check_numbers(args, seed=0, batch_size=1, n=1, draws=1, ode_steps=2)
    fidelity = [metric for metric in args.metrics if metric in catalog.fidelity_metrics()]
    quality = [metric for metric in args.metrics if metric not in (*LIKELIHOODS, *fidelity)]
    _check_quality(args, quality)
    _check_sampling(args, bool(fidelity) or (bool(quality) and args.samples is None))

    with importing():
        from ddpm.run.processes import processes

    with processes(args.device, float64=True) as ranks:
        model, asked = open_model(args, ranks.device, conditional=True), guided(args, ranks.device)
        check_sampler(args, model.preset, model.denoiser.schedule.T)
        asked = asked.resolved(model)
        _check_likelihoods(args)
        denoiser, labels = asked.apply(model, sampling=bool(quality) and args.samples is None)
        # a class is that of samples; all other measurements have the labels of the images, and no guidance by a class
        alone = replace(asked, classes=(), guidance=None, guidance_interval=None) if asked.classes else asked
        plain = replace(model, denoiser=alone.apply(model, sampling=False)[0])
        model = replace(model, denoiser=denoiser)
        progress = ranks.first and not args.json
        given = {"labels": "of the images"} if model.preset.always_labelled else {}
        clip = {} if args.clip is None else {"clip": args.clip}
        results = _Results(
            out_folder(args, model.home / "evaluate" / f"{model.step:08d}-{model.weights}"),
            loader(args, model.preset, progress),
            {**model.about(), **given, **clip, "seed": args.seed},
            ranks.first,
        )
        cache = out_folder(args, model.home / "cache")
        _likelihoods(args, plain, results, cache, ranks, progress)
        if fidelity:
            _fidelity(args, fidelity, plain, alone.about(), results, cache, ranks, progress)
        if quality:
            _quality(args, quality, model, labels, asked.about(), results, cache, ranks, progress)
        if ranks.first:
            results.print(args)
    return 0


def _check_quality(args: argparse.Namespace, quality: list[str]) -> None:
    """Raise InputError for options of sample quality that have no effect or do not fit together."""
    names = ", ".join(catalog.quality_metrics())
    if args.classes and (args.samples is not None or not quality):
        raise InputError(f"--class {args.classes[0]}: needs one of --metrics {names}, without --samples")
    if args.guide is not None and args.samples is not None:
        raise InputError(f"--guide {args.guide}: not with --samples {args.samples}, which are made already")
    check_features(args)
    if args.n is not None and args.samples is not None and quality == args.metrics:
        raise InputError(f"-n {args.n}: not with --samples {args.samples}, of which all are scored")
    for name in ("samples", "features", "inception", "reference"):
        if not quality and getattr(args, name) is not None:
            raise InputError(f"--{name} {getattr(args, name)}: needs one of --metrics {names}")
    if args.reference is not None and _features_are_a_file(args):
        raise InputError(f"--reference {args.reference}: not with --features FILE.npz, which is the same; want one")
    if quality and _features_are_a_file(args) and args.samples is None:
        raise InputError(
            f"--features {args.features}: holds features of real images; want those of samples as --samples FILE.npz"
        )


def _check_sampling(args: argparse.Namespace, samples: bool) -> None:
    """Raise InputError for options of sampling where no `samples` are made."""
    for name in ("sampler", "steps", "spacing"):
        if not samples and (given := getattr(args, name)) is not None:
            raise InputError(f"--{name} {given}: no samples are made; want metrics of samples, without --samples")


def _check_likelihoods(args: argparse.Namespace) -> None:
    """Raise InputError for guidance in a measurement of bits/dim, except that of samples of a class."""
    known = [metric for metric in args.metrics if metric in LIKELIHOODS]
    if args.levels_per_image is not None and "nll" not in known:
        raise InputError(f"--levels-per-image {args.levels_per_image}: needs --metrics nll")
    if args.draws != 1 and ("nll" not in known or args.levels_per_image is not None):
        raise InputError(f"--draws {args.draws}: needs --metrics nll, without --levels-per-image")
    if args.ode_steps != ODE_STEPS and "ode" not in known:
        raise InputError(f"--ode-steps {args.ode_steps}: needs --metrics ode")
    for name in ("guidance", "guide"):
        if known and (given := getattr(args, name)) is not None and not (name == "guidance" and args.classes):
            raise InputError(f"--{name} {given}: not with --metrics {known[0]}, which is without guidance")


def _features_are_a_file(args: argparse.Namespace) -> bool:
    return args.features is not None and args.features.endswith(".npz")


@dataclass
class _Results:
    """The results so far. Each measurement has a file of its own, and so have its settings: no file is lost."""

    out: Path
    load: "Callable[[str], data.Images]"
    about: dict[str, Any]
    write: bool
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def images(self, split: str) -> dict[str, Any]:
        """Which images a measurement is asked for, as plain JSON values."""
        images = self.load(split)
        return {"data": images.name, "split": images.split, "fingerprint": images.fingerprint}

    def some(self, split: str, n: int | None) -> dict[str, Any]:
        """The same for `n` images of a split (None: all)."""
        size = len(self.load(split))
        return {**self.images(split), "count": min(n or size, size)}

    def stem(self, name: str, asked: dict[str, Any]) -> str:
        """`name`, or name-2, name-3 and so on if files before it hold what was measured with other settings."""
        now, number = json.loads(json.dumps({**self.about, **asked})), 1
        while True:
            stem = name if number == 1 else f"{name}-{number}"
            try:
                stored = parse_json((self.out / f"{stem}.json").read_bytes())
            except (OSError, ValueError):  # there is none, or it is damaged
                return stem
            if isinstance(stored, dict) and all(stored.get(key) == value for key, value in now.items()):
                return stem
            number += 1

    def keep(self, name: str, asked: dict[str, Any], values: dict[str, Any]) -> None:
        from ddpm.files import atomic

        self.done[name] = {**asked, **values}
        if self.write:
            atomic.write_json(self.out / f"{self.stem(name, asked)}.json", {**self.about, **self.done[name]})

    def print(self, args: argparse.Namespace) -> None:
        if not args.json:
            print("\n".join(self._table()))
            return
        bound = self.done.get("nll") or self.done.get("nll_sampled")
        bits = {"bits_per_dim": bound["bits_per_dim"]} if bound else {}
        scores = self.done.pop("quality", {})
        print(json.dumps({**self.about, **bits, **self.done, **scores}))

    def _table(self) -> Iterator[str]:
        """Lines for people: the model, the figures in columns, and where all results are."""
        from ddpm.run.export import figures

        about = self.about
        yield f"{about['run']}: step {about['step']:,}, {about['weights']}, variance {about['variance']}"
        rows = [row for values in self.done.values() for row in figures({**about, **values})]
        name, value = (max(len(row[k]) for row in rows) for k in (0, 1))
        yield from (f"  {row[0]:<{name}}  {row[1]:<{value}}  {row[2]}" for row in rows)
        yield f"written: {self.out}"


def _likelihoods(
    args: argparse.Namespace, model: Any, results: _Results, cache: Path, ranks: Any, progress: bool
) -> None:
    from ddpm.run import evaluate

    if not {"nll", "ode"} & set(args.metrics):
        return
    images, n, common = results.load(args.split), args.n, (args.seed, args.batch_size, progress)
    measured = results.some(args.split, n)
    if "nll" in args.metrics and args.levels_per_image is None:
        asked = {**measured, "draws": args.draws}
        stem = results.stem("nll", asked)
        values = evaluate.nll(model, images, results.out, cache, ranks, n, args.draws, *common, stem)
        results.keep("nll", asked, values)
    elif "nll" in args.metrics:
        values = evaluate.nll_sampled(model, images, args.levels_per_image, ranks, n, *common)
        results.keep("nll_sampled", {**measured, "levels_per_image": args.levels_per_image}, values)
    if "ode" in args.metrics:
        values = evaluate.ode(model, images, ranks, n, args.ode_steps, *common)
        results.keep("ode", {**measured, "steps": args.ode_steps}, values)


def _fidelity(
    args: argparse.Namespace, names: list[str], model: Any, asked: dict[str, Any],
    results: _Results, cache: Path, ranks: Any, progress: bool,
) -> None:  # fmt: skip
    from ddpm.run.fidelity import fidelity
    from ddpm.run.sample import describe_sampling, sampler_levels

    levels, images = sampler_levels(model, args.sampler, args.steps, args.spacing), results.load(args.split)
    values = fidelity(
        model, images, names, cache, ranks, args.n, args.seed, args.sampler, levels, args.batch_size, progress
    )
    how = describe_sampling(model.denoiser, args.sampler, levels, args.spacing)
    measured = results.some(args.split, args.n)
    results.keep("fidelity", {**measured, "metrics": names, **how, **asked}, values)


def _quality(
    args: argparse.Namespace, names: list[str], model: Any, labels: list[int], asked: dict[str, Any],
    results: _Results, cache: Path, ranks: Any, progress: bool,
) -> None:  # fmt: skip
    import torch

    from ddpm.run import quality
    from ddpm.run.parts import classes_of
    from ddpm.run.sample import describe_sampling, sampler_levels
    from ddpm.run.saved import Samples, read_samples

    samples = None if args.samples is None else Path(args.samples)
    file = args.features if _features_are_a_file(args) else args.reference
    if samples is not None and file is not None and quality.holds_features(samples):
        values = quality.quality_of_files(names, samples, Path(file), args.seed, ranks.device)
        results.keep("quality", {"metrics": names, "samples_from": args.samples, "reference": file}, values)
        return
    if _features_are_a_file(args):
        raise InputError(f"--samples {args.samples}: holds no features, which --features {args.features} wants")
    # mistakes show before hours of sampling
    network = feature_network(args, ranks.device, model.preset)
    real = results.load("train") if args.reference is None else _reference(names, Path(args.reference), network)
    if "is" in names:
        quality.check_network(network, torch.zeros(1, *model.preset.shape, dtype=model.denoiser.values.torch))
    if samples is not None:
        images: Samples = read_samples(samples, model.preset)
        source: dict[str, Any] = {"samples_from": args.samples}
    else:
        levels = sampler_levels(model, args.sampler, args.steps, args.spacing)
        held_out = None if model.preset.condition == "none" else results.load(args.split)
        if held_out is not None and labels and len(labels) == len(model.preset.class_names):  # those of the conditions
            labels = classes_of(model, held_out, range(len(held_out))).tolist()
        images = quality.samples(
            model, cache, ranks, args.n or 50_000, args.seed, args.sampler, levels, args.batch_size, progress, labels,
            held_out,
        )  # fmt: skip
        source = {**describe_sampling(model.denoiser, args.sampler, levels, args.spacing), **asked}
        source |= {} if held_out is None else {"conditions_of": held_out.split}
    values = quality.quality(names, images, real, network, cache, ranks, args.seed, progress)
    if ranks.first:
        source |= {"samples": len(images), "features": network.name, "features_weights": network.weights}
        against = results.images("train") if args.reference is None else {"reference": args.reference}
        results.keep("quality", {"metrics": names, **against, **source}, values)


def _reference(names: list[str], file: Path, network: "features.Network") -> "features.Measured":
    """The statistics or features of --reference. Raises InputError for those of another network."""
    from ddpm.files import features
    from ddpm.run.quality import check_reference

    reference = features.read_reference(
        file, {"network": network.name, "weights": network.weights, "resize": network.resize}
    )
    check_reference(names, reference)
    return reference
