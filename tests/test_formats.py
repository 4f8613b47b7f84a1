"""HEIC and JPEG XL: exact as far as the file is, and what is not kept is said."""

import io
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from ddpm.errors import InputError
from ddpm.files import arrays, codecs, data, images
from ddpm.files.data import listing
from ddpm.pixels import Values

imagecodecs = pytest.importorskip("imagecodecs")
heif = pytest.importorskip("pillow_heif")

RNG = np.random.default_rng(0)
SMOOTH = np.add.outer(5 * np.arange(32), 2 * np.arange(48)).astype(np.uint8)


def jxl(pixels, **options):
    return imagecodecs.jpegxl_encode(pixels, **{"lossless": True, **options})


def heic(image, mode=None, **options):
    file = io.BytesIO()
    if mode is None:
        heif.from_pillow(image).save(file, quality=-1, chroma=444, matrix_coefficients=0, **options)
    else:
        heif.encode(mode, (image.shape[1], image.shape[0]), image.tobytes(), file, quality=-1, **options)
    return file.getvalue()


def levels(shape, depth, dtype):
    return RNG.integers(0, 2**depth, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(9, 16), (8, 8, 3), (33, 47, 4), (1, 600, 3), (300, 200), (16, 16, 1)])
@pytest.mark.parametrize(("depth", "dtype"), [(8, np.uint8), (16, np.uint16), (10, np.uint16), (12, np.uint16)])
def test_lossless_jpeg_xl_is_exact(shape, depth, dtype):
    """The header gives size and depth, for sizes of every way to write them, in both kinds of file."""
    given = levels(shape, depth, dtype)
    file = jxl(given, bitspersample=depth)
    read = arrays.read(file, "a")
    assert read.dtype == dtype
    assert (read.reshape(shape) == given).all()
    found = codecs.decode(file, "a")
    assert (found.depth, found.several, found.turned) == (depth, False, False)
    assert codecs.size(file, "a") == shape[:2]
    picture = images.read(file, "a.jxl")
    assert images.size(file) == picture.size
    notes = {}
    channels = images.native(picture)
    converted = np.asarray(images.convert(picture, channels, "a", notes))
    top = 2**depth - 1
    assert (converted.reshape(shape) == np.floor(given / top * 255 + 0.5)).all()
    assert ("rounded to 8" in str(notes)) == (depth > 8)


def test_floats_of_jpeg_xl_are_exact_and_no_pictures():
    given = RNG.random((8, 8), np.float32)
    assert (arrays.read(jxl(given), "a")[..., 0] == given).all()
    with pytest.raises(InputError, match="mode F"):
        images.convert(images.read(jxl(given), "a"), 1, "a", {})
    with pytest.raises(InputError, match="a: float32 of 3 channels; want pixel_type float32"):
        images.read(jxl(RNG.random((8, 8, 3), np.float32)), "a")


def test_an_animation_gives_its_first_picture_and_that_is_said():
    frames = RNG.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    picture, notes = images.read(jxl(frames), "a"), {}
    assert (np.asarray(images.convert(picture, 3, "a", notes)) == frames[0]).all()
    assert notes == {images.SEVERAL: ("a", 1)}


def test_lossless_heic_is_exact():
    given = np.stack([SMOOTH, SMOOTH[::-1], 255 - SMOOTH], -1)
    picture = images.read(heic(Image.fromarray(given)), "a.heic")
    assert not picture.info["deep"]
    assert (np.asarray(picture) == given).all()
    assert (arrays.read(heic(Image.fromarray(given)), "a") == given).all()
    assert images.read(heic(Image.fromarray(SMOOTH)), "a").mode == "L"


def test_heic_of_10_bits_is_deep():
    """As an array it has its own levels, which a control shows: those of pillow-heif are shifted up."""
    given = np.stack([SMOOTH.astype(np.uint16) * 257] * 3, -1)
    file = heic(given, "RGB;16")
    read = arrays.read(file, "a")
    assert read.dtype == np.uint16
    assert 255 < read.max() <= 1023
    assert np.abs(read - given / 65535 * 1023).max() < 12
    shifted = np.asarray(heif.open_heif(file, convert_hdr_to_8bit=False))
    assert (shifted == read * 64).all()
    notes = {}
    rounded = np.asarray(images.convert(images.read(file, "a"), 3, "a", notes))
    assert notes == {images.DEEP: ("a", 1)}
    assert (rounded == np.floor(read / 1023 * 255 + 0.5)).all()


def test_heic_that_is_turned_or_holds_several_pictures():
    picture = Image.fromarray(np.stack([SMOOTH] * 3, -1))
    exif = Image.Exif()
    exif[274] = 6
    turned = images.read(heic(picture, exif=exif.tobytes()), "a")
    assert turned.size == (32, 48)
    assert (np.asarray(turned) == np.rot90(np.asarray(picture), -1)).all()
    notes = {}
    images.convert(turned, 3, "a", notes)
    assert notes == {images.TURNED: ("a", 1)}
    file = io.BytesIO()
    both = heif.from_pillow(picture)
    both.add_from_pillow(picture)
    both.save(file)
    assert images.read(file.getvalue(), "a").info["several"]


def fault_of(read, file):
    try:
        read(file, "a")
    except InputError as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize(
    "file",
    [jxl(SMOOTH), jxl(levels((9, 9), 16, np.uint16)), heic(Image.fromarray(SMOOTH))],
    ids=["JPEG XL", "JPEG XL of 16 bits", "HEIC"],
)
def test_damaged_files_are_named(file):
    """Cut and changed anywhere: a picture or an error of one line, and never another exception."""
    for k in range(0, len(file), max(1, len(file) // 40)):
        changed = bytearray(file)
        changed[k] ^= 0x55
        for damaged in (file[:k], bytes(changed)):
            for read in (images.read, arrays.read):
                assert re.fullmatch("a: .*|", fault_of(read, damaged))


def test_a_file_that_would_fill_the_memory_is_refused_before_it_is_decoded():
    """The header of JPEG XL with 2^30 rows and columns, the most that it can say."""
    header = b"\xff\x0a" + (0b110 | (2**30 - 1) << 3 | 0b11 << 36 | (2**30 - 1) << 38 | 1 << 68).to_bytes(9, "little")
    assert codecs.size(header, "a") == (2**30, 2**30)
    for read in (images.read, arrays.read):
        with pytest.raises(InputError, match=r"a: 1073741824x1073741824 pixels: .* MB; want at most"):
            read(header, "a")


def test_they_are_images_of_a_source(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.heic").write_bytes(heic(Image.fromarray(SMOOTH)))
        (tmp_path / f"{i}.JXL").write_bytes(jxl(SMOOTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = data.load(str(tmp_path), (32, 48), 1)
    assert (loaded.batch(range(8))[:, 0].numpy() == SMOOTH).all()
    for i, file in enumerate(tmp_path.iterdir()):
        file.rename(file.with_suffix(".jxl"))
        file.with_suffix(".jxl").write_bytes(jxl(levels((8, 8, 13), 16, np.uint16)[..., : 1 + 2 * (i % 2)]))
    colour = [file for file in tmp_path.iterdir() if codecs.decode(file.read_bytes(), "a").pixels.shape[2] == 3]
    for file in colour:
        file.unlink()
    values = Values("uint16", 0, 65535)
    deep = data.load(str(tmp_path), (8, 8), 1, values=values)
    wanted = [imagecodecs.jpegxl_decode(file.read_bytes()) for file in sorted(tmp_path.iterdir(), key=lambda f: f.name)]
    assert (deep.batch(range(len(deep)))[:, 0].numpy() == np.stack(wanted)).all()


def test_without_the_packages_they_are_left_out_and_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(codecs, "MISSING", frozenset({".heic", ".jxl"}))
    with pytest.warns(UserWarning, match=r"2 \.heic, 1 \.cr2; pip install 'ddpm-kit\[formats\]' reads \.heic$"):
        listing.Contents({}, {".heic": 2, ".cr2": 1}).warn("a")


@pytest.mark.parametrize(
    ("module", "file"),
    [("imagecodecs", jxl(SMOOTH)), ("pillow_heif", heic(Image.fromarray(SMOOTH)))],
    ids=["JPEG XL", "HEIC"],
)
def test_a_file_whose_package_is_missing_names_it(monkeypatch, module, file):
    def refuse(name, *arguments):
        if name == module:
            raise ImportError(name)
        return __import__(name, *arguments)

    monkeypatch.setattr(codecs.importlib, "import_module", refuse)
    with pytest.raises(InputError, match=rf"a\.png: .*{module} is not installed; want pip install 'ddpm-kit"):
        images.read(file, "a.png")
