"""Algorithms 3 and 4 of the paper by reverse-channel coding: x_T, group by group, and the pixels given the last x.

A group is a step from level t to a lower level s. The encoder draws x_s from q(x_s | x_t, x_0) and sends which shared
candidate it drew (`encode_group`). Then both sides move to this x_s by one function (`advance`), so the encoder goes
on from the x that the decoder will have. Arrays are float64 [n, C, H, W] for n tiles of one picture. Outside the
network the arithmetic is NumPy's, one operation at a time, so that IEEE 754 fixes every bit of it.

A group that costs many bits is coded in bands of rows. There, the low bits of the next band's pixels choose among the
candidates (bits-back coding). From the choices and the band's pixels, these bits can be computed again
(`recover_message`). So the decoder, once it has read a band's pixels, knows the low bits of the next band, and only
the rest of those pixels is coded. An index then costs little more than the divergence. The last band has no next
band, so its choices carry no bits.
"""

import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm import kernels, pixels
from ddpm.codec import residual, reverse, shared
from ddpm.codec.entropy import Damaged, Encoder, EndOfPrefix, Source, frequencies
from ddpm.codec.plan import PAD, SCALES, Group, Tables
from ddpm.codec.reverse import STATE, Picker
from ddpm.denoiser import Denoiser

Array = NDArray[np.float64]
T = TypeVar("T")
_START, _FILL, _PICKS = 201, 202, 203  # keys of streams of shared random numbers
_GRID = 1024
"""x0^ is rounded to a multiple of 2^-10 before it is used."""
_MARGIN = 1e-10
"""The largest difference that float64 networks may have between machines."""


class Undecided(Exception):
    """Another machine might round this x0^ to another multiple of 2^-10. Another seed gives another x0^."""


@dataclass(frozen=True)
class Predictor:
    """x0^(x_t), clipped and rounded to multiples of 2^-10, so that both sides have the same one.

    careful  compute one tile at a time, in float64, for the portable profile
    check    raise Undecided if less than 1e-10 decides the rounding
    packed   the network's weights in the layout of our kernels; the weights do not change any more
    tick     called with a number of tiles when the network has seen them
    """

    denoiser: Denoiser
    careful: bool
    check: bool = False
    packed: kernels.Packed = field(default_factory=dict)
    tick: Callable[[int], object] = lambda tiles: None

    @torch.no_grad()
    def __call__(self, x: Array, level: int) -> Array:
        xt = torch.from_numpy(x)
        with kernels.frozen(self.packed):
            parts = [self._estimate(part, level) for part in torch.split(xt, 1 if self.careful else 64)]
        x0 = torch.cat(parts).numpy().clip(-1, 1) * _GRID
        if self.check and self.careful and (np.abs(x0 - np.floor(x0) - 0.5) < _MARGIN * _GRID).any():
            raise Undecided
        snapped: Array = np.rint(x0) / _GRID
        return snapped

    def _estimate(self, x: Tensor, level: int) -> Tensor:
        x = x if self.careful else x.float()
        t = torch.tensor([level])  # one time embedding, since a matrix product may differ in another batch
        device = self.denoiser.device
        x0 = self.denoiser(x.to(device), t.to(device)).x0.double().cpu()
        self.tick(len(x))
        return x0


Predict = Callable[[Array, int], Array]


def narrow(x0: Array) -> NDArray[np.int16]:
    """x0^ of a Predictor in a quarter of the memory: the multiples of 2^-10. `wide` is the inverse."""
    return np.rint(x0 * _GRID).astype(np.int16)


def wide(x0: NDArray[np.int16]) -> Array:
    """The x0^ of which `narrow` made this.

    >>> wide(narrow(np.array([-1, 3 / 1024]))) * 1024
    array([-1024.,     3.])
    """
    result: Array = x0 / _GRID
    return result


@dataclass(frozen=True)
class Symbols:
    """The symbols of one group: for each tile its scale, and the indices of the chunks of each band."""

    scales: list[int]
    indices: list[list[NDArray[np.int64]]]


@dataclass
class State:
    """The state of both sides: x at the next level, the last scales, and a checksum of x after each group."""

    x: Array
    scales: list[int]
    sums: list[int] = field(default_factory=list)


def signal(image: NDArray[np.uint8]) -> Array:
    """The pixels as signal x_0, of the same shape."""
    x0: Array = pixels.to_signal(torch.from_numpy(image)).double().numpy()
    return x0


def start(shape: Sequence[int], seed: int) -> State:
    """The state at level T: x_T of n tiles, from shared noise."""
    n, *one = shape
    x = [shared.normals(int(np.prod(one)), _START, seed, tile).astype(np.float64).reshape(one) for tile in range(n)]
    return State(np.stack(x), [0] * n)


def bands(height: int) -> list[slice]:
    """The bands of a tile: rows from the top, fewer in each next band.

    >>> [(band.start, band.stop) for band in bands(32)]
    [(0, 13), (13, 23), (23, 28), (28, 31), (31, 32)]
    """
    ends = [0, *dict.fromkeys(-(-height * share // 20) for share in (8, 14, 17, 19, 20))]
    return [slice(*pair) for pair in pairwise(ends)]


def parts(mask: NDArray[np.bool_], group: Group | None = None) -> list[NDArray[np.bool_]]:
    """Split a mask [C, H, W] into bands; a group without bands has one part."""
    if group and not group.banded(mask.size):
        return [mask]
    masks = []
    for band in bands(mask.shape[1]):
        part = np.zeros_like(mask)
        part[:, band] = mask[:, band]
        masks.append(part)
    return masks


def advance(
    state: State, group: Group, x0: Array, sent: Symbols, real: NDArray[np.bool_], tables: Tables, seed: int
) -> None:
    """Move to x_s = mu_p + sqrt(variance_p) z, with z from the symbols. Outside the picture, z is shared noise."""
    c_0, c_x, _ = group.coefficients
    for tile, (scale, indices) in enumerate(zip(sent.scales, sent.indices, strict=True)):
        z = np.empty(real[tile].shape)
        for band, (part, chosen) in enumerate(zip(parts(real[tile], group), indices, strict=True)):
            if dims := int(part.sum()):
                bits = index_bits(group, scale, part, tables)
                z[part] = reverse.draw(chosen, dims, bits, seed, tile, group.t, band)
        mask = real[tile]
        z[~mask] = shared.normals(int((~mask).sum()), _FILL, seed, tile, group.t)
        mean = c_x * state.x[tile] + c_0 * x0[tile]
        state.x[tile] = mean + np.sqrt(group.variance(scale)) * z
    state.scales = list(sent.scales)
    state.sums.append(zlib.crc32(state.x.astype("<f8").tobytes()))


def scale_of(error: float, group: Group) -> int:
    """The scale nearest to this mean squared error."""
    nearest = round(2 * float(np.log2(max(error, 1e-30) / group.mse)))
    return min(max(nearest, SCALES[0]), SCALES[-1])


def index_bits(group: Group, scale: int, part: NDArray[np.bool_], tables: Tables) -> int:
    """The bits of a part's indices: the largest number without bands; in bands just enough, as each bit costs."""
    if not group.banded(part.size):
        return tables.bits + PAD
    return group.chunks(scale, int(part.sum()), tables.bits).bits


def draw_of(
    group: Group, scale: int, true: Array, x0: Array, part: NDArray[np.bool_], tables: Tables, *keys: int
) -> reverse.Draw:
    """The draw x_s ~ q(x_s | x_t, x_0) in a band, as z; `true` is x_0 and `x0` is x0^."""
    c_0, _, variance_q = group.coefficients
    chunks = group.chunks(scale, int(part.sum()), tables.bits).number
    variance_p = group.variance(scale)
    mean = c_0 * (true - x0)[part] / np.sqrt(variance_p)
    return reverse.Draw(mean, variance_q / variance_p, chunks, index_bits(group, scale, part, tables), keys)


def encode_group(
    state: State, group: Group, x0: Array, true: Array, real: NDArray[np.bool_], tables: Tables, seed: int,
    pickers: Sequence[Sequence[Picker]],
) -> Symbols:  # fmt: skip
    """Draw x_s ~ q(x_s | x_t, x_0), move to it, and return the symbols. `pickers` choose in each tile's bands."""
    sent = Symbols([], [])
    for tile, mask in enumerate(real):
        scale = scale_of(float(np.mean((true[tile] - x0[tile])[mask] ** 2)), group)
        sent.scales.append(scale)
        sent.indices.append([])
        banded = group.banded(mask.size)
        for band, part in enumerate(parts(mask, group)):
            keys = (seed, tile, group.t, band)
            draws = [draw_of(group, scale, true[tile], x0[tile], part, tables, *keys)] if part.any() else []
            races = reverse.races(draws)
            if banded:
                chosen = [pickers[tile][band].pick(race) for race in races]
            else:
                chosen = [reverse.winner(race, tables.bits + PAD, *keys, i) for i, race in enumerate(races)]
            sent.indices[-1].append(np.array(chosen, np.int64))
    advance(state, group, x0, sent, real, tables, seed)
    return sent


# -- low bits of pixels as choices -------------------------------------------------------------------------------------


def pickers(image: NDArray[np.uint8], coded: NDArray[np.bool_], seed: int, use_pixels: bool) -> list[list[Picker]]:
    """A picker for each band of each tile. With `use_pixels`, its message is the low bits of the next band."""
    result = []
    for tile, (pixel, mask) in enumerate(zip(image, coded, strict=True)):
        _, *next_bands = parts(mask)
        messages = [low_bits(pixel[part]) if use_pixels else b"" for part in next_bands]
        result.append([Picker(message, _PICKS, seed, tile, band) for band, message in enumerate([*messages, b""])])
    return result


def low_bits(pixel: NDArray[np.uint8]) -> bytes:
    """The bits of pixels [m]: first the lowest bit of every pixel, then the next one, and so on."""
    return np.packbits(pixel >> np.arange(8, dtype=np.uint8)[:, None] & 1).tobytes()


def known_bits(text: bytes, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The known bits of `count` pixels, and a mask of them, uint8 [count]; `text` is the beginning of `low_bits`.

    >>> pixel = np.array([200, 77, 3], np.uint8)
    >>> known_bits(low_bits(pixel)[:1], 3)
    (array([0, 5, 3], dtype=uint8), array([7, 7, 3], dtype=uint8))
    """
    bits = np.unpackbits(np.frombuffer(text, np.uint8))[: 8 * count]
    known = np.arange(8 * count) < len(bits)
    bits = np.concatenate([bits, np.zeros(8 * count - len(bits), np.uint8)])
    place = np.arange(8, dtype=np.uint8)[:, None]
    return tuple(np.bitwise_or.reduce(a.reshape(8, count).astype(np.uint8) << place) for a in (bits, known))


class BandedGroup:
    """A group that was coded in bands: x0^ before it, and its symbols."""

    def __init__(self, group: Group, x0: Array, sent: Symbols) -> None:
        self.group, self.sent, self._x0 = group, sent, narrow(x0)

    def x0(self, tile: int) -> Array:
        """[C, H, W]."""
        return wide(self._x0[tile])


def recover_message(
    sent_groups: Sequence[BandedGroup],
    true: Array,
    real: NDArray[np.bool_],
    tables: Tables,
    seed: int,
    tile: int,
    band: int,
    state: int,
) -> bytes:
    """The message by which the choices in a tile's band were made. `true` [C, H, W] is x_0, known in this band."""
    part = parts(real[tile])[band]
    sent_groups = sent_groups if part.any() else []
    order = sorted(  # `races` is faster if draws with the same bits follow each other
        range(len(sent_groups)),
        key=lambda i: index_bits(sent_groups[i].group, sent_groups[i].sent.scales[tile], part, tables),
    )
    races = reverse.races(
        draw_of(g.group, g.sent.scales[tile], true, g.x0(tile), part, tables, seed, tile, g.group.t, band)
        for g in (sent_groups[i] for i in order)
    )
    slots_of = {
        i: [next(races).slot(index) for index in sent_groups[i].sent.indices[tile][band].tolist()] for i in order
    }
    slots = [slot for i in range(len(sent_groups)) for slot in slots_of[i]]
    return reverse.message_of(state, slots, _PICKS, seed, tile, band)


# -- symbols to bits ---------------------------------------------------------------------------------------------------


def put_scale(encoder: Encoder, tables: Tables, scale: int, before: int) -> None:
    encoder.put(tables.scale_symbol(scale, before), tables.scale_frequency)


def get_scale(decoder: Source, tables: Tables, before: int) -> int:
    return tables.scale_of_symbol(decoder.get(tables.scale_frequency), before)


def put_group(
    encoder: Encoder, tables: Tables, group: Group, sent: Symbols, before: Sequence[int], real: NDArray[np.bool_]
) -> None:
    """Code the symbols of a group; `before` holds the scales of the group before it."""
    for scale, indices, last, mask in zip(sent.scales, sent.indices, before, real, strict=True):
        put_scale(encoder, tables, scale, last)
        banded = group.banded(mask.size)
        for chosen, part in zip(indices, parts(mask, group), strict=True):
            chunks = group.chunks(scale, int(part.sum()), tables.bits)
            for index in chosen.tolist():
                if banded:
                    encoder.put_bits(index, chunks.bits)
                else:
                    bucket = (index + 1).bit_length() - 1
                    encoder.put(bucket, tables.bucket_frequency[chunks.load])
                    encoder.put_bits(index + 1 - (1 << bucket), bucket)


def get_group(decoder: Source, tables: Tables, group: Group, before: Sequence[int], real: NDArray[np.bool_]) -> Symbols:
    sent = Symbols([], [])
    for last, mask in zip(before, real, strict=True):
        scale = get_scale(decoder, tables, last)
        sent.scales.append(scale)
        sent.indices.append([])
        banded = group.banded(mask.size)
        for part in parts(mask, group):
            chunks = group.chunks(scale, int(part.sum()), tables.bits)
            chosen = np.empty(chunks.number if part.any() else 0, np.int64)
            for i in range(len(chosen)):
                if banded:
                    chosen[i] = decoder.get_bits(chunks.bits)
                else:
                    bucket = decoder.get(tables.bucket_frequency[chunks.load])
                    chosen[i] = (1 << bucket) + decoder.get_bits(bucket) - 1
                    if chosen[i] >= 1 << (tables.bits + PAD):
                        raise Damaged("payload: no encoder writes such bytes; want the file as it was written")
            sent.indices[-1].append(chosen)
    return sent


def pixel_scales(tables: Tables, image: NDArray[np.uint8], x0: Array, coded: NDArray[np.bool_]) -> list[int]:
    """The scale of each tile's errors after the prediction."""
    remaining = residual.remaining(tables.weights, np.where(coded, signal(image) - x0, 0.0))
    return [scale_of(float(np.mean(part[mask] ** 2)), tables.last) for part, mask in zip(remaining, coded, strict=True)]


def pixel_walk(
    tables: Tables, x0: Array, scales: Sequence[int], coded: NDArray[np.bool_], symbols: residual.Symbols,
    image: NDArray[np.uint8] | None = None, rows: slice | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Code or read the pixels uint8 [n, C, H, W] given x0^ at the last level (L_0, Eq. 13).

    With `rows` only these rows, into `image`, which holds the rows above.
    """
    sigma = np.sqrt([tables.last.error(scale) for scale in scales])
    return residual.walk(tables.weights, x0, sigma, coded, tables.pixel_frequencies, symbols, image, rows)


def frequencies_given_bits(
    frequency: NDArray[np.int64], low: NDArray[np.uint8], known: NDArray[np.uint8]
) -> NDArray[np.int64]:
    """The frequencies [m, 256] of pixels that have the bits of `low` wherever the mask `known` is set."""
    if not known.any():
        return frequency
    agree = (np.arange(256, dtype=np.uint8) & known[:, None]) == low[:, None]
    return frequencies(np.where(agree, frequency, 0))


NextBits = Callable[[int, int], bytes]
"""(tile, band) -> the low bits of the next band. It codes or reads the state of this band's picker."""


def _band_by_band(
    tables: Tables, x0: Array, scales: Sequence[int], coded: NDArray[np.bool_], image: NDArray[np.uint8],
    symbols: residual.Symbols, next_bits: NextBits | None,
) -> None:  # fmt: skip
    """Code or read all pixels into `image`. From the second band on, bits that `next_bits` gives are not coded."""
    low, known = np.zeros_like(image), np.zeros_like(image)

    def symbols_given_bits(frequency: NDArray[np.int64], at: Any) -> NDArray[np.integer]:
        return symbols(frequencies_given_bits(frequency, low[at], known[at]), at)

    for band, rows in enumerate(bands(image.shape[2])):
        if band and next_bits:
            for tile, mask in enumerate(coded):
                part = parts(mask)[band]
                if part.any():
                    low[tile][part], known[tile][part] = known_bits(next_bits(tile, band - 1), int(part.sum()))
        pixel_walk(tables, x0, scales, coded, symbols_given_bits, image, rows)


def put_pixels(
    encoder: Encoder, tables: Tables, image: NDArray[np.uint8], x0: Array, before: Sequence[int],
    coded: NDArray[np.bool_], pickers: Sequence[Sequence[Picker]] | None,
) -> None:  # fmt: skip
    """Code the scales and pixels of all tiles; `before` holds the last group's scales.

    `pickers` is None if pixels do not choose candidates.
    """
    scales = pixel_scales(tables, image, x0, coded)
    for scale, last in zip(scales, before, strict=True):
        put_scale(encoder, tables, scale, last)

    def put(frequency: NDArray[np.int64], at: Any) -> NDArray[np.uint8]:
        encoder.put_each(image[at], frequency)
        symbols: NDArray[np.uint8] = image[at]
        return symbols

    def next_bits(tile: int, band: int) -> bytes:
        assert pickers is not None
        picker = pickers[tile][band]
        encoder.put_bits(picker.state >> STATE // 2, STATE // 2)
        encoder.put_bits(picker.state & (1 << STATE // 2) - 1, STATE // 2)
        return picker.used

    _band_by_band(tables, x0, scales, coded, np.zeros_like(image), put, None if pickers is None else next_bits)


def get_pixels(
    source: Source, tables: Tables, x0: Array, before: Sequence[int], coded: NDArray[np.bool_],
    recover: Callable[[int, int, int, NDArray[np.uint8]], bytes] | None,
) -> tuple[NDArray[np.uint8], int]:  # fmt: skip
    """The picture: true pixels as far as the bytes determine them, and x0^ elsewhere; and the number of true values.

    recover(tile, band, state, pixels so far) gives the low bits of the next band; it is None if pixels do not choose
    candidates.
    """
    image, done = np.zeros(x0.shape, np.uint8), np.zeros(x0.shape, bool)

    def get(frequency: NDArray[np.int64], at: tuple[Any, int, Any, Any]) -> NDArray[np.integer]:
        symbols, (tile, channel, y, x) = source.get_each(frequency), at
        read = slice(len(symbols))
        image[tile[read], channel, y[read], x[read]] = symbols
        done[tile[read], channel, y[read], x[read]] = True
        if len(symbols) < len(frequency):
            raise EndOfPrefix
        return symbols

    def next_bits(tile: int, band: int) -> bytes:
        assert recover is not None
        state = source.get_bits(STATE // 2) << STATE // 2 | source.get_bits(STATE // 2)
        return recover(tile, band, state, image[tile])

    with suppress(EndOfPrefix):
        scales = [get_scale(source, tables, last) for last in before]
        _band_by_band(tables, x0, scales, coded, image, get, None if recover is None else next_bits)
    picture: NDArray[np.uint8] = np.where(done, image, pixels.to_pixels(torch.from_numpy(x0)).numpy())
    return picture, int(done.sum())


Step = Callable[[int, Group, Array], bool]
"""(number, group, x0^) -> whether the group was done; False ends the walk."""
Walk: TypeAlias = Generator[tuple[Array, int], Array, T]
"""A generator that yields (x, level), is sent x0^, and returns a result at its end."""


def walk(tables: Tables, state: State, step: Step) -> Walk[Array]:
    """Ask for x0^ before each group and call `step`, until it returns False. Returns the last x0^."""
    for number, group in enumerate(tables.groups):
        x0 = yield state.x, group.t
        if not step(number, group, x0):
            return x0
    return (yield state.x, tables.levels[-1])


def run_together(predict: Predict, walks: Sequence[Walk[T]]) -> list[T]:
    """Run several walks and return their results. Walks at one level, with tiles of one size, share network calls."""
    results: dict[int, T] = {}
    questions = {i: next(walk) for i, walk in enumerate(walks)}
    while questions:
        first, level = next(iter(questions.values()))
        together = [i for i, (x, t) in questions.items() if t == level and x.shape[1:] == first.shape[1:]]
        xs = [questions[i][0] for i in together]
        x0 = predict(np.concatenate(xs), level)
        for i, part in zip(together, np.split(x0, np.cumsum(list(map(len, xs)))[:-1]), strict=True):
            try:
                questions[i] = walks[i].send(part)
            except StopIteration as end:
                results[i] = end.value
                del questions[i]
    return [results[i] for i in range(len(walks))]
