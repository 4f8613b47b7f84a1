"""A lossless and progressive image codec from a DDPM: Algorithms 3 and 4 as real bytes."""

from ddpm.errors import not_installed

try:
    import constriction  # noqa: F401  # the entropy coder, an extra
except ModuleNotFoundError:
    raise not_installed("constriction", "codec") from None

from ddpm.codec.entropy import Damaged
from ddpm.codec.picture import Header, Model, Picture, compress, compress_each, decompress, pictures, read_header

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
