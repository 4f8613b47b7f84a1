"""Test this package on a CUDA GPU, and compare its speed with that of diffusers.

    python benchmarks/gpu.py [--minutes 9] [--only STAGE ...] [--data FILE.parquet] [--wheels FOLDER] [--out FOLDER]
    python benchmarks/gpu.py --rehearse --out FOLDER    # on the CPU with tiny sizes; the figures mean nothing

The stages in their order, the most useful one first:

    steps      the step of `ddpm train` with its gradient as a CUDA graph and without: the paper's network, and
               cifar10_fast with Adam and with Muon
    tests      tests/test_cuda.py
    train      `ddpm train cifar10` for 45 seconds, on the images of --data (benchmarks/cut_cifar10.py makes the file)
    diffusers  a training step of ours and of diffusers, taken in turns
    batches    the stage `steps` for other batches, from 128 to 1,024
    samples    1,024 images of ours and of diffusers, taken in turns
    large      the stage `steps` for the network for 256x256

Each stage is a process of its own with a time limit. The script writes the record (record.json and record.md) anew
after each case, so a call that is killed leaves the finished cases. A later call with the same --out runs the cases
that are missing or have failed. The limits add up to more than nine minutes, because most stages end sooner.

The matrix rate is that of one large bf16 product, measured in the same call. The operations of a step are those of its
convolutions and matrix products, counted on a forward pass and multiplied by three; Muon's own products do not count. A
profile covers three steps. Gaps are the time in which no kernel ran, between the start of the first kernel and the end
of the last one. The time to compile is the difference between the first call and a later one. The time to capture is
what the next calls take more than a later one. The peak is what the allocator had of the card. With a graph it holds
the memory of the graph and that of the calls before it.

The script needs torch, pytest and the dependencies of the package. --wheels names a folder with wheels of missing
packages; the script installs them into a temporary folder and downloads nothing. The script packs the compilation
caches into archives gpu-cache-N.tar.gz in --out, and the next call unpacks them. The exit code is 2 without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import gpu_caches
from figures import Spread, table

ROOT = Path(__file__).parents[1]
CHILD = Path(__file__).with_name("gpu_stages.py")
CARD_LIMIT = 60
LIMITS = {"steps": 200, "tests": 100, "train": 75, "diffusers": 100, "batches": 240, "samples": 70, "large": 90}
"""The time limit of each stage in seconds."""
LEAST = 2
"""A stage does not start if fewer seconds are left."""
RESERVE = 25
"""Seconds that are kept for packing the caches; a twentieth of the call if that is less."""
TITLES = {
    "steps": "Training steps",
    "tests": "tests/test_cuda.py",
    "train": "`ddpm train cifar10`",
    "diffusers": "A training step beside diffusers",
    "batches": "Training steps of other batches",
    "samples": "Samples beside diffusers",
    "large": "The network for 256x256",
}
Values = dict[str, Any]


# -- the record --------------------------------------------------------------------------------------------------------


def write(file: Path, text: str) -> None:
    """Write a file so that a reader never sees half of it."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text)
    new.replace(file)


def save(out: Path, record: Values) -> None:
    """Write the record as JSON and as markdown."""
    write(out / "record.json", json.dumps(record, indent=1) + "\n")
    write(out / "record.md", report(record))


def failed(cases: Values) -> list[str]:
    """The names of the cases that failed."""
    return [name for name, values in cases.items() if "error" in values]


def show(values: Values | None, scale: float = 1) -> str:
    """A spread in words, or nothing."""
    return "" if values is None else str(Spread(*(scale * values[key] for key in ("median", "low", "high"))))


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def gib(values: Values) -> str:
    return f"{values['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in values else ""


def report(record: Values) -> str:
    """The record in markdown."""
    calls, stages = record["calls"], record["stages"]
    about = calls[-1]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    card = f"{about['card']}, {about['memory_gib']} GiB, driver {about['driver']}, CUDA {about.get('cuda', 'none')}"
    text = "# A rehearsal on the CPU: no figure here says anything about a GPU\n\n" if record["rehearsal"] else ""
    text = text or f"# On a GPU: {about['card']}\n\n"
    text += f"- hardware: {about['hardware']}\n- card: {card}\n- versions: {versions}, Python {about['python']}\n"
    text += (
        f"- a figure is the median (least - most) of {record['repeats']} repeats of at least {record['seconds']:g} s, "
    )
    text += "of at most 3 repeats for samples, and of the lines of the log for `ddpm train`\n\n"
    rows = []
    for i, call in enumerate(calls, 1):
        before = f"{call.get('percent_busy_before', '?')}, {call.get('mib_used_before', '?')}"
        rate = show(call.get("product"), 1e-12)
        rows.append((i, call["date"], call["commit"], before, rate, call["caches"]))
    header = ["call", "date", "commit", "card before: % busy, MiB used", "bf16 product, TFLOP/s", "caches unpacked"]
    text += table(header, rows) + "\n"
    rows = [
        (name, record["stages"][name]["state"], f"{stages[name].get('seconds', 0):.0f}", stages[name].get("note", ""))
        for name in LIMITS
        if name in stages
    ]
    text += table(["stage", "state", "seconds", "note"], rows) + "\n"
    text += "".join(section(name, stages[name]) for name in LIMITS if stages.get(name, {}).get("cases"))
    if caches := record.get("caches"):
        sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in caches["archives"].items())
        text += "\n".join(["## Compilation caches\n", sizes or "no archive", *caches["notes"]]) + "\n"
    return text


def section(name: str, stage: Values) -> str:
    """The results of one stage in markdown."""
    cases = stage["cases"]
    text = f"## {TITLES[name]}\n\n" + SECTIONS[name]({k: v for k, v in cases.items() if k not in failed(cases)}, cases)
    text += "".join(f"- {case} failed: {cases[case]['error']}\n" for case in failed(cases))
    return text.rstrip() + "\n\n"


def tests_text(_: Values, cases: Values) -> str:
    outcomes = [values["outcome"] for values in cases.values()]
    counts = ", ".join(f"{outcomes.count(word)} {word}" for word in ("passed", "failed", "skipped"))
    reasons = sorted({values["reason"] for values in cases.values() if "reason" in values})
    slowest = sorted(cases.items(), key=lambda item: -item[1].get("seconds", 0))[:3]
    text = f"{counts}. The slowest: "
    text += ", ".join(f"{name.rpartition('::')[2]} {values.get('seconds', 0):.1f} s" for name, values in slowest)
    return text + ".\n" + "".join(f"- skipped: {reason}\n" for reason in reasons)


SPEED = ["ms", "images/s", "share of the matrix rate, %"]


def speed(values: Values) -> list[str]:
    return [show(values["ms"]), show(values["images_per_second"]), show(values.get("matrix_share"), 100)]


def train_text(cases: Values, _: Values) -> str:
    rows = [
        [f"{name}, batch {v['batch']}, {v['precision']}", *speed(v), v["lines"], v["steps"],
         f"{v['seconds_to_first_line'] or 0:.1f}", " to ".join(f"{loss:.3f}" for loss in v["loss"])]
        for name, v in cases.items()
    ]  # fmt: skip
    return table(["", *SPEED, "lines of log", "steps", "to the first line, s", "loss"], rows)


def sides_text(cases: Values, _: Values) -> str:
    """The cases that took turns: a row for each side, and under the table what the profiles and the notes say."""
    rows, notes = [], ""
    for name, v in cases.items():
        for key, side in v["sides"].items():
            shares = side.get("profile", {})
            parts = [percent(shares.get(part)) for part in ("products", "others", "gaps")]
            starts = [f"{side[part]:.1f}" if part in side else "" for part in ("compile_seconds", "capture_seconds")]
            ratio = show(v.get("ratio")) if key == next(iter(v["sides"])) else ""
            rows.append([f"{name}: {key}", *speed(side), ratio, gib(side), *starts, *parts])
            if "error" in shares:
                notes += f"- {name}: {key}: the profile failed: {shares['error']}\n"
            elif shares:
                kernels = list(shares["longest"].items())[:5]
                longest = "; ".join(f"`{kernel}` {100 * part:.0f}%" for kernel, part in kernels)
                notes += f"- {name}: {key}: {shares['kernels']} kernels per step; "
                notes += f"the longest by their share of the time: {longest}\n"
        notes += "".join(f"- {name}: {note}\n" for note in v.get("notes", []))
    header = ["", *SPEED, "times as fast as the next row", "peak, GiB", "to compile, s", "to capture, s"]
    return table([*header, "convolutions and products, %", "other kernels, %", "gaps, %"], rows) + "\n" + notes


SECTIONS: dict[str, Callable[[Values, Values], str]] = {
    "steps": sides_text, "tests": tests_text, "train": train_text, "diffusers": sides_text, "batches": sides_text,
    "samples": sides_text, "large": sides_text,
}  # fmt: skip


# -- running -----------------------------------------------------------------------------------------------------------


def lines(file: Path) -> Values:
    """The cases that a stage has written so far, without a last line that is still being written."""
    complete = file.read_text().rpartition("\n")[0] if file.exists() else ""
    cases = [json.loads(line) for line in complete.splitlines()]
    return {case.pop("case"): case for case in cases}


def run(stage: str, work: Path, limit: float, env: dict[str, str], see: Callable[[], None]) -> tuple[int | None, str]:
    """Run a stage for at most `limit` seconds. Returns its exit code (None if killed) and its last line of output.

    The function calls `see` ten times a second. All processes that the stage has started end with it.
    """
    log, end = work / f"{stage}.log", time.monotonic() + limit
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(CHILD), stage, str(work)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True,
        )  # fmt: skip
        try:
            while (code := process.poll()) is None and time.monotonic() < end:
                time.sleep(0.1)
                see()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = log.read_text(errors="replace").strip().splitlines()
    return code, output[-1][:300] if output else ""


def do(stage: str, out: Path, record: Values, work: Path, limit: float, env: dict[str, str]) -> None:
    """Run a stage and save the record after each case. Cases that have succeeded before do not run again."""
    before = record["stages"].get(stage, {}).get("cases", {})
    succeeded = {name: values for name, values in before.items() if "error" not in values}
    file, call = work / f"{stage}.jsonl", len(record["calls"])
    file.write_text("".join(json.dumps({"case": name, **values}) + "\n" for name, values in succeeded.items()))
    entry: Values = {
        "state": "running",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "call": call,
        "cases": succeeded,
    }
    record["stages"][stage] = entry
    save(out, record)
    begun = time.monotonic()

    def see() -> None:
        cases = lines(file)
        if len(cases) > len(entry["cases"]):
            entry["cases"] = {name: {"call": call, **values} for name, values in cases.items()}
            entry["seconds"] = time.monotonic() - begun
            save(out, record)

    try:
        code, last_line = run(stage, work, limit, env, see)
        see()
    except KeyboardInterrupt:
        entry |= {"state": "cut", "note": "interrupted"}
        save(out, record)
        raise
    bad = failed(entry["cases"])
    if code is None:
        entry |= {"state": "cut", "note": f"not finished after {limit:.0f} s"}
    elif code or not entry["cases"]:
        entry |= {"state": "failed", "note": f"ended with code {code}; its last line of output: {last_line}"}
    elif bad:
        entry |= {"state": "failed", "note": f"{len(bad)} of {len(entry['cases'])} cases failed"}
    else:
        entry["state"] = "done"
    entry["seconds"] = time.monotonic() - begun
    save(out, record)


def children(args: argparse.Namespace, work: Path, notes: list[str]) -> dict[str, str]:
    """The environment of the stages: this checkout's package, the wheels and the caches, without downloads."""
    paths = [str(ROOT / "src")]
    if args.wheels:
        files = [str(file) for file in sorted(args.wheels.glob("*.whl"))]
        words = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet", "--target"]
        done = subprocess.run([*words, str(work / "wheels"), *files], capture_output=True, text=True)
        if done.returncode:
            notes.append(f"--wheels were not installed: {(done.stderr.strip().splitlines() or ['pip failed'])[-1]}")
        paths.append(str(work / "wheels"))
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hub")}
    return {**os.environ, **offline, **gpu_caches.environment(work / "caches"), "PYTHONPATH": os.pathsep.join(paths)}


def open_record(args: argparse.Namespace, call: Values) -> Values:
    """The record of --out with this call in it. SystemExit if that record has other settings or another card."""
    file = args.out / "record.json"
    new: Values = {"name": "gpu", "rehearsal": args.rehearse, "repeats": args.repeats, "seconds": args.seconds}
    record = json.loads(file.read_text()) if file.exists() else {**new, "calls": [], "stages": {}}
    same = all(record[key] == value for key, value in new.items())
    if not same or any(other["card"] != call["card"] for other in record["calls"]):
        raise SystemExit(
            f"gpu.py: --out {args.out}: holds a record of other settings or another card; want another --out"
        )
    record["calls"].append(call)
    return record


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="time limit of the whole call (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="STAGE", help="stages (all)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/cache/gpu", help="folder of the record")
    parser.add_argument("--data", type=Path, help="parquet file of CIFAR-10 images (digits)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of packages that this machine lacks")
    parser.add_argument("--caches", type=Path, help="folder with archives of caches to unpack (--out)")
    parser.add_argument("--commit", help="commit of the code, for a checkout without git")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of each figure (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="least duration of a repeat (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="run all stages on the CPU with tiny sizes")
    parser.add_argument(
        "--tests", type=Path, default=ROOT / "tests/test_cuda.py", help="test file of the stage `tests`"
    )
    parser.add_argument("--limit", type=float, help="time limit of each stage in seconds, if shorter than its own")
    args = parser.parse_args()
    for name in ("data", "wheels", "caches", "tests"):
        path = getattr(args, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path}: does not exist")
    return args


def measure(args: argparse.Namespace, work: Path) -> int:
    end = time.monotonic() + 60 * args.minutes
    until = end - min(RESERVE, 3 * args.minutes)
    notes: list[str] = []
    (work / "caches").mkdir()
    unpacked, problems = gpu_caches.unpack(args.caches or args.out, work / "caches")
    notes += problems
    env = children(args, work, notes)
    plan: Values = {
        "rehearse": args.rehearse, "repeats": args.repeats, "seconds": args.seconds, "parent": os.getpid(),
        "data": str(args.data.resolve()) if args.data else None, "tests": str(args.tests.resolve()),
    }  # fmt: skip
    write(work / "plan.json", json.dumps(plan))
    code, last_line = run("card", work, min(CARD_LIMIT, until - time.monotonic()), env, lambda: None)
    card = lines(work / "card.jsonl")
    if code == 2:
        print("gpu.py: this machine has no CUDA GPU that PyTorch can use; --rehearse runs on the CPU", file=sys.stderr)
        return 2
    if "card" not in card or failed(card):
        print(f"gpu.py: the GPU could not be queried: {[*card.values()]} {last_line}", file=sys.stderr)
        return 1
    product = next((values["flops"] for values in card.values() if "flops" in values), None)
    call = {
        **card["card"],
        "date": str(date.today()),
        "product": product,
        "caches": len(unpacked),
        "minutes": args.minutes,
    }
    call["commit"] = args.commit or call["commit"]
    args.out.mkdir(parents=True, exist_ok=True)
    record = open_record(args, call)
    plan["product_flops"] = product["median"] if product else None
    write(work / "plan.json", json.dumps(plan))
    for note in notes:
        print(f"gpu.py: {note}", file=sys.stderr)
    for stage, limit in LIMITS.items():
        state = record["stages"].get(stage, {}).get("state")
        if stage not in args.only or state == "done":
            continue
        limit = min(limit, args.limit or limit, until - time.monotonic())
        if limit < LEAST:
            why = f"--minutes {args.minutes:g} are over"
            record["stages"].setdefault(stage, {"cases": {}})
            record["stages"][stage] |= {"state": "not reached", "note": why}
            save(args.out, record)
            print(f"{stage}: not reached; {why}\n", flush=True)
            continue
        do(stage, args.out, record, work, limit, env)
        entry = record["stages"][stage]
        note = f"; {entry['note']}" if "note" in entry else ""
        print(f"{stage}: {entry['state']} in {entry['seconds']:.0f} s{note}\n", flush=True)
        print(section(stage, entry), flush=True)
    now = time.monotonic()
    sizes, left_out = gpu_caches.pack(work / "caches", args.out, until=now + 0.4 * (end - now))
    record["caches"] = {"archives": sizes, "notes": [*notes, *left_out]}
    save(args.out, record)
    print("".join(f"{name}: {size / 2**20:.1f} MiB\n" for name, size in sizes.items()), end="")
    print(f"written: {args.out}/record.json, .md", file=sys.stderr)
    return 0


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="ddpm-gpu-") as folder:
        try:
            return measure(args, Path(folder).resolve())
        except KeyboardInterrupt:
            print(f"gpu.py: interrupted; the record is in {args.out}", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
