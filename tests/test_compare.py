"""Two sets of pictures without a model, and statistics that other programs wrote."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg

from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files import data, features

# Features of images of any size: the means and deviations of their channels, of which grey ones have three equal ones.
FUNCTION = """
import numpy as np
def stats(x):
    x = np.broadcast_to(x, (*x.shape[:3], 3)) / 255
    p = x.reshape(len(x), -1, 3).mean((1, 2))[:, None]
    return np.concatenate([x.mean((1, 2)), x.std((1, 2))], 1), np.concatenate([p, 1 - p], 1)
def pixels(x):
    return x.reshape(len(x), -1).astype(float)
"""


def stats(pictures):
    """The same of each picture, one by one."""
    rows = [np.broadcast_to(p if p.ndim == 3 else p[..., None], (*p.shape[:2], 3)) / 255 for p in pictures]
    return np.array([[*row.mean((0, 1)), *row.std((0, 1))] for row in rows])


def frechet(a, b):
    """By the square root of a product, as pytorch-fid does."""
    (m1, s1), (m2, s2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    return ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("f.py").write_text(FUNCTION)
    return tmp_path


def drawn(seed, count=24, sides=(8, 12, 15), channels=3):
    rng = np.random.default_rng(seed)
    shapes = [(sides[i % len(sides)], sides[(i // 2) % len(sides)], channels) for i in range(count)]
    return [rng.integers(0, 100 + 5 * i, shape, np.uint8) for i, shape in enumerate(shapes)]


def written(folder, pictures):
    Path(folder).mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.squeeze()).save(Path(folder) / f"{i}.png")
    return folder


def compared(capsys, *words):
    assert main(["compare", *words, "--features", "f.py:stats", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_two_folders_of_any_sizes(here, capsys):
    """All images of both, by the formula; in a zip, in folders of folders and in an npz they are the same images."""
    a, b = drawn(1), drawn(2, 30)
    written("a/deep", a)
    written("b", b)
    result = compared(capsys, "a", "b", "--metrics", "fid", "kid", "pr", "is")
    assert result["frechet_distance"] == pytest.approx(frechet(stats(a), stats(b)), rel=1e-6)
    assert (result["samples"], result["images"], result["a"], result["b"]) == (24, 30, "a", "b")
    assert {"kid", "precision", "recall", "inception_score"} <= result.keys()
    with zipfile.ZipFile("a.zip", "w") as archive:
        for i in range(24):
            archive.write(f"a/deep/{i}.png", f"x/{i}.png")
        archive.writestr("x/readme.txt", "no image")
        archive.writestr("__MACOSX/x/._0.png", "no image")
    zipped = compared(capsys, "a.zip", "b", "--metrics", "fid", "kid", "pr", "is", "--out", "r.json")
    assert {**zipped, "a": "a"} == result
    assert json.loads(Path("r.json").read_text()) == zipped
    same = drawn(3, sides=(8,))
    np.savez("c.npz", arr_0=np.stack(same), names=np.arange(24))
    assert compared(capsys, written("c", same), "b") == {**compared(capsys, "c.npz", "b"), "a": "c"}


def test_the_same_images_are_at_distance_zero(here, capsys):
    written("a", drawn(1))
    written("b", drawn(1))
    result = compared(capsys, "a", "b", "--metrics", "fid", "pr")
    assert result["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert result["precision"] == result["recall"] == 1


@pytest.mark.filterwarnings("ignore:.*laid on white|.*is converted:UserWarning")
def test_grey_and_transparent_pictures(here, capsys):
    """Grey is RGB of three equal channels, and alpha is laid on white."""
    grey = drawn(1, channels=1)
    written("grey", grey)
    written("rgb", [np.repeat(picture, 3, 2) for picture in grey])
    clear = drawn(2, channels=4)
    written("rgba", clear)
    flat = [Image.alpha_composite(Image.new("RGBA", p.shape[1::-1], "white"), Image.fromarray(p)) for p in clear]
    written("flat", [np.array(picture.convert("RGB")) for picture in flat])
    assert compared(capsys, "grey", "rgb")["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert compared(capsys, "rgba", "flat")["frechet_distance"] == pytest.approx(0, abs=1e-9)


def test_statistics_and_features_of_other_programs(here, capsys):
    """In place of either side; mu and sigma as they publish them, of float32 too."""
    a, b = drawn(1), drawn(2)
    written("a", a)
    rows = stats(b)
    np.savez("features.npz", features=rows)
    np.savez("fid.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez("adm.npz", arr_0=images[:0], mu=rows.mean(0), sigma=np.cov(rows, rowvar=False), mu_s=rows, sigma_s=rows)
    np.savez("small.npz", mu=rows.mean(0).astype("f4"), sigma=np.cov(rows, rowvar=False).astype("f4"))
    wanted = frechet(stats(a), rows)
    assert compared(capsys, "a", "features.npz")["frechet_distance"] == pytest.approx(wanted, rel=1e-6)
    for file in ("fid.npz", "small.npz"):
        result = compared(capsys, "a", file)
        assert result["frechet_distance"] == pytest.approx(wanted, rel=1e-4)
        assert "images" not in result  # nobody knows how many
        assert compared(capsys, file, "a")["frechet_distance"] == pytest.approx(wanted, rel=1e-4)
    assert features.read_reference("adm.npz").moments.mean == pytest.approx(rows.mean(0))
    assert compared(capsys, "a", "adm.npz")["frechet_distance"] == pytest.approx(wanted, rel=1e-6)
    assert compared(capsys, "fid.npz", "features.npz")["frechet_distance"] == pytest.approx(0, abs=1e-9)
    for metric in ("kid", "pr"):
        assert main(["compare", "a", "fid.npz", "--metrics", metric, "--features", "f.py:stats"]) == 2
        assert f"metric {metric}: needs the features of each" in capsys.readouterr().err
    np.savez("wide.npz", mu=np.zeros(7), sigma=np.eye(7))
    assert main(["compare", "a", "wide.npz", "--features", "f.py:stats"]) == 2
    assert "features of 6 numbers for the samples, and of 7 for the real images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "none"], "none: no such file or folder; want a folder, a .zip or an .npz of images"),
        (["a", "empty"], "empty: no images in it"),
        (["a", "f.py"], "f.py: not a zip file or an .npz; want a folder"),
        (["a", "empty.zip"], "empty.zip: no images in it"),
        (["a", "two.npz"], "two.npz: has images in x, y; want them in one array"),
        (["a", "deep.npz"], "deep.npz: x is uint16 [2, 4, 4, 3]; want 8-bit grey, RGB or RGBA images"),
        (["a", "text.npz"], "text.npz: x: not an array of numbers"),
        (["a", "bad"], "bad/0.png: not an image"),
        (["a", "skewed.npz"], "skewed.npz: sigma is not a covariance"),
        (["a", "a", "--metrics", "nll"], "--metrics 'nll': want fid, is, kid, pr"),
        (["a", "a", "--features", "x.npz"], "--features x.npz: want FILE.py:NAME"),
        (["a", "a", "--out", "r.txt"], "--out r.txt: want a name that ends in .json"),
        (["a", "one", "--features", "f.py:stats"], "1 images: want at least 3 for fid"),
        (["a", "a", "--features", "f.py:pixels"], "gives features of different lengths for"),
        (["a"], "B: missing; want real images: a folder"),
    ],
)
def test_mistakes(here, capsys, words, message):
    written("a", drawn(1, 6))
    written("one", drawn(1, 1))
    Path("empty").mkdir()
    Path("bad").mkdir()
    for i in range(3):
        Path(f"bad/{i}.png").write_text("text" * 100)
    zipfile.ZipFile("empty.zip", "w").close()
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez("two.npz", x=images, y=images)
    np.savez("deep.npz", x=images.astype(np.uint16))
    np.savez("text.npz", x=np.array(["a", "b"]))
    np.savez("skewed.npz", mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]]))
    more = [] if "--features" in words else ["--features", "f.py:stats"]
    assert main(["compare", *words, *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


def test_pictures_of_one_size_go_through_the_network_together():
    """As few calls as there are batches; rows, probabilities and moments are those of one picture at a time."""
    calls = []

    def describe(pixels):
        calls.append(len(pixels))
        rows = pixels.double().flatten(1).mean(1)
        return torch.stack([rows, rows**2], 1).numpy(), torch.stack([rows / 255, 1 - rows / 255], 1).numpy()

    network = features.Network("means", "", "", 4, describe)
    pictures = [torch.from_numpy(p).permute(2, 0, 1) for p in drawn(5, 30)]
    found = features.measure_each(network, iter(pictures), keep_features=True, keep_probabilities=True, progress=False)
    assert len(calls) < 20
    one = np.array([[float(p.double().mean()), float(p.double().mean()) ** 2] for p in pictures])
    np.testing.assert_allclose(found.features, one, rtol=1e-12)
    np.testing.assert_allclose(found.probabilities[:, 0], one[:, 0] / 255, rtol=1e-12)
    np.testing.assert_allclose(found.moments.covariance, np.cov(one, rowvar=False), rtol=1e-9)
    with pytest.raises(InputError, match="0 images"):
        features.measure_each(network, [], progress=False)


# -- ddpm evaluate --reference -----------------------------------------------------------------------------------------


def test_statistics_in_place_of_the_training_images(here, capsys):
    """Those of the training images give the same score as the images, and need no data; so do features."""
    train = data.load("digits", (8, 8), 1)
    rows = features.custom("f.py:stats")(train.batch(range(len(train))))[0]
    np.savez("stats.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False))
    np.savez("rows.npz", features=rows)
    words, few = (
        ["evaluate", "digits", "--features", "f.py:stats", "--json", "--out", "out"],
        ["-n", "30", "--steps", "3"],
    )
    results = {}
    for name, more in {
        "images": ["--metrics", "fid", "kid"],
        "rows": ["--metrics", "fid", "kid", "--reference", "rows.npz"],
        "stats": ["--metrics", "fid", "is", "--reference", "stats.npz"],
    }.items():
        assert main([*words, *few, *more]) == 0
        results[name] = json.loads(capsys.readouterr().out)
    for name in ("rows", "stats"):
        assert results[name]["frechet_distance"] == pytest.approx(results["images"]["frechet_distance"], rel=1e-6)
        assert results[name]["reference"] == f"{name}.npz"
        assert "data" not in results[name]
    assert results["rows"]["kid"] == pytest.approx(results["images"]["kid"], rel=1e-6)
    assert main([*words, "--metrics", "kid", "--reference", "stats.npz"]) == 2
    assert "metric kid: needs the features of each real image" in capsys.readouterr().err
    np.savez("samples.npz", features=rows[:100])
    assert main([*words, "--metrics", "fid", "--reference", "stats.npz", "--samples", "samples.npz"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["frechet_distance"] == pytest.approx(frechet(rows[:100], rows), rel=1e-6)


def test_features_of_the_real_images_may_be_statistics(here, capsys):
    """`--features FILE.npz` takes mu and sigma, too."""
    real, fake = np.random.default_rng(0).normal(size=(2, 200, 4))
    np.savez("stats.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    np.savez("fake.npz", features=fake)
    words = ["evaluate", "digits", "--metrics", "fid", "--features", "stats.npz", "--samples", "fake.npz", "--json"]
    assert main([*words, "--out", "out"]) == 0
    assert json.loads(capsys.readouterr().out)["frechet_distance"] == pytest.approx(frechet(fake, real), rel=1e-6)


def test_statistics_of_another_network_are_refused(here, capsys):
    """If the file says of which it is, as files of this package do."""
    train = data.load("digits", (8, 8), 1)
    network = features.custom("f.py:stats")
    about = features.provenance(train, network)
    moments = features.measure(network, train, progress=False).moments
    features.save_statistics("own.npz", moments, about)
    words = [
        "evaluate",
        "digits",
        "--metrics",
        "fid",
        "--reference",
        "own.npz",
        "-n",
        "5",
        "--steps",
        "2",
        "--out",
        "out",
    ]
    assert main([*words, "--features", "f.py:stats", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1500
    assert main([*words, "--features", "f.py:pixels"]) == 2
    assert "own.npz: network is f.py:stats, but that of the samples is f.py:pixels" in capsys.readouterr().err
    for more, message in (
        (["--features", "own.npz"], "--reference own.npz: not with --features FILE.npz"),
        (["--metrics", "nll"], "--reference own.npz: needs one of --metrics fid"),
        (["--features", "f.py:stats", "--reference", "none.npz"], "none.npz: no such file"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
