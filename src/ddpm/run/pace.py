"""What the clock decides while a run trains: checkpoints and pictures between the regular ones, and the forecast.

No weight, no random number and no line of the log depends on it.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import nn

from ddpm.presets import Preset
from ddpm.run import forecast
from ddpm.run.previews import affordable
from ddpm.run.processes import Processes

_UNTIMED = 2
"""Steps that are not timed, since they also compile and fill caches."""
_LEAST_STEPS, _LEAST_SECONDS = 3, 2.0
"""What is measured before the speed is known."""
_EARLY = 30.0
"""Seconds of training before the first early picture; each next one waits twice as long."""
_SHARE = 0.1
"""The share of the time so far that a picture may take."""


class Pace:
    """The clock of a run. It starts with the first step.

    step_seconds  of a training step; None until it is known
    """

    def __init__(self, preset: Preset, ranks: Processes, network: nn.Module) -> None:
        self._preset, self._ranks, self._network = preset, ranks, network
        self._began = self._saved = time.monotonic()
        self._steps, self._timed_from, self._early = 0, self._began, _EARLY
        self.step_seconds: float | None = None

    def step(self, left_out: float = 0.0) -> bool:
        """Count a step. Returns true once, when the speed becomes known.

        left_out  the seconds so far that were not of training steps
        """
        self._steps += 1
        if self.step_seconds is not None or self._steps < _UNTIMED:
            return False
        timed = self._steps - _UNTIMED
        if timed == 0:
            self._timed_from = _now(self._ranks) - left_out
        elif timed >= _LEAST_STEPS and time.monotonic() - left_out - self._timed_from >= _LEAST_SECONDS:
            self.step_seconds = (_now(self._ranks) - left_out - self._timed_from) / timed
            return True
        return False

    @property
    def costs(self) -> forecast.Costs:
        """The costs of the run's parts, once the speed is known. A step costs three calls of the network an image."""
        assert self.step_seconds is not None
        image_call = self.step_seconds / self._preset.batch_size / 3
        return forecast.costs(self._preset, self._network, self.step_seconds, image_call)

    def decide(self, stopped: bool, early: bool) -> tuple[bool, bool, tuple[int, int] | None]:
        """What all processes do after this step: end; save; and draw a picture of this size. The first one decides.

        stopped  whether this process was asked to stop; one is enough
        early    whether this is before the first regular picture
        """
        save, picture = self._save_due(), self._early_picture() if early else (0, 0)
        mine = [stopped, save, *picture] if self._ranks.first else [stopped, 0, 0, 0]
        ended, save, count, calls = self._ranks.total(torch.tensor(mine, dtype=torch.int64)).tolist()
        return bool(ended), bool(save), (count, calls) if count else None

    def saved(self) -> None:
        """Tell the clock of a checkpoint."""
        self._saved = time.monotonic()

    def picture(self, most: float = math.inf) -> tuple[int, int]:
        """Images, and calls for each, of a picture that takes a tenth of the time so far and at most `most` seconds."""
        if self.step_seconds is None:
            return 0, 0
        seconds = min(most, _SHARE * (time.monotonic() - self._began))
        return affordable(self._preset, seconds, self.costs.image_call)

    def _save_due(self) -> bool:
        return time.monotonic() - self._saved >= (60 * self._preset.save_minutes or math.inf)

    def _early_picture(self) -> tuple[int, int]:
        if time.monotonic() - self._began < self._early:
            return 0, 0
        self._early *= 2
        return self.picture()


def time_steps(step: Callable[[], object], seconds: float, ranks: Processes) -> float:
    """The seconds of a step: the mean of those that fit into `seconds`, and of at least three."""
    for _ in range(_UNTIMED):
        step()
    start, steps = _now(ranks), 0
    while True:
        step()
        steps += 1
        if ranks.any(ranks.first and steps >= _LEAST_STEPS and time.monotonic() - start >= seconds):
            return (_now(ranks) - start) / steps


def _now(ranks: Processes) -> float:
    """The time at which the device has done its work."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return time.monotonic()
