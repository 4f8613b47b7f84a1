"""What this package does on a CUDA GPU: whether it is right there, and how fast it is beside diffusers.

    python benchmarks/gpu.py [--minutes 9] [--only STAGE ...] [--data FILE.parquet] [--wheels FOLDER] [--out FOLDER]
    python benchmarks/gpu.py --rehearse --out FOLDER    # on the CPU with tiny sizes: its figures mean nothing

The stages in their order, the one of most worth first:

    tests      tests/test_cuda.py
    ours       training steps of our networks: speed, share of the card's matrix rate, memory, compilation, profile
    data       `ddpm train cifar10` for a minute on the images of --data (benchmarks/cut_cifar10.py makes the file)
    diffusers  a training step of ours and of diffusers, in turns
    samples    1,024 images, ours and diffusers', in turns
    large      a training step of the network for 256x256

Each stage is a process of its own with a time limit. The record, record.json and record.md, is written anew after each
case, so a call that is killed leaves what had ended. A later call with the same --out runs what is missing or has
failed. The limits add up to more than nine minutes, since most stages end sooner.

The matrix rate is that of one large bf16 product, measured in the same call. The operations of a step are those of its
convolutions and matrix products, counted on a forward pass and multiplied by three. A profile covers three steps. Gaps
are the time in which no kernel ran, from the first kernel's start to the last one's end. The seconds to compile are
those by which the first call is longer than a later one.

The script needs torch, pytest and what the package needs. Packages that are missing may lie as wheels in --wheels; the
script installs them into a temporary folder, and fetches nothing. The compilation caches are left as archives
gpu-cache-N.tar.gz in --out, and the next call takes them up. The exit code is 2 where there is no GPU.
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
LIMITS = {"tests": 100, "ours": 180, "data": 90, "diffusers": 110, "samples": 70, "large": 60}
"""Seconds of each stage, at most."""
LEAST = 2
"""Seconds below which a stage is not begun."""
RESERVE = 25
"""Seconds kept for the archives of the caches, at most; a twentieth of a shorter call."""
TITLES = {
    "tests": "tests/test_cuda.py",
    "ours": "Our training steps",
    "data": "`ddpm train cifar10` on images from a file",
    "diffusers": "A training step beside diffusers",
    "samples": "Samples beside diffusers",
    "large": "The network for 256x256",
}
Values = dict[str, Any]


# -- the record --------------------------------------------------------------------------------------------------------


def write(file: Path, text: str) -> None:
    """A file that is whole at any moment."""
    new = file.with_name(f".{file.name}.new")
    new.write_text(text)
    new.replace(file)


def save(out: Path, found: Values) -> None:
    write(out / "record.json", json.dumps(found, indent=1) + "\n")
    write(out / "record.md", report(found))


def failed(cases: Values) -> list[str]:
    return [name for name, values in cases.items() if "error" in values]


def show(values: Values | None, scale: float = 1) -> str:
    return "" if values is None else str(Spread(*(scale * values[key] for key in ("median", "low", "high"))))


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


def gib(values: Values) -> str:
    return f"{values['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in values else ""


def report(found: Values) -> str:
    """The record in markdown."""
    calls, stages = found["calls"], found["stages"]
    about = calls[-1]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    card = f"{about['card']}, {about['memory_gib']} GiB, driver {about['driver']}, CUDA {about.get('cuda', 'none')}"
    text = "# A rehearsal on the CPU: no figure here says anything of a GPU\n\n" if found["rehearsal"] else ""
    text = text or f"# On a GPU: {about['card']}\n\n"
    text += f"- hardware: {about['hardware']}\n- card: {card}\n- versions: {versions}, Python {about['python']}\n"
    text += (
        f"- a figure is the median (least - most) of {found['repeats']} repeats of at least {found['seconds']:g} s; "
    )
    text += "of at most 3 repeats for samples; of the lines of the log for `ddpm train`\n\n"
    rows = []
    for i, call in enumerate(calls, 1):
        before = f"{call.get('percent_busy_before', '?')}, {call.get('mib_used_before', '?')}"
        rate = show(call.get("product"), 1e-12)
        rows.append((i, call["date"], call["commit"], before, rate, call["caches"]))
    header = ["call", "date", "commit", "card before: % busy, MiB used", "bf16 product, TFLOP/s", "caches taken up"]
    text += table(header, rows) + "\n"
    rows = [
        (name, found["stages"][name]["state"], f"{stages[name].get('seconds', 0):.0f}", stages[name].get("note", ""))
        for name in LIMITS
        if name in stages
    ]
    text += table(["stage", "state", "seconds", "note"], rows) + "\n"
    text += "".join(section(name, stages[name]) for name in LIMITS if stages.get(name, {}).get("cases"))
    if caches := found.get("caches"):
        sizes = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in caches["archives"].items())
        text += "\n".join(["## Compilation caches\n", sizes or "no archive", *caches["notes"]]) + "\n"
    return text


def section(name: str, stage: Values) -> str:
    """What one stage found, in markdown."""
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


def steps_text(cases: Values, _: Values) -> str:
    rows, kernels = [], ""
    for name, v in cases.items():
        went = v.get("profile", {})
        parts = [percent(went.get(part)) for part in ("products", "others", "gaps")]
        extra = f"{v['compile_seconds']:.1f}" if "compile_seconds" in v else ""
        rows.append([name, *speed(v), gib(v), extra, *parts])
        if "error" in went:
            kernels += f"- {name}: the profile failed: {went['error']}\n"
        elif went:
            longest = "; ".join(f"`{kernel}` {100 * share:.0f}%" for kernel, share in list(went["longest"].items())[:5])
            kernels += f"- {name}: {went['kernels']} kernels a step; of their time: {longest}\n"
    header = ["", *SPEED, "peak, GiB", "to compile, s", "convolutions and products, %", "other kernels, %", "gaps, %"]
    return table(header, rows) + "\n" + kernels


SPEED = ["ms", "images/s", "share of the matrix rate, %"]


def speed(values: Values) -> list[str]:
    return [show(values["ms"]), show(values["images_per_second"]), show(values.get("matrix_share"), 100)]


def data_text(cases: Values, _: Values) -> str:
    rows = [
        [f"{name}, batch {v['batch']}, {v['precision']}", *speed(v), v["lines"], v["steps"],
         f"{v['seconds_to_first_line'] or 0:.1f}", " to ".join(f"{loss:.3f}" for loss in v["loss"])]
        for name, v in cases.items()
    ]  # fmt: skip
    return table(["", *SPEED, "lines of log", "steps", "to the first line, s", "loss"], rows)


def turns_text(cases: Values, _: Values) -> str:
    rows = []
    for name, v in cases.items():
        for side in ("ours", "diffusers"):
            ratio = show(v["ratio"]) if side == "ours" else ""
            rows.append([f"{name}: {side}", *speed(v[side]), gib(v[side]), f"{v[side]['compile_seconds']:.1f}", ratio])
    return table(["", *SPEED, "peak, GiB", "to compile, s", "ours is faster by"], rows)


SECTIONS: dict[str, Callable[[Values, Values], str]] = {
    "tests": tests_text, "ours": steps_text, "data": data_text, "diffusers": turns_text, "samples": turns_text,
    "large": steps_text,
}  # fmt: skip


# -- running -----------------------------------------------------------------------------------------------------------


def lines(file: Path) -> Values:
    """The cases that a stage has written so far; half a line, which is being written, is left out."""
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    found = [json.loads(line) for line in whole.splitlines()]
    return {case.pop("case"): case for case in found}


def run(stage: str, work: Path, limit: float, env: dict[str, str], see: Callable[[], None]) -> tuple[int | None, str]:
    """Run a stage for at most `limit` seconds: its exit code, None where it was killed, and its last words.

    `see` is called all the while. Whatever the stage has started ends with it.
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
    said = log.read_text(errors="replace").strip().splitlines()
    return code, said[-1][:300] if said else ""


def do(stage: str, out: Path, found: Values, work: Path, limit: float, env: dict[str, str]) -> None:
    """Run a stage, and keep the record up to date with its cases; cases that have succeeded are not run again."""
    before = found["stages"].get(stage, {}).get("cases", {})
    kept = {name: values for name, values in before.items() if "error" not in values}
    file, call = work / f"{stage}.jsonl", len(found["calls"])
    file.write_text("".join(json.dumps({"case": name, **values}) + "\n" for name, values in kept.items()))
    entry: Values = {"state": "running", "started": time.strftime("%Y-%m-%d %H:%M:%S"), "call": call, "cases": kept}
    found["stages"][stage] = entry
    save(out, found)
    begun = time.monotonic()

    def see() -> None:
        cases = lines(file)
        if len(cases) > len(entry["cases"]):
            entry["cases"] = {name: {"call": call, **values} for name, values in cases.items()}
            entry["seconds"] = time.monotonic() - begun
            save(out, found)

    try:
        code, said = run(stage, work, limit, env, see)
        see()
    except KeyboardInterrupt:
        entry |= {"state": "cut", "note": "interrupted"}
        save(out, found)
        raise
    bad = failed(entry["cases"])
    if code is None:
        entry |= {"state": "cut", "note": f"not ended after {limit:.0f} s"}
    elif code or not entry["cases"]:
        entry |= {"state": "failed", "note": f"ended with code {code}; its last words: {said}"}
    elif bad:
        entry |= {"state": "failed", "note": f"{len(bad)} of {len(entry['cases'])} cases failed"}
    else:
        entry["state"] = "done"
    entry["seconds"] = time.monotonic() - begun
    save(out, found)


def children(args: argparse.Namespace, work: Path, notes: list[str]) -> dict[str, str]:
    """The environment of the stages: this checkout's package, the wheels, the caches; nothing is fetched."""
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


def opened(args: argparse.Namespace, call: Values) -> Values:
    """The record of --out with this call in it; SystemExit where that record is of something else."""
    file = args.out / "record.json"
    new: Values = {"name": "gpu", "rehearsal": args.rehearse, "repeats": args.repeats, "seconds": args.seconds}
    found = json.loads(file.read_text()) if file.exists() else {**new, "calls": [], "stages": {}}
    same = all(found[key] == value for key, value in new.items())
    if not same or any(other["card"] != call["card"] for other in found["calls"]):
        raise SystemExit(
            f"gpu.py: --out {args.out}: holds a record of other settings or another card; want another --out"
        )
    found["calls"].append(call)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="of the whole call, at most (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="STAGE", help="(all)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/cache/gpu", help="folder of the record")
    parser.add_argument("--data", type=Path, help="parquet file of CIFAR-10 images")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of packages that this machine lacks")
    parser.add_argument("--caches", type=Path, help="folder of archives of caches to take up (--out)")
    parser.add_argument("--commit", help="of the code, where the checkout does not know it")
    parser.add_argument("--repeats", type=int, default=5, help="of every figure (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of work a repeat, at least (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="run all stages on the CPU with tiny sizes")
    parser.add_argument("--tests", type=Path, default=ROOT / "tests/test_cuda.py", help="file of the stage tests")
    parser.add_argument("--limit", type=float, help="seconds of each stage, at most, where its own limit is longer")
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
    taken, problems = gpu_caches.unpack(args.caches or args.out, work / "caches")
    notes += problems
    env = children(args, work, notes)
    plan: Values = {
        "rehearse": args.rehearse, "repeats": args.repeats, "seconds": args.seconds, "parent": os.getpid(),
        "data": str(args.data.resolve()) if args.data else None, "tests": str(args.tests.resolve()),
    }  # fmt: skip
    write(work / "plan.json", json.dumps(plan))
    code, said = run("card", work, min(CARD_LIMIT, until - time.monotonic()), env, lambda: None)
    card = lines(work / "card.jsonl")
    if code == 2:
        print("gpu.py: this machine has no CUDA GPU that PyTorch can use; --rehearse runs on the CPU", file=sys.stderr)
        return 2
    if "card" not in card or failed(card):
        print(f"gpu.py: the card could not be asked: {[*card.values()]} {said}", file=sys.stderr)
        return 1
    product = next((values["flops"] for values in card.values() if "flops" in values), None)
    call = {
        **card["card"],
        "date": str(date.today()),
        "product": product,
        "caches": len(taken),
        "minutes": args.minutes,
    }
    call["commit"] = args.commit or call["commit"]
    args.out.mkdir(parents=True, exist_ok=True)
    found = opened(args, call)
    plan["product_flops"] = product["median"] if product else None
    write(work / "plan.json", json.dumps(plan))
    for note in notes:
        print(f"gpu.py: {note}", file=sys.stderr)
    for stage, limit in LIMITS.items():
        state = found["stages"].get(stage, {}).get("state")
        if stage not in args.only or state == "done":
            continue
        limit = min(limit, args.limit or limit, until - time.monotonic())
        why = f"--minutes {args.minutes:g} were spent" if limit < LEAST else ""
        if stage == "data" and not args.data:
            why = "no --data was given"
        if why:
            found["stages"].setdefault(stage, {"cases": {}})
            found["stages"][stage] |= {"state": "not reached", "note": why}
            save(args.out, found)
            print(f"{stage}: not reached; {why}\n", flush=True)
            continue
        do(stage, args.out, found, work, limit, env)
        entry = found["stages"][stage]
        note = f"; {entry['note']}" if "note" in entry else ""
        print(f"{stage}: {entry['state']} in {entry['seconds']:.0f} s{note}\n", flush=True)
        print(section(stage, entry), flush=True)
    now = time.monotonic()
    sizes, left_out = gpu_caches.pack(work / "caches", args.out, until=now + 0.4 * (end - now))
    found["caches"] = {"archives": sizes, "notes": [*notes, *left_out]}
    save(args.out, found)
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
