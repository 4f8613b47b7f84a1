"""A model that was read from disk, the place of its results, and the calibration beside its weights."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ddpm.catalog import Variance
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError, finite_number, parse_json, suggestion, whole_number
from ddpm.files import atomic
from ddpm.gaussian import calibrated_variance
from ddpm.pixels import EIGHT_BIT
from ddpm.presets import Preset
from ddpm.version import __version__

Weights = Literal["ema", "raw"]
MODELS = Path(__file__).parents[1] / "models"
"""The folder of the models that come with the package."""
CHECKOUT = Path(__file__).parents[3] / "models"
"""The folder of larger models, which a checkout of the source has."""


@dataclass(frozen=True)
class Average:
    """How `ddpm average` made the weights of a model. Raises InputError for values that cannot be.

    sigma_rel  the standard deviation of the average's profile, as a part of the steps until `step`
    step       the step at which it ends
    snapshots  of the run, from which it was made
    residual   the distance of its profile from the one of sigma_rel, relative to the latter (`run.ema.fit`)
    """

    sigma_rel: float
    step: int
    snapshots: int
    residual: float

    def __post_init__(self) -> None:
        for name in ("sigma_rel", "residual"):
            finite_number(name, getattr(self, name), 0, 1)
        for name in ("step", "snapshots"):
            whole_number(name, getattr(self, name), 1)

    def __str__(self) -> str:
        """In words.

        >>> print(Average(0.07, 2800, 28, 0.0004))
        sigma_rel 0.07 at step 2,800, from 28 snapshots, error 0.04%
        """
        return (
            f"sigma_rel {self.sigma_rel:g} at step {self.step:,}, from {self.snapshots:,} snapshots, error "
            f"{self.residual:.2%}"
        )


@dataclass(frozen=True)
class Checkpoint:
    """A model from disk.

    denoiser  in evaluation mode
    preset    its settings
    step      the training step of the weights; 0 if they come from another package
    weights   ema (the averaged weights) or raw
    path      the file of the weights, which a run in training may have deleted meanwhile
    name      of a third-party model or one that was opened by its name, which writes its results to ./ddpm-NAME
    foreign   whether its files are those of diffusers, which keep the settings apart from the weights
    identity  the hash that names these weights in results, calibrations and compressed files (`tensors.identity`)
    average   how `ddpm average` made the weights, if it did
    """

    denoiser: Denoiser
    preset: Preset
    step: int
    weights: str
    path: Path
    name: str = ""
    foreign: bool = False
    identity: str = ""
    average: Average | None = None

    @property
    def packaged(self) -> bool:
        """Whether the model comes with the package. Nothing is written to the package's folder."""
        return self.path.parent == MODELS

    @property
    def home(self) -> Path:
        """The folder for results: that of the run, or for a single file, the folder beside it of the same name.

        A model of the package, of hf:OWNER/NAME or of a diffusers folder writes to ./ddpm-NAME: from then on, ./NAME
        would be taken for a run.
        """
        path = self.path.absolute()
        if self.packaged or self.name:
            return Path(f"ddpm-{self.name or path.stem}")
        checkpoints = path.parent.parent
        in_run = checkpoints.name == "checkpoints" and (checkpoints.parent / "config.json").is_file()
        return checkpoints.parent if in_run else path.with_suffix("")

    def about(self) -> dict[str, Any]:
        """A description of the model for the files of its results, as plain JSON values."""
        variance = self.denoiser.variance
        return {
            "run": self.home.name, "step": self.step, "weights": self.weights, "identity": self.identity,
            "variance": variance if isinstance(variance, str) else "calibrated",
            "network_precision": self.preset.precision,
            "version": __version__,
            **({"average": asdict(self.average)} if self.average else {}),
        }  # fmt: skip


def without_condition(checkpoint: Checkpoint, what: str) -> Checkpoint:
    """The model itself. Raises InputError if it has a condition on an image, which `what` does not know."""
    if (condition := checkpoint.preset.condition) != "none":
        trained = f"was trained with condition {condition}, which {what} does not know"
        raise InputError(f"{checkpoint.path}: {trained}; want one without")
    return checkpoint


def calibration_file(weights: Path) -> Path:
    """The file of the calibration of a weights file."""
    return weights.with_name(f"{weights.stem}.calibration.json")


def save_calibration(checkpoint: Checkpoint, mse: Tensor, first: float, about: Mapping[str, Any]) -> Path:
    """Write a calibration beside the weights, and return its path.

    mse    mean squared error of x0^ at levels 1..T, float64 [T], signal units squared
    first  sigma_1^2
    about  what they were measured on, plain JSON values

    Raises InputError if the weights are gone.
    """
    if not checkpoint.path.is_file():  # else a folder would appear that looks like a damaged checkpoint
        raise InputError(f"{checkpoint.path}: the run deleted it meanwhile; want a larger keep, or the end")
    measured = {"first_variance": first, "mse": mse.tolist()}
    values = {**about, "weights": checkpoint.identity, "version": __version__, **measured}
    atomic.write_json(calibration_file(checkpoint.path), values)
    return calibration_file(checkpoint.path)


def read_calibration(checkpoint: Checkpoint) -> tuple[Tensor, float] | None:
    """mse, float64 [T], and sigma_1^2, as `save_calibration` wrote them for these weights; None if it did not.

    Raises InputError if the file is damaged or belongs to other weights.
    """
    file, T = calibration_file(checkpoint.path), checkpoint.denoiser.schedule.T
    again = "measure it again with `ddpm calibrate`"
    try:
        values = parse_json(file.read_bytes())
        mse, first = torch.tensor(values["mse"], dtype=torch.float64), float(values["first_variance"])
        weights = values["weights"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise InputError(f"{file}: damaged ({error}); {again}") from error
    if weights != checkpoint.identity:
        raise InputError(f"{file}: of other weights than {checkpoint.path.name}; {again}")
    if mse.shape != (T,) or not (mse.isfinite() & (mse > 0)).all() or not 0 < first < math.inf:
        raise InputError(f"{file}: want {T} positive numbers and one more; {again}")
    return mse, first


def calibration_remedy(checkpoint: Checkpoint, calibrate: str = "run `ddpm calibrate` on it first") -> str:
    """What to do about a missing calibration, for an error; `calibrate` says how to make one.

    A file that was sent around had its calibration beside it, and pictures were compressed with that one.
    """
    file, of_a_run = calibration_file(checkpoint.path), (checkpoint.path.parent / "state.json").exists()
    if checkpoint.foreign or of_a_run or file.exists():
        return calibrate
    name = checkpoint.path.name
    return f"fetch {file.name} from where {name} came from, and put it beside {name}; if none is there, {calibrate}"


def why_no_codec(checkpoint: Checkpoint) -> str | None:
    """Why the codec does not take this model, in a few words; None if it does.

    >>> from ddpm.files.opening import open_checkpoint
    >>> why_no_codec(open_checkpoint("digits")) is None
    True
    """
    preset, denoiser = checkpoint.preset, checkpoint.denoiser
    if preset.channels not in (1, 3) or denoiser.values != EIGHT_BIT:
        return f"its images are {denoiser.values}, {preset.channels} channels; the codec takes 8-bit grey and RGB"
    if preset.always_labelled:
        return "never saw an image without its label, and the codec sends no label; want another model"
    if preset.condition != "none":
        return f"was trained with condition {preset.condition}, and the codec sends none; want another model"
    if not denoiser.bound_follows_from_mse:
        return "cannot be calibrated; want eps, x0 or v and a fixed variance"
    if denoiser.schedule.alpha_bar[-1] == 0:
        return "its schedule ends at alpha_bar 0, which the codec does not take; want another model"
    return None


def codec_tables(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The codec's tables beside these weights, which compressed files need to be read; None if there are none."""
    try:
        values = parse_json(calibration_file(checkpoint.path).read_bytes())
        return values["codec"] if values["weights"] == checkpoint.identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def with_variance(checkpoint: Checkpoint, variance: str) -> Checkpoint:
    """The model with the sigma_t^2 fixed_large, fixed_small or calibrated (by `ddpm calibrate`).

    Raises InputError for another name, if no calibration lies beside the weights, and for a network that computes the
    variance itself.
    """
    accepted = ("fixed_large", "fixed_small", "calibrated")
    if variance not in accepted:
        raise InputError(f"variance {variance!r}: {suggestion(variance, accepted)}want {', '.join(accepted)}")
    if checkpoint.denoiser.learned:
        raise InputError(f"variance {variance}: the network of {checkpoint.path} gives its own")
    if variance == "calibrated" and checkpoint.denoiser.predict == "mu":
        raise InputError(f"variance calibrated: {checkpoint.path} predicts mu; want fixed_large or fixed_small")
    value: Variance | Tensor = cast(Variance, variance)
    if variance == "calibrated":
        measured = read_calibration(checkpoint)
        if measured is None:
            raise InputError(
                f"variance calibrated: {checkpoint.path} is not calibrated; {calibration_remedy(checkpoint)}"
            )
        value = calibrated_variance(checkpoint.denoiser.schedule, *measured)
    return replace(checkpoint, denoiser=replace(checkpoint.denoiser, variance=value))
