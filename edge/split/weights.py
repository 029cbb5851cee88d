"""The weights of a cut model, once, in one file that all its pieces name parts of.

Owns the layout of that file: tensors in the order of the graph, each at a multiple of 64 bytes. Small ones stay in the
graph, since shapes and axes must be readable there. Must never read more of a weights file than what is copied at once.
"""

from collections.abc import Iterable
from io import BufferedWriter
from pathlib import Path

from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import uses_external_data

from fedge.core.errors import ModelError
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import WEIGHTS
from fedge.edge.split.skeleton import SMALL_BYTES, place_of

_ALIGN_BYTES = 64
_BLOCK_BYTES = 1 << 20
_PACKED = {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}  # two elements to a byte


def write_weights(
    tensors: Iterable[TensorProto], source: Path, folder: Path, limits: EdgeLimits
) -> dict[str, TensorProto]:
    """Write the weights file of a bundle in `folder`; the tensors as the pieces' graphs hold them, by name.

    `source` is the folder of weights that lie outside the graph. Raises ModelError above the limits.
    """
    placed: dict[str, TensorProto] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for tensor in tensors:
            placed[tensor.name] = _place(tensor, source, file)
            if file.tell() > limits.max_weights_bytes:
                raise ModelError(f"The weights have more than {limits.max_weights_bytes} bytes; use a smaller model.")
    return placed


def _place(tensor: TensorProto, source: Path, file: BufferedWriter) -> TensorProto:
    data = b"" if uses_external_data(tensor) else _inline(tensor)
    if len(data) < SMALL_BYTES and not uses_external_data(tensor):
        return tensor
    file.write(bytes(-file.tell() % _ALIGN_BYTES))
    offset = file.tell()
    if data:
        file.write(data)
    else:
        _copy(tensor, source, file)
    outside = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    outside.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", str(file.tell() - offset))):
        outside.external_data.add(key=key, value=value)
    return outside


def _inline(tensor: TensorProto) -> bytes:
    """The tensor's bytes; none where it can only stay in the graph."""
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    if tensor.data_type == TensorProto.STRING or tensor.data_type in _PACKED:
        return b""
    return numpy_helper.to_array(tensor).tobytes()


def _copy(tensor: TensorProto, source: Path, file: BufferedWriter) -> None:
    location, start, length = place_of(tensor)
    path = source / location
    left = path.stat().st_size - start if length is None else length
    with path.open("rb") as data:
        data.seek(start)
        while left:
            block = data.read(min(left, _BLOCK_BYTES))
            if not block:
                raise ModelError(f"The weights {tensor.name!r} end too early; copy the file {location!r} again.")
            file.write(block)
            left -= len(block)
