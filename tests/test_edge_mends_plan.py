"""What is checked of a bundle before it is there, which rows are samples, and what figures and times are of."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from fedge.core.errors import CannotCut
from fedge.edge.bundle import INPUT, OUTPUT, load
from fedge.edge.split import verify as verifying
from fedge.edge.split.export import export
from fedge.edge.split.graph import open_graph
from fedge.edge.split.image import Image
from fedge.edge.split.verify import verify
from tests import onnx_models
from tests.onnx_models import FLOAT, INT64, Net


def exported(model: ModelProto, folder: Path, **options: Any) -> list[str]:
    """What was said of the check."""
    said: list[str] = []
    path = onnx_models.save(model, folder / "model.onnx")
    export(path, folder / "bundle", on_checked=said.append, **options)
    return said


def liar(square: bool) -> ModelProto:
    """A tensor of twice as many rows as the input, or of their square, is declared to have as many; then somebody asks
    for its rows.
    """
    net = Net(11)
    grid = net.op("MatMul", "x", net.op("Transpose", "x", perm=[1, 0]))
    other = net.op("Reshape", grid if square else "x", net.const([-1, 1 if square else 4], np.int64), name="other")
    rows = net.op("Cast", net.op("Shape", other, start=0, end=1), to=FLOAT)
    cut = net.op("Softmax", net.op("MatMul", "x", net.weight(8, 4)), name="cut")
    net.op("Mul", net.op("MatMul", cut, net.weight(4, 3)), rows, name="y")
    model = net.model({"x": (FLOAT, ["n", 8])}, {"y": (FLOAT, ["n", 3])})
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("other", FLOAT, ["n", 1 if square else 4]))
    return model


# ---- the pieces against the whole ---------------------------------------------------------------


@pytest.mark.parametrize("square", [False, True])  # the latter is right for a batch of one
def test_an_export_whose_pieces_differ_from_the_model_is_refused(square: bool, tmp_path: Path) -> None:
    with pytest.raises(CannotCut, match="gives another 'y' than the whole model does; name other cuts"):
        exported(liar(square), tmp_path, cuts=["cut"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("image", [None, Image(32, 32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))])
def test_what_was_compared_is_said(image: Image | None, tmp_path: Path) -> None:
    exits = [("early", "exit1"), ("late", "exit2")]
    said = exported(onnx_models.resnet(exits=True), tmp_path, exits=exits, image=image)
    count = len(load(tmp_path / "bundle").pieces)
    assert said == [f"on one random input {count} of {count} pieces give what the whole model gives, bit for bit"]


def test_a_model_with_caches_and_one_of_a_fixed_batch_are_compared(tmp_path: Path) -> None:
    for name, model in (("decoder", onnx_models.decoder()), ("shuffle", onnx_models.shufflenet())):
        (tmp_path / name).mkdir()
        assert "bit for bit" in exported(model, tmp_path / name)[0]


def test_a_piece_with_other_weights_is_found_and_its_cut_named(tmp_path: Path) -> None:
    """One tail of three is changed; every order of checks but one by one would name another."""
    exported(onnx_models.resnet(), tmp_path, cuts=["stage0", "stage2"])
    bundle, graph = load(tmp_path / "bundle"), open_graph(tmp_path / "model.onnx")
    for start, end in (("stage2", OUTPUT), ("stage0", OUTPUT), (INPUT, "stage0"), ("stage0", "stage2")):
        path = tmp_path / "bundle" / bundle.piece(start, end).file
        before = path.read_bytes()
        piece = onnx.load_model_from_string(before)
        spread = next(node for node in piece.graph.node if node.op_type == "Relu")
        spread.op_type = "Tanh"
        path.write_bytes(piece.SerializeToString())
        named = "'stage2'" if (start, end) == ("stage0", "stage2") else "'stage0'"
        with pytest.raises(CannotCut, match=named if start != "stage2" else "'stage2'"):
            verify(tmp_path / "model.onnx", tmp_path / "bundle", graph, bundle)
        path.write_bytes(before)
    assert "bit for bit" in verify(tmp_path / "model.onnx", tmp_path / "bundle", graph, bundle)


def test_what_is_not_compared_is_said(tmp_path: Path) -> None:
    net = Net(12)
    noise = net.op("RandomNormalLike", "x")
    net.op("Relu", net.op("Add", "x", noise), name="y")
    (tmp_path / "random").mkdir()
    said = exported(net.model({"x": (FLOAT, ["n", 8])}, {"y": (FLOAT, ["n", 8])}), tmp_path / "random", cuts=[])
    assert said == ["not checked, as RandomNormalLike gives something else each time"]
    net = Net(13)
    net.op("Gather", net.weight(4, 3), net.op("Add", "x", net.const(9, np.int64)), name="y")
    (tmp_path / "table").mkdir()
    model = net.model({"x": (INT64, ["n"])}, {"y": (FLOAT, ["n", 3])})
    (said_of_it,) = exported(model, tmp_path / "table", cuts=[])
    assert said_of_it.startswith("not checked, as the whole model does not run on random numbers (")
    path = onnx_models.save(onnx_models.resnet(), tmp_path / "model.onnx")
    bundle = export(path, tmp_path / "bundle")
    told = verify(path, tmp_path / "bundle", open_graph(path), bundle, limit_s=0.0)
    assert told.startswith("not checked") or told.endswith("the others would take more than 0 s")


def test_gaps_are_told_from_what_is_the_same() -> None:
    one = np.array([1.0, np.nan, np.inf, -2.0], np.float32)
    assert verifying._gap(one, one.copy()) == 0.0
    assert verifying._gap(one, one + np.float32([1e-4, 0, 0, 0])) == pytest.approx(5e-5, rel=0.01)
    for other in (one[:3], one.astype(np.float64), np.nan_to_num(one), -one):
        assert verifying._gap(one, other) > verifying.CLOSE
    assert verifying._gap(np.array([1, 2]), np.array([1, 3])) == np.inf
    assert verifying._gap(np.zeros(2), np.full(2, 1e-30)) == np.inf


# ---- which rows are samples ---------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["batch", "rows", None])
def test_a_flatten_written_as_a_reshape_keeps_the_batch(outputs: str | None, tmp_path: Path) -> None:
    """As PyTorch's x.view(-1, 32) is exported; what the exporter calls the rows after it is its own affair."""
    model = onnx_models.resnet()
    for node in model.graph.node:
        if node.op_type == "Flatten":
            node.op_type = "Reshape"
            node.input.append("flat")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 32]), "flat"))
    dim = model.graph.output[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    if outputs:
        dim.dim_param = outputs
    assert "bit for bit" in exported(model, tmp_path)[0]
    bundle = load(tmp_path / "bundle")
    assert {tensor.shape[0] for boundary in bundle.boundaries for tensor in boundary.tensors} == {-1}
