"""Algorithm 1, with what a long run needs: `train` reads from top to bottom, and `_update` is the algorithm's step.

Everything random in step n is a function of (seed, n), so a checkpoint holds only weights and moments.
"""

import copy
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm import float64, losses, noise, optimizers, pixels, timesteps, warp
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError, Stopped
from ddpm.files import atomic, checkpoints, data, tensors
from ddpm.files.checkpoints import CHECKPOINTS, SNAPSHOTS
from ddpm.files.models import Checkpoint
from ddpm.guidance import Guided
from ddpm.presets import Preset, build
from ddpm.run import agree, augment, conditioning, ema, forecast, init, log, nodes, partition, track
from ddpm.run.advice import advice, few_steps
from ddpm.run.device import Gradient, GraphedGradient, compile_stages, pick_compile
from ddpm.run.group import Lost, shared
from ddpm.run.held_out import held_out_by_level
from ddpm.run.lock import lock
from ddpm.run.meter import Meter
from ddpm.run.pace import Pace, time_steps
from ddpm.run.previews import affordable, draw, grid_file, has_grid
from ddpm.run.processes import Processes, pick_precision, processes, threads
from ddpm.run.progress import Progress
from ddpm.run.signals import PREEMPTED, Stop, asking_to_stop, signal_of_all
from ddpm.schedule import Schedule

# The purpose of a draw. It keeps the draws of one step apart.
_BATCH, _EPS, _DROPOUT, _WARP = 1, 2, 3, 5  # 4 is that of run/augment.py, and 6 of run/conditioning.py


@dataclass(frozen=True)
class Result:
    """The end of a run, finished or interrupted. Losses are held-out L_simple of the averaged weights."""

    step: int
    held_out_before: float | None
    held_out: float | None
    images_per_second: float | None
    interrupted: int | None  # the signal that ended the run, if one did


def train(
    preset: Preset,
    out: Path,
    minutes: float | None = None,
    images: data.Given | None = None,
    on_log: log.OnLog | None = None,
) -> Result:
    """Train `preset` into the run folder `out` up to step `preset.steps`, or resume the run in that folder.

    minutes  the time from now to the end of a new run. It takes the place of `preset.steps`: the speed of the first
             steps tells how many there are, and at most a tenth of them are warmup. config.json keeps both numbers.
             Then the run begins, an ordinary one. A run that exists keeps its steps
    images   images in memory, in the place of the SOURCE `preset.data`
    on_log   gets each new line of metrics.jsonl

    Raises InputError for settings, data or a device that cannot be used, and Stopped if the run cannot go on.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        ranks = stack.enter_context(processes(preset.device, timeout=60 * preset.timeout))
        devices = [ranks.device] if ranks.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))  # steps seed the global generators, which are the caller's
        with ranks.together():
            agree.settings(preset, minutes, ranks)
            found = nodes.find(out, ranks)
            preset = _check_settings(preset, out, found, ranks, minutes)
            source = init.source(preset) if preset.init and not found.saved else None
        known, old = found.settings is not None, found.settings
        # as much memory as before, whatever the number of processes
        most = found.at_once if old and old.accumulate == preset.accumulate else None
        parts = partition.parts(preset.batch_size, ranks.world, ranks.rank, preset.accumulate, most)
        at_once = partition.largest(preset.batch_size, ranks.world, preset.accumulate, most)
        stack.enter_context(threads(at_once * math.prod(preset.size) * preset.width, ranks.device))
        with ranks.together():
            train_set, held_out_set = _load(preset, images, ranks)
            preset = _with_class_names(preset, out, train_set, held_out_set)
            if not found.saved:
                init.check_teacher(source, preset)
            if preset.pixel_type == "float32":
                preset = replace(preset, value_range=(train_set.values.low, train_set.values.high))
            guide = init.guide_of(preset)
        agree.data(preset, train_set, held_out_set, ranks)
        with ranks.together():  # only now, so that a mistake in settings or data leaves no folder behind
            ranks = lock(out, ranks, stack)

        model = _build(preset, ranks.device, guide)
        model.at_once = most or at_once
        with ranks.together():
            _check_images(found.folder, model, preset, out, train_set, ranks)
            _check_guide(found.folder, model, preset)
            if ranks.rank == found.holder:
                _resume(model, found, out)
        if source is not None:
            _begin_with(source, model, preset, ranks)
        if ranks.world > 1:
            _spread(model, preset, out, found, train_set.fingerprint, ranks)
        begun = model.step
        with ranks.together():
            if ranks.writes:
                (out / PREEMPTED).unlink(missing_ok=True)
                if _has_snapshot(begun, preset) and checkpoints.damage(out / SNAPSHOTS / f"{begun:08d}"):
                    _snapshot(model, preset, out)  # an earlier process ended between checkpoint and snapshot
        if begun and ranks.any(ranks.first and has_grid(begun, preset) and not grid_file(out, begun).exists()):
            size = preset.sample_count, preset.sample_steps  # an earlier process ended between checkpoint and grid
            draw(model.averaged, preset, out, begun, ranks, size, lambda: False, held_out_set)
        if minutes is not None and known:
            log.say(ranks, f"{out} exists and keeps its {preset.steps:,} steps: --minutes is for a new run")
        if begun >= preset.steps:
            log.say(ranks, f"{out} is trained to step {begun} already; steps above {begun} continue it")
            return Result(begun, model.held_out_before, None, None, None)
        training = _for_training(model, preset, parts, train_set, ranks)
        warmup = preset.warmup
        if minutes is not None and not known:
            end = started + 60 * minutes
            preset = _ending_at(end, training, preset, held_out_set)
            if ranks.first and (hint := few_steps(preset)):
                warnings.warn(hint, stacklevel=2)
        write = stack.enter_context(log.metrics(out, begun, preset, ranks, on_log))
        log.write_held_out(out, held_out_set, ranks)
        _announce(preset, out, ranks, model, train_set, held_out_set, warmup)
        if len(parts) > preset.accumulate:
            log.say(
                ranks, f"each process accumulates {len(parts)} parts of at most {at_once} images, as many as before"
            )

        def evaluate(stop: Callable[[], bool] = lambda: False) -> float | None:
            """The held-out L_simple, which goes into the log; None if the run is to stop."""
            levels = held_out_by_level(model.averaged, held_out_set, preset.eval_images, ranks, preset, stop)
            if ranks.any(stop()):
                return None
            mean = float(torch.tensor(levels).nanmean())
            if not math.isfinite(mean):
                raise _not_finite(f"step {model.step}: the held-out loss is not finite", out)
            write(model.step, {"held_out": mean, "held_out_by_level": levels})
            return mean

        def save(held_out: float | None, last: bool = False, alone: bool = False) -> None:
            """Save, and wait until all writers have; not the `last` time. `alone`: this process only."""
            watch.check(out, meter.total)  # a bad image may end the run between a NaN and its report
            if model.step > model.saved:  # else nothing new was learned
                if not alone:
                    agree.weights(model.kinds(), model.step, out, ranks)
                if ranks.writes or alone:
                    before = time.monotonic()
                    _save(model, preset, out, meter.seconds(), held_out, train_set.fingerprint)
                    if not model.saved and (late := forecast.late_save(time.monotonic() - before)):
                        log.say(ranks, late)
                model.saved = model.step
                if not (last or alone):
                    ranks.exchange()
            pace.saved()

        if model.held_out_before is None:
            model.held_out_before = evaluate()
            log.say(ranks, f"step 0: held-out L_simple {model.held_out_before:.4f}")
        model.network.train()
        meter, watch, held_out = Meter(model.seconds, ranks, preset.batch_size), _Watch(ranks.device), None
        pace = Pace(preset, ranks, model.network)
        stream = data.batches(
            train_set, preset.seed, preset.batch_size, begun, preset.steps,
            part=training.mine, workers=preset.workers, device=ranks.device,
            say=lambda line: log.say(ranks, line),
        )  # fmt: skip
        bar = Progress[None](total=preset.steps, initial=begun, unit="step", desc="training", show=ranks.first)
        stack.callback(bar.close)
        stop = stack.enter_context(asking_to_stop(ranks.world > 1))  # before this line there is nothing to save
        stack.enter_context(_saving_at_the_end(model, out, save, ranks))

        for batch in meter.waiting(stream):
            loss, norm = _update(training, preset, batch)
            meter.see(loss)
            watch.see(model.step, norm)
            if ranks.device.type == "cpu":
                watch.check(out, loss)
            _apply(model, preset)
            bar.update()
            if ranks.group:
                ranks.group.step = model.step

            if pace.step(meter.left_out):
                log.say(ranks, f"step {model.step}: loss {float(loss):.4f}")
                log.say(ranks, forecast.describe(preset, out, pace.costs, model.network, model.step, ranks.device))

            done = model.step == preset.steps
            ended, timed, picture = pace.decide(stop.asked(), model.step < preset.sample_every)
            saving = model.step % preset.save_every == 0 or model.step in preset.keep_steps or done
            if model.step % preset.log_every == 0 or saving or ended:
                watch.check(out, loss)
                line = meter.line(model.optimizers[0].param_groups[0]["lr"], norm)
                write(model.step, line)
                if warning := meter.waits():
                    log.say(ranks, warning)
                waits = f", {line['data_wait']:.0%} waiting for data"
                bar.set_postfix_str(f"loss {line['loss']:.4f}, {line['images_per_second']:.1f} images/s{waits}")
            if _has_snapshot(model.step, preset):
                watch.check(out, loss)
                with meter.paused():
                    agree.weights(model.kinds(), model.step, out, ranks)
                    if ranks.writes:
                        _snapshot(model, preset, out)
                    ranks.exchange()
            with meter.paused():
                if saving or ended:
                    held_out = None if ended else evaluate(lambda: stop.signal is not None)
                    ended = ended or ranks.any(stop.asked())  # a signal during the evaluation
                    # L_simple measures means of images, which a consistency model leaves: no checkpoint is the best
                    save(None if preset.loss == "consistency" else held_out, last=ended)
                elif timed:
                    save(None)
                if has_grid(model.step, preset):
                    picture = preset.sample_count, preset.sample_steps
                if picture and not ended:
                    draw(
                        model.averaged, preset, out, model.step, ranks, picture, lambda: stop.signal is not None,
                        held_out_set,
                    )  # fmt: skip
            if ended:
                number = signal_of_all(stop, ranks)
                if ranks.writes and number != signal.SIGINT:
                    atomic.write_json(out / PREEMPTED, {"signal": signal.Signals(number).name, "step": model.step})
                log.say(ranks, f"stopped at step {model.step} and saved; the same command resumes the run")
                _draw_last(model, preset, out, ranks, pace, stop, held_out_set)
                return Result(model.step, model.held_out_before, held_out, meter.rate, number)

        if train_set.skipped:
            log.say(ranks, f"bad images that were skipped: {train_set.skipped:,}")
        return Result(model.step, model.held_out_before, held_out, meter.rate, None)


def _load(preset: Preset, images: data.Given | None, ranks: Processes) -> tuple[data.Images, data.Images]:
    """The images to train on and the held-out images, both with their pairs if the condition is `pairs`."""
    how: dict[str, Any] = {"verify": preset.verify, "progress": ranks.first}
    sets = data.load_pair(images or preset.data, preset.size, preset.channels, **how, **data.settings_of(preset))
    if preset.condition != "pairs":
        return sets
    source = preset.pairs or (images and images.pairs) or preset.data
    with data.settings_of_pairs(preset, sets[0]) as settings:
        others = data.load_pair(source, preset.size, preset.channels, **how, **settings)
    columns = preset.image_column, preset.pair_column
    return data.paired(sets[0], others[0], columns), data.paired(sets[1], others[1], columns)


# -- what training changes ---------------------------------------------------------------------------------------------


@dataclass
class _Model:
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


def _build(preset: Preset, device: torch.device, guide: Checkpoint | None = None) -> _Model:
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
    return _Model(
        denoiser, replace(denoiser, network=average), schedule, network, average, teacher, guide, found, powers=powers
    )


class _Training(NamedTuple):
    """What a training step runs.

    network   averages gradients over processes
    gradient  of the loss of a part
    parts     of the batch, those of this process
    images    whose labels the network is told, if it learns them
    draws     the generator of the noise
    """

    model: _Model
    network: nn.Module
    gradient: Gradient
    parts: list[slice]
    images: data.Images
    draws: torch.Generator
    ranks: Processes

    @property
    def mine(self) -> slice:
        """The images of a batch that this process takes."""
        return slice(self.parts[0].start, self.parts[-1].stop)

    def step(self, preset: Preset, batch: Tensor) -> Tensor:
        """Algorithm 1 for a batch of this process's images, pixels [b, C, H, W]: the loss before the update."""
        loss, _ = _update(self, preset, batch)
        _apply(self.model, preset)
        return loss


def _begin(preset: Preset, images: data.Images, ranks: Processes) -> _Training:
    """A new model and its training step without a run's files, for measurements of what `train` runs."""
    parts = partition.parts(preset.batch_size, ranks.world, ranks.rank, preset.accumulate)
    return _for_training(_build(preset, ranks.device), preset, parts, images, ranks)


def _told_of(denoiser: Denoiser, warps: Tensor | None) -> Denoiser:
    """The denoiser whose network is told how each image is warped. Guidance calls the network with each image twice."""
    if warps is None:
        return denoiser
    if isinstance(guided := denoiser.network, Guided):
        inner = _told_of(replace(denoiser, network=guided.network), warps)
        guide = guided.guide and partial(_told, guided.guide, warps)
        return replace(denoiser, network=replace(guided, network=inner.network, guide=guide))
    return replace(denoiser, network=partial(_told, denoiser.network, warps))


def _told(network: Callable[..., Tensor], warps: Tensor, x: Tensor, *args: Any, **condition: Any) -> Tensor:
    return network(x, *args, warp=warps.repeat(len(x) // len(warps), 1), **condition)


def _for_training(
    model: _Model, preset: Preset, parts: list[slice], images: data.Images, ranks: Processes
) -> _Training:  # fmt: skip
    """What a step runs. On a CUDA device it is compiled, and a step of one part in one process is a CUDA graph."""
    if pick_compile(preset.compile, ranks.device):
        compile_stages(model.network)
    network, on_cuda = model.network, ranks.device.type == "cuda"
    if ranks.world > 1:
        ids = [ranks.device.index] if on_cuda else None
        network = DistributedDataParallel(network, ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    denoiser, objective = replace(model.denoiser, network=network), losses.LOSSES[preset.loss]
    teacher = None if model.teacher is None else replace(model.denoiser, network=model.teacher)
    if teacher is not None and model.guide is not None:
        teacher = teacher.guided(preset.guide_scale, guide=model.guide.denoiser)
    elif teacher is not None and preset.guidance != 1:
        teacher = teacher.guided(preset.guidance)

    def gradient(
        x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None, warps: Tensor | None, condition: Tensor | None, *r: Tensor
    ) -> Tensor:
        by = {} if teacher is None else {"teacher": _told_of(teacher, warps).given(condition)}
        told = _told_of(denoiser, warps).given(condition)
        loss = objective(told, x0, t, eps, y, *r, **by) * losses.weight(denoiser, t, preset.weighting)
        loss = loss.mean() / partition.divisor(len(x0), preset.batch_size, ranks.world)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    training = _Training(model, network, gradient, parts, images, torch.Generator(ranks.device), ranks)
    if not on_cuda or preset.compile == "off":
        return training
    for reason, applies in (
        (f"{ranks.world} processes share the batch", ranks.world > 1),
        (f"a step has {len(parts)} parts", len(parts) > 1),
        ("gradient_checkpointing draws dropout twice", preset.gradient_checkpointing),
        ("loss consistency draws dropout twice", preset.loss == "consistency"),
    ):
        if applies:
            log.say(ranks, f"training runs without a CUDA graph: {reason}")
            return training
    return training._replace(gradient=GraphedGradient(gradient, model.weights, partial(log.say, ranks)))


def _begin_with(source: Checkpoint, model: _Model, preset: Preset, ranks: Processes) -> None:
    """Make the weights of another model, where it is averaged their average, the first weights and their average."""
    state, lines = init.adapt(source, preset)
    for network in (model.network, model.average, *([model.teacher] if model.teacher else [])):
        network.load_state_dict(state)
    step = f"step {source.step:,}, " if source.step else ""
    log.say(ranks, f"begins with {preset.init} ({step}{source.weights}), at lr {preset.lr:g}")
    for line in lines:
        log.say(ranks, f"  {line}")


def _check_guide(folder: Path | None, model: _Model, preset: Preset) -> None:
    """Raise InputError if another model guided the run until the checkpoint `folder`."""
    if folder is not None and checkpoints.read_state(folder).get("guide") != (model.guide and model.guide.identity):
        raise InputError(f"guide {preset.guide!r}: another model guided the run so far; want that one, or another out")


def _check_images(
    folder: Path | None, model: _Model, preset: Preset, out: Path, images: data.Images, ranks: Processes
) -> None:
    """Raise InputError if the run saw other images until the checkpoint `folder`."""
    model.contents = images.contents if preset.verify else None
    if folder is None:
        return
    state = checkpoints.read_state(folder)
    if state["data"] != images.fingerprint:
        was = checkpoints.settings(out)
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


def _resume(model: _Model, found: nodes.Found, out: Path) -> None:
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


def _spread(model: _Model, preset: Preset, out: Path, found: nodes.Found, fingerprint: str, ranks: Processes) -> None:
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
        _save(model, preset, out, seconds, held_out, fingerprint)
        log.write(out / "metrics.jsonl", lines)
    ranks.exchange()


def _save(model: _Model, preset: Preset, out: Path, seconds: float, held_out: float | None, fingerprint: str) -> None:
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


def _has_snapshot(step: int, preset: Preset) -> bool:
    """Whether a snapshot belongs to this step."""
    return bool(step and preset.snapshot_every) and (step % preset.snapshot_every == 0 or step == preset.steps)


def _snapshot(model: _Model, preset: Preset, out: Path) -> None:
    """Write RUN/snapshots/STEP, the power function averages of now. Raises Stopped as `_save` does."""
    _write(model, preset, out, {"step": model.step}, model.power_files(), SNAPSHOTS)


def _write(
    model: _Model, preset: Preset, out: Path, state: dict[str, Any], files: dict[str, dict[str, Tensor]], place: str
) -> Path:
    """`checkpoints.save`, whose errors end the run."""
    try:
        return checkpoints.save(out, preset, state, files, place)
    except FloatingPointError as error:
        raise _not_finite(f"step {model.step}: {error}", out) from error
    except OSError as error:
        last = checkpoints.newest(out) or "none"
        raise Stopped(
            f"step {model.step}: cannot save to {out}: {log.reason(error)}; the last whole checkpoint is {last}"
        ) from error


# -- a step ------------------------------------------------------------------------------------------------------------


def _update(training: _Training, preset: Preset, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1: draw t and eps of the whole batch, and leave the gradient of this process's parts.

    batch is this process's images, [b, C, H, W]. Returns the loss, this process's share of the batch's mean, and the
    norm of the gradient before clipping. The noise is drawn on the device. A CPU generator takes 32 bits of the seed,
    so a few of a million steps share their noise; they have other images and levels, so this does no harm.
    """
    model, parts, draws, ranks = training.model, training.parts, training.draws, training.ranks
    step = model.step
    g = noise.generator(preset.seed, step, _BATCH)
    t = timesteps.sample(model.schedule, preset.batch_size, preset.timestep_sampling, g, preset.predict)
    lower = [timesteps.lower(model.schedule, t, 1 + step // preset.gap_steps)] if preset.loss == "consistency" else []
    t, lower = data.send(t, ranks.device), [data.send(r, ranks.device) for r in lower]
    flips = data.send(torch.rand(preset.batch_size, generator=g) < 0.5, ranks.device)
    turns = data.send(augment.draw(preset, step), ranks.device) if preset.turn or preset.mirror else None
    draws.manual_seed(noise.mix(preset.seed, step, _EPS))
    eps = torch.randn(preset.batch_size, *preset.shape, generator=draws, device=ranks.device)
    y = _labels(training.images, preset, step, g, ranks) if preset.classes else None
    mine = training.mine
    images = pixels.to_signal(batch, model.denoiser.values)
    warps = _warps(preset, step, ranks) if preset.augment else None
    if preset.flip and warps is None:
        images = torch.where(flips[mine][:, None, None, None], images.flip(-1), images)
    if turns is not None:
        images = augment.apply(images, turns[:, mine])
    if warps is not None:
        images = warp.apply(images, warps[mine])
    images, condition = conditioning.of_batch(preset, images, step, mine)
    if preset.noise_assignment == "nearest":
        eps = eps[_nearest(images, eps, mine, [y, warps], ranks)]
    loss = torch.zeros((), device=ranks.device)
    for part in parts:
        own = slice(part.start - mine.start, part.stop - mine.start)
        torch.manual_seed(noise.mix(preset.seed, step, part.start, _DROPOUT))
        last = part is parts[-1]
        with nullcontext() if last or ranks.world == 1 else training.network.no_sync():  # type: ignore[operator]
            told = [None if each is None else each[part] for each in (y, warps)]
            told.append(None if condition is None else condition[own])
            loss += training.gradient(images[own], t[part], eps[part], *told, *(r[part] for r in lower))
    return loss, nn.utils.clip_grad_norm_(model.weights, preset.grad_clip or math.inf)


def _warps(preset: Preset, step: int, ranks: Processes) -> Tensor:
    """The warps of a batch, float32 [batch_size, 9]."""
    g = noise.generator(preset.seed, step, _WARP)
    return data.send(warp.sample(preset.batch_size, preset.augment, preset.flip, g), ranks.device)


def _nearest(x0: Tensor, eps: Tensor, mine: slice, told: Sequence[Tensor | None], ranks: Processes) -> Tensor:
    """Which noise each image of the whole batch gets, by `noise.assign`. x0 holds this process's images, `mine`.

    told is what the network is told of the whole batch: labels and warps, or None for what it is not told.
    Each process computes the products of its images with all noises, and gets the others' rows of the table. The
    products are float64: their rounding depends on the number of processes, and must not decide.
    """
    product = torch.zeros(len(eps), len(eps), dtype=torch.float64)
    product[mine] = (float64.convert(x0.flatten(1)) @ float64.convert(eps.flatten(1)).T).cpu()
    known = [each.cpu().float().view(len(eps), -1) for each in told if each is not None]
    return noise.assign(ranks.total(product), torch.cat([torch.zeros(len(eps), 0), *known], dim=1)).to(eps.device)


def _apply(model: _Model, preset: Preset) -> None:
    """Update the weights and their average by the gradient, and count the step."""
    model.whole = False
    for optimizer in model.optimizers:
        optimizer.param_groups[0]["lr"] = learning_rate(preset, model.step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    decay = ema.decay_at(model.step, preset.ema_decay, preset.ema_warmup)
    ema.update(model.average_weights, model.weights, decay)
    for stem, power in model.powers.items():
        ema.update(power, model.weights, ema.power_decay(model.step, ema.TRACKED[stem]))
    model.step += 1
    model.whole = True


def _ending_at(end: float, training: _Training, preset: Preset, held_out_set: data.Images) -> Preset:
    """The preset with the number of steps that end at the time `end`.

    At most a tenth of the steps are warmup, and a grid takes at most a tenth of the time. The steps that are timed for
    this are taken back.
    """
    model, ranks = training.model, training.ranks
    weights = copy.deepcopy(model.network.state_dict())
    stream = data.batches(
        training.images, preset.seed, preset.batch_size, 0, 10**9,
        part=training.mine, workers=preset.workers, device=ranks.device,
    )  # fmt: skip
    left = end - time.monotonic()
    model.network.train()
    step_seconds = time_steps(lambda: training.step(preset, next(stream)), min(max(2.0, left / 20), 60.0), ranks)
    for _ in range(2):  # the first call also compiles and fills caches
        begun = time.monotonic()
        held_out_by_level(model.averaged, held_out_set, 16, ranks, preset)
        image_call = (time.monotonic() - begun) / 16
    stream.close()
    model.network.load_state_dict(weights)
    model.average.load_state_dict(weights)
    for optimizer in model.optimizers:
        optimizer.state.clear()
    model.step = 0
    measured = torch.tensor([step_seconds, image_call, end - time.monotonic()], dtype=torch.float64)
    step_seconds, image_call, left = ranks.total(measured * ranks.first).tolist()  # the first process decides
    if preset.sample_every:
        count, calls = affordable(preset, left / 10, image_call)
        preset = replace(preset, sample_count=max(1, count), sample_steps=calls)
    steps = forecast.costs(preset, model.network, step_seconds, image_call).steps_in(preset, left)
    return replace(preset, steps=steps, warmup=min(preset.warmup, steps // 10))


def _labels(train_set: data.Images, preset: Preset, step: int, g: torch.Generator, ranks: Processes) -> Tensor:
    """The labels of a batch, int64 [batch_size]; -1 hides one (Ho & Salimans 2022, Algorithm 1)."""
    assert train_set.labels is not None
    y = train_set.labels[train_set.order(preset.seed, step, preset.batch_size)]
    hidden = torch.rand(preset.batch_size, generator=g) < preset.label_dropout
    return data.send(y.masked_fill(hidden, -1), ranks.device)


def learning_rate(preset: Preset, step: int) -> float:
    """The learning rate of update `step`, counted from 0. It rises over `warmup` steps, and falls after `lr_ref_steps`
    and in the cooldown.

    cooldown 1 is a linear decay over the whole run (Defazio et al. 2023). A smaller one is warmup-stable-decay (Hu et
    al. 2024): a run of a constant rate can be resumed for more steps, and only its end is trained again. lr_ref_steps
    has no end: from that step on the rate is lr sqrt(lr_ref_steps / step) (Karras et al. 2024), whatever `steps` is.

    >>> from dataclasses import replace
    >>> from ddpm.presets import PRESETS
    >>> preset = replace(PRESETS["cifar10"], lr=1.0, steps=100, warmup=10, cooldown=0.5)
    >>> [learning_rate(preset, step) for step in (0, 5, 10, 50, 75, 99)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.02]
    >>> endless = replace(preset, cooldown=0.0, lr_ref_steps=100)
    >>> [learning_rate(endless, step) for step in (5, 10, 100, 400, 10_000)]
    [0.5, 1.0, 1.0, 0.5, 0.1]
    """
    up = step / preset.warmup if preset.warmup else 1.0
    down = (preset.steps - step) / (preset.cooldown * preset.steps) if preset.cooldown else 1.0
    late = max(1.0, step / preset.lr_ref_steps) if preset.lr_ref_steps else 1.0
    return preset.lr * min(1.0, up, down) / math.sqrt(late)


# -- pictures at the end, and numbers that are not finite --------------------------------------------------------------


def _draw_last(
    model: _Model, preset: Preset, out: Path, ranks: Processes, pace: Pace, stop: Stop, held_out: data.Images
) -> None:
    """Draw a picture of some seconds after Ctrl-C. The next Ctrl-C skips it."""
    size = pace.picture(most=20)
    if stop.signal == signal.SIGINT and preset.sample_every and size[0] and ranks.world == 1:
        log.say(ranks, f"drawing {grid_file(out, model.step)}; Ctrl-C skips it")
        with suppress(KeyboardInterrupt):
            draw(model.averaged, preset, out, model.step, ranks, size, lambda: stop.signal != signal.SIGINT, held_out)


class _Watch:
    """Whether every gradient so far was finite. The answer stays on the device until somebody asks for it."""

    def __init__(self, device: torch.device) -> None:
        self.first_bad = torch.full((), -1, device=device)

    def see(self, step: int, norm: Tensor) -> None:
        self.first_bad.masked_fill_((self.first_bad < 0) & ~norm.isfinite(), step)

    def check(self, out: Path, loss: Tensor) -> None:
        """Raise Stopped if a gradient was not finite."""
        if (step := int(self.first_bad)) >= 0:
            raise _not_finite(f"step {step}: the gradient is not finite (loss {float(loss.detach()):.4g})", out)


class _NotFinite(Stopped):
    """The weights are not worth saving."""


def _not_finite(what: str, out: Path) -> _NotFinite:
    return _NotFinite(
        f"{what}; the last good checkpoint is {checkpoints.newest(out) or 'none'}; "
        "try a lower lr, a longer warmup, grad_clip 1 or precision float32"
    )


# -- how a run begins and ends -----------------------------------------------------------------------------------------


def _check_settings(preset: Preset, out: Path, found: nodes.Found, ranks: Processes, minutes: float | None) -> Preset:
    """The preset to train with: it takes over from an existing run what was left open. Nothing is written.

    Raises InputError for settings that do not fit the run in `out`, or this machine.
    """
    if not preset.data:
        raise InputError("data: this preset names no dataset; want a SOURCE of images")
    partition.parts(preset.batch_size, ranks.world, ranks.rank, preset.accumulate)
    for old in filter(None, (found.own, found.settings)):
        if preset.precision == "auto":
            preset = replace(preset, precision=old.precision)
        if preset.pixel_type == old.pixel_type and not preset.value_range:
            preset = replace(preset, value_range=old.value_range)
        preset = replace(preset, class_names=old.class_names)
        if minutes is not None:
            preset = replace(preset, steps=old.steps, warmup=old.warmup)
        for f in fields(Preset):
            was, now = getattr(old, f.name), getattr(preset, f.name)
            elsewhere = old is not found.own or not os.path.exists(os.path.expanduser(str(was)))
            moved = f.name in ("data", "pairs") and elsewhere  # the fingerprint decides later
            if was != now and not f.metadata["resume"] and not moved:
                raise InputError(f"{f.name} {now!r}: the run in {out} has {was!r}; want the same, or another out")
    used = out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir()))
    if found.own is None and used:
        raise InputError(f"out {out}: exists and is not a run; want a new folder, or a run to resume")
    track.check(preset.track)
    with torch.device("meta"):
        build(preset)  # a network or a schedule that cannot be is a mistake in the settings
    precision = ranks.exchange(pick_precision(preset.precision, ranks.device))[0]  # the first process decides
    return replace(preset, precision=precision)


def _with_class_names(preset: Preset, out: Path, train_set: data.Images, held_out: data.Images) -> Preset:
    """The preset with the names of the dataset's classes, if it learns them."""
    if not preset.classes:
        return preset
    names = train_set.class_names
    if names is None or train_set.labels is None:
        raise InputError(
            f"classes: {train_set.name} has no labels; want a folder per class, a column of labels, or no classes"
        )
    if preset.class_names not in ((), names):
        raise InputError(f"classes {', '.join(names)}: the run in {out} has {', '.join(preset.class_names)}")
    if preset.label_dropout == 0 and held_out.labels is None:
        raise InputError(
            f"label_dropout 0: needs all labels, and the held-out {held_out.split} of {held_out.name} has "
            "none; want label_dropout above 0"
        )
    shown = set(train_set.labels.tolist())
    if unseen := [name for i, name in enumerate(names) if i not in shown]:
        warnings.warn(f"these classes have no training image and cannot be learned: {', '.join(unseen)}", stacklevel=2)
    return replace(preset, class_names=names)


@contextmanager
def _saving_at_the_end(model: _Model, out: Path, save: Callable[..., None], ranks: Processes) -> Iterator[None]:
    """If an exception ends the loop, save what was learned; a second Ctrl-C ends it at once.

    Nothing is saved amid an update, or of weights that are not finite or differ. Then the last good checkpoint is
    named. Where a process is lost, the others save and say which one it is.
    """
    try:
        yield
    except (_NotFinite, agree.Differ):
        raise
    except Exception as error:
        lost = None
        try:
            cut = ranks.group is not None and ranks.group.cut(error)
            can = model.whole and not (cut and ranks.device.type == "cuda")  # its queue waits for the lost process
            if can and ranks.writes:
                save(None, alone=True)
            lost = error if isinstance(error, Lost) else ranks.group and ranks.group.explain(error)
            if can and lost and ranks.inherits:
                save(None, alone=True)
        except Stopped as stopped:
            raise (error if isinstance(error, Stopped) else stopped) from None
        except Exception as second:  # as of a device that is gone
            error.add_note(f"The state of step {model.step} could not be saved: {second}")
        if isinstance(lost, Lost):
            saved = f"step {model.saved} is saved" if model.saved else "nothing was saved yet"
            raise shared(
                Lost(f"{lost}; {saved}, and the same command goes on"), getattr(lost, "shared", True)
            ) from error
        if model.saved < model.step or not model.whole:
            error.add_note(f"The last good checkpoint is {checkpoints.newest(out) or 'none'}.")
        raise


def _announce(
    preset: Preset, out: Path, ranks: Processes, model: _Model, train_set: data.Images, held_out: data.Images,
    warmup: int,
) -> None:  # fmt: skip
    """Say what is about to be trained, and warn of settings that will disappoint. `warmup` is what was asked for."""
    size = sum(p.numel() for p in model.weights)
    shortened = f", warmup {preset.warmup:,} in place of {warmup:,}" if preset.warmup != warmup else ""
    several = f" x {ranks.world} processes" if ranks.world > 1 else ""
    log.say(ranks, data.describe(train_set, held_out))
    log.say(
        ranks,
        f"{out}: {size:,} parameters, {len(train_set):,} images and {len(held_out):,} held out of {preset.data}, "
        f"{ranks.device}{several}, {preset.precision}, steps {model.step:,} to {preset.steps:,}{shortened}",
    )
    if preset.snapshot_every:
        log.say(ranks, forecast.describe_snapshots(preset, model.network))
    if ranks.first:
        shortage = forecast.disk_shortage(preset, out, model.network, len(checkpoints.saved(out)), model.step)
        late = forecast.late_save(forecast.write_seconds(forecast.checkpoint_bytes(preset, model.network)))
        for line in (*advice(preset, model.schedule), *filter(None, [shortage, late])):
            warnings.warn(line, stacklevel=2)
