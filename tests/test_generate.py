"""`ddpm sample` writes a grid, an array or a folder. An image depends on its seed and the settings only."""

import dataclasses
import json
import shutil
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import ddpm
from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files import checkpoints
from ddpm.files import images as pictures
from ddpm.files.models import read_calibration
from ddpm.files.opening import open_checkpoint
from ddpm.noise import per_image
from ddpm.run import device
from ddpm.run.sample import generate, progressive, sampler_levels, trajectory
from ddpm.samplers import SAMPLERS, Levels, named
from ddpm.spacing import SPACINGS, bound_cost


def sample(source: Path, out: Path, *options: Any) -> NDArray[np.uint8]:
    """Run `ddpm sample` and return its array [N, H, W, C]."""
    assert main(["sample", str(source), "--out", str(out), *map(str, options)]) == 0
    images: NDArray[np.uint8] = np.load(out)["arr_0"]
    return images


def test_grid_array_and_folder_hold_the_same_images(trained: Path, tmp_path: Path) -> None:
    """The name of --out determines the kind of output. A missing parent folder is created."""
    array = sample(trained, tmp_path / "new" / "a.npz", "-n", 5)
    assert array.shape == (5, 8, 8, 1)
    assert array.dtype == np.uint8
    assert array.std(axis=0).min() > 0  # the images differ in every pixel
    assert main(["sample", str(trained), "-n", "5", "--out", str(tmp_path / "folder")]) == 0
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [p.name for p in files] == [f"{i:06d}.png" for i in range(5)]
    assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in files])[..., None], array)
    assert main(["sample", str(trained), "-n", "5", "--out", str(tmp_path / "grid.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), pictures.grid(array)[..., 0])


def test_run_checkpoint_folder_and_file_are_the_same_model(trained: Path, tmp_path: Path) -> None:
    """All three name the averaged weights of step 30."""
    folder = trained / "checkpoints" / "00000030"
    of_run = sample(trained, tmp_path / "a.npz", "-n", 2)
    assert np.array_equal(of_run, sample(folder, tmp_path / "b.npz", "-n", 2))
    assert np.array_equal(of_run, sample(folder / "ema.safetensors", tmp_path / "c.npz", "-n", 2))


def test_raw_weights(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They give other images than the averaged weights. --weights must match a file that is given alone."""
    raw = sample(trained, tmp_path / "a.npz", "-n", 2, "--weights", "raw")
    assert not np.array_equal(raw, sample(trained, tmp_path / "b.npz", "-n", 2))
    file = trained / "checkpoints" / "00000030" / "raw.safetensors"
    assert np.array_equal(raw, sample(file, tmp_path / "c.npz", "-n", 2))
    assert main(["sample", str(file), "--weights", "ema", "--out", str(tmp_path / "d.npz")]) == 2
    assert "--weights ema: " in capsys.readouterr().err
    assert not (tmp_path / "d.npz").exists()


@pytest.mark.parametrize("sampler", ["--sampler ancestral", "--sampler ddim --steps 10 --eta 0.5"])
def test_the_batch_size_changes_no_image(sampler: str, trained: Path, tmp_path: Path) -> None:
    """Batches of 1, 3 and 4 give the same pixels, except that a few round to the next grey level."""
    at_once = sample(trained, tmp_path / "all.npz", "-n", 4, *sampler.split()).astype(int)
    for size in (1, 3):
        parts = sample(trained, tmp_path / f"{size}.npz", "-n", 4, *sampler.split(), "--batch-size", size).astype(int)
        assert np.abs(parts - at_once).max() <= 1
        assert (parts == at_once).mean() >= 0.999


def test_each_image_has_a_seed_of_its_own(trained: Path, tmp_path: Path) -> None:
    """Image i of --seed s is image 0 of --seed s + i, and its file is named after the seed."""
    some = sample(trained, tmp_path / "a.npz", "-n", 4, "--seed", 5)
    one = sample(trained, tmp_path / "b.npz", "-n", 1, "--seed", 8)
    assert np.abs(one[0].astype(int) - some[3]).max() <= 1
    assert not np.array_equal(one[0], some[0])
    assert main(["sample", str(trained), "-n", "1", "--seed", "8", "--out", str(tmp_path / "folder")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / "000008.png")), one[0, ..., 0])


def test_ddim(trained: Path, tmp_path: Path) -> None:
    """DDIM is deterministic at eta 0 and noisy at eta 1. A seed repeats an image. --steps counts network calls."""
    ddim = ("-n", 2, "--sampler", "ddim")
    plain = sample(trained, tmp_path / "a.npz", *ddim)
    assert np.array_equal(plain, sample(trained, tmp_path / "b.npz", *ddim, "--steps", 20))  # all T levels
    noisy = sample(trained, tmp_path / "c.npz", *ddim, "--eta", 1)
    assert not np.array_equal(plain, noisy)
    assert np.array_equal(noisy, sample(trained, tmp_path / "d.npz", *ddim, "--eta", 1))
    assert not np.array_equal(plain, sample(trained, tmp_path / "e.npz", *ddim, "--steps", 4))


def test_the_progressive_strip_ends_with_the_image(trained: Path, tmp_path: Path) -> None:
    """As in Figure 6, a row shows the x0^ of an image. The last one is the sample, and the first one differs."""
    out = tmp_path / "strip.png"
    assert main(["sample", str(trained), "-n", "3", "--progressive", "--out", str(out)]) == 0
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (3 * 34 + 2, 11 * 34 + 2)  # tiles of 8 enlarged to 32, 2 between
    tiles = sheet[2:, 2:].reshape(3, 34, 11, 34)[:, 2:32:4, :, 2:32:4].transpose(0, 2, 1, 3)  # [3, 11, 8, 8]
    images = sample(trained, tmp_path / "a.npz", "-n", 3)[..., 0].astype(int)
    assert np.abs(tiles[:, -1] - images).max() <= 1
    assert np.abs(tiles[:, 0] - images).mean() > 5


def test_json_describes_the_samples(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints one object on stdout and nothing on stderr."""
    out = tmp_path / "a.png"
    assert main(["sample", str(trained), "-n", "2", "--sampler", "ddim", "--out", str(out), "--json"]) == 0
    printed, err = capsys.readouterr()
    values = json.loads(printed)
    assert err == ""
    assert (values["out"], values["count"], values["step"], values["weights"]) == (str(out), 2, 30, "ema")


@pytest.mark.parametrize(("which", "step"), [("last", 30), ("best", 20), ("20", 20), ("00000030", 30)])
def test_checkpoint_is_chosen(
    which: str, step: int, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--checkpoint is last, best (by held-out loss) or a step."""
    run = shutil.copytree(trained, tmp_path / "run")
    state = run / "checkpoints" / "00000020" / "state.json"
    values = dict(checkpoints.read_state(state.parent))
    values["held_out"] = 0.01
    state.write_text(json.dumps({**values, "seal": checkpoints._seal(values)}))
    out = str(tmp_path / "a.png")
    assert main(["sample", str(run), "-n", "1", "--checkpoint", which, "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == step
    assert main(["sample", str(run), "--checkpoint", "25", "--out", out]) == 2
    assert f"checkpoint 25: {run} has 20, 30" in capsys.readouterr().err


def test_bf16_gives_nearly_the_same_images(trained: Path, tmp_path: Path) -> None:
    """The sampler's state stays float32, so only the network's rounding changes the images."""
    exact = sample(trained, tmp_path / "a.npz", "-n", 2).astype(int)
    rounded = sample(trained, tmp_path / "b.npz", "-n", 2, "--precision", "bf16").astype(int)
    assert 0 < np.abs(exact - rounded).mean() < 8


def test_ctrl_c(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Ctrl-C gives exit code 130 and one line, and leaves no unfinished picture."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm.run.sample.trajectory", interrupted)
    assert main(["sample", str(trained), "--out", str(tmp_path / "a.png")]) == 130
    assert capsys.readouterr().err == "ddpm: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_the_library_gives_what_the_command_writes(trained: Path, tmp_path: Path) -> None:
    """`generate` and `progressive` with the denoiser of `ddpm.load`. `stop` ends sampling early."""
    denoiser = ddpm.load(trained)
    images = generate(denoiser, (1, 8, 8), [3, 1], batch_size=1)
    assert np.array_equal(images[1], sample(trained, tmp_path / "a.npz", "-n", 1, "--seed", 1)[0].transpose(2, 0, 1))
    strip = progressive(denoiser, (1, 8, 8), [3, 1], columns=3)
    assert strip.shape == (2, 3, 1, 8, 8)
    assert int((strip[:, -1].int() - images.int()).abs().max()) <= 1
    assert not generate(denoiser, (1, 8, 8), [3], stop=lambda: True).any()
    with pytest.raises(ddpm.InputError, match="sampler 'euler': want ancestral, ddim"):
        generate(denoiser, (1, 8, 8), [3], sampler="euler")
    assert torch.is_grad_enabled()


def test_a_cuda_graph_stands_in_for_the_network(trained: Path, captured: list[tuple[int, ...]]) -> None:
    """It is captured once per shape, and results stay valid after the next call. (Here a replay is a plain call.)"""
    denoiser = ddpm.load(trained)
    assert isinstance(denoiser.network, ddpm.UNet)
    graphed = dataclasses.replace(denoiser, network=device.GraphedUNet(denoiser.network))
    images, wanted = (generate(d, (1, 8, 8), range(7), batch_size=3) for d in (graphed, denoiser))
    assert torch.equal(images, wanted)
    assert captured == [(3, 1, 8, 8), (1, 1, 8, 8)]
    x, t = torch.randn(2, 3, 1, 8, 8), torch.tensor([1, 2, 3])
    first = graphed.network(x[0], t)
    assert not torch.equal(graphed.network(x[1], t), first)
    assert torch.equal(first, denoiser.network(x[0], t))


def test_cuda_graphs_are_used_only_where_they_can_be(trained: Path) -> None:
    """They need CUDA and a UNet in evaluation mode without gradients."""
    denoiser = ddpm.load(trained)
    assert device.use_cuda_graphs(denoiser, "cpu") is denoiser
    assert isinstance(device.use_cuda_graphs(denoiser, "cuda").network, device.GraphedUNet)
    assert device.use_cuda_graphs(device.use_cuda_graphs(denoiser, "cuda"), "cuda").network.network is denoiser.network
    assert isinstance(denoiser.network, nn.Module)
    other = dataclasses.replace(denoiser, network=lambda x, timestep, y: x)
    assert device.use_cuda_graphs(other, "cuda") is other
    denoiser.network.train()
    assert device.use_cuda_graphs(denoiser, "cuda") is denoiser
    denoiser.network.eval().requires_grad_(True)
    assert device.use_cuda_graphs(denoiser, "cuda") is denoiser


def test_the_spacing_of_the_bound_is_the_cheapest() -> None:
    """No other choice of levels costs less, from T or from a lower level."""
    checkpoint = open_checkpoint("digits")
    calibration = read_calibration(checkpoint)
    assert calibration is not None
    cost = bound_cost(checkpoint.denoiser.schedule, calibration[0])

    def bits(levels: list[int]) -> float:
        return sum(float(cost[s, t]) for s, t in pairwise([0, *levels]))

    for steps, start in ((2, None), (3, 90), (1, 40), (90, 90)):
        levels = sampler_levels(checkpoint, "ddim", steps, "bound", start)
        assert (len(levels), levels[-1]) == (steps, start or 1000)
        others = combinations(range(1, levels[-1]), steps - 1)
        assert bits(levels) == min(bits([*some, levels[-1]]) for some in others)
    assert len(sampler_levels(checkpoint, "heun", spaced="bound")) == 10
    with pytest.raises(InputError, match="spacing 'even': want uniform, quadratic, log_snr, karras, bound"):
        sampler_levels(checkpoint, "ddim", 5, "even")


@pytest.mark.parametrize(
    ("sampler", "steps", "eta"),
    [("ancestral", None, 0), ("ancestral", 7, 0), ("ddim", 6, 0.5), ("dpmpp_2m_sde", [3, 8, 11, 20], 0)],
)
def test_noise_is_drawn_ahead_in_the_order_of_the_calls(
    sampler: str, steps: Levels | None, eta: float, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ahead` gets exactly the levels of the sampler's calls. (Here it draws on the CPU.)"""
    denoiser, given, called = ddpm.load(trained), list[int](), list[int]()

    def ahead(seeds: Any, shape: Any, device: str, levels: list[int]) -> Any:
        def noise(t: int) -> torch.Tensor:
            called.append(t)
            return per_image(seeds, shape)(t)

        assert device == "cuda"
        given.extend(levels)
        return noise

    monkeypatch.setattr("ddpm.run.sample.ahead", ahead)
    steps_made = list(trajectory(denoiser, (1, 8, 8), [0], named(sampler, eta), steps, "cuda"))
    assert called == given
    assert steps_made[-1].t == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_batch_changes_no_picture(sampler: str) -> None:
    """Batches of 1, 7 and 32 of the digits model agree within 1e-5 before rounding, and so in their pixels."""
    denoiser = open_checkpoint("digits", precision="float32").denoiser
    steps = SPACINGS["log_snr"](denoiser.schedule, 8)
    whole = generate(denoiser, (1, 8, 8), range(32), sampler, steps, batch_size=32)
    for n, size in ((14, 7), (3, 1)):
        images = generate(denoiser, (1, 8, 8), range(n), sampler, steps, batch_size=size)
        assert (images == whole[: len(images)]).float().mean() >= 0.999
        assert (images.int() - whole[: len(images)].int()).abs().max() <= 1
    paths = [trajectory(denoiser, (1, 8, 8), seeds, sampler, steps) for seeds in (range(7), [3])]
    for many, one in zip(*paths, strict=True):
        torch.testing.assert_close(many.x[3:4], one.x, rtol=0, atol=1e-5)
