"""Read odd but intact pictures, and compare every value with those of Pillow and tifffile.

    pip install tifffile
    python tests/fuzz/odd_pictures.py

The pictures are written by Pillow (every mode that a format takes) and tifffile (depths, byte orders, planes, strips,
compressions, white as zero). A picture must come out within one grey level of the other program's values, scaled by
the levels that the file has, or be refused with one line. pytest does not collect this folder.
"""

import io
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import figures
import record

from ddpm.errors import InputError
from ddpm.files import images

FORMATS = {"WEBP": {"lossless": True}} | {name: {} for name in "PNG BMP GIF PPM TIFF JPEG JPEG2000".split()}
MODES = "1 L LA P PA RGB RGBA RGBX CMYK YCbCr LAB HSV I I;16 I;16B F".split()


def by_pillow(rng: np.random.Generator) -> Iterator[tuple[str, bytes, np.ndarray | None]]:
    """(name, file, the right values uint8 [H, W, 3] or None if Pillow has none)."""
    colour = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    grey16 = rng.integers(0, 65536, (12, 16), np.uint16)
    for mode, (form, options) in itertools.product(MODES, FORMATS.items()):
        try:
            image = Image.fromarray(grey16) if mode.startswith("I") else colour.convert(mode)
            image = image.convert("I") if mode == "I" else image
            image.save(file := io.BytesIO(), form, **options)
            stored = Image.open(io.BytesIO(file.getvalue()))
        except (OSError, ValueError, KeyError, SystemError):
            continue
        if stored.mode.startswith("I"):
            grey = np.asarray(stored).astype(np.float64) * 255 / 65535
            values = np.repeat(np.round(grey).clip(0, 255).astype(np.uint8)[..., None], 3, 2)
        else:
            try:
                flat = stored.convert("RGBA") if "A" in stored.getbands() or "transparency" in stored.info else stored
                white = Image.new("RGBA", flat.size, "white")
                flat = Image.alpha_composite(white, flat) if flat.mode == "RGBA" else flat
                values = np.asarray(flat.convert("RGB"))
            except ValueError:
                values = None
        yield f"Pillow {form} {mode}", file.getvalue(), values


def by_tifffile(rng: np.random.Generator) -> Iterator[tuple[str, bytes, np.ndarray]]:
    """As `by_pillow`, for TIFF files. The values are those that were written, as tifffile reads them back."""
    depths, orders, planes = (np.uint8, np.uint16), "<>", ("contig", "separate")
    for dtype, order, plane, compression, photometric, strips in itertools.product(
        depths, orders, planes, (None, "zlib"), ("minisblack", "miniswhite", "rgb"), (None, 5)
    ):
        shape = (12, 16, 3) if photometric == "rgb" else (12, 16)
        if photometric != "rgb" and plane == "separate":
            continue
        most = np.iinfo(dtype).max
        pixels = rng.integers(0, most + 1, shape, dtype)
        written = np.moveaxis(pixels, -1, 0) if plane == "separate" else pixels
        file = io.BytesIO()
        tifffile.imwrite(
            file, written, byteorder=order, photometric=photometric, compression=compression, rowsperstrip=strips,
            **({"planarconfig": plane} if photometric == "rgb" else {}),
        )  # fmt: skip
        back = tifffile.imread(io.BytesIO(file.getvalue()))
        values = np.round((np.moveaxis(back, 0, -1) if plane == "separate" else back).astype(np.float64) * 255 / most)
        values = 255 - values if photometric == "miniswhite" else values
        values = values if values.ndim == 3 else np.repeat(values[..., None], 3, 2)
        name = f"tifffile {np.dtype(dtype)} {order} {plane} {compression} {photometric} {strips}"
        yield name, file.getvalue(), values.astype(np.uint8)


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    args = parser.parse_args()
    rng, outcomes, wrong, refused = np.random.default_rng(0), Counter[str](), [], []
    for name, data, values in itertools.chain(by_pillow(rng), by_tifffile(rng)):
        source = name.split()[0]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = np.asarray(images.convert(images.read(data, name), 3, name, notes={}))
        except InputError as error:
            outcomes[f"{source}: refused"] += 1
            refused.append(str(error))
            continue
        apart = None if values is None else int(abs(result.astype(int) - values.astype(int)).max())
        if apart is not None and apart <= 1:
            outcomes[f"{source}: within one grey level"] += 1
        else:
            outcomes[f"{source}: WRONG"] += 1
            wrong.append({"name": name, "apart": apart})
            print(name, "apart by", apart, flush=True)
    text = (
        f"{outcomes.total()} odd pictures, read as RGB: {len(wrong)} are more than one grey level from the values of "
        f"Pillow {Image.__version__} and tifffile {tifffile.__version__}.\n\n"
    )
    text += figures.table(["outcome", "pictures"], [[name, f"{n:,}"] for name, n in sorted(outcomes.items())])
    values = {"outcomes": dict(outcomes), "wrong": wrong, "refused": refused}
    record.write("odd-pictures", "Odd pictures", args, values, text)


if __name__ == "__main__":
    main()
