"""The command line: help without torch, and a user's mistakes, each of which is one helpful line and exit code 2."""

import argparse
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, steps, tensors, train
from PIL import Image

import ddpm
from ddpm.cli import main
from ddpm.cli.main import parser
from ddpm.errors import InputError
from ddpm.files import data, images, opening
from ddpm.presets import PRESETS

COMMANDS: dict[str, argparse.ArgumentParser] = next(
    a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction)
)


def test_help_does_not_wait_for_torch() -> None:
    """None of the heavy packages is imported for it, which is what makes it quick."""
    program = (
        "import sys\nfrom ddpm.cli import main\nfor line in sys.argv[1:]:\n    try:\n        main(line.split())\n"
        "    except SystemExit as end:\n        assert end.code == 0\n    else:\n        raise AssertionError(line)\n"
        "heavy = {'torch', 'numpy', 'PIL', 'datasets', 'sklearn', 'tqdm'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    lines = ["--help", "train --help", "paper --help", "--version"]
    done = subprocess.run([sys.executable, "-c", program, *lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in ("ddpm COMMAND", "ddpm train", "ddpm paper", ddpm.__version__))


def test_help_names_every_setting_and_preset(capsys: pytest.CaptureFixture[str]) -> None:
    """Each field of a preset is an option with a line on what it means."""
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')} " in text or f"--{name.replace('_', '-')}," in text for name in FIELDS)
    assert all(name in text.replace("\n", " ") for name in PRESETS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_named_groups_and_an_example_that_parses(name: str) -> None:
    """Every option is in a group with a name, each line has words, and the parser knows all words of the example."""
    command = COMMANDS[name]
    for group in command._action_groups:
        assert not (group.title == "options" and group._group_actions)
        assert all(action.help for action in group._group_actions)
    assert {"--help", "-h"} <= command._option_string_actions.keys()
    title, *lines = (command.epilog or "").splitlines()
    assert title == "example:"
    for line in lines:
        program, *words = shlex.split(line)
        args, unknown = parser().parse_known_args(words)
        assert (program, unknown) == ("ddpm", [])
    assert args.command == name


# The dataset says the names of classes, and an imported model the details of its network.
FIELDS = [name for name in ddpm.Preset.__dataclass_fields__ if name not in ("class_names", "details")]


def grey(path: Path, count: int = 4) -> None:
    for i in range(count):
        images.save(path / f"{i}.png", np.full((8, 8, 1), 10 * i, np.uint8))


def broken(content: bytes) -> Callable[[Path], None]:
    def make(here: Path) -> None:
        grey(here / "pictures")
        (here / "pictures" / "2.png").write_bytes(content)

    return make


def mixed(here: Path) -> None:
    grey(here / "pictures")
    images.save(here / "pictures" / "2.png", np.full((8, 8, 3), (255, 0, 0), np.uint8))


def nothing(here: Path) -> None:
    pass


ON_PICTURES = "train digits --data pictures"
MISTAKES: list[tuple[str, Callable[[Path], None], list[str]]] = [
    # the command and its options
    ("", nothing, ["no command", "train", "sample"]),
    ("trian digits", nothing, ["'trian'", "did you mean train?"]),
    ("--verison", nothing, ["--verison", "did you mean --version?"]),
    ("train", nothing, ["PRESET", "cifar10"]),
    ("train cifra10", nothing, ["'cifra10'", "did you mean cifar10?", "lsun_church"]),
    ("train digits --stpes 5", nothing, ["--stpes", "did you mean --steps?"]),
    ("train digits --colour red", nothing, ["--colour", "ddpm train --help"]),
    ("train digits cifar10", nothing, ["cifar10", "ddpm train --help"]),
    ("train digits --steps", nothing, ["--steps"]),
    ("train digits --steps ten", nothing, ["--steps", "'ten'", "a whole number"]),
    ("train digits --lr fast", nothing, ["--lr", "'fast'", "a number"]),
    ("train digits --channel-multipliers 1,two", nothing, ["--channel-multipliers", "'1,two'", "whole numbers"]),
    # settings
    ("train digits --steps -5", nothing, ["steps -5", "at least 1"]),
    ("train digits --batch-size 0", nothing, ["--batch-size 0", "at least 1"]),
    ("train digits --lr nan", nothing, ["lr nan", "a finite number"]),
    ("train digits --ema-decay 1 --no-ema-warmup", nothing, ["--ema-decay 1.0", "0 to 0.999999"]),
    ("train digits --seed 9223372036854775808", nothing, ["seed 9223372036854775808", "at most 9223372036854775807"]),
    ("train digits --dropout 1.5", nothing, ["dropout 1.5", "0 to 0.99"]),
    ("train digits --width 100", nothing, ["width 100", "multiple of 32"]),
    ("train digits --size 9", nothing, ["size 9x9", "8 and 10"]),
    ("train digits --size 3x4x5", nothing, ["size (3, 4, 5)", "32x48"]),
    ("train digits --channels 2", nothing, ["[8, 8, 1]", "want channels 1"]),
    ("train digits --predict epsilon", nothing, ["predict 'epsilon'", "eps, x0, mu, v"]),
    ("train digits --schedule cosin", nothing, ["schedule 'cosin'", "did you mean cosine?"]),
    ("train digits --loss simpel", nothing, ["loss 'simpel'", "did you mean simple?"]),
    ("train digits --variance learned", nothing, ["variance learned", "loss hybrid or vlb"]),
    ("train digits --batch-size 8 --accumulate 3", nothing, ["accumulate 3", "batch_size 8"]),
    ("train digits --patch 4", nothing, ["patch 4", "1, 2"]),
    ("train digits --size 10 --patch 2", nothing, ["size 10x10", "8 and 12"]),
    ("train digits --weighting p2 --predict mu", nothing, ["weighting p2", "eps, x0 or v"]),
    (
        "train digits --timestep-sampling bound --predict mu",
        nothing,
        ["--timestep-sampling bound", "uniform or stratified for mu"],
    ),
    ("train digits --weighting p2 --loss vlb", nothing, ["weighting p2", "loss simple"]),
    ("train digits --noise-assignment nearest --loss vlb", nothing, ["--noise-assignment nearest", "want loss simple"]),
    (
        "train digits --noise-assignment nearest --loss hybrid --variance learned",
        nothing,
        ["--noise-assignment nearest", "want loss simple"],
    ),
    ("train digits --cooldown 2", nothing, ["cooldown 2.0", "0 to 1"]),
    ("train digits --num-timesteps 10", nothing, ["--sample-steps 50", "at most num_timesteps, 10"]),
    ("train digits --device gpu", nothing, ["device 'gpu'", "auto, cpu, cuda"]),
    # data
    ("train lsun_cat", nothing, ["--data", "a SOURCE of images"]),
    ("train digits --data ./pictures", nothing, ["./pictures", "no such file or folder", "a folder of images"]),
    ("train digits --data digit", nothing, ["digit", "did you mean digits?"]),
    (ON_PICTURES, lambda here: (here / "pictures").mkdir(), ["pictures", "no images"]),
    (ON_PICTURES, broken(b"These are words."), ["2.png", "not an image"]),
    (ON_PICTURES, broken(b""), ["2.png", "empty file"]),
    (ON_PICTURES, mixed, ["2.png", "RGB", "most images are grey"]),
    (ON_PICTURES, lambda here: grey(here / "pictures", 1), ["pictures", "at least 2"]),
    (f"{ON_PICTURES} --image-column img", lambda here: grey(here / "pictures"), ["--image-column img", "no columns"]),
    ("train digits --label-column digit", nothing, ["--label-column digit", "digits", "no columns"]),
    (
        "train digits --data notes.txt",
        lambda here: write(here / "notes.txt"),
        ["notes.txt", ".parquet file", "a .zip"],
    ),
    # the run's folder
    ("train pictures", lambda here: grey(here / "pictures"), ["pictures: not a run", "a preset, cifar10"]),
    ("train ./digits", nothing, ["preset './digits'", "did you mean digits?"]),
    ("train RUN --width 64", nothing, ["--width 64", "has 32"]),
    ("train digits --out notes.txt", lambda here: write(here / "notes.txt"), ["out notes.txt", "a new folder"]),
    ("train digits --out pictures", lambda here: grey(here / "pictures"), ["out pictures", "not a run"]),
    ("train digits --out notes.txt/run", lambda here: write(here / "notes.txt"), ["out notes.txt/run", "directory"]),
    # sampling
    ("sample", nothing, ["MODEL", "a run folder"]),
    ("sample runs/none", nothing, ["runs/none", "no such file or folder", "a run folder"]),
    ("sample pictures", lambda here: grey(here / "pictures"), ["pictures", "not a run", "a run folder"]),
    ("sample notes.txt", lambda here: write(here / "notes.txt"), ["notes.txt", "safetensors"]),
    ("sample RUN -n 0", nothing, ["-n 0", "at least 1"]),
    ("sample RUN -n many", nothing, ["-n", "'many'", "a whole number"]),
    ("sample RUN --steps 21", nothing, ["--steps 21", "1 to 20"]),
    ("sample RUN --steps 0", nothing, ["--steps 0", "1 to 20"]),
    ("sample RUN --seed -1", nothing, ["--seed -1", "at least 0"]),
    ("sample RUN --sampler ddim --eta 2", nothing, ["--eta 2", "0 to 1"]),
    ("sample RUN --eta 0.5", nothing, ["--eta 0.5", "--sampler ddim"]),
    ("sample digist", nothing, ["digist", "did you mean digits?", "a run folder"]),
    ("sample digits --class all --spacing karas", nothing, ["--spacing 'karas'", "did you mean karras?"]),
    ("paper tabel1 --run RUN", nothing, ["'tabel1'", "did you mean table1?"]),
    ("sample RUN --sampler euler", nothing, ["--sampler 'euler'", "ancestral, ddim"]),
    ("sample RUN --weights best", nothing, ["--weights 'best'", "ema, raw"]),
    ("sample RUN --checkpoint newest", nothing, ["checkpoint 'newest'", "last, best or a step"]),
    ("sample RUN --checkpoint ²", nothing, ["checkpoint '²'", "last, best or a step"]),
    ("sample RUN --checkpoint 7", nothing, ["checkpoint 7", "20, 30"]),
    ("sample RUN/checkpoints/00000020 --checkpoint 7", nothing, ["checkpoint '7'", "one checkpoint already"]),
    ("sample RUN --precision fp16", nothing, ["--precision 'fp16'", "bf16"]),
    ("sample RUN --out samples.jpg", nothing, ["samples.jpg", ".tif, FILE.gif, .webp or .mp4"]),
    ("sample RUN --out pictures", lambda here: grey(here / "pictures"), ["pictures", "not empty"]),
    ("sample RUN --out notes.txt/a.png", lambda here: write(here / "notes.txt"), ["notes.txt/a.png", "cannot write"]),
    ("sample RUN --progressive --out a.npz", nothing, ["a.npz", "--progressive", "want NAME.png"]),
]
if not torch.cuda.is_available():
    MISTAKES.append(("train digits --device cuda", nothing, ["device 'cuda'", "auto or cpu"]))


def write(path: Path) -> None:
    path.write_text("These are words.")


@pytest.mark.parametrize(("command", "prepare", "words"), MISTAKES, ids=[command or "-" for command, *_ in MISTAKES])
def test_a_mistake_is_one_helpful_line(
    command: str,
    prepare: Callable[[Path], None],
    words: list[str],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2; one line on stderr that names the value and what would do; and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    before = {p: p.stat().st_size for p in [*tmp_path.rglob("*"), *trained.rglob("*")]}
    assert main([re.sub("^RUN", str(trained), word) for word in command.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("ddpm: ")
    assert all(word in err for word in words), err
    assert {p: p.stat().st_size for p in [*tmp_path.rglob("*"), *trained.rglob("*")]} == before


def test_a_run_with_other_settings_is_one_line_too(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The preset's own network is not that of the run."""
    assert main(["train", "digits", "--out", str(trained)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"the run in {trained} has" in err


def test_a_run_goes_on_with_its_own_settings(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its folder stands for all of its options. A preset's name wins over a folder of that name; ./NAME is the run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "digits")
    assert main(["train", "./digits", "--steps", "33"]) == 0
    assert json.loads(Path("digits/config.json").read_text()) == {
        **json.loads((trained / "config.json").read_text()),
        "steps": 33,
    }
    again = tmp_path / "again"
    assert train(again, "--steps", 33, "--save-every", 10, "--sample-every", 30) == 0
    assert_same(tensors(again, 33), tensors(Path("digits"), 33))
    assert main(["train", "again", "--out", "other", "--steps", "1"]) == 0  # a new run with the same settings
    assert steps(Path("other")) == [1]
    assert steps(again)[-1] == 33
    capsys.readouterr()
    assert main(["train", "digits", "--steps", "0"]) == 2
    assert not Path("runs").exists()


def test_a_mistyped_run_is_found(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside what was typed, in whatever folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs/My-Flowers")
    (tmp_path / "runs/my-flowery").mkdir()  # not a run
    for typed, wanted in (
        ("runs/my-flowesr", "runs/My-Flowers"),
        (f"{tmp_path}/runs/flowers", f"{tmp_path}/runs/My-Flowers"),
    ):
        assert main(["sample", typed]) == 2
        assert f"{typed}: no such file or folder; did you mean {wanted}? want a run folder" in capsys.readouterr().err


def test_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of models/ too, where a checkout is installed. Their results do not go into it."""
    monkeypatch.chdir(tmp_path)
    for file in opening.CHECKOUT.glob("*.safetensors"):
        by_name, by_path = opening.open_checkpoint(file.stem), opening.open_checkpoint(file)
        assert by_name.path == by_path.path == file
        assert by_name.home == Path(f"ddpm-{file.stem}")
    assert opening.open_checkpoint("digits").home == Path("ddpm-digits")
    (tmp_path / "digits").mkdir()
    with pytest.raises(InputError, match="digits: not a run"):
        opening.open_checkpoint("digits")


def test_a_config_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One written by hand, or by another version of the program."""
    wrong = {"{": "cannot be read", "[]": "cannot be read", '{"colour": 3}': "config colour: no such setting"}
    for text, words in wrong.items():
        (tmp_path / "config.json").write_text(text)
        assert train(tmp_path, "--steps", 2) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert words in err
        assert "want another out" in err


def raises(error: Exception) -> Callable[..., None]:
    def fault(*_: object, **__: object) -> None:
        raise error

    return fault


@pytest.mark.parametrize("fault", [ZeroDivisionError(), RuntimeError("shapes differ")])
def test_our_own_faults_keep_their_traceback(fault: Exception, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is no mistake of the user's is not dressed up as one."""
    monkeypatch.setattr("ddpm.run.sample.generate", raises(fault))
    with pytest.raises(type(fault)):
        main(["sample", str(trained), "-n", "1"])


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        MemoryError(),
    ],
)
def test_a_memory_that_is_full_is_one_line(
    fault: Exception, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a GPU or of the machine: exit code 1, and what takes less."""
    monkeypatch.setattr("ddpm.run.sample.generate", raises(fault))
    assert main(["sample", str(trained), "-n", "1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("ddpm: the memory is full; use a smaller --batch-size")
    assert err.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder in which nothing can be made")
def test_a_place_where_nothing_can_be_made_is_one_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(trained), "-n", "1", "--steps", "1", "--out", "/proc/x.png"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("ddpm: no such file or directory (/proc/x.png)")


def test_an_empty_out_is_a_mistake(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a shell variable that is not set makes it."""
    assert main(["sample", str(trained), "--out", ""]) == 2
    assert (
        capsys.readouterr().err
        == "ddpm: --out '': want a name that ends in .png, .npz, .npy, .tar or .tif, or a folder\n"
    )


def test_what_the_system_refuses_is_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that was mounted for reading, seen only when the picture is written: exit code 1, the file, why."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a.png")

    monkeypatch.setattr("ddpm.files.atomic.write", refuse)
    assert main(["sample", str(trained), "-n", "1", "--out", str(tmp_path / "a.png")]) == 1
    assert capsys.readouterr().err == "ddpm: read-only file system (a.png)\n"


def test_what_was_done_as_json(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps are those that were taken, also where none were asked for."""
    assert main(["sample", str(trained), "-n", "1", "--out", str(tmp_path / "a.png"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["steps"], about["step"], about["count"]) == (20, 30, 1)


def test_ctrl_c_while_torch_loads() -> None:
    """One line and 130, whatever numpy is in the middle of."""
    program = (
        "import os, signal\nfrom ddpm.cli.options import importing\nwith importing():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    import torch\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stderr) == (130, "ddpm: interrupted\n")


def test_every_kind_of_option_reaches_the_run(tmp_path: Path) -> None:
    """A flag, a number, a list, a choice and a size, with a space or with =; what is not given is the preset's."""
    given = [
        "--lr=3e-3",
        "--channel-multipliers",
        "1,1",
        "--schedule=cosine",
        "--size",
        "8x16",
        "--no-clip",
        "--steps=1",
    ]
    assert main([*TINY, *given, "--out", str(tmp_path / "run")]) == 0
    from ddpm.files.opening import open_checkpoint

    found = open_checkpoint(tmp_path / "run").preset
    assert (found.lr, found.channel_multipliers, found.schedule) == (3e-3, (1, 1), "cosine")
    assert (found.size, found.clip) == ((8, 16), False)
    assert found.beta_T == PRESETS["digits"].beta_T


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two held-out digits, a mask of the right half, and one of another shape."""
    held_out = data.load("digits", (8, 8), 1, split="test").batch([0, 1]).permute(0, 2, 3, 1).numpy()
    for name, picture in zip("ab", held_out, strict=True):
        images.save(tmp_path / f"{name}.png", picture)
    mask = np.zeros((8, 8, 1), np.uint8)
    mask[:, 4:] = 255
    images.save(tmp_path / "mask.png", mask)
    return tmp_path


def test_interpolate(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At t = 0 the ends are the images and between them are their mixtures; higher, the same seed is the same."""
    words = ["interpolate", str(trained), str(pictures / "a.png"), str(pictures / "b.png"), "-n", "3"]

    def made(name: str, *more: str) -> Any:
        assert main([*words, "--out", str(pictures / name), *more]) == 0
        return np.load(pictures / name)["arr_0"]

    a, b = (np.asarray(Image.open(pictures / f"{name}.png"))[..., None] for name in "ab")
    plain = made("0.npz", "--t", "0")
    assert (plain[0] == a).all()
    assert (plain[2] == b).all()
    assert np.abs(plain[1] - (a / 2 + b / 2)).max() <= 1
    assert (made("1.npz", "--t", "15") == made("2.npz", "--t", "15")).all()
    assert (made("1.npz", "--t", "15") != made("3.npz", "--t", "15", "--seed", "1")).any()
    assert main([*words, "--out", str(pictures / "row.png")]) == 0
    assert Image.open(pictures / "row.png").size == (3 * 34 + 2, 36)
    assert main([*words, "--t", "21", "--out", str(pictures / "x.png")]) == 2
    assert capsys.readouterr().err.endswith("ddpm: --t 21: want 0 to 20\n")
    assert not (pictures / "x.png").exists()


def test_edit(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At t = 0 the image itself; higher, versions by seed; inverted, the image again, nearly."""
    words = ["edit", str(trained), str(pictures / "a.png"), "--out", str(pictures / "out.npz")]
    a = np.asarray(Image.open(pictures / "a.png"))[..., None]

    def made(*more: str) -> Any:
        assert main([*words, *more]) == 0
        return np.load(pictures / "out.npz")["arr_0"].astype(int)

    assert (made("--t", "0", "-n", "2") == a).all()
    three = made("--t", "15", "-n", "3", "--sampler", "unipc", "--steps", "5")
    assert np.abs(three[2] - made("--t", "15", "--seed", "2", "--sampler", "unipc", "--steps", "5")[0]).max() <= 1
    assert (three[0] != three[1]).any()
    assert np.abs(made("--t", "8", "--steps", "8", "--invert", "30")[0] - a).max() <= 1
    for more, reason in (
        (["--t", "21"], "t 21: want 0 to 20"),
        (["--invert", "2", "--sampler", "ancestral"], "draws noise, which an inversion cannot use; want ddim"),
        (["--invert", "-1"], "--invert -1: want a whole number of at least 0"),
        (["--class", "seven"], "was not trained with classes"),
    ):
        assert main([*words, *more]) == 2
        assert reason in capsys.readouterr().err


def test_inpaint(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is kept is the image's own, to the bit; what is made depends on the seed."""
    words = ["inpaint", str(trained), str(pictures / "a.png"), str(pictures / "mask.png"), "--resample", "2", "-n", "3"]
    assert main([*words, "--out", str(pictures / "out.npz")]) == 0
    found = np.load(pictures / "out.npz")["arr_0"]
    a = np.asarray(Image.open(pictures / "a.png"))[..., None]
    assert (found[:, :, :4] == a[:, :4]).all()
    assert (found[0, :, 4:] != found[1, :, 4:]).any()
    assert main([*words, "--out", str(pictures / "one.npz"), "-n", "1", "--seed", "2"]) == 0
    apart = np.abs(np.load(pictures / "one.npz")["arr_0"][0].astype(int) - found[2])
    assert apart.max() <= 1
    assert main([*words, "--jump", "20", "--out", str(pictures / "x.png")]) == 2
    assert "jump 20: want 1 to 19" in capsys.readouterr().err
    assert main([*words, "--steps", "1", "--out", str(pictures / "y.npz")]) == 0


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (np.zeros((8, 8, 1)), "grey levels 0; want 255 (white)"),
        (np.eye(8)[..., None], "grey levels 0, 1; want 255 (white)"),
        (np.full((8, 8, 1), 128), "grey levels 128; want 255 (white)"),
        (np.full((4, 8, 1), 255), "4x8 (height x width); want a mask of the image's size, 8x8"),
    ],
)
def test_a_mask_that_says_nothing_is_refused(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str], mask: Any, reason: str
) -> None:
    """Black, in 0 and 1, grey, or of another size: they would leave the image as it is, or make what was to stay."""
    images.save(pictures / "m.png", mask.astype(np.uint8))
    words = [str(pictures / name) for name in ("a.png", "m.png")]
    assert main(["inpaint", str(trained), *words, "--out", str(pictures / "x.png")]) == 2
    assert reason in capsys.readouterr().err
    assert not (pictures / "x.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_calibrate_and_use_it(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured once, kept beside the weights; sample and evaluate take it; before, it is one line that says how."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    sample = ["sample", str(run), "-n", "2", "--variance", "calibrated", "--out", str(tmp_path / "a.npz")]
    spaced = [*sample[:4], "--spacing", "bound", "--steps", "5", "--out", str(tmp_path / "c.npz"), "--json"]
    for asked in (sample, spaced):
        assert main(asked) == 2
        assert "not calibrated; run `ddpm calibrate`" in capsys.readouterr().err
    assert main(["calibrate", str(run), "-n", "8", "--codec", "2"]) == 0
    capsys.readouterr()
    assert main(spaced) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["spacing"], made["steps"], made["network_calls"]) == ("bound", 5, 5)
    assert main(sample) == 0
    assert main([*sample[:-1], str(tmp_path / "b.npz"), "--variance", "fixed_large"]) == 0
    assert (np.load(tmp_path / "a.npz")["arr_0"] != np.load(tmp_path / "b.npz")["arr_0"]).any()
    capsys.readouterr()
    assert main(["evaluate", str(run), "-n", "2", "--variance", "calibrated", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nll"]["by_variance"]["calibrated"] == pytest.approx(found["bits_per_dim"])
    assert (run / "evaluate" / "00000030-ema" / "nll.csv").is_file()
    assert main([*sample, "--steps", "5"]) == 0  # on fewer levels it is another table
    file = run / "checkpoints" / "00000030" / "ema.calibration.json"
    before = file.read_bytes()
    capsys.readouterr()
    assert main(["calibrate", str(run), "-n", "4"]) == 2
    assert capsys.readouterr().err == (
        f"ddpm: {file}: holds the codec's tables, which compressed files need; want --codec 0 or --replace\n"
    )
    assert file.read_bytes() == before
    assert main(["calibrate", str(run), "-n", "4", "--codec", "0"]) == 0
    found = json.loads(file.read_text())
    assert (found["count"], found["codec"]) == (4, json.loads(before)["codec"])
    assert main(["calibrate", str(run), "-n", "4", "--codec", "1", "--replace"]) == 0
    assert json.loads(file.read_text())["codec"] != found["codec"]


def test_report(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"written: {run / 'report.html'}\n"
    assert main(["report", str(tmp_path / "nothing")]) == 2


@pytest.mark.usefixtures("undrawn")
def test_measurements_do_not_mix(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has a file that says what it is of; another measurement leaves it as it is."""
    out = tmp_path / "out"
    words = ["evaluate", str(trained), "-n", "2", "--out", str(out), "--json"]
    assert main([*words, "--variance", "fixed_small"]) == 0
    first = (out / "nll.json").read_text()
    assert (
        main([*words, "--metrics", "nll", "ode", "--levels-per-image", "5", "--split", "train", "--ode-steps", "5"])
        == 0
    )
    assert (out / "nll.json").read_text() == first
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in ("nll", "nll_sampled", "ode")}
    assert [values["variance"] for values in found.values()] == ["fixed_small", "fixed_large", "fixed_large"]
    assert [values["split"] for values in found.values()] == ["test", "train", "train"]
    assert found["nll"]["fingerprint"] != found["ode"]["fingerprint"]


@pytest.mark.usefixtures("undrawn")
def test_no_measurement_takes_the_place_of_another(trained: Path, tmp_path: Path) -> None:
    """With other settings it has a file of its own, and with the same ones it has the same file."""
    (tmp_path / "mine.py").write_text("def rows(x):\n    return x.reshape(len(x), -1)[:, :4].astype(float)\n")
    out = tmp_path / "out"
    fid = ["fid", "--features", f"{tmp_path}/mine.py:rows", "--steps", "2", "--sampler"]
    commands = {
        "nll": [["nll"], ["nll", "--variance", "fixed_small"], ["nll", "--draws", "2"]],
        "nll_sampled": [["nll", "--levels-per-image", "2"], ["nll", "--levels-per-image", "3"]],
        "ode": [["ode", "--ode-steps", "3"], ["ode", "--ode-steps", "4"]],
        "quality": [[*fid, "ddim"], [*fid, "unipc"], ["kid", *fid[1:], "ddim"]],
    }
    for name, settings in commands.items():
        for _ in range(2):
            for words in settings:
                assert main(["evaluate", str(trained), "-n", "6", "--out", str(out), "--metrics", *words]) == 0
        stems = [name, *(f"{name}-{k}" for k in range(2, len(settings) + 1))]
        assert (
            sorted(file.stem for file in out.glob(f"{name}*.json") if "sampled" not in file.stem[len(name) :]) == stems
        )
        assert len({(out / f"{stem}.json").read_text() for stem in stems}) == len(stems)
    assert {file.stem for file in out.glob("*.csv")} == {"nll", "nll-2", "nll-3"}


@pytest.mark.usefixtures("undrawn")
def test_a_lone_file_has_a_folder_of_its_own(trained: Path, tmp_path: Path) -> None:
    """Results of two weights files side by side do not overwrite each other."""
    for name in ("a", "b"):
        shutil.copy(trained / "checkpoints" / "00000030" / "ema.safetensors", tmp_path / f"{name}.safetensors")
        assert main(["evaluate", str(tmp_path / f"{name}.safetensors"), "-n", "2"]) == 0
        assert (tmp_path / name / "evaluate" / "00000030-ema" / "nll.json").is_file()


@pytest.mark.usefixtures("undrawn")
def test_a_folder_of_ones_own_is_measured_as_it_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a test split training holds some images out: evaluate's `test` are these, and `train` is the rest."""
    digits = data.load("digits", (8, 8), 1).batch(range(40)).permute(0, 2, 3, 1).numpy()
    images.save_many(tmp_path / "own/", digits, [str(i) for i in range(40)])
    run = tmp_path / "run"
    own = ["--data", str(tmp_path / "own"), "--channels", "1"]
    assert train(run, *own, "--steps", 2) == 0
    capsys.readouterr()
    held_out, rest = [], []
    for split, found in (("test", held_out), ("train", rest)):
        assert main(["evaluate", str(run), "--split", split, "--json", "--out", str(tmp_path / split)]) == 0
        found.append(json.loads(capsys.readouterr().out)["nll"])
    assert (held_out[0]["count"], rest[0]["count"]) == (2, 38)
    assert held_out[0]["split"] == "held out of train"
    state = json.loads((run / "checkpoints" / "00000002" / "state.json").read_text())
    assert rest[0]["fingerprint"] == state["data"]


def test_a_note_of_both_sets_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for i in range(2):
            images.save(tmp_path / "set" / split / f"{i}.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "set" / "a.cr2").write_bytes(b"x")
    assert train(tmp_path / "run", "--data", tmp_path / "set", "--steps", 1) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert sum("converted to L" in line for line in said) == 1
    assert sum(".cr2" in line for line in said) == 1
