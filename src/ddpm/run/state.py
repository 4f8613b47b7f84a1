"""What training changes: weights, their average and moments. A run saves them, resumes with them and spreads them.

A checkpoint holds no more than this: everything random in step n is a function of (seed, n).
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm import optimizers
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError, Stopped
from ddpm.files import checkpoints, data, tensors
from ddpm.files.checkpoints import CHECKPOINTS, SNAPSHOTS
from ddpm.files.models import Checkpoint
from ddpm.presets import Preset, build
from ddpm.run import ema, init, log, nodes
from ddpm.run.processes import Processes
from ddpm.schedule import Schedule


@dataclass
class Model:
    """The network, its moving average, and the optimizers of its weights; `step` counts updates.

    denoiser   with the network that is trained
    averaged   with the average of the weights
    schedule   on the CPU, where the noise levels of a batch are drawn
    teacher    the network of `init` as it was, if the run has a teacher; checkpoints hold it, too
    guide      the weaker model that guides the teacher, if there is one; checkpoints do not hold it
    seconds    of training so far
    saved      the step of the newest checkpoint
    resumed    the checkpoint that this process began with
    at_once    the most images that a process computes at once
    contents   a hash of the images that it is trained on, if some process of the run made it
    whole      whether weights, moments and average are those of one step, and not amid an update
    powers     the averages of `ema.TRACKED` by their names, if the run has snapshots
    """

    denoiser: Denoiser
    averaged: Denoiser
    schedule: Schedule
    network: nn.Module
    average: nn.Module
    teacher: nn.Module | None
    guide: Checkpoint | None
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    held_out_before: float | None = None
    saved: int = 0
    resumed: Path | None = None
    at_once: int = 0
    contents: str | None = None
    whole: bool = True
    powers: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights, self.average_weights = list(self.network.parameters()), list(self.average.parameters())

    def kinds(self) -> list[list[Tensor]]:
        """Weights, averages, moments, and weights of the teacher and its guide."""
        others = [self.teacher, self.guide and self.guide.denoiser.network]
        taught: list[Tensor] = [p for network in others if isinstance(network, nn.Module) for p in network.parameters()]
        own: list[list[Tensor]] = [list(self.weights), list(self.average_weights), *self.powers.values()]
        return [*own, list(self.moments().values()), taught]

    def moments(self) -> dict[str, Tensor]:
        """The moments of the optimizers by their names in optimizer.safetensors; none before the first step."""
        states = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        return {
            f"{key}.{name}": value
            for name, p in self.network.named_parameters()
            for key, value in states.get(p, {}).items()
            if key != "step"
        }

    def power_files(self) -> dict[str, dict[str, Tensor]]:
        """What a snapshot holds: the stem of a file -> the averages by the names of the weights."""
        names = [name for name, _ in self.network.named_parameters()]
        return {stem: dict(zip(names, power, strict=True)) for stem, power in self.powers.items()}


def new(preset: Preset, device: torch.device, guide: Checkpoint | None = None) -> Model:
    """A model of new weights, which depend on the seed."""
    torch.manual_seed(preset.seed)
    denoiser = build(preset)
    schedule = denoiser.schedule
    denoiser = denoiser.to(device)
    network = denoiser.network
    assert isinstance(network, nn.Module)
    average = copy.deepcopy(network).eval().requires_grad_(False)
    teacher = copy.deepcopy(average) if preset.teacher else None
    if guide is not None:  # at the noise levels of this run, which leaves out the last ones
        guide = replace(guide, denoiser=replace(guide.denoiser.to(device), schedule=schedule))
    found = optimizers.make(network, preset.optimizer, preset.lr)
    tracked = ema.TRACKED if preset.snapshot_every else ()
    powers = {stem: [p.detach().clone() for p in network.parameters()] for stem in tracked}
    return Model(
        denoiser, replace(denoiser, network=average), schedule, network, average, teacher, guide, found, powers=powers
    )


def begin_with(source: Checkpoint, model: Model, preset: Preset, ranks: Processes) -> None:
    """Make the weights of another model, where it is averaged their average, the first weights and their average."""
    state, lines = init.adapt(source, preset)
    for network in (model.network, model.average, *([model.teacher] if model.teacher else [])):
        network.load_state_dict(state)
    step = f"step {source.step:,}, " if source.step else ""
    log.say(ranks, f"begins with {preset.init} ({step}{source.weights}), at lr {preset.lr:g}")
    for line in lines:
        log.say(ranks, f"  {line}")


def check_same_guide(folder: Path | None, model: Model, preset: Preset) -> None:
    """Raise InputError if another model guided the run until the checkpoint `folder`."""
    if folder is not None and checkpoints.read_state(folder).get("guide") != (model.guide and model.guide.identity):
        raise InputError(f"guide {preset.guide!r}: another model guided the run so far; want that one, or another out")


def check_images(
    folder: Path | None, model: Model, preset: Preset, out: Path, images: data.Images, ranks: Processes
) -> None:
    """Raise InputError if the run saw other images until the checkpoint `folder`."""
    model.contents = images.contents if preset.verify else None
    if folder is None:
        return
    state = checkpoints.read_state(folder)
    if state["data"] != images.fingerprint:
        was = checkpoints.settings(out)
        if was and was.data == preset.data and preset.skip_bad:
            raise InputError(
                f"data {preset.data}: not the images that the run in {out} was trained on; with skip_bad, bad images "
                "are left out only if all are in memory; want the files and the cache_bytes of before, or another out"
            )
        raise InputError(
            f"data {preset.data}: not the images that the run in {out} was trained on, which came from "
            f"{was.data if was else 'elsewhere'}; want "
            "these, or another out"
        )
    known = state.get("contents")
    if model.contents is not None and known not in (None, model.contents):
        raise InputError(
            f"data {preset.data}: images of the same names and sizes as those of the run in {out}, but other contents; "
            "want those, or another out"
        )
    if model.contents is not None and known is None:
        log.say(ranks, f"{out} has no hash of its images yet, so nothing is compared; later starts with verify compare")
    model.contents = model.contents or known


def resume(model: Model, found: nodes.Found, out: Path) -> None:
    """Load the newest whole checkpoint, if the run has one. Raises InputError if all of them are damaged."""
    folder = found.folder
    if folder is None:
        if damaged := checkpoints.saved(out):
            raise InputError(f"out {out}: none of its checkpoints is whole; delete {damaged[0].parent} to start again")
        return
    state = checkpoints.read_state(folder)
    model.network.load_state_dict(tensors.read_tensors(folder / "raw.safetensors"))
    model.average.load_state_dict(tensors.read_tensors(folder / "ema.safetensors"))
    if model.teacher:
        model.teacher.load_state_dict(tensors.read_tensors(folder / "teacher.safetensors"))
    moments = tensors.read_tensors(folder / "optimizer.safetensors")
    optimizers.begin(model.optimizers, state["step"])
    for name, value in model.moments().items():
        value.copy_(moments[name])
    for stem, power in model.power_files().items():
        for name, value in tensors.read_tensors(folder / f"{stem}.safetensors").items():
            power[name].copy_(value)
    model.step, model.seconds, model.held_out_before = state["step"], state["seconds"], state["held_out_before"]
    model.saved = model.step
    model.resumed = folder


def spread(model: Model, preset: Preset, out: Path, found: nodes.Found, fingerprint: str, ranks: Processes) -> None:
    """Give all processes what the holder of the newest checkpoint has. Writers that lack this checkpoint save it."""
    holds, mine = ranks.rank == found.holder, None
    if holds:
        held_out = checkpoints.read_state(found.folder)["held_out"] if found.folder else None
        lines = [line for line in log.read(out / "metrics.jsonl") if line["step"] <= model.step] if model.step else []
        mine = [model.step, model.seconds, model.held_out_before, model.contents, held_out, lines]
    step, seconds, before, contents, held_out, lines = ranks.exchange(mine)[found.holder]
    if step and not holds:
        optimizers.begin(model.optimizers, step)
        model.step, model.seconds, model.held_out_before, model.contents = step, seconds, before, contents
    for value in (tensor for kind in model.kinds() for tensor in kind):
        sent = value.detach().contiguous()
        dist.broadcast(sent, found.holder)
        if sent.data_ptr() != value.data_ptr():
            value.detach().copy_(sent)
    model.saved = step
    has = found.folder is not None and int(found.folder.name) == step
    if step and ranks.writes and not has:
        save(model, preset, out, seconds, held_out, fingerprint)
        log.write(out / "metrics.jsonl", lines)
    ranks.exchange()


def save(model: Model, preset: Preset, out: Path, seconds: float, held_out: float | None, fingerprint: str) -> None:
    """Write a checkpoint, and delete those that `preset.keep` does not keep.

    Raises Stopped if the disk is full, or if the numbers are not finite.
    """
    state = {
        "step": model.step,
        "seconds": seconds,
        "held_out": held_out,
        "held_out_before": model.held_out_before,
        "data": fingerprint,
        "at_once": model.at_once,
        **({"contents": model.contents} if model.contents else {}),
        **({"guide": model.guide.identity} if model.guide else {}),
    }
    files = {
        "ema": model.average.state_dict(),
        "raw": model.network.state_dict(),
        "optimizer": model.moments(),
        **model.power_files(),
        **({"teacher": model.teacher.state_dict()} if model.teacher else {}),
    }
    folder = _write(model, preset, out, state, files, CHECKPOINTS)
    protected = {folder, *([model.resumed] if model.resumed else [])}
    checkpoints.prune(out, preset.keep, preset.keep_steps, protected)


def has_snapshot(step: int, preset: Preset) -> bool:
    """Whether a snapshot belongs to this step."""
    return bool(step and preset.snapshot_every) and (step % preset.snapshot_every == 0 or step == preset.steps)


def snapshot(model: Model, preset: Preset, out: Path) -> None:
    """Write RUN/snapshots/STEP, the power function averages of now. Raises Stopped as `save` does."""
    _write(model, preset, out, {"step": model.step}, model.power_files(), SNAPSHOTS)


def _write(
    model: Model, preset: Preset, out: Path, state: dict[str, Any], files: dict[str, dict[str, Tensor]], place: str
) -> Path:
    """`checkpoints.save`, whose errors end the run."""
    try:
        return checkpoints.save(out, preset, state, files, place)
    except FloatingPointError as error:
        raise NotFinite(f"step {model.step}: {error}", out) from error
    except OSError as error:
        last = checkpoints.newest(out) or "none"
        raise Stopped(
            f"step {model.step}: cannot save to {out}: {log.reason(error)}; the last whole checkpoint is {last}"
        ) from error


class NotFinite(Stopped):
    """The weights are not worth saving. `what` says which value is not finite, and `out` is the folder of the run."""

    def __init__(self, what: str, out: Path) -> None:
        super().__init__(
            f"{what}; the last good checkpoint is {checkpoints.newest(out) or 'none'}; "
            "try a lower lr, a longer warmup, grad_clip 1 or precision float32"
        )
