"""Preprocessing of images as part of the graph: its input becomes the uint8 picture itself.

So a device feeds what its camera gives, and the picture may go to the cloud as PNG or JPEG like any other tensor at a
boundary. Owns the operators that are prepended. Must never resize: the caller brings the size that the model takes.
"""

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from fedge.core.errors import ModelError
from fedge.core.params import Array
from fedge.edge.split.tidy import refill

_LAYOUTS = {"NCHW": (3, 1, 1), "NHWC": (3,)}  # the shape in which a mean per channel is subtracted
_ORDERS = {"NCHW": (0, 3, 1, 2), "NHWC": (0, 1, 2, 3)}


@dataclass(frozen=True)
class Image:
    """How a model wants pictures: `(pixel * scale - mean) / std` per channel, red first, in its `layout`.

    `height` and `width` are in pixels. `layout` is the model's own, "NCHW" or "NHWC"; pictures come as NHWC.
    """

    height: int
    width: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    scale: float = 1 / 255
    layout: str = "NCHW"


def prepend(model: ModelProto, primary: str, image: Image) -> str:
    """Put preprocessing before the input `primary` of `model`, in place; the name of the new uint8 NHWC input.

    Raises ModelError where the input does not take such a picture.
    """
    graph = model.graph
    value = next(value for value in graph.input if value.name == primary)
    _check(value, image)
    used = {name for node in graph.node for name in [*node.input, *node.output]} | {value.name for value in graph.input}
    names = [_free(f"image{suffix}", used) for suffix in ("", "_ordered", "_float", "_factor", "_offset", "_scaled")]
    picture, ordered, floating, factor, offset, scaled = names
    constants = zip(_constants(image), (factor, offset))
    graph.initializer.extend(numpy_helper.from_array(constant, name) for constant, name in constants)
    nodes = [
        helper.make_node("Transpose", [picture], [ordered], perm=_ORDERS[image.layout]),
        helper.make_node("Cast", [ordered], [floating], to=TensorProto.FLOAT),
        helper.make_node("Mul", [floating, factor], [scaled]),
        helper.make_node("Sub", [scaled, offset], [primary]),
    ]
    refill(graph.node, [*nodes, *graph.node])
    batch = value.type.tensor_type.shape.dim[0]
    shape = [batch.dim_param or batch.dim_value or None, image.height, image.width, 3]
    value.CopyFrom(helper.make_tensor_value_info(picture, TensorProto.UINT8, shape))
    return picture


def scaled(pictures: Array, image: Image) -> Array:
    """What the prepended operators make of uint8 pictures [n, height, width, 3], to the bit: the model's own input."""
    factor, offset = _constants(image)
    made: Array = pictures.transpose(_ORDERS[image.layout]).astype(np.float32) * factor - offset
    return made


def _constants(image: Image) -> tuple[Array, Array]:
    """What pixels are multiplied by, and what is then subtracted."""
    std, per_channel = np.asarray(image.std, np.float64), _LAYOUTS[image.layout]
    factor, offset = image.scale / std, np.asarray(image.mean) / std
    return factor.astype(np.float32).reshape(per_channel), offset.astype(np.float32).reshape(per_channel)


def _check(value: ValueInfoProto, image: Image) -> None:
    if image.layout not in _LAYOUTS:
        raise ModelError(f"The layout {image.layout!r} is unknown; use NCHW or NHWC.")
    if min(image.std) <= 0 or image.scale <= 0 or len(image.mean) != 3 or len(image.std) != 3:
        raise ModelError("The image's scale and three deviations must be positive, with three means; mend them.")
    dims = value.type.tensor_type.shape.dim
    size = (3, image.height, image.width) if image.layout == "NCHW" else (image.height, image.width, 3)
    if value.type.tensor_type.elem_type != TensorProto.FLOAT or len(dims) != 4:
        raise ModelError(f"The input {value.name!r} takes no float32 pictures of rank 4; leave out the image.")
    known = [dim.dim_value if dim.HasField("dim_value") else extent for dim, extent in zip(list(dims)[1:], size)]
    if tuple(known) != size:
        raise ModelError(f"The input {value.name!r} takes {known}, not {list(size)}; give the image the model's size.")


def _free(name: str, used: set[str]) -> str:
    while name in used:
        name += "_"
    used.add(name)
    return name
