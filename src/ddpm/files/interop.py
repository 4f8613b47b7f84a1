"""Weights to and from other packages: folders of diffusers both ways, files of ermongroup/ddim on the way in.

All three hold the paper's U-Net and differ in names; our query, key and value are one layer, theirs three.
Nothing pickled is run, diffusers is not imported, and every name, shape and setting is accounted for or refused.
"""

import functools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import ddpm
from ddpm.errors import InputError
from ddpm.files import atomic
from ddpm.files.checkpoints import Checkpoint, read_tensors, save_tensors
from ddpm.files.images import check_folder
from ddpm.presets import PRESETS, Preset, build, check, to_json
from ddpm.schedule import SCHEDULES
from ddpm.unet import groups_of

Package = Literal["diffusers", "ddim"]

# -- names -------------------------------------------------------------------------------------------------------------

# Ours: (diffusers, ddim). Where there are three, ours is their concatenation. `level` is 0 at full size, `up` at the
# bottom; `n` is the number within a level.
NAMES: dict[str, tuple[str, str]] = {
    "time1": ("time_embedding.linear_1", "temb.dense.0"),
    "time2": ("time_embedding.linear_2", "temb.dense.1"),
    "label": ("class_embedding", "label"),  # ddim has none
    "conv_in": ("conv_in", "conv_in"),
    "norm_out": ("conv_norm_out", "norm_out"),
    "conv_out": ("conv_out", "conv_out"),
    # where a part of the network lies
    "down.block": ("down_blocks.{level}.resnets.{n}", "down.{level}.block.{n}"),
    "down.attention": ("down_blocks.{level}.attentions.{n}", "down.{level}.attn.{n}"),
    "down.conv": ("down_blocks.{level}.downsamplers.0.conv", "down.{level}.downsample.conv"),
    "middle.block": ("mid_block.resnets.{n}", "mid.block_{after}"),
    "middle.attention": ("mid_block.attentions.{n}", "mid.attn_{after}"),
    "up.block": ("up_blocks.{up}.resnets.{n}", "up.{level}.block.{n}"),
    "up.attention": ("up_blocks.{up}.attentions.{n}", "up.{level}.attn.{n}"),
    "up.conv": ("up_blocks.{up}.upsamplers.0.conv", "up.{level}.upsample.conv"),
    # the layers of a part
    "block.norm1": ("norm1", "norm1"),
    "block.conv1": ("conv1", "conv1"),
    "block.time": ("time_emb_proj", "temb_proj"),
    "block.norm2": ("norm2", "norm2"),
    "block.conv2": ("conv2", "conv2"),
    "block.shortcut": ("conv_shortcut", "nin_shortcut"),
    "attention.norm": ("group_norm", "norm"),
    "attention.qkv": ("to_q to_k to_v", "q k v"),
    "attention.out": ("to_out.0", "proj_out"),
}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the layers of attention at first, as the published files still do."""


def names(key: str, preset: Preset, package: Package) -> list[str]:
    """What a package calls the weights that our network keeps as `key`; three names where ours are three in one.

    >>> cifar10 = PRESETS["cifar10"]
    >>> names("up.12.block.norm1.bias", cifar10, "diffusers"), names("up.12.block.norm1.bias", cifar10, "ddim")
    (['up_blocks.3.resnets.0.norm1.bias'], ['up.0.block.0.norm1.bias'])
    >>> names("down.3.attention.qkv.weight", cifar10, "ddim")
    ['down.1.attn.0.q.weight', 'down.1.attn.0.k.weight', 'down.1.attn.0.v.weight']
    """
    column = get_args(Package).index(package)
    *path, leaf = key.split(".")
    if path[0] not in ("down", "middle", "up"):
        return [f"{NAMES[path[0]][column]}.{leaf}"]
    part, index, kind, *layer = path
    each = {"down": preset.blocks + 1, "middle": 2, "up": preset.blocks + 2}[part]  # a level's layers, its sampler last
    level, n = divmod(int(index), each)
    up = level
    if part == "up":
        level = len(preset.multipliers) - 1 - up
    place = NAMES[f"{part}.{kind}"][column].format(level=level, up=up, n=n, after=n + 1)
    inner = NAMES[f"{kind}.{layer[0]}"][column].split() if layer else []
    return [f"{place}.{name}.{leaf}" for name in inner] or [f"{place}.{leaf}"]


def _is_matrix(key: str, package: Package) -> bool:
    """Whether the package keeps our 1x1 convolution `key` as a dense layer."""
    return package == "diffusers" and ".attention." in key and key.endswith(("qkv.weight", "out.weight"))


def to_theirs(state: Mapping[str, Tensor], preset: Preset, package: Package) -> dict[str, Tensor]:
    """Our state dict under a package's names and in its shapes; the values are shared, not copied.

    >>> with torch.device("meta"):
    ...     state = build(PRESETS["cifar10"]).network.state_dict()
    >>> theirs = to_theirs(state, PRESETS["cifar10"], "diffusers")
    >>> len(state), len(theirs), list(theirs["mid_block.attentions.0.to_k.weight"].shape)
    (304, 328, [256, 256])
    """
    theirs: dict[str, Tensor] = {}
    for key, value in state.items():
        called = names(key, preset, package)
        if _is_matrix(key, package):
            value = value.flatten(1)
        theirs.update(zip(called, value.chunk(len(called)), strict=True))
    return theirs


def to_ours(given: Mapping[str, Tensor], preset: Preset, package: Package) -> dict[str, Tensor]:
    """`to_theirs` mirrored: float32 tensors for the preset's network.

    Raises InputError that names weights which are missing, of another shape, or too many.
    """
    left, ours = dict(given), {}
    for key, shape in _shapes(preset).items():
        called, parts = names(key, preset, package), []
        wanted = [shape[0] // len(called), *shape[1:]]
        if _is_matrix(key, package):
            wanted = wanted[:2]
        for name in called:
            if name not in left:
                raise InputError(f"{name} is missing; want {wanted}")
            parts.append(left.pop(name).float())
            if list(parts[-1].shape) != wanted:
                raise InputError(f"{name} of shape {list(parts[-1].shape)}: want {wanted}")
        ours[key] = (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise InputError(f"{min(left)}{more}: not of this network; want {len(given) - len(left)} names without it")
    return ours


@functools.lru_cache(maxsize=4)
def _network(preset: Preset) -> nn.Module:
    """The preset's network without memory for its weights."""
    with torch.device("meta"):
        network = build(preset).network
    assert isinstance(network, nn.Module)
    return network


def _shapes(preset: Preset) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in _network(preset).state_dict().items()}


@contextmanager
def _of(path: Path) -> Iterator[None]:
    """Let an InputError begin with the path that it is of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error.__cause__


# -- diffusers ---------------------------------------------------------------------------------------------------------

VERSION = "0.32.0"
"""Of diffusers, whose settings the folders are written with."""
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# Each setting: what diffusers takes an absent one for, then what our network has; nothing more where it is read or has
# no effect on the model.
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
    "num_train_timesteps": (None,),  # of a time embedding that is learned
}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small", "fixed_large": "fixed_large", "learned_range": "learned_range",
    "fixed_small_log": "fixed_small",
}  # fmt: skip
"""Not learned: diffusers takes what the network says for sigma^2, we for its logarithm."""
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
    "timestep_spacing": ("leading",),  # which levels a sampler visits, as the next one
    "steps_offset": (0,),
    "rescale_betas_zero_snr": (False, False),
    "set_alpha_to_one": (True, True),  # of DDIMScheduler
}


def to_diffusers(found: Checkpoint, folder: Path) -> None:
    """Write a folder that diffusers' DDPMPipeline and DDIMPipeline load, weights in float32, whole or not at all.

    Of the same noise DDPMPipeline makes what our ancestral sampler does, and DDIMPipeline what our ddim does where the
    steps divide the levels and use_clipped_model_output is set. Given fewer steps than levels DDPMPipeline leaves noise
    in the image unless the variance is fixed_small; DDIMPipeline takes no variance that is learned; neither has labels
    for a network with classes.
    Raises InputError for a folder that is not empty, and for what diffusers cannot express: patch 2, multipliers that
    do not begin with 1, predict mu, variance learned or calibrated, dynamic thresholding.

    >>> from ddpm.files.checkpoints import open_checkpoint
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "digits"
    >>> to_diffusers(open_checkpoint("digits"), folder)
    >>> sorted(path.name for path in folder.iterdir())
    ['model_index.json', 'scheduler', 'unet']
    """
    preset, denoiser = found.preset, found.denoiser
    assert isinstance(denoiser.network, nn.Module)
    with _of(found.path):
        _exportable(found)
    check_out(folder)
    state = denoiser.network.state_dict()
    tensors = to_theirs({name: value.float() for name, value in state.items()}, preset, "diffusers")
    label = state.get("label.weight")
    unet = {name: accepted[:2][-1] for name, accepted in UNET.items()} | {
        "sample_size": preset.size[0] if preset.size[0] == preset.size[1] else list(preset.size),
        "in_channels": preset.channels,
        "out_channels": preset.channels * (2 if denoiser.learned else 1),
        "down_block_types": _kinds(preset, "Down"),
        "up_block_types": _kinds(preset, "Up")[::-1],
        "block_out_channels": [preset.width * m for m in preset.multipliers],
        "layers_per_block": preset.blocks,
        "dropout": preset.dropout,
        "norm_num_groups": groups_of(preset.width),
        "num_class_embeds": None if label is None else len(label),
    }
    theirs = {ours: name for name, ours in BETAS.items()}.get(preset.schedule)
    beta = SCHEDULES[preset.schedule](preset.levels, preset.beta_1, preset.beta_T).beta[1:]
    scheduler = {name: accepted[0] for name, accepted in SCHEDULER.items() if name != "set_alpha_to_one"} | {
        "num_train_timesteps": preset.levels,
        "beta_start": preset.beta_1,
        "beta_end": preset.beta_T,
        "beta_schedule": theirs or "linear",
        "trained_betas": None if theirs else beta.tolist(),
        "variance_type": denoiser.variance,
        "clip_sample": denoiser.clip,
        "prediction_type": {ours: name for name, ours in PREDICTIONS.items()}[denoiser.predict],
        "timestep_spacing": "trailing",  # as ours: the last level is always visited
    }
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}

    target = folder.absolute()
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        atomic.write_json(part / "model_index.json", _named("DDPMPipeline", index))
        atomic.write_json(part / "unet" / "config.json", _named("UNet2DModel", unet))
        atomic.write_json(part / "scheduler" / "scheduler_config.json", _named("DDPMScheduler", scheduler))
        save_tensors(part / "unet" / WEIGHTS[0], tensors, {"format": "pt"})
        for written in (part / "unet", part / "scheduler", part):
            atomic.sync(written)
        part.rename(target)  # in the place of an empty folder, if there is one
        atomic.sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_out(folder: Path) -> None:
    """InputError where `to_diffusers` could not write there; to be called before the work."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"out {folder}: is there already; want a new folder or an empty one")
    check_folder(folder.absolute().parent)


def _exportable(found: Checkpoint) -> None:
    """InputError for what diffusers has no setting for."""
    preset, variance = found.preset, found.denoiser.variance
    if preset.patch != 1:
        raise InputError(f"patch {preset.patch}: diffusers has no such level; want 1")
    if preset.multipliers[0] != 1:
        raise InputError(f"multipliers {preset.multipliers}: diffusers has the width itself at full size; want 1 first")
    if not isinstance(found.denoiser.clip, bool):
        raise InputError(f"clip {found.denoiser.clip}: is not kept by diffusers; want static or none")
    if found.denoiser.predict not in PREDICTIONS.values():
        raise InputError(f"predict {found.denoiser.predict}: diffusers wants {', '.join(PREDICTIONS.values())}")
    if not isinstance(variance, str) or variance not in VARIANCES:
        name = "calibrated" if isinstance(variance, Tensor) else variance
        raise InputError(f"variance {name}: diffusers has none such; want fixed_large, fixed_small or learned_range")


def _kinds(preset: Preset, way: Literal["Down", "Up"]) -> list[str]:
    """diffusers' blocks, from full size down."""
    levels = range(len(preset.multipliers))
    return [f"{'Attn' if level in preset.attention_levels else ''}{way}Block2D" for level in levels]


def _named(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": kind, "_diffusers_version": VERSION, **settings}


def from_diffusers(folder: Path) -> tuple[Preset, dict[str, Tensor]]:
    """The preset and our state dict, float32, of a UNet2DModel and its DDPM or DDIM scheduler.

    As pipelines save them, or with the network's files at the top as google/ddpm-cifar10-32 has them; weights in
    .safetensors or .bin. What diffusers has no setting for (data, training) has its default; of the scheduler, which
    levels it visits is left out. DDIMScheduler knows no variance: that is diffusers' default then, fixed_small.
    Raises InputError that names a file, weights or a setting that is missing, damaged or not what our network has. An
    absent setting is diffusers' default, which often is another.

    >>> from_diffusers(Path("runs/nothing"))
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: runs/nothing: want a folder of diffusers: unet/config.json and ... or both at its top
    """
    network, noise = _places(folder)
    unet = _settings(network / "config.json", UNET, "UNet2DModel")
    scheduler = _settings(noise / "scheduler_config.json", SCHEDULER, "DDPMScheduler", "DDIMScheduler")
    with _of(noise / "scheduler_config.json"):
        diffusion = _diffusion(scheduler)
    with _of(network / "config.json"):
        preset = Preset(**_architecture(unet), **diffusion)
        _check_groups(unet, preset)
        if unet["out_channels"] != (wanted := preset.channels * (2 if preset.variance == "learned_range" else 1)):
            raise InputError(
                f"out_channels {unet['out_channels']}: want {wanted}, for in_channels {preset.channels} and "
                f"variance_type {preset.variance}"
            )
    file = weights_of(folder)
    given = read_tensors(file) if file.suffix == ".safetensors" else _plain(file)
    with _of(file):
        return preset, to_ours(_renewed(_tensors(given)), preset, "diffusers")


def weights_of(folder: Path) -> Path:
    """The file of weights of a folder of diffusers; InputError where there is none."""
    network, _ = _places(folder)
    file = next((path for name in WEIGHTS if (path := network / name).is_file()), None)
    if file is None:
        raise InputError(f"{network}: has no weights; want {' or '.join(WEIGHTS)}")
    return file


def _places(folder: Path) -> tuple[Path, Path]:
    """The folders of the network's and of the scheduler's configuration."""
    network = next((p for p in (folder / "unet", folder) if (p / "config.json").is_file()), None)
    noise = next((p for p in (folder / "scheduler", folder) if (p / "scheduler_config.json").is_file()), None)
    if network is None or noise is None:
        raise InputError(
            f"{folder}: want a folder of diffusers: unet/config.json and scheduler/scheduler_config.json, or both at "
            "its top"
        )
    return network, noise


def _settings(file: Path, known: Mapping[str, tuple[Any, ...]], *kinds: str) -> dict[str, Any]:
    """All `known` settings by a file; InputError for one that is unknown or not as accepted."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: damaged ({error}); want a configuration of {' or '.join(kinds)}") from error
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if kind not in kinds:
        raise InputError(f"{file}: _class_name {kind!r}: want {' or '.join(kinds)}")
    for name, value in config.items():
        if name not in known and not name.startswith("_") and value is not None:
            raise InputError(f"{file}: {name} {value!r}: a setting that we do not know; want it absent or null")
    values = {}
    for name, (default, *accepted) in known.items():
        values[name] = value = config.get(name, default)
        if accepted and value not in accepted:
            absent = "" if name in config else ", diffusers' default as it is absent"
            wanted = ", ".join(json.dumps(one) for one in accepted)
            raise InputError(f"{file}: {name} {json.dumps(value)}{absent}: want {wanted}")
    return values


def _architecture(unet: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's fields of the network; what is checked here has the name that the user knows it by."""
    size, widths = unet["sample_size"], unet["block_out_channels"]
    size = tuple(size) if isinstance(size, list) else (size, size)
    widths = tuple(widths) if isinstance(widths, list) else widths
    check("in_channels", unet["in_channels"], Literal[1, 3, 4])
    check("sample_size", size, tuple[int, ...], 1)
    check("block_out_channels", widths, tuple[int, ...], 1)
    check("layers_per_block", unet["layers_per_block"], int, 1)
    check("dropout", unet["dropout"], float, 0, 0.99)
    if widths[0] % 32 or any(width % widths[0] for width in widths):
        raise InputError(f"block_out_channels {list(widths)}: want multiples of the first, and that of 32")
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
        "multipliers": tuple(width // widths[0] for width in widths), "blocks": unet["layers_per_block"],
        "attention": tuple(attention) or (0,),
    }  # fmt: skip


def _check_groups(unet: Mapping[str, Any], preset: Preset) -> None:
    """InputError where norms have other groups than ours."""
    groups = groups_of(preset.width)
    for name in ("norm_num_groups", "attn_norm_num_groups"):
        if unet[name] != groups and not (name == "attn_norm_num_groups" and unet[name] is None):
            raise InputError(
                f"{name} {unet[name]}: want {groups}, as ours has where channels begin with {preset.width}"
            )


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
        "schedule": name, "levels": levels, "beta_1": first, "beta_T": last, "clip": scheduler["clip_sample"],
        "predict": PREDICTIONS[scheduler["prediction_type"]], "variance": variance,
        "loss": "hybrid" if variance == "learned_range" else "simple",
        "sample_steps": min(Preset.sample_steps, levels),
    }  # fmt: skip


def _schedule(table: Any, levels: int, first: float, last: float) -> tuple[str, float, float]:
    """Which of our schedules a table of betas is, with its beta_1 and beta_T; those that are given are tried first."""
    if isinstance(table, list) and len(table) == levels and all(isinstance(beta, int | float) for beta in table):
        betas = torch.tensor(table, dtype=torch.float64)
        ends = [(first, last), (float(betas[0]), float(betas[-1]))]
        for beta_1, beta_T in ends:
            for name, schedule in SCHEDULES.items():
                if 0 < min(beta_1, beta_T) <= max(beta_1, beta_T) <= 1:
                    ours = schedule(levels, beta_1, beta_T).beta[1:]
                    if torch.allclose(ours, betas, rtol=1e-5, atol=0):  # theirs may have been float32
                        return name, beta_1, beta_T
    raise InputError(f"trained_betas: want {levels} that are one of our schedules, {', '.join(SCHEDULES)}; or null")


def _renewed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the names of attention's layers that diffusers has now; InputError where there are both."""
    new: dict[str, Tensor] = {}
    for name, value in given.items():
        if ".attentions." in name:
            place, layer, leaf = (name.replace(".to_out.0.", ".proj_attn.")).rsplit(".", 2)
            now = f"{place}.{OLD.get(layer, layer)}.{leaf}"
        else:
            now = name
        if now in new:
            raise InputError(f"{name}: is there twice, by its old and by its new name; want one")
        new[now] = value
    return new


# -- ermongroup/ddim, pesser/pytorch_diffusion -------------------------------------------------------------------------


def from_ddim(file: Path, preset: Preset) -> dict[str, Tensor]:
    """Our state dict, float32, of the weights that `read_ddim` finds; `preset` is the network they are of.

    They do not say what they were trained for: the sizes may come from `shape_of`, the rest is the caller's. The
    published ones predict eps on the linear schedule, with fixed_large for CIFAR-10 and fixed_small for LSUN.
    Raises InputError for a file that cannot be read, a network whose norms are not of 32 groups or that ddim has not,
    and for weights that are missing, of another shape, or too many.

    >>> from_ddim(Path("model-790000.ckpt"), PRESETS["cifar10"])
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: model-790000.ckpt: not plain weights ([Errno 2] No such file or directory: ...
    """
    if preset.patch != 1:
        raise InputError(f"{file}: patch {preset.patch}: ddim has no such level; want 1")
    if groups_of(preset.width) != 32:
        raise InputError(
            f"{file}: width {preset.width}: ddim's norms have 32 groups, ours then fewer; want at least 128"
        )
    given = read_ddim(file)
    with _of(file):
        return to_ours(given, preset, "ddim")


def read_ddim(file: Path) -> dict[str, Tensor]:
    """A file's weights under ddim's names: .safetensors, or what torch.save wrote, without running any of it.

    A state dict, or ddim's training checkpoint [model, optimizer, epoch, step, average], of which the average is taken
    where there is one. A "module." before the names is left off.
    """
    given = read_tensors(file) if file.suffix == ".safetensors" else _plain(file)
    with _of(file):
        if isinstance(given, list):
            average = [one for one in given[4:5] if isinstance(one, dict)]
            given = next(iter(average or given), None)
        state = _tensors(given)
        if all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): value for name, value in state.items()}
        if "temb.dense.0.weight" not in state:
            raise InputError("not weights of ddim, as those with temb.dense.0.weight; one of our own needs no import")
    return state


def shape_of(state: Mapping[str, Tensor]) -> Preset:
    """The preset whose network has these weights, which are under ddim's names (`read_ddim`).

    Channels, width, multipliers, blocks and the levels with attention are read from them. The size is a guess: the
    first level with attention is taken to be 16x16, as in every published one. The rest is that of the first of
    PRESETS with this network, or of none, the defaults. Raises InputError where they tell no size or are too few.

    >>> with torch.device("meta"):
    ...     state = build(PRESETS["lsun_cat"]).network.state_dict()
    >>> preset = shape_of(to_theirs(state, PRESETS["lsun_cat"], "ddim"))
    >>> preset.size, preset.multipliers, preset.attention, preset.variance
    ((256, 256), (1, 1, 2, 2, 4, 4), (16,), 'fixed_small')
    """
    levels = range(_count(state, "down.{}.block.0.conv1.weight"))
    blocks = _count(state, "down.0.block.{}.conv1.weight")
    if "conv_in.weight" not in state or state["conv_in.weight"].ndim != 4 or not blocks:
        raise InputError("no weights of ddim's network; want conv_in.weight, down.0.block.0.conv1.weight and so on")
    width, channels = state["conv_in.weight"].shape[:2]
    with_attention = [level for level in levels if f"down.{level}.attn.0.q.weight" in state]
    if not with_attention:
        raise InputError("no attention on the way down, which would tell the size; want a preset that says it")
    side = 16 << with_attention[0]
    found: dict[str, Any] = {
        "size": (side, side), "channels": channels, "width": width, "blocks": blocks,
        "multipliers": tuple(state[f"down.{level}.block.0.conv1.weight"].shape[0] // width for level in levels),
        "attention": tuple(side >> level for level in with_attention), "patch": 1,
    }  # fmt: skip
    same = (row for row in PRESETS.values() if all(getattr(row, name) == value for name, value in found.items()))
    return replace(next(same, Preset()), data="", **found)


def _count(state: Mapping[str, Tensor], name: str) -> int:
    """How many of name.format(0), name.format(1), .. there are."""
    n = 0
    while name.format(n) in state:
        n += 1
    return n


def _plain(file: Path) -> Any:
    """What torch.save wrote, if it is of tensors and plain values only; InputError otherwise, and nothing is run."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what the bytes are taken for
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]  # torch's goes on with advice
        raise InputError(f"{file}: not plain weights ({reason})") from error


def _tensors(given: Any) -> dict[str, Tensor]:
    """`given`, if it is a state dict."""
    if not isinstance(given, dict) or not given:
        raise InputError(f"not a state dict but {type(given).__name__}; want names and tensors")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{name} is {type(value).__name__}; want names and tensors")
    return {str(name): value for name, value in given.items()}


# -- both --------------------------------------------------------------------------------------------------------------


def is_diffusers(folder: Path) -> bool:
    """Whether a folder has the configurations of a network and a scheduler of diffusers."""
    try:
        network, _ = _places(folder)
        return "_class_name" in json.loads((network / "config.json").read_text())
    except (InputError, OSError, ValueError, TypeError):
        return False


def recognise(path: Path) -> Package:
    """Whose weights a path has: diffusers (a folder) or ddim (a file); InputError names what is accepted.

    >>> recognise(Path("README.md"))
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: README.md: ... want a folder of diffusers or a file of ddim's weights (.ckpt, .pt, .pth, ...
    """
    wanted = "want a folder of diffusers or a file of ddim's weights (.ckpt, .pt, .pth, .safetensors)"
    if path.is_dir():
        if is_diffusers(path):
            return "diffusers"
        raise InputError(f"{path}: not a folder of diffusers; {wanted}")
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; {wanted}")
    try:
        read_ddim(path)
    except InputError as error:
        raise InputError(f"{error}; {wanted}") from error
    return "ddim"


def read(path: Path, preset: Preset | None = None) -> tuple[Preset, dict[str, Tensor]]:
    """The preset and our state dict of whatever `recognise` knows; `preset` for a file of ddim, else its shapes tell.

    Raises InputError where it is neither, or not what our network has.
    """
    if recognise(path) == "diffusers":
        if preset is not None:
            raise InputError(f"{path}: a folder of diffusers says its settings itself; want no --preset")
        return from_diffusers(path)
    if preset is None:
        with _of(path):
            preset = shape_of(read_ddim(path))
    return preset, from_ddim(path, preset)


def save(path: Path, preset: Preset, state: Mapping[str, Tensor], about: str) -> None:
    """Write our state dict as a weights file that `ddpm.load` opens, float32, whole or not at all.

    about  where the weights are from; kept in the file's metadata. The step is 0: none of our training is in them.

    Raises InputError for another suffix, and for weights that are not of the preset's network.

    >>> import tempfile
    >>> from ddpm.files.checkpoints import open_checkpoint
    >>> digits, path = open_checkpoint("digits"), Path(tempfile.mkdtemp()) / "copy.safetensors"
    >>> save(path, digits.preset, digits.denoiser.network.state_dict(), "the package's own")
    >>> ddpm.load(path).predict
    'v'
    """
    if path.suffix != ".safetensors":
        raise InputError(f"out {path}: want a name that ends in .safetensors")
    wanted = _shapes(preset)
    for name in sorted(wanted.keys() ^ state.keys()):
        raise InputError(f"{name}: {'missing' if name in wanted else 'not of the network of this preset'}")
    for name, value in state.items():
        if value.shape != wanted[name]:
            raise InputError(f"{name} of shape {list(value.shape)}: want {list(wanted[name])}")
    metadata = {
        "config": json.dumps(to_json(preset)),
        "step": "0",
        "weights": "ema",
        "version": ddpm.__version__,
        "about": about,
    }
    save_tensors(path, {name: value.float() for name, value in state.items()}, metadata)
