"""The paper's tables and figures for a tiny run: their contents must follow from the model."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from exact import correlated, network
from PIL import Image

from ddpm import likelihood, pixels, schedule
from ddpm.cli import main
from ddpm.denoiser import Denoiser
from ddpm.files import data, images
from ddpm.files.opening import open_checkpoint
from ddpm.gaussian import q
from ddpm.noise import per_image
from ddpm.run import paper, sample
from ddpm.unet import UNet

FEATURES = "def rows(x):\n    x = x.reshape(len(x), -1)[:, 3::8] + 1.0\n    return x, x / x.sum(1)[:, None]\n"


@pytest.fixture(scope="module")
def results(trained, tmp_path_factory):
    """A copy of the run with all experiments but table2. Tests must not change it."""
    run = tmp_path_factory.mktemp("paper") / "run"
    shutil.copytree(trained, run)
    (run / "mine.py").write_text(FEATURES)
    words = ["--run", str(run), "-n", "4", "--features", f"{run}/mine.py:rows", "--batch-size", "3"]
    assert main(["paper", *(name for name, each in paper.EXPERIMENTS.items() if not each.trains), *words]) == 0
    return run


def table(run: Path, name: str) -> list[dict[str, str]]:
    """The rows of a table."""
    with (run / "paper" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def tiles(run: Path, name: str, columns: int) -> np.ndarray:
    """The pictures of a grid of 8x8 tiles, drawn four times as large: uint8 [rows, columns, 8, 8]."""
    sheet = np.asarray(Image.open(run / "paper" / f"{name}.png"))
    rows = (sheet.shape[0] - 2) // 34
    assert sheet.shape == (rows * 34 + 2, columns * 34 + 2)
    return np.stack([[sheet[34 * y + 2 : 34 * y + 34 : 4, 34 * x + 2 : 34 * x + 34 : 4] for x in range(columns)]
                     for y in range(rows)])  # fmt: skip


def test_each_result_names_its_model_and_data(results):
    """It names no folder of this machine."""
    for name in ("table1", "table3", "table4", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10", "neighbours"):
        about = json.loads((results / "paper" / f"{name}.json").read_text())
        assert about["identity"] == open_checkpoint(results).identity
        assert about["step"] == 30
        assert about["variance"] == "fixed_large"
        assert all(set(data) == {"name", "images", "fingerprint"} for data in about["data"].values())
        assert about["n"] == 4


def test_table_1_holds_the_values_of_evaluate_and_the_papers_rows(results, capsys):
    ours, *paper_rows = table(results, "table1")
    assert main(["evaluate", str(results), "-n", "4", "--batch-size", "3", "--json", "--out", str(results / "e")]) == 0
    expected = json.loads(capsys.readouterr().out)["bits_per_dim"]
    assert float(ours["NLL_test"]) == pytest.approx(expected, rel=1e-5)
    assert float(ours["frechet_distance"]) > 0
    assert float(ours["IS"]) >= 1
    row = next(row for row in paper_rows if row["model"] == "DDPM, L_simple")
    assert (row["IS"], row["IS_std"], row["frechet_distance"], row["NLL_test"]) == ("9.46", "0.11", "3.17", "3.75")


def test_table_4_holds_the_bound_at_ten_steps(results):
    """The largest rate is L without L_0. The rate rises and the error falls with the steps."""
    rows = table(results, "table4")
    assert [int(r["reverse_step"]) for r in rows] == list(range(20, 0, -2))
    with (results / "paper" / "nll-test" / "nll.csv").open() as file:
        levels = {int(r["t"]): r for r in csv.DictReader(file)}
    assert float(rows[0]["rate_bits_per_dim"]) == pytest.approx(float(levels[1]["rate_bits_per_dim"]), rel=1e-5)
    assert float(rows[0]["rmse_grey_levels"]) == pytest.approx(float(levels[1]["rmse_grey_levels"]), rel=1e-5)
    rates = [float(r["rate_bits_per_dim"]) for r in rows]
    assert rates == sorted(rates, reverse=True)
    assert float(rows[0]["rmse_grey_levels"]) < float(rows[-1]["rmse_grey_levels"])
    assert rows[0]["paper_rate"] == "1.77581"
    curve = table(results, "fig5")
    assert len(curve) == 20
    assert float(curve[-1]["rate_bits_per_dim"]) == pytest.approx(rates[0], rel=1e-5)


def test_figure_6_ends_with_the_samples(results):
    strip = tiles(results, "fig6", 20)
    samples = sample.generate(open_checkpoint(results).denoiser, (1, 8, 8), range(4))[:, 0].numpy()
    assert (strip[:, -1] == samples).all()


def test_samples_of_figure_7_differ_less_at_lower_levels(results):
    """It has one row for each of the levels 20, 15, 10, 5."""
    shared = tiles(results, "fig7", 5)[:, 1:].astype(float)
    spread = shared.std(axis=1).mean(axis=(1, 2))
    assert json.loads((results / "paper" / "fig7.json").read_text())["levels"] == [20, 15, 10, 5]
    assert len(spread) == 4
    assert spread[0] > spread[-1] > 0


def test_figures_7_to_9_visit_the_given_levels(trained, tmp_path, monkeypatch):
    """They visit the levels of --steps and --spacing below their start, and their JSON names these settings."""
    seen, forward = set(), UNet.forward

    def spy(self, x, timestep, y=None):
        seen.update((timestep + 1).tolist())
        return forward(self, x, timestep, y)

    monkeypatch.setattr(UNet, "forward", spy)
    visited = sample.sampler_levels(open_checkpoint(trained), "ancestral", 5, "quadratic")
    words = ["--run", str(trained), "-n", "1", "--steps", "5", "--spacing", "quadratic", "--out", str(tmp_path)]
    starts = {"fig7": [20], "fig8": [10], "fig9": [20, 17, 15, 12, 10, 7, 5, 2]}
    for name, tops in starts.items():
        seen.clear()
        assert main(["paper", name, *words]) == 0
        assert seen == {t for top in tops for t in (*visited, top) if t <= top}
        about = json.loads((tmp_path / f"{name}.json").read_text())
        assert (about["steps"], about["sampler"], about["spacing"]) == (5, "ancestral", "quadratic")
        assert about["weights"] == "ema"


def test_figures_8_and_9_show_the_images_that_they_interpolate(results):
    held_out = data.load("digits", (8, 8), 1, split="test").batch(range(8))[:, 0].numpy()
    pairs = tiles(results, "fig8", 13)
    assert (pairs[:, 0] == held_out[::2]).all()
    assert (pairs[:, -1] == held_out[1::2]).all()
    mixed = tiles(results, "fig9", 11)[-1].astype(float)  # t = 0
    weights = np.linspace(0, 1, 9)[:, None, None]
    assert np.abs(mixed[1:-1] - ((1 - weights) * held_out[0] + weights * held_out[1])).max() <= 1


def test_figure_10_ends_with_the_images(results):
    """Its last column is the image. The number of bits rises along a row."""
    rows = table(results, "fig10")
    columns = len(rows) // 4
    strip = tiles(results, "fig10", columns)
    assert (strip[:, -1] == data.load("digits", (8, 8), 1, split="test").batch(range(4))[:, 0].numpy()).all()
    for i in range(4):
        own = [r for r in rows if r["image"] == str(i)]
        bits = [float(r["sent_bits_per_dim"]) for r in own]
        assert bits == sorted(bits)
        assert [int(r["t"]) for r in own] == sorted((int(r["t"]) for r in own), reverse=True)
        assert float(own[-1]["rmse_grey_levels"]) == 0


def test_progressive_coding_costs_the_bound():
    """Algorithm 3 costs L on average, as independent draws do, and its x_t are distributed as q(x_t | x_0)."""
    s = schedule.linear(12, 1e-3, 0.6)
    denoiser = Denoiser(network(correlated(), s, "eps"), s, clip=False)
    x0 = pixels.to_signal(torch.tensor([[20, 200], [90, 140]], dtype=torch.uint8)).double().expand(4000, 1, 2, 2)
    noise = per_image(range(4000), (1, 2, 2))
    *_, last = received = list(likelihood.progressive_coding(denoiser, x0, noise))
    bound = likelihood.vlb(denoiser, x0, per_image(range(4000, 8000), (1, 2, 2)))
    whole = bound.prior + bound.kl.sum(1) + bound.decoder
    error = (last.nats.var() / 4000 + whole.var() / 4000).sqrt()
    assert abs(last.nats.mean() - whole.mean()) < 4 * error
    assert [r.t for r in received] == list(range(12, -1, -1))
    assert torch.equal(last.x0, x0)
    for r in received[:-1]:
        law = q(s, x0, torch.full((4000,), r.t))
        z = (r.x - law.mean) * (-0.5 * law.log_variance).exp()
        assert z.mean(0).abs().max() < 4 / 4000**0.5
        assert (z.var(0) - 1).abs().max() < 4 * (2 / 4000) ** 0.5


def test_planted_copies_are_the_duplicates(trained, tmp_path, capsys):
    """Of four samples, one is a training image and one is nearly one. Exactly these two are found."""
    train = data.load("digits", (8, 8), 1)
    samples = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples[1] = train.batch([77])[0]
    samples[2] = train.batch([1200])[0]
    samples[2, 0, 0, 0] += 3
    images.save_many(tmp_path / "s.npz", samples.permute(0, 2, 3, 1).numpy(), list("abcd"))
    (tmp_path / "mine.py").write_text(FEATURES)
    words = [
        "--samples",
        str(tmp_path / "s.npz"),
        "--features",
        f"{tmp_path}/mine.py:rows",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["paper", "neighbours", "--run", str(trained), *words]) == 0
    with (tmp_path / "o" / "neighbours.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = {int(r["sample"]): r for r in rows if r["space"] == "pixels" and r["rank"] == "1"}
    assert (first[1]["training_image"], float(first[1]["distance"])) == ("77", 0)
    assert (first[2]["training_image"], float(first[2]["distance"])) == ("1200", 3)
    assert json.loads((tmp_path / "o" / "neighbours.json").read_text())["pixels"]["duplicates"] == [1, 2]
    assert {r["duplicate"] for r in rows if r["space"] == "pixels" and r["sample"] == "0"} == {"False"}
    assert json.loads((tmp_path / "o" / "neighbours.json").read_text())["samples"] == "s.npz"
    assert (tmp_path / "o" / "neighbours_features.png").is_file()


@pytest.mark.usefixtures("undrawn")
def test_table_2_trains_six_runs_once(tmp_path, trained, capsys):
    """It takes the settings of a run, and a second call trains nothing."""
    (tmp_path / "mine.py").write_text(FEATURES)
    base = tmp_path / "base"
    words = [*TINY, "--out", str(base), "--steps", "3", "--save-every", "3", "--num-timesteps", "6"]
    assert main(words) == 0
    words = ["paper", "table2", "--run", str(base), "-n", "4", "--features", f"{tmp_path}/mine.py:rows"]
    assert main(words) == 0
    rows = table(base, "table2")
    assert [(r["predict"], r["loss"], r["variance"]) for r in rows] == [
        ("mu", "vlb", "learned"), ("mu", "vlb", "fixed_large"), ("mu", "simple", "fixed_large"),
        ("eps", "vlb", "learned"), ("eps", "vlb", "fixed_large"), ("eps", "simple", "fixed_large"),
    ]  # fmt: skip
    assert {r["state"] for r in rows} == {"finished"}
    assert [r["paper_FID"] for r in rows] == ["23.69", "13.22", "unstable", "unstable", "13.51", "3.17"]
    assert all(float(r["NLL"]) > 0 for r in rows)
    assert rows[-1]["step"] == "3"
    before = {p: p.stat().st_mtime_ns for p in (base / "paper" / "table2").rglob("*.safetensors")}
    assert main(words) == 0
    assert {p: p.stat().st_mtime_ns for p in (base / "paper" / "table2").rglob("*.safetensors")} == before
    assert table(base, "table2") == rows


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["fig11", "--run", "{run}"], "fig11"),
        (["fig6"], "--run"),
        (["fig6", "--run", "nothing"], "nothing: no such file or folder"),
        (["fig6", "--run", "cifar10"], "cifar10: no such file or folder; did you mean cifar10_fast? want a run folder"),
        (["fig8", "--run", "{run}", "-n", "500"], "want at least 1000"),
        (["table1", "--run", "{run}", "--features", "none.py:f"], "none.py"),
        (["neighbours", "--run", "{run}", "--features", "none.py:f", "-n", "2"], "none.py"),
        (["neighbours", "--run", "{run}", "--split", "train", "-n", "2", "--sampler", "ddim"], "want held-out ones"),
        ([], "NAME"),
        (["fig6", "--run", "{run}", "--sampler", "foo"], "foo"),
        (["fig6", "--run", "{run}", "--out", "afile"], "afile"),
        (["table2", "--run", "{run}", "--samples", "s.npz"], "not for table2"),
        (["table2", "--run", "{run}", "--features", "dumb.py:f"], "no class probabilities"),
        (["table2", "--run", "{run}", "--features", "none.py:f"], "none.py"),
        (["table2", "--run", "{run}", "--features", "mine.py:rows", "--sampler", "foo"], "--sampler 'foo'"),
        (["table2", "--run", "{run}", "--features", "mine.py:rows", "--spacing", "bound"], "--spacing bound"),
        (["fig7", "--run", "{run}", "--sampler", "ddim"], "--sampler ddim: draws no noise"),
    ],
)
def test_mistakes(trained, tmp_path, capsys, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    Path("afile").write_text("")
    Path("dumb.py").write_text("def f(x):\n    return x.reshape(len(x), -1)\n")
    Path("mine.py").write_text(FEATURES)
    words = [w.replace("{run}", str(trained)) for w in words]
    assert main(["paper", *(["--out", "out"]), *words]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert not Path("out").exists()
