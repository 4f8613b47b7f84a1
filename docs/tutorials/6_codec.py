r"""
Compress a picture and read it half
===================================

The paper's Algorithms 3 and 4 send an image with a diffusion model: coarse shapes first, details last. This package
writes real files in this way. A file holds the picture exactly, and its first bytes already show an estimate. This
tutorial needs the extra ``codec``.
"""

import matplotlib.pyplot as plt
import numpy as np

import ddpm
from ddpm import codec
from ddpm.files import data


def show(images, labels):
    """Draw uint8 images [H, W, 1], each with a label."""
    figure, axes = plt.subplots(1, len(images), figsize=(8, 1.5))
    for axis, image, label in zip(axes, images, labels, strict=True):
        axis.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(label, fontsize=8)
    figure.tight_layout(pad=0.3)


# %%
# Compress
# --------
# The writer and the reader need the same weights and tables. ``ddpm calibrate`` makes the tables, and
# ``ddpm.load_codec`` opens a model with its tables. The packaged model ``digits`` has them.

model = ddpm.load_codec("digits")
images = data.load("digits", (8, 8), 1, split="test").batch(range(8)).permute(0, 2, 3, 1).numpy()
picture = images[3]
file = codec.compress(model, picture, bits=8)
print(f"{picture.size} pixels of one byte became a file of {len(file)} bytes")

# %%
# Read it back
# ------------
# The file is lossless: every pixel is the same.

print("exact:", np.array_equal(codec.decompress(model, file), picture))

# %%
# Read it half
# ------------
# ``codec.decompress`` with ``at`` reads only the first bytes. The header alone gives an estimate, which knows
# nothing of the picture. Each further group of levels makes the estimate better.

header, begin = codec.read_header(file)
marks = [begin, *np.linspace(begin + 3, len(file), 7).astype(int)]
show([codec.decompress(model, file, at=n) for n in marks], [f"{n} bytes" for n in marks])

# %%
# ``codec.pictures`` yields the better and better pictures of one file. It also says how many pixels of each are exact.

for state in codec.pictures(model, file):
    error = np.sqrt(np.mean((state.image.astype(float) - picture) ** 2))
    print(f"{state.groups} groups, {state.pixels} pixels exact, error {error:.1f} grey levels")

# %%
# A file that was cut short still gives a picture, but the decoder does not call it exact.

half = file[: len(file) // 2]
*_, state = codec.pictures(model, half)
print("whole file:", state.whole, "- exact:", state.exact)

# %%
# Write a lossy file
# ------------------
# A lossy file stops early: at a number of bits per pixel, or at a quality in decibels. The encoder writes the lossless
# file if this file fits, or if no lossy file reaches the quality.

for psnr in (12, 16, 20):
    small = codec.compress(model, picture, psnr=psnr, bits=8)
    print(f"asked for {psnr} dB: {len(small)} bytes")

# %%
# A damaged file is refused
# -------------------------
# Checksums detect a changed byte, so the decoder never calls a wrong picture exact.

broken = bytearray(file)
broken[-8] ^= 1
try:
    codec.decompress(model, bytes(broken))
except codec.Damaged as error:
    print("refused:", error)

# %%
# In files of such small pictures, the header and the checksums take a large part of the bytes. The page "The codec"
# explains the scheme and the format of the file. It compares sizes with PNG, WebP and JPEG XL.
