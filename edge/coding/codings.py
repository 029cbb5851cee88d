"""Codings: how a tensor at a cut becomes the bytes of a message, and comes back.

A coding is named by text:

    raw                 the tensor's own bytes, exact
    f16                 IEEE half precision
    u8, u8c             8 bits, one range for the tensor or one per channel (axis 1)
    u8@99.9, u8c@99.9   the range leaves out the values beyond this percentile and its mirror image
    ...+zlib, ...+zstd  one of these, compressed after
    png, jpeg90         one RGB image, uint8 [1, height, width, 3]; the number is JPEG's quality

What comes in is hostile: `decode` knows the shape, the type and every size before it allocates. Numbers travel in
little-endian order. Must never import onnxruntime, or guess what was meant.
"""

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import zstandard

from fedge.core.errors import RefusedTensor
from fedge.core.limits import EdgeLimits
from fedge.core.params import Array
from fedge.edge.bundle import Tensor
from fedge.edge.coding import affine, images

FLOATS = ("float16", "float32", "float64")
DTYPES = {*FLOATS, *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "bool"}
LARGEST_HALF = 65519.0  # rounds to 65504, the largest number of half precision
_NAME = re.compile(
    r"(?:(?P<base>raw|f16|u8c?)(?:(?<=u8|8c)@(?P<percentile>\d{2,3}(?:\.\d{1,4})?))?(?:\+(?P<packer>zlib|zstd))?"
    r"|(?P<image>png|jpeg(?P<quality>[1-9]\d{0,2})))",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Coded:
    """One tensor as it travels; see `Coded` in protos/edge.proto. `low` and `high` are empty but for 8-bit codings."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    data: bytes

    @property
    def size_bytes(self) -> int:
        """What travels: the data and the ranges, four bytes a number; names and shapes are small beside them."""
        return len(self.data) + 4 * (len(self.low) + len(self.high))


@dataclass(frozen=True, slots=True)
class _Scheme:
    base: str  # raw, f16, u8, u8c, PNG or JPEG
    percentile: float = 100.0
    packer: str = ""
    quality: int | None = None

    def ranges(self, shape: tuple[int, ...]) -> int:
        """How many ranges travel with a tensor."""
        return {"u8": 1, "u8c": affine.channels(shape)}.get(self.base, 0)

    def width(self, dtype: str) -> int:
        """Bytes per value before compression."""
        return {"f16": 2, "u8": 1, "u8c": 1}.get(self.base, np.dtype(dtype).itemsize)


def check(coding: str) -> None:
    """Raises RefusedTensor where no coding has this name."""
    _scheme(coding)


def encode(name: str, array: Array, coding: str) -> Coded:
    """The tensor `name` in a coding.

    Raises RefusedTensor where the coding is none, does not suit the tensor's type, or cannot hold its values.
    """
    scheme, dtype = _scheme(coding), array.dtype.name
    _check_suits(scheme, coding, dtype, array.shape)
    low = high = np.empty(0, np.float32)
    if scheme.base in ("PNG", "JPEG"):
        return Coded(name, dtype, array.shape, coding, (), (), images.encode(array, scheme.quality))
    if scheme.base == "f16":
        array = _halved(array)
    elif scheme.base != "raw":
        array = np.ascontiguousarray(array, np.float32).reshape(array.shape)  # the former makes rank 0 rank 1
        low, high = affine.ranges(array, scheme.ranges(array.shape), scheme.percentile)
        array = affine.quantise(array, low, high, clip=scheme.percentile < 100.0)
    data = _pack(array, scheme.packer) if scheme.packer else array.tobytes()
    return Coded(name, dtype, array.shape, coding, tuple(low.tolist()), tuple(high.tolist()), data)


def decode(coded: Coded, tensor: Tensor, limits: EdgeLimits = EdgeLimits()) -> Array:
    """The tensor that was sent, as `tensor` wants it. It may share, read-only, the memory of `coded.data`.

    Raises RefusedTensor on another name, type or shape, on bytes that are too many, too few or no such coding.
    """
    if coded.name != tensor.name or coded.dtype != tensor.dtype:
        raise RefusedTensor(
            f"{coded.name[:80]!r} of {coded.dtype[:20]!r} came where {tensor.name!r} of {tensor.dtype} is wanted."
        )
    scheme, count = _scheme(coded.coding), _count(coded, tensor, limits)
    _check_suits(scheme, coded.coding, tensor.dtype, coded.shape)
    if not len(coded.low) == len(coded.high) == scheme.ranges(coded.shape):
        raise RefusedTensor(f"{tensor.name!r} came with {len(coded.low)} ranges, which its coding has not.")
    if scheme.base in ("PNG", "JPEG"):
        return images.decode(coded.data, coded.shape, scheme.base)
    data = _unpack(coded.data, count * scheme.width(tensor.dtype), scheme.packer)
    return _values(data, coded, tensor.dtype, scheme)


def _values(data: bytes, coded: Coded, dtype: str, scheme: _Scheme) -> Array:
    """The numbers in `data`, whose length has been checked."""
    kind = np.dtype({"f16": "<f2", "raw": dtype}.get(scheme.base, "u1"))
    flat = np.frombuffer(data, kind) if data else np.empty(0, kind)
    array = flat.reshape(coded.shape)
    if scheme.base == "f16":
        return array.astype(dtype)
    if scheme.base == "raw":
        if dtype == "bool" and data and flat.view(np.uint8).max() > 1:
            raise RefusedTensor(f"{coded.name!r} came with truth values that are neither 0 nor 1.")
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = np.array(coded.low, np.float32), np.array(coded.high, np.float32)
        span = high - low
        if not (np.isfinite(low).all() and np.isfinite(span).all() and (span >= 0).all()):
            raise RefusedTensor(f"The ranges of {coded.name!r} are not finite or upside down; encode it again.")
        return affine.restore(array, low, high).astype(dtype, copy=False)


@lru_cache(maxsize=256)
def _scheme(coding: str) -> _Scheme:
    found = _NAME.fullmatch(coding)
    percentile = float(found["percentile"] or 100.0) if found else 0.0
    quality = int(found["quality"] or 90) if found else 0
    if not found or not 50.0 < percentile <= 100.0 or quality > 100:
        raise RefusedTensor(f"No coding is called {coding[:40]!r}; use e.g. 'raw', 'f16', 'u8c@99.9+zstd' or 'jpeg90'.")
    if found["image"]:
        return _Scheme("JPEG", quality=quality) if found["quality"] else _Scheme("PNG")
    return _Scheme(found["base"], percentile, found["packer"] or "")


def _check_suits(scheme: _Scheme, coding: str, dtype: str, shape: tuple[int, ...]) -> None:
    if scheme.base in ("PNG", "JPEG"):
        if not images.fits(dtype, shape):
            raise RefusedTensor(f"{coding!r} is for one image, uint8 [1, height, width, 3], not {dtype} {shape}.")
    elif dtype not in (DTYPES if scheme.base == "raw" else FLOATS):
        raise RefusedTensor(f"{coding!r} does not code tensors of {dtype[:20]!r}; use `raw` for integers.")


def _count(coded: Coded, tensor: Tensor, limits: EdgeLimits) -> int:
    """How many values the tensor has. Raises RefusedTensor where its shape is not the wanted one, or too large."""
    shape = coded.shape
    fits = len(shape) == len(tensor.shape) <= limits.max_rank and all(
        0 <= have <= limits.max_tensor_bytes and want in (have, min(want, -1))
        for have, want in zip(shape, tensor.shape)
    )
    if not fits:
        raise RefusedTensor(f"{tensor.name!r} came in the shape {shape[:9]}, {tensor.shape} is wanted.")
    most = prod(max(1, extent) for extent in shape) * np.dtype(tensor.dtype).itemsize
    if max(most, len(coded.data)) > limits.max_tensor_bytes:
        raise RefusedTensor(f"{tensor.name!r} is larger than {limits.max_tensor_bytes} bytes; send less at a time.")
    return prod(shape)


def _halved(array: Array) -> Array:
    if array.size and not (array.min() >= -LARGEST_HALF and array.max() <= LARGEST_HALF):
        raise RefusedTensor("A tensor with NaN or values beyond 65504 has no half precision; use `u8`, or `raw`.")
    return array.astype("<f2")


def _pack(array: Array, packer: str) -> bytes:
    data = np.ascontiguousarray(array).data.cast("B") if array.size else b""
    packed: bytes = zlib.compress(data, 1) if packer == "zlib" else zstandard.ZstdCompressor(level=1).compress(data)
    return packed


def _unpack(data: bytes, size: int, packer: str) -> bytes:
    """What `data` was before compression; never more than `size` + 1 bytes are written. Raises RefusedTensor."""
    plain: bytes | None = data
    try:
        if packer == "zlib":
            unpacker = zlib.decompressobj()
            plain = unpacker.decompress(data, size + 1)
            plain = plain if unpacker.eof and not unpacker.unused_data else None
        elif packer == "zstd":
            # The size that the frame claims is allocated whatever the bound that is given, so it is looked at first.
            claims = zstandard.get_frame_parameters(data).content_size
            unzstd = zstandard.ZstdDecompressor().decompress
            plain = unzstd(data, max_output_size=size, allow_extra_data=False) if claims == size else None
    except (zlib.error, zstandard.ZstdError) as error:
        raise RefusedTensor(f"The tensor does not decompress ({error}); encode it again.") from None
    if plain is None or len(plain) != size:
        raise RefusedTensor(f"The tensor has not the {size} bytes that its shape needs; encode it again.")
    return plain
