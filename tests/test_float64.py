"""Sampling and training work on a device without float64, such as Apple's mps. The device is emulated, without a Mac.

`EmulatedMps` is a context in which device "mps" exists: its tensors live on the CPU but carry a mark. What is computed
from a marked tensor is marked. As on a real mps, a marked float64 tensor raises, and so does an operation that mixes
marked tensors with others. A copy to it has to wait until it is done.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import ddpm
from ddpm import float64, inception, likelihood, losses, metrics, noise, ode, pixels, samplers, schedule, spacing, warp
from ddpm.errors import InputError
from ddpm.files import data, images
from ddpm.files.opening import open_checkpoint
from ddpm.run import edit, processes, restore, sample
from ddpm.run.compress import load_codec
from ddpm.run.held_out import held_out_by_level
from ddpm.samplers import SAMPLERS

MPS = torch.device("mps")
LEAVE = {Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__bool__}
COPY = {Tensor.copy_, Tensor.__setitem__}  # these may copy from one device to another


class Marked(Tensor):
    """A tensor on the emulated device."""


class EmulatedMps(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **kwargs or {})
        flat, spec = tree_flatten((args, kwargs or {}))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        marked = [value for value in tensors if isinstance(value, Marked)]
        if function == Tensor.device.__get__:
            return MPS if marked else function(*args)
        on_cpu = [value for value in tensors if not isinstance(value, Marked) and value.ndim]
        if function is Tensor.to:
            target = next((v for v in flat[1:] if isinstance(v, Tensor | torch.device | str)), args[0])
            result_marked = isinstance(target, Marked) or str(target) == "mps"
            if result_marked and (kwargs or {}).get("non_blocking"):
                raise RuntimeError("a copy that does not wait reads memory that is freed")
        else:
            moved = any(isinstance(v, torch.device | str) and str(v) == "mps" for v in flat)
            result_marked = bool(moved or marked) and function not in LEAVE
            if marked and function is F.grid_sample:
                raise RuntimeError("mps: Unsupported Bicubic interpolation")
            if marked and on_cpu and function not in COPY | LEAVE:
                raise RuntimeError(f"Expected all tensors to be on the same device ({function})")
        with torch._C.DisableTorchFunctionSubclass():
            whole = function is torch.autograd.grad  # a marked tensor is in the graph, and its plain one is not
            plain = [v.as_subclass(Tensor) if isinstance(v, Marked) and not whole else v for v in flat]
            plain = [self.real(v) for v in plain]
            args, kwargs = tree_unflatten(plain, spec)
            result = function(*args, **kwargs)
            if not result_marked:
                return result
            return tree_map_only(Tensor, self.mark, result)

    @staticmethod
    def real(value):
        return torch.device("cpu") if isinstance(value, torch.device | str) and str(value) == "mps" else value

    @staticmethod
    def mark(x):
        if x.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return x.as_subclass(Marked)


@pytest.fixture
def mps():
    with EmulatedMps():
        yield MPS


@pytest.fixture(autouse=True)
def random_state(monkeypatch):
    """The states of the emulated device's generator that were set again."""
    again = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda device: "before")
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state, device: again.append(state))
    return again


def network(x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
    return 0.3 * x


def network_on_mps(x: Tensor, timestep: Tensor, y: Tensor | None = None) -> Tensor:
    assert isinstance(x, Marked), "the network gets a tensor of another device"
    assert isinstance(timestep, Marked), "the network gets timesteps of another device"
    return network(x, timestep, y)


class OnMps(nn.Module):
    """`network_on_mps` with a weight there."""

    def __init__(self):
        super().__init__()
        with EmulatedMps():
            self.weight = torch.zeros(1, device="mps")

    def parameters(self, recurse=True):
        yield self.weight

    def forward(self, x, timestep, y=None):
        return network_on_mps(x, timestep, y)


ON_CPU = ddpm.Denoiser(network, schedule.linear(20, 1e-3, 0.6), predict="v")
ON_MPS = replace(ON_CPU, network=network_on_mps)


def test_the_emulation_refuses_float64_and_mixed_devices(mps):
    x = torch.ones(2, 3, device="mps")
    assert x.device == mps
    assert (2 * x)[0].device == mps
    assert torch.zeros_like(x).device == mps
    assert x.cpu().device.type == "cpu"
    assert x.cpu().double().dtype == torch.float64
    table = torch.ones(3, dtype=torch.float64)
    for wrong in (lambda: x.double(), lambda: x.to(torch.float64), lambda: table.to("mps")):
        with pytest.raises(TypeError, match="float64"):
            wrong()
    with pytest.raises(RuntimeError, match="same device"):
        x * table.float()


def test_tables_on_such_a_device_would_fail(mps, monkeypatch):
    """The negative control: without the two precautions, sampling raises."""
    with pytest.raises(TypeError, match="float64"):
        ON_MPS.schedule.to("mps")
    monkeypatch.setattr(float64, "convert", Tensor.double)
    with pytest.raises(TypeError, match="float64"):
        sample.generate(ON_MPS, (1, 4, 4), range(2), "ancestral", 5, device="mps")


def test_tables_stay_on_the_cpu(mps):
    assert ON_CPU.to("mps").schedule.alpha_bar.device.type == "cpu"


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("clip", [True, 0.9])
def test_samples_equal_those_of_the_cpu(name, clip):
    wanted = sample.generate(replace(ON_CPU, clip=clip), (1, 4, 4), range(2), name, 5)
    with EmulatedMps():
        images = sample.generate(replace(ON_MPS, clip=clip), (1, 4, 4), range(2), name, 5, device="mps")
    assert torch.equal(images, wanted)


def test_guided_samples_equal_those_of_the_cpu():
    def labelled(x, timestep, y):
        return 0.3 * x + 0.1 * y.view(-1, 1, 1, 1)

    guided, y = replace(ON_CPU, network=labelled).guided(2.0, (3, 15)), torch.tensor([1, 2])
    wanted = sample.generate(guided, (1, 4, 4), range(2), "ddim", 5, y=y)
    with EmulatedMps():
        assert torch.equal(sample.generate(guided, (1, 4, 4), range(2), "ddim", 5, device="mps", y=y.to("mps")), wanted)


@pytest.mark.parametrize("weighting", ["none", "min_snr", "p2"])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_training_losses_and_gradients_equal_those_of_the_cpu(name, weighting, random_state):
    x0, eps, t = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([2, 10, 20])

    def step(device):
        factor = torch.full((), 0.3, requires_grad=True)  # a scalar may be on any device
        predict = "v" if name == "consistency" else ON_CPU.predict
        denoiser = replace(ON_CPU, network=lambda x, timestep, y=None: factor * x, predict=predict)
        moved = t.to(device)
        each = losses.LOSSES[name](denoiser, x0.to(device), moved, eps.to(device))
        loss = (each * losses.weight(denoiser, moved, weighting)).mean()
        assert loss.device.type == device
        return loss.item(), torch.autograd.grad(loss, factor)[0].item()

    wanted = step("cpu")
    with EmulatedMps():
        assert step("mps") == wanted
    assert random_state == ["before"] * (name == "consistency")  # both terms draw the same dropout


def test_edits_and_restorations_equal_those_of_the_cpu():
    """Pictures go where the network is, and not where the tables are."""
    digits = open_checkpoint("digits")
    first, second = (images.to_png(np.full((8, 8, 1), grey, np.uint8)) for grey in (40, 200))
    hidden, few = torch.arange(64).view(1, 8, 8) < 32, edit.SamplingSettings("ancestral", steps=4)
    quiet = replace(few, sampler="ddim")

    def restored(operator, method):
        settings = restore.Restoration(method, sampling=few)
        made = restore.restore(model, [first], operator, settings=settings, degrade=True, progress=False)
        return torch.cat([made.restored.flatten(), made.degraded.flatten(), torch.tensor([made.residual])])

    programs = [
        lambda: edit.redraw(model, first, 2, 500, few, progress=False),
        lambda: edit.redraw(model, first, 1, 500, quiet, iterations=2, progress=False),
        lambda: edit.interpolate(model, first, second, 3, 500, few, progress=False),
        lambda: edit.inpaint(model, first, hidden, 2, few, progress=False),
        lambda: restored("superresolution:2", "ddnm"),
        lambda: restored("blur:1", "ddnm"),
        lambda: restored("blur:1", "dps"),
    ]
    for program in programs:
        model = replace(digits, denoiser=replace(digits.denoiser, network=network))
        wanted = program()
        model = replace(digits, denoiser=replace(digits.denoiser, network=OnMps()))
        with EmulatedMps():
            assert torch.equal(program(), wanted)


def test_warps_equal_those_of_the_cpu():
    x, warps = torch.rand(3, 1, 6, 8), warp.sample(3, 0.9, True, noise.generator(0))
    wanted = warp.apply(x, warps)
    with EmulatedMps():
        moved = warp.apply(x.to("mps"), warps.to("mps"))
        assert (moved.device, torch.equal(moved.cpu(), wanted)) == (MPS, True)


def test_the_held_out_loss_equals_that_of_the_cpu():
    held_out = data.load("digits", (8, 8), 1, split="test")
    wanted = held_out_by_level(ON_CPU, held_out, 16, processes.Processes(0, 1, torch.device("cpu")))
    with EmulatedMps():
        result = held_out_by_level(ON_MPS, held_out, 16, processes.Processes(0, 1, MPS))
    np.testing.assert_array_equal(result, wanted)


def test_the_bound_of_the_page_is_that_of_the_cpu(tmp_path, monkeypatch):
    """A network on the emulated device fails here, since the bound is computed in another thread."""
    pytest.importorskip("starlette")
    from ddpm.page.state import State
    from ddpm.page.tabs import compress

    state, codec = State((), tmp_path, MPS), load_codec("digits", MPS)
    quick = replace(codec.denoiser, schedule=codec.denoiser.schedule.respace(range(50, 1001, 50)))
    monkeypatch.setattr(compress, "_codec", lambda *_: replace(codec, denoiser=quick))
    opened = open_checkpoint("digits")
    told = []
    for network in (quick.network, OnMps()):
        on_device = replace(opened, denoiser=replace(quick, network=network))
        monkeypatch.setattr(state, "model", lambda name, model=on_device: model)
        kept = state.keep(np.zeros((8, 8, 1), np.uint8))["id"]
        told.append([*compress.bound(state, {"model": "digits", "picture": kept})][-1])
    state.work.end()
    assert told[0]["bits_per_dim"] > 0
    assert told[0] == told[1]


def test_spacing_by_path_and_metrics_move_to_the_cpu():
    x = torch.randn(2, 1, 4, 4)
    features = np.random.default_rng(0).normal(size=(2, 30, 4))
    wanted = spacing.path_cost(ON_CPU.schedule, x, samplers.ddim(ON_CPU, x, 20))
    with EmulatedMps():
        moved = x.to("mps")
        assert torch.equal(spacing.path_cost(ON_MPS.schedule, moved, samplers.ddim(ON_MPS, moved, 20)), wanted)
        assert metrics.kid(*features, device="mps") == metrics.kid(*features)
        assert metrics.precision_recall(*features, device="mps") == metrics.precision_recall(*features)
        assert torch.equal(metrics.nearest(*features, device="mps")[0], metrics.nearest(*features)[0])
        assert torch.equal(inception.resize(moved).cpu(), inception.resize(x))


def test_likelihoods_ask_for_another_device(mps):
    x0 = pixels.to_signal(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)).to("mps")
    draw = noise.per_image([0, 1], (1, 4, 4), "mps")
    levels, variances = torch.ones(2, 1, dtype=torch.int64, device="mps"), torch.ones(3)
    for call in (
        lambda: likelihood.vlb(ON_MPS, x0, draw),
        lambda: likelihood.sampled_terms(ON_MPS, x0, levels, draw(1)[:, None]),
        lambda: next(likelihood.progressive_coding(ON_MPS, x0, draw)),
        lambda: likelihood.decoder_cost(x0, x0, variances),
        lambda: ode.probability_flow(ON_MPS, x0, x0),
        lambda: ode.bound(ON_MPS, x0, x0, x0),
        lambda: ode.decoder_bound(ON_MPS, x0, x0, x0),
    ):
        with pytest.raises(InputError, match="device mps: has no float64, which likelihoods need; want the CPU"):
            call()


def test_commands_that_need_float64_do_not_pick_such_a_device(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.pick_device("auto").type == "mps"
    assert processes.pick_device("auto", float64=True).type == "cpu"
    with pytest.raises(InputError, match="no float64, which likelihoods need"):
        processes.pick_device("mps", float64=True)
