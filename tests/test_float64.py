"""A device without float64, as Apple's mps: sampling and training do not ask it for one. Emulated, not tried on a Mac.

`OnDevice` marks tensors as lying on such a device. What is computed from a marked tensor is marked, `.cpu()` takes the
mark off, and a marked tensor of float64 raises, as it does on mps.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ddpm
from ddpm import kernels, losses, noise, pixels, schedule
from ddpm.errors import InputError
from ddpm.run import processes, sample
from ddpm.run.train import held_out_by_level
from ddpm.samplers import SAMPLERS


class OnDevice(Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function in (Tensor.cpu, Tensor.tolist, Tensor.numpy):
            return result.as_subclass(Tensor) if isinstance(result, Tensor) else result
        if isinstance(result, OnDevice) and result.dtype == torch.float64:
            raise RuntimeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


def put(x: Tensor) -> Tensor:
    return x.as_subclass(OnDevice)


def network(x: Tensor, timestep: Tensor, y: Tensor | None) -> Tensor:
    assert isinstance(x, OnDevice), "the network is called with a tensor that lies elsewhere"
    return 0.3 * x


@pytest.fixture
def denoiser():
    return ddpm.Denoiser(network, schedule.linear(20, 1e-3, 0.6), predict="v")


@pytest.fixture(autouse=True)
def _plain():
    with kernels.disabled():
        yield


def test_the_emulation_has_teeth():
    x = put(torch.ones(2, 3))
    assert isinstance((2 * x)[0], OnDevice)
    assert not isinstance(x.cpu(), OnDevice)
    for wrong in (lambda: x.double(), lambda: x * torch.ones(3, dtype=torch.float64), lambda: x.to(torch.float64)):
        with pytest.raises(RuntimeError, match="float64"):
            wrong()


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_made_without_float64(name, denoiser, monkeypatch):
    """The images are those of a device that has it."""
    wanted = sample.generate(replace(denoiser, network=lambda x, t, y: 0.3 * x), (1, 4, 4), range(2), name, 5)
    draw = noise.per_image
    monkeypatch.setattr(sample, "per_image", lambda *a: lambda t: put(draw(*a)(t)))
    monkeypatch.setattr(pixels, "to_pixels", to_pixels_of_mps)
    assert torch.equal(sample.generate(denoiser, (1, 4, 4), range(2), name, 5), wanted)


def to_pixels_of_mps(signal: Tensor, convert=pixels.to_pixels) -> Tensor:
    """`to_pixels` asks for the device's type, which the emulation cannot change."""
    assert isinstance(signal, OnDevice)
    return convert(signal.cpu())


@pytest.mark.parametrize("weighting", ["none", "min_snr", "p2"])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_are_computed_without_float64(name, weighting, denoiser):
    x0, eps, t = put(torch.rand(3, 1, 4, 4)), put(torch.randn(3, 1, 4, 4)), torch.tensor([2, 10, 20])
    loss = losses.LOSSES[name](denoiser, x0, t, eps) * losses.weight(denoiser, t, weighting)
    assert isinstance(loss, OnDevice)
    assert loss.dtype == torch.float32


def test_the_held_out_loss_is_summed_elsewhere(denoiser, monkeypatch):
    from ddpm.files import data

    held_out = data.load("digits", (8, 8), 1, split="test")
    monkeypatch.setattr(pixels, "to_signal", lambda x, convert=pixels.to_signal: put(convert(x)))
    one = processes.Processes(0, 1, torch.device("cpu"))
    assert len(held_out_by_level(denoiser, held_out, 16, one)) == 10


def test_likelihoods_do_not_pick_such_a_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.pick_device("auto").type == "mps"
    assert processes.pick_device("auto", float64=True).type == "cpu"
    with pytest.raises(InputError, match="no float64, which likelihoods need"):
        processes.pick_device("mps", float64=True)
