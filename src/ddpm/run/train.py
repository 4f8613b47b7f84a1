"""Algorithm 1, with all that a long run needs; read `train` from top to bottom.

Everything random in step n is a function of (seed, n), so nothing but weights and moments has to be saved.
"""

import copy
import errno
import importlib.util
import json
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ddpm import kernels, losses, noise, pixels, timesteps
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError, Stopped
from ddpm.files import atomic, checkpoints, data, images, tensors
from ddpm.presets import Preset, build, from_json, to_json
from ddpm.run import ema
from ddpm.run.device import compile_stages, pick_compile
from ddpm.run.processes import Processes, pick_precision, processes, threads
from ddpm.run.sample import generate, in_turn

BUCKETS = 10
HELD_OUT_SEED = 1 << 40  # far from the seeds of runs, so that held-out draws are the same in every run

# What a draw is for, so that no two come from the same generator.
_BATCH, _EPS, _DROPOUT = 1, 2, 3


@dataclass(frozen=True)
class Result:
    """What a finished or interrupted run came to; losses are held-out L_simple of the averaged weights."""

    step: int
    held_out_before: float | None
    held_out: float | None
    images_per_second: float | None
    interrupted: int | None  # the signal, where one ended the run


def train(preset: Preset, out: Path) -> Result:
    """Train `preset` into the run folder `out`, or go on with the run that is there, to step `preset.steps`.

    Raises InputError for settings, data or a device that cannot be used, and Stopped where the run cannot go on.
    """
    with ExitStack() as stack:
        ranks = stack.enter_context(processes(preset.device))
        preset = _settle(preset, out, ranks)
        at_once = preset.batch_size // (ranks.world * preset.accumulate)
        stack.enter_context(threads(at_once * math.prod(preset.size) * preset.width, ranks.device))
        train_set, held_out_set = data.load_pair(
            preset.data, preset.size, preset.channels,
            image_column=preset.image_column or None, label_column=preset.label_column or None,
            skip_bad=preset.skip_bad, progress=ranks.first,
        )  # fmt: skip
        preset = _named(preset, out, train_set)
        if ranks.first:
            _lock(out, stack)  # only now: a mistake in settings or data leaves no folder behind

        # The network, its average, and Adam.
        torch.manual_seed(preset.seed)
        denoiser = build(preset)
        schedule = denoiser.schedule  # stays on the CPU, where the levels of a batch are drawn
        denoiser = denoiser.to(ranks.device)
        network = denoiser.network
        assert isinstance(network, nn.Module)
        average = copy.deepcopy(network).eval().requires_grad_(False)
        weights, averaged = list(network.parameters()), list(average.parameters())
        adam = torch.optim.Adam(weights, lr=preset.lr, betas=(0.9, 0.999), eps=1e-8, fused=ranks.device.type != "mps")
        step, seconds, before = _resume(preset, out, train_set.fingerprint, network, average, adam)
        begun = step
        if step >= preset.steps:
            _say(ranks, f"{out} is trained to step {step} already; a larger --steps goes on")
            return Result(step, before, None, None, None)

        if pick_compile(preset.compile, ranks.device):
            compile_stages(network)
        model = network
        if ranks.world > 1:
            ids = [ranks.device.index] if ranks.device.type == "cuda" else None
            model = DistributedDataParallel(network, ids, broadcast_buffers=False, gradient_as_bucket_view=True)
        training = replace(denoiser, network=model)
        evaluating = replace(denoiser, network=average)
        objective = losses.LOSSES[preset.loss]
        parts = _parts(preset, ranks)

        log = stack.enter_context(_metrics(out, step, preset, ranks))
        _announce(preset, out, ranks, network, train_set, held_out_set, step)

        def evaluate(stop: Callable[[], bool] = lambda: False) -> float | None:
            """Held-out L_simple, written to the log; None where the run is to stop."""
            levels = held_out_by_level(evaluating, held_out_set, preset.eval_images, ranks, stop, preset.classes)
            if ranks.any(stop()):
                return None
            mean = float(torch.tensor(levels).nanmean())
            if not math.isfinite(mean):
                raise _not_finite(f"step {step}: the held-out loss is not finite", out)
            log(step, {"held_out": mean, "held_out_by_level": levels})
            return mean

        def save(held_out: float | None) -> None:
            watch.check(out, loss_sum)  # an image that cannot be read may come between a NaN and its report
            if not ranks.first or step == begun:  # nothing was learned that is not there
                return
            moments = {f"{key}.{n}": adam.state[p][key] for n, p in network.named_parameters() for key in _MOMENTS}
            state = {
                "step": step,
                "seconds": seconds + time.monotonic() - started,
                "held_out": held_out,
                "held_out_before": before,
                "data": train_set.fingerprint,
            }
            tensors = {"ema": average.state_dict(), "raw": network.state_dict(), "optimizer": moments}
            try:
                checkpoints.save(out, preset, state, tensors)
            except OSError as error:
                last = checkpoints.newest(out) or "none"
                raise Stopped(
                    f"step {step}: cannot save to {out}: {_reason(error)}; the last whole checkpoint is {last}"
                ) from error
            checkpoints.prune(out, preset.keep)

        if before is None:
            before = evaluate()
            assert before is not None
            _say(ranks, f"step 0: held-out L_simple {before:.4f}")
        network.train()
        started = logged_at = time.monotonic()
        loss_sum, loss_steps = torch.zeros((), device=ranks.device), 0
        rate, held_out, watch = None, None, _Watch(ranks.device)
        stream = data.batches(
            train_set, preset.seed, preset.batch_size, step, preset.steps,
            part=slice(parts[0].start, parts[-1].stop), workers=preset.workers, device=ranks.device,
        )  # fmt: skip
        draws = torch.Generator(ranks.device)
        bar = tqdm(total=preset.steps, initial=step, unit="step", disable=None if ranks.first else True)
        stack.callback(bar.close)
        stop = stack.enter_context(_signals())  # until here there is nothing to save

        for batch in _saving(stream, save):
            # Algorithm 1. The draws of the whole batch, then this process's parts of it. The noise is drawn on the
            # device; a CPU's generator takes 32 bits of the seed, so that of a million steps some share their noise:
            # with other images and levels, which does no harm.
            g = noise.generator(preset.seed, step, _BATCH)
            t = data.send(
                timesteps.sample(schedule, preset.batch_size, preset.timestep_sampling, g, preset.predict), ranks.device
            )
            flips = data.send(torch.rand(preset.batch_size, generator=g) < 0.5, ranks.device)
            draws.manual_seed(noise.mix(preset.seed, step, _EPS))
            eps = torch.randn(preset.batch_size, *preset.shape, generator=draws, device=ranks.device)
            y = _labels(train_set, preset, step, g, ranks) if preset.classes else None
            adam.param_groups[0]["lr"] = learning_rate(preset, step)
            for part in parts:
                x0 = batch[part.start - parts[0].start : part.stop - parts[0].start]
                if preset.flip:
                    x0 = torch.where(flips[part][:, None, None, None], x0.flip(-1), x0)
                x0 = pixels.to_signal(x0)
                torch.manual_seed(noise.mix(preset.seed, step, part.start, _DROPOUT))
                last = part is parts[-1]
                with nullcontext() if last or ranks.world == 1 else model.no_sync():  # type: ignore[operator]
                    loss = objective(training, x0, t[part], eps[part], None if y is None else y[part])
                    loss = (loss * losses.weight(denoiser, t[part], preset.weighting)).mean() / len(parts)
                    loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += loss.detach()
            loss_steps += 1
            norm = nn.utils.clip_grad_norm_(weights, preset.grad_clip or math.inf)
            watch.see(step, norm)
            if ranks.device.type == "cpu":
                watch.check(out, loss)
            adam.step()
            adam.zero_grad(set_to_none=True)
            ema.update(averaged, weights, ema.decay_at(step, preset.ema_decay, preset.ema_warmup))
            step += 1
            bar.update()

            done, ended = step == preset.steps, ranks.any(stop.signal is not None)
            saving = step % preset.save_every == 0 or done
            if step % preset.log_every == 0 or saving or ended:
                watch.check(out, loss)
                now = time.monotonic()
                rate = loss_steps * preset.batch_size / (now - logged_at)
                loss_mean = float(ranks.total((loss_sum / loss_steps).cpu())) / ranks.world
                line = {"loss": loss_mean, "lr": adam.param_groups[0]["lr"], "grad_norm": float(norm)}
                line |= {"images_per_second": rate, "seconds": seconds + now - started}
                log(step, line)
                bar.set_postfix_str(f"loss {loss_mean:.4f}, {rate:.1f} images/s")
                loss_sum.zero_()
                loss_steps, logged_at = 0, now
            if saving or ended:
                held_out = None if ended else evaluate(lambda: stop.signal is not None)
                save(held_out)
                ended = ended or ranks.any(stop.signal is not None)  # a signal during the evaluation
            if not ended and preset.sample_every and (step % preset.sample_every == 0 or done):
                mine = list(ranks.mine(preset.sample_count))
                classes = in_turn(range(len(preset.class_names)), mine)
                grid = generate(
                    evaluating, preset.shape, mine, "ddim", preset.sample_steps, device=ranks.device,
                    stop=lambda: stop.signal is not None, y=classes,
                )  # fmt: skip
                grid = ranks.interleave(grid, preset.sample_count)
                if not ranks.any(stop.signal is not None) and ranks.first:
                    (out / "samples").mkdir(exist_ok=True)
                    images.save(out / "samples" / f"{step:08d}.png", images.grid(grid.permute(0, 2, 3, 1).numpy()))
            if saving:
                logged_at = time.monotonic()  # evaluation and samples are not training time
            if ended:
                _say(ranks, f"stopped at step {step}, saved; the same command goes on")
                return Result(step, before, held_out, rate, stop.signal or signal.SIGTERM)

        if train_set.skipped:
            _say(ranks, f"images that could not be read and were passed over: {train_set.skipped:,}")
        return Result(step, before, held_out, rate, None)


def _saving(stream: Iterator[Tensor], save: Callable[[None], None]) -> Iterator[Tensor]:
    """The stream; where an image cannot be read, what was learned so far is saved before that is said."""
    try:
        yield from stream
    except InputError:
        save(None)
        raise


def learning_rate(preset: Preset, step: int) -> float:
    """That of update `step`, counted from 0: up from 0 over `warmup` steps, constant, down to 0 over the `cooldown`.

    cooldown 1 is a linear decay over the whole run (Defazio et al. 2023); a smaller one (warmup-stable-decay, Hu et al.
    2024) lets one run of a constant rate be gone on with, and only its end be done again for more steps.

    >>> from dataclasses import replace
    >>> from ddpm.presets import PRESETS
    >>> preset = replace(PRESETS["cifar10"], lr=1.0, steps=100, warmup=10, cooldown=0.5)
    >>> [learning_rate(preset, step) for step in (0, 5, 10, 50, 75, 99)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.02]
    """
    up = step / preset.warmup if preset.warmup else 1.0
    down = (preset.steps - step) / (preset.cooldown * preset.steps) if preset.cooldown else 1.0
    return preset.lr * min(1.0, up, down)


_MOMENTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
@kernels.frozen()
def held_out_by_level(
    denoiser: Denoiser, held_out: data.Images, most: int, ranks: Processes,
    stop: Callable[[], bool] = lambda: False, labelled: bool = False,
) -> list[float]:  # fmt: skip
    """L_simple of held-out images in BUCKETS equal ranges of t, lowest first; nan for a range that has no image,
    inf for one where a loss is not a number.

    Image i has a level and a noise of its own, the same in every run and on any number of processes. Where `stop`
    comes true it returns early, with the means of what it has. labelled: the network is told their labels.
    """
    n, T = min(most, len(held_out)), denoiser.schedule.T
    t = 1 + (torch.randperm(n, generator=noise.generator(HELD_OUT_SEED)) * T + T // 2) // n
    sums = torch.zeros(2, BUCKETS, dtype=torch.float64)
    mine = ranks.mine(n)
    for start in range(0, len(mine), 64):
        if stop():
            break
        rows = list(mine[start : start + 64])
        x0 = pixels.to_signal(held_out.batch(rows)).to(ranks.device)
        eps = noise.normal([noise.mix(HELD_OUT_SEED, i) for i in rows], x0.shape[1:]).to(ranks.device)
        y = None if held_out.labels is None or not labelled else held_out.labels[rows].to(ranks.device)
        loss = losses.simple(denoiser, x0, t[rows].to(ranks.device), eps, y).cpu().double()
        bucket = (t[rows] - 1) * BUCKETS // T
        sums[0].index_add_(0, bucket, loss.where(~loss.isnan(), math.inf))
        sums[1].index_add_(0, bucket, torch.ones_like(loss))
    total, count = ranks.total(sums)
    means: list[float] = (total / count).tolist()
    return means


def _named(preset: Preset, out: Path, train_set: data.Images) -> Preset:
    """The preset with the names of the classes, where it learns them; InputError where the images have no labels."""
    if not preset.classes:
        return preset
    names = train_set.class_names
    if names is None or train_set.labels is None:
        raise InputError(
            f"classes: {train_set.name} has no labels; want folders of classes, a column of labels, or --no-classes"
        )
    if preset.class_names not in ((), names):
        raise InputError(f"classes {', '.join(names)}: the run in {out} has {', '.join(preset.class_names)}")
    shown = set(train_set.labels.tolist())
    if unseen := [name for i, name in enumerate(names) if i not in shown]:
        warnings.warn(f"classes without a training image, which cannot be learned: {', '.join(unseen)}", stacklevel=2)
    return replace(preset, class_names=names)


def _labels(train_set: data.Images, preset: Preset, step: int, g: torch.Generator, ranks: Processes) -> Tensor:
    """The batch's classes, int64 [batch_size], some of them -1: not shown (Ho & Salimans 2022, Algorithm 1)."""
    assert train_set.labels is not None
    y = train_set.labels[data.order(len(train_set), preset.seed, step, preset.batch_size)]
    hidden = torch.rand(preset.batch_size, generator=g) < preset.label_dropout
    return data.send(y.masked_fill(hidden, -1), ranks.device)


def _parts(preset: Preset, ranks: Processes) -> list[slice]:
    """This process's parts of the global batch: one process with --accumulate 2 computes what two do with 1."""
    n = ranks.world * preset.accumulate
    if preset.batch_size % n:
        wanted = f"want a multiple of {n}, {ranks.world} processes x accumulate {preset.accumulate}"
        raise InputError(f"batch_size {preset.batch_size}: {wanted}")
    size = preset.batch_size // n
    first = ranks.rank * preset.accumulate
    return [slice(i * size, (i + 1) * size) for i in range(first, first + preset.accumulate)]


def _settle(preset: Preset, out: Path, ranks: Processes) -> Preset:
    """The preset to train with: a run that exists keeps its settings. InputError for what cannot be; writes nothing."""
    config = out / "config.json"
    if not preset.data:
        raise InputError("data: this preset names no data set; want --data SOURCE")
    _parts(preset, ranks)
    if config.is_file():
        try:
            old = from_json(json.loads(config.read_text()))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{config}: cannot be read ({error}); want another --out") from error
        if preset.precision == "auto":
            preset = replace(preset, precision=old.precision)
        preset = replace(preset, class_names=old.class_names)
        for f in fields(Preset):
            was, now = getattr(old, f.name), getattr(preset, f.name)
            moved = f.name == "data" and not os.path.exists(os.path.expanduser(was))  # the fingerprint decides later
            if was != now and not f.metadata["resume"] and not moved:
                raise InputError(
                    f"{f.name} {now!r}: the run in {out} has {was!r}; want the same settings, or another --out"
                )
    elif out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
        raise InputError(f"out {out}: exists and is not a run; want a new folder or a run to go on with")
    if preset.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard: not installed; want `pip install 'ddpm-kit[tensorboard]'`")
    return replace(preset, precision=pick_precision(preset.precision, ranks.device))


def _lock(out: Path, stack: ExitStack) -> None:
    """Make the run's folder and lock it until the end. Raises InputError if another process trains the run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(filelock.FileLock(out / ".lock").acquire(timeout=0))
    except filelock.Timeout:
        raise InputError(f"out {out}: another process is training this run; want another out") from None
    except OSError as error:
        raise InputError(f"out {out}: cannot be written ({_reason(error)})") from error


def _resume(
    preset: Preset, out: Path, fingerprint: str, network: nn.Module, average: nn.Module, adam: torch.optim.Optimizer
) -> tuple[int, float, float | None]:
    """Load the newest whole checkpoint, if there is one: (step, seconds, held-out loss at step 0)."""
    folder = checkpoints.newest(out)
    if folder is None:
        if there := checkpoints.saved(out):
            raise InputError(f"out {out}: none of its checkpoints is whole; delete {there[0].parent} to begin anew")
        return 0, 0.0, None
    state = checkpoints.read_state(folder)
    if state["data"] != fingerprint:
        was = json.loads((out / "config.json").read_text())["data"]
        raise InputError(
            f"data {preset.data}: not the images that the run in {out} was trained on, those that {was} held; want "
            "these, or another --out"
        )
    network.load_state_dict(tensors.read_tensors(folder / "raw.safetensors"))
    average.load_state_dict(tensors.read_tensors(folder / "ema.safetensors"))
    moments = tensors.read_tensors(folder / "optimizer.safetensors")
    for name, p in network.named_parameters():
        # as the weights lie in memory, which fused Adam wants
        adam.state[p] = {key: torch.empty_like(p).copy_(moments[f"{key}.{name}"]) for key in _MOMENTS}
        adam.state[p]["step"] = torch.tensor(float(state["step"]), device=p.device if p.is_cuda else "cpu")
    return state["step"], state["seconds"], state["held_out_before"]


class _Watch:
    """Whether every gradient so far was finite; the answer stays on the device until it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.first_bad = torch.full((), -1, device=device)

    def see(self, step: int, norm: Tensor) -> None:
        self.first_bad.masked_fill_((self.first_bad < 0) & ~norm.isfinite(), step)

    def check(self, out: Path, loss: Tensor) -> None:
        if (step := int(self.first_bad)) >= 0:
            raise _not_finite(f"step {step}: the gradient is not finite (loss {float(loss.detach()):.4g})", out)


def _not_finite(what: str, out: Path) -> Stopped:
    return Stopped(
        f"{what}; the last good checkpoint is {checkpoints.newest(out) or 'none'}; "
        "try a lower --lr, a longer --warmup, --grad-clip 1 or --precision float32"
    )


class _Stop:
    signal: int | None = None


@contextmanager
def _signals() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM set a flag that the loop reads after each step; a second Ctrl-C interrupts at once."""
    stop = _Stop()

    def handle(number: int, _: object) -> None:
        if stop.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.signal = number

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _metrics(out: Path, step: int, preset: Preset, ranks: Processes) -> Iterator[Any]:
    """config.json, and RUN/metrics.jsonl cut back to `step`; gives log(step, values)."""
    if not ranks.first:
        yield lambda *_: None
        return
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() and step else []
    kept = [line for line in lines if (found := _step_of(line)) is not None and found <= step]
    try:
        atomic.write_json(out / "config.json", to_json(preset))
        atomic.write(path, "".join(line + "\n" for line in kept))
    except OSError as error:
        raise Stopped(f"cannot write to {out}: {_reason(error)}") from error
    with path.open("ab", buffering=0) as file, _tensorboard(out, preset.tensorboard, step) as board:

        def log(step: int, values: dict[str, Any]) -> None:
            try:
                _write_line(file, {"step": step, **values})
            except OSError as error:
                raise Stopped(f"step {step}: cannot write {path}: {_reason(error)}") from error
            if board is not None:
                for name, value in values.items():
                    for i, one in enumerate(value if isinstance(value, list) else [value]):
                        board.add_scalar(f"{name}/{i}" if isinstance(value, list) else name, one, step)

        yield log


def _step_of(line: str) -> int | None:
    try:
        step: int = json.loads(line)["step"]
        return step
    except (ValueError, KeyError, TypeError):
        return None  # half a line, from a process that was killed


def _write_line(file: BinaryIO, values: dict[str, Any]) -> None:
    """One JSON object a line; nan and infinity, which JSON does not have, as null."""
    clean = json.loads(json.dumps(values), parse_constant=lambda _: None)
    line = memoryview((json.dumps(clean) + "\n").encode())
    while line:  # a disk with room for half a line writes that half first
        line = line[file.write(line) :]


def _tensorboard(out: Path, wanted: bool, step: int) -> AbstractContextManager[Any]:
    if not wanted:
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(out / "tensorboard", purge_step=step and step + 1)  # what comes after is done again


def _announce(
    preset: Preset, out: Path, ranks: Processes, network: nn.Module,
    train_set: data.Images, held_out: data.Images, step: int,
) -> None:  # fmt: skip
    """A line on what is about to happen, and the warning that a run is too short for its average."""
    size = sum(p.numel() for p in network.parameters())
    many = f" x {ranks.world} processes" if ranks.world > 1 else ""
    _say(
        ranks,
        f"{out}: {size:,} parameters, {len(train_set):,} images and {len(held_out):,} held out of {preset.data}, "
        f"{ranks.device}{many}, {preset.precision}, steps {step:,} to {preset.steps:,}",
    )
    left = preset.ema_decay**preset.steps
    if left > 0.01 and not preset.ema_warmup and ranks.first:
        warnings.warn(
            f"ema_decay {preset.ema_decay} averages over about {1 / (1 - preset.ema_decay):,.0f} steps; "
            f"after {preset.steps:,} steps {left:.0%} of the average is still the first weights, "
            "so its samples will look like noise: "
            "use --ema-warmup, a lower --ema-decay, or sample with --weights raw",
            stacklevel=2,
        )


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC or "No space left" in str(error) or "os error 28" in str(error):
        return "the disk is full"
    return error.strerror or str(error)


def _say(ranks: Processes, line: str) -> None:
    if ranks.first:
        tqdm.write(line, file=sys.stderr)
