"""Rounded weights: how far from the true ones, in whose layout, and that slabs of rows make the whole."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedge.core.errors import ModelError
from fedge.edge.llm.shards.quant import KINDS, quantise
from tests.llm_reference import dequantise

SHAPES = st.tuples(st.integers(0, 5), st.integers(0, 70))
WEIGHTS = SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32)))


def normal(rows=64, columns=192, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def distance(kind, weight):
    return np.linalg.norm(dequantise(quantise(weight, kind)) - weight) / np.linalg.norm(weight)


@settings(deadline=None)
@given(WEIGHTS, st.sampled_from(KINDS))
def test_no_weight_moves_further_than_its_scale_allows(weight, kind):
    matrix = quantise(weight, kind)
    back = dequantise(matrix)
    assert back.shape == weight.shape == (matrix.rows, matrix.columns)
    assert back.dtype == np.float32
    if kind == "float32":
        np.testing.assert_array_equal(back, weight)
        return
    # int8 rounds to the nearest; in int4 the side without a level of its own may be a whole step away.
    allowed = matrix.scale / 2 if kind == "int8" else np.abs(matrix.scale).repeat(32, axis=1)[:, : matrix.columns]
    allowed = allowed[:, None] if kind == "int8" else allowed
    assert (np.abs(back - weight) <= allowed * 1.001 + 1e-30).all()


@settings(deadline=None)
@given(WEIGHTS, st.sampled_from(KINDS), st.integers(0, 5))
def test_slabs_of_rows_make_the_whole(weight, kind, cut):
    whole, top, rest = (quantise(part, kind) for part in (weight, weight[:cut], weight[cut:]))
    np.testing.assert_array_equal(np.concatenate([top.data, rest.data]), whole.data)
    np.testing.assert_array_equal(np.concatenate([top.scale, rest.scale]), whole.scale)


def test_many_slabs_of_the_processor_s_cache_make_the_whole():
    weight = normal(300, 700)
    for kind in ("int8", "int4"):
        rows = [quantise(weight[row : row + 1], kind).data for row in range(300)]
        np.testing.assert_array_equal(quantise(weight, kind).data, np.concatenate(rows))


def test_weights_of_a_normal_distribution_lose_little():
    weight = normal(256, 1024)
    assert distance("int8", weight) < 0.01
    nearest = np.abs(weight.reshape(256, -1, 32)).max(2, keepdims=True) / 7
    plain = np.clip(np.rint(weight.reshape(256, -1, 32) / nearest), -8, 7) * nearest
    plain_distance = np.linalg.norm(plain.reshape(weight.shape) - weight) / np.linalg.norm(weight)
    assert distance("int4", weight) < 0.9 * plain_distance


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_zeros_and_the_smallest_numbers_are_safe(kind):
    weight = np.zeros((3, 40), np.float32)
    weight[1] = -1e-42
    weight[2, 7] = 1e38
    matrix = quantise(weight, kind)
    back = dequantise(matrix)
    assert not back[:2].any()
    assert not matrix.scale[:2].any()
    assert back[2, 7] == pytest.approx(weight[2, 7], rel=1e-6)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(kind, value):
    weight, bias = normal(3, 50), np.ones(3, np.float32)
    bias[2] = value
    with pytest.raises(ModelError, match="not finite"):
        quantise(weight, kind, bias)
    weight[1, 40] = value
    with pytest.raises(ModelError, match="not finite"):
        quantise(weight, kind)


@pytest.mark.parametrize("columns", [32, 48, 100, 256])
def test_int4_lies_as_onnxruntime_s_matmulnbits_wants_it(columns):
    weight, x = normal(24, columns), normal(5, columns, seed=1)
    matrix = quantise(weight, "int4")
    settings_ = {"K": columns, "N": 24, "bits": 4, "block_size": 32}
    node = onnx.helper.make_node("MatMulNBits", ["x", "data", "scale"], ["y"], domain="com.microsoft", **settings_)
    numbers = {"data": matrix.data, "scale": matrix.scale.reshape(-1)}
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [5, columns])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [5, 24])],
        [onnx.numpy_helper.from_array(array, name) for name, array in numbers.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    np.testing.assert_allclose(y, x @ dequantise(matrix).T, rtol=1e-4, atol=1e-4)
