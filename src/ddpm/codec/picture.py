"""One picture in one file: tiles, the encoder's walk over the groups, and a picture from any prefix."""

import itertools
import math
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm import pixels
from ddpm.codec import progressive
from ddpm.codec.container import MOST_PIXELS, Header, check_identity, check_intact, read_header, sealed
from ddpm.codec.entropy import Damaged, Decoder, Encoder, EndOfPrefix, PrefixDecoder, Source
from ddpm.codec.model import Model
from ddpm.codec.plan import Group, Tables
from ddpm.codec.progressive import Array, Symbols, Undecided
from ddpm.codec.reverse import Picker
from ddpm.errors import InputError

Image = NDArray[np.uint8]
_MOST_VALUES = 1 << 26  # values of all tiles, also outside the picture
_MOST_PICKING = 1 << 22  # values of a picture whose pixels choose candidates
_TRIES = 64  # seeds that are tried for an image
_TOGETHER = 16  # tiles that share network calls


class Tiles(NamedTuple):
    """A picture in tiles.

    pixels  uint8 [n, C, H, W]
    real    which values lie in the picture
    coded   which of those the last stage codes; a grey picture in a colour network codes one channel
    """

    pixels: Image
    real: NDArray[np.bool_]
    coded: NDArray[np.bool_]


def grid(header: Header, model: Model) -> tuple[int, int, int, int, int]:
    """C, H and W of a tile, and the number of tiles down and across. Raises InputError for too large a picture."""
    c, h, w = model.shape
    if header.whole:
        f = model.factor
        h, w = -(-header.height // f) * f, -(-header.width // f) * f
    down, across = -(-header.height // h), -(-header.width // w)
    if (values := down * h * across * w * max(c, header.channels)) > _MOST_VALUES:
        size = f"{header.width}x{header.height}: {down * across:,} tiles of {values:,} values in all"
        raise InputError(f"picture {size}; want at most {_MOST_VALUES:,}")
    return c, h, w, down, across


def work(model: Model, source: Image | bytes, **settings: Any) -> tuple[int, int]:
    """The tiles of a picture or of a file, and how often the network sees each; `settings` are those of `compress`.

    Raises what `compress` and `decompress` raise for too large a picture, and for settings out of range.
    """
    header = read_header(source)[0] if isinstance(source, bytes) else _header(model, source, **settings)
    channels, _, _, down, across = grid(header, model)
    planes = header.channels if channels == 1 else 1
    groups = model.tables[header.bits].groups if header.bits in model.tables else ()
    return down * across * planes, len(groups) + 1


def cut(image: Image, header: Header, model: Model) -> Tiles:
    """Cut a picture [H, W, C] into tiles, with padded edges.

    Grey is repeated for a colour network, and colours become tiles of their own for a grey network.
    """
    c, h, w, down, across = grid(header, model)
    grey = header.channels == 1 and c == 3
    planes = np.repeat(image, 3, axis=2) if grey else image
    fill = [(0, down * h - header.height), (0, across * w - header.width), (0, 0)]

    def tiled(a: NDArray[np.generic]) -> NDArray[np.generic]:
        parts = a.reshape(down, h, across, w, -1, c).transpose(0, 2, 4, 5, 1, 3)
        return np.ascontiguousarray(parts.reshape(-1, c, h, w))

    real = tiled(np.pad(np.ones(planes.shape, bool), fill)).astype(bool)
    coded = real.copy()
    coded[:, 1:] &= not grey
    return Tiles(tiled(np.pad(planes, fill)).astype(np.uint8), real, coded)


def tiles_of(model: Model, image: Image) -> Tiles:
    """The tiles in which `compress` codes a picture. Raises InputError for a picture that the codec does not take."""
    return cut(image, _header(model, image), model)


def join(tiles: Image, header: Header, model: Model) -> Image:
    """The picture [H, W, C] of tiles [n, C, H, W]: the inverse of `cut`."""
    c, h, w, down, across = grid(header, model)
    parts = tiles.reshape(down, across, -1, c, h, w).transpose(0, 4, 1, 5, 2, 3)
    image = parts.reshape(down * h, across * w, -1)[: header.height, : header.width]
    return np.ascontiguousarray(image[..., : header.channels])


def _empty_tiles(header: Header, model: Model) -> Tiles:
    """The tiles of a picture whose pixels are not known yet; only the masks are used."""
    return cut(np.zeros((header.height, header.width, header.channels), np.uint8), header, model)


def _picks_by_pixels(tiles: Tiles, tables: Tables) -> bool:
    """Whether low bits of pixels choose candidates. Not for a large picture, since every x0^ must stay in memory."""
    _, *tile = tiles.pixels.shape
    return tiles.pixels.size <= _MOST_PICKING and any(group.banded(math.prod(tile)) for group in tables.groups)


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
    """Compress a picture uint8 [H, W, C], C = 1 or 3, to the bytes of a file for `decompress` with the same model.

    bits_per_dim  lossy: the most bits that the file may have per value, H W C values; None for lossless
    psnr          lossy: stop at this quality, decibels; None for lossless
    bits          K, for which the model has tables; None for the largest. A larger K saves bytes and takes longer
    local         use the network's own precision: faster, but the file decodes only where it was written
    whole         code the picture as one tile of its own size
    seed          seed of the shared noise; the next seeds are tried if x0^ lies too near a rounding boundary

    A lossy file is lossless if that needs no more bytes. Raises InputError for another kind of picture and for settings
    out of range.
    """
    header = _header(model, image, bits_per_dim, psnr, bits, local, whole, seed)
    predict = model.predictor(local, check=True)
    for attempt in range(seed, seed + _TRIES):
        with suppress(Undecided):
            walk = _walk(model, image, replace(header, seed=attempt), bits_per_dim, psnr)
            return progressive.run_together(predict, [walk])[0]
    raise InputError(f"image: x0^ lies too near a rounding boundary with {_TRIES} seeds; want the local profile")


def compress_each(model: Model, images: Iterable[Image], **settings: Any) -> Iterator[bytes]:
    """The files that `compress` makes, to the bit. In the local profile several pictures may share network calls.

    Pictures are taken one by one, and no more are held than share a call.
    """
    if not (settings.get("local") and model.batches):
        yield from (compress(model, image, **settings) for image in images)
        return
    walks: list[progressive.Walk[bytes]] = []
    tiles = 0
    for image in images:
        header = _header(model, image, **settings)
        walks.append(_walk(model, image, header, settings.get("bits_per_dim"), settings.get("psnr")))
        _, _, _, down, across = grid(header, model)
        tiles += down * across
        if tiles >= _TOGETHER:
            yield from progressive.run_together(model.predictor(True), walks)
            walks, tiles = [], 0
    if walks:
        yield from progressive.run_together(model.predictor(True), walks)


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
    """Height, width and channels of a picture. Raises InputError for one that the codec does not take."""
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
    """The walk of the encoder, which returns the file."""
    tables = model.tables[header.bits]
    tiles = cut(image, header, model)
    true = progressive.signal(tiles.pixels)
    state = progressive.start(true.shape, header.seed)
    most_bytes = math.inf if bits_per_dim is None else bits_per_dim * image.size / 8
    picks_by_pixels = _picks_by_pixels(tiles, tables)
    pickers = progressive.pickers(tiles.pixels, tiles.coded, header.seed, picks_by_pixels)
    sent: list[Symbols] = []
    counter = Encoder()  # it only counts bits

    def step(number: int, group: Group, x0: Array) -> bool:
        before = list(state.scales)
        if psnr is not None and _psnr(_shown(x0, header, model), image) >= psnr:
            return False
        sent.append(progressive.encode_group(state, group, x0, true, tiles.real, tables, header.seed, pickers))
        progressive.put_group(counter, tables, group, sent[-1], before, tiles.real)
        return counter.bits / 8 <= most_bytes

    x0 = yield from progressive.walk(tables, state, step)
    fits = counter.bits / 8 <= most_bytes  # if it fits, x0 is the estimate after the last group
    if fits and len(sent) == len(tables.groups) and (psnr is None or _psnr(_shown(x0, header, model), image) < psnr):
        chosen = pickers if picks_by_pixels else None
        data = _written(replace(header, lossless=True), tables, sent, tiles, x0, state.sums, image, chosen)
        if len(data) <= most_bytes:
            return data
    while True:
        data = _written(header, tables, sent, tiles)
        if len(data) <= most_bytes:
            return data
        if not sent:
            least = 8 * len(data) / image.size
            raise InputError(f"bits_per_dim {bits_per_dim}: an empty file of this picture takes {least:.3g}; want more")
        sent.pop()


def _written(
    header: Header, tables: Tables, sent: Sequence[Symbols], tiles: Tiles, x0: Array | None = None,
    sums: Sequence[int] = (), image: Image | None = None, pickers: Sequence[Sequence[Picker]] | None = None,
) -> bytes:  # fmt: skip
    """The file: the groups, and with x0^ also the pixels."""
    encoder = Encoder()
    before = [0] * len(tiles.real)
    for group, symbols in zip(tables.groups, sent, strict=False):
        progressive.put_group(encoder, tables, group, symbols, before, tiles.real)
        before = symbols.scales
    trailer = b""
    if x0 is not None and image is not None:
        progressive.put_pixels(encoder, tables, tiles.pixels, x0, before, tiles.coded, pickers)
        checks = bytes(sums[i] & 255 if sums else 0 for i in _checked(len(sums)))
        trailer = checks + zlib.crc32(image.tobytes()).to_bytes(4, "big")
    payload = encoder.finish()
    return sealed(replace(header, groups=len(sent), length=len(payload)).to_bytes() + payload + trailer)


def _checked(groups: int) -> list[int]:
    """The groups after which a lossless file has a check byte of x."""
    return [groups * quarter // 4 for quarter in (1, 2, 3)]


def _psnr(a: Image, b: Image) -> float:
    mse = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def _shown(x0: Array, header: Header, model: Model) -> Image:
    """x0^ (Eq. 15) as a picture."""
    return join(pixels.to_pixels(torch.from_numpy(x0)).numpy(), header, model)


class Picture(NamedTuple):
    """The picture that the first bytes of a file show.

    groups  the number of groups that were decoded
    pixels  how many of H W C values are exact; the others are x0^
    image   uint8 [H, W, C]
    exact   whether it is the picture itself, bit for bit
    whole   whether the whole file was used
    """

    groups: int
    pixels: int
    image: Image
    exact: bool
    whole: bool


def decompress(model: Model, data: bytes, at: int | None = None) -> Image:
    """The picture uint8 [H, W, C] of a file, or the best picture of its first `at` bytes.

    Raises Damaged for a file of another model, for changed bits, for too many bytes, and if this machine's network
    differs too much from the writer's. So a wrong picture is never taken for a lossless one. A file that ends early
    gives the picture of its whole groups, with the pixels that its bytes determine. Its checksums are missing then,
    so nothing shows whether this machine's network agrees.
    """
    (last,) = deque(pictures(model, data, at), maxlen=1)
    return last.image


def pictures(
    model: Model, data: bytes, at: int | None = None, known: list[NDArray[np.int16]] | None = None
) -> Iterator[Picture]:
    """Yield better and better pictures: x0^ of noise, then one picture per group, and last the exact one.

    known  x0^ after each group, from `progressive.narrow`. An empty list is filled; with the list of a whole file, any
           of its prefixes needs no network, and only the last picture of the prefix is yielded
    """
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
    trailer = data[end:] if len(data) == expected else b""
    yield from _pictures(model, header, tables, payload, trailer, complete, known)


def _pictures(
    model: Model, header: Header, tables: Tables, payload: bytes, trailer: bytes, complete: bool,
    known: list[NDArray[np.int16]] | None,
) -> Iterator[Picture]:  # fmt: skip
    """The pictures of a payload, or of its first bytes. `trailer` is empty if the file is cut short."""
    tiles = _empty_tiles(header, model)
    decoder = Decoder(payload) if complete else PrefixDecoder(payload)
    sent: list[Symbols] = []
    with suppress(EndOfPrefix):
        sent.extend(_groups(decoder, header, tables, tiles.real))
    scales = sent[-1].scales if sent else [0] * len(tiles.real)
    sent_groups: list[progressive.BandedGroup] = []
    keeps_groups = header.lossless and _picks_by_pixels(tiles, tables)
    checks = dict(zip(_checked(header.groups), trailer, strict=False)) if header.lossless else {}
    profile = f"; it was written in the {'local' if header.local else 'portable'} profile"

    def step(number: int, group: Group, x0: Array) -> bool:
        if number == len(sent):
            return False
        progressive.advance(state, group, x0, sent[number], tiles.real, tables, header.seed)
        if checks.get(number, state.sums[-1] & 255) != state.sums[-1] & 255:
            raise Damaged(f"group {number + 1}: this machine's network gives another x than the writer's" + profile)
        return True

    def estimates() -> Iterator[Array]:
        predict, walk = model.predictor(header.local), progressive.walk(tables, state, step)
        question = next(walk)
        with suppress(StopIteration):
            while True:
                x0 = predict(*question)
                yield x0
                question = walk.send(x0)

    whole_walk = known[: len(sent) + 1] if known and len(known) > len(sent) else None
    state = progressive.start(tiles.pixels.shape, header.seed)
    for number, x0 in enumerate(map(progressive.wide, whole_walk) if whole_walk else estimates()):
        last = number == len(sent)
        if not last and keeps_groups and tables.groups[number].banded(x0[0].size):
            sent_groups.append(progressive.BandedGroup(tables.groups[number], x0, sent[number]))
        if known is not None and not whole_walk:
            known.append(progressive.narrow(x0))
        if last or not whole_walk:
            yield Picture(number, 0, _shown(x0, header, model), False, last and complete and not header.lossless)
    if not header.lossless or len(sent) < header.groups:
        return
    if not complete and header.local and header.where != model.where and not trailer:
        return  # this machine's x0^ may differ, and then the pixels would be wrong

    def recover(tile: int, band: int, state: int, known: Image) -> bytes:
        true = progressive.signal(np.where(tiles.coded[tile], known, known[:1]))  # a grey value stands for all colours
        try:
            return progressive.recover_message(sent_groups, true, tiles.real, tables, header.seed, tile, band, state)
        except Damaged:
            if complete:
                raise
            raise EndOfPrefix from None  # a file that is cut short shows the picture before this band

    decoded, count = progressive.get_pixels(decoder, tables, x0, scales, tiles.coded, recover if keeps_groups else None)
    image = join(decoded, header, model)
    if not complete:
        if count:
            yield Picture(len(sent), count, image, False, False)
        return
    if zlib.crc32(image.tobytes()) != int.from_bytes(trailer[3:7], "big"):
        raise Damaged("pixels: not those that were written; this machine's network differs too much" + profile)
    yield Picture(len(sent), image.size, image, True, True)


def _groups(decoder: Source, header: Header, tables: Tables, real: NDArray[np.bool_]) -> Iterator[Symbols]:
    before = [0] * len(real)
    for group in tables.groups[: header.groups]:
        symbols = progressive.get_group(decoder, tables, group, before, real)
        before = symbols.scales
        yield symbols


class GroupCost(NamedTuple):
    """The cost of one group of a file: the step from level t to s, its chunks and bits, and the RMSE before it."""

    t: int
    s: int
    chunks: int
    bits: float
    rmse: float


def group_costs(model: Model, data: bytes) -> Iterator[GroupCost]:
    """The cost of each group of a whole file. rmse, in grey levels, is between x0^ before the group and the picture."""
    header, begin = read_header(data)
    shown = list(pictures(model, data))
    tables = model.tables[header.bits]
    if not shown[-1].whole:
        raise Damaged(f"{len(data)} bytes: cut short; want the whole file")
    real = _empty_tiles(header, model).real
    counter, before, spent = Encoder(), [0] * len(real), 0.0
    sent = _groups(Decoder(data[begin : begin + header.length]), header, tables, real)
    for number, (group, symbols) in enumerate(zip(tables.groups, sent, strict=False)):
        progressive.put_group(counter, tables, group, symbols, before, real)
        rmse = float(np.sqrt(np.mean((shown[number].image.astype(float) - shown[-1].image) ** 2)))
        chunks = sum(map(len, itertools.chain.from_iterable(symbols.indices)))
        yield GroupCost(group.t, group.s, chunks, counter.bits - spent, rmse)
        before, spent = symbols.scales, counter.bits
    if header.lossless:
        rmse = float(np.sqrt(np.mean((shown[-2].image.astype(float) - shown[-1].image) ** 2)))
        yield GroupCost(tables.levels[-1], 0, 0, 8 * header.length - spent, rmse)
