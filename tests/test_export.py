"""Models for others: one file, its card, and the names of those that come with the package."""

import html
import importlib.resources
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train
from safetensors import safe_open
from safetensors.torch import load_file
from several import start_python

import ddpm
from ddpm.cli import main
from ddpm.details import Details
from ddpm.files import data, interop, models, opening
from ddpm.files.opening import open_checkpoint
from ddpm.files.tensors import file_sha256
from ddpm.presets import PRESETS
from ddpm.run import export
from ddpm.run.held_out import held_out_by_level
from ddpm.run.processes import processes

ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory. The grid of a card holds four samples, since sampling takes the time of an export."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "SAMPLES", 4)
    return tmp_path


# -- export ------------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_run_rounded(trained: Path, here: Path) -> None:
    """bf16 on disk, and read as float32: the nearest bf16 of each; --precision float32 leaves every bit."""
    original = load_file(trained / "checkpoints" / "00000030" / "ema.safetensors")
    for options, kind in (([], torch.bfloat16), (["--precision", "float32"], torch.float32)):
        assert main(["export", str(trained), "--out", "models/a.safetensors", *options]) == 0
        stored = load_file("models/a.safetensors")
        network = ddpm.load("models/a.safetensors").network
        assert isinstance(network, torch.nn.Module)
        read = network.state_dict()
        assert stored.keys() == original.keys() == read.keys()
        for name, value in original.items():
            assert stored[name].dtype == kind
            assert read[name].dtype == torch.float32
            assert torch.equal(read[name], value.to(kind).float())


def test_the_same_weights_give_the_same_bytes(trained: Path, here: Path) -> None:
    """In another process, too, so that a hash is of the model; and an export of an export is the same model."""
    assert main(["export", str(trained), "--out", "a.safetensors"]) == 0
    other = start_python(["-m", "ddpm", "export", trained, "--out", "b.safetensors"], here)
    other.join()
    assert other.exitcode == 0
    assert main(["export", "a.safetensors", "--out", "c.safetensors"]) == 0
    assert len({file.read_bytes() for file in here.glob("*.safetensors")}) == 1


def test_no_path_goes_along(here: Path) -> None:
    """What data is called on one machine, and its device, are nobody else's business."""
    preset = replace(PRESETS["cifar10"], data="/home/me/cifar", device="cuda:1")
    assert (export.public(preset).data, export.public(preset).device) == ("", "auto")
    assert export.public(preset, "uoft-cs/cifar10").data == "uoft-cs/cifar10"
    assert export.public(PRESETS["cifar10"]).data == "uoft-cs/cifar10"
    (here / "uoft-cs" / "cifar10").mkdir(parents=True)  # a copy of one's own, or something else
    assert export.public(PRESETS["cifar10"]).data == ""


@pytest.mark.usefixtures("undrawn")
def test_a_run_on_own_images(here: Path) -> None:
    """Neither the file nor the card names the folder."""
    digits = data.load("digits", (8, 8), 1).batch(range(40)).permute(0, 2, 3, 1).numpy()
    ddpm.files.images.save_many("secret-place/", digits, [str(i) for i in range(40)])
    assert train(here / "run", "--data", str(here / "secret-place"), "--channels", 1, "--steps", 2) == 0
    assert main(["calibrate", "run", "-n", "2", "--codec", "1"]) == 0
    assert main(["evaluate", "run", "-n", "2"]) == 0
    assert main(["export", "run", "--out", "a.safetensors"]) == 0
    assert "(2 images, own images, held out of train)" in Path("a.md").read_text()
    assert all(str(here).encode() not in file.read_bytes() for file in here.glob("a.*"))
    assert all(b"secret-place" not in file.read_bytes() for file in here.glob("a.*"))
    with safe_open("a.safetensors", "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["config"])["seed"] == 0
    assert (metadata["step"], metadata["weights"], metadata["version"]) == ("2", "ema", ddpm.__version__)
    assert "--data SOURCE" in Path("a.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_the_card_says_what_was_measured(trained: Path, here: Path) -> None:
    """Of the run, marked where the weights were rounded since, and of the file; nothing that was not measured."""
    run = Path(shutil.copytree(trained, here / "run"))
    options = ["--out", "a.safetensors", "--license", "apache-2.0"]
    assert main(["export", str(run), *options]) == 0
    before = Path("a.md").read_text()
    assert "bits/dim" not in before
    assert re.search(r"held-out L_simple, in training \| 0\.\d{4}", before)
    assert "30 steps of 8 images: 240 images" in before
    assert before.startswith('---\nlibrary_name: "ddpm"\nlicense: "apache-2.0"\n')
    assert main(["evaluate", str(run), "-n", "2"]) == 0
    assert main(["evaluate", "a.safetensors", "-n", "2", "--levels-per-image", "5"]) == 0
    assert main(["export", str(run), *options]) == 0
    text = Path("a.md").read_text()
    assert re.search(
        r"bits/dim, bound \(Eq\. 5\), fixed_large, before rounding \| \d+\.\d{4} ± .*2 images, digits", text
    )
    assert re.search(r"bits/dim, bound \(Eq\. 5\), 5 levels per image, fixed_large \| \d", text)
    assert "fid" not in text
    assert Path("a.png").is_file()


def test_the_commands_of_the_card_make_the_model(trained: Path, here: Path) -> None:
    """Run as they stand, but for the pictures and figures on the way, they give the same weights."""
    assert main(["export", str(trained), "--out", "a.safetensors"]) == 0
    commands = re.findall(r"^ddpm (.*)$", Path("a.md").read_text().partition("## How it was made")[2], re.M)
    assert [line.split()[0] for line in commands] == ["train", "export"]
    (here / "again").mkdir()
    for line in commands:
        words = [f"again/{word}" if word in ("RUN", "a.safetensors") else word for word in line.split()]
        assert main([*words, *(["--eval-images", "16", "--sample-every", "0"] if words[0] == "train" else [])]) == 0
    stored, again = load_file("a.safetensors"), load_file("again/a.safetensors")
    assert all(torch.equal(again[name], value) for name, value in stored.items())


@pytest.mark.parametrize(
    "model", ["models/cifar10_fast", "models/cifar10_likelihood", "models/cifar10_two_calls", "src/ddpm/models/digits"]
)
def test_the_cards_of_the_repository_name_the_training_of_their_models(model: str) -> None:
    """A preset that changes later would make another network than the card says."""
    root = Path(__file__).parents[1] / model
    command = re.findall(r"^ddpm ((?:train|distill) .*)$", root.with_suffix(".md").read_text(), re.M)[0]
    checkpoint = open_checkpoint(root.with_suffix(".safetensors"))
    first = export._commands(checkpoint, checkpoint).splitlines()[0]
    given, wanted = command.split(), first.removeprefix("ddpm ").split()
    assert (given[:2], sorted(given)) == (wanted[:2], sorted(wanted))


def test_the_card_names_the_precision_of_the_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the machine that exports computes in float32. (No samples are made, which would take 1,000 steps.)"""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(export, "generate", lambda _, shape, seeds, *__, **___: torch.zeros(len(seeds), *shape).byte())
    assert main(["export", "digits", "--out", "a.safetensors", "--device", "cpu"]) == 0
    assert "ddpm train digits --out RUN --precision bf16 " in Path("a.md").read_text()


def test_a_calibration_goes_along(trained: Path, here: Path) -> None:
    """It says of which weights it was measured, and is taken; without one, an old one does not stay."""
    run = Path(shutil.copytree(trained, here / "run"))
    assert main(["calibrate", str(run), "-n", "4", "--codec", "1"]) == 0
    original = opening.open_checkpoint(run)
    for source in (str(run), "a.safetensors"):
        out = Path("b.safetensors" if source == "a.safetensors" else "a.safetensors")
        assert main(["export", source, "--out", str(out)]) == 0
        values = json.loads(models.calibration_file(out).read_text())
        assert values["measured_on"] == original.identity
        assert "| calibration | of the weights before rounding, on 4 images (digits) |" in Path("a.md").read_text()
        exported = models.read_calibration(opening.open_checkpoint(out))
        assert exported is not None
        assert torch.equal(exported[0], models.read_calibration(original)[0])  # type: ignore[index]
    assert main(["export", str(trained), "--out", "a.safetensors"]) == 0
    assert not Path("a.calibration.json").exists()
    assert main(["calibrate", "a.safetensors", "-n", "4", "--codec", "1"]) == 0
    own = Path("a.calibration.json").read_text()
    assert main(["export", str(run), "--out", "a.safetensors"]) == 0
    assert Path("a.calibration.json").read_text() == own


MISTAKES: list[tuple[list[str], str]] = [
    (["RUN", "--out", "a.pt"], "out a.pt: want a name that ends in .safetensors"),
    (["RUN", "--out", ""], "want a name that ends in .safetensors"),
    (["RUN", "--out", "folder.safetensors"], "out folder.safetensors: want a name"),
    (["RUN", "--out", "words.txt/a.safetensors"], "words.txt: cannot write"),
    (["RUN", "--out", "RUN/checkpoints/00000030/a.safetensors"], "inside a checkpoint of a run"),
    (["lone.safetensors", "--out", "lone.safetensors"], "this file is the one to export"),
    (
        ["RUN", "--out", "a.safetensors", "--precision", "fp16"],
        "--precision 'fp16': did you mean bf16? want bf16, float32",
    ),
    (["lone.safetensors", "--out", "a.safetensors", "--weights", "raw"], "holds the ema weights"),
    (["RUN"], "--out, --to: want one of --out FILE.safetensors, --to diffusers DIR, --to hub OWNER/NAME"),
    (["RUN", "--out", "a.safetensors", "--to", "hub", "a/b"], "--out, --to: want one of"),
    (["RUN", "--to", "keras", "a"], "--to 'keras': want diffusers, hub"),
    (["RUN", "--to", "hub", "a/b/c"], "a/b/c: want hf:OWNER/NAME"),
    (["nothing", "--out", "a.safetensors"], "nothing: no such file or folder"),
]


@pytest.mark.parametrize(("words", "reason"), MISTAKES)
def test_mistakes(words: list[str], reason: str, trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, and nothing written."""
    (here / "folder.safetensors").mkdir()
    (here / "words.txt").write_text("words")
    shutil.copy(trained / "checkpoints" / "00000030" / "ema.safetensors", here / "lone.safetensors")
    before = {p: p.stat().st_mtime_ns for p in [*here.rglob("*"), *trained.rglob("*")]}
    assert main(["export", *(re.sub("^RUN", str(trained), word) for word in words)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert reason in err
    assert {p: p.stat().st_mtime_ns for p in [*here.rglob("*"), *trained.rglob("*")]} == before


# -- names -------------------------------------------------------------------------------------------------------------


def test_sample_by_name_from_an_empty_folder(here: Path) -> None:
    """What the README begins with."""
    assert main("sample digits -n 4 --steps 20 --out a.npz".split()) == 0
    assert np.load("a.npz")["arr_0"].shape == (4, 8, 8, 1)
    assert [p.name for p in here.iterdir()] == ["a.npz"]


def test_what_lies_here_goes_first(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run, a file, or a folder that is neither: none is passed over for the package's model."""
    assert ddpm.load("digits").schedule.T == 1000
    shutil.copytree(trained, "digits")
    assert ddpm.load("digits").schedule.T == 20
    shutil.rmtree("digits")
    shutil.copy(trained / "checkpoints" / "00000030" / "ema.safetensors", "digits")
    assert ddpm.load("digits").schedule.T == 20
    Path("digits").unlink()
    Path("digits").mkdir()
    assert main(["sample", "digits"]) == 2
    assert "digits: not a run; want a run folder" in capsys.readouterr().err


def test_what_is_accepted_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is none, and a path that only ends in one."""
    for name in ("digit", "models/digits", "../digits"):
        assert main(["sample", name]) == 2
        err = capsys.readouterr().err
        near = "did you mean digits? "
        wanted = "want a run folder, a checkpoint folder or a .safetensors file; a model by name: "
        assert err.startswith(f"ddpm: {name}: no such file or folder; {near}{wanted}")
        assert err.endswith("digits; a diffusers folder; or hf:OWNER/NAME\n")


def folder(path: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in path.rglob("*")}


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "digits", "-n", "1", "--metrics", "ode", "--ode-steps", "2"],
        ["paper", "fig6", "--run", "digits", "-n", "1", "--steps", "2"],
        ["interpolate", "digits", "a.png", "a.png", "-n", "2", "--t", "2"],
    ],
)
def test_results_stay_out_of_the_package(words: list[str], here: Path) -> None:
    """They go to ./ddpm-digits; the name means the same model afterwards."""
    ddpm.files.images.save("a.png", np.zeros((8, 8, 1), np.uint8))
    before = folder(models.MODELS)
    assert main(words) == 0
    assert folder(models.MODELS) == before
    assert {p.name for p in here.iterdir()} <= {"a.png", "ddpm-digits", "interpolation.png"}
    assert opening.find(Path("digits")) == models.MODELS / "digits.safetensors"


def test_its_calibration_is_read_and_not_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A codec's files are read by it, wherever they are; who wants another one calibrates a copy."""
    assert ddpm.load("digits", variance="calibrated").schedule.T == 1000
    before = folder(models.MODELS)
    assert main(["calibrate", "digits", "-n", "1"]) == 2
    assert "calibrate a copy: `ddpm export digits --out FILE.safetensors`" in capsys.readouterr().err
    assert folder(models.MODELS) == before


# -- the models that ship ----------------------------------------------------------------------------------------------


def test_they_are_in_the_wheel(tmp_path: Path) -> None:
    """Weights, calibration, card and grid; the weights in bf16 and at most 1 MB."""
    hatchling = pytest.importorskip("hatchling.builders.wheel")
    wheel = next(hatchling.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    inside = {item.filename: item.file_size for item in zipfile.ZipFile(wheel).infolist()}
    for kind in ("safetensors", "calibration.json", "md", "png"):
        assert f"ddpm/models/digits.{kind}" in inside
        assert importlib.resources.files("ddpm").joinpath(f"models/digits.{kind}").is_file()
    assert inside["ddpm/models/digits.safetensors"] < 1_000_000
    assert sum(size for name, size in inside.items() if "models/" in name) < 1_100_000


def test_cards_are_of_their_files() -> None:
    """The hash, the size and the parameters that they state; and they are of the presets as they stand."""
    for file in models.MODELS.glob("*.safetensors"):
        found = opening.open_checkpoint(file)
        text = file.with_suffix(".md").read_text()
        assert isinstance(found.denoiser.network, torch.nn.Module)
        count = sum(p.numel() for p in found.denoiser.network.parameters())
        for fact in (
            file_sha256(file),
            f"{file.stat().st_size:,} bytes",
            f"{count:,} parameters",
            f"{found.step:,} steps",
        ):
            assert fact in text
        assert set(map(str, (v.dtype for v in load_file(file).values()))) == {"torch.bfloat16"}
        assert found.preset.shape == PRESETS[file.stem].shape
        assert found.preset.data == PRESETS[file.stem].data


def test_the_digits_are_as_good_as_they_were() -> None:
    """Held-out L_simple, which says soonest that weights and code have come apart: measured 0.2039."""
    held_out = data.load_pair("digits", (8, 8), 1)[1]
    with processes("cpu") as ranks:
        levels = held_out_by_level(ddpm.load("digits"), held_out, len(held_out), ranks, PRESETS["digits"])
    assert sum(levels) / len(levels) == pytest.approx(0.2039, abs=0.002)


MARKUP = [
    "a\n---\n<script>alert(1)</script>",
    "x | y",
    "[here](javascript:a)",
    "*b* _c_ `d` ~e~",
    "&lt;",
    "```\nrm -rf",
]


def test_names_of_other_peoples_files_are_no_markup(tmp_path: Path) -> None:
    """They are shown as they are: Markdown that is turned into HTML gives the names back, in one cell."""
    found = open_checkpoint("digits")
    names = tuple(MARKUP + list("6789"))
    preset = replace(found.preset, class_names=names, data="someone/<b>data</b>", image_column="a\n```\n<i>")
    path = tmp_path / "theirs.safetensors"
    interop.save(path, preset, found.denoiser.network.state_dict(), "")
    theirs = replace(open_checkpoint(path), step=5)
    exported = export.export(theirs, tmp_path / "out.safetensors")
    exported = replace(exported, preset=replace(exported.preset, data=preset.data))
    card = export.card(theirs, exported)
    front, body = card.split("---\n", 2)[1:]
    assert json.loads(front.split("datasets: ")[1].splitlines()[0]) == [preset.data]
    row = next(line for line in body.splitlines() if line.startswith("| classes |"))
    assert row.count("|") - row.count("\\|") == 3
    plain = html.unescape(re.sub(r"\\([\\`*\[\]|~_])", r"\1", row))
    assert ", ".join(MARKUP).replace("\n", "\\n") in plain
    for word in ("<script>", "<b>", "\n---\n<"):
        assert word not in body
    assert not re.search(r"(?<!\\)\[here|(?<!\\)\]\(javascript", body)
    shell = body.split("```sh\n")[2]
    assert shell.count("\n```") == 1  # the block is not closed by a name


def test_an_imported_model_has_no_training(tmp_path: Path) -> None:
    found = open_checkpoint("digits")
    path = tmp_path / "in.safetensors"
    interop.save(path, replace(found.preset, details=Details(norm_eps=1e-5)), found.denoiser.network.state_dict(), "")
    imported = open_checkpoint(path)
    card = export.card(imported, export.export(imported, tmp_path / "out.safetensors"))
    assert "| training | by another package |" in card
    assert "ddpm train" not in card
