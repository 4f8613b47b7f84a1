"""Animated pictures: .gif, which everything shows, .webp, which keeps every colour, and .mp4, which is small."""

import importlib.util
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddpm.errors import InputError, Stopped, not_installed
from ddpm.files import atomic
from ddpm.files.images import Pixels, check_folder, grid

LONGEST = {".gif": 65_535, ".webp": 16_383, ".mp4": 16_384}
"""Suffix -> the pixels that a side can have at most."""
SUFFIXES = tuple(LONGEST)
MOST_FRAMES = 60
_MILLISECONDS, _LAST = 80, 2000
"""How long a frame is shown, and the last one."""


def is_animation(out: str | Path) -> bool:
    """Whether the name of a file asks for an animation.

    >>> is_animation("a.GIF"), is_animation("a.png")
    (True, False)
    """
    return _kind(out) in SUFFIXES


def check_out(out: str | Path) -> None:
    """Raise InputError if `save` could not write to `out`, also for want of ffmpeg. Call this before the work."""
    if Path(out).is_dir():
        raise InputError(f"out {out}: is a folder; want the name of a file")
    if _kind(out) == ".mp4":
        _ffmpeg()
    check_folder(Path(out).absolute().parent)


def check_size(out: str | Path, n: int, height: int, width: int, columns: int | None = None) -> None:
    """Raise InputError if a sheet of n images is too large for the format of `out`. Call this before the work.

    >>> check_size("a.gif", 500, 64, 64, 2), check_size("a.webp", 500, 64, 64, 2)
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: out a.webp: 134x16502 pixels; want at most 16,383 a side, so fewer images or another format
    """
    high, wide, _ = _sheet(np.empty((n, height, width, 0), np.uint8), columns).shape  # no channel, so no memory
    if max(high, wide) > (most := LONGEST[_kind(out)]):
        raise InputError(
            f"out {out}: {wide}x{high} pixels; want at most {most:,} a side, so fewer images or another format"
        )


def spread(count: int) -> list[int]:
    """At most MOST_FRAMES of the numbers 0..count-1, evenly spread, with the first and the last one.

    >>> spread(3), len(spread(1000)), spread(1000)[-1]
    ([0, 1, 2], 60, 999)
    """
    n = min(count, MOST_FRAMES)
    return [round((count - 1) * i / max(n - 1, 1)) for i in range(n)]


def save(path: str | Path, frames: Sequence[Pixels], columns: int | None = None) -> None:
    """Write frames, each of images uint8 [N, H, W, C] as a contact sheet, as one animation. The last one stays for 2 s.

    .gif   repeats; grey is exact, and there are at most 256 colours a frame
    .webp  repeats, and is exact
    .mp4   is H.264 of high quality, with half the resolution in colour. Odd sides grow by one pixel, the edge again.

    The file appears whole or not at all. Raises InputError for .mp4 without imageio-ffmpeg, Stopped if ffmpeg fails.

    >>> import numpy as np, tempfile
    >>> save(tempfile.mkdtemp() + "/a.gif", [np.zeros((2, 8, 8, 1), np.uint8), np.ones((2, 8, 8, 1), np.uint8)])
    """
    sheets = [_sheet(frame, columns) for frame in frames]
    with atomic.temporary(path) as part:
        if _kind(path) == ".mp4":
            _write_video(part, sheets)
        else:
            _write_pictures(part, sheets, _kind(path))


def _sheet(frame: Pixels, columns: int | None) -> Pixels:
    return grid(frame, columns, padding=2 * (len(frame) > 1))


def _kind(path: str | Path) -> str:
    return Path(path).suffix.lower()


def _write_pictures(part: Path, sheets: Sequence[Pixels], kind: str) -> None:
    pictures = [Image.fromarray(np.ascontiguousarray(s[..., 0] if s.shape[2] == 1 else s)) for s in sheets]
    if kind == ".webp":  # it has no grey
        pictures = [picture.convert("RGB") if picture.mode == "L" else picture for picture in pictures]
    duration = [_MILLISECONDS] * (len(pictures) - 1) + [_LAST]
    options = {"lossless": True} if kind == ".webp" else {}
    with part.open("wb") as file:
        pictures[0].save(
            file, kind[1:].upper(), save_all=True, append_images=pictures[1:], duration=duration, loop=0, **options
        )


# -- video -------------------------------------------------------------------------------------------------------------


def _ffmpeg() -> str:
    """The program that imageio-ffmpeg brings or finds. Raises InputError without it."""
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise not_installed("imageio_ffmpeg", "video")
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError:
        raise InputError("imageio_ffmpeg finds no ffmpeg; want one on the PATH, or another suffix than .mp4") from None


def _write_video(part: Path, sheets: Sequence[Pixels]) -> None:
    height, width, channels = sheets[0].shape
    even = [np.pad(sheet, ((0, height % 2), (0, width % 2), (0, 0)), "edge") for sheet in sheets]
    size, kind = f"{width + width % 2}x{height + height % 2}", {1: "gray", 3: "rgb24", 4: "rgba"}[channels]
    stay = f"tpad=stop={_LAST // _MILLISECONDS - 1}:stop_mode=clone"
    # without these flags grey is 2 levels off
    colours = "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int"
    words = [
        *f"-loglevel error -y -f rawvideo -pixel_format {kind} -video_size {size}".split(),
        *f"-framerate 1000/{_MILLISECONDS} -i pipe: -c:v libx264 -crf 12 -pix_fmt yuv420p -f mp4".split(),
        *f"-vf {stay},{colours} -movflags +faststart".split(),
        *"-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv".split(),
    ]
    done = subprocess.run(
        [_ffmpeg(), *words, f"file:{part}"], input=b"".join(map(np.ndarray.tobytes, even)), capture_output=True
    )
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[:1] or [f"exit code {done.returncode}"]
        raise Stopped(f"the video cannot be written: ffmpeg says: {reason[0]}")
