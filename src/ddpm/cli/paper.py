"""`ddpm paper`."""

import argparse
import functools
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddpm import catalog
from ddpm.cli.options import (
    MODEL,
    Commands,
    add_data,
    add_features,
    add_model,
    add_sampler,
    check_model,
    check_numbers,
    check_sampler,
    command,
    feature_network,
    importing,
    loader,
    number,
    open_model,
    out_folder,
)
from ddpm.errors import InputError
from ddpm.presets import PRESETS, Preset, check

if TYPE_CHECKING:
    from ddpm.files.models import Checkpoint
    from ddpm.run import paper as experiments


def add(commands: Commands) -> None:
    names = catalog.experiments()
    parser = command(
        commands, "paper", run, "make the paper's tables and figures for a model",
        f"Make one or more of these:\n\n{catalog.describe(names)}\n\nEach writes NAME.csv or NAME.png, with the "
        "paper's numbers beside the model's, and NAME.json, which says what was measured.",
        "ddpm paper table4 fig5 fig8 --run digits",
    )  # fmt: skip
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one or more of {', '.join(names)}")
    group = parser.add_argument_group("experiment", "which model is measured, and where the results go")
    run_help = f"{MODEL}; for table2 also a preset. Under torchrun write --model"
    group.add_argument("--run", "--model", required=True, metavar="MODEL", help=run_help)
    group.add_argument("-n", **number(int, None), help="number of images or samples (default: as in the paper)")
    group.add_argument("--out", metavar="FOLDER", help="folder for the results (default: RUN/paper)")
    add_data(parser)
    add_features(parser)
    add_sampler(parser)
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    for name in args.names:
        check("NAME", name, Literal[tuple(catalog.experiments())])
    check_numbers(args, seed=0, batch_size=1, n=1)
    trains = [name for name in args.names if catalog.experiments()[name].settings.get("trains")]
    for name in trains:
        _check_trains(args, name)
    is_preset = args.names == trains and args.run in PRESETS and not Path(args.run).exists()

    with importing():
        from ddpm.run import paper
        from ddpm.run.processes import processes

    with processes(args.device, float64=True) as ranks:
        if is_preset:
            check_model(args)
            model, preset, out = None, PRESETS[args.run], Path(f"runs/{args.run}-paper")
        else:
            model = open_model(args, ranks.device)
            preset, out = model.preset, model.home / "paper"
            _check_labels(args, preset)
        out = out_folder(args, out)
        progress = ranks.first and not args.json
        setup = _Setups(args, preset, ranks, progress)
        for name in args.names:
            if name in trains:
                stopped = setup.train(name, preset, out)
                if stopped:
                    return 128 + stopped
            else:
                assert model is not None
                paper.EXPERIMENTS[name].function(setup(model, out, out_folder(args, model.home / "cache")))
            if progress:
                files = [p for p in sorted(out.glob(f"{name}*.*")) if p.suffix in (".csv", ".png")]
                print(f"{name}: {', '.join(map(str, files))}")
        if ranks.first and args.json:
            print(json.dumps({"out": str(out), "experiments": args.names}))
    return 0


def _check_trains(args: argparse.Namespace, name: str) -> None:
    """Raise InputError for options that an experiment which trains its own runs cannot use."""
    for option in ("samples", "steps", "variance", "checkpoint"):
        if getattr(args, option) not in (None, "last"):
            raise InputError(f"--{option} {getattr(args, option)}: not for {name}, which trains runs of its own")
    if args.spacing == "bound":
        raise InputError(f"--spacing bound: not for {name}, whose runs are not calibrated")


def _check_labels(args: argparse.Namespace, preset: Preset) -> None:
    """Raise InputError for an experiment that would call the network without a label, which it never saw."""
    from ddpm.run.paper import EXPERIMENTS

    for name in args.names if preset.always_labelled else ():
        made = EXPERIMENTS[name].unlabelled
        if made == "samples" and args.samples is None:
            raise InputError(f"{name}: {args.run} never saw an image without its label; want --samples FILE")
        if made == "pictures":
            raise InputError(f"{name}: {args.run} never saw an image without its label; want table4 or fig5")


class _Setups:
    """Makes the `Setup` of an experiment from the options. Images and the feature network are loaded once."""

    def __init__(self, args: argparse.Namespace, preset: Preset, ranks: Any, progress: bool) -> None:
        self.args, self.ranks, self.progress = args, ranks, progress
        self.load = loader(args, preset, progress)
        self.network = functools.cache(partial(feature_network, args, ranks.device, preset))

    def __call__(self, model: "Checkpoint", out: Path, cache: Path) -> "experiments.Setup":
        from ddpm.run.paper import Setup
        from ddpm.run.sample import sampler_levels

        args = self.args
        check_sampler(args, model.preset, model.denoiser.schedule.T)
        return Setup(
            model, self.load, out, cache, self.ranks, self.network,
            named_features=args.features is not None or args.inception is not None,
            split=args.split, n=args.n, samples=None if args.samples is None else Path(args.samples),
            sampler=args.sampler, steps=sampler_levels(model, args.sampler, args.steps, args.spacing),
            spacing=args.spacing, seed=args.seed, batch_size=args.batch_size, progress=self.progress,
        )  # fmt: skip

    def train(self, name: str, preset: Preset, out: Path) -> int:
        """Run an experiment that trains its own runs from a preset. Returns the signal that stopped it, or 0."""
        from ddpm.run import paper
        from ddpm.run.quality import check_network

        args = self.args
        base = replace(preset, data=args.data or preset.data, device=args.device)
        check_sampler(args, base, base.num_timesteps)  # mistakes show before the training, not after it
        check_network(self.network(), self.load("train").batch([0]))
        self.load(args.split)

        def setup(run: Path) -> "experiments.Setup":
            return self(open_model(args, self.ranks.device, run), run / "paper", run / "cache")

        stopped: int = paper.EXPERIMENTS[name].function(base, out, self.ranks, setup)
        return stopped
