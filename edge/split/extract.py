"""Pieces of a graph: the operators from some tensors to others, as a model of its own.

Owns the walk back from a piece's outputs to its inputs and the graph that comes of it. onnx's own extractor is not
used, as it loses what the bodies of If, Loop and Scan take from around them, and turns inputs that do not cut the graph
into an invalid model without a word. Must never copy weights: pieces name parts of the one weights file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from fedge.core.errors import CannotCut, ModelError
from fedge.edge.bundle import Tensor
from fedge.edge.split.graph import Graph
from fedge.edge.split.order import needed
from fedge.edge.split.skeleton import one_line


def extract(
    graph: Graph, inputs: Sequence[Tensor], outputs: Sequence[Tensor], weights: Mapping[str, TensorProto]
) -> tuple[ModelProto, tuple[Tensor, ...]]:
    """The piece that computes `outputs` from `inputs`, and all inputs it takes: the given ones, then side inputs.

    `weights` are the initialisers to put in, by name. Raises CannotCut where `inputs` do not cut `outputs` off.
    """
    stop = {tensor.name for tensor in inputs}
    maker = {name: node for node in graph.nodes for name in node.outputs}
    wanted = {tensor.name for tensor in outputs}
    indices = needed(maker, wanted, stop)
    measured = graph.primary if graph.primary in stop else next(iter(sorted(graph.batched & stop)), graph.primary)
    protos, read = [], set(wanted)
    for node in (node for node in graph.nodes if node.index in indices):
        proto, names = graph.model.graph.node[node.index], node.inputs
        if node.batch and node.probes(graph.primary):
            proto, names = _measure(proto, measured), (measured,)
        protos.append(proto)
        read.update(names)
    if graph.primary in read - stop:
        raise CannotCut(f"{min(wanted)!r} needs more of the input than {', '.join(sorted(stop))}; name another cut.")
    taken = (*inputs, *(graph.tensor(name) for name in graph.inputs if name in read - stop))
    return _model(graph, protos, taken, outputs, [weights[name] for name in weights if name in read - stop]), taken


def plain_session(model: bytes | str, folder: Path) -> ort.InferenceSession:
    """A piece, or the file of a model, as written: without optimisation, on one thread, weights from `folder`.

    Raises ModelError with what the runtime says where it cannot load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # what is wrong is in the error
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base class but this
        raise ModelError(
            f"ONNX Runtime cannot load the model ({one_line(error)}); export it with other operators."
        ) from None


def _measure(proto: NodeProto, name: str) -> NodeProto:
    """A Shape of another tensor that has the same first extent."""
    copy = NodeProto()
    copy.CopyFrom(proto)
    copy.input[0] = name
    return copy


def _model(
    graph: Graph,
    nodes: Sequence[NodeProto],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    weights: Sequence[TensorProto],
) -> ModelProto:
    def values(tensors: Sequence[Tensor]) -> list[ValueInfoProto]:
        return [_value(tensor, "batch" if tensor.name in graph.batched else None) for tensor in tensors]

    body = helper.make_graph(nodes, "piece", values(inputs), values(outputs), weights)
    opsets = graph.model.opset_import
    return helper.make_model(body, opset_imports=opsets, ir_version=graph.model.ir_version, producer_name="fedge")


def _value(tensor: Tensor, batch: str | None) -> ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return helper.make_tensor_value_info(tensor.name, kind, [batch if size < 0 else size for size in tensor.shape])
