"""`ddpm export --to onnx`: onnxruntime computes what torch computes, and the metadata suffice to sample."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.cli import main
from ddpm.details import Details
from ddpm.errors import InputError
from ddpm.files.interop import onnx as ours
from ddpm.files.models import Checkpoint
from ddpm.files.opening import open_checkpoint
from ddpm.noise import per_image
from ddpm.presets import PRESETS, build
from ddpm.run.sample import generate
from ddpm.samplers import named

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

RGB = replace(
    PRESETS["digits"], channels=3, size=(8, 12), width=32, channel_multipliers=(1,), num_res_blocks=1, class_names=(),
    predict="eps", schedule="linear", variance="learned_range", loss="hybrid", num_timesteps=60, sample_steps=5,
    precision="bf16", details=Details(heads=2, scale_shift=True),
)  # fmt: skip


def random_model(preset):
    """A model with random weights, of which none starts at 0."""
    torch.manual_seed(0)
    denoiser = build(preset)
    for parameter in denoiser.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    denoiser.network.eval()
    return Checkpoint(denoiser, preset, 0, "ema", Path("random/model.safetensors"))


def onnx_network(content):
    """The network of an ONNX file, as a function that a denoiser can call."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    labelled = "y" in [given.name for given in session.get_inputs()]

    def network(x, timestep, y=None):
        timestep = timestep.expand(len(x))
        y = torch.full((len(x),), -1) if y is None else y
        inputs = {"x": x, "timestep": timestep, **({"y": y} if labelled else {})}
        return torch.from_numpy(session.run(["out"], {name: value.numpy() for name, value in inputs.items()})[0])

    return network


def test_onnxruntime_samples_the_images_of_torch(digits_onnx):
    """With a class and guidance, without, and in batches of other sizes than those that were checked at the export."""
    model = open_checkpoint("digits", precision="float32")
    theirs = replace(model.denoiser, network=onnx_network(digits_onnx.read_bytes()))
    for y, scale in ((None, 1.0), (torch.arange(7), 2.0)):
        images = [
            generate(denoiser.guided(scale), (1, 8, 8), range(7), named("ddim"), 10, y=y).int()
            for denoiser in (model.denoiser, theirs)
        ]
        assert images[0].float().std() > 50
        assert float(((images[0] - images[1]).abs() <= 1).float().mean()) > 0.99


def test_metadata_say_what_sampling_needs(digits_onnx):
    model, checkpoint = onnx.load(digits_onnx), open_checkpoint("digits")
    onnx.checker.check_model(model)
    about = {p.key: p.value for p in model.metadata_props}
    texts = ("name", "predict", "variance")
    settings = {name: value if name in texts else json.loads(value) for name, value in about.items()}
    assert settings == ours.settings(checkpoint)
    assert settings["opset"] == model.opset_import[0].version
    assert settings["inputs"].keys() == {given.name for given in model.graph.input} == {"x", "timestep", "y"}
    assert settings["alpha_bar"] == checkpoint.denoiser.schedule.alpha_bar.tolist()
    assert settings["model"]["identity"] == checkpoint.identity
    assert settings["samplers"] == {"ddim": 50, "ancestral": 1000}
    text = digits_onnx.read_bytes()
    assert str(Path(ours.__file__).parents[3]).encode() not in text  # no path of the machine that exported it
    assert b"site-packages" not in text


def test_learned_variance_is_exported_too():
    """An RGB network whose sides differ, with two heads and no classes, which computes in bf16 elsewhere."""
    model = random_model(RGB)
    content, settings = ours.graph(model)
    x = per_image(range(5), RGB.shape)(60)
    out = onnx_network(content)(x, torch.full((5,), 39))
    model.denoiser.network.bf16 = False
    with torch.no_grad():
        want = model.denoiser.network(x, torch.full((5,), 39))
    assert out.shape == (5, 6, 8, 12)
    assert float((out - want).abs().max()) < 1e-4 * float(want.abs().max())
    assert settings["classes"] == []
    assert settings["inputs"].keys() == {"x", "timestep"}
    assert "3 channels of the variance (learned_range)" in settings["outputs"]["out"]


def test_a_graph_with_a_changed_weight_is_refused(digits_onnx):
    """Negative control of the check before writing."""
    checkpoint, model = open_checkpoint("digits"), onnx.load(digits_onnx)
    ours.verify(digits_onnx.read_bytes(), checkpoint)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = np.frombuffer(weight.raw_data, np.float32).copy()
    changed[0] += 0.5
    weight.raw_data = changed.tobytes()
    with pytest.raises(InputError, match=r"of the largest output off torch, and 0\.0001 is accepted"):
        ours.verify(model.SerializeToString(), checkpoint)


def test_what_torch_cannot_export_is_refused(tmp_path, monkeypatch):
    def fails(*args, **settings):
        raise torch.onnx.errors.OnnxExporterError("No ONNX function found\nand much more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(InputError, match=r"torch cannot export this network to ONNX \(No ONNX function found\)$"):
        ours.to_onnx(random_model(RGB), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "onnx", "a.pt"], "out a.pt: want a name that ends in .onnx"),
        (["--to", "onnx", "a.onnx", "--class", "7"], "--class 7: only with --to diffusers"),
        (["--to", "onnx", "a.onnx", "--precision", "bf16"], "--precision bf16: not with --to onnx"),
        (["--to", "onnx", "a.onnx", "--runtime", "b"], "--runtime b: only with --to web"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "digits", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_package_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    assert main(["export", "digits", "--to", "onnx", str(tmp_path / "a.onnx")]) == 2
    assert capsys.readouterr().err == "ddpm: onnx is not installed; want `pip install 'ddpm-kit[onnx]'`\n"


def test_networks_beyond_two_gib_are_refused():
    """Before the export, whose result could not be stored."""
    with torch.device("meta"):
        denoiser = build(replace(PRESETS["cifar10"], width=1024))
    assert sum(p.numel() for p in denoiser.network.parameters()) > 2**29
    big = Checkpoint(denoiser, PRESETS["cifar10"], 0, "ema", Path("big.safetensors"))
    with pytest.raises(InputError, match="GiB in float32; want a network of less than 2 GiB"):
        ours.check_size(big)
