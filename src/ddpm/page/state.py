"""What the page holds while it is open: models by name, and pictures and files under random ids."""

import base64
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddpm.errors import InputError, finite_number, suggestion, whole_number
from ddpm.files import images
from ddpm.files.checkpoints import saved
from ddpm.files.data.blobs import facts_of
from ddpm.files.images import Pixels
from ddpm.files.interop import is_diffusers, weights_of
from ddpm.files.models import Checkpoint, without_condition
from ddpm.files.opening import find, models_by_name
from ddpm.page.work import Work
from ddpm.run.processes import open_for_device

KEPT_MODELS = 2
KEPT, KEPT_BYTES = 200, 400_000_000
"""Pictures and files that are kept at most, and their bytes; the oldest goes first."""

UPLOAD = 30_000_000
"""Bytes of a picture that somebody adds."""
PIXELS = 16_000_000
"""Pixels of a picture that somebody adds."""

T = TypeVar("T")


class Kept(NamedTuple):
    """A file that the page can show or save: its bytes, its media type, and the pixels if it is a picture."""

    data: bytes
    kind: str
    pixels: Pixels | None


class State:
    """What all tabs share.

    given   models from the command line, each in the words in which it was given; these are listed first
    runs    the folder whose runs are listed
    device  where models run
    """

    def __init__(self, given: Sequence[str], runs: Path, device: torch.device) -> None:
        self.given = tuple(name if name.startswith("hf:") else str(Path(name)) for name in given)
        self._theirs = {Path(name) for name in self.given if is_diffusers(Path(name))}
        self.runs, self.device, self.work = runs, device, Work()
        self._models: OrderedDict[tuple[str, Path, tuple[int, int]], Checkpoint] = OrderedDict()
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._opening, self._keeping = threading.Lock(), threading.Lock()

    def names(self) -> list[str]:
        """The models, as one types them on the command line: those given, the package's by their size, and runs."""
        packaged = sorted((file.stat().st_size, name) for name, file in models_by_name().items())
        runs = (str(run) for run in self.run_folders() if saved(run))
        return list(dict.fromkeys([*self.given, *(name for _, name in packaged), *runs]))

    def run_folders(self) -> list[Path]:
        """The runs under the folder of runs, and those given, sorted."""
        found = [config.parent for config in self.runs.glob("*/config.json")]
        given = {Path(name) for name in self.given if (Path(name) / "config.json").is_file()}
        return sorted({*found, *given - self._theirs})

    def model(self, name: str) -> Checkpoint:
        """The model of this name, on its device. One whose run trained on, or whose file changed, is opened anew.

        Raises InputError for a name that is not in the list, and if the model cannot be opened.
        """
        if name not in (names := self.names()):
            raise InputError(f"model {name!r}: {suggestion(name, names)}want {', '.join(names)}")
        with self._opening:
            if name.startswith("hf:"):
                return self._open(name, Path(name))
            return self._open(name, (weights_of if Path(name) in self._theirs else find)(Path(name)))

    def _open(self, name: str, file: Path) -> Checkpoint:
        """The model of this name. `file` tells whether one that is open is still the newest."""
        key = name, file, facts_of(file)
        if key not in self._models:
            opened = without_condition(open_for_device(name, self.device), "the page")
            self._models[key] = replace(opened, denoiser=opened.denoiser.to(self.device))
            while len(self._models) > KEPT_MODELS:
                self._models.popitem(last=False)
        self._models.move_to_end(key)
        return self._models[key]

    def warm_up(self) -> None:
        """Open the first model and call it once, so that the first image comes soon. A fault shows when it is used."""
        with suppress(InputError):
            model = self.model(self.names()[0])
            x = torch.zeros(1, *model.preset.shape, device=self.device)
            labels = torch.zeros(1, dtype=torch.int64, device=self.device) if model.preset.always_labelled else None
            model.denoiser(x, torch.ones(1, dtype=torch.int64, device=self.device), labels)

    def keep(self, pixels: Pixels) -> dict[str, Any]:
        """Keep a picture, uint8 [H, W, C] with C 1, 3 or 4: its id, width, height and url, for the page."""
        height, width = pixels.shape[:2]
        return {**self._put(Kept(images.to_png(pixels), "image/png", pixels)), "width": width, "height": height}

    def keep_file(self, data: bytes, kind: str = "application/octet-stream") -> dict[str, Any]:
        """Keep the bytes of a file that somebody may save: its id, bytes and url, for the page."""
        return {**self._put(Kept(data, kind, None)), "bytes": len(data)}

    def _put(self, kept: Kept) -> dict[str, Any]:
        name = secrets.token_urlsafe(12)
        with self._keeping:
            self._kept[name] = kept
            while len(self._kept) > KEPT or sum(map(_size, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return {"id": name, "url": f"/api/kept/{name}"}

    def kept(self, name: str) -> Kept:
        """What is kept under an id. Raises InputError if nothing is, or no more."""
        if name not in self._kept:
            raise InputError(f"{name!r:.40}: the page does not hold it, or no more; add the picture again")
        return self._kept[name]

    def picture(self, name: str) -> Pixels:
        """The picture of an id, uint8 [H, W, C]. Raises InputError if there is none."""
        pixels = self.kept(name).pixels
        if pixels is None:
            raise InputError(f"{name!r}: is a file; want a picture")
        return pixels

    def add_picture(self, data: bytes) -> dict[str, Any]:
        """Keep the picture of an image file's bytes, as grey, RGB or RGBA. Returns what `keep` does, and notes.

        Raises InputError if it is not an image, or has more than PIXELS pixels, which is seen before it is decoded.
        """
        check_size(data)
        image, notes = images.read(data, "the picture"), images.Notes()
        array = np.asarray(images.convert(image, images.native(image), "the picture", notes))
        return {**self.keep(array.reshape(*array.shape[:2], -1)), "notes": list(notes)}


def check_size(data: bytes) -> None:
    """Raise InputError if a file is no image, or has more than PIXELS pixels. Nothing is decoded."""
    width, height = images.size(data, "the picture")
    if width * height > PIXELS:
        raise InputError(f"the picture: {width}x{height} pixels; want at most {PIXELS // 1_000_000} million")


def _size(kept: Kept) -> int:
    return len(kept.data) + (0 if kept.pixels is None else kept.pixels.nbytes)


def png_url(pixels: Tensor | Pixels) -> str:
    """A picture as an address that holds its PNG file: a tensor uint8 [C, H, W], or an array uint8 [H, W, C]."""
    array = images.channels_last(pixels[None].cpu())[0] if isinstance(pixels, Tensor) else pixels
    return f"data:image/png;base64,{base64.b64encode(images.to_png(array)).decode()}"


def field(
    body: dict[str, Any], name: str, kind: type[T], default: T | None = None,
    low: float | None = None, high: float | None = None,
) -> T:  # fmt: skip
    """A value of a request: int and float in low..high, bool, str of at most `high` characters (200), or list.

    A value that is missing or null is the default. Raises InputError for a value of another type or out of range, and
    if there is neither a value nor a default.

    >>> field({"steps": 20}, "steps", int, 10, 1, 1000), field({}, "steps", int, 10)
    (20, 10)
    """
    value: Any = body.get(name)
    if value is None and default is not None:
        return default
    if kind is int:
        value = whole_number(name, value, low, high)
    elif kind is float:
        value = finite_number(name, value, low, high)
    elif not isinstance(value, kind):
        words = {str: "text", bool: "true or false", list: "a list"}
        raise InputError(f"{name} {value!r:.80}: want {words.get(kind, kind.__name__)}")
    elif isinstance(value, str) and len(value) > (high or 200):
        raise InputError(f"{name}: {len(value):,} characters; want at most {high or 200:g}")
    result: T = value
    return result


def optional(body: dict[str, Any], name: str, kind: type[T], low: float | None = None) -> T | None:
    """A value of a request as `field` checks it, or None if it is missing, null or empty text."""
    return None if body.get(name) in (None, "") else field(body, name, kind, None, low)
