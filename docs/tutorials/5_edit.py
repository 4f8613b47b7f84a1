r"""
Edit, inpaint and interpolate
=============================

A model that can sample images can also change images. This tutorial redraws digits, fills in a missing part, and walks
from one image to another. The functions of ``ddpm.editing`` are generators, as samplers are. The last step holds the
result.
"""

import matplotlib.pyplot as plt
import torch

import ddpm
from ddpm import editing, pixels, samplers
from ddpm.files import data
from ddpm.noise import normal, per_image


def show(rows, labels):
    """Draw signals: each row is a tensor [N, 1, 8, 8], and has a label."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(8, 1.05 * len(rows)), squeeze=False)
    for row, images in enumerate(rows):
        for axis, image in zip(axes[row], images, strict=True):
            axis.imshow(image[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(labels[row], rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)


def last(steps):
    """Return the images after the last step."""
    *_, final = steps
    return final.x


denoiser = ddpm.load("digits")
images = data.load("digits", (8, 8), 1, split="test")
x0 = pixels.to_signal(images.batch(range(8)))
noise = per_image(seeds=range(8), shape=(1, 8, 8))

# %%
# Redraw (SDEdit)
# ---------------
# Add noise to the image up to level t (Equation 4), and run the reverse process from there (Meng et al. 2022). The
# higher the level, the more the image changes. On the command line, ``ddpm edit`` does this.

levels = [0, 300, 500, 700, 900]
show([last(editing.redraw(denoiser, x0, t, noise, min(t, 100) or None)) for t in levels], [f"t = {t}" for t in levels])

# %%
# The first row shows the originals. At low levels the digits stay the same digit. At high levels they become other
# digits.
#
# Change the class (DDIM inversion)
# ---------------------------------
# DDIM without noise can run backwards: it finds the :math:`x_t` from which it would sample the image (Song et al.
# 2021). From this latent we sample again with a class label and guidance. The result is an image of that class. It
# often keeps the slant and the thickness of the strokes.

*_, up = editing.invert(denoiser, x0, steps=50, t=800, iterations=3)
same = last(samplers.ddim(denoiser, up.x, steps=50, start=800))
seven = torch.full((8,), 7)
changed = last(samplers.ddim(denoiser.guided(3), up.x, steps=50, y=seven, start=800))
show([x0, same, changed], ["original", "and back", "as a 7"])

# %%
# Inpaint (RePaint)
# -----------------
# Draw only a part of the image, and keep the rest (Lugmayr et al. 2022). The mask is 1 where the model draws. Here, the
# model draws the lower half. Each column has its own seed.

mask = torch.zeros(8, 8)
mask[4:] = 1
one = x0[2:3].expand(8, -1, -1, -1)
mended = last(editing.inpaint(denoiser, one, mask, noise, steps=50, jump=5, resample=5))
show([one, torch.where(mask == 1, torch.zeros_like(one), one), mended], ["original", "known", "drawn"])

# %%
# Interpolate (Figures 8 and 9)
# -----------------------------
# Mix two images at level t, and decode the mixture. The outer columns decode the two images without mixing. At a low
# level they still look like the two images. At a high level, little of the two images is left, and the model draws
# other digits.

weights = torch.linspace(0, 1, 9)
ends = normal([1, 2], (1, 8, 8))
steady = per_image([0] * 9, (1, 8, 8))
rows = [
    last(editing.interpolate(denoiser, x0[3], x0[5], weights, t, *ends, steady, steps=min(t, 100)))
    for t in (250, 500, 750)
]
show(rows, ["t = 250", "t = 500", "t = 750"])

# %%
# Images that share a latent (Figure 7)
# -------------------------------------
# Stop a sampler at level t, and sample from there several times. The images share the features that the sampler decided
# above level t.

single = per_image([7], (1, 8, 8))
chain = {step.t: step.x[0] for step in samplers.ancestral(denoiser, single(1000), single, steps=200)}
rows = [last(editing.share_latent(denoiser, chain[t], t, noise, steps=min(t, 100))) for t in (750, 500, 250)]
show(rows, ["t = 750", "t = 500", "t = 250"])
