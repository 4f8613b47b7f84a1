"""fit random-crop: parts of images at their own resolution, at places that depend on the seed and the step alone."""

import math
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import tensors, train

from ddpm.errors import InputError
from ddpm.files import arrays, data, images
from ddpm.files.data.batches import crop_places
from ddpm.noise import generator
from ddpm.pixels import EIGHT_BIT, Values

N, OUTER, SIZE = 12, (23, 31), (8, 8)
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (N, *OUTER, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (N, *OUTER, 1), dtype=np.uint16)
BANDS = RNG.integers(0, 10_001, (N, *OUTER, 13), dtype=np.uint16)
FLOATS = RNG.normal(0, 1, (N, *OUTER, 1)).astype(np.float32)

KINDS = [
    pytest.param(RGB, EIGHT_BIT, ".png", id="RGB"),
    pytest.param(GREY16, Values("uint16", 0, 65535), ".png", id="grey16"),
    pytest.param(BANDS, Values("uint16", 0, 10_000), "one.npy", id="13 bands in one file"),
    pytest.param(BANDS, Values("uint16", 0, 10_000), ".npy", id="13 bands"),
    pytest.param(FLOATS, Values("float32", -9, 9), "one.npy", id="float32"),
]


def write(path, given, kind):
    if kind == "one.npy":
        np.save(path / kind, given)
        return str(path / kind)
    for i, image in enumerate(given):
        images.save_image(path / f"{i}", image)
    assert all(file.suffix == kind for file in path.iterdir())
    return str(path)


def opened(path, given, values, kind, **settings):
    source = write(path, given, kind)
    return data.load(source, SIZE, given.shape[3], values=values, fit="random-crop", **settings)


@pytest.mark.parametrize(("given", "values", "kind"), KINDS)
def test_a_crop_is_a_slice_of_the_image(tmp_path, given, values, kind):
    loaded = opened(tmp_path, given, values, kind)
    [batch] = data.batches(loaded, 5, 10, 3, 4, workers=0)
    rows, places = data.order(N, 5, 3, 10), crop_places(loaded, 5, 3, 10)
    assert batch.dtype == values.torch
    corners = set()
    for image, row, (u, v) in zip(batch.permute(0, 2, 3, 1).numpy(), rows, places.tolist(), strict=True):
        top, left = math.floor(u * (23 - 8 + 1)), math.floor(v * (31 - 8 + 1))
        assert (image == given[row, top : top + 8, left : left + 8]).all()
        corners.add((top, left))
    assert len(corners) > 5


@pytest.mark.parametrize(("given", "values", "kind"), KINDS)
def test_evaluation_takes_the_centre(tmp_path, given, values, kind):
    loaded = opened(tmp_path, given, values, kind)
    assert not loaded.decoded
    assert (loaded.batch(range(N)).permute(0, 2, 3, 1).numpy() == given[:, 7:15, 11:19]).all()


def test_workers_processes_and_resuming_change_nothing(tmp_path):
    loaded = opened(tmp_path, RGB, EIGHT_BIT, ".png")
    whole = torch.stack(list(data.batches(loaded, 1, 8, 0, 4, workers=0)))
    assert torch.equal(whole, torch.stack(list(data.batches(loaded, 1, 8, 0, 4, workers=2))))
    assert torch.equal(whole, torch.stack(list(data.batches(loaded, 1, 8, 0, 4, workers="auto"))))
    parts = [torch.stack(list(data.batches(loaded, 1, 8, 0, 4, part=part, workers=0))) for part in HALVES]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(whole[2:], torch.stack(list(islice(data.batches(loaded, 1, 8, 2, 9, workers=2), 2))))
    assert not torch.equal(whole[0], next(data.batches(loaded, 2, 8, 0, 4, workers=0)))


HALVES = slice(0, 4), slice(4, 8)


def test_every_place_is_as_likely(tmp_path):
    """Chi squared over all places of a crop, and no dependence of top and left; the places come from many steps."""
    loaded = opened(tmp_path, RGB[:2], EIGHT_BIT, ".png")
    draws = torch.cat([crop_places(loaded, 0, step, 64) for step in range(500)]).tolist()
    counts = np.zeros((16, 24))
    for place in draws:
        counts[images.corner(OUTER, SIZE, place)] += 1
    expected = len(draws) / counts.size
    z = (((counts - expected) ** 2 / expected).sum() - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))
    assert abs(z) < 4


def test_the_last_place_is_reached_and_none_beyond():
    """Also by the largest number below 1, whose product with a large room rounds up."""
    below = math.nextafter(1, 0)
    for room in (0, 1, 2**52):
        assert images.corner((room + 8, 8), (8, 8), (below, below)) == (room, 0)


@pytest.mark.parametrize("shape", [(4, 16), (16, 4), (5, 6), (4, 40)])
def test_small_images_are_enlarged_until_they_cover_the_size(tmp_path, shape):
    """And no further: the shorter of the sides that were too short gets the size. The picture and the array agree."""
    ramp = np.add.outer(7 * np.arange(shape[0]), 3 * np.arange(shape[1])).astype(np.uint8)
    notes = {}
    picture = images.Image.fromarray(ramp)
    whole = np.asarray(images.resized(picture, (8, 8), "crop"))
    fitted = images.fit(picture, (8, 8), 1, "a", notes, "random-crop")
    assert notes == {"smaller than 8x8, enlarged": ("a", 1)}
    assert fitted.shape == (8, 8, 1)
    assert np.abs(fitted[..., 0].astype(int) - whole).max() <= 6  # both show the centre, to half a pixel
    array = arrays.fit(ramp[..., None].astype(np.uint16), (8, 8), 1, "random-crop", "a", {})
    assert np.abs(array.astype(int) - fitted).max() <= 1
    ends = [images.fit(picture, (8, 8), 1, "a", {}, "random-crop", place) for place in ((0, 0), (0.999, 0.999))]
    assert abs(int(ends[0][0, 0, 0]) - ramp[0, 0]) <= 4
    assert abs(int(ends[1][-1, -1, 0]) - ramp[-1, -1]) <= 4


def test_only_the_part_is_looked_at(tmp_path):
    """A number out of range beyond the part is not read, so that large arrays stay on the disk."""
    odd = BANDS[:2].copy()
    odd[:, 0, 0] = 20_000
    loaded = opened(tmp_path, odd, Values("uint16", 0, 10_000), "one.npy")
    assert (loaded.batch([0])[0].permute(1, 2, 0).numpy() == odd[0, 7:15, 11:19]).all()
    with pytest.raises(InputError, match="outside the range"):
        loaded.batch([0], torch.zeros(1, 2, dtype=torch.float64))


def test_a_bad_image_gives_its_place_to_the_next_one(tmp_path):
    source = write(tmp_path, RGB[:3], ".png")
    (tmp_path / "1.png").write_bytes(b"no")
    loaded = data.load(source, SIZE, 3, fit="random-crop", skip_bad=True)
    with pytest.warns(UserWarning, match="bad images are skipped"):
        found = loaded.batch([1], torch.tensor([[0.5, 0.25]], dtype=torch.float64))
    assert (found[0].permute(1, 2, 0).numpy() == RGB[2, 8:16, 6:14]).all()


def test_the_fingerprint_tells_how_images_get_their_size(tmp_path):
    source = write(tmp_path, RGB, ".png")
    prints = {data.load(source, SIZE, 3, fit=fit, cache_bytes=0).fingerprint for fit in ("crop", "pad", "random-crop")}
    assert len(prints) == 3


def test_a_run_that_is_resumed_sees_the_same_crops(tmp_path):
    """To the bit, also with workers in place of none."""
    (tmp_path / "a").mkdir()
    source = write(tmp_path / "a", RGB[..., :1], ".png")
    options = ["--data", source, "--fit", "random-crop", "--workers"]
    assert train(tmp_path / "once", *options, 0, "--steps", 4) == 0
    assert train(tmp_path / "twice", *options, 2, "--steps", 2) == 0
    assert train(tmp_path / "twice", *options, 0, "--steps", 4) == 0
    once, twice = (tensors(tmp_path / name, 4) for name in ("once", "twice"))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_crops_do_not_depend_on_other_draws():
    """The key keeps them apart from the order and from the noise of the same step."""
    digits = data.load("digits", (4, 4), 1, fit="random-crop")
    other = torch.rand(4, 2, generator=generator(0, 0), dtype=torch.float64)
    assert not torch.equal(crop_places(digits, 0, 0, 4), other)
    assert crop_places(data.load("digits", (4, 4), 1), 0, 0, 4) is None
