"""The tab Compress: a picture becomes a file, and any first bytes of a file become a picture."""

import functools
import io
import math
import shlex
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ddpm.codec import Model, container, picture
from ddpm.errors import InputError
from ddpm.files import animation, data
from ddpm.files.data.blobs import facts_of
from ddpm.files.data.decoding import Decoder
from ddpm.files.images import Pixels
from ddpm.files.models import calibration_file
from ddpm.page.state import UPLOAD, State, check_size, field, optional, png_url
from ddpm.page.watch import watched
from ddpm.page.work import Job, read
from ddpm.run.compress import decodes_here, load_codec, naming, read_image
from ddpm.run.evaluate import sampled_bits
from ddpm.run.processes import Processes

ASK = 10_000
"""Pixels of a picture above which a request must say that somebody has confirmed it."""
STOPS = 128
"""Prefixes of a file whose pictures are stored at most, beside the whole file."""
PATIENCE = 30.0
"""Seconds that the pictures of prefixes may take."""
LEVELS, ESTIMATES = 20, 8
"""Noise levels of one estimate of the bound, and the least number of estimates that its standard error needs."""

R = TypeVar("R")


def routes(state: State) -> list[Route]:
    def keep(data: bytes) -> dict[str, Any]:
        check_size(data)
        return state.keep(read_image(data))

    async def add_picture(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(keep, await read(request, UPLOAD)))

    async def add_file(request: Request) -> Response:
        data = await read(request, UPLOAD)
        if container.is_archive(data):
            raise InputError(
                "the file: an archive of several pictures, which `ddpm decompress` reads; want one picture"
            )
        with naming("the file"):
            container.read_header(data)
        return JSONResponse(state.keep_file(data))

    jobs = {"forecast": forecast, "start": start, "open": open_file, "bound": bound}
    return [
        Route("/api/pictures/exact", add_picture, methods=["POST"]),
        Route("/api/pictures/file", add_file, methods=["POST"]),
        *(state.work.route(f"/api/compress/{name}", functools.partial(job, state)) for name, job in jobs.items()),
    ]


def forecast(state: State, body: dict[str, Any]) -> Job:
    """How large the work is on a picture or on a file, and how long it takes if one tile is measured."""
    model, bits = _codec(state, body), optional(body, "bits", int)
    source = _source(state, body)
    tiles, _ = picture.work(model, source, **({} if isinstance(source, bytes) else {"bits": bits}))
    about = {"kind": "about", "tiles": tiles, "pixels": _pixels(source), "ask": _pixels(source) > ASK, "most": ASK}
    seconds = None
    if tiles > 1:
        timing = yield from _timed(model, bits)
        seconds = tiles * (timing[1] if isinstance(source, bytes) else sum(timing))
    yield {**about, "seconds": seconds}


def start(state: State, body: dict[str, Any]) -> Job:
    """Compress a picture as `ddpm compress` does, and read the file again."""
    model, bits, image = _codec(state, body), optional(body, "bits", int), state.picture(field(body, "picture", str))
    _confirmed(body, image)
    command = ["ddpm", "compress", field(body, "model", str), "picture.png", "--out", "picture.ddpm"]
    command += [] if bits is None else ["--chunk-bits", str(bits)]
    tiles, times = picture.work(model, image, bits=bits)
    yield {"kind": "about", "command": shlex.join(command)}
    file = yield from _counted(
        "Compresses", tiles * times, lambda tick, tell: picture.compress(replace(model, tick=tick), image, bits=bits)
    )
    yield {"kind": "file", **state.keep_file(file)}
    yield from _shown(model, file)


def open_file(state: State, body: dict[str, Any]) -> Job:
    """Read a file as `ddpm decompress` does."""
    model, file = _codec(state, body), state.kept(field(body, "file", str)).data
    _confirmed(body, file)
    with naming("the file"):
        yield from _opened(model, file)


def _opened(model: Model, file: bytes) -> Job:
    """What `_shown` says, after a note of a file that may not decode here."""
    if not decodes_here(model, file):
        elsewhere = "The file was written in the local profile on another machine, device or release."
        yield {"kind": "note", "line": f"{elsewhere} It may not decode here."}
    yield from _shown(model, file)


def bound(state: State, body: dict[str, Any]) -> Job:
    """The model's bound of a picture (Eq. 5), estimated from LEVELS levels for each tile, and its standard error.

    The picture is given, so the error is that of the draws: each tile is estimated several times.
    """
    model, image = _codec(state, body), state.picture(field(body, "picture", str))
    _confirmed(body, image)
    tiles = picture.tiles_of(model, image)
    whole = tiles.pixels[tiles.coded.all((1, 2, 3))]
    if not len(whole):
        kind = "x".join(map(str, model.shape[:0:-1]))
        yield {"kind": "bound", "reason": f"no tile of {kind} pixels lies in this picture with all the model's colours"}
        return
    checkpoint, n = state.model(field(body, "model", str)), len(whole)
    repeats = max(2, math.ceil(ESTIMATES / n))
    stack = _images(np.tile(whole, (repeats, 1, 1, 1)))
    denoiser, calls = model.denoiser, math.ceil(n * repeats / (64 // LEVELS))

    def estimate(tick: Callable[[int], None], tell: object) -> torch.Tensor:
        def network(*inputs: Any) -> torch.Tensor:
            tick(1)
            return denoiser.network(*inputs)

        counted = replace(checkpoint, denoiser=replace(denoiser, network=network))
        ranks = Processes(0, 1, denoiser.device)  # the CPU for mps, which has no float64
        return sampled_bits(counted, stack, range(n * repeats), LEVELS, ranks, progress=False)

    bits = (yield from _counted("Measures", denoiser.schedule.T + calls, estimate)).view(repeats, n)
    error = float((bits.var(0) / repeats).sum().sqrt()) / n
    about = {"tiles": n, "of": len(tiles.pixels), "repeats": repeats, "levels": LEVELS}
    yield {"kind": "bound", "bits_per_dim": float(bits.mean()), "standard_error": error, **about}


def _images(stack: NDArray[np.uint8]) -> data.Images:
    """A set of pictures in memory, from [N, C, H, W]."""
    n, channels, height, width = stack.shape
    arrays = data.Arrays("the picture", stack.transpose(0, 2, 3, 1))
    decoder = Decoder(arrays, data.Form((height, width), channels))
    return data.Images("the picture", "all", None, None, decoder, torch.arange(n), torch.from_numpy(stack))


def _codec(state: State, body: dict[str, Any]) -> Model:
    """The codec of the model that a request names. Raises InputError if it has none."""
    checkpoint = state.model(name := field(body, "model", str))
    return _load(name, state.device, checkpoint.path, checkpoint.identity, facts_of(calibration_file(checkpoint.path)))


@functools.lru_cache(maxsize=2)
def _load(name: str, device: torch.device, *changes: Any) -> Model:
    """The codec of a model. `changes` differ once it has trained on, or was written or calibrated again."""
    return load_codec(name, device)


def _source(state: State, body: dict[str, Any]) -> Pixels | bytes:
    """The picture or the file that a request names."""
    if (name := optional(body, "picture", str)) is not None:
        return state.picture(name)
    return state.kept(field(body, "file", str)).data


def _pixels(source: Pixels | bytes) -> int:
    if isinstance(source, bytes):
        header, _ = container.read_header(source)
        return header.width * header.height
    height, width, _ = source.shape
    return int(height * width)


def _confirmed(body: dict[str, Any], source: Pixels | bytes) -> None:
    if (pixels := _pixels(source)) > ASK and not field(body, "confirmed", bool, False):
        raise InputError(f"{pixels:,} pixels: more than {ASK:,} take long; want confirmed true, after the forecast")


@functools.cache
def _timing(identity: bytes, bits: int | None) -> list[float]:
    """What `_timed` measured: nothing yet."""
    return []


def _timed(model: Model, bits: int | None) -> Generator[None, None, list[float]]:
    """Seconds to compress one tile, and to read it. They are measured once for each model and K."""

    def measure(tell: Callable[[None], None]) -> list[float]:
        channels, height, width = model.shape
        tile = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
        watching = replace(model, tick=lambda tiles: tell(None))
        watching.predictor(False)(np.zeros((1, *model.shape)), 1)  # the first call packs the weights
        times = [time.monotonic()]
        file = picture.compress(watching, tile, bits=bits)
        times.append(time.monotonic())
        list(picture.pictures(watching, file))
        times.append(time.monotonic())
        seconds: list[float] = np.diff(times).tolist()
        return seconds

    if not (measured := _timing(model.identity, bits)):
        measured += yield from watched(measure)
    return measured


def _counted(
    what: str, total: int, make: Callable[[Callable[[int], None], Callable[[dict[str, Any]], None]], R]
) -> Generator[dict[str, Any] | None, None, R]:
    """Run make(tick, tell): tick(number) says that so much more of `total` is done, and `tell` takes other events."""

    def run(tell: Callable[[dict[str, Any]], None]) -> R:
        begin, done = time.monotonic(), 0

        def tick(number: int) -> None:
            nonlocal done
            done = min(done + number, total)
            left = (time.monotonic() - begin) * (total - done) / done
            tell({"kind": "work", "what": what, "done": done, "of": total, "seconds": left})

        return make(tick, tell)

    return (yield from watched(run))


def _shown(model: Model, file: bytes) -> Job:
    """What a file shows: the picture after each group as it comes, then beside other formats, and at STOPS prefixes."""
    header, begin = container.read_header(file)
    tiles, times = picture.work(model, file)
    known: list[Any] = []

    def read_all(tick: Callable[[int], None], tell: Callable[[dict[str, Any]], None]) -> picture.Picture:
        for shown in picture.pictures(replace(model, tick=tick), file, known=known):
            tell({"kind": "picture", **_event(shown)})
        return shown

    last = yield from _counted("Reads", tiles * times, read_all)
    yield {"kind": "stop", "at": len(file), **_event(last)}
    about = {"width": header.width, "height": header.height, "channels": header.channels, "groups": header.groups}
    about |= {"begin": begin, "trailer": header.trailer, "bytes": len(file), "values": last.image.size}
    sizes = {"This file": len(file), **(_sizes(last.image) if last.exact else {})}
    table = [[name, size, 8 * size / last.image.size] for name, size in sizes.items()]
    yield {"kind": "read", **about, "sizes": table}
    until = time.monotonic() + PATIENCE
    for at in places(begin, len(file)):
        if time.monotonic() > until:
            break
        (shown,) = deque(picture.pictures(model, file, at, known), maxlen=1)
        yield {"kind": "stop", "at": at, **_event(shown)}
    yield {"kind": "done"}


def places(begin: int, end: int) -> list[int]:
    """At most STOPS lengths from `begin` to below `end`, evenly spread: the first, the middle, the quarters, and so on.

    >>> places(10, 18)
    [10, 14, 12, 16, 11, 13, 15, 17]
    """
    spread = sorted({begin + (end - begin) * i // STOPS for i in range(STOPS)} - {end})
    return [spread[i] for i in sorted(range(len(spread)), key=lambda i: -(i & -i) or -len(spread))]


def _event(shown: picture.Picture) -> dict[str, Any]:
    return {**shown._asdict(), "image": png_url(shown.image)}


def _sizes(image: Pixels) -> dict[str, int]:
    """The bytes of the picture as PNG and as lossless WebP, each as small as Pillow makes it."""
    pillow = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    options: dict[str, dict[str, Any]] = {"PNG": {"optimize": True}}
    if max(image.shape) <= animation.LONGEST[".webp"]:
        options["WebP"] = {"lossless": True, "quality": 100, "method": 6}
    sizes = {}
    for kind, settings in options.items():
        if kind.upper() in Image.SAVE:
            pillow.save(file := io.BytesIO(), kind, **settings)
            sizes[kind] = len(file.getvalue())
    return sizes
