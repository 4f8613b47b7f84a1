"""Networks of diffusers that differ from the paper's, its other schedulers and files, and classes in its pipelines."""

import inspect
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from test_interop import SMALL, apart, assert_same, inputs, network, random_model

import ddpm
from ddpm import kernels
from ddpm.cli import main
from ddpm.details import Details
from ddpm.errors import InputError
from ddpm.files.interop import diffusers as folders
from ddpm.files.interop import from_diffusers, to_diffusers, weights_of
from ddpm.presets import from_json, to_json

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

PAPER = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None, "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "norm_eps": 1e-6,
}  # fmt: skip
# What differs in diffusers, and the details that it becomes; None: the weights are arranged in another order.
DIFFERENT = {
    "heads": ({"attention_head_dim": 8}, Details(head_channels=8)),
    "frequencies": ({"freq_shift": 0}, Details(frequency_shift=0)),
    "cosines first": ({"flip_sin_to_cos": True}, None),
    "padding": ({"downsample_padding": 1}, Details(even_padding=True)),
    "epsilon": ({"norm_eps": 1e-3}, Details(norm_eps=1e-3)),
    "groups": ({"norm_num_groups": 16}, Details(norm_groups=16)),
    "scale and shift": (
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8}, Details(scale_shift=True)
    ),
    "no attention in the middle": ({"add_attention": False}, Details(middle_attention=False)),
}  # fmt: skip


def their_folder(folder, unet=None, scheduler=None, seed=1, **save):
    """A folder that a pipeline of diffusers saved, with a network of random weights none of which is near zero."""
    torch.manual_seed(seed)
    model = UNet2DModel(**(PAPER if unet is None else unet)).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "norm" in name:
            value.add_(0.2 * torch.randn_like(value))
    DDPMPipeline(model, scheduler or DDPMScheduler()).save_pretrained(folder, **save)
    return folder, model


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_different_network_comes_in_and_goes_out(name, tmp_path):
    """The same output to 1e-5, with the kernels and without; without the detail the outputs part."""
    changes, details = DIFFERENT[name]
    folder, model = their_folder(tmp_path / "theirs", PAPER | changes)
    preset, state = from_diffusers(folder)
    assert preset.details == (details or Details())
    net = network(preset, state)
    assert apart(net, model, *inputs(preset)) < 1e-5
    with kernels.disabled():
        assert apart(net, model, *inputs(preset)) < 1e-5
    if name not in ("no attention in the middle", "scale and shift"):  # these have weights of other names and shapes
        wrong = state if details else state | {"time1.weight": state["time1.weight"].roll(16, 1)}
        assert apart(network(replace(preset, details=Details()), wrong), model, *inputs(preset)) > 1e-4
    assert from_json(json.loads(json.dumps(to_json(preset)))) == preset
    ours = replace(random_model(preset), denoiser=replace(random_model(preset).denoiser, network=net))
    to_diffusers(ours, tmp_path / "ours")
    again, same = from_diffusers(tmp_path / "ours")
    assert replace(again, dropout=preset.dropout) == preset
    assert_same(state, same)
    theirs = UNet2DModel.from_pretrained(tmp_path / "ours", subfolder="unet")
    assert apart(network(again, same), theirs, *inputs(preset)) < 1e-5


@pytest.mark.parametrize("widths", [(64, 128), (224, 448)])
def test_the_default_network_of_diffusers_comes_in(widths, tmp_path):
    """Every setting is its default: 32 groups, which have 7 channels at a width of 224, and heads of 8 channels."""
    unet = {name: PAPER[name] for name in ("sample_size", "layers_per_block", "down_block_types", "up_block_types")}
    folder, model = their_folder(tmp_path / "theirs", unet | {"block_out_channels": widths})
    preset, state = from_diffusers(folder)
    assert apart(network(preset, state), model, *inputs(preset)) < 1e-5
    assert apart(ddpm.load(folder).network, model, *inputs(preset)) < 1e-5


def test_more_groups_than_the_kernels_have(tmp_path):
    """64 groups: the kernels leave such norms to PyTorch."""
    folder, model = their_folder(tmp_path / "theirs", PAPER | {"block_out_channels": (64, 64), "norm_num_groups": 64})
    preset, state = from_diffusers(folder)
    assert preset.details.norm_groups == 64 > kernels.MAX_GROUPS
    assert apart(network(preset, state), model, *inputs(preset)) < 1e-5


def test_gradients_of_a_different_network_are_those_of_autograd(tmp_path):
    """All details together: the kernels' gradients are those of the plain path."""
    changes = {name: value for different, _ in DIFFERENT.values() for name, value in different.items()}
    folder, _ = their_folder(tmp_path / "theirs", PAPER | changes | {"attn_norm_num_groups": 16})
    net = network(*from_diffusers(folder)).double().requires_grad_(True)
    x, timestep = inputs(from_diffusers(folder)[0])
    gradients = []
    for path in (kernels.disabled, nullcontext):
        with path():
            net.zero_grad()
            net(x.double(), timestep).square().sum().backward()
            gradients.append([p.grad.clone() for p in net.parameters()])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9 * float(plain.abs().max()))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"heads": 0}, "heads 0: want a whole number of at least 1"),
        ({"heads": 2, "head_channels": 8}, "head_channels 8: not together with heads 2"),
        ({"norm_eps": float("nan")}, "norm_eps nan: want a finite number"),
        ({"scale_shift": 1}, "scale_shift 1: want true or false"),
        ({"colour": 1}, "config details .*: want some of even_padding, "),
        ([1], "config details .*: want some of"),
    ],
)
def test_details_are_checked(values, words):
    with pytest.raises(InputError, match=f"^{words}"):
        from_json(to_json(SMALL) | {"details": values})


@pytest.mark.parametrize(
    ("details", "words"),
    [
        (Details(heads=3), "heads 3: want a divisor of 32"),
        (Details(norm_groups=5), "norm_groups 5: want a divisor of 32"),
    ],
)
def test_details_must_fit_the_channels(details, words):
    with pytest.raises(InputError, match=f"^{words}"):
        random_model(replace(SMALL, details=details))


def test_the_papers_network_has_no_details_in_its_settings():
    """So that files of models without details are the same as before there were any."""
    assert "details" not in to_json(SMALL)
    assert to_json(replace(SMALL, details=Details(heads=2)))["details"] == {"heads": 2}


# -- schedulers --------------------------------------------------------------------------------------------------------


def their_schedulers():
    """All classes of the installed diffusers that are made from betas."""
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Scheduler") and not name.startswith("Flax") else None
        if isinstance(kind, type) and "beta_start" in inspect.signature(kind.__init__).parameters:
            yield name, kind


def test_every_scheduler_with_the_same_table_is_known():
    """And no other: those of CogVideoX shift the table."""
    betas = {"num_train_timesteps": 20, "beta_start": 1e-3, "beta_end": 0.3, "beta_schedule": "linear"}
    wanted = DDPMScheduler(**betas).alphas_cumprod
    same = {name for name, kind in their_schedulers() if torch.equal(kind(**betas).alphas_cumprod, wanted)}
    assert same == set(folders.CLASSES)


@pytest.mark.parametrize("name", folders.CLASSES)
def test_any_scheduler_comes_in(name, tmp_path):
    """With other settings than the defaults; the table of abar is the scheduler's own."""
    kind = getattr(diffusers, name)
    settings = {"num_train_timesteps": 20, "beta_start": 1e-3, "beta_end": 0.3, "beta_schedule": "scaled_linear"}
    if "prediction_type" in inspect.signature(kind.__init__).parameters:
        settings["prediction_type"] = "v_prediction"
    scheduler = kind(**settings)
    folder, model = their_folder(tmp_path / "theirs", scheduler=scheduler)
    denoiser = ddpm.load(folder)
    assert apart(denoiser.network, model, *inputs(from_diffusers(folder)[0])) < 1e-5
    table = denoiser.schedule.alpha_bar[1:]
    torch.testing.assert_close(table, scheduler.alphas_cumprod.double(), rtol=1e-5, atol=1e-7)
    assert denoiser.predict == ("v" if "prediction_type" in settings else "eps")
    assert (denoiser.variance, denoiser.clip) == ("fixed_small", True)


def scheduler_changed(folder, absent=(), **changes):
    file = folder / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if name not in absent}))
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "absent", "words"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, (), 'want "discrete"'),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, (), "use_flow_sigmas true: want false"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, (), 'want "epsilon"'),
        ("DPMSolverMultistepScheduler", {"rescale_betas_zero_snr": True}, (), "want false"),
        ("UniPCMultistepScheduler", {}, ("beta_end",), "beta_end: missing, and its default differs"),
        ("CogVideoXDDIMScheduler", {}, (), "_class_name 'CogVideoXDDIMScheduler': want one of DDPMScheduler, "),
        ("FlowMatchEulerDiscreteScheduler", {}, (), "_class_name 'FlowMatchEulerDiscreteScheduler': want one of"),
        ("EDMEulerScheduler", {}, (), "_class_name 'EDMEulerScheduler': want one of"),
    ],
)
def test_another_diffusion_is_refused(kind, changes, absent, words, tmp_path):
    folder, _ = their_folder(tmp_path / "theirs", scheduler=getattr(diffusers, kind)())
    with pytest.raises(InputError, match=words) as error:
        from_diffusers(scheduler_changed(folder, absent, **changes))
    assert str(error.value).startswith(str(folder / "scheduler/scheduler_config.json"))


NEW = ("prediction_type", "thresholding", "clip_sample_range", "timestep_spacing", "dynamic_thresholding_ratio",
       "sample_max_value", "steps_offset", "rescale_betas_zero_snr")  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "predict"),
    [
        ({"tensor_format": "pt", "timestep_values": None}, "eps"),
        ({"predict_epsilon": True}, "eps"),
        ({"predict_epsilon": False}, "x0"),
        ({"predict_epsilon": False, "prediction_type": "sample"}, "x0"),
    ],
)
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, diffusers.DPMSolverMultistepScheduler])
def test_folders_of_old_versions(kind, lines, predict, tmp_path):
    folder, _ = their_folder(tmp_path / "theirs", scheduler=kind())
    assert from_diffusers(scheduler_changed(folder, NEW, **lines))[0].predict == predict


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize(
    "save", [{"variant": "fp16"}, {"max_shard_size": "50KB"}, {"variant": "ema", "max_shard_size": "50KB"}]
)
def test_weights_as_diffusers_saves_them(save, safe, tmp_path):
    folder, model = their_folder(tmp_path / "theirs", safe_serialization=safe, **save)
    preset, state = from_diffusers(folder)
    assert apart(network(preset, state), model, *inputs(preset)) < 1e-5
    assert len(list((folder / "unet").iterdir())) > (3 if "max_shard_size" in save else 1)
    assert weights_of(folder).parent == folder / "unet"


def test_which_weights_are_taken(tmp_path):
    """Those without a variant, before .bin; variants only if there is one."""
    folder, model = their_folder(tmp_path / "theirs")
    unet = folder / "unet"
    torch.save({"x": torch.zeros(1)}, unet / "diffusion_pytorch_model.bin")
    model.half().save_pretrained(unet, variant="fp16")
    assert weights_of(folder).name == "diffusion_pytorch_model.safetensors"
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    (unet / "diffusion_pytorch_model.bin").unlink()
    assert weights_of(folder).name == "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(weights_of(folder), unet / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(InputError, match="has the weights as fp16, non_ema; want one of them"):
        weights_of(folder)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "../other.safetensors"}, "damaged"),
        ({"a": "/etc/passwd"}, "damaged"),
        ({"a": "passwd"}, "names passwd; want files of weights"),
        ({"a": "missing.safetensors"}, "not a whole safetensors file"),
        ({"a": 3}, "damaged"),
        ([], "damaged"),
    ],
)
def test_a_damaged_index_is_refused(weight_map, words, tmp_path):
    folder, _ = their_folder(tmp_path / "theirs")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=words):
        from_diffusers(folder)


def test_a_network_alone_comes_in_with_a_warning(tmp_path):
    """The scheduler beside it is read; without one, diffusers' default is taken, and a warning says so."""
    folder, model = their_folder(tmp_path / "theirs", scheduler=DDPMScheduler(prediction_type="v_prediction"))
    assert from_diffusers(folder / "unet")[0].predict == "v"
    shutil.copytree(folder / "unet", tmp_path / "alone")
    with pytest.warns(UserWarning, match="has no scheduler_config.json"):
        denoiser = ddpm.load(tmp_path / "alone")
    assert apart(denoiser.network, model, *inputs(from_diffusers(folder)[0])) < 1e-5
    assert (denoiser.predict, denoiser.schedule.T) == ("eps", 1000)
    assert main(["import", str(tmp_path / "alone"), "--out", str(tmp_path / "in.safetensors")]) == 0


@pytest.mark.parametrize("config", [{"architectures": ["BertModel"]}, [], "text", None])
def test_the_configuration_of_something_else_is_no_run(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"its config.json is not that of a run; want a run folder, .* a diffusers folder"
    ):
        ddpm.load(tmp_path)


@pytest.mark.filterwarnings("ignore:.*has no scheduler_config.json:UserWarning")
def test_an_averaged_network_comes_in(tmp_path):
    """As diffusers' training script saves it beside the network, with the settings of the average."""
    _, model = their_folder(tmp_path / "theirs")
    EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config).save_pretrained(
        tmp_path / "unet_ema"
    )
    assert "inv_gamma" in json.loads((tmp_path / "unet_ema/config.json").read_text())
    preset, state = from_diffusers(tmp_path / "unet_ema")
    assert apart(network(preset, state), model, *inputs(preset)) < 1e-5


def test_a_latent_diffusion_model_is_refused(tmp_path):
    """Its network makes no pixels."""
    folder, _ = their_folder(tmp_path / "theirs")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(InputError, match="has vqvae VQModel; want a pipeline of unet and scheduler"):
        from_diffusers(folder)


# -- classes -----------------------------------------------------------------------------------------------------------

CLASSES = replace(SMALL, classes=True, class_names=("cat", "dog", "owl"), label_dropout=0.1)


@pytest.mark.parametrize("label", [None, 0, 2])
def test_a_class_runs_in_a_pipeline(label, tmp_path):
    """The network of one class, or of none, is our network's with this class, and DDPMPipeline calls it."""
    found = random_model(CLASSES)
    to_diffusers(found, tmp_path / "out", label)
    pipe = DDPMPipeline.from_pretrained(tmp_path / "out")
    net, y = found.denoiser.network, None if label is None else torch.tensor([label] * 2)
    assert apart(lambda *a: net(*a, y), pipe.unet, *inputs(SMALL)) < 1e-5
    assert apart(lambda *a: net(*a, torch.tensor([1, 1])), pipe.unet, *inputs(SMALL)) > 1e-3
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=3, output_type="np").images.shape == (1, 4, 4, 1)


def test_a_class_must_be_chosen_where_the_network_needs_one(tmp_path):
    """It never saw an image without its class, and a pipeline passes none."""
    found = random_model(replace(CLASSES, label_dropout=0.0))
    words = "class: diffusers' pipelines pass no class, .* want cat, dog, owl for the network of one class, or all"
    with pytest.raises(InputError, match=words):
        to_diffusers(found, tmp_path / "out")
    for label, words in ((3, "class 3: want a whole number, 0 to 2"), (-1, "class -1: want")):
        with pytest.raises(InputError, match=words):
            to_diffusers(found, tmp_path / "out", label)
    with pytest.raises(InputError, match="class 0: the model has no classes"):
        to_diffusers(random_model(SMALL), tmp_path / "out", 0)
    assert not list(tmp_path.iterdir())


def test_the_class_of_an_export_on_the_command_line(tmp_path, capsys):
    """digits was trained with hidden labels, so it has a network without a class, too."""
    words = ["export", "digits", "--to", "diffusers"]
    for number, (more, text) in enumerate(
        (([], "without a class"), (["--class", "3"], "of class 3"), (["--class", "all"], "of class all"))
    ):
        assert main([*words, str(tmp_path / str(number)), *more]) == 0
        assert text in capsys.readouterr().out
    assert main([*words, str(tmp_path / "no"), "--class", "ten"]) == 2
    assert "--class ten: want 0, 1, 2," in capsys.readouterr().err
    assert main(["export", "digits", "--out", str(tmp_path / "a.safetensors"), "--class", "1"]) == 2
    assert "only with --to diffusers" in capsys.readouterr().err
    unets = [UNet2DModel.from_pretrained(tmp_path / n, subfolder="unet") for n in "012"]
    assert [unet.config.num_class_embeds for unet in unets] == [None, None, 10]
    assert not (tmp_path / "no").exists()
