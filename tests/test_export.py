"""Bundles: which boundaries and pieces they have, and that chains of pieces give what the whole model gives."""

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from fedge.core.errors import CannotCut, ModelError
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import INPUT, OUTPUT, Bundle, load
from fedge.edge.split.export import export
from fedge.edge.split.image import Image
from tests import onnx_models
from tests.onnx_models import FLOAT, Array, Net

EXITS = [("early", "exit1"), ("late", "exit2")]


def exported(model: ModelProto, folder: Path, **options: Any) -> Bundle:
    return export(onnx_models.save(model, folder / "model.onnx"), folder / "bundle", **options)


def walk(bundle: Bundle, folder: Path, way: list[str], feeds: dict[str, Array]) -> dict[str, Array]:
    """Run the pieces along a way of boundaries; each gets what those before it gave, and the side inputs."""
    tensors = dict(feeds)
    for start, end in pairwise(way):
        piece = bundle.piece(start, end)
        given = {tensor.name: tensors[tensor.name] for tensor in piece.inputs}
        made = onnx_models.run((folder / piece.file).read_bytes(), given, folder)
        assert list(made) == [tensor.name for tensor in piece.outputs]
        tensors |= made
    return tensors


def ways(bundle: Bundle) -> list[list[str]]:
    """Every chain of pieces from input to output."""
    found, open_ways = [], [[INPUT]]
    while open_ways:
        way = open_ways.pop()
        for piece in bundle.pieces:
            if piece.start == way[-1]:
                (found if piece.end == OUTPUT else open_ways).append([*way, piece.end])
    return found


def test_a_bundle_offers_the_cuts_that_shrink_the_data(tmp_path: Path) -> None:
    bundle = exported(onnx_models.resnet(), tmp_path)
    assert [boundary.name for boundary in bundle.boundaries] == [
        INPUT, "relu2", "maxpool3", "globalaveragepool48", OUTPUT,
    ]  # fmt: skip
    assert load(tmp_path / "bundle") == bundle
    assert bundle.model == "model"
    assert bundle.boundary(INPUT).tensors[0].shape == (-1, 3, 32, 32)
    assert bundle.boundary(OUTPUT).tensors[0].shape == (-1, 10)
    assert len(bundle.pieces) == 10  # from each boundary to each later one
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == ["bundle.json", "pieces", "weights.data"]


@pytest.mark.parametrize("batch", [1, 3])
def test_every_chain_of_pieces_gives_what_the_whole_gives(batch: int, tmp_path: Path) -> None:
    model = onnx_models.resnet()
    bundle = exported(model, tmp_path, cuts=["relu6", "stage0", "stage2"])
    feeds = onnx_models.feeds(model, batch=batch)
    whole = onnx_models.run(model.SerializeToString(), feeds)
    chains = ways(bundle)
    assert len(chains) == 8
    for way in chains:
        assert np.array_equal(walk(bundle, tmp_path / "bundle", way, feeds)["logits"], whole["logits"]), way


def test_exits_answer_on_the_way_and_tails_leave_them_out(tmp_path: Path) -> None:
    model = onnx_models.resnet(exits=True)
    bundle = exported(model, tmp_path, cuts=["maxpool3", "relu31", "stage3"], exits=EXITS, classes=list("abcdefghij"))
    line = [INPUT, "maxpool3", "stage1", "relu31", "stage2", "stage3", OUTPUT]
    assert [boundary.name for boundary in bundle.boundaries] == line
    assert [(leave.name, leave.boundary, leave.logits.shape) for leave in bundle.exits] == [
        ("early", "stage1", (-1, 10)),
        ("late", "stage2", (-1, 10)),
    ]
    assert [tensor.name for tensor in bundle.boundary(OUTPUT).tensors] == ["logits"]
    joined = {(piece.start, piece.end): piece.exits for piece in bundle.pieces if piece.end != OUTPUT}
    assert joined == {
        (INPUT, "maxpool3"): (),
        (INPUT, "stage1"): ("early",),
        ("maxpool3", "stage1"): ("early",),
        ("stage1", "relu31"): (),
        ("stage1", "stage2"): ("late",),
        ("relu31", "stage2"): ("late",),
        ("stage2", "stage3"): (),
    }
    tails = [piece for piece in bundle.pieces if piece.end == OUTPUT]
    assert [piece.start for piece in tails] == line[:-1]
    for piece in tails:
        assert piece.exits == ()
        assert [tensor.name for tensor in piece.outputs] == ["logits"]
    feeds = onnx_models.feeds(model)
    whole = onnx_models.run(model.SerializeToString(), feeds)
    for way in (
        [INPUT, "stage1", "stage2", OUTPUT],
        [INPUT, "maxpool3", "stage1", "relu31", "stage2", "stage3", OUTPUT],
    ):
        made = walk(bundle, tmp_path / "bundle", way, feeds)
        assert all(np.array_equal(made[name], value) for name, value in whole.items()), way


def test_an_exit_at_an_inner_tensor_needs_no_output_of_the_model(tmp_path: Path) -> None:
    model = onnx_models.resnet(exits=True)
    feeds = onnx_models.feeds(model)
    whole = onnx_models.run(model.SerializeToString(), feeds)
    del model.graph.output[1:]
    bundle = exported(model, tmp_path, cuts=[], exits=EXITS)
    made = walk(bundle, tmp_path / "bundle", [INPUT, "stage1", "stage2", OUTPUT], feeds)
    assert all(np.array_equal(made[name], value) for name, value in whole.items())


def test_a_decoder_with_caches_is_split_and_each_side_keeps_its_own(tmp_path: Path) -> None:
    model = onnx_models.decoder()
    bundle = exported(model, tmp_path, cuts=["layer.0", "layer.1"])
    tail = bundle.piece("layer.0", OUTPUT)
    names = {tensor.name for tensor in tail.inputs}
    assert names >= {"layer.0", "mask", "positions", "past.1.k", "past.2.v"}
    assert names.isdisjoint({"ids", "past.0.k"})
    assert [tensor.name for tensor in tail.outputs] == [
        "logits", "present.1.k", "present.1.v", "present.2.k", "present.2.v",
    ]  # fmt: skip
    feeds = onnx_models.feeds(model)
    whole = onnx_models.run(model.SerializeToString(), feeds)
    for way in ways(bundle):
        made = walk(bundle, tmp_path / "bundle", way, feeds)
        assert all(np.array_equal(made[name], value) for name, value in whole.items()), way


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_picture_becomes_the_input(layout: str, tmp_path: Path) -> None:
    model = onnx_models.resnet()
    if layout == "NHWC":
        turn = onnx.helper.make_node("Transpose", ["picture"], ["x"], perm=[0, 3, 1, 2])
        nodes = [turn, *model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.input[0].CopyFrom(onnx.helper.make_tensor_value_info("picture", FLOAT, ["batch", 32, 32, 3]))
    image = Image(32, 32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), layout=layout)
    bundle = exported(model, tmp_path, image=image)
    (picture,) = bundle.boundary(INPUT).tensors
    assert (picture.name, picture.dtype, picture.shape) == ("image", "uint8", (-1, 32, 32, 3))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    scaled = ((pixels / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).astype(np.float32)
    feed = scaled if layout == "NHWC" else scaled.transpose(0, 3, 1, 2)
    whole = onnx_models.run(model.SerializeToString(), {model.graph.input[0].name: feed})["logits"]
    way = [boundary.name for boundary in bundle.boundaries]
    assert len(way) > 3
    made = walk(bundle, tmp_path / "bundle", way, {"image": pixels})["logits"]
    np.testing.assert_allclose(made, whole, rtol=1e-4, atol=1e-5)
    sizes = [np.prod(boundary.tensors[0].shape[1:]) for boundary in bundle.boundaries[1:-1]]
    assert max(sizes) * 2 < 32 * 32 * 3  # a picture of bytes is what a cut must undercut


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image(16, 32), r"takes \[3, 32, 32\], not \[3, 16, 32\]; give the image the model's size"),
        (Image(32, 32, layout="NHWC"), "give the image the model's size"),
        (Image(32, 32, layout="CHWN"), "layout 'CHWN' is unknown"),
        (Image(32, 32, std=(1.0, 0.0, 1.0)), "must be positive"),
        (Image(32, 32, scale=-1.0), "must be positive"),
    ],
)
def test_a_picture_that_the_model_does_not_take_is_refused(image: Image, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        exported(onnx_models.resnet(), tmp_path, image=image)


def test_weights_are_written_once_and_only_those_in_use(tmp_path: Path) -> None:
    model = onnx_models.resnet()
    model.graph.initializer.append(numpy_helper.from_array(np.full(5000, 7.0), "unused"))
    used = sum(len(tensor.raw_data) for tensor in model.graph.initializer if 1024 <= len(tensor.raw_data) < 40000)
    bundle = exported(model, tmp_path)
    size, _ = bundle.files["weights.data"]
    assert used <= size < used + 64 * len(model.graph.initializer)


def test_the_same_model_gives_the_same_bundle_inline_or_not(tmp_path: Path) -> None:
    model = onnx_models.resnet(exits=True)
    versions = []
    for name, external in (("a", False), ("b", False), ("c", True)):
        (tmp_path / name).mkdir()
        path = onnx_models.save(model, tmp_path / name / "model.onnx", external)
        versions.append(export(path, tmp_path / name / "bundle", exits=EXITS).version)
    assert len(set(versions)) == 1


def test_no_more_than_eight_cuts_are_offered_unasked(tmp_path: Path) -> None:
    net = Net()
    x, width = "x", 64
    for _ in range(12):
        x, width = net.op("Tanh", net.op("MatMul", x, net.weight(width, width - 4))), width - 4
    net.op("MatMul", x, net.weight(width, 2), name="y")
    bundle = exported(net.model({"x": (FLOAT, [1, 64])}, {"y": (FLOAT, [1, 2])}), tmp_path)
    assert len(bundle.boundaries) == 10
    assert bundle.boundaries[-2].tensors[0].shape == (1, 16)


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"cuts": ["nowhere"]}, CannotCut, "no tensor 'nowhere'"),
        ({"exits": [("a", "nowhere")]}, CannotCut, "makes no tensor 'nowhere'"),
        ({"exits": [("a", "exit1"), ("a", "exit2")]}, CannotCut, "Two exits share"),
        ({"exits": [("a", "exit1"), ("b", "exit1")]}, CannotCut, "Two exits share"),
        ({"exits": [("a", "x")]}, CannotCut, "does not vary with the input 'x'"),
        ({"exits": [("a", "conv0")]}, CannotCut, "No cut lies before the exit 'conv0'; attach it further on"),
        ({"classes": ["cat", "dog"]}, ModelError, r"2 classes are named, but the output has the shape \[-1, 10\]"),
        ({"limits": EdgeLimits(max_pieces=3)}, ModelError, "more than the 3 allowed; name fewer cuts"),
        ({"limits": EdgeLimits(max_weights_bytes=9999)}, ModelError, "The weights have more than 9999 bytes"),
    ],
)
def test_a_refused_export_leaves_nothing_behind(
    options: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=reason):
        exported(onnx_models.resnet(exits=True), tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    exported(onnx_models.resnet(), tmp_path)
    with pytest.raises(ModelError, match="is not an empty folder; name a new one"):
        exported(onnx_models.resnet(), tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="cannot be written"):
        export(tmp_path / "model.onnx", tmp_path / "file" / "bundle")


def test_a_model_that_does_not_read_its_input_is_refused(tmp_path: Path) -> None:
    net = Net()
    net.op("Add", "z", net.const([1.0]), name="y")
    model = net.model({"x": (FLOAT, [1, 4]), "z": (FLOAT, [1, 4])}, {"y": (FLOAT, [1, 4])})
    with pytest.raises(CannotCut, match="No output varies with the input 'x'; name another as primary"):
        exported(model, tmp_path)
    assert export(tmp_path / "model.onnx", tmp_path / "bundle", primary="z").boundaries[0].tensors[0].name == "z"


@pytest.mark.parametrize("batch", [1, 2])
def test_a_shape_asked_of_a_tensor_whose_extents_are_unknown_is_not_made_up(batch: int, tmp_path: Path) -> None:
    """What torch writes for x.view(x.size(0), -1) and a later .size(1)."""
    net = Net()
    shape = net.op("Concat", net.op("Shape", "x", start=0, end=1), net.const([-1], np.int64), axis=0)
    p = net.op("Softmax", net.op("Reshape", net.op("Tanh", "x"), shape))
    rows = net.op("Cast", net.op("Shape", p, start=0, end=1), to=FLOAT)
    both = net.op("Cast", net.op("ReduceProd", net.op("Shape", p)), to=FLOAT)
    width = net.op("Sqrt", net.op("Cast", net.op("Shape", p, start=1, end=2), to=FLOAT))
    p = net.op("Add", net.op("Add", net.op("Div", p, width), rows), both)
    net.op("MatMul", p, net.weight(6, 4), name="y")
    model = net.model({"x": (FLOAT, ["batch", 2, 3])}, {"y": (FLOAT, ["batch", 4])})
    bundle = exported(model, tmp_path)
    feeds = onnx_models.feeds(model, batch=batch)
    whole = onnx_models.run(model.SerializeToString(), feeds)["y"]
    made = walk(bundle, tmp_path / "bundle", [INPUT, OUTPUT], feeds)["y"]
    np.testing.assert_allclose(made, whole, rtol=1e-6)


def test_no_cut_leaves_an_output_of_the_model_behind(tmp_path: Path) -> None:
    model = onnx_models.resnet(exits=True)
    bundle = exported(model, tmp_path)
    assert [boundary.name for boundary in bundle.boundaries] == [INPUT, "relu2", "maxpool3", OUTPUT]
    names = [tensor.name for tensor in bundle.boundary(OUTPUT).tensors]
    assert names == ["logits", "exit1", "exit2"]
    assert all([tensor.name for tensor in tail.outputs] == names for tail in bundle.pieces if tail.end == OUTPUT)
    path = tmp_path / "model.onnx"
    with pytest.raises(CannotCut, match="output 'exit1' of the model lies before the cut 'stage2'"):
        export(path, tmp_path / "other", cuts=["stage2"])
    with pytest.raises(CannotCut, match="output 'exit1' of the model lies before the cut 'stage2'"):
        export(path, tmp_path / "other", exits=[("late", "exit2")])
    assert not (tmp_path / "other").exists()


def test_a_side_output_of_the_input_alone_keeps_no_cut_away(tmp_path: Path) -> None:
    """It runs first, wherever it stands in the file."""
    net = Net()
    part = net.op("Softmax", net.op("MatMul", "x", net.weight(8, 4)), name="part")
    net.op("MatMul", net.op("Mul", part, "mask"), net.weight(4, 3), name="y")
    net.op("Exp", "x", name="side")
    inputs = {"x": (FLOAT, ["batch", 8]), "mask": (FLOAT, ["batch", 4])}
    model = net.model(inputs, {"y": (FLOAT, ["batch", 3]), "side": (FLOAT, ["batch", 8])})
    bundle = exported(model, tmp_path, cuts=["part"])
    assert [tensor.name for tensor in bundle.piece(INPUT, "part").outputs] == ["part", "side"]
    feeds = onnx_models.feeds(model)
    made = walk(bundle, tmp_path / "bundle", [INPUT, "part", OUTPUT], feeds)
    whole = onnx_models.run(model.SerializeToString(), feeds)
    assert all(np.array_equal(made[name], value) for name, value in whole.items())


@pytest.mark.parametrize("name", ["batch", None])
def test_only_the_batch_is_called_so(name: str | None, tmp_path: Path) -> None:
    net = Net()
    windows = net.op("Reshape", "x", net.const([-1, 4], np.int64))
    part = net.op("Softmax", net.op("MatMul", windows, net.weight(4, 4)), name="windows")
    whole = net.op("Reshape", net.op("MatMul", part, net.weight(4, 4)), net.const([-1, 8], np.int64))
    net.op("Softmax", net.op("MatMul", "x", net.weight(8, 4)), name="rows")
    net.op("MatMul", net.op("Concat", whole, "rows", axis=1), net.weight(12, 3), name="y")
    bundle = exported(net.model({"x": (FLOAT, [name, 8])}, {"y": (FLOAT, [None, 3])}), tmp_path, cuts=["rows"])
    assert {each.name: each.shape for boundary in bundle.boundaries for each in boundary.tensors} == {
        "x": (-1, 8), "reshape4": (-2, 8), "rows": (-1, 4), "y": (-2, 3),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [True, False])
def test_what_torch_exports_is_split(optimize: bool, tmp_path: Path) -> None:
    import torch
    from torch import nn

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
            self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.GELU())
            self.last = nn.Linear(8 * 64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.second(self.first(x)).flatten(1))

    torch.manual_seed(0)
    net, path = Small().eval(), tmp_path / "model.onnx"
    sizes = ({0: torch.export.Dim("batch")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            net, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=sizes, optimize=optimize, verbose=False
        )
        assert program is not None
        program.save(str(path), external_data=True)
    bundle = export(path, tmp_path / "bundle", image=Image(32, 32))
    assert all(len(boundary.tensors) == 1 for boundary in bundle.boundaries)
    assert len(bundle.boundaries) == 3
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    with torch.no_grad():
        wanted = net(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255).numpy()
    for way in ways(bundle):
        made = walk(bundle, tmp_path / "bundle", way, {"image": pixels})
        name = bundle.boundary(OUTPUT).tensors[0].name
        np.testing.assert_allclose(made[name], wanted, rtol=1e-4, atol=1e-5)
