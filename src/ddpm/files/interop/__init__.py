"""Weights to and from other packages: folders of diffusers both ways, files of ermongroup/ddim on the way in.

All of them hold the paper's U-Net and differ in names; our query, key and value are one layer, theirs are three.
Nothing pickled is run, and diffusers is not imported. Every name, shape and setting is accounted for or refused.
"""

from ddpm.files.interop.ddim import from_ddim, read_ddim, shape_of
from ddpm.files.interop.diffusers import check_out, from_diffusers, is_diffusers, to_diffusers, weights_of
from ddpm.files.interop.names import their_names, to_ours, to_theirs
from ddpm.files.interop.reading import read, recognise, save

__all__ = [
    "check_out", "from_ddim", "from_diffusers", "is_diffusers", "read", "read_ddim", "recognise", "save", "shape_of",
    "their_names", "to_diffusers", "to_ours", "to_theirs", "weights_of",
]  # fmt: skip
