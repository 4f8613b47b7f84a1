"""Warps of training images, of which the network is told: the maps, their law, the network, and a run."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_close, assert_same, losses, tensors, train
from diffusers import UNet2DModel
from scipy import stats
from test_init import fitted, model
from torch import Tensor

import ddpm
from ddpm import noise, warp
from ddpm.errors import InputError
from ddpm.files import interop
from ddpm.files.opening import open_checkpoint
from ddpm.unet import UNet

# -- the maps ----------------------------------------------------------------------------------------------------------


def numbers(**given: float) -> Tensor:
    """A warp, [1, 9], from the names of `ddpm.warp`."""
    a, w, r = (given.get(name, 0.0) for name in ("a", "w", "r"))
    values = [math.cos(a) - 1, math.sin(a), w * math.cos(2 * r), w * math.sin(2 * r)]
    first = [given.get(name, 0.0) for name in ("mirrored", "upside_down", "s")]
    return torch.tensor([[*first, *values, given.get("right", 0.0), given.get("down", 0.0)]])


PICTURE = 2 * torch.rand(1, 3, 16, 16, generator=noise.generator(0)) - 1


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
@pytest.mark.parametrize(("mirrored", "upside_down"), list(itertools.product([0, 1], repeat=2)))
def test_turns_and_mirrors_are_those_of_torch(quarters: int, mirrored: int, upside_down: int) -> None:
    """Mirrors keep every bit. Quarter turns interpolate at the pixels themselves, within float error."""
    want = PICTURE.flip([dim for dim, yes in ((-1, mirrored), (-2, upside_down)) if yes]).rot90(quarters, (-2, -1))
    out = warp.apply(PICTURE, numbers(mirrored=mirrored, upside_down=upside_down, a=quarters * math.pi / 2))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-4 if quarters else 0)


@pytest.mark.parametrize(("right", "down"), [(3, 0), (-3, 0), (0, 5), (2, -4)])
def test_whole_pixels_are_moved_as_they_are(right: int, down: int) -> None:
    """What comes in from beyond the edge is the reflected image. One eighth of 16 pixels is 2."""
    padded = np.pad(PICTURE.numpy(), [(0, 0), (0, 0), (5, 5), (5, 5)], mode="symmetric")
    want = torch.from_numpy(padded[:, :, 5 - down : 21 - down, 5 - right : 21 - right].copy())
    out = warp.apply(PICTURE, numbers(right=right / 2, down=down / 2))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-4)


def blob(places: np.ndarray) -> np.ndarray:
    """A smooth picture without symmetry at places [..., 2]: x to the right and y up, pixels from the centre."""
    x, y = np.moveaxis(places, -1, 0)
    return np.asarray(2 * np.exp(-((x - 3) ** 2) / 40 - (y + 2 - 0.3 * x) ** 2 / 15) - 1)


def grid(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x - (width - 1) / 2, (height - 1) / 2 - y], axis=-1)


@pytest.mark.parametrize(
    "given",
    [
        {"s": 1.5}, {"s": -1.0}, {"a": 0.7}, {"w": 2.0}, {"w": 2.0, "r": 0.5}, {"w": -1.5, "r": 2.0}, {"right": 1.3},
        {"s": 0.8, "a": -2.0, "w": 1.2, "r": -0.9, "right": -0.7, "down": 0.6, "mirrored": 1, "upside_down": 1},
    ],
)  # fmt: skip
def test_a_smooth_picture_goes_where_the_matrices_take_it(given: dict[str, float]) -> None:
    """Mirror, scale, turn, stretch and move, written as matrices, on an image that is not square."""
    places = {name: given.get(name, 0.0) for name in ("s", "a", "w", "r", "right", "down", "mirrored", "upside_down")}

    def turn(angle: float) -> np.ndarray:
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    mirror = np.diag([1 - 2 * places["mirrored"], 1 - 2 * places["upside_down"]])
    stretch = turn(places["r"]) @ np.diag([2 ** (places["w"] / 5), 2 ** (-places["w"] / 5)]) @ turn(-places["r"])
    forth = stretch @ turn(places["a"]) * 2 ** (places["s"] / 5) @ mirror
    move = np.array([places["right"] * 56 / 8, -places["down"] * 40 / 8])
    want = blob((grid(40, 56) - move) @ np.linalg.inv(forth).T)
    image = torch.from_numpy(blob(grid(40, 56))).float()[None, None]
    out = warp.apply(image, numbers(**given))[0, 0].numpy()
    assert np.abs(out - want).max() < 0.03
    assert np.abs(out - image[0, 0].numpy()).max() > 0.3


def test_each_map_has_its_own_numbers() -> None:
    """A stretch along r and the reverse stretch across it are one map."""
    torch.testing.assert_close(numbers(w=1.3, r=0.4), numbers(w=-1.3, r=0.4 + math.pi / 2))


def test_images_without_a_warp_keep_every_bit() -> None:
    """Also beside images that are warped."""
    x = PICTURE.repeat(6, 1, 1, 1)
    warps = torch.cat([torch.zeros(1, 9), numbers(s=1), numbers(mirrored=1), numbers(a=1), numbers(down=1), numbers()])
    out = warp.apply(x, warps)
    assert [torch.equal(*each) for each in zip(out, x, strict=True)] == [True, False, False, False, False, True]
    assert torch.equal(out[2], PICTURE[0].flip(-1))
    assert float(out.abs().max()) <= 1


# -- their law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_the_draws_have_their_law(flip: bool) -> None:
    """Each kind of warp has its probability, independently of the others; then its numbers have their law."""
    n, p = 20_000, 0.3
    drawn = warp.sample(n, p, flip, noise.generator(3)).double()
    kinds = [drawn[:, 0] != 0, drawn[:, 1] != 0, drawn[:, 2] != 0]
    kinds += [drawn[:, 3:5].any(1), drawn[:, 5:7].any(1), drawn[:, 7:].any(1)]
    shares = [0.5 if flip else p / 2, p / 2, p, p, p, p]
    for kind, share in zip(kinds, shares, strict=True):
        assert abs(float(kind.double().mean()) - share) < 5 * (share * (1 - share) / n) ** 0.5
    for (a, p_a), (b, p_b) in itertools.combinations(zip(kinds, shares, strict=True), 2):
        both = p_a * p_b
        assert abs(float((a & b).double().mean()) - both) < 5 * (both * (1 - both) / n) ** 0.5
    assert set(drawn[:, :2].flatten().tolist()) == {0.0, 1.0}
    angle = torch.atan2(drawn[:, 4], 1 + drawn[:, 3])[kinds[3]]
    w = drawn[kinds[4], 5:7]
    along_x = w[:, 1] == 0
    double_r = torch.atan2(w[:, 1], w[:, 0])[~along_x]
    normal = [drawn[kinds[2], 2], w[along_x, 0], *drawn[kinds[5], 7:].T]
    assert abs(float(along_x.double().mean()) - 0.5) < 5 * (0.25 / len(w)) ** 0.5
    assert all(stats.kstest(values.numpy(), "norm").pvalue > 1e-4 for values in normal)
    assert stats.kstest(w.norm(dim=1).numpy(), "halfnorm").pvalue > 1e-4
    for angles in (angle, double_r):
        assert stats.kstest(angles.numpy(), stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-4


# -- the network -------------------------------------------------------------------------------------------------------


def unet(warped: bool) -> UNet:
    torch.manual_seed(0)
    return UNet(1, width=32, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(), warped=warped).eval()


@torch.no_grad()
def test_without_a_warp_the_network_is_the_one_that_knows_none() -> None:
    """To the bit, for zeros and for None, whatever it has learned of warps. A network that knows none refuses one."""
    plain, told, x, t = unet(False), unet(True), torch.randn(3, 1, 8, 8), torch.tensor([5, 6, 7])
    assert set(told.state_dict()) - set(plain.state_dict()) == {"warp"}
    for p in plain.parameters():
        p.add_(0.1 * torch.randn_like(p))
    told.load_state_dict({**plain.state_dict(), "warp": torch.randn(128, 9)})
    assert torch.equal(told(x, t), plain(x, t))
    assert torch.equal(told(x, t, warp=torch.zeros(3, 9)), plain(x, t))
    some = told(x, t, warp=torch.cat([torch.zeros(2, 9), numbers(s=1)]))
    torch.testing.assert_close(some[:2], plain(x, t)[:2])
    assert float((some[2] - plain(x, t)[2]).abs().max()) > 1e-3
    with pytest.raises(InputError, match="warp: this network was not trained with augment"):
        plain(x, t, warp=torch.zeros(3, 9))


@torch.no_grad()
@pytest.mark.parametrize(("was", "now"), [(0.0, 0.2), (0.2, 0.0), (0.2, 0.5)])
def test_a_run_may_begin_with_a_model_of_other_warps(was: float, now: float) -> None:
    """It gives what the model gave, and says so if the network differs."""
    old = model(augment=was)
    network, lines = fitted(old, augment=now)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 40])
    assert torch.equal(network(x, t), old.denoiser.network(x, t))
    assert [line.partition(":")[0] for line in lines] == ["augment"] * (bool(was) != bool(now))


# -- a run -------------------------------------------------------------------------------------------------------------

AUGMENT = ("--augment", 0.5, "--flip")


def test_parts_and_resuming_change_nothing(tmp_path: Path) -> None:
    """A resumed run is the same to the bit, and a batch in two parts is the same within float error."""
    assert train(tmp_path / "whole", *AUGMENT, "--steps", 6) == 0
    assert train(tmp_path / "halves", *AUGMENT, "--steps", 3) == 0
    assert train(tmp_path / "halves", *AUGMENT, "--steps", 6) == 0
    whole = tensors(tmp_path / "whole", 6)
    assert_same(whole, tensors(tmp_path / "halves", 6))
    assert float(whole["raw/warp"].abs().amax(0).min()) > 0  # it has learned of each number
    assert train(tmp_path / "parts", *AUGMENT, "--steps", 6, "--accumulate", 2) == 0
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    assert_close(tensors(tmp_path / "parts", 6), whole)


def test_a_model_samples_and_is_exported_as_one_without_warps(tmp_path: Path) -> None:
    """Its file says that it was told of warps; its samples, and diffusers' network, are those without the map."""
    assert train(tmp_path / "run", *AUGMENT, "--steps", 3) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["augment"] == 0.5
    checkpoint = open_checkpoint(tmp_path / "run")
    network = checkpoint.denoiser.network
    assert isinstance(network, UNet)
    assert network.warp is not None
    plain = ddpm.build(replace(checkpoint.preset, augment=0.0))
    assert isinstance(plain.network, UNet)
    plain.network.load_state_dict({name: value for name, value in network.state_dict().items() if name != "warp"})
    plain.network.eval()
    x = noise.per_image(range(2), (1, 8, 8))
    ours, others = ([step.x for step in ddpm.samplers.ddim(each, x(20), 5)] for each in (checkpoint.denoiser, plain))
    assert len(ours) == 5
    assert all(torch.equal(*each) for each in zip(ours, others, strict=True))
    interop.to_diffusers(checkpoint, tmp_path / "theirs")
    theirs = UNet2DModel.from_pretrained(tmp_path / "theirs/unet").eval()
    some = x(7)
    with torch.no_grad():
        torch.testing.assert_close(theirs(some, 4).sample, network(some, torch.tensor([4])), rtol=1e-4, atol=1e-5)


def test_the_noise_is_exchanged_only_with_images_of_the_same_warp(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So the noise is standard normal, given what the network is told."""
    seen = []

    def spy(product: Tensor, told: Tensor) -> Tensor:
        order = assign(product, told)
        seen.append((told, order))
        return order

    assign = noise.assign
    monkeypatch.setattr(noise, "assign", spy)
    given = ("--noise-assignment", "nearest", "--classes", "--label-dropout", 0.9, "--augment", 0.1)
    assert train(tmp_path / "run", *given, "--batch-size", 32, "--steps", 3) == 0
    assert all(told.shape == (32, 10) and torch.equal(told[order], told) for told, order in seen)
    assert any(not torch.equal(order, torch.arange(32)) for _, order in seen)


def test_warps_do_not_wait_for_the_device() -> None:
    """They run on the device meta, whose values cannot be read."""
    x, warps = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(4, warp.NUMBERS, device="meta")
    assert warp.apply(x, warps).shape == x.shape
