r"""
Bits per dimension and the rate-distortion curve
================================================

A diffusion model is also a density model: it assigns a number of bits to every image. This tutorial measures these bits
with the bound (Equation 5), splits them into rate and distortion, and draws Figure 5 of the paper for the model
``digits``.
"""

from dataclasses import replace

import matplotlib.pyplot as plt

import ddpm
from ddpm import gaussian, likelihood, pixels
from ddpm.files import data
from ddpm.noise import per_image

denoiser = ddpm.load("digits")
x0 = pixels.to_signal(data.load("digits", (8, 8), 1, split="test").batch(range(16)))
noise = per_image(seeds=range(16), shape=(1, 8, 8))

# %%
# The bound (Equation 5)
# ----------------------
# The bound has a term for each level:
#
# .. math::
#
#    L = \underbrace{D_\mathrm{KL}(q(x_T|x_0) \| p(x_T))}_{L_T}
#    + \sum_{t>1} \underbrace{D_\mathrm{KL}(q(x_{t-1}|x_t,x_0) \| p_\theta(x_{t-1}|x_t))}_{L_{t-1}}
#    \underbrace{- \log p_\theta(x_0|x_1)}_{L_0}
#
# ``likelihood.vlb`` draws :math:`x_t` once at each level, and returns every term in nats. ``bits_per_dim`` divides the
# sum by the number of pixels and by log 2.

bound = likelihood.vlb(denoiser, x0, noise)
bits = bound.bits_per_dim()
print(f"{bits.mean():.3f} bits per dimension, standard error {bits.std() / len(bits) ** 0.5:.3f}")

# %%
# Rate and distortion (Section 4.3)
# ---------------------------------
# The paper calls :math:`L_1 + \dots + L_T` the *rate*: the bits that describe the image up to the error of the last
# estimate. :math:`L_0` is the *distortion*: the bits that are left.

dims = bound.dims
rate = gaussian.bits_per_dim(bound.prior + bound.kl.sum(1), dims).mean()
distortion = gaussian.bits_per_dim(bound.decoder, dims).mean()
print(f"rate {rate:.3f}, distortion {distortion:.3f} bits per dimension")

# %%
# Another variance, without another network call
# ----------------------------------------------
# We can choose the variance of the reverse process (Section 3.2). For a fixed variance, the mean squared errors
# determine the terms of the bound. ``bound.mse`` holds these errors. They also give the best variance of each level
# (Bao et al. 2022). Here, the same 16 images give the variance and then measure it, so the result is a little too good.
# ``ddpm calibrate`` measures the variance on training images.

small = replace(denoiser, variance="fixed_small")
best = replace(denoiser, variance=gaussian.calibrated_variance(denoiser.schedule, bound.mse.mean(0)))
for name, other in {"fixed_small": small, "calibrated": best}.items():
    there = likelihood.vlb_with_variance(bound, other, x0, noise)
    print(f"{name}: {there.bits_per_dim().mean():.3f} bits per dimension")

# %%
# Progressive coding (Algorithms 3 and 4, Figure 5)
# -------------------------------------------------
# A sender can send :math:`x_T, x_{T-1}, \dots, x_0` one after the other. After each of them, the receiver has an
# estimate of the image. ``likelihood.progressive_coding`` yields this estimate and the bits that the sender has spent.

spent, error, shown = [], [], {}
for state in likelihood.progressive_coding(denoiser, x0, noise):
    spent.append(gaussian.bits_per_dim(state.nats, dims).mean().item())
    error.append(((state.x0 - x0).square().mean().sqrt() * 127.5).item())
    if state.t in (1000, 800, 600, 400, 200, 50, 0):
        shown[state.t] = state.x0[:8]

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
left.plot(range(1000, -1, -1), error)
left.set(xlabel="noise level t", ylabel="error, grey levels of 256", xlim=(1000, 0))
right.plot(spent, error)
right.set(xlabel="rate, bits per dimension", ylabel="error, grey levels of 256")
figure.tight_layout()

# %%
# The error falls steeply over the first bits. The later bits reduce the error only a little, because they describe
# small differences. The next figure shows what the receiver sees (Figure 10). The last row is the image itself.

figure, axes = plt.subplots(len(shown), 8, figsize=(7, 6))
for row, (t, images) in zip(axes, shown.items(), strict=True):
    for axis, image in zip(row, images, strict=True):
        axis.imshow(image[0].clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"t = {t}", rotation=0, ha="right", va="center")
figure.tight_layout(pad=0.3)

# %%
# Fewer levels
# ------------
# The bound over all 1,000 levels takes 1,000 network calls per image. ``ddpm evaluate RUN --levels-per-image 20`` draws
# 20 levels for each image. This estimate has no bias, and the command prints its standard error.
