r"""
A new sampler, schedule or loss in ten lines
============================================

Samplers, schedules and losses are functions of tensors. To write a new one, you need no base class, and you do not
change the trainer. This tutorial writes a new sampler, a new schedule and a new loss.
"""

import math
from itertools import pairwise

import matplotlib.pyplot as plt
import torch

import ddpm
from ddpm import Denoiser, UNet, gaussian, pixels, samplers, timesteps
from ddpm.files import data
from ddpm.files import images as pictures
from ddpm.noise import generator, per_image
from ddpm.schedule import Schedule


def show(x, columns=8):
    """Draw signals [N, 1, 8, 8] as a grid."""
    grid = pictures.grid(pixels.to_pixels(x).permute(0, 2, 3, 1).numpy(), columns)
    plt.figure(figsize=(6, 6 * grid.shape[0] / grid.shape[1]))
    plt.imshow(grid.squeeze(), cmap="gray", vmin=0, vmax=255)
    plt.axis("off")
    plt.tight_layout(pad=0)


denoiser = ddpm.load("digits")
noise = per_image(seeds=range(16), shape=(1, 8, 8))

# %%
# A sampler
# ---------
# A sampler is a generator. It takes noise, and yields a ``Step`` after each step. Our sampler forgets the old noise at
# every step: it goes to the estimate of the image (Equation 15), and adds fresh noise of the next level (Equation 4).
# This is DDIM with the largest possible variance.


def fresh(denoiser, x, noise, steps=50, y=None, start=None):
    """Step to the estimate, and add fresh noise of the next level."""
    abar = denoiser.schedule.alpha_bar.tolist()
    levels = denoiser.schedule.levels(steps, start)
    for t, s in pairwise([*levels[::-1], 0]):
        with torch.no_grad():
            x0 = denoiser(x, torch.full((len(x),), t), y).x0
        x = math.sqrt(abar[s]) * x0 + math.sqrt(1 - abar[s]) * noise(s) if s else x0
        yield samplers.Step(s, x, x0)


*_, last = fresh(denoiser, noise(1000), noise)
show(last.x)

# %%
# For comparison, this is DDIM with the same number of network calls and the same seeds.

*_, last = samplers.ddim(denoiser, noise(1000), steps=50)
show(last.x)

# %%
# A row of ``samplers.SAMPLERS`` gives the sampler a name. The functions of ``ddpm.editing`` accept this name, too.

samplers.SAMPLERS["fresh"] = samplers.Sampler(fresh, steps=50, spacing="uniform", noisy=True, meaning="fresh noise")
print(samplers.named("fresh").meaning)

# %%
# A schedule
# ----------
# A schedule is one table: :math:`\bar\alpha_t` at levels 0 to T. The forward process (Equation 4) needs nothing else.
# The plot compares a sigmoid schedule with the linear and the cosine schedule.


def sigmoid(T=1000, steepness=12.0):
    """Return a schedule whose abar_t falls from 1 as a sigmoid of t."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    f = torch.sigmoid(steepness * (0.5 - u))
    abar = (f - f[-1]) / (f[0] - f[-1]) * (1 - 1e-5) + 1e-5
    return Schedule(abar, torch.arange(-1, T))


plt.figure(figsize=(7, 3))
schedules = {"linear": ddpm.schedule.linear(), "cosine": ddpm.schedule.cosine(), "sigmoid": sigmoid()}
for name, schedule in schedules.items():
    plt.plot(schedule.alpha_bar, label=name)
plt.xlabel("noise level t")
plt.ylabel(r"$\bar\alpha_t$")
plt.legend()
plt.tight_layout()

# %%
# A loss
# ------
# A loss compares the network's output with its target. Equation 14 uses the squared error. Our loss is the Huber loss,
# which grows only linearly for large errors.


def huber(denoiser, x0, t, eps):
    """Return the Huber loss of the prediction, one number per image."""
    xt = gaussian.q_sample(denoiser.schedule, x0, t, eps)
    prediction, _ = denoiser.output(xt, t)
    target = denoiser.target(x0, xt, t, eps)
    return torch.nn.functional.huber_loss(prediction, target, reduction="none").flatten(1).mean(1)


# %%
# Train with all three
# --------------------
# This loop is Algorithm 1 with the new schedule and the new loss. It spreads the noise levels of a batch evenly over
# 1..T (``stratified``). 300 steps are far too few for good digits, but the shapes begin to appear.

torch.manual_seed(0)
network = UNet(channels=1, width=32, channel_multipliers=(1, 1), num_res_blocks=1, attention_levels=(1,))
mine = Denoiser(network, sigmoid(), predict="v")
images = data.load("digits", (8, 8), 1)
optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
random = generator(0)
history = []
for _ in range(300):
    rows = torch.randint(0, len(images), (32,), generator=random)
    x0 = pixels.to_signal(images.batch(rows.tolist()))
    t = timesteps.sample(mine.schedule, 32, "stratified", random)
    loss = huber(mine, x0, t, torch.randn(x0.shape, generator=random)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    history.append(loss.item())
print(f"loss of the first 20 steps {sum(history[:20]) / 20:.3f}, of the last 20 steps {sum(history[-20:]) / 20:.3f}")

# %%
# The new sampler draws from the new model.

network.eval()
*_, last = fresh(mine, noise(1000), noise)
show(last.x)

# %%
# To use your functions from the command line, add them to ``samplers.py``, ``schedule.py`` or ``losses.py`` in a
# checkout. Add a row to the table in the same file. The help and the checks of the options then know a new sampler or
# schedule. For a new loss, also add its name to the setting ``loss`` in ``presets.py``.
