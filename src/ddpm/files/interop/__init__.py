"""Weights of other packages: diffusers folders are read and written, files of others are read.

All hold the paper's U-Net, or one that differs in `ddpm.details`, under other names. No pickled code runs, and no other
package is imported. Every name, shape and setting is understood or refused.
"""

from ddpm.files.interop.diffusers import check_out, from_diffusers, is_diffusers, to_diffusers, weights_of
from ddpm.files.interop.names import export_state, import_state, names_in
from ddpm.files.interop.reading import read, read_file, recognise, save

__all__ = [
    "check_out", "export_state", "from_diffusers", "import_state", "is_diffusers", "names_in", "read", "read_file",
    "recognise", "save", "to_diffusers", "weights_of",
]  # fmt: skip
