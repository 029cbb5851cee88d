"""Small networks of real architectures with random weights, as ONNX files: what cuts and pieces are tested on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Net:
    """A graph under construction: each method adds an operator and gives the name of its output."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, *shape: int, scale: float | None = None) -> str:
        scale = scale or (2 / max(int(np.prod(shape[1:])), 1)) ** 0.5
        return self.const(self.rng.normal(0, scale, shape))

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> Any:
        names = [name or f"{kind.lower()}{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def conv(self, x: str, cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> str:
        weight = self.weight(cout, cin // groups, kernel, kernel)
        pad = kernel // 2
        shape = {"kernel_shape": [kernel] * 2, "pads": [pad] * 4, "strides": [stride] * 2, "group": groups}
        return str(self.op("Conv", x, weight, **shape))

    def norm(self, x: str, channels: int) -> str:
        scale, bias, mean = (self.const(self.rng.normal(m, 0.1, channels)) for m in (1, 0, 0))
        variance = self.const(self.rng.uniform(0.5, 1.5, channels))
        return str(self.op("BatchNormalization", x, scale, bias, mean, variance))

    def cnr(self, x: str, cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> str:
        return str(self.op("Relu", self.norm(self.conv(x, cin, cout, kernel, stride, groups), cout)))

    def head(self, x: str, channels: int, classes: int, name: str) -> str:
        pooled = self.op("Flatten", self.op("GlobalAveragePool", x))
        return str(self.op("Gemm", pooled, self.weight(channels, classes), self.weight(classes, scale=0.1), name=name))

    def model(
        self, inputs: Mapping[str, tuple[int, Sequence[Any]]], outputs: Mapping[str, tuple[int, Any]]
    ) -> ModelProto:
        ins = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        outs = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()]
        graph = helper.make_graph(self.nodes, "net", ins, outs, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def resnet(batch: Any = "batch", exits: bool = False) -> ModelProto:
    """Bottleneck blocks with and without down-sampling; with `exits`, logits after the first and second stage."""
    net = Net(1)
    x = net.op("MaxPool", net.cnr("x", 3, 8, stride=2), kernel_shape=[2, 2], strides=[2, 2])
    outputs: dict[str, tuple[int, Any]] = {"logits": (FLOAT, [batch, 10])}
    for stage, (cin, cout, stride) in enumerate([(8, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1)]):
        y = net.cnr(net.cnr(x, cin, cout // 4, 1), cout // 4, cout // 4, 3, stride)
        y = net.norm(net.conv(y, cout // 4, cout, 1), cout)
        skip = x if cin == cout else net.norm(net.conv(x, cin, cout, 1, stride), cout)
        x = net.op("Relu", net.op("Add", y, skip), name=f"stage{stage}")
        if exits and stage in (1, 2):
            outputs[net.head(x, cout, 10, f"exit{stage}")] = (FLOAT, [batch, 10])
    net.head(x, 32, 10, "logits")
    return net.model({"x": (FLOAT, [batch, 3, 32, 32])}, outputs)


def squeezenet() -> ModelProto:
    """Fire modules: branches that meet in a Concat; Gelu and Swish written out, as exporters do."""
    net = Net(2)
    x = net.cnr("x", 3, 8, stride=2)
    for cin in (8, 16):
        s = net.op("Relu", net.conv(x, cin, 4, 1))
        x = net.op("Concat", net.op("Relu", net.conv(s, 4, 8, 1)), net.op("Relu", net.conv(s, 4, 8, 3)), axis=1)
    x = net.conv(x, 16, 16)
    x = net.op("Mul", x, net.op("Sigmoid", x), name="swish")
    x = net.conv(x, 16, 16)
    erf = net.op("Add", net.op("Erf", net.op("Div", x, net.const(2**0.5))), net.const(1.0))
    x = net.op("Mul", net.op("Mul", x, erf), net.const(0.5), name="gelu")
    net.head(x, 16, 10, "logits")
    return net.model({"x": (FLOAT, ["batch", 3, 24, 24])}, {"logits": (FLOAT, ["batch", 10])})


def shufflenet() -> ModelProto:
    """Units of Split, a branch, Concat and a channel shuffle by Reshape and Transpose."""
    net = Net(3)
    x = net.cnr("x", 3, 16, stride=2)
    for _ in range(3):
        a, b = net.op("Split", x, axis=1, num_outputs=2, outputs=2)
        b = net.cnr(net.norm(net.conv(net.cnr(b, 8, 8, 1), 8, 8, 3, groups=8), 8), 8, 8, 1)
        x = net.op("Concat", a, b, axis=1)
        x = net.op("Reshape", x, net.const([0, 2, 8, 12, 12], np.int64))
        x = net.op("Reshape", net.op("Transpose", x, perm=[0, 2, 1, 3, 4]), net.const([0, 16, 12, 12], np.int64))
    net.head(x, 16, 10, "logits")
    return net.model({"x": (FLOAT, [2, 3, 24, 24])}, {"logits": (FLOAT, [2, 10])})


def decoder(layers: int = 3, width: int = 16, heads: int = 2, tokens: int = 3, past: int = 4) -> ModelProto:
    """Like Llama: RMS norms, caches in and out, a mask and positions as further inputs, a shape asked of the ids."""
    net, size = Net(4), width // heads
    x = net.op("Gather", net.weight(50, width, scale=1), "ids", name="embedded")
    mask = net.op("Mul", net.op("Sub", "mask", net.const(1)), net.const(1e4))
    mask = net.op("Unsqueeze", mask, net.const([1, 2], np.int64))
    length = net.op("Shape", "ids", start=0, end=2)
    split = net.op("Concat", length, net.const([heads, size], np.int64), axis=0)
    merge = net.op("Concat", length, net.const([width], np.int64), axis=0)
    angle = net.op("Unsqueeze", net.op("Cast", "positions", to=FLOAT), net.const([1, 3], np.int64))
    turn = net.op("Cos", net.op("Mul", angle, net.const(np.linspace(0.1, 1, size))))
    inputs: dict[str, tuple[int, Sequence[Any]]] = {
        "ids": (INT64, ["batch", tokens]),
        "mask": (FLOAT, ["batch", past + tokens]),
        "positions": (INT64, ["batch", tokens]),
    }
    outputs: dict[str, tuple[int, Any]] = {"logits": (FLOAT, ["batch", tokens, 50])}

    def rms(x: str) -> str:
        mean = net.op("ReduceMean", net.op("Mul", x, x), net.const([-1], np.int64))
        root = net.op("Sqrt", net.op("Add", mean, net.const(1e-5)))
        return str(net.op("Mul", net.op("Div", x, root), net.weight(width, scale=1)))

    def split_heads(x: str) -> str:
        x = net.op("Reshape", net.op("MatMul", x, net.weight(width, width)), split)
        return str(net.op("Transpose", x, perm=[0, 2, 1, 3]))

    for layer in range(layers):
        y = rms(x)
        q, k, v = (split_heads(y) for _ in range(3))
        q, k = net.op("Mul", q, turn), net.op("Mul", k, turn)
        for kind, new in (("k", k), ("v", v)):
            inputs[f"past.{layer}.{kind}"] = (FLOAT, ["batch", heads, past, size])
            outputs[f"present.{layer}.{kind}"] = (FLOAT, ["batch", heads, past + tokens, size])
            net.op("Concat", f"past.{layer}.{kind}", new, axis=2, name=f"present.{layer}.{kind}")
        score = net.op("MatMul", q, net.op("Transpose", f"present.{layer}.k", perm=[0, 1, 3, 2]))
        score = net.op("Softmax", net.op("Add", net.op("Mul", score, net.const(size**-0.5)), mask))
        y = net.op("Transpose", net.op("MatMul", score, f"present.{layer}.v"), perm=[0, 2, 1, 3])
        y = net.op("MatMul", net.op("Reshape", y, merge), net.weight(width, width))
        x = net.op("Add", x, y, name=f"attended.{layer}")
        y = net.op("MatMul", rms(x), net.weight(width, 2 * width))
        y = net.op("MatMul", net.op("Mul", y, net.op("Sigmoid", y)), net.weight(2 * width, width))
        x = net.op("Add", x, y, name=f"layer.{layer}")
    net.op("MatMul", rms(x), net.weight(width, 50), name="logits")
    return net.model(inputs, outputs)


def branching() -> ModelProto:
    """An If whose bodies read a tensor and a large weight of the graph around them."""
    net = Net(5)
    x = net.cnr("x", 3, 8)
    big = net.weight(8, 8, 8, 8)
    flag = net.op("Greater", net.op("ReduceSum", x, keepdims=0), net.const(0.0))
    bodies = {}
    for branch, weight in (("then_branch", big), ("else_branch", net.weight(8, 8, 8, 8))):
        node = helper.make_node("Conv", [x, weight], [branch], kernel_shape=[8, 8], pads=[4, 4, 3, 3])
        out = helper.make_tensor_value_info(branch, FLOAT, None)
        bodies[branch] = helper.make_graph([node], branch, [], [out])
    y = net.op("If", flag, name="chosen", **bodies)
    y = net.op("Relu", net.op("Reshape", y, net.const([-1, 8, 8, 8], np.int64)), name="after")
    net.head(y, 8, 10, "logits")
    return net.model({"x": (FLOAT, [2, 3, 8, 8])}, {"logits": (FLOAT, [2, 10])})


def save(model: ModelProto, path: Path, external: bool = False) -> Path:
    """Write a copy of the model, with its weights beside it where asked."""
    copy = ModelProto()
    copy.CopyFrom(model)
    onnx.save_model(copy, path, save_as_external_data=external, location=path.name + ".data", size_threshold=0)
    return path


def session(model: bytes, folder: Path | None = None) -> ort.InferenceSession:
    """As written: no fusion, one thread."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: bytes, feeds: Mapping[str, Array], folder: Path | None = None) -> dict[str, Array]:
    """All outputs by name; of `feeds`, what the model takes."""
    runs = session(model, folder)
    names = [value.name for value in runs.get_outputs()]
    given = {value.name: feeds[value.name] for value in runs.get_inputs()}
    return dict(zip(names, runs.run(names, given)))


def feeds(model: ModelProto, seed: int = 0, batch: int = 2) -> dict[str, Array]:
    """Random inputs: normal floats, small whole numbers."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, Array] = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or batch for dim in kind.shape.dim]
        whole = kind.elem_type == INT64
        drawn[value.name] = rng.integers(0, 50, shape) if whole else rng.normal(size=shape).astype(np.float32)
    return drawn
