"""How many generated digits does a classifier recognise that has only ever seen real ones?

    python examples/digits_report.py SAMPLES.npz [--asked]

The classifier has eleven classes: the ten digits, and real digits with their pixels shuffled, so that it can
also say "not a digit". Prints the share to which it gives some digit a probability above 0.9: of the samples,
of held-out real digits, and of uniform noise, which should be near 0. With --asked the samples are those of
`ddpm sample --class all`, 0 to 9 in turn: then also the share of them that are taken for the digit they should be.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn.neural_network import MLPClassifier

from ddpm.files import data as datasets


def flat(images: datasets.Images) -> np.ndarray:
    return images.batch(range(len(images))).flatten(1).numpy() / 255


def report(samples: np.ndarray, asked: bool = False) -> dict[str, object]:
    """The shares, for uint8 samples [N, 8, 8, 1], and how the samples spread over the ten classes."""
    train, test = datasets.load_pair("digits", (8, 8), 1)
    x, x_test = flat(train), flat(test)
    random = np.random.default_rng(0)
    shuffled = random.permuted(x, axis=1)
    classifier = MLPClassifier((128,), learning_rate_init=0.003, random_state=0, max_iter=300)
    classifier.fit(np.concatenate([x, shuffled]), np.concatenate([train.labels, np.full(len(x), 10)]))

    def digit(x: np.ndarray) -> np.ndarray:
        return classifier.predict_proba(x)[:, :10]

    def share(x: np.ndarray) -> float:
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
