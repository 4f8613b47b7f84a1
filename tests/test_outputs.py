"""Where results go: folders that are resumed, links, pipes and devices, names that are not Unicode, huge numbers."""

import json
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import train
from PIL import Image
from several import start_python

import ddpm
from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files import atomic, images
from ddpm.files.opening import open_checkpoint
from ddpm.run import export
from ddpm.run.processes import Processes
from ddpm.run.sample import Sampling, sample
from ddpm.run.stream import RECORD, write_samples

ALONE = Processes(0, 1, torch.device("cpu"))
QUICK = ["--steps", "2", "--sampler", "unipc"]

# -- folders of samples ------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".png"}


def test_a_folder_of_samples_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, only what is missing is made, and the result is that of a command that was not stopped."""
    command = ["sample", "digits", "-n", "7", *QUICK, "--batch-size", "2", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        saved, save = [], images.save

        def stop_at_the_fourth(path: Path, pixels: Any) -> None:
            if len(saved) == 3:
                raise KeyboardInterrupt
            saved.append(path.name)
            save(path, pixels)

        patch.setattr(images, "save", stop_at_the_fourth)
        assert main([*command, str(tmp_path / "stopped")]) == 130
    assert saved == ["000000.png", "000001.png", "000002.png"]
    inodes = {name: (tmp_path / "stopped" / name).stat().st_ino for name in saved}
    assert main([*command, str(tmp_path / "stopped")]) == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert {name: (tmp_path / "stopped" / name).stat().st_ino for name in saved} == inodes


def test_a_folder_of_samples_grows(tmp_path: Path) -> None:
    for n in (2, 5, 5):
        assert main(["sample", "digits", "-n", str(n), *QUICK, "--out", str(tmp_path / "a")]) == 0
        assert json.loads((tmp_path / "a" / RECORD).read_text())["count"] == n
    assert main(["sample", "digits", "-n", "5", *QUICK, "--out", str(tmp_path / "b")]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_other_samples_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "digits", "-n", "3", *QUICK, "--out", str(tmp_path / "a")]
    assert main(command) == 0
    before = contents(tmp_path / "a")
    for words, reason in (
        (["--seed", "3"], "holds samples with seed 0, and these have 3"),
        (["--class", "7"], "holds samples with "),
        (["--clip", "none"], "holds samples with clip None, and these have False"),
        (["--sampler", "ddim"], "holds samples with sampler 'unipc', and these have 'ddim'"),
        (["-n", "2"], "holds 3 samples; want n of at least that"),
    ):
        capsys.readouterr()
        assert main([*command, *words]) == 2
        assert reason in capsys.readouterr().err
        assert contents(tmp_path / "a") == before


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"count": 3}', "[" * 100_000, '{"count": "x", "seed": 0}'])
def test_a_damaged_record_is_refused(record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RECORD).write_text(record)
    assert main(["sample", "digits", "-n", "3", *QUICK, "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == [RECORD]


def test_a_folder_holds_the_images_that_python_gets(tmp_path: Path) -> None:
    checkpoint, sampling = open_checkpoint("digits"), Sampling("ddim", 3, seed=5, batch_size=2)
    pixels, about = sample(checkpoint, 3, ALONE, sampling)
    assert write_samples(checkpoint, 3, ALONE, tmp_path / "a", sampling) == (about, 3)
    saved = [np.asarray(Image.open(tmp_path / "a" / f"{i:06d}.png")) for i in (5, 6, 7)]
    assert np.array_equal(np.stack(saved), pixels[:, 0].numpy())


@pytest.mark.parametrize("n", [10**11, 2**70])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.png", "and may take 600 MB; want at most 519,031, or a folder"),
        ("a.npz", "are free in "),
        ("a.npy", "are free in "),
        ("a.tar", "are free in "),
        ("a/", "are free in "),
    ],
)
def test_more_images_than_there_is_room_for_are_refused(
    name: str, reason: str, n: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At once, and in one line."""
    assert main(["sample", "digits", "-n", str(n), *QUICK, "--out", f"{tmp_path}/{name}"]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.npz", "a.tar", "a/"])
def test_a_sampler_that_refuses_the_model_leaves_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does so when it begins. Then the record of its settings would refuse the right ones."""
    assert train(tmp_path / "run", "--schedule", "jsd", "--predict", "x0", "--steps", 1) == 0
    before = set(tmp_path.iterdir())
    words = ["sample", str(tmp_path / "run"), "-n", "2", "--steps", "3", "--out", f"{tmp_path}/{name}"]
    assert main([*words, "--sampler", "dpmpp_2m", "--spacing", "uniform"]) == 2
    assert "the schedule ends at alpha_bar 0" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before
    assert main([*words, "--sampler", "ddim"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say how much memory there is")
def test_more_pages_than_memory_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tifffile")
    assert main(["sample", "digits", "-n", str(10**12), *QUICK, "--out", str(tmp_path / "a.tif")]) == 2
    assert "do not fit in this machine's memory; want fewer, or a folder" in capsys.readouterr().err


# -- links, pipes and devices ------------------------------------------------------------------------------------------


def received(path: Path, act: Any) -> bytes:
    """What comes through a named pipe while `act` runs."""
    end = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        act()
        return os.read(end, 1 << 20)
    finally:
        os.close(end)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_is_written_into_and_stays(link: bool, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    out = tmp_path / "link.png" if link else pipe
    if link:
        out.symlink_to(pipe)
    got = received(pipe, lambda: main(["sample", "digits", "-n", "1", *QUICK, "--out", str(out)]))
    assert main(["sample", "digits", "-n", "1", *QUICK, "--out", str(tmp_path / "plain.png")]) == 0
    assert got == (tmp_path / "plain.png").read_bytes()
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert out.is_symlink() == link
    assert len(list(tmp_path.iterdir())) == 2 + link


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_goes_through_standard_output_is_the_file_alone(tmp_path: Path) -> None:
    """The line about the file goes to standard error then."""
    images.save(tmp_path / "a.png", np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4)
    words = ["compress", "digits", str(tmp_path / "a.png"), "--chunk-bits", "8", "--out"]
    pipe, err = tmp_path / "pipe", tmp_path / "err.txt"
    os.mkfifo(pipe)
    piped = received(pipe, lambda: start_python(["-m", "ddpm", *words, "/dev/stdout"], tmp_path, pipe, err).join())
    assert main([*words, str(tmp_path / "a.ddpm")]) == 0
    assert piped == (tmp_path / "a.ddpm").read_bytes()
    assert "bytes" in err.read_text()


def test_a_device_is_written_into_and_stays() -> None:
    before = os.stat(os.devnull)
    atomic.write(os.devnull, b"nothing")
    assert os.stat(os.devnull).st_rdev == before.st_rdev
    assert os.stat(os.devnull).st_ino == before.st_ino


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_goes_on_pointing_where_it_points(exists: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere" / "a.txt", tmp_path / "link.txt"
    if exists:
        target.parent.mkdir()
        target.write_text("before")
    link.symlink_to(target)
    atomic.write(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert [p.name for p in target.parent.iterdir()] == ["a.txt"]


def test_a_link_to_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "big" / "disk")
    assert train(tmp_path / "link", "--steps", 1) == 0
    assert (tmp_path / "big" / "disk" / "config.json").is_file()
    (tmp_path / "samples").symlink_to(tmp_path / "big" / "samples")
    assert main(["sample", "digits", "-n", "2", *QUICK, "--out", str(tmp_path / "samples")]) == 0
    assert len(contents(tmp_path / "big" / "samples")) == 2


def test_links_that_go_round_and_very_deep_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    measure = ["evaluate", "digits", "--metrics", "ode", "-n", "1", "--ode-steps", "2", "--out"]
    assert main([*measure, str(tmp_path / "loop")]) == 1
    assert "too many levels of symbolic links" in capsys.readouterr().err.splitlines()[-1]
    deep = tmp_path / "/".join("a" * 1500)
    try:
        assert atomic.make_folder(deep).is_dir()
    finally:  # nothing else can: shutil.rmtree fails, too
        while deep != tmp_path:
            deep.rmdir()
            deep = deep.parent


# -- names that are not Unicode ----------------------------------------------------------------------------------------


def test_a_text_with_a_name_that_is_no_unicode_is_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"k\xe4tze")
    atomic.write(tmp_path / "a", f"# {name}\n")
    assert (tmp_path / "a").read_bytes() == b"# k\\udce4tze\n"
    atomic.write_csv(tmp_path / "b", ["a"], [[name]])
    atomic.write_json(tmp_path / "c", {"a": name})
    assert json.loads((tmp_path / "c").read_text()) == {"a": name}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_run_with_a_class_that_is_no_unicode_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SAMPLES", 4)
    for name in (b"k\xe4tze", b"hund"):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/data/" + name))
        folder.mkdir(parents=True)
        for i in range(6):
            images.save(folder / f"{i}.png", np.full((8, 8, 1), 40 * i, np.uint8))
    assert train(tmp_path / "run", "--data", tmp_path / "data", "--classes", "--steps", 1, "--label-dropout", 0.5) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "e" / "m.safetensors")]) == 0
    assert {"m.md", "m.safetensors"} <= {p.name for p in (tmp_path / "e").iterdir()}
    assert main(["report", str(tmp_path / "run")]) == 0


# -- inversion ---------------------------------------------------------------------------------------------------------


def test_inversion_is_exact_whatever_the_precision(tmp_path: Path) -> None:
    """A picture that the model does not know, noise, comes back to the grey level also if bf16 is asked for."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    out = tmp_path / "b.png"
    command = ["edit", "digits", str(tmp_path / "a.png"), "--t", "500", "--invert", "8", "--precision", "bf16"]
    assert main([*command, "--out", str(out)]) == 0
    assert abs(np.asarray(Image.open(out)).astype(int) - picture).max() <= 1


def test_inversion_keeps_its_best_iterate() -> None:
    """An iteration that drifts away after its best step: each image gets the iterate of its smallest change."""
    from ddpm import editing, schedule
    from ddpm.denoiser import Denoiser

    calls = []

    def network(x: torch.Tensor, timestep: torch.Tensor, y: object) -> torch.Tensor:
        calls.append(0)
        return 0.3 * x if len(calls) < 9 else 0.3 * x + len(calls)  # from the ninth call on it is disturbed

    x0 = torch.full((2, 1, 4, 4), 0.7)
    results = []
    for iterations in (8, 20):
        calls.clear()
        denoiser = Denoiser(network, schedule.linear(), clip=False)
        *_, step = editing.invert(denoiser, x0, steps=[500], t=500, iterations=iterations)
        results.append(step.x)
    assert torch.equal(*results)


# -- models that were never without a label ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that never hid a label."""
    out = tmp_path_factory.mktemp("labelled") / "run"
    assert train(out, "--classes", "--label-dropout", 0, "--steps", 30, "--lr", 0.01) == 0
    return out


@pytest.mark.parametrize(
    "words",
    [
        "sample RUN -n 2",
        "evaluate RUN --metrics fid -n 4",
        "edit RUN IMAGE",
        "edit RUN IMAGE --invert 2 --class 3",
        "interpolate RUN IMAGE IMAGE -n 2",
        "inpaint RUN IMAGE MASK",
        "restore RUN IMAGE --operator blur:1",
        "compress RUN IMAGE --out OUT.ddpm",
        "paper fig6 --run RUN",
    ],
)
def test_a_command_asks_for_the_class(
    words: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images.save(tmp_path / "image.png", np.zeros((8, 8, 1), np.uint8))
    images.save(tmp_path / "mask.png", np.full((8, 8, 1), 255, np.uint8))
    places = {"RUN": str(labelled), "IMAGE": "image.png", "MASK": "mask.png", "OUT.ddpm": "o.ddpm"}
    assert main([places.get(word, word) for word in words.split()]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "never saw an image without its label" in err


def test_python_is_told_too(labelled: Path) -> None:
    model = ddpm.load(labelled)
    x, t = torch.zeros(1, 1, 8, 8), torch.tensor([5])
    with pytest.raises(InputError, match="never saw an image without its label"):
        model(x, t)
    assert model(x, t, torch.tensor([3])).x0.isfinite().all()


def test_likelihoods_are_given_the_labels_of_the_images(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They equal the bound of each image with its label, which other labels make larger."""
    from ddpm import likelihood
    from ddpm.files import data
    from ddpm.run import evaluate
    from ddpm.run.parts import image_noise

    checkpoint, held_out = open_checkpoint(labelled), data.load("digits", (8, 8), 1, split="test")
    result = evaluate.nll(checkpoint, held_out, tmp_path, tmp_path / "cache", ALONE, 6, progress=False)
    indices = evaluate.subset(held_out, 6)
    x0 = ddpm.pixels.to_signal(held_out.batch(indices))
    assert held_out.labels is not None
    y, draws = held_out.labels[indices], image_noise(0, indices, 0, evaluate._NLL, (1, 8, 8))
    right, wrong = (
        likelihood.vlb(checkpoint.denoiser, x0, draws, labels).bits_per_dim() for labels in (y, (y + 5) % 10)
    )
    assert result["bits_per_dim"] == pytest.approx(float(right.mean()), rel=1e-9)
    assert result["bits_per_dim"] != pytest.approx(float(wrong.mean()), rel=1e-6)
    measure = ["evaluate", str(labelled), "-n", "4", "--metrics", "nll", "ode", "--ode-steps", "5"]
    assert main([*measure, "--out", str(tmp_path / "e")]) == 0
    bound = json.loads((tmp_path / "e" / "nll.json").read_text())
    out = capsys.readouterr().out
    figure = rf"{bound['bits_per_dim']:.4f} ± {bound['standard_error']:.4f}"
    assert re.search(rf"^  bits/dim, bound \(Eq\. 5\), fixed_large  +{figure}  +4 images, ", out, re.M)
    assert "bits/dim, ODE" in out
    assert "{" not in out
    assert json.loads((tmp_path / "e" / "nll.json").read_text())["labels"] == "of the images"
    assert main(["calibrate", str(labelled), "-n", "8", "--codec", "2"]) == 0


def test_images_without_labels_have_no_likelihood_there(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        images.save(tmp_path / "data" / f"{i}.png", np.full((8, 8, 1), 40 * i, np.uint8))
    command = ["evaluate", str(labelled), "--data", str(tmp_path / "data"), "--split", "train", "--out"]
    assert main([*command, str(tmp_path / "e")]) == 2
    assert "want labelled images" in capsys.readouterr().err
