"""Every kind of source gives the same images, bad ones are named in one line, and the order is a function."""

import io
import json
import multiprocessing
import os
import re
import tarfile
import time
import tracemalloc
import warnings
import zipfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from several import server

from ddpm.errors import InputError
from ddpm.files import images as pictures
from ddpm.files.data import batches, describe, load, load_pair, objects, order, paired, split_holdout

DATA = Path(__file__).parents[1] / "../shared/data"
real = pytest.mark.skipif(not DATA.exists(), reason="needs the real data beside the checkout")

N = 23
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
LABELS = [i % 3 for i in range(N)]
CLASSES = ("bird", "cat", "dog")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch, request):
    if "hugging" in request.node.name or "real" in request.node.name:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # each test says which it expects
        warnings.filterwarnings("ignore", ".*fork.*")
        yield


def folder(root, split="", rows=range(N), classes=True, form="png"):
    """PIXELS as files CLASS/NUMBER.png."""
    for i in rows:
        pictures.save(root / split / (CLASSES[LABELS[i]] if classes else "") / f"{i}.{form}", PIXELS[i])
    return root


def zipped(root, to):
    with zipfile.ZipFile(to, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root.parent))
    return to


def in_a_new_process(images):
    """All of them as a worker that shares no memory with this one reads them."""
    with ProcessPoolExecutor(1, server()) as pool:
        return pool.submit(images.batch, range(len(images))).result()


def in_order_of_files(classes=True):
    return sorted(range(N), key=lambda i: (LABELS[i] if classes else 0, i))


def holds(found, rows, pixels=PIXELS, labels=True):
    """That the images found are those of `rows`, in that order."""
    want = torch.from_numpy(pixels[list(rows)]).permute(0, 3, 1, 2)
    assert len(found) == len(want)
    assert found.batch(range(len(found))).dtype == torch.uint8
    assert torch.equal(found.batch(range(len(found))), want)
    if labels:
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == [LABELS[i] for i in rows]
        assert found.class_names == CLASSES
    else:
        assert found.labels is None
    return True


def refused(*args, match, **kwargs):
    with pytest.raises(InputError, match=match) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)


# -- sources -----------------------------------------------------------------------------------------------------------


def test_digits():
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    train, test = load_pair("digits", (8, 8), 1)
    assert (len(train), len(test), train.split, test.split) == (1500, 297, "train", "test")
    assert train.class_names == tuple("0123456789")
    # Together the two are the 1,797 digits of scikit-learn, each with its label, shuffled because writers come in runs.
    parts = [
        (p.numpy().ravel(), label)
        for s in (train, test)
        for p, label in zip(s.batch(range(len(s))), s.labels, strict=True)
    ]
    found = sorted((*np.rint(pixels / 255 * 16).astype(int), int(label)) for pixels, label in parts)
    assert found == sorted((*row.astype(int), label) for row, label in zip(values, labels, strict=True))
    assert train.fingerprint != test.fingerprint
    with pytest.warns(UserWarning, match="1,500 images: smaller than 32x32"), pytest.warns(UserWarning, match="to RGB"):
        assert load("digits", (32, 32), 3).batch([0]).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_nested_files_with_classes(tmp_path, kind, cache_bytes):
    source = folder(tmp_path / "set")
    (source / "cat" / ".hidden.png").write_bytes(b"x")
    (source / "cat" / "notes.txt").write_text("no image")
    (source / "__MACOSX").mkdir()
    (source / "__MACOSX" / "1.png").write_bytes(b"x")
    if kind == "zip":
        source = zipped(source, tmp_path / "set.zip")
    found = load(str(source), (8, 8), 3, cache_bytes=cache_bytes)
    assert found.decoded == (cache_bytes > 0)
    assert holds(found, in_order_of_files())
    refused(str(source), (8, 8), 3, split="test", match=re.escape(f"{source}: no split test, it has train"))
    refused(str(source), (8, 8), 3, label_column="y", match="label_column y: .*has no columns")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_files_in_splits(tmp_path, kind):
    root = folder(tmp_path / "set", "Train", range(15), classes=False)
    folder(root, "val", range(15, N), classes=False)
    source = str(zipped(root, tmp_path / "set.zip") if kind == "zip" else root)
    train, held_out = load_pair(source, (8, 8), 3)
    assert holds(train, range(15), labels=False)
    assert holds(held_out, range(15, N), labels=False)
    assert (train.split, held_out.split, load(source, (8, 8), 3, split="validation").split) == ("Train", "val", "val")
    assert holds(load(source, (8, 8), 3, split="test"), range(15, N), labels=False)


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("classes", [True, False])
def test_a_split_beside_other_images_is_refused(tmp_path, kind, classes):
    """A class that is called train, among others or loose images: half of the set would be lost without a word."""
    root = folder(tmp_path / "set", "train", range(15), classes=False)
    for i in range(15, N):
        pictures.save(root / (("bus", "car")[i % 2] if classes else "") / f"{i}.png", PIXELS[i])
    source = str(zipped(root, tmp_path / "set.zip") if kind == "zip" else root)
    refused(
        source,
        (8, 8),
        3,
        match="train: the name of a split, or of a class; 8 images lie beside it; want all in folders",
    )


def test_classes_are_those_of_all_splits(tmp_path):
    folder(tmp_path, "train", [0, 2])
    folder(tmp_path, "test", [1])
    train, test = load_pair(str(tmp_path), (8, 8), 3)
    assert holds(train, [0, 2])
    assert holds(test, [1])


def test_the_order_of_files_is_natural(tmp_path):
    for i, name in enumerate(["1.png", "2.png", "10.png", "a1/x.png", "a2/x.png", "a10/x.png", "b.png"]):
        pictures.save(tmp_path / name, PIXELS[i])
    assert holds(load(str(tmp_path), (8, 8), 3), range(7), labels=False)


def rows_of(lo, hi, label="label", image="image", encode=pictures.to_png):
    import datasets

    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=list(CLASSES))})
    return datasets.Dataset.from_dict(
        {image: [{"bytes": encode(PIXELS[i]), "path": None} for i in range(lo, hi)], label: LABELS[lo:hi]}, features
    )


def test_hugging_face_layouts(tmp_path):
    import datasets

    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    rows_of(0, 15).to_parquet(hub / "train-00000-of-00001.parquet")
    rows_of(15, N).to_parquet(hub / "validation-00000-of-00001.parquet")
    pair = datasets.DatasetDict({"train": rows_of(0, 15), "validation": rows_of(15, N)})
    pair.save_to_disk(tmp_path / "saved")
    for source in ("hub", "saved"):
        for cache_bytes in (2**30, 0):
            train, held_out = load_pair(str(tmp_path / source), (8, 8), 3, cache_bytes=cache_bytes)
            assert holds(train, range(15))
            assert holds(held_out, range(15, N))
            assert torch.equal(train.batch([9, 3, 3]), train.batch(range(15))[[9, 3, 3]])
            assert train.batch([]).shape == (0, 3, 8, 8)
        refused(str(tmp_path / source), (8, 8), 3, split="extra", match="no split extra, it has train, validation")
    one = tmp_path / "one"
    rows_of(0, N).save_to_disk(one)
    assert holds(load(str(one), (8, 8), 3), range(N))
    single = hub / "train-00000-of-00001.parquet"
    assert holds(load(str(single), (8, 8), 3), range(15))


def test_hugging_face_cache_follows_the_file(tmp_path):
    for k, place in enumerate(["one", "two", "two"]):
        (tmp_path / place / "set").mkdir(parents=True, exist_ok=True)
        rows_of(k, k + 10).to_parquet(tmp_path / place / "set" / "train.parquet")
        assert holds(load(str(tmp_path / place / "set"), (8, 8), 3), range(k, k + 10))


def test_hugging_face_columns(tmp_path):
    import datasets

    rows = rows_of(0, N, "kind", "picture").add_column("text", [f"b{CLASSES[k]}" for k in LABELS])
    rows = rows.add_column("number", [10 * (k + 1) for k in LABELS]).add_column("half", [0.5] * N)
    source = str(tmp_path / "a.parquet")
    rows.to_parquet(source)
    found = load(source, (8, 8), 3)
    assert holds(found, range(N))
    assert load(source, (8, 8), 3, label_column="number").class_names == ("10", "20", "30")
    assert load(source, (8, 8), 3, label_column="number").labels.tolist() == LABELS
    assert load(source, (8, 8), 3, label_column="text").class_names == ("bbird", "bcat", "bdog")
    every = "picture, kind, text, number, half"
    refused(source, (8, 8), 3, image_column="img", match="image_column img: no such column; .* are picture$")
    refused(source, (8, 8), 3, image_column="text", match="image_column text: holds no images; .* are picture$")
    refused(source, (8, 8), 3, label_column="y", match=f"label_column y: no such column.*{every}")
    refused(source, (8, 8), 3, label_column="half", match="label_column half: .*kind, text, number")

    two = str(tmp_path / "two.parquet")
    rows.add_column("mask", rows.cast_column("picture", datasets.Image(decode=False))["picture"]).cast_column(
        "mask", datasets.Image()
    ).to_parquet(two)
    refused(two, (8, 8), 3, match="columns picture, mask hold images")
    assert holds(load(two, (8, 8), 3, image_column="mask"), range(N))

    none = str(tmp_path / "none.parquet")
    rows.remove_columns(["picture"]).to_parquet(none)
    refused(none, (8, 8), 3, match="no column of images among kind, text, number, half")


def test_hugging_face_parquet_of_another_program(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [pictures.to_png(image) for image in PIXELS]
    pq.write_table(pa.table({"png": cells, "label": LABELS}), tmp_path / "a.parquet")
    found = load(str(tmp_path / "a.parquet"), (8, 8), 3)
    assert (found.labels.tolist(), found.class_names) == (LABELS, ("0", "1", "2"))
    assert torch.equal(found.batch(range(N)), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))


def test_parquet_without_any_path(tmp_path):
    """What pyarrow writes where every path is None: a column of nulls."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [{"bytes": pictures.to_png(image), "path": None} for image in PIXELS[:3]]
    pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
    held = load(str(tmp_path / "a.parquet"), (8, 8), 3)
    lazy = load(str(tmp_path / "a.parquet"), (8, 8), 3, cache_bytes=0)
    assert torch.equal(lazy.batch([0, 1, 2]), held.batch([0, 1, 2]))
    assert lazy.fingerprint == held.fingerprint


def test_hugging_face_bad_rows(tmp_path):
    def encode(image):
        return b"" if (image == PIXELS[17]).all() else pictures.to_png(image)

    rows_of(0, N, encode=encode).to_parquet(tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    refused(source, (8, 8), 3, match=re.escape(f"row 17 of {source} (train): empty file"))
    with pytest.warns(UserWarning, match="1 of 23 images skipped, the first: row 17"):
        found = load(source, (8, 8), 3, skip_bad=True)
    assert holds(found, [i for i in range(N) if i != 17])
    assert found.skipped == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.parquet").write_bytes(Path(source).read_bytes()[:-100])
    refused(str(tmp_path / "b"), (8, 8), 3, match=r"b/train\.parquet: damaged")


def test_hugging_face_hub_without_network(monkeypatch, tmp_path):
    from huggingface_hub.errors import RepositoryNotFoundError

    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known")

    def unknown(*_, **__):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    refused(
        "some/thing", (8, 8), 3, match="some/thing: no such file or folder, and the .* hub cannot be reached; want dig"
    )
    (tmp_path / "birds").mkdir()
    rows_of(0, 3).to_parquet(tmp_path / "birds" / "a.parquet")
    assert len(load(str(tmp_path / "birds"), (8, 8), 3)) == 3
    refused("birds", (8, 8), 3, match="hub cannot be reached")  # not the cached local one
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unknown)
    refused("something", (8, 8), 3, match="something: .*no such dataset on the hub; want digits")


@real
@pytest.mark.parametrize(("name", "size", "channels", "n"), [("cifar10", 32, 3, 500), ("mnist", 28, 1, 1500)])
def test_real_data(name, size, channels, n):
    found = load(str(DATA / name), (size, size), channels, split="test")
    assert (len(found), found.split, found.labels.unique().tolist()) == (n, "test", list(range(10)))
    assert found.class_names[3] == {"cifar10": "cat", "mnist": "3"}[name]
    import pyarrow.parquet as pq

    [file] = (DATA / name).rglob("test-*.parquet")
    table = pq.read_table(file)
    for i in (0, 7, n - 1):
        want = np.asarray(Image.open(io.BytesIO(table.column(0)[i].as_py()["bytes"]))).reshape(size, size, channels)
        assert (found.batch([i])[0].permute(1, 2, 0).numpy() == want).all()
        assert found.labels[i] == table.column(1)[i].as_py()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", ["./none", "a/b/c", "none.zip", "~/none/at/all", "~nosuchuser/x", "../none", "", "a b", "cat.png"]
)
def test_nothing_there(source):
    refused(source, (8, 8), 3, match="no such file or folder; want digits")


def test_near_digits():
    refused("digit", (8, 8), 3, match="digit: no such dataset, did you mean digits")


def test_sources_without_images(tmp_path):
    refused(str(tmp_path), (8, 8), 3, match="no images in this folder; want")
    (tmp_path / "a.cr2").write_text("")
    refused(str(tmp_path), (8, 8), 3, match=r"no images in this folder \(1 \.cr2\); want")
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 cut short")
    refused(str(tmp_path / "a.zip"), (8, 8), 3, match=r"a\.zip: damaged or empty zip")
    (tmp_path / "a.parquet").write_bytes(b"")
    refused(str(tmp_path / "a.parquet"), (8, 8), 3, match=r"a\.parquet: damaged or empty parquet")
    (tmp_path / "a.txt").write_text("text")
    refused(str(tmp_path / "a.txt"), (8, 8), 3, match=r"a\.txt: not a file of images")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("text")
    whole = zipped(tmp_path / "b", tmp_path / "b.zip")
    refused(str(whole), (8, 8), 3, match=r"b\.zip: no images")
    whole.write_bytes(whole.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x00"))  # its list of files
    refused(str(whole), (8, 8), 3, match=r"b\.zip: damaged zip file \(")


BAD = {
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("hello"), "not an image"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged image"),
    "LAB": (lambda path: Image.new("LAB", (8, 8)).save(path, "TIFF"), "mode LAB"),
    "float": (lambda path: Image.new("F", (8, 8)).save(path, "TIFF"), "mode F"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "a pipe or a device, want a plain file"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_a_bad_image_is_named_or_skipped(tmp_path, fault, kind, cache_bytes):
    if (kind, fault) == ("zip", "pipe"):
        return
    root = folder(tmp_path / "set", classes=False)
    spoil, message = BAD[fault]
    for name in ("4.png", "5.png", "22.png"):
        spoil(root / name)
    source = str(zipped(root, tmp_path / "set.zip") if kind == "zip" else root)
    good = [i for i in range(N) if i not in (4, 5, 22)]
    if cache_bytes:
        refused(source, (8, 8), 3, match=rf"4\.png.*: {message}")
        with pytest.warns(UserWarning, match=r"3 of 23 images skipped, the first: .*4\.png"):
            found = load(source, (8, 8), 3, skip_bad=True)
        assert holds(found, good, labels=False)
    else:
        with pytest.raises(InputError, match=rf"4\.png.*: {message}"):
            load(source, (8, 8), 3, cache_bytes=0).batch([3, 4])
        found = load(source, (8, 8), 3, cache_bytes=0, skip_bad=True)
        assert found.skipped == 0
        with pytest.warns(UserWarning, match=r"bad images are skipped, the first: .*4\.png"):
            assert holds(found, [*range(4), 6, 6, *range(6, 22), 0], labels=False)
    assert found.skipped == 3


def test_the_stand_in_of_a_bad_image_is_of_its_class(tmp_path):
    root = folder(tmp_path / "set")
    files = in_order_of_files()
    first, last = files[0], max(i for i in range(N) if LABELS[i] == 0)
    (root / "bird" / f"{last}.png").write_bytes(b"")
    found = load(str(root), (8, 8), 3, cache_bytes=0, skip_bad=True)
    with pytest.warns(UserWarning, match="skipped"):
        batch = found.batch([files.index(last)])
    assert torch.equal(batch[0], torch.from_numpy(PIXELS[first]).permute(2, 0, 1))


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_all_images_bad(tmp_path, cache_bytes):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    refused(str(tmp_path), (8, 8), 3, match=r"0\.png: empty file", cache_bytes=cache_bytes)
    refused(str(tmp_path), (8, 8), 3, match=r"none of 3 images.*0\.png", skip_bad=True, cache_bytes=cache_bytes)


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    path = zipped(folder(tmp_path / "set", classes=False), tmp_path / "set.zip")
    data = bytearray(path.read_bytes())
    at = data.index(pictures.to_png(PIXELS[3]))
    data[at + 60] ^= 1
    path.write_bytes(data)
    refused(str(path), (8, 8), 3, match=r"3\.png in .*set\.zip: cannot be read")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_any_compression_is_named(tmp_path, method):
    files = sorted(folder(tmp_path / "set", classes=False).rglob("*.png"))
    with zipfile.ZipFile(tmp_path / "set.zip", "w", method) as archive:
        for file in files:
            archive.write(file, file.name)
        info = archive.getinfo(files[0].name)
    data = bytearray((tmp_path / "set.zip").read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    data[start + 12 : start + info.compress_size] = bytes(info.compress_size - 12)
    (tmp_path / "set.zip").write_bytes(data)
    refused(str(tmp_path / "set.zip"), (8, 8), 3, match=r"0\.png in .*set\.zip: cannot be read")


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("wanted", [1, 3, 4])
def test_pixels_are_those_of_the_same_pictures(tmp_path, channels, wanted):
    """Arrays that have the form already are copied, and others pass through Pillow. Files always pass through it."""
    shape = (3, 6, 5) if channels == 1 else (3, 6, 5, channels)
    arrays = np.random.default_rng(channels).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=arrays)
    (tmp_path / "files").mkdir()
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / "files" / f"{i}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about conversions
        found, expected = (load(tmp_path / name, (6, 5), wanted) for name in ("a.npz", "files"))
    assert torch.equal(found.batch([0, 1, 2]), expected.batch([0, 1, 2]))


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_converting_and_enlarging_warn_once(tmp_path, cache_bytes):
    folder(tmp_path, classes=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load(str(tmp_path), (16, 16), 1, cache_bytes=cache_bytes)
        assert found.batch(range(N)).shape == (N, 1, 16, 16)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert any("mode RGB is converted to L; the first: " in text and "0.png" in text for text in texts)
    assert any("smaller than 16x16, enlarged" in text for text in texts)


def test_palettes_and_colours_are_of_one_kind(tmp_path):
    pictures.save(tmp_path / "0.png", PIXELS[0])
    Image.fromarray(PIXELS[1]).quantize(8).save(tmp_path / "1.png")
    with pytest.warns(UserWarning, match=r"1 image: mode P is converted to RGB; the first: .*1\.png"):
        assert len(load(str(tmp_path), (8, 8), 3)) == 2


# -- from any listing to splits, classes and what is left out ----------------------------------------------------------


def tree(root, *files):
    """Images whose grey level is their number, at these paths."""
    for i, file in enumerate(files):
        pictures.save(root / file, np.full((8, 8, 1), 10 * i, np.uint8))
    return root


def levels(found):
    return sorted(found.batch(range(len(found)))[:, 0, 0, 0].tolist())


SPLIT_TREES = {  # folders of two images each, those of the training split first -> the name of the held-out split
    "coco": (["train2017"], ["val2017"], "val2017"),
    "kaggle": (["training_set/a", "training_set/b"], ["test_set/a", "test_set/b"], "test_set"),
    "camel": (["TrainImages"], ["TestImages"], "TestImages"),
    "glued": (["trainset"], ["testset"], "testset"),
    "numbered": (["1_train"], ["2_dev"], "2_dev"),
    "evaluation": (["training"], ["evaluation"], "evaluation"),
    "div2k": (["DIV2K_train_HR"], ["DIV2K_valid_HR"], "DIV2K_valid_HR"),
    "below a class": (["a/train/good", "b/train/good"], ["a/test/good", "b/test/bad"], "test"),
    "deep": (["set/images/Train/x/y"], ["set/images/Val/x/z"], "Val"),
    "under a name": (["train_test_split/train/a"], ["train_test_split/test/a"], "test"),
    "two years": (["x/train2014", "x/train2017"], ["x/val2014"], "val2014"),
}


@pytest.mark.parametrize("name", SPLIT_TREES)
@pytest.mark.parametrize("kind", ["folder", "zip", "backslashes", "tar"])
def test_names_of_splits(tmp_path, name, kind):
    train, held_out, split = SPLIT_TREES[name]
    files = [f"{folder}/{i}.png" for folder in (*train, *held_out) for i in range(2)]
    root = tree(tmp_path / "set", *files)
    source = root
    if kind == "tar":
        source = tmp_path / "set.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(root, ".")
    elif kind != "folder":
        source = tmp_path / "set.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in files:
                archive.write(root / file, file.replace("/", "\\") if kind == "backslashes" else file)
    a, b = load_pair(str(source), (8, 8), 1)
    assert levels(a) == [10 * i for i in range(2 * len(train))]
    assert levels(b) == [10 * i for i in range(2 * len(train), len(files))]
    assert b.split == split


def test_the_split_is_that_of_datasets(tmp_path, monkeypatch):
    """`datasets` splits the same folders into as many images, where it does not see a split in every part of a name."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("coco", "kaggle", "numbered", "evaluation", "below a class"):
        train, held_out, _ = SPLIT_TREES[name]
        root = tree(tmp_path / name, *[f"{folder}/{i}.png" for folder in (*train, *held_out) for i in range(2)])
        theirs = datasets.load_dataset("imagefolder", data_dir=str(root))
        ours = load_pair(str(root), (8, 8), 1)
        assert sorted(map(len, theirs.values())) == sorted(map(len, ours))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["bus", "train"], "train: the name of a split, or of a class; 2 images lie beside it"),
        (["train", "test", "unlabeled"], "test, train: the name of a split, or of a class; 2 images"),
        (["crash_test", "race"], "crash_test: the name of a split, or of a class"),
        (["freight_train", "passenger_train"], "each reads as the split train, or they are classes"),
        (["train", "train_masks", "test"], "train, train_masks: each reads as the split train"),
        (["trainA", "trainB", "testA", "testB"], "each reads as the split"),
        (["train/train", "train/val", "test/train", "test/val"], "train, val.*; want only one kind"),
        (["a/train", "test"], "the name of a split, or of a class"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(tmp_path, folders, message):
    tree(tmp_path, *[f"{folder}/{i}.png" for folder in folders for i in range(2)])
    refused(str(tmp_path), (8, 8), 1, match=message)


def test_a_class_may_have_train_in_its_name(tmp_path):
    tree(tmp_path, "bullet_train/0.png", "car/0.png", "contest/0.png")
    assert load(str(tmp_path), (8, 8), 1).class_names == ("bullet_train", "car", "contest")


def test_names_of_files_may_be_splits(tmp_path):
    tree(tmp_path / "a", "train_0.png", "train_1.png", "test_0.png")
    train, held_out = load_pair(str(tmp_path / "a"), (8, 8), 1)
    assert (levels(train), levels(held_out)) == ([0, 10], [20])
    tree(tmp_path / "b", "train_0.png", "test_0.png", "other.png")
    refused(str(tmp_path / "b"), (8, 8), 1, match="names of 2 of 3 images, as test_0, train_0, name splits")
    tree(tmp_path / "c", "my test.png", "a train.png", "other.png")
    assert len(load(str(tmp_path / "c"), (8, 8), 1)) == 3


def test_a_source_of_test_images_alone_is_not_trained_on(tmp_path):
    tree(tmp_path, "set/test/0.png", "set/test/1.png")
    refused(str(tmp_path), (8, 8), 1, match="no split train, it has test; want its folder or file itself as the SOURCE")
    assert len(load(str(tmp_path / "set" / "test"), (8, 8), 1)) == 2


def test_classes_are_where_folders_branch_below_the_split(tmp_path):
    tree(tmp_path, "train/images/cat/0.png", "train/images/dog/0.png", "val/images/dog/0.png")
    train, val = load_pair(str(tmp_path), (8, 8), 1)
    assert (train.class_names, train.labels.tolist(), val.labels.tolist()) == (("cat", "dog"), [0, 1], [1])


def test_what_is_left_out_is_counted_and_said(tmp_path):
    """Formats that are not read and data beside the images are warned of; texts are only counted."""
    tree(tmp_path, "0.png", "1.png")
    names = "a.CR2 b.cr2 c.nef LICENSE notes.txt x/data.parquet d IMG_1 0.2024 Thumbs.db"
    for name in names.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    message = r"7 files left out, .*: 3 no suffix, 2 \.cr2, 1 \.nef, 1 \.parquet; the images are read, and not the data"
    with pytest.warns(UserWarning, match=message):
        pair = load_pair(str(tmp_path), (8, 8), 1)
    assert pair[0].left_out == {
        ".cr2": 2, ".nef": 1, ".parquet": 1, "no suffix": 3, "LICENSE": 1, ".txt": 1, ".db": 1,
    }  # fmt: skip
    assert describe(*pair).startswith(
        f"{tmp_path}: train 1 images, held out 1 of train; no classes; warning: left out 3 no suffix, 2 .cr2, "
        "1 .db, 1 .nef, 1 .parquet, 1 .txt, .."
    )


def test_the_line_about_a_source(tmp_path):
    tree(tmp_path, *[f"{split}/{kind}/0.png" for split in ("train", "val", "test") for kind in ("cat", "dog")])
    (tmp_path / "train" / "readme.txt").write_text("")
    assert describe(*load_pair(str(tmp_path), (8, 8), 1)) == (
        f"{tmp_path}: train 2 images, held out 2 of test; not used: val; classes cat, dog; left out 1 .txt"
    )


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    tree(tmp_path, "a/0.png", "b/0.png")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    refused(str(tmp_path), (8, 8), 1, match=r"/b: permission denied; want a folder that can be read")


WANTED = ["dog", "cat", "dog", "cat", "dog", "cat"]


def metadata(form, names):
    rows = [{"file_name": name, "score": 0.5, "label": label} for name, label in zip(names, WANTED, strict=True)]
    if form == "csv":
        return ("file_name,score,label\n" + "".join(f"{r['file_name']},0.5,{r['label']}\n" for r in rows)).encode()
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_hugging_face_metadata_gives_labels(tmp_path, form, kind):
    """As `datasets.load_dataset("imagefolder")` gives them; folders would be other classes."""
    import datasets

    root = tree(tmp_path / "set", *[f"{'ab'[i > 2]}/{i}.png" for i in range(6)])
    (root / f"metadata.{form}").write_bytes(metadata(form, [f"{'ab'[i > 2]}/{i}.png" for i in range(6)]))
    theirs = datasets.load_dataset("imagefolder", data_dir=str(root))["train"]
    assert list(theirs["label"]) == WANTED
    source = str(zipped(root, tmp_path / "set.zip") if kind == "zip" else root)
    for column in (None, "label"):
        found = load(source, (8, 8), 1, label_column=column)
        assert [found.class_names[k] for k in found.labels] == WANTED
    refused(source, (8, 8), 1, label_column="y", match=r"label_column y: no such column, .*metadata.* has score, label")


def test_metadata_that_is_damaged_incomplete_or_of_another_kind(tmp_path):
    tree(tmp_path, "a/0.png", "b/1.png")
    table = tmp_path / "metadata.jsonl"
    table.write_text("{")
    refused(str(tmp_path), (8, 8), 1, match=r"metadata\.jsonl of .*: cannot be read")
    table.write_text('{"file_name": "a/0.png", "label": 1}\n')
    assert load(str(tmp_path), (8, 8), 1).labels is None
    refused(str(tmp_path), (8, 8), 1, label_column="label", match="1 of 2 images of .* have no label")
    table.write_text('{"image": "a/0.png", "label": 1}\n')
    assert load(str(tmp_path), (8, 8), 1).class_names == ("a", "b")


def shard(path, *members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(i, extension="cls", value=None):
    png = pictures.to_png(np.full((8, 8, 1), i, np.uint8))
    return (f"{i:04d}.png", png), (f"{i:04d}.{extension}", str(i % 2).encode() if value is None else value)


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_webdataset_shards(tmp_path, cache_bytes):
    """Labels of NAME.cls, splits of the shards' names; one .tar is its folder."""
    for k, name in enumerate(["a-train-0000", "a-train-0001", "a-val-0000"]):
        shard(tmp_path / f"{name}.tar", *sample(2 * k), *sample(2 * k + 1))
    train, val = load_pair(str(tmp_path), (8, 8), 1, cache_bytes=cache_bytes)
    assert (levels(train), levels(val)) == ([0, 1, 2, 3], [4, 5])
    assert (train.labels.tolist(), val.labels.tolist(), train.class_names) == ([0, 1, 0, 1], [0, 1], ("0", "1"))
    one = load(str(tmp_path / "a-val-0000.tar"), (8, 8), 1, cache_bytes=cache_bytes)
    assert (one.split, levels(one), one.labels.tolist()) == ("train", [4, 5], [0, 1])
    assert torch.equal(in_a_new_process(train), train.batch(range(4)))


def test_webdataset_labels_in_json_and_images_of_two_kinds(tmp_path):
    file = shard(tmp_path / "a" / "a.tar", *sample(0, "json", b'{"label": 7}'), *sample(1, "json", b'{"label": 3}'))
    found = load(str(file), (8, 8), 1)
    assert (found.class_names, found.labels.tolist()) == (("3", "7"), [1, 0])
    png = sample(0)[0][1]
    two = [(f"{i}.{kind}", png) for i in range(2) for kind in ("png", "seg.png")]
    file = shard(tmp_path / "b" / "b.tar", *two)
    refused(str(file), (8, 8), 1, match="every sample has images png, seg.png; want one as image_column")
    with pytest.warns(UserWarning, match=r"2 files left out.*2 \.png"):
        assert len(load(str(file), (8, 8), 1, image_column="seg.png")) == 2
    assert len(load(str(shard(tmp_path / "c.tar", ("a.1.png", png), ("a.2.png", png))), (8, 8), 1)) == 2


def test_tars_that_cannot_be_read(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar" * 200)
    refused(str(tmp_path / "a.tar"), (8, 8), 1, match="not a whole tar file without compression")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
        pass
    refused(str(tmp_path / "b.tar.gz"), (8, 8), 1, match="not a whole tar file without compression")
    refused(str(shard(tmp_path / "c.tar", ("a.txt", b"text"))), (8, 8), 1, match="no images in this tar file")


def test_npz_files(tmp_path):
    """Those of `ddpm sample` (arr_0), of evaluators (with labels in arr_1), of Keras and of MedMNIST."""
    labels = np.array(LABELS)
    pictures.save_many(tmp_path / "own.npz", PIXELS, [str(i) for i in range(N)])
    assert holds(load(str(tmp_path / "own.npz"), (8, 8), 3), range(N), labels=False)
    np.savez(tmp_path / "eval.npz", PIXELS, labels)
    assert load(str(tmp_path / "eval.npz"), (8, 8), 3).labels.tolist() == LABELS
    np.savez(
        tmp_path / "keras.npz",
        x_train=PIXELS[:9, ..., 0],
        y_train=labels[:9],
        x_test=PIXELS[9:, ..., 0],
        y_test=labels[9:],
    )
    np.savez(
        tmp_path / "med.npz", train_images=PIXELS[:9, ..., :1], train_labels=labels[:9, None],
        val_images=PIXELS[9:, ..., :1], val_labels=labels[9:, None],
    )  # fmt: skip
    for name, column in (("keras", "y"), ("med", "labels")):
        for label_column in (None, column):
            train, held_out = load_pair(str(tmp_path / f"{name}.npz"), (8, 8), 1, label_column=label_column)
            assert (train.labels.tolist(), held_out.labels.tolist()) == (LABELS[:9], LABELS[9:])
            assert (held_out.batch([3])[0, 0].numpy() == PIXELS[12, ..., 0]).all()


def test_npz_files_that_are_no_images(tmp_path, monkeypatch):
    def of(**arrays):
        np.savez_compressed(tmp_path / "a.npz", **arrays)
        return str(tmp_path / "a.npz")

    for arrays, described in (
        ({"x": PIXELS[0, 0]}, r"x uint8 \[8, 3\]"),
        ({"x": PIXELS, "y": PIXELS}, r"x uint8 .*, y uint8 "),
    ):
        refused(of(**arrays), (8, 8), 3, match=rf"a\.npz: has {described}.*; want an \.npz with images \[N, H, W\]")
    refused(of(x=PIXELS / 255), (8, 8), 3, match=r"image 0 of .*a\.npz \(x\): float64 numbers; want pixel_type float32")
    refused(of(x=PIXELS.transpose(0, 3, 1, 2)), (8, 8), 3, match=r"\[H, W, C\] is \[3, 8, 8\]; want channels 8, or C")
    assert len(load(of(x=PIXELS, y=PIXELS[:5]), (8, 8), 3, image_column="y")) == 5
    refused(of(x=PIXELS), (8, 8), 3, image_column="z", match="image_column z: .*a.npz: has x uint8")
    refused(of(x=PIXELS), (8, 8), 3, label_column="z", match="label_column z: .* has no such array of 23 integers")
    monkeypatch.setattr(pictures, "MEMORY", 10**6)
    refused(of(x=np.zeros((4, 800, 800), np.uint8)), (8, 8), 1, match="unpacked: 3 MB; want at most 1 MB")


def test_a_member_that_unpacks_to_more_than_the_memory_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MEMORY", 10**6)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", pictures.to_png(PIXELS[0]))
        archive.writestr("1.png", bytes(2 * 10**6))
    refused(str(tmp_path / "a.zip"), (8, 8), 3, match=r"1\.png in .*a\.zip: 2 MB; want at most 1 MB")


def test_hugging_face_configurations_of_a_folder(tmp_path):
    root = tmp_path / "set"
    for name, rows in (("a", 3), ("b", 5)):
        (root / name).mkdir(parents=True)
        rows_of(0, rows).to_parquet(root / name / "train-00000-of-00001.parquet")
    lines = [f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train-*\n" for c in "ab"]
    (root / "README.md").write_text(f"---\nconfigs:\n{''.join(lines)}---\n")
    assert holds(load(f"{root}:b", (8, 8), 3), range(5))
    refused(str(root), (8, 8), 3, match=f"it has several configurations; want {root}:a or {root}:b$")
    refused(f"{root}:c", (8, 8), 3, match=f"no configuration c; want {root}:a or {root}:b$")


def test_hugging_face_rows_that_name_files(tmp_path):
    """Only those in the source's folder and in the caches, unless that is allowed; a link leads where it leads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tree(tmp_path / "set", "0.png")
    outside = tree(tmp_path, "outside.png") / "outside.png"
    (root / "link.png").symlink_to(outside)
    source = str(tmp_path / "set" / "a.parquet")

    def naming(name):
        pq.write_table(pa.table({"image": [{"bytes": None, "path": str(name)}]}), source)
        return source

    for name in ("0.png", root / "0.png"):
        assert len(load(naming(name), (8, 8), 1)) == 1
    for name in (outside, "../outside.png", "/dev/zero", "link.png"):
        refused(
            naming(name), (8, 8), 1, match=f"row 0 of .*: names the file '{name}', which is not in {root}; want the"
        )
    for name in (outside, "../outside.png", "link.png"):
        assert len(load(naming(name), (8, 8), 1, allow_paths=True)) == 1
    refused(naming("/dev/zero"), (8, 8), 1, allow_paths=True, match="a pipe or a device")
    refused(naming("none.png"), (8, 8), 1, match="no such file")


def test_hugging_face_parquet_that_unpacks_to_more_than_the_memory(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [bytes(3 * 10**6)]}), tmp_path / "a.parquet", compression="zstd")
    monkeypatch.setattr(pictures, "MEMORY", 10**6)
    refused(str(tmp_path / "a.parquet"), (8, 8), 1, match=r"a\.parquet: unpacked: 4 MB; want at most 1 MB")


class Decoding(list):
    """A map-style Dataset of files, whose items are decoded to arrays."""

    def __getitem__(self, index):
        return np.asarray(Image.open(io.BytesIO(super().__getitem__(index))))


@pytest.mark.parametrize("kind", ["zip", "tar", "lmdb", "parquet", "Dataset"])
def test_hugging_face_and_others_hold_few_files_in_memory(tmp_path, kind):
    """Of a batch, each image is decoded before the next one is fetched."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 128, 128, 3), np.uint8)
    files = [pictures.to_png(image) for image in noise]
    source = str(tmp_path / f"a.{kind}")
    if kind == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            for i, file in enumerate(files):
                archive.writestr(f"{i}.png", file)
    elif kind == "tar":
        with tarfile.open(source, "w") as archive:
            for i, file in enumerate(files):
                member = tarfile.TarInfo(f"{i}.png")
                member.size = len(file)
                archive.addfile(member, io.BytesIO(file))
    elif kind == "lmdb":
        lmdb = pytest.importorskip("lmdb")
        with lmdb.open(source, map_size=1 << 24) as opened, opened.begin(write=True) as transaction:
            for i, file in enumerate(files):
                transaction.put(b"%02d" % i, file)
    elif kind == "parquet":
        import datasets

        features = datasets.Features({"image": datasets.Image()})
        rows = [{"bytes": file, "path": None} for file in files]
        datasets.Dataset.from_dict({"image": rows}, features).to_parquet(source)
    else:
        source = objects.given(Decoding(files))
    decoder = load_pair(source, (8, 8), 3, cache_bytes=0)[0].decoder
    tracemalloc.start()
    faults = decoder.decode(range(40))[1]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not faults
    assert peak < 8 * len(files[0])


def test_what_is_no_plain_file_is_no_source(tmp_path):
    for name in ("a", "b.parquet", "c.zip", "d.npz", "e.tar"):
        os.mkfifo(tmp_path / name)
        refused(str(tmp_path / name), (8, 8), 1, match="a pipe or a device; want digits")
    (tmp_path / "f").mkdir()
    os.mkfifo(tmp_path / "f" / "a.parquet")
    refused(str(tmp_path / "f"), (8, 8), 1, match=r"a\.parquet: a pipe or a device")


# -- kinds of images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_what_converts_without_loss_is_used_and_the_majority_says_what_is_odd(tmp_path, cache_bytes):
    """The first image is grey, as in ImageNet; others are a palette and an opaque alpha channel."""
    folder(tmp_path, classes=False)
    grey = Image.fromarray(PIXELS[0, ..., 0])
    grey.save(tmp_path / "0.png")
    Image.fromarray(PIXELS[5]).convert("RGBA").save(tmp_path / "5.png")
    want = PIXELS.copy()
    want[0] = want[0, ..., :1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = load(str(tmp_path), (8, 8), 3, cache_bytes=cache_bytes)
        assert holds(found, range(N), want, labels=False)
    said = sorted(re.sub(".*: mode", "mode", str(warning.message).rpartition(";")[0]) for warning in caught)
    assert said == ["mode L is converted to RGB", "mode RGBA is converted to RGB"]


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_a_few_transparent_images_are_laid_on_white_with_one_note(tmp_path, cache_bytes):
    folder(tmp_path, classes=False)
    for i in (0, 3, 5):
        Image.new("RGBA", (8, 8)).save(tmp_path / f"{i}.png")
    count = "3 images" if cache_bytes else "images"
    note = rf": {count}: mode RGBA is converted to RGB, laid on white; the first: .*/0\.png"
    with pytest.warns(UserWarning, match=note) as caught:
        white = load(str(tmp_path), (8, 8), 3, cache_bytes=cache_bytes).batch([0, 3, 5])
    assert (white == 255).all()
    assert len(caught) == 1


@pytest.mark.parametrize("colour", ["RGB", "RGBA", "P"])
def test_colour_is_refused_where_most_images_are_grey_and_the_model_is(tmp_path, colour):
    for i in range(4):
        Image.fromarray(PIXELS[i, ..., 0]).save(tmp_path / f"{i}.png")
    Image.fromarray(PIXELS[4]).convert(colour).save(tmp_path / "4.png")
    with pytest.raises(InputError, match=r"4\.png: RGB.* most images are grey, and as grey it would lose its colours"):
        load(str(tmp_path), (8, 8), 1)
    Image.new("LA", (8, 8)).save(tmp_path / "4.png")
    with pytest.warns(UserWarning, match=r"1 image: mode LA is converted to L, laid on white"):
        assert (load(str(tmp_path), (8, 8), 1).batch([4]) == 255).all()


@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_the_line_about_a_source_says_that_all_images_are_grey(tmp_path, mode):
    for i in range(6):
        grey = PIXELS[i, ..., 0]
        image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
        image.save(tmp_path / f"{i}.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rgb, grey = (describe(*load_pair(str(tmp_path), (8, 8), channels)) for channels in (3, 1))
        Image.fromarray(PIXELS[5]).save(tmp_path / "5.tif")
        mixed = describe(*load_pair(str(tmp_path), (8, 8), 3))
    assert rgb.endswith("are grey; --channels 1 would train a smaller model of grey images")
    assert "channels" not in grey + mixed


def test_what_most_images_lose_is_lost_with_a_note(tmp_path):
    folder(tmp_path, classes=False)
    Image.fromarray(PIXELS[0, ..., 0]).save(tmp_path / "0.png")
    with pytest.warns(UserWarning, match="22 images: mode RGB is converted to L; the first: .*/1.png"):
        assert len(load(str(tmp_path), (8, 8), 1)) == N


# -- held-out images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [2**30, 0])
def test_held_out_images_are_a_fixed_part_without_copies(tmp_path, cache_bytes):
    folder(tmp_path)
    whole = load(str(tmp_path), (8, 8), 3, cache_bytes=cache_bytes)
    pairs = [load_pair(str(tmp_path), (8, 8), 3, cache_bytes=cache_bytes), split_holdout(whole)]
    assert [len(part) for part in pairs[0]] == [22, 1]
    for one, other in zip(*pairs, strict=True):
        assert one.fingerprint == other.fingerprint != whole.fingerprint
        assert torch.equal(one.batch(range(len(one))), other.batch(range(len(one))))
    rest, held_out = pairs[1]
    every = {bytes(image.numpy()) for part in (rest, held_out) for image in part.batch(range(len(part)))}
    assert len(every) == N
    assert sorted(rest.labels.tolist() + held_out.labels.tolist()) == sorted(LABELS)
    if cache_bytes:
        assert rest.pixels is held_out.pixels is whole.pixels
    folder(tmp_path / "one", rows=[0])
    with pytest.raises(InputError, match="1 image, want at least 2"):
        load_pair(str(tmp_path / "one"), (8, 8), 3)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "parquet", "npz"])
def test_one_fingerprint_whether_decoded_or_not_and_another_for_other_data(tmp_path, kind):
    """A name, a size, a label, the image size or the part of the source that differs is noticed."""

    def source(k, rows, labels=True):
        root = tmp_path / f"{k}" / "set"
        root.mkdir(parents=True)
        if kind == "parquet":
            table = rows_of(0, len(rows))
            if not labels:
                table = table.remove_columns(["label"])
            table.to_parquet(root / "a.parquet")
            return str(root / "a.parquet")
        if kind == "npz":
            arrays = {"x_train": PIXELS[: len(rows)]} | ({"y_train": np.array(LABELS)[: len(rows)]} if labels else {})
            np.savez(root / "a.npz", **arrays)
            return str(root / "a.npz")
        folder(root, rows=rows, classes=labels)
        if kind == "zip":
            return str(zipped(root, tmp_path / f"{k}" / "set.zip"))
        if kind == "tar":
            with tarfile.open(tmp_path / f"{k}" / "set.tar", "w") as archive:
                archive.add(root, "set")
            return str(tmp_path / f"{k}" / "set.tar")
        return str(root)

    def prints(source, size=(8, 8), channels=3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [
                [part.fingerprint for part in load_pair(source, size, channels, cache_bytes=cache_bytes)]
                for cache_bytes in (2**30, 0)
            ]
        assert found[0] == found[1]
        assert found[0][0] != found[0][1]
        return found[0]

    first = source(0, range(N))
    assert prints(first) == prints(source(1, range(N)))  # a copy, whose times differ
    others = [prints(source(2, range(N - 1))), prints(source(3, range(N), labels=False))]
    others += [prints(first, (16, 8)), prints(first, channels=1)]
    every = [one for both in (prints(first), *others) for one in both]
    assert len(set(every)) == len(every)


# -- order and batches -------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 30), st.integers(0, 2**63), st.integers(1, 70))


@given(sizes, st.integers(1, 4))
@settings(max_examples=60)
def test_each_epoch_visits_every_image_once(size, epochs):
    n, seed, batch = size
    steps = -(-n * epochs // batch)
    stream = torch.cat([order(n, seed, step, batch) for step in range(steps)])
    for epoch in stream[: n * epochs].view(epochs, n):
        assert epoch.sort().values.tolist() == list(range(n))


@given(sizes, st.integers(0, 1000), st.integers(1, 70))
@settings(max_examples=60)
def test_the_stream_does_not_depend_on_where_it_is_entered_nor_on_the_batch_size(size, step, other):
    n, seed, batch = size
    place = step * batch
    around = torch.cat([order(n, seed, place // other + k, other) for k in range(batch // other + 2)])
    assert torch.equal(order(n, seed, step, batch), around[place % other :][:batch])


def test_seeds_and_epochs_differ():
    streams = [order(100, seed, epoch, 100) for seed in range(5) for epoch in range(5)]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert (one == other).float().mean() < 0.2


def test_the_order_of_an_epoch_is_uniform():
    first = torch.stack([order(5, seed, 0, 5) for seed in range(2000)])
    counts = torch.stack([(first == value).float().mean(0) for value in range(5)])
    assert (counts - 0.2).abs().max() < 5 * (0.2 * 0.8 / 2000) ** 0.5


def test_order_is_the_callers_to_change():
    before = order(10, 0, 0, 10).clone()
    order(10, 0, 0, 10).zero_()
    assert torch.equal(order(10, 0, 0, 10), before)


def test_batches_are_the_same_from_memory_from_workers_and_after_resuming(tmp_path):
    folder(tmp_path / "set")
    sources = [tmp_path / "set", zipped(tmp_path / "set", tmp_path / "set.zip")]
    memory = list(batches(load(str(sources[0]), (8, 8), 3), 5, 10, 0, 6))
    want = torch.from_numpy(PIXELS[in_order_of_files()]).permute(0, 3, 1, 2)
    for step, batch in enumerate(memory):
        assert torch.equal(batch, want[order(N, 5, step, 10)])
    state = torch.get_rng_state()
    for source in sources:
        lazy = load(str(source), (8, 8), 3, cache_bytes=0)
        lazy.batch([0])  # so that a file is open when the workers are forked
        for workers in (0, 2):
            ranks = [list(batches(lazy, 5, 10, 2, 6, part=slice(r, None, 2), workers=workers)) for r in range(2)]
            for step in range(4):
                assert torch.equal(torch.stack([ranks[0][step], ranks[1][step]], 1).flatten(0, 1), memory[2 + step])
            elsewhere = next(batches(lazy, 5, 10, 0, 6, workers=workers, device="meta"))
            assert (elsewhere.device.type, elsewhere.shape) == ("meta", memory[0].shape)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("held", [0, 1, 40])
def test_a_batch_that_somebody_has_is_never_written_again(tmp_path, held):
    """Workers write into memory that is lent with each batch. 40 batches are more than there are slots."""
    lazy = load(str(folder(tmp_path / "set")), (8, 8), 3, cache_bytes=0)
    want, kept = list(batches(lazy, 5, 10, 0, 40, workers=0)), deque(maxlen=held)
    for step, batch in enumerate(batches(lazy, 5, 10, 0, 40, workers=2)):
        assert torch.equal(batch, want[step])
        kept.append((step, batch))
        assert all(torch.equal(batch, want[step]) for step, batch in kept)


def test_without_shared_memory_batches_come_through_pipes(tmp_path, monkeypatch):
    """As in a container, where /dev/shm is small. Workers inherit the patch, so none of them shares a tensor either."""
    lazy = load(str(folder(tmp_path / "set")), (8, 8), 3, cache_bytes=0)
    want = list(batches(lazy, 5, 10, 0, 6, workers=0))

    def full(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    monkeypatch.setattr(torch.multiprocessing.reductions, "reduce_storage", full)
    with pytest.warns(UserWarning, match="shared memory, so decoded images come through pipes"):
        found = list(batches(lazy, 5, 10, 0, 6, workers=2))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_hugging_face_rows_in_workers(tmp_path):
    rows_of(0, N).to_parquet(tmp_path / "a.parquet")
    lazy = load(str(tmp_path / "a.parquet"), (8, 8), 3, cache_bytes=0)
    want = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    for step, batch in enumerate(batches(lazy, 0, 7, 0, 4)):
        assert torch.equal(batch, want[order(N, 0, step, 7)])
    assert torch.equal(in_a_new_process(lazy), want)


def test_workers_report_what_they_skip_and_convert(tmp_path):
    folder(tmp_path, classes=False)
    (tmp_path / "4.png").write_bytes(b"")
    Image.fromarray(PIXELS[9]).quantize(8).save(tmp_path / "9.png")
    lazy = load(str(tmp_path), (8, 8), 3, cache_bytes=0, skip_bad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        found = list(batches(lazy, 0, N, 0, 3))
    assert lazy.skipped == 1
    assert sorted(re.sub(".*/", "", str(warning.message)) for warning in caught) == [
        "4.png: empty file, want an image",
        "9.png",
    ]
    again = load(str(tmp_path), (8, 8), 3, cache_bytes=0, skip_bad=True)
    with pytest.warns(UserWarning, match=r"4\.png"), pytest.warns(UserWarning, match=r"9\.png"):
        assert torch.equal(torch.stack(found), torch.stack(list(batches(again, 0, N, 0, 3, workers=0))))
    strict = load(str(tmp_path), (8, 8), 3, cache_bytes=0)
    with pytest.raises(
        InputError, match=r"4\.png: empty file, want an image; the setting skip_bad of `ddpm train` skips such images$"
    ):
        list(batches(strict, 0, N, 0, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_takes_the_place_of_a_bad_image(tmp_path, workers):
    """The next good image of the class; of another class only if all of the class are bad, which is said."""
    folder(tmp_path, rows=range(9))
    lazy = load(str(tmp_path), (8, 8), 3, cache_bytes=0, skip_bad=True)
    labels, names = lazy.labels.tolist(), lazy.names()
    classes = [[i for i, label in enumerate(labels) if label == k] for k in range(3)]
    want = lazy.batch(range(9))
    for bad in (classes[0][0], *classes[1]):
        Path(names[bad]).write_bytes(b"")
    want[classes[0][0]] = want[classes[0][1]].clone()
    want[classes[1]] = want[classes[2][0]].clone()  # after the last of class 1 comes the first of class 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        lazy = load(str(tmp_path), (8, 8), 3, cache_bytes=0, skip_bad=True)
        [batch] = batches(lazy, 0, 9, 0, 1, workers=workers)
    assert any("bad like all of the class, so one of another class" in str(warning.message) for warning in caught)
    assert torch.equal(batch, want[order(9, 0, 0, 9)])
    assert lazy.skipped == 1 + len(classes[1])


def test_closing_the_iterator_ends_the_workers(tmp_path):
    folder(tmp_path, classes=False)
    steps = batches(load(str(tmp_path), (8, 8), 3, cache_bytes=0), 0, 4, 0, 10**6)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert multiprocessing.active_children() == []


def test_workers_decode_both_images_of_a_pair(tmp_path):
    """As many as are asked for decode both, and auto times both."""
    roots = folder(tmp_path / "a", rows=range(20)), folder(tmp_path / "b", rows=range(20))
    for path in roots[1].rglob("*.png"):
        pictures.save(path, 255 - np.asarray(Image.open(path)))
    memory = paired(*(load(str(root), (8, 8), 3) for root in roots))
    want = list(batches(memory, 0, 6, 0, 9))
    lazy = paired(*(load(str(root), (8, 8), 3, cache_bytes=0) for root in roots))
    lines = []
    for workers in (0, 2, "auto"):
        found = list(batches(lazy, 0, 6, 0, 9, workers=workers, say=lines.append))
        assert torch.equal(torch.stack(found), torch.stack(want))
    assert len(lines) == 1
    steps = batches(lazy, 0, 6, 0, 10**6)
    next(steps)
    assert len(multiprocessing.active_children()) == 2
    steps.close()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_ranks_and_workers_visit_each_image_once_from_any_step_on(tmp_path, kind):
    """An epoch as a multiset of images, for 1, 2 and 3 ranks, 0 and 4 workers, stopped after any step."""
    warnings.filterwarnings("ignore", ".*worker processes in total.*")  # more than cores
    root = folder(tmp_path / "set", rows=range(22), classes=False)
    source = root if kind == "folder" else zipped(root, tmp_path / "set.zip")
    lazy = load(str(source), (8, 8), 3, cache_bytes=0)
    every = {bytes(PIXELS[i].transpose(2, 0, 1)): i for i in range(22)}
    for ranks, workers, stop in ((1, 0, 1), (2, 4, 1), (3, 0, 0), (1, 4, 0)):
        seen = []
        for rank in range(ranks):
            part = slice(rank * 11 // ranks, (rank + 1) * 11 // ranks)
            for start, end in ((0, stop), (stop, 2)):  # it stops and goes on
                for batch in batches(lazy, 3, 11, start, end, part=part, workers=workers):
                    seen += [every[bytes(image.numpy())] for image in batch]
        assert sorted(seen) == list(range(22))


def test_auto_takes_the_workers_that_the_first_steps_ask_for(tmp_path, monkeypatch):
    """The batches are the same; decoding that is slow gets processes, and decoding that takes no time gets none."""
    lazy = load(str(folder(tmp_path, classes=False)), (8, 8), 3, cache_bytes=0)
    want = list(batches(lazy, 0, 4, 0, 12, workers=0))
    decode, said = type(lazy).decode, []

    def slow(*args, **named):
        time.sleep(0.02)
        return decode(*args, **named)

    for slower, training, workers in ((slow, 0.005, {1, 2}), (decode, 0.5, {0})):
        monkeypatch.setattr(type(lazy), "decode", slower)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
        stream = batches(lazy, 0, 4, 0, 12 if workers != {0} else 5, workers="auto", say=said.append)
        for step, batch in enumerate(stream):
            assert torch.equal(batch, want[step])
            assert len(multiprocessing.active_children()) in (workers if step > 3 else {0})
            time.sleep(training)
    assert [line[:9] for line in said] == ["workers 2", "workers 0"]
    assert [len(batch) for batch in batches(lazy, 0, 4, 0, 2, workers="auto")] == [4, 4]


def test_zip_in_a_new_process(tmp_path):
    lazy = load(str(zipped(folder(tmp_path / "set"), tmp_path / "set.zip")), (8, 8), 3, cache_bytes=0)
    assert torch.equal(in_a_new_process(lazy), lazy.batch(range(N)))
    assert holds(lazy, in_order_of_files())
