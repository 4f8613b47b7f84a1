"""Folders of diffusers: `to_diffusers` writes one, `from_diffusers` reads one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddpm.errors import InputError, parse_json
from ddpm.files import atomic
from ddpm.files.images import check_folder
from ddpm.files.interop.names import OLD_NAMES, errors_named, export_state, import_state
from ddpm.files.models import Checkpoint
from ddpm.files.tensors import as_state_dict, read_tensors, read_torch, save_tensors
from ddpm.presets import Preset, check
from ddpm.schedule import SCHEDULES
from ddpm.unet import groups_of

VERSION = "0.32.0"
"""The version of diffusers for which folders are written."""
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Setting of diffusers: its default there, and then the values that our network has. Only the default: the value is read
# by the code below, or it does not change the model.
UNET: dict[str, tuple[Any, ...]] = {
    "sample_size": (None,),
    "in_channels": (3,),
    "out_channels": (3,),
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "time_embedding_dim": (None, None),
    "freq_shift": (0, 1),
    "flip_sin_to_cos": (True, False),
    "down_block_types": (["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "up_block_types": (["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],),
    "block_out_channels": ([224, 448, 672, 896],),
    "layers_per_block": (2,),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (1, 0),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "dropout": (0.0,),
    "act_fn": ("silu", "silu", "swish"),
    "attention_head_dim": (8, None),
    "norm_num_groups": (32,),
    "attn_norm_num_groups": (None,),
    "norm_eps": (1e-5, 1e-6),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None,),
    "num_train_timesteps": (None,),  # for a learned time embedding
}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small", "fixed_large": "fixed_large", "learned_range": "learned_range",
    "fixed_small_log": "fixed_small",
}  # fmt: skip
"""Variance in diffusers -> ours. `learned` differs: the network's output is sigma^2 there and its logarithm here."""
BETAS = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine"}
SCHEDULER: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (1000,),
    "beta_start": (1e-4,),
    "beta_end": (0.02,),
    "beta_schedule": ("linear", *BETAS),
    "trained_betas": (None,),
    "variance_type": ("fixed_small", *VARIANCES),
    "clip_sample": (True, True, False),
    "prediction_type": ("epsilon", *PREDICTIONS),
    "thresholding": (False, False),
    "dynamic_thresholding_ratio": (0.995,),
    "clip_sample_range": (1.0, 1.0),
    "sample_max_value": (1.0,),
    "timestep_spacing": ("leading",),  # this and the next one choose the levels that a sampler visits
    "steps_offset": (0,),
    "rescale_betas_zero_snr": (False, False),
    "set_alpha_to_one": (True, True),  # only in DDIMScheduler
}


def to_diffusers(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder for diffusers' DDPMPipeline and DDIMPipeline, in float32, completely or not at all.

    With the same noise, DDPMPipeline makes the images of our ancestral sampler. DDIMPipeline makes those of our ddim
    sampler, if the number of steps divides T and use_clipped_model_output is set. With fewer than T steps, DDPMPipeline
    leaves noise in the image unless the variance is fixed_small. DDIMPipeline does not take a learned variance. Neither
    pipeline passes labels to a network with classes.

    Raises InputError for a folder that is not empty, and for what diffusers cannot express: patch 2, multipliers that
    do not begin with 1, predict mu, a learned or calibrated variance, dynamic thresholding.

    >>> from ddpm.files.opening import open_checkpoint
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "digits"
    >>> to_diffusers(open_checkpoint("digits"), folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['model_index.json', 'scheduler', 'unet']
    """
    preset, denoiser = checkpoint.preset, checkpoint.denoiser
    assert isinstance(denoiser.network, nn.Module)
    with errors_named(checkpoint.path):
        _check_exportable(checkpoint)
    check_out(folder)
    state = denoiser.network.state_dict()
    tensors = export_state({name: value.float() for name, value in state.items()}, preset, "diffusers")
    label = state.get("label.weight")
    unet = {name: accepted[:2][-1] for name, accepted in UNET.items()} | {
        "sample_size": preset.size[0] if preset.size[0] == preset.size[1] else list(preset.size),
        "in_channels": preset.channels,
        "out_channels": preset.channels * (2 if denoiser.learned else 1),
        "down_block_types": _block_types(preset, "Down"),
        "up_block_types": _block_types(preset, "Up")[::-1],
        "block_out_channels": [preset.width * m for m in preset.channel_multipliers],
        "layers_per_block": preset.num_res_blocks,
        "dropout": preset.dropout,
        "norm_num_groups": groups_of(preset.width),
        "num_class_embeds": None if label is None else len(label),
    }
    beta_schedule = {ours: name for name, ours in BETAS.items()}.get(preset.schedule)
    beta = SCHEDULES[preset.schedule](preset.num_timesteps, preset.beta_1, preset.beta_T).beta[1:]
    scheduler = {name: accepted[0] for name, accepted in SCHEDULER.items() if name != "set_alpha_to_one"} | {
        "num_train_timesteps": preset.num_timesteps,
        "beta_start": preset.beta_1,
        "beta_end": preset.beta_T,
        "beta_schedule": beta_schedule or "linear",
        "trained_betas": None if beta_schedule else beta.tolist(),
        "variance_type": denoiser.variance,
        "clip_sample": denoiser.clip,
        "prediction_type": {ours: name for name, ours in PREDICTIONS.items()}[denoiser.predict],
        "timestep_spacing": "trailing",  # level T is always visited, as here
    }
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}

    target = folder.absolute()
    with atomic.temporary_folder(target) as part:
        atomic.write_json(part / "model_index.json", _with_class("DDPMPipeline", index))
        atomic.write_json(part / "unet" / "config.json", _with_class("UNet2DModel", unet))
        atomic.write_json(part / "scheduler" / "scheduler_config.json", _with_class("DDPMScheduler", scheduler))
        save_tensors(part / "unet" / WEIGHTS[0], tensors, {"format": "pt"})


def check_out(folder: Path) -> None:
    """Raise InputError if `to_diffusers` could not write this folder. Call this before the work."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out {folder}: exists already; want a new or an empty folder")
    check_folder(folder.absolute().parent)


def _check_exportable(checkpoint: Checkpoint) -> None:
    """Raise InputError for a setting that diffusers does not have."""
    preset, denoiser = checkpoint.preset, checkpoint.denoiser
    variance = denoiser.variance
    if preset.patch != 1:
        raise InputError(f"patch {preset.patch}: diffusers does not have it; want 1")
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


def _block_types(preset: Preset, direction: Literal["Down", "Up"]) -> list[str]:
    """The types of diffusers' blocks, from full size to the smallest."""
    levels = range(len(preset.channel_multipliers))
    return [f"{'Attn' if level in preset.attention_levels else ''}{direction}Block2D" for level in levels]


def _with_class(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": VERSION, **settings}


def from_diffusers(folder: Path) -> tuple[Preset, dict[str, Tensor]]:
    """The preset and the state dict of our network, float32, from a UNet2DModel and its DDPM or DDIM scheduler.

    The folder is one that a pipeline saved, or has the network's files at its top, as google/ddpm-cifar10-32 does. The
    weights are .safetensors or .bin. Settings that diffusers does not have (data, training) get our defaults. Which
    levels the scheduler visits is ignored. DDIMScheduler has no variance, so diffusers' default is taken, fixed_small.

    Raises InputError, which names the file, the weights or the setting, for what is missing, damaged, or not in our
    network. A setting that is absent has diffusers' default, which our network often does not have.

    >>> from_diffusers(Path("runs/nothing"))
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: runs/nothing: want a diffusers folder: unet/config.json and ... or both at its top
    """
    network, noise = _config_folders(folder)
    unet = _read_settings(network / "config.json", UNET, "UNet2DModel")
    scheduler = _read_settings(noise / "scheduler_config.json", SCHEDULER, "DDPMScheduler", "DDIMScheduler")
    with errors_named(noise / "scheduler_config.json"):
        diffusion = _diffusion(scheduler)
    with errors_named(network / "config.json"):
        preset = Preset(**_architecture(unet), **diffusion)
        _check_groups(unet, preset)
        if unet["out_channels"] != (wanted := preset.channels * (2 if preset.variance == "learned_range" else 1)):
            raise InputError(
                f"out_channels {unet['out_channels']}: want {wanted}, for in_channels {preset.channels} and "
                f"variance_type {preset.variance}"
            )
    file = weights_of(folder)
    content = read_tensors(file) if file.suffix == ".safetensors" else read_torch(file)
    with errors_named(file):
        return preset, import_state(_with_current_names(as_state_dict(content)), preset, "diffusers")


def weights_of(folder: Path) -> Path:
    """The file of the weights in a diffusers folder. Raises InputError if there is none."""
    network, _ = _config_folders(folder)
    file = next((path for name in WEIGHTS if (path := network / name).is_file()), None)
    if file is None:
        raise InputError(f"{network}: has no weights; want {' or '.join(WEIGHTS)}")
    return file


def _config_folders(folder: Path) -> tuple[Path, Path]:
    """The folders of the network's and the scheduler's configuration. Raises InputError if there are none."""
    network = next((p for p in (folder / "unet", folder) if (p / "config.json").is_file()), None)
    noise = next((p for p in (folder / "scheduler", folder) if (p / "scheduler_config.json").is_file()), None)
    if network is None or noise is None:
        raise InputError(
            f"{folder}: want a diffusers folder: unet/config.json and scheduler/scheduler_config.json, or both at "
            "its top"
        )
    return network, noise


def _read_settings(file: Path, known: Mapping[str, tuple[Any, ...]], *kinds: str) -> dict[str, Any]:
    """The values of all `known` settings in a file, of which an absent one has diffusers' default.

    Raises InputError for a setting that is unknown or has a value that is not accepted, and for another _class_name
    than `kinds`.
    """
    try:
        config = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: damaged ({error}); want a configuration of {' or '.join(kinds)}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in kinds:
        raise InputError(f"{file}: _class_name {kind!r}: want {' or '.join(kinds)}")
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value is not None:
            raise InputError(f"{file}: {name} {value!r}: an unknown setting; want it absent or null")
    values = {}
    for name, (default, *accepted) in known.items():
        values[name] = value = config.get(name, default)
        if accepted and value not in accepted:
            absent = "" if name in config else ", diffusers' default, as the setting is absent"
            wanted = ", ".join(json.dumps(choice) for choice in accepted)
            raise InputError(f"{file}: {name} {json.dumps(value)}{absent}: want {wanted}")
    return values


def _architecture(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's fields of the network. They are checked here under diffusers' names, which the user knows."""
    size, widths = unet["sample_size"], unet["block_out_channels"]
    size = tuple(size) if isinstance(size, list) else (size, size)
    widths = tuple(widths) if isinstance(widths, list) else widths
    check("in_channels", unet["in_channels"], Literal[1, 3, 4])
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
    attention = [min(size) >> level for level, kind in enumerate(kinds) if kind.startswith("Attn")]
    classes = unet["num_class_embeds"] or 0
    check("num_class_embeds", classes, int, 0)
    return {
        **({"classes": True, "class_names": tuple(map(str, range(classes))), "label_dropout": 0.0} if classes else {}),
        "size": size, "channels": unet["in_channels"], "width": widths[0], "dropout": unet["dropout"],
        "channel_multipliers": tuple(width // widths[0] for width in widths),
        "num_res_blocks": unet["layers_per_block"],
        "attention_resolutions": tuple(attention) or (0,),
    }  # fmt: skip


def _check_groups(unet: Mapping[str, Any], preset: Preset) -> None:
    """Raise InputError if the norms have another number of groups than in our network."""
    groups = groups_of(preset.width)
    for name in ("norm_num_groups", "attn_norm_num_groups"):
        if unet[name] != groups and not (name == "attn_norm_num_groups" and unet[name] is None):
            raise InputError(f"{name} {unet[name]}: want {groups}, as our network has for a width of {preset.width}")


def _diffusion(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's fields of the diffusion."""
    levels, first, last = scheduler["num_train_timesteps"], scheduler["beta_start"], scheduler["beta_end"]
    check("num_train_timesteps", levels, int, 1)
    check("beta_start", first, float, 1e-12, 1)
    check("beta_end", last, float, 1e-12, 1)
    variance = VARIANCES[scheduler["variance_type"]]
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
    """Whether a folder has the configurations of a network and a scheduler of diffusers."""
    try:
        network, _ = _config_folders(folder)
        return "_class_name" in parse_json((network / "config.json").read_bytes())
    except (InputError, OSError, ValueError, TypeError):
        return False
