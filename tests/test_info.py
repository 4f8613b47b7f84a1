"""`ddpm info`: what it says of runs and models is what the files hold and what the commands do."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import train
from PIL import Image

from ddpm.cli import main
from ddpm.files import checkpoints
from ddpm.presets import PRESETS, to_json


def info(model: str | Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["info", str(model), "--json"]) == 0
    about: dict[str, Any] = json.loads(capsys.readouterr().out)
    return about


def test_a_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = info(trained, capsys)
    assert about["settings"] == json.loads((trained / "config.json").read_text())
    assert [one["step"] for one in about["checkpoints"]] == [20, 30]
    states = [checkpoints.read_state(trained / "checkpoints" / f"{step:08d}") for step in (20, 30)]
    assert [one["held_out"] for one in about["checkpoints"]] == [state["held_out"] for state in states]
    lowest = min(states, key=lambda state: state["held_out"])["step"]
    assert [one["step"] for one in about["checkpoints"] if one["best"]] == [lowest]
    assert (about["step"], about["steps"], about["classes"]) == (30, 30, [])
    assert "297 images, test" in about["held_out"]
    assert about["ask"][f"ddpm compress {trained} IMAGE --out FILE"] == f"first: ddpm calibrate {trained}"
    assert main(["info", str(trained)]) == 0
    out = capsys.readouterr().out
    for line in (
        "image       8x8 grey",
        "num_timesteps           20",
        "checkpoint  20, held-out",
        "the commands that it takes",
    ):
        assert line in out


def test_what_it_says_of_each_command_is_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command without a note works as it stands; one that is not there, or has to wait, is refused."""
    assert train(tmp_path / "run", "--steps", 2, "--classes", "--label-dropout", 0) == 0
    asked = {name: info(name, capsys)["ask"] for name in ("digits", str(tmp_path / "run"))}
    picture = str(tmp_path / "a.png")
    assert (
        main(["sample", "digits", "-n", "1", "--class", "3", "--sampler", "ddim", "--steps", "2", "--out", picture])
        == 0
    )
    for name, ask in asked.items():
        sample = ["sample", name, "-n", "1", "--sampler", "ddim", "--steps", "2", "--out", str(tmp_path / "b.png")]
        calibrated = ask.get(f"ddpm sample {name} --variance calibrated") == ""
        assert main([*sample, "--variance", "calibrated"]) == (0 if calibrated else 2)
        guided = f"ddpm sample {name} --class NAME --guidance X" in ask
        assert main([*sample, "--class", "3", "--guidance", "2"]) == (0 if guided else 2)
        compresses = ask.get(f"ddpm compress {name} IMAGE --out FILE") == ""
        compress = ["compress", name, picture, "--out", str(tmp_path / "c"), "--chunk-bits", "8"]
        assert main(compress) == (0 if compresses else 2)
    assert f"ddpm train {tmp_path / 'run'}" in asked[str(tmp_path / "run")]
    assert not any(line.startswith("ddpm train") for line in asked["digits"])


@pytest.mark.parametrize(
    "options",
    [
        ["--schedule", "jsd", "--predict", "x0"], ["--predict", "mu"], ["--loss", "hybrid", "--variance", "learned"],
        ["--classes", "--label-dropout", 0], ["--pixel-type", "uint16"], ["--condition", "lowres:2"],
        ["--predict", "v", "--loss", "consistency"],
    ],
)  # fmt: skip
def test_commands_that_it_lists_are_not_refused(
    options: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that cannot be calibrated cannot compress, and one that has to be told its class is sampled with it."""
    (run := tmp_path / "run").parent.mkdir(exist_ok=True)
    assert train(run, *options, "--steps", 1) == 0
    ask = info(run, capsys)["ask"]
    picture = tmp_path / "a.png"
    deep, side = "uint16" in options, 4 if "--condition" in options else 8
    Image.fromarray(np.zeros((side, side), np.uint16 if deep else np.uint8)).save(picture)
    told = ["--input", str(picture)] if "--condition" in options else []
    line = f"ddpm sample {run}" + " --input FILE" * bool(told)
    assert (line in ask) == (main(["sample", str(run), "-n", "1", *told, "--out", f"{tmp_path}/b.png"]) == 0)
    assert (f"ddpm evaluate {run}" in ask) == (main(["evaluate", str(run), "-n", "2"]) == 0)
    edited = main(["edit", str(run), str(picture), "--out", f"{tmp_path}/c.png", "--steps", "2"]) == 0
    assert any(each.startswith(f"ddpm edit {run} IMAGE") and "--class" not in each for each in ask) == edited
    main(["calibrate", str(run), "-n", "4", "--codec", "2"])
    words = ["compress", str(run), str(picture), "--chunk-bits", "8", "--out", f"{tmp_path}/d"]
    assert (f"ddpm compress {run} IMAGE --out FILE" in ask) == (main(words) == 0)
    if "consistency" not in options:  # whose sampler has no variance
        words = ["sample", str(run), "-n", "1", *told, "--variance", "calibrated", "--out", f"{tmp_path}/e.png"]
        assert (f"{line} --variance calibrated" in ask) == (main(words) == 0)


def test_a_model_of_diffusers_is_imported_first(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What stands there can be typed, in that order."""
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(trained), "--to", "diffusers", "theirs"]) == 0
    about = info("theirs", capsys)
    assert about["settings"]["width"] == 32
    assert not {"flip", "dropout", "lr", "loss", "steps", "batch_size"} & about["settings"].keys()
    ask = about["ask"]
    wanted = "first: ddpm import theirs --out FILE.safetensors, and ddpm calibrate FILE.safetensors --data SOURCE"
    assert ask["ddpm compress theirs IMAGE --out FILE"] == wanted
    assert ask["ddpm import theirs --out FILE.safetensors"] == ""
    assert not any("export" in line for line in ask)
    assert main(["import", "theirs", "--out", "FILE.safetensors"]) == 0
    assert info("FILE.safetensors", capsys)["settings"] == about["settings"]
    assert main(["info", "FILE.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "num_timesteps " in out
    assert "flip" not in out
    assert "the training steps" not in out
    assert main("calibrate FILE.safetensors --data digits -n 2 --codec 2".split()) == 0
    assert info("FILE.safetensors", capsys)["ask"]["ddpm compress FILE.safetensors IMAGE --out FILE"] == ""


def test_a_model_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    about = info("digits", capsys)
    assert about["classes"] == list("0123456789")
    assert about["parameters"] == 285_793
    assert about["checkpoints"] == []
    assert about["settings"]["width"] == to_json(PRESETS["digits"])["width"]


def test_damage_is_said_and_a_run_without_checkpoints_is_shown(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of a preset's name is named as training takes it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "digits")
    with open("digits/checkpoints/00000030/ema.safetensors", "ab") as file:
        file.write(b"0")
    about = info("digits", capsys)
    assert [one["damage"] for one in about["checkpoints"]] == [None, "ema.safetensors is truncated or altered"]
    assert about["step"] == 20
    assert "ddpm train ./digits" in about["ask"]
    shutil.rmtree("digits/checkpoints")
    about = info("digits", capsys)
    assert (about["step"], about["checkpoints"], list(about["ask"])) == (0, [], ["ddpm train ./digits"])


@pytest.mark.parametrize("name", ["nothing", "digist"])
def test_what_is_no_model_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", name]) == 2
    assert capsys.readouterr().err.startswith(f"ddpm: {name}: no such file or folder; ")
