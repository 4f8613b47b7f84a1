"""Samples that are written while they are made: the same images whatever the file, the stops and the processes."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.cli import main
from ddpm.errors import InputError
from ddpm.files import data
from ddpm.files.opening import open_checkpoint
from ddpm.run.processes import Processes
from ddpm.run.sample import Conditions, Sampling, sample
from ddpm.run.stream import RECORD, write_samples

ALONE = Processes(0, 1, torch.device("cpu"))
N = 11
SAMPLING = Sampling("ddim", 2, conditions=Conditions(("7", "3", "5")), seed=4, batch_size=3)
QUICK = ["--steps", "2", "--sampler", "ddim", "--class", "7", "3", "5", "--seed", "4", "--batch-size", "3"]


@pytest.fixture(scope="module")
def checkpoint() -> Any:
    return open_checkpoint("digits", precision="float32")  # bf16 is slow on many CPUs


@pytest.fixture(scope="module")
def expected(checkpoint: Any) -> Any:
    """The images of `sample`, which holds them all, uint8 [N, 8, 8, 1]."""
    return sample(checkpoint, N, ALONE, SAMPLING)[0].permute(0, 2, 3, 1).numpy()


def of_tars(files: list[Path]) -> dict[str, Any]:
    """From the name of a file in tar files to its pixels, or its text."""
    found: dict[str, Any] = {}
    for file in files:
        with tarfile.open(file) as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                bytes_ = content.read()
                is_png = member.name.endswith(".png")
                assert member.name not in found
                found[member.name] = np.asarray(Image.open(io.BytesIO(bytes_))) if is_png else bytes_.decode()
    return found


def check_tars(files: list[Path], expected: Any) -> None:
    """All images by their seeds, each with its class, which cycles."""
    found = of_tars(files)
    assert len(found) == 2 * N
    for i in range(N):
        assert np.array_equal(found[f"{4 + i:06d}.png"], expected[i, :, :, 0])
        assert found[f"{4 + i:06d}.cls"] == ["7", "3", "5"][i % 3]


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Ctrl-C in the batch after so many."""
    made, real = [0], Sampling.maker

    def maker(self: Sampling, *args: Any) -> Any:
        make, about = real(self, *args)

        def stops(*places: Any, **settings: Any) -> Any:
            if made[0] == batches:
                raise KeyboardInterrupt
            made[0] += 1
            return make(*places, **settings)

        return stops, about

    monkeypatch.setattr(Sampling, "maker", maker)


def stopped(checkpoint: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An .npy of which two batches were made."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            write_samples(checkpoint, N, ALONE, out, SAMPLING, "npy")


def test_arrays_are_numpys_own_files(checkpoint: Any, expected: Any, tmp_path: Path) -> None:
    """The bytes of an .npy are those of numpy.save, and an .npz holds that file."""
    about, made = write_samples(checkpoint, N, ALONE, tmp_path / "a.npy", SAMPLING, "npy")
    assert (about["count"], made) == (N, N)
    np.save(tmp_path / "b.npy", expected)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    write_samples(checkpoint, N, ALONE, tmp_path / "a.npz", SAMPLING, "npz")
    with np.load(tmp_path / "a.npz") as file:
        assert file.files == ["arr_0"]
        assert np.array_equal(file["arr_0"], expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "a.npz", "b.npy"]


def test_tars_hold_images_and_classes(checkpoint: Any, expected: Any, tmp_path: Path) -> None:
    """One tar file and several hold the same, and this package reads the images, the classes and the order back."""
    write_samples(checkpoint, N, ALONE, tmp_path / "a.tar", SAMPLING, "tar")
    check_tars([tmp_path / "a.tar"], expected)
    write_samples(checkpoint, N, ALONE, tmp_path / "set", SAMPLING, shard=4)
    shards = sorted((tmp_path / "set").glob("*.tar"))
    assert [p.name for p in shards] == ["set-000000.tar", "set-000001.tar", "set-000002.tar"]
    check_tars(shards, expected)
    for source in ("a.tar", "set"):
        images = data.load(str(tmp_path / source), (8, 8), 1)
        assert np.array_equal(images.batch(range(N)).permute(0, 2, 3, 1).numpy(), expected)
        assert images.labels is not None
        assert images.class_names is not None
        assert [images.class_names[k] for k in images.labels.tolist()] == [["7", "3", "5"][i % 3] for i in range(N)]


@pytest.mark.parametrize(("kind", "out"), [("npy", "a.npy"), ("npz", "a.npz"), ("tar", "a.tar"), ("folder", "set")])
def test_what_a_stop_left_is_not_made_again(
    kind: str, out: str, checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of the final name is there before it is whole, and the result is that of a command without a stop."""
    shard = 3 if kind == "folder" else None
    write_samples(checkpoint, N, ALONE, tmp_path / "whole" / out, SAMPLING, kind, shard)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt, match=r"^5 of 11 images are left, from seed 10 on; the same command"):
            write_samples(checkpoint, N, ALONE, tmp_path / out, SAMPLING, kind, shard)
    kept = sorted(tmp_path.rglob("set-*.tar" if shard else "*.part"))
    assert len([p for p in kept if p.parent.parent == tmp_path]) == 2
    assert (tmp_path / out).exists() == (kind == "folder")
    assert write_samples(checkpoint, N, ALONE, tmp_path / out, SAMPLING, kind, shard)[1] == 5
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()]
    assert len(files) == (5 if shard else 1)
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_another_batch_size_resumes_too(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(checkpoint, tmp_path / "a.npy", monkeypatch)
    other = Sampling(**{**vars(SAMPLING), "batch_size": 5})
    assert write_samples(checkpoint, N, ALONE, tmp_path / "a.npy", other, "npy")[1] == N - 6


def test_shards_grow(checkpoint: Any, tmp_path: Path) -> None:
    """A last tar file that was short is made again, and whole ones are kept."""
    write_samples(checkpoint, 6, ALONE, tmp_path / "set", SAMPLING, shard=4)
    first = (tmp_path / "set" / "set-000000.tar").stat().st_ino
    assert write_samples(checkpoint, N, ALONE, tmp_path / "set", SAMPLING, shard=4)[1] == N - 4
    assert (tmp_path / "set" / "set-000000.tar").stat().st_ino == first
    write_samples(checkpoint, N, ALONE, tmp_path / "b" / "set", SAMPLING, shard=4)
    for file in (tmp_path / "b" / "set").iterdir():
        assert file.read_bytes() == (tmp_path / "set" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--shard", "3"], "holds samples with shard 4, and these have 3; want a new or an empty folder"),
        ([], "holds samples with shard 4, and these have None; want a new or an empty folder"),
        (["--shard", "4", "-n", "5"], "holds 6 samples; want n of at least that"),
        (["--shard", "0"], "--shard 0: want "),
        (["--shard", "3", "--out", "b.tar"], "--shard 3: --out b.tar is one file; want a folder as --out"),
        (["--out", "b.tar.gz"], "--out b.tar.gz: want a name that ends in .png, .npz, .npy, .tar or .tif, FILE.gif"),
        (["--out", "b.tar", "--progressive"], "--progressive makes one picture"),
    ],
)
def test_mistakes(
    words: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["sample", "digits", "-n", "6", "--out", "set/", *QUICK]
    assert main([*command, "--shard", "4"]) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*")}
    capsys.readouterr()
    assert main([*command, *words]) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert len(err.splitlines()) == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*")} == before


def test_parts_of_other_samples_are_not_used(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named, and nothing is deleted. A part that is cut short is no part of a file either."""
    stopped(checkpoint, tmp_path / "a.npy", monkeypatch)
    other = Sampling(**{**vars(SAMPLING), "seed": 9})
    with pytest.raises(InputError, match=r"seed 4, and these have 9; delete .*a\.npy\.parts, or want another name"):
        write_samples(checkpoint, N, ALONE, tmp_path / "a.npy", other, "npy")
    part = tmp_path / "a.npy.parts" / "00000000-00000003.part"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged, its parts have 703 bytes; want to delete it"):
        write_samples(checkpoint, N, ALONE, tmp_path / "a.npy", SAMPLING, "npy")
    assert not (tmp_path / "a.npy").exists()


def test_processes_share_the_files(
    checkpoint: Any, expected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes its own tar files, and together they make all of them once."""
    monkeypatch.setattr(Processes, "total", lambda self, x: x)
    made = [
        write_samples(checkpoint, N, Processes(rank, 2, ALONE.device), tmp_path / "set", SAMPLING, shard=2)[1]
        for rank in (0, 1)
    ]
    assert made == [6, 5]  # shards 0, 2, 4 and shards 1, 3, 5, of which the last has one image
    check_tars(sorted((tmp_path / "set").glob("*.tar")), expected)


def test_no_process_holds_more_than_a_batch(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images that were asked for at once, for every kind."""
    sizes, real = [], Sampling.maker

    def maker(self: Sampling, *args: Any) -> Any:
        make, about = real(self, *args)
        return lambda places, **settings: (sizes.append(len(places)), make(places, **settings))[1], about

    monkeypatch.setattr(Sampling, "maker", maker)
    for kind, shard in (("npy", None), ("npz", None), ("tar", None), ("folder", None), ("folder", 7)):
        write_samples(checkpoint, N, ALONE, tmp_path / f"{kind}{shard}", SAMPLING, kind, shard)
    assert max(sizes) == 3
    assert sum(sizes) == 5 * N


def test_the_last_line_tells_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "digits", "-n", "6", "--out", str(tmp_path / "set"), *QUICK, "--shard", "4"]
    for line in (" images/s", ", 0 made now, 0 images/s"):
        assert main(command) == 0
        assert capsys.readouterr().out.rstrip().endswith(line)
    assert json.loads((tmp_path / "set" / RECORD).read_text())["count"] == 6
