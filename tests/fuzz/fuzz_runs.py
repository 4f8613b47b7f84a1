"""Fuzz runs: damage the files of a run at random, then use it.

    python tests/fuzz/fuzz_runs.py [--tries 300]

Checkpoints, settings, logs, caches and calibrations are cut, altered, emptied, deleted, replaced by folders, links and
pipes, or written again with other values. Then a command uses the run. Counted are tracebacks, signals and calls that
took more than 120 s; wrong results, which are samples that no whole checkpoint of the run makes; and whole checkpoints
that are lost. pytest does not collect this folder.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))

import figures
import record
from fuzz_commands import CALLS, NUMBERS, ddpm, outcome

from ddpm.files.checkpoints import damage

USES = {
    "resume": (CALLS["train"] + " ")
    .replace("--steps 2 ", "--steps 5 ")
    .replace("OUT ", "RUN")
    .replace("keep 1", "keep 9"),
    "sample": "sample RUN -n 1 --steps 3 --sampler ddim --out a.png",
    "best": "sample RUN -n 1 --steps 3 --sampler ddim --checkpoint best --out a.png",
    "raw": "sample RUN -n 1 --steps 3 --sampler ddim --weights raw --out a.png",
    "evaluate": "evaluate RUN --metrics nll -n 2 --batch-size 1 --data digits",
    "calibrated": "evaluate RUN --metrics nll -n 2 --batch-size 1 --data digits --variance calibrated",
    "calibrate": "calibrate RUN -n 2 --codec 0 --data digits --batch-size 1",
    "report": "report RUN",
    "info": "info RUN",
    "export": "export RUN --out x.safetensors",
}


def make_run(folder: Path) -> None:
    """A run with checkpoints of steps 1, 2 and 3, a calibration, finished parts, and a result of `evaluate`."""
    (folder / "DIR").mkdir()
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / "DIR" / f"{i}.png")
    train = USES["resume"].replace("--steps 5 ", "--steps 3 ")
    for words in (train, USES["calibrate"], USES["evaluate"]):
        ddpm(folder, words.split(), check=True)


def spoil(rng: random.Random, file: Path) -> str:
    """Damage one file, and say how."""
    data = file.read_bytes()
    how = rng.choice(
        ["cut", "flip", "flip", "zeros", "empty", "delete", "folder", "loop", "pipe", "noise", "json", "json"]
    )
    match how:
        case "cut":
            file.write_bytes(data[: rng.randrange(len(data) + 1)])
        case "flip" if data:
            changed = bytearray(data)
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(changed)
        case "zeros":
            file.write_bytes(bytes(len(data)))
        case "noise":
            file.write_bytes(rng.randbytes(len(data)))
        case "json" if file.suffix in (".json", ".jsonl"):
            file.write_text(other_values(rng, data.decode(errors="replace")))
        case "empty":
            file.write_bytes(b"")
        case _:
            file.unlink()
            if how == "folder":
                file.mkdir()
            elif how == "loop":
                file.symlink_to(file)
            elif how == "pipe":
                os.mkfifo(file)
    return how


def other_values(rng: random.Random, text: str) -> str:
    """The JSON with one value replaced by another one, or by one that is nested deeply."""
    if rng.random() < 0.1:
        return "[" * 100_000
    try:
        values = json.loads(text.splitlines()[0] if "\n{" in text else text)
    except (ValueError, IndexError):
        return "null"
    bad = rng.choice([None, True, -1, 2**70, 1e308, "x", [], {}, [[]], float("nan"), *NUMBERS])
    if isinstance(values, dict) and values:
        values[rng.choice([*values])] = bad
    return json.dumps(values if isinstance(values, dict) and values else bad)


def whole(run: Path) -> dict[str, str]:
    """The whole checkpoints of a run and a hash of their weights."""
    return {
        folder.name: hashlib.sha256((folder / "raw.safetensors").read_bytes()).hexdigest()
        for folder in (run / "checkpoints").glob("0*")
        if folder.is_dir() and damage(folder) is None
    }


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--tries", type=int, default=300, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage (%(default)s)")
    args = parser.parse_args()
    rng, outcomes, faults = random.Random(args.seed), Counter[str](), []
    with tempfile.TemporaryDirectory() as tmp:
        template = Path(tmp) / "template"
        template.mkdir()
        make_run(template)
        right = set()  # the pictures that whole checkpoints make
        for step in "1 2 3".split():
            for weights in ("ema", "raw"):
                words = f"sample RUN -n 1 --steps 3 --sampler ddim --checkpoint {step} --weights {weights} --out a.png"
                ddpm(template, words.split(), check=True)
                right.add((template / "a.png").read_bytes())
        (template / "a.png").unlink()
        for i in range(args.tries):
            folder = Path(tmp) / f"try{i}"
            shutil.copytree(template, folder)
            files = sorted(p for p in (folder / "RUN").rglob("*") if p.is_file())
            spoiled = {str(f.relative_to(folder)): spoil(rng, f) for f in rng.sample(files, rng.choice((1, 1, 2, 4)))}
            name = rng.choice([*USES])
            before = whole(folder / "RUN")
            code, err = outcome(folder, USES[name].split())
            after = whole(folder / "RUN")
            lost = [step for step, digest in before.items() if after.get(step) != digest]
            picture = folder / "a.png"
            wrong = code == "0" and picture.exists() and picture.read_bytes() not in right
            outcomes[f"exit code {code}"] += 1
            if "Traceback" in err or code not in ("0", "1", "2") or lost or wrong:
                faults.append(
                    {"use": name, "damage": spoiled, "code": code, "lost": lost, "wrong": wrong, "err": err[-600:]}
                )
                print(name, spoiled, code, lost, wrong, err[-400:], flush=True)
            shutil.rmtree(folder)
    text = (
        f"{args.tries} damaged runs, seed {args.seed}: {len(faults)} ended in a traceback, by a signal or after 120 s, "
        "gave a wrong result or lost a whole checkpoint.\n\n"
    )
    text += figures.table(["outcome", "tries"], [[name, f"{n:,}"] for name, n in outcomes.most_common()])
    record.write("fuzz-runs", "Damaged runs", args, {"outcomes": dict(outcomes), "faults": faults}, text)


if __name__ == "__main__":
    main()
