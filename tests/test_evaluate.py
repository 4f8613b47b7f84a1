"""Bits per dimension of a dataset, the estimate from few levels, other variances, and sample quality."""

import csv
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import gaussian, likelihood, metrics, pixels, schedule
from ddpm.cli import main
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import data, features, models, opening
from ddpm.files.opening import open_checkpoint
from ddpm.noise import per_image
from ddpm.presets import PRESETS
from ddpm.run import calibrate, evaluate, parts, quality, sample
from ddpm.run.processes import Processes
from ddpm.run.saved import read_samples

ALONE = Processes(0, 1, torch.device("cpu"))
SHAPE = (1, 4, 4)
SCHEDULE = schedule.linear(12, 1e-3, 0.6)


def wrong_network(x, timestep, y):
    """A function of x and t that is a bad denoiser."""
    return torch.tanh(x * (1 + timestep.view(-1, 1, 1, 1) / 7)) * 0.9


def pixels_of(n, key=0):
    g = torch.Generator().manual_seed(key)
    return torch.randint(0, 256, (n, *SHAPE), generator=g).double() / 127.5 - 1


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [True, False])
def test_other_variances_follow_from_mse(predict, clip):
    """`vlb_with_variance` equals the bound that `vlb` computes with that variance, term by term."""
    first = Denoiser(wrong_network, SCHEDULE, predict, "fixed_large", clip)
    x0, noise = pixels_of(3), per_image(range(3), SHAPE)
    bound = likelihood.vlb(first, x0, noise)
    table = gaussian.calibrated_variance(SCHEDULE, bound.mse.mean(0))
    for variance in ("fixed_small", "fixed_large", table):
        other = replace(first, variance=variance)
        result, whole = likelihood.vlb_with_variance(bound, other, x0, noise), likelihood.vlb(other, x0, noise)
        assert torch.allclose(result.kl, whole.kl, rtol=1e-9)
        assert torch.allclose(result.decoder, whole.decoder, rtol=1e-9)


def test_other_variances_are_refused_for_mu():
    x0, noise = pixels_of(1), per_image([0], SHAPE)
    mu = Denoiser(wrong_network, SCHEDULE, "mu")
    with pytest.raises(ValueError, match="mse"):
        likelihood.vlb_with_variance(likelihood.vlb(mu, x0, noise), mu, x0, noise)


def test_the_calibrated_variance_is_the_best_scalar():
    """Any factor on sigma_t^2 at t > 1 raises the mean of that level's term over the images it was calibrated on."""
    denoiser = Denoiser(wrong_network, SCHEDULE, "x0")
    x0, noise = pixels_of(16), per_image(range(16), SHAPE)
    bound = likelihood.vlb(denoiser, x0, noise)
    table = gaussian.calibrated_variance(SCHEDULE, bound.mse.mean(0))

    def terms(factor):
        scaled = replace(denoiser, variance=table * factor)
        return likelihood.vlb_with_variance(bound, scaled, x0, noise).kl.mean(0)

    best = terms(1.0)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (terms(factor) > best).all()


def test_sampled_terms_equal_the_terms_of_the_bound():
    """At the same levels and with the same noise they equal the terms of `vlb`."""
    denoiser = Denoiser(wrong_network, SCHEDULE, "x0")
    x0, noise = pixels_of(2), per_image(range(2), SHAPE)
    bound = likelihood.vlb(denoiser, x0, noise)
    t = torch.tensor([[1, 5], [12, 2]])
    draws = torch.stack([torch.stack([noise(int(level))[b] for level in t[b]]) for b in range(2)])
    result = likelihood.sampled_terms(denoiser, x0, t, draws)
    every = torch.cat([bound.decoder[:, None], bound.kl], dim=1)
    assert torch.allclose(result, every.gather(1, t - 1), rtol=1e-9)


@pytest.fixture(scope="module")
def checkpoint(trained):
    return open_checkpoint(trained)


@pytest.fixture(scope="module")
def held_out():
    return data.load("digits", (8, 8), 1, split="test")


def nll(checkpoint, images, out, **settings):
    return evaluate.nll(checkpoint, images, out, out, ALONE, progress=False, **{"count": 12, **settings})


@pytest.mark.usefixtures("undrawn")
def test_the_bound_does_not_depend_on_batches_and_is_not_computed_twice(checkpoint, held_out, tmp_path, monkeypatch):
    """The same value for any batch size; a second call computes nothing."""
    one = nll(checkpoint, held_out, tmp_path / "a", batch_size=5)
    other = nll(checkpoint, held_out, tmp_path / "b", batch_size=12)
    assert one["bits_per_dim"] == pytest.approx(other["bits_per_dim"], rel=1e-5)
    assert one["by_variance"]["fixed_large"] == pytest.approx(one["bits_per_dim"], rel=1e-9)  # the run's own
    assert one["rate"] + one["distortion"] == pytest.approx(one["bits_per_dim"], rel=1e-9)

    calls = []
    monkeypatch.setattr(likelihood, "vlb", lambda *_: calls.append(1))
    assert nll(checkpoint, held_out, tmp_path / "a", batch_size=5) == one
    assert not calls


@pytest.mark.usefixtures("undrawn")
def test_cached_parts_of_another_model_or_precision_are_not_used(trained, held_out, tmp_path):
    """Other weights in a file of the same name, or another precision, are evaluated anew."""
    weights = tmp_path / "model.safetensors"

    def value(kind, precision):
        weights.write_bytes(open_checkpoint(trained, kind).path.read_bytes())
        model = open_checkpoint(weights, precision=precision)
        return nll(model, held_out, tmp_path / "out", count=2)["bits_per_dim"]

    assert len({value("ema", "float32"), value("raw", "float32"), value("ema", "bf16")}) == 3


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_evaluation_resumes(checkpoint, held_out, tmp_path, monkeypatch):
    """After a stop at two of three batches, only the third is computed, and the result is the same."""
    whole = nll(checkpoint, held_out, tmp_path / "whole", batch_size=4)
    real, calls = likelihood.vlb, []

    def stops(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(likelihood, "vlb", stops)
    with pytest.raises(KeyboardInterrupt):
        nll(checkpoint, held_out, tmp_path / "run", batch_size=4)
    assert nll(checkpoint, held_out, tmp_path / "run", batch_size=4) == whole
    assert len(calls) == 4


def test_the_table_adds_up(checkpoint, held_out, tmp_path):
    """It has one row per level from T to 1. The terms add up to the bound, and the rate is their running sum."""
    result = nll(checkpoint, held_out, tmp_path)
    with (tmp_path / "nll.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["t"]) for row in rows] == list(range(20, 0, -1))
    terms = sum(float(row["term_bits_per_dim"]) for row in rows)
    assert terms + result["prior"] == pytest.approx(result["bits_per_dim"], rel=1e-6)
    assert float(rows[0]["rate_bits_per_dim"]) == pytest.approx(result["prior"], rel=1e-6)
    assert float(rows[-1]["rate_bits_per_dim"]) == pytest.approx(result["rate"], rel=1e-6)
    with Image.open(tmp_path / "nll.png") as plot:
        assert plot.width > 400


def test_the_estimate_from_few_levels_is_unbiased_with_a_correct_standard_error(checkpoint):
    """Over 25 sets of 16 images it has no bias against the whole bound, and its standard error is the spread.

    A function takes the place of the network, since the claim holds for any denoiser.
    """
    checkpoint = replace(checkpoint, denoiser=replace(checkpoint.denoiser, network=wrong_network))
    train = data.load("digits", (8, 8), 1)
    differences, values, errors = [], [], []
    for s in range(25):
        images = replace(train, rows=train.rows[16 * s : 16 * s + 16])
        result = evaluate.nll_sampled(checkpoint, images, 4, ALONE, seed=s, progress=False)
        x0 = pixels.to_signal(images.batch(range(16)))
        noise = per_image([1000 + 16 * s + i for i in range(16)], (1, 8, 8))
        exact = likelihood.vlb(checkpoint.denoiser, x0, noise).bits_per_dim().mean()
        differences.append(result["bits_per_dim"] - float(exact))
        values.append(result["bits_per_dim"])
        errors.append(result["standard_error"])
    z = np.mean(differences) / (np.std(differences, ddof=1) / 5)
    assert abs(z) < 4
    assert 0.6 < np.std(values, ddof=1) / np.sqrt(np.mean(np.square(errors))) < 1.5  # 99.9% of 25 draws


@pytest.fixture
def own(trained, tmp_path):
    """A copy of the run that may be calibrated."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.usefixtures("undrawn")
def test_calibration_lowers_the_bound(own, tmp_path):
    """It does so on its own images, although the draws differ. The calibration is stored, and `load` uses it."""
    checkpoint = open_checkpoint(own)
    train = data.load("digits", (8, 8), 1)
    assert "calibrated" not in nll(checkpoint, train, tmp_path / "before", count=2)["by_variance"]
    mse = calibrate.calibrate(checkpoint, train, tmp_path, ALONE, 32, progress=False, codec=0)
    assert mse.shape == (20,)
    denoiser = replace(checkpoint.denoiser, network=lambda *_: pytest.fail("measured again"))
    unused = replace(checkpoint, denoiser=denoiser)
    assert torch.equal(calibrate.calibrate(unused, train, tmp_path, ALONE, 32, progress=False, codec=0), mse)
    by_variance = nll(checkpoint, train, tmp_path / "after", count=32)["by_variance"]
    assert by_variance["calibrated"] < min(by_variance["fixed_large"], by_variance["fixed_small"])
    table = opening.load(own, variance="calibrated").variance
    assert torch.equal(table[2:], gaussian.calibrated_variance(checkpoint.denoiser.schedule, mse)[2:])
    assert opening.load(own, variance="fixed_small").variance == "fixed_small"


def test_a_calibration_belongs_to_its_weights(own):
    checkpoint = open_checkpoint(own)
    with pytest.raises(InputError, match="not calibrated; run `ddpm calibrate`"):
        opening.load(own, variance="calibrated")
    file = models.save_calibration(checkpoint, torch.ones(20), 0.5, {})
    mse, first = models.read_calibration(checkpoint)
    assert torch.equal(mse, torch.ones(20).double())
    assert first == 0.5
    for text, reason in [
        (file.read_text().replace(checkpoint.identity, "0" * 64), "of other weights"),
        (file.read_text()[:-40], "damaged"),
        (file.read_text().replace("1.0,", "-1.0,", 1), "20 positive numbers"),
        (file.read_text().replace("1.0,", "", 1), "20 positive numbers"),
        (file.read_text().replace("0.5", "NaN", 1), "20 positive numbers"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=reason):
            opening.load(own, variance="calibrated")
        models.save_calibration(checkpoint, torch.ones(20), 0.5, {})
    with pytest.raises(InputError, match="variance 'huge': want fixed_large, fixed_small, calibrated"):
        opening.load(own, variance="huge")


def test_the_first_variance_is_the_best_for_bins(own, tmp_path):
    """With errors of half a grey level, mse_1 costs 0.02 bits/dim too much. The stored variance is the best one."""
    x0 = pixels.to_signal(
        torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )
    mean = x0 + 0.5 * pixels.BIN * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    variances = torch.logspace(-7, 0, 141).double()
    cost = likelihood.decoder_cost(x0, mean, variances) / (8 * 64 * np.log(2))
    mse = (mean - x0).square().mean().double()
    assert likelihood.decoder_cost(x0, mean, mse[None]).item() / (8 * 64 * np.log(2)) > cost.min() + 0.01
    assert variances[cost.argmin()] < mse

    checkpoint = open_checkpoint(own)
    calibrate.calibrate(checkpoint, data.load("digits", (8, 8), 1), tmp_path, ALONE, 16, progress=False, codec=0)
    table = opening.load(own, variance="calibrated").variance
    train = data.load("digits", (8, 8), 1)
    rows = parts.subset(train, 16)
    signal, draws = parts.as_signal(train, rows), parts.image_noise(0, rows, 0, parts.CALIBRATION, (1, 8, 8))
    for factor in (0.8, 1.25):
        other = table.clone()
        other[1] *= factor
        best, worse = (
            likelihood.vlb(replace(checkpoint.denoiser, variance=v), signal, draws).decoder.sum()
            for v in (table, other)
        )
        assert best < worse


def test_calibration_needs_the_error_of_x0(own, tmp_path):
    checkpoint = open_checkpoint(own)
    for change, reason in [
        ({"predict": "mu"}, "predicts mu"),
        ({"variance": "learned_range"}, "gives its own variance"),
    ]:
        other = replace(checkpoint, denoiser=replace(checkpoint.denoiser, **change))
        with pytest.raises(InputError, match=reason):
            calibrate.calibrate(other, data.load("digits", (8, 8), 1), tmp_path, ALONE, 1, progress=False)


@pytest.mark.parametrize("stream", [False, True])
def test_bits_per_dimension_of_deep_images_are_refused(checkpoint, tmp_path, stream):
    """Rounded to 8 bits they would be other images, whether they are in memory or streamed."""
    for i in range(3):
        deep = Image.fromarray((np.arange(64).reshape(8, 8) * 1000 + i).astype(np.uint16))
        deep.save(tmp_path / f"{i}.png")
    images = data.load(str(tmp_path), (8, 8), 1, cache_bytes=0 if stream else 1 << 30)
    for measure in (nll, partial(evaluate.ode, ranks=ALONE)):
        with pytest.raises(InputError, match=r"0.png: more than 8 bits a channel.*256 grey levels.*want 8-bit images"):
            measure(checkpoint, images, out=tmp_path / "out") if measure is nll else measure(checkpoint, images)
    assert not (tmp_path / "out").exists()


def test_the_likelihood_of_the_flow_does_not_depend_on_the_batch(checkpoint, held_out):
    """More levels change it little."""
    one = evaluate.ode(checkpoint, held_out, ALONE, 6, steps=10, batch_size=2, progress=False)
    other = evaluate.ode(checkpoint, held_out, ALONE, 6, steps=10, batch_size=6, progress=False)
    assert one["bits_per_dim"] == pytest.approx(other["bits_per_dim"], rel=1e-5)
    fine = evaluate.ode(checkpoint, held_out, ALONE, 6, steps=None, progress=False)
    assert one["bits_per_dim"] == pytest.approx(fine["bits_per_dim"], rel=0.02)
    assert one["count"] == 6
    assert one["standard_error"] > 0


def test_samples_are_cached(checkpoint, tmp_path, monkeypatch):
    """They are the images of their seeds. A second call makes only missing ones. Other settings make other images."""

    def samples(seed=3):
        return quality.samples(checkpoint, tmp_path, ALONE, 7, seed, "ddim", 5, 3, progress=False).batch(range(7))

    whole = samples()
    assert torch.equal(whole, sample.generate(checkpoint.denoiser, (1, 8, 8), range(3, 10), "ddim", 5))
    next(tmp_path.glob("samples-*/00000003-*")).unlink()
    calls = []
    monkeypatch.setattr(quality, "generate", lambda *a, **k: (calls.append(a[2]), sample.generate(*a, **k))[1])
    assert torch.equal(samples(), whole)
    assert calls == [range(6, 9)]
    assert not torch.equal(samples(4), whole)


def test_a_network_that_reads_other_weights_measures_the_real_images_again(tmp_path):
    """The function is the same text, so its hash is the same. The stored statistics are not used."""
    scale, calls = [1.0], []
    real, fake = (data.load("digits", (8, 8), 1, split=split) for split in ("train", "test"))

    def function(pixels):
        calls.append(len(pixels))
        return scale[0] * pixels.flatten(1).numpy().astype(float), None

    def distance():
        calls.clear()
        network = features.Network("mine.py:f", "the same hash", "", 64, function)
        return quality.quality(["fid"], fake, real, network, tmp_path, ALONE, progress=False)["frechet_distance"]

    first = distance()
    assert distance() == first
    assert sum(calls) == len(fake) + 2  # the real images are not measured again
    scale[0] = 2.0
    assert distance() == pytest.approx(4 * first)


def test_samples_of_classes_are_cached_apart(tmp_path):
    """Classes cycle over all samples, not over a batch. Another guidance, clip or class gives other samples."""
    checkpoint = open_checkpoint("digits")
    plain, guided = checkpoint.denoiser, checkpoint.denoiser.guided(2.0)

    def samples(denoiser, classes=()):
        changed = replace(checkpoint, denoiser=denoiser)
        made = quality.samples(changed, tmp_path, ALONE, 5, 3, "ddim", 3, 2, progress=False, classes=classes)
        return made.batch(range(5))

    whole = samples(guided, [4, 0])
    y = torch.tensor([4, 0, 4, 0, 4])
    assert torch.equal(whole, sample.generate(guided, (1, 8, 8), range(3, 8), "ddim", 3, y=y))
    within = checkpoint.denoiser.guided(2.0, (1, 500))
    settings = [
        (guided, [4, 0]),
        (guided, [0, 4]),
        (within, [4, 0]),
        (plain, [4, 0]),
        (plain, []),
        (replace(plain, clip=False), []),
    ]
    seen = [samples(*one).numpy().tobytes() for one in settings]
    assert len(set(seen)) == len(settings)
    assert len(list(tmp_path.glob("samples-*"))) == len(settings)


def test_features_from_files(tmp_path, capsys, trained):
    """Two files of features are scored like the arrays in them."""
    random = np.random.default_rng(0)
    real, fake = random.normal(size=(200, 4)), random.normal(1, 1, size=(150, 4))
    np.savez(tmp_path / "real.npz", features=real)
    np.savez(tmp_path / "fake.npz", features=fake, probabilities=np.full((150, 10), 0.1))
    words = ["evaluate", str(trained), "--metrics", "fid", "is", "kid", "pr", "--features", str(tmp_path / "real.npz")]
    assert main([*words, "--samples", str(tmp_path / "fake.npz"), "--out", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    expected = metrics.frechet_distance(metrics.moments(real), metrics.moments(fake))
    assert result["frechet_distance"] == pytest.approx(expected)
    assert result["inception_score"] == pytest.approx(1)
    assert (result["samples"], result["images"]) == (150, 200)
    np.savez(tmp_path / "narrow.npz", features=fake[:, :3])
    assert main([*words, "--samples", str(tmp_path / "narrow.npz")]) == 2
    assert "features of 3 numbers" in capsys.readouterr().err
    assert main(words) == 2
    assert "--samples FILE.npz" in capsys.readouterr().err


FUNCTION = "def rows(images):\n    return images.reshape(len(images), -1)[:, ::8].astype(float)\n"


@pytest.mark.usefixtures("undrawn")
def test_the_command(trained, tmp_path, capsys, monkeypatch):
    """`ddpm evaluate --json` prints one object with values and their provenance; a second call prints the same."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTION)
    words = [
        "evaluate",
        str(trained),
        "--metrics",
        "nll",
        "ode",
        "fid",
        "kid",
        "pr",
        "-n",
        "12",
        "--features",
        "mine.py:rows",
        "--ode-steps",
        "5",
    ]
    words += ["--out", str(tmp_path / "out"), "--json", "--sampler", "ddim", "--steps", "5"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["nll"]["count"] == 12
    assert first["bits_per_dim"] == first["nll"]["bits_per_dim"]
    assert first["samples"] == 12
    assert first["images"] == 1500
    assert {"frechet_distance", "kid", "precision", "recall", "weights", "step", "data", "split"} <= first.keys()
    assert "fid" not in first  # the features are not those of Inception
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_real_images_are_at_distance_zero(tmp_path):
    """The training images are at distance 0 from themselves, but not after noise is added."""
    (tmp_path / "mine.py").write_text(FUNCTION)
    network = features.custom(f"{tmp_path}/mine.py:rows")
    train = data.load("digits", (8, 8), 1)
    same = train.batch(range(len(train)))
    result = quality.quality(["fid", "pr"], train, train, network, tmp_path, ALONE, progress=False)
    assert result["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert result["precision"] == result["recall"] == 1
    noisy = (same.int() + torch.randint(0, 80, same.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    fake = Rows(noisy.to(torch.uint8))
    worse = quality.quality(["fid"], fake, train, network, tmp_path, ALONE, progress=False)
    assert worse["frechet_distance"] > 100


class Rows:
    """Images in memory."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def batch(self, indices):
        return self.pixels[list(indices)]


def shaped(channels, *size):
    return replace(PRESETS["digits"], channels=channels, size=size, channel_multipliers=(1,))


def test_saved_samples_are_read_as_they_are(tmp_path):
    from ddpm.files import images

    pictures = torch.randint(0, 256, (3, 8, 8, 1), dtype=torch.uint8).numpy()
    images.save_many(tmp_path / "a.npz", pictures, ["0", "1", "2"])
    images.save_many(tmp_path / "b", pictures, ["0", "1", "2"])
    for path in (tmp_path / "a.npz", tmp_path / "b"):
        found = read_samples(path, shaped(1, 8, 8)).batch(range(3))
        assert (found.permute(0, 2, 3, 1).numpy() == pictures).all()
    with pytest.raises(InputError, match="want uint8"):
        read_samples(tmp_path / "a.npz", shaped(3, 8, 8))


def test_a_folder_of_samples_is_that_folder_whatever_its_name(tmp_path, monkeypatch):
    """A folder `digits` is not the dataset. Images of another size are refused, and so is an empty folder."""
    from ddpm.files import images

    monkeypatch.chdir(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 1), np.uint8)
    images.save_many("digits/", pictures, ["0", "1", "2"])
    found = read_samples(Path("digits"), shaped(1, 4, 8)).batch(range(3))
    assert (found.permute(0, 2, 3, 1).numpy() == pictures).all()
    with pytest.raises(InputError, match=r"^digits/0\.png: 4x8; want samples of the model's size, 8x4$"):
        read_samples(Path("digits"), shaped(1, 8, 4))
    with pytest.raises(InputError, match=r"^digits/0\.png: mode L; want RGB, as samples of the model have$"):
        read_samples(Path("digits"), shaped(3, 4, 8))
    Path("empty").mkdir()
    with pytest.raises(InputError, match="empty: no images in this folder; want samples of 4x8"):
        read_samples(Path("empty"), shaped(1, 4, 8))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--metrics", "bits"], "bits"),
        (["-n", "0"], "-n"),
        (["--levels-per-image", "21"], "--levels-per-image 21"),
        (["--split", "nothing"], "nothing"),
        (["--draws", "2", "--levels-per-image", "2"], "--draws 2: needs --metrics nll, without --levels-per-image"),
        (["--draws", "2", "--metrics", "ode"], "--draws 2: needs --metrics nll"),
        (["--ode-steps", "5"], "--ode-steps 5: needs --metrics ode"),
        (["--samples", "a.npz"], "--samples a.npz: needs one of --metrics fid"),
        (
            ["--metrics", "fid", "--samples", "a.npz", "-n", "5"],
            "-n 5: not with --samples a.npz",
        ),
        (["--metrics", "fid", "--samples", "a.npz", "--steps", "5"], "--steps 5: no samples are made"),
        (["--sampler", "ddim"], "--sampler ddim: no samples are made; want metrics of samples, without --samples"),
        (["--metrics", "fid", "--any-weights"], "--any-weights: needs --inception FILE"),
        (
            ["--metrics", "fid", "--features", "f.py:g", "--inception", "w.pth"],
            "--inception w.pth: not with",
        ),
        (["--metrics", "fid", "--features", "mine.py"], "FILE.py:function"),
        (["--metrics", "fid", "--inception", "none.pth"], "none.pth"),
        (["--metrics", "fid", "--samples", "none.npz", "--features", "f.py:g"], "f.py"),
        (["--metrics", "is", "--features", "logits.py:rows", "-n", "4"], "logits.py:rows: rows are not probabilities"),
    ],
)
def test_mistakes(trained, tmp_path, capsys, monkeypatch, words, names):
    """A mistake is one line that names it, with exit code 2."""
    monkeypatch.chdir(tmp_path)
    Path("logits.py").write_text("def rows(x):\n    x = x.reshape(len(x), -1) + 1.0\n    return x, x\n")
    assert main(["evaluate", str(trained), "--out", "out", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not Path("out").exists()
    assert names in error


def test_images_that_were_written_again_are_measured_again(trained, tmp_path, capsys):
    """With the same names and sizes of files."""
    mine = tmp_path / "mine.py"
    mine.write_text("def rows(x):\n    return x.reshape(len(x), -1)[:, :4].astype(float)\n")
    words = ["evaluate", str(trained), "--data", str(tmp_path / "images"), "--split", "train", "-n", "3", "--json"]
    words += ["--metrics", "nll", "fid", "--features", f"{mine}:rows", "--sampler", "ddim", "--steps", "2", "--out"]
    (tmp_path / "images").mkdir()
    found = []
    for seed in (0, 1):
        for i in range(8):
            pixels = np.random.default_rng([seed, i]).integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.bmp")
        for out in ("kept", f"new{seed}"):
            assert main([*words, str(tmp_path / out)]) == 0
            about = json.loads(capsys.readouterr().out)
            found.append((about["nll"]["bits_per_dim"], about["frechet_distance"]))
    assert found[0] == found[1] != found[2] == found[3]


@pytest.mark.usefixtures("undrawn")
def test_the_bound_reduced_part_by_part_is_that_of_the_whole_table(checkpoint, held_out, tmp_path):
    """The sums of parts against the table [n, T] in memory."""
    result = nll(checkpoint, held_out, tmp_path, batch_size=5)
    files = sorted(next(tmp_path.glob("nll-*")).glob("*.safetensors"))
    table = parts.read_parts(files)
    assert table["terms"].shape == (12, 20)
    per_image = table["prior"] + table["terms"].sum(1)
    expected = {
        "bits_per_dim": per_image.mean(),
        "standard_error": per_image.std() / 12**0.5,
        "prior": table["prior"].mean(),
        "rate": (per_image - table["terms"][:, 0]).mean(),
        "distortion": table["terms"][:, 0].mean(),
    }
    for name, value in expected.items():
        assert result[name] == pytest.approx(float(value), rel=1e-12)
    sums = parts.sum_parts(files, ["terms", "mse"])
    assert torch.allclose(sums["terms"] / 12, table["terms"].mean(0), rtol=1e-13)
    assert torch.allclose(sums["mse"] / 12, table["mse"].mean(0), rtol=1e-13)
