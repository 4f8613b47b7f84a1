"""An index says what the files say, is used again only for the same files, and never stands in the way."""

import io
import os
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from several import forked

from ddpm.errors import InputError
from ddpm.files import images as pictures
from ddpm.files.data import index, layout, load, sources, tars

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_DATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- tar files ---------------------------------------------------------------------------------------------------------

names = st.one_of(
    st.from_regex(r"[a-z]{1,8}(/[a-z0-9]{1,8}){0,3}\\.(png|cls)", fullmatch=True),
    st.text(st.characters(blacklist_characters="\0/", blacklist_categories=["Cs"]), min_size=1, max_size=150).filter(
        lambda name: name.strip(".")
    ),
    st.tuples(st.integers(60, 90), st.integers(60, 90), st.integers(1, 90)).map(lambda n: "/".join("a" * k for k in n)),
)
kinds = st.sampled_from([tarfile.REGTYPE] * 5 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.AREGTYPE])
entries = st.lists(st.tuples(names, kinds, st.integers(0, 1500), st.floats(0, 2e9)), max_size=12)


def tar_of(entries, form):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, kind, size, changed in entries:
            about = tarfile.TarInfo(name)
            about.type, about.mtime, about.linkname = kind, changed, "a"
            about.size = size if kind in (tarfile.REGTYPE, tarfile.AREGTYPE) else 0
            try:
                archive.addfile(about, io.BytesIO(bytes(about.size)))
            except ValueError:  # this form cannot hold such a name
                continue
    return file.getvalue()


@given(entries, st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
@settings(max_examples=60)
def test_the_quick_reader_agrees_with_tarfile(entries, form):
    data = tar_of(entries, form)
    quick = tars._quick(io.BytesIO(data), len(data))
    assert quick is None or quick == tars._thorough(io.BytesIO(data))


@given(entries, st.data())
@settings(max_examples=60)
def test_the_quick_reader_believes_no_damaged_header(entries, data):
    """Any change is found by the checksum, is harmless, or is left to tarfile."""
    whole = bytearray(tar_of(entries, tarfile.PAX_FORMAT))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    quick = tars._quick(io.BytesIO(whole), len(whole))
    if quick is not None:
        try:
            assert quick == tars._thorough(io.BytesIO(whole))
        except (tarfile.TarError, ValueError):  # of a pax header, whose times and owners do not matter here
            assert b"PaxHeader" in whole


@pytest.mark.parametrize("line", [b"0 a=b\n", b"-4 a=b\n", b"99 a=b\n", b"a=b", b"\xff", b"7 abcd\n", b"4 =b\n"])
def test_a_damaged_pax_header_ends(line):
    with pytest.raises(ValueError, match=r"damaged pax|invalid literal"):
        list(tars._pax(line + b"9 c=d\n"))


def test_the_quick_reader_reads_what_writers_of_webdataset_write():
    plain = [(f"{i:05d}.{end}", tarfile.REGTYPE, 99, i / 7) for i in range(30) for end in ("png", "cls")]
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT):
        data = tar_of(plain, form)
        assert len(tars._quick(io.BytesIO(data), len(data))) == 60
    assert tars._quick(io.BytesIO(data[:-20_000]), len(data) - 20_000) is None


# -- when an index is used ---------------------------------------------------------------------------------------------


def source_of(root, kind):
    for i, image in enumerate(PIXELS):
        pictures.save(root / "set" / f"c{i % 2}" / f"{i}.png", image)
    return packed(root, kind)


def packed(root, kind):
    if kind == "folder":
        return root / "set"
    to = root / f"set.{kind}"
    if kind == "tar":
        with tarfile.open(to, "w") as archive:
            archive.add(root / "set", "set")
    else:
        with zipfile.ZipFile(to, "w") as archive:
            for path in sorted((root / "set").rglob("*.png")):
                archive.write(path, path.relative_to(root))
    return to


def found(source):
    images = load(str(source), (8, 8), 3)
    return images.batch(range(len(images))).tolist(), images.labels.tolist(), images.class_names, images.fingerprint


def with_labels_beside(root):
    """A folder of images, each with its label in NAME.cls."""
    for i, image in enumerate(PIXELS):
        pictures.save(root / f"{i}.png", image)
        (root / f"{i}.cls").write_text(f"c{i % 2}")
    return root


def not_called(*_):
    raise AssertionError("was called")


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_second_start_uses_the_index(tmp_path, cache, monkeypatch, kind):
    source = source_of(tmp_path, kind)
    first = found(source)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "arrange", not_called)
        patch.setattr(tars, "_quick", not_called)
        assert found(source) == first
        assert list(cache.glob("index/*.arrow"))
        for file in cache.glob("index/*.arrow"):  # a damaged index is no index
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        with pytest.raises(AssertionError, match="was called"):
            found(source)
    assert found(source) == first
    for file in cache.glob("index/*.arrow"):
        file.write_bytes(b"")
    assert found(source) == first


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_a_changed_source_is_read_again(tmp_path, kind):
    source = source_of(tmp_path, kind)
    first = found(source)
    os.replace(tmp_path / "set" / "c0" / "4.png", tmp_path / "set" / "c1" / "4.png")
    assert found(packed(tmp_path, kind))[1] != first[1]


def test_a_label_that_is_edited_to_the_same_length_is_noticed_by_its_time(tmp_path):
    root = with_labels_beside(tmp_path / "set")
    first = found(root)
    (root / "0.cls").write_text("c1")
    assert found(root)[1] == [1, *first[1][1:]]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DDPM_DATA_CACHE", str(tmp_path / "file"))
    source = source_of(tmp_path, "tar")
    assert found(source) == found(source)


def test_an_index_that_is_not_used_is_forgotten(tmp_path, cache):
    found(source_of(tmp_path / "a", "folder"))
    [old] = cache.glob("index/*.arrow")
    os.utime(old, (0, 0))
    found(source_of(tmp_path / "b", "folder"))
    [new] = cache.glob("index/*.arrow")
    assert new != old


def _index(counted):
    def build():
        with counted.get_lock():
            counted.value += 1
        time.sleep(0.3)
        return pa.table({"a": [1, 2, 3]})

    assert index.indexed(index.key_of("test"), build).equals(pa.table({"a": [1, 2, 3]}))


@pytest.mark.filterwarnings("ignore:.*fork")
def test_processes_that_start_together_build_one_index():
    assert forked(3, _index) == 1


def test_images_of_a_format_that_is_installed_later_are_found(tmp_path, monkeypatch):
    source = source_of(tmp_path, "folder")
    pictures.save(tmp_path / "b.png", PIXELS[0])
    os.replace(tmp_path / "b.png", source / "c0" / "b.heic")
    monkeypatch.setattr(pictures, "SUFFIXES", pictures.SUFFIXES - {".heic"})
    with pytest.warns(UserWarning, match=r"1 file left out.*1 \.heic"):
        assert len(found(source)[1]) == len(PIXELS)
    monkeypatch.setattr(pictures, "SUFFIXES", pictures.SUFFIXES | {".heic"})
    assert len(found(source)[1]) == len(PIXELS) + 1


def test_a_cache_of_another_user_is_used(tmp_path, monkeypatch):
    """Its files can be read, but their times cannot be changed."""

    def refuse(*_, **__):
        raise PermissionError

    source = source_of(tmp_path, "tar")
    first = found(source)
    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(sources, "arrange", not_called)
    monkeypatch.setattr(tars, "_quick", not_called)
    assert found(source) == first


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps no such time")
def test_an_edit_that_keeps_size_and_time_is_noticed(tmp_path):
    """As by `cp -p`."""
    root = with_labels_beside(tmp_path / "set")
    first = found(root)
    before = (root / "0.cls").stat()
    time.sleep(0.02)  # the clock of a file system has steps
    (root / "0.cls").write_text("c1")
    os.utime(root / "0.cls", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert found(root)[1] == [1, *first[1][1:]]


def test_mistakes_are_not_kept(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    for _ in range(2):
        with pytest.raises(InputError, match=r"a\.tar: not a whole tar file without compression"):
            load(str(tmp_path / "a.tar"), (8, 8), 3)
    assert not index._read(Path(tmp_path / "none"))


@given(st.lists(st.sampled_from(["train/a/\udcff.png", "train/b/2.png", "test/a/é.png", "notes.txt"]), unique=True))
@settings(max_examples=20)
def test_a_layout_is_the_same_from_its_table(files):
    try:
        one = layout.arrange("here", files, not_called, sources.Options())
    except InputError:
        return
    other = layout.Layout.from_table(one.to_table())
    assert (one.splits, one.class_names, one.left_out) == (other.splits, other.class_names, other.left_out)
    assert (one.labels is None) == (other.labels is None)
    for split, labels in (one.labels or {}).items():
        assert np.array_equal(labels, other.labels[split])
