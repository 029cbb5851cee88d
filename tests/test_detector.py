"""A detector cut for the edge: JPEG, 8 bits or a learned bottleneck, and nothing at all for an empty picture.

The detector is a tiny one, trained here on squares in noise; the benchmark does the same to a real one.
"""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from fedge.edge.bundle import load
from fedge.edge.coding.codings import decode, encode
from fedge.edge.coding.report import message_bytes
from fedge.edge.exits.rules import decide
from fedge.edge.runtime.sessions import open_piece
from fedge.edge.split import inject, prefilter
from fedge.edge.split.bottleneck import train_bottleneck
from fedge.edge.split.export import export
from fedge.edge.split.image import Image

pytestmark = pytest.mark.slow

SIZE = 32
THRESHOLD_RECALL = 0.99


def scenes(count, seed):
    """Pictures uint8 [n, 32, 32, 3], their maps [n, 1, 32, 32], and whether there is a square; in every second one."""
    random = np.random.default_rng(seed)
    pictures = random.normal(90, 25, (count, SIZE, SIZE, 3)).clip(0, 255)
    maps = np.zeros((count, 1, SIZE, SIZE), np.float32)
    for row in range(1, count, 2):
        side = int(random.integers(7, 13))
        top, left = random.integers(0, SIZE - side, 2)
        pictures[row, top : top + side, left : left + side] += 90
        maps[row, 0, top : top + side, left : left + side] = 1
    return pictures.clip(0, 255).astype(np.uint8), maps, np.arange(count) % 2


def floats(pictures):
    return torch.from_numpy(pictures.astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()


def fitted(pictures, maps):
    """Three stages: a quarter of the points, then back to a map of logits."""
    parts = [
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 8, 4, padding=2)),
    ]
    network = nn.Sequential(*parts)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(100):
        rows = [(step * 16 + index) % len(pictures) for index in range(16)]
        loss = nn.functional.binary_cross_entropy_with_logits(
            network(floats(pictures[rows])), torch.from_numpy(maps[rows])
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return [part.eval().requires_grad_(requires_grad=False) for part in parts]


def as_onnx(parts):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [], "detector", [value("x", TensorProto.FLOAT, ["N", 3, SIZE, SIZE])],
        [value("map", TensorProto.FLOAT, ["N", 1, SIZE, SIZE])],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    for part, start, end in zip(parts, ("x", "early", "late"), ("early", "late", "map")):
        made.graph.node.extend(inject._translate(made, part, start, end))
    return made


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The bundle's folder, with the bottleneck and the prefilter inside, and the filter's confidence."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pictures, maps, contains = scenes(128, 0)
    parts = fitted(pictures, maps)
    with torch.no_grad():
        early = parts[0](floats(pictures))
        late = parts[1](early).numpy()
    coder = train_bottleneck(
        early.numpy(), late, 4, later=parts[2:], steps=200, batch=32, width=16, rate=1e-2
    )  # fmt: skip
    network = prefilter.train_prefilter(early.numpy(), contains, width=8, steps=120, rate=1e-2)
    held, _, labels = scenes(200, 1)
    with torch.no_grad():
        scores = prefilter.scores(network, parts[0](floats(held)).numpy())
    leave, confidence = prefilter.as_exit(network, prefilter.threshold_for(scores, labels, THRESHOLD_RECALL))
    folder = tmp_path_factory.mktemp("detector")
    plain = as_onnx(parts)
    small = inject.branch(inject.bottleneck(plain, "early", "late", *coder), "early", leave, "empty")
    onnx.save(plain, folder / "plain.onnx")
    onnx.save(small, folder / "small.onnx")
    image = Image(SIZE, SIZE)
    export(folder / "plain.onnx", folder / "plain", cuts=["late"], image=image)
    export(folder / "small.onnx", folder / "small", cuts=["bottleneck"], exits=[("empty", "empty")], image=image)
    torch.set_num_threads(before)
    return folder, confidence


class Split:
    """Head here, tail there, and the bytes between them."""

    def __init__(self, folder: Path, place: str, coding: str) -> None:
        self.bundle = load(folder)
        self.boundary = self.bundle.boundary(place)
        names = [boundary.name for boundary in self.bundle.boundaries]
        stops = names[: names.index(place) + 1]  # a piece ends at each exit's boundary
        self.head = [open_piece(folder, self.bundle, *step) for step in itertools.pairwise(stops)]
        self.tail = open_piece(folder, self.bundle, place, "output")
        self.coding = coding

    def __call__(self, picture):
        """The map, and the bytes of the message that the tail took."""
        (tensor,) = self.boundary.tensors
        sent = {self.bundle.boundaries[0].tensors[0].name: picture}
        for piece in self.head:
            sent = piece.run({name: array for name, array in sent.items() if name != "empty"})
        coded = encode(tensor.name, sent[tensor.name], self.coding)
        out = self.tail.run({tensor.name: decode(coded, tensor)})
        return out["map"], message_bytes(self.boundary.name, [coded])


def overlap(one, other):
    one, other = one > 0, other > 0
    return (one & other).sum() / max(1, (one | other).sum())


def test_a_bottleneck_sends_less_than_jpeg_and_finds_what_the_whole_detector_finds(cut):
    folder, _ = cut
    pictures, _, contains = scenes(40, 2)
    ways = {
        "whole": Split(folder / "plain", "input", "raw"),
        "jpeg": Split(folder / "plain", "input", "jpeg90"),
        "cut": Split(folder / "plain", "late", "u8"),
        "bottleneck": Split(folder / "small", "bottleneck", "u8"),
    }
    agreement, size = {}, {}
    for name, way in ways.items():
        answers = [way(pictures[row : row + 1]) for row in np.flatnonzero(contains)]
        whole = [ways["whole"](pictures[row : row + 1])[0] for row in np.flatnonzero(contains)]
        agreement[name] = np.mean([overlap(one, other) for (one, _), other in zip(answers, whole)])
        size[name] = np.mean([count for _, count in answers])
    assert agreement["whole"] == 1.0
    assert agreement["cut"] > 0.95
    assert agreement["bottleneck"] > 0.75
    assert size["bottleneck"] < 0.5 * size["jpeg"]
    assert size["bottleneck"] < 0.4 * size["cut"] < size["whole"]


def test_empty_pictures_end_at_the_prefilter_and_squares_do_not(cut):
    folder, confidence = cut
    bundle = load(folder / "small")
    leave = bundle.exits[0]
    head = open_piece(folder / "small", bundle, "input", leave.boundary)
    pictures, _, contains = scenes(120, 3)
    feed = bundle.boundaries[0].tensors[0].name
    logits = np.concatenate([head.run({feed: pictures[row : row + 1]})[leave.logits.name] for row in range(120)])
    ends = decide("confidence", [logits], 1.0, confidence)
    assert ends[contains == 1].mean() < 0.05
    assert ends[contains == 0].mean() > 0.8
    assert (logits[ends].argmax(axis=1) == prefilter.NOTHING).all()
