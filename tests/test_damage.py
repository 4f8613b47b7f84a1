"""Damaged files of a run: what is whole is used, and the rest is named in one line."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, steps, train
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ddpm
from ddpm.cli import main
from ddpm.errors import parse_json
from ddpm.files import checkpoints, data, features, models, opening
from ddpm.files.tensors import sha256_of
from ddpm.presets import PRESETS, to_json
from ddpm.run import log, parts, quality
from ddpm.run.processes import Processes

PRESET = PRESETS["digits"]
ALONE = Processes(0, 1, torch.device("cpu"))
FAST = ["-n", "1", "--steps", "1", "--sampler", "ddim"]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run, to be damaged."""
    return shutil.copytree(trained, tmp_path / "run")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def save(run: Path, step: int, held_out: float | None = None) -> Path:
    weights = {"raw": {"w": torch.full((9,), float(step))}}
    return checkpoints.save(run, PRESET, {"step": step, "held_out": held_out}, weights)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command, which must be one line."""
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    return lines[0]


# -- which checkpoints are kept ----------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_does_not_cost_a_whole_one(run: Path) -> None:
    """With keep 1, the damaged one of step 30 stays too: it is newer than the one that was just saved."""
    flip(run / "checkpoints" / "00000030" / "raw.safetensors")
    assert train(run, "--steps", 25, "--save-every", 10, "--keep", 1) == 0
    assert steps(run) == [20, 25, 30]
    with pytest.warns(UserWarning, match="00000030.*altered"):
        assert checkpoints.newest(run) == run / "checkpoints" / "00000025"


def test_a_damaged_checkpoint_is_neither_counted_nor_the_best(tmp_path: Path) -> None:
    for step, loss in enumerate([0.3, 0.1, 0.4, 0.5, 0.6]):
        save(tmp_path, step, loss)
    for step in (1, 3):
        flip(tmp_path / "checkpoints" / f"{step:08d}" / "raw.safetensors")
    checkpoints.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [0, 1, 2, 3, 4]  # 4 and 2 are the newest, 0 is the best; 1 may be better, 3 is newer
    assert checkpoints.best(tmp_path) == tmp_path / "checkpoints" / "00000000"
    save(tmp_path, 5, 0.2)
    checkpoints.prune(tmp_path, keep=2)
    assert steps(tmp_path) == [1, 4, 5]


def test_what_cannot_be_read_is_not_deleted(tmp_path: Path) -> None:
    """Its loss may be the lowest, and the disk may answer the next time."""
    for step in range(4):
        save(tmp_path, step, 1.0 - step / 10)
    (tmp_path / "checkpoints" / "00000000" / "state.json").write_text("{")
    checkpoints.prune(tmp_path, keep=1)
    assert steps(tmp_path) == [0, 3]


def test_what_was_saved_or_resumed_from_is_not_deleted(run: Path, tmp_path: Path) -> None:
    saved = save(tmp_path / "a", 1)
    save(tmp_path / "a", 2)
    checkpoints.prune(tmp_path / "a", 1, protected={saved})
    assert steps(tmp_path / "a") == [1, 2]
    assert train(run, "--steps", 33, "--save-every", 1, "--keep", 1) == 0
    assert steps(run) == [30, 33]


def test_a_save_beside_thousands_of_checkpoints_reads_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all are kept or few: files that did not change are read once."""
    first = save(tmp_path, 1, 0.5)
    for step in range(2, 500):
        shutil.copytree(first, first.with_name(f"{step:08d}"))
    time.sleep(2.1)  # what changed in the last two seconds is read again
    read: list[Path] = []
    read_bytes, file_sha256 = Path.read_bytes, checkpoints.file_sha256
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    monkeypatch.setattr(checkpoints, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    for keep, step in ((1000, 500), (490, 501), (490, 502)):
        read.clear()
        checkpoints.prune(tmp_path, keep, protected={save(tmp_path, step, 0.6)})
        if step != 501:
            assert len(read) < 20, (keep, step)
    assert len(steps(tmp_path)) == 490


# -- weights that are not finite ---------------------------------------------------------------------------------------


def with_nan(source: Path, target: Path) -> None:
    """A copy of a weights file with one value that is not a number; the metadata stay."""
    tensors = load_file(source)
    tensors[sorted(tensors)[3]].view(-1)[0] = torch.nan
    with safe_open(source, "pt") as file:
        save_file(tensors, target, file.metadata())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.safetensors"
    with_nan(models.MODELS / "digits.safetensors", file)
    for command in (["sample", str(file), *FAST], ["calibrate", str(file), "-n", "2", "--codec", "2"]):
        assert main([*command, *(["--out", str(tmp_path / "a.png")] if command[0] == "sample" else [])]) == 2
        assert "m.safetensors: " in (line := one_line(capsys))
        assert "holds values that are not finite" in line
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors"}


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    for stem in ("ema", "raw", "optimizer"):
        tensors = {"ema": {"w": torch.zeros(1)}, stem: {"w": torch.tensor([torch.inf])}}
        with pytest.raises(FloatingPointError, match=rf"{stem}\.safetensors: w is not finite"):
            checkpoints.save(tmp_path, PRESET, {"step": 1}, tensors)
    assert not (tmp_path / "checkpoints").exists()


def test_a_sealed_checkpoint_that_is_not_finite_is_not_a_good_one(run: Path) -> None:
    """An older version of the package may have written it."""
    folder = run / "checkpoints" / "00000030"
    with_nan(folder / "raw.safetensors", folder / "raw.safetensors")
    state = json.loads((folder / "state.json").read_text())
    state["files"]["raw.safetensors"] = sha256_of((folder / "raw.safetensors").read_bytes())
    state.pop("seal")
    (folder / "state.json").write_text(json.dumps({**state, "seal": checkpoints._seal(state)}))
    with pytest.warns(UserWarning, match="00000030: raw.safetensors holds values that are not finite"):
        assert checkpoints.newest(run) == run / "checkpoints" / "00000020"


def test_training_with_moments_that_overflow_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients and weights are finite, and the squares of the gradients are not."""
    clip = torch.nn.utils.clip_grad_norm_

    def huge(weights: list[Any], most: float) -> torch.Tensor:
        norm = clip(weights, most)
        weights[0].grad.fill_(1e30)
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", huge)
    assert train(tmp_path / "run", "--steps", 2, "--save-every", 1) == 1
    assert "optimizer.safetensors: exp_avg_sq." in (line := capsys.readouterr().err.splitlines()[-1])
    assert "is not finite; the last good checkpoint is none" in line


# -- JSON --------------------------------------------------------------------------------------------------------------

DEEP = ["[" * 100_000, '{"a":' * 5000 + "0" + "}" * 5000, "[" * 500 + "]" * 500]


@pytest.mark.parametrize("text", DEEP[::2], ids=["endless", "deeper than a file of ours"])
def test_deep_json_is_named_in_one_line(text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In config, state, log, the header of a model, its calibration, and a folder of diffusers."""
    last = run / "checkpoints" / "00000030"
    file = shutil.copy(last / "ema.safetensors", run.parent / "m.safetensors")
    (run.parent / "m.calibration.json").write_text(text)
    assert main(["sample", str(file), *FAST, "--variance", "calibrated", "--out", str(run / "a.png")]) == 2
    assert "m.calibration.json: damaged" in one_line(capsys)
    with safe_open(file, "pt") as opened:
        metadata = {**opened.metadata(), "config": text}
    save_file(load_file(file), file, metadata)
    assert main(["sample", str(file), *FAST, "--out", str(run / "a.png")]) == 2
    assert "its configuration is damaged" in one_line(capsys)

    foreign = run.parent / "foreign"
    foreign.mkdir()
    for name in ("config.json", "scheduler_config.json"):
        (foreign / name).write_text('{"_class_name": "UNet2DModel"}')
        (foreign / "scheduler_config.json").write_text(text)
        (foreign / "config.json").write_text('{"_class_name": "UNet2DModel"}' if name != "config.json" else text)
        assert main(["sample", str(foreign), *FAST, "--out", str(run / "a.png")]) == 2
        assert str(foreign) in one_line(capsys)
    (run / "metrics.jsonl").open("a").write(text + "\n")
    (last / "state.json").write_text(text)
    assert main(["sample", str(run), *FAST, "--out", str(run / "a.png")]) == 0
    assert "state.json cannot be read" in capsys.readouterr().err
    (run / "config.json").write_text(text)
    assert train(run, "--steps", 31) == 0
    assert f"the settings are those of {run / 'checkpoints' / '00000020'}" in capsys.readouterr().err
    assert max(losses(run)) == 31


def test_json_is_read_up_to_100_levels() -> None:
    assert parse_json("[" * 100 + "]" * 100) is not None
    for text in ("[" * 101 + "]" * 101, *DEEP):
        with pytest.raises(ValueError, match="nested more than 100 deep"):
            parse_json(text)
    with pytest.raises(ValueError, match="utf-8"):
        parse_json(b'"\xff"')


@pytest.mark.parametrize("name", [name for name, value in to_json(PRESET).items() if type(value) is int])
@pytest.mark.parametrize("value", [2**63, 2**70, 10**400])
def test_no_setting_is_a_number_without_end(name: str, value: int) -> None:
    with pytest.raises(ddpm.InputError, match=rf"^{name} \d+: want"):
        ddpm.presets.from_json({**to_json(PRESET), name: value})


def test_levels_without_end_are_refused() -> None:
    with pytest.raises(ddpm.InputError, match="channel_multipliers: 100000 levels; want at most 16"):
        ddpm.presets.from_json({**to_json(PRESET), "channel_multipliers": [1] * 100_000})


# -- config.json and metrics.jsonl -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(b"\xff{"), lambda p: p.write_text("[]"), Path.unlink])
def test_a_damaged_config_is_made_again_from_the_checkpoints(
    damage: Callable[[Path], Any], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (run / "config.json").read_bytes()
    damage(run / "config.json")
    assert train(run, "--steps", 30, "--width", 64) == 2
    assert "width 64: the run in" in capsys.readouterr().err
    assert train(run, "--steps", 31, "--save-every", 10, "--sample-every", 30) == 0
    assert json.loads((run / "config.json").read_bytes()) == {**json.loads(config), "steps": 31}


def test_a_damaged_config_without_a_whole_checkpoint_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "config.json").write_text("{")
    assert train(run, "--steps", 31) == 2
    assert f"{run / 'config.json'}: cannot be read" in one_line(capsys)


LINES = [b"\xff\n", b'{"step": "x"}\n', b'{"step": [1]}\n', b'{"step": true}\n', b'{"step": 5, "lo', b"[[]]\n", b"\n"]


def test_damaged_lines_of_the_log_stop_nothing(run: Path, trained: Path) -> None:
    """Training goes on without them, the report leaves them out, and every other line stays as it is."""
    file = run / "metrics.jsonl"
    before = file.read_bytes()
    for line in [*LINES, b"".join(line.rstrip(b"\n") + b"\n" for line in LINES)]:
        file.write_bytes(line.rstrip(b"\n") + b"\n" + before + line)
        assert log.read(file) == log.read(trained / "metrics.jsonl")
    file.write_bytes(file.read_bytes() + b'{"step": 5, "lo')
    assert main(["export", str(run), "--out", str(run / "m.safetensors")]) == 0
    assert train(run, "--steps", 31) == 0
    assert file.read_bytes().startswith(before)
    assert max(losses(run)) == 31


# -- reading a run in training -----------------------------------------------------------------------------------------


def test_a_run_can_be_read_while_its_checkpoints_come_and_go(tmp_path: Path) -> None:
    """Every opening gives one whole checkpoint, without a warning."""
    tensors = {stem: load_file(models.MODELS / "digits.safetensors") for stem in ("ema", "raw")}
    (tmp_path / "config.json").write_text(json.dumps(to_json(opening.open_checkpoint("digits").preset)))
    preset, ended = opening.open_checkpoint("digits").preset, threading.Event()

    def write() -> None:
        step = 0
        while not ended.is_set():
            step += 1
            checkpoints.save(tmp_path, preset, {"step": step, "held_out": 0.5}, tensors)
            checkpoints.prune(tmp_path, 1)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not (tmp_path / "checkpoints").is_dir() or not checkpoints.saved(tmp_path):
            time.sleep(0.01)
        for which in ("last", "best") * 8:
            checkpoint = opening.open_checkpoint(tmp_path, which=which)
            assert checkpoint.identity == opening.open_checkpoint("digits").identity
    finally:
        ended.set()
        writer.join()


def test_a_model_stays_as_it_was_when_its_file_goes(run: Path) -> None:
    """A run that trains on deletes the checkpoint; a calibration would make a folder that looks like a damaged one."""
    checkpoint = opening.open_checkpoint(run)
    before = [p.clone() for p in checkpoint.denoiser.network.parameters()]  # type: ignore[attr-defined]
    file = checkpoint.path
    file.write_bytes(bytes(file.stat().st_size))
    after = checkpoint.denoiser.network.parameters()  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    checkpoints.prune(run, 1)
    shutil.rmtree(run / "checkpoints" / "00000030")
    assert len(checkpoint.identity) == 64
    with pytest.raises(ddpm.InputError, match="deleted"):
        models.save_calibration(checkpoint, torch.ones(20), 1.0, {})
    assert not (run / "checkpoints" / "00000030").exists()


def test_opening_a_model_reads_only_its_own_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And hashes it once, whatever is done with it."""
    hashed: list[str] = []
    file_sha256 = checkpoints.file_sha256
    monkeypatch.setattr(checkpoints, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    checkpoints._fault.cache_clear()
    ddpm.load(run)
    assert hashed == ["ema.safetensors"]


# -- what a kill leaves out --------------------------------------------------------------------------------------------


def test_a_grid_that_a_kill_left_out_is_made_when_the_run_goes_on(trained: Path, run: Path) -> None:
    """Also if the run is at its end."""
    grid = run / "samples" / "00000030.png"
    for count in (30, 31):
        grid.unlink()
        assert train(run, "--steps", count, "--save-every", 10, "--sample-every", 30) == 0
        assert grid.read_bytes() == (trained / "samples" / "00000030.png").read_bytes()


# -- parts of measurements ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b"")])
def test_a_damaged_part_is_made_again(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    """And only this one; a part without a hash is no better."""
    made: list[int] = []

    def compute() -> torch.Tensor:
        made.clear()

        def make(part: slice) -> dict[str, torch.Tensor]:
            made.append(part.start)
            return {"x": torch.arange(part.start, part.stop, dtype=torch.float64)}

        files = parts.compute_parts(tmp_path / "parts", 10, ALONE, 4, "parts", False, make)
        return parts.read_parts(files)["x"]

    whole = compute()
    assert made == [0, 4, 8]
    assert torch.equal(compute(), whole)
    assert made == []
    file = tmp_path / "parts" / "00000004-00000008.safetensors"
    damage(file)
    with pytest.warns(UserWarning, match="00000004-00000008.safetensors: damaged; it is made again"):
        assert torch.equal(compute(), whole)
    assert made == [4]
    save_file(load_file(file), file)
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(compute(), whole)
    assert made == [4]


def test_parts_that_other_code_made_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is a hash of every source file but those of the command line."""
    package = shutil.copytree(Path(ddpm.__file__ or "").parent, tmp_path / "ddpm")
    monkeypatch.setattr(parts, "__file__", str(package / "run" / "parts.py"))

    def key() -> str:
        parts._code.cache_clear()
        return parts.parts_folder(tmp_path, "nll", ["model"]).name

    before = key()
    (package / "cli" / "main.py").write_text("")
    assert key() == before
    for file in ("likelihood.py", "kernels/winograd.c", "run/evaluate.py"):
        with (package / file).open("a") as opened:
            opened.write("\n")
        assert key() != before
        before = key()
    monkeypatch.undo()
    parts._code.cache_clear()


def test_damaged_statistics_are_made_again(tmp_path: Path) -> None:
    images = data.load("digits", (8, 8), 1)
    network = features.Network("mean", "w", "none", 64, lambda x: (x.double().flatten(1)[:, 20:23].numpy(), None))
    before = quality._real_features(network, images, tmp_path, ALONE, False, False)
    (file,) = tmp_path.glob("*.npz")
    flip(file)
    with pytest.warns(UserWarning, match="it is made again"):
        after = quality._real_features(network, images, tmp_path, ALONE, False, False)
    assert (after.moments.covariance == before.moments.covariance).all()
    features.load_statistics(file)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000 + "a"])
def test_a_name_that_is_too_long_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the work, of which nothing is left."""
    monkeypatch.chdir(tmp_path)
    for command in (
        ["sample", "digits", *FAST, "--out", name], ["sample", "digits", *FAST, "--out", f"{name}.png"],
        ["train", "digits", "--steps", "1", "--out", name], ["export", "digits", "--out", f"{name}.safetensors"],
        ["sample", name, *FAST], ["train", "digits", "--data", name], ["report", name], ["evaluate", name],
        ["calibrate", name],
    ):  # fmt: skip
        assert main(command) == 2, command
        assert len(one_line(capsys)) < 500
    assert list(tmp_path.iterdir()) == []


def test_the_longest_names_can_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export is refused before the work if its calibration, which has a longer name, cannot lie beside it."""
    out = tmp_path / ("\u00e4" * 120 + "a" * 11 + ".png")
    assert main(["sample", "digits", *FAST, "--out", str(out)]) == 0
    assert out.is_file()
    capsys.readouterr()
    assert main(["export", "digits", "--out", str(tmp_path / ("a" * 240 + ".safetensors"))]) == 2
    assert "too long a name, since .calibration.json has to fit" in one_line(capsys)
    assert list(tmp_path.iterdir()) == [out]


def test_a_result_with_other_values_is_left_out_of_the_card(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result that somebody changed, and a calibration with another count, end no export."""
    assert main(["evaluate", str(run), "--metrics", "nll", "-n", "2", "--data", "digits"]) == 0
    (file,) = run.glob("evaluate/*/nll.json")
    whole = json.loads(file.read_text())
    damages: list[dict[str, Any]] = [{"by_variance": "x"}, {"count": None}, {"bits_per_dim": []}, {"samples": "x"}]
    for i, values in enumerate(damages):
        file.write_text(json.dumps({**whole, **values}))
        capsys.readouterr()
        assert main(["export", str(run), "--out", str(tmp_path / f"{i}.safetensors")]) == 0
        assert "is left out of the card" in capsys.readouterr().err
        assert "bits/dim" not in (tmp_path / f"{i}.md").read_text()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_settings_that_are_a_pipe_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    assert train(run, "--steps", 40) == 2
    assert "config.json: not a plain file" in capsys.readouterr().err
