"""Autoguidance: a weaker model in the place of the label that is left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact import (
    PREDICTIONS,
    GaussianData,
    correlated,
    last,
    network,
    normal,
    one_thread,  # noqa: F401
)

from ddpm import samplers, schedule
from ddpm.cli import main
from ddpm.denoiser import Denoiser
from ddpm.errors import InputError
from ddpm.files.opening import open_checkpoint
from ddpm.run import processes
from ddpm.run.export import figures
from ddpm.run.parts import guidance_key
from ddpm.run.processes import open_for_device
from ddpm.run.sample import Conditions

S = schedule.linear(50, 2e-3, 0.4)
DATA = correlated()
WIDER = GaussianData(DATA.mean + 0.2, 2 * DATA.covariance)


def of(data: GaussianData, predict: Any = "v") -> Denoiser:
    return Denoiser(network(data, S, predict), S, predict, clip=False)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_x0_is_that_of_the_guide_and_the_scaled_difference(predict: Any) -> None:
    """x0^ = x0_guide + X (x0_main - x0_guide), at levels within the interval; elsewhere it is that of the model."""
    x, t = normal(6, (1, 2, 2))(0), torch.tensor([1, 4, 5, 30, 40, 41])
    main_, guide = of(DATA, predict), of(WIDER, predict)
    strong, weak = main_(x, t).x0, guide(x, t).x0
    result = main_.guided(2.5, (5, 40), guide)(x, t).x0
    torch.testing.assert_close(result[2:5], (weak + 2.5 * (strong - weak))[2:5], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(result[[0, 1, 5]], strong[[0, 1, 5]])


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "unipc"])
def test_scale_1_changes_no_bit(sampler: str) -> None:
    noise, run = normal(4, (1, 2, 2)), samplers.SAMPLERS[sampler].run
    plain, same, guided = (
        last(run(d, noise(50), noise, 10, None, None)).x
        for d in (of(DATA), of(DATA).guided(1, guide=of(WIDER)), of(DATA).guided(2, guide=of(WIDER)))
    )
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, guided, atol=1e-2)


def test_a_wider_guide_narrows_the_samples() -> None:
    """The sampled law of DDIM is Gaussian. With a guide of twice the covariance, every direction is narrower."""
    guide = of(GaussianData(DATA.mean, 2 * DATA.covariance))
    basis = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double().view(5, 1, 2, 2)  # x -> A x + b
    laws = []
    for scale in (1.0, 2.0):
        out = last(samplers.ddim(of(DATA).guided(scale, guide=guide), basis, 50)).x.flatten(1)
        A = (out[1:] - out[0]).T
        laws.append(A @ A.T)
        torch.testing.assert_close(out[0], last(samplers.ddim(of(DATA), basis[:1], 50)).x.flatten(), atol=0.05, rtol=0)
    assert torch.linalg.eigvalsh(laws[0] - laws[1]).min() > 0


def test_a_variance_is_that_of_the_model() -> None:
    """A learned variance of model or guide is not guided."""

    def both(net: Any, raw: float) -> Any:
        return lambda x, timestep, y=None: torch.cat([net(x, timestep), torch.full_like(x, raw)], 1)

    x, t = normal(2, (1, 2, 2))(0), torch.tensor([10, 20])
    learned = replace(of(DATA), network=both(of(DATA).network, 0.5), variance="learned_range")
    other = replace(of(WIDER), network=both(of(WIDER).network, -0.5), variance="learned_range")
    for guide in (other, of(WIDER)):
        result = learned.guided(3, guide=guide)(x, t)
        assert torch.equal(result.log_variance, learned(x, t).log_variance)
        torch.testing.assert_close(result.x0, of(DATA).guided(3, guide=of(WIDER))(x, t).x0)
    torch.testing.assert_close(of(DATA).guided(3, guide=other)(x, t).x0, result.x0)


def test_guides_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="guide: it predicts x0; want one that predicts v"):
        of(DATA).guided(2, guide=of(DATA, "x0"))
    with pytest.raises(InputError, match="guide: it has another noise schedule"):
        of(DATA).guided(2, guide=replace(of(DATA), schedule=schedule.linear(50)))


@pytest.mark.parametrize(
    ("name", "value"), [("pixel_type", "uint16"), ("label_dropout", 0.0), ("predict", "x0"), ("beta_T", 0.01)]
)
def test_a_guide_is_of_the_same_images_labels_and_levels(name: str, value: Any) -> None:
    model = open_checkpoint("digits")
    guide = replace(model, preset=replace(model.preset, **{name: value}))
    with pytest.raises(InputError, match=f"it has another {name} than"):
        Conditions(guide=guide).apply(model)


def test_precision_is_for_the_guide_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And measurements with guides of two precisions are stored apart."""
    opened, keys = [], []

    def seen(*given: Any) -> Any:
        opened.append(open_for_device(*given))
        return opened[-1]

    monkeypatch.setattr(processes, "open_for_device", seen)
    out = str(tmp_path / "a.npz")
    words = ["sample", "digits", "--guide", "digits", "--class", "7", "-n", "1", "--sampler", "ddim", "--steps", "2"]
    for precision in ("bf16", "float32"):
        assert main([*words, "--precision", precision, "--out", out]) == 0
        model, guide = opened[-2:]
        assert (model.denoiser.network.bf16, guide.denoiser.network.bf16) == (precision == "bf16",) * 2
        keys.append(guidance_key(opened[0].denoiser.guided(2, guide=guide.denoiser)))
    assert keys[0] != keys[1]


def test_the_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An earlier checkpoint guides. Scale 1 is the run without a guide, and other scales are not."""
    early = str(trained / "checkpoints/00000020")

    def sample(*options: str) -> np.ndarray:
        words = ["sample", str(trained), "-n", "2", "--out", str(tmp_path / "a.npz"), *options]
        assert main(words) == 0
        return np.load(tmp_path / "a.npz")["arr_0"]

    plain = sample()
    assert np.array_equal(sample("--guide", early, "--guide-scale", "1"), plain)
    assert not np.array_equal(sample("--guide", early, "--guide-scale", "3"), plain)
    (tmp_path / "a.npz").unlink()
    capsys.readouterr()
    for options, words in (
        (["--guide", "digits"], "it has another class_names than"),
        (["--guide-scale", "2"], "--guide-scale 2.0: needs --guide MODEL"),
        (["--guide", "nothing"], "nothing: no such file or folder"),
        (["--guide", early, "--guide-scale", "nan"], "--guide-scale nan: want a finite number"),
    ):
        assert main(["sample", str(trained), *options, "--out", str(tmp_path / "a.npz")]) == 2
        assert words in capsys.readouterr().err
    assert main(["sample", "digits", "--class", "7", "--guidance", "2", "--guide", "digits"]) == 2
    assert "guidance 2.0: not with a guide" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_evaluate_scores_the_guided_samples(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are those of `ddpm sample`. Each guide has samples of its own: the model itself changes nothing."""
    (tmp_path / "mine.py").write_text("def rows(x):\n    return x.reshape(len(x), -1)[:, :4].astype(float)\n")
    early, few = str(trained / "checkpoints/00000020"), ["-n", "8", "--sampler", "ddim", "--steps", "3"]

    def score(*options: str) -> dict[str, Any]:
        words = ["evaluate", str(trained), "--metrics", "fid", "--features", f"{tmp_path}/mine.py:rows"]
        capsys.readouterr()
        assert main([*words, "--out", str(tmp_path / "out"), "--json", *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    guide = ["--guide", early, "--guide-scale", "3"]
    assert main(["sample", str(trained), *few, *guide, "--out", str(tmp_path / "a.npz")]) == 0
    guided, alone = score(*few, *guide), score(*few)
    assert (guided["guide"]["step"], guided["guide"]["scale"]) == (20, 3)
    ((_, _, how),) = figures(guided)
    assert how.endswith(f"guided by {guided['guide']['run']} at scale 3")  # a card says it, too
    wanted = score("--samples", str(tmp_path / "a.npz"))["frechet_distance"]
    assert guided["frechet_distance"] == pytest.approx(wanted)
    assert alone["frechet_distance"] != pytest.approx(wanted)
    itself = score(*few, "--guide", str(trained), "--guide-scale", "3")
    assert itself["frechet_distance"] == pytest.approx(alone["frechet_distance"], rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--metrics nll", "--guide EARLY: not with --metrics nll, which is without guidance"),
        ("--metrics fid ode", "--guide EARLY: not with --metrics ode"),
        ("--metrics fid --samples a.npz", "--guide EARLY: not with --samples a.npz, which are made already"),
        ("--metrics fid --guide-scale inf", "--guide-scale inf: want a finite number"),
        ("--metrics fid --guidance 2", "--guidance 2.0: not with a guide"),
        ("--metrics psnr", " was trained without a condition; want one with"),
    ],
)
def test_measurements_that_no_guide_fits(
    options: str, words: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = str(trained / "checkpoints/00000020")
    given = ["evaluate", str(trained), "--guide", early, "--out", str(tmp_path / "out"), *options.split()]
    assert main(given) == 2
    assert words.replace("EARLY", early).replace("RUN", str(trained)) in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
