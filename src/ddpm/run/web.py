"""A folder with a model in a page: any static web server serves it, and the model runs in the visitor's browser."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ddpm.errors import InputError
from ddpm.files import atomic
from ddpm.files.interop import onnx
from ddpm.files.interop.diffusers import check_out
from ddpm.files.models import Checkpoint, without_condition
from ddpm.pixels import EIGHT_BIT
from ddpm.run.sample import GUIDANCE

PAGE = Path(__file__).parents[1] / "web"
"""The files of the page: one HTML file, its style, and JavaScript modules."""
VERSION = "1.30.0"
"""The version of onnxruntime-web, which computes the network in the browser."""
PACKAGE = f"onnxruntime-web@{VERSION}"
WANT = f"want a folder with {PACKAGE}, which `npm pack {PACKAGE}` fetches, unpacked"
"""What an error says about a runtime that is not there."""
PACKED = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
"""SHA-512 of the package that `npm pack` fetches."""
RUNTIME = {
    "ort.wasm.bundle.min.mjs": (
        "d4a705f0258065eaad4dcbcb80a3ed38c5c86e459e87ef8b0c24290e14390115"
        "711c02f554d2f9aebd0e23e3314db98d200365744fc0feaf8ee2048a81232359"
    ),
    "ort-wasm-simd-threaded.wasm": (
        "1adeded62203219fcf5c484cfce5657aa5875689b490423f86cf1ca1dd1cad77"
        "15f630c6337f41db71ee42794e3a00ce0b7c78939a71220b5d83368bf6ea7730"
    ),
}
"""The files of onnxruntime-web that the page needs -> their SHA-512. They compute on the CPU, here with one thread."""


def to_web(checkpoint: Checkpoint, folder: Path, runtime: Path | None = None) -> int:
    """Write a folder with the model, the page and what runs it, completely or not at all. Returns its bytes.

    runtime  an unpacked onnxruntime-web of VERSION; None: fetch it with npm

    Raises InputError as `check` does, for a runtime that cannot be found or is not the expected one, and as
    `interop.onnx.graph` does.
    """
    check(checkpoint, folder)
    ort = read_runtime(runtime)
    graph, settings = onnx.graph(checkpoint)
    settings["guidance"] = GUIDANCE if checkpoint.preset.label_dropout > 0 else 1.0
    with atomic.temporary_folder(folder.absolute()) as part:
        atomic.write(part / "model.onnx", graph)
        atomic.write_json(part / "model.json", settings)
        for name, content in ort.items():
            atomic.write(part / "ort" / name, content)
        for file in PAGE.iterdir():
            atomic.write(part / file.name, file.read_bytes())
        return sum(file.stat().st_size for file in part.rglob("*") if file.is_file())


def check(checkpoint: Checkpoint, folder: Path) -> None:
    """Raise InputError if `to_web` could not write this model to this folder. Call this before the work.

    The page shows grey and RGB images of 8 bits. It clips x0^ to [-1, 1] or not at all, and knows no calibrated
    variance.
    """
    check_out(folder)
    without_condition(checkpoint, "the web page")
    onnx.check_packages()
    denoiser, preset = checkpoint.denoiser, checkpoint.preset
    if preset.channels not in (1, 3) or denoiser.values != EIGHT_BIT:
        raise InputError(f"{preset.kind} images: a web page shows grey and RGB images of 8 bits; want --to onnx")
    if preset.loss == "consistency":
        raise InputError("loss consistency: the web page has no sampler for it; want --to onnx")
    if not isinstance(denoiser.clip, bool):
        raise InputError(f"clip {denoiser.clip}: the web page does not have it; want static or none")
    if not isinstance(denoiser.variance, str):
        raise InputError("variance calibrated: the web page does not have it; want the model's own")


def read_runtime(folder: Path | None) -> dict[str, bytes]:
    """The files of RUNTIME: name -> content, from an unpacked onnxruntime-web, or for None from npm's registry.

    Raises InputError if they cannot be found, or if they are not those of VERSION.
    """
    if folder is None:
        return checked(_packed(), "npm pack")
    places = [place / name for place in (folder / "package" / "dist", folder / "dist", folder) for name in RUNTIME]
    found = {place.name: place.read_bytes() for place in reversed(places) if place.is_file()}
    return checked(found, f"runtime {folder}")


def checked(files: Mapping[str, bytes], source: str) -> dict[str, bytes]:
    """The files of RUNTIME among `files`. Raises InputError if one is missing or has another SHA-512."""
    for name, digest in RUNTIME.items():
        if name not in files:
            raise InputError(f"{source}: {name} is not there; {WANT}")
        if hashlib.sha512(files[name]).hexdigest() != digest:
            raise InputError(f"{source}: {name} is not that of version {VERSION}, since its SHA-512 differs; {WANT}")
    return {name: files[name] for name in RUNTIME}


def _packed() -> dict[str, bytes]:
    """The files of RUNTIME from the package that npm fetches."""
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"runtime: npm is not installed, which would fetch it; {WANT}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = [npm, "pack", PACKAGE, "--fetch-retries=0"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.SubprocessError) as error:
            lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
            reason = lines[0] if lines else "it says no reason"
            raise InputError(f"runtime: npm cannot fetch {PACKAGE} ({reason}); {WANT}") from error
        archive = next(Path(folder).glob("*.tgz"))
        if hashlib.sha512(archive.read_bytes()).hexdigest() != PACKED:
            raise InputError(f"npm pack: {archive.name} is not the expected one, since its SHA-512 differs; {WANT}")
        with tarfile.open(archive) as tar:
            members = {name: tar.extractfile(f"package/dist/{name}") for name in RUNTIME}
            return {name: member.read() for name, member in members.items() if member is not None}
