"""Images of any dtype, depth and number of channels: read exactly, trained on, sampled, and written back exactly."""

import io
import json
import pickle
import tarfile
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.cli.main import main
from ddpm.errors import InputError
from ddpm.files import arrays, data, images
from ddpm.files.data import decoding, loading
from ddpm.pixels import EIGHT_BIT, Values

tifffile = pytest.importorskip("tifffile")
imagecodecs = pytest.importorskip("imagecodecs")

N, SIZE = 24, (8, 8)
RNG = np.random.default_rng(0)
GREY16 = RNG.integers(0, 65536, (N, 8, 8, 1), dtype=np.uint16)
RGB16 = RNG.integers(0, 65536, (N, 8, 8, 3), dtype=np.uint16)
BANDS = RNG.integers(0, 10_001, (N, 8, 8, 13), dtype=np.uint16)
FLOATS = RNG.normal(300, 5, (N, 8, 8, 1)).astype(np.float32)  # kelvins, far from 0


def npy(image):
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def tiff(image, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, image, **options)
    return file.getvalue()


def png(image):
    return imagecodecs.png_encode(image[..., 0] if image.shape[2] == 1 else image)


def planes(image):
    return tiff(np.ascontiguousarray(image.transpose(2, 0, 1)), planarconfig="separate", photometric="minisblack")


def samples(image):
    return tiff(image, planarconfig="contig", photometric="minisblack")


def folder(path, images_of, suffix, encode):
    path.mkdir(parents=True)
    for i, image in enumerate(images_of):
        (path / f"{i}{suffix}").write_bytes(encode(image))
    return str(path)


def whole(source, channels, values, **settings):
    """All images of a source in order, [N, H, W, C]."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = data.load(source, SIZE, channels, values=values, **settings)
    return loaded.batch(range(len(loaded))).permute(0, 2, 3, 1).numpy()


DEEP = Values("uint16", 0, 65535)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize(
    ("given", "suffix", "encode", "values"),
    [
        (GREY16, ".png", png, DEEP),
        (GREY16, ".tif", lambda x: tiff(x[..., 0]), DEEP),
        (GREY16, ".tif", lambda x: tiff(x[..., 0], byteorder=">"), DEEP),
        (GREY16, ".npy", lambda x: npy(x[..., 0]), DEEP),
        (GREY16, ".tiff", lambda x: tiff(65535 - x[..., 0], photometric="miniswhite"), DEEP),
        (RGB16, ".png", png, DEEP),
        (RGB16, ".tif", lambda x: tiff(x, photometric="rgb"), DEEP),
        (BANDS, ".npy", npy, DEEP),
        (BANDS, ".tif", planes, DEEP),
        (BANDS, ".tif", samples, DEEP),
        (BANDS, ".npy", lambda x: npy(x.astype(np.int32)), Values("uint16", 0, 10_000)),
        (FLOATS, ".npy", npy, Values("float32", 200, 400)),
        (FLOATS, ".tif", lambda x: tiff(x[..., 0]), Values("float32", 200, 400)),
        ((BANDS % 256).astype(np.uint8), ".npy", npy, EIGHT_BIT),
        ((BANDS[..., :3] % 256).astype(np.uint8), ".npy", npy, EIGHT_BIT),
        ((BANDS[..., :2] % 256).astype(np.uint8), ".tif", planes, EIGHT_BIT),
    ],
)  # fmt: skip
def test_files_are_read_exactly(tmp_path, given, suffix, encode, values, cache_bytes):
    """Also the low bytes, in any layout of TIFF, decoded at once or on demand."""
    source = folder(tmp_path / "a", given, suffix, encode)
    read = whole(source, given.shape[3], values, cache_bytes=cache_bytes)
    assert read.dtype == given.dtype
    assert (read == given).all()


def test_a_control_loses_the_low_bytes(tmp_path):
    """Pillow opens 16-bit colour as 8 bits, so the test above could fail."""
    (tmp_path / "a.png").write_bytes(png(RGB16[0]))
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(image).dtype == np.uint8
    with pytest.warns(UserWarning, match="rounded to 8 .*pixel_type uint16 keeps them"):
        data.load(str(tmp_path), SIZE, 3)


@pytest.mark.parametrize("given", [GREY16, BANDS, FLOATS])
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.tar", "lmdb"])
def test_one_file_of_many_images(tmp_path, given, name):
    values = Values("float32", 200, 400) if given is FLOATS else DEEP
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, given[..., 0] if given is GREY16 else given)
    elif name == "a.npz":
        np.savez(path, x=given)
    elif name == "a.tar":
        with tarfile.open(path, "w") as archive:
            for i, image in enumerate(given):
                member = tarfile.TarInfo(f"{i}.npy")
                member.size = len(npy(image))
                archive.addfile(member, io.BytesIO(npy(image)))
    else:
        write_lmdb(path, [npy(image) for image in given])
    assert (whole(str(path), given.shape[3], values) == given).all()


def test_a_mapped_array_is_not_copied_into_workers(tmp_path):
    """Where workers do not start as copies of this process, the images are pickled for them."""
    np.save(tmp_path / "a.npy", RGB16)
    loaded = data.load(str(tmp_path / "a.npy"), SIZE, 3, values=DEEP, cache_bytes=0)
    pickled = pickle.dumps(loaded)
    assert len(pickled) < RGB16.nbytes / 2
    assert torch.equal(pickle.loads(pickled).batch(range(N)), loaded.batch(range(N)))


def test_an_lmdb_is_opened_by_several(tmp_path):
    """As by a notebook that trains twice, though a process may open an LMDB only once."""
    pictures = [images.to_png(np.full((8, 8, 3), i, np.uint8)) for i in range(6)]
    write_lmdb(tmp_path / "lmdb", pictures)
    one, other = (data.load(str(tmp_path / "lmdb"), SIZE, 3, cache_bytes=0) for _ in range(2))
    for each in (one, other, one):
        assert each.batch(range(6))[:, 0, 0, 0].tolist() == list(range(6))


def test_workers_open_an_lmdb_again(tmp_path):
    """A fork copies what this process has open, and another fork follows when the first workers are gone."""
    write_lmdb(tmp_path / "lmdb", [images.to_png(np.full((8, 8, 3), i, np.uint8)) for i in range(6)])
    loaded = data.load(str(tmp_path / "lmdb"), SIZE, 3, cache_bytes=0)
    for step in range(2):
        [batch] = data.batches(loaded, 0, 6, step, step + 1, workers=2)
        assert batch[:, 0, 0, 0].tolist() == loaded.order(0, step, 6).tolist()
        assert loaded.batch(range(6))[:, 0, 0, 0].tolist() == list(range(6))


def test_pairs_of_two_lmdbs_have_the_same_keys(tmp_path):
    files = [images.to_png(np.full((8, 8, 3), i, np.uint8)) for i in range(4)]
    write_lmdb(tmp_path / "a", files[:3])
    write_lmdb(tmp_path / "b", files[:3])
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "c"), map_size=1 << 24) as opened, opened.begin(write=True) as transaction:
        for i in range(1, 4):
            transaction.put(f"{i:04d}".encode(), files[i])
    one, same, other = (data.load(str(tmp_path / name), SIZE, 3) for name in "abc")
    assert len(data.paired(one, same)) == 3
    with pytest.raises(InputError, match="0001 is in the place of 0000; want files of the same names"):
        data.paired(one, other)


def write_lmdb(path, files):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=1 << 24) as opened, opened.begin(write=True) as transaction:
        for i, file in enumerate(files):
            transaction.put(f"{i:04d}".encode(), file)


def test_lsun_as_it_is_distributed(tmp_path):
    """A folder of LMDBs of JPEGs, whose names say their split."""
    pictures = [images.to_png(np.full((8, 8, 3), i, np.uint8)) for i in range(6)]
    write_lmdb(tmp_path / "church_outdoor_train_lmdb", pictures[:4])
    write_lmdb(tmp_path / "church_outdoor_val_lmdb", pictures[4:])
    train, held_out = data.load_pair(str(tmp_path), SIZE, 3)
    assert train.batch(range(4))[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert (held_out.split, held_out.batch([0, 1])[:, 0, 0, 0].tolist()) == ("validation", [4, 5])
    write_lmdb(tmp_path / "tower_train_lmdb", pictures[:1])
    with pytest.raises(InputError, match="several of one split; want one of them as the SOURCE"):
        data.load(str(tmp_path), SIZE, 3)
    (tmp_path / "church_outdoor_train_lmdb" / "data.mdb").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged LMDB"):
        data.load(str(tmp_path / "church_outdoor_train_lmdb"), SIZE, 3)


def test_pages_of_a_tiff(tmp_path):
    """The first page, or all of them as channels."""
    source = folder(tmp_path / "a", BANDS, ".tif", lambda x: tiff(x.transpose(2, 0, 1).copy(), metadata=None))
    assert (whole(source, 13, DEEP, pages="channels") == BANDS).all()
    with pytest.warns(UserWarning, match="24 images: several pictures in one file, only the first is taken"):
        first = data.load(source, SIZE, 1, values=DEEP)
    assert (first.batch(range(N)).permute(0, 2, 3, 1).numpy() == BANDS[..., :1]).all()


def test_the_range_of_floats_is_found_over_all_splits(tmp_path):
    folder(tmp_path / "train", FLOATS[:20], ".npy", npy)
    folder(tmp_path / "test", np.concatenate([FLOATS[20:], FLOATS[:1] + 100]), ".npy", npy)
    train, held_out = data.load_pair(str(tmp_path), SIZE, 1, values=None)
    assert train.values == held_out.values == Values("float32", float(FLOATS.min()), float(FLOATS[:1].max() + 100))


def test_bad_images_do_not_tell_the_range_of_floats(tmp_path, capsys):
    """With skip_bad, damaged files and those with NaN are skipped; without, they are named, and so is the setting."""
    source = folder(tmp_path / "a", FLOATS, ".npy", npy)
    for name, content in (("bad", b"words"), ("nan", npy(np.full((8, 8), np.nan)))):
        (tmp_path / "a" / f"{name}.npy").write_bytes(content)
    with pytest.warns(UserWarning, match="2 of 26 images skipped"):
        loaded = data.load(source, SIZE, 1, values=None, skip_bad=True)
    assert loaded.values == Values("float32", float(FLOATS.min()), float(FLOATS.max()))
    with pytest.raises(InputError, match=r"bad\.npy: not a whole .*; the setting skip_bad of `ddpm train` skips such"):
        data.load(source, SIZE, 1, values=None)
    assert main(["data", source, "--size", "8", "--channels", "1", "--pixel-type", "float32", "--json"]) == 0
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert ["bad.npy" in faults[0], "nan.npy: holds NaN" in faults[1]] == [True, True]
    for i in range(N):
        (tmp_path / "a" / f"{i}.npy").unlink()
    with pytest.raises(InputError, match=r"no image can be used, the first: .*bad\.npy"):
        data.load(source, SIZE, 1, values=None, skip_bad=True)


@pytest.mark.parametrize(
    ("image", "channels", "values", "match"),
    [
        (FLOATS[0], 1, EIGHT_BIT, r"0\.npy: float32 numbers; want pixel_type float32"),
        (GREY16[0], 1, EIGHT_BIT, r"0\.npy: uint16 numbers; want pixel_type uint16"),
        (FLOATS[0], 1, DEEP, r"0\.npy: float32 numbers; want pixel_type float32, or integers for uint16"),
        (
            FLOATS[0],
            1,
            Values("float32", 0, 1),
            r"0\.npy: numbers 28.*, outside the range 0\.\.1; want anothe",
        ),
        (np.full((8, 8), np.nan), 1, Values("float32", 0, 1), r"0\.npy: holds NaN"),
        (np.full((8, 8), np.inf), 1, Values("float32", 0, 1), r"0\.npy: holds infinity"),
        (BANDS[0], 3, DEEP, r"0\.npy: \[H, W, C\] is \[8, 8, 13\]; want channels 13, or C = 3"),
        (np.zeros(8), 1, DEEP, r"0\.npy: float64 \[8\]; want an image"),
        (np.zeros((8, 8), np.complex64), 1, DEEP, r"0\.npy: complex64 \[8, 8\]; want an image"),
        (np.zeros((8, 8), np.int64) - 1, 1, DEEP, r"0\.npy: numbers -1\.\.-1, outside the range 0\.\.65535"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, image, channels, values, match):
    np.save(tmp_path / "0.npy", image)
    with pytest.raises(InputError, match=match):
        data.load(str(tmp_path), SIZE, channels, values=values)


@pytest.mark.parametrize("damage", ["cut", "empty", "pickle", "8-bit"])
def test_files_that_cannot_be_read_are_named(tmp_path, damage):
    file = tmp_path / "0.npy"
    np.save(file, GREY16[0])
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "pickle":
        np.save(file, np.array([{}], object))
    else:
        file.unlink()
        (tmp_path / "0.png").write_bytes(images.to_png(np.zeros((8, 8, 1), np.uint8)))
    wanted = "8 bits a channel; want 16" if damage == "8-bit" else "not a whole .npy file of numbers"
    with pytest.raises(InputError, match=rf"0\.(npy|png): {wanted}"):
        data.load(str(tmp_path), SIZE, 1, values=DEEP)


def test_damaged_files_are_refused_or_read():
    """Bytes that are changed or cut off end in InputError, or in an image; never in another exception."""
    rng = np.random.default_rng(0)
    whole = [npy(GREY16[0]), npy(FLOATS[0]), png(RGB16[0]), planes(BANDS[0]), tiff(RGB16[0], photometric="rgb")]
    refusals = 0
    for k in range(400):
        data = bytearray(whole[k % len(whole)])
        if k % 3:
            data[rng.integers(min(len(data), 200))] = rng.integers(256)
        else:
            data = data[: rng.integers(len(data))]
        with suppress(InputError):
            assert arrays.read(bytes(data), "a", "channels").ndim == 3
            continue
        refusals += 1
    assert refusals > 100


def test_a_tiff_without_pixels_is_not_read_as_zeros():
    """tifffile only logs that the place of the pixels is missing, and returns zeros."""
    data = bytearray(tiff(GREY16[0, ..., 0]))
    at = data.index((273).to_bytes(2, "little") + (4).to_bytes(2, "little"))  # StripOffsets
    data[at : at + 2] = (40000).to_bytes(2, "little")
    with pytest.raises(InputError, match=r"damaged TIFF \(.*missing data offset tag"):
        arrays.read(bytes(data), "a")


def test_threads_fit_into_the_memory_as_those_of_pictures_do(tmp_path, monkeypatch):
    """A large image that is no picture is decoded by several threads, which do not fill the memory together."""
    used = []

    def decode_all(decoder, pixels, threads, *others):
        used.append(threads)
        return decoding.decode_all(decoder, pixels, threads, *others)

    monkeypatch.setattr(loading, "decode_all", decode_all)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    large = RNG.integers(0, 65536, (4, 64, 128, 2), dtype=np.uint16)
    source = folder(tmp_path / "a", large, ".npy", npy)
    for memory in (images.MEMORY, 3 * 4 * large[0].size):
        monkeypatch.setattr(images, "MEMORY", memory)
        data.load(source, SIZE, 2, values=DEEP)
    data.load(folder(tmp_path / "small", GREY16, ".npy", npy), SIZE, 1, values=DEEP)
    assert used == [8, 3, 1]


def test_clipping_is_said_once_with_a_count(tmp_path):
    source = folder(tmp_path / "a", FLOATS, ".npy", npy)
    with pytest.warns(UserWarning, match=r"24 images: numbers outside 299\.\.301 are clipped") as caught:
        loaded = data.load(source, SIZE, 1, values=Values("float32", 299, 301), clip_values=True)
    assert len(caught) == 1
    assert (loaded.batch(range(N)).permute(0, 2, 3, 1).numpy() == FLOATS.clip(299, 301)).all()


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_fit_is_the_same_for_pictures_and_arrays(how):
    """An array of 8-bit numbers gets what the picture gets, to a rounding; ramps keep their ends."""
    ramp = np.add.outer(np.arange(24), 4 * np.arange(40)).astype(np.uint8)
    picture = images.fit(Image.fromarray(ramp), (8, 16), 1, how=how)
    array = arrays.fit(ramp[..., None].astype(np.uint16), (8, 16), 1, how, "a", {})
    assert np.abs(array.astype(int) - picture).max() <= 1
    wide = {"crop": 0, "pad": 1, "stretch": 0}[how]
    assert (picture[:, 0] == 0).all() == bool(wide)


def test_padding_and_stretching():
    """pad keeps all of the image in its proportions, centred on black; stretch fills the size with all of it."""
    image = Image.new("RGB", (40, 20), "white")
    padded = images.fit(image, (16, 16), 3, how="pad")
    assert (padded[4:12] == 255).all()
    assert (padded[:4] == 0).all()
    assert (padded[12:] == 0).all()
    assert (images.fit(image, (16, 16), 3, how="stretch") == 255).all()
    clear = images.fit(Image.new("RGBA", (40, 20), "white"), (16, 16), 4, how="pad")
    assert (clear[0] == 0).all()


@pytest.mark.parametrize(
    ("channels", "values"),
    [(1, Values("uint16", 0, 65535)), (4, Values("uint16", 0, 65535)), (1, Values("float32", -1000, 3000))],
)
def test_padding_is_the_low_end_of_the_values(channels, values):
    """It is black, or transparent, whatever the darkest number of the image is; scaling does not overshoot into it."""
    image = RNG.integers(2000, 3000, (20, 40, channels)).astype(values.dtype)
    form = decoding.Form((16, 16), channels, values, "pad")
    padded = form.array(image, "a", {})
    assert (padded[[0, 1, 2, 3, 12, 13, 14, 15]] == values.low).all()
    assert padded[4:12].min() >= image.min()


def test_what_a_picture_of_many_channels_shows():
    values = Values("uint16", 0, 10_000)
    shown = arrays.shown(BANDS, arrays.View(values, (4, 3, 2)))
    assert (shown == np.rint(BANDS[..., [3, 2, 1]] * (255 / 10_000))).all()
    assert (arrays.shown(BANDS, arrays.View(values)) == np.rint(BANDS[..., :3] * (255 / 10_000))).all()
    assert arrays.shown(BANDS[..., :2], arrays.View(values)).shape[-1] == 1
    bright = arrays.shown(BANDS, arrays.View(values, (1,), (1000, 3000)))
    assert (bright == np.rint(((BANDS[..., :1] - 1000.0) * (255 / 2000)).clip(0, 255))).all()
    eight = RNG.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert (arrays.shown(eight, arrays.View(EIGHT_BIT)) == eight).all()


# -- from files to samples ---------------------------------------------------------------------------------------------

TINY = "--size 8 --width 32 --channel-multipliers 1 --num-res-blocks 1 --attention-resolutions 0 --patch 1 --steps 4 "
TINY += "--batch-size 8 --sample-every 4 --sample-count 4 --sample-steps 4 --eval-images 8 --num-timesteps 20"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("given", "suffix", "encode", "options"),
    [
        (GREY16, ".png", png, "--channels 1 --pixel-type uint16"),
        (RGB16, ".tif", lambda x: tiff(x, photometric="rgb"), "--pixel-type uint16"),
        (
            BANDS,
            ".npy",
            npy,
            "--channels 13 --pixel-type uint16 --value-range 0,10000 --show 4,3,2 --show-range 0,99",
        ),
        (FLOATS, ".npy", npy, "--channels 1 --pixel-type float32"),
        (FLOATS - 300, ".npy", npy, "--channels 1 --pixel-type float32 --value-range -50,50"),
    ],
)
def test_from_files_to_samples(tmp_path, monkeypatch, capsys, given, suffix, encode, options):
    """train, sample in every form, edit, evaluate: what comes out is of the kind that went in."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "a", given, suffix, encode)
    assert main(f"train photos --data a --out run {TINY} {options}".split()) == 0
    config = json.loads(Path("run/config.json").read_text())
    low, high = config["value_range"] or (0, 65535)
    if "value-range" not in options and given.dtype == np.float32:
        assert (low, high) == (float(given.min()), float(given.max()))
    with Image.open("run/samples/00000004.png") as grid:
        assert grid.mode == ("L" if given.shape[3] == 1 else "RGB")
    assert main("info run".split()) == 0
    steps = "-n 3 --sampler ddim --steps 2 --json"
    for out in ("one/", "all.npy", "all.npz", "all.tif", "grid.png"):
        assert main(f"sample run {steps} --out {out}".split()) == 0
    exact = np.load("all.npy")
    assert (exact.dtype, exact.shape) == (given.dtype, (3, 8, 8, given.shape[3]))
    assert low <= exact.min() < exact.max() <= high
    assert (np.load("all.npz")["arr_0"] == exact).all()
    assert (tifffile.imread("all.tif").reshape(exact.shape) == exact).all()
    files = sorted(p for p in Path("one").iterdir() if p.suffix != ".json")
    assert [p.suffix for p in files] == [".png" if given is GREY16 else ".npy"] * 3
    for file, image in zip(files, exact, strict=True):
        assert (arrays.read(file, str(file)) == image).all()
    first = next(p for p in sorted(Path("a").iterdir()))
    assert main(f"edit run {first} --t 0 --out same.npy --json".split()) == 0
    same = np.load("same.npy")[0]
    error = np.abs(same.astype(np.float64) - arrays.read(first, "a"))
    assert error.max() <= (0 if given.dtype == np.uint16 else 1e-4)
    capsys.readouterr()
    metrics = "ode" if given.dtype == np.float32 else "nll"
    few = "--ode-steps 3" if metrics == "ode" else ""
    assert main(f"evaluate run --metrics {metrics} -n 2 --json {few}".split()) == 0
    result = json.loads(capsys.readouterr().out)[metrics]
    assert np.isfinite(result["nats_per_dim" if metrics == "ode" else "bits_per_dim"])
    if metrics == "ode":
        assert main("evaluate run --metrics nll -n 2".split()) == 2
        assert "float32: has no bins" in capsys.readouterr().err
    Path("f.py").write_text("def f(x):\n    return x.reshape(len(x), -1)[:, :2].astype(float)\n")
    assert main("paper neighbours --model run --features f.py:f -n 4 --sampler ddim --steps 2".split()) == 0
    capsys.readouterr()
    assert main("evaluate run --metrics fid -n 4 --sampler ddim --steps 2".split()) == 2
    assert "images: Inception takes 8-bit grey and RGB; want --features FILE.py:NAME" in capsys.readouterr().err
    assert main(f"train photos --data a --out run {TINY} {options} --steps 6".split()) == 0
