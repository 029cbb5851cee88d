"""A prefilter: a tiny network on the head's features that says when an image holds nothing worth sending.

After the neural filter of Matsubara and Levorato (ICPR 2020): where p(contains object) falls below a threshold, nothing
is sent. The threshold comes from held-out images, for a wanted recall; what the filter costs in accuracy is only as
well known as those images resemble the device's.

It leaves as an exit. Its three logits are "nothing here" and "something" twice: each something has at most half of the
probability, so the exit's confidence can pass a threshold above 0.5 only for "nothing here". The exit rules that
exist, and their calibration, serve it unchanged. Runs in the cloud, never on a device.
"""

from math import floor, log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedge.core.errors import DataError
from fedge.core.params import Array

NOTHING = 0  # the class that the exit answers
MOST = 0.49  # as a threshold: the two halves of "something" may differ in their last digit, so 0.5 is too near


def train_prefilter(
    features: Array,
    contains: Array,
    *,
    width: int = 16,
    steps: int = 300,
    batch: int = 32,
    rate: float = 3e-3,
    seed: int = 0,
) -> nn.Sequential:
    """A network features [n, C, H, W] -> logits [n, 2] of (nothing, something), from labels `contains` [n] of 0 and 1.

    Both labels weigh the same whatever their numbers. Raises DataError where one of them is missing.
    """
    labels = np.asarray(contains, np.int64)
    counts = np.bincount(labels, minlength=2)
    if features.ndim != 4 or labels.shape != features.shape[:1] or counts.size != 2 or not counts.all():
        raise DataError("A prefilter learns from features [n, C, H, W] of images with and without objects; give both.")
    random = np.random.default_rng(seed)
    scale = float(features.std()) or 1.0
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = _untrained(features.shape[1], width)
    weights = torch.from_numpy((labels.size / (2.0 * counts)).astype(np.float32))
    optimiser = torch.optim.Adam(network.parameters(), lr=rate)
    for _ in range(steps):
        rows = np.sort(random.choice(labels.size, min(batch, labels.size), replace=False))
        logits = network(torch.from_numpy(features[rows]) / scale)
        loss = functional.cross_entropy(logits, torch.from_numpy(labels[rows]), weights)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        next(network.parameters()).div_(scale)
    return network.eval()


def _untrained(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, 2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 2),
    )


def scores(network: nn.Sequential, features: Array, batch: int = 64) -> NDArray[np.float64]:
    """p(contains object) of each image [n]."""
    with torch.no_grad():
        parts = [network(torch.from_numpy(features[low : low + batch])) for low in range(0, len(features), batch)]
    return np.asarray(torch.cat(parts).double().softmax(1)[:, 1].numpy())


def threshold_for(held_out: Array, contains: Array, recall: float) -> float:
    """The threshold t at which p < t is expected to turn away at most 1 - `recall` of new images with objects.

    `held_out` are scores [n]. Of n + 1 images with objects, one of them new, it may lie anywhere in the order of their
    scores, so t is the k-th lowest of the n, with k = floor((n + 1)(1 - recall)), and at most MOST (split conformal
    prediction; Papadopoulos et al., ECML 2002). Too few images for the recall give 0: everything is sent. Raises
    DataError without an image with an object, or for a recall outside (0, 1].
    """
    with_objects = np.sort(np.asarray(held_out, np.float64)[np.asarray(contains, bool)])
    if not with_objects.size or not 0.0 < recall <= 1.0:
        raise DataError("A threshold needs held-out images with objects, and a recall above 0 and up to 1.")
    rank = floor((1.0 - recall) * (with_objects.size + 1) + 1e-9)
    return float(min(MOST, with_objects[rank - 1])) if rank else 0.0


def as_exit(network: nn.Sequential, threshold: float) -> tuple[nn.Sequential, float]:
    """The network with an exit's three logits, and the confidence from which that exit answers "nothing here".

    An image is turned away exactly when p(contains object) < `threshold`, rounding of the last digit aside. Raises
    DataError for a threshold above MOST, or a network that `train_prefilter` did not make.
    """
    last = network[-1]
    if not isinstance(last, nn.Linear) or not 0.0 <= threshold <= MOST:
        raise DataError(f"An exit needs a network of `train_prefilter` and a threshold of 0 to {MOST}.")
    three = nn.Linear(last.in_features, 3)
    with torch.no_grad():
        three.weight.copy_(last.weight[[0, 1, 1]])
        three.bias.copy_(last.bias[[0, 1, 1]] - torch.tensor([0.0, log(2.0), log(2.0)]))
    return nn.Sequential(*list(network)[:-1], three).eval(), float(np.nextafter(1.0 - threshold, 1.0))
