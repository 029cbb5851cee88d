"""Where graphs are cut, what is refused of a file before that, and with which reason."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from fedge.core.errors import CannotCut, ModelError
from fedge.core.limits import EdgeLimits
from fedge.edge.split.graph import Graph, cut_at, cuts, open_graph
from tests import onnx_models
from tests.onnx_models import FLOAT, Net


def opened(model: ModelProto, folder: Path, **options: Any) -> Graph:
    return open_graph(onnx_models.save(model, folder / "m.onnx"), **options)


def names(graph: Graph, most: int = 2, **options: Any) -> list[str]:
    return [cut.name for cut in cuts(graph, most, **options)]


def test_a_resnet_is_cut_between_its_blocks_and_not_within_fused_groups(tmp_path: Path) -> None:
    graph = opened(onnx_models.resnet(), tmp_path)
    single = names(graph, 1)
    assert single == [
        "relu2",
        "maxpool3",
        *(f"stage{stage}" for stage in range(4)),
        "globalaveragepool48",
        "flatten49",
    ]
    double = cuts(graph, 2)
    assert {tensor.name for cut in double for tensor in cut.tensors} >= {"relu6", "relu9"}
    grouped = ("conv", "batchnormalization", "add")
    assert not [cut for cut in double for tensor in cut.tensors if tensor.name.startswith(grouped)]
    assert [cut.position for cut in double] == sorted({cut.position for cut in double})
    assert len(names(graph, 2, inside=True)) > 2 * len(double)


def test_activations_written_as_several_operators_are_one_group(tmp_path: Path) -> None:
    graph = opened(onnx_models.squeezenet(), tmp_path)
    assert names(graph)[-4:] == ["swish", "gelu", "globalaveragepool26", "flatten27"]


def test_a_tensor_that_a_skip_reads_too_stays_a_cut_before_its_activation(tmp_path: Path) -> None:
    net = Net()
    x = net.op("MaxPool", "x", kernel_shape=[2, 2], strides=[2, 2], name="before")
    net.op("Add", x, net.conv(net.op("Relu", x), 3, 3), name="y")
    model = net.model({"x": (FLOAT, [1, 3, 8, 8])}, {"y": (FLOAT, [1, 3, 4, 4])})
    assert names(opened(model, tmp_path)) == ["before"]


def test_a_decoder_is_cut_at_its_residual_sums_whatever_else_it_takes_and_gives(tmp_path: Path) -> None:
    graph = opened(onnx_models.decoder(), tmp_path)
    single = cuts(graph, 1)
    assert {f"layer.{i}" for i in range(3)} | {f"attended.{i}" for i in range(3)} <= {cut.name for cut in single}
    shapes = {cut.name: [(tensor.name, tensor.shape) for tensor in cut.tensors] for cut in single}
    assert shapes["layer.1"] == [("layer.1", (-1, 3, 16))]  # though later layers ask the shape of the ids


def test_a_graph_with_if_is_cut_around_it_and_never_within(tmp_path: Path) -> None:
    graph = opened(onnx_models.branching(), tmp_path)
    assert names(graph, 1)[:3] == ["relu2", "chosen", "after"]
    with pytest.raises(CannotCut, match="no tensor 'then_branch' outside the bodies of If"):
        cut_at(graph, "then_branch")


@pytest.mark.parametrize("build", [onnx_models.resnet, onnx_models.squeezenet, onnx_models.shufflenet])
def test_no_cut_of_one_tensor_is_missed(build: Callable[[], ModelProto], tmp_path: Path) -> None:
    """By brute force: a tensor cuts the graph if without it no path leads from the input to the output."""
    graph = opened(build(), tmp_path)
    wanted = {name for node in graph.nodes for name in node.outputs if not _reaches(graph, {name})}
    assert {cut.name for cut in cuts(graph, 1, inside=True)} == wanted - {"logits"}


def test_every_pair_that_cuts_at_a_position_truly_cuts(tmp_path: Path) -> None:
    graph = opened(onnx_models.resnet(), tmp_path)
    pairs = [{tensor.name for tensor in cut.tensors} for cut in cuts(graph, 2, inside=True)]
    assert not [pair for pair in pairs if _reaches(graph, pair)]
    assert max(map(len, pairs)) == 2


def _reaches(graph: Graph, without: set[str]) -> bool:
    data = {graph.primary}
    for node in graph.nodes:
        if data & set(node.inputs):
            data |= set(node.outputs) - without
    return "logits" in data


def test_a_branch_to_a_side_output_is_no_reason_to_keep_a_tensor(tmp_path: Path) -> None:
    net = Net()
    x = net.cnr("x", 3, 8)
    net.head(net.cnr(x, 8, 8), 8, 5, "main")
    net.head(x, 8, 5, "side")  # last in the file, though it could run early
    shape = (FLOAT, ["n", 5])
    graph = opened(net.model({"x": (FLOAT, ["n", 3, 8, 8])}, {"main": shape, "side": shape}), tmp_path)
    assert names(graph, 1) == ["relu2", "relu5", "globalaveragepool6", "flatten7"]
    assert [cut.position for cut in cuts(graph, 1)] == [3, 9, 10, 11]
    assert [cut.position for cut in cuts(graph, 1, exits=["side"])] == [3, 6, 7, 8]


def test_free_extents_beside_the_batch_need_shapes(tmp_path: Path) -> None:
    net = Net()
    net.head(net.cnr("x", 3, 8), 8, 5, "y")
    model = net.model({"x": (FLOAT, ["n", 3, "h", "w"])}, {"y": (FLOAT, ["n", 5])})
    graph = opened(model, tmp_path)
    assert "relu2" not in names(graph)
    with pytest.raises(CannotCut, match="shape of the tensor 'relu2' is unknown but for its batch; give the inputs'"):
        cut_at(graph, "relu2")
    fixed = opened(model, tmp_path, shapes={"x": (1, 3, 8, 8)})
    assert fixed.tensor("relu2").shape == (1, 8, 8, 8)
    assert names(fixed)[0] == "relu2"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "makes no tensor 'nowhere'"),
        ("logits", "'logits' is not on the way from 'x' to the output"),
        ("stage0", None),
    ],
)
def test_a_cut_that_cannot_be_is_refused_with_the_reason(name: str, reason: str | None, tmp_path: Path) -> None:
    graph = opened(onnx_models.resnet(), tmp_path)
    if reason is None:
        assert cut_at(graph, name).name == name
    else:
        with pytest.raises(CannotCut, match=reason):
            cut_at(graph, name)


def test_where_too_many_tensors_cross_or_the_input_itself_no_cut_is_made(tmp_path: Path) -> None:
    net = Net()
    parts = [net.op(kind, "x", name=kind) for kind in ("Sin", "Cos", "Tan", "Abs")]
    net.op("Max", *parts, name="most")
    net.op("Exp", "most", name="y")
    graph = opened(net.model({"x": (FLOAT, [1, 4])}, {"y": (FLOAT, [1, 4])}), tmp_path)
    assert names(graph) == ["most"]
    with pytest.raises(CannotCut, match="4 tensors cross at 'Abs', 2 are allowed"):
        cut_at(graph, "Abs")
    assert cut_at(graph, "Abs", most=4).position == 4
    with pytest.raises(CannotCut, match="input 'x' itself is still needed after 'Cos'"):
        cut_at(graph, "Cos")


def test_the_names_of_the_ends_are_no_cuts(tmp_path: Path) -> None:
    net = Net()
    net.op("Softmax", net.op("Softmax", net.op("Softmax", "x", name="output"), name="then"), name="y")
    graph = opened(net.model({"x": (FLOAT, [1, 4])}, {"y": (FLOAT, [1, 4])}), tmp_path)
    assert names(graph) == ["then"]
    with pytest.raises(CannotCut, match="cannot be named 'output', which is an end of the model; rename"):
        cut_at(graph, "output")


def test_the_input_from_which_data_flows_can_be_named(tmp_path: Path) -> None:
    graph = opened(onnx_models.decoder(), tmp_path, primary="mask")
    assert "ids" not in {tensor.name for cut in cuts(graph) for tensor in cut.tensors}
    with pytest.raises(ModelError, match="no input 'nope'; it has ids, mask"):
        opened(onnx_models.decoder(), tmp_path, primary="nope")


def _small(**changes: Any) -> ModelProto:
    net = Net()
    net.op(changes.pop("kind", "Relu"), "x", name="y", **changes)
    return net.model({"x": (FLOAT, ["n", 4])}, {"y": (FLOAT, ["n", 4])})


def refused(model: ModelProto, folder: Path, reason: str, **options: Any) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        opened(model, folder, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ModelError, match="There is no model"):
        open_graph(path)
    for content in (b"", b"\x00\x01garbage" * 9, b"<html>", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="is not an ONNX model"):
            open_graph(path)


@settings(max_examples=100, deadline=None)
@given(changes=st.dictionaries(st.integers(0, 2000), st.integers(0, 255), min_size=1, max_size=4), build=st.booleans())
def test_a_damaged_file_is_cut_or_refused_and_never_more(
    changes: dict[int, int], build: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray((_outside() if build else onnx_models.branching()).SerializeToString())
    for place, value in changes.items():
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(content)
    try:
        graph = open_graph(path)
        assert all(cut.position > 0 for cut in cuts(graph))
    except ModelError as error:
        assert str(error)  # noqa: PT017


def test_models_beyond_the_limits_are_refused(tmp_path: Path) -> None:
    refused(_small(), tmp_path, "bytes, 10 are allowed; save its weights beside", limits=EdgeLimits(max_model_bytes=10))
    many = onnx_models.branching()
    refused(many, tmp_path, "more than 11 operators", limits=EdgeLimits(max_nodes=11))
    assert opened(many, tmp_path, limits=EdgeLimits(max_nodes=13))  # those in the bodies count too


def test_operators_that_no_runtime_knows_are_refused(tmp_path: Path) -> None:
    refused(_small(kind="Frobnicate"), tmp_path, "'Frobnicate' is not in opset 18; export with standard")
    foreign = _small(kind="Mine", domain="org.example")
    foreign.opset_import.add(domain="org.example", version=1)
    refused(foreign, tmp_path, "'Mine' is of the domain 'org.example', unknown here")
    fused = _small(kind="Gelu", domain="com.microsoft")
    fused.opset_import.add(domain="com.microsoft", version=1)
    assert opened(fused, tmp_path).outputs == ("y",)


def test_models_that_a_cut_would_harm_are_refused(tmp_path: Path) -> None:
    model = _small()
    model.graph.quantization_annotation.add(tensor_name="y")
    refused(model, tmp_path, "would be lost in a cut")
    model = _small()
    values, indices = (
        numpy_helper.from_array(np.ones(1, np.float32), "s"),
        numpy_helper.from_array(np.zeros(1, np.int64)),
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    refused(model, tmp_path, "Sparse weights")


def test_models_without_inputs_outputs_or_order_are_refused(tmp_path: Path) -> None:
    model = _small()
    del model.graph.input[:]
    refused(model, tmp_path, "The model has no input")
    model = _small()
    del model.graph.output[:]
    refused(model, tmp_path, "The model has no output")
    model = onnx_models.resnet()
    first = model.graph.node[0].SerializeToString()
    del model.graph.node[0]
    model.graph.node.append(onnx.NodeProto.FromString(first))
    refused(model, tmp_path, "is no valid model")
    model = onnx_models.resnet()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    refused(model, tmp_path, "shapes of the model contradict")


def _outside(**place: str) -> ModelProto:
    net = Net()
    net.op("MatMul", "x", net.weight(4, 100), name="y")
    tensor = net.weights[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": "w.data", "offset": "0", "length": "1600"} | place).items():
        tensor.external_data.add(key=key, value=value)
    return net.model({"x": (FLOAT, ["n", 4])}, {"y": (FLOAT, ["n", 100])})


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ({"location": "/etc/passwd"}, "lie outside the model's folder"),
        ({"location": "../w.data"}, "lie outside the model's folder"),
        ({"location": "a/../../w.data"}, "lie outside the model's folder"),
        ({"location": "..\\w.data"}, "lie outside the model's folder"),
        ({"location": "gone.data"}, "'gone.data' with weights is missing"),
        ({"location": "."}, "is missing"),
        ({"location": "link.data"}, "lie behind a link"),
        ({"location": "way/w.data"}, "lie behind a link"),
        ({"offset": "1"}, "reach beyond their file"),
        ({"length": "1601"}, "reach beyond their file"),
        ({"offset": "-4"}, "unreadable place"),
        ({"length": "many"}, "unreadable place"),
    ],
)
def test_weights_outside_the_folder_or_their_file_are_refused(
    place: dict[str, str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "w.data").write_bytes(bytes(1600))
    (tmp_path / "link.data").symlink_to(tmp_path / "w.data")
    (tmp_path / "way").symlink_to(tmp_path)
    path = tmp_path / "m.onnx"
    path.write_bytes(_outside().SerializeToString())
    assert open_graph(path)
    path.write_bytes(_outside(**place).SerializeToString())
    with pytest.raises(ModelError, match=reason):
        open_graph(path)


def test_weights_outside_within_an_operator_are_refused(tmp_path: Path) -> None:
    model = _small()
    node = model.graph.node.add(op_type="Constant", output=["c"])
    node.attribute.append(helper.make_attribute("value", _outside().graph.initializer[0]))
    (tmp_path / "w.data").write_bytes(bytes(1600))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="within an operator keeps its data outside"):
        open_graph(path)


def test_shapes_must_fit_the_model(tmp_path: Path) -> None:
    refused(_small(), tmp_path, "no input 'z' to give a shape", shapes={"z": (1,)})
    for shape in ((1, 5), (1,), (0, 4), (-1, 4)):
        refused(_small(), tmp_path, "'x' cannot have the shape", shapes={"x": shape})


def test_large_weights_outside_are_not_read_and_small_ones_are(tmp_path: Path) -> None:
    net = Net()
    net.op("Reshape", net.op("MatMul", "x", net.weight(4, 100)), net.const([-1, 10, 10], np.int64), name="y")
    model = net.model({"x": (FLOAT, ["n", 4])}, {"y": (FLOAT, ["n", None, None])})
    graph = open_graph(onnx_models.save(model, tmp_path / "m.onnx", external=True))
    outside = [tensor.name for tensor in graph.model.graph.initializer if tensor.external_data]
    assert outside == ["w0"]
    assert graph.tensor("y").shape == (-1, 10, 10)
    assert graph.tensor("x").dtype == "float32"
