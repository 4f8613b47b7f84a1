"""Pages of TIFF files as images: every page once, with its exact numbers and the labels of its file."""

import io
import tarfile
import warnings
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from ddpm.errors import InputError
from ddpm.files import arrays, data
from ddpm.pixels import EIGHT_BIT, Values

tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(0)
DEEP = Values("uint16", 0, 65535)
GREY = RNG.integers(0, 65536, (6, 8, 8), dtype=np.uint16)
RGB = RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
COUNTS = {"cat/1.tif": (0, 3), "cat/2.tif": (3, 4), "dog/1.tif": (4, 6)}
"""File -> which of the images it holds."""


def tiff(stack, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, stack, photometric="rgb" if stack.shape[3:] == (3,) else "minisblack", **options)
    return file.getvalue()


def files(given, **options):
    return {name: tiff(given[start:stop], **options) for name, (start, stop) in COUNTS.items()}


def write(path, kind, contents):
    source = path / f"a{kind}"
    if kind == "":
        for name, content in contents.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    elif kind == ".zip":
        with zipfile.ZipFile(source, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    elif kind == ".lmdb":
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(str(source), map_size=1 << 24) as opened, opened.begin(write=True) as transaction:
            for name, content in contents.items():
                transaction.put(name.encode(), content)
    elif kind == ".parquet":
        rows = [{"image": {"bytes": content, "path": name}} for name, content in contents.items()]
        labels = [name.partition("/")[0] for name in contents]
        datasets.Dataset.from_list(rows).add_column("label", labels).to_parquet(source)
    else:
        with tarfile.open(source, "w") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(source)


def whole(loaded):
    return loaded.batch(range(len(loaded))).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("kind", ["", ".zip", ".tar", ".lmdb", ".parquet"])
@pytest.mark.parametrize(("given", "values"), [(GREY, DEEP), (RGB, EIGHT_BIT)])
def test_each_page_is_an_image_with_the_labels_of_its_file(tmp_path, kind, given, values, cache_bytes):
    source = write(tmp_path, kind, files(given))
    channels = given.shape[3] if given.ndim == 4 else 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = data.load(source, (8, 8), channels, values=values, pages="images", cache_bytes=cache_bytes)
    assert (whole(loaded) == given.reshape(6, 8, 8, channels)).all()
    if kind != ".lmdb":  # which has no labels
        assert loaded.class_names == ("cat", "dog")
        assert loaded.labels.tolist() == [0, 0, 0, 0, 1, 1]
    assert loaded.names()[4].startswith("page 1 of ")
    assert "; each page of 3 TIFF files is an image; " in data.describe(*data.split_holdout(loaded))
    if cache_bytes == 0:
        step = next(data.batches(loaded, 0, 6, 0, 1, workers=2))
        assert (step.permute(0, 2, 3, 1).numpy() == whole(loaded)[data.order(6, 0, 0, 6)]).all()


def test_a_tif_file_is_a_stack_of_images(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(GREY))
    loaded = data.load(str(tmp_path / "a.tif"), (8, 8), 1, values=DEEP)
    assert (whole(loaded)[..., 0] == GREY).all()
    line = "each page of 1 TIFF file is an image; 8x8, 1 channel of uint16 0..65535; no classes"
    assert line in data.describe(*data.split_holdout(loaded))
    with pytest.raises(InputError, match=r"pages channels: .*a\.tif would be one image; want a folder of such files"):
        data.load(str(tmp_path / "a.tif"), (8, 8), 6, values=DEEP, pages="channels")


def test_without_it_the_first_is_taken_and_that_is_said(tmp_path):
    source = write(tmp_path, "", files(GREY))
    with pytest.warns(UserWarning, match="2 images: several pictures in one file, only the first is taken; the first"):
        loaded = data.load(source, (8, 8), 1, values=DEEP)
    assert (whole(loaded)[..., 0] == GREY[[0, 3, 4]]).all()


@pytest.mark.parametrize(
    "options", [{"imagej": True}, {"metadata": None}, {"ome": True}, {"metadata": {"axes": "ZYX"}}]
)
def test_pages_are_those_of_the_file_whatever_its_axes_are_called(tmp_path, options):
    (tmp_path / "a.tif").write_bytes(tiff(GREY, **options))
    assert (whole(data.load(str(tmp_path / "a.tif"), (8, 8), 1, values=DEEP))[..., 0] == GREY).all()


def test_pages_that_are_not_listed_are_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(GREY, truncate=True))
    with pytest.raises(InputError, match=r"lists one page, and stores \[6, 8, 8\]; want pages that are listed"):
        data.load(str(tmp_path / "a.tif"), (8, 8), 1, values=DEEP)


def test_a_damaged_file_is_named_or_skipped(tmp_path):
    source = write(tmp_path, "", files(RGB) | {"cat/2.tif": tiff(RGB[3:4])[:40]})
    with pytest.raises(InputError, match=r"2\.tif: damaged TIFF"):
        data.load(source, (8, 8), 3, pages="images")
    with pytest.warns(UserWarning, match="1 of 6 images skipped"):
        loaded = data.load(source, (8, 8), 3, pages="images", skip_bad=True)
    assert (whole(loaded) == RGB[[0, 1, 2, 4, 5]]).all()


def test_thumbnails_are_no_pages(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for image in RGB[:2]:
            file.write(image, photometric="rgb")
            file.write(image[::2, ::2], photometric="rgb", subfiletype=1)
    assert (whole(data.load(str(tmp_path / "a.tif"), (8, 8), 3)) == RGB[:2]).all()


def test_kinds_of_pages_are_what_pillow_makes_of_them(tmp_path):
    """Black and white, white as 0, and palettes; pictures beside TIFF files stay what they are."""
    grey = Image.fromarray((GREY[0] >> 8).astype(np.uint8))
    palette = Image.fromarray(RGB[0]).quantize(16)
    for name, first, second, expected in (
        ("bits", grey.point(lambda v: 255 * (v > 99), "1"), grey.point(lambda v: 255 * (v > 200), "1"), "L"),
        ("palette", palette, palette.rotate(90), "RGB"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        first.save(folder / "a.tif", save_all=True, append_images=[second])
        grey.save(folder / "b.png")
        channels = {"L": 1, "RGB": 3}[expected]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = data.load(str(folder), (8, 8), channels, pages="images")
        wanted = [np.asarray(each.convert(expected)).reshape(8, 8, channels) for each in (first, second, grey)]
        assert (whole(loaded) == np.stack(wanted)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pages_are_turned_as_pictures_are(tmp_path, orientation):
    """Against Pillow, for each of the eight orientations of EXIF; it is said."""
    image = RNG.integers(0, 65536, (6, 8), dtype=np.uint16)
    content = tiff(image, extratags=[(274, "H", 1, orientation, True)])
    with Image.open(io.BytesIO(content)) as opened:
        turned = np.asarray(ImageOps.exif_transpose(opened))
    notes = {}
    read = arrays.read(content, "a", notes=notes)
    assert (read[..., 0] == turned).all()
    assert (read.shape[0] == 8) == (orientation > 4)
    assert notes == ({} if orientation == 1 else {"turned as the EXIF data say": ("a", 1)})


def test_pairs_of_pages_have_files_of_the_same_names(tmp_path):
    """Each page is paired with the same page of the file of this name; a single file may have any name."""

    def loaded(name, counts):
        for file, count in counts.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes(tiff(GREY[:count]))
        source = tmp_path / name if len(counts) > 1 else tmp_path / name / file
        return data.load(source, (8, 8), 1, values=DEEP, pages="images")

    stacks = loaded("stacks", {"a.tif": 2, "b.tif": 1})
    assert len(data.paired(stacks, loaded("same", {"a.tiff": 2, "b.tiff": 1})).pair) == 3
    with pytest.raises(InputError, match="b is in the place of page 2 of a; want files of the same names"):
        data.paired(stacks, loaded("others", {"a.tif": 1, "b.tif": 2}))
    with pytest.raises(InputError, match="c is in the place of a"):
        data.paired(loaded("single", {"a.tif": 1, "b.tif": 1}), loaded("renamed", {"c.tif": 1, "d.tif": 1}))
    assert len(data.paired(loaded("one", {"images.tif": 3}), loaded("two", {"masks.tif": 3})).pair) == 3
