"""`ddpm distill`: a run like every other, and a model that only the sampler `consistency` samples."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close, tensors
from PIL import Image
from safetensors.torch import load_file

from ddpm import losses, timesteps
from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files.models import MODELS
from ddpm.files.opening import open_checkpoint
from ddpm.run import export, forecast, init
from ddpm.run.export import public
from ddpm.run.init import distilled, inherit

SHORT = "--batch-size 8 --eval-images 8 --sample-every 0 --gap-steps 2 --warmup 0 --cooldown 0".split()


def distill(out: Path, *options: Any, model: str = "digits") -> int:
    return main(["distill", model, "--out", str(out), *SHORT, *map(str, options)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consistency model after 4 steps, with a grid."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    assert distill(out, "--steps", 4, "--sample-every", 4) == 0
    return out


@pytest.mark.parametrize("teacher", ["--no-teacher", "--teacher", "--guidance 3"])
def test_a_run_resumes_to_the_bit_without_the_model(teacher: str, tmp_path: Path) -> None:
    """With dropout, across two halvings of the gap. The teacher is in the run's own checkpoints, and the forecast of
    their size counts it.
    """
    shutil.copy(MODELS / "digits.safetensors", tmp_path / "model.safetensors")
    options = [*teacher.split(), "--dropout", 0.2]
    for name, steps in (("whole", 5), ("halves", 3)):
        out = tmp_path / name
        assert distill(out, *options, "--steps", steps, model=str(tmp_path / "model.safetensors")) == 0
    (tmp_path / "model.safetensors").unlink()
    assert main(["train", str(tmp_path / "halves"), "--steps", "5"]) == 0
    whole, halves = (tensors(tmp_path / name, 5) for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert any(name.startswith("teacher/") for name in whole) == (teacher != "--no-teacher")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    opened = open_checkpoint(tmp_path / "whole")
    assert isinstance(opened.denoiser.network, torch.nn.Module)
    size = sum(file.stat().st_size for file in (tmp_path / "whole/checkpoints/00000005").glob("*.safetensors"))
    assert forecast.checkpoint_bytes(opened.preset, opened.denoiser.network) == pytest.approx(size, rel=0.05)
    size = sum(4 * tensor.numel() for tensor in whole.values())
    assert forecast.checkpoint_bytes(opened.preset, opened.denoiser.network) == size


def test_bad_images_are_skipped_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new run is asked again, as its data may be other data."""
    for i in range(20):
        (folder := tmp_path / "data" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "bad.png").write_bytes(b"no image")
    options = ["--data", tmp_path / "data", "--steps", 2]
    assert distill(tmp_path / "run", *options) == 2
    assert "skip_bad" in capsys.readouterr().err
    assert distill(tmp_path / "run", *options, "--skip-bad") == 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
    """The levels t and r and the teacher of each call of the loss."""
    calls, real = list[tuple[torch.Tensor, torch.Tensor, Any]](), losses.consistency

    def spy(denoiser: Any, x0: Any, t: Any, eps: Any, y: Any = None, r: Any = None, teacher: Any = None) -> Any:
        calls.append((t, r, teacher))
        return real(denoiser, x0, t, eps, y, r, teacher)

    monkeypatch.setitem(losses.LOSSES, "consistency", spy)
    return calls


@pytest.mark.parametrize("scale", [1, 2.5])
def test_the_loss_gets_the_gap_of_the_step_and_the_teacher(scale: float, tmp_path: Path, seen: list[Any]) -> None:
    """The gap halves every 2 steps. The teacher is the model at this guidance scale, also after an update."""
    assert distill(tmp_path / "run", "--steps", 6, "--teacher", "--guidance", scale, "--batch-size", 64) == 0
    schedule = open_checkpoint(tmp_path / "run").denoiser.schedule
    sigma = (-schedule.half_log_snr).exp()
    assert schedule.T == 991
    assert len(seen) == 6
    for step, (t, r, teacher) in enumerate(seen):
        noisy = (sigma[t] > 3) & (sigma[t] < 30)  # where a level is small beside the gap, and n is 1
        share = 1 - sigma[r[noisy]] / sigma[t[noisy]]
        assert share.mean().item() == pytest.approx(0.5 ** (1 + step // 2), abs=0.08)
        assert getattr(teacher.network, "scale", 1) == scale
    theirs = open_checkpoint("digits").denoiser.network.state_dict()  # type: ignore[union-attr]
    network = seen[-1][2].network if scale == 1 else seen[-1][2].network.network
    assert all(torch.equal(value, theirs[name]) for name, value in network.state_dict().items())


def test_the_gap_stays_at_its_last_stage(tmp_path: Path, seen: list[Any]) -> None:
    """A run that goes on compares the levels of the eighth stage, which is not the next one for all levels."""
    assert distill(tmp_path / "run", "--gap-steps", 1, "--steps", 10, "--batch-size", 64) == 0
    schedule = open_checkpoint(tmp_path / "run").denoiser.schedule
    for step, stage in ((0, 1), (6, 7), (7, 8), (9, 8)):
        t, r, _ = seen[step]
        assert torch.equal(r, timesteps.lower(schedule, t, stage))
    assert not torch.equal(seen[9][1], timesteps.lower(schedule, seen[9][0], 10))


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model of the digits, which may guide `digits`."""
    out = tmp_path_factory.mktemp("weak") / "run"
    words = ["--steps", "2", "--channel-multipliers", "1", "--attention-resolutions", "0", "--sample-every", "0"]
    assert main(["train", "digits", *words, "--batch-size", "8", "--eval-images", "8", "--out", str(out)]) == 0
    return out


def test_a_guide_of_the_teacher(weak: Path, tmp_path: Path, seen: list[Any]) -> None:
    """Its lower point is one step of the guided teacher. The run resumes to the bit, also if the guide has moved."""
    for name, steps in (("whole", 4), ("halves", 2)):
        assert distill(tmp_path / name, "--guide", weak, "--guide-scale", 3, "--steps", steps) == 0
    moved = shutil.copytree(weak, tmp_path / "moved")
    assert main(["train", str(tmp_path / "halves"), "--guide", str(moved), "--steps", "4"]) == 0
    whole, halves = (tensors(tmp_path / name, 4) for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    digits, guide = (open_checkpoint(path, precision="float32").denoiser for path in ("digits", weak))
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([5, 400, 980]), torch.tensor([1, 2, 3])
    want = guide.unclipped()(x, t, y).x0 + 3 * (digits.unclipped()(x, t, y).x0 - guide.unclipped()(x, t, y).x0)
    assert len(seen) == 8
    torch.testing.assert_close(seen[-1][2].unclipped()(x, t, y).x0, want, rtol=1e-4, atol=1e-4)
    plain = tensors(tmp_path / "plain", 4) if distill(tmp_path / "plain", "--teacher", "--steps", 4) == 0 else {}
    assert not all(torch.equal(whole[name], plain[name]) for name in whole)


def test_another_guide_does_not_go_on(weak: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert distill(out, "--guide", weak, "--steps", 1) == 0
    for other in ("digits", ""):
        assert main(["train", str(out), "--guide", other, "--steps", "2"]) == 2
        assert f"--guide {other!r}: another model guided the run so far" in capsys.readouterr().err
    assert public(open_checkpoint(out).preset).guide == "MODEL"
    begun = inherit(str(out), None, {})
    assert (begun.teacher, begun.guide, begun.guide_scale) == (False, "", 1.5)


def test_a_run_that_begins_with_a_taught_model_has_no_teacher(tmp_path: Path) -> None:
    assert distill(tmp_path / "run", "--steps", 1, "--guidance", 2) == 0
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"track": "tensorboard"}))
    begun = inherit(str(tmp_path / "run"), None, {})
    assert (begun.teacher, begun.guidance, begun.track) == (False, 1, "none")
    assert main(["train", "--init", str(tmp_path / "run"), "--steps", "1", "--out", str(tmp_path / "next")]) == 0


def test_parts_of_a_batch_give_the_same_run(tmp_path: Path) -> None:
    for parts in (1, 4):
        assert distill(tmp_path / str(parts), "--steps", 2, "--accumulate", parts) == 0
    assert_close(tensors(tmp_path / "1", 2), tensors(tmp_path / "4", 2))


def test_it_is_sampled_in_two_calls(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By default, and in the grid of training; each image has its seed, and a class needs no guidance."""
    assert (model / "samples/00000004.png").is_file()
    state = json.loads((model / "checkpoints/00000004/state.json").read_text())
    assert state["held_out"] is None  # no checkpoint is the best by L_simple
    capsys.readouterr()

    def sample(*options: str) -> tuple[dict[str, Any], np.ndarray]:
        assert main(["sample", str(model), "--out", str(tmp_path / "a.npz"), "--json", *options]) == 0
        about: dict[str, Any] = json.loads(capsys.readouterr().out)
        return about, np.load(tmp_path / "a.npz")["arr_0"].astype(int)

    about, four = sample("-n", "4", "--class", "7")
    assert (about["sampler"], about["steps"], about["network_calls"], about["guidance"]) == ("consistency", 2, 2, 1.0)
    _, one = sample("-n", "1", "--seed", "3", "--class", "7")
    assert np.abs(four[3] - one[0]).max() <= 1
    assert sample("-n", "1", "--steps", "1")[0]["network_calls"] == 1
    assert main(["info", str(model)]) == 0
    out = capsys.readouterr().out
    assert "a consistency model: 2 network calls, or --steps 1" in out
    assert "--variance" not in out  # the sampler has none


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample MODEL --sampler unipc --out OUT.png", "is a consistency model; want consistency"),
        ("sample digits --sampler consistency --out OUT.png", "is no consistency model; want another sampler"),
        ("sample MODEL --class 7 --guidance 2 --out OUT.png", "has the guidance of its distillation; want 1"),
        ("sample MODEL --class 7 --guidance-interval 5,9 --out OUT.png", "--guidance-interval: there is no guidance"),
        ("sample MODEL --checkpoint best --out OUT.png", "no checkpoint of"),
        ("sample MODEL --guide digits --out OUT.png", "is a consistency model; want an ordinary model"),
        ("distill EPS --out OUT", "predict eps: loss consistency needs x0^ even at high noise; want x0 or v"),
        ("distill digits --guidance 0.5 --out OUT", "--guidance 0.5: want a finite number, 1 to 100"),
        ("distill MODEL --guidance 2 --out OUT", "is a consistency model; want teacher false"),
        ("distill digits --no-teacher --guidance 2 --out OUT", "guidance 2.0: needs a teacher"),
        ("distill digits --no-teacher --guide digits --out OUT", "--guide digits: there is no teacher to guide"),
        ("distill digits --guide digits --guidance 2 --out OUT", "not with a guide, which takes its place"),
        ("distill digits --guide EPS --out OUT", "it has another class_names than the teacher; want the same"),
        ("distill digits --guide MODEL --out OUT", "is a consistency model; want an ordinary model"),
        ("distill digits --guide-scale 2 --out OUT", "--guide-scale 2: there is no guide; want guide MODEL, too"),
        ("train digits --guide digits --out OUT", "there is no teacher to guide"),
        ("train digits --teacher --out OUT", "teacher: loss simple has none; want loss consistency"),
        ("distill nothing --out OUT", "nothing: no such file or folder"),
        ("export MODEL --to diffusers OUT", "loss consistency: no pipeline of DDPM or DDIM samples it"),
        ("train EPS --guidance 2 --out OUT", "needs a teacher, classes, and label_dropout above 0"),
        ("train digits --loss consistency --teacher --out OUT", "there is no model; want init MODEL, or teacher false"),
    ],
)
def test_mistakes_are_one_line(
    command: str, words: str, model: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"MODEL": str(model), "EPS": str(trained), "OUT": str(tmp_path / "out")}
    given = [places.get(word, word.replace("OUT", str(tmp_path / "out"))) for word in command.split()]
    assert main(given) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "was", "now"),
    [
        ("label_dropout", 0.0, 0.1),
        ("condition_dropout", 0.0, 0.1),
        ("condition_noise", 0.1, 0.3),
        ("last_sigma", 20.0, 80.0),
    ],
)
def test_teacher_and_guide_have_seen_what_the_run_hides(
    setting: str, was: float, now: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels and conditions that are left out, noise on conditions, and high noise levels."""
    digits, name = open_checkpoint("digits"), {"init": "MODEL", "guide": "MODEL", "teacher": True}
    old = replace(digits.preset, condition="lowres:2", **{setting: was})
    model = replace(digits, preset=old)
    monkeypatch.setattr(init, "open_checkpoint", lambda *_, **__: model)
    run = replace(old, loss="consistency", **name)
    init.check_teacher(model, run)
    assert init.guide_of(run) is model
    run = replace(run, **{setting: now})
    with pytest.raises(InputError, match=f"{setting} {now:g}: the model MODEL was trained with {was:g}; want at most"):
        init.check_teacher(model, run)
    with pytest.raises(InputError, match=f"the model MODEL was trained with {was:g}|has another label_dropout"):
        init.guide_of(run)


def test_the_first_call_is_at_a_level_that_the_model_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the highest one, unless it has more noise than sigma 80 or --last-sigma."""
    assert distill(tmp_path / "run", "--last-sigma", 20, "--steps", 1) == 0
    model = open_checkpoint("digits")
    assert open_checkpoint(tmp_path / "run").denoiser.schedule.T == model.denoiser.schedule.up_to(20).T < 991
    for trained, wanted in ((0.0, 80.0), (200.0, 80.0), (20.0, 20.0)):
        seen = replace(model, preset=replace(model.preset, last_sigma=trained))
        monkeypatch.setattr(init, "open_checkpoint", lambda *_, seen=seen, **__: seen)
        assert distilled("MODEL", {}).last_sigma == wanted


def test_the_commands_of_the_card_make_the_model(weak: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as they stand, but for the files that are MODEL there, and for the pictures and figures on the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "SAMPLES", 4)
    assert distill(Path("run"), "--guide", weak, "--guide-scale", 3, "--steps", 2, "--lr", 1e-3, "--seed", 5) == 0
    assert main(["export", "run", "--out", "a.safetensors"]) == 0
    commands = re.findall(r"^ddpm (.*)$", Path("a.md").read_text().partition("## How it was made")[2], re.M)
    assert [line.split()[0] for line in commands] == ["distill", "export"]
    Path("again").mkdir()
    places = {"RUN": "again/RUN", "a.safetensors": "again/a.safetensors", "MODEL": str(weak)}
    for line in commands:
        words = [places.get(word, word) for word in line.split()]
        assert main([*words, *(["--eval-images", "8", "--sample-every", "0"] if words[0] == "distill" else [])]) == 0
    stored, again = load_file("a.safetensors"), load_file("again/a.safetensors")
    assert all(torch.equal(again[name], value) for name, value in stored.items())


def test_an_exported_model_keeps_its_guidance_and_its_last_level(model: Path, tmp_path: Path) -> None:
    """Without the path of the model that it was made of; the file is sampled as the run is."""
    guided = public(replace(distilled("digits", {"guidance": 2.0}), init="/home/me/model"))
    assert (guided.guidance, guided.init) == (2.0, "MODEL")
    assert main(["export", str(model), "--out", str(tmp_path / "m.safetensors")]) == 0
    assert open_checkpoint(tmp_path / "m.safetensors").denoiser.schedule.T == 991
    assert "consistency sampling in 2 network calls" in (tmp_path / "m.md").read_text()
