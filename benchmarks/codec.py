"""Measure the codec on test images: bytes beside the model's bound and beside PNG, WebP and JPEG XL, and seconds.

    python benchmarks/codec.py MODEL --data SOURCE [--images 200] [--parts single archive lossy time]

The parts:

single    Lossless portable files of one image each: bits/dim by file size and by stage, beside L of Eq. 5 for the same
          images (exact draws, calibrated variance). Another process with another number of threads reads every file
          back. With --python, another installation of the package reads them too.
archive   All images in one file. The first images, which are files of their own, and the others are counted apart.
others    The same images as PNG, WebP and JPEG XL, one file each.
lossy     RMSE of prefixes of the lossless files against bytes, beside the rate and distortion of the bound, the paper's
          Table 4, and JPEG, WebP and JPEG XL.
time      Seconds per image for each profile and K, measured in turns, and the share of each stage.
training  The bound of training images and of test images, from a few levels per image.
photos    256x256 pixels of three photographs from scikit-learn and matplotlib, in tiles, portable, with the fastest K.

--shape 28x28x1 takes images of another shape than the model's, for which there is no bound. JPEG XL needs
pillow-jxl-plugin. Finished parts stay under --work, and the same command resumes.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import figures
import numpy as np
import record
import timing
import torch
from PIL import Image
from torch import Tensor

from ddpm import codec, kernels, likelihood, noise, pixels
from ddpm.codec import archive, container, picture, progressive, residual, reverse
from ddpm.files import atomic, plots
from ddpm.files import data as datasets
from ddpm.files.models import with_variance
from ddpm.files.opening import open_checkpoint
from ddpm.noise import per_image
from ddpm.run import evaluate
from ddpm.run.compress import load_codec
from ddpm.run.paper import TABLE_4
from ddpm.run.processes import Processes

PARTS = ["single", "archive", "others", "lossy", "time", "training", "photos"]
ALL, STRIDE = 32, 16
"""`bound` draws each of the first ALL levels for every image, and of the others one in STRIDE."""
PLACES = [
    (progressive.Predictor, "__call__", "network"), (reverse, "_log_weights", "weighing"),
    (reverse, "draw", "chosen rows"), (residual, "walk", "pixels"), (picture, "_written", "bytes"),
    (progressive, "get_group", "bytes"),
]  # fmt: skip
SHARES = np.array([0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0])  # of a lossless file


def loaded(args: argparse.Namespace) -> tuple[codec.Model, Tensor]:
    """The model and its test images uint8 [n, C, H, W]."""
    return _loaded(args.model, args.data, args.images, args.shape)


@cache
def _loaded(path: str, source: str, images: int, shape: str | None) -> tuple[codec.Model, Tensor]:
    model = load_codec(path)
    c, h, w = model.shape
    if shape:
        h, w, c = map(int, shape.split("x"))
    held_out = datasets.load(source, (h, w), c, split="test")
    return model, held_out.batch(torch.arange(min(images, len(held_out))))


def bits_per_dim(size: float, images: Tensor) -> float:
    return 8 * size / images[0].numel()


def bound(args: argparse.Namespace) -> dict[str, float]:
    """An unbiased estimate of L, L_0 and L_T (Eq. 5), bits/dim; {} for images of another shape than the model's.

    Each image gets a draw at each of the first 32 levels, which have most of the bits and of their spread. Of the other
    levels it gets every 16th, from a random one on, with weight 16.
    """
    model, images = loaded(args)
    file = args.work / "bound.json"
    if images.shape[1:] != model.shape:
        return {}
    if not file.exists():
        denoiser = with_variance(open_checkpoint(args.model), "calibrated").denoiser
        T, sums, generator = denoiser.schedule.T, torch.zeros(3, dtype=torch.float64), noise.generator(0)
        with kernels.frozen(), torch.no_grad():
            for x0 in pixels.to_signal(images).split(8):
                low = torch.arange(1, min(ALL, T) + 1).expand(len(x0), -1)
                high = torch.arange(ALL + 1, T + STRIDE, STRIDE) + torch.randint(
                    STRIDE, (len(x0), 1), generator=generator
                )
                t, weight = torch.cat([low, high], 1), torch.cat([torch.ones_like(low), STRIDE * (high <= T)], 1)
                eps = torch.randn(*t.shape, *x0.shape[1:], generator=generator)
                terms = likelihood.sampled_terms(denoiser, x0, t.clamp(max=T), eps)
                prior = likelihood.prior(denoiser, x0.double())
                sums += torch.stack([(terms * weight).sum() + prior.sum(), terms[:, 0].sum(), prior.sum()])
        values = sums / images.numel() / np.log(2)
        atomic.write_json(file, dict(zip(("bound", "L_0", "L_T"), values.tolist(), strict=True)))
    result: dict[str, float] = json.loads(file.read_text())
    return result


def curve(args: argparse.Namespace, images: Tensor) -> list[tuple[float, float]]:
    """For each level from T down: the cost of x_t by the bound in bytes, and the RMSE of x0^ in grey levels."""
    denoiser = with_variance(open_checkpoint(args.model), "calibrated").denoiser
    x0 = pixels.to_signal(images)
    with kernels.frozen():
        b = likelihood.vlb(denoiser, x0, per_image(range(len(x0)), x0.shape[1:]))
    rate = torch.cat([b.prior[:, None], b.kl.flip(1)], dim=1).mean(0).cumsum(0) / np.log(2) / 8
    error = b.mse.flip(1).mean(0).sqrt() / pixels.BIN
    return list(zip(rate.tolist(), error.tolist(), strict=True))


def files(args: argparse.Namespace) -> list[bytes]:
    """Lossless portable files of the images, which are kept under --work."""
    model, images = loaded(args)
    folder = args.work / "files"
    contents = []
    for i, image in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
        file = folder / f"{i:04d}.ddpm"
        if not file.exists():
            atomic.write(file, codec.compress(model, image, bits=args.bits))
        contents.append(file.read_bytes())
    return contents


def read_back(
    args: argparse.Namespace, folder: str, right: np.ndarray[Any, Any], python: str
) -> tuple[int, str, float]:
    """Read the files of a folder in another process, with another number of threads and another hash seed.

    Returns how many images equal `right`, the releases of the process's packages, and its seconds. Results are kept
    under --work.
    """
    code = (
        "import sys, numpy as np, torch; torch.set_num_threads(int(sys.argv[4]))\n"
        "from pathlib import Path; from ddpm import codec; from ddpm.run.compress import load_codec\n"
        "from ddpm.codec import archive, container\n"
        "model, right = load_codec(sys.argv[1]), np.load(sys.argv[2])\n"
        "files = [f.read_bytes() for f in sorted(Path(sys.argv[3]).glob('*.ddpm'))]\n"
        "if container.is_archive(files[0]): images = [x for _, x in archive.decompress(model, *files)]\n"
        "else: images = [codec.decompress(model, data) for data in files]\n"
        "print(sum(np.array_equal(a, b) for a, b in zip(images, right, strict=True)))\n"
        "print(f'Python {sys.version.split()[0]}, numpy {np.__version__}, torch {torch.__version__}')\n"
    )
    where = "here" if python == sys.executable else "elsewhere"
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in sorted((args.work / folder).glob("*.ddpm")))).hexdigest()
    about = args.work / f"{folder}-{where}-{digest[:16]}.json"
    if about.exists():
        count, releases, seconds = json.loads(about.read_text())
        return count, releases, seconds
    start = time.monotonic()
    file = args.work / f"{folder}.npy"
    np.save(file, right)
    other = "1" if torch.get_num_threads() > 1 else "2"
    words = [python, "-c", code, args.model, str(file), str(args.work / folder), other]
    process = subprocess.run(
        words, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    count, releases = process.stdout.splitlines()
    result = int(count), releases, time.monotonic() - start
    atomic.write_json(about, result)
    return result


def encoded(image: np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.squeeze()).save(out, kind, **options)
    return out.getvalue()


def others() -> dict[str, tuple[str, dict[str, Any]]]:
    """Lossless formats: Pillow's name, and the options that give the smallest files."""
    formats = {"PNG": ("PNG", {"optimize": True}), "WebP": ("WebP", {"lossless": True, "quality": 100, "method": 6})}
    if importlib.util.find_spec("pillow_jxl"):
        import pillow_jxl  # type: ignore[import-not-found]  # noqa: F401

        formats["JPEG XL"] = ("JXL", {"lossless": True, "effort": 9})
    return formats


def other_formats(args: argparse.Namespace) -> dict[str, Any]:
    _, images = loaded(args)
    result: dict[str, Any] = {"images": len(images)}
    for name, (kind, options) in others().items():
        sizes = [len(encoded(x, kind, **options)) for x in images.permute(0, 2, 3, 1).contiguous().numpy()]
        result[name] = bits_per_dim(np.mean(sizes), images)
    return result


def single(args: argparse.Namespace) -> dict[str, Any]:
    model, images = loaded(args)
    lossless = files(args)
    right = images.permute(0, 2, 3, 1).numpy()
    exact = read_back(args, "files", right, sys.executable)[0]
    result: dict[str, Any] = {"images": len(images), "read_back": exact, **bound(args)}
    result["bits"] = codec.read_header(lossless[0])[0].bits
    if args.python:
        result["elsewhere"] = read_back(args, "files", right, args.python)[:2]
    sizes = np.array([len(data) for data in lossless])
    result["file"] = bits_per_dim(sizes.mean(), images)
    result["standard_error"] = bits_per_dim(sizes.std() / len(sizes) ** 0.5, images)
    headers = [codec.read_header(data) for data in lossless]
    result["container"] = bits_per_dim(np.mean([begin + h.trailer for h, begin in headers]), images)
    stages = [list(picture.group_costs(model, data)) for data in lossless[:50]]
    result["pixels"] = np.mean([rows[-1].bits for rows in stages]) / images[0].numel()
    result["groups"] = np.mean([sum(r.bits for r in rows[:-1]) for rows in stages]) / images[0].numel()
    result["restarts"] = sum(h.seed for h, _ in headers)
    return result | {name: value for name, value in other_formats(args).items() if name != "images"}


def archived(args: argparse.Namespace) -> dict[str, Any]:
    model, images = loaded(args)
    right = images.permute(0, 2, 3, 1).contiguous().numpy()
    start = time.monotonic()
    data = archive.compress(model, list(right))
    encode = time.monotonic() - start
    atomic.write(args.work / "archive" / "all.ddpm", data)
    exact, _, decode = read_back(args, "archive", right, sys.executable)
    contents, _ = container.read_contents(data)
    rest = (contents.stack - contents.file_bytes) / (contents.pictures - contents.files)
    return {
        "images": len(images), "bytes": len(data), "files": contents.files,
        "whole": bits_per_dim(len(data) / len(images), images), "others": bits_per_dim(rest, images), **bound(args),
        "encode_seconds": encode / len(images), "decode_seconds": decode / len(images), "read_back": exact,
    }  # fmt: skip


def squared_error(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """The mean squared error of two images."""
    return float(np.mean((a.astype(float) - b) ** 2))


def lossy(args: argparse.Namespace) -> dict[str, Any]:
    """RMSE over all images against bytes, for prefixes of the files and for the qualities of other formats."""
    model, images = loaded(args)
    right = images.permute(0, 2, 3, 1).contiguous().numpy()[: args.lossy_images]
    lossless = files(args)[: len(right)]
    ours = []
    for share in SHARES:
        cut = [max(codec.read_header(data)[1], round(share * len(data))) for data in lossless]
        shown = [codec.decompress(model, data, at=n) for data, n in zip(lossless, cut, strict=True)]
        ours.append((np.mean(cut), np.mean([squared_error(a, b) for a, b in zip(shown, right, strict=True)]) ** 0.5))
    curves: dict[str, list[tuple[float, float]]] = {"ours": ours}
    if images.shape[1:] == model.shape:
        limit = curve(args, images[: len(right)])
        rates = [rate for rate, _ in limit]
        wanted = [min(range(len(rates)), key=lambda i: abs(rates[i] - size)) for size, _ in ours]
        curves["the bound of this model"] = [limit[i] for i in sorted(set(wanted))]
    if right.shape[1:] == (32, 32, 3):
        curves["the paper's Table 4, a bound"] = [(rate * right[0].size / 8, error) for rate, error in TABLE_4.values()]
    kinds = {"JPEG": "JPEG", "WebP": "WebP"} | ({"JPEG XL": "JXL"} if "JPEG XL" in others() else {})
    for name, kind in kinds.items():
        points = []
        for quality in (1, 5, 10, 20, 35, 50, 70, 85, 95):
            data = [encoded(x, kind, quality=quality) for x in right]
            mode = "RGB" if right.shape[3] == 3 else "L"
            shown = [np.asarray(Image.open(io.BytesIO(d)).convert(mode)) for d in data]
            error = np.mean([squared_error(a.reshape(b.shape), b) for a, b in zip(shown, right, strict=True)])
            points.append((float(np.mean([len(d) for d in data])), float(error) ** 0.5))
        curves[name] = points
    ends = [list(codec.pictures(model, data)) for data in lossless[:8]]
    strip = [np.stack([seen[round(s * (len(seen) - 1))].image for s in np.linspace(0, 1, 12)]) for seen in ends]
    np.save(args.work / "strip.npy", np.concatenate(strip))
    return {"images": len(right), "curves": curves}


def timed(args: argparse.Namespace) -> dict[str, Any]:
    model, images = loaded(args)
    image = images[0].permute(1, 2, 0).contiguous().numpy()
    cases: dict[str, timing.Case] = {}
    sizes = {}
    for local in (False, True):
        for bits in sorted(model.tables):
            name = f"{'local' if local else 'portable'} K {bits}"
            data = codec.compress(model, image, bits=bits, local=local)
            sizes[name] = bits_per_dim(len(data), images)
            cases[f"encode {name}"] = lambda bits=bits, local=local: codec.compress(
                model, image, bits=bits, local=local
            )  # type: ignore[misc]
            cases[f"decode {name}"] = lambda data=data: codec.decompress(model, data)  # type: ignore[misc]
    spent = {}
    for name, case in cases.items():
        parts = timing.Parts()
        with parts.timing(*PLACES), parts("the rest"):
            case()
        spent[name] = parts.seconds
    if model.batches:  # otherwise pictures do not share network calls
        several = list(images[:16].permute(0, 2, 3, 1).contiguous().numpy())
        fast = {"bits": min(model.tables), "local": True}
        cases["encode, one by one"] = lambda: [codec.compress(model, x, **fast) for x in several]
        cases["encode, together"] = lambda: list(codec.compress_each(model, several, **fast))
    seconds = timing.interleave(cases, args.repeats, args.seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": seconds,
        "spent": spent,
        "bits_per_dim_of_this_image": sizes,
        "peak_MiB": peak,
        "groups": {str(bits): len(tables.groups) for bits, tables in model.tables.items()},
    }


def training(args: argparse.Namespace) -> dict[str, Any]:
    """The bounds of test and training images. A model that has memorised its training images needs fewer bits there."""
    checkpoint = with_variance(open_checkpoint(args.model), "calibrated")
    c, h, w = checkpoint.preset.shape
    alone = Processes(0, 1, torch.device("cpu"))
    return {
        split: evaluate.nll_sampled(checkpoint, datasets.load(args.data, (h, w), c, split=split), 20, alone, count)
        for split, count in (("test", 500), ("train", 1000))
    }


def photographs() -> dict[str, np.ndarray[Any, Any]]:
    """The middle 256x256 pixels of three photographs by name, uint8 [256, 256, 3]."""
    from matplotlib import cbook
    from sklearn.datasets import load_sample_image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        images = {"grace_hopper": np.asarray(Image.open(file).convert("RGB"))}
    images |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    corners = {name: ((x.shape[0] - 256) // 2, (x.shape[1] - 256) // 2) for name, x in images.items()}
    return {name: np.ascontiguousarray(images[name][y : y + 256, x : x + 256]) for name, (y, x) in corners.items()}


def photos(args: argparse.Namespace) -> dict[str, Any]:
    model, _ = loaded(args)
    rows: dict[str, Any] = {}
    images = photographs()
    for i, (name, image) in enumerate(images.items()):
        start = time.monotonic()
        data = codec.compress(model, image, bits=min(model.tables))
        rows[name] = {"ours": 8 * len(data) / image.size, "encode_seconds": time.monotonic() - start}
        atomic.write(args.work / "photos" / f"{i}.ddpm", data)
        for other, (kind, options) in others().items():
            rows[name][other] = 8 * len(encoded(image, kind, **options)) / image.size
    exact, _, seconds = read_back(args, "photos", np.stack(list(images.values())), sys.executable)
    return {"rows": rows, "read_back": exact, "decode_seconds": seconds / len(images)}


def report(results: dict[str, Any], args: argparse.Namespace) -> str:
    text = []
    if s := results.get("single"):
        limit, over = [], []
        if "bound" in s:
            limit = [
                ["bound (exact draws, calibrated variance)", f"{s['bound']:.3f}"],
                ["of it L_0", f"{s['L_0']:.3f}"],
            ]
            over = [["over the bound", f"{s['file'] / s['bound'] - 1:.1%}"]]
        read = f"{s['read_back']} of {s['images']} read back exactly by another process with another number of threads"
        if "elsewhere" in s:
            count, releases = s["elsewhere"]
            read += f"; {count} by another installation, {releases}"
        text += [
            f"## Lossless files of one image, {s['images']} images, K = {s['bits']}\n",
            f"{read}.\n",
            figures.table(
                ["bits/dim", ""],
                [*limit, ["**our file**", f"**{s['file']:.3f}** ± {s['standard_error']:.3f}"],
                 ["of it groups", f"{s['groups']:.3f}"], ["of it pixels", f"{s['pixels']:.3f}"],
                 ["of it header and checksums", f"{s['container']:.3f}"], *over,
                 *[[name, f"{s[name]:.3f}"] for name in ("PNG", "WebP", "JPEG XL") if name in s]],
            ),
        ]  # fmt: skip
    if a := results.get("archive"):
        over = a["others"] / a["bound"] - 1
        text += [
            f"\n## Archive of {a['images']} images, portable profile\n",
            f"{a['whole']:.3f} bits/dim by file size. {a['files']} of them are files of their own; the others take "
            f"{a['others']:.3f}, {over:+.1%} against the bound of {a['bound']:.3f}. {a['encode_seconds']:.2f} s per "
            f"image to write, {a['decode_seconds']:.2f} s to read. {a['read_back']} read back exactly by another "
            "process, with another number of threads and hash seed.",
        ]
    if o := results.get("others"):
        sizes = ", ".join(f"{name} {value:.3f}" for name, value in o.items() if name != "images")
        text += [f"\nThe first {o['images']} images by others, bits/dim, a file each: {sizes}."]
    if curve := results.get("lossy"):
        rows = [[name, f"{size:.0f}", f"{error:.1f}"] for name, c in curve["curves"].items() for size, error in c]
        text += [f"\n## RMSE against bytes, {curve['images']} images\n", figures.table(["", "bytes", "RMSE"], rows)]
    if t := results.get("training"):
        test, train = t["test"], t["train"]
        more = test["bits_per_dim"] - train["bits_per_dim"]
        error = (test["standard_error"] ** 2 + train["standard_error"] ** 2) ** 0.5
        text += [
            "\n## Images that were trained on\n",
            f"The bound of {train['count']} training images is {train['bits_per_dim']:.3f} bits/dim, of "
            f"{test['count']} test images {test['bits_per_dim']:.3f}: {more:.3f} ± {error:.3f} more.",
        ]
    if p := results.get("photos"):
        names = [name for name in ("ours", "PNG", "WebP", "JPEG XL") if name in next(iter(p["rows"].values()))]
        rows = [
            [name, *(f"{row[n]:.3f}" for n in names), f"{row['encode_seconds']:.0f}"] for name, row in p["rows"].items()
        ]
        text += [
            "\n## Photographs of 256x256, as 64 tiles, portable profile, the fastest K\n",
            f"{p['read_back']} of {len(rows)} read back exactly by another process with another number of threads, "
            f"{p['decode_seconds']:.0f} s each.\n",
            figures.table(["bits/dim", *names, "encode, s"], rows),
        ]
    if t := results.get("time"):
        rows = []
        for name, bits in t["bits_per_dim_of_this_image"].items():
            spent = [str(figures.spread(t["seconds"][f"{way} {name}"])) for way in ("encode", "decode")]
            rows.append([name, t["groups"][name.split()[-1]], *spent, f"{bits:.3f}"])
        header = ["", "groups", "encode, s", "decode, s", "bits/dim of this image"]
        text += ["\n## Seconds per picture\n", figures.table(header, rows), f"\nPeak memory {t['peak_MiB']:.0f} MiB."]
        if "encode, together" in t["seconds"]:
            faster = timing.ratio(t["seconds"], "encode, together", "encode, one by one")
            text += [f"\n16 pictures that share the network's calls, local, the fastest K: {faster} times as fast."]
        parts = list(dict.fromkeys(part for seconds in t["spent"].values() for part in seconds))
        rows = [[name, *(f"{seconds.get(part, 0):.2f}" for part in parts)] for name, seconds in t["spent"].items()]
        text += ["\nSeconds by stage, in one more run of each:\n", figures.table(["seconds", *parts], rows)]
    return "\n".join(text)


def main() -> None:
    parser = record.parser(__doc__, repeats=5, seconds=0)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="SOURCE with a test split")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--lossy-images", type=int, default=50)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--bits", type=int, help="K of the single files (the largest)")
    parser.add_argument("--shape", metavar="HxWxC", help="shape of the images, if it is not the model's")
    parser.add_argument("--python", metavar="PATH", help="another interpreter with ddpm that reads the files back")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(__file__).parent / "cache" / "codec",
        help="folder of finished parts (%(default)s)",
    )
    parser.add_argument("--name", default="codec", help="name of the record (%(default)s)")
    args = parser.parse_args()
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("parts", "work", "name", "out")}
    record.same_settings(args.work, settings | {"commit": record.commit()})
    functions = {"single": single, "archive": archived, "lossy": lossy, "time": timed}
    functions |= {"training": training, "photos": photos, "others": other_formats}
    with record.measuring(args):
        for part in args.parts:
            file = args.work / f"{part}.json"
            if not file.exists():
                print(part, file=sys.stderr, flush=True)
                atomic.write_json(file, functions[part](args))
    results = {
        p: json.loads((args.work / f"{p}.json").read_text()) for p in PARTS if (args.work / f"{p}.json").exists()
    }
    name = args.name
    del args.work, args.name
    path = record.write(
        name,
        "The codec: bytes, errors and seconds",
        args,
        {"results": results},
        report(results, args),
        repeated="time" in results,
    )
    if "lossy" in results:
        curves = {label: list(zip(*points, strict=True)) for label, points in results["lossy"]["curves"].items()}
        panel = plots.Panel("Error against bytes", curves, "bytes per image", "RMSE, grey levels", log_x=True)
        atomic.write(path.with_suffix(".png"), plots.draw([panel]))


if __name__ == "__main__":
    main()
