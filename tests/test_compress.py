"""`ddpm compress`, `decompress` and `inspect` on the package's digits, as somebody at a terminal uses them."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
from ddpm import codec
from ddpm.cli import main
from ddpm.codec import archive
from ddpm.errors import InputError
from ddpm.files import checkpoints, data, images, interop, models, opening, tensors
from ddpm.presets import PRESETS, build
from ddpm.run import compress
from ddpm.run.processes import Processes


@pytest.fixture(scope="module")
def model():
    return ddpm.load_codec("digits")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four digits of the test set as files."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(data.load("digits", (8, 8), 1, split="test").batch([0, 1, 2, 3])):
        images.save(folder / f"digit{i}.png", image.permute(1, 2, 0).numpy())
    return folder


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_fresh_process_with_other_threads_reads_it_back(pictures, tmp_path):
    """Elsewhere and with another hash seed. Both profiles share the process, because torch starts slowly."""
    files = {name: (tmp_path / f"{name}.ddpm", tmp_path / f"{name}.png") for name in ("portable", "local")}
    for name, (file, _) in files.items():
        words = ["compress", "digits", str(pictures / "digit0.png"), "--chunk-bits", "8"]
        assert main([*words, "--profile", name, "--out", str(file)]) == 0
    code = "import json, sys; from ddpm.cli import main; sys.exit(any(map(main, json.loads(sys.argv[1]))))"
    words = json.dumps([["decompress", "digits", str(file), "--out", str(out)] for file, out in files.values()])
    done = subprocess.run(
        [sys.executable, "-c", code, words], cwd="/", capture_output=True, text=True,
        env={**os.environ, "PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exactly as before") == 2
    for _, out in files.values():
        assert np.array_equal(pixels(out), pixels(pictures / "digit0.png"))


def test_an_archive_takes_names_that_differ_in_case_only(tmp_path):
    for name in ("a.png", "A.png"):
        images.save(tmp_path / name, np.zeros((8, 8, 1), np.uint8))
    paths, archive = [str(tmp_path / name) for name in ("a.png", "A.png")], str(tmp_path / "all.ddpm")
    assert main(["compress", "digits", *paths, "--archive", "--out", archive, "--chunk-bits", "8"]) == 0
    assert main(["decompress", "digits", archive, "--out", str(tmp_path / "back")]) == 0
    assert len({path.name.casefold() for path in (tmp_path / "back").iterdir()}) == 2


def test_several_pictures_go_to_a_folder_and_an_archive_to_a_file(model, pictures, tmp_path, capsys):
    paths = [str(pictures / f"digit{i}.png") for i in range(2)]
    assert main(["compress", "digits", *paths, "--out", str(tmp_path / "files"), "--chunk-bits", "8", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [about["file"] for about in made] == [str(tmp_path / "files" / f"digit{i}.ddpm") for i in range(2)]
    assert all(about["bytes"] == os.path.getsize(about["file"]) for about in made)
    archive = str(tmp_path / "all.ddpm")
    assert main(["compress", "digits", *paths, "--archive", "--out", archive, "--chunk-bits", "8"]) == 0
    assert main(["decompress", "digits", archive, "--out", str(tmp_path / "back")]) == 0
    for i in range(2):
        assert np.array_equal(pixels(tmp_path / "back" / f"digit{i}.png"), pixels(paths[i]))
    capsys.readouterr()
    assert main(["inspect", archive, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["pictures"], about["profile"], about["chunk_bits"]) == (2, "portable", 8)
    assert about["model"] == model.identity.hex()
    assert (about["bytes"], about["state"]) == (os.path.getsize(archive), "whole")
    for name, damage, state in [
        (archive, lambda data: data[:-20], "20 bytes are missing"),
        (made[0]["file"], lambda data: data[:-20], "20 bytes are missing"),
        (made[0]["file"], lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:], "damaged"),
        (made[0]["file"], lambda data: data + b"x", "1 bytes too many"),
    ]:
        file = tmp_path / "damaged.ddpm"
        file.write_bytes(damage(open(name, "rb").read()))
        assert main(["inspect", str(file), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["state"] == state
        if state != "20 bytes are missing":
            assert main(["decompress", "digits", str(file), "--out", str(tmp_path / "damaged.png")]) == 2
            assert capsys.readouterr().err.startswith(f"ddpm: {file}: ")


def test_names_that_would_be_one_file_become_two(model, pictures, tmp_path, monkeypatch):
    image, file = compress.read_image(pictures / "digit0.png"), tmp_path / "a.ddpm"
    file.write_bytes(archive.compress(model, [image], ["../x"], bits=8))
    compress.decompress(model, file, tmp_path / "one")
    assert os.listdir(tmp_path / "one") == ["_x.png"]
    cases = [
        (["a (1)", "A [1]", "../x", ""], ["a _1_.png", "A _1_1.png", "_x.png", "3.png"]),
        (["A2", "a", "A"], ["A2.png", "a.png", "A22.png"]),  # what the third would become is taken, too
    ]
    for i, (names, wanted) in enumerate(cases):
        found = [np.full_like(image, number) for number in range(len(names))]
        pairs = list(zip(names, found, strict=True))
        monkeypatch.setattr(archive, "decompress", lambda *_, pairs=pairs: iter(pairs))
        compress.decompress(model, file, tmp_path / f"back{i}")
        assert sorted(os.listdir(tmp_path / f"back{i}")) == sorted(wanted)
        for name, each in zip(wanted, found, strict=True):
            assert np.array_equal(pixels(tmp_path / f"back{i}" / name), each.squeeze())


def test_part_of_a_file_and_what_it_holds(pictures, tmp_path, capsys):
    file, out = tmp_path / "a.ddpm", tmp_path / "a.png"
    assert main(["compress", "digits", str(pictures / "digit1.png"), "--out", str(file), "--chunk-bits", "8"]) == 0
    capsys.readouterr()
    assert main(["decompress", "digits", str(file), "--out", str(out), "--at", "40"]) == 0
    assert "the file was read in part" in capsys.readouterr().out
    assert main(["inspect", str(file), "--run", "digits"]) == 0
    said = capsys.readouterr().out
    assert "kind: lossless" in said
    assert "1000 ->" in said
    assert main(["inspect", str(file), "--run", "digits", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["bytes"] == about["header_bytes"] + about["payload_bytes"] + about["checksum_bytes"]


def test_lossy_by_rate_and_by_psnr(pictures, tmp_path):
    source = pictures / "digit2.png"
    for option in (["--bits-per-dim", "6"], ["--psnr", "18"]):
        file, out = tmp_path / "a.ddpm", tmp_path / "a.png"
        assert main(["compress", "digits", str(source), "--out", str(file), "--chunk-bits", "8", *option]) == 0
        assert main(["decompress", "digits", str(file), "--out", str(out)]) == 0
        mse = np.mean((pixels(out).astype(float) - pixels(source)) ** 2)
        if "--psnr" in option:
            assert 10 * np.log10(255**2 / mse) >= 18
        else:
            assert file.stat().st_size * 8 / 64 <= 6
        assert mse > 0


def saved(folder, name, mode, size=(8, 8)):
    path = folder / name
    Image.new(mode, size).save(path)
    return path


def test_mistakes_are_one_line(pictures, tmp_path, capsys, model):
    good, file = str(pictures / "digit0.png"), tmp_path / "a.ddpm"
    file.write_bytes(codec.compress(model, compress.read_image(good), bits=8))
    rgba, deep = str(saved(tmp_path, "rgba.png", "RGBA")), str(saved(tmp_path, "deep.png", "I;16"))
    (tmp_path / "capital").mkdir()
    capital = str(shutil.copy(good, tmp_path / "capital" / Path(good).name.upper()))
    (tmp_path / "junk.ddpm").write_bytes(b"junk")
    (tmp_path / "empty.ddpm").write_bytes(b"")
    new = str(tmp_path / "new.ddpm")
    png = str(tmp_path / "new.png")
    cases = [
        (["compress", "digits", rgba, "--out", new], "transparency"),
        (["compress", "digits", deep, "--out", new], "more than 8 bits"),
        (["compress", "digits", "nowhere.png", "--out", new], "nowhere.png"),
        (["compress", "nothing", good, "--out", new], "nothing: no such file or folder"),
        (["compress", "digits", good, "--out", new, "--chunk-bits", "9"], "bits 9: the model is calibrated for 8,"),
        (["compress", "digits", good, "--out", new, "--profile", "fast"], "portable"),
        (["compress", "digits", good, "--out", new, "--lossless", "--psnr", "30"], "--lossless, --psnr"),
        (["compress", "digits", good, "--out", new, "--archive", "--psnr", "30"], "--archive"),
        (["compress", "digits", good, "--out", new, "--bits-per-dim", "0.001"], "want more"),
        (["compress", "digits", good, good, "--out", str(tmp_path / "two")], "two images have this name"),
        (["compress", "digits", good, capital, "--out", str(tmp_path / "two")], "two images have this name"),
        (["compress", "digits", good, deep, "--out", new], "want a folder, or --archive"),
        (["decompress", "digits", str(tmp_path / "junk.ddpm"), "--out", png], "not a file of `ddpm compress`"),
        (["decompress", "digits", str(tmp_path / "empty.ddpm"), "--out", png], "0 bytes"),
        (["decompress", "digits", str(tmp_path / "no.ddpm"), "--out", png], "no such file"),
        (["decompress", "digits", str(file), "--out", str(tmp_path / "a.jpg")], "PNG"),
        (["decompress", "digits", str(file), "--out", png, "--at", "3"], "at 3: want at least the header"),
        (["inspect", good], "not a file of `ddpm compress`"),
    ]
    for words, message in cases:
        assert main(words) == 2, words
        said = capsys.readouterr().err
        assert message in said, said
        assert said.count("\n") == 1, said
    assert not os.path.exists(new)
    assert not os.path.exists(png)
    assert not (tmp_path / "two").exists()


def test_a_model_without_tables_says_what_to_do(trained, pictures, tmp_path, capsys):
    words = ["compress", str(trained), str(pictures / "digit0.png"), "--out", str(tmp_path / "a.ddpm")]
    assert main(words) == 2
    assert "no tables for the codec; want `ddpm calibrate " in capsys.readouterr().err


def test_a_model_of_transparent_pictures_has_no_codec(tmp_path):
    """Its calibration has none, and may so be made again."""
    preset = replace(PRESETS["digits"], channels=4, classes=False, num_timesteps=20, sample_steps=20)
    interop.save(tmp_path / "rgba.safetensors", preset, build(preset).network.state_dict(), "")
    images.save_many(tmp_path / "set/", np.zeros((2, 8, 8, 4), np.uint8), ["a", "b"])
    words = ["calibrate", str(tmp_path / "rgba.safetensors"), "--data", str(tmp_path / "set"), "-n", "1"]
    assert main(words) == 0
    assert main(words) == 0
    with pytest.raises(
        ddpm.InputError,
        match=r"rgba\.safetensors: its images are uint8 0..255, 4 channels; .* takes 8-bit grey and RGB",
    ):
        ddpm.load_codec(tmp_path / "rgba.safetensors")


def test_the_raw_weights_have_a_codec_of_their_own(pictures, tmp_path, capsys):
    """That of their own tables; the averaged ones read none of their files."""
    digits = opening.open_checkpoint("digits")
    state = digits.denoiser.network.state_dict()
    raw = {name: 0.99 * value for name, value in state.items()}
    run = checkpoints.save(tmp_path / "run", digits.preset, {"step": 1}, {"ema": state, "raw": raw})
    tables = json.loads(models.calibration_file(digits.path).read_text())
    for name in ("ema", "raw"):
        own = tables | {"weights": tensors.identity(tensors.read_tensors(run / f"{name}.safetensors"))}
        (run / f"{name}.calibration.json").write_text(json.dumps(own))
    source, file, out = pictures / "digit0.png", tmp_path / "a.ddpm", tmp_path / "a.png"
    words = ["compress", str(run), str(source), "--out", str(file), "--chunk-bits", "8"]
    assert main([*words, "--weights", "both"]) == 2
    assert main([*words, "--weights", "raw"]) == 0
    capsys.readouterr()
    assert main(["decompress", str(run), str(file), "--out", str(out)]) == 2
    assert f"ddpm: {file}: of model " in capsys.readouterr().err
    models.calibration_file(run / "raw.safetensors").unlink()
    assert main([*words, "--weights", "raw"]) == 2
    assert capsys.readouterr().err == (
        f"ddpm: {run / 'raw.calibration.json'}: no tables for the codec; want `ddpm calibrate {run} --weights raw`\n"
    )
    (run / "raw.calibration.json").write_text(json.dumps(own))
    assert main(["decompress", str(run), str(file), "--out", str(out), "--weights", "raw"]) == 0
    assert np.array_equal(pixels(out), pixels(source))


def test_a_file_of_another_machine_is_warned_of(pictures, tmp_path, capsys, model, monkeypatch):
    file, out = tmp_path / "a.ddpm", tmp_path / "a.png"
    words = ["compress", "digits", str(pictures / "digit0.png"), "--out", str(file), "--profile", "local"]
    assert main([*words, "--chunk-bits", "8"]) == 0
    monkeypatch.setattr(compress, "_environment", lambda *_: b"??")
    capsys.readouterr()
    assert main(["decompress", "digits", str(file), "--out", str(out)]) == 0
    assert "written in the local profile on another machine" in capsys.readouterr().err
    assert main(["decompress", "digits", str(file), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]


def test_colour_and_large_pictures_by_a_model_of_small_grey_ones(tmp_path):
    rng = np.random.default_rng(0)
    source, file, out = (tmp_path / name for name in ("a.png", "a.ddpm", "b.png"))
    images.save(source, rng.integers(0, 17, (9, 5, 3), np.uint8) * 15)
    assert main(["compress", "digits", str(source), "--out", str(file), "--chunk-bits", "8"]) == 0
    assert main(["decompress", "digits", str(file), "--out", str(out)]) == 0
    assert np.array_equal(pixels(source), pixels(out))


def test_pictures_that_share_network_calls_are_the_same_files(pictures):
    """Batch 1 and 4, in the local profile, where the machine's kernels promise the same bits in any batch."""
    model = ddpm.load_codec("digits", precision="bf16")
    if not model.batches:
        pytest.skip("no kernels of ours on this machine")
    found = [compress.read_image(pictures / f"digit{i}.png") for i in range(4)]
    files = list(codec.compress_each(model, found, bits=8, local=True))
    assert files == [codec.compress(model, image, bits=8, local=True) for image in found]
    for file, image in zip(files, found, strict=True):
        assert np.array_equal(codec.decompress(model, file), image)


def test_one_tile_or_many_and_threads_make_one_portable_file(model, pictures):
    image = compress.read_image(pictures / "digit3.png")
    import torch

    one = codec.compress(model, image, bits=8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert codec.compress(model, image, bits=8) == one
    finally:
        torch.set_num_threads(threads)
    many = np.concatenate([image, image], axis=1)
    assert np.array_equal(codec.decompress(model, codec.compress(model, many, bits=8)), many)


def written(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


GREY = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.gif", written(GREY, "GIF", save_all=True, append_images=[GREY.rotate(90)]), "several pictures"),
        ("a.tif", written(GREY, "TIFF", save_all=True, append_images=[GREY.rotate(90)]), "several pictures"),
        ("a.png", written(GREY, "PNG", transparency=7), "transparency"),
        ("a.png", written(GREY.convert("RGB"), "PNG", transparency=(7, 7, 7)), "transparency"),
        ("a.gif", written(GREY, "GIF", transparency=7), "transparency"),
        ("a.ppm", b"P6 1 1 65535\n" + bytes(6), "more than 8 bits per channel"),
        ("a.ppm", b"P5 1 1 1023\n" + bytes(2), "more than 8 bits per channel"),
        ("a.tif", written(GREY.convert("CMYK"), "TIFF"), "mode CMYK"),
    ],
)
def test_what_the_codec_would_lose_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        compress.read_image(tmp_path / name)


def test_what_loses_nothing_is_read_as_pillow_reads_it(tmp_path):
    for k, image in enumerate((GREY, GREY.convert("RGBA"), GREY.convert("LA"), GREY.convert("RGB").quantize(8))):
        image.save(tmp_path / f"{k}.png")
        channels = 1 if image.mode in ("L", "LA") else 3
        want = np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(8, 8, channels)
        assert (compress.read_image(tmp_path / f"{k}.png") == want).all()


def test_a_colour_profile_that_is_lost_is_warned_of(tmp_path):
    GREY.save(tmp_path / "a.png", icc_profile=b"a profile")
    with pytest.warns(UserWarning, match=r"a\.png: its colour profile is not kept; its pixel values are"):
        assert (compress.read_image(tmp_path / "a.png")[..., 0] == np.asarray(GREY)).all()


def test_processes_divide_the_pictures(model, pictures, tmp_path, monkeypatch):
    """Together they write the files of one process, to the byte. An archive is the first one's alone."""
    paths = [pictures / f"digit{i}.png" for i in range(3)]
    alone = compress.compress(model, paths, tmp_path / "one", progress=False, bits=8)
    monkeypatch.setattr(Processes, "exchange", lambda self, mine: [[(i, 0) for i in range(3)], mine])
    ranks = [Processes(rank, 2, torch.device("cpu")) for rank in (0, 1)]
    for rank, names in zip(ranks, (["digit0", "digit2"], ["digit1"]), strict=True):
        compress.compress(model, paths, tmp_path / f"two{rank.rank}", progress=False, ranks=rank, bits=8)
        made = {p.stem: p.read_bytes() for p in (tmp_path / f"two{rank.rank}").iterdir()}
        assert made == {name: (tmp_path / "one" / f"{name}.ddpm").read_bytes() for name in names}
    assert [about["bytes"] for about in alone] == [os.path.getsize(about["file"]) for about in alone]
    archived = [compress.compress(model, paths[:1], tmp_path / "a.ddpm", True, False, rank, bits=8) for rank in ranks]
    assert [len(written) for written in archived] == [1, 0]


def test_one_picture_at_a_time_is_held(model, pictures, tmp_path, monkeypatch):
    """Each picture is read when the one before is written."""
    paths, real, events = [pictures / f"digit{i}.png" for i in range(3)], compress.read_image, []
    monkeypatch.setattr(compress, "read_image", lambda path: (events.append("read"), real(path))[1])
    write = compress.atomic.write
    monkeypatch.setattr(compress.atomic, "write", lambda *args: (events.append("write"), write(*args)))
    compress.compress(model, paths, tmp_path / "out", progress=False, bits=8)
    assert events == ["read"] * 3 + ["read", "write"] * 3
