"""A model read from disk, where its results go, and the calibration that lies beside its weights."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ddpm.catalog import Variance
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import atomic
from ddpm.files.tensors import identity
from ddpm.gaussian import calibrated_variance
from ddpm.presets import Preset
from ddpm.version import __version__

Weights = Literal["ema", "raw"]
MODELS = Path(__file__).parents[1] / "models"
"""Where the models that come with the package lie."""


@dataclass(frozen=True)
class Checkpoint:
    """A model from disk: its denoiser in evaluation mode, what it was made from, and which weights these are."""

    denoiser: Denoiser
    preset: Preset
    step: int
    weights: str
    path: Path
    name: str = ""  # where it is another's: where its results go, ./ddpm-NAME
    foreign: bool = False  # of diffusers, whose settings lie in other files than the weights
    stored: Callable[[], Mapping[str, Tensor]] = dict  # reads the tensors as they are stored

    @property
    def packaged(self) -> bool:
        """Whether it came with the package, whose folder nothing is written to."""
        return self.path.parent == MODELS

    @property
    def home(self) -> Path:
        """Where results go: the run's folder; for a file that lies elsewhere, a folder of its name beside it.

        Those of the package's model NAME go to ./ddpm-NAME, since ./NAME would be taken for a run from then on, and so
        do those of hf:OWNER/NAME and of a folder of diffusers.
        """
        path = self.path.absolute()
        if self.packaged or self.name:
            return Path(f"ddpm-{self.name or path.stem}")
        checkpoints = path.parent.parent
        inside = checkpoints.name == "checkpoints" and (checkpoints.parent / "config.json").is_file()
        return checkpoints.parent if inside else path.with_suffix("")

    @functools.cached_property
    def identity(self) -> str:
        """What names these weights in results, calibrations and compressed files: `tensors.identity` of them."""
        return identity(self.stored())

    def about(self) -> dict[str, Any]:
        """What results of this model are of, as plain JSON values."""
        variance = self.denoiser.variance
        return {
            "run": self.home.name, "step": self.step, "weights": self.weights, "identity": self.identity,
            "variance": variance if isinstance(variance, str) else "calibrated",
            "network_precision": self.preset.precision,
            "version": __version__,
        }  # fmt: skip


def calibration_file(weights: Path) -> Path:
    """Where the calibration of a weights file is kept."""
    return weights.with_name(f"{weights.stem}.calibration.json")


def save_calibration(found: Checkpoint, mse: Tensor, first: float, about: Mapping[str, Any]) -> Path:
    """Keep mse_t, levels 1..T, float64 [T], sigma_1^2, and what they were measured on beside the weights."""
    measured = {"first_variance": first, "mse": mse.tolist()}
    values = {**about, "weights": found.identity, "version": __version__, **measured}
    atomic.write_json(calibration_file(found.path), values)
    return calibration_file(found.path)


def read_calibration(found: Checkpoint) -> tuple[Tensor, float] | None:
    """mse_t, float64 [T], and sigma_1^2 that `save_calibration` left for these weights; None where there is none.

    Raises InputError for a file that is damaged or of other weights.
    """
    file, T = calibration_file(found.path), found.denoiser.schedule.T
    again = "measure it again with `ddpm calibrate`"
    try:
        values = json.loads(file.read_bytes())
        mse, first = torch.tensor(values["mse"], dtype=torch.float64), float(values["first_variance"])
        weights = values["weights"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError(f"{file}: damaged ({error}); {again}") from error
    if weights != found.identity:
        raise InputError(f"{file}: of other weights than {found.path.name}; {again}")
    if mse.shape != (T,) or not (mse.isfinite() & (mse > 0)).all() or not 0 < first < math.inf:
        raise InputError(f"{file}: want {T} positive numbers and one more; {again}")
    return mse, first


def codec_tables(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The codec's tables beside these weights, which compressed files need to be read; None if there are none."""
    try:
        values = json.loads(calibration_file(checkpoint.path).read_bytes())
        return values["codec"] if values["weights"] == checkpoint.identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def with_variance(found: Checkpoint, variance: str) -> Checkpoint:
    """The model with sigma_t^2 fixed_large, fixed_small or calibrated, as `ddpm calibrate` left it beside the weights.

    Raises InputError for another name, where nothing was calibrated, and for a network that gives the variance itself.
    """
    accepted = ("fixed_large", "fixed_small", "calibrated")
    if variance not in accepted:
        raise InputError(f"variance {variance!r}: want {', '.join(accepted)}")
    if found.denoiser.learned:
        raise InputError(f"variance {variance}: the network of {found.path} gives its own")
    if variance == "calibrated" and found.denoiser.predict == "mu":
        raise InputError(f"variance calibrated: {found.path} predicts mu; want fixed_large or fixed_small")
    chosen: Variance | Tensor = cast(Variance, variance)
    if variance == "calibrated":
        measured = read_calibration(found)
        if measured is None:
            raise InputError(f"variance calibrated: {found.path} is not calibrated; run `ddpm calibrate` on it first")
        chosen = calibrated_variance(found.denoiser.schedule, *measured)
    return replace(found, denoiser=replace(found.denoiser, variance=chosen))
