"""An ONNX graph of one operator, written without the onnx package, which devices do not have.

Owns the few fields of the format that such a graph needs, with the field numbers of onnx.proto. Weights are not in the
graph: it only says that they lie elsewhere. Must never load anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from fedge.core.params import Array

_FIELDS = {  # message: number, name and type of its fields; * for many
    "Model": ((1, "ir_version", "int"), (7, "graph", "Graph"), (8, "opset_import", "*Opset")),
    "Opset": ((1, "domain", "text"), (2, "version", "int")),
    "Graph": (
        (1, "node", "*Node"),
        (2, "name", "text"),
        (5, "initializer", "*Tensor"),
        (11, "input", "*Value"),
        (12, "output", "*Value"),
    ),
    "Node": (
        (1, "input", "*text"),
        (2, "output", "*text"),
        (4, "op_type", "text"),
        (5, "attribute", "*Attribute"),
        (7, "domain", "text"),
    ),
    "Attribute": ((1, "name", "text"), (3, "i", "int"), (20, "type", "int")),
    "Value": ((1, "name", "text"), (2, "type", "Type")),
    "Type": ((1, "tensor_type", "Shaped"),),
    "Shaped": ((1, "elem_type", "int"), (2, "shape", "Shape")),
    "Shape": ((1, "dim", "*Dim"),),
    "Dim": ((1, "dim_value", "int"), (2, "dim_param", "text")),
    "Tensor": (
        (1, "dims", "*int"),
        (2, "data_type", "int"),
        (8, "name", "text"),
        (13, "external_data", "*Entry"),
        (14, "data_location", "int"),
    ),
    "Entry": ((1, "key", "text"), (2, "value", "text")),
}
_TYPES = {"float32": 1, "uint8": 2}
_INT, _EXTERNAL = 2, 1  # an attribute's type, a tensor's place
_IR_VERSION, _OPSET = 8, 17  # understood by every onnxruntime that has the operators


@dataclass(frozen=True, slots=True)
class Operator:
    """What computes y, and its whole-number attributes. `domain` is "" for those of ONNX itself."""

    name: str
    domain: str = ""
    attributes: Mapping[str, int] = field(default_factory=dict)


def linear(operator: Operator, weights: Mapping[str, Array], columns: int, rows: int) -> bytes:
    """A model: y [m, rows] = operator(x [m, columns], *weights), all floats being float32."""
    model = _model()()
    model.ir_version = _IR_VERSION
    model.opset_import.add(domain="", version=_OPSET)
    model.opset_import.add(domain="com.microsoft", version=1)
    graph = model.graph
    graph.name = "linear"
    _value(graph.input.add(name="x"), columns)
    _value(graph.output.add(name="y"), rows)
    node = graph.node.add(op_type=operator.name, domain=operator.domain, input=["x", *weights], output=["y"])
    for name, number in operator.attributes.items():
        node.attribute.add(name=name, i=number, type=_INT)
    for name, array in weights.items():
        kind = _TYPES[array.dtype.name]
        tensor = graph.initializer.add(name=name, dims=array.shape, data_type=kind, data_location=_EXTERNAL)
        for key, value in (("location", "given"), ("offset", "0"), ("length", str(array.nbytes))):
            tensor.external_data.add(key=key, value=value)
    serialised: bytes = model.SerializeToString()
    return serialised


def _value(value: Any, width: int) -> None:
    """Any number of rows of so many float32."""
    value.type.tensor_type.elem_type = _TYPES["float32"]
    value.type.tensor_type.shape.dim.add(dim_param="m")
    value.type.tensor_type.shape.dim.add(dim_value=width)


@cache
def _model() -> Any:
    """The class of ModelProto."""
    of = descriptor_pb2.FieldDescriptorProto
    plain = {"int": of.TYPE_INT64, "text": of.TYPE_STRING}
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="graph", syntax="proto2")
    for message, fields in _FIELDS.items():
        kind = file.message_type.add(name=message)
        for number, name, typed in fields:
            label = of.LABEL_REPEATED if typed.startswith("*") else of.LABEL_OPTIONAL
            base = typed.removeprefix("*")
            added = kind.field.add(name=name, number=number, label=label, type=plain.get(base, of.TYPE_MESSAGE))
            if base not in plain:
                added.type_name = f".graph.{base}"
    pool = descriptor_pool.DescriptorPool()  # its own, so that the onnx package may be loaded beside it
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("graph.Model"))
