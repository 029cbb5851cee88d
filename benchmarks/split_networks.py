"""The networks of the split benchmark as bundles, each with real inputs, and what counts as the right answer.

Lite0 with ImageNet weights on crops of photographs, the CIFAR-10 network with exits on CIFAR-10, and the text detector
of PP-OCRv4 on pages and signs. Owns their export and what held-out samples say of them. Must never touch a network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import exit_network, text_images
from benchmarks.efficientnet_lite import MEAN, SIDE, STD, pretrained
from benchmarks.feature_coding import member, wheel
from fedge.core.params import Array
from fedge.edge.assess import assess, same_class
from fedge.edge.bundle import Bundle
from fedge.edge.exits.to_onnx import to_onnx
from fedge.edge.split.export import export
from fedge.edge.split.image import Image

DATA = exit_network.CIFAR.parent
HELD_OUT = {"Lite0": 100, "CIFAR-10 with exits": 3000, "PP-OCRv4 detector": 16}
TEXT, DETECTOR_SIDE = 0.3, 320
LOSE = 0.01
DETECTOR_MEAN, DETECTOR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Network:
    """A bundle in `folder`, samples to ask with [n, ...], and how right an answer is, `judge(outputs, truth) -> [n]`.

    `truth` is None where the full model's answer is the measure. The device is `slower` times slower than the cloud.
    """

    name: str
    slower: float
    folder: Path
    bundle: Bundle
    samples: Array
    truth: Array | None
    judge: Callable[[Array, Array], Array]


def lite0(folder: Path, asked: int) -> Network:
    """224 x 224 photographs; right is what the full model says, since they have no labels."""
    model, path = pretrained(DATA / "efficientnet-lite0.safetensors"), folder / "lite0.onnx"
    to_onnx(model, torch.zeros(1, 3, SIDE, SIDE), path)
    image = Image(SIDE, SIDE, (MEAN / 255,) * 3, (STD / 255,) * 3)
    export(path, folder / "lite0", image=image)
    photographs = wheel("scikit_image")
    held, _ = text_images.images(text_images.photographs(photographs, test=False), 2 * HELD_OUT["Lite0"], SIDE, 1)
    fresh, _ = text_images.images(text_images.photographs(photographs, test=True), 2 * asked, SIDE, 2)
    bundle = assess(folder / "lite0", held[::2], lose=LOSE)
    return Network("Lite0", 10.0, folder / "lite0", bundle, fresh[::2], None, same_class)


def cifar(folder: Path, asked: int) -> Network:
    """32 x 32 images with labels; three exits."""
    model, _ = exit_network.trained(exits=True)
    path = folder / "cifar.onnx"
    exits = to_onnx(model.eval(), exit_network.tensor(np.zeros((1, 32, 32, 3), np.uint8)), path)
    export(path, folder / "cifar", exits=exits, image=Image(32, 32, (0.5,) * 3, (0.25,) * 3))
    sides = exit_network.sides()
    x, y = sides["held out"]
    count = HELD_OUT["CIFAR-10 with exits"]
    bundle = assess(folder / "cifar", x[:count], y[:count], lose=LOSE / 2)
    fresh, truth = sides["test"]
    return Network("CIFAR-10 with exits", 100.0, folder / "cifar", bundle, fresh[:asked], truth[:asked], same_class)


def detector(folder: Path, asked: int) -> Network:
    """320 x 320 pages and signs; right is the share of the full model's text map that is found (overlap)."""
    path = folder / "detector.onnx"
    path.write_bytes(member("rapidocr_onnxruntime", "det_infer.onnx"))
    side = DETECTOR_SIDE
    shapes = {"x": (1, 3, side, side)}
    export(path, folder / "detector", shapes=shapes, image=Image(side, side, DETECTOR_MEAN, DETECTOR_STD))
    photographs = wheel("scikit_image")
    known = text_images.photographs(photographs, test=False)
    held, _ = text_images.images(known, 2 * HELD_OUT["PP-OCRv4 detector"], side, 1)
    fresh, _ = text_images.images(text_images.photographs(photographs, test=True), 2 * asked, side, 2)
    held, fresh = (np.ascontiguousarray(pictures[1::2, ..., ::-1]) for pictures in (held, fresh))  # blue comes first
    bundle = assess(folder / "detector", held, lose=LOSE, judge=overlaps)
    return Network("PP-OCRv4 detector", 5.0, folder / "detector", bundle, fresh, None, overlaps)


def overlaps(found: Array, full: Array) -> NDArray[np.float64]:
    """Intersection over union of two text maps, per sample [n]; 1 where neither has text."""
    ours, theirs = found > TEXT, full > TEXT
    axes = tuple(range(1, found.ndim))
    union = (ours | theirs).sum(axis=axes)
    both = (ours & theirs).sum(axis=axes)
    return np.where(union == 0, 1.0, both / np.maximum(union, 1))


ALL: dict[str, tuple[Callable[[Path, int], Network], int]] = {  # and how many samples are asked
    "CIFAR-10 with exits": (cifar, 64),
    "Lite0": (lite0, 10),
    "PP-OCRv4 detector": (detector, 10),
}
