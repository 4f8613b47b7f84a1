"""The scripts in benchmarks/: statistics and counts are checked exactly, measurements run once on tiny networks."""

import argparse
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exact import one_thread  # noqa: F401
from several import start_python

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import codec
import figures
import fine_tune
import memory
import peers
import profile_step
import quality_per_hour
import record
import sampling
import scaling
import speed
import start
import timing

from ddpm.gaussian import q_sample
from ddpm.presets import PRESETS, build

TINY = replace(
    PRESETS["cifar10_small"],
    size=(8, 8),
    width=32,
    channel_multipliers=(1, 1),
    attention_resolutions=(8,),
    batch_size=4,
    dropout=0.1,
)


@pytest.fixture
def tiny(monkeypatch):
    """Put a tiny network in place of each network that a script can name."""
    monkeypatch.setattr(peers, "PAPER", TINY)
    monkeypatch.setattr(peers, "SMALL", TINY)
    monkeypatch.setitem(speed.NETWORKS, "small", (TINY, peers.example_network))
    monkeypatch.setitem(scaling.NETWORKS, "small", TINY)
    monkeypatch.setitem(PRESETS, "cifar10", TINY)
    return TINY


def test_codec_reads_its_files_back_and_resumes_only_with_the_same_settings(tmp_path, monkeypatch, capsys):
    def run(*options):
        about = ["codec.py", "digits", "--data", "digits", "--parts", "single", "others", "--repeats", "1"]
        monkeypatch.setattr(sys, "argv", [*about, "--work", str(tmp_path), "--out", str(tmp_path), *options])
        codec.main()
        return json.loads(next(tmp_path.glob("codec_*.json")).read_text())["results"]["single"]

    result = run("--images", "2")
    assert result["read_back"] == result["images"] == 2
    assert result["bound"] < result["groups"] + result["pixels"] < result["file"]
    monkeypatch.setattr(codec, "single", None)
    assert run("--images", "2") == result
    with pytest.raises(SystemExit, match="other settings"):
        run("--images", "3")


# Statistics.


def test_repeats_are_taken_in_turns():
    order = []
    cases = {name: lambda name=name: order.append(name) or time.sleep(0.002) for name in "abc"}
    times = timing.interleave(cases, repeats=3, seconds=0)
    assert "".join(order).endswith("abc" * 3)
    assert [len(repeats) for repeats in times.values()] == [3, 3, 3]
    assert all(0.002 <= t < 1 for repeats in times.values() for t in repeats)


def test_a_repeat_makes_enough_calls_for_its_duration():
    calls = []
    times = timing.interleave({"a": lambda: calls.append(0) or time.sleep(0.01)}, repeats=1, seconds=0.05)
    assert 3 <= len(calls) <= 7  # one warms up, and one measures how long a call takes
    assert times["a"][0] < 0.1  # seconds per call, not of all calls


def test_a_case_may_time_itself():
    calls = []
    times = timing.interleave({"a": lambda: calls.append(0) or timing.Timed(7.0)}, repeats=2, seconds=100)
    assert times == {"a": [7.0, 7.0]}
    assert len(calls) == 3


def test_a_ratio_compares_times_of_the_same_turn():
    """If the machine is half as fast in the second turn, no ratio changes."""
    times = {"ours": [1.0, 2.0, 1.0], "theirs": [3.0, 6.0, 2.0], "other": [9.0, 9.0, 9.0]}
    assert timing.ratio(times, "ours", "theirs") == (3.0, 2.0, 3.0)
    assert timing.ratio(times, "ours", "ours") == (1.0, 1.0, 1.0)
    assert timing.fastest(times, ["theirs", "other"]) == "theirs"
    assert figures.spread([4.0, 1.0, 2.0, 10.0]) == (3.0, 1.0, 10.0)
    assert str(figures.Spread(3.14159, 0.001, 12345.6)) == "3.14 (0.001 - 12,346)"


def test_a_part_leaves_out_the_parts_that_it_calls():
    parts = timing.Parts()
    owner = argparse.Namespace(work=lambda: time.sleep(0.03))
    work = owner.work
    with parts.timing((owner, "work", "inner")), parts("outer"):
        time.sleep(0.01)
        owner.work()
    assert owner.work is work
    assert 0.01 <= parts.seconds["outer"] < 0.03 <= parts.seconds["inner"]


def test_a_generators_part_leaves_out_its_consumer():
    def each():
        for i in range(3):
            time.sleep(0.01)
            yield i

    parts, owner = timing.Parts(), argparse.Namespace(each=each)
    with parts.timing((owner, "each", "inner")), parts("outer"):
        for _ in owner.each():
            time.sleep(0.02)
    assert 0.03 <= parts.seconds["inner"] < 0.06 <= parts.seconds["outer"]


def test_a_record_names_its_provenance_and_no_folder(tmp_path, capsys):
    args = record.parser("").parse_args(["--out", str(tmp_path), "--plain"])
    args.data = "/a/secret/path"
    path = record.write("name", "Title", args, {"x": [1, 2]}, figures.table(["a"], [["b"]]))
    values, text = json.loads(path.with_suffix(".json").read_text()), path.read_text()
    assert values["x"] == [1, 2]
    assert {"hardware", "threads", "versions", "commit", "date", "settings"} <= values.keys()
    assert {"ddpm", "torch", "diffusers"} <= values["versions"].keys()
    assert "| a |\n| --- |\n| b |" in text
    assert "5 repeats" in text
    assert "--plain" in text
    assert "secret" not in text + path.with_suffix(".json").read_text()


# Each script's measurements.


def test_our_and_their_networks_have_the_same_number_of_parameters():
    def size(network):
        return sum(p.numel() for p in network.parameters())

    with torch.device("meta"):
        for theirs, preset in (
            (peers.paper_network, PRESETS["cifar10"]),
            (peers.paper_network, PRESETS["celebahq256"]),
            (peers.example_network, PRESETS["cifar10_small"]),
        ):
            assert size(theirs(preset)) == size(build(preset).network)


@pytest.mark.parametrize("settings", [{}, {"autocast": True, "quick": True, "channels_last": True}])
def test_a_step_of_each_package_trains(settings):
    """A training step changes weights, averages and the count of steps."""
    x0 = peers.batch(TINY, 2)
    theirs = peers.Theirs(peers.example_network(TINY), **settings)
    before = [p.clone() for p in theirs.weights]
    losses = [theirs.step(x0) for _ in range(3)]
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any(not torch.equal(a, b) for a, b in zip(before, theirs.weights, strict=True))
    assert theirs.average.optimization_step == 3
    ours = peers.Ours(TINY, 2, "float32")
    model = ours.training.model
    before, average = ([p.clone() for p in group] for group in (model.weights, model.average_weights))
    ours.step()
    ours.without_graph()
    assert model.step == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, model.weights, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(average, model.average_weights, strict=True))


def test_speed(tiny):
    cases = speed.training_cases(tiny, peers.example_network, 2, steps=1)
    assert {speed.MAIN, f"{speed.MAIN}, `ddpm train`", "diffusers float32 (its default)"} < set(cases)
    times = timing.interleave({name: cases[name] for name in cases if speed.BEST in name}, 1, 0)
    values, text = speed.summary(times, 2)
    assert values[speed.MAIN]["ours_is_faster_by"]["median"] == 1
    assert "`ddpm train`" in text
    assert f"{speed.MAIN.capitalize()} against the fastest other, diffusers" in text
    assert "compiled" not in text
    assert any("compiled" in name for name in speed.theirs_settings(compiled=True))
    for name, case in speed.forward_cases(tiny, peers.example_network, 2).items():
        if speed.BEST in name:
            case()


def test_a_missing_peer_has_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "denoising_diffusion_pytorch", lambda: "ImportError: no torchvision")
    networks, missing = speed.others({})
    assert not networks
    assert missing["denoising-diffusion-pytorch"] == "ImportError: no torchvision"
    (tmp_path / "model.py").write_text("class UNet:\n    def __init__(self, *a): self.a = a")
    networks, missing = speed.others({"pytorch-ddpm": tmp_path})
    assert networks["pytorch-ddpm"][0].a[:2] == (1000, 128)
    assert list(missing) == ["improved-diffusion", "denoising-diffusion-pytorch"]
    with pytest.raises(SystemExit, match="want pytorch-ddpm=PATH"):
        peers.checkout("nothing", tmp_path)


def event(name, parent=None):
    """An event of the profiler."""
    return argparse.Namespace(name=name, cpu_parent=parent)


def test_operations_are_grouped_by_name_and_by_caller():
    products = "convolutions and matrix products"
    for name in ("aten::mkldnn_convolution", "aten::addmm", "aten::bmm", "ddpm.conv", "ddpm::conv", "ConvBackward"):
        assert profile_step.group(event(name)) == products, name
    assert profile_step.group(event("aten::native_group_norm_backward")) == "norms"
    assert profile_step.group(event("ddpm.norm")) == "norms"
    assert profile_step.group(event("aten::linalg_vector_norm")) == "optimiser and average"
    assert profile_step.group(event("aten::mul")) == profile_step.OTHER
    assert profile_step.group(event("aten::mul", event("aten::dropout"))) == "dropout"
    assert profile_step.group(event("aten::empty", event("aten::add", event("ddpm.conv")))) == products
    assert profile_step.group(event("aten::_to_copy", event("ddpm.conv"))) == "casts and copies"


def test_profile(tiny):
    for name, function in profile_step.programs("small", 2, "float32").items():
        groups, operations = profile_step.profiled(function, 1)
        assert groups["convolutions and matrix products"] > 0, name
        assert ("optimiser and average" in groups) == (name == "training step")
        assert sum(profile_step.shares(groups).values()) == pytest.approx(1)
        assert operations


def test_memory_of_a_case(monkeypatch):
    monkeypatch.setitem(memory.NETWORKS, "tiny", (TINY, 4))
    monkeypatch.setattr(memory, "limit", lambda: None)  # it is for a process of its own
    cases = memory.cases(4, "bf16")
    assert list(cases) == [
        "float32, 4 x 1", "float32, 2 x 2", "float32, 1 x 4", "bf16, 4 x 1", "bf16, checkpointing, 4 x 1"
    ]  # fmt: skip
    whole, parts = (memory.child("tiny", cases[name], "cpu") for name in ("float32, 4 x 1", "float32, 2 x 2"))
    assert whole["parameters"] == parts["parameters"] == sum(p.numel() for p in build(TINY).network.parameters())
    assert min(whole["bytes"], parts["bytes"]) >= 0
    assert whole["loss"] == pytest.approx(parts["loss"], rel=0.2)  # each part has a dropout of its own


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is for Linux")
def test_an_allocation_that_does_not_fit_is_an_error_of_its_case(tmp_path):
    """Without the limit the system grants it, because nothing is written, and would end a process that writes."""
    code = f"import os, sys\nsys.path.insert(0, {str(Path(memory.__file__).parent)!r})\nimport memory, torch\n"
    code += "free = os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')\n"
    for limit, exit_code in (("memory.limit()\n", 1), ("", 0)):
        (tmp_path / "code.py").write_text(code + limit + "torch.empty(int(0.97 * free), dtype=torch.uint8)")
        process = start_python(["code.py"], tmp_path, err=tmp_path / f"err{exit_code}.txt")
        process.join()
        assert process.exitcode == exit_code, (tmp_path / f"err{exit_code}.txt").read_text()
    assert "memory" in (tmp_path / "err1.txt").read_text().splitlines()[-1]


def test_saved_bytes_are_those_of_a_network_counted_by_hand(monkeypatch):
    """The backward pass of silu(convolution(x)) needs x and the result of the convolution; weights do not count."""

    class One(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x, timestep):
            return torch.nn.functional.silu(self.layer(x))

    monkeypatch.setattr("ddpm.presets.build", lambda preset: argparse.Namespace(network=One()))
    assert memory.saved_bytes(TINY, "float32") == 4 * 8 * 8 * (3 + 5)


def test_sampling(tiny, tmp_path):
    run = sampling.tiny_run(tiny, tmp_path / "run")
    seconds = sampling.sampled(run, tmp_path / "samples.png", 3, 2, "ancestral", 2)
    assert (tmp_path / "samples.png").is_file()
    assert set(seconds) == {part for _, _, part in sampling.PLACES} | {"the rest"}
    text = sampling.report([{"network": 9.0, "noise": 1.0}, {"network": 6.0, "noise": 4.0}], 10)
    assert text.startswith("1 (1 - 1) images/s; outside the network 25 (10 - 40) %")


def test_start():
    seconds = start.by_package("import time: self [us] | cumulative | imported package\n" + REPORT)
    assert seconds == {"torch": 0.0015, "numpy": 0.0001}
    assert list(seconds) == ["torch", "numpy"]


REPORT = """import time:       100 |        100 |   numpy
import time:      1000 |       1000 |   torch.nn
import time:       500 |       1600 | torch
"""


def test_scaling(tiny):
    args = argparse.Namespace(network="small", batches=[1, 2], sides=[8, 16], size_batch=2, repeats=2, seconds=0)
    assert list(scaling.by_batch(args)) == ["1", "2"]
    text = scaling.report("side", scaling.by_size(args), {"8": 2, "16": 2}, pixels=True)
    assert "| 16 |" in text
    assert "2e+03" not in scaling.report("x", {"1": [0.5, 0.5]}, {"1": 1})
    assert "| 1 | 500 (500 - 500) | 2 (2 - 2) |" in scaling.report("x", {"1": [0.5, 0.5]}, {"1": 1})


def test_clock_plans_for_the_rest_of_its_budget():
    clock = quality_per_hour.Clock(100)
    assert clock.steps(1.0) == 96
    assert clock.steps(1000.0) == 1
    assert clock.left() + clock.spent() == pytest.approx(100, abs=0.01)


@pytest.fixture
def contest(tiny, tmp_path, monkeypatch):
    """Settings for a contest of a few steps."""
    monkeypatch.setattr(quality_per_hour, "BATCH", 2)
    return argparse.Namespace(
        data="digits", preset="cifar10", minutes=0.02, probe=0.2, work=tmp_path, samples=2, levels=1, nll_images=2,
        contestants=["ours", "diffusers-float32"], quality=None,
    )  # fmt: skip


def test_theirs_trains_and_samples_and_our_denoiser_wraps_it(contest, monkeypatch):
    """Our Denoiser around their network gives the eps that their network gives at diffusers' timestep t - 1."""
    name, folder = "diffusers-float32", contest.work / "diffusers-float32"
    trained = quality_per_hour.do("train", name, contest)
    assert 1 <= trained["steps"] <= (trained["planned_steps"] or 1e9)
    assert trained["images"] == 2 * trained["steps"]
    assert quality_per_hour.do("sample", name, contest)["count"] == 2
    assert (folder / "grid.png").is_file()
    seen = []
    monkeypatch.setattr(quality_per_hour.evaluate, "nll_sampled", lambda model, *_: seen.append(model) or {})
    quality_per_hour.do("bits", name, contest)
    denoiser = seen[0].denoiser
    x0, eps, t = peers.batch(TINY, 2), torch.ones(2, 3, 8, 8), torch.tensor([500, 900])
    xt = q_sample(denoiser.schedule, x0, t, eps)
    with torch.no_grad():
        eps = quality_per_hour.load_theirs(folder, {}).network(xt.float(), t - 1).sample
    assert torch.allclose(denoiser.unclipped()(xt, t).eps.float(), eps, atol=1e-4)
    assert [model.denoiser.variance for model in seen] == ["fixed_large", "fixed_small"]


def test_ours_trains_for_the_time_and_finished_parts_do_not_run_again(contest, monkeypatch, capsys):
    assert threading.current_thread() is threading.main_thread()
    trained = quality_per_hour.do("train", "ours", contest)
    assert 1 <= trained["steps"] <= trained["planned_steps"]
    assert trained["parameters"] == sum(p.numel() for p in build(TINY).network.parameters())
    done = []

    def run(words, **_):
        part, name = words[-2:]
        done.append((part, name))
        (contest.work / name).mkdir(exist_ok=True)
        file = contest.work / name / f"{part}.json"
        bound = {"bits_per_dim": 4.0, "standard_error": 0.1}
        file.write_text(json.dumps({"bits": {"fixed_large": bound, "fixed_small": bound}}.get(part, trained)))

    monkeypatch.setattr(quality_per_hour.subprocess, "run", run)
    (contest.work / "ours" / "train.json").write_text(json.dumps(trained))
    results = quality_per_hour.run_parts(contest)
    assert done == [
        ("sample", "ours"),
        ("bits", "ours"),
        *((part, "diffusers-float32") for part in ("train", "sample", "bits")),
    ]
    assert quality_per_hour.run_parts(contest) == results
    assert len(done) == 5
    assert "4.000 ± 0.100" in quality_per_hour.report(results)
    contest.minutes = 1
    with pytest.raises(SystemExit, match="other settings"):
        quality_per_hour.run_parts(contest)


def test_fine_tune_counts_the_steps_to_the_others_last_loss():
    nothing = {0: 1.0, 50: 0.6, 100: 0.5}
    assert fine_tune.share({0: 0.9, 25: 0.51, 50: 0.5}, nothing) == 0.5
    assert fine_tune.share({0: 0.5, 50: 0.7}, nothing) == 0  # it counts from the first time
    assert fine_tune.share({0: 0.9, 50: 0.6}, nothing) == float("inf")


def test_fine_tune_draws_letters_of_many_fonts(tmp_path):
    """White on black, as high or as wide as the image, and no digit is among them."""
    pytest.importorskip("matplotlib")
    files = fine_tune.fonts()
    assert len(files) >= 5
    assert not any(c.isdigit() for c in fine_tune.LETTERS)
    for letter in "Wlo":
        drawn = fine_tune.draw(letter, files[0])
        assert drawn.shape == (8, 8)
        touched = (drawn > 0).any(1).all() or (drawn > 0).any(0).all()
        assert touched
        assert drawn.mean() < 200
    ink = [fine_tune.draw(letter, files[0]).mean() for letter in "MWi"]
    assert ink[2] < min(ink[:2])
