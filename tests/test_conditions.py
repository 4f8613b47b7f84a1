"""Conditions on an image: closed forms for Gaussian data, laws of masks, training, `ddpm sample --input`, measures."""

import itertools
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close, assert_same, tensors, train
from exact import PREDICTIONS, GaussianData, correlated, last, network, normal, z_score
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest, chisquare, kstest
from torch import Tensor

from ddpm import PRESETS, Preset, conditions, likelihood, losses, noise, pixels, samplers, schedule
from ddpm.cli import main
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import data
from ddpm.files.images import to_png
from ddpm.files.opening import open_checkpoint
from ddpm.gaussian import beta_tilde, q_sample
from ddpm.run import conditioning, device, fidelity, inputs, parts, previews, quality
from ddpm.run.export import figures
from ddpm.run.processes import Processes
from ddpm.run.sample import Conditions, Sampling, generate
from ddpm.run.train import _load
from ddpm.unet import UNet

SHORT = schedule.linear(50, 2e-3, 0.4)
LARGE = torch.cat([beta_tilde(SHORT)[:2], SHORT.beta[2:]])  # fixed_large's sigma_t^2
NOISE = 0.1
"""Standard deviation of the noise on the Gaussian data's condition. Without it, the covariance would be singular."""
ALONE = Processes(0, 1, torch.device("cpu"))


# Gaussian data and a linear condition: c = the mean of the four pixels (lowres:2 of a 2x2 image) + noise.


def posterior(prior: GaussianData, c: Tensor) -> GaussianData:
    """x_0 given c [B]: the covariance does not depend on c; the means are [B, 1, 2, 2]."""
    A = torch.full((1, 4), 0.25).double()
    gain = prior.covariance @ A.T / (A @ prior.covariance @ A.T + NOISE**2)
    mean = prior.mean.flatten() + (c[:, None] - A @ prior.mean.flatten()) @ gain.T
    return GaussianData(mean.view(-1, *prior.mean.shape), prior.covariance - gain @ A @ prior.covariance)


def told_network(predict: str) -> Callable[..., Tensor]:
    """E[x_0 | x_t, c] as a network with a condition, whose first channel is c at every pixel."""

    def call(x: Tensor, timestep: Tensor, y: Tensor | None, condition: Tensor) -> Tensor:
        out: Tensor = network(posterior(correlated(), condition[:, 0].mean((1, 2))), SHORT, predict)(x, timestep)
        return out

    return call


def as_condition(c: list[float]) -> Tensor:
    return conditions.join(torch.tensor(c).double().view(-1, 1, 1, 1), torch.ones(len(c), 1, 2, 2).double())


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_samples_have_the_exact_conditional_distribution(predict: Any) -> None:
    """Each of two conditions gives its own images their mean and covariance, those of the reverse chain given c."""
    c, n = [-0.4, 0.9], 8000
    denoiser = Denoiser(told_network(predict), SHORT, predict, clip=False).given(as_condition(c))
    draws = normal(2 * n, (1, 2, 2))
    x = last(samplers.ancestral(denoiser, draws(50), draws)).x
    laws = [
        replace(law, mean=law.mean[0]).chain(SHORT, LARGE)
        for law in (posterior(correlated(), torch.tensor([each]).double()) for each in c)
    ]
    for part, law, other in ((x[:n], laws[0], laws[1]), (x[n:], laws[1], laws[0])):
        assert z_score(part, *law) < 4.5
        assert z_score(part, *other) > 6  # negative control: the other condition
    assert z_score(x[:n], *correlated().chain(SHORT, LARGE)) > 6  # nor is it the law without a condition


def test_the_ode_gives_the_conditional_mean_and_covariance() -> None:
    """The probability flow given c is linear, so 8 of its points give its law: that of x_0 given c, to 2%."""
    fine, c = schedule.linear(), torch.tensor([0.9]).double()
    law = posterior(correlated(), c)

    def call(x: Tensor, timestep: Tensor, y: Tensor | None, condition: Tensor) -> Tensor:
        out: Tensor = network(posterior(correlated(), condition[:, 0].mean((1, 2))), fine, "v")(x, timestep)
        return out

    points = 2 * torch.cat([torch.eye(4), -torch.eye(4)]).double().view(-1, 1, 2, 2)  # of N(0, I): mean and covariance
    denoiser = Denoiser(call, fine, "v", clip=False).given(as_condition([0.9]))
    x = last(samplers.ddim(denoiser, points, steps=1000)).x.flatten(1)
    torch.testing.assert_close(x.mean(0), law.mean.flatten(), atol=0.02, rtol=0)
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    assert float((covariance - law.covariance).norm() / law.covariance.norm()) < 0.02
    assert float((covariance - correlated().covariance).norm() / law.covariance.norm()) > 0.1


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_bound_given_the_condition_equals_the_closed_form(predict: Any) -> None:
    """The mean of every L_{t-1} over x_0 given c; without the condition the same bound costs more."""
    law = posterior(correlated(), torch.tensor([0.9]).double())
    law = replace(law, mean=law.mean[0])
    x0, eps = law.cubature()
    plain = Denoiser(network(correlated(), SHORT, predict), SHORT, predict, clip=False)
    told = Denoiser(told_network(predict), SHORT, predict, clip=False).given(as_condition([0.9]))
    terms = [[], []]  # type: ignore[var-annotated]
    for t in torch.arange(2, SHORT.T + 1)[:, None].expand(-1, len(x0)):
        for found, denoiser in zip(terms, (told, plain), strict=True):
            found.append(likelihood.term(denoiser, x0, q_sample(SHORT, x0, t, eps), t)[0].mean())
    closed = law.bound_kl(SHORT, LARGE)
    torch.testing.assert_close(torch.stack(terms[0]), closed, rtol=1e-8, atol=0)
    assert (torch.stack(terms[1]) > closed + 1e-6).all()


# Guidance.


def seen(x: Tensor, timestep: Tensor, y: Tensor | None, condition: Tensor) -> Tensor:
    """A function of x, class and condition in place of a network."""
    label = 0 if y is None else (y.view(-1, 1, 1, 1) + 1).double()
    return (2 * x).sin() + 0.3 * label * x.cos() + condition[:, :1] * (1 + x.square())


@given(scale=st.floats(-2, 8), seed=st.integers(0, 10**6), labelled=st.booleans())
def test_guidance_towards_a_condition_or_a_class(scale: float, seed: int, labelled: bool) -> None:
    """prediction = without + scale (with - without). A label is guided if there is one, and otherwise the condition."""
    g = torch.Generator().manual_seed(seed)
    x, c = torch.randn(3, 1, 2, 2, generator=g).double(), torch.randn(3, 2, 2, 2, generator=g).double()
    t, y = torch.tensor([500]), torch.tensor([0, 2, 1]) if labelled else None
    plain = Denoiser(seen, schedule.linear(), clip=False)
    without = seen(x, t, None, c) if labelled else seen(x, t, None, torch.zeros_like(c))
    if labelled:
        without = seen(x, t, torch.full((3,), -1), c)
    wanted = without + scale * (seen(x, t, y, c) - without)
    for guided in (plain.given(c).guided(scale), plain.guided(scale).given(c)):
        torch.testing.assert_close(guided.output(x, t, y)[0], wanted, rtol=1e-9, atol=1e-9)


@given(scale=st.floats(-2, 8), seed=st.integers(0, 10**6), labelled=st.booleans())
def test_a_guide_gets_the_condition_too(scale: float, seed: int, labelled: bool) -> None:
    """prediction = guide + scale (model - guide), where both are told the condition and the label."""
    g = torch.Generator().manual_seed(seed)
    x, c = torch.randn(3, 1, 2, 2, generator=g).double(), torch.randn(3, 2, 2, 2, generator=g).double()
    t, y = torch.tensor([500]), torch.tensor([0, 2, 1]) if labelled else None

    def weaker(x: Tensor, timestep: Tensor, y: Tensor | None, condition: Tensor) -> Tensor:
        return seen(x.square(), timestep, y, condition)

    plain, guide = (Denoiser(each, schedule.linear(), clip=False) for each in (seen, weaker))
    wanted = weaker(x, t, y, c) + scale * (seen(x, t, y, c) - weaker(x, t, y, c))
    for guided in (plain.given(c).guided(scale, guide=guide), plain.guided(scale, guide=guide).given(c)):
        torch.testing.assert_close(guided.output(x, t, y)[0], wanted, rtol=1e-9, atol=1e-9)


# The condition.


def picture_of(generator: np.random.Generator, side: int = 8) -> tuple[Image.Image, Tensor]:
    array = generator.integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(array), pixels.to_signal(torch.from_numpy(array.copy()).permute(2, 0, 1)[None])


@pytest.mark.parametrize("factor", [2, 4])
def test_lowres_and_grey_equal_pillow(factor: int) -> None:
    """Block averages are Pillow's `reduce`, and luma is its mode L, each within its rounding."""
    image, x0 = picture_of(np.random.default_rng(factor))
    small = pixels.to_pixels(conditions.picture(f"lowres:{factor}", x0))[0].permute(1, 2, 0).numpy()
    assert np.abs(small.astype(int) - np.asarray(image.reduce(factor)).astype(int)).max() <= 1
    grey = pixels.to_pixels(conditions.picture("grey", x0))[0, 0].numpy()
    assert np.abs(grey.astype(int) - np.asarray(image.convert("L")).astype(int)).max() <= 1
    assert torch.equal(conditions.picture("grey", x0[:, :2]), conditions.picture("grey", x0[:, [1, 0]]))


def test_a_small_picture_is_enlarged_by_cubic_convolution() -> None:
    """Keys' cubic with a = -0.75 and clamped edges, written out."""

    def cubic(d: float, a: float = -0.75) -> float:
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    matrix = np.zeros((8, 4))
    for i in range(8):
        place = (i + 0.5) / 2 - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            matrix[i, min(max(j, 0), 3)] += cubic(place - j)
    small = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    large = conditions.join(small, torch.ones(1, 1, 8, 8).double())
    m = torch.from_numpy(matrix)
    torch.testing.assert_close(large[:, :-1], m @ small @ m.T, rtol=1e-9, atol=1e-9)
    assert (large[:, -1] == 1).all()


@given(seed=st.integers(0, 10**6), law=st.sampled_from(["half", "box", "dots"]))
def test_a_masked_condition_tells_nothing_of_the_hidden_part(seed: int, law: str) -> None:
    """Two images that agree where the mask is 1 have one condition; where the mask is 0, all channels are 0."""
    g = torch.Generator().manual_seed(seed)
    x0, other = torch.randn(2, 1, 3, 8, 8, generator=g)
    known = conditions.known(f"mask:{law}", 1, (8, 8), g)
    both = [conditions.join(x, known) for x in (x0, x0 * known + other * (1 - known))]
    assert torch.equal(*both)
    assert (both[0][(1 - known).bool().expand(-1, 4, -1, -1)] == 0).all()
    assert torch.equal(both[0][:, -1:], known)


def test_the_laws_of_masks_have_their_frequencies() -> None:
    n, size, g = 4000, (8, 12), torch.Generator().manual_seed(3)
    halves = conditions.half(n, size, g)
    assert (halves.flatten(1).sum(1) == 48).all()
    corners = halves[:, [0, 0, -1], [0, -1, 0]].int().tolist()  # top left, top right, bottom left tell the side
    sides = [corners.count(each) for each in ([1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1])]
    assert sum(sides) == n
    assert chisquare(sides).pvalue > 1e-4

    boxes = ~conditions.box(n, size, g)
    for dim, (least, most) in ((2, (2, 6)), (1, (3, 9))):
        lengths = boxes.any(dim).sum(1)
        counts = torch.bincount(lengths)[least:]
        assert (int(lengths.min()), int(lengths.max())) == (least, most)
        assert chisquare(counts.numpy()).pvalue > 1e-4
        start = boxes.any(dim).int().argmax(1)[lengths == least]
        assert chisquare(torch.bincount(start, minlength=size[2 - dim] - least + 1).numpy()).pvalue > 1e-4
    assert torch.equal(boxes, boxes.any(2)[:, :, None] & boxes.any(1)[:, None])  # they are rectangles

    dots = conditions.dots(n, size, g)
    assert binomtest(int(dots.sum()), dots.numel(), 0.25).pvalue > 1e-4
    neighbours = dots[:, :, 1:] & dots[:, :, :-1]
    assert binomtest(int(neighbours[:, :, ::2].sum()), neighbours[:, :, ::2].numel(), 1 / 16).pvalue > 1e-4


# The network.


def test_the_network_sees_the_condition_beside_the_image() -> None:
    """Its first convolution is that of x plus that of the condition; a wrong number of channels is refused."""
    torch.manual_seed(0)
    net = UNet(
        1, width=32, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(), condition_channels=2
    ).eval()
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    plain = UNet(1, width=32, channel_multipliers=(1,), num_res_blocks=1, attention_levels=()).eval()
    state = {**net.state_dict(), "conv_in.weight": net.conv_in.weight[:, :1]}
    plain.load_state_dict(state)
    x, t, condition = torch.randn(2, 1, 8, 8), torch.tensor([3, 9]), torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(net(x, t, condition=torch.zeros_like(condition)), plain(x, t))
    assert float((net(x, t, condition=condition) - plain(x, t)).detach().abs().min()) > 0
    for wrong, words in ((None, "condition: 0 channels; want 2"), (condition[:, :1], "condition: 1 channels; want 2")):
        with pytest.raises(InputError, match=words):
            net(x, t, condition=wrong)
    with pytest.raises(InputError, match="condition: 2 channels; want no condition"):
        plain(x, t, condition=condition)


def test_cuda_graphs_take_the_condition(captured: list[tuple[int, ...]]) -> None:
    """The inner network is replayed with the condition as an input. (Here a replay is a plain call.)"""
    torch.manual_seed(0)
    net = UNet(1, width=32, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(), condition_channels=2)
    for p in net.eval().requires_grad_(False).parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    plain = Denoiser(net, schedule.linear(20, 1e-3, 0.3)).guided(2.0)
    condition = torch.randn(3, 2, 8, 8)
    graphed = device.use_cuda_graphs(plain, "cuda")
    result, want = (generate(d, (1, 8, 8), range(3), "ddim", 4, condition=condition) for d in (graphed, plain))
    assert torch.equal(result, want)
    assert captured == [(6, 1, 8, 8)]
    alone = generate(plain, (1, 8, 8), range(3), "ddim", 4, batch_size=1, condition=condition)
    assert (alone.int() - want.int()).abs().max() <= 1  # each image keeps its condition


# Training.


def preset_of(condition: str, **settings: Any) -> Preset:
    return replace(PRESETS["digits"], condition=condition, batch_size=32, **settings)


def test_the_condition_of_a_batch_is_a_function_of_seed_step_and_place() -> None:
    """Parts of the batch get what the whole batch gets; dropout hides its share; without dropout it hides nothing."""
    x0 = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    preset = preset_of("mask:box", condition_dropout=0.25)
    _, whole = conditioning.of_batch(preset, x0, 7, slice(0, 32))
    _, part = conditioning.of_batch(preset, x0[8:20], 7, slice(8, 20))
    assert whole is not None
    assert part is not None
    assert torch.equal(whole[8:20], part)
    assert not torch.equal(conditioning.of_batch(preset, x0, 8, slice(0, 32))[1], whole)  # type: ignore[arg-type]
    hidden = 0
    for step in range(100):
        _, condition = conditioning.of_batch(preset, x0, step, slice(0, 32))
        assert condition is not None
        hidden += int((condition.flatten(1) == 0).all(1).sum())
    assert binomtest(hidden, 3200, 0.25).pvalue > 1e-4
    _, told = conditioning.of_batch(preset_of("lowres:2"), x0, 7, slice(0, 32))
    wanted = conditions.join(conditions.picture("lowres:2", x0), torch.ones(32, 1, 8, 8))
    assert torch.equal(told, wanted)  # type: ignore[arg-type]


def test_noise_on_the_condition_has_the_deviation_that_the_network_is_told() -> None:
    """The last channel is 1 - s; s is uniform in 0 .. 0.5, and (noisy - clean) / s is standard normal."""
    x0, preset = torch.zeros(32, 1, 8, 8), preset_of("lowres:2", condition_noise=0.5)
    clean = conditions.picture("lowres:2", x0).mean()
    told, draws = [], []
    for step in range(40):
        _, condition = conditioning.of_batch(preset, x0, step, slice(0, 32))
        assert condition is not None
        s = 1 - condition[:, -1, 0, 0]
        told.append(s)
        draws.append(((condition[:, 0] - clean) / s[:, None, None]).flatten())
        _, part = conditioning.of_batch(preset, x0[5:9], step, slice(5, 9))
        assert torch.equal(part, condition[5:9])  # type: ignore[arg-type]
    assert kstest(torch.cat(told).numpy() / 0.5, "uniform").pvalue > 1e-4
    assert kstest(torch.cat(draws).numpy(), "norm").pvalue > 1e-4
    _, masked = conditioning.of_batch(preset_of("mask:half", condition_noise=0.5), x0, 0, slice(0, 32))
    assert masked is not None
    hidden = masked[:, -1:] == 0
    assert (masked[:, :1][hidden] == 0).all()


def test_the_condition_of_an_image_depends_on_its_place_only() -> None:
    images = data.load("digits", (8, 8), 1, split="test")
    preset, places = preset_of("mask:half"), [5, 2, 9]
    x0 = pixels.to_signal(images.batch(places))
    whole = conditioning.of_images(preset, images, places, x0)
    alone = [conditioning.of_images(preset, images, [place], x0[k : k + 1]) for k, place in enumerate(places)]
    assert torch.equal(whole, torch.cat(alone))  # type: ignore[arg-type]


OPTIONS = ["--classes", "--condition", "lowres:2", "--condition-dropout", "0.2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run with condition lowres:2, its dropout, and classes."""
    out = tmp_path_factory.mktemp("run") / "run"
    assert train(out, *OPTIONS, "--steps", "8", "--save-every", "4", "--sample-every", "8") == 0
    return out


def test_a_run_with_a_condition_resumes_to_the_bit(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for steps in (4, 8):
        assert train(out, *OPTIONS, "--steps", steps, "--save-every", "4", "--sample-every", "8") == 0
    assert_same(tensors(out, 8), tensors(run, 8))
    assert (out / "samples" / "00000008.png").read_bytes() == (run / "samples" / "00000008.png").read_bytes()


def test_the_condition_is_that_of_the_warped_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With augment, the network is told the warp, and the picture of the image after the warp."""
    found: list[tuple[Tensor, Any]] = []
    real = losses.simple

    def spy(denoiser: Denoiser, x0: Tensor, *more: Any) -> Tensor:
        found.append((x0, denoiser.network))
        return real(denoiser, x0, *more)

    monkeypatch.setitem(losses.LOSSES, "simple", spy)
    assert train(tmp_path / "run", "--condition", "lowres:2", "--augment", "0.5", "--steps", "2") == 0
    for x0, told in found:
        picture = conditions.picture("lowres:2", x0)
        torch.testing.assert_close(told.condition, conditions.join(picture, torch.ones(len(x0), 1, 8, 8)))
        assert told.network.args[1].any()
    assert found


def test_distill_tells_model_and_teacher_the_condition(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the warp. The result takes --input, and has its guidance built in."""
    model, out = tmp_path / "model", tmp_path / "run"
    assert train(model, *OPTIONS, "--augment", "0.5", "--predict", "v", "--schedule", "cosine", "--steps", "2") == 0
    found: list[tuple[Denoiser, Denoiser]] = []
    real = losses.consistency

    def spy(denoiser: Denoiser, *data: Any, teacher: Denoiser) -> Tensor:
        found.append((denoiser, teacher))
        return real(denoiser, *data, teacher=teacher)

    monkeypatch.setitem(losses.LOSSES, "consistency", spy)
    options = "--steps 2 --batch-size 8 --eval-images 8 --sample-every 2 --guidance 2".split()
    assert main(["distill", str(model), "--out", str(out), *options]) == 0
    for student, teacher in found:
        assert torch.equal(student.network.condition, teacher.network.condition)  # type: ignore[attr-defined]
        guided = teacher.network.network  # type: ignore[attr-defined]
        assert guided.scale == 2
        assert student.network.network.args[1].any()  # type: ignore[attr-defined]
        assert torch.equal(student.network.network.args[1], guided.network.args[1])  # type: ignore[attr-defined]
    assert found
    words = ["sample", str(out), "--input", str(pictures / "small" / "0.png"), "--out", str(tmp_path / "a.npz")]
    assert main(words) == 0
    assert main([*words, "--guidance", "2"]) == 2
    assert "has the guidance of its distillation; want 1" in capsys.readouterr().err


def test_accumulation_changes_nothing(run: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", *OPTIONS, "--steps", "8", "--accumulate", "2") == 0
    assert_close(tensors(tmp_path / "run", 8), tensors(run, 8))


def test_init_from_a_model_without_a_condition_begins_as_this_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new input channels begin at 0, and a line says so: with lr 0, the network gives what the model gave."""
    options = ["--init", trained, "--condition", "lowres:2", "--steps", "1", "--lr", "0"]
    assert train(tmp_path / "a", *options) == 0
    assert "condition: lowres:2 instead of none; its input channels begin at 0" in capsys.readouterr().err
    old, new = (open_checkpoint(path).denoiser for path in (trained, tmp_path / "a"))
    x, t, condition = torch.randn(2, 1, 8, 8), torch.tensor([3, 9]), torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(new.given(condition)(x, t).x0, old(x, t).x0)


# `ddpm sample`.


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three large pictures 8x8 in large/, and their block averages 4x4 in small/."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("large", "small"):
        (folder / name).mkdir()
    for i in range(3):
        large = rng.integers(0, 256, (8, 8), np.uint8)
        small = pixels.to_pixels(conditions.picture("lowres:2", pixels.to_signal(torch.from_numpy(large)[None, None])))
        Image.fromarray(large).save(folder / "large" / f"{i}.png")
        Image.fromarray(small[0, 0].numpy()).save(folder / "small" / f"{i}.png")
    return folder


def test_a_small_picture_and_the_large_one_give_the_same_images(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """N samples per input; the large picture is reduced, which one line says; image i has seed i, in any batch."""
    out, found = tmp_path / "a.npz", {}
    for name in ("small", "large"):
        words = ["sample", str(run), "--input", str(pictures / name), "-n", "2", "--out", str(out), "--json"]
        assert main([*words, "--batch-size", "4"]) == 0
        said = capsys.readouterr()
        assert ("3 pictures: reduced to 4x4" in said.err) == (name == "large")
        assert json.loads(said.out)["per_input"] == 2
        found[name] = np.load(out)["arr_0"]
    assert np.array_equal(found["small"], found["large"])
    assert len(found["small"]) == 6
    words = ["sample", str(run), "--input", str(pictures / "small" / "1.png"), "--seed", "2", "-n", "2"]
    assert main([*words, "--out", str(out)]) == 0
    assert np.abs(np.load(out)["arr_0"].astype(int) - found["small"][2:4].astype(int)).max() <= 1
    assert main([*words, "--out", str(tmp_path / "a.png"), "--class", "3"]) == 0  # classes combine with it
    tiles = np.asarray(Image.open(tmp_path / "a.png"))[2:34, 2:34:4][::4]
    enlarged = inputs.read_inputs(open_checkpoint(run), pictures / "small" / "1.png").of([0])[:, :1]
    assert np.array_equal(tiles, pixels.to_pixels(enlarged)[0, 0].numpy())  # the input comes first


def test_a_mask_is_a_file_or_transparency(tmp_path: Path) -> None:
    """White is drawn, as in `inpaint`; so is what is transparent."""
    out, rng = tmp_path / "run", np.random.default_rng(0)
    assert train(out, "--condition", "mask:half", "--steps", "2") == 0
    grey, white = rng.integers(0, 256, (8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    white[:, 4:] = 255
    Image.fromarray(grey).save(tmp_path / "plain.png")
    Image.fromarray(white).save(tmp_path / "mask.png")
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - white)]).save(tmp_path / "clear.png")
    model = open_checkpoint(out)
    by_file = inputs.read_inputs(model, tmp_path / "plain.png", mask=tmp_path / "mask.png").of([0])
    clear = inputs.read_inputs(model, tmp_path / "clear.png").of([0])
    assert torch.equal(by_file, clear)
    assert torch.equal(by_file[0, 1], torch.from_numpy(white == 0).float())
    assert torch.equal(by_file[0, 0, :, :4], pixels.to_signal(torch.from_numpy(grey))[:, :4])
    with pytest.raises(InputError, match=r"no part is transparent; want --mask FILE"):
        inputs.read_inputs(model, tmp_path / "plain.png")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (6, 12)])
def test_known_pixels_are_those_of_training(channels: int, size: tuple[int, int], tmp_path: Path) -> None:
    """With a mask, a transparent picture is read as in training. Without one, only RGBA keeps what is half transparent.

    What is added to a picture of another shape is known, as in training.
    """
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (*size, 4), np.uint8)
    rgba[..., 3] = rng.choice([0, 200, 255], size)
    (tmp_path / "data").mkdir()
    Image.fromarray(rgba, "RGBA").save(tmp_path / "data" / "0.png")
    Image.fromarray(np.repeat(np.uint8([[255] + [0] * (size[1] - 1)]), size[0], 0)).save(tmp_path / "column.png")
    preset = replace(open_checkpoint("digits").preset, channels=channels, condition="mask:half", fit="pad")
    model = replace(open_checkpoint("digits"), preset=preset)
    trained = pixels.to_signal(data.load(str(tmp_path / "data"), (8, 8), channels, fit="pad").batch([0]))
    file = tmp_path / "data" / "0.png"
    by_file = inputs.read_inputs(model, file, mask=tmp_path / "column.png").of([0])
    assert torch.equal(by_file, conditions.join(trained, by_file[:, -1:]))
    by_alpha = inputs.read_inputs(model, file).of([0])
    opaque = torch.ones(8, 8, dtype=torch.bool)
    if size == (8, 8):
        opaque = torch.from_numpy(rgba[..., 3] >= 128)
        assert torch.equal(by_alpha[0, -1] > 0, opaque)
    else:
        assert (by_alpha[0, -1, :2] > 0).all()
        assert (by_alpha[0, -1] == 0).any()
    if channels == 4 and size == (8, 8):
        assert torch.equal(by_alpha[..., 1:][..., opaque[:, 1:]], by_file[..., 1:][..., opaque[:, 1:]])


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of images 4x4."""
    out = tmp_path_factory.mktemp("smaller") / "run"
    assert train(out, "--size", "4", "--steps", "2") == 0
    return out


def enlarged(run: Path, folder: Path, *options: str) -> np.ndarray:
    """What `sample --input` makes of the images in a folder, with the seeds of the second model of a cascade."""
    out = folder.with_suffix(".npz")
    words = ["sample", str(run), "--input", str(folder), "--seed", str(1 << 40), "--out", str(out), *options]
    assert main(words) == 0
    images: np.ndarray = np.load(out)["arr_0"]
    return images


def test_a_cascade_enlarges_the_images_of_another_model(run: Path, smaller: Path, tmp_path: Path) -> None:
    """It is `sample` of the first model, and `--input` of its images for the second one, but for the second's seeds."""
    out = tmp_path / "c.npz"
    assert main(["sample", str(smaller), "--then", str(run), "-n", "3", "--out", str(out)]) == 0
    assert main(["sample", str(smaller), "-n", "3", "--out", str(tmp_path / "s/")]) == 0
    assert np.array_equal(np.load(out)["arr_0"], enlarged(run, tmp_path / "s"))


def test_a_cascade_in_a_folder_grows(run: Path, smaller: Path, tmp_path: Path) -> None:
    """From 2 images to 3. `--checkpoint` is for the first model, and may be a step that the second one has not."""
    words = ["sample", str(smaller), "--then", str(run), "--checkpoint", "2", "--sampler", "ddim", "--steps", "2"]
    assert main([*words, "-n", "2", "--out", str(tmp_path / "c/")]) == 0
    assert main([*words, "-n", "3", "--out", str(tmp_path / "c/")]) == 0
    assert sorted(file.stem for file in (tmp_path / "c").glob("*.png")) == ["000000", "000001", "000002"]


@pytest.mark.parametrize("asked", [[], ["--sampler", "ddim", "--steps", "3"], ["--steps", "3"]])
def test_a_cascade_of_a_distilled_model_and_another(
    asked: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has its own sampler; the one that is named is for the model that it fits."""
    options = ["--predict", "v", "--loss", "consistency", "--size", "4", "--steps", "1"]
    assert train(tmp_path / "two", *options) == 0
    capsys.readouterr()
    words = ["sample", str(tmp_path / "two"), "--then", str(run), "-n", "2", "--json"]
    assert main([*words, *asked, "--out", str(tmp_path / "c.npz")]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["sampler"] == ("ddim" if "--sampler" in asked else "ancestral")
    assert (about["network_calls"], about["input_network_calls"], about["seed"]) == (3 if asked else 20, 2, 0)
    small = ["sample", str(tmp_path / "two"), "-n", "2", "--out", str(tmp_path / "s/")]
    assert main(small) == 0
    assert np.array_equal(np.load(tmp_path / "c.npz")["arr_0"], enlarged(run, tmp_path / "s", *asked))


def test_a_cascade_begins_with_a_model_without_a_condition(run: Path, smaller: Path) -> None:
    """Its input would be that of the first model, for which --then has no option."""
    small, large = open_checkpoint(smaller), open_checkpoint(run)
    inputs.check_cascade(small, large, Sampling())
    told = replace(small, preset=replace(small.preset, condition="mask:half"))
    with pytest.raises(InputError, match="has condition mask:half itself; want a model without one"):
        inputs.check_cascade(told, large, Sampling())


def test_all_classes_of_a_cascade_are_those_of_both_models(run: Path, smaller: Path) -> None:
    """Each model would go through its own classes, and enlarge a cat as a bird."""
    small, large = open_checkpoint(smaller), open_checkpoint(run)
    every = Sampling(conditions=Conditions(classes=("all",)))
    same = replace(small, preset=replace(small.preset, classes=True, class_names=large.preset.class_names))
    inputs.check_cascade(same, large, every)
    other = replace(small, preset=replace(small.preset, classes=True, class_names=("cat", "bird")))
    with pytest.raises(InputError, match="class all: has other classes than"):
        inputs.check_cascade(other, large, every)


@pytest.mark.parametrize(("equal", "mean"), [(1, True), (3, False)])
def test_images_that_equal_their_samples_have_no_part_in_the_psnr(
    equal: int, mean: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, held_out = data.load_pair("digits", (8, 8), 1)
    found, draws = held_out.batch(parts.subset(held_out, 3)), fidelity.DRAWS
    found[equal:] //= 2
    monkeypatch.setattr(fidelity, "generate", lambda *_, **__: found.repeat_interleave(draws, dim=0))
    result = fidelity.fidelity(
        open_checkpoint(run), held_out, ["psnr"], tmp_path, Processes(0, 1, torch.device("cpu")), 3
    )
    assert (result["psnr_infinite"], result["psnr"] is not None) == (equal, mean)
    shown = figures({**result, "data": "digits", "split": "test", "sampler": "ddim", "steps": 2})
    assert any(name == "PSNR, one sample" for name, *_ in shown) == mean
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_pictures_of_more_bits_are_conditions_too(run: Path, tmp_path: Path) -> None:
    """Their 8-bit copies have no bits/dim, but they can be enlarged, as in training."""
    (tmp_path / "deep").mkdir()
    for i in range(2):
        grey = np.random.default_rng(i).integers(0, 65536, (8, 8, 1), np.uint16)
        (tmp_path / "deep" / f"{i}.png").write_bytes(to_png(grey))
    images, model = data.load(str(tmp_path / "deep"), (8, 8), 1), open_checkpoint(run)
    found = fidelity.fidelity(
        model, images, ["psnr"], tmp_path, ALONE, 2, sampler="ddim", levels=[10, 20], progress=False
    )
    assert found["psnr"] > 0
    drawn = quality.samples(model, tmp_path, ALONE, 2, 0, "ddim", [10, 20], given=images, progress=False)
    assert drawn.batch(range(2)).shape == (2, 1, 8, 8)


def test_noise_on_a_condition_is_for_the_guide_too(run: Path, pictures: Path) -> None:
    checkpoint = open_checkpoint(run)
    told = inputs.read_inputs(checkpoint, str(pictures / "small" / "0.png"), 1)
    noisy = replace(checkpoint, preset=replace(checkpoint.preset, condition_noise=0.5))
    asked = Sampling("ddim", 2, inputs=told, condition_noise=0.1, conditions=Conditions(guide=noisy))
    asked.maker(noisy, torch.device("cpu"))
    with pytest.raises(InputError, match=r"condition_noise 0.1: .* was trained with 0 to 0"):
        replace(asked, conditions=Conditions(guide=checkpoint)).maker(noisy, torch.device("cpu"))


def test_a_cascade_knows_the_classes_of_its_first_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are in the record of a folder, which refuses others, and in the .cls of a .tar, if the second has none."""
    monkeypatch.chdir(tmp_path)
    assert train(Path("small"), "--size", "4", "--classes", "--steps", "2") == 0
    assert train(Path("large"), "--condition", "lowres:2", "--steps", "2") == 0
    words = ["sample", "small", "--then", "large", "--sampler", "ddim", "--steps", "2", "-n"]
    assert main([*words, "4", "--class", "3", "8", "--out", "a.tar"]) == 0
    with tarfile.open("a.tar") as tar:
        texts = [tar.extractfile(name).read() for name in tar.getnames() if name.endswith(".cls")]  # type: ignore[union-attr]
    assert texts == [b"3", b"8", b"3", b"8"]
    assert main([*words, "2", "--class", "3", "8", "--out", "folder/"]) == 0
    assert main([*words, "4", "--class", "3", "8", "--out", "folder/", "--batch-size", "1"]) == 0
    capsys.readouterr()
    assert main([*words, "4", "--class", "3", "5", "--out", "folder/"]) == 2
    assert "holds samples with input_classes ['3', '8'], and these have ['3', '5']" in capsys.readouterr().err


def test_a_process_without_images_has_empty_results(run: Path, pictures: Path) -> None:
    """As when two processes share one image. Noise on the condition, strips and the pictures of training, too."""
    checkpoint = open_checkpoint(run)
    checkpoint = replace(checkpoint, preset=replace(checkpoint.preset, condition_noise=0.5))
    told = inputs.read_inputs(checkpoint, str(pictures / "small" / "0.png"), 1)
    make, _ = Sampling("ddim", 2, inputs=told, condition_noise=0.1).maker(checkpoint, torch.device("cpu"))
    assert make([]).shape == (0, 1, 8, 8)
    assert make([], strips=True).shape == (0, 2, 1, 8, 8)
    _, held_out = data.load_pair("digits", (8, 8), 1)
    for condition in ("lowres:2", "mask:half"):
        preset = replace(checkpoint.preset, condition=condition)
        assert conditioning.of_images(preset, held_out, [], torch.zeros(0, 1, 8, 8)).shape == (0, 2, 8, 8)  # type: ignore[union-attr]


def test_strips_are_made_in_batches(run: Path, pictures: Path) -> None:
    checkpoint = open_checkpoint(run)
    told, sizes = inputs.read_inputs(checkpoint, str(pictures / "small" / "0.png"), 5), list[int]()
    whole, parts = (
        Sampling("ddim", 2, inputs=told, batch_size=size).maker(checkpoint, torch.device("cpu"))[0] for size in (64, 2)
    )
    assert torch.equal(whole(range(5), strips=True), parts(range(5), strips=True, watch=sizes.append))
    assert max(sizes) == 2


def test_pairs_are_read_in_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The condition of an image is the image of the same name, mirrored with it; other names are refused."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    for i in range(12):
        array = rng.integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(array).save(tmp_path / "a" / f"{i}.png")
        Image.fromarray(255 - array).save(tmp_path / "b" / f"{i}.bmp")
        Image.fromarray(array).save(tmp_path / "c" / f"{i + 1}.png")
    preset = preset_of("pairs", pairs=str(tmp_path / "b"), flip=True)
    loaded = [data.load(str(tmp_path / name), (8, 8), 1) for name in ("a", "b")]
    images = data.paired(*loaded)
    batch = pixels.to_signal(next(data.batches(images, 0, 8, 3, 4)))
    x0, condition = conditioning.of_batch(replace(preset, batch_size=8), batch, 3, slice(0, 8))
    assert condition is not None
    torch.testing.assert_close(condition[:, :1], -x0)
    options = [
        "--data",
        str(tmp_path / "a"),
        "--size",
        "8",
        "--condition",
        "pairs",
        "--steps",
        "2",
        "--sample-every",
        "2",
    ]
    assert train(tmp_path / "run", *options, "--pairs", str(tmp_path / "b")) == 0
    command = ["evaluate", str(tmp_path / "run"), "--levels-per-image", "2", "-n", "2", "--split", "train"]
    assert main(command) == 0
    command = ["calibrate", str(tmp_path / "run"), "-n", "2", "--codec", "0", "--data", str(tmp_path / "a")]
    assert main(command) == 2
    assert "want --pairs SOURCE, too" in capsys.readouterr().err
    assert main([*command, "--pairs", str(tmp_path / "b")]) == 0
    assert train(tmp_path / "other", *options, "--pairs", str(tmp_path / "c")) == 2
    assert "1 is in the place of 0; want files of the same names" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("window", [1, 40])
def test_pairs_are_read_in_one_order(window: int) -> None:
    """Also if one of the two sources, or each in its own way, has shards that must be read in order."""
    plain = data.load("digits", (8, 8), 1, split="test")
    sharded = [replace(plain, bounds=torch.tensor([*ends, 297]), window=window) for ends in ([100, 200], [31])]
    for one, other in ((plain, sharded[0]), (sharded[0], plain), (sharded[0], sharded[1])):
        batch = next(data.batches(data.paired(one, other), 0, 297, 0, 1))
        assert torch.equal(batch[:, 0], batch[:, 1])
        assert torch.equal(batch[:, :1], next(data.batches(one, 0, 297, 0, 1)))


def test_the_other_images_of_a_run_may_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As its data may. Other images in their place are refused."""
    rng = np.random.default_rng(0)
    for name, i in itertools.product("abc", range(4)):
        (tmp_path / name).mkdir(exist_ok=True)
        size = 9 if name == "c" else 8
        Image.fromarray(rng.integers(0, 256, (size, size), np.uint8)).save(tmp_path / name / f"{i}.bmp")
    own = ["--data", str(tmp_path / "a"), "--size", "8", "--condition", "pairs", "--pairs"]
    assert train(tmp_path / "run", *own, str(tmp_path / "b"), "--steps", "1") == 0
    (tmp_path / "b").rename(tmp_path / "d")
    assert train(tmp_path / "run", *own, str(tmp_path / "c"), "--steps", "2") == 2
    assert "want these, or another out" in capsys.readouterr().err
    assert train(tmp_path / "run", *own, str(tmp_path / "d"), "--steps", "2") == 0


def test_a_class_is_that_of_the_image_of_the_condition(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the pictures of training, and in `evaluate --class all`."""
    told: list[Any] = []

    def generate(*args: Any, y: torch.Tensor, **_: Any) -> torch.Tensor:
        told.extend(y.tolist())
        return torch.zeros(len(y), 1, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(previews, "generate", generate)
    monkeypatch.setattr(quality, "generate", generate)
    model, test = open_checkpoint(run), data.load("digits", (8, 8), 1, split="test")
    previews.draw(model.denoiser, model.preset, tmp_path, 1, ALONE, (4, 2), lambda: False, test)
    rows = "import numpy as np\ndef rows(x):\n    return np.eye(len(x), 4)\n"
    (tmp_path / "mine.py").write_text(rows)
    words = f"evaluate {run} --metrics fid -n 4 --class all --features {tmp_path}/mine.py:rows --out {tmp_path}/out"
    assert main(words.split()) == 0
    assert told == 2 * test.labels[:4].tolist()  # type: ignore[index]


NAMES = ("photo", "negative")
TWO = "--image-column photo --condition pairs --pair-column negative".split()


@pytest.fixture(scope="module")
def photos() -> dict[str, Any]:
    """12 grey images and their negatives, uint8 [12, 8, 8]."""
    array = np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8)
    return dict(zip(NAMES, (array, 255 - array), strict=True))


@pytest.fixture(scope="module")
def columns(photos: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet file with a column of images, one of their negatives, and one of numbers."""
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    cells = {name: [{"bytes": to_png(x[..., None]), "path": None} for x in array] for name, array in photos.items()}
    file = tmp_path_factory.mktemp("columns") / "a.parquet"
    pq.write_table(pa.table({**cells, "number": list(range(12))}), file)
    return file


@pytest.fixture(scope="module")
def sources(photos: dict[str, Any], columns: Path) -> dict[str, str | data.Given]:
    """The same in every kind of source that has columns."""
    datasets, folder = pytest.importorskip("datasets"), columns.parent
    np.savez(folder / "a.npz", **photos)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i, name in itertools.product(range(12), NAMES):
            Image.fromarray(photos[name][i]).save(file := folder / f"{i}.{name}.png")
            tar.add(file, file.name)
    rows = datasets.load_dataset("parquet", data_files=str(columns), cache_dir=str(folder / "cache"), split="train")
    in_python = data.given(rows, options=data.Options("photo", pair_column="negative"))
    return {"parquet": str(columns), "npz": f"{folder}/a.npz", "tar": f"{folder}/a.tar", "python": in_python}


@pytest.mark.filterwarnings("ignore:.*files left out")
@pytest.mark.parametrize("kind", ["parquet", "npz", "tar", "python"])
def test_pairs_are_two_columns_of_one_dataset(kind: str, sources: dict[str, str | data.Given]) -> None:
    """In training's batches and among the held-out images, the other image of each one is its negative."""
    source, names = sources[kind], [f"{name}.png" if kind == "tar" else name for name in NAMES]
    given = None if isinstance(source, str) else source
    place = source if isinstance(source, str) else source.name
    preset = preset_of("pairs", data=place, image_column=names[0], pair_column=names[1])
    train_set, held_out = _load(preset, given, ALONE)
    assert (len(train_set), len(held_out)) == (11, 1)
    condition = conditioning.of_images(preset, held_out, [0], x0 := pixels.to_signal(held_out.batch([0])))
    assert condition is not None
    torch.testing.assert_close(condition[:, :1], -x0)
    batch = next(data.batches(train_set, 0, 8, 3, 4))
    assert torch.equal(batch[:, 1:], 255 - batch[:, :1])


def test_a_model_of_two_columns_is_trained_measured_and_distilled(columns: Path, tmp_path: Path) -> None:
    """With the columns of its data: distill names neither data nor columns."""
    run = tmp_path / "run"
    assert train(run, "--data", columns, "--size", "8", *TWO, "--predict", "v", "--steps", "2") == 0
    words = [
        "evaluate",
        str(run),
        "--levels-per-image",
        "2",
        "-n",
        "2",
        "--split",
        "train",
        "--out",
        str(tmp_path / "a"),
    ]
    assert main(words) == 0
    assert main([*words, "--data", str(columns)]) == 0
    short = "--steps 2 --batch-size 4 --eval-images 4 --sample-every 0".split()
    assert main(["distill", str(run), "--out", str(tmp_path / "two"), *short]) == 0
    preset = open_checkpoint(tmp_path / "two").preset
    assert (preset.image_column, preset.pair_column, preset.loss) == ("photo", "negative", "consistency")
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture)
    assert main(["sample", str(tmp_path / "two"), "--input", str(picture), "--out", str(tmp_path / "b.png")]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--pair-column sketch", "pair-column sketch: no such column; "),
        ("--pair-column sketch", "a.parquet are photo, negative"),
        ("--pair-column negativ", "did you mean negative?"),
        ("--pair-column number", "--pair-column number: holds no images; "),
        ("--pair-column photo", "--pair-column photo: is image_column, too; want another column"),
        (
            "--pair-column photo --condition mask:box",
            "--pair-column photo: the condition is mask:box; want condition pairs",
        ),
        ("--pairs DATA", "columns photo, negative hold images; want one of them as pair_column"),
        ("--pair-column negative --pairs FOLDER", "pair-column negative: FOLDER holds images only"),
    ],
)
def test_a_wrong_column_of_pairs_is_one_line(
    words: str, said: str, columns: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    places = {"DATA": str(columns), "FOLDER": str(pictures / "small")}
    given = [places.get(word, word) for word in words.split()]
    assert train(tmp_path / "run", "--data", columns, "--size", "8", *TWO[:4], *given, "--steps", "2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said.replace("FOLDER", places["FOLDER"]) in error
    assert not (tmp_path / "run").exists()


# Measurements.


def test_psnr_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 255, (2, 3, 1, 8, 8))
    wanted = [10 * np.log10(255**2 / np.mean((a - b) ** 2)) for a, b in zip(x, y, strict=True)]
    assert fidelity.psnr(torch.from_numpy(x), torch.from_numpy(y), 255).tolist() == pytest.approx(wanted)


def test_ssim_equals_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    x, y = torch.rand(2, 3, 3, 16, 16).double()
    wanted = [
        metrics.structural_similarity(
            a.numpy(), b.numpy(), data_range=1, channel_axis=0, gaussian_weights=True, use_sample_covariance=False
        )
        for a, b in zip(x, y, strict=True)
    ]
    assert fidelity.ssim(x, y, 1).tolist() == pytest.approx(wanted)


def test_fidelity_of_a_network_that_copies_the_condition(tmp_path: Path, run: Path) -> None:
    """If x0^ is the enlarged picture, then one sample, the mean of all and bicubic have one PSNR."""
    checkpoint = open_checkpoint(run)
    copies = Denoiser(lambda x, timestep, y, condition: condition[:, :1], checkpoint.denoiser.schedule, "x0")
    images = data.load("digits", (8, 8), 1, split="test")
    model = replace(checkpoint, denoiser=copies)
    found = fidelity.fidelity(
        model, images, ["psnr"], tmp_path, ALONE, 5, sampler="ddim", levels=[10, 20], progress=False
    )
    assert found["psnr"] == pytest.approx(found["psnr_bicubic"])
    assert found["psnr_of_mean"] == pytest.approx(found["psnr_bicubic"])
    assert found["count"] == 5


def test_the_mean_of_samples_has_the_psnr_of_the_conditional_mean(tmp_path: Path, run: Path) -> None:
    """For x_0 = 0 + N(0, s^2), whatever the condition, one sample has MSE 2 s^2, and the mean of 8 has 9/8 s^2."""
    checkpoint, s, fine = open_checkpoint(run), 0.1, schedule.linear()
    law = GaussianData(torch.zeros(1, 8, 8).double(), s**2 * torch.eye(64).double())
    exact = network(law, fine, "x0")
    denoiser = Denoiser(lambda x, timestep, y, condition: exact(x, timestep), fine, "x0", "fixed_small", clip=False)
    images = data.load("digits", (8, 8), 1, split="test")
    images = replace(images, pixels=pixels.to_pixels(s * noise.normal(range(297), (1, 8, 8))))
    model = replace(checkpoint, denoiser=denoiser)
    found = fidelity.fidelity(model, images, ["psnr"], tmp_path, ALONE, 6, progress=False)
    assert found["psnr"] == pytest.approx(10 * np.log10(4 / (2 * s**2)), abs=0.4)
    assert found["psnr_of_mean"] == pytest.approx(10 * np.log10(4 / (9 / 8 * s**2)), abs=0.4)


@pytest.mark.usefixtures("undrawn")
def test_evaluate_takes_a_model_with_a_condition(run: Path, tmp_path: Path, capsys: Any) -> None:
    """bits/dim by both ways, PSNR, and the features of samples given the conditions of held-out images."""
    (tmp_path / "mine.py").write_text("def rows(x):\n    return x.reshape(len(x), -1)[:, :4].astype(float)\n")
    words = ["evaluate", str(run), "--sampler", "ddim", "--steps", "2", "-n", "4", "--out", str(tmp_path), "--json"]
    assert main([*words, "--metrics", "nll", "psnr", "fid", "--features", f"{tmp_path}/mine.py:rows"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nll"]["bits_per_dim"] > 0
    options = f"--out {tmp_path}/of-class --metrics nll psnr fid --features {tmp_path}/mine.py:rows --class 3"
    assert main([*words, *options.split()]) == 0
    of_class = json.loads(capsys.readouterr().out)  # the class is that of the samples for fid only
    assert of_class["nll"]["bits_per_dim"] == found["nll"]["bits_per_dim"]
    assert of_class["fidelity"]["psnr"] == found["fidelity"]["psnr"]
    assert {"psnr", "psnr_of_mean", "psnr_bicubic", "psnr_standard_error"} <= set(found["fidelity"])
    assert (found["conditions_of"], found["samples"]) == ("test", 4)
    words = ["evaluate", str(run), "-n", "4", "--out", str(tmp_path), "--metrics", "nll", "ode", "--ode-steps", "3"]
    assert main([*words, "--levels-per-image", "2"]) == 0


# Mistakes.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"condition": "lowres"}, "condition lowres: want none, lowres:N, grey, mask:LAW"),
        ({"condition": "gray", "channels": 3}, r"condition gray: did you mean grey\? want none, lowres:N"),
        ({"condition": "blur:2"}, "condition blur:2: want none, lowres:N"),
        ({"condition": "grey:2", "channels": 3}, "condition grey:2: want none, lowres:N"),
        (
            {"condition": "lowres:3"},
            "lowres:3: want a whole number of at least 2 that divides both sides of 8x8",
        ),
        ({"condition": "lowres:x"}, "want a whole number of at least 2"),
        ({"condition": "grey"}, "condition grey: the images are grey already; want channels 3"),
        ({"condition": "grey", "channels": 4}, "condition grey: grey pictures have no transparency; want channels 3"),
        ({"condition": "mask:halves"}, "condition mask:halves: did you mean half"),
        ({"condition": "pairs"}, "condition pairs: has no other images; want a SOURCE as pairs, or a column"),
        ({"pairs": "x"}, "pairs x: the condition is none; want condition pairs with it"),
        ({"pair_column": "x"}, "pair_column x: the condition is none; want condition pairs with it"),
        ({"condition": "pairs", "pairs": "x", "skip_bad": True}, "condition pairs: not with skip_bad"),
        ({"condition": "lowres:2", "condition_dropout": 1.0}, "condition_dropout 1: want less than 1"),
        ({"condition_noise": 0.5}, "condition_noise 0.5: want 0 without a condition"),
        ({"condition_dropout": 0.5}, "condition_dropout 0.5: want less than 1, and 0 without a condition"),
        ({"condition": "lowres:2", "noise_assignment": "nearest"}, "noise_assignment nearest: only images"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        replace(PRESETS["digits"], **settings)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample RUN --out OUT", "was trained with condition lowres:2; want an image file"),
        ("sample OTHER --input SMALL --out OUT", "was not trained with a condition; want no input"),
        ("sample RUN --input SMALL --mask SMALL --out OUT", "has the condition lowres:2; want no mask"),
        ("sample RUN --mask SMALL --out OUT", "needs --input FILE"),
        ("sample RUN --input SMALL --condition-noise 0.2 --out OUT", "--condition-noise 0.2: "),
        ("sample RUN --input NONE --out OUT", "no images in this folder"),
        ("sample OTHER --then OTHER --out OUT", "has condition none; want a model with condition lowres:N"),
        ("sample OTHER --then RUN --out OUT", "enlarges grey images of 4x4; "),
        ("sample RUN --then RUN --input SMALL --out OUT", "not with --input"),
        ("sample SMALLER --then RUN --condition-noise 0.1 --out OUT", "--condition-noise 0.1: "),
        ("sample SMALLER --then RUN --guide SMALLER --out OUT", "not with --guide"),
        ("sample RUN --input SMALL --class 3 --guidance 1 --guidance-interval 5,9 --out OUT", "there is no guidance"),
        ("sample RUN --input SMALL --guide OTHER --out OUT", "it has another class_names than"),
        ("sample RUN --input SMALL --guidance-interval 5,9 --out OUT", "--guidance-interval: needs guidance"),
        ("restore RUN SMALL --operator grey --out OUT", "which `ddpm restore` does not know"),
        ("sample OTHER --guidance 2 --out OUT", "--guidance: needs a class; want class NAME"),
        ("edit RUN SMALL --out OUT", "was trained with condition lowres:2, which `ddpm edit` does not know"),
        ("inpaint RUN SMALL SMALL --out OUT", "which `ddpm inpaint` does not know"),
        ("paper fig6 --run RUN --out OUT", "which `ddpm paper` does not know"),
        ("compress RUN SMALL --out OUT", "which the codec does not know"),
        ("export RUN --to diffusers OUT", "which diffusers' UNet2DModel does not know"),
        ("export RUN --to onnx OUT.onnx", "which the ONNX file does not know"),
        ("export RUN --to web OUT", "which the web page does not know"),
        ("evaluate OTHER --metrics psnr", "metric psnr: "),
        (
            "evaluate RUN --metrics psnr --pairs SMALL",
            "this model was not trained with condition pairs; want no --pairs",
        ),
        ("evaluate RUN --metrics nll --guidance 2", "--guidance 2.0: not with --metrics nll"),
        ("evaluate RUN --metrics psnr --levels-per-image 2", "--levels-per-image 2: needs --metrics nll"),
        ("evaluate RUN --metrics ssim", "its window has 11x11 pixels|scikit-image|skimage is not installed"),
    ],
)
def test_mistakes(
    command: str, words: str, run: Path, trained: Path, smaller: Path, pictures: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "none").mkdir()
    places = {
        "RUN": run, "OTHER": trained, "SMALL": pictures / "small" / "0.png", "NONE": tmp_path / "none",
        "SMALLER": smaller, "OUT": tmp_path / "out", "OUT.onnx": tmp_path / "out.onnx",
    }  # fmt: skip
    before = sorted(tmp_path.iterdir())
    assert main([str(places.get(word, word)) for word in command.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert any(each in error for each in words.split("|")), error
    assert sorted(tmp_path.iterdir()) == before
