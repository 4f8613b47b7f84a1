"""The compilation caches of benchmarks/gpu.py as archives, so that the next call compiles less.

An archive holds what Triton compiled and which settings Inductor chose. Inductor's cache of graphs is left out: it
consists of pickles, and this project loads no pickle that it was given. Triton's files name their folder; an archive
has FOLDER in place of that name, so it can be unpacked anywhere.
"""

import io
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

NAME = "gpu-cache-{}.tar.gz"
MOST = 16 * 2**20
"""Bytes of an archive: each is smaller."""
FOLDER = b"@ddpm-gpu-caches@"


def kept(name: str) -> bool:
    """Whether a file of this name belongs into an archive.

    >>> [kept(n) for n in ("triton/ab/kernel.cubin", "inductor/ab/x.best_config", "inductor/fxgraph/ab/graph")]
    [True, True, False]
    """
    path = PurePosixPath(name)
    return path.parts[0] == "triton" or path.suffix == ".best_config"


def environment(folder: Path) -> dict[str, str]:
    """The variables by which PyTorch and Triton keep their caches in `folder`."""
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


def _files(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and kept(name):
            yield name


def _content(folder: Path, name: str) -> bytes:
    content = (folder / name).read_bytes()
    return content.replace(str(folder).encode(), FOLDER) if name.endswith(".json") else content


def pack(
    folder: Path, out: Path, most: int = MOST, archives: int = 5, until: float = float("inf")
) -> tuple[dict[str, int], list[str]]:
    """Write archives of less than `most` bytes each into `out`: their sizes, and why files were left out.

    Each file goes into the first archive that has room for it. `until` is a moment of time.monotonic: files that are
    not measured by then are left out. To write the archives takes about as long again as to measure the files.
    """
    parts: list[tuple[int, list[str]]] = []
    large = surplus = late = 0
    for name in _files(folder):
        if time.monotonic() > until:
            late += 1
            continue
        size = len(zlib.compress(_content(folder, name), 1)) + 600  # and its header
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
        if new.stat().st_size >= most:  # which the sizes of the single files exclude
            new.unlink()
            large += len(names)
            continue
        new.replace(file)
        sizes[file.name] = file.stat().st_size
    for file in out.glob(NAME.format("*")):
        if sizes and file.name not in sizes:
            file.unlink()  # of an earlier call that had more
    why = {"too large for an archive": large, "archives were full": surplus, "time was up": late}
    return sizes, [f"{count} files left out: {reason}" for reason, count in why.items() if count]


def unpack(source: Path, folder: Path) -> tuple[list[str], list[str]]:
    """Unpack the archives of `source` into `folder`: the names of those taken, and why others were not."""
    taken, problems = [], []
    for file in sorted(source.glob(NAME.format("*"))):
        try:
            with tarfile.open(file) as archive:
                members = [member for member in archive.getmembers() if member.isfile() and kept(member.name)]
                archive.extractall(folder, members, filter="data")
            taken.append(file.name)
        except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
            problems.append(f"{file.name} was not taken: {type(error).__name__}: {error}")
    for path in folder.rglob("*.json"):
        content = path.read_bytes()
        if FOLDER in content:
            path.write_bytes(content.replace(FOLDER, str(folder).encode()))
    return taken, problems
