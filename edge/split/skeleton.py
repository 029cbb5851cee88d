"""A model file as a skeleton: the graph without the weights that lie beside it, checked before anything of it is used.

Owns what is refused of a file: what is no ONNX, too large, of unknown operators, or names data outside its folder.
Must never read external weights of more than a few bytes.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError, EncodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from fedge.core.errors import ModelError
from fedge.core.limits import EdgeLimits

SMALL_BYTES = 1024  # weights below it stay in the graph
DOMAINS = ("", "ai.onnx", "com.microsoft")


def read_skeleton(path: Path, limits: EdgeLimits) -> ModelProto:
    """The checked graph in `path`, its external weights unread but for small ones, its functions inlined.

    Raises ModelError with the reason and the remedy.
    """
    if not path.is_file():
        raise ModelError(f"There is no model {str(path)!r}; name an ONNX file.")
    size = path.stat().st_size
    if size > limits.max_model_bytes:
        raise ModelError(
            f"{path.name!r} has {size} bytes, {limits.max_model_bytes} are allowed; "
            "save its weights beside it (onnx.save_model with save_as_external_data=True)."
        )
    model = _parse(path)
    _check_nodes(model, limits)
    _check_graph(model.graph)
    for tensor in _tensors(model.graph):
        _check_external(tensor, path.parent, limits)
    _check_whole(path)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor) and _length(tensor, path.parent) < SMALL_BYTES:
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    return model


def graphs_in(node: NodeProto) -> Iterator[GraphProto]:
    """The bodies of a node: two for If, one for Loop and Scan, none for most."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def captured(graph: GraphProto) -> set[str]:
    """What the body of a node takes from the graph around it, by name."""
    own = {value.name for value in [*graph.input, *graph.initializer]}
    taken: set[str] = set()
    for node in graph.node:
        taken |= set(node.input) - own
        for body in graphs_in(node):
            taken |= captured(body) - own
        own |= set(node.output)
    return (taken | ({value.name for value in graph.output} - own)) - {""}


def nodes_in(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those in bodies of others too."""
    for node in graph.node:
        yield node
        for body in graphs_in(node):
            yield from nodes_in(body)


def _parse(path: Path) -> ModelProto:
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except (DecodeError, EncodeError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path.name!r} is not an ONNX model ({one_line(error)}); export it again.") from None
    if not model.ir_version or not model.opset_import or not model.graph.node:
        raise ModelError(f"{path.name!r} is not an ONNX model, or has no operators; export it again.")
    if not all(isinstance(text, str) for text in _texts(model)):  # protobuf gives bytes for what is no UTF-8
        raise ModelError(f"{path.name!r} is not an ONNX model, as its names are no text; export it again.")
    return model


def _texts(model: ModelProto) -> Iterator[object]:
    """All names in a model."""
    yield from (opset.domain for opset in model.opset_import)
    for graph in [model.graph, *(body for node in nodes_in(model.graph) for body in graphs_in(node))]:
        for value in [*graph.input, *graph.output, *graph.value_info]:
            yield value.name
            yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)
    for tensor in _tensors(model.graph):
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))


def _check_nodes(model: ModelProto, limits: EdgeLimits) -> None:
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    for count, node in enumerate(nodes_in(model.graph), 1):
        if count > limits.max_nodes:
            raise ModelError(f"The model has more than {limits.max_nodes} operators; cut it where it is trained.")
        if node.domain not in DOMAINS:
            raise ModelError(
                f"The operator {node.op_type!r} is of the domain {node.domain!r}, unknown here; replace it."
            )
        version = opsets.get(node.domain, opsets.get("ai.onnx" if node.domain == "" else "", 0))
        if node.domain != "com.microsoft" and not onnx.defs.has(node.op_type, version, ""):
            raise ModelError(
                f"The operator {node.op_type!r} is not in opset {version}; export with standard operators."
            )


def _check_graph(graph: GraphProto) -> None:
    filled = {tensor.name for tensor in graph.initializer}
    if all(value.name in filled for value in graph.input):
        raise ModelError("The model has no input; export it with one.")
    if not graph.output:
        raise ModelError("The model has no output; export it with one.")
    if graph.sparse_initializer or graph.quantization_annotation:
        raise ModelError("Sparse weights and quantisation annotations would be lost in a cut; export dense weights.")
    outer = {id(tensor) for tensor in graph.initializer}
    for tensor in _tensors(graph):
        if uses_external_data(tensor) and id(tensor) not in outer:
            raise ModelError(f"{tensor.name!r} within an operator keeps its data outside; save it within the graph.")


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """All constant tensors: initialisers and attributes, in bodies too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors
        for body in graphs_in(node):
            yield from _tensors(body)


def _check_external(tensor: TensorProto, folder: Path, limits: EdgeLimits) -> None:
    if not uses_external_data(tensor):
        return
    name, offset, length = place_of(tensor)
    location = PurePosixPath(name)
    path = folder / location
    if location.is_absolute() or ".." in location.parts or "\\" in name or "\0" in name:
        raise ModelError(f"The weights {tensor.name!r} lie outside the model's folder; do not use this model.")
    steps = [folder.joinpath(*location.parts[: count + 1]) for count in range(len(location.parts))]
    if any(step.is_symlink() for step in steps):
        raise ModelError(f"The weights {tensor.name!r} lie behind a link; put the file itself beside the model.")
    if not path.is_file():
        raise ModelError(f"The file {name!r} with weights is missing; copy it beside the model.")
    size = path.stat().st_size
    length = max(size - offset, 0) if length is None else length
    if size > limits.max_weights_bytes or offset + length > size:
        raise ModelError(f"The weights {tensor.name!r} reach beyond their file or the limits; copy the file again.")


def place_of(tensor: TensorProto) -> tuple[str, int, int | None]:
    """The file, the first byte and the count of bytes of a tensor outside the graph; None is the rest of the file.

    Raises ModelError where this cannot be told.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    numbers = [place.get("offset") or "0", place.get("length") or "0"]
    if not place.keys() <= {"location", "offset", "length", "checksum"} or not all(map(str.isdecimal, numbers)):
        raise ModelError(f"The weights {tensor.name!r} have an unreadable place; export the model again.")
    offset, length = map(int, numbers)
    return place.get("location", ""), offset, length if place.get("length") else None


def _length(tensor: TensorProto, folder: Path) -> int:
    location, offset, length = place_of(tensor)
    return (folder / location).stat().st_size - offset if length is None else length


def _check_whole(path: Path) -> None:
    """What is left is onnx's own business: order, types, attributes."""
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        raise ModelError(f"{path.name!r} is no valid model ({one_line(error)}); export it again.") from None


def one_line(error: Exception) -> str:
    """What another library said, short enough for one sentence."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
