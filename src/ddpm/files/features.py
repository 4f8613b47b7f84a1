"""Feature networks from files, and features and their statistics on disk.

A feature network is the Inception network of 2015, whose weights are downloaded and checked here, or a function of the
user. `measure` runs it over images. `save_statistics` writes the statistics of real images and their provenance.
"""

import http.client
import json
import os
import shutil
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm.errors import InputError, brief, parse_json
from ddpm.files import atomic, functions
from ddpm.files.images import channels_last, check_unpacked
from ddpm.files.tensors import as_state_dict, file_sha256, read_tensors, read_torch
from ddpm.inception import SIDE, Inception
from ddpm.metrics import Moments, moments, softmax
from ddpm.unet import exact_convolutions
from ddpm.version import __version__

Floats: TypeAlias = NDArray[np.float64]

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
"""The name of the published weights in pytorch-fid. torch-fidelity publishes the same file under another name."""

SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

URLS = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS}",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)

_PARTS = {
    "blocks.0": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    "blocks.1": ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    "blocks.2": tuple(f"Mixed_{block}" for block in "5b 5c 5d 6a 6b 6c 6d 6e".split()),
    "blocks.3": ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}
"""Names of parts in pytorch-fid's module -> those in its published file. The module has no classifier."""


@dataclass(frozen=True)
class Network:
    """A feature network: images [N, C, H, W] -> features float64 [N, D], probabilities float64 [N, K] or None.

    name        goes into the provenance of statistics, as do the next two
    weights     SHA-256 of the file of the weights or of the user's function
    resize      how the network resizes images
    batch_size  a good number of images per call
    function    pixels -> (features, probabilities or None)
    """

    name: str
    weights: str
    resize: str
    batch_size: int
    function: Callable[[Tensor], tuple[Any, Any]]

    def __call__(self, pixels: Tensor) -> tuple[Floats, Floats | None]:
        """Raises TypeError for what is no pixels [N, C, H, W], and InputError for features not finite or not [N, D]."""
        if pixels.dtype not in (torch.uint8, torch.uint16, torch.float32) or pixels.ndim != 4:
            raise TypeError(f"want pixels [N, C, H, W], got {pixels.dtype} {list(pixels.shape)}")
        features, probabilities = self.function(pixels)
        features = _checked(f"{self.name}: features", features, len(pixels))
        if probabilities is None:
            return features, None
        return features, _checked(f"{self.name}: probabilities", probabilities, len(pixels))


def _checked(what: str, array: Any, n: int | None) -> Floats:
    """The array as float64 [n, D], D > 0; n None: any. Raises InputError if it has another shape or is not finite."""
    try:
        rows = np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError) as fault:
        raise InputError(f"{what}: not an array of numbers ({brief(fault)}), want [N, D]") from fault
    if rows.ndim != 2 or rows.shape[1] == 0 or n not in (None, len(rows)):
        raise InputError(f"{what}: shape {list(rows.shape)}, want [{'N' if n is None else n}, D]")
    if not np.isfinite(rows).all():
        raise InputError(f"{what}: nan or inf in row {int(np.argmin(np.isfinite(rows).all(1)))}, want finite numbers")
    return rows


# -- Inception ---------------------------------------------------------------------------------------------------------


def cache() -> Path:
    """The folder of downloaded weights: $XDG_CACHE_HOME/ddpm, by default ~/.cache/ddpm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm"


def inception(
    path: str | Path | None = None,
    *,
    any_weights: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Network:
    """The Inception network of 2015: 2048 features, and probabilities of 1008 classes (from logits without bias).

    path         the weights, under the names of the published file, or under those of pytorch-fid's module, which has
                 no classifier and so gives no probabilities. None: the file in `cache()`, downloaded if it is not there
                 (90 MB)
    any_weights  accept another file than the published one; the score is then not FID
    progress     show a bar during the download

    It computes in float32, without TensorFloat-32 and autocast. Grey images become RGB of three equal channels. Raises
    InputError for a file that is missing, damaged or not the published one, and if the download fails; the message then
    says which file to get and where to put it.

    >>> inception("weights.pth")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: weights.pth: no such file; want Inception's weights, pt_inception-2015-12-05-6726825d.pth
    """
    file = _cached(progress) if path is None else Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file; want Inception's weights, {WEIGHTS}")
    digest = file_sha256(file)
    if digest != SHA256 and not any_weights:
        raise InputError(
            f"{file}: its SHA-256 is {digest}, want {SHA256} of {WEIGHTS}; the setting any_weights allows it"
        )
    network, classifies = _read(file)
    network.to(device)

    def run(pixels: Tensor) -> tuple[Any, Any]:
        if pixels.shape[1] not in (1, 3) or pixels.dtype != torch.uint8:
            kind = str(pixels.dtype).removeprefix("torch.")
            raise InputError(f"images {kind} of {pixels.shape[1]} channels: Inception wants uint8 of 1 or 3")
        with _exact(torch.device(device)):
            features, logits = network(pixels.to(device).expand(-1, 3, -1, -1))
        return features.cpu().numpy(), softmax(logits.cpu().numpy()) if classifies else None

    return Network("inception-2015-12-05", digest, f"TensorFlow 1 bilinear to {SIDE}x{SIDE}", 64, run)


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Switch gradients, autocast and TensorFloat-32 off, whatever training has set."""
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, before)
            stack.enter_context(exact_convolutions())
        yield


def _read(file: Path) -> tuple[Inception, bool]:
    """The network with the file's weights, and whether they include the classifier.

    Raises InputError if a weight is missing, unknown or of another shape.
    """
    content = read_tensors(file) if file.suffix == ".safetensors" else read_torch(file)
    try:
        state = as_state_dict(content)
    except InputError as fault:
        raise InputError(f"{file}: {fault}") from None
    weights = {
        _published_name(name): value for name, value in state.items() if not name.endswith("num_batches_tracked")
    }
    numbered = any(name.startswith("blocks.") for name in state)
    with torch.device("meta"):  # without memory and random numbers
        network = Inception()
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith("num_batches_tracked")}
    wanted = {name: list(value.shape) for name, value in network.state_dict().items() if name not in counters}
    classifies = not numbered or any(name.startswith("fc.") for name in weights)
    if not classifies:
        weights |= {name: torch.zeros(shape) for name, shape in wanted.items() if name.startswith("fc.")}
    for names, what in ((wanted.keys() - weights.keys(), "lacks"), (weights.keys() - wanted.keys(), "has an unknown")):
        if names:
            more = f" and {len(names) - 1} more" * (len(names) > 1)
            raise InputError(f"{file}: {what} {min(names)}{more}; want the {len(wanted)} tensors of {WEIGHTS}")
    for name, shape in wanted.items():
        weight = weights[name]
        if list(weight.shape) != shape or not weight.is_floating_point():
            kind = f"{weight.dtype} {list(weight.shape)}".removeprefix("torch.")
            raise InputError(f"{file}: {name} is {kind}, want floats {shape}")
    network.load_state_dict({**{name: value.float() for name, value in weights.items()}, **counters}, assign=True)
    return network.eval().requires_grad_(False), classifies


def _published_name(name: str) -> str:
    """The name in the published file: `blocks.2.7.branch1x1...` becomes `Mixed_6e.branch1x1...`, other names stay."""
    words = name.split(".")
    parts = _PARTS.get(".".join(words[:2]), ())
    if len(words) > 3 and words[2].isdigit() and int(words[2]) < len(parts):
        return ".".join([parts[int(words[2])], *words[3:]])
    return name


def _cached(progress: bool) -> Path:
    """The file of weights in `cache()`, downloaded if it is not there. Raises InputError if no address has it."""
    file = cache() / WEIGHTS
    if file.is_file():
        return file
    reasons = []
    for url in URLS:
        try:
            _download(url, file, progress)
            return file
        except (OSError, http.client.HTTPException) as fault:
            reasons.append(brief(fault))
    why = "; ".join(dict.fromkeys(reasons))
    raise InputError(
        f"Inception's weights cannot be downloaded ({why}); want {URLS[0]} in {file.parent} or as --inception FILE, or "
        "other features by --features"
    )


def _download(url: str, file: Path, progress: bool) -> None:
    """Download the weights to `file`. Raises OSError or HTTPException if that fails or the SHA-256 is another."""
    from tqdm import tqdm

    # torch.hub.download_url_to_file has no timeout: a server that stalls would keep us from asking the other one
    with urllib.request.urlopen(url, timeout=20) as response, atomic.temporary(file) as part:
        size = int(response.headers.get("Content-Length") or 0) or None
        bar = tqdm.wrapattr(response, "read", total=size, desc="Inception's weights", disable=not progress)
        with bar as body, part.open("wb") as out:
            shutil.copyfileobj(body, out)
        if (digest := file_sha256(part)) != SHA256:
            raise OSError(f"the download has SHA-256 {digest}, want {SHA256}")


# -- any other network -------------------------------------------------------------------------------------------------


def custom(spec: str) -> Network:
    """The user's network, FILE.py:function.

    The function takes a NumPy array of images [N, H, W, C], uint8 or what the model makes, once per batch. It returns
    features [N, D], or the pair of features and class probabilities [N, K]. The file is run, so the user must trust it.
    Its SHA-256 names the network in the provenance, although the file may load weights from other files. Raises
    InputError if the file cannot be used, and also when the function is called, if the call fails.

    >>> custom("features.py")
    Traceback (most recent call last):
    ...
    ddpm.errors.InputError: features.py: want FILE.py:function
    """
    function = functions.load(spec)
    file, _, name = spec.rpartition(":")
    path = Path(file)

    def run(pixels: Tensor) -> tuple[Any, Any]:
        result = function(channels_last(pixels.cpu()))
        if isinstance(result, tuple):
            if len(result) != 2:
                raise InputError(f"{spec}: returned {len(result)} values, want features or (features, probabilities)")
            return result[0], result[1]
        return result, None

    return Network(f"{path.name}:{name}", file_sha256(path), "its own", 1000, run)


def read_features(path: str | Path) -> tuple[Floats, Floats | None]:
    """Features [N, D] from an .npz file, and class probabilities [N, K] if it has them, else None.

    They are the arrays `features` and `probabilities`. If there is no `features`, the first array is taken for the
    features. Raises InputError for a file that is missing, damaged, or of another kind.
    """
    arrays = read_arrays(Path(path))
    name = "features" if "features" in arrays else next(iter(arrays))
    features = _checked(f"{path}: {name}", arrays[name], None)
    if name == "features" and "probabilities" in arrays:
        return features, _checked(f"{path}: probabilities", arrays["probabilities"], len(features))
    return features, None


def read_arrays(path: Path, only: Collection[str] = ()) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz file, or of those only these names. Raises InputError if it is damaged or needs pickle."""
    with _npz(path) as file:
        arrays = {name: file[name] for name in file.files if not only or name in only}
    if not arrays and not only:
        raise InputError(f"{path}: no arrays in it")
    return arrays


def array_names(path: Path) -> list[str]:
    """The names of the arrays of an .npz file. Raises InputError as `read_arrays` does."""
    with _npz(path) as file:
        return list(file.files)


@contextmanager
def _npz(path: Path) -> Iterator[Any]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            check_unpacked(unpacked, path.stat().st_size, str(path))
        with np.load(path, allow_pickle=False) as file:
            yield file
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file, want an .npz") from None
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as fault:
        raise InputError(f"{path}: not a whole .npz of plain arrays ({brief(fault)})") from fault


# -- running a network over images -------------------------------------------------------------------------------------


class Batches(Protocol):
    """Images by index, such as `ddpm.files.data.Images`."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Tensor:
        """The images at these indices, uint8 [len(indices), C, H, W]."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The result of `measure`: the moments of all features, and features and probabilities if they were to be kept."""

    moments: Moments
    features: Floats | None
    probabilities: Floats | None


def measure(
    network: Network,
    images: Tensor | Batches,
    *,
    keep_features: bool = False,
    keep_probabilities: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
) -> Measured:
    """Run a feature network over images uint8 [N, C, H, W], a tensor or a dataset, in batches.

    keep_features       return the features, too: 8 N D bytes (800 MB for 50,000 images and Inception)
    keep_probabilities  return the probabilities, too: half as many bytes for Inception
    batch_size          None: that of the network
    progress            show a bar

    Without these, the memory is that of one covariance. Raises InputError for no images, for probabilities that the
    network does not have, and as the network does.

    >>> rows = Network("rows", "", "", 2, lambda x: (x.flatten(1).numpy(), None))
    >>> measure(rows, torch.arange(6, dtype=torch.uint8).view(3, 2, 1, 1), progress=False).moments.mean
    array([2., 3.])
    """
    from tqdm import tqdm

    n, step = len(images), batch_size or network.batch_size
    rows = _Rows(network, keep_features, keep_probabilities)
    with tqdm(total=n, desc="features", unit="image", disable=not progress) as bar:
        for start in range(0, n, step):
            batch = range(start, min(start + step, n))
            rows.add(images[batch.start : batch.stop] if isinstance(images, Tensor) else images.batch(batch), batch)
            bar.update(len(batch))
    return rows.measured()


def measure_each(
    network: Network,
    pictures: Iterable[Tensor],
    *,
    keep_features: bool = False,
    keep_probabilities: bool = False,
    progress: bool = True,
) -> Measured:
    """Run a feature network over pictures of any sizes, each uint8 [C, H, W]; else as `measure`.

    Those of one size go through the network together. The rows are in the order of the pictures.

    >>> rows = Network("means", "", "", 2, lambda x: (x.double().mean((2, 3)).numpy(), None))
    >>> pictures = [torch.full((1, size, 3), size, dtype=torch.uint8) for size in (5, 7, 5, 5)]
    >>> measure_each(rows, pictures, keep_features=True, progress=False).features.ravel()
    array([5., 7., 5., 5.])
    """
    from tqdm import tqdm

    rows = _Rows(network, keep_features, keep_probabilities)
    waiting: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    held = 0
    for i, picture in enumerate(tqdm(pictures, desc="features", unit="image", disable=not progress)):
        waiting.setdefault(picture.shape, []).append((i, picture))
        held += picture.numel()
        full = [picture.shape] if len(waiting[picture.shape]) == network.batch_size else []
        for shape in list(waiting) if held > 2**28 else full:  # of very many sizes, few pictures wait together
            held -= rows.add_group(waiting.pop(shape))
    for group in waiting.values():
        rows.add_group(group)
    return rows.measured()


class _Rows:
    """The features of batches of images, in any order."""

    def __init__(self, network: Network, keep_features: bool, keep_probabilities: bool) -> None:
        self.network, self.keep_features, self.keep_probabilities = network, keep_features, keep_probabilities
        self.total: Moments | None = None
        self.waiting: list[Floats] = []  # rows that are not in `total` yet; adding them is slow, so by the 1024
        self.features: list[Floats] = []
        self.probabilities: list[Floats] = []
        self.places: list[int] = []

    def add(self, pixels: Tensor, places: Sequence[int]) -> None:
        """Add a batch uint8 [B, C, H, W]. Raises InputError for probabilities that the network does not have."""
        features, probabilities = self.network(pixels)
        if self.waiting and features.shape[1] != self.waiting[0].shape[1]:
            raise InputError(f"{self.network.name}: gives features of different lengths for images of different sizes")
        self.waiting.append(features)
        self.places += places
        if sum(map(len, self.waiting)) >= 1024:
            self._add_waiting()
        if self.keep_features:
            self.features.append(features)
        if self.keep_probabilities:
            if probabilities is None:
                raise InputError(f"{self.network.name}: gives no probabilities, which the Inception score needs")
            self.probabilities.append(probabilities)

    def add_group(self, group: Sequence[tuple[int, Tensor]]) -> int:
        """Add pictures of one size with their places, and return their size in bytes."""
        pixels = torch.stack([picture for _, picture in group])
        self.add(pixels, [place for place, _ in group])
        return pixels.numel()

    def _add_waiting(self) -> None:
        if self.waiting:
            part = moments(np.concatenate(self.waiting))
            if self.total is not None and self.total.mean.shape != part.mean.shape:
                raise InputError(f"{self.network.name}: gives features of different lengths for different sizes")
            self.total = part if self.total is None else self.total + part
            self.waiting = []

    def measured(self) -> Measured:
        """All rows in the order of their places. Raises InputError if there are none."""
        self._add_waiting()
        if self.total is None:
            raise InputError("0 images: want at least 1")
        order = np.argsort(self.places)
        return Measured(
            self.total,
            np.concatenate(self.features)[order] if self.keep_features else None,
            np.concatenate(self.probabilities)[order] if self.keep_probabilities else None,
        )


# -- statistics --------------------------------------------------------------------------------------------------------


class Described(Batches, Protocol):
    """A dataset that `provenance` can describe, such as `ddpm.files.data.Images`."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def channels(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Provenance:
    """What statistics were computed from.

    source, split             the dataset
    fingerprint               hash of its images
    count                     the number of images
    size                      of the images, HxWxC, before the network resizes them
    network, weights, resize  as in `Network`
    dtype                     of the pixels: uint8, as they are saved, or float
    version                   of ddpm
    """

    source: str
    split: str
    fingerprint: str
    count: int
    size: str
    network: str
    weights: str
    resize: str
    dtype: str = "uint8"
    version: str = __version__

    def comparable(self) -> dict[str, str]:
        """The fields in which two sets must agree for their statistics to be compared."""
        return {name: getattr(self, name) for name in ("network", "weights", "resize", "size", "dtype")}


def provenance(images: Described, network: Network) -> Provenance:
    """The provenance of the statistics of a whole dataset under a network."""
    height, width = images.size
    size = f"{height}x{width}x{images.channels}"
    of_network = (network.name, network.weights, network.resize)
    return Provenance(images.name, images.split, images.fingerprint, len(images), size, *of_network)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Moments from a file, and their provenance; None if the file has none."""

    moments: Moments
    provenance: Provenance | None


def save_statistics(path: str | Path, moments: Moments, provenance: Provenance) -> None:
    """Write moments and provenance to an .npz file, completely or not at all.

    The arrays are mu [D], sigma [D, D], count, and provenance, which is JSON text. pytorch-fid reads the file, too.
    """
    text = np.array(json.dumps(asdict(provenance)))
    count = -1 if moments.count is None else moments.count
    with atomic.temporary(path) as part, part.open("wb") as file:
        np.savez(file, mu=moments.mean, sigma=moments.covariance, count=np.array(count), provenance=text)


def load_statistics(path: str | Path, expected: Mapping[str, str] | None = None) -> Statistics:
    """Read statistics of `save_statistics`, or plain ones: the arrays mu and sigma, or mean and cov.

    expected  field of `Provenance` -> the value that it must have, as `Provenance.comparable` of the samples gives them

    Plain statistics have neither count nor provenance; a warning says so. Raises InputError for a file that is missing,
    damaged, or of another kind, and for a field that has another value than expected.
    """
    pairs = (("mu", "sigma"), ("mean", "cov"))
    arrays = read_arrays(Path(path), [*pairs[0], *pairs[1], "count", "provenance"])
    names = next((pair for pair in pairs if pair[0] in arrays and pair[1] in arrays), None)
    if names is None:
        held = ", ".join(array_names(Path(path))) or "no arrays"
        raise InputError(f"{path}: has {held}, want statistics, the arrays mu and sigma")
    mean, covariance = (arrays[name] for name in names)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path}: {names[0]} {list(mean.shape)} and {names[1]} {list(covariance.shape)}, want [D], [D, D]"
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f" or not np.isfinite(mean.sum() + covariance.sum()):
        raise InputError(f"{path}: {names[0]} or {names[1]} is not of finite floats")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    asymmetry = np.abs(covariance - covariance.T).max(initial=0)
    if asymmetry > 1e-3 * np.abs(covariance).max(initial=0) or covariance.diagonal().min(initial=0) < 0:
        raise InputError(f"{path}: {names[1]} is not a covariance, which is symmetric with a diagonal of at least 0")
    if "provenance" not in arrays:
        warnings.warn(
            f"{path}: provenance unknown: the file does not name its images, their size and the network", stacklevel=2
        )
        return Statistics(Moments(None, mean, covariance), None)
    try:
        values = parse_json(str(arrays["provenance"][()]))
        provenance = Provenance(**{f.name: values[f.name] for f in fields(Provenance)})
        count = int(arrays["count"])
    except (ValueError, KeyError, TypeError) as fault:
        raise InputError(f"{path}: damaged provenance ({brief(fault)})") from fault
    for name, value in (expected or {}).items():
        if (actual := getattr(provenance, name)) != value:
            raise InputError(f"{path}: {name} is {actual}, but that of the samples is {value}; want the same")
    return Statistics(Moments(count if count >= 0 else None, mean, covariance), provenance)


def read_reference(path: str | Path, expected: Mapping[str, str] | None = None) -> Measured:
    """The real side of a metric from an .npz file: features as `read_features` reads them, or else statistics.

    Statistics are mu and sigma, as pytorch-fid, clean-fid, torch-fidelity and guided-diffusion write them. They have no
    rows. `expected` is as in `load_statistics`, which says what is raised.
    """
    names = array_names(Path(path))
    if "features" not in names and any(name in names for name in ("mu", "sigma", "mean", "cov")):
        return Measured(load_statistics(path, expected).moments, None, None)
    rows, probabilities = read_features(path)
    return Measured(moments(rows), rows, probabilities)
