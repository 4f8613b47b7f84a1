"""Folders of diffusers: `to_diffusers` writes one, `from_diffusers` reads one."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddpm.details import Details
from ddpm.errors import InputError, brief, parse_json
from ddpm.files import atomic
from ddpm.files.images import check_folder
from ddpm.files.interop.names import OLD_NAMES, errors_named, export_state, import_state
from ddpm.files.models import Checkpoint, without_condition
from ddpm.files.tensors import as_state_dict, read_tensors, read_torch, save_tensors
from ddpm.presets import Preset, check
from ddpm.schedule import SCHEDULES
from ddpm.unet import groups_of

VERSION = "0.32.0"
"""The version of diffusers for which folders are written."""
WEIGHTS = "diffusion_pytorch_model"
"""The names of the files of weights begin with it; `.VARIANT` may follow, then `.safetensors` or `.bin`. Weights in
several files have an index: its name has `.index` and ends in `.json`."""
# Setting of diffusers: its default there, and then the values that our network has. Only the default: the value is read
# by the code below, or it does not change the model.
UNET: dict[str, tuple[Any, ...]] = {
    "sample_size": (None,),
    "in_channels": (3,),
    "out_channels": (3,),
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None,),
    "freq_shift": (0, 0, 1),
    "flip_sin_to_cos": (True, True, False),
    "down_block_types": (["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "up_block_types": (["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],),
    "block_out_channels": ([224, 448, 672, 896],),
    "layers_per_block": (2,),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (1, 0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "dropout": (0.0,),
    "act_fn": ("silu", "silu", "swish"),
    "attention_head_dim": (8,),
    "norm_num_groups": (32,),
    "attn_norm_num_groups": (None,),
    "norm_eps": (1e-5,),
    "resnet_time_scale_shift": ("default", "default", "scale_shift"),
    "add_attention": (True, True, False),
    "class_embed_type": (None, None),
    "num_class_embeds": (None,),
    "num_train_timesteps": (None,),  # for a learned time embedding
}
EMA = frozenset("decay min_decay optimization_step update_after_step use_ema_warmup inv_gamma power".split())
"""What diffusers' EMAModel adds to the configuration of an averaged network. It says nothing of the network."""
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small", "fixed_large": "fixed_large", "learned_range": "learned_range",
    "fixed_small_log": "fixed_small",
}  # fmt: skip
"""Variance in diffusers -> ours. `learned` differs: the network's output is sigma^2 there and its logarithm here."""
BETAS = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
CLASSES = (
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler",
    "PNDMScheduler", "LMSDiscreteScheduler", "RePaintScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler", "SASolverScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "LCMScheduler",
    "TCDScheduler",
)  # fmt: skip
"""The schedulers with the diffusion of this package. They differ in how they sample, which the user chooses here."""
# Of every class. A setting that is not listed chooses how the scheduler samples.
SCHEDULER: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000,),
    "beta_start": (1e-4,),
    "beta_end": (0.02,),
    "beta_schedule": ("linear", *BETAS),
    "trained_betas": (None,),
    "variance_type": (None, None, *VARIANCES),
    "prediction_type": ("epsilon", *PREDICTIONS),
    "rescale_betas_zero_snr": (False, False),
    "use_flow_sigmas": (False, False),
    "timestep_type": ("discrete", "discrete"),
}
# Of the first five classes, for which no other settings are accepted.
DDPM: dict[str, tuple[Any, ...]] = {
    "variance_type": ("fixed_small", None, *VARIANCES),
    "clip_sample": (True, True, False),
    "clip_sample_range": (1.0, 1.0),
    "thresholding": (False, False),
    "dynamic_thresholding_ratio": (0.995,),
    "sample_max_value": (1.0,),
    "timestep_spacing": ("leading",),  # this and the next three choose the levels that a sampler visits
    "steps_offset": (0,),
    "set_alpha_to_one": (True,),  # only in DDIMScheduler
    "set_alpha_to_zero": (None,),  # only in DDIMInverseScheduler, of old versions
    "tensor_format": (None,),  # of old versions: the type of array
}


def to_diffusers(checkpoint: Checkpoint, folder: Path, label: int | Literal["all"] | None = None) -> None:
    """Write a folder for diffusers' DDPMPipeline and DDIMPipeline, in float32, completely or not at all.

    With the same noise, DDPMPipeline makes the images of our ancestral sampler. DDIMPipeline makes those of our ddim
    sampler, if the number of steps divides T and use_clipped_model_output is set. With fewer than T steps, DDPMPipeline
    leaves noise in the image unless the variance is fixed_small. DDIMPipeline does not take a learned variance.

    The pipelines pass no class to the network. So a network with classes is written as one without them:

    label  a class, 0 .. the number of classes - 1: the network of this class
           None: the network as it is without a class
           all: the network with all classes, which no pipeline can call

    Raises InputError for a folder that is not empty, for no label if the network never saw an image without its label,
    and for what diffusers cannot express: a condition on an image, patch 2, multipliers that do not begin with 1,
    predict mu, a learned or calibrated variance, dynamic thresholding, some details of imported networks.

    >>> from ddpm.files.opening import open_checkpoint
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "digits"
    >>> to_diffusers(open_checkpoint("digits"), folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['model_index.json', 'scheduler', 'unet']
    """
    without_condition(checkpoint, "diffusers' UNet2DModel")
    preset, denoiser = checkpoint.preset, checkpoint.denoiser
    assert isinstance(denoiser.network, nn.Module)
    with errors_named(checkpoint.path):
        _check_exportable(checkpoint)
        state = _without_classes(denoiser.network.state_dict(), preset, label)
        state.pop("warp", None)  # samples have no warp
        head_channels = _head_channels(preset)
    check_out(folder)
    tensors = export_state({name: value.float() for name, value in state.items()}, preset, "diffusers")
    classes, details = state.get("label.weight"), preset.details
    groups = details.norm_groups or groups_of(preset.width)
    unet = {name: accepted[:2][-1] for name, accepted in UNET.items()} | {
        "sample_size": preset.size[0] if preset.size[0] == preset.size[1] else list(preset.size),
        "in_channels": preset.channels,
        "out_channels": preset.channels * (2 if denoiser.learned else 1),
        "freq_shift": int(details.frequency_shift),
        "flip_sin_to_cos": False,
        "down_block_types": _block_types(preset, "Down"),
        "up_block_types": _block_types(preset, "Up")[::-1],
        "block_out_channels": [preset.width * m for m in preset.channel_multipliers],
        "layers_per_block": preset.num_res_blocks,
        "downsample_padding": int(details.even_padding),
        "dropout": preset.dropout,
        "attention_head_dim": head_channels,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups if details.scale_shift else None,  # by default the middle then has no norm
        "norm_eps": details.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if details.scale_shift else "default",
        "add_attention": details.middle_attention,
        "num_class_embeds": None if classes is None else len(classes),
    }
    beta_schedule = {ours: name for name, ours in BETAS.items()}.get(preset.schedule)
    beta = SCHEDULES[preset.schedule](preset.num_timesteps, preset.beta_1, preset.beta_T).beta[1:]
    scheduler = {
        "num_train_timesteps": preset.num_timesteps,
        "beta_start": preset.beta_1,
        "beta_end": preset.beta_T,
        "beta_schedule": beta_schedule or "linear",
        "trained_betas": None if beta_schedule else beta.tolist(),
        "variance_type": denoiser.variance,
        "clip_sample": denoiser.clip,
        "clip_sample_range": 1.0,
        "prediction_type": {ours: name for name, ours in PREDICTIONS.items()}[denoiser.predict],
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "timestep_spacing": "trailing",  # level T is always visited, as here
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
    }
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}

    target = folder.absolute()
    with atomic.temporary_folder(target) as part:
        atomic.write_json(part / "model_index.json", _with_class("DDPMPipeline", index))
        atomic.write_json(part / "unet" / "config.json", _with_class("UNet2DModel", unet))
        atomic.write_json(part / "scheduler" / "scheduler_config.json", _with_class("DDPMScheduler", scheduler))
        save_tensors(part / "unet" / f"{WEIGHTS}.safetensors", tensors, {"format": "pt"})


def check_out(folder: Path) -> None:
    """Raise InputError if `to_diffusers` could not write this folder. Call this before the work."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out {folder}: exists already; want a new or an empty folder")
    check_folder(folder.absolute().parent)


def _check_exportable(checkpoint: Checkpoint) -> None:
    """Raise InputError for a setting that diffusers does not have."""
    preset, denoiser = checkpoint.preset, checkpoint.denoiser
    variance = denoiser.variance
    if preset.loss == "consistency":
        raise InputError("loss consistency: no pipeline of DDPM or DDIM samples it; want --out FILE.safetensors")
    if preset.pixel_type != "uint8":
        warnings.warn(
            f"pixel_type {preset.pixel_type}: the folder does not say so, and its images are read as 8-bit ones; "
            "a pipeline of diffusers makes numbers in 0..1",
            stacklevel=2,
        )
    if preset.last_sigma:
        raise InputError(f"last_sigma {preset.last_sigma:g}: diffusers' schedules have all levels; want last_sigma 0")
    if preset.patch != 1:
        raise InputError(
            f"patch {preset.patch}: diffusers' UNet2DModel has no outer level at half the size; want a model that was "
            "trained with patch 1, or an export with --out FILE.safetensors or --to hub, which ddpm reads"
        )
    if preset.channel_multipliers[0] != 1:
        raise InputError(
            f"channel_multipliers {preset.channel_multipliers}: in diffusers the first is always 1; want 1 first"
        )
    if not isinstance(denoiser.clip, bool):
        raise InputError(f"clip {denoiser.clip}: diffusers does not have it; want static or none")
    if denoiser.predict not in PREDICTIONS.values():
        raise InputError(f"predict {denoiser.predict}: diffusers wants {', '.join(PREDICTIONS.values())}")
    if not isinstance(variance, str) or variance not in VARIANCES:
        name = "calibrated" if isinstance(variance, Tensor) else variance
        raise InputError(f"variance {name}: diffusers does not have it; want fixed_large, fixed_small or learned_range")

    if preset.details.timestep_scale != 1:
        raise InputError(f"timestep_scale {preset.details.timestep_scale}: diffusers does not have it; want 1")
    if preset.details.frequency_shift not in (0, 1):
        raise InputError(f"frequency_shift {preset.details.frequency_shift}: want 0 or 1 for diffusers")


def _head_channels(preset: Preset) -> int | None:
    """diffusers' attention_head_dim; None for one head. Raises InputError if it has no single value."""
    details = preset.details
    if details.head_channels or details.heads == 1:
        return details.head_channels or None
    levels = [*preset.attention_levels, *([-1] if details.middle_attention else [])]
    sizes = {preset.width * preset.channel_multipliers[level] // details.heads for level in levels}
    if len(sizes) > 1:
        raise InputError(f"heads {details.heads}: have {sorted(sizes)} channels; in diffusers all have the same number")
    return sizes.pop() if sizes else None


def _without_classes(
    state: Mapping[str, Tensor], preset: Preset, label: int | Literal["all"] | None
) -> dict[str, Tensor]:
    """The state dict of the network that `to_diffusers` writes for this label."""
    state, names = dict(state), preset.class_names
    if "label.weight" not in state:
        if label is not None:
            raise InputError(f"class {label}: the model has no classes; want no class")
        return state
    if label == "all":
        return state
    rows = state.pop("label.weight")
    if label is None and preset.label_dropout == 0:
        raise InputError(
            "class: diffusers' pipelines pass no class, and this network never saw an image without its class; want "
            f"{', '.join(names)} for the network of one class, or all for your own calls of the network"
        )
    if label is not None:  # the network adds the class to this layer's output
        check("class", label, int, 0, len(rows) - 1)
        state["time2.bias"] = state["time2.bias"] + rows[label]
    return state


def _block_types(preset: Preset, direction: Literal["Down", "Up"]) -> list[str]:
    """The types of diffusers' blocks, from full size to the smallest."""
    levels = range(len(preset.channel_multipliers))
    return [f"{'Attn' if level in preset.attention_levels else ''}{direction}Block2D" for level in levels]


def _with_class(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": VERSION, **settings}


def from_diffusers(folder: Path) -> tuple[Preset, dict[str, Tensor]]:
    """The preset and the state dict of our network, float32, from a UNet2DModel and its scheduler.

    The folder is one that a pipeline saved, or one with the network's files at its top, as google/ddpm-cifar10-32. The
    weights are as `weights_of` finds them. Settings that diffusers does not have (data, training) get our defaults. The
    scheduler's class and the levels that it visits are ignored, because the sampler is the user's choice here. A
    scheduler without a variance gets diffusers' default, fixed_small. A network without a scheduler gets diffusers'
    default, DDPMScheduler(), and a warning.

    Raises InputError, which names the file, the weights or the setting, for what is missing, damaged, or not in our
    network. A setting that is absent has diffusers' default.

    >>> from_diffusers(Path("runs/nothing"))
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: runs/nothing: want a diffusers folder: config.json of a UNet2DModel, at its top or in unet/
    """
    network = _network_folder(folder)
    _check_pipeline(folder)
    unet = _read_settings(network / "config.json", UNET, "UNet2DModel")
    noise = _scheduler_file(folder)
    if noise is not None:
        scheduler = _read_scheduler(noise)
    else:
        variance = "learned_range" if unet["out_channels"] == 2 * unet["in_channels"] else None
        scheduler = {name: default for name, (default, *_) in (SCHEDULER | DDPM).items()} | {"variance_type": variance}
        warnings.warn(
            f"{folder}: has no scheduler_config.json, which says how the network was trained; diffusers' defaults are "
            "taken: it predicts eps, of 1000 levels of the linear schedule",
            stacklevel=2,
        )
    with errors_named(noise or folder):
        diffusion = _diffusion(scheduler)
    with errors_named(network / "config.json"):
        preset = Preset(**_architecture(unet), **diffusion)
        if unet["out_channels"] != (wanted := preset.channels * (2 if preset.variance == "learned_range" else 1)):
            raise InputError(
                f"out_channels {unet['out_channels']}: want {wanted}, for in_channels {preset.channels} and "
                f"variance_type {preset.variance}"
            )
    file = weights_of(folder)
    content = _read_weights(file)
    with errors_named(file):
        state = import_state(_with_current_names(as_state_dict(content)), preset, "diffusers")
    if unet["flip_sin_to_cos"]:  # the cosines come first; in our network they come last
        state["time1.weight"] = state["time1.weight"].roll(preset.width // 2, 1)
    return preset, state


def weights_of(folder: Path) -> Path:
    """The file of the weights in a diffusers folder, or the index of their files.

    Weights without a variant are preferred, then .safetensors. Raises InputError if there are none, or only variants,
    such as fp16 and non_ema, and several of them.
    """
    network = _network_folder(folder)
    whole = re.compile(rf"{WEIGHTS}(\.[\w-]+)?\.(safetensors|bin)")
    index = re.compile(rf"{WEIGHTS}\.(safetensors|bin)\.index(\.[\w-]+)?\.json")
    found: dict[str, list[Path]] = {}
    for file in sorted(network.iterdir(), key=lambda file: (".bin" in file.name, ".index" in file.name)):
        one, several = whole.fullmatch(file.name), index.fullmatch(file.name)
        if (one and not re.search(r"-\d+-of-\d+", file.name)) or several:
            variant = (one[1] if one else several[2] if several else "") or ""
            found.setdefault(variant, []).append(file)
    if not found:
        raise InputError(f"{network}: has no weights; want {WEIGHTS}.safetensors or {WEIGHTS}.bin")
    if "" not in found and len(found) > 1:
        variants = ", ".join(variant.removeprefix(".") for variant in sorted(found))
        raise InputError(f"{network}: has the weights as {variants}; want one of them, or weights without a variant")
    return (found.get("") or next(iter(found.values())))[0]


def _read_weights(file: Path) -> Any:
    """What a file of weights holds, or all files of an index. Raises InputError if one is missing or damaged."""
    if file.suffix != ".json":
        return read_tensors(file) if file.suffix == ".safetensors" else read_torch(file)
    try:
        names = set(parse_json(file.read_bytes())["weight_map"].values())
        parts = [file.with_name(name) for name in sorted(names)]  # ValueError for names with a folder
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: damaged ({brief(error)}); want the index of the files of weights") from error
    state: dict[str, Tensor] = {}
    for part in parts:
        if part.suffix not in (".safetensors", ".bin"):
            raise InputError(f"{file}: names {part.name}; want files of weights, .safetensors or .bin")
        with errors_named(part):
            content = as_state_dict(_read_weights(part))
        if twice := sorted(state.keys() & content.keys()):
            raise InputError(f"{part}: {twice[0]} is in another file, too; want one")
        state |= content
    return state


def _network_folder(folder: Path) -> Path:
    """The folder of the network's configuration. Raises InputError if there is none."""
    for path in (folder / "unet", folder):
        if (path / "config.json").is_file():
            return path
    raise InputError(f"{folder}: want a diffusers folder: config.json of a UNet2DModel, at its top or in unet/")


def _scheduler_file(folder: Path) -> Path | None:
    """The scheduler's configuration: in the folder, or beside it if the folder is `unet` of a pipeline."""
    around = [folder / "scheduler", folder]
    if (folder.absolute().parent / "model_index.json").is_file():
        around.append(folder.absolute().parent / "scheduler")
    return next((file for path in around if (file := path / "scheduler_config.json").is_file()), None)


def _check_pipeline(folder: Path) -> None:
    """Raise InputError if the folder's pipeline has other networks, such as the decoder of a latent diffusion model."""
    file = folder / "model_index.json"
    index = _read_json(file, "a pipeline") if file.is_file() else {}
    for name, value in index.items():
        if not name.startswith("_") and name not in ("unet", "scheduler") and isinstance(value, list) and any(value):
            raise InputError(
                f"{file}: has {name} {value[-1]}; want a pipeline of unet and scheduler, which makes pixels"
            )


def _read_json(file: Path, wanted: str) -> dict[str, Any]:
    try:
        values = parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: damaged ({brief(error)}); want a configuration of {wanted}") from error
    return values if isinstance(values, dict) else {}


def _read_settings(file: Path, known: Mapping[str, tuple[Any, ...]], kind: str) -> dict[str, Any]:
    """The values of all `known` settings in a file, of which an absent one has diffusers' default.

    Raises InputError for a setting that is unknown or has a value that is not accepted, and for another _class_name
    than `kind`.
    """
    config = _read_json(file, kind)
    if config.get("_class_name") != kind:
        raise InputError(f"{file}: _class_name {config.get('_class_name')!r}: want {kind}")
    _refuse_unknown(file, {name: value for name, value in config.items() if name not in EMA}, known)
    return _values(file, config, known)


def _refuse_unknown(file: Path, config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value is not None:
            raise InputError(f"{file}: {name} {value!r}: an unknown setting; want it absent or null")


def _values(file: Path, config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    values = {}
    for name, (default, *accepted) in known.items():
        values[name] = value = config.get(name, default)
        if accepted and value not in accepted:
            absent = "" if name in config else ", diffusers' default, as the setting is absent"
            wanted = ", ".join(json.dumps(choice) for choice in accepted)
            raise InputError(f"{file}: {name} {json.dumps(value)}{absent}: want {wanted}")
    return values


def _read_scheduler(file: Path) -> dict[str, Any]:
    """The values of all settings of SCHEDULER and DDPM in a file. Raises InputError as `_read_settings` does."""
    config = _read_json(file, "a scheduler")
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise InputError(f"{file}: _class_name {kind!r}: want one of {', '.join(CLASSES)}")
    if "predict_epsilon" in config:  # the name in diffusers 0.7 to 0.9
        with errors_named(file):
            predicts_eps = check("predict_epsilon", config.pop("predict_epsilon"), bool)
            prediction = "epsilon" if predicts_eps else "sample"
            if config.setdefault("prediction_type", prediction) != prediction:
                raise InputError(
                    f"prediction_type {config['prediction_type']}: not with predict_epsilon {predicts_eps}"
                )
    if kind in CLASSES[:5]:
        known = SCHEDULER | DDPM
        _refuse_unknown(file, config, known)
        return _values(file, config, known)
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule"):
        if name not in config:
            raise InputError(f"{file}: {name}: missing, and its default differs between schedulers; want a value")
    # Clipping is a setting of the sampler in these classes. Here DDPMScheduler's default is taken.
    return {name: default for name, (default, *_) in DDPM.items()} | _values(file, config, SCHEDULER)


def _architecture(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's fields of the network. They are checked here under diffusers' names, which the user knows."""
    size, widths = unet["sample_size"], unet["block_out_channels"]
    size = tuple(size) if isinstance(size, list) else (size, size)
    widths = tuple(widths) if isinstance(widths, list) else widths
    check("in_channels", unet["in_channels"], int, 1, 1024)
    check("sample_size", size, tuple[int, ...], 1)
    check("block_out_channels", widths, tuple[int, ...], 1)
    check("layers_per_block", unet["layers_per_block"], int, 1)
    check("dropout", unet["dropout"], float, 0, 0.99)
    if widths[0] % 32 or any(width % widths[0] for width in widths):
        raise InputError(f"block_out_channels {list(widths)}: want multiples of the first, which is a multiple of 32")
    kinds = unet["down_block_types"]
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(widths)
        or any(kind not in ("DownBlock2D", "AttnDownBlock2D") for kind in kinds)
    ):
        raise InputError(
            f"down_block_types {kinds}: want DownBlock2D or AttnDownBlock2D for each of {len(widths)} levels"
        )
    mirrored = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    if unet["up_block_types"] != mirrored:
        raise InputError(f"up_block_types {unet['up_block_types']}: want {mirrored}, as on the way down")
    if unet["time_embedding_dim"] not in (None, 4 * widths[0]):
        raise InputError(f"time_embedding_dim {unet['time_embedding_dim']}: want null or {4 * widths[0]}")
    attention = [min(size) >> level for level, kind in enumerate(kinds) if kind.startswith("Attn")]
    classes = unet["num_class_embeds"] or 0
    check("num_class_embeds", classes, int, 0)
    return {
        **({"classes": True, "class_names": tuple(map(str, range(classes))), "label_dropout": 0.0} if classes else {}),
        "size": size, "channels": unet["in_channels"], "width": widths[0], "dropout": unet["dropout"],
        "channel_multipliers": tuple(width // widths[0] for width in widths),
        "num_res_blocks": unet["layers_per_block"],
        "attention_resolutions": tuple(attention) or (0,), "details": _details(unet, widths, kinds),
    }  # fmt: skip


def _details(unet: Mapping[str, Any], widths: Sequence[int], kinds: Sequence[str]) -> Details:
    """Where the network differs from the paper's. What is the paper's rule for this width becomes the default."""
    groups, head = unet["norm_num_groups"], unet["attention_head_dim"]
    scale_shift = unet["resnet_time_scale_shift"] == "scale_shift"
    check("norm_num_groups", groups, int, 1)
    check("norm_eps", unet["norm_eps"], float, 0, 1)
    levels = [width for width, kind in zip(widths, kinds, strict=True) if kind.startswith("Attn")]
    levels += [widths[-1]] if unet["add_attention"] else []
    if head is not None and (check("attention_head_dim", head, int, 1) > min(levels, default=head)):
        raise InputError(f"attention_head_dim {head}: want at most {min(levels)}, the channels with attention")
    # With scale_shift, null means that the attention in the middle has no norm.
    if unet["attn_norm_num_groups"] not in ((groups,) if scale_shift and unet["add_attention"] else (None, groups)):
        raise InputError(f"attn_norm_num_groups {unet['attn_norm_num_groups']}: want {groups}, as norm_num_groups")
    one_head = head is None or all(width == head for width in levels)
    details = Details(
        norm_groups=0 if groups == groups_of(widths[0]) else groups,
        norm_eps=unet["norm_eps"],
        head_channels=0 if one_head else head,
        middle_attention=unet["add_attention"],
        scale_shift=scale_shift,
        even_padding=unet["downsample_padding"] == 1,
        frequency_shift=unet["freq_shift"],
    )
    for width in levels:
        if head is not None and width % head:
            raise InputError(f"attention_head_dim {head}: want a divisor of {width}, the channels with attention")
    for width in widths:
        if width % groups:
            raise InputError(f"norm_num_groups {groups}: want a divisor of {width}, a number of channels")
    return details


def _diffusion(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's fields of the diffusion."""
    levels, first, last = scheduler["num_train_timesteps"], scheduler["beta_start"], scheduler["beta_end"]
    check("num_train_timesteps", levels, int, 1)
    check("beta_start", first, float, 1e-12, 1)
    check("beta_end", last, float, 1e-12, 1)
    variance = VARIANCES[scheduler["variance_type"] or "fixed_small"]
    name = BETAS[scheduler["beta_schedule"]]
    if (table := scheduler["trained_betas"]) is not None:
        name, first, last = _schedule(table, levels, first, last)
    return {
        "schedule": name, "num_timesteps": levels, "beta_1": first, "beta_T": last, "clip": scheduler["clip_sample"],
        "predict": PREDICTIONS[scheduler["prediction_type"]], "variance": variance,
        "loss": "hybrid" if variance == "learned_range" else "simple",
        "sample_steps": min(Preset.sample_steps, levels),
    }  # fmt: skip


def _schedule(table: Any, levels: int, first: float, last: float) -> tuple[str, float, float]:
    """The name of our schedule that has this table of betas, its beta_1 and its beta_T.

    The arguments first and last are tried as beta_1 and beta_T, and then the ends of the table. Raises InputError if no
    schedule has the table.
    """
    if isinstance(table, list) and len(table) == levels and all(isinstance(beta, int | float) for beta in table):
        betas = torch.tensor(table, dtype=torch.float64)
        ends = [(first, last), (float(betas[0]), float(betas[-1]))]
        for beta_1, beta_T in ends:
            for name, schedule in SCHEDULES.items():
                if 0 < min(beta_1, beta_T) <= max(beta_1, beta_T) <= 1:
                    ours = schedule(levels, beta_1, beta_T).beta[1:]
                    if torch.allclose(ours, betas, rtol=1e-5, atol=0):  # the table may be of float32
                        return name, beta_1, beta_T
    schedules = ", ".join(SCHEDULES)
    raise InputError(f"trained_betas: want null, or {levels} numbers that are one of the schedules {schedules}")


def _with_current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with today's names of attention's layers. Raises InputError if a layer has both names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        current = name
        if ".attentions." in name:
            block, layer, leaf = (name.replace(".to_out.0.", ".proj_attn.")).rsplit(".", 2)
            current = f"{block}.{OLD_NAMES.get(layer, layer)}.{leaf}"
        if current in renamed:
            raise InputError(f"{name}: is there twice, under its old and its new name; want one")
        renamed[current] = value
    return renamed


def is_diffusers(folder: Path) -> bool:
    """Whether a folder has the configuration of a network of diffusers."""
    try:
        return "_class_name" in parse_json((_network_folder(folder) / "config.json").read_bytes())
    except (InputError, OSError, ValueError, TypeError):
        return False
