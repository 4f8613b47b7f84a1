"""Models of others: folders of diffusers and the Hugging Face hub wherever a run is asked for, and the way there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from huggingface_hub.errors import LocalTokenNotFoundError

import ddpm
from ddpm.cli import main
from ddpm.files.opening import open_checkpoint
from ddpm.noise import per_image
from ddpm.run.parts import model_key


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory. The grid of a card holds four samples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpm.run.export.SAMPLES", 4)
    return tmp_path


class Hub:
    """The hub, as far as we call it: a folder of repositories."""

    def __init__(self, root: Path) -> None:
        self.root, self.reached = root, True
        self.fetched: list[list[str]] = []

    def model_info(self, repo: str, revision: str | None = None, timeout: float | None = None) -> Any:
        if not self.reached:
            raise ConnectionError
        files = [str(p.relative_to(self.root / repo)) for p in (self.root / repo).rglob("*") if p.is_file()]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(self, repo: str, allow_patterns: list[str] | None = None, **_: Any) -> str:
        self.fetched.append(allow_patterns or [])
        return str(self.root / repo)

    def create_repo(self, repo: str, exist_ok: bool) -> None:
        assert exist_ok
        (self.root / repo).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, folder_path: Path, repo_id: str, commit_message: str) -> None:
        assert commit_message
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The real calls' errors are the other tests'."""
    hub = Hub(tmp_path_factory.mktemp("hub"))
    for name in ("model_info", "create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda self, *a, name=name, **k: getattr(hub, name)(*a, **k))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def sample(source: str) -> Any:
    assert main(["sample", source, "-n", "3", "--sampler", "ddim", "--steps", "5", "--out", "a.npz"]) == 0
    return np.load("a.npz")["arr_0"]


def test_a_folder_of_diffusers_is_a_model(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There, sampled from there by us and by diffusers, and back as one of our files: the same images."""
    want = sample(str(trained))
    assert main(["export", str(trained), "--to", "diffusers", "theirs"]) == 0
    assert np.array_equal(sample("theirs"), want)
    assert main(["import", "theirs", "--out", "ours.safetensors", "--data", "digits"]) == 0
    assert np.array_equal(sample("ours.safetensors"), want)
    assert open_checkpoint("ours.safetensors").preset.data == "digits"
    assert open_checkpoint("theirs").home == Path("ddpm-theirs")
    pipeline = DDIMPipeline.from_pretrained("theirs")
    noise = per_image(range(3), (1, 8, 8))(20)
    found = ddpm.load("theirs")
    assert isinstance(pipeline.unet, UNet2DModel)
    with torch.no_grad():
        theirs, ours = pipeline.unet(noise, 7).sample, found.network(noise, torch.tensor([7, 7, 7]))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert main(["evaluate", "theirs", "--data", "digits", "-n", "2", "--levels-per-image", "3", "--json"]) == 0


def test_what_a_folder_of_diffusers_is_refused(trained: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stays as it is, and says its settings itself; other settings are another model."""
    assert main(["export", str(trained), "--to", "diffusers", "theirs"]) == 0
    before = open_checkpoint("theirs")
    for words, reason in (
        (
            ["calibrate", "theirs", "--data", "digits"],
            "theirs: this model cannot be changed; calibrate a copy: `ddpm im",
        ),
        (["export", "theirs", "--out", "a.safetensors"], "want a file that `ddpm import` has written"),
        (
            ["import", "theirs", "--preset", "cifar10", "--out", "a.safetensors"],
            "--preset: theirs is a diffusers folder, which has its own settings; want no preset",
        ),
        (["sample", "theirs", "--checkpoint", "5"], "checkpoint '5': theirs is one model"),
        (["evaluate", "theirs"], "--data: this model names no dataset; want --data SOURCE"),
        (
            ["export", str(trained), "--to", "diffusers", "new", "--license", "mit"],
            "--license mit: not with --to diffusers",
        ),
        (["export", str(trained), "--to", "diffusers", "theirs"], "out theirs: exists already"),
    ):
        assert main(words) == 2
        assert reason in capsys.readouterr().err
    assert {p.name for p in here.iterdir()} == {"theirs"}
    file = Path("theirs/scheduler/scheduler_config.json")
    file.write_text(file.read_text().replace("epsilon", "v_prediction"))
    after = open_checkpoint("theirs")
    assert after.identity == before.identity  # the same weights
    assert model_key(after) != model_key(before)  # under which results are kept


def test_there_and_back_by_the_hub(trained: Path, here: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """--to hub leaves weights, card and grid; hf:OWNER/NAME is that model wherever a run is asked for."""
    want = sample(str(trained))
    options = ["--precision", "float32", "--license", "apache-2.0", "--json"]
    capsys.readouterr()
    assert main(["export", str(trained), "--to", "hub", "me/tiny", *options]) == 0
    assert json.loads(capsys.readouterr().out)["out"].endswith("/me/tiny")
    assert {p.name for p in (hub.root / "me/tiny").iterdir()} == {"tiny.safetensors", "README.md", "tiny.png"}
    card = (hub.root / "me/tiny/README.md").read_text()
    assert card.startswith("---\nlibrary_name")
    assert "# tiny" in card
    assert "(tiny.png)" in card
    assert np.array_equal(sample("hf:me/tiny"), want)
    assert np.array_equal(sample("hf:me/tiny@main"), want)
    assert hub.fetched == [["*.json", "*.safetensors"]] * 2
    assert open_checkpoint("hf:me/tiny").home == Path("ddpm-tiny")
    hub.reached = False  # what was fetched before is still there
    assert ddpm.load("hf:me/tiny").predict == "eps"


def test_a_published_model_of_diffusers(trained: Path, here: Path, hub: Hub) -> None:
    """With the network's files at the top, as google/ddpm-cifar10-32 has them, and no safetensors."""
    assert main(["export", str(trained), "--to", "diffusers", "theirs"]) == 0
    repo = hub.root / "google/tiny"
    repo.mkdir(parents=True)
    state = UNet2DModel.from_pretrained("theirs", subfolder="unet").state_dict()
    torch.save(state, repo / "diffusion_pytorch_model.bin")
    shutil.copy("theirs/unet/config.json", repo)
    shutil.copy("theirs/scheduler/scheduler_config.json", repo)
    assert np.array_equal(sample("hf:google/tiny"), sample("theirs"))
    assert main(["import", "hf:google/tiny", "--out", "copy.safetensors"]) == 0
    assert np.array_equal(sample("copy.safetensors"), sample("theirs"))
    assert hub.fetched[0] == ["*.json", "*.bin"]


def test_without_a_network_it_is_one_line(here: Path) -> None:
    """The real call, at a port where nobody listens."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(here / "cache")}
    lines = ["sample hf:google/ddpm-cifar10-32", "export digits --to hub hf:a/b"]
    code = "import sys; from ddpm.cli import main; print([main(line.split()) for line in sys.argv[1:]])"
    made = subprocess.run([sys.executable, "-c", code, *lines], env=environment, capture_output=True, text=True)
    assert made.stdout.splitlines()[-1] == "[2, 2]", made.stderr
    said = [line for line in made.stderr.splitlines() if line.startswith("ddpm: ")]
    for line, found in zip(lines, said, strict=True):
        assert found.startswith(f"ddpm: {line.split()[-1]}: the hub cannot be reached")
    assert "Traceback" not in made.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["sample", "hf:a/b/c"], "hf:a/b/c: want hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"),
        (
            ["import", "nothing", "--out", "a.safetensors"],
            "nothing: no such file or folder; want a diffusers folder",
        ),
        (["import", "words.txt", "--out", "a.safetensors"], "words.txt: not plain weights"),
        (["import", "folder", "--out", "a.safetensors"], "folder: not a diffusers folder"),
        (["import", "words.txt", "--out", "a.pt"], "out a.pt: want a name that ends in .safetensors"),
        (["import", "words.txt", "--out", "a.safetensors", "--preset", "cifar"], "did you mean cifar10?"),
    ],
)
def test_mistakes(words: list[str], reason: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("words.txt").write_text("These are words.")
    Path("folder").mkdir()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert len(err.splitlines()) == 1
    assert {p.name for p in here.iterdir()} == {"words.txt", "folder"}


def test_the_hub_wants_to_know_who_asks(
    trained: Path, here: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stranger(*_: Any, **__: Any) -> None:
        raise LocalTokenNotFoundError

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", stranger)
    assert main(["export", str(trained), "--to", "hub", "me/tiny"]) == 2
    assert capsys.readouterr().err.endswith("me/tiny: you are not logged in to the hub; run `hf auth login` first\n")
