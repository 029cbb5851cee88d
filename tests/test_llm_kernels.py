"""Kernels: every one multiplies what the reference multiplies, wherever the bytes lie, and keeps its promises."""

import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedge.core.errors import ExperimentError, ModelError
from fedge.edge.llm.compute import graph, kernels, onnx_kernels
from fedge.edge.llm.compute.kernels import KERNELS, choose, named, rows_alone, suited
from fedge.edge.llm.shards.quant import KINDS, Matrix, quantise
from tests.llm_reference import dequantise

NAMES = sorted(KERNELS)
# Where a kernel rounds x to 8 bits the error is that of the rounding, not of sums.
ROUNDS = {"onnx-int8", "onnx-fine-int8", "onnx-int4", "torch-int8"}


def random_matrix(kind, rows, columns, seed=0, bias=True):
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, columns), np.float32)
    return quantise(weight, kind, random.standard_normal(rows, np.float32) if bias else None)


def expected(matrix, x):
    y = x.astype(np.float64) @ dequantise(matrix).T
    return y if matrix.bias is None else y + matrix.bias


def close(name, matrix, x, y):
    """As near as rounding sums, and x where it is rounded, allows."""
    step = np.abs(x).max(initial=0) * (1 / 127 if name in ROUNDS else 1e-6)
    bound = step * np.sqrt(matrix.columns) * np.abs(dequantise(matrix)).max(initial=0) + 1e-4
    return np.abs(y - expected(matrix, x)).max(initial=0) < bound


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 300),
    many=st.sampled_from([1, 2, 5, 17, 64]),
    seed=st.integers(0, 99),
    bias=st.booleans(),
)
@example(rows=2, columns=1, many=1, seed=0, bias=False)  # torch's own product reads beyond one column
def test_it_multiplies(name, rows, columns, many, seed, bias):
    kernel = KERNELS[name]
    matrix = random_matrix(kernel.kind, rows, columns, seed, bias)
    x = np.random.default_rng(seed + 1).standard_normal((many, columns), np.float32)
    matrix.data.flags.writeable = x.flags.writeable = False  # a map, bytes of the network
    y = kernel.prepare(matrix)(x)
    assert y.shape == (many, rows)
    assert y.dtype == np.float32
    assert y.flags.c_contiguous
    assert y.flags.writeable
    assert close(name, matrix, x, y)


@pytest.mark.parametrize("name", [name for name in NAMES if name in ROUNDS])
def test_rows_of_zeros_stay_zeros(name):
    matrix = random_matrix(KERNELS[name].kind, 8, 64, bias=False)
    y = KERNELS[name].prepare(matrix)(np.zeros((3, 64), np.float32))
    assert not y.any()


@pytest.mark.parametrize("name", [name for name in NAMES if KERNELS[name].streams])
def test_streaming_kernels_see_the_buffer_change(name):
    kernel = KERNELS[name]
    first, second = (random_matrix(kernel.kind, 48, 96, seed) for seed in (1, 2))
    buffer = Matrix(kernel.kind, 48, 96, first.data.copy(), first.scale.copy(), first.bias.copy())
    linear = kernel.prepare(buffer)
    x = np.random.default_rng(0).standard_normal((4, 96), np.float32)
    assert np.array_equal(linear(x), kernel.prepare(first)(x))
    for held, new in ((buffer.data, second.data), (buffer.scale, second.scale), (buffer.bias, second.bias)):
        held[...] = new
    assert np.array_equal(linear(x), kernel.prepare(second)(x))


@pytest.mark.parametrize("name", [name for name in NAMES if not KERNELS[name].streams])
def test_copying_kernels_leave_the_weights_as_they_were(name):
    matrix = random_matrix(KERNELS[name].kind, 40, 96)
    before = matrix.data.copy()
    KERNELS[name].prepare(matrix)(np.ones((2, 96), np.float32))
    assert np.array_equal(matrix.data, before)


@pytest.mark.parametrize("name", [name for name in NAMES if KERNELS[name].invariant])
@pytest.mark.parametrize("shape", [(64, 128), (96, 352), (300, 1056), (33, 100)])
def test_rows_do_not_depend_on_their_company(name, shape):
    kernel = KERNELS[name]
    assert rows_alone(kernel.prepare(random_matrix(kernel.kind, *shape)), shape[1])


def one_scale(matrix):
    """Products that round all rows of x with one scale, as some libraries do."""

    def linear(x):
        step = np.abs(x).max() / 127
        return (np.rint(x / step) * step) @ dequantise(matrix).T

    return linear


def test_dependence_on_company_is_noticed():
    assert not rows_alone(one_scale(random_matrix("int8", 64, 256)), 256)


def untouched_by_a_large_row(linear, columns):
    """Whether the others' results are about the same in company of a row a thousand times as large."""
    x = np.random.default_rng(3).standard_normal((9, columns), np.float32)
    alone, x[4] = linear(x), x[4] * 1000
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    return np.abs(linear(x)[others] - alone[others]).max() < 0.01 * np.abs(alone).max()


@pytest.mark.parametrize("name", NAMES)
def test_a_large_row_does_not_spoil_the_others(name):
    """The first token of a text often has states of that kind."""
    kernel = KERNELS[name]
    assert untouched_by_a_large_row(kernel.prepare(random_matrix(kernel.kind, 64, 256, bias=False)), 256)


def test_a_spoilt_row_is_noticed():
    assert not untouched_by_a_large_row(one_scale(random_matrix("int8", 64, 256, bias=False)), 256)


def test_a_kernel_refuses_another_kind():
    with pytest.raises(ModelError, match=r"onnx-int8.*float32"):
        KERNELS["onnx-int8"].prepare(random_matrix("float32", 4, 32))


def test_weights_are_made_again_where_the_session_still_wants_them(monkeypatch):
    """An onnxruntime that packs nothing reads its weights at every call."""
    prepare = onnx_kernels._session
    monkeypatch.setattr(onnx_kernels, "_session", lambda *given: unpacked(*given, otherwise=prepare))
    matrix = random_matrix("int8", 40, 300)
    x = np.random.default_rng(0).standard_normal((3, 300), np.float32)
    assert close("onnx-int8", matrix, x, KERNELS["onnx-int8"].prepare(matrix)(x))


def unpacked(operator, weights, matrix, columns, otherwise):
    """A session's result, off the bytes that it was given, whatever they are by then."""
    data, scale = weights["w"], weights["s"]
    return lambda x: (
        x @ ((data.astype(np.float32) - 128) * scale[:, :, None]).reshape(matrix.rows, columns).T.astype(np.float32)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("invariant", [True, False])
def test_the_choice_has_the_wanted_properties(kind, streamed, invariant):
    kernel = choose(kind, streamed=streamed, invariant=invariant, shape=(64, 128), seconds=0.05)
    assert kernel.kind == kind
    assert kernel.streams or not streamed
    assert kernel.invariant or not invariant


def test_the_choice_is_the_fastest(monkeypatch):
    costs = {"numpy-int8": 3.0, "onnx-int8": 2.0, "torch-int8": 1.0, "onnx-fine-int8": 5.0}
    few = {name: kernel for name, kernel in KERNELS.items() if name in costs}
    monkeypatch.setattr(kernels, "KERNELS", few)
    monkeypatch.setattr(kernels, "_costs", lambda *_: costs)
    assert choose("int8", shape=(32, 32)).name == "torch-int8"


def test_of_two_alike_the_first_is_chosen(monkeypatch):
    for least, wanted in ((0.98, "onnx-int8"), (0.9, "torch-int8")):
        costs = {"numpy-int8": 1.5, "onnx-int8": 1.0, "torch-int8": least}
        monkeypatch.setattr(kernels, "_costs", lambda *_, costs=costs: costs)
        assert choose("int8", shape=(32, 32)).name == wanted


def logged(name, log, pause_s, invariant=False):
    """A kernel that writes down when it is used."""

    def linear(x):
        log.append((name, len(x)))
        time.sleep(pause_s)
        return np.zeros((len(x), 32), np.float32)

    return kernels.Kernel(name, "int8", True, invariant, lambda _: linear, lambda: True)


def test_kernels_take_turns_and_hopeless_ones_are_dropped(monkeypatch):
    log = []
    three = [logged("a", log, 0), logged("b", log, 0), logged("slow", log, 0.02)]
    monkeypatch.setattr(kernels, "KERNELS", {kernel.name: kernel for kernel in three})
    assert choose("int8", shape=(512, 512), seconds=0.3).name in ("a", "b")
    turns = [name for (name, rows), before in zip(log, [("", 0), *log]) if name != before[0]]
    assert turns[:5] == ["a", "b", "slow", "a", "b"]
    assert turns.count("slow") == 1
    assert {rows for name, rows in log} == {1, kernels.PROMPT}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_one_by_one_are_only_for_who_wants_them(monkeypatch, kind):
    """However fast they seem."""
    seen = []
    monkeypatch.setattr(kernels, "_costs", lambda linears, *_: dict.fromkeys(seen.append(set(linears)) or linears, 1.0))
    for invariant in (False, True):
        choose(kind, invariant=invariant, shape=(64, 128))
    assert [f"numpy-rows-{kind}" in names for names in seen] == [False, True]


def test_a_kernel_that_breaks_its_promise_here_is_not_chosen(monkeypatch):
    lies = kernels.Kernel("liar", "int8", False, True, one_scale, lambda: True)
    honest = KERNELS["numpy-rows-int8"]
    monkeypatch.setattr(kernels, "KERNELS", {"liar": lies, honest.name: honest})
    monkeypatch.setattr(kernels, "_costs", lambda linears, *_: {name: 1.0 + (name != "liar") for name in linears})
    assert choose("int8", invariant=True, shape=(64, 256)) is honest


@pytest.mark.parametrize("shape", [(0, 32), (32, -1)])
def test_an_empty_shape_is_refused(shape):
    with pytest.raises(ExperimentError, match="positive"):
        choose("int8", shape=shape)


@pytest.mark.parametrize("name", [name for name in NAMES if KERNELS[name].kind == "int4"])
def test_the_head_of_int4_has_a_kernel_of_the_same_properties(name):
    kernel = KERNELS[name]
    found = suited(kernel, "int8")
    assert (found.kind, found.streams) == ("int8", kernel.streams)
    assert found.invariant >= kernel.invariant
    assert suited(kernel, "int4") is suited(kernel, "float32") is kernel


def test_only_int4_has_another_head():
    assert all(suited(one, kind) is one for one in KERNELS.values() if one.kind != "int4" for kind in KINDS)


def test_kernels_by_name():
    assert named("onnx-int4", "int4") is KERNELS["onnx-int4"]
    for name, kind in (("onnx-int4", "int8"), ("abacus", "int8")):
        with pytest.raises(ExperimentError, match=r"name one of .*onnx-int8"):
            named(name, kind)


def test_the_graph_is_onnx():
    weights = {"w": np.zeros((4, 2, 32), np.uint8), "s": np.zeros((4, 2), np.float32)}
    operator = graph.Operator("MatMulNBits", "com.microsoft", {"K": 64, "N": 4})
    model = onnx.load_from_string(graph.linear(operator, weights, 64, 4))
    node = model.graph.node[0]
    assert (node.op_type, node.domain, list(node.input)) == ("MatMulNBits", "com.microsoft", ["x", "w", "s"])
    assert {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute} == {"K": 64, "N": 4}
    assert [list(one.dims) for one in model.graph.initializer] == [[4, 2, 32], [4, 2]]
    assert [one.type.tensor_type.shape.dim[1].dim_value for one in (*model.graph.input, *model.graph.output)] == [64, 4]


LEAN = """
import sys
import numpy as np
from fedge.edge.llm.compute.kernels import choose
from fedge.edge.llm.shards.quant import quantise

class Nothing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in BARRED:
            raise ModuleNotFoundError(name)
BARRED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Nothing())
import importlib.util
importlib.util.find_spec = lambda name, find=importlib.util.find_spec: None if name in BARRED else find(name)
names = [choose(kind, shape=(32, 64), seconds=0.02).name for kind in ("float32", "int8", "int4")]
print(*names, *(one for one in BARRED if one in sys.modules))
"""


@pytest.mark.parametrize("barred", ["torch,onnx", "torch,onnx,onnxruntime"])
def test_a_device_needs_neither_torch_nor_onnx(barred):
    done = subprocess.run([sys.executable, "-c", LEAN, barred], capture_output=True, text=True, check=True)
    chosen = done.stdout.split()
    assert len(chosen) == 3, done.stdout
    allowed = ("numpy",) if "onnxruntime" in barred else ("numpy", "onnx")
    assert all(name.startswith(allowed) for name in chosen)


PRIVATE = """
import gc, sys
import numpy as np
from fedge.edge.llm.compute import heap
from fedge.edge.llm.compute.kernels import KERNELS
from fedge.edge.llm.shards.quant import Matrix, quantise
from fedge.edge.runtime.memory import resident

def now():
    gc.collect()
    heap.trim()
    return resident().private

kernel = KERNELS[sys.argv[1]]
one = quantise(np.ones((1536, 1024), np.float32), kernel.kind)
x = np.ones((1, 1024), np.float32)
kernel.prepare(one)(x)
held, before = [], now()
for number in range(8):
    held.append(kernel.prepare(one))
    held[-1](x)
print((now() - before) / 8 / (one.data.nbytes + one.scale.nbytes))
"""


@pytest.mark.parametrize(("name", "most"), [("onnx-float32", 1.1), ("onnx-int8", 1.2), ("onnx-int4", 1.55)])
def test_sessions_hold_little_more_than_the_weights(name, most):
    """Per byte of a matrix in the shard. It is at least 0.9, or the memory would not have been measured."""
    done = subprocess.run([sys.executable, "-c", PRIVATE, name], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < most


@pytest.mark.parametrize("name", [one.name for one in KERNELS.values() if one.name.startswith("torch")])
def test_torch_has_one_thread_whoever_multiplies(name: str) -> None:
    """torch keeps the number of its threads for each calling thread; ranks are run by others than those that load."""
    kernel = KERNELS[name]
    linear = kernel.prepare(quantise(np.ones((64, 64), np.float32), kernel.kind))
    seen: list[int] = []

    def work() -> None:
        linear(np.ones((1, 64), np.float32))
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1]
