"""Plain data with NumPy arrays inside, as bytes and back: how states outlive a process.

MessagePack in which an array is its dtype and shape, then the elements of all arrays in the order they were met; so
encoding copies no array. Types come from the reader's annotations, never from the bytes. Must never be fed from the
network (see fedge.protos.wire for that).
"""

from typing import Any, TypeVar

import msgspec
import numpy as np

from fedge.core.params import Array

T = TypeVar("T")
Parts = list[bytes | memoryview]
_ARRAY = 1  # the extension type of an array's dtype and shape
_LENGTH_BYTES = 8  # of the MessagePack, before it


def encode_parts(state: Any) -> Parts:
    """Dataclasses, dicts, lists, numbers, strings and arrays as buffers to write one after the other.

    The arrays' own memory is among them: write them before the state changes. Raises TypeError for anything else.
    """
    arrays: list[Array] = []

    def pack(value: Any) -> msgspec.msgpack.Ext:
        if not isinstance(value, np.ndarray | np.generic) or value.dtype.hasobject:
            raise TypeError(f"a state may hold plain data and numeric arrays, not {type(value).__name__}")
        arrays.append(np.ascontiguousarray(value))
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode((value.dtype.str, value.shape)))

    body = msgspec.msgpack.encode(state, enc_hook=pack)
    elements = [array.reshape(-1).view(np.uint8).data for array in arrays]
    return [len(body).to_bytes(_LENGTH_BYTES, "big"), body, *elements]


def encode(state: Any) -> bytes:
    """The same in one piece."""
    return b"".join(encode_parts(state))


def decode(data: bytes) -> Any:
    """What was encoded, as dicts, lists, numbers, strings and arrays. Raises msgspec.DecodeError for other bytes."""
    split = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    at = split

    def unpack(code: int, head: memoryview) -> Any:
        nonlocal at
        if code != _ARRAY:
            raise msgspec.DecodeError(f"unknown extension type {code}")
        name, shape = msgspec.msgpack.decode(head)
        dtype, start = np.dtype(name), at
        at += dtype.itemsize * int(np.prod(shape))
        if at > len(data):
            raise msgspec.DecodeError("the arrays are cut off")
        return np.frombuffer(data, dtype, count=int(np.prod(shape)), offset=start).reshape(shape).copy()

    return msgspec.msgpack.decode(memoryview(data)[_LENGTH_BYTES:split], ext_hook=unpack)


def convert(raw: Any, type_: type[T]) -> T:
    """What `decode` gave, as `type_`. Raises msgspec.ValidationError where it does not fit."""
    return msgspec.convert(raw, type_, dec_hook=lambda _, value: value)
