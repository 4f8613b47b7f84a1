"""Pictures survive the way in and out unchanged, or the user is told in one line."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np
from PIL import Image

from ddpm.errors import InputError
from ddpm.files import images


def random(height, width, channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4])).flatmap(
        lambda shape: st_np.arrays(np.uint8, shape)
    )
)
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_read_bit_for_bit(pixels):
    height, width, channels = pixels.shape
    image = images.read(images.to_png(pixels))
    assert images.native(image) == channels
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is converted
        assert (images.fit(image, (height, width), channels) == pixels).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 20), (20, 8)])
def test_crop_is_central_and_exact_where_no_scaling_is_needed(channels, height, width):
    pixels = random(height, width, channels)
    if channels == 4:
        pixels[..., 3] = 255
    image = images.read(images.to_png(pixels))
    y, x = (height - 8) // 2, (width - 8) // 2
    assert (images.fit(image, (8, 8), channels) == pixels[y : y + 8, x : x + 8]).all()


def test_scaling_is_antialiased():
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    small = images.fit(images.read(images.to_png(stripes)), (8, 8), 1)
    assert abs(small[2:-2, 2:-2].astype(float) - 127.5).max() < 8


def test_scaling_commutes_with_mirroring():
    pixels = random(21, 33, 3)
    there = images.fit(images.read(images.to_png(pixels)), (8, 8), 3)
    mirrored = images.fit(images.read(images.to_png(pixels[:, ::-1])), (8, 8), 3)
    assert abs(there.astype(int) - mirrored[:, ::-1]).max() <= 1


def test_enlarging_warns_and_keeps_a_constant():
    with pytest.warns(UserWarning, match=r"a\.png: smaller than 8x8"):
        assert (images.fit(Image.new("RGB", (3, 4), (1, 2, 3)), (8, 8), 3, "a.png") == (1, 2, 3)).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(form):
    levels = np.array([[0, 128, 129, 257, 256 * 257 // 2, 65406, 65407, 65535]], np.uint16)
    image = images.read(encoded(Image.fromarray(levels), form))
    assert images.native(image) == 1
    with pytest.warns(UserWarning, match="more than 8 bits"):
        found = images.fit(image, (1, 8), 1)[0, :, 0]
    assert (found == np.rint(levels[0] / 257)).all()
    assert found[[0, 1, 2, -1]].tolist() == [0, 0, 1, 255]


def test_32_bit_integers_that_hold_16_bits_are_scaled_and_others_refused():
    fit = images.fit(Image.fromarray(np.array([[0, 65535]], np.int32)), (1, 2), 1, notes={})
    assert fit[0, :, 0].tolist() == [0, 255]
    for value in (-1, 65536):
        with pytest.raises(InputError, match=r"a\.tif: grey levels"):
            images.convert(Image.fromarray(np.array([[0, value]], np.int32)), 1, "a.tif", {})
    with pytest.raises(InputError, match=r"a\.tif: mode F"):
        images.convert(Image.new("F", (1, 1)), 1, "a.tif", {})


def test_transparency_is_lost_onto_white_and_an_opaque_image_keeps_its_colours():
    opaque = random(8, 8, 4)
    opaque[..., 3] = 255
    assert (np.asarray(images.convert(Image.fromarray(opaque), 3, notes={})) == opaque[..., :3]).all()
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    assert images.convert(clear, 3, notes={}).getpixel((0, 0)) == (255, 255, 255)
    assert images.convert(clear, 1, notes={}).getpixel((0, 0)) == 255
    assert images.convert(Image.new("LA", (1, 1), (0, 0)), 1, notes={}).getpixel((0, 0)) == 255


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16"]
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_converts_to_every_other_with_one_note(mode, channels):
    notes = {}
    image = Image.new(mode, (2, 2))
    for name in ("a.png", "b.png"):
        assert images.convert(image, channels, name, notes).mode == images.MODES[channels]
    same = mode == images.MODES[channels]
    assert list(notes.values()) == ([] if same else [("a.png", 2)])


def test_palette_keeps_colour_and_transparency():
    colours = Image.fromarray(random(4, 4, 3)).quantize(4)
    assert images.native(images.read(encoded(colours))) == 3
    transparent = images.read(encoded(colours, transparency=0))
    assert images.native(transparent) == 4
    assert np.asarray(images.convert(transparent, 4, notes={}))[..., 3].min() == 0


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    pixels = random(4, 6, 3)
    image = images.read(encoded(Image.fromarray(pixels), exif=exif))
    assert (np.asarray(image) == np.rot90(pixels, -1)).all()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
NOISE = Image.fromarray(random(64, 64, 3))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello, this is no image\n" * 10,
        bytes(1000),
        encoded(NOISE)[:200],
        encoded(NOISE)[:2000],
        encoded(NOISE)[:2000] + bytes(2000) + encoded(NOISE)[4000:],
        encoded(NOISE, "JPEG")[:700],
        encoded(NOISE, "GIF")[:700],
        encoded(NOISE, "TIFF")[:700],
        encoded(NOISE, "WEBP")[:700],
        encoded(NOISE, "BMP")[:700],
        BOMB,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n",
    ],
    ids=lambda data: f"{data[:4]}{len(data)}",
)
def test_every_damage_is_one_line_with_the_name(data, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    for source, name in ((path, None), (data, "a.png"), (io.BytesIO(data), "a.png")):
        with pytest.raises(InputError, match=r"a\.png: ") as caught:
            images.read(source, name)
        assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        images.read(tmp_path / "none.png")
    with pytest.raises(InputError, match="is a directory"):
        images.read(tmp_path)


@given(st.integers(1, 17), st.sampled_from([1, 3, 4]), st.one_of(st.none(), st.integers(1, 5)), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_every_tile_of_the_grid_is_its_image(n, channels, columns, padding):
    tiles = np.stack([random(10, 16, channels, seed) for seed in range(n)])
    sheet = images.grid(tiles, columns, padding, minimum_tile=20)
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    assert sheet.shape == (-(-n // columns) * (20 + padding) + padding, columns * (32 + padding) + padding, channels)
    for i, tile in enumerate(tiles):
        y, x = i // columns * (20 + padding) + padding, i % columns * (32 + padding) + padding
        assert (sheet[y : y + 20 : 2, x : x + 32 : 2] == tile).all()
        assert (sheet[y + 1 : y + 20 : 2, x + 1 : x + 32 : 2] == tile).all()
    inside = n * 20 * 32
    assert (sheet == 255).all(-1).sum() >= sheet.shape[0] * sheet.shape[1] - inside


def test_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="N >= 1"):
        images.grid(np.zeros((0, 8, 8, 1), np.uint8))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_save_many_makes_what_the_name_says(tmp_path, channels):
    pixels = np.stack([random(40, 36, channels, seed) for seed in range(3)])
    names = ["0", "1", "2"]

    def load(path):
        return np.asarray(images.read(path)).reshape(-1, images.read(path).width, channels)

    images.save_many(tmp_path / "new" / "grid.png", pixels, names)
    assert (load(tmp_path / "new" / "grid.png") == images.grid(pixels)).all()
    images.save_many(tmp_path / "one.PNG", pixels[:1], names[:1])
    assert (load(tmp_path / "one.PNG") == pixels[0]).all()
    images.save_many(tmp_path / "all.npz", pixels, names)
    assert (np.load(tmp_path / "all.npz")["arr_0"] == pixels).all()
    (tmp_path / "empty.d").mkdir()
    for folder in (tmp_path / "folder", tmp_path / "empty.d", f"{tmp_path}/v1.0/"):
        images.save_many(folder, pixels, names)
        found = sorted(p.name for p in (tmp_path / folder).iterdir())
        assert found == ["0.png", "1.png", "2.png"]
        assert (load(tmp_path / folder / "2.png") == pixels[2]).all()
    assert not list(tmp_path.rglob("*.part"))


def test_places_that_cannot_take_images_are_refused_before_the_work(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(InputError, match="not empty"):
        images.check_out(tmp_path / "full")
    with pytest.raises(InputError, match=r"\.png or \.npz, or a folder"):
        images.check_out(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="a file of that name"):
        images.check_out(tmp_path / "full" / "file")
    with pytest.raises(InputError, match="cannot write"):
        images.check_out(tmp_path / "full" / "file" / "a.png")
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "file"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    images.save_many(path, random(8, 8, 1)[None], ["0"])
    before = path.read_bytes()

    def broken(file, *_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        images.save_many(path, random(8, 8, 1, 1)[None], ["0"])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
