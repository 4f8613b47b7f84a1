"""Animated pictures: .gif, which everything shows, and .webp, which keeps every colour."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm.errors import InputError
from ddpm.files import atomic
from ddpm.files.images import Pixels, check_folder, grid

SUFFIXES = (".gif", ".webp")
MOST_FRAMES = 60
_MILLISECONDS, _LAST = 80, 2000
"""How long a frame is shown, and the last one."""


def is_animation(out: str | Path) -> bool:
    """Whether the name of a file asks for an animation.

    >>> is_animation("a.GIF"), is_animation("a.png")
    (True, False)
    """
    return Path(out).suffix.lower() in SUFFIXES


def check_out(out: str | Path) -> None:
    """Raise InputError if `save` could not write to `out`. Call this before the work."""
    if Path(out).is_dir():
        raise InputError(f"out {out}: is a folder; want the name of a file")
    check_folder(Path(out).absolute().parent)


def spread(count: int) -> list[int]:
    """At most MOST_FRAMES of the numbers 0..count-1, evenly spread, with the first and the last one.

    >>> spread(3), len(spread(1000)), spread(1000)[-1]
    ([0, 1, 2], 60, 999)
    """
    n = min(count, MOST_FRAMES)
    return [round((count - 1) * i / max(n - 1, 1)) for i in range(n)]


def save(path: str | Path, frames: Sequence[Pixels], columns: int | None = None) -> None:
    """Write frames, each of images uint8 [N, H, W, C] as a contact sheet, as one animation that repeats.

    Grey is exact in both formats; a .gif has at most 256 colours a frame. The file appears whole or not at all.

    >>> import numpy as np, tempfile
    >>> save(tempfile.mkdtemp() + "/a.gif", [np.zeros((2, 8, 8, 1), np.uint8), np.ones((2, 8, 8, 1), np.uint8)])
    """
    sheets = [grid(frame, columns, padding=2 * (len(frame) > 1)) for frame in frames]
    pictures = [Image.fromarray(np.ascontiguousarray(s[..., 0] if s.shape[2] == 1 else s)) for s in sheets]
    kind = Path(path).suffix.lower()
    if kind == ".webp":  # it has no grey
        pictures = [picture.convert("RGB") if picture.mode == "L" else picture for picture in pictures]
    duration = [_MILLISECONDS] * (len(pictures) - 1) + [_LAST]
    options = {"lossless": True} if kind == ".webp" else {}
    with atomic.temporary(path) as part, part.open("wb") as file:
        pictures[0].save(
            file, kind[1:].upper(), save_all=True, append_images=pictures[1:], duration=duration, loop=0, **options
        )
