"""`--init`: a run begins as the model, to the bit where nothing differs, and as close as can be elsewhere."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, tensors
from safetensors.torch import load_file

import ddpm
from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files import data
from ddpm.files.models import Checkpoint
from ddpm.files.opening import open_checkpoint
from ddpm.presets import Preset, build
from ddpm.run import init
from ddpm.run.export import public
from ddpm.run.held_out import held_out_by_level
from ddpm.run.processes import Processes

SHORT: dict[str, Any] = {"steps": 2, "batch_size": 4, "eval_images": 16, "sample_every": 0, "precision": "float32"}


def letters(n: int = 30) -> np.ndarray:
    """Other images than digits, uint8 [n, 8, 8]."""
    return 255 - data.load("digits", (8, 8), 1).batch(range(100, 100 + n))[:, 0].numpy()


def test_the_weights_are_those_of_the_model(trained: Path, tmp_path: Path) -> None:
    """Its averaged weights, as weights and as average: with a learning rate of 0 they stay so."""
    run = ddpm.train(None, out=tmp_path / "run", init=str(trained), lr=0, **SHORT)
    ours = tensors(run.folder, 2)
    theirs = load_file(trained / "checkpoints/00000030/ema.safetensors")
    for name, value in theirs.items():
        assert torch.equal(ours[f"raw/{name}"], value)
        assert torch.equal(ours[f"ema/{name}"], value)
    assert any(not torch.equal(value, ours[f"raw/{name.removeprefix('raw/')}"]) for name, value in raw_of(trained))


def raw_of(run: Path) -> Any:
    return load_file(run / "checkpoints/00000030/raw.safetensors").items()


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file", "diffusers"])
def test_the_first_held_out_loss_is_the_models(
    kind: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what the model's own run measured last, on the same images; whatever `load` reads is a model."""
    places = {"run": trained, "checkpoint": trained / "checkpoints/00000030", "file": tmp_path / "m.safetensors"}
    shutil.copy(places["checkpoint"] / "ema.safetensors", places["file"])
    places["diffusers"] = tmp_path / "theirs"
    if kind == "diffusers":
        assert main(["export", str(trained), "--to", "diffusers", str(places[kind])]) == 0
    last = json.loads((trained / "checkpoints/00000030/state.json").read_text())["held_out"]
    preset = ddpm.Preset(channels=1, size=(8, 8), flip=False, data="digits", sample_steps=5)
    run = ddpm.train(preset, None, tmp_path / "run", init=str(places[kind]), **SHORT)
    assert run.result.held_out_before == pytest.approx(last, rel=1e-6)
    err = capsys.readouterr().err
    assert f"step 0: held-out L_simple {last:.4f}" in err
    assert f"begins with {places[kind]}" in err


def test_on_other_images_too(tmp_path: Path) -> None:
    """The packaged model, on images that it never saw and with other classes."""
    labels = ["3", "x"] * 15
    run = ddpm.train(None, (letters(), labels), tmp_path / "run", init="digits", **SHORT)
    denoiser = ddpm.load("digits")
    denoiser.network.bf16 = False  # type: ignore[attr-defined]
    _, held_out = data.load_pair(data.given((letters(), labels)), (8, 8), 1)
    assert held_out.labels is not None
    assert {"3", "x"} == set(held_out.class_names or ())
    held_out.labels = torch.where(held_out.labels == 0, 3, -1)  # an unknown class is as no class
    levels = held_out_by_level(denoiser, held_out, 16, Processes(0, 1, torch.device("cpu")), run.preset)
    assert run.result.held_out_before == pytest.approx(float(torch.tensor(levels).nanmean()), rel=1e-6)


def test_what_comes_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Network and diffusion from the model, the rest from the preset; half of the learning rate, unless given."""
    model = open_checkpoint("digits").preset
    run = ddpm.train("mnist", letters(), tmp_path / "a", init="digits", size=8, classes=False, **SHORT)
    for name in ("width", "channel_multipliers", "predict", "schedule", "attention_resolutions", "timestep_sampling"):
        assert getattr(run.preset, name) == getattr(model, name)
    mnist = ddpm.PRESETS["mnist"]
    assert (run.preset.warmup, run.preset.lr, run.preset.init) == (mnist.warmup, mnist.lr / 2, "digits")
    assert "at lr 0.00025" in capsys.readouterr().err
    words = "train --init digits --lr 1e-3 --no-classes --steps 1 --eval-images 4 --sample-every 0 --batch-size 4"
    assert main([*words.split(), "--out", str(tmp_path / "b")]) == 0
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert (config["lr"], config["init"], config["data"], config["classes"]) == (1e-3, "digits", "digits", False)
    assert "classes: none instead of 10" in capsys.readouterr().err


def test_a_run_resumes_without_the_model(trained: Path, tmp_path: Path) -> None:
    """To the bit, though the model is gone; and a run that was killed before its first checkpoint begins again."""
    shutil.copytree(trained, tmp_path / "model")
    where = str(tmp_path / "model")
    short = {**SHORT, "steps": 4, "snapshot_every": 3}
    whole = ddpm.train(None, letters(), tmp_path / "whole", init=where, **short)
    halves = ddpm.train(None, letters(), tmp_path / "halves", init=where, **{**short, "steps": 2})
    ddpm.train(None, letters(), tmp_path / "again", init=where, **{**short, "steps": 2})
    shutil.rmtree(tmp_path / "again/checkpoints")
    again = ddpm.train(tmp_path / "again", letters(), steps=4)
    shutil.rmtree(where)
    ddpm.train(halves.folder, letters(), steps=4)
    assert_same(tensors(whole.folder, 4), tensors(halves.folder, 4))
    assert_same(tensors(whole.folder, 4), tensors(again.folder, 4))
    with pytest.raises(InputError, match="model: no such file"):
        ddpm.train(None, letters(), tmp_path / "new", init=where, **short)


def test_a_run_of_python_is_a_model(tmp_path: Path) -> None:
    """What `ddpm.train` gave back; and its folder as a path."""
    first = ddpm.train("digits", letters(), tmp_path / "a", classes=False, **SHORT)
    for k, model in enumerate((first, first.folder)):
        run = ddpm.train(data=letters(), out=tmp_path / f"b{k}", init=model, **SHORT)
        assert run.preset.init == str(first.folder)
        assert run.result.held_out_before == pytest.approx(first.result.held_out, rel=1e-6)


# -- what differs ------------------------------------------------------------------------------------------------------


def model(**settings: Any) -> Checkpoint:
    """A network with random weights, also where a fresh one has nearly zeros."""
    preset = Preset(
        size=(8, 8), channels=settings.pop("channels", 1), width=32, channel_multipliers=(1, 1), num_res_blocks=1,
        attention_resolutions=(4,), num_timesteps=50, schedule="cosine", **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    denoiser = build(preset)
    for p in denoiser.network.parameters():  # type: ignore[attr-defined]
        torch.nn.init.normal_(p, std=0.1)
    denoiser.network.eval()  # type: ignore[attr-defined]
    return Checkpoint(denoiser, preset, 7, "ema", Path("m.safetensors"))


def fitted(old: Checkpoint, **changes: Any) -> tuple[torch.nn.Module, list[str]]:
    preset = replace(old.preset, **changes)
    state, lines = init.adapt(old, preset)
    network = build(preset).network
    network.load_state_dict(state)  # type: ignore[attr-defined]
    return network.eval(), lines  # type: ignore[attr-defined]


T = torch.tensor([3, 40])


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("channels", [3, 4, 8])
@torch.no_grad()
def test_a_grey_model_reads_equal_channels_as_grey(channels: int, variance: Any) -> None:
    """And writes what it wrote for the grey image to each channel; a learned variance likewise."""
    old = model(variance=variance, loss="simple" if variance == "fixed_large" else "hybrid")
    network, lines = fitted(old, channels=channels)
    x = torch.randn(2, 1, 8, 8)
    want = old.denoiser.network(x, T, None).repeat_interleave(channels, 1)
    assert torch.allclose(network(x.expand(-1, channels, -1, -1), T), want, atol=1e-5)
    assert [line.partition(":")[0] for line in lines] == ["channels"]
    back, _ = fitted(
        replace(old, denoiser=replace(old.denoiser, network=network), preset=replace(old.preset, channels=channels)),
        channels=1,
    )
    assert torch.allclose(back(x, T), old.denoiser.network(x, T, None), atol=1e-5)


@torch.no_grad()
def test_a_colour_model_keeps_its_colours() -> None:
    """What alpha holds changes nothing at first, and the colours that are predicted are the model's."""
    old = model(channels=3, variance="learned", loss="hybrid")
    network, _ = fitted(old, channels=4)
    x = torch.randn(2, 4, 8, 8)
    ours, theirs = network(x, T), old.denoiser.network(x[:, :3], T, None)
    assert torch.allclose(ours[:, :3], theirs[:, :3], atol=1e-5)
    assert torch.allclose(ours[:, 4:7], theirs[:, 3:], atol=1e-5)


def test_other_numbers_and_many_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """8 channels of 16 bits begin with the grey model of 8 bits: equal channels have its loss, in the same signal."""
    images = letters()
    many = np.repeat(images[..., None], 8, axis=3).astype(np.uint16) * 257  # 255 becomes 65535
    settings = {**SHORT, "init": "digits", "classes": False}
    run = ddpm.train(None, many, tmp_path / "many", channels=8, pixel_type="uint16", **settings)
    err = capsys.readouterr().err
    assert "numbers: uint16 0..65535 instead of uint8 0..255" in err
    assert "channels: 8 instead of 1" in err
    model = open_checkpoint(run.folder, "raw")
    assert model.denoiser.network.conv_in.weight.shape[1] == 8  # type: ignore[attr-defined]
    signal = ddpm.pixels.to_signal(torch.from_numpy(many), model.denoiser.values)
    assert torch.allclose(signal[..., 0], ddpm.pixels.to_signal(torch.from_numpy(images)), atol=1e-6)


@torch.no_grad()
def test_classes_are_found_by_their_names() -> None:
    """A class that the model knows stays what it was, and another one begins as an image without a label."""
    old = model(classes=True, class_names=("a", "b", "c"))
    network, lines = fitted(old, class_names=("c", "new"))
    x = torch.randn(2, 1, 8, 8)
    theirs = old.denoiser.network
    assert torch.allclose(network(x, T, torch.tensor([0, 0])), theirs(x, T, torch.tensor([2, 2])), atol=1e-6)
    assert torch.allclose(network(x, T, torch.tensor([1, 1])), theirs(x, T, None), atol=1e-6)
    assert not torch.allclose(theirs(x, T, None), theirs(x, T, torch.tensor([2, 2])), atol=1e-3)
    assert lines == [
        "classes: 2 instead of 3; 1 have a name that the model knows, others begin as an image without a label"
    ]
    without, _ = fitted(old, classes=False, class_names=())
    assert torch.allclose(without(x, T), theirs(x, T, None), atol=1e-6)
    first, _ = fitted(
        replace(
            old,
            denoiser=replace(old.denoiser, network=without),
            preset=replace(old.preset, classes=False, class_names=()),
        ),
        classes=True,
        class_names=("x",),
    )
    assert torch.allclose(first(x, T, torch.tensor([0, 0])), theirs(x, T, None), atol=1e-6)


@torch.no_grad()
def test_classes_of_a_model_that_always_knew_them() -> None:
    """It never saw an image without a label, so a new class begins as the mean of those that it knows."""
    old = model(classes=True, class_names=("a", "b"), label_dropout=0.0)
    state, _ = init.adapt(old, replace(old.preset, class_names=("b", "z")))
    rows = old.denoiser.network.label.weight  # type: ignore[attr-defined]
    assert torch.allclose(state["label.weight"], torch.stack([rows[1], rows.mean(0)]))


def test_another_size_keeps_weights_and_levels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Attention stays at the same level; the first held-out loss is that of the model on such images."""
    images = letters().repeat(2, axis=1).repeat(2, axis=2)
    run = ddpm.train(None, images, tmp_path / "run", init="digits", size=16, classes=False, lr=0, **SHORT)
    assert run.preset.attention_resolutions == (8,)
    assert "size: 16x16 instead of 8x8" in capsys.readouterr().err
    ours, theirs = run.model.network.state_dict(), ddpm.load("digits").network.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert theirs.keys() - ours.keys() == {"label.weight"}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"width": 64}, "width 64: the model digits has 32; want the same, or no init"),
    "levels": ({"channel_multipliers": (1, 2)}, r"channel_multipliers \(1, 2\): the model digits has \(1, 1\)"),
    "predict": ({"predict": "eps"}, "predict 'eps': the model digits has 'v'"),
    "noise levels": ({"num_timesteps": 500}, "num_timesteps 500: the model digits has 1000"),
    "schedule": ({"schedule": "linear"}, "schedule 'linear': the model digits has 'cosine'"),
    "attention": ({"attention_resolutions": (8,)}, "attention_resolutions 8: .* has attention elsewhere; want 4"),
    "variance": ({"variance": "learned", "loss": "hybrid"}, "the model digits did not learn one; want fixed_large"),
    "size": ({"size": 9}, "size 9x9: 9 is not divisible by 2"),
    "no model": ({"init": "digist"}, "digist: no such file or folder; did you mean digits"),
    "no classes": ({"data": np.zeros((4, 8, 8), np.uint8)}, "classes: array .* has no labels; want .* or no classes"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    settings, message = MISTAKES[what]
    with pytest.raises(InputError, match=message) as error:
        ddpm.train(**{"out": tmp_path / "run", "init": "digits", "steps": 1, **settings})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_exported_model_names_no_folder_of_this_machine() -> None:
    preset = ddpm.PRESETS["digits"]
    for name, kept in (("/home/me/model", "MODEL"), ("", ""), ("digits", "digits"), ("hf:me/it", "hf:me/it")):
        assert public(replace(preset, init=name)).init == kept
