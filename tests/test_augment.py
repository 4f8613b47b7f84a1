"""Turned and mirrored training images, and the preset for photographs."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same, tensors, train
from PIL import Image

from ddpm.cli import main
from ddpm.files import images
from ddpm.presets import PRESETS, build, photos
from ddpm.run import augment

OPERATIONS = {
    (False, False): [None],
    (False, True): [None, Image.Transpose.FLIP_TOP_BOTTOM],
    (True, False): [None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270],
    (True, True): [None, *Image.Transpose],
}
"""(turn, mirror) -> what Pillow calls the images that may come out."""


@pytest.mark.parametrize(("turn", "mirror"), OPERATIONS)
def test_each_image_is_one_of_the_turned_ones_and_each_is_as_frequent(turn: bool, mirror: bool) -> None:
    """Pillow's transposes of one image without symmetry, 4,000 times: within 5 standard deviations."""
    preset = replace(PRESETS["cifar10"], batch_size=4000, turn=turn, mirror=mirror)
    picture = np.arange(9, dtype=np.uint8).reshape(3, 3)
    batch = torch.from_numpy(picture).expand(4000, 1, 3, 3)
    out = augment.apply(batch, augment.draw(preset, 7))[:, 0].numpy()
    wanted = OPERATIONS[turn, mirror]
    outcomes = [
        np.asarray(Image.fromarray(picture) if one is None else Image.fromarray(picture).transpose(one))
        for one in wanted
    ]
    counts = np.array([(out == one).all(axis=(1, 2)).sum() for one in outcomes])
    assert counts.sum() == 4000
    share = 1 / len(wanted)
    assert np.abs(counts - 4000 * share).max() <= 5 * (4000 * share * (1 - share)) ** 0.5


def test_the_draws_are_a_function_of_seed_and_step() -> None:
    preset = replace(PRESETS["cifar10"], turn=True, mirror=True)
    assert torch.equal(augment.draw(preset, 3), augment.draw(preset, 3))
    assert not torch.equal(augment.draw(preset, 3), augment.draw(preset, 4))
    assert not torch.equal(augment.draw(preset, 3), augment.draw(replace(preset, seed=1), 3))


def test_a_resumed_run_turns_as_before(tmp_path: Path) -> None:
    """To the bit, also in two parts of a batch; and the images are other ones than without turns."""
    given = ("--turn", "--mirror", "--dropout", 0.3)
    assert train(tmp_path / "whole", *given, "--steps", 6) == 0
    assert train(tmp_path / "halves", *given, "--steps", 3) == 0
    assert train(tmp_path / "halves", *given, "--steps", 6) == 0
    assert_same(tensors(tmp_path / "whole", 6), tensors(tmp_path / "halves", 6))
    assert train(tmp_path / "plain", "--dropout", 0.3, "--steps", 6) == 0
    name = "raw/" + next(iter(k.removeprefix("raw/") for k in tensors(tmp_path / "plain", 6) if k.startswith("raw/")))
    assert not torch.equal(tensors(tmp_path / "plain", 6)[name], tensors(tmp_path / "whole", 6)[name])


def test_only_squares_are_turned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--steps", 1, "--turn", "--size", "8x12") == 2
    assert "--turn: images of size 8x12 cannot be turned; want a square size" in capsys.readouterr().err
    assert train(tmp_path / "run", "--steps", 1, "--mirror", "--size", "8x12") == 0


@pytest.mark.parametrize(
    "size", [(1, 1), (8, 8), (30, 30), (32, 32), (33, 33), (64, 48), (100, 100), (256, 256), (7, 64)]
)
def test_photographs_of_any_size_have_a_network(size: tuple[int, int]) -> None:
    """Its sides divide without rest. Large ones have more levels, and no more weights than they need."""
    preset = photos(size)
    assert preset.size == size
    with torch.device("meta"):
        network = build(preset).network
    assert isinstance(network, torch.nn.Module)
    assert sum(p.numel() for p in network.parameters()) < 20e6


def test_photographs_need_no_name_of_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of pictures and a size are enough. --out is runs/photos by default."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 30, 3), dtype=np.uint8)
    images.save_many(tmp_path / "pictures", pixels, [str(i) for i in range(12)])
    quick = "--steps 1 --width 32 --num-res-blocks 1 --batch-size 2 --eval-images 4 --sample-every 0 --device cpu"
    assert main(["train", "--data", "pictures", "--size", "16", *quick.split()]) == 0
    settings = json.loads((tmp_path / "runs/photos/config.json").read_text())
    assert settings["channel_multipliers"] == list(photos((16, 16)).channel_multipliers)
    assert settings["width"] == 32
    assert len(json.loads((tmp_path / "runs/photos/held_out.json").read_text())["images"]) == 1
