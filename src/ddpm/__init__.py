"""Denoising Diffusion Probabilistic Models (Ho, Jain, Abbeel 2020): the whole paper, on PyTorch.

mathematics   pixels, noise, schedule, gaussian, denoiser, guidance, conditions, timesteps, losses, likelihood, ode,
              samplers, spacing, editing, restoration, metrics, unet
settings      presets: Preset, PRESETS, build; catalog: what can be chosen by name
training      train: a preset and images -> Run, with its model
files         load: a run folder or a checkpoint file -> Denoiser
codec         codec.compress, codec.decompress, codec.pictures; load_codec: a calibrated model -> codec.Model
programs      run.train, run.sample, run.evaluate, run.quality, run.calibrate, run.paper, run.edit, run.restore,
              run.report, run.compress, run.export; cli: the command line

A module loads when it is first used, so that `ddpm --help` does not wait for torch.

>>> import ddpm
>>> ddpm.schedule.linear().T
1000
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddpm import codec as codec
    from ddpm import conditions as conditions
    from ddpm import denoiser as denoiser
    from ddpm import editing as editing
    from ddpm import gaussian as gaussian
    from ddpm import guidance as guidance
    from ddpm import likelihood as likelihood
    from ddpm import losses as losses
    from ddpm import metrics as metrics
    from ddpm import noise as noise
    from ddpm import ode as ode
    from ddpm import pixels as pixels
    from ddpm import presets as presets
    from ddpm import restoration as restoration
    from ddpm import samplers as samplers
    from ddpm import schedule as schedule
    from ddpm import spacing as spacing
    from ddpm import timesteps as timesteps
    from ddpm import unet as unet
    from ddpm.denoiser import Denoiser as Denoiser
    from ddpm.denoiser import Estimate as Estimate
    from ddpm.errors import InputError as InputError
    from ddpm.files.opening import load as load
    from ddpm.gaussian import Gaussian as Gaussian
    from ddpm.presets import PRESETS as PRESETS
    from ddpm.presets import Preset as Preset
    from ddpm.presets import build as build
    from ddpm.run.compress import load_codec as load_codec
    from ddpm.run.start import Run as Run
    from ddpm.run.start import train as train
    from ddpm.schedule import Schedule as Schedule
    from ddpm.unet import UNet as UNet

from ddpm.version import __version__ as __version__

_MODULES = {
    "pixels", "noise", "schedule", "gaussian", "denoiser", "losses", "likelihood", "ode", "samplers", "spacing",
    "editing", "restoration", "metrics", "unet", "presets", "codec", "guidance", "conditions", "timesteps", "catalog",
}  # fmt: skip
_NAMES = {
    "Schedule": "schedule",
    "Gaussian": "gaussian",
    "Denoiser": "denoiser",
    "Estimate": "denoiser",
    "UNet": "unet",
    "Preset": "presets",
    "PRESETS": "presets",
    "build": "presets",
    "load": "files.opening",
    "load_codec": "run.compress",
    "train": "run.start",
    "Run": "run.start",
    "InputError": "errors",
}
__all__ = ["__version__", *sorted(_MODULES), *sorted(_NAMES)]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"ddpm.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"ddpm.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'ddpm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
