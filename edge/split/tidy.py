"""A skeleton made ready to be cut: constants in one place, shapes of inputs fixed, known shapes folded.

Owns what is changed in a model before its analysis; what it computes stays the same. Must never read files.
"""

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fedge.core.errors import ModelError
from fedge.edge.bundle import Tensor
from fedge.edge.split.skeleton import nodes_in


def tidy(model: ModelProto) -> None:
    """Constants become initialisers, initialisers are no inputs, and what tells of the exporter is dropped."""
    graph = model.graph
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.attribute[0].name == "value":
            tensor = graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
    filled = {tensor.name for tensor in graph.initializer}
    refill(graph.node, [node for node in graph.node if node.op_type != "Constant" or node.output[0] not in filled])
    refill(graph.input, [value for value in graph.input if value.name not in filled])
    model.ir_version = max(model.ir_version, 4)  # before it, initialisers had to be inputs as well
    for part in [model, graph, *graph.initializer, *graph.input, *graph.output, *graph.value_info, *nodes_in(graph)]:
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def refill(field: Any, items: list[Any]) -> None:
    """A repeated field of a message, filled anew."""
    copies = [type(item).FromString(item.SerializeToString()) for item in items]
    del field[:]
    field.extend(copies)


def fix(model: ModelProto, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give inputs the shapes that the caller knows; what the exporter wrote of other tensors is dropped then."""
    inputs = {value.name: value for value in model.graph.input}
    for name, shape in shapes.items():
        if name not in inputs:
            raise ModelError(f"The model has no input {name!r} to give a shape; it has {', '.join(inputs)}.")
        dims = inputs[name].type.tensor_type.shape.dim
        known = [dim.dim_value for dim in dims]
        if len(known) != len(shape) or any(old not in (0, new) or new < 1 for old, new in zip(known, shape)):
            raise ModelError(f"The input {name!r} cannot have the shape {list(shape)}; the model says otherwise.")
        for dim, extent in zip(dims, shape):
            dim.dim_value = extent
    if shapes:
        del model.graph.value_info[:]
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")


def same_batch(model: ModelProto, values: Mapping[str, ValueInfoProto], batch: str) -> set[str]:
    """All names that shape inference has given to the extent `batch`, itself among them.

    It gives a new one at a Reshape to [-1, n, ...]. Where a row held n * ... values before, too, rows stay rows.
    """
    names = {batch}
    targets = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT64}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in targets:
            before, after = (_extents(values.get(name)) for name in (node.input[0], node.output[0]))
            if before and after and before[0] in names and _keeps_rows(before[1:], targets[node.input[1]]):
                names.add(str(after[0]) or batch)
    return names


def _extents(value: ValueInfoProto | None) -> list[int | str]:
    """The extents of a tensor, by name where they are free; none where the rank is unknown."""
    dims = value.type.tensor_type.shape.dim if value is not None else ()
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in dims]


def _keeps_rows(row: Sequence[int | str], target: TensorProto) -> bool:
    """Whether a Reshape to `target` gives as many rows of as many values."""
    if target.data_location == TensorProto.EXTERNAL or len(target.dims) != 1 or not target.dims[0]:
        return False
    first, *rest = numpy_helper.to_array(target).tolist()
    sizes = [extent for extent in row if isinstance(extent, int)]
    return first == -1 and min(rest, default=1) > 0 and len(sizes) == len(row) and prod(sizes) == prod(rest)


def fold_shapes(model: ModelProto, tensors: Mapping[str, Tensor], batched: Collection[str], primary: str) -> None:
    """What is asked of shapes becomes constants, and the batch where it is free is asked of the `primary` input alone.

    So no tail asks for a tensor only to measure it. `batched` are the tensors whose first extent is the primary's.
    """
    graph, kept = model.graph, []
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for node in graph.node:
        extents = _asked(node, tensors) if node.op_type in ("Shape", "Size") else None
        if extents is not None and min(extents, default=1) > 0:
            value = extents if node.op_type == "Shape" else np.prod(extents)
            graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int64), node.output[0]))
        elif opset >= 15 and extents and extents[0] == -1 and node.op_type == "Shape" and node.input[0] in batched:
            # before opset 15, Shape has no start and end
            kept += _batch_and(extents[1:], graph, primary, node.output[0])
        else:
            kept.append(node)
    refill(graph.node, kept)


def _asked(node: NodeProto, tensors: Mapping[str, Tensor]) -> Sequence[int] | None:
    """The extents that a Shape or Size asks for, as far as they are known; None where more than the batch is not."""
    span = {attribute.name: attribute.i for attribute in node.attribute}
    if node.input[0] in tensors:
        shape = tensors[node.input[0]].shape
        return shape[span.get("start", 0) : span.get("end", len(shape))]
    return (-1,) if node.op_type == "Shape" and span.get("start", 0) == 0 and span.get("end") == 1 else None


def _batch_and(rest: Sequence[int], graph: GraphProto, primary: str, name: str) -> list[NodeProto]:
    """Operators that give the shape `name`: the batch of the primary input, then known extents."""
    if not rest:
        return [helper.make_node("Shape", [primary], [name], start=0, end=1)]
    batch, known = f"{name}/batch", f"{name}/known"
    graph.initializer.append(numpy_helper.from_array(np.asarray(rest, np.int64), known))
    shape = helper.make_node("Shape", [primary], [batch], start=0, end=1)
    return [shape, helper.make_node("Concat", [batch, known], [name], axis=0)]
