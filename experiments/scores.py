"""FRD and RS of images, by a program that takes an .npz of images and prints `FRD x  RS y`."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from ddpm.files import atomic


def quality(program: Path, samples: Path) -> dict[str, float]:
    """FRD and RS that the program prints for an .npz of images."""
    printed = subprocess.run([sys.executable, program, samples], check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in re.findall(r"(FRD|RS) ([\d.]+)", printed)}


def scored(program: Path, images: np.ndarray, file: Path) -> dict[str, float]:
    """FRD and RS of images [N, H, W, C]. `file` holds them for the program, and is removed afterwards."""
    with atomic.temporary(file) as part, part.open("wb") as opened:
        np.savez(opened, images)
    try:
        return quality(program, file)
    finally:
        file.unlink()
