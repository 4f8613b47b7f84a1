"""Weights of other packages: the same numbers both ways, every name and setting accounted for, nothing else let in."""

import json
import math
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from exact import one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import ddpm
from ddpm import samplers
from ddpm.cli import main
from ddpm.details import Details
from ddpm.errors import InputError
from ddpm.files import interop, models
from ddpm.files.interop import diffusers as folders
from ddpm.files.interop import export_state, from_diffusers, import_state, to_diffusers
from ddpm.files.interop.ddim import infer_preset
from ddpm.files.models import Checkpoint
from ddpm.files.opening import open_checkpoint
from ddpm.presets import PRESETS, Preset, build
from ddpm.schedule import SCHEDULES

CIFAR10, CELEBAHQ = PRESETS["cifar10"], PRESETS["celebahq256"]
SMALL = Preset(
    size=(4, 4), channels=1,
    width=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_resolutions=(2,), dropout=0.0,
    num_timesteps=10, beta_T=0.5, sample_steps=10,
)  # fmt: skip
WIDE = replace(SMALL, width=128)  # with ddim's 32 groups


def drawn(shape, name, g):
    """Random weights for a layer of this name, none of them near zero; signals stay O(1)."""
    draw = 12**0.5 * (torch.rand(shape, generator=g) - 0.5)
    return draw / draw[0].numel() ** 0.5 if len(shape) > 1 else 0.2 * draw + ("norm" in name and "weight" in name)


def random_model(preset, seed=1, **changes):
    """A checkpoint of random weights; `changes` are its denoiser's."""
    with torch.device("meta"):
        denoiser = build(preset)
    g = torch.Generator().manual_seed(seed)
    state = {name: drawn(value.shape, name, g) for name, value in denoiser.network.state_dict().items()}
    denoiser.network.load_state_dict(state, assign=True)
    denoiser.network.eval().requires_grad_(False)
    return Checkpoint(replace(denoiser, **changes), preset, 0, "ema", Path("model.safetensors"))


def exported(found, folder):
    to_diffusers(found, folder)
    return folder


def network(preset, state):
    with torch.device("meta"):
        net = build(preset).network
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def inputs(preset, size=None, batch=2):
    """Images and the timesteps 999, 3."""
    x = torch.randn(batch, preset.channels, *(size or preset.size), generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([999, 3])[:batch]


@torch.no_grad()
def apart(net, model, x, timestep):
    """The largest difference of two networks' outputs over the largest output."""
    ours, theirs = net(x, timestep), model(x, timestep)
    theirs = getattr(theirs, "sample", theirs)
    assert ours.std() > 0.1
    return ((ours - theirs).abs().max() / ours.abs().max()).item()


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert not [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def meta_state(preset):
    with torch.device("meta"):
        return build(preset).network.state_dict()


# -- diffusers: the published networks ---------------------------------------------------------------------------------

# config.json of google/ddpm-cifar10-32 and of google/ddpm-cat-256, and their scheduler_config.json.
PUBLISHED = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "downsample_padding": 0,
    "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-06, "norm_num_groups": 32, "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
PUBLISHED_256 = PUBLISHED | {
    "block_out_channels": [128, 128, 256, 256, 512, 512], "sample_size": 256,
    "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
    "variance_type": "fixed_large",
}  # fmt: skip
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def their_network(config):
    """diffusers' network without memory for its weights."""
    with torch.device("meta"):
        return UNet2DModel.from_config(dict(config)).eval().requires_grad_(False)


def as_published(folder, unet, scheduler, state, file="diffusion_pytorch_model.bin"):
    """A folder laid out as google/ddpm-cifar10-32 is: everything at the top, and attention's old names."""
    folder.mkdir()
    for name, values in (("config.json", unet), ("scheduler_config.json", scheduler)):
        (folder / name).write_text(json.dumps(values))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    old = {}
    for name, value in state.items():
        for now, then in OLD_NAMES.items():
            name = name.replace(f".{now}.", f".{then}.")
        old[name] = value.contiguous()
    save_file(old, folder / file) if file.endswith("safetensors") else torch.save(old, folder / file)
    return folder


def test_the_published_cifar10_network_comes_in(tmp_path):
    """diffusers' network of the published configuration, with weights of its own making: the same output to 1e-5."""
    model = their_network(PUBLISHED)
    g = torch.Generator().manual_seed(1)
    model.load_state_dict({name: drawn(p.shape, name, g) for name, p in model.named_parameters()}, assign=True)
    folder = as_published(tmp_path / "ddpm-cifar10-32", PUBLISHED, SCHEDULER, model.state_dict())
    assert any(
        name.endswith(".proj_attn.bias")
        for name in torch.load(folder / "diffusion_pytorch_model.bin", weights_only=True)
    )
    assert interop.recognise(folder) == "diffusers"
    preset, state = from_diffusers(folder)
    assert preset == replace(CIFAR10, data="", dropout=0.0)  # which the published configuration does not say
    net = network(preset, state)
    assert apart(net, model, *inputs(preset)) < 1e-5
    assert_same(model.state_dict(), export_state(state, preset, "diffusers"))


def test_our_cifar10_network_goes_out(tmp_path):
    """With random weights: diffusers loads it and says the same to 1e-5; read again it is the same to the bit."""
    found = random_model(CIFAR10)
    folder = exported(found, tmp_path / "out")
    model = UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert apart(found.denoiser.network, model, *inputs(CIFAR10)) < 1e-5
    preset, state = from_diffusers(folder)
    assert preset == replace(CIFAR10, data="")
    assert_same(state, found.denoiser.network.state_dict())
    config = json.loads((folder / "unet/config.json").read_text())
    assert {name: config[name] for name in PUBLISHED} == PUBLISHED | {"_diffusers_version": folders.VERSION}


@pytest.mark.parametrize("name", ["cifar10", "celebahq256"])  # LSUN's is the same as the second
def test_every_weight_of_the_published_networks(name):
    """All names and shapes of diffusers' network by the published configuration, and of ddim's."""
    preset = PRESETS[name]
    model = their_network(PUBLISHED if name == "cifar10" else PUBLISHED_256)
    ddim = Ddim(preset, device="meta")
    ddim(torch.empty(1, *preset.shape, device="meta"), torch.empty(1, device="meta"))
    for package, theirs in (("diffusers", model.state_dict()), ("ddim", ddim.state)):
        assert shapes(export_state(meta_state(preset), preset, package)) == shapes(theirs)
        assert shapes(import_state(theirs, preset, package)) == shapes(meta_state(preset))


def test_the_published_256_network(tmp_path):
    """The architecture of CelebA-HQ and LSUN, whole, on a small image: six levels, attention on the fifth."""
    found = random_model(CELEBAHQ)
    (folder := tmp_path / "celebahq").mkdir()
    state = export_state(found.denoiser.network.state_dict(), CELEBAHQ, "diffusers")
    model = their_network(PUBLISHED_256)
    model.load_state_dict(state, assign=True)
    assert apart(found.denoiser.network, model, *inputs(CELEBAHQ, (32, 32), batch=1)) < 1e-5
    # of the files the settings only: 455 MB need not go to the disk
    (folder / "config.json").write_text(json.dumps(PUBLISHED_256))
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULER | {"variance_type": "fixed_small"}))
    save_file({}, folder / "diffusion_pytorch_model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "read_tensors", lambda path: state)
        preset, ours = from_diffusers(folder)
    fields = (
        "size",
        "channels",
        "width",
        "channel_multipliers",
        "num_res_blocks",
        "attention_resolutions",
        "dropout",
        "variance",
        "predict",
    )
    assert {f: getattr(preset, f) for f in fields} == {f: getattr(CELEBAHQ, f) for f in fields}
    assert_same(ours, found.denoiser.network.state_dict())


SWAPS = {
    "query and key": (".to_q.", ".to_k."),
    "key and value": (".to_k.", ".to_v."),
    "the two norms": (".norm1.", ".norm2."),
    "the two convolutions": (".conv1.", ".conv2."),
    "the first two blocks on the way up": ("up_blocks.0.resnets.0.", "up_blocks.0.resnets.1."),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_the_comparison_has_teeth(swap):
    """Negative control: weights of one shape exchanged, wherever they are, and the outputs part."""
    found = random_model(SMALL)
    state = export_state(found.denoiser.network.state_dict(), SMALL, "diffusers")
    model = their_network(PUBLISHED | SMALL_CONFIG)
    model.load_state_dict(state, assign=True)
    net = found.denoiser.network
    assert apart(net, model, *inputs(SMALL)) < 1e-5
    a, b = SWAPS[swap]
    wrong = dict(state)
    for name in state:
        other = name.replace(a, b)
        if a in name and state[other].shape == state[name].shape:
            wrong[name], wrong[other] = state[other], state[name]
    assert any(wrong[name] is not state[name] for name in state)
    model.load_state_dict(wrong, assign=True)
    assert apart(net, model, *inputs(SMALL)) > 1e-2
    assert apart(network(SMALL, import_state(wrong, SMALL, "diffusers")), model, *inputs(SMALL)) < 1e-5


SMALL_CONFIG = {
    "norm_num_groups": 8, "block_out_channels": [32, 32], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "in_channels": 1, "out_channels": 1, "sample_size": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {
            "size": (8, 16),
            "channels": 3,
            "channel_multipliers": (1, 2),
            "attention_resolutions": (0,),
            "dropout": 0.25,
            "schedule": "const",
        },
        {
            "size": (12, 12),
            "channel_multipliers": (1, 1, 1),
            "attention_resolutions": (12, 3),
            "num_res_blocks": 2,
            "channels": 4,
            "schedule": "warmup50",
        },
        {"width": 96, "variance": "learned_range", "loss": "hybrid", "predict": "v"},
    ],
    ids=["rectangular", "three levels", "learned"],
)
def test_there_and_back(changes, tmp_path):
    """Other shapes: the same output, and the same preset and bits when read again."""
    preset = replace(SMALL, **changes)
    found = random_model(preset)
    folder = exported(found, tmp_path / "out")
    model = UNet2DModel.from_pretrained(folder, subfolder="unet")
    assert apart(found.denoiser.network, model, *inputs(preset)) < 1e-5
    back, state = from_diffusers(folder)
    assert back == preset
    assert_same(state, found.denoiser.network.state_dict())


def test_class_labels_go_out_and_come_in(tmp_path, capsys):
    """As num_class_embeds, and back: the names are numbers then; it may never have been without a label."""
    found = random_model(replace(SMALL, classes=True, class_names=("cat", "dog", *"abcdefgh")))
    net, folder = found.denoiser.network, tmp_path / "out"
    to_diffusers(found, folder, "all")
    model = UNet2DModel.from_pretrained(folder, subfolder="unet")
    back, state = from_diffusers(folder)
    assert (back.classes, back.class_names) == (True, tuple("0123456789"))
    assert_same(state, net.state_dict())
    x, timestep = inputs(SMALL)
    y, other = torch.tensor([3, 9]), torch.tensor([4, 9])
    assert apart(lambda *a: net(*a, y), lambda *a: model(*a, class_labels=y), x, timestep) < 1e-5
    assert apart(lambda *a: net(*a, y), lambda *a: model(*a, class_labels=other), x, timestep) > 1e-2
    assert back.label_dropout == 0
    assert main(["import", str(folder), "--out", str(tmp_path / "in.safetensors")]) == 0
    for found in (folder, tmp_path / "in.safetensors"):
        words = ["sample", str(found), "-n", "1", "--steps", "1", "--out", str(tmp_path / "a.png"), "--class", "3"]
        assert main([*words, "--guidance", "2"]) == 2
        assert "never saw an image without its label; want 1" in capsys.readouterr().err
        assert main([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["guidance"] == 1


# -- diffusers: samples ------------------------------------------------------------------------------------------------

DIFFUSIONS = {
    "linear": {"predict": "eps", "variance": "fixed_large"},
    "quad": {"predict": "x0", "variance": "learned_range", "loss": "hybrid", "clip": False},
    "warmup10": {"predict": "eps", "variance": "fixed_small"},
    "jsd": {"predict": "v", "variance": "fixed_large"},
    "cosine": {"predict": "v", "variance": "fixed_small"},
}


@pytest.fixture(scope="module", params=DIFFUSIONS)
def pipelined(request, tmp_path_factory):
    """A checkpoint of each schedule, with all kinds of prediction and variance, its folder, and what loads from it."""
    found = random_model(replace(SMALL, schedule=request.param, **DIFFUSIONS[request.param]))
    folder = exported(found, tmp_path_factory.mktemp("pipelines") / "out")
    pipes = [kind.from_pretrained(folder) for kind in (DDPMPipeline, DDIMPipeline)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return found, folder, *pipes


def stream(seed=0, batch=2):
    """noise(t) that draws one after the other from a generator, as a pipeline does, whatever the level."""
    g = torch.Generator().manual_seed(seed)
    return lambda t: torch.randn(batch, *SMALL.shape, generator=g)


def as_pipeline(x):
    """What a pipeline returns before it rounds: [0, 1], channels last."""
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def last(steps):
    *_, step = steps
    return step.x


def test_the_table_is_the_same(pipelined):
    """diffusers' betas are ours, by its own formula where it has one, and the schedule is known again by name."""
    found, folder, *_ = pipelined
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    torch.testing.assert_close(scheduler.betas.double(), found.denoiser.schedule.beta[1:], rtol=1e-5, atol=0)
    assert (scheduler.config.trained_betas is None) == (found.preset.schedule in ("linear", "quad", "cosine"))
    assert from_diffusers(folder)[0] == found.preset


@pytest.mark.parametrize("steps", [10, 5])
def test_ddpm_pipeline(steps, pipelined):
    """The pipeline's own loop, and its parts step by step, against ours with the noise that the pipeline draws."""
    found, _, pipe, _ = pipelined
    noise = stream()
    ours = list(samplers.ancestral(found.denoiser, noise(10), noise, steps=steps))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, *SMALL.shape, generator=g)
    pipe.scheduler.set_timesteps(steps)
    # it adds noise wherever the network is told more than 0, on the way to x_0 too if it does not go through level 1
    noisy_end = steps < 10 and found.denoiser.variance != "fixed_small"
    for timestep, (level, expected, _) in zip(pipe.scheduler.timesteps, ours, strict=True):
        with torch.no_grad():
            x = pipe.scheduler.step(pipe.unet(x, timestep).sample, timestep, x, generator=g).prev_sample
        same = (x - expected).abs().max() < 1e-4 * max(1, expected.abs().max())
        assert same == (level > 0 or not noisy_end), level
    g.manual_seed(0)
    images = pipe(batch_size=2, num_inference_steps=steps, generator=g, output_type="np").images
    assert images.std() > 0.1
    assert abs(images - as_pipeline(x)).max() < 1e-6
    assert noisy_end or abs(images - as_pipeline(ours[-1].x)).max() < 1e-4


def test_the_comparison_of_samples_has_teeth(pipelined):
    """Negative control: another variance, another clipping."""
    found, _, pipe, _ = pipelined
    g = torch.Generator().manual_seed(0)
    images = pipe(2, num_inference_steps=10, generator=g, output_type="np").images
    changes = [{"clip": not found.denoiser.clip}]
    if not found.denoiser.learned:
        changes += [{"variance": {"fixed_large": "fixed_small", "fixed_small": "fixed_large"}[found.denoiser.variance]}]
    for change in changes:
        noise = stream()
        wrong = last(samplers.ancestral(replace(found.denoiser, **change), noise(10), noise))
        assert abs(images - as_pipeline(wrong)).max() > 1e-3, change


@pytest.mark.parametrize(("steps", "eta"), [(5, 0.0), (5, 0.5)])
def test_ddim_pipeline(steps, eta, pipelined):
    """From the same noise; with eta also of its own seed an image, which their scheduler takes step by step."""
    found, _, _, pipe = pipelined
    if found.denoiser.learned:
        pytest.skip("DDIMScheduler takes no network that gives its variance")
    g = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": steps, "eta": eta, "output_type": "np"}
    images = pipe(2, g, use_clipped_model_output=True, **options).images
    noise = stream()
    ours = last(samplers.ddim(found.denoiser, noise(10), steps=steps, eta=eta, noise=noise))
    assert abs(images - as_pipeline(ours)).max() < 1e-4
    assert images.std() > 0.1

    noise = ddpm.noise.per_image([7, 8], SMALL.shape)
    x = noise(10)
    for timestep, step in zip(
        pipe.scheduler.timesteps, samplers.ddim(found.denoiser, x, steps=steps, eta=eta, noise=noise), strict=True
    ):
        with torch.no_grad():
            out = pipe.unet(x, timestep).sample
        x = pipe.scheduler.step(out, timestep, x, eta, True, variance_noise=noise(step.t)).prev_sample
        assert (x - step.x).abs().max() < 1e-4 * max(1, step.x.abs().max()), step.t


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_what_a_pipeline_saves_comes_in(kind, small_folder, tmp_path):
    """By diffusers' own save_pretrained; DDIMScheduler keeps the variance, which it does not use, as it was."""
    kind.from_pretrained(small_folder).save_pretrained(tmp_path / "saved")
    (preset, state), (saved, weights) = from_diffusers(small_folder), from_diffusers(tmp_path / "saved")
    assert (preset, saved) == (SMALL, SMALL)
    assert_same(state, weights)


def test_what_diffusers_calls_learned():
    """Why that is refused: the network's second half is sigma^2 itself there."""
    scheduler = DDPMScheduler(variance_type="learned")

    def step(variance):
        out = torch.cat([torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), variance)], dim=1)
        return scheduler.step(out, 500, torch.zeros(1, 1, 4, 4), generator=torch.Generator().manual_seed(0)).prev_sample

    torch.testing.assert_close(step(4.0), 2 * step(1.0))
    assert (step(0.0) == 0).all()


# -- diffusers: what is refused ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return exported(random_model(SMALL), tmp_path_factory.mktemp("small") / "out")


def settings_of(folder, part):
    file = folder / {"unet": "unet/config.json", "scheduler": "scheduler/scheduler_config.json"}[part]
    return file, json.loads(file.read_text())


def changed(small_folder, folder, part, changes, absent=()):
    """A copy with other settings; its weights are a link."""
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(small_folder, folder, ignore=ignore)
    weights = "unet/diffusion_pytorch_model.safetensors"
    (folder / weights).symlink_to(small_folder / weights)
    file, config = settings_of(folder, part)
    file.write_text(json.dumps({name: value for name, value in (config | changes).items() if name not in absent}))
    return folder


def refused(folder):
    with pytest.raises(InputError) as error:
        from_diffusers(folder)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))
    return str(error.value).removeprefix(str(folder))


REFUSED = [
    ("unet", "_class_name", "UNet2DConditionModel", "want UNet2DModel"),
    ("unet", "sample_size", None, "want a whole number"),
    ("unet", "sample_size", 7, "7 is not divisible by 2"),
    ("unet", "in_channels", 0, "want a whole number, 1 to 1024"),
    ("unet", "out_channels", 2, "want 1"),
    ("unet", "center_input_sample", True, "want false"),
    ("unet", "time_embedding_type", "fourier", 'want "positional"'),
    ("unet", "time_embedding_dim", 256, "want null or 128"),
    ("unet", "freq_shift", 2, "want 0, 1"),
    ("unet", "flip_sin_to_cos", None, "want true, false"),
    ("unet", "down_block_types", ["DownBlock2D", "ResnetDownsampleBlock2D"], "want DownBlock2D or AttnDownBlock2D"),
    ("unet", "down_block_types", ["DownBlock2D"], "each of 2 levels"),
    ("unet", "mid_block_type", None, 'want "UNetMidBlock2D"'),
    ("unet", "up_block_types", ["UpBlock2D", "AttnUpBlock2D"], "as on the way down"),
    ("unet", "block_out_channels", [48, 96], "which is a multiple of 32"),
    ("unet", "block_out_channels", [32, 48], "want multiples of the first"),
    ("unet", "block_out_channels", [], "want whole numbers"),
    ("unet", "layers_per_block", 0, "want a whole number of at least 1"),
    ("unet", "mid_block_scale_factor", 2, "want 1"),
    ("unet", "downsample_padding", 2, "want 0, 1"),
    ("unet", "downsample_type", "resnet", 'want "conv"'),
    ("unet", "upsample_type", "resnet", 'want "conv"'),
    ("unet", "dropout", 1.5, "want a finite number"),
    ("unet", "act_fn", "gelu", 'want "silu"'),
    ("unet", "attention_head_dim", 64, "want at most 32"),
    ("unet", "attention_head_dim", 12, "want a divisor of 32"),
    ("unet", "attention_head_dim", 0, "want a whole number of at least 1"),
    ("unet", "norm_num_groups", 5, "want a divisor of 32"),
    ("unet", "norm_num_groups", None, "want a whole number of at least 1"),
    ("unet", "attn_norm_num_groups", 16, "want 8, as norm_num_groups"),
    ("unet", "norm_eps", -1e-5, "want a finite number"),
    ("unet", "resnet_time_scale_shift", "ada_group", 'want "default", "scale_shift"'),
    ("unet", "add_attention", None, "want true, false"),
    ("unet", "class_embed_type", "timestep", "want null"),
    ("unet", "num_class_embeds", -1, "want a whole number of at least 0"),
    ("unet", "window_size", 7, "an unknown setting"),
    ("scheduler", "_class_name", "FlowMatchEulerDiscreteScheduler", "want one of DDPMScheduler, "),
    ("scheduler", "num_train_timesteps", 0, "want a whole number of at least 1"),
    ("scheduler", "beta_start", 0, "want a finite number"),
    ("scheduler", "beta_end", 2.0, "want a finite number"),
    ("scheduler", "beta_schedule", "sigmoid", 'want "linear"'),
    ("scheduler", "trained_betas", [0.1] * 9 + [0.11], "one of the schedules"),
    ("scheduler", "trained_betas", [0.1] * 9, "or 10 numbers"),
    ("scheduler", "trained_betas", [0.1] * 9 + ["x"], "or 10 numbers"),
    ("scheduler", "variance_type", "learned", 'want null, "fixed_small"'),
    ("scheduler", "variance_type", "fixed_large_log", 'want null, "fixed_small"'),
    ("scheduler", "predict_epsilon", "yes", "want true or false"),
    ("scheduler", "predict_epsilon", False, "not with predict_epsilon"),
    ("scheduler", "clip_sample", "yes", "want true, false"),
    ("scheduler", "prediction_type", "pf_ode", 'want "epsilon"'),
    ("scheduler", "thresholding", True, "want false"),
    ("scheduler", "clip_sample_range", 2.0, "want 1.0"),
    ("scheduler", "rescale_betas_zero_snr", True, "want false"),
    ("scheduler", "solver_order", 2, "an unknown setting"),
]


def test_a_schedule_without_its_last_levels_is_not_exported(tmp_path):
    """Their pipelines would begin at levels that the network never saw."""
    preset = replace(SMALL, last_sigma=2.0)
    with pytest.raises(InputError, match="last_sigma 2: diffusers' schedules have all levels"):
        exported(random_model(preset), tmp_path / "out")


@pytest.mark.parametrize(("part", "name", "value", "words"), REFUSED)
def test_a_setting_is_refused_by_name(part, name, value, words, small_folder, tmp_path):
    folder = changed(small_folder, tmp_path / "changed", part, {name: value})
    message = refused(folder)
    assert message.startswith(f"/{settings_of(folder, part)[0].relative_to(folder)}: ")
    assert {"sample_size": "size"}.get(name, name) in message
    assert words in message


def test_an_absent_setting_is_their_default(small_folder, tmp_path):
    """diffusers' own class says what it is."""
    names = ["attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift", "norm_eps"]
    folder = changed(small_folder, tmp_path / "changed", "unet", {}, absent=names)
    preset, state = from_diffusers(folder)
    assert apart(network(preset, state), UNet2DModel.from_pretrained(folder, subfolder="unet"), *inputs(preset)) < 1e-5
    assert preset.details == Details(norm_eps=1e-5, head_channels=8, even_padding=True, frequency_shift=0)


def test_every_setting_of_diffusers_is_known_and_its_default_is_right():
    """By the classes themselves."""
    with torch.device("meta"):
        unet = UNet2DModel().config
    schedulers = {name: getattr(diffusers, name)().config for name in folders.CLASSES[:5]}
    theirs = {"unet": unet, **schedulers}
    for part, config in theirs.items():
        table = folders.UNET if part == "unet" else folders.SCHEDULER | folders.DDPM
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        assert config.keys() <= table.keys()
        for name, value in config.items():
            assert table[name][0] == (list(value) if isinstance(value, tuple) else value), name
    assert folders.UNET.keys() <= theirs["unet"].keys()
    of_old_versions = {"set_alpha_to_zero", "tensor_format"}
    of_other_classes = {"use_flow_sigmas", "timestep_type"}
    known = folders.SCHEDULER.keys() | folders.DDPM.keys()
    assert known - of_old_versions - of_other_classes <= set().union(*schedulers.values())


JSON = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.lists(st.integers())
ONE_VALUE = {
    "center_input_sample": False, "mid_block_type": "UNetMidBlock2D", "mid_block_scale_factor": 1,
    "class_embed_type": None, "downsample_type": "conv", "upsample_type": "conv",
}  # fmt: skip


@given(name=st.sampled_from(sorted(ONE_VALUE)), value=JSON)
@settings(max_examples=25)
def test_no_other_value_of_a_setting_comes_in(name, value, small_folder, tmp_path_factory):
    """Whatever it is; the one that our network has does."""
    folder = changed(small_folder, tmp_path_factory.getbasetemp() / "settings", "unet", {name: value})
    if value == ONE_VALUE[name]:
        assert from_diffusers(folder)[0] == SMALL
    else:
        assert name in refused(folder)


@given(part=st.sampled_from(["unet", "scheduler"]), data=st.data())
@settings(max_examples=40)
def test_any_value_of_any_setting_comes_in_or_is_an_input_error(part, data, small_folder, tmp_path_factory):
    config = settings_of(small_folder, part)[1]
    name = data.draw(st.sampled_from(sorted(config)))
    small = st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text() | st.lists(st.integers(0, 9))
    folder = changed(small_folder, tmp_path_factory.getbasetemp() / "any", part, {name: data.draw(small)})
    with suppress(InputError):
        assert isinstance(from_diffusers(folder)[0], Preset)


def test_what_says_nothing_of_the_model_comes_in(small_folder, tmp_path):
    """Unknown names that are null or begin with _, names of one value, which levels are visited; DDIM's scheduler."""
    changes = {"_name_or_path": "x", "timestep_values": None, "timestep_spacing": "leading", "steps_offset": 1}
    changes |= {"variance_type": "fixed_small_log", "_class_name": "DDIMScheduler", "set_alpha_to_one": True}
    folder = changed(small_folder, tmp_path / "changed", "scheduler", changes)
    assert from_diffusers(folder)[0] == replace(SMALL, variance="fixed_small")
    changes = {"act_fn": "swish", "attn_norm_num_groups": 8, "sample_size": [4, 4], "num_train_timesteps": 1000}
    assert from_diffusers(changed(small_folder, tmp_path / "other", "unet", changes))[0] == SMALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_table_of_betas_is_known_again(name, dtype, small_folder, tmp_path):
    """Also one of float32 that does not say what it was made from, where that can be told from it."""
    ends = (1e-3, 0.25)
    table = SCHEDULES[name](10, *ends).beta[1:].to(dtype).tolist()
    predict = {"prediction_type": "v_prediction"}
    folder = changed(small_folder, tmp_path / "changed", "scheduler", {"trained_betas": table, **predict})
    preset = from_diffusers(folder)[0]
    torch.testing.assert_close(build(replace(preset, width=32)).schedule.beta[1:].tolist(), table, rtol=1e-5, atol=0)
    if name not in ("const", "jsd", "cosine", "log_snr"):  # of which beta_1, or both, have no part in the table
        assert preset.schedule == name
        assert (preset.beta_1, preset.beta_T) == pytest.approx(ends, rel=1e-6)


def test_damaged_folders(small_folder, tmp_path):
    for name, words in (("unet/config.json", "damaged"), ("scheduler/scheduler_config.json", "damaged")):
        folder = changed(small_folder, tmp_path / "changed", "unet", {})
        (folder / name).write_text("{")
        assert words in refused(folder)
        (folder / name).write_text("[]")
        assert "_class_name None" in refused(folder)
    (folder / "unet/config.json").unlink()
    assert "want a diffusers folder" in refused(folder)
    folder = changed(small_folder, tmp_path / "changed", "unet", {})
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    assert "has no weights; want diffusion_pytorch_model.safetensors or" in refused(folder)
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        weights.write_bytes(data[:size])
        assert "not a whole safetensors file" in refused(folder)


@pytest.mark.parametrize("package", ["diffusers", "ddim"])
def test_weights_are_accounted_for(package):
    """Each missing one, one more, and each of another shape is named with what was wanted."""
    state = export_state(meta_state(SMALL), SMALL, package)
    import_state(state, SMALL, package)
    for name in state:
        with pytest.raises(InputError) as error:
            import_state({k: v for k, v in state.items() if k != name}, SMALL, package)
        assert str(error.value) == f"{name} is missing; want {list(state[name].shape)}"
    for name, value in list(state.items())[::3]:
        for wrong in (value[:-1], value[None]):
            with pytest.raises(InputError) as error:
                import_state(state | {name: wrong}, SMALL, package)
            assert str(error.value) == f"{name} of shape {list(wrong.shape)}: want {list(value.shape)}"
    with pytest.raises(InputError, match=r"^logvar: not of this network; want only its \d+ names"):
        import_state(state | {"logvar": torch.zeros(1000)}, SMALL, package)
    with pytest.raises(InputError, match=r"^a and 1 more: not of this network"):
        import_state(state | {"logvar": torch.zeros(1000), "a": torch.zeros(())}, SMALL, package)


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_old_names(file, tmp_path):
    """Of attention's layers; half precision becomes float32; one that is there by both names is refused."""
    found = random_model(SMALL)
    state = {k: v.half() for k, v in export_state(found.denoiser.network.state_dict(), SMALL, "diffusers").items()}
    unet, scheduler = PUBLISHED | SMALL_CONFIG, SCHEDULER | {"num_train_timesteps": 10, "beta_end": 0.5}
    preset, ours = from_diffusers(as_published(tmp_path / "old", unet, scheduler, state, file))
    assert preset == SMALL
    assert_same(ours, {k: v.half().float() for k, v in found.denoiser.network.state_dict().items()})
    both = {name.replace(".to_q.", ".query."): value for name, value in state.items()} | state
    with pytest.raises(InputError, match=r"attentions\.0\.\S+: is there twice"):
        folders._with_current_names(both)


class Code:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_file_is_not_run(tmp_path):
    """Neither of diffusers' .bin nor of ddim's .ckpt; the file would run by itself."""
    ran, state = tmp_path / "ran", export_state(random_model(SMALL).denoiser.network.state_dict(), SMALL, "ddim")
    file = tmp_path / "model.ckpt"
    torch.save(state | {"x": Code(ran)}, file)
    torch.load(file, weights_only=False)
    assert ran.exists()
    ran.unlink()
    unet, scheduler = PUBLISHED | SMALL_CONFIG, SCHEDULER
    folder = as_published(tmp_path / "folder", unet, scheduler, {})
    shutil.copy(file, folder / "diffusion_pytorch_model.bin")
    for call in (lambda: interop.read(file, WIDE)[1], lambda: interop.recognise(file), lambda: from_diffusers(folder)):
        with pytest.raises(InputError, match="not plain weights"):
            call()
    assert not ran.exists()


# -- diffusers: what cannot go out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "changes", "words"),
    [
        ({"patch": 2}, {}, r"patch 2: .* no outer level .* patch 1, or an export with --out FILE\.safetensors"),
        ({}, {"clip": 0.99}, "clip 0.99: .* want static or none"),
        ({"channel_multipliers": (2, 2)}, {}, r"channel_multipliers \(2, 2\): .* want 1 first"),
        ({"predict": "mu"}, {}, "predict mu: .* eps, x0, v"),
        ({"variance": "learned", "loss": "vlb"}, {}, "variance learned: .* want fixed_large, fixed_small or learned_r"),
        ({}, {"variance": torch.ones(11, dtype=torch.float64)}, "variance calibrated: .* want fixed_large"),
    ],
)
def test_what_diffusers_cannot_express(preset, changes, words, tmp_path):
    with pytest.raises(InputError, match=f"^model.safetensors: {words}"):
        to_diffusers(random_model(replace(SMALL, **preset), **changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_stays(tmp_path):
    """A file too; an empty folder is taken, and one whose parents are not there is made."""
    found = random_model(SMALL)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    for path in (tmp_path / "full", tmp_path / "full/notes.txt"):
        with pytest.raises(InputError, match=f"^out {path}: exists already; want a new or an empty folder"):
            to_diffusers(found, path)
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "notes.txt"]
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new/deep"):
        assert from_diffusers(exported(found, folder))[0] == SMALL
        assert not list(folder.parent.glob(".*"))


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(folders, "save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        to_diffusers(random_model(SMALL), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- ddim --------------------------------------------------------------------------------------------------------------


class Ddim:
    """The U-Net of ermongroup/ddim, from its description, as a function of `state`, which it fills as it goes."""

    def __init__(self, preset, device="cpu"):
        self.preset, self.state, self.device = preset, {}, device
        self.g = torch.Generator().manual_seed(3)

    def weights(self, name, c_out, *c_in):
        """weight [c_out, *c_in] and bias [c_out] of a layer."""
        for leaf, shape in (("weight", (c_out, *c_in)), ("bias", (c_out,))):
            if f"{name}.{leaf}" not in self.state:
                made = (
                    torch.empty(shape, device="meta")
                    if self.device == "meta"
                    else drawn(shape, f"{name}.{leaf}", self.g)
                )
                self.state[f"{name}.{leaf}"] = made
        return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

    def conv(self, name, x, c_out, kernel=3, **how):
        return F.conv2d(x, *self.weights(name, c_out, x.shape[1], kernel, kernel), **how)

    def same(self, name, x, c_out):
        return self.conv(name, x, c_out, padding=1)

    def dense(self, name, x, c_out):
        return F.linear(x, *self.weights(name, c_out, x.shape[1]))

    def norm(self, name, x):
        return F.group_norm(x, 32, *self.weights(name, x.shape[1]), eps=1e-6)

    def block(self, name, x, temb, c_out):
        h = self.same(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), c_out)
        h = h + self.dense(f"{name}.temb_proj", F.silu(temb), c_out)[..., None, None]
        h = self.same(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), c_out)
        return h + (x if x.shape[1] == c_out else self.conv(f"{name}.nin_shortcut", x, c_out, 1))

    def attention(self, name, x):
        n, c = self.norm(f"{name}.norm", x), x.shape[1]
        q, k, v = (self.conv(f"{name}.{part}", n, c, 1).flatten(2) for part in "qkv")
        weight = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(c), dim=2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("bij,bcj->bci", weight, v).view_as(x), c, 1)

    def __call__(self, x, t):
        p = self.preset
        half = p.width // 2
        angle = t.float()[:, None] * 1e4 ** (-torch.arange(half, device=self.device) / (half - 1))
        temb = self.dense("temb.dense.0", torch.cat([angle.sin(), angle.cos()], 1), 4 * p.width)
        temb = self.dense("temb.dense.1", F.silu(temb), 4 * p.width)
        widths, bottom = [p.width * m for m in p.channel_multipliers], len(p.channel_multipliers) - 1
        h = self.same("conv_in", x, p.width)
        kept = [h]
        for level, width in enumerate(widths):
            for i in range(p.num_res_blocks):
                h = self.block(f"down.{level}.block.{i}", h, temb, width)
                if level in p.attention_levels:
                    h = self.attention(f"down.{level}.attn.{i}", h)
                kept.append(h)
            if level < bottom:
                h = self.conv(f"down.{level}.downsample.conv", F.pad(h, (0, 1, 0, 1)), width, stride=2)
                kept.append(h)
        h = self.block("mid.block_1", h, temb, widths[-1])
        h = self.block("mid.block_2", self.attention("mid.attn_1", h), temb, widths[-1])
        for level in range(bottom, -1, -1):
            for i in range(p.num_res_blocks + 1):
                h = self.block(f"up.{level}.block.{i}", torch.cat([h, kept.pop()], 1), temb, widths[level])
                if level in p.attention_levels:
                    h = self.attention(f"up.{level}.attn.{i}", h)
            if level > 0:
                h = self.same(f"up.{level}.upsample.conv", F.interpolate(h, scale_factor=2), widths[level])
        return self.same("conv_out", F.silu(self.norm("norm_out", h)), p.channels)


def ddim_model(preset):
    model = Ddim(preset)
    with torch.no_grad():
        model(*inputs(preset, batch=1))
    return model


def test_the_cifar10_network_of_ddim_comes_in(tmp_path):
    """The same output to 1e-5; the sizes are told by the weights."""
    model = ddim_model(CIFAR10)
    file = tmp_path / "ema_diffusion_cifar10_model-790000.ckpt"
    torch.save(model.state, file)
    assert interop.recognise(file) == "ddim"
    assert infer_preset(interop.read_file(file)[1]) == replace(CIFAR10, data="")
    net = network(CIFAR10, interop.read(file, CIFAR10)[1])
    assert apart(net, model, *inputs(CIFAR10)) < 1e-5
    assert_same(export_state(net.state_dict(), CIFAR10, "ddim"), model.state)


@pytest.mark.parametrize(
    "changes",
    [
        {"size": (8, 8), "channel_multipliers": (1, 2), "attention_resolutions": (4,), "channels": 3},
        {
            "size": (8, 8),
            "channel_multipliers": (2, 1, 1),
            "attention_resolutions": (8, 2),
            "num_res_blocks": 2,
        },  # the width is not at full size
    ],
)
def test_other_networks_of_ddim(changes, tmp_path):
    preset = replace(WIDE, **changes)
    model = ddim_model(preset)
    save_file(model.state, tmp_path / "model.safetensors")
    assert (
        apart(network(preset, interop.read(tmp_path / "model.safetensors", preset)[1]), model, *inputs(preset)) < 1e-5
    )


@pytest.mark.parametrize(
    ("a", "b"), [("attn_1.q", "attn_1.k"), ("attn_1.k", "attn_1.v"), ("block_1.norm1", "block_1.norm2")]
)
def test_the_comparison_with_ddim_has_teeth(a, b, tmp_path):
    """Negative control: two layers exchanged."""
    model = ddim_model(WIDE)
    names = {f"mid.{x}.{leaf}": f"mid.{y}.{leaf}" for x, y in ((a, b), (b, a)) for leaf in ("weight", "bias")}
    torch.save({name: model.state[names.get(name, name)] for name in model.state}, tmp_path / "model.pt")
    assert apart(network(WIDE, interop.read(tmp_path / "model.pt", WIDE)[1]), model, *inputs(WIDE)) > 1e-3


def test_training_checkpoints_of_ddim(tmp_path):
    """[model, optimizer, epoch, step, average]: the average, else the model; with "module." or without."""
    raw, average = ddim_model(WIDE).state, Ddim(WIDE)
    average.g.manual_seed(4)
    with torch.no_grad():
        average(*inputs(WIDE))
    wrapped = {f"module.{name}": value for name, value in raw.items()}
    adam = torch.optim.Adam([p := nn.Parameter(torch.zeros(3))])
    p.sum().backward()
    adam.step()
    rest = [adam.state_dict(), 5, 1000]
    layouts = [
        ([wrapped, *rest, average.state], average.state),
        ([wrapped, *rest], raw),
        ([wrapped, *rest, None], raw),
        (wrapped, raw),
        (raw, raw),
    ]
    for number, (saved, expected) in enumerate(layouts):
        file = tmp_path / f"ckpt_{number}.pth"
        torch.save(saved, file, _use_new_zipfile_serialization=number % 2 == 0)
        assert interop.recognise(file) == "ddim"
        assert_same(interop.read_file(file)[1], expected)
        assert_same(interop.read(file, WIDE)[1], import_state(expected, WIDE, "ddim"))


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([], "not weights of a known package; want a diffusers folder"),
        ([1, 2], "not weights of a known package"),
        ({}, "not weights of a known package"),
        ({"state_dict": {"a": torch.zeros(1)}}, "not weights of a known package"),
        ({0: 1}, "not weights of a known package"),
        ({"downs.0.0.block1.proj.weight": torch.zeros(1)}, "weights of lucidrains/denoising-diffusion-pytorch, whose"),
        ({"time_embedding.linear_1.weight": torch.zeros(1)}, "weights of diffusers without their settings; want the f"),
    ],
)
def test_other_files_are_not_ddims(saved, words, tmp_path):
    file = tmp_path / "model.pt"
    torch.save(saved, file)
    for call in (lambda: interop.read(file, WIDE)[1], lambda: interop.recognise(file)):
        with pytest.raises(InputError, match=f"^{file}: {words}"):
            call()


def test_damaged_files_of_ddim(tmp_path):
    """Cut off anywhere."""
    whole = tmp_path / "whole.pt"
    torch.save({"temb.dense.0.weight": torch.zeros(3)}, whole)
    data = whole.read_bytes()
    file = tmp_path / "model.pt"
    for size in (0, 1, 20, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(InputError, match="not plain weights"):
            interop.read(file, WIDE)[1]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="not a whole safetensors file"):
        interop.read(tmp_path / "model.safetensors", WIDE)[1]


def test_the_preset_must_be_of_the_weights(tmp_path):
    """What ddim has not, and a network of another shape."""
    file = tmp_path / "model.pt"
    torch.save(ddim_model(WIDE).state, file)
    for changes, words in (
        ({"patch": 2}, "patch 2: .* want 1"),
        (
            {"width": 64},
            r"conv_in.weight of shape .*: want|temb.dense.0.weight of shape \[512, 128\]: want \[256, 64\]",
        ),
        (
            {"channel_multipliers": (1, 2)},
            r"down.1.block.0.norm2.weight of shape \[128\]: want \[256\]|.* of shape .*: want ",
        ),
        ({"attention_resolutions": (0,)}, "down.1.attn.0.k.bias and .* more: not of this network"),
        ({"attention_resolutions": (4, 2)}, "down.0.attn.0.norm.weight is missing; want \\[128\\]"),
    ):
        with pytest.raises(InputError, match=f"^{file}: {words}"):
            interop.read(file, replace(WIDE, **changes))


@pytest.mark.parametrize("name", ["cifar10", "celebahq256", "lsun_bedroom_large"])
def test_the_sizes_are_told_by_the_weights(name):
    preset = PRESETS[name]
    assert infer_preset(export_state(meta_state(preset), preset, "ddim")) == replace(preset, data="")


def test_sizes_that_no_preset_has():
    """The first level with attention is taken for 16x16; without attention nothing tells the size."""
    preset = Preset(
        size=(64, 64),
        channels=1,
        width=160,
        channel_multipliers=(1, 2, 1, 3),
        num_res_blocks=3,
        attention_resolutions=(16, 8),
    )
    state = export_state(meta_state(preset), preset, "ddim")
    assert infer_preset(state) == preset
    with pytest.raises(InputError, match="no attention on the way down"):
        infer_preset({name: value for name, value in state.items() if ".attn." not in name})
    with pytest.raises(InputError, match=r"want conv_in.weight"):
        infer_preset({name: value for name, value in state.items() if name != "conv_in.weight"})


# -- both --------------------------------------------------------------------------------------------------------------


def test_recognise(small_folder, tmp_path):
    assert interop.recognise(small_folder) == "diffusers"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(ddpm.presets.to_json(SMALL)))
    (tmp_path / "file.txt").write_text("x")
    own = models.MODELS / "digits.safetensors"
    for path in (tmp_path, tmp_path / "run", tmp_path / "nothing", tmp_path / "file.txt", own):
        with pytest.raises(InputError, match=r"want a diffusers folder, or a file \(.ckpt"):
            interop.recognise(path)


def test_what_comes_in_is_a_model_of_ours(small_folder, tmp_path):
    """Saved, it is opened as any other, and says the same."""
    preset, state = from_diffusers(small_folder)
    file = tmp_path / "imported.safetensors"
    interop.save(file, preset, {name: value.double() for name, value in state.items()}, "a folder of diffusers")
    found = open_checkpoint(file)
    assert (found.preset, found.step, found.weights) == (preset, 0, "ema")
    assert_same(found.denoiser.network.state_dict(), state)
    assert {value.dtype for value in load_file(file).values()} == {torch.float32}
    model = UNet2DModel.from_pretrained(small_folder, subfolder="unet")
    assert apart(ddpm.load(file).network, model, *inputs(preset)) < 1e-5
    # and out again
    assert_same(from_diffusers(exported(found, tmp_path / "again"))[1], state)


def test_what_is_not_of_the_preset_is_not_saved(tmp_path):
    state = meta_state(SMALL)
    file = tmp_path / "out.safetensors"
    for wrong, words in (
        ({k: v for k, v in state.items() if k != "time1.bias"}, "time1.bias: missing"),
        (state | {"x": state["time1.bias"]}, "x: not of the network of this preset"),
        (state | {"time1.bias": state["time1.weight"]}, r"time1.bias of shape \[128, 32\]: want \[128\]"),
    ):
        with pytest.raises(InputError, match=words):
            interop.save(file, SMALL, wrong, "")
    with pytest.raises(InputError, match=r"want a name that ends in .safetensors"):
        interop.save(tmp_path / "out.pt", SMALL, state, "")
    assert not list(tmp_path.iterdir())
