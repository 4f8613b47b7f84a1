"""benchmarks/gpu.py without a GPU: all stages on tiny networks, time limits, and what an interrupted call leaves."""

import argparse
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import zipfile
from multiprocessing.popen_fork import Popen
from pathlib import Path

import numpy as np
import pytest
import torch
from several import run_python, start_python

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cut_cifar10
import gpu
import gpu_caches
import gpu_stages

from ddpm import kernels
from ddpm.presets import PRESETS

BENCHMARKS = Path(gpu.__file__).parent
STUB = """
import json, os, sys, time
from pathlib import Path

stage, folder = sys.argv[1], Path(sys.argv[2])
file, parent = folder / f"{stage}.jsonl", os.getppid()
spread = {"median": 1.0, "low": 1.0, "high": 1.0}
about = {"hardware": "none", "versions": {}, "python": "3", "commit": "c", "card": "stub", "memory_gib": 0}
sides = {"graph": {"ms": spread, "images_per_second": spread}}
cases = {name: {"outcome": "passed", "sides": sides} for name in "ab"}
if stage == "card":
    cases = {"card": {**about, "driver": "none"}, "product": {"flops": spread}}
done = [json.loads(line)["case"] for line in file.read_text().splitlines()] if file.exists() else []
for name, values in cases.items():
    if name in done:
        continue
    while name == "b" and stage in os.environ.get("SLEEPS", "").split() and os.getppid() == parent:
        time.sleep(0.05)
    with file.open("a") as out:
        out.write(json.dumps({"case": name, **values}) + "\\n")
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Stages that do nothing. A stage that the variable SLEEPS names sleeps after its first case."""
    file = tmp_path / "stub.py"
    file.write_text(STUB)
    monkeypatch.setattr(gpu, "CHILD", file)
    return file


@pytest.fixture
def call(tmp_path, monkeypatch):
    """A function that runs the script in this process and returns the exit code and the record."""

    def run(*options):
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(out), *map(str, options)])
        with tempfile.TemporaryDirectory() as work:
            code = gpu.measure(gpu.parse(), Path(work))
        return code, json.loads((out / "record.json").read_text()), (out / "record.md").read_text()

    return run


def script(words):
    """Run the script, whose stages are forks of it."""

    def fork(args, stdout, env, **_):
        def stage():
            os.setsid()
            os.environ.update(env)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            run_python(args[1:])

        return Popen(multiprocessing.get_context("fork").Process(target=stage))

    gpu.subprocess = types.SimpleNamespace(Popen=fork, DEVNULL=None)
    sys.argv = ["gpu.py", *words]
    sys.exit(gpu.main())


def states(record):
    return {name: stage["state"] for name, stage in record["stages"].items()}


# The stages.


@pytest.fixture
def images(tmp_path):
    """A parquet file of a few images, cut from a dataset in the layout of the hub."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rows = []
    for i in range(12):
        encoded = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(encoded, "png")
        rows.append({"img": {"bytes": encoded.getvalue(), "path": None}, "label": i % 10})
    (tmp_path / "hub/plain_text").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "hub/plain_text/train-00000-of-00001.parquet")
    out = tmp_path / "cut/ten.parquet"
    assert cut_cifar10.cut(tmp_path / "hub", 10, out) == out.stat().st_size
    assert pq.read_table(out).to_pylist() == rows[:10]
    with pytest.raises(SystemExit, match="want 1 to 12"):
        cut_cifar10.cut(tmp_path / "hub", 13, out)
    return out


class Forked:
    """`subprocess.Popen` of Python as a fork of the server."""

    def __init__(self, words, stdout, stderr):
        process = start_python(words[1:], Path.cwd(), stdout.name, stderr.name)
        self.poll, self.terminate, self.wait = lambda: process.exitcode, process.terminate, process.join


def test_all_stages_run_and_are_not_run_again(call, images, monkeypatch):
    """All stages in this process, except `tests`, which the next test runs. One network of two is really compiled."""
    ran, once = [], iter([torch.compile])

    def compiled(network, **settings):
        return next(once, lambda network, **_: network)(network, **settings)

    def run(stage, work, limit, env, see):
        ran.append(stage)
        plan, card = json.loads((work / "plan.json").read_text()), gpu_stages.Stub()
        cases = gpu_stages.Cases(work / f"{stage}.jsonl", card)
        with kernels.disabled():
            gpu_stages.STAGES[stage](cases, plan, card)
        return 0, ""

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu_stages, "subprocess", types.SimpleNamespace(Popen=Forked))
    monkeypatch.setitem(gpu_stages.TINY, "steps", [("cifar10_fast", "muon", 2)])
    stages = [name for name in gpu.LIMITS if name != "tests"]
    options = ["--rehearse", "--repeats", 1, "--seconds", 0, "--data", images, "--only", *stages]
    code, record, text = call(*options)
    assert code == 0
    assert states(record) == dict.fromkeys(stages, "done"), text
    cases = {name: stage["cases"] for name, stage in record["stages"].items()}
    assert {name: len(cases[name]) for name in stages} == {
        "steps": 1, "train": 1, "diffusers": 2, "batches": 1, "samples": 2, "large": 1
    }  # fmt: skip
    for name in ("steps", "batches", "large"):
        (values,) = cases[name].values()
        assert list(values["sides"]) == ["graph", "no graph"]
        for side in values["sides"].values():
            assert side["profile"]["products"] > 0, side
            assert side["matrix_share"]["median"] > 0
    for name in ("steps", "batches", "large", "diffusers", "samples"):
        for values in cases[name].values():
            first, second = (side["ms"]["median"] for side in values["sides"].values())
            assert values["ratio"]["median"] == pytest.approx(second / first)
    assert "A rehearsal" in text.splitlines()[0]
    assert all(f"## {gpu.TITLES[name]}" in text for name in stages)
    assert str(images) not in text + json.dumps(record)  # a record names no folder of this machine
    again = call(*options)[1]
    assert ran == ["card", *stages, "card"]
    assert again["stages"] == record["stages"]
    assert len(again["calls"]) == 2


def test_the_script_runs_tests_and_gives_reasons_for_failures(tmp_path):
    """With real processes. A second call runs only the tests that failed."""
    tests, out = tmp_path / "test_some.py", tmp_path / "out"
    tests.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad():\n    assert 1 + 1 == 3, 'sums are wrong'\n"
        "@pytest.mark.skip(reason='no such card')\ndef test_skipped(): pass\n"
        "@pytest.fixture\ndef broken(): raise RuntimeError('no memory')\n"
        "def test_error(broken): pass\n"
    )
    words = ["--rehearse", "--only", "tests", "--tests", tests, "--out", out, "--repeats", 1, "--seconds", 0]

    def run():
        process = start_python(words, tmp_path, tmp_path / "out.txt", tmp_path / "err.txt", work=script)
        process.join()
        assert process.exitcode == 0, (tmp_path / "err.txt").read_text()
        stage = json.loads((out / "record.json").read_text())["stages"]["tests"]
        cases = {name.rpartition("::")[2]: values for name, values in stage["cases"].items()}
        return (tmp_path / "out.txt").read_text(), stage, cases

    printed, stage, cases = run()
    assert {name: values["outcome"] for name, values in cases.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_error": "failed",
    }
    assert cases["test_bad"]["error"] == "line 4: AssertionError: sums are wrong"
    assert "RuntimeError: no memory" in cases["test_error"]["error"]
    assert "no such card" in cases["test_skipped"]["reason"]
    assert stage["state"] == "failed"
    assert stage["note"] == "2 of 4 cases failed"
    assert "1 passed, 2 failed, 1 skipped" in printed
    tests.write_text("def test_good(): assert False\ndef test_bad(): pass\ndef test_error(): pass\n")
    _, stage, cases = run()
    assert stage["state"] == "done"
    assert {name: values["call"] for name, values in cases.items()} == {
        "test_good": 1,
        "test_skipped": 1,
        "test_bad": 2,
        "test_error": 2,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_line_and_code_2(call, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "save", None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])
    assert gpu.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_failed_case_has_a_reason_and_the_others_still_run(tmp_path):
    cases = gpu_stages.Cases(tmp_path / "cases.jsonl", gpu_stages.Stub())

    def fails():
        raise RuntimeError("\nout of memory\nat line 2")

    cases("broken", fails)
    cases("good", lambda: {"x": 1})
    cases("good", fails)
    assert gpu.lines(cases.file) == {"broken": {"error": "RuntimeError: out of memory"}, "good": {"x": 1}}


# Figures.


def test_flops_are_those_of_a_convolution_counted_by_hand(monkeypatch):
    class One(torch.nn.Module):
        def forward(self, x, timestep):
            return torch.nn.functional.conv2d(x, torch.zeros(5, 3, 3, 3), padding=1)

    monkeypatch.setattr(gpu_stages, "build", lambda preset: argparse.Namespace(network=One()))
    assert gpu_stages.flops(PRESETS["cifar10"]) == 3 * 2 * 32 * 32 * 5 * 3 * 3 * 3


def test_a_profile_of_events_made_by_hand():
    """In 10 units of time, a product runs for 4 and other kernels for 3, 1 of them at the same time; 4 are gaps."""
    events = [("sm90_xmma_gemm", 100, 4), ("elementwise", 103, 2), ("elementwise", 109, 1)]
    shares = gpu_stages.where_time_goes(events)
    assert shares["gaps"] == pytest.approx(0.4)
    assert shares["products"] == pytest.approx(0.6 * 4 / 7)
    assert shares["others"] == pytest.approx(0.6 * 3 / 7)
    assert shares["kernels"] == 3
    assert list(shares["longest"]) == ["sm90_xmma_gemm", "elementwise"]
    inside = [("a", 0, 10), ("b", 2, 3), ("c", 9, 11)]  # one event inside another, and one that ends after it
    assert gpu_stages.where_time_goes(inside)["gaps"] == 0


def test_kernels_are_products_by_their_names():
    products = [
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "nvjet_hsh_128x256_64x4", "triton_tem_fused_convolution_3",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad>", "pytorch_flash::flash_fwd_kernel",
    ]  # fmt: skip
    others = [
        "triton_poi_fused_convolution_native_group_norm_0", "triton_red_fused_addmm_backward", "Memcpy DtoD",
        "void cudnn::engines_precompiled::nchwToNhwcKernel", "void at::native::vectorized_elementwise_kernel<4>",
        "convert_element_type",
    ]  # fmt: skip
    assert [name for name in products if not gpu_stages.is_product(name)] == []
    assert [name for name in others if gpu_stages.is_product(name)] == []


def test_speeds_are_shares_of_the_product():
    values = gpu_stages.speeds([0.5, 0.25, 1.0], 100, 2e6, {"product_flops": 1e9})
    assert values["ms"] == {"median": 500, "low": 250, "high": 1000}
    assert values["images_per_second"] == {"median": 200, "low": 100, "high": 400}
    assert values["matrix_share"] == pytest.approx({"median": 0.4, "low": 0.2, "high": 0.8})
    assert "matrix_share" not in gpu_stages.speeds([1.0], 1, 1.0, {})


# Time limits, and what an interrupted call leaves.


def test_a_stage_that_overruns_is_ended_and_keeps_its_cases(call, stub, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    monkeypatch.setattr(gpu, "LIMITS", {"tests": 1.0, "steps": 100.0, "large": 100.0})
    monkeypatch.setenv("SLEEPS", "tests")
    code, record, text = call("--rehearse")
    assert code == 0
    assert states(record) == {"tests": "cut", "steps": "done", "large": "done"}
    assert list(record["stages"]["tests"]["cases"]) == ["a"]
    assert "not finished after 1 s" in text
    monkeypatch.delenv("SLEEPS")
    again = call("--rehearse")[1]
    assert states(again)["tests"] == "done"
    assert {name: case["call"] for name, case in again["stages"]["tests"]["cases"].items()} == {"a": 1, "b": 2}
    assert again["stages"]["steps"] == record["stages"]["steps"]


def test_stages_for_which_there_is_no_time_are_not_reached(call, stub, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.3)
    monkeypatch.setenv("SLEEPS", "tests")
    code, record, text = call("--rehearse", "--minutes", 0.03, "--only", "tests", "large")
    assert code == 0
    assert states(record) == {"tests": "cut", "large": "not reached"}
    assert record["stages"]["large"]["note"] == "--minutes 0.03 are over"
    assert "| large | not reached |" in text


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_call_keeps_its_finished_cases_and_the_next_call_resumes(how, stub, tmp_path):
    out = tmp_path / "out"
    code = f"import sys, gpu; from pathlib import Path; gpu.CHILD = Path({str(stub)!r}); sys.exit(gpu.main())"
    words = [sys.executable, "-c", code, "--rehearse", "--out", str(out), "--only", "tests", "steps", "large"]
    env = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}

    def read():
        return json.loads((out / "record.json").read_text()) if (out / "record.json").exists() else {"stages": {}}

    process = subprocess.Popen(words, env={**env, "SLEEPS": "tests"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    end = time.monotonic() + 60
    while "a" not in read()["stages"].get("tests", {}).get("cases", {}) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(how)
    process.communicate()
    cut = read()
    assert states(cut) == {"steps": "done", "tests": "running" if how == signal.SIGKILL else "cut"}
    assert list(cut["stages"]["tests"]["cases"]) == ["a"]
    assert "| tests | " in (out / "record.md").read_text()
    assert subprocess.run(words, env=env, capture_output=True).returncode == 0
    whole = read()
    assert states(whole) == {"tests": "done", "steps": "done", "large": "done"}
    assert whole["stages"]["steps"] == cut["stages"]["steps"]
    assert {name: case["call"] for name, case in whole["stages"]["tests"]["cases"].items()} == {"a": 1, "b": 2}


def test_a_stage_ends_with_the_script_that_started_it(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"rehearse": True, "parent": 1, "repeats": 1, "seconds": 60}))
    process = start_python([BENCHMARKS / "gpu_stages.py", "card", tmp_path], tmp_path)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_record_of_other_settings_or_another_card_is_refused(call, stub, tmp_path):
    call("--rehearse", "--only", "large")
    with pytest.raises(SystemExit, match="want another --out"):
        call("--rehearse", "--only", "large", "--repeats", 7)
    stub.write_text(STUB.replace('"card": "stub"', '"card": "another"'))
    with pytest.raises(SystemExit, match="another card"):
        call("--rehearse", "--only", "large")


# Wheels, and archives of caches.


def test_wheels_are_installed_for_the_stages_only(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "lies_beside-1.0-py3-none-any.whl", "w") as wheel:
        about = "lies_beside-1.0.dist-info"
        wheel.writestr("lies_beside.py", "here = True\n")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: lies-beside\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    notes = []
    env = gpu.children(argparse.Namespace(wheels=wheels), tmp_path, notes)
    code = "import lies_beside, ddpm; print(lies_beside.here, ddpm.__file__)"
    printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
    assert printed.split() == ["True", str(gpu.ROOT / "src/ddpm/__init__.py")]
    assert notes == []
    (wheels / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    gpu.children(argparse.Namespace(wheels=wheels), tmp_path, notes)
    assert "--wheels were not installed" in notes[0]


def test_caches_are_packed_small_and_unpacked_anywhere(tmp_path):
    first, second, out = tmp_path / "first", tmp_path / "second/place", tmp_path / "out"
    out.mkdir()
    random = np.random.default_rng(0)
    files = {f"triton/{i}/kernel.cubin": random.bytes(3000) for i in range(10)}
    files |= {"inductor/a/b.best_config": b"{}", "triton/0/__grp__.json": f'{{"a": "{first}/triton/0/a"}}'.encode()}
    others = {"inductor/fxgraph/a/pickle": b"x", "inductor/a/b.py": b"x", "triton/large": random.bytes(20_000)}
    for name, content in {**files, **others}.items():
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (first / name).write_bytes(content)
    (out / "gpu-cache-9.tar.gz").write_bytes(b"of an earlier call")
    sizes, notes = gpu_caches.pack(first, out, most=10_000, archives=5)
    assert len(sizes) > 2
    assert {file.name: file.stat().st_size for file in out.iterdir()} == sizes
    assert max(sizes.values()) < 10_000
    assert notes == ["1 files left out: too large for an archive"]
    assert gpu_caches.unpack(out, second) == (sorted(sizes), [])
    unpacked = {path.relative_to(second).as_posix(): path.read_bytes() for path in second.rglob("*") if path.is_file()}
    files["triton/0/__grp__.json"] = f'{{"a": "{second}/triton/0/a"}}'.encode()
    assert unpacked == files
    assert "archives were full" in gpu_caches.pack(first, out, most=10_000, archives=2)[1][1]
    assert "time was up" in gpu_caches.pack(first, out, until=0)[1][0]


def test_damaged_archives_and_paths_outside_the_folder_are_refused(tmp_path):
    out, folder = tmp_path / "out", tmp_path / "a/folder"
    out.mkdir()
    (out / "gpu-cache-1.tar.gz").write_bytes(b"nothing")
    with tarfile.open(out / "gpu-cache-2.tar.gz", "w:gz") as archive:
        for name in ("triton/../../escaped", "../escaped", "inductor/fxgraph/pickle"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    unpacked, problems = gpu_caches.unpack(out, folder)
    assert unpacked == []
    assert [line.partition(" ")[0] for line in problems] == ["gpu-cache-1.tar.gz", "gpu-cache-2.tar.gz"]
    assert not [path for path in tmp_path.rglob("*") if path.name in ("escaped", "pickle")]


def test_the_next_call_unpacks_the_caches(call, stub, tmp_path, capsys):
    stub.write_text(
        STUB + "kept = Path(os.environ['TRITON_CACHE_DIR'], 'k.cubin')\n"
        "kept.parent.mkdir(parents=True, exist_ok=True)\n"
        "kept.write_bytes((kept.read_bytes() if kept.exists() else b'') + b'k')\n"
    )
    call("--rehearse", "--only", "large")
    assert "gpu-cache-1.tar.gz: 0.0 MiB" in capsys.readouterr().out
    _, record, text = call("--rehearse", "--only", "steps")
    assert [one["caches"] for one in record["calls"]] == [0, 1]
    assert "gpu-cache-1.tar.gz" in text
    gpu_caches.unpack(tmp_path / "out", tmp_path / "there")
    assert (tmp_path / "there/triton/k.cubin").read_bytes() == b"kkkk"  # two stages in each of two calls
