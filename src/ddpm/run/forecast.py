"""How long a run takes and what it needs, from its first measured steps; and the steps that fit into given minutes."""

import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ddpm import optimizers
from ddpm.presets import Preset


def snapshot_bytes(network: nn.Module) -> int:
    """The size of a snapshot: two averages of the weights, in float32."""
    return 8 * sum(p.numel() for p in network.parameters())


def checkpoint_bytes(preset: Preset, network: nn.Module) -> int:
    """The size of a checkpoint: weights, their average, and the optimizer's moments, all in float32; also the averages
    of snapshots and the teacher's weights, if the run has them."""
    kept, others = optimizers.moments(network, preset.optimizer), 2 + preset.teacher
    own = 4 * sum(p.numel() * (others + len(kept[name])) for name, p in network.named_parameters())
    return own + (snapshot_bytes(network) if preset.snapshot_every else 0)


def write_seconds(size: int) -> float:
    """A cautious guess of the time in which so many bytes are written and hashed: 150 MB/s."""
    return size / 150e6


def snapshots(preset: Preset, steps: int, last: bool = True) -> int:
    """The number of snapshots up to a step. If it is the `last` one of the run, it has one, too.

    >>> from dataclasses import replace
    >>> from ddpm.presets import PRESETS
    >>> preset = replace(PRESETS["digits"], snapshot_every=10)
    >>> snapshots(PRESETS["digits"], 25), snapshots(preset, 25), snapshots(preset, 25, last=False)
    (0, 3, 2)
    """
    every = preset.snapshot_every
    return steps // every + (last and steps % every > 0) if every else 0


GRACE = 30.0
"""Seconds that torchrun leaves its processes after SIGTERM, if nothing else is said."""


def late_save(seconds: float) -> str | None:
    """What is wrong with a checkpoint that takes so long, if torchrun started this process; None if it is in time.

    >>> late_save(2.0) is None
    True
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or seconds < 0.8 * GRACE:
        return None
    return (
        f"a checkpoint takes about {duration(seconds)}, but torchrun kills its processes {GRACE:.0f} seconds after "
        f"SIGTERM; want torchrun --shutdown-timeout {math.ceil(2 * seconds)}, and as much from the scheduler, or the "
        "steps since the last checkpoint are lost"
    )


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a run.

    step        a training step
    image_call  a call of the network for one image, in sampling and evaluation
    save        writing a checkpoint
    snapshot    writing a snapshot
    """

    step: float
    image_call: float
    save: float
    snapshot: float = 0.0

    def seconds(self, preset: Preset, begun: int, steps: int) -> float:
        """The time from step `begun` to step `steps`, with evaluations, checkpoints, snapshots and grids.

        >>> from dataclasses import replace
        >>> from ddpm.presets import PRESETS
        >>> preset = replace(PRESETS["cifar10"], save_every=10, sample_every=0, eval_images=5)
        >>> Costs(step=2, image_call=1, save=3).seconds(preset, 0, 25)  # 3 times an evaluation and a save, and step 0
        79.0
        """
        evaluation, grid = preset.eval_images * self.image_call, preset.sample_count * preset.sample_steps
        saves = -(-steps // preset.save_every) - begun // preset.save_every
        grids = -(-steps // preset.sample_every) - begun // preset.sample_every if preset.sample_every else 0
        at_start = 0.0 if begun else evaluation
        work = (steps - begun) * self.step + saves * (evaluation + self.save) + grids * grid * self.image_call
        averages = (snapshots(preset, steps) - snapshots(preset, begun, last=False)) * self.snapshot
        return float(at_start + work + averages)

    def steps_in(self, preset: Preset, seconds: float) -> int:
        """The most steps of a new run that take at most `seconds`, and at least 1.

        >>> from dataclasses import replace
        >>> from ddpm.presets import PRESETS
        >>> preset = replace(PRESETS["cifar10"], save_every=10, sample_every=0, eval_images=5)
        >>> Costs(step=2, image_call=1, save=3).steps_in(preset, 79)
        25
        """
        low, high = 1, max(2, int(seconds / self.step) + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.seconds(preset, 0, middle) <= seconds else (low, middle)
        return low


def costs(preset: Preset, network: nn.Module, step: float, image_call: float) -> Costs:
    """The costs of a run by the measured seconds of a step and of an image's call, and the sizes of the files."""
    files = checkpoint_bytes(preset, network), snapshot_bytes(network)
    return Costs(step, image_call, *map(write_seconds, files))


class SamplingForecast:
    """Says on stderr how long sampling takes, once, if it takes minutes. It is called after each step of a batch.

    n      images in all
    steps  noise levels for each image
    calls  network calls for each image
    """

    LEAST = 180.0
    """Seconds from which it is worth a line."""
    QUICK = 20
    """Steps of unipc, which make good images of most models (docs/samplers.md)."""

    def __init__(self, n: int, steps: int, calls: int) -> None:
        self._n, self._steps, self._calls = n, steps, calls
        self._left, self._timed, self._number, self._from, self._said = n * steps, 0, 0, 0.0, False

    def __call__(self, images: int) -> None:
        """Count a step of a batch of so many images."""
        self._left -= images
        self._number += 1
        if self._number == 1:  # it also fills caches
            self._from = time.monotonic()
            return
        self._timed += images
        passed = time.monotonic() - self._from
        if self._said or passed < 2 or (self._number < 4 and passed < 10):
            return
        self._said = True
        step = passed / self._timed
        if (left := step * self._left) >= self.LEAST:
            quick = step * self._n * self._steps / self._calls * self.QUICK
            hint = f"; --sampler unipc --steps {self.QUICK} takes about {duration(quick)}"
            hint = hint if self._calls >= 2 * self.QUICK else ""
            tqdm.write(f"forecast: sampling takes about {duration(left)}{hint}", file=sys.stderr)


def describe(preset: Preset, out: Path, costs: Costs, network: nn.Module, step: int, device: torch.device) -> str:
    """One line for the screen: speed, time, memory and disk. `step` is the run's step now."""
    speed = f"{costs.step:.3g} s a step" if costs.step > 0.5 else f"{1 / costs.step:.3g} steps a second"
    left, memory = duration(costs.seconds(preset, step, preset.steps)), peak_memory(device)
    return (
        f"forecast: {speed}, {left} to step {preset.steps:,}; {f'{gib(memory)} of memory; ' if memory else ''}"
        f"checkpoints of {gib(checkpoint_bytes(preset, network))}, {gib(disk_bytes(preset, network))} in all, "
        f"{gib(free_bytes(out))} free"
    )


def describe_snapshots(preset: Preset, network: nn.Module) -> str:
    """One line for the screen about the snapshots of a run: their number and size."""
    count, size = snapshots(preset, preset.steps), snapshot_bytes(network)
    return f"snapshots: {count:,} x {gib(size)} = {gib(count * size)} of disk, which --keep does not delete"


def disk_shortage(preset: Preset, out: Path, network: nn.Module, saved: int, step: int) -> str | None:
    """What is wrong with the disk of a run at `step` that has `saved` checkpoints; None if it is large enough."""
    needed = disk_bytes(preset, network) - min(saved, preset.keep) * checkpoint_bytes(preset, network)
    needed -= snapshots(preset, step, last=False) * snapshot_bytes(network)
    if needed <= (free := free_bytes(out)):
        return None
    what, less = "checkpoints", "use a smaller keep"
    if preset.snapshot_every:
        what, less = "checkpoints and snapshots", "use a smaller keep or fewer snapshots"
    return f"the {what} of this run take {gib(needed)} more, but {gib(free)} are free in {out}; {less}"


def disk_bytes(preset: Preset, network: nn.Module) -> int:
    """What a run takes: the checkpoints that are kept, the best one, the one that is being written, and snapshots."""
    kept = preset.keep + 2 + len([step for step in preset.keep_steps if step])
    return kept * checkpoint_bytes(preset, network) + snapshots(preset, preset.steps) * snapshot_bytes(network)


def free_bytes(out: Path) -> int:
    """What is free on the disk of a folder."""
    return shutil.disk_usage(out).free


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had: of the device if that is a GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def duration(seconds: float) -> str:
    """A time in the unit that suits it.

    >>> duration(42), duration(600), duration(9000), duration(1e6)
    ('42 seconds', '10 minutes', '2.5 hours', '12 days')
    """
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def gib(count: float) -> str:
    """Bytes in MiB or GiB.

    >>> gib(3 * 2**20), gib(5 * 2**29)
    ('3 MiB', '2.5 GiB')
    """
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{max(1, count / 2**20):.0f} MiB"
