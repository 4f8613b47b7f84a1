"""Measure how many generated digits a classifier recognises that has seen only real digits.

    python examples/digits_report.py SAMPLES.npz [--asked]

The classifier has eleven classes: the ten digits, and real digits with shuffled pixels, which stand for "not a digit".
The script prints the share of images for which some digit has a probability above 0.9: of the samples, of held-out real
digits, and of uniform noise, for which it should be near 0. --asked is for samples of `ddpm sample --class all`, which
are 0 to 9 in turn. The script then also prints the share of samples that are recognised as the digit asked for.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.neural_network import MLPClassifier

from ddpm.files import data as datasets


def flat(images: datasets.Images) -> np.ndarray:
    """All images as rows of pixels in [0, 1], [N, 64]."""
    return images.batch(range(len(images))).flatten(1).numpy() / 255


def report(samples: np.ndarray, asked: bool = False) -> dict[str, object]:
    """The shares for uint8 samples [N, 8, 8, 1], and the number of samples that are recognised as each digit."""
    train, test = datasets.load_pair("digits", (8, 8), 1)
    x, x_test = flat(train), flat(test)
    random = np.random.default_rng(0)
    shuffled = random.permuted(x, axis=1)
    classifier = MLPClassifier((128,), learning_rate_init=0.003, random_state=0, max_iter=300)
    classifier.fit(np.concatenate([x, shuffled]), np.concatenate([train.labels, np.full(len(x), 10)]))

    def digit(x: np.ndarray) -> np.ndarray:
        """The probability of each of the ten digits."""
        return classifier.predict_proba(x)[:, :10]

    def share(x: np.ndarray) -> float:
        """The share of the rows that are recognised as some digit."""
        return round(float((digit(x).max(1) > 0.9).mean()), 4)

    generated = samples.reshape(len(samples), -1) / 255
    right = digit(generated).argmax(1) == np.arange(len(samples)) % 10
    return {
        **({"recognised_as_asked": round(float(right.mean()), 4)} if asked else {}),
        "count": len(samples),
        "samples_above_0.9": share(generated),
        "held_out_above_0.9": share(x_test),
        "noise_above_0.9": share(random.uniform(size=(1000, x.shape[1]))),
        "accuracy_on_held_out": round(float((digit(x_test).argmax(1) == test.labels.numpy()).mean()), 4),
        "samples_by_class": np.bincount(digit(generated).argmax(1), minlength=10).tolist(),
    }


if __name__ == "__main__":
    with np.load(Path(sys.argv[1])) as file:
        print(json.dumps(report(file["arr_0"], "--asked" in sys.argv)))
