"""Measure how the data path scales: the time and memory to the first batch, and the rate of the loader.

    python benchmarks/data_scale.py [--folder N] [--tar N] [--parquet N] [--loader N] [--work DIR]

Each source of N small images is made once, in --work. A process of its own loads it with an empty cache, and another
one with the index that the first one left; both stream (`cache_bytes` 0) with two workers, and stop at the first batch.
--loader is the number of JPEGs of 256x256: one core decodes them in a plain loop, and then the loader alone yields
batches of 32. Memory is the sum of the proportional set sizes (PSS) of all processes, seen every 50 ms at most. 0
leaves a source out.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import figures
import numpy as np
import record
from PIL import Image

MIB = 2**20


# -- the images --------------------------------------------------------------------------------------------------------


def png(i: int) -> bytes:
    """A PNG of 8x8 that tells i."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels.reshape(-1)[:8] = np.frombuffer(np.int64(i).tobytes(), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=1)
    return file.getvalue()


def make_folder(to: Path, n: int) -> None:
    """n files in 100 folders, which are classes."""
    for i in range(n):
        place = to / f"class{i % 100}"
        if i < 100:
            place.mkdir(parents=True)
        (place / f"IMG_{i:08d}.png").write_bytes(png(i))


def make_tar(to: Path, n: int) -> None:
    """A WebDataset: n images, each with its .cls, in shards of 10,000."""
    to.mkdir(parents=True)
    for start in range(0, n, 10_000):
        with tarfile.open(to / f"shard-{start // 10_000:05d}.tar", "w") as archive:
            for i in range(start, min(start + 10_000, n)):
                for name, data in ((f"{i:08d}.cls", str(i % 100).encode()), (f"{i:08d}.png", png(i))):
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    archive.addfile(about, io.BytesIO(data))


def make_parquet(to: Path, n: int) -> None:
    """n rows with an image and a label, in files of 500,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    to.mkdir(parents=True)
    images = [png(i) for i in range(min(n, 100_000))]  # the same ones in turn
    for start in range(0, n, 500_000):
        rows = range(start, min(start + 500_000, n))
        cells = [{"bytes": images[i % len(images)], "path": None} for i in rows]
        table = pa.table({"image": cells, "label": [i % 100 for i in rows]})
        pq.write_table(table, to / f"train-{start // 500_000:05d}.parquet", row_group_size=10_000)


def make_loader(to: Path, n: int) -> None:
    """n JPEGs of 256x256, quality 90, of smooth random pictures with some noise."""
    to.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = np.clip(pixels + rng.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(to / f"{i}.jpg", quality=90)


MAKE = {"folder": make_folder, "tar": make_tar, "parquet": make_parquet, "loader": make_loader}


def made(work: Path, kind: str, n: int) -> Path:
    """The folder of a source, which is made if it is not there."""
    to = work / f"{kind}-{n}"
    if not to.exists():
        part = work / f"{kind}-{n}.part"
        MAKE[kind](part, n)
        part.rename(to)
    return to


# -- what is measured --------------------------------------------------------------------------------------------------


def pss(process: int) -> int:
    """The proportional set sizes of a process and of all processes that it started, in bytes."""
    total, children = 0, f"/proc/{process}/task/{process}/children"
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        total = 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        total += sum(pss(int(child)) for child in Path(children).read_text().split())
    except (OSError, StopIteration):  # it has ended
        pass
    return total


class Watch:
    """The most memory that this process and its children have had since."""

    def __init__(self) -> None:
        self.most, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            self.most = max(self.most, pss(os.getpid()))

    def stop(self) -> int:
        self.most = max(self.most, pss(os.getpid()))
        self._ended.set()
        self._thread.join()
        return self.most


def start(source: str) -> dict[str, Any]:
    """Seconds and memory from a source to its first batch."""
    from ddpm.files import data

    before, begun, watch = pss(os.getpid()), time.monotonic(), Watch()
    train, _ = data.load_pair(source, (8, 8), 3, cache_bytes=0)
    loaded = time.monotonic() - begun
    printed = train.fingerprint
    stream = data.batches(train, 0, 64, 0, 10, workers=2)
    next(stream)
    seconds = time.monotonic() - begun
    stream.close()
    memory = watch.stop() - before
    return {"seconds": seconds, "load_seconds": loaded, "bytes": memory, "images": len(train), "print": printed}


def cpu_seconds() -> float:
    """The CPU time of this process and of the processes that it started and that still run."""
    ticks, total = os.sysconf("SC_CLK_TCK"), time.process_time()
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def rate(work: Any, seconds: float) -> tuple[float, float]:
    """Images/s, and CPU milliseconds an image, of calls of `work`, which returns its number of images."""
    begun, cpu, count = time.monotonic(), cpu_seconds(), 0
    while time.monotonic() - begun < seconds:
        count += work(count)
    return count / (time.monotonic() - begun), 1000 * (cpu_seconds() - cpu) / count


def decoding(files: list[bytes], seconds: float) -> tuple[float, float]:
    """The `rate` of a plain loop that decodes these files."""
    from ddpm.files import images as pictures

    def decode(k: int) -> int:
        pictures.fit(pictures.read(files[k % len(files)]), (256, 256), 3)
        return 1

    return rate(decode, seconds)


def loader(source: str, seconds: float) -> dict[str, float]:
    """Images/s, and CPU milliseconds an image, of one process without workers, and of as many workers as cores.

    Decoding alone and the loaders take turns of a second, since the speed of a rented core drifts.
    """
    from concurrent.futures import ProcessPoolExecutor

    from ddpm.files import data

    cores = os.cpu_count() or 1
    images = data.load(source, (256, 256), 3, cache_bytes=0)
    files = [Path(images.decoder.encoded.name(i)).read_bytes() for i in range(min(len(images), 256))]
    streams = {"alone": data.batches(images, 0, 32, 0, 10**9, workers=0)}
    before = pss(os.getpid())
    streams["workers"] = data.batches(images, 0, 32, 0, 10**9, workers=cores)
    found: dict[str, list[tuple[float, float]]] = {}
    with ProcessPoolExecutor(cores) as pool:
        list(pool.map(decoding, [files] * cores, [0.1] * cores))  # starts the processes
        for _ in range(max(1, round(seconds))):
            time.sleep(0.5)  # until the workers have made their batches ahead
            found.setdefault("decode", []).append(decoding(files, 1))
            together = list(pool.map(decoding, [files] * cores, [1] * cores))
            found.setdefault("together", []).append((sum(r for r, _ in together), sum(c for _, c in together) / cores))
            for name, stream in streams.items():
                for _ in range(16):  # what the workers made ahead
                    next(stream)
                found.setdefault(name, []).append(rate(lambda _, stream=stream: len(next(stream)), 1))
    values = {name: statistics.mean(r for r, _ in each) for name, each in found.items()}
    values |= {f"{name}_cpu": statistics.mean(c for _, c in each) for name, each in found.items()}
    watch = Watch()  # only now, since looking at memory takes time
    for _ in range(16):
        next(streams["workers"])
    values["workers_bytes"] = watch.stop() - before
    for stream in streams.values():
        stream.close()
    memory = data.load(source, (256, 256), 3, cache_bytes=1 << 40)
    for name, fed in (("fed_streamed", images), ("fed_memory", memory)):
        values[name] = fed_rate(fed, 32 / values["workers"], seconds)
    return values


def fed_rate(images: Any, step_seconds: float, seconds: float) -> float:
    """Images/s of a loop that waits `step_seconds` after each batch, as for a network on another device."""
    from ddpm.files import data

    stream = data.batches(images, 0, 32, 0, 10**9, workers=os.cpu_count() or 1)
    for _ in range(16):
        next(stream)
    begun, count = time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        count += len(next(stream))
        time.sleep(step_seconds)
    rate = count / (time.monotonic() - begun)
    stream.close()
    return rate


def child(arguments: dict[str, Any]) -> None:
    what = loader if arguments.pop("loader", False) else start
    print(json.dumps(what(**arguments)))


def measure(cache: Path, **arguments: Any) -> dict[str, Any]:
    """`child` in a process of its own, with this cache."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    command = [sys.executable, str(Path(__file__)), "--child", json.dumps(arguments)]
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    if out.returncode:
        raise SystemExit(out.stderr)
    result: dict[str, Any] = json.loads(out.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=5)
    for kind, n in {"folder": 200_000, "tar": 100_000, "parquet": 5_000_000, "loader": 1000}.items():
        parser.add_argument(f"--{kind}", type=int, default=n, help="images (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "ddpm-scale", help="folder of data")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child)
        return
    work = args.work
    work.mkdir(parents=True, exist_ok=True)
    del args.work  # a record does not name folders of this machine
    values: dict[str, Any] = {"load": os.getloadavg()[0]}
    rows = []
    for kind in ("folder", "tar", "parquet"):
        if n := getattr(args, kind):
            source = str(made(work, kind, n))
            with tempfile.TemporaryDirectory(dir=work) as cache:
                for when in ("first", "second"):
                    found = values[f"{kind}, {when}"] = measure(Path(cache), source=source)
                    row = [kind, f"{n:,}", when, f"{found['seconds']:.1f}", f"{found['bytes'] / MIB:.0f}"]
                    rows.append(row)
                    print(" | ".join(row), file=sys.stderr, flush=True)
    text = f"Load average at the start: {values['load']:.1f} on {os.cpu_count()} cores.\n\n"
    text += "## To the first batch, streamed\n\n"
    text += figures.table(["source", "images", "start", "s", "MiB (PSS), beyond imports"], rows) + "\n" if rows else ""
    if args.loader:
        source = str(made(work, "loader", args.loader))
        repeats = [
            measure(work / "cache", source=source, seconds=args.seconds, loader=True) for _ in range(args.repeats)
        ]
        values["loader"] = repeats
        cores = os.cpu_count() or 1
        names = {
            "decode": "decoding alone, one core",
            "together": f"decoding alone, {cores} processes",
            "alone": "the loader, no workers",
            "workers": f"the loader, {cores} workers",
        }
        table = [
            (title, *(figures.spread(each[key + part] for each in repeats) for part in ("", "_cpu")))
            for key, title in names.items()
        ]
        shares = [
            (
                f"rate, share of {cores} x the loader without workers",
                [each["workers"] / each["alone"] / cores for each in repeats],
            ),
            (
                f"rate, share of {cores} x decoding alone",
                [each["workers"] / each["decode"] / cores for each in repeats],
            ),
            (
                f"rate, share of decoding alone in {cores} processes",
                [each["workers"] / each["together"] for each in repeats],
            ),
            (
                "a network as fast as the loader, fed by it / from memory",
                [each["fed_streamed"] / each["fed_memory"] for each in repeats],
            ),
            ("CPU time, loader without workers / with", [each["alone_cpu"] / each["workers_cpu"] for each in repeats]),
            ("memory with workers, MiB (PSS), beyond the start", [each["workers_bytes"] / MIB for each in repeats]),
        ]
        text += f"## The loader alone, JPEGs of 256x256, batches of 32, {cores} cores\n\n"
        text += figures.table(["", "images/s", "CPU ms an image"], table) + "\n"
        text += figures.table(["", ""], [(title, figures.spread(values)) for title, values in shares])
    record.write("data-scale", "The data path at scale", args, values, text, repeated=False)


if __name__ == "__main__":
    main()
