"""Pack the compilation caches of benchmarks/gpu.py into archives, so that the next call compiles less.

An archive holds the kernels that Triton compiled and the settings that Inductor chose. It leaves out Inductor's cache
of graphs, which consists of pickles: this project loads no pickle that it was given. Triton's files contain the name of
their folder. An archive has FOLDER in place of that name, so it can be unpacked anywhere.
"""

import io
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

NAME = "gpu-cache-{}.tar.gz"
MOST = 16 * 2**20
"""Upper limit for the bytes of an archive."""
FOLDER = b"@ddpm-gpu-caches@"


def packable(name: str) -> bool:
    """Whether a file of this name belongs into an archive.

    >>> [packable(n) for n in ("triton/ab/kernel.cubin", "inductor/ab/x.best_config", "inductor/fxgraph/ab/graph")]
    [True, True, False]
    """
    path = PurePosixPath(name)
    return path.parts[0] == "triton" or path.suffix == ".best_config"


def environment(folder: Path) -> dict[str, str]:
    """Environment variables that make PyTorch and Triton keep their caches in `folder`."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and packable(name):
            yield name


def _content(folder: Path, name: str) -> bytes:
    content = (folder / name).read_bytes()
    return content.replace(str(folder).encode(), FOLDER) if name.endswith(".json") else content


def pack(
    folder: Path, out: Path, most: int = MOST, archives: int = 5, until: float = float("inf")
) -> tuple[dict[str, int], list[str]]:
    """Write archives of less than `most` bytes each into `out`. Returns their sizes, and why files were left out.

    Each file goes into the first archive that has room for it. `until` is a time of time.monotonic(): a file whose size
    is not known by then is left out. Writing the archives takes about as long again as finding the sizes.
    """
    parts: list[tuple[int, list[str]]] = []
    large = surplus = late = 0
    for name in _files(folder):
        if time.monotonic() > until:
            late += 1
            continue
        size = len(zlib.compress(_content(folder, name), 1)) + 600  # 600 for the header
        if size > 0.95 * most:
            large += 1
            continue
        place = next((i for i, (used, _) in enumerate(parts) if used + size <= 0.95 * most), len(parts))
        if place == archives:
            surplus += 1
            continue
        if place == len(parts):
            parts.append((0, []))
        parts[place] = (parts[place][0] + size, [*parts[place][1], name])
    sizes = {}
    for i, (_, names) in enumerate(parts, 1):
        file, new = out / NAME.format(i), out / f".{NAME.format(i)}"
        with tarfile.open(new, "w:gz", compresslevel=1) as archive:
            for name in names:
                content = _content(folder, name)
                about = tarfile.TarInfo(name)
                about.size = len(content)
                archive.addfile(about, io.BytesIO(content))
        if new.stat().st_size >= most:  # not expected, since the sizes of the files add up to less
            new.unlink()
            large += len(names)
            continue
        new.replace(file)
        sizes[file.name] = file.stat().st_size
    for file in out.glob(NAME.format("*")):
        if sizes and file.name not in sizes:
            file.unlink()  # left by an earlier call that wrote more archives
    why = {"too large for an archive": large, "archives were full": surplus, "time was up": late}
    return sizes, [f"{count} files left out: {reason}" for reason, count in why.items() if count]


def unpack(source: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Unpack the archives of `source` into `folder`. Returns the names of good archives, and the faults of others."""
    unpacked, problems = [], []
    for file in sorted(source.glob(NAME.format("*"))):
        try:
            with tarfile.open(file) as archive:
                members = [member for member in archive.getmembers() if member.isfile() and packable(member.name)]
                archive.extractall(folder, members, filter="data")
            unpacked.append(file.name)
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
            problems.append(f"{file.name} was not unpacked: {type(error).__name__}: {error}")
    for path in folder.rglob("*.json"):
        content = path.read_bytes()
        if FOLDER in content:
            path.write_bytes(content.replace(FOLDER, str(folder).encode()))
    return unpacked, problems
