"""The stages of benchmarks/gpu.py, which starts each stage as a process of its own:

    python benchmarks/gpu_stages.py STAGE FOLDER

FOLDER holds plan.json with the settings, and STAGE.jsonl with one line per case. The stage appends a line as soon as a
case has finished, so a stage that is killed leaves the finished cases. The stage skips a case that has a line.
"""

import argparse
import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import figures
import peers
import record
import timing
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ddpm import kernels
from ddpm.presets import PRESETS, Precision, Preset, build
from ddpm.run.device import CAPTURES
from ddpm.run.sample import generate

Values = dict[str, Any]

REAL: Values = {
    "product": 8192,  # side of the matrices
    "steps": [
        ("cifar10", "adam", 128), ("cifar10_fast", "adam", 256), ("cifar10_fast", "muon", 256),
        ("cifar10", "adam", 512),
    ],
    "batches": [
        ("cifar10_fast", "adam", 1024), ("cifar10_fast", "muon", 1024), ("cifar10", "adam", 1024),
        ("cifar10_fast", "adam", 128), ("cifar10_fast", "muon", 128), ("cifar10", "adam", 256),
        ("cifar10_fast", "adam", 512), ("cifar10_fast", "muon", 512),
    ],
    "large": [("celebahq256", "adam", 64)],
    "beside": ("cifar10", 128),
    "samples": (1024, 256, 20),  # images, batch, network calls an image
    "train": (["--log-every", "20"], 45, 10**9),  # options of `ddpm train`, seconds, lines of its log
}  # fmt: skip
TINY: Values = {
    "product": 64,
    "steps": [("cifar10", "adam", 4), ("cifar10_fast", "muon", 2)],
    "batches": [("cifar10_fast", "adam", 4)],
    "large": [("celebahq256", "adam", 2)],
    "beside": ("cifar10", 2),
    "samples": (4, 2, 2),
    "train": (
        "--size 8 --width 32 --channel-multipliers 1 --num-res-blocks 1 --attention-resolutions 0 "
        "--batch-size 2 --log-every 1 --eval-images 2 --device cpu --ema-warmup".split(),
        60,
        3,
    ),
}
DIFFUSERS = {"eager": {}, "compiled": {"compiled": True}}


# -- the card, and its stand-in for a rehearsal ------------------------------------------------------------------------


class Cuda:
    """The functions of a CUDA device that a stage uses."""

    device = torch.device("cuda")
    precision: Precision = "bf16"
    backend = "inductor"
    activities = (ProfilerActivity.CUDA,)
    busy = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events in a trace in which the device works

    def about(self) -> Values:
        card = torch.cuda.get_device_properties(self.device)
        fields = "driver_version,memory.used,utilization.gpu"
        words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id=GPU-{card.uuid}"]
        try:
            values = (
                subprocess.check_output(words, text=True, stderr=subprocess.DEVNULL, timeout=20).strip().split(", ")
            )
        except (OSError, subprocess.SubprocessError):
            values = ["unknown"] * 3
        return {
            "card": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            **dict(zip(("driver", "mib_used_before", "percent_busy_before"), values, strict=False)),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }

    def wait(self) -> None:
        torch.cuda.synchronize()

    def held(self) -> int:
        """Bytes that the allocator has of the card now, for tensors and graphs. The peak counts from here on."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved()

    def clear(self) -> None:
        torch.cuda.empty_cache()


class Stub(Cuda):
    """The CPU in place of the card, so that a rehearsal runs the same code."""

    device = torch.device("cpu")
    precision: Precision = "float32"  # bf16 takes minutes on a CPU that does not multiply it
    backend = "eager"
    activities = (ProfilerActivity.CPU,)
    busy = ("cpu_op",)

    def about(self) -> Values:
        return {"card": "none (rehearsal on the CPU)", "memory_gib": 0, "driver": "none"}

    def wait(self) -> None:
        pass

    def held(self) -> int:
        return 0

    def peak(self) -> int:
        return 0

    def clear(self) -> None:
        pass


# -- cases -------------------------------------------------------------------------------------------------------------


class Cases:
    """The cases of a stage. It runs each case that has no line yet, and writes its line."""

    def __init__(self, file: Path, card: Cuda) -> None:
        self.file, self.card = file, card
        lines = file.read_text().splitlines() if file.exists() else []
        self.done = [json.loads(line)["case"] for line in lines]

    def add(self, name: str, values: Values) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"case": name, **values}) + "\n")
        self.done.append(name)

    def __call__(self, name: str, function: Callable[[], Values]) -> None:
        if name not in self.done:
            self.add(name, tried(function))
            gc.collect()
            self.card.clear()
            if "torch._dynamo" in sys.modules:  # its import takes seconds
                torch.compiler.reset()


def tried(function: Callable[[], Values]) -> Values:
    """The result of the function, or the error that it raises, so that the other cases still run."""
    try:
        return function()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {first_line(str(error))}"}


def first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "no message").strip()[:300]


# -- measuring ---------------------------------------------------------------------------------------------------------


def flops(preset: Preset) -> float:
    """Floating-point operations of a training step per image: three times those of a forward pass.

    The count runs on the CPU and contains only convolutions and matrix products.
    """
    network = build(replace(preset, precision="float32")).network
    with kernels.disabled(), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, *preset.shape), torch.zeros(1, dtype=torch.int64))
    return 3.0 * counter.get_total_flops()


def product_rate(card: Cuda, side: int, repeats: int, seconds: float) -> figures.Spread:
    """FLOP per second of a bf16 product of two square matrices."""
    a = torch.randn(side, side, device=card.device, dtype=torch.bfloat16)
    times = timing.interleave({"": partial(torch.mm, a, a)}, repeats, seconds, card.wait)
    return figures.spread(2 * side**3 / s for s in times[""])


def speeds(seconds: Iterable[float], images: int, flop: float, plan: Values) -> Values:
    """Milliseconds, images per second and the share of the matrix rate, each with its spread."""
    seconds = list(seconds)
    values: Values = {"ms": figures.spread(1000 * s for s in seconds)._asdict()}
    values["images_per_second"] = figures.spread(images / s for s in seconds)._asdict()
    if rate := plan.get("product_flops"):
        values["matrix_share"] = figures.spread(flop * images / s / rate for s in seconds)._asdict()
    return values


def first_calls(card: Cuda, case: timing.Case, count: int) -> list[float]:
    """The seconds of each of the first calls of a case."""
    seconds = []
    for _ in range(count):
        card.wait()
        begun = time.perf_counter()
        case()
        card.wait()
        seconds.append(time.perf_counter() - begun)
    return seconds


def side(
    card: Cuda, times: Sequence[float], first: Sequence[float], peak: int, images: int, flop: float, plan: Values
) -> Values:  # fmt: skip
    """What is known of one of the cases that took turns: speed, memory, and how much longer its first calls took.

    The first call compiles, and a later one may capture a CUDA graph.
    """
    extra = [max(0.0, seconds - min(times)) for seconds in first]
    start = {"compile_seconds": extra[0], "capture_seconds": sum(extra[1:])}
    return {**speeds(times, images, flop, plan), **start, "peak_bytes": peak}


PRODUCTS = re.compile(
    r"gemm|gemv|xmma|cutlass|nvjet|fprop|wgrad|dgrad|conv(?!ert)|flash|fmha|sdpa|attention|splitk", re.I
)


def is_product(kernel: str) -> bool:
    """Whether the kernel of this name is a convolution or a matrix product. Attention counts as matrix products.

    Inductor names a kernel after all operations that are fused in it, so `triton_poi_fused_convolution_...` only adds
    a bias.
    """
    if kernel.startswith("triton_"):
        return kernel.startswith(("triton_tem", "triton_mm"))
    return PRODUCTS.search(kernel) is not None


def where_time_goes(events: Sequence[tuple[str, float, float]]) -> Values:
    """Shares of the time between the first kernel's start and the last one's end; events are (name, start, duration).

    Kernels may overlap. Time in which several kernels run counts once, and products and other kernels share the busy
    time in proportion to their durations.
    """
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    first = min(start for _, start, _ in events)
    last = max(start + duration for _, start, duration in events)
    busy, end = 0.0, first
    for _, start, duration in sorted(events, key=lambda event: event[1]):
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    total = sum(duration for *_, duration in events)
    products = sum(duration for name, _, duration in events if is_product(name))
    share = busy / (last - first)
    by_name: dict[str, float] = {}
    for name, _, duration in events:
        by_name[name[:100]] = by_name.get(name[:100], 0.0) + duration / total
    longest = sorted(by_name.items(), key=lambda item: -item[1])[:8]
    return {
        "products": share * products / total,
        "others": share * (1 - products / total),
        "gaps": 1 - share,
        "kernels": len(events),
        "longest": dict(longest),
    }


def profiled(card: Cuda, case: timing.Case, steps: int = 3) -> Values:
    """`where_time_goes` for a few steps in a row, as in training. The first profile only warms up the profiler."""
    for _ in range(2):
        card.wait()
        with profile(activities=card.activities) as profiler:
            for _ in range(steps):
                case()
            card.wait()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    values = where_time_goes([(e["name"], e["ts"], e["dur"]) for e in trace if e.get("cat") in card.busy])
    return {**values, "kernels": round(values["kernels"] / steps)}


# -- stages ------------------------------------------------------------------------------------------------------------


def preset(name: str, plan: Values) -> Preset:
    """The preset of this name. A rehearsal has tiny sizes."""
    chosen = PRESETS[name]
    if plan["rehearse"]:
        chosen = replace(
            chosen, size=(8, 8), width=32, channel_multipliers=(1,), attention_resolutions=(8,), num_res_blocks=1
        )
    return chosen


def sizes(plan: Values) -> Values:
    """The sizes of all stages."""
    return TINY if plan["rehearse"] else REAL


def the_card(cases: Cases, plan: Values, card: Cuda) -> None:
    """The properties of the card, and the rate of one large matrix product."""
    about = record.provenance()
    about = {key: about[key] for key in ("hardware", "versions", "python", "commit")}
    cases("card", lambda: {**about, **card.about()})
    side = sizes(plan)["product"]
    cases(
        f"bf16 product of {side} x {side}",
        lambda: {"flops": product_rate(card, side, plan["repeats"], plan["seconds"])._asdict()},
    )


class Recorder:
    """A pytest plugin that makes each test a case, and writes its line as soon as the test has finished."""

    def __init__(self, cases: Cases) -> None:
        self.cases = cases

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.add(report, {"outcome": report.outcome, "seconds": round(report.duration, 2)})

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.add(report, {"outcome": "failed"})

    def add(self, report: Any, values: Values) -> None:
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = str(report.longrepr).strip().splitlines()
            reason = f"line {crash.lineno}: {first_line(crash.message)}" if crash else lines[-1][:300]
            values |= {"error": reason, "trace": "\n".join(lines)[-3000:]}
        elif report.outcome == "skipped":
            text = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
            values["reason"] = text.removeprefix("Skipped: ")
        self.cases.add(report.nodeid, values)


def tests(cases: Cases, plan: Values, card: Cuda) -> None:
    """tests/test_cuda.py, without the tests that already have a line."""
    import pytest

    words = [plan["tests"], "-p", "no:cacheprovider", "-o", "addopts=", "-q", f"--rootdir={record.ROOT}"]
    code = pytest.main([*words, *(f"--deselect={name}" for name in cases.done)], plugins=[Recorder(cases)])
    if code not in (0, 1, 5):  # pytest: all passed, some failed, no test was selected
        cases.add("pytest", {"outcome": "failed", "error": f"pytest ended with code {int(code)}"})


WARM_UP = CAPTURES + 1
"""Calls after which a step of ours is as quick as it gets."""


def both_ways(name: str, optimizer: Any, count: int, plan: Values, card: Cuda) -> Values:
    """The step of `ddpm train`, with its gradient as a CUDA graph and without, in turns on the same weights.

    The memory of the step without a graph is that of the calls before the capture.
    """
    shape = replace(preset(name, plan), optimizer=optimizer)
    flop, said, held = flops(shape), io.StringIO(), card.held()
    with redirect_stderr(said):
        ours = peers.Ours(shape, count, card.precision, card.device)
        first = first_calls(card, ours.step, CAPTURES - 1)
        plain_peak = card.peak() - held
        captures = first_calls(card, ours.step, WARM_UP - len(first))
    peak = card.peak() - held
    cases: dict[str, timing.Case] = {"graph": ours.step, "no graph": ours.without_graph}
    starts = {"graph": ([*first, *captures], peak), "no graph": (first, plain_peak)}
    if not (ours.captured or plan["rehearse"]):
        del cases["graph"]
    times = timing.interleave(cases, plan["repeats"], plan["seconds"], card.wait)
    sides = {key: side(card, times[key], *starts[key], count, flop, plan) for key in cases}
    for key, case in cases.items():
        sides[key]["profile"] = tried(partial(profiled, card, case))
    notes = [line for line in said.getvalue().splitlines() if "without a CUDA graph" in line]
    values: Values = {"flop_an_image": flop, "notes": notes, "sides": sides}
    return values | ({"ratio": timing.ratio(times, *cases)._asdict()} if len(cases) > 1 else {})


def steps(stage: str, cases: Cases, plan: Values, card: Cuda) -> None:
    """The training steps of a stage."""
    for name, optimizer, count in sizes(plan)[stage]:
        cases(f"{name}, {optimizer}, batch {count}", partial(both_ways, name, optimizer, count, plan, card))


def real_run(plan: Values) -> Values:
    """`ddpm train` on the images of a file or on digits, stopped by SIGTERM and measured by its log after the first
    line.
    """
    (options, most, enough), source = sizes(plan)["train"], plan["data"] or "digits"
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "ddpm", "train", "cifar10", "--data", source, *options]
        begun, seen = time.monotonic(), None
        with Path(folder, "log").open("w") as log:
            process = subprocess.Popen([*words, "--out", f"{folder}/run"], stdout=log, stderr=log)
            while process.poll() is None and time.monotonic() - begun < most:
                lines = peers.training_lines(Path(folder, "run"))
                seen = seen or (lines and time.monotonic() - begun) or None
                if len(lines) >= enough:
                    break
                time.sleep(0.2)
            process.terminate()
            process.wait()
        lines = peers.training_lines(Path(folder, "run"))
        if len(lines) < 3:
            output = Path(folder, "log").read_text().replace(source, "DATA").strip().splitlines()
            raise RuntimeError(f"{len(lines)} log lines; the last line of output: {output[-1] if output else 'none'}")
        config = json.loads(Path(folder, "run", "config.json").read_text())
    seconds = [config["batch_size"] / line["images_per_second"] for line in lines[1:]]
    values = speeds(seconds, config["batch_size"], flops(preset("cifar10", plan)), plan)
    values |= {"batch": config["batch_size"], "precision": config["precision"], "seconds_to_first_line": seen}
    return {**values, "steps": lines[-1]["step"], "loss": [lines[0]["loss"], lines[-1]["loss"]], "lines": len(lines)}


def train(cases: Cases, plan: Values, card: Cuda) -> None:
    cases(f"`ddpm train cifar10` on {'a file' if plan['data'] else 'digits'}", partial(real_run, plan))


def diffusers_network(card: Cuda, shape: Preset, settings: Values) -> peers.Theirs:
    network = peers.paper_network(shape)
    fast = {"autocast": card.precision == "bf16", "channels_last": True, "quick": True, "backend": card.backend}
    return peers.Theirs(network, card.device, **fast, **settings)


def turns(
    card: Cuda, plan: Values, images: int, flop: float, repeats: int, seconds: float, calls: int,
    makers: dict[str, Callable[[], timing.Case]],
) -> Values:  # fmt: skip
    """Measure ours and diffusers in turns, after so many calls of each, and the ratio within each turn."""
    cases, starts = {}, {}
    for name, make in makers.items():
        held = card.held()
        cases[name] = make()
        starts[name] = first_calls(card, cases[name], calls), card.peak() - held
    times = timing.interleave(cases, repeats, seconds, card.wait)
    sides = {name: side(card, times[name], *starts[name], images, flop, plan) for name in cases}
    return {"ratio": timing.ratio(times, *cases)._asdict(), "sides": sides}


def beside(cases: Cases, plan: Values, card: Cuda) -> None:
    """A training step of ours and of diffusers in turns, with the same network and batch."""
    name, count = sizes(plan)["beside"]
    shape = preset(name, plan)

    def compared(settings: Values) -> Values:
        def theirs() -> timing.Case:
            return partial(diffusers_network(card, shape, settings).step, peers.batch(shape, count, card.device))

        makers = {"ours": lambda: peers.Ours(shape, count, card.precision, card.device).step, "diffusers": theirs}
        return turns(card, plan, count, flops(shape), plan["repeats"], plan["seconds"], WARM_UP, makers)

    for kind, settings in DIFFUSERS.items():
        cases(f"{name}, batch {count}, diffusers {kind}", partial(compared, settings))


def samples(cases: Cases, plan: Values, card: Cuda) -> None:
    """Images by DDIM from ours and from diffusers in turns. Each call makes all images."""
    shape = preset("cifar10", plan)
    count, batch, calls = sizes(plan)["samples"]

    def compared(settings: Values) -> Values:
        def our_images() -> timing.Case:
            denoiser = build(replace(shape, precision=card.precision)).to(card.device)
            denoiser.network.eval().requires_grad_(False)  # type: ignore[attr-defined]  # CUDA graphs need both settings
            return partial(generate, denoiser, shape.shape, range(count), "ddim", calls, batch, card.device)

        def their_images() -> timing.Case:
            loop = diffusers_network(card, shape, settings)
            loop.network.eval()
            return lambda: [peers.ddim(loop, shape, batch, calls) for _ in range(count // batch)]

        makers = {"ours": our_images, "diffusers": their_images}
        return turns(card, plan, count, flops(shape) / 3 * calls, min(3, plan["repeats"]), 0, 2, makers)

    for kind, settings in DIFFUSERS.items():
        cases(f"{count} images by {calls} calls, diffusers {kind}", partial(compared, settings))


STAGES: dict[str, Callable[[Cases, Values, Cuda], None]] = {
    "card": the_card, "steps": partial(steps, "steps"), "tests": tests, "train": train, "diffusers": beside,
    "batches": partial(steps, "batches"), "samples": samples, "large": partial(steps, "large"),
}  # fmt: skip


def end_with_the_parent(parent: int) -> None:
    """End this process group when gpu.py is gone: gpu.py may be killed, and nothing may stay on the card."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    plan = json.loads((args.folder / "plan.json").read_text())
    if os.getpgrp() == os.getpid():  # the process group that gpu.py made for this stage
        threading.Thread(target=end_with_the_parent, args=(plan["parent"],), daemon=True).start()
    if not plan["rehearse"] and not torch.cuda.is_available():
        return 2
    card = Stub() if plan["rehearse"] else Cuda()
    cases = Cases(args.folder / f"{args.stage}.jsonl", card)
    if plan["rehearse"]:
        torch.set_num_threads(1)  # more threads are slower for networks this small
        with kernels.disabled():  # compiled stages do not use the CPU kernels
            STAGES[args.stage](cases, plan, card)
    else:
        STAGES[args.stage](cases, plan, card)
    return 0


if __name__ == "__main__":
    sys.exit(main())
