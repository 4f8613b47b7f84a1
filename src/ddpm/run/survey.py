"""What training would see of a source of images: counts, sizes, kinds, conversions and faults. Nothing is trained."""

import statistics
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ddpm.errors import InputError
from ddpm.files import arrays, data
from ddpm.files import images as pictures
from ddpm.presets import Preset

_SHEET = 24
"""Images of the contact sheet, in rows of `_COLUMNS`."""
_COLUMNS = 8
_NAMED = 20
"""Faults that are named; the others are counted."""


@dataclass(frozen=True)
class Survey:
    """What was found.

    about  plain JSON values; sizes, kinds, conversions, faults and speed are those of the images that were looked at
    line   the line that training says of the source
    sheet  uint8 [H, W, 3]: a row of images as they are, and below it the same images as training sees them, and so on;
           None if no image could be read
    """

    about: dict[str, Any]
    line: str
    sheet: pictures.Pixels | None


def survey(source: str, preset: Preset, most: int = 400) -> Survey:
    """Look at a source with the size, channels and columns of `preset`; at most `most` images are decoded.

    The images that are looked at are spread evenly over those to train on. Raises InputError for a source that training
    would refuse, except for bad images, which are named.

    >>> from ddpm.presets import PRESETS
    >>> found = survey("digits", PRESETS["digits"], 100)
    >>> found.about["train"], found.about["looked_at"], found.about["kinds"]
    (1500, 100, {'L': 100})
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the same is in the result
        settings = {**data.settings_of(preset), "skip_bad": True, "on_demand": True}
        train, held_out = data.load_pair(source, preset.size, preset.channels, **settings)
    n = len(train)
    rows = train.rows[torch.arange(min(n, most)) * n // min(n, most)].tolist()
    begun = time.perf_counter()
    pixels, faults, notes = train.decoder.decode(rows)
    seconds = time.perf_counter() - begun
    heights, widths, kinds = list[int](), list[int](), Counter[str]()
    before, after = list[pictures.Pixels](), list[pictures.Pixels]()
    wanted = set(range(0, len(rows), -(-len(rows) // _SHEET)))
    for k, row in enumerate(rows):
        try:
            name = train.decoder.encoded.name(row)
            image, kind = _read(next(train.decoder.encoded.fetch([row])), name, train.decoder.form)
        except InputError:
            continue  # it is among the faults
        heights.append(image.height if isinstance(image, Image.Image) else image.shape[0])
        widths.append(image.width if isinstance(image, Image.Image) else image.shape[1])
        kinds[kind] += 1
        if k in wanted and k not in faults:
            pair = _pair(image, pixels[k], arrays.view_of(preset, train.values))
            before.append(pair[0])
            after.append(pair[1])
    labels = None if train.labels is None else Counter(train.labels.tolist())
    about = {
        "source": source,
        "splits": list(train.splits),
        "train": n,
        "held_out": len(held_out),
        "held_out_of": held_out.split.removeprefix("held out of "),
        "classes": None if labels is None else {name: labels[i] for i, name in enumerate(train.class_names or ())},
        "left_out": dict(train.left_out),
        "looked_at": len(rows),
        "height": _spread(heights),
        "width": _spread(widths),
        "kinds": dict(kinds.most_common()),
        "fitted": f"{preset.size[0]}x{preset.size[1]}, channels {preset.channels}, {train.decoder.form.values}",
        "conversions": {what: {"images": count, "first": first} for what, (first, count) in notes.items()},
        "bad": len(faults),
        "faults": [faults[k] for k in sorted(faults)][:_NAMED],
        "images_per_second": len(rows) / max(seconds, 1e-9),
    }
    return Survey(about, data.describe(train, held_out), _sheet(before, after))


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _read(encoded: Any, name: str, form: data.Form) -> tuple[Image.Image | NDArray[Any], str]:
    """An image as it is, and its kind in words: Pillow's mode, or the type and the number of channels of an array.

    Raises InputError if it cannot be read.
    """
    if isinstance(encoded, InputError):
        raise encoded
    if not form.is_picture:
        array = arrays.read(encoded, name, form.pages)
        return array, f"{array.dtype} of {array.shape[2]} channel{'s' * (array.shape[2] != 1)}"
    image = data.decoded(encoded, name)
    notes = [" of more than 8 bits"] if image.info.get("deep") else []
    notes += [" with several pictures"] if image.info.get("several") else []
    return image, image.mode + ",".join(notes)


def _pair(
    image: Image.Image | NDArray[Any], fitted: NDArray[Any], view: arrays.View
) -> tuple[pictures.Pixels, pictures.Pixels]:
    """Two tiles uint8 [H, W, 3] of one size: the whole image on white, and its pixels [C, H, W] as they are fitted."""
    factor = -(-64 // min(fitted.shape[1:]))
    seen = _colours(_picture(fitted.transpose(1, 2, 0), view))
    shown = np.asarray(seen).repeat(factor, axis=0).repeat(factor, axis=1)
    whole = _colours(image if isinstance(image, Image.Image) else _picture(image, view))
    enlarged = whole.width < shown.shape[1] and whole.height < shown.shape[0]
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.BICUBIC
    tile = ImageOps.pad(whole, (shown.shape[1], shown.shape[0]), method, color="white")
    return np.asarray(tile, np.uint8), shown


def _picture(pixels: NDArray[Any], view: arrays.View) -> Image.Image:
    seen = arrays.shown(pixels, view)
    return Image.fromarray(np.ascontiguousarray(seen[..., 0] if seen.shape[2] == 1 else seen))


def _colours(image: Image.Image) -> Image.Image:
    return pictures.convert(image, 3, notes={})


def _sheet(before: list[pictures.Pixels], after: list[pictures.Pixels]) -> pictures.Pixels | None:
    if not before:
        return None
    columns = min(_COLUMNS, len(before))
    tiles = list[pictures.Pixels]()
    for start in range(0, len(before), columns):
        for row in (before[start : start + columns], after[start : start + columns]):
            tiles += [*row, *[np.full_like(row[0], 255)] * (columns - len(row))]
    return pictures.grid(np.stack(tiles), columns)


def check_sheet(out: str | Path) -> Path:
    """Check the name of the contact sheet before the work. Raises InputError unless it ends in .png and can be made."""
    if Path(out).suffix.lower() != ".png":
        raise InputError(f"out {out}: want a name that ends in .png")
    pictures.check_out(out)
    return Path(out)
