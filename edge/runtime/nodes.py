"""The operators of an ONNX graph, by name and outputs, read without the onnx package, which devices do not have.

Owns the few fields of the format that profiling needs; all others are skipped. Must never interpret weights.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from fedge.core.errors import BadBundle


@dataclass(frozen=True, slots=True)
class Node:
    """One operator; an optional output that is left out is ""."""

    name: str
    outputs: tuple[str, ...]


def nodes(model: bytes) -> list[Node]:
    """The operators in the order of the file. Raises BadBundle where the bytes are no ONNX model."""
    try:
        found = _model().FromString(model).graph.node
    except DecodeError:
        raise BadBundle("A piece of the bundle is no ONNX model; export the bundle again.") from None
    return [Node(one.name, tuple(one.output)) for one in found]


@cache
def _model() -> Any:
    """ModelProto, GraphProto and NodeProto, with the field numbers of onnx.proto."""
    field = descriptor_pb2.FieldDescriptorProto
    one, many, text, message = field.LABEL_OPTIONAL, field.LABEL_REPEATED, field.TYPE_STRING, field.TYPE_MESSAGE
    file = descriptor_pb2.FileDescriptorProto(name="nodes.proto", package="nodes", syntax="proto2")
    kind = file.message_type.add(name="Node")
    kind.field.add(name="output", number=2, label=many, type=text)
    kind.field.add(name="name", number=3, label=one, type=text)
    kind = file.message_type.add(name="Graph")
    kind.field.add(name="node", number=1, label=many, type=message, type_name=".nodes.Node")
    kind = file.message_type.add(name="Model")
    kind.field.add(name="graph", number=7, label=one, type=message, type_name=".nodes.Graph")
    pool = descriptor_pool.DescriptorPool()  # its own, so that the onnx package may be loaded beside it
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("nodes.Model"))
