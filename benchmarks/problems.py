"""Small learning problems on real images, quick enough that thousands of whole federations fit into an hour.

fashion     Fashion-MNIST (the images that come with fedge), averaged over 2 x 2 pixels: 14 x 14
cifar       CIFAR-10 seen through random patches: FILTERS of them, taken from the training images and whitened, are laid
            over each image; both signs of the response, pooled over quarters, are its fixed features (Coates, Ng, Lee,
            "An Analysis of Single-Layer Networks in Unsupervised Feature Learning", AISTATS 2011)

On either trains the perceptron of `perceptron.py`. Data sets and trainer are named in experiment files by dotted path.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.perceptron import Perceptron
from fedge.client.data import Dataset, load
from fedge.core.random import generator

HIDDEN, BATCH, RATE = 24, 32, 0.2
TRAIN, TEST = 8000, 2000
FILTERS, PATCH = 64, 6
SPREAD = 0.15  # standard deviation of a CIFAR feature: as long as the other problem's examples, so one rate suits both
CIFAR = Path(os.environ.get("FEDGE_DATA", Path.home() / ".cache" / "fedge-data")) / "cifar10.npz"
Images = NDArray[np.float32]


@cache
def fashion() -> Dataset:
    """10 classes, 196 features in 0..1."""
    whole = load("fashion-mnist")

    def small(images: NDArray[np.uint8]) -> Images:
        return images.reshape(-1, 14, 2, 14, 2).mean((2, 4), dtype=np.float32) / 255

    return Dataset(small(whole.x_train[:TRAIN]), whole.y_train[:TRAIN], small(whole.x_test[:TEST]), whole.y_test[:TEST])


@cache
def cifar() -> Dataset:
    """10 classes, 8 FILTERS features; made once and kept beside the images."""
    kept = CIFAR.with_name(f"cifar10-features-{FILTERS}-{TRAIN}.npz")
    if not kept.exists():
        partial = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, **_cifar_features())
        partial.replace(kept)
    with np.load(kept, allow_pickle=False) as found:
        return Dataset(**{name: found[name] for name in found.files})


def perceptron(experiment: Any, dataset: Dataset) -> Perceptron:
    """The trainer."""
    return Perceptron(dataset, HIDDEN, BATCH, RATE, experiment.experiment.seed)


def _cifar_features() -> dict[str, Any]:
    with np.load(CIFAR, allow_pickle=False) as whole:
        sides = {side: (whole[f"x_{side}"][:count], whole[f"y_{side}"][:count]) for side, count in _SIDES.items()}
    bank = _filters(sides["train"][0])
    features = {side: _features(x, *bank) for side, (x, _) in sides.items()}
    mean, scale = features["train"].mean(axis=0), features["train"].std(axis=0) / np.float32(SPREAD)
    return {
        key: value
        for side, (_, y) in sides.items()
        for key, value in ((f"x_{side}", (features[side] - mean) / scale), (f"y_{side}", y))
    }


_SIDES = {"train": TRAIN, "test": TEST}


def _patches(images: NDArray[np.uint8]) -> Images:
    """Every patch of every image, its mean and contrast taken out: [images, positions, 3 PATCH^2]."""
    windows = np.lib.stride_tricks.sliding_window_view(images.astype(np.float32), (PATCH, PATCH), (1, 2))
    flat = windows.reshape(len(images), -1, 3 * PATCH * PATCH)
    flat = flat - flat.mean(-1, keepdims=True)
    whole: Images = flat / np.sqrt(flat.var(-1, keepdims=True) + 10)
    return whole


def _filters(images: NDArray[np.uint8]) -> tuple[Images, Images, Images]:
    """(FILTERS whitened patches, the mean patch, the whitening matrix)."""
    random = generator(0, "patches")
    some = _patches(images[random.choice(len(images), 300, replace=False)]).reshape(-1, 3 * PATCH * PATCH)
    mean = some.mean(0)
    values, vectors = np.linalg.eigh(np.cov((some - mean).T))
    whitening = ((vectors / np.sqrt(values + 0.1)) @ vectors.T).astype(np.float32)
    chosen = (some[random.choice(len(some), FILTERS, replace=False)] - mean) @ whitening
    return chosen / np.linalg.norm(chosen, axis=1, keepdims=True), mean, whitening


def _features(images: NDArray[np.uint8], filters: Images, mean: Images, whitening: Images) -> Images:
    """Rectified responses of both signs, averaged over the quarters of an image: [images, 8 FILTERS]."""
    edge = 32 - PATCH + 1
    cut = (edge + 1) // 2
    found = np.empty((len(images), 8 * len(filters)), np.float32)
    for low in range(0, len(images), 100):
        patches = _patches(images[low : low + 100])
        responses = (((patches - mean) @ whitening) @ filters.T).reshape(len(patches), edge, edge, -1)
        both = np.maximum(np.concatenate([responses, -responses], -1) - np.float32(0.25), 0)
        quarters = [both[:, rows, columns].mean((1, 2)) for rows in _cuts(cut) for columns in _cuts(cut)]
        found[low : low + 100] = np.concatenate(quarters, 1)
    return found


def _cuts(at: int) -> tuple[slice, slice]:
    return slice(None, at), slice(at, None)
