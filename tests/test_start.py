"""`ddpm.train`: the same run whichever way its images and settings are given, in any thread, and resumed."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same, metrics, tensors
from conftest import train as train_by_command
from PIL import Image

import ddpm
from ddpm import pixels
from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files import data, images
from ddpm.run.start import read_config

SETTINGS: dict[str, Any] = {
    "classes": False, "width": 32, "channel_multipliers": [1], "num_res_blocks": 1, "attention_resolutions": (0,),
    "num_timesteps": 20, "schedule": "linear", "predict": "eps", "batch_size": 8, "lr": 1e-3, "warmup": 5,
    "ema_decay": 0.999, "ema_warmup": True, "precision": "float32", "eval_images": 16, "timestep_sampling": "uniform",
    "cooldown": 0, "log_every": 1, "sample_every": 0, "sample_count": 4, "sample_steps": 5,
}  # fmt: skip
"""The settings of TINY."""


def digits(n: int = 40) -> np.ndarray:
    """uint8 [n, 8, 8]."""
    return data.load("digits", (8, 8), 1).batch(range(n))[:, 0].numpy()


def test_it_is_the_run_of_the_command(tmp_path: Path) -> None:
    """To the bit, and what is logged too; `on_log` gets each line of the file."""
    seen: list[dict[str, Any]] = []
    run = ddpm.train("digits", out=tmp_path / "python", steps=4, on_log=seen.append, **SETTINGS)
    assert train_by_command(tmp_path / "command", "--steps", 4) == 0
    assert_same(tensors(tmp_path / "python", 4), tensors(tmp_path / "command", 4))
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("python", "command")]
    assert written[0] == written[1]
    assert seen == metrics(tmp_path / "python") == run.log
    assert TINY[1] == "digits"


def test_the_same_call_resumes(tmp_path: Path) -> None:
    """Images in memory as well; `on_log` gets the new lines only, and other images are refused."""
    seen: list[dict[str, Any]] = []
    for steps in (3, 6):
        seen.clear()
        run = ddpm.train("digits", digits(), tmp_path / "halves", steps=steps, on_log=seen.append, **SETTINGS)
    assert {line["step"] for line in seen} == {4, 5, 6}
    whole = ddpm.train("digits", digits(), tmp_path / "whole", steps=6, **SETTINGS)
    assert_same(tensors(run.folder, 6), tensors(whole.folder, 6))
    with pytest.raises(InputError, match="not the images that the run"):
        ddpm.train("digits", 255 - digits(), tmp_path / "whole", steps=7, **SETTINGS)


class Items:
    """A map-style Dataset."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def given_as() -> dict[str, Any]:
    """The same 40 images, as every kind of object."""
    drawn = digits()
    labelled = [(Image.fromarray(one), i % 3) for i, one in enumerate(drawn)]
    return {
        "array": drawn,
        "array with channels": drawn[..., None],
        "tensor": torch.from_numpy(drawn),
        "tensor with channels": torch.from_numpy(drawn)[:, None],
        "pair": (drawn, [f"c{i % 3}" for i in range(40)]),
        "Dataset of tensors": torch.utils.data.TensorDataset(torch.from_numpy(drawn)[:, None]),
        "Dataset of arrays": Items(list(drawn)),
        "Dataset of pictures": Items(labelled),
    }


@pytest.fixture(scope="module")
def from_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[data.Images, data.Images]:
    """The images of `given_as` from a folder of pictures."""
    folder = tmp_path_factory.mktemp("objects") / "folder"
    images.save_many(folder, digits()[..., None], [f"{i:03d}" for i in range(40)])
    return data.load_pair(str(folder), (8, 8), 1)


@pytest.mark.parametrize("kind", given_as())
def test_objects_are_the_files_that_they_would_be(kind: str, from_files: tuple[data.Images, data.Images]) -> None:
    """The images of a folder with the same pictures, and so the same weights."""
    ours = data.load_pair(data.given(given_as()[kind]), (8, 8), 1)
    for a, b in zip(ours, from_files, strict=True):
        assert torch.equal(a.batch(range(len(a))), b.batch(range(len(b))))
    again = data.load_pair(data.given(given_as()[kind]), (8, 8), 1)
    assert [one.fingerprint for one in again] == [one.fingerprint for one in ours]


def test_colour_tensors_have_their_channels_first() -> None:
    colour = torch.arange(2 * 3 * 4 * 8, dtype=torch.uint8).reshape(2, 3, 4, 8)
    for given in (colour, colour.permute(0, 2, 3, 1).numpy(), Items(list(colour))):
        train, held_out = data.load_pair(data.given(given), (4, 8), 3)
        assert torch.equal(torch.cat([train.batch([0]), held_out.batch([0])]).sort(0).values, colour.sort(0).values)


def test_a_data_set_of_hugging_face(tmp_path: Path) -> None:
    """Its splits and labels are those that the hub would give."""
    import datasets

    drawn = digits()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})

    def part(rows: range) -> Any:
        columns = {"image": [Image.fromarray(drawn[i]) for i in rows], "label": [i % 2 for i in rows]}
        return datasets.Dataset.from_dict(columns, features=features)

    both = datasets.DatasetDict({"train": part(range(30)), "test": part(range(30, 40))})
    train, held_out = data.load_pair(data.given(both), (8, 8), 1)
    assert torch.equal(train.batch(range(30))[:, 0], torch.from_numpy(drawn[:30]))
    assert torch.equal(held_out.batch(range(10))[:, 0], torch.from_numpy(drawn[30:]))
    run = ddpm.train("digits", both["train"], tmp_path / "run", steps=1, **{**SETTINGS, "classes": True})
    assert run.preset.class_names == ("even", "odd")


@pytest.mark.parametrize("kind", ["array", "tensor", "Dataset"])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_numbers_and_channels(kind: str, dtype: Any, tmp_path: Path) -> None:
    """8 channels of 16 bits or floats arrive as they are, and a model of them trains."""
    draw = np.random.default_rng(0)
    array = draw.integers(0, 60000, (20, 8, 8, 8)).astype(dtype)
    tensor = torch.from_numpy(array.astype(np.float32)).movedim(-1, 1).to(getattr(torch, dtype))
    given = {"array": array, "tensor": tensor, "Dataset": Items(list(tensor))}[kind]
    settings = {**SETTINGS, "channels": 8, "pixel_type": dtype}
    run = ddpm.train("digits", given, tmp_path / "run", steps=1, **settings)
    values = pixels.values(dtype, run.preset.value_range)
    train, held_out = data.load_pair(data.given(given), (8, 8), 8, values=values)
    found = torch.zeros(20, 8, 8, 8, dtype=torch.float64)
    for part in (train, held_out):
        found[part.rows] = part.batch(range(len(part))).double()
    assert torch.equal(found, torch.from_numpy(array).movedim(-1, 1).double())
    assert run.model.network.conv_in.weight.shape[1] == 8  # type: ignore[attr-defined]
    if dtype == "float32":
        assert run.preset.value_range == (array.min(), array.max())


@pytest.mark.parametrize("kind", ["pair", "Dataset of pictures"])
def test_labels_are_learned(kind: str, tmp_path: Path) -> None:
    """The model takes the classes by the names that were given."""
    run = ddpm.train("digits", given_as()[kind], tmp_path / "run", steps=1, **{**SETTINGS, "classes": True})
    wanted = ("c0", "c1", "c2") if kind == "pair" else ("0", "1", "2")
    assert run.preset.class_names == wanted
    train, _ = data.load_pair(data.given(given_as()[kind], labelled=True), (8, 8), 1)
    assert train.labels is not None
    assert train.labels.tolist() == [row % 3 for row in train.rows.tolist()]
    assert run.model.network.label.weight.shape[0] == 3  # type: ignore[attr-defined]


def test_a_dataset_too_large_for_memory(tmp_path: Path) -> None:
    """It is decoded by other processes; its fingerprint tells other items, and another number of items."""

    def fingerprint(items: list[Any]) -> str:
        contents = data.given(Items(items))
        return data.load_pair(contents, (8, 8), 1, cache_bytes=0)[0].fingerprint

    drawn = list(digits())
    one = fingerprint(drawn)
    assert one == fingerprint(drawn)
    assert one != fingerprint(drawn[:39])
    assert one != fingerprint([255 - drawn[0], *drawn[1:]])
    images_by_worker = data.load_pair(data.given(Items(drawn)), (8, 8), 1, cache_bytes=0)[0]
    at_once = data.load_pair(data.given(Items(drawn)), (8, 8), 1)[0]
    for workers in (0, 2):
        batch = next(data.batches(images_by_worker, 0, 8, 0, 1, workers=workers))
        assert torch.equal(batch, next(data.batches(at_once, 0, 8, 0, 1)))


def test_a_dataset_is_asked_by_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may seek and read in one open file, between which another thread must not seek."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    drawn = np.random.default_rng(0).integers(0, 256, (600, 128, 128), np.uint8)
    (tmp_path / "pixels").write_bytes(drawn.tobytes())

    class OneFile(Items):
        def __getitem__(self, index: int) -> Any:
            file.seek(index * 128 * 128)
            time.sleep(1e-4)  # another thread may run
            return np.frombuffer(file.read(128 * 128), np.uint8).reshape(128, 128)

    with (tmp_path / "pixels").open("rb") as file:
        train, _ = data.load_pair(data.given(OneFile([None] * 600)), (128, 128), 1)
    assert train.pixels is not None
    assert np.array_equal(train.pixels[:, 0].numpy(), drawn)


def test_it_runs_in_a_thread(tmp_path: Path) -> None:
    """As in a notebook's server: no signal handlers are set there, and the run is the same."""
    runs: list[Any] = []
    thread = threading.Thread(
        target=lambda: runs.append(ddpm.train("digits", digits(), tmp_path / "a", steps=3, **SETTINGS))
    )
    thread.start()
    thread.join()
    ddpm.train("digits", digits(), tmp_path / "b", steps=3, **SETTINGS)
    assert runs[0].result.step == 3
    assert_same(tensors(tmp_path / "a", 3), tensors(tmp_path / "b", 3))


def test_the_run_that_comes_back(tmp_path: Path) -> None:
    """Its model is what `ddpm.load` opens, its folder goes on, and one line says how it went."""
    run = ddpm.train("digits", out=tmp_path / "run", steps=2, **SETTINGS)
    opened = ddpm.load(run.folder)
    for name, value in opened.network.state_dict().items():  # type: ignore[attr-defined]
        assert torch.equal(value, run.model.network.state_dict()[name])  # type: ignore[attr-defined]
    assert run.model is run.model
    assert repr(run).startswith(f"<Run {tmp_path / 'run'}: step 2 of 2, held-out L_simple {run.result.held_out:.4f} (")
    more = ddpm.train(run.folder, steps=5)
    assert (more.folder, more.result.step, more.preset.width) == (run.folder, 5, 32)


@pytest.mark.parametrize("kind", ["array", "tensor", "Dataset"])
def test_a_run_of_objects_goes_on_only_with_these(kind: str, tmp_path: Path) -> None:
    """Its folder alone does not hold them, and the error says what is missing."""
    images = {"array": digits(), "tensor": torch.from_numpy(digits()), "Dataset": Items(list(digits()))}[kind]
    run = ddpm.train("digits", images, tmp_path / "run", steps=1, **SETTINGS)
    with pytest.raises(InputError, match=f"data: the images of this run were given in Python, {kind} "):
        ddpm.train(run.folder, steps=2)
    assert ddpm.train(run.folder, images, steps=2).result.step == 2


def test_a_fault_of_the_callback_saves_the_run(tmp_path: Path) -> None:
    def fail(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ddpm.train("digits", out=tmp_path / "run", steps=5, on_log=fail, **SETTINGS)
    assert tensors(tmp_path / "run", 3)


class Random(Items):
    def __getitem__(self, index: int) -> Any:
        return np.random.default_rng().integers(0, 256, (8, 8), np.uint8)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no preset": ({"preset": "digist"}, "preset 'digist': did you mean digits"),
    "no setting": ({"stepss": 5}, "stepss: no such setting; did you mean steps"),
    "a value": ({"steps": 0}, "steps 0: want a whole number of at least 1"),
    "two ends": ({"steps": 5, "minutes": 1}, "minutes, steps: want one of the two"),
    "no time": ({"minutes": 0}, "minutes 0: want a finite number"),
    "no out": ({"preset": ddpm.Preset(), "out": None}, "out: missing"),
    "float": (
        {"data": np.zeros((4, 8, 8))},
        r"image 0 of the array float64 \[4, 8, 8\]: float64 .*want pixel_type float",
    ),
    "bool": ({"data": np.zeros((4, 8, 8), bool)}, r"data array bool \[4, 8, 8\]: want numbers"),
    "flat": ({"data": np.zeros((4, 64), np.uint8)}, r"\[4, 64\]: want \[N, H, W\] or \[N, H, W, C\]"),
    "empty": ({"data": np.zeros((0, 8, 8), np.uint8)}, r"\[0, 8, 8\]: no images; want"),
    "one image": ({"data": np.zeros((8, 8, 3), np.uint8)}, r"\[8, 8, 3\]: seems to be one image; want \[N, H, W\]"),
    "bands": (
        {"data": np.zeros((4, 8, 8, 13), np.uint16)},
        r"uint16 numbers; want pixel_type uint16 and channels 13, or uint8",
    ),
    "channels first": ({"data": np.zeros((4, 3, 8, 8), np.uint8)}, "channels seem to be at another place"),
    "channels last": ({"data": torch.zeros(4, 8, 8, 3, dtype=torch.uint8)}, "channels seem to be at another place"),
    "labels": ({"data": (np.zeros((4, 8, 8), np.uint8), [1, 2])}, "2 labels; want 4 integers or names"),
    "a number": ({"data": 7}, "data int: want a SOURCE as text"),
    "a dict": ({"data": {"train": 1}}, "data dict: want a SOURCE as text"),
    "words": ({"data": Items(["a", "b"])}, "item 0 of the Dataset Items of 2: str; want an image of Pillow"),
    "random": ({"data": Random([0, 0])}, "item 0 is another image each time"),
    "a column": ({"data": np.zeros((4, 8, 8), np.uint8), "label_column": "y"}, "label_column y.*no columns"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    arguments, message = MISTAKES[what]
    with pytest.raises(InputError, match=message) as error:
        ddpm.train(**{"preset": "digits", "out": tmp_path / "run", **arguments})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


# -- settings in a file ------------------------------------------------------------------------------------------------

FILES = {
    "a.yaml": "size: 8\nchannel_multipliers: 1\nlr: 1e-3\nschedule: linear\nema_warmup: true\n",
    "a.toml": 'size = "8x8"\nchannel_multipliers = [1]\nlr = 1e-3\nschedule = "linear"\nema_warmup = true\n',
    "a.json": '{"size": [8, 8], "channel_multipliers": [1], "lr": 1e-3, "schedule": "linear", "ema_warmup": true}',
}


@pytest.mark.parametrize("name", FILES)
def test_settings_from_a_file(name: str, tmp_path: Path) -> None:
    """The file's settings replace those of the preset, and options replace the file's."""
    (tmp_path / name).write_text(FILES[name])
    short = f"--steps 1 --batch-size 4 --eval-images 4 --sample-every 0 --out {tmp_path / 'run'}"
    assert main(["train", "digits", "--config", str(tmp_path / name), "--schedule", "cosine", *short.split()]) == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["size"], config["lr"], config["channel_multipliers"]) == ([8, 8], 1e-3, [1])
    assert config["schedule"] == "cosine"
    assert config["warmup"] == ddpm.PRESETS["digits"].warmup


def test_the_config_of_a_run_makes_the_same_run(trained: Path, tmp_path: Path) -> None:
    """To the bit, with no preset and no other option."""
    assert main(["train", "--config", str(trained / "config.json"), "--out", str(tmp_path / "run")]) == 0
    assert_same(tensors(trained, 30), tensors(tmp_path / "run", 30))


def test_a_pipe_of_settings_is_refused(tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(InputError, match="not a plain file"):
        read_config(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "stepz: 5", "stepz: no such setting; did you mean steps?"),
        ("a.yaml", "steps: [", "cannot be read (while parsing"),
        ("a.yaml", "- 5", "want settings by their names"),
        ("a.toml", "steps = ", "cannot be read (Invalid value"),
        ("a.json", "{", "cannot be read (Expecting"),
        ("a.yaml", "steps: many", "--steps 'many': want a whole number"),
        ("a.yaml", "details: {headz: 3}", "config details {'headz': 3}: want some of"),
        ("a.ini", "steps=5", "want a name that ends in .json, .yaml, .yml, .toml"),
        ("b.yaml", None, "cannot be read ([Errno 2] No such file"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(
    name: str, text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["train", "digits", "--config", str(tmp_path / name), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert main(["train", "--config", str(tmp_path / name)]) == 2
