"""Many pictures in one file, each at nearly the bound: bits-back coding in Bit-Swap's order (Kingma et al. 2019).

The encoder works on a stack of bits. To pop a symbol means to decode it from the stack, which draws it at random and
makes the stack shorter; to push a symbol means to encode it. For each picture it does

    pop x_1 ~ q(.|x_0), push x_0; pop x_{t+1} ~ q(.|x_t), push x_t by p(.|x_{t+1}); at last push x_T

The decoder goes the same way back, and pushes again what the encoder popped, so nothing is lost. The first pictures
find too little to pop. They are coded as files of their own, whose bytes are pushed for the next pictures to pop. So
nothing is wasted, and an archive stands alone. The encoder pushes the number of a tile's attempt after the tile, and 16
bits before the tile if this is not the first attempt. For a picture that is a file it pushes the bytes, their length in
twice 16 bits, and _FILE.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import constriction
import numpy as np
from numpy.typing import NDArray

from ddpm.codec import entropy, picture, progressive
from ddpm.codec.container import (
    MOST_PIXELS,
    Contents,
    Header,
    check_identity,
    check_intact,
    read_contents,
    read_header,
    sealed,
)
from ddpm.codec.entropy import Damaged
from ddpm.codec.model import Model
from ddpm.codec.picture import Image
from ddpm.codec.plan import Group, Tables
from ddpm.codec.progressive import Array, Predict, Undecided
from ddpm.errors import InputError, parse_json

_BYTE = constriction.stream.model.Uniform(256)
_OFFSETS = 16  # places of a mean between two grid points
_FINE = 4  # grid points per standard deviation of q(x_t | x_s)
_REACH = 8  # standard deviations to each side; a further point needs an extra number
_FAR = 20  # bits of that number

_FILE = 7
_ATTEMPTS = entropy.frequencies([60, 1, 1, 1, 1, 1, 1, 1])  # attempts of a tile; _FILE marks a file

_DIFFERS = "this machine's network differs from the writer's"

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class GridNormal:
    """N(mean, sigma^2) on the multiples of delta. Each of its 17 integer tables is for one place of a mean."""

    sigma: float
    delta: float

    @cached_property
    def window(self) -> int:
        return math.ceil(_REACH * self.sigma / self.delta) + 1

    @cached_property
    def tables(self) -> list[Any]:
        W = self.window
        edges: Array = np.arange(-W, W + 2).astype(np.float64) - 0.5
        edges[0], edges[-1] = -np.inf, np.inf
        tables = []
        for place in range(_OFFSETS + 1):
            offset = place / _OFFSETS - 0.5
            below = entropy.cdf((edges - offset) * (self.delta / self.sigma))
            tables.append(entropy.categorical(entropy.frequencies(below[1:] - below[:-1])))
        return tables

    def split(self, mean: Array) -> tuple[Integers, Integers]:
        """The grid point nearest to each mean, and the number of its table."""
        centre = np.rint(mean / self.delta)
        return centre.astype(np.int64), np.rint((mean / self.delta - centre + 0.5) * _OFFSETS).astype(np.int64)


class Empty(Exception):
    """The stack had too few bits to pop."""


class Stack:
    """A stack of symbols over constriction's ANS coder. A `push` of what a `pop` gave restores the stack to the bit.

    >>> stack, normal, mean = Stack(), GridNormal(1.0, 0.25), np.linspace(-3, 3, 50)
    >>> stack.push_bytes(bytes(range(256)))
    >>> k = stack.pop(mean, normal)
    >>> stack.push(k, mean, normal)
    >>> stack.pop_bytes() == bytes(range(256)), stack.empty()
    (True, True)
    """

    def __init__(self, words: bytes = b"") -> None:
        """An empty stack, or the stack whose `words` are given."""
        numbers = np.frombuffer(words, "<u4").astype(np.uint32)
        self._coder = constriction.stream.stack.AnsCoder(numbers)

    def copy(self) -> "Stack":
        other = Stack()
        other._coder = self._coder.clone()
        return other

    def become(self, other: "Stack") -> None:
        self._coder = other._coder

    def words(self) -> bytes:
        return self._coder.get_compressed().astype("<u4").tobytes()  # type: ignore[no-any-return]

    def empty(self) -> bool:
        return bool(self._coder.is_empty())

    def _check_filled(self) -> None:
        if self._coder.num_words() < 3:
            raise Empty

    def pop(self, mean: Array, normal: GridNormal) -> Integers:
        """Grid points, int64 like mean [m], drawn from N(mean, sigma^2) with bits of the stack."""
        centre, place = normal.split(mean)
        steps = np.empty(len(mean), np.int64)
        for i, table in enumerate(normal.tables):
            chosen = place == i
            if chosen.any():
                steps[chosen] = self._coder.decode(table, int(chosen.sum())) - normal.window
                self._check_filled()
        for i_far in np.flatnonzero(np.abs(steps) == normal.window):
            steps[i_far] += np.sign(steps[i_far]) * self.pop_bits(_FAR)
        return centre + steps

    def push(self, k: Integers, mean: Array, normal: GridNormal) -> None:
        centre, place = normal.split(mean)
        steps = k - centre
        near = np.clip(steps, -normal.window, normal.window)
        for i_far in np.flatnonzero(np.abs(near) == normal.window)[::-1]:
            distance = abs(int(steps[i_far])) - normal.window
            if distance >> _FAR:
                raise Empty  # too far for any number of bits
            self.push_bits(distance, _FAR)
        for i, table in reversed(list(enumerate(normal.tables))):
            chosen = place == i
            if chosen.any():
                self._coder.encode_reverse((near[chosen] + normal.window).astype(np.int32), table)

    def pop_bits(self, bits: int) -> int:
        value = int(self._coder.decode(constriction.stream.model.Uniform(1 << bits)))
        self._check_filled()
        return value

    def push_bits(self, value: int, bits: int) -> None:
        self._coder.encode_reverse(int(value), constriction.stream.model.Uniform(1 << bits))

    def pop_bytes(self) -> bytes:
        """Bytes that `push_bytes` put there. Raises Damaged if their length is more than the stack has."""
        length = self.pop_bits(16) << 16 | self.pop_bits(16)
        if length > 4 * self._coder.num_words() + 4:  # zeros at the bottom need no word
            raise Damaged("holds a file that is longer than the stack")
        return self._coder.decode(_BYTE, length).astype(np.uint8).tobytes()  # type: ignore[no-any-return]

    def push_bytes(self, data: bytes) -> None:
        self._coder.encode_reverse(np.frombuffer(data, np.uint8).astype(np.int32), _BYTE)
        self.push_bits(len(data) & 0xFFFF, 16)
        self.push_bits(len(data) >> 16, 16)

    def pop_each(self, frequency: Integers) -> NDArray[np.int32]:
        """Symbols [m], each with its own frequencies [m, n]."""
        return np.array(self._coder.decode(constriction.stream.model.Categorical(perfect=False), frequency - 1.0))

    def push_each(self, symbols: NDArray[np.integer], frequency: Integers) -> None:
        chosen = np.ascontiguousarray(symbols, np.int32)
        self._coder.encode_reverse(chosen, constriction.stream.model.Categorical(perfect=False), frequency - 1.0)


class Link(NamedTuple):
    """The step between x_s and x_t: q(x_t | x_s) on the grid of x_t, and p(x_s | x_t) on the grid of x_s."""

    group: Group
    signal: float
    q: GridNormal
    p: GridNormal


def _links(chain: Tables) -> tuple[list[Link], GridNormal]:
    """The links from data to noise, and N(0, 1) on the last grid. The first link, from x_0, has no p."""
    links: list[Link] = []
    delta = 1.0
    for group in (chain.last, *reversed(chain.groups)):
        b = 1 - group.abar_t / group.abar_s
        delta_s, delta = delta, math.sqrt(b) / _FINE
        p = GridNormal(math.sqrt(group.variance(0)) if group.s else 1.0, delta_s)
        links.append(Link(group, math.sqrt(group.abar_t / group.abar_s), GridNormal(math.sqrt(b), delta), p))
    return links, GridNormal(1.0, delta)


class Coder:
    """Push a tile uint8 [C, H, W] onto a stack and pop it again; `push` and `pop` are mirror images."""

    def __init__(self, chain: Tables, predict: Predict, shape: Sequence[int]) -> None:
        self.chain, self.predict, self.shape = chain, predict, shape
        self.links, self.prior = _links(chain)

    def _x0(self, k: Integers, link: Link) -> tuple[Array, Array]:
        """x_t at the grid points k, and its x0^, both flat."""
        x: Array = k.astype(np.float64) * link.q.delta
        return x, self.predict(x.reshape(1, *self.shape), link.group.t).ravel()

    def _mean(self, x: Array, x0: Array, group: Group) -> Array:
        c_0, c_x, _ = group.coefficients
        mean: Array = c_x * x + c_0 * x0
        return mean

    def push(self, stack: Stack, tile: Image) -> None:
        first, *others = self.links
        k = stack.pop(first.signal * progressive.signal(tile).ravel(), first.q)
        x, x0 = self._x0(k, first)
        self._push_pixels(stack, tile[None], x0.reshape(1, *self.shape))
        for link in others:
            k_s, x_s = k, x
            k = stack.pop(link.signal * x_s, link.q)
            x, x0 = self._x0(k, link)
            stack.push(k_s, self._mean(x, x0, link.group), link.p)
        stack.push(k, np.zeros(len(k)), self.prior)

    def pop(self, stack: Stack) -> Image:
        first, *others = self.links
        k = stack.pop(np.zeros(math.prod(self.shape)), self.prior)
        for link, next_link in zip(reversed(others), reversed(self.links[:-1]), strict=True):
            x, x0 = self._x0(k, link)
            k_t = k
            k = stack.pop(self._mean(x, x0, link.group), link.p)
            stack.push(k_t, link.signal * (k.astype(np.float64) * next_link.q.delta), link.q)
        _, x0 = self._x0(k, first)
        tile: Image = self._pop_pixels(stack, x0.reshape(1, *self.shape))[0]
        stack.push(k, first.signal * progressive.signal(tile).ravel(), first.q)
        return tile

    def _push_pixels(self, stack: Stack, tile: Image, x0: Array) -> None:
        coded = np.ones(tile.shape, bool)
        scales = progressive.pixel_scales(self.chain, tile, x0, coded)
        pushed: list[tuple[Image, Integers]] = []

        def collect(frequency: Integers, at: Any) -> Image:
            symbols: Image = tile[at]
            pushed.append((symbols, frequency))
            return symbols

        progressive.pixel_walk(self.chain, x0, scales, coded, collect)
        for symbols, frequency in reversed(pushed):
            stack.push_each(symbols, frequency)
        stack.push_each(np.array([self.chain.scale_symbol(scales[0])]), self.chain.scale_frequency[None])

    def _pop_pixels(self, stack: Stack, x0: Array) -> Image:
        scale = self.chain.scale_of_symbol(int(stack.pop_each(self.chain.scale_frequency[None])[0]))
        coded = np.ones(x0.shape, bool)
        return progressive.pixel_walk(self.chain, x0, [scale], coded, lambda frequency, at: stack.pop_each(frequency))


# -- the file ----------------------------------------------------------------------------------------------------------


def compress(
    model: Model, images: Sequence[Image], names: Sequence[str] = (), bits: int | None = None, local: bool = False,
    seed: int = 0, tick: Callable[[int], object] = lambda done: None,
) -> bytes:  # fmt: skip
    """Compress pictures uint8 [H, W, C] to one lossless archive, at about the model's bound if there are several.

    names are stored with the pictures; bits, local and seed are as for `picture.compress`; tick is called with the
    number of finished pictures. Raises InputError for a model without tables for archives, and for no pictures.
    """
    if model.chain is None:
        raise InputError("archive: the model has no tables for one; calibrate it again")
    if not images or len(names) not in (0, len(images)):
        raise InputError(f"archive: {len(images)} pictures with {len(names)} names; want at least one, and a name each")
    for image in images:
        picture.grid(_header(model, picture.checked(image), local), model)
    coder, stack = _coder(model, local, check=True), Stack()
    files: list[bytes] = []
    for done, image in enumerate(images):
        trial = stack.copy()
        try:
            for tile in picture.cut(image, _header(model, image.shape, local), model).pixels:
                _push(trial, coder, tile)
            stack = trial
        except (Empty, Undecided):
            files.append(picture.compress(model, image, bits=bits, local=local, seed=seed))
            stack.push_bytes(files[-1])
            stack.push_each(np.array([_FILE]), _ATTEMPTS[None])
        tick(done + 1)
    about = zlib.compress(json.dumps([_sizes(images), list(names)], separators=(",", ":")).encode(), 9)
    words = stack.words()
    chosen = read_header(files[0])[0].bits
    contents = Contents(
        local, chosen, model.identity, len(images), len(files), len(about), sum(map(len, files)), len(words),
        model.where if local else b"",
    )  # fmt: skip
    return sealed(contents.to_bytes() + about + words + _checksum(images).to_bytes(4, "big"))


def _sizes(images: Sequence[Image]) -> list[list[int]]:
    """The shapes as runs of [count, height, width, channels]."""
    runs: list[list[int]] = []
    for image in images:
        if runs and runs[-1][1:] == list(image.shape):
            runs[-1][0] += 1
        else:
            runs.append([1, *image.shape])
    return runs


def _sizes_and_names(values: Any, pictures: int) -> tuple[list[tuple[int, ...]], list[str]]:
    """The shapes and names in an archive's JSON. Raises ValueError or TypeError for values that no archive has."""
    runs, names = values
    shapes: list[tuple[int, ...]] = []
    for count, *shape in runs:
        height, width, channels = shape
        whole = all(type(n) is int and n >= 1 for n in (count, *shape))
        good = whole and channels in (1, 3) and height * width <= MOST_PIXELS
        if not good or len(shapes) + count > pictures:
            raise ValueError
        shapes += [tuple(shape)] * count
    if len(shapes) != pictures or len(names) not in (0, pictures) or not all(type(name) is str for name in names):
        raise ValueError
    return shapes, names


def _checksum(images: Sequence[Image]) -> int:
    checksum = 0
    for image in images:
        checksum = zlib.crc32(image.tobytes(), checksum)
    return checksum


def _coder(model: Model, local: bool, check: bool) -> Coder:
    assert model.chain is not None
    return Coder(model.chain, model.predictor(local, check), model.shape)


def _push(stack: Stack, coder: Coder, tile: Image) -> None:
    """Push a tile and the number of attempts. An attempt fails if an x0^ lies too near a rounding boundary; the next
    one has other bits on top."""
    for attempt in range(_FILE):
        trial = stack.copy()
        if attempt:
            trial.push_bits(attempt * 40503 & 0xFFFF, 16)
        try:
            coder.push(trial, tile)
        except Undecided:
            continue
        trial.push_each(np.array([attempt]), _ATTEMPTS[None])
        stack.become(trial)
        return
    raise Undecided


def _pop(stack: Stack, coder: Coder, model: Model, header: Header) -> tuple[Image, int]:
    """The next picture, and the length of its file in bytes, or 0 if it is not a file."""
    c, _, _, down, across = picture.grid(header, model)
    tiles: list[Image] = []
    for tile in range(down * across * (header.channels if c == 1 else 1)):
        attempt = int(stack.pop_each(_ATTEMPTS[None])[0])
        if attempt == _FILE:
            if tile:
                raise Damaged("a file in the middle of a picture")
            data = stack.pop_bytes()
            return _of_file(model, data, header), len(data)
        tiles.append(coder.pop(stack))
        if attempt:
            stack.pop_bits(16)
    return picture.join(np.stack(tiles[::-1]), header, model), 0


def _of_file(model: Model, data: bytes, wanted: Header) -> Image:
    header, begin = read_header(data)
    same = (header.height, header.width, header.channels) == (wanted.height, wanted.width, wanted.channels)
    if not same or not header.lossless or len(data) != begin + header.length + header.trailer:
        raise Damaged("a file that is not whole and lossless, or of another size")
    return picture.decompress(model, data)


def _header(model: Model, shape: Sequence[int], local: bool) -> Header:
    height, width, channels = shape
    return Header(width, height, channels, 0, True, local, False, model.identity, 0, 0, 0)


def decompress(model: Model, data: bytes) -> Iterator[tuple[str, Image]]:
    """Yield the names and pictures of an archive, in order; a name is "" if the archive has no names.

    Raises Damaged as `picture.decompress` does. It yields no picture before all are read and their checksum agrees.
    """
    contents, begin = read_contents(data)
    check_identity(contents.identity, model.identity)
    expected = begin + contents.about + contents.stack + 8
    if len(data) != expected:
        what = "more than the archive has" if len(data) > expected else "missing; an archive cannot be read in part"
        raise Damaged(f"{len(data)} bytes: {abs(len(data) - expected)} {what}")
    check_intact(data)
    if model.chain is None:
        raise InputError("archive: the model has no tables for one; calibrate it again")
    try:
        text = zlib.decompressobj().decompress(data[begin : begin + contents.about], 1 << 26)
        shapes, names = _sizes_and_names(parse_json(text), contents.pictures)
        stack = Stack(data[begin + contents.about : -8])
    except (zlib.error, ValueError, TypeError) as error:
        raise Damaged("sizes, names or stack: damaged; want the file as it was written") from error
    coder = _coder(model, contents.local, check=False)
    images, sizes = list[Image](), list[int]()
    try:
        for shape in reversed(shapes):
            image, size = _pop(stack, coder, model, _header(model, shape, contents.local))
            images.append(image)
            sizes.append(size)
        if not stack.empty():
            raise Damaged("is not empty at the end")
    except Empty as error:
        raise Damaged(f"stack: ends too early; {_DIFFERS}") from error
    except Damaged as error:
        raise Damaged(f"stack: {error}; or {_DIFFERS}") from error
    if (sum(map(bool, sizes)), sum(sizes)) != (contents.files, contents.file_bytes):
        raise Damaged("header: of other files than are on the stack")
    images.reverse()
    if _checksum(images) != int.from_bytes(data[-8:-4], "big"):
        raise Damaged(f"pixels: not those that were written; {_DIFFERS}")
    yield from zip(names or [""] * len(images), images, strict=True)
