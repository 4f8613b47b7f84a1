"""Algorithm 1, with what a long run needs: `train` reads from top to bottom.

Its step is in run/step.py. What a step changes, and a checkpoint holds, is in run/state.py.
"""

import copy
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm.errors import InputError, Stopped
from ddpm.files import atomic, checkpoints, data
from ddpm.files.checkpoints import SNAPSHOTS
from ddpm.noise import forked
from ddpm.presets import Preset, build
from ddpm.run import agree, forecast, init, log, nodes, partition, state, track
from ddpm.run.advice import advice, few_steps
from ddpm.run.group import Lost, shared
from ddpm.run.held_out import held_out_by_level
from ddpm.run.lock import lock
from ddpm.run.meter import Meter
from ddpm.run.pace import Pace, time_steps
from ddpm.run.previews import affordable, draw, grid_file, has_grid
from ddpm.run.processes import Processes, pick_precision, processes, threads
from ddpm.run.progress import Progress
from ddpm.run.signals import PREEMPTED, Stop, asking_to_stop, signal_of_all
from ddpm.run.step import Training, apply, for_training, update


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
    started = time.perf_counter()
    with ExitStack() as stack:
        ranks = stack.enter_context(processes(preset.device, timeout=60 * preset.timeout))
        stack.enter_context(forked(ranks.device))  # steps seed the global generators, which are the caller's
        with ranks.together():
            agree.settings(preset, minutes, ranks)
            found, before = nodes.find(out, ranks), checkpoints.saved(out)
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
            if checkpoints.saved(out) != before:
                raise InputError(f"out {out}: another process trained this run until now; want the same command again")

        model = state.new(preset, ranks.device, guide)
        model.at_once = most or at_once
        with ranks.together():
            state.check_images(found.folder, model, preset, out, train_set, ranks)
            state.check_same_guide(found.folder, model, preset)
            if ranks.rank == found.holder:
                state.resume(model, found, out)
        if source is not None:
            state.begin_with(source, model, preset, ranks)
        if ranks.world > 1:
            state.spread(model, preset, out, found, train_set.fingerprint, ranks)
        begun = model.step
        with ranks.together():
            if ranks.writes:
                (out / PREEMPTED).unlink(missing_ok=True)
                if state.has_snapshot(begun, preset) and checkpoints.damage(out / SNAPSHOTS / f"{begun:08d}"):
                    state.snapshot(model, preset, out)  # an earlier process ended between checkpoint and snapshot
        if begun and ranks.any(ranks.first and has_grid(begun, preset) and not grid_file(out, begun).exists()):
            size = preset.sample_count, preset.sample_steps  # an earlier process ended between checkpoint and grid
            draw(model.averaged, preset, out, begun, ranks, size, lambda: False, held_out_set)
        if minutes is not None and known:
            log.say(ranks, f"{out} exists and keeps its {preset.steps:,} steps: --minutes is for a new run")
        if begun >= preset.steps:
            log.say(ranks, f"{out} is trained to step {begun} already; steps above {begun} continue it")
            return Result(begun, model.held_out_before, None, None, None)
        training = for_training(model, preset, parts, train_set, ranks)
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
                raise state.NotFinite(f"step {model.step}: the held-out loss is not finite", out)
            write(model.step, {"held_out": mean, "held_out_by_level": levels})
            return mean

        def save(held_out: float | None, last: bool = False, alone: bool = False) -> None:
            """Save, and wait until all writers have; not the `last` time. `alone`: this process only."""
            watch.check(out, meter.total)  # a bad image may end the run between a NaN and its report
            if model.step > model.saved:  # else nothing new was learned
                if not alone:
                    agree.weights(model.kinds(), model.step, out, ranks)
                if ranks.writes or alone:
                    before = time.perf_counter()
                    state.save(model, preset, out, meter.seconds(), held_out, train_set.fingerprint)
                    if not model.saved and (late := forecast.late_save(time.perf_counter() - before)):
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
            loss, norm = update(training, preset, batch)
            meter.see(loss)
            watch.see(model.step, norm)
            if ranks.device.type == "cpu":
                watch.check(out, loss)
            apply(model, preset)
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
            if state.has_snapshot(model.step, preset):
                watch.check(out, loss)
                with meter.paused():
                    agree.weights(model.kinds(), model.step, out, ranks)
                    if ranks.writes:
                        state.snapshot(model, preset, out)
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


# -- how a run begins --------------------------------------------------------------------------------------------------


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
            count, calls = min(preset.sample_count, old.sample_count), min(preset.sample_steps, old.sample_steps)
            preset = replace(preset, steps=old.steps, warmup=old.warmup, sample_count=count, sample_steps=calls)
        for f in fields(Preset):
            was, now = getattr(old, f.name), getattr(preset, f.name)
            elsewhere = old is not found.own or not os.path.exists(os.path.expanduser(str(was)))
            moved = f.name in ("data", "pairs") and elsewhere  # the fingerprint decides later
            if was != now and not f.metadata["resume"] and not moved:
                raise InputError(f"{f.name} {now!r}: the run in {out} has {was!r}; want the same, or another out")
    used = out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir()))
    if found.own is None and used:
        raise InputError(f"out {out}: exists and is not a run; want a new folder, or a run to resume")
    for name in ("data", "pairs"):
        folder = data.folder_of(getattr(preset, name))
        if folder is not None and out.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"out {out}: lies in {name} {folder}, so its pictures would be images; want it elsewhere")
    track.check(preset.track)
    with torch.device("meta"):
        build(preset)  # a network or a schedule that cannot be is a mistake in the settings
    precision = ranks.exchange(pick_precision(preset.precision, ranks.device))[0]  # the first process decides
    return replace(preset, precision=precision)


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


def _ending_at(end: float, training: Training, preset: Preset, held_out_set: data.Images) -> Preset:
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
    left = end - time.perf_counter()
    model.network.train()
    step_seconds = time_steps(lambda: training.step(preset, next(stream)), min(max(2.0, left / 20), 60.0), ranks)
    for _ in range(2):  # the first call also compiles and fills caches
        begun = time.perf_counter()
        held_out_by_level(model.averaged, held_out_set, 16, ranks, preset)
        image_call = (time.perf_counter() - begun) / 16
    stream.close()
    model.network.load_state_dict(weights)
    model.average.load_state_dict(weights)
    for optimizer in model.optimizers:
        optimizer.state.clear()
    model.step = 0
    measured = torch.tensor([step_seconds, image_call, end - time.perf_counter()], dtype=torch.float64)
    step_seconds, image_call, left = ranks.total(measured * ranks.first).tolist()  # the first process decides
    if preset.sample_every:
        count, calls = affordable(preset, left / 10, image_call)
        preset = replace(preset, sample_count=max(1, count), sample_steps=calls)
    steps = forecast.costs(preset, model.network, step_seconds, image_call).steps_in(preset, left)
    return replace(preset, steps=steps, warmup=min(preset.warmup, steps // 10))


def _announce(
    preset: Preset, out: Path, ranks: Processes, model: state.Model, train_set: data.Images, held_out: data.Images,
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


# -- how a run ends ----------------------------------------------------------------------------------------------------


class _Watch:
    """Whether every gradient so far was finite. The answer stays on the device until somebody asks for it."""

    def __init__(self, device: torch.device) -> None:
        self.first_bad = torch.full((), -1, device=device)

    def see(self, step: int, norm: Tensor) -> None:
        self.first_bad.masked_fill_((self.first_bad < 0) & ~norm.isfinite(), step)

    def check(self, out: Path, loss: Tensor) -> None:
        """Raise Stopped if a gradient was not finite."""
        if (step := int(self.first_bad)) >= 0:
            raise state.NotFinite(f"step {step}: the gradient is not finite (loss {float(loss.detach()):.4g})", out)


@contextmanager
def _saving_at_the_end(model: state.Model, out: Path, save: Callable[..., None], ranks: Processes) -> Iterator[None]:
    """If an exception ends the loop, save what was learned; a second Ctrl-C ends it at once.

    Nothing is saved amid an update, or of weights that are not finite or differ. Then the last good checkpoint is
    named. Where a process is lost, the others save and say which one it is.
    """
    try:
        yield
    except (state.NotFinite, agree.Differ):
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


def _draw_last(
    model: state.Model, preset: Preset, out: Path, ranks: Processes, pace: Pace, stop: Stop, held_out: data.Images
) -> None:
    """Draw a picture of some seconds after Ctrl-C. The next Ctrl-C skips it."""
    size = pace.picture(most=20)
    if stop.signal == signal.SIGINT and preset.sample_every and size[0] and ranks.world == 1:
        log.say(ranks, f"drawing {grid_file(out, model.step)}; Ctrl-C skips it")
        with suppress(KeyboardInterrupt):
            draw(model.averaged, preset, out, model.step, ranks, size, lambda: stop.signal != signal.SIGINT, held_out)
