"""Weights of other packages: diffusers folders are read and written, files of ermongroup/ddim are read.

All hold the paper's U-Net, under other names. Query, key and value are one layer here and three layers there. No
pickled code runs, and diffusers is not imported. Every name, shape and setting is understood or refused.
"""

from ddpm.files.interop.ddim import from_ddim, infer_preset, read_ddim
from ddpm.files.interop.diffusers import check_out, from_diffusers, is_diffusers, to_diffusers, weights_of
from ddpm.files.interop.names import export_state, import_state, names_in
from ddpm.files.interop.reading import read, recognise, save

__all__ = [
    "check_out", "export_state", "from_ddim", "from_diffusers", "import_state", "infer_preset", "is_diffusers",
    "names_in", "read", "read_ddim", "recognise", "save", "to_diffusers", "weights_of",
]  # fmt: skip
