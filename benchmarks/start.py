"""Time `ddpm train digits` to its first step and `ddpm sample` to its first image, and find where the time goes.

    python benchmarks/start.py [--repeats 5] [--before CHECKOUT]

Each repeat is a fresh process. The total lasts from the start of the process until the first step is in the log, or the
picture is on disk. Another process measures the parts; the time of a part leaves out the parts that it calls. A third
process measures the imports by package with `-X importtime`, which itself takes some time. CHECKOUT is a folder with an
older commit: its totals are measured in turns with those of this code.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

BEGUN = "DDPM_BENCHMARK_BEGUN"
"""The environment variable with the time at which a timed process was started."""


def child(command: list[str]) -> None:
    """Run `ddpm COMMAND` and time its parts. At the first step or image, print them as JSON and end the process."""
    begun = float(os.environ[BEGUN])
    stamps = {"Python": time.time() - begun}
    start = time.perf_counter()
    import torch  # noqa: F401

    stamps["import torch"] = time.perf_counter() - start
    start = time.perf_counter()
    import timing

    import ddpm.noise
    import ddpm.run.processes
    import ddpm.run.sample
    import ddpm.run.train as training
    from ddpm import cli, optimizers
    from ddpm.files import data as datasets
    from ddpm.files import images

    stamps["other imports"] = time.perf_counter() - start
    parts = timing.Parts()
    places = [
        (datasets, "load_pair", "data"),
        (optimizers.Adam, "__init__", "making Adam"),
        (training, "build", "network"),
        (ddpm.run.processes, "open_for_device", "network and weights"),
        (ddpm.run.sample, "generate", "sampling"),
        (images, "save_many", "saving"),
    ]

    def finish() -> None:
        parts.charge()
        left = time.time() - begun - sum(stamps.values()) - sum(parts.seconds.values())
        stamps.update(parts.seconds)
        stamps["the rest"] = stamps.get("the rest", 0.0) + left
        print(json.dumps(stamps), flush=True)
        os._exit(0)

    measure_held_out, step = training.held_out_by_level, optimizers.Adam.step

    def held_out(*args: Any, **kwargs: Any) -> Any:
        with parts("held-out loss before training"):
            losses = measure_held_out(*args, **kwargs)
        rest.enter_context(parts("first step"))  # all that follows belongs to the first step
        return losses

    def first_step(*args: Any, **kwargs: Any) -> Any:
        step(*args, **kwargs)
        finish()

    training.held_out_by_level, optimizers.Adam.step = held_out, first_step  # type: ignore[method-assign]
    with ExitStack() as rest, parts.timing(*places), parts("the rest"):
        cli.main(command)
    finish()


def started(command: list[str]) -> dict[str, float]:
    """Seconds of one timed process by part."""
    environment = {**os.environ, BEGUN: repr(time.time())}
    words = [sys.executable, __file__, "--child", *command]
    out = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    seconds: dict[str, float] = json.loads(out.stdout.splitlines()[-1])
    return seconds


def first_line(checkout: Path, out: Path) -> float:
    """Seconds from `ddpm train digits` of the code in `checkout` to the log line of its first step, with nothing timed
    inside."""
    log, begun = out / "metrics.jsonl", time.perf_counter()
    words = [*program(checkout), "train", "digits", "--log-every", "1", "--out", str(out)]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while not (log.exists() and '"loss"' in log.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(words)}: exit {process.returncode}")
            time.sleep(0.005)
        return time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait()


def first_image(checkout: Path, run: Path, out: Path) -> float:
    """Seconds that `ddpm sample RUN -n 1` of the code in `checkout` takes."""
    begun = time.perf_counter()
    words = [*program(checkout), *sampling(run, out)]
    subprocess.run(words, capture_output=True, check=True)
    return time.perf_counter() - begun


def program(checkout: Path) -> list[str]:
    """The words that start the command `ddpm` of the code in `checkout`."""
    with (checkout / "pyproject.toml").open("rb") as file:
        module, function = tomllib.load(file)["project"]["scripts"]["ddpm"].split(":")
    code = f"import sys; sys.path[0] = {str(checkout / 'src')!r}; from {module} import {function}; {function}()"
    return [sys.executable, "-c", code]


def sampling(run: Path, out: Path) -> list[str]:
    return ["sample", str(run), "-n", "1", "--sampler", "ddim", "--steps", "50", "--out", str(out)]


def imports(module: str) -> dict[str, float]:
    """Seconds that `import module` spends in each top-level package, longest first."""
    words = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    return by_package(subprocess.run(words, capture_output=True, text=True, check=True).stderr)


def by_package(report: str) -> dict[str, float]:
    """Seconds by top-level package, from a report of -X importtime: lines of own microseconds | sum | name.

    >>> by_package("import time:       100 |        100 |   torch.nn\\nimport time:       50 |   150 | torch\\n")
    {'torch': 0.00015}
    """
    microseconds = Counter[str]()
    for own, name in re.findall(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", report):
        microseconds[name.split(".")[0]] += int(own)
    return {name: own / 1e6 for name, own in microseconds.most_common()}


def main() -> None:
    import figures
    import record

    parser = record.parser(__doc__, seconds=0)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="a folder with an older commit")
    args = parser.parse_args()
    checkouts = {"": record.ROOT}
    if args.before is not None:
        checkouts[", before"] = args.before.resolve()
        args.before = record.commit(args.before)
    totals: dict[str, list[float]] = {name + age: [] for age in checkouts for name in ("train", "sample")}
    parts: dict[str, list[dict[str, float]]] = {"train": [], "sample": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs = {age: folder / f"run{age}" for age in checkouts}
        for age, run in runs.items():
            short = ["--steps", "1", "--sample-every", "0", "--eval-images", "1", "--out", str(run)]
            words = [*program(checkouts[age]), "train", "digits", *short]
            subprocess.run(words, capture_output=True, check=True)
        for i in range(args.repeats):
            for age, checkout in checkouts.items():
                totals["train" + age].append(first_line(checkout, folder / f"log{i}{age}"))
                totals["sample" + age].append(first_image(checkout, runs[age], folder / "sample.png"))
            parts["train"].append(started(["train", "digits", "--out", str(folder / f"parts{i}")]))
            parts["sample"].append(started(sampling(runs[""], folder / "sample.png")))
    packages = {module: imports(module) for module in ("ddpm.run.train", "ddpm.run.sample")}
    text = ""
    for name, title in (("train", "`ddpm train digits` to its first step"), ("sample", "`ddpm sample` to an image")):
        keys = list(dict.fromkeys(key for seconds_of in parts[name] for key in seconds_of))
        rows = [(key, figures.spread(seconds_of.get(key, 0.0) for seconds_of in parts[name])) for key in keys]
        inside = figures.spread(sum(seconds_of.values()) for seconds_of in parts[name])
        text += f"## {title}: {figures.spread(totals[name])} s\n\n"
        if args.before is not None:
            text += f"Commit {args.before}: {figures.spread(totals[name + ', before'])} s.\n\n"
        text += figures.table(["", "s"], [*rows, ("sum, in the timed process", inside)]) + "\n"
    for module, seconds_of in packages.items():
        most = ", ".join(f"{package} {seconds:.2f}" for package, seconds in list(seconds_of.items())[:8])
        text += f"`import {module}`, {sum(seconds_of.values()):.2f} s by `-X importtime`: {most}.\n\n"
    values = {"totals": totals, "parts": parts, "imports": packages}
    record.write("start", "Start: to the first step and to the first image", args, values, text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
