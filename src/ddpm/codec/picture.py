"""One picture in one file: tiles, the encoder's walk over the groups, and a picture from any prefix."""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm import pixels
from ddpm.codec import progressive
from ddpm.codec.container import MOST_PIXELS, Header, check_identity, check_intact, read_header, sealed
from ddpm.codec.entropy import Certain, Damaged, Decoder, Encoder, Ends, Source
from ddpm.codec.model import Model
from ddpm.codec.plan import Group, Tables
from ddpm.codec.progressive import Array, Symbols, Undecided
from ddpm.codec.reverse import Picker
from ddpm.errors import InputError

Image = NDArray[np.uint8]
_MOST_VALUES = 1 << 26  # of all tiles, with what of them lies outside
_MOST_LENT = 1 << 22  # values
_TRIES = 64  # seeds before an image is given up
_TOGETHER = 16  # tiles, after which no more pictures share network calls


class Tiles(NamedTuple):
    """A picture cut up: uint8 [n, C, H, W], what of it is picture, and what of that the last stage has to say."""

    pixels: Image
    real: NDArray[np.bool_]
    said: NDArray[np.bool_]


def grid(header: Header, model: Model) -> tuple[int, int, int, int, int]:
    """C, H, W of a tile, tiles down and across. Raises InputError for too large a picture."""
    c, h, w = model.shape
    if header.whole:
        f = model.factor
        h, w = -(-header.height // f) * f, -(-header.width // f) * f
    down, across = -(-header.height // h), -(-header.width // w)
    if (values := down * h * across * w * max(c, header.channels)) > _MOST_VALUES:
        size = f"{header.width}x{header.height}: {down * across:,} tiles of {values:,} values in all"
        raise InputError(f"picture {size}; want at most {_MOST_VALUES:,}")
    return c, h, w, down, across


def cut(image: Image, header: Header, model: Model) -> Tiles:
    """[H, W, C] to tiles: edges filled up, grey repeated for a network of colours, colours as tiles for one of grey."""
    c, h, w, down, across = grid(header, model)
    grey = header.channels == 1 and c == 3
    planes = np.repeat(image, 3, axis=2) if grey else image
    fill = [(0, down * h - header.height), (0, across * w - header.width), (0, 0)]

    def tiled(a: NDArray[np.generic]) -> NDArray[np.generic]:
        parts = a.reshape(down, h, across, w, -1, c).transpose(0, 2, 4, 5, 1, 3)
        return np.ascontiguousarray(parts.reshape(-1, c, h, w))

    real = tiled(np.pad(np.ones(planes.shape, bool), fill)).astype(bool)
    said = real.copy()
    said[:, 1:] &= not grey
    return Tiles(tiled(np.pad(planes, fill)).astype(np.uint8), real, said)


def join(tiles: Image, header: Header, model: Model) -> Image:
    """What `cut` cut up, [n, C, H, W] to [H, W, C]."""
    c, h, w, down, across = grid(header, model)
    parts = tiles.reshape(down, across, -1, c, h, w).transpose(0, 4, 1, 5, 2, 3)
    image = parts.reshape(down * h, across * w, -1)[: header.height, : header.width]
    return np.ascontiguousarray(image[..., : header.channels])


def _real(header: Header, model: Model) -> Tiles:
    """The tiles of a picture that is not known yet."""
    return cut(np.zeros((header.height, header.width, header.channels), np.uint8), header, model)


def _lends(tiles: Tiles, tables: Tables) -> bool:
    """Whether low bits of pixels pick candidates: not of a large picture, of which all x0^ would have to be kept."""
    _, *tile = tiles.pixels.shape
    return tiles.pixels.size <= _MOST_LENT and any(group.banded(math.prod(tile)) for group in tables.groups)


def compress(
    model: Model,
    image: Image,
    bits_per_dim: float | None = None,
    psnr: float | None = None,
    bits: int | None = None,
    local: bool = False,
    whole: bool = False,
    seed: int = 0,
) -> bytes:
    """A picture uint8 [H, W, C], C of 1 or 3, to a file that `decompress` reads with the same model.

    Lossless, unless bits_per_dim gives the most bits the file may take for each of H W C numbers, or psnr the decibels
    at which to stop; lossless all the same where it takes no more. bits is K, one of the model's tables (None: the
    largest): more takes longer and saves bytes. local is faster by the network's own precision, and decodes where it
    was written only; whole codes a picture as one tile of its own size. Raises InputError for another picture and
    settings out of range.
    """
    header = _header(model, image, bits_per_dim, psnr, bits, local, whole, seed)
    predict = model.predictor(local, check=True)
    for attempt in range(seed, seed + _TRIES):
        with suppress(Undecided):
            [data] = progressive.answer(
                predict, [_walk(model, image, replace(header, seed=attempt), bits_per_dim, psnr)]
            )
            return data
    raise InputError(f"image: x0^ lies too near a rounding boundary with {_TRIES} seeds; want the local profile")


def compress_each(model: Model, images: Sequence[Image], **settings: Any) -> Iterator[bytes]:
    """What `compress` makes of each, to the bit; in the local profile some share network calls, where they may."""
    if not (settings.get("local") and model.batches):
        yield from (compress(model, image, **settings) for image in images)
        return
    walks: list[progressive.Walk[bytes]] = []
    tiles = 0
    for i, image in enumerate(images):
        header = _header(model, image, **settings)
        walks.append(_walk(model, image, header, settings.get("bits_per_dim"), settings.get("psnr")))
        _, _, _, down, across = grid(header, model)
        tiles += down * across
        if tiles >= _TOGETHER or i == len(images) - 1:
            yield from progressive.answer(model.predictor(True), walks)
            walks, tiles = [], 0


def _header(
    model: Model, image: Image, bits_per_dim: float | None = None, psnr: float | None = None, bits: int | None = None,
    local: bool = False, whole: bool = False, seed: int = 0,
) -> Header:  # fmt: skip
    if bits_per_dim is not None and psnr is not None:
        raise InputError("bits_per_dim, psnr: want one of the two")
    for name, value in (("bits_per_dim", bits_per_dim), ("psnr", psnr)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name} {value}: want a positive number")
    if not 0 <= seed < 1 << 31:
        raise InputError(f"seed {seed}: want 0 to {(1 << 31) - 1}")
    chosen = max(model.tables) if bits is None else bits
    if chosen not in model.tables:
        raise InputError(f"bits {bits}: the model is calibrated for {', '.join(map(str, sorted(model.tables)))}")
    lossless = bits_per_dim is None and psnr is None
    where = model.where if local else b""
    height, width, channels = checked(image)
    return Header(width, height, channels, chosen, lossless, local, whole, model.identity, seed, 0, 0, where)


def checked(image: Image) -> tuple[int, int, int]:
    """Height, width and channels of a picture that the codec takes; InputError for another."""
    if not isinstance(image, np.ndarray):
        raise InputError(f"image {type(image).__name__}: want a NumPy array, uint8 [H, W, C], C of 1 or 3")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise InputError(f"image {image.dtype} {list(image.shape)}: want uint8 [H, W, C], C of 1 or 3")
    height, width, channels = image.shape
    if not 1 <= height * width <= MOST_PIXELS:
        raise InputError(f"image {width}x{height}: want 1 to {MOST_PIXELS:,} pixels")
    return height, width, channels


def _walk(
    model: Model, image: Image, header: Header, bits_per_dim: float | None, psnr: float | None
) -> progressive.Walk[bytes]:
    """To the file of an image."""
    tables = model.tables[header.bits]
    tiles = cut(image, header, model)
    true = progressive.signal(tiles.pixels)
    state = progressive.start(true.shape, header.seed)
    most = math.inf if bits_per_dim is None else bits_per_dim * image.size / 8
    lends = _lends(tiles, tables)
    pickers = progressive.pickers(tiles.pixels, tiles.said, header.seed, lends)
    sent: list[Symbols] = []
    price = Encoder()  # what it takes so far

    def step(number: int, group: Group, x0: Array) -> bool:
        before = list(state.scales)
        if psnr is not None and _psnr(_shown(x0, header, model), image) >= psnr:
            return False
        sent.append(progressive.encode_group(state, group, x0, true, tiles.real, tables, header.seed, pickers))
        progressive.put_group(price, tables, group, sent[-1], before, tiles.real)
        return price.bits / 8 <= most

    x0 = yield from progressive.walk(tables, state, step)
    fits = price.bits / 8 <= most  # and x0^ is of the last group
    if fits and len(sent) == len(tables.groups) and (psnr is None or _psnr(_shown(x0, header, model), image) < psnr):
        data = _written(
            replace(header, lossless=True), tables, sent, tiles, x0, state.sums, image, pickers if lends else None
        )
        if len(data) <= most:
            return data
    while True:
        data = _written(header, tables, sent, tiles)
        if len(data) <= most:
            return data
        if not sent:
            least = 8 * len(data) / image.size
            raise InputError(f"bits_per_dim {bits_per_dim}: an empty file of this picture takes {least:.3g}; want more")
        sent.pop()


def _written(
    header: Header, tables: Tables, sent: Sequence[Symbols], tiles: Tiles, x0: Array | None = None,
    sums: Sequence[int] = (), image: Image | None = None, pickers: Sequence[Sequence[Picker]] | None = None,
) -> bytes:  # fmt: skip
    """The file: groups, and the pixels where there is x0^ to code them by."""
    encoder = Encoder()
    before = [0] * len(tiles.real)
    for group, symbols in zip(tables.groups, sent, strict=False):
        progressive.put_group(encoder, tables, group, symbols, before, tiles.real)
        before = symbols.scales
    trailer = b""
    if x0 is not None and image is not None:
        progressive.put_pixels(encoder, tables, tiles.pixels, x0, before, tiles.said, pickers)
        trailer = bytes(sums[i] & 255 if sums else 0 for i in _checked(len(sums))) + zlib.crc32(
            image.tobytes()
        ).to_bytes(4, "big")
    payload = encoder.finish()
    return sealed(replace(header, groups=len(sent), length=len(payload)).to_bytes() + payload + trailer)


def _checked(groups: int) -> list[int]:
    """After which groups a lossless file has a checksum of x."""
    return [groups * quarter // 4 for quarter in (1, 2, 3)]


def _psnr(a: Image, b: Image) -> float:
    mse = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def _shown(x0: Array, header: Header, model: Model) -> Image:
    """x0^ as a picture (Eq. 15)."""
    return join(pixels.to_pixels(torch.from_numpy(x0)).numpy(), header, model)


class Picture(NamedTuple):
    """What so much of a file shows.

    groups  coded groups that it took
    pixels  of H W C numbers, how many are the picture's own, and not x0^'s
    image   uint8 [H, W, C]
    exact   whether it is the picture itself, bit for bit
    whole   whether it is all that the file has
    """

    groups: int
    pixels: int
    image: Image
    exact: bool
    whole: bool


def decompress(model: Model, data: bytes, at: int | None = None) -> Image:
    """The picture uint8 [H, W, C] of a file, or the best one of its first `at` bytes.

    Raises Damaged for a file of another model, with flipped bits or with more bytes than it should have, and where
    this machine's network differs too much from the writer's: a wrong picture is never taken for a lossless one. A
    file that ends early gives what its whole groups show, and those pixels that are there: without the checksums of its
    end, which nobody has, it is taken on trust that this machine's network agrees.
    """
    *_, last = pictures(model, data, at)
    return last.image


def pictures(model: Model, data: bytes, at: int | None = None) -> Iterator[Picture]:
    """What `decompress` returns, as it gets better: first noise's x0^, then one picture a group, last the exact one."""
    header, begin = read_header(data)
    check_identity(header.identity, model.identity)
    if header.bits not in model.tables:
        raise Damaged(f"header: K {header.bits}; the model is calibrated for {sorted(model.tables)}")
    tables = model.tables[header.bits]
    expected = begin + header.length + header.trailer
    if len(data) > expected:
        raise Damaged(f"{len(data)} bytes: {len(data) - expected} more than the file has; want it as it was written")
    if len(data) == expected:
        check_intact(data)
    if header.groups > len(tables.groups) or (header.lossless and header.groups != len(tables.groups)):
        raise Damaged(f"header: {header.groups} groups; the model has {len(tables.groups)}")
    if at is not None and at < begin:
        raise InputError(f"at {at}: want at least the header, {begin} bytes")
    end = begin + header.length
    complete = len(data) == expected and (at is None or at >= end)
    payload = data[begin : end if at is None else min(at, end)]
    yield from _pictures(model, header, tables, payload, data[end:] if len(data) == expected else b"", complete)


def _pictures(
    model: Model, header: Header, tables: Tables, payload: bytes, trailer: bytes, complete: bool
) -> Iterator[Picture]:
    """Of a payload, or of its first bytes; `trailer` is empty where the file itself is cut."""
    tiles = _real(header, model)
    decoder = Decoder(payload) if complete else Certain(payload)
    sent: list[Symbols] = []
    with suppress(Ends):
        sent.extend(_groups(decoder, header, tables, tiles.real))
    state = progressive.start(tiles.pixels.shape, header.seed)
    told: list[progressive.Told] = []
    keep = header.lossless and _lends(tiles, tables)
    checks = dict(zip(_checked(header.groups), trailer, strict=False)) if header.lossless else {}
    elsewhere = f"; it was written in the {'local' if header.local else 'portable'} profile"

    def step(number: int, group: Group, x0: Array) -> bool:
        if number == len(sent):
            return False
        if keep and group.banded(x0[0].size):
            told.append(progressive.Told(group, x0, sent[number]))
        progressive.advance(state, group, x0, sent[number], tiles.real, tables, header.seed)
        if checks.get(number, state.sums[-1] & 255) != state.sums[-1] & 255:
            raise Damaged(f"group {number + 1}: this machine's network gives another x than the writer's" + elsewhere)
        return True

    predict, walk = model.predictor(header.local), progressive.walk(tables, state, step)
    asked = next(walk)
    for number in range(len(sent) + 1):
        x0 = predict(*asked)
        last = number == len(sent)
        yield Picture(number, 0, _shown(x0, header, model), False, last and complete and not header.lossless)
        with suppress(StopIteration):
            asked = walk.send(x0)
    if not header.lossless or len(sent) < header.groups:
        return
    if not complete and header.local and header.where != model.where and not trailer:
        return  # another x0^, other pixels

    def lent(tile: int, band: int, state: int, known: Image) -> bytes:
        true = progressive.signal(np.where(tiles.said[tile], known, known[:1]))  # grey stands for all colours
        try:
            return progressive.lent(told, true, tiles.real, tables, header.seed, tile, band, state)
        except Damaged:
            if complete:
                raise
            raise Ends from None  # of a file that is cut short what there is before is shown

    some, count = progressive.get_pixels(decoder, tables, x0, state.scales, tiles.said, lent if keep else None)
    image = join(some, header, model)
    if not complete:
        if count:
            yield Picture(len(sent), count, image, False, False)
        return
    if zlib.crc32(image.tobytes()) != int.from_bytes(trailer[3:7], "big"):
        raise Damaged("pixels: not those that were written; this machine's network differs too much" + elsewhere)
    yield Picture(len(sent), image.size, image, True, True)


def _groups(decoder: Source, header: Header, tables: Tables, real: NDArray[np.bool_]) -> Iterator[Symbols]:
    before = [0] * len(real)
    for group in tables.groups[: header.groups]:
        symbols = progressive.get_group(decoder, tables, group, before, real)
        before = symbols.scales
        yield symbols


class Spent(NamedTuple):
    """What one group of a file takes and where it leads: from level t to s, with so many bits in so many chunks."""

    t: int
    s: int
    chunks: int
    bits: float
    rmse: float


def spent(model: Model, data: bytes) -> Iterator[Spent]:
    """What each group of a whole file takes; rmse of x0^ before it is from the file's last picture, in grey levels."""
    header, begin = read_header(data)
    seen = list(pictures(model, data))
    tables = model.tables[header.bits]
    if not seen[-1].whole:
        raise Damaged(f"{len(data)} bytes: cut short; want the whole file")
    real = _real(header, model).real
    price, before, taken = Encoder(), [0] * len(real), 0.0
    sent = _groups(Decoder(data[begin : begin + header.length]), header, tables, real)
    for number, (group, symbols) in enumerate(zip(tables.groups, sent, strict=False)):
        progressive.put_group(price, tables, group, symbols, before, real)
        rmse = float(np.sqrt(np.mean((seen[number].image.astype(float) - seen[-1].image) ** 2)))
        yield Spent(
            group.t, group.s, sum(len(some) for tile in symbols.indices for some in tile), price.bits - taken, rmse
        )
        before, taken = symbols.scales, price.bits
    if header.lossless:
        rmse = float(np.sqrt(np.mean((seen[-2].image.astype(float) - seen[-1].image) ** 2)))
        yield Spent(tables.levels[-1], 0, 0, 8 * header.length - taken, rmse)
