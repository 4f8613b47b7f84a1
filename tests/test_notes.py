"""What is done to images, and what in them is not used, is said once with a count, and never silently."""

import io
import warnings

import numpy as np
import pytest
from conftest import train
from PIL import Image, ImageCms

from ddpm.files import arrays, data, images
from ddpm.pixels import Values

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def renamed(profile, before, after):
    """The profile with another description of the same length."""
    for encoding in ("ascii", "utf-16-be"):
        profile = profile.replace(before.encode(encoding), after.encode(encoding))
    return profile


P3 = renamed(SRGB, "sRGB", "P3P3")


def exif(orientation):
    found = Image.Exif()
    found[274] = orientation
    return found.tobytes()


def write(path, options, suffix=".png"):
    path.mkdir(exist_ok=True)
    for i, settings in enumerate(options):
        Image.fromarray(PIXELS[i]).save(path / f"{i}{suffix}", **settings)
    return str(path)


def said(load, *arguments, **settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(*arguments, **settings)
    return [str(each.message) for each in caught]


def test_each_kind_is_said_once_with_its_count(tmp_path):
    options = [{"icc_profile": P3}, {"icc_profile": P3, "exif": exif(6)}, {"exif": exif(3)}, {"icc_profile": SRGB}, {}]
    lines = said(data.load, write(tmp_path / "a", options), (8, 8), 3)
    assert sorted(line.partition(": ")[2].partition("; the first")[0] for line in lines) == [
        "2 images: the colour profile P3P3 built-in is not applied",
        "2 images: turned as the EXIF data say",
    ]
    assert [line.rpartition("/")[2] for line in sorted(lines, key=len)] == ["1.png", "0.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_notes_of_workers_reach_the_user(tmp_path, workers):
    """And once, although many batches bring them; their number is that of all decodings."""
    source = write(tmp_path / "a", [{}, {}, {}, {"exif": exif(6)}])
    loaded = data.load(source, (8, 8), 3, cache_bytes=0)
    assert not loaded.notes
    lines = said(lambda: list(data.batches(loaded, 0, 4, 0, 3, workers=workers)))
    assert lines == [f"{source}: images: turned as the EXIF data say; the first: {source}/3.png"]
    assert loaded.notes == {images.TURNED: (f"{source}/3.png", 3)}


def test_a_run_says_it_as_a_line(tmp_path, capsys):
    source = write(tmp_path / "a", [{"icc_profile": P3}] * 4)
    assert train(tmp_path / "run", "--data", source, "--channels", 3, "--steps", 1) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "colour profile" in line]
    assert lines == [
        f"warning: {source}: 4 images: the colour profile P3P3 built-in is not applied; the first: {source}/0.png"
    ]


@pytest.mark.parametrize(
    ("profile", "name"),
    [
        (SRGB, None),
        (P3, "P3P3 built-in"),
        (LAB, "Lab identity built-in"),
        (renamed(SRGB, "sRGB built-in", "linear sRGB X"), "linear sRGB X"),
        (SRGB[:100], "(damaged)"),
        (b"no", "(damaged)"),
    ],
    ids=["sRGB", "another", "Lab", "linear", "cut", "no profile"],  # a profile holds the time when it was made
)
def test_only_srgb_needs_no_word(profile, name):
    notes = {}
    images.note_file({"icc_profile": profile}, "a", notes)
    assert notes == ({} if name is None else {f"the colour profile {name} is not applied": ("a", 1)})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_turning_is_said_and_done(tmp_path, orientation, suffix):
    """In every format, and also where Pillow itself turns the image when it loads it."""
    [file] = [tmp_path / f"a{suffix}"]
    Image.fromarray(PIXELS[0, :6]).save(
        file, exif=exif(orientation), **({"lossless": True} if suffix == ".webp" else {})
    )
    notes = {}
    picture = images.convert(images.read(file), 3, "a", notes)
    assert (np.asarray(picture) == arrays.upright(PIXELS[0, :6], orientation)).all()
    assert notes == ({} if orientation == 1 else {images.TURNED: ("a", 1)})


@pytest.mark.parametrize("orientation", [1, 6])
def test_16_bit_colour_is_turned_and_its_profile_said(orientation):
    imagecodecs = pytest.importorskip("imagecodecs")
    given = RNG.integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    plain, small = imagecodecs.png_encode(given), io.BytesIO()
    Image.fromarray(PIXELS[0]).save(small, "PNG", exif=exif(orientation), icc_profile=P3)
    start = 8 + 25  # after the signature and IHDR
    chunks = small.getvalue()[start : small.getvalue().index(b"IDAT") - 4]
    notes = {}
    read = arrays.read(plain[:start] + chunks + plain[start:], "a", notes=notes)
    assert (read == arrays.upright(given, orientation)).all()
    wanted = {"the colour profile P3P3 built-in is not applied"} | ({images.TURNED} if orientation == 6 else set())
    assert notes.keys() == wanted


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize(
    ("top", "high", "wanted"),
    [
        (
            4000,
            65535,
            "all numbers are at most 4,000, and white is 65,535; --value-range 0,4095 would use the whole",
        ),
        (
            4096,
            65535,
            "all numbers are at most 4,096, and white is 65,535; --value-range 0,8191 would use the whole",
        ),
        (8191, 65535, "all numbers are at most 8,191"),
        (8192, 65535, ""),
        (4000, 4095, ""),
    ],
)
def test_numbers_of_12_bits_in_16_are_told_once_with_the_range_to_give(tmp_path, top, high, wanted, cache_bytes):
    """The hint stands in the line about the data, if white is more than eight times the largest number."""
    given = RNG.integers(0, top + 1, (6, 8, 8, 1), dtype=np.uint16)
    given[:, 0, 0] = top
    for i, image in enumerate(given):
        images.save_image(tmp_path / f"{i}", image)
    pair = data.load_pair(str(tmp_path), (8, 8), 1, values=Values("uint16", 0, high), cache_bytes=cache_bytes)
    line = data.describe(*pair)
    assert wanted in line
    assert ("at most" in line) == bool(wanted)


def test_8_bit_pictures_that_are_nearly_black_are_told(tmp_path):
    """As labels stored as grey levels, or 12 bits in 16-bit files that are rounded to 8."""
    for i in range(6):
        images.save_image(tmp_path / "dark" / f"{i}", np.full((8, 8, 1), 20 + i, np.uint8))
        images.save_image(tmp_path / "deep" / f"{i}", np.full((8, 8, 1), 4000 + i, np.uint16))
        images.save_image(tmp_path / "grey" / f"{i}", np.full((8, 8, 1), 40 + i, np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pairs = {kind: data.load_pair(str(tmp_path / kind), (8, 8), 1) for kind in ("dark", "deep", "grey")}
    lines = {kind: data.describe(*pair) for kind, pair in pairs.items()}
    assert "all numbers are at most 25, and white is 255, so all pictures are nearly black" in lines["dark"]
    assert "at most 16, and white is 255" in lines["deep"]
    assert "at most" not in lines["grey"]
