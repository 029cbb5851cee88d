"""Models of known architectures with random weights, out of the onnx package, as bundles of one piece.

The package carries the graphs of some published networks without their weights; here they get weights of sensible
scale, in one file beside the graph. Owns how a benchmark comes by a large model without a download. What such a model
answers means nothing; what it costs is that of the trained one.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fedge.edge import bundle as bundles
from fedge.edge.bundle import INPUT, OUTPUT, WEIGHTS, Boundary, Bundle, Piece, Tensor

ALIGNED = 4096  # weights begin on a page, so that they can be mapped
LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def weighted(name: str, seed: int = 0) -> onnx.ModelProto:
    """A light model such as "resnet50" with its weights inside and without its softmax, which would hide errors."""
    model = onnx.load(LIGHT / f"light_{name}.onnx")
    shapes = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    made = {node.output[0]: shapes[node.input[0]] for node in model.graph.node if node.op_type == "ConstantOfShape"}
    nodes = [node for node in model.graph.node if node.op_type not in ("ConstantOfShape", "Softmax")]
    variances = {node.input[4] for node in nodes if node.op_type == "BatchNormalization"}
    generator = np.random.default_rng(seed)
    tensors = []
    for target, shape in made.items():
        values = (
            generator.standard_normal(shape, dtype=np.float32) * np.float32(2.0 / max(np.prod(shape[1:]), 1)) ** 0.5
        )
        values = np.ones(shape, np.float32) if target in variances else values
        tensors.append(numpy_helper.from_array(values.astype(np.float32), target))
    used = {one for node in nodes for one in node.input}
    tensors += [one for one in model.graph.initializer if one.name in used]
    held = {one.name for one in tensors}
    inputs = [one for one in model.graph.input if one.name not in held and one.name in used]
    last = model.graph.output[0]
    last.name = nodes[-1].output[0]
    graph = helper.make_graph(nodes, name, inputs, [last], tensors)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=4)  # weights need not be inputs


def bundled(model: onnx.ModelProto, folder: Path) -> Bundle:
    """Write the model as a bundle of one piece, from input to output, into an empty folder."""
    (folder / "pieces").mkdir(parents=True)
    with (folder / WEIGHTS).open("wb") as file:
        for tensor in model.graph.initializer:
            raw = numpy_helper.to_array(tensor).tobytes()
            if len(raw) < 1024:
                continue
            file.write(bytes(-file.tell() % ALIGNED))
            place = {"location": WEIGHTS, "offset": str(file.tell()), "length": str(len(raw))}
            file.write(raw)
            for field in ("raw_data", "float_data"):
                tensor.ClearField(field)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
    (folder / "pieces/whole.onnx").write_bytes(model.SerializeToString())
    first, last = (tensor_of(one) for one in (model.graph.input[0], model.graph.output[0]))
    ends = (Boundary(INPUT, (first,), 0), Boundary(OUTPUT, (last,), len(model.graph.node)))
    piece = Piece("pieces/whole.onnx", INPUT, OUTPUT, (first,), (last,))
    return bundles.write(folder, Bundle(bundles.FORMAT, "", model.graph.name, ends, (piece,), {}))


def tensor_of(value: onnx.ValueInfoProto) -> Tensor:
    """What the graph says of a tensor, as a bundle says it."""
    kind = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return Tensor(value.name, str(dtype), tuple(one.dim_value or -1 for one in kind.shape.dim))
