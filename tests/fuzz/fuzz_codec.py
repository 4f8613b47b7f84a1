"""Fuzz the codec: read damaged files until the time is up.

    python tests/fuzz/fuzz_codec.py [MODEL] [--minutes 10]

The script changes files of pictures and archives at random: bits, bytes, pieces that are cut out, doubled or swapped
between files. Half of the files get correct checksums again, so that the parser itself is reached. Every file must give
the right picture, a picture that says it is incomplete, or one error. The script stops and writes fuzz-crash.bin after
a crash, a wrong picture that is called exact, or 120 s for one of these pictures of 8x8 to 20x20; it may use 4 GiB.
pytest does not collect this folder.
"""

import resource
import signal
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import figures
import record

from ddpm import codec
from ddpm.codec import archive, container
from ddpm.errors import InputError
from ddpm.run.compress import load_codec

CRASH = Path("fuzz-crash.bin")
WRONG = "WRONG"
"""The outcome that must not happen: other pixels than those that were compressed, called exact."""


def damaged(rng: np.random.Generator, data: bytes, others: list[bytes]) -> bytes:
    """The file after one to three random changes."""
    result = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(0, len(result) + 1))
        size = int(rng.integers(0, 1 + len(result) // 4))
        match rng.integers(0, 7):
            case 0 if result:
                result[start % len(result)] ^= 1 << int(rng.integers(0, 8))
            case 1:
                result[start : start + size] = rng.bytes(size)
            case 2:
                del result[start : start + size]
            case 3:
                result[start:start] = result[start : start + size]
            case 4:
                other = others[rng.integers(0, len(others))]
                result[start : start + size] = other[start : start + size]
            case 5:
                del result[start:]
            case 6:
                result += rng.bytes(int(rng.integers(1, 40)))
    return bytes(result)


def with_checksums(data: bytes) -> bytes:
    """The file with a correct check byte of its header, if a header can be read, and a correct last checksum."""
    read = container.read_contents if container.is_archive(data) else codec.read_header
    for end in range(10, min(len(data), 40)):
        trial = data[: end - 1] + bytes([zlib.crc32(data[: end - 1]) & 255]) + data[end:]
        try:
            if read(trial)[1] == end:
                data = trial
                break
        except InputError:
            continue
    return data[:-4] + zlib.crc32(data[:-4]).to_bytes(4, "big")


def valid_files(model: codec.Model, rng: np.random.Generator) -> tuple[list[bytes], set[bytes]]:
    """Files to damage, and the pixels of all pictures in them."""
    bits = min(model.tables)
    shapes = [(8, 8, 1), (20, 11, 1), (5, 9, 3)]
    small = [rng.integers(0, 256, (3, 3, shape[2]), np.uint8) for shape in shapes]
    images = [np.kron(x, np.ones((7, 7, 1), np.uint8))[: s[0], : s[1]] for x, s in zip(small, shapes, strict=True)]
    files = [codec.compress(model, x, bits=bits, local=local) for x in images for local in (False, True)]
    files += [codec.compress(model, x, bits=bits, psnr=18.0) for x in images]
    c, h, w = model.shape
    noise = list(rng.integers(0, 256, (3, h, w, c), np.uint8))  # they fill an archive's stack with random bits
    files += [archive.compress(model, [*noise, *images], bits=bits, local=local) for local in (False, True)]
    assert all(container.read_contents(data)[0].files < len(noise) + len(images) for data in files[-2:])
    return files, {x.tobytes() for x in [*noise, *images]}


def outcome(model: codec.Model, data: bytes, known: set[bytes]) -> str:
    """Read one damaged file and say in words what came of it."""
    try:
        if container.is_archive(data):
            right = all(x.tobytes() in known for _, x in archive.decompress(model, data))
            return "an archive that is right" if right else WRONG
        *_, last = codec.pictures(model, data)
        if not last.exact:
            return "a picture not called exact"
        return "exact and right" if last.image.tobytes() in known else WRONG
    except InputError:
        return "refused"
    except BaseException:
        CRASH.write_bytes(data)
        raise


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("model", nargs="?", default="digits", help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage (%(default)s)")
    args = parser.parse_args()
    model, rng = load_codec(args.model), np.random.default_rng(args.seed)
    files, known = valid_files(model, rng)
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
    count: Counter[str] = Counter()
    longest, end = 0.0, time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        data = damaged(rng, files[rng.integers(0, len(files))], files)
        if rng.random() < 0.5 and len(data) > 14:
            data = with_checksums(data)
        if data in files:
            continue
        signal.alarm(120)
        start = time.monotonic()
        result = outcome(model, data, known)
        signal.alarm(0)
        longest = max(longest, time.monotonic() - start)
        count[result] += 1
        if result == WRONG:
            CRASH.write_bytes(data)
            sys.exit(f"a wrong picture was called exact: {CRASH}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = (
        f"{count.total():,} damaged files in {args.minutes:g} minutes, seed {args.seed}, model "
        f"{Path(args.model).name}: no crash, no hang (the longest {longest:.1f} s), no wrong picture called exact; "
        f"peak memory {peak:.0f} MiB.\n\n"
    )
    text += figures.table(["", "files"], [[name, f"{n:,}"] for name, n in count.most_common()])
    record.write("fuzz-codec", "Damaged files", args, {"outcomes": dict(count)}, text)


if __name__ == "__main__":
    main()
