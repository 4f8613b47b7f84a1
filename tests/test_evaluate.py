"""Bits per dimension of a data set, its estimate from few levels, other variances, and sample quality."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm import likelihood, schedule
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files import datasets
from ddpm.files.checkpoints import open_checkpoint
from ddpm.noise import per_image
from ddpm.run import evaluate
from ddpm.run.cli import main
from ddpm.run.distributed import Processes

ALONE = Processes(0, 1, torch.device("cpu"))
SHAPE = (1, 4, 4)
SCHEDULE = schedule.linear(12, 1e-3, 0.6)


def wrong_network(x, timestep, y):
    """Some function of x and t that is no good denoiser."""
    return torch.tanh(x * (1 + timestep.view(-1, 1, 1, 1) / 7)) * 0.9


def pixels_of(n, key=0):
    g = torch.Generator().manual_seed(key)
    return torch.randint(0, 256, (n, *SHAPE), generator=g).double() / 127.5 - 1


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [True, False])
def test_other_variances_follow_from_mse(predict, clip):
    """with_variance is the bound that vlb computes with that variance, term by term."""
    first = Denoiser(wrong_network, SCHEDULE, predict, "fixed_large", clip)
    x0, noise = pixels_of(3), per_image(range(3), SHAPE)
    bound = likelihood.vlb(first, x0, noise)
    table = likelihood.calibrated_variance(SCHEDULE, bound.mse.mean(0))
    for variance in ("fixed_small", "fixed_large", table):
        other = replace(first, variance=variance)
        found, whole = likelihood.with_variance(bound, other, x0, noise), likelihood.vlb(other, x0, noise)
        assert torch.allclose(found.kl, whole.kl, rtol=1e-9)
        assert torch.allclose(found.decoder, whole.decoder, rtol=1e-9)


def test_other_variances_are_refused_where_they_do_not_follow():
    x0, noise = pixels_of(1), per_image([0], SHAPE)
    mu = Denoiser(wrong_network, SCHEDULE, "mu")
    with pytest.raises(ValueError, match="mse"):
        likelihood.with_variance(likelihood.vlb(mu, x0, noise), mu, x0, noise)


def test_the_calibrated_variance_is_the_best_scalar():
    """Any factor on sigma_t^2 at t > 1 raises the mean of that level's term over the images it was calibrated on."""
    denoiser = Denoiser(wrong_network, SCHEDULE, "x0")
    x0, noise = pixels_of(16), per_image(range(16), SHAPE)
    bound = likelihood.vlb(denoiser, x0, noise)
    table = likelihood.calibrated_variance(SCHEDULE, bound.mse.mean(0))

    def terms(factor):
        scaled = replace(denoiser, variance=table * factor)
        return likelihood.with_variance(bound, scaled, x0, noise).kl.mean(0)

    best = terms(1.0)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (terms(factor) > best).all()


def test_sampled_terms_are_the_terms():
    """At the same level and noise, one at a time or all levels at once."""
    denoiser = Denoiser(wrong_network, SCHEDULE, "x0")
    x0, noise = pixels_of(2), per_image(range(2), SHAPE)
    bound = likelihood.vlb(denoiser, x0, noise)
    t = torch.tensor([[1, 5], [12, 2]])
    draws = torch.stack([torch.stack([noise(int(level))[b] for level in t[b]]) for b in range(2)])
    found = likelihood.sampled_terms(denoiser, x0, t, draws)
    every = torch.cat([bound.decoder[:, None], bound.kl], dim=1)
    assert torch.allclose(found, every.gather(1, t - 1), rtol=1e-9)


@pytest.fixture(scope="module")
def checkpoint(trained):
    return open_checkpoint(trained)


@pytest.fixture(scope="module")
def held_out():
    return datasets.load("digits", (8, 8), 1, split="test")


def nll(checkpoint, images, out, **settings):
    return evaluate.nll(checkpoint, images, out, ALONE, progress=False, **{"count": 12, **settings})


def test_batches_change_nothing_and_the_parts_are_kept(checkpoint, held_out, tmp_path, monkeypatch):
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


def test_parts_of_another_model_or_precision_are_not_taken(trained, held_out, tmp_path):
    """A file of the same name with other weights, or the same in bf16, is evaluated anew."""
    weights = tmp_path / "model.safetensors"

    def value(kind, precision):
        weights.write_bytes(open_checkpoint(trained, kind).path.read_bytes())
        model = open_checkpoint(weights, precision=precision)
        return nll(model, held_out, tmp_path / "out")["bits_per_dim"]

    assert len({value("ema", "float32"), value("raw", "float32"), value("ema", "bf16")}) == 3


def test_a_stopped_evaluation_goes_on(checkpoint, held_out, tmp_path, monkeypatch):
    """Stopped after two of three batches, the rest is done and no more, with the same result."""
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
    """A row a level from T to 1; the terms sum to the bound, and the running sum says so."""
    found = nll(checkpoint, held_out, tmp_path)
    with (tmp_path / "nll.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["t"]) for row in rows] == list(range(20, 0, -1))
    terms = sum(float(row["term_bits_per_dim"]) for row in rows)
    assert terms + found["prior"] == pytest.approx(found["bits_per_dim"], rel=1e-6)
    assert float(rows[-1]["sum_from_T_bits_per_dim"]) == pytest.approx(found["bits_per_dim"], rel=1e-6)


def test_the_estimate_from_few_levels_is_unbiased_and_its_error_honest(checkpoint, held_out, tmp_path):
    """Over seeds, estimates scatter about the mean of all-level bounds, by as much as noise and levels say they do."""
    small = replace(held_out, rows=held_out.rows[:16], pixels=held_out.pixels)
    seeds = range(25)
    exact = [nll(checkpoint, small, tmp_path / str(s), seed=1000 + s, count=16)["bits_per_dim"] for s in range(6)]
    found = [evaluate.nll_sampled(checkpoint, small, 4, ALONE, seed=s, progress=False, batch_size=64) for s in seeds]
    values = torch.tensor([f["bits_per_dim"] for f in found])
    error = (values.std() ** 2 / len(values) + torch.tensor(exact).std() ** 2 / len(exact)) ** 0.5
    assert abs(values.mean() - torch.tensor(exact).mean()) < 4 * error
    # The stated error also holds the spread over images, which are the same for every seed: never too small.
    stated = torch.tensor([f["standard_error"] for f in found]).mean()
    assert values.std() < 1.3 * stated


def test_calibration_lowers_the_bound(checkpoint, tmp_path):
    """On the images that it was measured on, up to the noise of other draws."""
    train = datasets.load("digits", (8, 8), 1)
    mse = evaluate.calibrate(checkpoint.denoiser, train, 64, ALONE, progress=False)
    assert mse.shape == (20,)
    found = nll(checkpoint, train, tmp_path, mse=mse, count=64)["by_variance"]
    assert found["calibrated"] < min(found["fixed_large"], found["fixed_small"])


FUNCTION = "def rows(images):\n    return images.reshape(len(images), -1)[:, ::8].astype(float)\n"


def test_the_command(trained, tmp_path, capsys, monkeypatch):
    """`ddpm evaluate --json` is one object with the values and what they were made from; a second call is the same."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FUNCTION)
    words = ["evaluate", str(trained), "--metrics", "nll", "fid", "kid", "pr", "-n", "40", "--features", "mine.py:rows"]
    words += ["--calibrate", "8", "--out", str(tmp_path / "out"), "--json", "--sampler", "ddim", "--steps", "5"]
    assert main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["nll"]["count"] == 40
    assert first["bits_per_dim"] == first["nll"]["bits_per_dim"]
    assert first["samples"] == 40
    assert first["images"] == 1500
    assert {"frechet_distance", "kid", "precision", "recall", "weights", "step", "data", "split"} <= first.keys()
    assert "fid" not in first  # it is not Inception's
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_real_images_are_at_distance_zero(tmp_path):
    """The training images against themselves; the same with noise are not."""
    (tmp_path / "mine.py").write_text(FUNCTION)
    network = evaluate.features.custom(f"{tmp_path}/mine.py:rows")
    train = datasets.load("digits", (8, 8), 1)
    same = train.batch(range(len(train)))
    found = evaluate.quality(["fid", "pr"], same, train, network, tmp_path, progress=False)
    assert found["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == 1
    noisy = (same.int() + torch.randint(0, 80, same.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255)
    worse = evaluate.quality(["fid"], noisy.to(torch.uint8), train, network, tmp_path, progress=False)
    assert worse["frechet_distance"] > 100


def test_saved_samples_are_read_as_they_are(tmp_path):
    from ddpm.files import images

    pictures = torch.randint(0, 256, (3, 8, 8, 1), dtype=torch.uint8).numpy()
    images.save_many(tmp_path / "a.npz", pictures, ["0", "1", "2"])
    images.save_many(tmp_path / "b", pictures, ["0", "1", "2"])
    for path in (tmp_path / "a.npz", tmp_path / "b"):
        assert (evaluate.read_samples(path, (1, 8, 8)).permute(0, 2, 3, 1).numpy() == pictures).all()
    with pytest.raises(InputError, match="want uint8"):
        evaluate.read_samples(tmp_path / "a.npz", (3, 8, 8))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--metrics", "bits"], "bits"),
        (["-n", "0"], "-n"),
        (["--levels", "21"], "levels 21"),
        (["--split", "nothing"], "nothing"),
        (["--metrics", "fid", "--features", "mine.py"], "FILE.py:function"),
        (["--metrics", "fid", "--inception", "none.pth"], "none.pth"),
        (["--metrics", "fid", "--samples", "none.npz", "--features", "f.py:g"], "f.py"),
    ],
)
def test_mistakes(trained, tmp_path, capsys, monkeypatch, words, names):
    """One line that names it, exit code 2."""
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(trained), "--out", "out", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not Path("out").exists()
    assert names in error
