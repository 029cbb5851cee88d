"""A bundle of three pieces and one exit, made by hand, for the tests of the runtime and of what is measured."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from fedge.edge import bundle as bundles
from fedge.edge.bundle import INPUT, OUTPUT, WEIGHTS, Boundary, Bundle, Exit, Piece, Sent, Tensor

IMAGE = Tensor("x", "float32", (-1, 16, 12, 12))
FEATURES = Tensor("relu", "float32", (-1, 16, 12, 12))
EARLY = Tensor("early", "float32", (-1, 4))
LOGITS = Tensor("logits", "float32", (-1, 4))
HEAD, TAIL, WHOLE = (INPUT, "middle"), ("middle", OUTPUT), (INPUT, OUTPUT)


def weights():
    generator = np.random.default_rng(3)
    shapes = {"kernel": (16, 16, 3, 3), "scale": (16,), "bias": (16,), "mean": (16,), "var": (16,)}
    shapes |= {"first": (16, 4), "second": (16, 4)}
    made = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {"var": np.abs(made["var"]) + 1}


HEAD_NODES = [
    helper.make_node("Conv", ["x", "kernel"], ["conv"], "a", pads=[1, 1, 1, 1]),
    helper.make_node("BatchNormalization", ["conv", "scale", "bias", "mean", "var"], ["norm"], "b"),
    helper.make_node("Relu", ["norm"], ["relu"], "c"),
]
EXIT_NODES = [
    helper.make_node("ReduceMean", ["relu"], ["pooled"], "d", axes=[2, 3], keepdims=0),
    helper.make_node("MatMul", ["pooled", "first"], ["early"], "e"),
]
TAIL_NODES = [
    helper.make_node("Sigmoid", ["relu"], ["gate"], "f"),
    helper.make_node("Mul", ["relu", "gate"], ["swish"], "g"),
    helper.make_node("ReduceMax", ["swish"], ["most"], "h", axes=[2, 3], keepdims=0),
    helper.make_node("MatMul", ["most", "second"], ["logits"], "i"),
]


def info(tensor):
    shape = [extent if extent > 0 else "batch" for extent in tensor.shape]
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape)


def graph(operators, inputs, outputs, held, external=True):
    """A skeleton whose weights lie one after the other in weights.data, or inside."""
    tensors, offset = [], 0
    for name, array in held.items():
        tensor = onnx.numpy_helper.from_array(array, name)
        if external:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": WEIGHTS, "offset": offset, "length": array.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
        offset += array.nbytes
        if any(name in node.input for node in operators):
            tensors.append(tensor)
    made = helper.make_graph(operators, "piece", [info(one) for one in inputs], [info(one) for one in outputs], tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def make(folder):
    """A bundle of three pieces and one exit."""
    held = weights()
    (folder / "pieces").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"".join(array.tobytes() for array in held.values()))
    parts = {
        "head": (HEAD, [*HEAD_NODES, *EXIT_NODES], (IMAGE,), (FEATURES, EARLY), ("early",)),
        "tail": (TAIL, TAIL_NODES, (FEATURES,), (LOGITS,), ()),
        "whole": (WHOLE, [*HEAD_NODES, *TAIL_NODES], (IMAGE,), (LOGITS,), ()),
    }
    pieces = []
    for name, (ends, operators, inputs, outputs, exits) in parts.items():
        (folder / f"pieces/{name}.onnx").write_bytes(graph(operators, inputs, outputs, held))
        pieces.append(Piece(f"pieces/{name}.onnx", *ends, inputs, outputs, exits))
    line = (Boundary(INPUT, (IMAGE,), 0), Boundary("middle", (FEATURES,), 3), Boundary(OUTPUT, (LOGITS,), 7))
    codings = {"middle": {"f16": Sent(), "u8+zlib": Sent(0.9)}}
    leaves = (Exit("early", "middle", EARLY),)
    bundles.write(folder, Bundle(1, "", "demo", line, tuple(pieces), {}, leaves, codings=codings))
    return bundles.load(folder)


def reference(x):
    """The model in plain onnxruntime, without any optimisation, weights inside."""
    data = graph(
        [*HEAD_NODES, *EXIT_NODES, *TAIL_NODES], (IMAGE,), (FEATURES, EARLY, LOGITS), weights(), external=False
    )
    chosen = onnxruntime.SessionOptions()
    chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    chosen.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, chosen, providers=["CPUExecutionProvider"])
    return dict(zip(("relu", "early", "logits"), session.run(None, {"x": x})))


def image(batch=1):
    return np.random.default_rng(batch).standard_normal((batch, 16, 12, 12)).astype(np.float32)
