"""A CUDA device gives what the CPU gives, and so does the fast path there: compiled, replayed, bf16.

The file is planned for 90 s on a card: `pytest tests/test_cuda.py`. It needs no other file of tests but conftest.py.
Tests that compile come last, since they take most of the time. Without a card all tests are skipped.
"""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, assert_close, assert_same, tensors
from torch import Tensor, nn

import ddpm
from ddpm import losses, noise
from ddpm.cli import main
from ddpm.files import data
from ddpm.files.opening import open_checkpoint
from ddpm.presets import PRESETS, build
from ddpm.run import device
from ddpm.run.processes import Processes
from ddpm.run.sample import generate
from ddpm.samplers import SAMPLERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def small(**settings) -> tuple[ddpm.UNet, Tensor, Tensor]:
    """A network of two levels with attention and no weight near nothing, and what it is called with."""
    torch.manual_seed(0)
    network = ddpm.UNet(3, width=64, channel_multipliers=(1, 2), attention_levels=(1,), **settings)
    for p in network.parameters():
        if p.ndim == 4 and p.abs().max() < 1e-4:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return network, torch.randn(4, 3, 16, 16), torch.tensor([1, 5, 500, 999])


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm())


def gradient(network: nn.Module, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and every gradient of its mean square in one row."""
    out = network(x, t)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("patch", [1, 2])
def test_the_network_is_the_cpu_s(patch: int) -> None:
    """float32, weights channels-last or not: to 1e-5 of the CPU's float64; TensorFloat-32 would be at 1e-3."""
    network, x, t = small(patch=patch)
    exact = copy.deepcopy(network).double()
    wanted = exact(x.double(), t)
    for layout in (torch.contiguous_format, torch.channels_last):
        there = copy.deepcopy(network).to("cuda", memory_format=layout)
        assert distance(there(x.cuda(), t.cuda()), wanted) < 1e-5


def test_a_step_is_the_cpu_s() -> None:
    """Loss and gradient of the same draws, float32; the noise of a run is drawn on its device, so runs differ."""
    preset = dataclasses.replace(PRESETS["digits"], precision="float32")
    torch.manual_seed(0)
    denoiser = build(preset)
    x0, eps = torch.rand(8, 1, 8, 8) * 2 - 1, noise.normal(range(8), (1, 8, 8), 3)
    t = torch.arange(1, 1000, 125)
    found = []
    for place in ("cpu", "cuda"):
        one = dataclasses.replace(denoiser, network=copy.deepcopy(denoiser.network)).to(place)
        loss = losses.simple(one, x0.to(place), t.to(place), eps.to(place)).mean()
        loss.backward()
        grad = torch.cat([p.grad.contiguous().flatten() for p in one.network.parameters()])
        found.append((loss.detach(), grad))
    assert distance(found[1][0], found[0][0]) < 1e-5
    assert distance(found[1][1], found[0][1]) < 2e-3  # TensorFloat-32 is PyTorch's way back


def test_a_graph_gives_what_the_network_gives() -> None:
    """Each shape, called again with other inputs, and after the weights have changed in place."""
    network, x, t = small(bf16=True)
    network = network.eval().requires_grad_(False).to("cuda", memory_format=torch.channels_last)
    graphed = device.GraphedUNet(network)
    for count in (4, 1, 4):
        x = torch.randn(count, 3, 16, 16, device="cuda")
        assert torch.equal(graphed(x, t[:count].cuda()), network(x, t[:count].cuda()))
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(1.01)


def test_the_bound_is_the_same() -> None:
    pytest.importorskip("constriction")  # which `evaluate` imports with the codec
    from ddpm.run import evaluate

    found = open_checkpoint("digits", precision="float32")
    there = open_checkpoint("digits", precision="float32")
    there = dataclasses.replace(there, denoiser=there.denoiser.to("cuda"))
    _, held_out = data.load_pair("digits", (8, 8), 1)
    bits = [
        evaluate.nll_sampled(one, held_out, 12, Processes(0, 1, torch.device(device)), 32)["bits_per_dim"]
        for one, device in ((found, "cpu"), (there, "cuda"))
    ]
    assert bits[0] == pytest.approx(bits[1], rel=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_gives_the_same_image(sampler: str) -> None:
    """float32, on both devices and in batches of 1, 7 and 64: the same pixels but for one in a thousand by one."""
    denoiser, there = (open_checkpoint("digits", precision="float32").denoiser for _ in range(2))
    there = there.to("cuda")
    wanted = generate(denoiser, (1, 8, 8), range(16), sampler, 12)
    for size in (1, 7, 64):
        found = generate(there, (1, 8, 8), range(16), sampler, 12, batch_size=size, device="cuda")
        off = (found.int() - wanted.int()).abs()
        assert int(off.max()) <= 1
        assert float((off > 0).float().mean()) <= 1e-3


def load_codec(*args: Any, **kwargs: Any) -> Any:
    """A codec. Where the package constriction is missing the test is skipped, and the other tests still run."""
    pytest.importorskip("constriction")
    return ddpm.load_codec(*args, **kwargs)


def pictures() -> list[np.ndarray]:
    _, held_out = data.load_pair("digits", (8, 8), 1)
    return list(held_out.batch(range(4)).permute(0, 2, 3, 1).contiguous().numpy())


def test_portable_files_cross_devices() -> None:
    """Written on one, read on the other, exact."""
    here, there = load_codec("digits", device="cpu"), load_codec("digits", device="cuda")
    for writer, reader in ((here, there), (there, here)):
        for image in pictures():
            assert np.array_equal(ddpm.codec.decompress(reader, ddpm.codec.compress(writer, image)), image)


def test_local_files_come_back_on_the_device() -> None:
    """The network's own bf16 path; another process of the same machine would have the same mark."""
    model = load_codec("digits", device="cuda")
    for image in pictures():
        assert np.array_equal(ddpm.codec.decompress(model, ddpm.codec.compress(model, image, local=True)), image)


def test_the_codec_is_set_on_the_device(tmp_path: Path) -> None:
    """`ddpm calibrate` there; then files of one device are read on the other."""
    load_codec("digits")
    shutil.copy(open_checkpoint("digits").path, tmp_path / "digits.safetensors")
    assert main(["calibrate", str(tmp_path / "digits.safetensors"), "-n", "4", "--codec", "2", "--device", "cuda"]) == 0
    here, there = (load_codec(tmp_path / "digits.safetensors", device=device) for device in ("cpu", "cuda"))
    image = pictures()[0]
    assert np.array_equal(ddpm.codec.decompress(there, ddpm.codec.compress(here, image)), image)


def test_bf16_compiled_is_float32_but_for_rounding() -> None:
    """Forward and backward, eager and by Inductor: 2e-2 and 3e-2 of the CPU's float64."""
    network, x, t = small(bf16=True, num_res_blocks=1)  # the fewer kinds of stages, the less there is to compile
    exact = copy.deepcopy(network).double()
    exact.bf16 = False
    wanted = gradient(exact, x.double(), t)
    for compiled in (False, True):
        there = copy.deepcopy(network).to("cuda", memory_format=torch.channels_last)
        if compiled:
            device.compile_stages(there)
        found = gradient(there, x.cuda(), t.cuda())
        assert [distance(a, b) < limit for a, b, limit in zip(found, wanted, (2e-2, 3e-2), strict=True)] == [True] * 2


def train(out: Path, *options: object) -> int:
    return main([*TINY, "--out", str(out), "--device", "cuda", *map(str, options)])


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_run_goes_on_where_it_stopped(how: str, tmp_path: Path) -> None:
    """3 steps and 3 are 6, to the bit where the device's own sums are; weights lie channels-last, files do not."""
    options = ["--dropout", 0.3, "--compile", "on" if how == "compiled" else "off", "--precision", "bf16"]
    assert train(tmp_path / "whole", *options, "--steps", 6) == 0
    assert train(tmp_path / "parts", *options, "--steps", 3) == 0
    assert train(tmp_path / "parts", *options, "--steps", 6) == 0
    a, b = tensors(tmp_path / "parts", 6), tensors(tmp_path / "whole", 6)
    assert_close(a, b)
    assert_same(a, b)


def test_training_learns(tmp_path: Path) -> None:
    """The default path, compiled bf16: the held-out loss of digits falls to a half in 200 steps."""
    out = tmp_path / "run"
    command = ["train", "digits", "--out", str(out), "--steps", "200", "--sample-every", "200", "--save-every", "200"]
    assert main(command) == 0
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = (line["held_out"] for line in log if "held_out" in line)
    assert after < before / 2
    assert (out / "samples" / "00000200.png").is_file()
