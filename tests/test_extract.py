"""Pieces: at every place where a graph can be cut, head and then tail give what the whole gives, bit for bit."""

import importlib.resources
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper

from fedge.core.errors import CannotCut, ModelError
from fedge.core.limits import EdgeLimits
from fedge.edge.split.extract import extract, plain_session
from fedge.edge.split.graph import Cut, Graph, cuts, open_graph
from fedge.edge.split.order import line
from fedge.edge.split.weights import write_weights
from tests import onnx_models
from tests.onnx_models import Array

BUILDERS: list[Callable[[], ModelProto]] = [
    onnx_models.resnet,
    onnx_models.squeezenet,
    onnx_models.shufflenet,
    onnx_models.decoder,
    onnx_models.branching,
]


def placed(graph: Graph, folder: Path) -> dict[str, TensorProto]:
    return write_weights(graph.model.graph.initializer, graph.folder, folder, EdgeLimits())


def halves(graph: Graph, cut: Cut, weights: dict[str, TensorProto]) -> tuple[bytes, bytes]:
    """Head and tail at a cut: outputs go to the side on which they are made."""
    order = line(graph.nodes, graph.primary, graph.outputs).order
    early = {name for node in order[: cut.position] for name in node.outputs}
    before = [graph.tensor(name) for name in graph.outputs if name in early]
    after = [graph.tensor(name) for name in graph.outputs if name not in early]
    crossing = {tensor.name for tensor in cut.tensors}
    given = [*cut.tensors, *(tensor for tensor in before if tensor.name not in crossing)]
    head, _ = extract(graph, [graph.tensor(graph.primary)], given, weights)
    tail, _ = extract(graph, cut.tensors, after, weights)
    return head.SerializeToString(), tail.SerializeToString()


def chained(pieces: tuple[bytes, bytes], feeds: dict[str, Array], folder: Path) -> dict[str, Array]:
    head = onnx_models.run(pieces[0], feeds, folder)
    return head | onnx_models.run(pieces[1], feeds | head, folder)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("external", [False, True])
def test_every_cut_gives_what_the_whole_gives(build: Callable[[], ModelProto], external: bool, tmp_path: Path) -> None:
    model = build()
    graph = open_graph(onnx_models.save(model, tmp_path / "m.onnx", external))
    feeds = onnx_models.feeds(model)
    whole = onnx_models.run(model.SerializeToString(), feeds)
    found, weights = cuts(graph, inside=True), placed(graph, tmp_path)
    assert len(found) > 9
    for cut in found[:: 3 if external else 1 + len(found) // 60]:
        parts = chained(halves(graph, cut, weights), feeds, tmp_path)
        for name, value in whole.items():
            assert np.array_equal(parts[name], value), (cut.name, name)
        for tensor in cut.tensors:
            assert parts.get(tensor.name, feeds.get(tensor.name)).dtype.name == tensor.dtype  # type: ignore[union-attr]


@cache
def _opened(build: Callable[[], ModelProto], folder: Path) -> tuple[ModelProto, Graph]:
    model = build()
    return model, open_graph(onnx_models.save(model, folder / f"{build.__name__}.onnx"))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_input_and_batch_passes_any_cut(data: st.DataObject, shelf: Path) -> None:
    model, graph = _opened(data.draw(st.sampled_from(BUILDERS)), shelf)
    cut = data.draw(st.sampled_from(cuts(graph)))
    feeds = onnx_models.feeds(model, data.draw(st.integers(0, 99)), data.draw(st.integers(1, 5)))
    whole = onnx_models.run(model.SerializeToString(), feeds)
    parts = chained(halves(graph, cut, placed(graph, shelf)), feeds, shelf)
    assert all(np.array_equal(parts[name], value) for name, value in whole.items())


def test_pieces_hold_no_weights_and_no_trace_of_the_exporter(tmp_path: Path) -> None:
    model = onnx_models.resnet()
    model.doc_string = model.graph.node[0].doc_string = "/home/someone/secret.py"
    model.graph.node[1].metadata_props.add(key="stack", value="/home/someone/secret.py")
    graph = open_graph(onnx_models.save(model, tmp_path / "m.onnx"))
    head, tail = halves(graph, cuts(graph, 1)[3], placed(graph, tmp_path))
    assert b"secret" not in head + tail
    large = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= 1024]
    assert large
    for tensor in large:
        assert tensor.raw_data not in head + tail
        assert tensor.raw_data in (tmp_path / "weights.data").read_bytes()


def test_a_tail_keeps_what_the_bodies_of_an_if_take_from_around_them(tmp_path: Path) -> None:
    graph = open_graph(onnx_models.save(onnx_models.branching(), tmp_path / "m.onnx"))
    cut = next(cut for cut in cuts(graph, 1) if cut.position == 3)
    tail = onnx.load_model_from_string(halves(graph, cut, placed(graph, tmp_path))[1])
    conv = next(node for node in tail.graph.node if node.op_type == "If").attribute[0].g.node[0]
    assert conv.input[0] == cut.name
    assert conv.input[1] in {tensor.name for tensor in tail.graph.initializer}


def test_an_input_that_does_not_cut_the_graph_is_refused(tmp_path: Path) -> None:
    graph = open_graph(onnx_models.save(onnx_models.resnet(), tmp_path / "m.onnx"))
    inner = next(cut for cut in cuts(graph) if len(cut.tensors) == 2)
    with pytest.raises(CannotCut, match="needs more of the input than relu6; name another cut"):
        extract(graph, inner.tensors[1:], [graph.tensor("logits")], {})


def test_weights_are_copied_byte_for_byte_and_small_ones_stay_inline(tmp_path: Path) -> None:
    large, small = np.arange(1000, dtype=np.float64), np.arange(4, dtype=np.int64)
    typed = onnx.helper.make_tensor("typed", onnx.TensorProto.FLOAT, [600], np.linspace(0, 1, 600).tolist())
    tensors = [numpy_helper.from_array(large, "large"), numpy_helper.from_array(small, "small"), typed]
    placed = write_weights(tensors, tmp_path, tmp_path, EdgeLimits())
    assert np.array_equal(numpy_helper.to_array(placed["large"], str(tmp_path)), large)
    assert np.array_equal(numpy_helper.to_array(placed["typed"], str(tmp_path)), numpy_helper.to_array(typed))
    assert placed["small"] == tensors[1]
    moved = write_weights([placed["typed"]], tmp_path, _folder(tmp_path), EdgeLimits())
    assert np.array_equal(numpy_helper.to_array(moved["typed"], str(tmp_path / "two")), numpy_helper.to_array(typed))


def _folder(above: Path) -> Path:
    (above / "two").mkdir()
    return above / "two"


def test_too_many_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="The weights have more than 100 bytes; use a smaller model"):
        write_weights(
            [numpy_helper.from_array(np.zeros(999), "w")], tmp_path, tmp_path, EdgeLimits(max_weights_bytes=100)
        )


def test_a_weights_file_that_shrinks_meanwhile_is_refused(tmp_path: Path) -> None:
    placed = write_weights([numpy_helper.from_array(np.zeros(999), "w")], tmp_path, tmp_path, EdgeLimits())
    (tmp_path / "weights.data").write_bytes(b"short")
    with pytest.raises(ModelError, match="end too early"):
        write_weights(placed.values(), tmp_path, _folder(tmp_path), EdgeLimits())


def test_a_piece_that_the_runtime_cannot_load_is_refused(tmp_path: Path) -> None:
    graph = open_graph(onnx_models.save(onnx_models.resnet(), tmp_path / "m.onnx"))
    head, _ = halves(graph, cuts(graph)[-1], placed(graph, tmp_path))
    plain_session(head, tmp_path)
    (tmp_path / "weights.data").unlink()
    with pytest.raises(ModelError, match="ONNX Runtime cannot load the model"):
        plain_session(head, tmp_path)


LIGHT = ["densenet121", "inception_v1", "inception_v2", "resnet50", "shufflenet", "squeezenet"]


def _light(name: str) -> ModelProto:
    """A model of the zoo as onnx's own tests hold it, its constant weights made random."""
    data = importlib.resources.files("onnx.backend.test.data") / "light" / f"light_{name}.onnx"
    model = onnx.load_model_from_string(data.read_bytes())
    rng = np.random.default_rng(0)
    sizes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    model.ir_version = 4  # before it, the new initialisers would have to be inputs
    nodes = [node for node in model.graph.node if node.op_type != "ConstantOfShape"]
    for node in model.graph.node:
        if node.op_type == "ConstantOfShape":
            shape = sizes[node.input[0]].tolist()
            value = np.abs(rng.normal(0, (2 / max(np.prod(shape[1:]), 1)) ** 0.5, shape))
            value *= rng.choice([-1, 1], shape) if len(shape) > 1 else 1
            model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), node.output[0]))
    for node in nodes:
        if node.op_type == "Softmax":  # it would hide errors where it saturates
            node.op_type = "Identity"
            del node.attribute[:]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT)
def test_cuts_of_the_zoo_s_architectures_are_exact(name: str, tmp_path: Path) -> None:
    model = _light(name)
    path = onnx_models.save(model, tmp_path / "m.onnx", external=True)
    graph = open_graph(path)
    shape = graph.tensor(graph.primary).shape
    feeds = {graph.primary: np.random.default_rng(1).normal(size=shape).astype(np.float32)}
    whole = onnx_models.run(model.SerializeToString(), feeds)
    assert all(np.ptp(value) > 0 and np.isfinite(value).all() for value in whole.values())
    found, weights = cuts(graph), placed(graph, tmp_path)
    assert len(cuts(graph, 1)) > 5
    for cut in found[:: max(1, len(found) // 12)]:
        parts = chained(halves(graph, cut, weights), feeds, tmp_path)
        assert all(np.array_equal(parts[each], value) for each, value in whole.items()), cut.name


@pytest.mark.parametrize("opset", [18, 13])
def test_the_shape_of_the_input_is_taken_from_what_crosses_or_sent(opset: int, tmp_path: Path) -> None:
    net = onnx_models.Net()
    batch = net.op("Slice", net.op("Shape", "x"), *(net.const([i], np.int64) for i in (0, 1)))
    size = net.op("Concat", batch, net.const([8 * 16], np.int64), axis=0)
    net.op("MatMul", net.op("Reshape", net.cnr("x", 3, 8, stride=2), size), net.weight(128, 5), name="y")
    model = net.model({"x": (onnx_models.FLOAT, ["n", 3, 8, 8])}, {"y": (onnx_models.FLOAT, ["n", 5])})
    model.opset_import[0].version = opset  # before 15, a Shape is of all extents
    graph = open_graph(onnx_models.save(model, tmp_path / "m.onnx"))
    cut = cuts(graph, 1)[0]
    assert [tensor.name for tensor in cut.tensors] == ([cut.name] if opset == 18 else [cut.name, "x"])
    feeds = onnx_models.feeds(model, batch=3)
    parts = chained(halves(graph, cut, placed(graph, tmp_path)), feeds, tmp_path)
    assert np.array_equal(parts["y"], onnx_models.run(model.SerializeToString(), feeds)["y"])
