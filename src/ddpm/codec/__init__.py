"""A lossless and progressive image codec from a DDPM: Algorithms 3 and 4 as real bytes."""

from ddpm.errors import not_installed

try:
    import constriction  # noqa: F401  # the entropy coder, an extra
except ModuleNotFoundError:
    raise not_installed("constriction", "codec") from None

from ddpm.codec.container import Header, read_header
from ddpm.codec.entropy import Damaged
from ddpm.codec.model import Model
from ddpm.codec.picture import Picture, compress, compress_each, decompress, pictures

__all__ = [
    "Damaged",
    "Header",
    "Model",
    "Picture",
    "compress",
    "compress_each",
    "decompress",
    "pictures",
    "read_header",
]
