"""Begin a run with the weights of a model: which settings come from it, and how its weights fit other images.

What fits other images begins as close to the model as it can: an image of equal channels gives what the grey image
gave, and an unknown class gives what an image without a label gives.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import timesteps
from ddpm.errors import InputError
from ddpm.files import hub
from ddpm.files.models import Checkpoint
from ddpm.files.opening import open_checkpoint
from ddpm.pixels import values
from ddpm.presets import Preset
from ddpm.warp import NUMBERS

LR_SHARE = 0.5
"""The default learning rate is this share of what training from nothing has."""
DISTILL_LR = 0.4
"""The default learning rate of `ddpm distill` is this share of what another run of `--init` has."""
LAST_SIGMA = 80.0
"""The first network call of a distilled model is at this sqrt((1 - abar)/abar), or the highest that its model saw."""
_FREE = {"dropout", "variance", "clip", "loss", "weighting", "timestep_sampling", "noise_assignment", "last_sigma"}
_FREE |= {"attention_resolutions"}
"""Settings of the network and the diffusion that the weights do not depend on, or not by that name."""
_BOUND = [f.name for f in fields(Preset) if f.metadata["group"] in ("network", "diffusion") and f.name not in _FREE]


_LEVELS = ("predict", "schedule", "num_timesteps", "beta_1", "beta_T")
"""Settings that say what a network estimates at a level."""
_IMAGES = ("size", "channels", "class_names", "pixel_type", "value_range", "condition")
"""Settings that say what images a model is of. A teacher has those of the run, and a guide those of its model."""
OF_TEACHER = ("teacher", "guidance", "guide", "guide_scale")
"""Settings that no run takes from its model."""
OF_DATA = ("image_column", "label_column", "pair_column", "pairs")
"""Settings that belong to the data of the model: other data has others."""


def inherit(name: str, base: Preset | None, settings: Mapping[str, Any]) -> Preset:
    """The settings of a run that begins with the model `name`.

    `settings` win. The network and the diffusion are the model's, and the rest is that of `base`, or the model's
    without a base. The learning rate is half of what it would be. Raises InputError if there is no such model.

    >>> begun = inherit("digits", None, {"seed": 1})
    >>> begun.predict, begun.lr, begun.init, begun.seed
    ('v', 0.001, 'digits', 1)
    """
    model = open_checkpoint(name).preset
    if base is None:
        local = (
            "skip_bad", "allow_paths", "precision", "device", "compile", "workers", "track", *OF_TEACHER,
        )  # fmt: skip
        defaults: dict[str, Any] = {f.name: f.default for f in fields(Preset) if f.name in local}
        base = replace(model, class_names=(), **defaults)
        if "data" in settings:
            settings = {**dict.fromkeys(OF_DATA, ""), **settings}
    taken = {each: getattr(model, each) for each in (*_BOUND, *_FREE)}
    taken["attention_resolutions"] = _attention(model, settings.get("size", base.size))
    taken["lr"] = base.lr * LR_SHARE
    taken["sample_steps"] = min(base.sample_steps, model.num_timesteps)
    return replace(base, **{**taken, **settings, "init": name})


def _attention(model: Preset, size: tuple[int, int]) -> tuple[int, ...]:
    """The `attention_resolutions` that give a network for this size attention at the model's levels."""
    return tuple(min(size) // model.patch >> level for level in model.attention_levels) or (0,)


def out_folder(name: str) -> Path:
    """Where a run goes that begins with the model `name` and has no other name.

    >>> out_folder("models/cifar10_fast.safetensors").as_posix(), out_folder("hf:google/ddpm@main").as_posix()
    ('runs/from-cifar10_fast', 'runs/from-ddpm')
    """
    return Path("runs", f"from-{Path(name.partition('@')[0] if hub.is_name(name) else name).stem}")


def source(preset: Preset) -> Checkpoint:
    """The model `preset.init`. Raises InputError if there is none, or its network is not that of the settings."""
    model = open_checkpoint(preset.init)
    old, want = model.preset, "want the same, or no init"
    for name in _BOUND:
        if (now := getattr(preset, name)) != (was := getattr(old, name)):
            raise InputError(f"{name} {now!r}: the model {preset.init} has {was!r}; {want}")
    if (learned := old.variance.startswith("learned")) != preset.variance.startswith("learned"):
        raise InputError(
            f"variance {preset.variance}: the model {preset.init} {'learned' if learned else 'did not learn'} one; "
            f"want {old.variance}, or no init"
        )
    if preset.attention_levels != old.attention_levels:
        levels = ", ".join(map(str, _attention(old, preset.size)))
        raise InputError(
            f"attention_resolutions {','.join(map(str, preset.attention_resolutions))}: the model {preset.init} has "
            f"attention elsewhere; want {levels}, or no init"
        )
    return model


def check_teacher(model: Checkpoint | None, preset: Preset) -> None:
    """Raise InputError if `preset` wants a teacher, and the model cannot be one, or not on these images."""
    if not preset.teacher:
        return
    if model is None:
        raise InputError("teacher: there is no model; want init MODEL, or teacher false")
    old = model.preset
    if other := [name for name in _IMAGES if getattr(old, name) != getattr(preset, name)]:
        raise InputError(f"teacher: the model {preset.init} has another {other[0]}; want teacher false")
    if old.loss == "consistency":
        raise InputError(f"teacher: the model {preset.init} is a consistency model; want teacher false")
    _check_seen(old, preset, preset.init)
    if preset.guidance != 1 and not old.label_dropout:
        why = "never saw an image without its label"
        raise InputError(f"guidance {preset.guidance}: the model {preset.init} {why}; want 1")


def _check_seen(old: Preset, preset: Preset, name: str) -> None:
    """Raise InputError if the run asks the model `name` for what its training never saw.

    This is an image without its label or condition, more noise on the condition, or a higher noise level.
    """
    if old.last_sigma and not 0 < preset.last_sigma <= old.last_sigma:
        raise InputError(
            f"last_sigma {preset.last_sigma:g}: the model {name} was trained with {old.last_sigma:g}; want at most that"
        )
    labels = ["label_dropout"] if preset.class_names else []
    for setting in (*labels, "condition_dropout", "condition_noise"):
        now, was = getattr(preset, setting), getattr(old, setting)
        if now > was and (was == 0 or setting == "condition_noise"):
            raise InputError(f"{setting} {now:g}: the model {name} was trained with {was:g}; want at most that")


def guide_of(preset: Preset) -> Checkpoint | None:
    """The model `preset.guide`. Raises InputError if it cannot guide the teacher."""
    if not preset.guide:
        return None
    guide = open_checkpoint(preset.guide, precision=preset.precision)
    check_guide(guide, preset, "the teacher")
    _check_seen(guide.preset, preset, preset.guide)
    if (guide.preset.augment > 0) != (preset.augment > 0):
        raise InputError(f"guide: only one of {preset.guide} and the teacher has augment; want both or none with it")
    return guide


def check_guide(guide: Checkpoint, preset: Preset, model: str) -> None:
    """Raise InputError if `guide` is no weaker version of the `model` with this preset."""
    names = (*_IMAGES, *_LEVELS, "always_labelled")
    if other := [name for name in names if getattr(guide.preset, name) != getattr(preset, name)]:
        name = {"always_labelled": "label_dropout"}.get(other[0], other[0])
        raise InputError(f"guide {guide.path}: it has another {name} than {model}; want the same")
    if guide.preset.loss == "consistency":
        raise InputError(f"guide {guide.path}: it is a consistency model; want an ordinary model")


def distilled(name: str, settings: Mapping[str, Any]) -> Preset:
    """The settings of a run that makes a consistency model of the model `name` (Geng et al. 2024).

    `settings` win. Raises InputError if there is no such model, or it predicts eps or mu.

    >>> run = distilled("digits", {"steps": 800})
    >>> run.loss, run.init, run.last_sigma, run.gap_steps, run.lr
    ('consistency', 'digits', 80.0, 100, 0.0004)
    """
    model = inherit(name, None, {each: settings[each] for each in ("data", *OF_DATA) if each in settings})
    ours = {
        "loss": "consistency", "last_sigma": min(LAST_SIGMA, model.last_sigma or LAST_SIGMA),
        "timestep_sampling": "lognormal_wide", "weighting": "none",
        "noise_assignment": "independent", "lr": DISTILL_LR * model.lr,
        "guidance": 1.0, "teacher": settings.get("guidance", 1.0) != 1 or bool(settings.get("guide")),
        "gap_steps": max(1, settings.get("steps", model.steps) // timesteps.STAGES),
    }  # fmt: skip
    return replace(model, **{**ours, **settings})


def adapt(model: Checkpoint, preset: Preset) -> tuple[dict[str, Tensor], list[str]]:
    """The model's weights for the network of `preset`, float32 on the CPU, and one line for each difference.

    `preset` has the names of its classes, and its network is the model's but for classes, channels and size.
    """
    network, old = model.denoiser.network, model.preset
    assert isinstance(network, nn.Module)
    state = {name: value.detach().clone() for name, value in network.state_dict().items()}
    lines = []
    weight, told = state["conv_in.weight"].split([old.channels, old.condition_channels], dim=1)
    state["conv_in.weight"] = weight
    if preset.size != old.size:
        lines.append(f"size: {_size(preset)} instead of {_size(old)}; the weights are the same")
    if (now := values(preset.pixel_type, preset.value_range)) != (was := values(old.pixel_type, old.value_range)):
        lines.append(f"numbers: {now} instead of {was}; low is still -1 of the signal, and high is 1")
    if preset.channels != old.channels:
        state["conv_in.weight"] = _more_channels(state["conv_in.weight"], preset.channels, 1)
        for name in ("conv_out.weight", "conv_out.bias"):
            parts = state[name].split(old.channels)  # of the prediction, and of a learned variance
            state[name] = torch.cat([_more_channels(part, preset.channels, 0) for part in parts])
        how = "spread over all" if old.channels == 1 else "summed" if preset.channels == 1 else "the first are kept"
        lines.append(f"channels: {preset.channels} instead of {old.channels}; in the outer convolutions they are {how}")
    same = (preset.condition, preset.channels) == (old.condition, old.channels)
    if not same and preset.condition_channels:
        told = weight.new_zeros(len(weight), preset.condition_channels, *weight.shape[2:])
    if preset.condition != old.condition:
        begin = "its input channels begin at 0" if preset.condition_channels else "its input channels are left out"
        lines.append(f"condition: {preset.condition} instead of {old.condition}; {begin}")
    if preset.condition_channels:
        state["conv_in.weight"] = torch.cat([state["conv_in.weight"], told], dim=1)
    if preset.class_names != old.class_names:
        lines.append(_classes(state, old, preset))
    if old.augment and not preset.augment:
        del state["warp"]
        lines.append("augment: none; the model goes on without warps")
    if preset.augment and not old.augment:
        state["warp"] = torch.zeros(len(state["time2.bias"]), NUMBERS)
        lines.append("augment: the model was not told of warps; each begins as an image without one")
    return state, lines


def _size(preset: Preset) -> str:
    return f"{preset.size[0]}x{preset.size[1]}"


def _more_channels(weight: Tensor, channels: int, dim: int) -> Tensor:
    """A weight for another number of channels, along `dim`: 1 for those that are read, 0 for those that are written."""
    had = weight.shape[dim]
    if had == 1:
        spread = weight.repeat_interleave(channels, dim)
        return spread / channels if dim == 1 else spread
    if channels == 1:
        return weight.sum(dim, keepdim=True) if dim == 1 else weight.mean(dim, keepdim=True)
    kept = weight.narrow(dim, 0, min(had, channels))
    missing = [channels - had if d == dim else side for d, side in enumerate(weight.shape)]
    return torch.cat([kept, weight.new_zeros(missing)], dim) if channels > had else kept


def _classes(state: dict[str, Tensor], old: Preset, preset: Preset) -> str:
    """Put the rows of the classes of `preset` in the place of the model's, and say so."""
    rows, new = state.pop("label.weight", None), preset.class_names
    if not new:
        return f"classes: none instead of {len(old.class_names)}; the model goes on without labels"
    if rows is None:
        width = state["time2.weight"].shape[0]
        state["label.weight"] = torch.zeros(len(new), width)
        return f"classes: {len(new)} instead of none; each begins as an image without a label"
    known = dict(zip(old.class_names, rows, strict=True))
    other = rows.mean(0) if old.always_labelled else torch.zeros_like(rows[0])
    state["label.weight"] = torch.stack([known.get(name, other) for name in new])
    same = sum(name in known for name in new)
    begin = "the mean of the model's" if old.always_labelled else "an image without a label"
    return (
        f"classes: {len(new)} instead of {len(rows)}; {same} have a name that the model knows, others begin as {begin}"
    )
