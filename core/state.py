"""Plain data with NumPy arrays inside, as bytes and back: how states outlive a process.

MessagePack with one extension type for arrays; types come from the reader's annotations, never from the bytes. Must
never be fed from the network (see fedge.protos.wire for that).
"""

from typing import Any, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")
_ARRAY = 1  # the extension type: dtype and shape in MessagePack behind a 2-byte length, then the elements


def _pack(value: Any) -> msgspec.msgpack.Ext:
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.hasobject:
        raise TypeError(f"a state may hold plain data and numeric arrays, not {type(value).__name__}")
    head = msgspec.msgpack.encode((value.dtype.str, value.shape))
    return msgspec.msgpack.Ext(_ARRAY, len(head).to_bytes(2, "big") + head + value.tobytes())


def _unpack(code: int, data: memoryview) -> Any:
    if code != _ARRAY:
        raise ValueError(f"unknown extension type {code}")
    split = 2 + int.from_bytes(data[:2], "big")
    dtype, shape = msgspec.msgpack.decode(data[2:split])
    return np.frombuffer(data[split:], np.dtype(dtype)).reshape(shape).copy()


_encoder = msgspec.msgpack.Encoder(enc_hook=_pack)
_decoder = msgspec.msgpack.Decoder(ext_hook=_unpack)


def encode(state: Any) -> bytes:
    """Dataclasses, dicts, lists, numbers, strings and arrays as bytes. Raises TypeError for anything else."""
    return _encoder.encode(state)


def decode(data: bytes) -> Any:
    """The same as dicts, lists, numbers, strings and arrays. Raises msgspec.DecodeError for other bytes."""
    return _decoder.decode(data)


def convert(raw: Any, type_: type[T]) -> T:
    """What `decode` gave, as `type_`. Raises msgspec.ValidationError where it does not fit."""
    return msgspec.convert(raw, type_, dec_hook=lambda _, value: value)
