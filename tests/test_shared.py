"""A machine decodes once: processes map one file, which is made again when anything that it depends on differs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from several import forked

from ddpm.errors import InputError
from ddpm.files import codecs
from ddpm.files import images as pictures
from ddpm.files.data import batches, load, loading, shared

N = 40
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_DATA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "PLAIN", 0)
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def folder(tmp_path):
    for i, image in enumerate(PIXELS):
        pictures.save(tmp_path / "set" / f"{i}.png", image)
    return str(tmp_path / "set")


def found(folder, **options):
    return load(folder, (8, 8), 3, **options)


def not_called(*_):
    raise AssertionError("was called")


def test_a_second_run_maps_what_the_first_one_decoded(folder, cache, monkeypatch):
    first = found(folder)
    assert torch.equal(first.pixels, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert len(list(cache.glob("*.npy"))) == 1
    monkeypatch.setattr(loading, "decode_all", not_called)
    second = found(folder)
    assert torch.equal(second.pixels, first.pixels)
    assert second.fingerprint == first.fingerprint
    assert torch.equal(next(batches(first, 0, 8, 3, 4)), next(batches(second, 0, 8, 3, 4)))
    second.pixels.zero_()  # its own; the file stays
    assert torch.equal(found(folder).pixels, first.pixels)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_the_pixels_depend_on_is_in_the_key(folder, cache, monkeypatch):
    found(folder)
    count = 1
    for change in (
        lambda: load(folder, (16, 16), 3),
        lambda: load(folder, (8, 8), 1),
        lambda: load(folder, (8, 4), 3, fit="stretch"),
        lambda: found(folder, skip_bad=True),
    ):
        change()
        count += 1
        assert len(list(cache.glob("*.npy"))) == count
    old = Path(folder, "7.png").stat()
    pictures.save(Path(folder, "7.png"), PIXELS[3])
    os.utime(Path(folder, "7.png"), ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert torch.equal(found(folder).pixels[7], torch.from_numpy(PIXELS[3]).permute(2, 0, 1))


def test_an_image_that_was_too_large_is_read_when_the_limit_is_raised(folder, monkeypatch):
    """As the message of the one that was skipped advises."""
    Image.new("RGB", (600, 600)).save(Path(folder, "5.png"))
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "MEMORY", 10**6)
        with pytest.warns(UserWarning, match=r"1 of 40 images skipped.*5\.png.* set DDPM_PICTURE_MB=2"):
            found(folder, skip_bad=True)
    assert len(found(folder, skip_bad=True)) == N


def test_bad_images_are_left_out_again_without_decoding(folder, cache, monkeypatch):
    Path(folder, "5.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"5\.png: empty file"):
        found(folder)
    assert not list(cache.glob("*.npy"))
    with pytest.warns(UserWarning, match=r"1 of 40 images skipped.*5\.png"):
        first = found(folder, skip_bad=True)
    monkeypatch.setattr(loading, "decode_all", not_called)
    with pytest.warns(UserWarning, match=r"1 of 40 images skipped.*5\.png"):
        second = found(folder, skip_bad=True)
    assert (first.faults, first.fingerprint) == (second.faults, second.fingerprint)
    rest = [i for i in range(N) if i != 5]
    for images in (first, second):
        assert torch.equal(images.batch(range(N - 1)), torch.from_numpy(PIXELS[rest]).permute(0, 3, 1, 2))
        assert images.names()[5].endswith("6.png")


def _load(folder, counted):
    decode_all = loading.decode_all

    def counting(*arguments):
        with counted.get_lock():
            counted.value += 1
        return decode_all(*arguments)

    loading.decode_all, loading.PLAIN = counting, 0
    images = load(folder, (8, 8), 3)
    assert torch.equal(images.batch(range(N)), torch.from_numpy(PIXELS).permute(0, 3, 1, 2))


def test_processes_that_start_together_decode_once(folder):
    assert forked(4, _load, folder) == 1


def test_a_full_disk_or_a_cache_that_is_no_folder_costs_only_memory(folder, cache, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.warns(UserWarning, match=r"not written .*No space left"):
            pixels = found(folder).pixels
        assert torch.equal(pixels, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert not list(cache.glob("*.npy"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDPM_DATA_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="so each process holds its own images"):
        assert torch.equal(found(folder).pixels, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))


def test_copies_that_are_not_used_are_forgotten_and_damaged_ones_made_again(folder, cache):
    first = found(folder)
    [path] = cache.glob("*.npy")
    path.with_suffix(".json").write_text("{")
    assert torch.equal(found(folder).pixels, first.pixels)
    path.write_bytes(path.read_bytes()[:200])
    assert torch.equal(found(folder).pixels, first.pixels)
    for file in cache.iterdir():
        os.utime(file, (0, 0))
    with pytest.warns(UserWarning, match="converted"):
        load(folder, (8, 8), 1)
    assert path not in set(cache.iterdir())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells which files are mapped")
def test_a_file_is_renamed_only_when_it_is_not_mapped(folder, cache, monkeypatch):
    """Windows renames no other file."""
    replace, mapped = os.replace, []

    def look(source, target):
        mapped.append(str(source) in Path("/proc/self/maps").read_text())
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    found(folder)
    assert len(list(cache.glob("*.npy"))) == 1
    assert not any(mapped)


def test_another_version_of_a_decoder_decodes_again(folder, cache, monkeypatch):
    found(folder)
    monkeypatch.setattr(codecs, "version", lambda package: "99")
    found(folder)
    assert len(list(cache.glob("*.npy"))) == 2


def test_few_images_of_one_process_stay_in_its_memory(folder, cache, monkeypatch):
    monkeypatch.setattr(loading, "PLAIN", shared.PLAIN)
    found(folder)
    assert not cache.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    found(folder)
    assert len(list(cache.glob("*.npy"))) == 1


def test_rows_that_name_files_are_not_kept(tmp_path, cache, monkeypatch):
    """A file that a row names may change, and nothing tells."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    for i, image in enumerate(PIXELS):
        pictures.save(tmp_path / "set" / "files" / f"{i}.png", image)
    data = [pictures.to_png(image) for image in PIXELS]
    for name, cells in {
        "paths": [{"bytes": None, "path": f"files/{i}.png"} for i in range(N)],
        "bytes": [{"bytes": each, "path": None} for each in data],
    }.items():
        pq.write_table(pa.table({"image": cells}), tmp_path / "set" / f"{name}.parquet")
        images = load(str(tmp_path / "set" / f"{name}.parquet"), (8, 8), 3)
        assert torch.equal(images.pixels, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
        assert len(list(cache.glob("*.npy"))) == (name == "bytes")
