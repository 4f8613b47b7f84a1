"""Power function averages, and `ddpm average`: Karras et al. 2024, Section 3 and Appendix C."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_same, metrics, snapshots, steps, tensors, train
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import integrate, linalg
from torch import Tensor

import ddpm.run.train
from ddpm.cli import main
from ddpm.files import checkpoints, opening
from ddpm.files.tensors import read_metadata, save_tensors
from ddpm.run import average, ema, forecast

WIDTHS = st.floats(0.001, ema.WIDEST)


def profile(t: np.ndarray, T: float, sigma_rel: float) -> np.ndarray:
    """Eq. 121."""
    gamma = ema.gamma_of(sigma_rel)
    return np.where(t <= T, (gamma + 1) / T * (t / T) ** gamma, 0)


# -- profiles ----------------------------------------------------------------------------------------------------------


@given(WIDTHS)
def test_gamma_inverts_the_width(sigma_rel: float) -> None:
    gamma = ema.gamma_of(sigma_rel)
    assert gamma >= 0
    assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma_rel, rel=1e-9)


def test_the_width_is_the_standard_deviation_of_the_profile() -> None:
    for sigma_rel in (0.01, 0.05, 0.1, 0.28):
        moments = [integrate.quad(lambda t, n=n, s=sigma_rel: t**n * profile(t, 1, s), 0, 1)[0] for n in range(3)]
        assert moments[0] == pytest.approx(1)
        assert moments[2] - moments[1] ** 2 == pytest.approx(sigma_rel**2, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.288])
def test_the_updates_give_the_profile(sigma_rel: float) -> None:
    """Step k gets the integral of the profile over its place: the updates are exact."""
    T, weights = 20, [torch.eye(20, dtype=torch.float64)[k] for k in range(20)]
    tracked = torch.full((T,), 7.0, dtype=torch.float64)
    for k in range(T):
        ema.update([tracked], [weights[k]], ema.power_decay(k, sigma_rel))
    wanted = [integrate.quad(profile, k, k + 1, (T, sigma_rel), epsabs=1e-14)[0] for k in range(T)]
    np.testing.assert_allclose(tracked, wanted, atol=1e-12)


@settings(max_examples=30)
@given(st.floats(1, 1e4), WIDTHS, st.floats(1, 1e4), WIDTHS)
def test_inner_products_are_integrals(t_a: float, a: float, t_b: float, b: float) -> None:
    end = min(t_a, t_b)
    near = [0.9 * end, 0.99 * end]  # most of the integral lies beyond
    numeric, _ = integrate.quad(lambda t: profile(t, t_a, a) * profile(t, t_b, b), 0, end, epsabs=1e-12, points=near)
    exact = ema.inner(*(np.array(x) for x in (t_a, ema.gamma_of(a), t_b, ema.gamma_of(b))))
    assert float(exact) == pytest.approx(numeric, rel=1e-6, abs=1e-9)


# -- the fit -----------------------------------------------------------------------------------------------------------


def grid(ends: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Places and weights of Gauss and Legendre's quadrature, which is exact to rounding between snapshots."""
    x, w = np.polynomial.legendre.leggauss(max(8, 400 // len(ends)))
    edges = np.array([0, *ends], dtype=np.float64)
    half = np.diff(edges)[:, None] / 2
    return (edges[:-1, None] + half * (1 + x)).ravel(), (half * w).ravel()


@pytest.mark.parametrize("ends", [[100], [7, 60, 61, 100], list(range(10, 170, 10)), list(range(6, 306, 6))])
def test_the_fit_is_the_nearest_sum(ends: list[int]) -> None:
    """Its residual is the distance of profiles on a grid, and no other sum that adds up to 1 is nearer."""
    wanted, T = [0.03, 0.07, 0.1, 0.2], ends[-1]
    coefficients, residuals = ema.fit(ends, wanted)
    t, weight = grid(ends)
    basis = np.stack([profile(t, end, s) for end in ends for s in ema.TRACKED.values()], 1)
    for x, residual, sigma_rel in zip(coefficients, residuals, wanted, strict=True):
        p = profile(t, T, sigma_rel)
        norm = np.sqrt(weight @ p**2)
        assert np.sqrt(weight @ (basis @ x.ravel() - p) ** 2) / norm == pytest.approx(residual, rel=1e-5, abs=1e-6)
        assert x.sum() == pytest.approx(1, abs=1e-9)
        root = np.sqrt(weight)[:, None]  # least squares for the others, where the last coefficient is what is left of 1
        rest, target = root * (basis[:, :-1] - basis[:, -1:]), root[:, 0] * (p - basis[:, -1])
        y = linalg.lstsq(rest, target)[0]
        assert np.linalg.norm(rest @ y - target) / norm == pytest.approx(residual, rel=1e-4, abs=1e-6)


def test_a_tracked_average_is_found_as_it_is() -> None:
    for sigma_rel, place in zip(ema.TRACKED.values(), np.eye(2), strict=True):
        (x,), (residual,) = ema.fit([10, 20, 30], [sigma_rel])
        np.testing.assert_allclose(x[-1], place, atol=1e-9)
        assert residual < 1e-6


def bound(sigma_rel: float, residual: float, T: int, spread: float) -> float:
    """The most that a sum of snapshots may differ from the average, by Cauchy-Schwarz. `spread` is |theta - c|."""
    end, gamma = np.array(T), np.array(ema.gamma_of(sigma_rel))
    return float(residual * np.sqrt(ema.inner(end, gamma, end, gamma)) * spread)


def random_walk(T: int, count: int, sigma_rel: float) -> tuple[float, float, float]:
    """A random walk of 30 weights over T steps with `count` snapshots.

    Returns the error of the fit's sum, the most that it may be, and the error of the nearer of the two averages.
    """
    walk = torch.from_numpy(np.random.default_rng(0).normal(size=(T, 30)).cumsum(0) + 50)
    direct, powers, snapshots = torch.zeros(30).double(), torch.zeros(2, 30).double(), []
    for k in range(T):
        ema.update([direct], [walk[k]], ema.power_decay(k, sigma_rel))
        for power, tracked in zip(powers, ema.TRACKED.values(), strict=True):
            ema.update([power], [walk[k]], ema.power_decay(k, tracked))
        if (k + 1) % (T // count) == 0:
            snapshots.append(powers.clone())
    (x,), (residual,) = ema.fit([T // count * (i + 1) for i in range(count)], [sigma_rel])
    sum_ = torch.einsum("st,stw->w", torch.from_numpy(x), torch.stack(snapshots))
    most = bound(sigma_rel, residual, T, float((walk - walk.mean(0)).norm()))
    return float((sum_ - direct).norm()), most, min(float((power - direct).norm()) for power in powers)


@pytest.mark.parametrize("count", [16, 64])
@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_a_sum_of_snapshots_is_the_average_of_a_random_walk(count: int, sigma_rel: float) -> None:
    error, most, otherwise = random_walk(1024, count, sigma_rel)
    assert error <= most
    assert error < otherwise / 10  # which tells it from the averages that were tracked


def test_weights_that_do_not_change_keep_their_values() -> None:
    """The coefficients add up to 1, also where the fit is poor."""
    coefficients, residuals = ema.fit([10, 20], [0.01, 0.25])
    assert (residuals > 0.3).all()
    np.testing.assert_allclose(coefficients.sum((1, 2)), 1, atol=1e-12)


def test_the_documented_ranges_are_those_of_the_fit() -> None:
    page = (Path(__file__).parents[1] / "docs/howto/checkpoint.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+ to [\d.]+) \|$", page, re.M)
    assert len(rows) == 5
    for count, widths in rows:
        assert average._widths(range(10, 10 * int(count) + 1, 10)) == widths


# -- a run -------------------------------------------------------------------------------------------------------------

STEPS, EVERY = 128, 8
DIRECT = (0.07, 0.15)


@dataclass(frozen=True)
class Run:
    """A run of STEPS steps with 16 snapshots, which also tracked the averages of DIRECT.

    spread  |theta - c| over all steps and weights, where c is their mean
    """

    path: Path
    spread: float


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Tests must not change it, but may write averages."""
    path, total, square, apply = tmp_path_factory.mktemp("average") / "run", 0, 0.0, ddpm.run.train.apply

    def summing(model: Any, preset: Any) -> None:
        nonlocal total, square
        apply(model, preset)
        flat = torch.cat([p.detach().flatten() for p in model.weights]).double()
        total, square = total + flat, square + float(flat @ flat)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddpm.run.train, "apply", summing)
        patch.setattr(ema, "TRACKED", ema.TRACKED | {f"power-{s}": s for s in DIRECT})
        options = ["--steps", STEPS, "--snapshot-every", EVERY, "--save-every", 64, "--keep", 1, "--log-every", 64]
        assert train(path, *options) == 0
    assert isinstance(total, Tensor)
    return Run(path, float(square - total @ total / STEPS) ** 0.5)


def snapshot(run: Path, step: int, sigma_rel: float) -> dict[str, Tensor]:
    return load_file(run / "snapshots" / f"{step:08d}" / f"power-{sigma_rel:.2f}.safetensors")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(torch.cat([(a[name].double() - b[name].double()).flatten() for name in a]).norm())


@pytest.mark.parametrize("sigma_rel", DIRECT)
def test_the_average_is_the_one_that_was_tracked(sigma_rel: float, run: Run, tmp_path: Path) -> None:
    """As near as the residual promises, up to float32, and much nearer than the averages it is made of."""
    out, about = average.average(run.path, sigma_rel, out=tmp_path / "a.safetensors")
    made, tracked = load_file(out), snapshot(run.path, STEPS, sigma_rel)
    rounding = 1e-6 * distance(tracked, {name: torch.zeros_like(x) for name, x in tracked.items()})
    assert distance(made, tracked) <= bound(sigma_rel, about.residual, STEPS, run.spread) + rounding
    nearest = min(distance(snapshot(run.path, STEPS, s), tracked) for s in ema.TRACKED.values())
    assert distance(made, tracked) < nearest / 10


def test_a_step_before_the_last(run: Run, tmp_path: Path) -> None:
    """It needs only the snapshots until then."""
    out, about = average.average(run.path, 0.07, 88, tmp_path / "a.safetensors")
    assert (about.step, about.snapshots) == (88, 11)
    tracked = snapshot(run.path, 88, 0.07)
    assert distance(load_file(out), tracked) < distance(snapshot(run.path, 88, 0.05), tracked) / 10


def test_the_file_says_what_it_is(run: Run) -> None:
    """Snapshots are float32, and a width that was tracked gives its snapshot."""
    out, about = average.average(run.path, 0.1)
    assert out == run.path / "averages" / "00000128-0.1.safetensors"
    made, tracked = load_file(out), snapshot(run.path, STEPS, 0.10)
    assert {x.dtype for x in [*made.values(), *tracked.values()]} == {torch.float32}
    assert all(torch.allclose(made[name], tracked[name], rtol=1e-6, atol=1e-9) for name in made)
    said = read_metadata(out)
    assert (said["weights"], said["step"]) == ("ema", "128")
    assert json.loads(said["average"]) == {"sigma_rel": 0.1, "step": 128, "snapshots": 16, "residual": about.residual}
    assert json.loads(said["config"])["snapshot_every"] == EVERY


def test_keep_leaves_snapshots_alone(run: Run) -> None:
    """Of the checkpoints, one or the best one more is kept; of the snapshots, all."""
    assert len(steps(run.path)) <= 2
    found = checkpoints.saved(run.path, checkpoints.SNAPSHOTS)
    assert [int(folder.name) for folder in reversed(found)] == list(range(EVERY, STEPS + 1, EVERY))
    assert not any(checkpoints.damage(folder) for folder in found)
    with (shutil.copytree(found[0], run.path.parent / "copy") / "power-0.05.safetensors").open("ab") as file:
        file.write(b"0")
    assert checkpoints.damage(run.path.parent / "copy") == "power-0.05.safetensors is truncated or altered"


def test_every_command_takes_it(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, mine = str(tmp_path / "a.safetensors"), str(tmp_path / "mine.safetensors")
    assert main(["average", str(run.path), "--ema", "0.07", "--out", model, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    about = {name: said[name] for name in ("sigma_rel", "step", "snapshots", "residual")}
    assert said == {"out": model, **about}
    assert main(["sample", model, "-n", "2", "--out", str(tmp_path / "a.png")]) == 0
    capsys.readouterr()
    assert main(["evaluate", model, "-n", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["average"] == about
    assert main(["export", model, "--out", mine]) == 0
    card = (tmp_path / "mine.md").read_text()
    assert "ddpm average RUN --ema 0.07 --step 128 --out average.safetensors\nddpm export average.safetensors" in card
    capsys.readouterr()
    for name in (model, mine):
        assert main(["info", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["average"] == about
    assert main(["info", model]) == 0
    assert "average     sigma_rel 0.07 at step 128, from 16 snapshots, error 0." in capsys.readouterr().out
    assert main(["info", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "snapshots   16, of steps 8 to 128" in out
    assert f"ddpm average {run.path} --ema X" in out


def test_a_file_that_says_nonsense_of_its_average_is_refused(run: Run, tmp_path: Path) -> None:
    out, _ = average.average(run.path, 0.07, out=tmp_path / "a.safetensors")
    for nonsense in ('{"sigma_rel": 0.1}', "3", '{"sigma_rel": "x", "step": 1, "snapshots": 1, "residual": 0}'):
        save_tensors(out, load_file(out), {**read_metadata(out), "average": nonsense})
        with pytest.raises(ddpm.InputError, match="its configuration is damaged"):
            opening.open_checkpoint(out)


def test_damaged_snapshots_are_left_out(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(run.path, tmp_path / "run")
    (copy / "snapshots/00000088/power-0.10.safetensors").write_bytes(b"no")
    assert main(["average", str(copy), "--ema", "0.12", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["snapshots"] == 15
    assert err.startswith("warning: snapshot ")
    assert "00000088: power-0.10.safetensors is truncated or altered; it is left out" in err
    assert main(["average", str(copy), "--ema", "0.12", "--step", "88"]) == 2
    assert "--step 88: " in capsys.readouterr().err
    for folder in checkpoints.saved(copy, checkpoints.SNAPSHOTS):
        (folder / "state.json").unlink()
    assert main(["average", str(copy), "--ema", "0.12"]) == 2
    assert "none of its snapshots is whole" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ema", "0.28"], "--ema 0.28: has an error of 2"),
        (["--ema", "0.5"], "--ema 0.5: want a finite number, 0.001 to 0.288"),
        (["--ema", "x"], "--ema: 'x': want a number"),
        ([], "--ema: missing; want length of the average"),
        (["--ema", "0.1", "--step", "15"], "--step 15: "),
        (["--ema", "0.1", "--step", "0"], "--step 0: want a whole number of at least 1"),
        (["--ema", "0.1", "--out", "a.pt"], "--out a.pt: want a name that ends in .safetensors"),
    ],
)
def test_mistakes_are_one_line(options: list[str], said: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(run.path.rglob("*"))
    assert main(["average", str(run.path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ddpm: {said}")
    assert sorted(run.path.rglob("*")) == files


def test_a_refusal_names_widths_that_are_accepted(run: Run, tmp_path: Path) -> None:
    """And no others: the next ones on either side are refused."""
    out = tmp_path / "a.safetensors"
    with pytest.raises(ddpm.InputError) as refused:
        average.average(run.path, 0.28, out=out)
    least, most = (float(word) for word in str(refused.value).rpartition("want ")[2].split(" to "))
    assert (least, most) == (pytest.approx(0.03, abs=0.01), pytest.approx(0.22, abs=0.02))
    for sigma_rel in (least, most):
        average.average(run.path, sigma_rel, out=out)
    out.unlink()
    for sigma_rel in (least - 0.001, most + 0.001):
        with pytest.raises(ddpm.InputError, match="above 5%"):
            average.average(run.path, sigma_rel, out=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("folder", "said"),
    [("run", "it has no snapshots; want a run that was trained with --snapshot-every N"), ("none", "no such folder")],
)
def test_a_run_without_snapshots(
    folder: str, said: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps nothing of them, and is refused."""
    assert {path.name for path in trained.iterdir()} & {"snapshots", "averages"} == set()
    assert not list(trained.rglob("power-*"))
    assert main(["average", str(trained.parent / folder), "--ema", "0.1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_snapshots_to_the_bit(tmp_path: Path) -> None:
    """And one more, of its end. A snapshot that a killed process did not write is written by the next one."""
    options = ["--snapshot-every", 4, "--save-every", 4, "--keep", 1, "--dropout", 0.3]
    assert train(tmp_path / "whole", *options, "--steps", 10) == 0
    run = tmp_path / "halves"
    assert train(run, *options, "--steps", 5) == 0
    written = (run / "snapshots/00000005/power-0.05.safetensors").read_bytes()
    shutil.rmtree(run / "snapshots/00000005")
    assert train(run, *options, "--steps", 5) == 0
    assert (run / "snapshots/00000005/power-0.05.safetensors").read_bytes() == written
    assert train(run, *options, "--steps", 10) == 0
    whole, halves = snapshots(tmp_path / "whole"), snapshots(run)
    assert {name.split("/")[0] for name in halves.keys() - whole.keys()} == {"00000005"}
    assert {name.split("/")[0] for name in whole} == {"00000004", "00000008", "00000010"}
    assert all(torch.equal(halves[name], value) for name, value in whole.items())
    a, b = tensors(tmp_path / "whole", 10), tensors(run, 10)
    assert {name.split("/")[0] for name in a} == {"ema", "raw", "optimizer", "power-0.05", "power-0.10"}
    assert_same(a, b)
    assert [line["step"] for line in metrics(run) if "held_out" in line] == [0, 4, 5, 8, 10]


def test_the_setting_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An average that was not tracked from the first step on cannot be had later."""
    assert train(tmp_path / "run", "--steps", 2) == 0
    capsys.readouterr()
    assert train(tmp_path / "run", "--steps", 4, "--snapshot-every", 2) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("ddpm: --snapshot-every 2: the run in ")


def test_bytes_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At the start, those of the files; a disk on which they do not fit is warned of."""
    options = ["--steps", 4, "--snapshot-every", 2, "--width", 64]
    assert train(tmp_path / "run", *options) == 0
    said = capsys.readouterr().err
    size = sum(file.stat().st_size for file in (tmp_path / "run/snapshots/00000002").glob("*.safetensors"))
    assert f"snapshots: 2 x {forecast.gib(size)} = {forecast.gib(2 * size)} of disk" in said
    kept = sum(file.stat().st_size for file in (tmp_path / "run/checkpoints/00000004").glob("*.safetensors"))
    assert "warning: the checkpoints" not in said
    for room, warns in ((4 * kept + 2 * size, False), (4 * kept + 1 * size, True)):
        monkeypatch.setattr(forecast, "free_bytes", lambda out, room=room: room)
        shutil.rmtree(tmp_path / "run")
        assert train(tmp_path / "run", *options) == 0
        assert ("warning: the checkpoints and snapshots of this run take" in capsys.readouterr().err) == warns
