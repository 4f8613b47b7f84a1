"""Fuzz the command line: bad calls of every command, which must end in one line and leave nothing behind.

    python tests/fuzz/fuzz_commands.py [--calls 1000]

A call is one that works, with one or two of its words replaced by something that a person might type or a script might
pass: numbers out of range, names that do not exist, files of another kind, pipes, links that go round. It runs in a
process of its own, which gets 120 s and 8 GiB. Counted are tracebacks, signals, calls that took too long, messages of
several lines, and what a refused call (exit code 2) left behind. pytest does not collect this folder.
"""

import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import figures
import record

CALLS = {  # calls that work; DIR is a folder of images, RUN a run, OUT a place that does not exist
    "train": "train digits --data DIR --no-classes --width 32 --channel-multipliers 1 --num-res-blocks 1 --patch 1 "
    "--attention-resolutions 0 --num-timesteps 20 --sample-steps 5 --steps 2 --batch-size 4 --lr 0.001 --warmup 1 "
    "--seed 0 --size 8 --channels 1 --schedule linear --predict eps --variance fixed_large --loss simple --dropout 0.1 "
    "--ema-decay 0.9 --save-every 1 --keep 1 --eval-images 4 --sample-every 0 --workers 0 --accumulate 1 "
    "--device cpu --precision float32 --cooldown 0.5 --grad-clip 1 --label-dropout 0.1 --out OUT",
    "arrays": "train photos --data STACK.npy --width 32 --channel-multipliers 1 --num-res-blocks 1 --patch 1 "
    "--attention-resolutions 0 --num-timesteps 20 --sample-steps 5 --steps 1 --batch-size 4 --size 8 --channels 5 "
    "--pixel-type uint16 --value-range 0,9999 --show 3,2,1 --show-range 0,500 --fit pad --pages first "
    "--schedule log_snr --beta-1 1e-6 --cache-bytes 1M --shuffle-window 10 --workers 0 --eval-images 4 --out OUT",
    "init": "train --init RUN --data DIR --steps 1 --batch-size 4 --eval-images 4 --sample-every 0 --workers 0 "
    "--lr 0.001 --out OUT",
    "config": "train --config RUN/config.json --steps 1 --batch-size 4 --out OUT",
    "data": "data DIR --size 8 --channels 1 --fit crop --pixel-type uint8 --out OUT.png",
    "deep": "sample DEEP -n 2 --sampler ddim --steps 2 --show 1 --show-range 0,9 --out OUT.npy",
    "sample": "sample RUN -n 2 --steps 3 --sampler ddim --eta 0.5 --spacing uniform --seed 1 --batch-size 2 --clip "
    "0.9 --checkpoint last --weights ema --precision float32 --device cpu --variance fixed_small --out OUT.png",
    "class": "sample digits -n 2 --steps 2 --class 7 --guidance 2 --guidance-interval 200,800 --out OUT",
    "evaluate": "evaluate RUN --metrics nll -n 2 --draws 1 --split test --data digits --seed 0 --batch-size 2 "
    "--out OUT",
    "quality": "evaluate RUN --metrics kid --samples DIR --features NET.py:net --data digits --out OUT",
    "ode": "evaluate RUN --metrics ode -n 2 --ode-steps 3 --out OUT",
    "calibrate": "calibrate RUN -n 2 --codec 1 --replace --data digits --batch-size 2",
    "paper": "paper table4 --run RUN -n 2 --seed 1 --data digits --out OUT",
    "edit": "edit RUN IMAGE --t 5 -n 2 --steps 3 --sampler ddim --seed 0 --out OUT.png",
    "invert": "edit RUN IMAGE --t 5 --invert 2 --steps 3 --out OUT.png",
    "interpolate": "interpolate RUN IMAGE IMAGE -n 3 --t 5 --steps 3 --out OUT.png",
    "inpaint": "inpaint RUN IMAGE MASK -n 1 --steps 4 --jump 1 --resample 2 --out OUT.png",
    "restore": "restore RUN IMAGE --degrade --operator superresolution:2 --noise 1 -n 1 --steps 4 --jump 1 "
    "--resample 2 --seed 0 --spacing uniform --batch-size 2 --out OUT.png",
    "dps": "restore RUN IMAGE --operator blur:1 --method dps --zeta 0.5 --steps 4 --out OUT.png",
    "compress": "compress digits IMAGE --chunk-bits 8 --profile portable --seed 0 --out OUT.ddpm",
    "psnr": "compress digits IMAGE --psnr 20 --chunk-bits 8 --out OUT.ddpm",
    "archive": "compress digits IMAGE IMAGE2 --archive --chunk-bits 8 --out OUT.ddpm",
    "decompress": "decompress digits FILE.ddpm --at 60 --out OUT.png",
    "inspect": "inspect FILE.ddpm --run digits",
    "export": "export RUN --out OUT.safetensors --precision bf16 --data digits --license mit",
    "diffusers": "export RUN --to diffusers OUT",
    "import": "import THEIRS --out OUT.safetensors",
    "report": "report RUN",
}
CALLS["resume"] = CALLS["train"].replace("--steps 2 ", "--steps 9 ").replace("OUT", "RUN")
NUMBERS = "-1 0 1 2 -0 1e400 nan inf -inf 0.5 1,000 1_0 １ 0x10 1e3 1,2 8x8 0x0 8x x8".split()
NUMBERS += ["", " ", "9" * 400, *(str(2**n) for n in (31, 63, 70)), str(2**63 - 1)]
WORDS = (
    "x none None true all last best ema digits cifar10 bf16 cuda cuda:9 mps meta -n -- --out --help - . .. / ~".split()
)
WORDS += "~nobody ü \udce4 hf: hf:a hf:a/b@c a/b a/b:c %s {} $HOME * [] null".split()
WORDS += ["", " ", "a\nb", "a\tb", "a" * 300, "a/" * 2000]
PLACES = "DIR RUN DEEP STACK.npy IMAGE FILE.ddpm FILE.safetensors THEIRS NET.py NET.py:nothing RUN/config.json "
PLACES += "RUN/checkpoints missing.png missing/ /dev/null /dev/zero /proc/self/mem OUT/deep/er.png"


def prepare(folder: Path) -> list[str]:
    """Files to use and to misuse; returns the names of those that are no use."""
    rng = np.random.default_rng(0)
    (folder / "DIR").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / "DIR" / f"{i}.png")
    for name in ("IMAGE", "IMAGE2"):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / name, "PNG")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(folder / "MASK", "PNG")
    (folder / "NET.py").write_text("def net(x):\n    return x.reshape(len(x), -1)[:, :9].astype(float)\n")
    run = (CALLS["train"] + " ").replace("--out OUT ", "--out RUN").split()
    ddpm(folder, run, check=True)
    np.save(folder / "STACK.npy", rng.integers(0, 9999, (12, 8, 8, 5), np.uint16))
    ddpm(folder, (CALLS["arrays"] + " ").replace("--out OUT ", "--out DEEP").split(), check=True)
    ddpm(folder, "compress digits IMAGE --chunk-bits 8 --out FILE.ddpm".split(), check=True)
    ddpm(folder, "export RUN --out FILE.safetensors".split(), check=True)
    ddpm(folder, "export RUN --to diffusers THEIRS".split(), check=True)
    odd = folder / "odd"
    (odd / "empty").mkdir(parents=True)
    (odd / "empty.png").touch()
    (odd / "noise.png").write_bytes(rng.bytes(999))
    (odd / "text.txt").write_text("hello")
    (odd / "bad.json").write_text("[" * 99_999)
    (odd / "cut.png").write_bytes((folder / "IMAGE").read_bytes()[:60])
    (odd / "loop").symlink_to(odd / "loop")
    (odd / "nowhere.png").symlink_to(odd / "missing" / "x.png")
    os.mkfifo(odd / "pipe.png")
    shutil.copytree(folder / "RUN", odd / "hollow")
    shutil.rmtree(odd / "hollow" / "checkpoints")
    rgba = rng.integers(0, 256, (8, 8, 4), np.uint8)
    Image.fromarray(rgba).save(odd / "rgba.png")
    Image.fromarray(rng.integers(0, 65536, (8, 8), np.uint16)).save(odd / "deep.png")
    Image.new("L", (1, 5000)).save(odd / "thin.png")
    np.savez(odd / "a.npz", np.zeros(3))
    np.save(odd / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    names = [str(Path("odd") / p.name) for p in odd.iterdir()]
    return [*names, *PLACES.split()]


def ddpm(folder: Path, words: list[str], check: bool = False) -> subprocess.CompletedProcess[bytes]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    arguments = [w.encode("utf-8", "surrogateescape") for w in words]
    return subprocess.run(
        [sys.executable, "-m", "ddpm", *arguments], cwd=folder, check=check, capture_output=True, timeout=120,
        stdin=subprocess.DEVNULL, env=environment, preexec_fn=limit,
    )  # fmt: skip


def outcome(folder: Path, words: list[str]) -> tuple[str, str]:
    """The exit code of a call, or that it took too long, and what it wrote to standard error."""
    try:
        done = ddpm(folder, words)
    except subprocess.TimeoutExpired:
        return "more than 120 s", ""
    return str(done.returncode), done.stderr.decode(errors="replace")


def listing(folder: Path) -> dict[str, int]:
    """What is there, but for the lock and the caches that any call may leave in a run."""
    files = {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in folder.rglob("*") if not p.is_dir()}
    return {name: time for name, time in files.items() if not name.endswith(".lock")}


def spoiled(rng: random.Random, words: list[str], odd: list[str]) -> list[str]:
    """The call with one or two words replaced, left out, doubled or added."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(1, len(words))
        match rng.randrange(6):
            case 0:
                del words[place]
            case 1:
                words.insert(place, rng.choice(WORDS))
            case _:
                words[place] = rng.choice(rng.choice((NUMBERS, WORDS, odd)))
        if len(words) < 2:
            words.append("x")
    return [word for word in words if "\0" not in word]


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("--calls", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calls (%(default)s)")
    args = parser.parse_args()
    rng, codes, faults = random.Random(args.seed), Counter[str](), []
    with tempfile.TemporaryDirectory() as tmp:
        template = Path(tmp) / "template"
        template.mkdir()
        odd = prepare(template)
        works = [call.split() for call in CALLS.values()]
        calls = [*works, *(spoiled(rng, rng.choice(works), odd) for _ in range(args.calls))]

        def run(number: int) -> tuple[str, str, list[Any]]:
            folder = Path(tmp) / f"call{number}"
            shutil.copytree(template, folder, symlinks=True, copy_function=_copy)
            before = listing(folder)
            try:
                code, err = outcome(folder, calls[number])
            except OSError:  # the system itself refuses the words, as one that is too long
                return "", "", []
            left = sorted(set(listing(folder).items()) ^ set(before.items())) if code == "2" else []
            subprocess.run(["rm", "-rf", folder], check=True)  # a call may make folders that are too deep for Python
            return code, err, left

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for words, (code, err, left) in zip(calls, pool.map(run, range(len(calls))), strict=True):
                if words in works:  # without a fault they work
                    assert code == "0", (words, err)
                    continue
                codes[code] += bool(code)
                lines = [line for line in err.splitlines() if line.startswith("ddpm: ")]
                if "Traceback" in err or code not in ("", "0", "1", "2") or (code == "2" and len(lines) != 1) or left:
                    faults.append({"words": words, "code": code, "left": left[:5], "err": err[-600:]})
                    print(words, code, left[:3], err[-300:], flush=True)
    text = (
        f"{codes.total():,} bad calls over all commands, seed {args.seed}: {len(faults)} ended in a traceback, by a "
        "signal, in more than one line of error or after 120 s, or left something behind after exit code 2.\n\n"
    )
    text += figures.table(["exit code", "calls"], [[name, f"{n:,}"] for name, n in codes.most_common()])
    record.write("fuzz-commands", "Bad calls", args, {"codes": dict(codes), "faults": faults}, text)


def _copy(source: str, target: str) -> None:
    if Path(source).is_fifo():
        os.mkfifo(target)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


if __name__ == "__main__":
    main()
