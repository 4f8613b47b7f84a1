"""Check that a change of the code left every result the same, bit for bit.

    python benchmarks/unchanged.py record FILE.json          # computes everything, writes a SHA-256 of each result
    python benchmarks/unchanged.py compare OLD.json NEW.json     # prints what differs or is missing; then exits with 1

Compare two versions of the code on one machine with the same packages. Another CPU, another PyTorch or another number
of threads may give other bits. GOMP_SPINCOUNT=1000 in the environment makes the script faster beside other work. An
item keeps the name that it had in the first version of this script, even if the package has renamed its parts since.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

# -- names of the package: when the package renames something, this part of the script changes and no other ------------
import ddpm
from ddpm import kernels, likelihood, losses, metrics, noise, ode, pixels, timesteps
from ddpm.cli import main
from ddpm.codec import archive
from ddpm.files import data
from ddpm.files.opening import open_checkpoint
from ddpm.presets import PRESETS, to_json
from ddpm.run.compress import load_codec
from ddpm.run.sample import sampler_levels, trajectory
from ddpm.samplers import SAMPLERS
from ddpm.schedule import SCHEDULES
from ddpm.spacing import SPACINGS

RENAMED = {  # old name of a setting: its name now
    "multipliers": "channel_multipliers",
    "blocks": "num_res_blocks",
    "attention": "attention_resolutions",
    "levels": "num_timesteps",
    "times": "timestep_sampling",
    "checkpointing": "gradient_checkpointing",
    "ema": "ema_decay",
}
# Words of the command line that the items below use (options, commands, values): their names now.
WORDS = {f"--{was}": f"--{is_now.replace('_', '-')}" for was, is_now in RENAMED.items()} | {"flow": "pf_ode"}
# Keys of JSON files that the package writes: their old names.
KEYS = {is_now: was for was, is_now in RENAMED.items()} | {"levels_per_image": "levels"}
# Keys of JSON files that are left out: they differ between runs, between versions, and with the identity of a model.
TIMED = {"seconds", "images_per_second", "data_wait"}
VERSIONED = {"version", "_diffusers_version"}
NAMED = {"sha256", "identity", "weights_sha256", "model", "measured_on"}
SAMPLED = "ancestral ddim dpmpp_2m dpmpp_3m dpmpp_2m_sde unipc unipc_3 heun flow".split()
PRESET = "cifar10 celebahq256 lsun_bedroom lsun_bedroom_large lsun_church lsun_cat digits mnist cifar10_small".split()
PRESET += ["cifar10_fast", "cifar10_likelihood"]
PAPER = "table1 table3 table4 fig5 fig6 fig7 fig8 fig9 fig10 neighbours".split()


def now(word: object) -> str:
    """The name that a word of the command line, a sampler, schedule, spacing or preset has now."""
    return WORDS.get(str(word), str(word))


def checkpoint(run: str, step: int, kind: str) -> Path:
    """The path of a file of weights in a run: kind is ema, raw or optimizer."""
    return Path(run, "checkpoints", f"{step:08d}", f"{kind}.safetensors")


def calibration(weights: Path) -> Path:
    """The path of the calibration that belongs to a file of weights."""
    return weights.with_name(f"{weights.stem}.calibration.json")


def anonymous(model: Any) -> Any:
    """The codec's model with zeros in place of its identity."""
    return replace(model, identity=bytes(4))


# -- hashes ------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2


def digest(value: Any) -> str:
    """The SHA-256 of a value: type, shape and bytes of an array, the sorted entries of a dict, JSON of the rest."""
    sha256 = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            flat = item.detach().cpu().contiguous()
            sha256.update(f"{str(item.dtype).removeprefix('torch.')} {list(item.shape)} ".encode())
            sha256.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray):
            sha256.update(f"{item.dtype} {list(item.shape)} ".encode() + np.ascontiguousarray(item).tobytes())
        elif isinstance(item, bytes):
            sha256.update(f"bytes {len(item)} ".encode() + item)
        elif isinstance(item, dict):
            sha256.update(f"dict {len(item)} ".encode())
            for key in sorted(item, key=str):
                sha256.update(f"{key} ".encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            sha256.update(f"list {len(item)} ".encode())
            for part in item:
                add(part)
        else:
            sha256.update(json.dumps(item).encode() + b" ")

    add(value)
    return sha256.hexdigest()


def plain(value: Any) -> Any:
    """JSON with old names of keys, without the keys TIMED, VERSIONED and NAMED and without SHA-256 hashes."""
    if isinstance(value, dict):
        entries = {KEYS.get(key, key): entry for key, entry in value.items()}
        return {
            key: entry if key == "fingerprint" else plain(entry)
            for key, entry in entries.items()
            if key not in TIMED | VERSIONED | NAMED
        }
    if isinstance(value, list):
        return [plain(item) for item in value]
    return "a hash" if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else value


def picture(path: Path) -> np.ndarray:
    """The pixels of an image file."""
    with Image.open(path) as image:
        return np.asarray(image)


def content(path: Path) -> Any:
    """The content of a file without its packing: pixels, JSON, arrays, tensors, or bytes."""
    if path.suffix == ".png":
        return picture(path)
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return {
                name: plain(json.loads(str(item))) if item.dtype.kind == "U" else item for name, item in arrays.items()
            }
    return tensors(path) if path.suffix == ".safetensors" else path.read_bytes()


def contents(folder: Path) -> dict[str, Any]:
    """The contents of all files under a folder, by name.

    The name of a cache ends in a key that depends on the model's identity and the version; it is left out. Several
    files may then share a name, so each name has a list of contents in the order of their hashes.
    """
    results: dict[str, list[Any]] = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        results.setdefault(re.sub("-[0-9a-f]{16}", "-KEY", str(path.relative_to(folder))), []).append(content(path))
    return {name: sorted(values, key=digest) for name, values in results.items()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def metadata(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file, with its settings as JSON."""
    with safe_open(path, "pt") as file:
        return {key: json.loads(text) if key == "config" else text for key, text in file.metadata().items()}


def cli(*words: object) -> Any:
    """Run a command of `ddpm` in this process and return the JSON that it prints. RuntimeError if it fails."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([now(word) for word in (*words, "--json")])
    if code:
        raise RuntimeError(f"ddpm {' '.join(map(str, words))}: exit {code}: {err.getvalue().strip()[-200:]}")
    return plain(json.loads(out.getvalue().splitlines()[-1]))


# -- inputs of the items; the working directory is a temporary folder --------------------------------------------------

CIFAR = {name: f"{name}.safetensors" for name in ("cifar10_fast", "cifar10_likelihood")}
MODELS = {"digits": "digits", **CIFAR}
FEATURES = (
    "import numpy as np\n"
    "def network(x):\n"
    "    x = x.reshape(len(x), -1).astype(np.float64)\n"
    "    w = np.random.default_rng(0).normal(size=(x.shape[1], 12)) / 100\n"
    "    f = np.tanh(x @ w)\n"
    "    p = np.exp(f[:, :5])\n"
    "    return f, p / p.sum(1, keepdims=True)\n"
)


def synthetic(seed: int, height: int, width: int, channels: int) -> np.ndarray:
    """A synthetic picture uint8 [H, W, C]: coarse patches, a slope and some noise."""
    draws = np.random.default_rng(seed)
    coarse = np.kron(draws.uniform(40, 200, (height // 8 + 1, width // 8 + 1, channels)), np.ones((8, 8, 1)))
    slope = np.linspace(-30, 30, width)[None, :, None]
    fine = draws.normal(0, 4, (height, width, channels))
    return np.clip(coarse[:height, :width] + slope + fine, 0, 255).astype(np.uint8)


def draw(path: str, seed: int, height: int, width: int, mode: str = "RGB") -> None:
    """Write a synthetic picture in one of Pillow's modes."""
    channels = {"L": 1, "RGBA": 4, "I;16": 1}.get(mode, 3)
    array = synthetic(seed, height, width, channels)
    array = array[..., 0] if channels == 1 else array
    image = Image.fromarray(array.astype(np.uint16) * 257 + 3 if mode == "I;16" else array)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    (image.quantize(16) if mode == "P" else image).save(path)


def prepare() -> None:
    """Write the files that the items read."""
    for name, file in CIFAR.items():
        for source in (ROOT / "models" / file, calibration(ROOT / "models" / file)):
            shutil.copy(source, ".")
        assert calibration(Path(file)).is_file(), name
    Path("features.py").write_text(FEATURES)
    for i in range(24):  # names that sort by number, sides that no preset has
        draw(f"photos/{'ab'[i % 2]}/{i}.png", i, 16 + 3 * (i % 5), 16 + 5 * (i % 3), "P" if i % 6 == 5 else "RGB")
    for i in range(5):
        for k, mode in enumerate(("L", "RGBA", "I;16")):
            draw(f"{mode[0]}/train/{10 - i}.png", 50 + 5 * k + i, 9 + 7 * i, 30 - 5 * i, mode)
            draw(f"{mode[0]}/test/{10 - i}.png", 70 + 5 * k + i, 8 + 5 * i, 40 - 7 * i, mode)
    for i, image in enumerate(data.load("digits", (8, 8), 1, split="test").batch(range(6)).numpy()):
        Image.fromarray(image[0]).save(f"d{i}.png")
    for i in range(3):
        draw(f"c{i}.png", 100 + i, 32, 32)
    sizes = {"grey": (11, 13, "L"), "tiny": (2, 3, "L"), "crop": (7, 5, "RGB"), "high": (33, 9, "RGB")}
    sizes |= {"greyer": (16, 16, "L"), "wide": (16, 20, "RGB"), "colour": (8, 8, "RGB")}
    for i, (name, (height, width, mode)) in enumerate(sizes.items()):
        draw(f"{name}.png", 110 + i, height, width, mode)
    shutil.make_archive("photos", "zip", "photos")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 3:] = 255
    Image.fromarray(mask).save("mask.png")


@cache
def small() -> str:
    """A run with few levels and steps, for items that would take long with more."""
    options = "--levels 40 --steps 20 --save-every 20 --sample-every 0 --eval-images 32 --sample-steps 5"
    cli("train", "digits", "--out", "small", *options.split())
    return "small"


@cache
def calibrated() -> str:
    """A copy of the weights of `small`, after `ddpm calibrate`."""
    shutil.copy(checkpoint(small(), 20, "ema"), "calibrated.safetensors")
    cli("calibrate", "calibrated.safetensors", "-n", 24, "--codec", 8)
    return "calibrated.safetensors"


# -- items: each returns a value, or a dict whose values become items of their own -------------------------------------


def sampled(model: str, *options: object) -> dict[str, Any]:
    """Four images by the command line, and every x_t and x0^ of the same sampling by Python.

    With fewer than six steps, solvers of order 3 hardly differ from those of order 2.
    """
    cli("sample", MODELS[model], "-n", 4, "--steps", 6, "--out", "samples.npz", "--sampler", *options)
    uint8 = content(Path("samples.npz"))
    Path("samples.npz").unlink()
    checkpoint = open_checkpoint(MODELS[model])
    steps = list(trajectory(checkpoint.denoiser, checkpoint.preset.shape, range(4), now(options[0]), 6))
    return {"uint8": uint8, "float32": [(step.t, step.x, step.x0) for step in steps]}


def sample_options(options: str, out: str) -> Any:
    """The files that `ddpm sample digits` writes with these options."""
    cli("sample", "digits", "-n", 4, "--out", out, *options.split())
    path = Path(out)
    results = contents(path) if path.is_dir() else content(path)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return results


def trained(name: str, preset: str, options: str, stops: tuple[int, ...]) -> dict[str, Any]:
    """A run: the losses in its log, its settings, its samples, and its last weights."""
    for steps in stops:
        cli("train", preset, "--out", name, "--steps", steps, *options.split())
    log = [plain(json.loads(line)) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
    results = {kind: tensors(checkpoint(name, stops[-1], kind)) for kind in ("ema", "raw", "optimizer")}
    settings = plain(metadata(checkpoint(name, stops[-1], "ema")))
    return {"log": log, "settings": settings, "samples": contents(Path(name, "samples")), **results}


DIGITS = "--log-every 10 --save-every 25 --sample-every 25 --sample-count 8 --sample-steps 10 --eval-images 64"
TINY = "--width 32 --blocks 1 --attention 8 --batch-size 8 --warmup 4 --save-every 6 --log-every 3 --eval-images 16 "
TINY += "--sample-every 12 --sample-count 4 --sample-steps 5 --data photos --size"
TRAINED = [  # preset, options, steps at which the run stops
    ("digits", DIGITS, (50,)),
    ("digits", DIGITS, (25, 50)),
    ("cifar10_small", f"{TINY} 16 --multipliers 1,2 --dropout 0.2 --variance learned_range --loss hybrid --schedule "
     "cosine --levels 100 --times stratified", (12,)),
    ("cifar10_fast", f"{TINY} 16 --classes --predict x0 --schedule quad --variance fixed_small --weighting min_snr "
     "--accumulate 2 --checkpointing --levels 100 --seed 3", (12,)),
    ("cifar10", f"{TINY} 16 --multipliers 1,1 --predict mu --loss vlb --variance learned --schedule warmup10 --levels "
     "60 --precision bf16 --no-flip", (12,)),
    ("cifar10_likelihood", f"{TINY} 16x8 --multipliers 1,2 --channels 1 --schedule jsd --levels 50 --weighting p2 "
     "--times bound", (12,)),
    ("cifar10_small", f"{TINY} 16 --multipliers 1,1 --schedule const --levels 50 --times lognormal --ema 0 "
     "--grad-clip 0", (12,)),
]  # fmt: skip


def bound() -> dict[str, Any]:
    """Eq. 5 term by term of 8 held-out digits, and the ODE's likelihood of 4."""
    denoiser = open_checkpoint("digits").denoiser
    x0 = pixels.to_signal(data.load("digits", (8, 8), 1, split="test").batch(range(8)))
    terms = plain(asdict(likelihood.vlb(denoiser, x0, noise.per_image(range(8), x0.shape[1:]))))
    draws = noise.normal(range(4), x0.shape[1:], 1)
    probe = noise.normal(range(4), x0.shape[1:], 2).sign()
    flows = {
        "ode": ode.bound(denoiser, x0[:4], draws.sigmoid(), probe, 10),
        "ode, decoder": ode.decoder_bound(denoiser, x0[:4], draws, probe, 10),
    }
    return terms | flows


def evaluated(run: Callable[[], str], options: str) -> dict[str, Any]:
    """The files that `ddpm evaluate` writes."""
    out = Path(tempfile.mkdtemp(dir="."))
    cli("evaluate", run(), "--out", out, *options.replace("--levels", "--levels-per-image").split())
    return contents(out)


def blanked(data: bytes) -> bytes:
    """A file of the codec with zeros in place of the bytes that depend on the model's identity or the machine.

    Pictures (DPC) and archives (DPA) begin alike. Bytes 0-2 are the kind, byte 3 the version and flags, byte 4 is K,
    and bytes 5-8 are the model's identity. Then come five varints; in the local profile 2 bytes that name the machine;
    and the header's check byte, a CRC-8 of all bytes before it. The last 4 bytes of a file are the CRC-32 of all bytes
    before them. The checksums of x and of the pixels depend on the picture alone and stay.
    """
    position = 9
    for _ in range(5):
        while data[position] & 128:
            position += 1
        position += 1
    end = position + (2 if data[3] & 2 else 0)
    return data[:5] + bytes(4) + data[9:position] + bytes(end + 1 - position) + data[end + 1 : -4] + bytes(4)


def coded(model: str, files: str, options: str) -> dict[str, Any]:
    """Compressed pictures, whole and cut in half. A whole file must be read exactly unless its options set a limit."""
    folder = Path(tempfile.mkdtemp(dir="."))
    names = [f"{file}.png" for file in files.split()]
    cli("compress", MODELS[model], *names, "--out", folder, *options.split())
    results: dict[str, Any] = {}
    for path in sorted(folder.glob("*")):
        back = path.with_suffix(".png")
        about = cli("decompress", MODELS[model], path, "--out", back)
        if "--psnr" not in options and "--bits-per-dim" not in options:
            assert np.array_equal(picture(back), picture(Path(back.name))), f"{path.name} is not read exactly"
        data = path.read_bytes()
        early = cli("decompress", MODELS[model], path, "--out", "early.png", "--at", max(len(data) // 2, 25))
        results[path.stem] = {
            "file": blanked(data),
            "read": (picture(back), about["exact"], about["groups"]),
            "half": (picture(Path("early.png")), early["exact"], early["groups"]),
        }
        Path("early.png").unlink()
        inspected = cli("inspect", path, "--run", MODELS[model])
        results[path.stem]["said"] = {key: item for key, item in inspected.items() if key != "file"}
    assert len(results) == len(names)
    return results


def archived(model: str, files: str, local: bool) -> dict[str, Any]:
    """An archive of pictures from a model without identity. The command line also writes and reads one with identity.

    The stack of an archive contains whole files, which contain the identity. So every byte depends on the identity, and
    zeros in two fields would not be enough.
    """
    names = [f"{file}.png" for file in files.split()]
    arrays = [picture(Path(name)) for name in names]
    arrays = [a if a.ndim == 3 else a[..., None] for a in arrays]
    data = archive.compress(anonymous(load_codec(MODELS[model])), arrays, files.split(), local=local)
    folder, file = Path(tempfile.mkdtemp(dir=".")), Path("all.ddpm")
    profile = ["--profile", "local" if local else "portable"]
    cli("compress", MODELS[model], *names, "--archive", "--out", file, *profile)
    cli("decompress", MODELS[model], file, "--out", folder)
    for name in names:
        assert np.array_equal(picture(folder / name), picture(Path(name))), f"{name} is not read exactly"
    return {"file": blanked(data)}


DPC = [  # model, pictures, options: 36 files
    ("digits", "d0 d1 d2", "--chunk-bits 8"),
    ("digits", "d0 d1", "--chunk-bits 12"),
    ("digits", "d0 d1", "--chunk-bits 14 --lossless"),
    ("digits", "d0 d1 d2", "--chunk-bits 8 --profile local"),
    ("digits", "d0 d1", "--profile local"),
    ("digits", "grey tiny colour", "--chunk-bits 8"),
    ("digits", "grey", "--chunk-bits 8 --whole"),
    ("digits", "d3", "--chunk-bits 12 --seed 5"),
    ("digits", "d0 d1", "--bits-per-dim 5 --chunk-bits 8"),
    ("digits", "d0 d1", "--psnr 20 --profile local --chunk-bits 8"),
    ("cifar10_likelihood", "c0 c1", "--chunk-bits 8"),
    ("cifar10_likelihood", "c0", "--chunk-bits 12"),
    ("cifar10_likelihood", "c0", "--chunk-bits 14"),
    ("cifar10_likelihood", "c0 c1", "--chunk-bits 8 --profile local"),
    ("cifar10_likelihood", "c0", "--profile local"),
    ("cifar10_likelihood", "crop greyer", "--chunk-bits 8"),
    ("cifar10_likelihood", "high c2", "--chunk-bits 8 --profile local --seed 7"),
    ("cifar10_likelihood", "wide", "--chunk-bits 8 --profile local --whole"),
    ("cifar10_likelihood", "c0", "--psnr 30 --chunk-bits 8"),
    ("cifar10_likelihood", "c1 c2", "--bits-per-dim 0.5 --profile local --chunk-bits 8"),
]


def exported() -> dict[str, Any]:
    """An exported file, an exported diffusers folder, and the import of that folder."""
    cli("export", calibrated(), "--out", "mine.safetensors")
    cli("export", calibrated(), "--to", "diffusers", "theirs")
    cli("import", "theirs", "--out", "back.safetensors", "--data", "digits")
    results = {f"diffusers {name}": item for name, item in contents(Path("theirs")).items()}
    for file in (Path("mine.safetensors"), Path("back.safetensors")):
        results |= {f"{file.stem} weights": tensors(file), f"{file.stem} metadata": plain(metadata(file))}
    mine = Path("mine.safetensors")
    return results | {"calibration": content(calibration(mine)), "grid": picture(mine.with_suffix(".png"))}


def paper(name: str) -> dict[str, Any]:
    """The files of one of the paper's experiments."""
    out, n = Path(f"paper-{name}"), 16 if name in ("table1", "table3", "neighbours") else 3
    measuring = ["--features", "features.py:network", "--out", out]
    cli("paper", name, "--run", small(), "-n", n, *measuring)
    return contents(out)


def ablation() -> dict[str, Any]:
    """Table 2: six runs of a few steps."""
    options = "--levels 20 --steps 4 --save-every 4 --sample-every 0 --eval-images 16 --sample-steps 5"
    cli("train", "digits", "--out", "base", *options.split())
    cli("paper", "table2", "--run", "base", "-n", 12, "--features", "features.py:network", "--out", "paper-table2")
    return {name: content(Path("paper-table2", f"table2.{name}")) for name in ("csv", "json")}


def edited(command: str, options: str) -> Any:
    """The picture that an editing command writes."""
    cli(command, "digits", *options.split(), "--out", "edited.png")
    return picture(Path("edited.png"))


def scored() -> dict[str, Any]:
    """The metrics of two sets of synthetic features."""
    draws = np.random.default_rng(0)
    a, b = draws.normal(size=(200, 16)), draws.normal(size=(150, 16)) * 1.1 + 0.1
    return {
        "fid": metrics.frechet_distance(metrics.moments(a), metrics.moments(b)),
        "kid": metrics.kid(a, b, subsets=10, subset_size=50),
        "is": metrics.inception_score(metrics.softmax(a)),
        "pr": metrics.precision_recall(a, b),
        "nearest": metrics.nearest(a, b, 3),
    }


def loaded(source: str, channels: int, cached: int = 1 << 30) -> dict[str, Any]:
    """The images of a source with labels, class names and fingerprint, and the batches of some training steps."""
    results = {}
    for kind, images in zip(
        ("train", "held out"), data.load_pair(source, (12, 10), channels, cache_bytes=cached), strict=True
    ):
        results[kind] = (images.batch(range(len(images))), images.labels, images.class_names, images.fingerprint)
        steps = data.batches(images, 1, 3, 0, 4, workers=0)
        results[f"{kind}, batches"] = list(steps)
    return results


def drawn() -> dict[str, Any]:
    """Random numbers: noise, mixed seeds, the order of images, the levels of a batch and their weights."""
    plan = SCHEDULES[now("cosine")](1000, 1e-4, 0.02)
    draws = noise.per_image([0, 7, 1 << 40], (3, 5, 7))
    how = ("uniform", "stratified", "lognormal", "bound")
    times = {f"times {name}": timesteps.sample(plan, 33, now(name), noise.generator(4, 2), "v") for name in how}
    denoiser, t = open_checkpoint("digits").denoiser, torch.arange(1, 1001)
    weights = {f"weights {name}": losses.weight(denoiser, t, now(name)) for name in ("none", "min_snr", "p2")}
    early = noise.ahead([3, 4], (1, 8, 8), "cpu", [9, 5])
    return {
        "per image": [draws(t) for t in (1, 500, 1000)],
        "normal": noise.normal([1, 2], (4,), 5, 6, 7),
        "ahead": [early(9), early(5)],
        "mix": [noise.mix(), noise.mix(1, 2), noise.mix(-1, 1 << 70)],
        "order": [data.order(100, 3, step, 16) for step in range(9)],
        **times,
        **weights,
    }


def spaced() -> dict[str, Any]:
    """The levels of each spacing for each schedule, and the levels of the spacing `bound` for the digits."""
    results: dict[str, Any] = {}
    for name in ("linear", "quad", "const", "cosine"):
        for kind in ("uniform", "quadratic", "log_snr", "karras"):
            plan = SCHEDULES[now(name)](1000, 1e-4, 0.02)
            results[f"{name}, {kind}"] = [SPACINGS[now(kind)](plan, n, s) for n, s in ((7, None), (5, 400))]
    digits = open_checkpoint("digits")
    return results | {"bound": [sampler_levels(digits, now("ddim"), n, now("bound")) for n in (1, 4, 30)]}


def items() -> dict[str, Callable[[], Any]]:
    """Every item by name, in the order in which they run."""
    results: dict[str, Callable[[], Any]] = {"draws": drawn, "spacings": spaced, "metrics": scored}
    for name in ("linear", "quad", "const", "warmup10", "warmup50", "jsd", "cosine"):
        results[f"schedules/{name}"] = lambda name=name: SCHEDULES[now(name)](1000, 1e-4, 0.02).alpha_bar
    for name in PRESET:
        results[f"presets/{name}"] = lambda name=name: plain(json.loads(json.dumps(to_json(PRESETS[now(name)]))))
    for source in ("photos", "photos.zip", "L", "R", "I"):
        for channels in (1, 3, 4):
            results[f"data/{source} as {channels}"] = partial(loaded, source, channels)
    results["data/photos, decoded late"] = partial(loaded, "photos", 3, 0)
    results["data/digits"] = partial(loaded, "digits", 1)
    for model in MODELS:
        for sampler in SAMPLED:
            results[f"samples/{model}, {sampler}"] = partial(sampled, model, sampler)
        for precision in ("float32", "bf16"):
            results[f"samples/{model}, {precision}"] = partial(sampled, model, "ddim", "--precision", precision)
    for options in (
        "--class 7 --guidance 2 --steps 4", "--class all --steps 4", "--class 1 2 --steps 4 --batch-size 3 --seed 9",
        "--class 3 --guidance 3 --guidance-interval 200,800 --sampler unipc --steps 4", "--clip none --steps 4",
        "--clip 0.9 --steps 4", "--sampler ddim --eta 0.5 --steps 4", "--sampler ddim --sigma-hat --steps 4",
        *(f"--sampler ddim --steps 4 --spacing {kind}" for kind in "uniform quadratic log_snr karras bound".split()),
        *(f"--steps 4 --variance {kind}" for kind in ("fixed_large", "fixed_small", "calibrated")),
    ):  # fmt: skip
        results[f"samples/digits {options}"] = partial(sample_options, options, "sampled.npz")
    results["samples/grid"] = partial(sample_options, "--class all --steps 4", "sampled.png")
    results["samples/folder"] = partial(sample_options, "--steps 4", "sampled")
    results["samples/progressive"] = partial(sample_options, "--steps 15 --progressive", "progressive.png")
    for number, (preset, options, stops) in enumerate(TRAINED):
        changed = options.replace(TINY, "tiny").replace(DIGITS, "")
        results[f"training/{preset} {changed} {stops}"] = partial(trained, f"run{number}", preset, options, stops)
    results["bound"] = bound
    results["calibration"] = lambda: content(calibration(Path(calibrated())))
    for options in ("-n 6 --metrics nll ode --ode-steps 6", "-n 6 --variance calibrated --levels 5 --draws 2"):
        results[f"evaluate/{options}"] = partial(evaluated, calibrated, options)
    quality = "-n 40 --metrics fid is kid pr --features features.py:network --sampler ddim --steps 5"
    results["evaluate/fid is kid pr"] = partial(evaluated, small, quality)
    for model, files, options in DPC:
        results[f"codec/{model} {files} {options}"] = partial(coded, model, files, options)
    for model, files in (("digits", "d0 d1 d2 d3 d4 d5 grey"), ("cifar10_likelihood", "c0 c1 crop")):
        for local in (False, True):
            results[f"archive/{model}{', local' * local}"] = partial(archived, model, files, local)
    results["export"] = exported
    for name in PAPER:
        results[f"paper/{name}"] = partial(paper, name)
    results["paper/table2"] = ablation
    for command, options in (
        ("edit", "d0.png --t 400 -n 3 --steps 5"), ("edit", "d0.png --t 300 --invert 2 --class 7 --steps 5"),
        ("interpolate", "d0.png d1.png -n 4 --steps 6"), ("interpolate", "d0.png d1.png -n 3 --sampler unipc --t 700"),
        ("inpaint", "d0.png mask.png -n 2 --steps 8 --resample 2 --jump 2"),
    ):  # fmt: skip
        results[f"{command}/{options}"] = partial(edited, command, options)
    return results


# -- the record --------------------------------------------------------------------------------------------------------


def about() -> dict[str, Any]:
    """Where a record was made, and from which code."""
    from record import provenance  # a file beside this script

    used = {str(dtype).removeprefix("torch."): kernels.identity(dtype) for dtype in kernels.SOURCES}
    return {
        **provenance(),
        "package": str(Path(ddpm.__file__).parent),
        "kernels": used,
        "model written by": load_codec(MODELS["cifar10_likelihood"]).where.hex(),
    }


def record(out: Path, only: str) -> int:
    """Run all items whose name contains `only`, and write their hashes. Returns 1 if an item failed."""
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")  # the package warns of conversions of images
    hashes: dict[str, str] = {}
    out, start_folder, begun = out.absolute(), os.getcwd(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            prepare()
            assert set(SAMPLERS) == set(map(now, SAMPLED)), "samplers without an item"
            info = about()
            for name, item in items().items():
                if only not in name:
                    continue
                start = time.perf_counter()
                try:
                    value = item()
                    parts = value if isinstance(value, dict) else {"": value}
                    hashes |= {f"{name}: {key}".removesuffix(": "): digest(part) for key, part in parts.items()}
                except Exception as error:
                    hashes[name] = f"error: {type(error).__name__}: {error}"
                    print(f"{name}: {hashes[name]}", file=sys.stderr)
                print(f"{time.perf_counter() - start:6.1f} s  {name}", file=sys.stderr)
        finally:
            os.chdir(start_folder)
    out.write_text(json.dumps({"about": info, "items": hashes}, indent=1) + "\n")
    failed = sum(value.startswith("error: ") for value in hashes.values())
    print(f"{len(hashes)} items, {failed} errors, {time.perf_counter() - begun:.0f} s: {out}", file=sys.stderr)
    return int(failed > 0)


def compare(old: Path, new: Path) -> int:
    """Print the items that differ between two records. Returns 1 if there are any."""
    before, after = (json.loads(path.read_text()) for path in (old, new))
    for key in before["about"].keys() | after["about"].keys():
        if before["about"].get(key) != after["about"].get(key):
            print(f"note: {key}: {before['about'].get(key)} -> {after['about'].get(key)}")
    first, second = before["items"], after["items"]
    wrong = [f"missing: {name}" for name in first if name not in second]
    wrong += [f"new: {name}" for name in second if name not in first]
    for name in first.keys() & second.keys():
        failed = [value for value in (first[name], second[name]) if value.startswith("error: ")]
        if failed or first[name] != second[name]:
            wrong.append(f"{failed[0] if failed else 'differs'}: {name}")
    print(*sorted(wrong), f"{len(first)} items before, {len(second)} after, {len(wrong)} differ", sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record_parser = commands.add_parser("record")
    record_parser.add_argument("out", type=Path)
    record_parser.add_argument("--only", default="", metavar="TEXT", help="only items whose name contains TEXT (all)")
    compare_parser = commands.add_parser("compare")
    compare_parser.add_argument("old", type=Path)
    compare_parser.add_argument("new", type=Path)
    args = parser.parse_args()
    sys.exit(record(args.out, args.only) if args.command == "record" else compare(args.old, args.new))
