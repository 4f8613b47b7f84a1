"""Class labels: the network gets the right ones, guidance equals its formula, `ddpm sample --class` samples a class."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, tensors, train
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import ddpm
from ddpm import losses, schedule
from ddpm.cli import main
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import interop
from ddpm.files.opening import open_checkpoint
from ddpm.run import device, edit
from ddpm.run.edit import SamplingSettings
from ddpm.run.sample import generate
from ddpm.unet import UNet

S = schedule.linear()
GREYS = {"black": 0, "grey": 128, "white": 255}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of classes. The grey level of an image tells its class."""
    root = tmp_path_factory.mktemp("classes")
    for name, level in GREYS.items():
        (root / name).mkdir()
        for i in range(8):
            Image.fromarray(np.full((8, 8), level, np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that was trained on these classes."""
    out = tmp_path_factory.mktemp("run") / "run"
    options = ["--data", str(labelled), "--classes", "--size", "8", "--steps", "60", "--save-every", "30"]
    assert train(out, *options, "--sample-every", "60") == 0
    return out


# The network.


def unet(classes: int = 3) -> UNet:
    torch.manual_seed(0)
    network = UNet(
        1, width=32, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(), num_classes=classes
    ).eval()
    for p in network.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return network


def test_label_minus_one_means_no_label() -> None:
    """-1 gives what None gives, an image depends on its own label only, and a network without classes refuses y."""
    network, x, t = unet(), torch.randn(4, 1, 8, 8), torch.tensor([5, 5, 5, 5])
    free = network(x, t)
    mixed = network(x, t, torch.tensor([-1, 0, 1, 2]))
    torch.testing.assert_close(mixed[0], free[0])
    assert (mixed[1:] - free[1:]).abs().amax((1, 2, 3)).min() > 1e-3
    torch.testing.assert_close(network(x, t, torch.tensor([-1] * 4)), free)
    for i in range(1, 4):
        torch.testing.assert_close(network(x[i : i + 1], t[:1], torch.tensor([i - 1]))[0], mixed[i])
    with pytest.raises(InputError, match="y: this network has no classes"):
        unet(0)(x, t, torch.tensor([0, 0, 0, 0]))


# Guidance.


def labelled_network(x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
    """A function of x, timestep and class in place of a network."""
    k = (timestep.double() / 1000).view(-1, 1, 1, 1)
    label = 0 if y is None else (y.view(-1, 1, 1, 1) + 1).double()
    return (2 * x + 3 * k).sin() + 0.3 * label * x.cos()


@pytest.mark.parametrize("predict", ["eps", "x0", "mu", "v"])
@given(scale=st.floats(-2, 8), t=st.integers(1, 1000), seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_guidance_is_linear_in_x0(predict: Any, scale: float, t: int, seed: int) -> None:
    """x0^ = x0^(no label) + scale (x0^(label) - x0^(no label)), for every prediction."""
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    at, y = torch.tensor([t, t]), torch.tensor([0, 2])
    plain = Denoiser(labelled_network, S, predict, clip=False)
    free, given_y = plain(x, at, torch.tensor([-1, -1])).x0, plain(x, at, y).x0
    result = plain.guided(scale)(x, at, y).x0
    tolerance = 1e-9 * (1 + float(free.abs().max() + given_y.abs().max()))
    torch.testing.assert_close(result, free + scale * (given_y - free), rtol=1e-9, atol=tolerance)


def test_guidance_only_within_its_interval() -> None:
    """Outside it the prediction is that with label, from one call with the batch as it is."""
    sizes = []

    def spy(x: Tensor, timestep: Tensor, y: Tensor | None) -> Tensor:
        sizes.append(len(x))
        return labelled_network(x, timestep, y)

    x, y = torch.randn(3, 1, 4, 4).double(), torch.tensor([0, 1, 2])
    guided = Denoiser(spy, S).guided(3.0, (100, 900))
    everywhere, plain = Denoiser(labelled_network, S).guided(3.0), Denoiser(labelled_network, S)
    for t, inside in ((99, False), (100, True), (900, True), (901, False)):
        at = torch.tensor([t] * 3)
        want = everywhere if inside else plain
        torch.testing.assert_close(guided(x, at, y).x0, want(x, at, y).x0)
        assert sizes.pop() == (6 if inside else 3)
    few = guided.respace([50, 500, 950])  # respacing renumbers levels; the interval stays at the same timesteps
    torch.testing.assert_close(few(x, torch.tensor([2] * 3), y).x0, everywhere(x, torch.tensor([500] * 3), y).x0)
    torch.testing.assert_close(few(x, torch.tensor([3] * 3), y).x0, plain(x, torch.tensor([950] * 3), y).x0)
    mixed = guided(x, torch.tensor([50, 500, 950]), y).x0
    torch.testing.assert_close(mixed[1], everywhere(x, torch.tensor([500] * 3), y).x0[1])
    torch.testing.assert_close(mixed[0], plain(x, torch.tensor([50] * 3), y).x0[0])
    before = len(sizes)
    guided(x, torch.tensor([500] * 3))
    assert sizes[before:] == [3]  # without labels there is no guidance


def test_a_learned_variance_is_not_guided() -> None:
    """The variance is that of the call with label; guidance changes the mean only."""

    def both(x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
        out = labelled_network(x, timestep, y)
        return torch.cat([out, out.tanh()], 1)

    plain = Denoiser(both, S, variance="learned_range", clip=False)
    x, t, y = torch.randn(2, 1, 4, 4).double(), torch.tensor([700, 20]), torch.tensor([1, 2])
    guided = plain.guided(4.0)
    assert torch.equal(guided(x, t, y).log_variance, plain(x, t, y).log_variance)
    assert not torch.equal(plain(x, t, y).log_variance, plain(x, t).log_variance)
    assert (guided(x, t, y).x0 - plain(x, t, y).x0).abs().max() > 1e-3


def test_guided_networks_are_replayed(captured: list[tuple[int, ...]]) -> None:
    """CUDA graphs wrap the inner network, for both batch sizes and with labels. (Here a replay is a plain call.)"""
    network = unet().requires_grad_(False)
    plain = Denoiser(network, schedule.linear(20, 1e-3, 0.3)).guided(2.0, (5, 20))
    graphed = device.use_cuda_graphs(plain, "cuda")
    y = torch.tensor([0, 1, 2])
    result, want = (generate(d, (1, 8, 8), range(3), y=y) for d in (graphed, plain))
    assert torch.equal(result, want)
    assert captured == [(6, 1, 8, 8), (3, 1, 8, 8)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: d.guided(float("nan")), "guidance nan: want a finite number"),
        (lambda d: d.guided(2.0, (0, 10)), "guidance interval 0, 10: want two levels in order, 1..1000"),
        (lambda d: d.guided(2.0, (20, 10)), "guidance interval 20, 10"),
        (lambda d: replace(d, clip=1.5), "clip 1.5: want true, false, or a quantile"),
    ],
)
def test_mistakes_in_python(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(Denoiser(labelled_network, S))


# Dynamic thresholding.


@given(p=st.floats(0.5, 0.999), seed=st.integers(0, 10**6), scale=st.floats(0.1, 5))
@settings(max_examples=30)
def test_dynamic_thresholding_equals_diffusers(p: float, seed: int, scale: float) -> None:
    """x0^ of each image, including an image within [-1, 1], which does not change."""
    eps = scale * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    eps[0] *= 1e-3
    theirs = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=p, sample_max_value=1e9)
    denoiser = Denoiser(lambda x, timestep, y: x, S, "x0", clip=p)
    result = denoiser(eps, torch.tensor([500] * 3))
    torch.testing.assert_close(result.x0, theirs._threshold_sample(eps), rtol=1e-9, atol=1e-9)
    assert float(result.x0.abs().max()) <= 1
    again = S.alpha_bar[500].sqrt() * result.x0 + (1 - S.alpha_bar[500]).sqrt() * result.eps
    torch.testing.assert_close(again, eps)  # eps^ belongs to the clipped x0^


# Programs.


def test_labels_are_those_of_the_images(labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss gets the class that the picture shows, or -1 for about the share that label_dropout hides."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(denoiser: Denoiser, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is not None
        seen.append((x0.mean((1, 2, 3)), y))
        return losses.simple(denoiser, x0, t, eps, y)

    monkeypatch.setitem(losses.LOSSES, "simple", spy)
    options = ["--data", str(labelled), "--classes", "--size", "8", "--label-dropout", "0.25", "--batch-size", "64"]
    assert train(tmp_path / "run", *options, "--steps", 8, "--accumulate", 2) == 0
    grey, y = (torch.cat(part) for part in zip(*seen, strict=True))
    shown = y >= 0
    level = torch.tensor([2 * v / 255 - 1 for v in GREYS.values()])
    torch.testing.assert_close(grey[shown], level[y[shown]])
    assert len(y) == 512
    assert 0.18 < float((~shown).float().mean()) < 0.32
    assert (y[~shown] == -1).all()


def test_a_class_is_sampled_by_its_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--class cycles through the given classes, `all` through every class, and a seed still determines the image."""
    assert open_checkpoint(run).preset.class_names == tuple(GREYS)
    assert (run / "samples" / "00000060.png").is_file()

    def sample(*options: str) -> Any:
        assert main(["sample", str(run), "--out", str(tmp_path / "a.npz"), *options]) == 0
        return np.load(tmp_path / "a.npz")["arr_0"]

    both = sample("-n", "4", "--class", "white", "black", "--guidance", "3")
    white = sample("-n", "3", "--class", "white", "--guidance", "3")
    assert np.abs(both[[0, 2]].astype(int) - white[[0, 2]].astype(int)).max() <= 1
    assert both[[0, 2]].mean() > both[[1, 3]].mean()
    every = sample("-n", "6", "--class", "all", "--guidance", "3")
    alone = sample("-n", "1", "--seed", "5", "--class", "white", "--guidance", "3")
    assert np.abs(every[5].astype(int) - alone[0].astype(int)).max() <= 1
    assert np.abs(every.astype(int) - sample("-n", "6").astype(int)).max() > 1
    capsys.readouterr()
    sample("-n", "2", "--class", "grey", "--guidance-interval", "3,15", "--clip", "0.99", "--json")
    about = json.loads(capsys.readouterr().out)
    assert (about["classes"], about["guidance"], about["guidance_interval"]) == (["grey"], 1.5, [3, 15])


def test_a_conditional_run_resumes_to_the_bit(run: Path, labelled: Path, tmp_path: Path) -> None:
    """30 steps and 30 more steps give the weights of 60 steps."""
    out = tmp_path / "run"
    options = ["--data", str(labelled), "--classes", "--size", "8", "--save-every", "30", "--sample-every", "60"]
    assert train(out, *options, "--steps", 30) == 0
    assert train(out, *options, "--steps", 60) == 0
    assert_same(tensors(out, 60), tensors(run, 60))


@pytest.mark.parametrize("classes", [(), (2, 0, 1)])
@pytest.mark.parametrize("what", ["edit", "invert", "interpolate", "inpaint"])
def test_edits_do_not_depend_on_the_batch_size(
    what: str, classes: tuple[int, ...], run: Path, labelled: Path, tmp_path: Path
) -> None:
    """Batches of 2, 2 and 1 equal one of 5, bit for bit: an image keeps its seed, its weight and its class."""
    checkpoint = open_checkpoint(run)
    checkpoint = replace(checkpoint, denoiser=Denoiser(labelled_network, checkpoint.denoiser.schedule).guided(1.5))
    a, b, mask = (tmp_path / name for name in ("a.png", "b.png", "mask.png"))
    for path, picture in zip((a, b, mask), (np.arange(64), 255 - np.arange(64), np.arange(64) % 2 * 255), strict=True):
        Image.fromarray(picture.reshape(8, 8).astype(np.uint8)).save(path)

    def edited(**settings: Any) -> Tensor:
        sampling = SamplingSettings("ddim" if what == "invert" else "ancestral", 5, classes=classes, **settings)
        if what == "interpolate":
            return edit.interpolate(checkpoint, a, b, 5, settings=sampling, progress=False)
        if what == "inpaint":
            return edit.inpaint(checkpoint, a, mask, 5, sampling, jump=2, resample=2, progress=False)
        n, iterations = (max(len(classes), 1), 2) if what == "invert" else (5, 0)
        return edit.redraw(checkpoint, a, n, settings=sampling, iterations=iterations, progress=False)

    whole = edited()
    assert torch.equal(edited(batch_size=2), whole)
    assert len(whole.unique(dim=0)) == len(whole)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample RUN --class yellow", "--class 'yellow': want black, grey, white, or all"),
        ("sample RUN --guidance 2", "--guidance: needs a class; want class NAME"),
        ("sample RUN --class grey --guidance-interval 5", "--guidance-interval: '5': want two levels as 100,900"),
        (
            "sample RUN --class grey --guidance-interval 5,25",
            "guidance interval 5, 25: want two levels in order",
        ),
        ("sample RUN --class grey --clip 2", "--clip: '2': want static, none or a number between 0 and 1"),
        ("sample OTHER --class grey", "was not trained with classes"),
        ("edit RUN IMAGE --t -1", "t -1: want 0 to 20"),
        ("edit RUN IMAGE --batch-size 0", "--batch-size 0: want a whole number of at least 1"),
        ("edit RUN IMAGE --invert 2 -n 2", "n 2: an inversion has one result per class; want at most 1"),
        ("edit RUN IMAGE --invert 2 --clip static", "--clip: not with --invert"),
        ("sample NEVER --class grey --guidance 2", "never saw an image without its label; want 1"),
        ("paper table4 fig6 --run NEVER", "saw an image without its label; want table4 or fig5"),
        ("paper table4 table1 --run NEVER", "saw an image without its label; want --samples"),
        ("sample RUN --sigma-hat", "--sigma-hat: only --sampler ddim has it"),
        ("sample RUN --sampler heun --spacing linear", "--spacing 'linear': want uniform, quadratic, log_snr, karras"),
    ],
)
def test_mistakes(command: str, words: str, run: Path, trained: Path, capsys: Any, tmp_path: Path) -> None:
    preset = replace(open_checkpoint(run).preset, label_dropout=0.0)
    network = open_checkpoint(run).denoiser.network
    assert isinstance(network, UNet)
    interop.save(tmp_path / "never.safetensors", preset, network.state_dict(), "the run, as if it had no dropout")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "image.png")
    before = sorted(tmp_path.iterdir())
    places = {"RUN": run, "OTHER": trained, "NEVER": tmp_path / "never.safetensors", "IMAGE": tmp_path / "image.png"}
    given = [str(places.get(word, word)) for word in command.split()]
    assert main([*given, "--out", str(tmp_path / "a.png")]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_images_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(6):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "flat" / f"{i}.png")
    command = [*TINY, "--data", str(tmp_path / "flat"), "--size", "8", "--classes", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "has no labels; want a folder per class, a column of labels, or no classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_held_out_images_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have a loss without a class, which a model of --label-dropout 0 does not have."""
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    black = Image.fromarray(np.zeros((8, 8), np.uint8))
    rows = {"train": [0, 1, 0, 1], "test": [-1, -1]}  # -1 is no label
    splits = {
        name: datasets.Dataset.from_dict({"image": [black] * len(labels), "label": labels}, kinds)
        for name, labels in rows.items()
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "images")
    words = [*TINY, "--data", str(tmp_path / "images"), "--size", "8", "--classes", "--steps", "1", "--out"]
    assert main([*words, str(tmp_path / "none"), "--label-dropout", "0"]) == 2
    assert "--label-dropout 0: needs all labels, and the held-out test of" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main([*words, str(tmp_path / "some")]) == 0


def test_guidance_in_python(run: Path) -> None:
    """`ddpm.load` returns a denoiser that takes y. With guidance, white images are lighter than black ones."""
    denoiser = ddpm.load(run)
    y = torch.tensor([0, 2] * 8)
    brightness = generate(denoiser.guided(4.0), (1, 8, 8), range(16), y=y).float().mean((1, 2, 3))
    assert brightness[1::2].mean() > brightness[::2].mean() + 5


def test_a_guided_denoiser_moves_its_inner_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """`to` moves the inner network and keeps the guidance."""
    moved = []
    monkeypatch.setattr(UNet, "to", lambda self, device, **_: moved.append((self, device)))
    network = unet()
    guided = Denoiser(network, schedule.linear(20, 1e-3, 0.3)).guided(2.0).to("cpu")
    assert moved == [(network, "cpu")]
    assert (guided.network.network, guided.network.scale) == (network, 2.0)  # type: ignore[attr-defined]


def test_classes_that_cannot_be_learned(labelled: Path, tmp_path: Path, capsys: Any) -> None:
    """A warning names classes without a training image, and label_dropout 1 is refused."""
    for name in GREYS:
        for i in range(8):
            target = tmp_path / "set" / ("test" if name == "white" else "train") / name / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((labelled / name / f"{i}.png").read_bytes())
    options = ["--data", str(tmp_path / "set"), "--classes", "--size", "8", "--steps", "2"]
    assert train(tmp_path / "run", *options) == 0
    assert "these classes have no training image and cannot be learned: white" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"label_dropout 1\.0: would hide every label"):
        replace(ddpm.PRESETS["digits"], label_dropout=1.0)


def test_evaluate_measures_samples_of_classes(run: Path, tmp_path: Path, capsys: Any) -> None:
    """--class and --guidance give the same samples as in `ddpm sample`, and are refused if no samples are made."""
    (tmp_path / "mine.py").write_text("def rows(x):\n    return x.reshape(len(x), -1)[:, :4].astype(float)\n")
    options = ["--class", "all", "--guidance", "3", "--sampler", "ddim", "--steps", "3", "-n", "8", "--json"]
    features = ["--metrics", "fid", "--features", f"{tmp_path}/mine.py:rows"]
    assert main(["evaluate", str(run), *options, *features]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["classes"], result["guidance"], result["samples"]) == (["all"], 3.0, 8)
    assert main(["sample", str(run), *options, "--out", str(tmp_path / "s.npz")]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--samples", str(tmp_path / "s.npz"), *features, "--json"]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["frechet_distance"] == pytest.approx(result["frechet_distance"])
    for wrong in (["--metrics", "nll"], ["--samples", str(tmp_path / "s.npz"), *features]):
        assert main(["evaluate", str(run), "--class", "black", *wrong]) == 2
        assert "--class black: needs one of --metrics fid" in capsys.readouterr().err
