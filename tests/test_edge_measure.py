"""What is measured of pieces, operators and memory covers the bundle and goes where it belongs."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from fedge.core.errors import BadBundle, ModelError, RefusedTensor
from fedge.edge.bundle import INPUT, OUTPUT, WEIGHTS, Bundle, Tensor
from fedge.edge.plan.profile import decode, encode
from fedge.edge.runtime import memory
from fedge.edge.runtime.measure import line, profile_bundle, profile_piece
from fedge.edge.runtime.nodes import Node, nodes
from fedge.edge.runtime.operators import attribute, profile_operators
from fedge.edge.runtime.tensors import example
from tests.edge_pieces import HEAD, HEAD_NODES, TAIL_NODES, WHOLE, image, make


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    return folder, make(folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


def test_a_profile_covers_the_bundle(made, kept):
    folder, bundle = made
    profile = profile_bundle(folder, bundle, repeats=2, device="bench", inputs={"x": image()}, cache=kept)
    assert (profile.device, profile.version, profile.threads) == ("bench", bundle.version, 1)
    assert profile.pieces.keys() == {"input..middle", "middle..output", "input..output"}
    assert profile.memory_bytes.keys() == profile.pieces.keys()
    assert min(profile.pieces.values()) > 0
    assert profile.memory_bytes["input..output"] > (folder / WEIGHTS).stat().st_size / 2
    assert profile.codings.keys() == {"middle f16", "middle u8+zlib"}
    assert profile.codings["middle f16"].bytes == 2 * 16 * 12 * 12
    assert 0 < profile.codings["middle u8+zlib"].bytes < 16 * 12 * 12
    assert [tensor for tensor, _ in profile.operators] == [node.output[0] for node in [*HEAD_NODES, *TAIL_NODES]], (
        "the fewest pieces: the whole, which has no exit"
    )
    assert decode(encode(profile)) == profile


def test_operators_are_charged_to_tensors_of_the_model(made, kept):
    found = dict(profile_operators(*made, *HEAD, {"x": image()}, repeats=3, cache=kept))
    assert list(found) == ["conv", "norm", "relu", "pooled", "early"]
    assert found["conv"] == found["norm"] == 0, "they exist only inside the fused kernel"
    assert found["relu"] > 0
    with pytest.raises(RefusedTensor):
        profile_operators(*made, *HEAD, {"x": image()[:, :3]}, cache=kept)


def test_kernels_go_where_they_belong():
    model = [Node("a", ("conv",)), Node("b", ("relu",)), Node("c", ("split", "rest")), Node("d", ("y",))]
    fused = [Node("relu_nchwc", ("token",)), Node("order", ("token2",)), Node("c", ("s", "rest")), Node("d", ("y",))]
    kernels = [("in", 0.125), ("relu_nchwc", 1.0), ("order", 0.5), ("c", 2.0), ("d", 4.0), ("strange", 0.25)]
    assert attribute(model, fused, kernels) == (("conv", 0.0), ("relu", 1.625), ("split", 2.0), ("y", 4.25))


def test_nodes_are_read_without_the_onnx_package(made):
    path = made[0] / "pieces/head.onnx"
    wanted = [Node(node.name, tuple(node.output)) for node in onnx.load(path, load_external_data=False).graph.node]
    assert nodes(path.read_bytes()) == wanted
    with pytest.raises(BadBundle, match="no ONNX model"):
        nodes(b"\xff\xff\xff")


def test_the_least_of_all_runs_counts(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])  # of this module only: other threads look at the time, too
    monkeypatch.setattr("fedge.edge.runtime.measure.time", SimpleNamespace(perf_counter=lambda: next(clock)))

    class Still:
        def run(self, inputs):
            return inputs

    assert profile_piece(Still(), {}, repeats=3) == 1.0


def test_a_line_that_breaks_off_is_refused(made):
    bundle = made[1]
    assert [(piece.start, piece.end) for piece in line(bundle)] == [WHOLE]
    broken = Bundle(1, "", "", bundle.boundaries, (bundle.piece(*HEAD),), {})
    with pytest.raises(BadBundle, match="goes on from 'middle'"):
        line(broken)


def test_examples_fit_what_they_are_examples_of():
    tensors = (Tensor("a", "uint8", (-1, 2)), Tensor("b", "int64", (3,)), Tensor("c", "float16", ()))
    made = example(tensors)
    assert [(str(made[one.name].dtype), made[one.name].shape) for one in tensors] == [
        *(("uint8", (1, 2)), ("int64", (3,)), ("float16", ()))
    ]


def test_memory_of_a_piece_that_does_not_run_is_an_error(made, tmp_path):
    with pytest.raises(ModelError, match="no piece from"):
        memory.piece_memory(*made, OUTPUT, INPUT, cache=tmp_path)


def test_memory_is_told_apart(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8 << 20))  # before: the heap may keep these bytes
    before = memory.resident()
    held = np.ones(64 << 20, np.uint8)
    mapped = np.memmap(tmp_path / "file", np.uint8, mode="r")
    total = int(mapped.sum()) + int(held[0])
    found = memory.resident().since(before)
    assert total == 1
    assert found.private == pytest.approx(64 << 20, rel=0.1)
    assert found.mapped == pytest.approx(8 << 20, rel=0.1)
