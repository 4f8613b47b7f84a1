"""Damaged files against `decompress`: whatever the bytes, a picture that is right, a prefix that says so, or one error.

    python benchmarks/fuzz_codec.py [MODEL] [--minutes 10]

Files of pictures and archives are changed at random (bits, bytes, pieces cut out, doubled, swapped between files, new
checksums over changed payloads so that the parser itself is reached) and read. A crash, a wrong picture called exact,
more than 2 GiB or more than 60 s for one of these 8x8 to 20x20 pictures ends it with the bytes in a file.
"""

import resource
import signal
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import record

from ddpm import codec
from ddpm.codec import archive, container
from ddpm.errors import InputError
from ddpm.run.compress import load_codec


def changed(rng: np.random.Generator, data: bytes, others: list[bytes]) -> bytes:
    """Some bytes less or more or other."""
    found = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, len(found) + 1))
        size = int(rng.integers(0, 1 + len(found) // 4))
        match rng.integers(0, 7):
            case 0 if found:
                found[at % len(found)] ^= 1 << int(rng.integers(0, 8))
            case 1:
                found[at : at + size] = rng.bytes(size)
            case 2:
                del found[at : at + size]
            case 3:
                found[at:at] = found[at : at + size]
            case 4:
                other = others[rng.integers(0, len(others))]
                found[at : at + size] = other[at : at + size]
            case 5:
                del found[at:]
            case 6:
                found += rng.bytes(int(rng.integers(1, 40)))
    return bytes(found)


def mended(data: bytes) -> bytes:
    """With the header's check byte and the last checksum right again, where there is a header at all."""
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


def main() -> None:
    parser = record.parser(__doc__, repeats=1, seconds=0)
    parser.add_argument("model", nargs="?", default="digits")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_codec(args.model)
    rng = np.random.default_rng(args.seed)
    bits = min(model.tables)
    shapes = [(8, 8, 1), (20, 11, 1), (5, 9, 3)]
    small = [rng.integers(0, 256, (3, 3, shape[2]), np.uint8) for shape in shapes]
    images = [np.kron(x, np.ones((7, 7, 1), np.uint8))[: s[0], : s[1]] for x, s in zip(small, shapes, strict=True)]
    files = [codec.compress(model, x, bits=bits, local=local) for x in images for local in (False, True)]
    files += [codec.compress(model, x, bits=bits, psnr=18.0) for x in images]
    c, h, w = model.shape
    noise = list(rng.integers(0, 256, (3, h, w, c), np.uint8))  # for the stack, so that the others are not files
    files += [archive.compress(model, [*noise, *images], bits=bits, local=local) for local in (False, True)]
    assert all(container.read_contents(data)[0].files < len(noise) + len(images) for data in files[-2:])
    known = {x.tobytes() for x in [*noise, *images]}
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
    count: Counter[str] = Counter()
    longest, end = 0.0, time.monotonic() + 60 * args.minutes
    while time.monotonic() < end:
        whole = files[rng.integers(0, len(files))]
        data = changed(rng, whole, files)
        if rng.random() < 0.5 and len(data) > 14:
            data = mended(data)
        if data in files:
            continue
        signal.alarm(120)
        start = time.monotonic()
        try:
            if container.is_archive(data):
                right = all(x.tobytes() in known for _, x in archive.decompress(model, data))
                outcome = "an archive that is right" if right else "WRONG"
            else:
                *_, last = codec.pictures(model, data)
                same = last.image.tobytes() in known
                outcome = "a picture not called exact" if not last.exact else "exact and right" if same else "WRONG"
        except InputError:
            outcome = "refused"
        except BaseException:
            Path("fuzz-crash.bin").write_bytes(data)
            raise
        signal.alarm(0)
        longest = max(longest, time.monotonic() - start)
        count[outcome] += 1
        if outcome == "WRONG":
            Path("fuzz-crash.bin").write_bytes(data)
            sys.exit("a wrong picture was called exact: fuzz-crash.bin")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    rows = [[name, f"{n:,}"] for name, n in count.most_common()]
    of = f"in {args.minutes:g} minutes, seed {args.seed}, model {Path(args.model).name}"
    text = (
        f"{count.total():,} damaged files {of}: no crash, no hang (the longest {longest:.1f} s), no wrong picture "
        f"called exact; peak memory {peak:.0f} MiB.\n\n"
    )
    record.write(
        "fuzz-codec", "Damaged files", args, {"outcomes": dict(count)}, text + record.table(["", "files"], rows)
    )


if __name__ == "__main__":
    main()
