r"""
The paper in an hour
====================

This tutorial walks through *Denoising Diffusion Probabilistic Models* (Ho, Jain, Abbeel 2020): the forward process, the
loss, sampling and the bound. Each part shows its equation beside the code. The model is ``digits``, which is part of
the package. Its images have 8x8 pixels.
"""

import matplotlib.pyplot as plt
import torch

import ddpm
from ddpm import gaussian, likelihood, losses, pixels, samplers
from ddpm.files import data
from ddpm.noise import per_image


def show(rows, labels):
    """Draw signals: each row is a tensor [N, 1, 8, 8] in [-1, 1], and has a label."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(8, 1.05 * len(rows)), squeeze=False)
    for row, images in enumerate(rows):
        for axis, image in zip(axes[row], images, strict=True):
            axis.imshow(image[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(labels[row], rotation=0, ha="right", va="center")
    figure.tight_layout(pad=0.3)


denoiser = ddpm.load("digits")
images = data.load("digits", (8, 8), 1, split="test")
x0 = pixels.to_signal(images.batch(range(8)))
print(x0.shape, "from", float(x0.min()), "to", float(x0.max()))

# %%
# The data: pixels become a signal
# --------------------------------
# Section 3.3 scales the pixels 0..255 to numbers from -1 to 1. ``pixels.to_signal`` does this. The model has not seen
# these eight images in training.

show([x0], ["$x_0$"])

# %%
# The forward process (Equations 2 and 4)
# ---------------------------------------
# The forward process adds noise in T = 1000 small steps (Equation 2). It has no parameters to learn. The steps are
# Gaussian, so we can draw :math:`x_t` at any noise level t directly (Equation 4):
#
# .. math::
#
#    q(x_t | x_0) = \mathcal{N}(x_t; \sqrt{\bar\alpha_t}\, x_0, (1 - \bar\alpha_t) I)
#
# ``gaussian.q_sample`` draws from this distribution. Level 0 is data, and level 1000 is noise. One number per level
# describes the whole process: :math:`\bar\alpha_t` falls from 1 to almost 0, and :math:`\sqrt{\bar\alpha_t}` scales the
# image.

schedule = denoiser.schedule
noise = per_image(seeds=range(8), shape=(1, 8, 8))  # each image has a seed of its own
levels = [0, 100, 300, 500, 700, 1000]
show(
    [x0 if t == 0 else gaussian.q_sample(schedule, x0, torch.full((8,), t), noise(t)) for t in levels],
    [f"t = {t}" for t in levels],
)

# %%
# The reverse process (Equations 1 and 15)
# ----------------------------------------
# A network learns to go one step back. Its input is :math:`x_t` and t. Its output gives an estimate of the image,
# :math:`\hat x_0` (Equation 15). This estimate gives the mean of the step back (Equation 7). A ``Denoiser`` holds the
# network and knows what the output means: the noise, the image, the mean or v. This model predicts v.

t = torch.full((8,), 500)
xt = gaussian.q_sample(schedule, x0, t, noise(500))
estimate = denoiser(xt, t)
show([x0, xt, estimate.x0], ["$x_0$", "$x_{500}$", r"$\hat x_0$"])

# %%
# At level 500 the estimates show digits. Where the network is unsure, the strokes are soft. Some estimates show another
# digit than the original.
#
# The loss (Equation 14)
# ----------------------
# Training draws an image, a level and noise, and compares the network's prediction with the truth:
#
# .. math::
#
#    L_\mathrm{simple} = \mathbb{E}_{t, x_0, \epsilon} \left\| \epsilon - \epsilon_\theta(x_t, t) \right\|^2
#
# ``losses.simple`` returns the loss of each image, as a mean over the pixels. The plot shows the mean loss of 64 images
# at many noise levels. The model predicts v, so the loss is the squared error of v.

many = pixels.to_signal(images.batch(range(64)))
draw = per_image(seeds=range(64), shape=(1, 8, 8))
ts = list(range(1, 1001, 37))
with torch.no_grad():
    loss = [losses.simple(denoiser, many, torch.full((64,), t), draw(t)).mean().item() for t in ts]
plt.figure(figsize=(7, 3))
plt.plot(ts, loss)
plt.xlabel("noise level t")
plt.ylabel("loss")
plt.tight_layout()

# %%
# Sampling (Algorithm 2)
# ----------------------
# Sampling begins with noise and goes back from level 1000 to level 0. Each step draws from the Gaussian of Equation 1:
#
# .. math::
#
#    x_{t-1} = \mu_\theta(x_t, t) + \sigma_t z, \qquad z \sim \mathcal{N}(0, I)
#
# A sampler yields a ``Step`` after every step. So we can look at the estimates on the way, as in Figure 6 of the paper.

seen = {}
for step in samplers.ancestral(denoiser, noise(1000), noise):
    if step.t in (900, 700, 500, 300, 100, 0):
        seen[step.t] = step.x0
show(list(seen.values()), [f"t = {t}" for t in seen])

# %%
# The first estimates look like an average of all digits. They become sharper as the noise level falls.
#
# The bound (Equation 5)
# ----------------------
# How many bits does the model need for an image? The bound is an upper limit of the negative log-likelihood. It is the
# sum of three kinds of terms:
#
# .. math::
#
#    L = L_T + \sum_{t > 1} L_{t-1} + L_0
#
# ``likelihood.vlb`` calls the network at all 1,000 levels, and returns each term.

bound = likelihood.vlb(denoiser, x0, noise)
print("bits per dimension of each image:", [round(b, 2) for b in bound.bits_per_dim().tolist()])
bits = gaussian.bits_per_dim(bound.kl.mean(0), bound.dims)
plt.figure(figsize=(7, 3))
plt.plot(range(2, 1001), bits)
plt.yscale("log")
plt.xlabel("noise level t")
plt.ylabel("bits per dimension, one level")
plt.tight_layout()

# %%
# The lowest noise levels cost most of the bits. They describe details that nobody sees. The loss of Equation 14 gives
# these levels less weight than the bound does. The paper explains its good samples by this.
#
# What to read next: `Bits per dimension and the rate-distortion curve <4_likelihood.html>`_ continues with the bound.
# `A new sampler, schedule or loss <3_extend.html>`_ replaces the parts. The page "From the paper to the code" names the
# function of every equation.
