"""Small models for 28 x 28 grey images in ten classes (Fashion-MNIST, digits), as factories without arguments.

A factory is what `[model] factory` of an experiment names. The trainer seeds torch before it calls one.
"""

from torch import nn


def linear() -> nn.Module:
    """Softmax regression, 7 850 parameters; the loss is convex."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def mlp() -> nn.Module:
    """One hidden layer of 128, 101 770 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    """Two convolutions and two linear layers, 54 314 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
