"""Pictures survive the way in and out unchanged, or the user is told in one line."""

import base64
import io
import os
import runpy
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
@settings(max_examples=50)
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


# -- depth, white, transparency and further pictures, as the file tells them -------------------------------------------


def grey_levels(data):
    """What `fit` makes of the first row of a grey image, and its notes."""
    notes = {}
    image = images.read(data)
    return images.fit(image, (image.height, image.width), 1, notes=notes)[0, :, 0].tolist(), list(notes)


def tiff(values, bits, *tags, photometric=1, order="<"):
    """One row of grey levels as an uncompressed TIFF; `tags` are further (tag, value)."""
    row = "".join(f"{value % 2**bits:0{bits}b}" for value in values)
    row += "0" * (-len(row) % 8)
    pixels = int(row, 2).to_bytes(len(row) // 8, "big")
    if bits == 16:
        pixels = np.array(values).astype(f"{order}i4").astype(f"{order}u2").tobytes()
    entries = {256: len(values), 257: 1, 258: bits, 259: 1, 262: photometric, 277: 1, 278: 1, 279: len(pixels)}
    entries = {**entries, **dict(tags)}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    fields = [struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in entries.items()]
    fields.append(struct.pack(f"{order}HHII", 273, 4, 1, start))
    fields.sort(key=lambda field: struct.unpack(f"{order}H", field[:2]))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(fields))
    return head + b"".join(fields) + bytes(4) + pixels


@pytest.mark.parametrize(
    ("data", "levels", "top"),
    [
        (tiff([0, 65, 2047, 4095], 12), [0, 65, 2047, 4095], 4095),
        (tiff([0, 65, 4095], 16, (281, 4095)), [0, 65, 4095], 4095),  # MaxSampleValue: 12 bits in 16
        (tiff([0, 65, 4095], 16, (281, 4095), order=">"), [0, 65, 4095], 4095),
        (tiff([0, 300, 4000], 16, (281, 4000)), [0, 300, 4000], 65535),  # the largest level of this picture
        (tiff([0, 300, 5000], 16, (281, 4095)), [0, 300, 5000], 65535),  # more than it says
        (tiff([0, 300, 32767], 16, (339, 2)), [0, 300, 32767], 32767),  # signed
        (tiff([0, 300, 65535], 16, photometric=0), [65535, 65235, 0], 65535),  # WhiteIsZero
        (tiff([0, 65, 255], 8, photometric=0), [255, 190, 0], 255),
        (tiff([0, 1, 3], 2, photometric=0), [3, 2, 0], 3),
        (b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023), [0, 512, 1023], 1023),
        (b"P5 3 1 100\n" + bytes([0, 50, 100]), [0, 50, 100], 100),
        (b"P2 3 1 65535\n0 300 65535\n", [0, 300, 65535], 65535),
    ],
)
def test_grey_is_scaled_from_the_levels_that_the_file_has(data, levels, top):
    found, notes = grey_levels(data)
    assert found == pytest.approx([level * 255 / top for level in levels], abs=0.5)
    assert notes == ([images.DEEP] if top > 255 else [])


@pytest.mark.parametrize("bits", [4, 6, 12, 16])
def test_jpeg_2000_is_scaled_from_its_own_bits(bits):
    """Pillow writes 16 bits; with another number in the header the decoded levels are shifted by the new midpoint."""
    top = 2**bits - 1
    values = np.array([[0, 1, top // 3, top]] * 4)
    stored = 8 if bits < 8 else 16
    moved = (values - 2 ** (bits - 1) + 2 ** (stored - 1)).astype(np.uint8 if stored == 8 else np.uint16)
    data = bytearray(encoded(Image.fromarray(moved), "JPEG2000", irreversible=False, no_jp2=True))
    data[data.index(b"\xff\x4f\xff\x51") + 42] = bits - 1
    found, notes = grey_levels(bytes(data))
    assert found == pytest.approx((values[0] * 255 / top).tolist(), abs=0.5)
    assert notes == ([images.DEEP] if bits > 8 else [])


AVIF_10_BITS = (  # libavif's, by way of imagecodecs: 2x2, black and then white
    "0000WW^{RQVRmU|00000VRmU|ZE0pPZE0a<O+hh10002%ZDn*}000000000XXk=`10000000000aA{+7000000000000000000004sdC7Z2$lO0003100"
    "16oY;R)#0000)000310RR910RR926951JhX4QoC~0YKW&i*H00031000_kZf0cy000000RRADb}%tRZ)|UJ00000YH4tCZ~y=ROKEUpZvX%Q6lrsCWdH"
    "yG000000ssI20ssI25O8UDX#fBK00RmN3IG5A3}JRLLxCVb000006Ju{|a&BX6cmM(b0ssJj0000NX>e^}0000000001009I60)qqq0056|WMOm?015{<"
    "06uUaAPF*h5C8!70RQ~jkN^MX`7zGf3-5j3;bcVUMChn&sBA>%;bcVUMCe55MCe54#+U#9|NsC0{>mS@8P=*=scNOFma1B*YNe`{s#>XPrK*;yTB#`e|N"
    "sC0=4u5hguFuW3&bxFyh8B{#4ixMLh%d4FA%&!@e+DrQ=k"
)
RGB_16_BITS = struct.pack(">6H", 1, 2, 3, 65535, 0, 256)


@pytest.mark.parametrize(
    "data",
    [
        b"P6 2 1 65535\n" + RGB_16_BITS,
        b"P6 2 1 1023\n" + struct.pack(">6H", 1, 2, 3, 1023, 0, 256),
        b"P3 2 1 1023\n1 2 3 1023 0 256\n",
        pytest.param(
            base64.b85decode(AVIF_10_BITS), marks=pytest.mark.skipif("AVIF" not in Image.OPEN, reason="no AVIF")
        ),
    ],
)
def test_deep_colour_that_pillow_cuts_is_noted(data):
    notes = {}
    image = images.read(data)
    assert image.mode == "RGB"
    images.convert(image, 3, notes=notes)
    assert list(notes) == [images.DEEP]


def test_avif_of_8_bits_is_not_deep():
    if "AVIF" not in Image.SAVE:
        pytest.skip("needs a Pillow with AVIF")
    assert not images.read(encoded(NOISE, "AVIF")).info["deep"]


def test_what_pillow_decodes_wrongly_is_refused():
    """White of JPEG 2000 colour of 16 bits comes out black, and -1 in a TIFF of 8 bits comes out as 255."""
    colour = bytearray(encoded(NOISE, "JPEG2000", no_jp2=True, mct=0))
    at = colour.index(b"\xff\x4f\xff\x51") + 42
    colour[at : at + 9 : 3] = bytes([15] * 3)
    for data, message in ((bytes(colour), "JPEG 2000 colour of 16 bits"), (tiff([1], 8, (339, 2)), "signed levels")):
        with pytest.raises(InputError, match=rf"a\.x: {message}"):
            images.read(data, "a.x")


def png(width, height, depth, kind, rows, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


TRANSPARENT = {  # a PNG of which the first pixel is transparent, its mode, and the grey or colour of the second
    "1 bit": (png(2, 1, 1, 0, b"\0\x80", chunk(b"tRNS", b"\0\1")), "1", 0),
    "2 bits": (png(2, 1, 2, 0, b"\0\x60", chunk(b"tRNS", b"\0\1")), "L", 170),
    "grey": (png(2, 1, 8, 0, b"\0\x07\x09", chunk(b"tRNS", b"\0\7")), "L", 9),
    "16 bits": (png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 300, 257), chunk(b"tRNS", b"\x01\x2c")), "I;16", 1),
    "colour": (png(2, 1, 8, 2, b"\0\1\2\3\4\4\4", chunk(b"tRNS", b"\0\1\0\2\0\3")), "RGB", 4),
    "16-bit colour": (
        png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 300, 300, 300, 1024, 1024, 1024), chunk(b"tRNS", b"\x01\x2c" * 3)),
        "RGB",
        4,
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_transparent_level_or_colour_is_transparency(kind, channels):
    data, mode, other = TRANSPARENT[kind]
    image = images.read(data)
    assert image.mode == mode
    assert np.asarray(images.alpha(image)).tolist() == [[0, 255]]
    assert (images.native(image), images.keeps(image, channels)) == (4, channels == 4)
    found = images.fit(image, (1, 2), channels, notes={})[0]
    assert found[1].tolist() == [other] * min(channels, 3) + [255] * (channels == 4)
    assert found[0].tolist() == [255] * channels if channels < 4 else found[0, 3] == 0


def test_transparency_is_pillows():
    """A palette with alpha, a GIF, and one colour: what Pillow lays on white."""
    gif = encoded(Image.fromarray(random(4, 4, 3)).quantize(4), "GIF", transparency=1)
    palette = encoded(Image.fromarray(random(4, 4, 3)).quantize(4), transparency=bytes([0, 100, 255, 255]))
    colour = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))
    for data in (gif, palette, colour):
        rgba = Image.open(io.BytesIO(data)).convert("RGBA")
        image = images.read(data)
        assert (np.asarray(images.alpha(image)) == np.asarray(rgba)[..., 3]).all()
        for channels, mode in ((1, "L"), (3, "RGB")):
            want = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert(mode)
            assert (np.asarray(images.convert(image, channels, notes={})) == np.asarray(want)).all()


def test_a_transparent_colour_that_no_pixel_has_is_none():
    image = images.read(encoded(NOISE.convert("L").point(lambda level: max(level, 1)), transparency=0))
    assert images.alpha(image) is None
    assert images.convert(image, 1, notes=(notes := {})) is image
    assert notes == {}


def test_what_converts_without_loss():
    opaque = Image.fromarray(np.dstack([random(4, 4, 3), np.full((4, 4), 255, np.uint8)]))
    clear = Image.fromarray(random(4, 4, 4))
    grey_in_colour = Image.fromarray(random(4, 4, 1)[..., 0]).convert("RGB")
    for image, kept in (
        (Image.new("L", (2, 2)), {1, 3, 4}),
        (grey_in_colour, {1, 3, 4}),
        (NOISE, {3, 4}),
        (NOISE.quantize(8), {3, 4}),
        (opaque, {3, 4}),
        (clear, {4}),
    ):
        assert {channels for channels in (1, 3, 4) if images.keeps(image, channels)} == kept
        if 3 in kept:
            back = images.convert(images.convert(image, 3, notes={}), images.native(image.convert("RGB")), notes={})
            assert (np.asarray(back) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_a_file_of_several_pictures_is_noted_and_its_first_is_read(form):
    pages = [Image.fromarray(random(16, 16, 3, seed)) for seed in range(3)]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(pages[0], form, save_all=True, append_images=pages[1:], **options)
    notes = {}
    found = images.convert(images.read(data), 3, "a", notes)
    assert notes.pop(images.SEVERAL) == ("a", 1)
    assert (np.asarray(found) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
    assert not images.read(encoded(pages[0], "JPEG" if form == "MPO" else form)).info["several"]


# -- sizes are looked at before anything is read -----------------------------------------------------------------------


def test_a_large_picture_is_read_and_one_that_would_fill_the_memory_is_refused(monkeypatch):
    rows = zlib.compress(bytes((1 + 20_000 // 8) * 10_000))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0))
    large = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert images.read(large).size == (20_000, 10_000)  # Pillow's limit is 178,956,970 pixels
    with pytest.raises(
        InputError, match=r"^a\.png: 40000x40000 pixels: 6,400 MB; want at most .* DDPM_PICTURE_MB=6400"
    ):
        images.read(BOMB, "a.png")
    monkeypatch.setattr(images, "MEMORY", 1_000_000)
    with pytest.raises(InputError, match=r"^a\.png: 2 MB; want at most 1 MB, or set DDPM_PICTURE_MB=2$"):
        images.read(bytes(1_000_001), "a.png")


def test_the_limit_of_memory_is_a_number_of_megabytes(monkeypatch):
    monkeypatch.setenv("DDPM_PICTURE_MB", "5")
    assert runpy.run_path(images.__file__)["MEMORY"] == 5_000_000
    for value in ("1G", "0", "-3", "1.5"):
        monkeypatch.setenv("DDPM_PICTURE_MB", value)
        with pytest.raises(InputError, match=f"^DDPM_PICTURE_MB '{value}': want a number of megabytes, an integer of"):
            runpy.run_path(images.__file__)


def test_a_large_file_and_what_is_no_plain_file_are_refused_unread(tmp_path, monkeypatch):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(10**12)  # takes no room
    with pytest.raises(InputError, match=r"a\.png: 1,000,000 MB; want at most"):
        images.read(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    for path in (tmp_path / "b.png", "/dev/zero"):
        with pytest.raises(InputError, match="a pipe or a device, want a plain file"):
            images.read(path)


@given(st.integers(1, 17), st.sampled_from([1, 3, 4]), st.one_of(st.none(), st.integers(1, 5)), st.integers(0, 3))
@settings(max_examples=40)
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
    with pytest.raises(InputError, match=r"\.png, \.npz, \.npy or \.tif, or a folder"):
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
