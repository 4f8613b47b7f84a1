"""`ddpm sample`: to a grid, an array or a folder; an image is a function of its seed and the settings only."""

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
    """`ddpm sample` to an array [N, H, W, C]."""
    assert main(["sample", str(source), "--out", str(out), *map(str, options)]) == 0
    found: NDArray[np.uint8] = np.load(out)["arr_0"]
    return found


def test_grid_array_and_folder_hold_the_same_images(trained: Path, tmp_path: Path) -> None:
    """--out says the kind by its name; a missing folder above is made."""
    array = sample(trained, tmp_path / "new" / "a.npz", "-n", 5)
    assert array.shape == (5, 8, 8, 1)
    assert array.dtype == np.uint8
    assert array.std(axis=0).min() > 0  # no two alike in any pixel
    assert main(["sample", str(trained), "-n", "5", "--out", str(tmp_path / "folder")]) == 0
    files = sorted((tmp_path / "folder").iterdir())
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
    """They make other images than the average; a single file is what it is, and says so when asked for the other."""
    raw = sample(trained, tmp_path / "a.npz", "-n", 2, "--weights", "raw")
    assert not np.array_equal(raw, sample(trained, tmp_path / "b.npz", "-n", 2))
    file = trained / "checkpoints" / "00000030" / "raw.safetensors"
    assert np.array_equal(raw, sample(file, tmp_path / "c.npz", "-n", 2))
    assert main(["sample", str(file), "--weights", "ema", "--out", str(tmp_path / "d.npz")]) == 2
    assert "--weights ema: " in capsys.readouterr().err
    assert not (tmp_path / "d.npz").exists()


@pytest.mark.parametrize("sampler", ["--sampler ancestral", "--sampler ddim --steps 10 --eta 0.5"])
def test_the_batch_size_changes_no_image(sampler: str, trained: Path, tmp_path: Path) -> None:
    """1, 3 or 7 at a time: the same pixels, but for rounding at an edge between two of the 256 values."""
    at_once = sample(trained, tmp_path / "all.npz", "-n", 7, *sampler.split()).astype(int)
    for size in (1, 3):
        parts = sample(trained, tmp_path / f"{size}.npz", "-n", 7, *sampler.split(), "--batch-size", size).astype(int)
        assert np.abs(parts - at_once).max() <= 1
        assert (parts == at_once).mean() >= 0.999


def test_each_image_has_a_seed_of_its_own(trained: Path, tmp_path: Path) -> None:
    """Image i of --seed s is image 0 of --seed s + i, and is named after it."""
    some = sample(trained, tmp_path / "a.npz", "-n", 4, "--seed", 5)
    one = sample(trained, tmp_path / "b.npz", "-n", 1, "--seed", 8)
    assert np.abs(one[0].astype(int) - some[3]).max() <= 1
    assert not np.array_equal(one[0], some[0])
    assert main(["sample", str(trained), "-n", "1", "--seed", "8", "--out", str(tmp_path / "folder")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "folder" / "000008.png")), one[0, ..., 0])


def test_ddim(trained: Path, tmp_path: Path) -> None:
    """Deterministic at eta 0, other images at eta 1, the same again with the same seed; --steps counts the calls."""
    ddim = ("-n", 2, "--sampler", "ddim")
    plain = sample(trained, tmp_path / "a.npz", *ddim)
    assert np.array_equal(plain, sample(trained, tmp_path / "b.npz", *ddim, "--steps", 20))  # all levels there are
    noisy = sample(trained, tmp_path / "c.npz", *ddim, "--eta", 1)
    assert not np.array_equal(plain, noisy)
    assert np.array_equal(noisy, sample(trained, tmp_path / "d.npz", *ddim, "--eta", 1))
    assert not np.array_equal(plain, sample(trained, tmp_path / "e.npz", *ddim, "--steps", 4))


def test_the_progressive_strip_ends_with_the_image(trained: Path, tmp_path: Path) -> None:
    """Figure 6: a row an image, x0^ on the way; the first is another, the last is what sampling gives."""
    out = tmp_path / "strip.png"
    assert main(["sample", str(trained), "-n", "3", "--progressive", "--out", str(out)]) == 0
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (3 * 34 + 2, 11 * 34 + 2)  # tiles of 8 enlarged to 32, 2 between
    tiles = sheet[2:, 2:].reshape(3, 34, 11, 34)[:, 2:32:4, :, 2:32:4].transpose(0, 2, 1, 3)  # [3, 11, 8, 8]
    images = sample(trained, tmp_path / "a.npz", "-n", 3)[..., 0].astype(int)
    assert np.abs(tiles[:, -1] - images).max() <= 1
    assert np.abs(tiles[:, 0] - images).mean() > 5


def test_json_says_what_was_made(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object on stdout, nothing on stderr."""
    out = tmp_path / "a.png"
    assert main(["sample", str(trained), "-n", "2", "--sampler", "ddim", "--out", str(out), "--json"]) == 0
    printed, err = capsys.readouterr()
    found = json.loads(printed)
    assert err == ""
    assert (found["out"], found["count"], found["step"], found["weights"]) == (str(out), 2, 30, "ema")


@pytest.mark.parametrize(("which", "step"), [("last", 30), ("best", 20), ("20", 20), ("00000030", 30)])
def test_the_checkpoint_asked_for(
    which: str, step: int, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """last, best by held-out loss, or a step."""
    run = shutil.copytree(trained, tmp_path / "run")
    state = run / "checkpoints" / "00000020" / "state.json"
    found = checkpoints.read_state(state.parent)
    found.pop("seal")
    found["held_out"] = 0.01
    state.write_text(json.dumps({**found, "seal": checkpoints._seal(found)}))
    out = str(tmp_path / "a.png")
    assert main(["sample", str(run), "-n", "1", "--checkpoint", which, "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == step
    assert main(["sample", str(run), "--checkpoint", "25", "--out", out]) == 2
    assert f"checkpoint 25: {run} has 20, 30" in capsys.readouterr().err


def test_bf16_gives_nearly_the_same_images(trained: Path, tmp_path: Path) -> None:
    """The sampler's state stays float32, so that only the network's rounding is seen."""
    exact = sample(trained, tmp_path / "a.npz", "-n", 2).astype(int)
    rounded = sample(trained, tmp_path / "b.npz", "-n", 2, "--precision", "bf16").astype(int)
    assert 0 < np.abs(exact - rounded).mean() < 8


def test_ctrl_c(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """130, one line, and no picture that is not finished."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ddpm.run.sample.trajectory", interrupted)
    assert main(["sample", str(trained), "--out", str(tmp_path / "a.png")]) == 130
    assert capsys.readouterr().err == "ddpm: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_the_library_gives_what_the_program_writes(trained: Path, tmp_path: Path) -> None:
    """`generate` and `progressive` on `ddpm.load`'s denoiser; `stop` ends it early."""
    denoiser = ddpm.load(trained)
    found = generate(denoiser, (1, 8, 8), [3, 1], batch_size=1)
    assert np.array_equal(found[1], sample(trained, tmp_path / "a.npz", "-n", 1, "--seed", 1)[0].transpose(2, 0, 1))
    strip = progressive(denoiser, (1, 8, 8), [3, 1], columns=3)
    assert strip.shape == (2, 3, 1, 8, 8)
    assert int((strip[:, -1].int() - found.int()).abs().max()) <= 1
    assert not generate(denoiser, (1, 8, 8), [3], stop=lambda: True).any()
    with pytest.raises(ddpm.InputError, match="sampler 'euler': want ancestral, ddim"):
        generate(denoiser, (1, 8, 8), [3], sampler="euler")
    assert torch.is_grad_enabled()


def test_a_graph_is_fed_and_read_as_the_network_is(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a shape, captured once, whose memory is its own: what it gave before stays. (Here it replays by a call.)"""
    denoiser, captured = ddpm.load(trained), []

    def capture(self: device.GraphedUNet, inputs: list[torch.Tensor]) -> Any:
        captured.append(inputs[0].shape)
        out = torch.empty_like(inputs[0])
        return inputs, out, lambda: out.copy_(self.network(*inputs))

    monkeypatch.setattr(device.GraphedUNet, "_capture", capture)
    assert isinstance(denoiser.network, ddpm.UNet)
    graphed = dataclasses.replace(denoiser, network=device.GraphedUNet(denoiser.network))
    found, wanted = (generate(d, (1, 8, 8), range(7), batch_size=3) for d in (graphed, denoiser))
    assert torch.equal(found, wanted)
    assert captured == [(3, 1, 8, 8), (1, 1, 8, 8)]
    x, t = torch.randn(2, 3, 1, 8, 8), torch.tensor([1, 2, 3])
    first = graphed.network(x[0], t)
    assert not torch.equal(graphed.network(x[1], t), first)
    assert torch.equal(first, denoiser.network(x[0], t))


def test_where_a_graph_can_be(trained: Path) -> None:
    """On CUDA, for a UNet that neither draws dropout nor wants gradients."""
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
    """Of 2 and 3 levels from the whole schedule's end, and from a level within: none of all choices costs less."""
    found = open_checkpoint("digits")
    measured = read_calibration(found)
    assert measured is not None
    cost = bound_cost(found.denoiser.schedule, measured[0])

    def bits(levels: list[int]) -> float:
        return sum(float(cost[s, t]) for s, t in pairwise([0, *levels]))

    for steps, start in ((2, None), (3, 90), (1, 40), (90, 90)):
        levels = sampler_levels(found, "ddim", steps, "bound", start)
        assert (len(levels), levels[-1]) == (steps, start or 1000)
        others = combinations(range(1, levels[-1]), steps - 1)
        assert bits(levels) == min(bits([*some, levels[-1]]) for some in others)
    assert len(sampler_levels(found, "heun", spaced="bound")) == 10
    with pytest.raises(InputError, match="spacing 'even': want uniform, quadratic, log_snr, karras, bound"):
        sampler_levels(found, "ddim", 5, "even")


@pytest.mark.parametrize(
    ("sampler", "steps", "eta"),
    [("ancestral", None, 0), ("ancestral", 7, 0), ("ddim", 6, 0.5), ("dpmpp_2m_sde", [3, 8, 11, 20], 0)],
)
def test_noise_drawn_ahead_is_what_the_sampler_asks_for(
    sampler: str, steps: Levels | None, eta: float, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The levels given to `ahead` are those of the calls, in order, and none is left; here the device is the CPU."""
    denoiser, given, asked = ddpm.load(trained), list[int](), list[int]()

    def ahead(seeds: Any, shape: Any, device: str, levels: list[int]) -> Any:
        def noise(t: int) -> torch.Tensor:
            asked.append(t)
            return per_image(seeds, shape)(t)

        assert device == "cuda"
        given.extend(levels)
        return noise

    monkeypatch.setattr("ddpm.run.sample.ahead", ahead)
    steps_made = list(trajectory(denoiser, (1, 8, 8), [0], named(sampler, eta), steps, "cuda"))
    assert asked == given
    assert steps_made[-1].t == 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_batch_changes_no_picture(sampler: str) -> None:
    """The digits model in batches of 1, 7 and 64: to 1e-5 before rounding, and so the same pixels."""
    denoiser = open_checkpoint("digits", precision="float32").denoiser
    steps = SPACINGS["log_snr"](denoiser.schedule, 8)
    whole = generate(denoiser, (1, 8, 8), range(64), sampler, steps, batch_size=64)
    for n, size in ((21, 7), (3, 1)):
        found = generate(denoiser, (1, 8, 8), range(n), sampler, steps, batch_size=size)
        assert (found == whole[: len(found)]).float().mean() >= 0.999
        assert (found.int() - whole[: len(found)].int()).abs().max() <= 1
    way = [trajectory(denoiser, (1, 8, 8), seeds, sampler, steps) for seeds in (range(7), [3])]
    for many, one in zip(*way, strict=True):
        torch.testing.assert_close(many.x[3:4], one.x, rtol=0, atol=1e-5)
