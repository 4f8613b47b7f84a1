"""The codec on test images: bytes beside the model's own bound and beside PNG, WebP and JPEG XL, and seconds.

    python benchmarks/codec.py MODEL --data SOURCE [--images 200] [--parts single archive lossy time]

single    lossless files of one image each, portable: bits/dim by file size, by stage, against L of Eq. 5 of the same
          images from exact draws (variance calibrated); every file is read back by another process, with other threads,
          and by another --python, where there is one with the package and other releases around it
archive   all images in one file: the first ones and the others apart
others    the same images by PNG, WebP and JPEG XL, a file each
lossy     RMSE of every prefix of those files against bytes, beside the bound's own rate and distortion, the paper's
          Table 4, and JPEG, WebP and JPEG XL of the same bytes
time      seconds an image by profile and K, interleaved, and where they go
training  the bound of images that were trained on and of test images, from a few levels of each
photos    256x256 of three photographs that scikit-learn and matplotlib bring, in tiles, portable, the fastest K, read
          back by another process, too

--shape 28x28x1 takes other images than those of the model's own shape; there is no bound of these.

JPEG XL is there where pillow-jxl-plugin is. Each part leaves its figures under --work, and the same command goes on.
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
"""Levels of the bound that all images have a draw of, and one in how many of the others."""
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
    """L of Eq. 5, bits/dim over the images, and L_0 of it, from exact draws, without bias.

    Every one of the first 32 levels, where most bits and their spread are; of the others every 16th, from one on that
    each image draws, for sixteen. Nothing for images of another shape than the model's.
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
    found: dict[str, float] = json.loads(file.read_text())
    return found


def curve(args: argparse.Namespace, images: Tensor) -> list[tuple[float, float]]:
    """From level T on: bytes that x_t has cost by the bound, and the root mean squared error of x0^ from it."""
    denoiser = with_variance(open_checkpoint(args.model), "calibrated").denoiser
    x0 = pixels.to_signal(images)
    with kernels.frozen():
        b = likelihood.vlb(denoiser, x0, per_image(range(len(x0)), x0.shape[1:]))
    rate = torch.cat([b.prior[:, None], b.kl.flip(1)], dim=1).mean(0).cumsum(0) / np.log(2) / 8
    error = b.mse.flip(1).mean(0).sqrt() / pixels.BIN
    return list(zip(rate.tolist(), error.tolist(), strict=True))


def files(args: argparse.Namespace) -> list[bytes]:
    """Lossless portable files of the images, made once."""
    model, images = loaded(args)
    folder = args.work / "files"
    made = []
    for i, image in enumerate(images.permute(0, 2, 3, 1).contiguous().numpy()):
        file = folder / f"{i:04d}.ddpm"
        if not file.exists():
            atomic.write(file, codec.compress(model, image, bits=args.bits))
        made.append(file.read_bytes())
    return made


def read_back(
    args: argparse.Namespace, folder: str, right: np.ndarray[Any, Any], python: str
) -> tuple[int, str, float]:
    """How many files of a folder another process, with other threads and hash seed, reads back exactly as `right`.

    And what releases it has, and its seconds. What was read once is kept.
    """
    code = (
        "import sys, numpy as np, torch; torch.set_num_threads(int(sys.argv[4]))\n"
        "from pathlib import Path; from ddpm import codec; from ddpm.run.compress import load_codec\n"
        "from ddpm.codec import archive, container\n"
        "model, right = load_codec(sys.argv[1]), np.load(sys.argv[2])\n"
        "made = [f.read_bytes() for f in sorted(Path(sys.argv[3]).glob('*.ddpm'))]\n"
        "if container.is_archive(made[0]): found = [x for _, x in archive.decompress(model, *made)]\n"
        "else: found = [codec.decompress(model, data) for data in made]\n"
        "print(sum(np.array_equal(a, b) for a, b in zip(found, right, strict=True)))\n"
        "print(f'Python {sys.version.split()[0]}, numpy {np.__version__}, torch {torch.__version__}')\n"
    )
    where = "here" if python == sys.executable else "elsewhere"
    made = hashlib.sha256(b"".join(f.read_bytes() for f in sorted((args.work / folder).glob("*.ddpm")))).hexdigest()
    about = args.work / f"{folder}-{where}-{made[:16]}.json"
    if about.exists():
        count, releases, seconds = json.loads(about.read_text())
        return count, releases, seconds
    start = time.monotonic()
    file = args.work / f"{folder}.npy"
    np.save(file, right)
    other = "1" if torch.get_num_threads() > 1 else "2"
    words = [python, "-c", code, args.model, str(file), str(args.work / folder), other]
    done = subprocess.run(words, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    count, releases = done.stdout.splitlines()
    found = int(count), releases, time.monotonic() - start
    atomic.write_json(about, found)
    return found


def encoded(image: np.ndarray[Any, Any], kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.squeeze()).save(out, kind, **options)
    return out.getvalue()


def others() -> dict[str, tuple[str, dict[str, Any]]]:
    """Lossless formats: Pillow's name and options at their best."""
    found = {"PNG": ("PNG", {"optimize": True}), "WebP": ("WebP", {"lossless": True, "quality": 100, "method": 6})}
    if importlib.util.find_spec("pillow_jxl"):
        import pillow_jxl  # type: ignore[import-not-found]  # noqa: F401

        found["JPEG XL"] = ("JXL", {"lossless": True, "effort": 9})
    return found


def other_formats(args: argparse.Namespace) -> dict[str, Any]:
    _, images = loaded(args)
    found: dict[str, Any] = {"images": len(images)}
    for name, (kind, options) in others().items():
        plain = [len(encoded(x, kind, **options)) for x in images.permute(0, 2, 3, 1).contiguous().numpy()]
        found[name] = bits_per_dim(np.mean(plain), images)
    return found


def single(args: argparse.Namespace) -> dict[str, Any]:
    model, images = loaded(args)
    made = files(args)
    right = images.permute(0, 2, 3, 1).numpy()
    back = read_back(args, "files", right, sys.executable)[0]
    found: dict[str, Any] = {"images": len(images), "read_back": back, **bound(args)}
    found["bits"] = codec.read_header(made[0])[0].bits
    if args.python:
        found["elsewhere"] = read_back(args, "files", right, args.python)[:2]
    sizes = np.array([len(data) for data in made])
    found["file"] = bits_per_dim(sizes.mean(), images)
    found["standard_error"] = bits_per_dim(sizes.std() / len(sizes) ** 0.5, images)
    headers = [codec.read_header(data) for data in made]
    found["container"] = bits_per_dim(np.mean([begin + h.trailer for h, begin in headers]), images)
    stages = [list(picture.group_costs(model, data)) for data in made[:50]]
    found["pixels"] = np.mean([rows[-1].bits for rows in stages]) / images[0].numel()
    found["groups"] = np.mean([sum(r.bits for r in rows[:-1]) for rows in stages]) / images[0].numel()
    found["restarts"] = sum(h.seed for h, _ in headers)
    return found | {name: value for name, value in other_formats(args).items() if name != "images"}


def archived(args: argparse.Namespace) -> dict[str, Any]:
    model, images = loaded(args)
    right = images.permute(0, 2, 3, 1).contiguous().numpy()
    start = time.monotonic()
    data = archive.compress(model, list(right))
    encode = time.monotonic() - start
    atomic.write(args.work / "archive" / "all.ddpm", data)
    back, _, decode = read_back(args, "archive", right, sys.executable)
    contents, _ = container.read_contents(data)
    rest = (contents.stack - contents.file_bytes) / (contents.pictures - contents.files)
    return {
        "images": len(images), "bytes": len(data), "files": contents.files,
        "whole": bits_per_dim(len(data) / len(images), images), "others": bits_per_dim(rest, images), **bound(args),
        "encode_seconds": encode / len(images), "decode_seconds": decode / len(images), "read_back": back,
    }  # fmt: skip


def rmse(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.mean((a.astype(float) - b) ** 2))


def lossy(args: argparse.Namespace) -> dict[str, Any]:
    """Root mean squared error over all images against bytes, for prefixes of the files and for the others' settings."""
    model, images = loaded(args)
    right = images.permute(0, 2, 3, 1).contiguous().numpy()[: args.lossy_images]
    made = files(args)[: len(right)]
    ours = []
    for share in SHARES:
        cut = [max(codec.read_header(data)[1], round(share * len(data))) for data in made]
        shown = [codec.decompress(model, data, at=n) for data, n in zip(made, cut, strict=True)]
        ours.append((np.mean(cut), np.mean([rmse(a, b) for a, b in zip(shown, right, strict=True)]) ** 0.5))
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
            error = np.mean([rmse(a.reshape(b.shape), b) for a, b in zip(shown, right, strict=True)])
            points.append((float(np.mean([len(d) for d in data])), float(error) ** 0.5))
        curves[name] = points
    ends = [list(codec.pictures(model, data)) for data in made[:8]]
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
    if model.batches:  # else several do not share the network's calls
        some = list(images[:16].permute(0, 2, 3, 1).contiguous().numpy())
        fast = {"bits": min(model.tables), "local": True}
        cases["encode, one by one"] = lambda: [codec.compress(model, x, **fast) for x in some]
        cases["encode, together"] = lambda: list(codec.compress_each(model, some, **fast))
    found = timing.interleave(cases, args.repeats, args.seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": found,
        "spent": spent,
        "bits_per_dim_of_this_image": sizes,
        "peak_MiB": peak,
        "groups": {str(bits): len(tables.groups) for bits, tables in model.tables.items()},
    }


def training(args: argparse.Namespace) -> dict[str, Any]:
    """A model that knows its training images by heart would code them in fewer bits than others."""
    found = with_variance(open_checkpoint(args.model), "calibrated")
    c, h, w = found.preset.shape
    alone = Processes(0, 1, torch.device("cpu"))
    return {
        split: evaluate.nll_sampled(found, datasets.load(args.data, (h, w), c, split=split), 20, alone, count)
        for split, count in (("test", 500), ("train", 1000))
    }


def photographs() -> dict[str, np.ndarray[Any, Any]]:
    """The middle 256x256 of each, uint8."""
    from matplotlib import cbook
    from sklearn.datasets import load_sample_image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        found = {"grace_hopper": np.asarray(Image.open(file).convert("RGB"))}
    found |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    corners = {name: ((x.shape[0] - 256) // 2, (x.shape[1] - 256) // 2) for name, x in found.items()}
    return {name: np.ascontiguousarray(found[name][y : y + 256, x : x + 256]) for name, (y, x) in corners.items()}


def photos(args: argparse.Namespace) -> dict[str, Any]:
    model, _ = loaded(args)
    rows: dict[str, Any] = {}
    some = photographs()
    for i, (name, image) in enumerate(some.items()):
        start = time.monotonic()
        data = codec.compress(model, image, bits=min(model.tables))
        rows[name] = {"ours": 8 * len(data) / image.size, "encode_seconds": time.monotonic() - start}
        atomic.write(args.work / "photos" / f"{i}.ddpm", data)
        for other, (kind, options) in others().items():
            rows[name][other] = 8 * len(encoded(image, kind, **options)) / image.size
    back, _, seconds = read_back(args, "photos", np.stack(list(some.values())), sys.executable)
    return {"rows": rows, "read_back": back, "decode_seconds": seconds / len(some)}


def report(found: dict[str, Any], args: argparse.Namespace) -> str:
    text = []
    if s := found.get("single"):
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
    if a := found.get("archive"):
        over = a["others"] / a["bound"] - 1
        text += [
            f"\n## Archive of {a['images']} images, portable profile\n",
            f"{a['whole']:.3f} bits/dim by file size. {a['files']} of them are files of their own; the others take "
            f"{a['others']:.3f}, {over:+.1%} against the bound of {a['bound']:.3f}. {a['encode_seconds']:.2f} s an "
            f"image to write, {a['decode_seconds']:.2f} s to read. {a['read_back']} read back exactly by another "
            "process, with another number of threads and hash seed.",
        ]
    if o := found.get("others"):
        sizes = ", ".join(f"{name} {value:.3f}" for name, value in o.items() if name != "images")
        text += [f"\nThe first {o['images']} images by others, bits/dim, a file each: {sizes}."]
    if curve := found.get("lossy"):
        rows = [[name, f"{size:.0f}", f"{error:.1f}"] for name, c in curve["curves"].items() for size, error in c]
        text += [f"\n## RMSE against bytes, {curve['images']} images\n", figures.table(["", "bytes", "RMSE"], rows)]
    if t := found.get("training"):
        test, train = t["test"], t["train"]
        more = test["bits_per_dim"] - train["bits_per_dim"]
        error = (test["standard_error"] ** 2 + train["standard_error"] ** 2) ** 0.5
        text += [
            "\n## Images that were trained on\n",
            f"The bound of {train['count']} training images is {train['bits_per_dim']:.3f} bits/dim, of "
            f"{test['count']} test images {test['bits_per_dim']:.3f}: {more:.3f} ± {error:.3f} more.",
        ]
    if p := found.get("photos"):
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
    if t := found.get("time"):
        rows = []
        for name, bits in t["bits_per_dim_of_this_image"].items():
            spent = [str(figures.spread(t["seconds"][f"{way} {name}"])) for way in ("encode", "decode")]
            rows.append([name, t["groups"][name.split()[-1]], *spent, f"{bits:.3f}"])
        header = ["", "groups", "encode, s", "decode, s", "bits/dim of this image"]
        text += ["\n## Seconds a picture\n", figures.table(header, rows), f"\nPeak memory {t['peak_MiB']:.0f} MiB."]
        if "encode, together" in t["seconds"]:
            faster = timing.ratio(t["seconds"], "encode, together", "encode, one by one")
            text += [f"\n16 pictures that share the network's calls, local, the fastest K: {faster} times as fast."]
        parts = list(dict.fromkeys(part for seconds in t["spent"].values() for part in seconds))
        rows = [[name, *(f"{seconds.get(part, 0):.2f}" for part in parts)] for name, seconds in t["spent"].items()]
        text += ["\nWhere they go, in one more run of each:\n", figures.table(["seconds", *parts], rows)]
    return "\n".join(text)


def main() -> None:
    parser = record.parser(__doc__, repeats=5, seconds=0)
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="SOURCE with a test split")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--lossy-images", type=int, default=50)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--bits", type=int, help="K of the single files (the most)")
    parser.add_argument("--shape", metavar="HxWxC", help="of the images, where not the model's")
    parser.add_argument("--python", metavar="PATH", help="another interpreter with ddpm, to read the files back")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "cache" / "codec", help="(%(default)s)")
    parser.add_argument("--name", default="codec", help="of the record (%(default)s)")
    args = parser.parse_args()
    about = {k: str(v) for k, v in vars(args).items() if k not in ("parts", "work", "name", "out")}
    record.same_settings(args.work, about | {"commit": record.commit()})
    what = {"single": single, "archive": archived, "lossy": lossy, "time": timed}
    what |= {"training": training, "photos": photos, "others": other_formats}
    with record.measuring(args):
        for part in args.parts:
            file = args.work / f"{part}.json"
            if not file.exists():
                print(part, file=sys.stderr, flush=True)
                atomic.write_json(file, what[part](args))
    found = {p: json.loads((args.work / f"{p}.json").read_text()) for p in PARTS if (args.work / f"{p}.json").exists()}
    name = args.name
    del args.work, args.name
    path = record.write(
        name,
        "The codec: bytes, errors and seconds",
        args,
        {"results": found},
        report(found, args),
        repeated="time" in found,
    )
    if "lossy" in found:
        curves = {label: list(zip(*points, strict=True)) for label, points in found["lossy"]["curves"].items()}
        panel = plots.Panel("Error against bytes", curves, "bytes an image", "RMSE, grey levels", log_x=True)
        atomic.write(path.with_suffix(".png"), plots.draw([panel]))


if __name__ == "__main__":
    main()
