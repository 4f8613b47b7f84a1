"""Images that are Python objects: arrays, tensors and Datasets, in the place of a SOURCE."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm.errors import InputError, brief
from ddpm.files.data import hugging_face
from ddpm.files.data.listing import Contents, Encoded, Listing, Options, number_values
from ddpm.files.data.sources import Arrays

WANTED = (
    "want a SOURCE as text, a NumPy array [N, H, W] or [N, H, W, C], a torch tensor [N, C, H, W] or [N, H, W], a "
    "map-style Dataset of images or (image, label), or a pair (images, labels)"
)


class Given(NamedTuple):
    """Images that were given as Python objects.

    name      the run's setting `data`
    contents  their one split
    meaning   what was understood, in one line
    pairs     the same with the other images of condition pairs, if they are in another column
    """

    name: str
    contents: Contents
    meaning: str
    pairs: "Given | None" = None


def given(data: Any, labelled: bool = False, options: Options | None = None) -> Given:
    """What the images of a Python object are.

    data      a NumPy array [N, H, W] or [N, H, W, C], a torch tensor [N, C, H, W] or [N, H, W], a pair of one of these
              and its N labels, a dataset of `datasets`, or a map-style Dataset. The items of a Dataset are images or
              (image, label). An image is of Pillow, a tensor [C, H, W] or [H, W], or an array [H, W] or [H, W, C]. A
              label is an integer or a name. Numbers are those of the setting `pixel_type`
    labelled  whether the labels of a Dataset are needed: all of its items are read for them, unless it has `targets`
    options   columns of a dataset of `datasets`; nothing else has columns

    Raises InputError for anything else, and for a Dataset whose first item is another one each time.

    >>> import numpy as np
    >>> given(np.zeros((5, 8, 6, 3), np.uint8)).meaning
    'array uint8 [5, 8, 6, 3]: 5 images of 8x6 with 3 channels; no labels'
    """
    options = options or Options()
    images, labels = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    if type(images).__module__.partition(".")[0] == "datasets" and type(images).__name__ in ("Dataset", "DatasetDict"):
        name = f"datasets.{type(images).__name__}"
        contents = hugging_face.contents(name, images, None, options)
        meaning = f"{name}: {', '.join(contents.splits)}"
        if options.pair_column is None:
            return Given(name, contents, meaning)
        others = hugging_face.contents(name, images, None, Options(options.pair_column))
        return Given(name, contents, meaning, Given(name, others, meaning))
    options.refuse_columns(f"data {type(images).__name__}")
    if isinstance(images, (np.ndarray, Tensor)):
        return _of_array(images, labels)
    if labels is None and hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        if isinstance(images, (str, bytes, Mapping)):
            raise InputError(f"data {type(images).__name__}: {WANTED}")
        return _of_dataset(images, labelled)
    raise InputError(f"data {type(data).__name__}: {WANTED}")


# -- arrays and tensors ------------------------------------------------------------------------------------------------


def _channels_last(images: NDArray[Any] | Tensor, batched: bool) -> NDArray[Any]:
    """An image or a batch of images as an array [..., H, W, C] or [..., H, W]; a tensor has its channels first."""
    if isinstance(images, np.ndarray):
        return images
    images = images.detach().cpu()
    images = images.float() if images.dtype == torch.bfloat16 else images  # NumPy has no such type
    return (images.movedim(-3, -1) if images.ndim >= batched + 3 else images).numpy()


def _of_array(images: NDArray[Any] | Tensor, labels: Any) -> Given:
    kind = "tensor" if isinstance(images, Tensor) else "array"
    title = f"{kind} {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    wanted = "[N, C, H, W] or [N, H, W]" if kind == "tensor" else "[N, H, W] or [N, H, W, C]"
    if 0 in images.shape:
        raise InputError(f"data {title}: no images; want {wanted}")
    if images.ndim not in (3, 4):
        raise InputError(f"data {title}: want {wanted}")
    if kind == "array" and images.ndim == 3 and images.shape[2] in (1, 3, 4):
        raise InputError(f"data {title}: seems to be one image; want {wanted}")
    at, other = (1, -1) if kind == "tensor" else (-1, 1)
    if images.ndim == 4 and images.shape[at] == images.shape[2] > 4 >= images.shape[other]:
        raise InputError(f"data {title}: its channels seem to be at another place; want {wanted}")
    arrays = _channels_last(images, batched=True)
    if arrays.dtype.kind not in "uif":
        raise InputError(f"data {title}: want numbers {wanted}")
    numbers, names = (None, None) if labels is None else _numbered(labels, len(arrays), title)
    height, width = arrays.shape[1:3]
    has = f"{arrays.shape[3] if arrays.ndim == 4 else 1} channel"
    meaning = f"{title}: {len(arrays):,} images of {height}x{width} with {has}{'s' * (not has.startswith('1 '))}; "
    meaning += "no labels" if names is None else f"{len(names)} classes"
    listing = Listing(Arrays(f"the {title}", arrays), numbers, names)
    return Given(title, Contents({"train": lambda: listing}), meaning)


def _numbered(labels: Any, n: int, title: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels as numbers 0..K-1, and the K names. Raises InputError unless they are n integers or names."""
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    if len(values) != n or not all(type(value) in (int, str) for value in values):
        raise InputError(f"data {title}: {len(values):,} labels; want {n:,} integers or names, one for each image")
    numbers, names = number_values(values)
    return np.array([numbers[value] for value in values], np.int64), names


# -- Datasets ----------------------------------------------------------------------------------------------------------


@dataclass
class Items:
    """The images of a map-style Dataset."""

    title: str
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"item {index} of the {self.title}"

    def fetch(self, indices: Sequence[int]) -> Iterator[Encoded | InputError]:
        return map(self._image, indices)

    def _image(self, index: int) -> Encoded | InputError:
        try:
            return _image_of(self.dataset[index], self.name(index))
        except InputError as fault:
            return fault
        except (OSError, ValueError) as fault:  # what Pillow raises for a damaged file
            return InputError(f"{self.name(index)}: cannot be read ({brief(fault)})")

    def identity(self) -> Iterator[bytes]:
        """The number of items, and the pixels of at most 32 of them, spread over the Dataset."""
        n = len(self)
        yield f"{n}\n".encode()
        for i in sorted({k * n // 32 for k in range(32)}):
            yield _bytes_of(self._image(i))

    def stamp(self) -> None:
        return None  # nobody knows when an item changes


def _bytes_of(image: Encoded | InputError) -> bytes:
    if isinstance(image, InputError):
        return b"bad"
    pixels = np.asarray(image)
    return f"{pixels.shape}".encode() + pixels.tobytes()


def _image_of(item: Any, name: str) -> Encoded:
    """The image of an item, without its label. Raises InputError if there is none."""
    image = item[0] if isinstance(item, (tuple, list)) and item else item
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (Tensor, np.ndarray)):
        return _channels_last(image, batched=False)
    kind = type(image).__name__
    raise InputError(
        f"{name}: {kind}; want an image of Pillow, a tensor [C, H, W] or an array [H, W, C], alone or with a label"
    )


def _of_dataset(dataset: Any, labelled: bool) -> Given:
    n, title = len(dataset), f"Dataset {type(dataset).__name__} of {len(dataset):,}"
    if not n:
        raise InputError(f"data {title}: no images")
    items = Items(title, dataset)
    first = dataset[0]
    image = _image_of(first, items.name(0))
    if _bytes_of(image) != _bytes_of(next(items.fetch([0]))):
        raise InputError(
            f"data {title}: item 0 is another image each time; want a Dataset without random transformations (flip, "
            "mirror and turn are settings)"
        )
    has_labels = isinstance(first, (tuple, list)) and len(first) == 2
    numbers, names = _labels_of(dataset, title) if labelled and has_labels else (None, None)
    what = f"in mode {image.mode}, {image.height}x{image.width}" if isinstance(image, Image.Image) else ""
    what = what or f"{image.dtype} {list(image.shape)}"  # type: ignore[union-attr]
    meaning = f"{title}: {n:,} items, the first an image {what}; "
    meaning += f"{len(names)} classes" if names else "labels are not used" if has_labels else "no labels"
    listing = Listing(items, numbers, names)
    return Given(title, Contents({"train": lambda: listing}), meaning)


def _labels_of(dataset: Any, title: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The labels of all items; `targets` and `classes`, as torchvision has them, save reading the items."""
    targets, classes = getattr(dataset, "targets", None), getattr(dataset, "classes", None)
    if targets is None or len(targets) != len(dataset):
        targets = [item[1] for item in map(dataset.__getitem__, range(len(dataset)))]
    values = [value.item() if hasattr(value, "item") else value for value in targets]
    if classes and all(type(value) is int and 0 <= value < len(classes) for value in values):
        return np.array(values, np.int64), tuple(map(str, classes))
    return _numbered(values, len(dataset), title)
