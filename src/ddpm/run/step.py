"""A step of Algorithm 1: `update` makes its gradient, and `apply` changes the weights by it.

Everything random in step n is a function of (seed, n).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddpm import float64, losses, noise, pixels, timesteps, warp
from ddpm.denoiser import Denoiser
from ddpm.files import data
from ddpm.guidance import Guided
from ddpm.presets import Preset
from ddpm.run import augment, conditioning, ema, log, partition, state
from ddpm.run.device import Gradient, GraphedGradient, compile_stages, pick_compile
from ddpm.run.processes import Processes

# The purpose of a draw. It keeps the draws of one step apart.
_BATCH, _EPS, _DROPOUT, _WARP = 1, 2, 3, 5  # 4 is that of run/augment.py, and 6 of run/conditioning.py


class Training(NamedTuple):
    """What a training step runs.

    network   averages gradients over processes
    gradient  of the loss of a part
    parts     of the batch, those of this process
    images    whose labels the network is told, if it learns them
    draws     the generator of the noise
    """

    model: state.Model
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
        loss, _ = update(self, preset, batch)
        apply(self.model, preset)
        return loss


def begin(preset: Preset, images: data.Images, ranks: Processes) -> Training:
    """A new model and its training step without a run's files, for measurements of what `train` runs."""
    parts = partition.parts(preset.batch_size, ranks.world, ranks.rank, preset.accumulate)
    return for_training(state.new(preset, ranks.device), preset, parts, images, ranks)


def for_training(
    model: state.Model, preset: Preset, parts: list[slice], images: data.Images, ranks: Processes
) -> Training:  # fmt: skip
    """What a step runs. On a CUDA device it is compiled, and a step of one part in one process is a CUDA graph."""
    if pick_compile(preset.compile, ranks.device):
        compile_stages(model.network)
    network, on_cuda = model.network, ranks.device.type == "cuda"
    if ranks.world > 1:
        ids = [ranks.device.index] if on_cuda else None
        network = DistributedDataParallel(network, ids, broadcast_buffers=False, gradient_as_bucket_view=True)
        # Attributes end in the order in which they came. If DDP's reducer held the group last, it would wait for
        # gloo's threads while it keeps Python's lock. A thread needs the lock to let go of a tensor: a deadlock.
        vars(network)["ends_last"] = network.process_group
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

    training = Training(model, network, gradient, parts, images, torch.Generator(ranks.device), ranks)
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


def update(training: Training, preset: Preset, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1: draw t and eps of the whole batch, and leave the gradient of this process's parts.

    batch is this process's images, [b, C, H, W]. Returns the loss, this process's share of the batch's mean, and the
    norm of the gradient before clipping. The noise is drawn on the device. A CPU generator takes 32 bits of the seed,
    so a few of a million steps share their noise; they have other images and levels, so this does no harm.
    """
    model, parts, draws, ranks = training.model, training.parts, training.draws, training.ranks
    step = model.step
    g = noise.generator(preset.seed, step, _BATCH)
    t = timesteps.sample(model.schedule, preset.batch_size, preset.timestep_sampling, g, preset.predict)
    stage = min(timesteps.STAGES, 1 + step // preset.gap_steps)
    lower = [timesteps.lower(model.schedule, t, stage)] if preset.loss == "consistency" else []
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


def apply(model: state.Model, preset: Preset) -> None:
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


def _labels(train_set: data.Images, preset: Preset, step: int, g: torch.Generator, ranks: Processes) -> Tensor:
    """The labels of a batch, int64 [batch_size]; -1 hides one (Ho & Salimans 2022, Algorithm 1)."""
    assert train_set.labels is not None
    y = train_set.labels[train_set.order(preset.seed, step, preset.batch_size)]
    hidden = torch.rand(preset.batch_size, generator=g) < preset.label_dropout
    return data.send(y.masked_fill(hidden, -1), ranks.device)


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
