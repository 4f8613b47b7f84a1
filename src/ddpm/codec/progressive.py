"""Algorithms 3 and 4 of the paper by reverse-channel coding: x_T, group by group, and the pixels given the last x.

`encode_group` draws and both sides `advance`: so the encoder goes on from the x that the decoder will have. Arrays are
float64 [n, C, H, W], n tiles of one picture; the arithmetic beside the network is NumPy's, one operation at a time, so
that IEEE 754 fixes every bit of it.
"""

import zlib
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm import kernels, pixels
from ddpm.codec import residual, reverse, shared
from ddpm.codec.entropy import Certain, Damaged, Decoder, Encoder, Ends, Source
from ddpm.codec.plan import PAD, SCALES, Group, Tables
from ddpm.denoiser import Denoiser

Array = NDArray[np.float64]
T = TypeVar("T")
_START, _FILL = 201, 202  # what a stream of shared randomness is for
_GRID = 1024
"""x0^ is a multiple of 2^-10 before anybody uses it."""
_MARGIN = 1e-10
"""How much float64 networks may differ between machines."""


class Undecided(Exception):
    """Another machine might round this x0^ to another multiple of 2^-10; another seed will not be as close."""


@dataclass(frozen=True)
class Predictor:
    """x0^(x_t), clipped and on a grid of 2^-10, so that both sides have the same one.

    careful  one tile at a time, in float64, as the portable profile wants it
    check    raise Undecided where rounding hangs on less than 1e-10
    packed   the network's weights as our kernels read them, which do not change any more
    """

    denoiser: Denoiser
    careful: bool
    check: bool = False
    packed: kernels.Packed = field(default_factory=dict)

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
        t = torch.tensor([level])  # one time embedding: its matrix products may differ in another batch
        device = self.denoiser.schedule.alpha_bar.device
        return self.denoiser(x.to(device), t.to(device)).x0.double().cpu()


Predict = Callable[[Array, int], Array]


@dataclass(frozen=True)
class Symbols:
    """What is sent of one group: for each tile its scale and the indices of its chunks."""

    scales: list[int]
    indices: list[NDArray[np.int64]]


@dataclass
class State:
    """Where both sides are: x at the next level, the scales said last, and a checksum of x after each group."""

    x: Array
    scales: list[int]
    sums: list[int] = field(default_factory=list)


def signal(image: NDArray[np.uint8]) -> Array:
    """x_0 of pixels, of their shape."""
    x0: Array = pixels.to_signal(torch.from_numpy(image)).double().numpy()
    return x0


def start(tables: Tables, shape: Sequence[int], seed: int) -> State:
    """x_T of n tiles, from shared noise."""
    n, *one = shape
    x = [shared.normals(int(np.prod(one)), _START, seed, tile).astype(np.float64).reshape(one) for tile in range(n)]
    return State(np.stack(x), [0] * n)


def advance(
    state: State, group: Group, x0: Array, sent: Symbols, real: NDArray[np.bool_], tables: Tables, seed: int
) -> None:
    """x_s = mu_p + sqrt(variance_p) z, from what was sent; where nothing is real, z is shared noise."""
    c_0, c_x, _ = group.coefficients
    for tile, (scale, indices) in enumerate(zip(sent.scales, sent.indices, strict=True)):
        there, keys = real[tile], (seed, tile, group.t)
        z = np.empty(there.shape)
        z[there] = reverse.draw(indices, int(there.sum()), tables.bits + PAD, *keys)
        z[~there] = shared.normals(int((~there).sum()), _FILL, *keys)
        mean = c_x * state.x[tile] + c_0 * x0[tile]
        state.x[tile] = mean + np.sqrt(group.variance(scale)) * z
    state.scales = list(sent.scales)
    state.sums.append(zlib.crc32(state.x.astype("<f8").tobytes()))


def scale_of(error: float, group: Group) -> int:
    """The scale that says this mean squared error best."""
    nearest = round(2 * float(np.log2(max(error, 1e-30) / group.mse)))
    return min(max(nearest, SCALES[0]), SCALES[-1])


def encode_group(
    state: State, group: Group, x0: Array, true: Array, real: NDArray[np.bool_], tables: Tables, seed: int
) -> Symbols:
    """Draw x_s ~ q(x_s | x_t, x_0) by reverse-channel coding, and go there; `true` is x_0, `x0` is x0^."""
    c_0, _, variance_q = group.coefficients
    sent = Symbols([], [])
    for tile, there in enumerate(real):
        residual = (true[tile] - x0[tile])[there]
        scale = scale_of(float(np.mean(residual**2)), group)
        chunks, _ = group.chunks(scale, len(residual), tables.bits)
        variance_p = group.variance(scale)
        mean = c_0 * residual / np.sqrt(variance_p)
        keys = (seed, tile, group.t)
        sent.scales.append(scale)
        sent.indices.append(reverse.choose(mean, variance_q / variance_p, chunks, tables.bits + PAD, *keys))
    advance(state, group, x0, sent, real, tables, seed)
    return sent


# -- symbols to bits ---------------------------------------------------------------------------------------------------


def put_scale(encoder: Encoder, tables: Tables, scale: int, before: int) -> None:
    encoder.put(tables.scale_symbol(scale, before), tables.scale_frequency)


def get_scale(decoder: Source, tables: Tables, before: int) -> int:
    return tables.scale_of_symbol(decoder.get(tables.scale_frequency), before)


def put_group(
    encoder: Encoder, tables: Tables, group: Group, sent: Symbols, before: Sequence[int], dims: Sequence[int]
) -> None:
    """The symbols of a group; `before` are the scales of the group before, `dims` the tiles' real dimensions."""
    for scale, indices, last, count in zip(sent.scales, sent.indices, before, dims, strict=True):
        put_scale(encoder, tables, scale, last)
        _, load = group.chunks(scale, count, tables.bits)
        for index in indices.tolist():
            bucket = (index + 1).bit_length() - 1
            encoder.put(bucket, tables.bucket_frequency[load])
            encoder.put_bits(index + 1 - (1 << bucket), bucket)


def get_group(decoder: Source, tables: Tables, group: Group, before: Sequence[int], dims: Sequence[int]) -> Symbols:
    sent = Symbols([], [])
    for last, count in zip(before, dims, strict=True):
        scale = get_scale(decoder, tables, last)
        chunks, load = group.chunks(scale, count, tables.bits)
        indices = np.empty(chunks, np.int64)
        for i in range(chunks):
            bucket = decoder.get(tables.bucket_frequency[load])
            indices[i] = (1 << bucket) + decoder.get_bits(bucket) - 1
            if indices[i] >= 1 << (tables.bits + PAD):
                raise Damaged("payload: no encoder writes such bytes; want the file as it was written")
        sent.scales.append(scale)
        sent.indices.append(indices)
    return sent


def pixel_scales(tables: Tables, image: NDArray[np.uint8], x0: Array, said: NDArray[np.bool_]) -> list[int]:
    """Of each tile, the scale of what prediction leaves of its errors."""
    left = residual.left(tables.weights, np.where(said, signal(image) - x0, 0.0))
    return [scale_of(float(np.mean(part[there] ** 2)), tables.last) for part, there in zip(left, said, strict=True)]


def pixel_walk(
    tables: Tables, x0: Array, scales: Sequence[int], said: NDArray[np.bool_], symbols: residual.Symbols
) -> NDArray[np.uint8]:
    """The pixels uint8 [n, C, H, W] given x0^ at the last level (L_0, Eq. 13), as `symbols` puts or gets them."""
    sigma = np.sqrt([tables.last.error(scale) for scale in scales])
    return residual.walk(tables.weights, x0, sigma, said, tables.pixel_frequencies, symbols)


def put_pixels(
    encoder: Encoder,
    tables: Tables,
    image: NDArray[np.uint8],
    x0: Array,
    before: Sequence[int],
    said: NDArray[np.bool_],
) -> None:
    """Scales and pixels of all tiles; `before` are the scales of the last group."""
    scales = pixel_scales(tables, image, x0, said)
    for scale, last in zip(scales, before, strict=True):
        put_scale(encoder, tables, scale, last)

    def put(frequency: NDArray[np.int64], at: Any) -> NDArray[np.uint8]:
        encoder.put_each(image[at], frequency)
        found: NDArray[np.uint8] = image[at]
        return found

    pixel_walk(tables, x0, scales, said, put)


def get_pixels(
    decoder: Decoder, tables: Tables, x0: Array, before: Sequence[int], said: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    scales = [get_scale(decoder, tables, last) for last in before]
    return pixel_walk(tables, x0, scales, said, lambda frequency, at: decoder.get_each(frequency))


def get_some_pixels(
    decoder: Certain, tables: Tables, x0: Array, before: Sequence[int], said: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], int]:
    """x0^ as pixels, in them as many of the true ones as the bytes determine; and how many."""
    image: NDArray[np.uint8] = pixels.to_pixels(torch.from_numpy(x0)).numpy()
    count = 0

    def get(frequency: NDArray[np.int64], at: tuple[Any, int, Any, Any]) -> NDArray[np.integer]:
        nonlocal count
        found, (tile, channel, y, x) = decoder.get_each(frequency), at
        sure = slice(len(found))
        image[tile[sure], channel, y[sure], x[sure]] = found
        count += len(found)
        if len(found) < len(frequency):
            raise Ends
        return found

    with suppress(Ends):
        pixel_walk(tables, x0, [get_scale(decoder, tables, last) for last in before], said, get)
    return image, count


Do = Callable[[int, Group, Array], bool]
"""Do the group of this number from this x0^; False: not, and no more."""
Walk: TypeAlias = Generator[tuple[Array, int], Array, T]
"""Asks for x0^ of (x, level), again and again, and comes to something."""


def walk(tables: Tables, state: State, step: Do) -> Walk[Array]:
    """Asks for x0^ before every group, and calls `step` to do it, until it says False; comes to the last x0^."""
    for number, group in enumerate(tables.groups):
        x0 = yield state.x, group.t
        if not step(number, group, x0):
            return x0
    return (yield state.x, tables.levels[-1])


def answer(predict: Predict, walks: Sequence[Walk[T]]) -> list[T]:
    """What each comes to. They go on together: all that ask at one level, of one size, are one call of `predict`."""
    found: dict[int, T] = {}
    asked = {i: next(walk) for i, walk in enumerate(walks)}
    while asked:
        first, level = next(iter(asked.values()))
        some = [i for i, (x, t) in asked.items() if t == level and x.shape[1:] == first.shape[1:]]
        x0 = predict(np.concatenate([asked[i][0] for i in some]), level)
        for i, part in zip(some, np.split(x0, np.cumsum([len(asked[i][0]) for i in some])[:-1]), strict=True):
            try:
                asked[i] = walks[i].send(part)
            except StopIteration as end:
                found[i] = end.value
                del asked[i]
    return [found[i] for i in range(len(walks))]
