r"""
Your own photographs, from folder to samples
============================================

This tutorial trains a model on a folder of pictures. It draws these pictures itself, so it runs anywhere: 240 pictures
of a sun above a hill. To use your own photographs, set ``folder`` to your folder. The network is very small and trains
for seconds, so the samples are rough.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import ddpm
from ddpm import pixels, samplers
from ddpm.files import data
from ddpm.files import images as pictures
from ddpm.noise import per_image


def show(batch, columns):
    """Draw uint8 images [N, C, H, W] as a grid."""
    grid = pictures.grid(batch.permute(0, 2, 3, 1).numpy(), columns)
    plt.figure(figsize=(7, 7 * grid.shape[0] / grid.shape[1]))
    plt.imshow(grid)
    plt.axis("off")
    plt.tight_layout(pad=0)


work = Path(tempfile.mkdtemp())
folder = work / "photos"
folder.mkdir()
rng = np.random.default_rng(0)
y, x = np.mgrid[0:48, 0:64]
for number in range(240):
    sky, hill = rng.uniform((90, 150, 210), (150, 190, 255)), rng.uniform((20, 80, 20), (90, 130, 60))
    picture = sky * (1 - y / 100)[..., None]
    picture[(x - rng.uniform(12, 52)) ** 2 + (y - rng.uniform(8, 20)) ** 2 < 49] = (255, 220, 80)
    picture[y > 32 + 6 * np.sin(x / rng.uniform(8, 14) + rng.uniform(0, 6))] = hill
    Image.fromarray(picture.astype(np.uint8)).save(folder / f"{number:03}.png")

# %%
# Look at the data first
# ----------------------
# On the command line, ``ddpm data FOLDER --out sheet.png`` shows the images as training sees them. In Python,
# ``data.load`` returns the images. It resizes each image until the image covers the size, and crops it at the centre.

source = data.load(str(folder), (16, 16), 3)
print(len(source), "images")
show(source.batch(range(16)), columns=8)

# %%
# Train
# -----
# The preset ``photos`` is the recipe for pictures of any size. You can replace each setting. Here, a small network and
# few steps make the run short. ``on_log`` receives every line of the log. This command starts a similar run:
#
# .. code-block:: sh
#
#    ddpm train photos --data photos --out run --size 16 --width 32 --channel-multipliers 1,1 --steps 500

log = []
run = ddpm.train(
    "photos",
    data=folder,
    out=work / "run",
    size=(16, 16),
    width=32,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(8,),
    dropout=0.0,
    steps=500,
    batch_size=16,
    lr=2e-3,
    warmup=20,
    cooldown=0.5,
    ema_decay=0.98,
    eval_images=64,
    log_every=10,
    sample_every=0,
    on_log=log.append,
)
print(run)

# %%
# Each line of the log is a dict. The loss falls quickly at first.

lines = [line for line in log if "loss" in line]
plt.figure(figsize=(7, 2.5))
plt.plot([line["step"] for line in lines], [line["loss"] for line in lines])
plt.xlabel("step")
plt.ylabel("loss (Equation 14)")
plt.tight_layout()

# %%
# Sample
# ------
# ``run.model`` is the model with its EMA weights, ready to sample. Here, UniPC makes 20 network calls for each image.

noise = per_image(seeds=range(16), shape=run.preset.shape)
sampler = samplers.SAMPLERS["unipc"]
levels = sampler.levels(run.model, 20)
*_, last = sampler.run(run.model, noise(run.model.schedule.T), noise, levels, None, None)
show(pixels.to_pixels(last.x), columns=8)

# %%
# Most samples have a sky, a hill and a sun. Some noise is left. A real run takes longer: see the how-to page "How long
# to train".
#
# Resume the run
# --------------
# The same call resumes a run that was stopped. To train for more steps, call ``ddpm.train(run.folder, steps=1000)``.
# With ``cooldown``, the learning rate depends on the number of steps, so decide on this number early. The run folder
# holds the settings, the log and the checkpoints:

for path in sorted(run.folder.rglob("*")):
    if path.is_file():
        print(path.relative_to(run.folder))
