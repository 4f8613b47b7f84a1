"""A feature network for digits: a small classifier that is trained on the training images of MNIST or of `digits`.

    ddpm evaluate RUN --metrics fid is --features experiments/digit_features.py:features
    python experiments/digit_features.py 32 | 8          # prints its accuracy on held-out images

The features are the 128 inputs of its last layer, and the probabilities are those of the ten digits. MNIST comes from
the folder in the environment variable MNIST, or from the hub. The weights are kept in experiments/cache. Values compare
only with each other: they are neither FID nor IS.
"""

import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from ddpm.files import data as datasets

EPOCHS = {32: 3, 8: 60}
"""Epochs of training by the side of the images: 32 is MNIST, 8 is `digits`."""


def data(side: int, split: str) -> datasets.Images:
    """The digits of this side."""
    source = "digits" if side == 8 else os.environ.get("MNIST", "ylecun/mnist")
    return datasets.load(source, (side, side), 1, split=split, progress=False)


def tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 1] -> float32 [N, 1, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@cache
def classifier(side: int) -> nn.Sequential:
    """Two convolutions and two dense layers, from experiments/cache or newly trained."""
    torch.manual_seed(0)
    first = nn.Conv2d(1, 32, 3, 1 if side == 8 else 2, 1)
    head = [nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * (4 if side == 8 else 8) ** 2, 128)]
    network = nn.Sequential(first, nn.ReLU(), *head, nn.ReLU(), nn.Linear(128, 10))
    file = Path(__file__).parent / "cache" / f"digits{side}.safetensors"
    if file.is_file():
        network.load_state_dict(load_file(file))
        return network.eval()
    train = data(side, "train")
    x = tensor(train.batch(range(len(train))).permute(0, 2, 3, 1).numpy())
    adam = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-5)
    for epoch in range(EPOCHS[side]):
        for group in adam.param_groups:
            group["lr"] = 1e-3 * (1 - epoch / EPOCHS[side])
        for rows in torch.randperm(len(x)).split(64):
            adam.zero_grad()
            F.cross_entropy(network(x[rows]), train.labels[rows]).backward()
            adam.step()
    file.parent.mkdir(exist_ok=True)
    save_file(network.state_dict(), file)
    return network.eval()


def features(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, side, side, 1] -> features [N, 128] and probabilities [N, 10]."""
    network = classifier(images.shape[1])
    with torch.no_grad():
        hidden = network[:-1](tensor(images))
    return hidden.numpy(), network[-1](hidden).detach().softmax(1).numpy()


if __name__ == "__main__":
    side = int(sys.argv[1])
    held_out = data(side, "test")
    _, probabilities = features(held_out.batch(range(len(held_out))).permute(0, 2, 3, 1).numpy())
    accuracy = float((probabilities.argmax(1) == held_out.labels.numpy()).mean())
    print(f"{side}x{side}: accuracy {accuracy:.4f} on {len(held_out)} held-out digits")
