"""A CUDA device computes what the CPU computes, also on the fast path: compiled, with CUDA graphs, in bf16.

`pytest tests/test_cuda.py` should take 90 s on a GPU. The file needs no other test file but conftest.py. Tests that
compile come last, since they take most of the time. Without a GPU all tests are skipped.
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
    """A network of two levels with attention, without weights near 0, and its inputs x and timestep."""
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
    """The output, and all gradients of its mean square as one vector."""
    out = network(x, t)
    out.square().mean().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


@pytest.mark.parametrize("patch", [1, 2])
def test_the_network_equals_that_of_the_cpu(patch: int) -> None:
    """In float32, with both memory layouts, it is within 1e-5 of the CPU's float64. TensorFloat-32 would be at 1e-3."""
    network, x, t = small(patch=patch)
    exact = copy.deepcopy(network).double()
    wanted = exact(x.double(), t)
    for layout in (torch.contiguous_format, torch.channels_last):
        on_gpu = copy.deepcopy(network).to("cuda", memory_format=layout)
        assert distance(on_gpu(x.cuda(), t.cuda()), wanted) < 1e-5


def test_a_training_step_equals_that_of_the_cpu() -> None:
    """Loss and gradient from the same draws in float32. Whole runs differ, because noise is drawn on the device."""
    preset = dataclasses.replace(PRESETS["digits"], precision="float32")
    torch.manual_seed(0)
    denoiser = build(preset)
    x0, eps = torch.rand(8, 1, 8, 8) * 2 - 1, noise.normal(range(8), (1, 8, 8), 3)
    t = torch.arange(1, 1000, 125)
    results = []
    for where in ("cpu", "cuda"):
        on_device = dataclasses.replace(denoiser, network=copy.deepcopy(denoiser.network)).to(where)
        loss = losses.simple(on_device, x0.to(where), t.to(where), eps.to(where)).mean()
        loss.backward()
        grad = torch.cat([p.grad.contiguous().flatten() for p in on_device.network.parameters()])
        results.append((loss.detach(), grad))
    assert distance(results[1][0], results[0][0]) < 1e-5
    assert distance(results[1][1], results[0][1]) < 2e-3  # PyTorch uses TensorFloat-32 in the backward pass


def test_a_cuda_graph_computes_what_the_network_computes() -> None:
    """For each shape, for other inputs, and after the weights have changed in place."""
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
    pytest.importorskip("constriction")  # `evaluate` imports it with the codec
    from ddpm.run import evaluate

    on_cpu = open_checkpoint("digits", precision="float32")
    on_gpu = open_checkpoint("digits", precision="float32")
    on_gpu = dataclasses.replace(on_gpu, denoiser=on_gpu.denoiser.to("cuda"))
    _, held_out = data.load_pair("digits", (8, 8), 1)
    bits = [
        evaluate.nll_sampled(checkpoint, held_out, 12, Processes(0, 1, torch.device(device)), 32)["bits_per_dim"]
        for checkpoint, device in ((on_cpu, "cpu"), (on_gpu, "cuda"))
    ]
    assert bits[0] == pytest.approx(bits[1], rel=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_gives_the_same_image(sampler: str) -> None:
    """In float32 and in batches of 1, 7 and 64, at most one pixel in a thousand differs from the CPU's, and by one."""
    denoiser, on_gpu = (open_checkpoint("digits", precision="float32").denoiser for _ in range(2))
    on_gpu = on_gpu.to("cuda")
    wanted = generate(denoiser, (1, 8, 8), range(16), sampler, 12)
    for size in (1, 7, 64):
        images = generate(on_gpu, (1, 8, 8), range(16), sampler, 12, batch_size=size, device="cuda")
        difference = (images.int() - wanted.int()).abs()
        assert int(difference.max()) <= 1
        assert float((difference > 0).float().mean()) <= 1e-3


def load_codec(*args: Any, **kwargs: Any) -> Any:
    """A codec. Where the package constriction is missing the test is skipped, and the other tests still run."""
    pytest.importorskip("constriction")
    return ddpm.load_codec(*args, **kwargs)


def pictures() -> list[np.ndarray]:
    _, held_out = data.load_pair("digits", (8, 8), 1)
    return list(held_out.batch(range(4)).permute(0, 2, 3, 1).contiguous().numpy())


def test_portable_files_cross_devices() -> None:
    """A file that one device writes is read exactly on the other."""
    on_cpu, on_gpu = load_codec("digits", device="cpu"), load_codec("digits", device="cuda")
    for writer, reader in ((on_cpu, on_gpu), (on_gpu, on_cpu)):
        for image in pictures():
            assert np.array_equal(ddpm.codec.decompress(reader, ddpm.codec.compress(writer, image)), image)


def test_local_files_come_back_on_the_device() -> None:
    """Local files, which use the network's own bf16, are read exactly on the device that wrote them."""
    model = load_codec("digits", device="cuda")
    for image in pictures():
        assert np.array_equal(ddpm.codec.decompress(model, ddpm.codec.compress(model, image, local=True)), image)


def test_the_codec_is_calibrated_on_the_device(tmp_path: Path) -> None:
    """After `ddpm calibrate --device cuda`, a file of the CPU is read exactly on the GPU."""
    load_codec("digits")
    shutil.copy(open_checkpoint("digits").path, tmp_path / "digits.safetensors")
    assert main(["calibrate", str(tmp_path / "digits.safetensors"), "-n", "4", "--codec", "2", "--device", "cuda"]) == 0
    on_cpu, on_gpu = (load_codec(tmp_path / "digits.safetensors", device=device) for device in ("cpu", "cuda"))
    image = pictures()[0]
    assert np.array_equal(ddpm.codec.decompress(on_gpu, ddpm.codec.compress(on_cpu, image)), image)


def test_compiled_bf16_is_near_float64() -> None:
    """Outputs within 2e-2 and gradients within 3e-2 of the CPU's float64, eager and with Inductor."""
    network, x, t = small(bf16=True, num_res_blocks=1)  # fewer kinds of stages to compile
    exact = copy.deepcopy(network).double()
    exact.bf16 = False
    wanted = gradient(exact, x.double(), t)
    for compiled in (False, True):
        on_gpu = copy.deepcopy(network).to("cuda", memory_format=torch.channels_last)
        if compiled:
            device.compile_stages(on_gpu)
        result = gradient(on_gpu, x.cuda(), t.cuda())
        assert [distance(a, b) < limit for a, b, limit in zip(result, wanted, (2e-2, 3e-2), strict=True)] == [True] * 2


def train(out: Path, *options: object) -> int:
    return main([*TINY, "--out", str(out), "--device", "cuda", *map(str, options)])


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_resumed_run_is_the_same_run(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """6 steps and 6 more give the weights of 12, bit for bit. Weights are channels-last in memory, but not in files.

    From the fifth step of a process on, a compiled step is a CUDA graph, and no line says that it is none.
    """
    options = ["--dropout", 0.3, "--compile", "on" if how == "compiled" else "off", "--precision", "bf16"]
    options += ["--optimizer", "adam" if how == "compiled" else "muon"]
    assert train(tmp_path / "whole", *options, "--steps", 12) == 0
    assert train(tmp_path / "parts", *options, "--steps", 6) == 0
    assert train(tmp_path / "parts", *options, "--steps", 12) == 0
    a, b = tensors(tmp_path / "parts", 12), tensors(tmp_path / "whole", 12)
    assert_close(a, b)
    assert_same(a, b)
    assert "without a CUDA graph" not in capsys.readouterr().err


def test_a_graph_of_the_gradient_follows_weights_inputs_and_seeds() -> None:
    """Replays equal the plain gradient to the bit: other tensors, another mask of dropout, weights that changed."""
    network, x, t = small(dropout=0.5)
    network, x, t = network.to("cuda"), x.cuda(), t.cuda()
    lines: list[str] = []

    def plain(x: Tensor, t: Tensor) -> Tensor:
        loss = network(x, t).square().mean()
        loss.backward()
        return loss.detach()

    weights = list(network.parameters())
    graphed = device.GraphedGradient(plain, weights, lines.append)
    for seed in range(8):
        results = []
        for run in (graphed, plain):
            torch.manual_seed(seed)
            for p in weights:
                p.grad = None
            loss = run(x + seed, t - seed % 2)
            results.append([loss, *(p.grad.clone() for p in weights)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        with torch.no_grad():
            for p in weights:
                p.mul_(0.99)
    assert lines == []


def test_training_learns(tmp_path: Path) -> None:
    """With the defaults, compiled bf16, the held-out loss of digits falls by half in 200 steps."""
    out = tmp_path / "run"
    command = ["train", "digits", "--out", str(out), "--steps", "200", "--sample-every", "200", "--save-every", "200"]
    assert main(command) == 0
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = (line["held_out"] for line in log if "held_out" in line)
    assert after < before / 2
    assert (out / "samples" / "00000200.png").is_file()
