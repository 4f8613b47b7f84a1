"""ONNX files, which other programs and browsers run: `to_onnx` writes one."""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm import noise
from ddpm.errors import InputError, not_installed
from ddpm.files import atomic
from ddpm.files.images import check_folder
from ddpm.files.models import Checkpoint, without_condition
from ddpm.samplers import SAMPLERS

OPSET = 20
"""The version of ONNX's operators that a file uses."""
TOLERANCE = 1e-4
"""How far onnxruntime's output may be from torch's, as a share of the largest output."""


def to_onnx(checkpoint: Checkpoint, file: Path) -> dict[str, Any]:
    """Write the network in float32 as an ONNX file, completely or not at all, and return its `settings`.

    The inputs and the output are named as the network's: x [batch, C, H, W], timestep [batch], y [batch] if there are
    classes, and out. The batch may have any size. The settings are also in the file's metadata, as JSON.

    Raises InputError if a package is missing, for a name that does not end in .onnx, and as `graph` does.
    """
    check_out(file)
    content, about = graph(checkpoint)
    atomic.write(file, content)
    return about


def check_out(file: Path) -> None:
    """Raise InputError if `to_onnx` could not write this file. Call this before the work."""
    if file.suffix != ".onnx" or file.is_dir():
        raise InputError(f"out {file}: want a name that ends in .onnx")
    check_folder(file.parent)
    check_packages()


def check_packages() -> None:
    """Raise InputError if a package that the export needs is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise not_installed(package, "onnx")


def check_size(checkpoint: Checkpoint) -> None:
    """Raise InputError for a network that takes more than the 2 GiB that an ONNX file holds."""
    assert isinstance(checkpoint.denoiser.network, nn.Module)
    parameters = sum(parameter.numel() for parameter in checkpoint.denoiser.network.parameters())
    if 4 * parameters > 2**31 - 2**20:
        raise InputError(
            f"{checkpoint.path}: {parameters:,} parameters take {4 * parameters / 2**30:.1f} GiB in float32; want a "
            "network of less than 2 GiB, which is the most that an ONNX file holds"
        )


def graph(checkpoint: Checkpoint) -> tuple[bytes, dict[str, Any]]:
    """The content of the ONNX file and the model's `settings`.

    Raises InputError for a network with a condition on an image, that takes more than ONNX's 2 GiB, that torch cannot
    export, or whose graph gives other numbers than torch (`verify`).
    """
    check_size(without_condition(checkpoint, "the ONNX file"))
    network, about = _plain(checkpoint.denoiser.network), settings(checkpoint)
    example = inputs(checkpoint, 2)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network, kwargs=example, input_names=list(example), output_names=["out"], opset_version=OPSET,
                dynamic_shapes={name: {0: "batch"} for name in example}, dynamo=True, verbose=False,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{checkpoint.path}: torch cannot export this network to ONNX ({reason})") from error
    assert program is not None
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]  # the exporter notes where the code lies on this machine
    for name, value in about.items():
        model.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    content = model.SerializeToString()
    verify(content, checkpoint)
    return content, about


def settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a program needs to sample with the network, as plain JSON values.

    name, model       the model's name, and `Checkpoint.about`
    opset             the version of ONNX's operators
    inputs, outputs   name -> what it is
    shape             [C, H, W]
    classes           names of the classes; the label of a class is its place here, and -1 is no class
    always_labelled   whether the network must have a class
    T, alpha_bar      the number of noise levels, and abar_t at 0..T; the timestep of level t is t - 1
    predict           what the first C channels of the output are, as in `Denoiser`
    variance          sigma_t^2, as in `Denoiser`: its name, or the table of calibrated variances at levels 0..T
    clip              whether x0^ is clipped to [-1, 1], or the quantile of dynamic thresholding
    values            dtype, low and high: the pixels, and those that are -1 and 1 of the signal
    samplers          name -> the default number of levels
    """
    denoiser, preset = checkpoint.denoiser, checkpoint.preset
    (C, H, W), K, T = preset.shape, len(preset.class_names), denoiser.schedule.T
    ours = ("consistency",) if preset.loss == "consistency" else ("ddim", "ancestral")
    assert denoiser.schedule.timestep.tolist() == list(range(-1, T))
    variance = denoiser.variance
    labels = {"y": f"int64 [batch]: the class, 0 to {K - 1}, or -1 for an image without class"} if K else {}
    second = f", then {C} channels of the variance ({variance})" if denoiser.learned else ""
    return {
        "name": checkpoint.home.name.removeprefix("ddpm-"),
        "model": {**checkpoint.about(), "network_precision": "float32"},
        "opset": OPSET,
        "inputs": {
            "x": f"float32 [batch, {C}, {H}, {W}]: x_t, the signal in [-1, 1] with noise",
            "timestep": f"int64 [batch]: t - 1 for the noise level t of 1 to {T}",
            **labels,
        },
        "outputs": {"out": f"float32 [batch, {C * (1 + denoiser.learned)}, {H}, {W}]: {denoiser.predict}{second}"},
        "shape": list(preset.shape),
        "classes": list(preset.class_names),
        "always_labelled": preset.always_labelled,
        "T": T,
        "alpha_bar": denoiser.schedule.alpha_bar.tolist(),
        "predict": denoiser.predict,
        "variance": variance.tolist() if isinstance(variance, Tensor) else variance,
        "clip": denoiser.clip,
        "values": {"dtype": denoiser.values.dtype, "low": denoiser.values.low, "high": denoiser.values.high},
        "samplers": {name: len(SAMPLERS[name].levels(denoiser, None)) for name in ours},
    }


def inputs(checkpoint: Checkpoint, n: int) -> dict[str, Tensor]:
    """Random inputs of the network for n images, by their names."""
    generator, preset = noise.generator(n), checkpoint.preset
    named = {
        "x": torch.randn(n, *preset.shape, generator=generator),
        "timestep": torch.randint(checkpoint.denoiser.schedule.T, (n,), generator=generator),
    }
    if classes := len(preset.class_names):
        named["y"] = torch.randint(0 if preset.always_labelled else -1, classes, (n,), generator=generator)
    return named


def verify(content: bytes, checkpoint: Checkpoint) -> None:
    """Raise InputError unless the ONNX file gives what torch gives, within TOLERANCE, for batches of two sizes."""
    import onnxruntime

    network, quiet = _plain(checkpoint.denoiser.network), onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, quiet, providers=["CPUExecutionProvider"])
    for n in (1, 3):
        example = inputs(checkpoint, n)
        with torch.no_grad():
            ours = network(**example)
        theirs = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in example.items()})[0])
        error, largest = float((theirs - ours).abs().max()), float(ours.abs().max())
        if theirs.shape != ours.shape or not error <= TOLERANCE * largest:
            raise InputError(
                f"{checkpoint.path}: onnxruntime is up to {error / largest:.1e} of the largest output off torch, and "
                f"{TOLERANCE:g} is accepted; this network cannot be exported to ONNX"
            )


def _plain(network: Any) -> nn.Module:
    """A copy of a network that computes in float32 on the CPU."""
    plain: nn.Module = copy.deepcopy(network).cpu().float().eval()
    plain.bf16 = False  # type: ignore[assignment]
    return plain


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the exporter's notes on packages that this project does not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
