"""Images on the wire: uint8 [1, height, width, 3] as PNG (exact) or JPEG.

Pillow is imported when the first image comes. An image that is received is decoded only after its header has shown
the format, size and colours that were expected. Must never rotate, scale or convert.
"""

import io
from math import prod
from typing import Any

import numpy as np

from fedge.core.errors import RefusedTensor
from fedge.core.params import Array

SHARP = 90
MOST_SCANS = 32  # of a JPEG; progressive files have some 10, and each scan costs a pass over all pixels
_SCAN = b"\xff\xda"
_SLACK_BYTES = 1 << 16  # of a file beside its pixels
_MISSING = "Images travel as PNG or JPEG only with Pillow; `pip install '.[images]'` in fedge's folder."


def fits(dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is one RGB image."""
    return dtype == "uint8" and len(shape) == 4 and shape[0] == 1 and shape[3] == 3 and 0 not in shape


def encode(array: Array, quality: int | None) -> bytes:
    """A file for one image, uint8 [1, H, W, 3]: JPEG of that quality (1..100), or PNG without one.

    Raises RefusedTensor where the format does not hold so large an image, or Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise RefusedTensor(_MISSING) from None
    file = io.BytesIO()
    options: dict[str, Any] = {"format": "PNG"}
    if quality is not None:  # at a quality of 90 and more, colours are as sharp as brightness
        options = {"format": "JPEG", "quality": quality, "subsampling": "4:4:4" if quality >= SHARP else "4:2:0"}
    try:
        Image.fromarray(array[0]).save(file, **options)
    except (OSError, ValueError) as error:
        raise RefusedTensor(f"The image has no file ({error}); send it `raw`.") from None
    return file.getvalue()


def decode(data: bytes, shape: tuple[int, ...], kind: str) -> Array:
    """The pixels of a PNG or JPEG file (`kind`), uint8 of `shape`. Raises RefusedTensor."""
    if len(data) > 2 * prod(shape) + _SLACK_BYTES or (kind == "JPEG" and data.count(_SCAN) > MOST_SCANS):
        raise RefusedTensor(f"The {kind} file is larger than its pixels or has too many scans; encode it again.")
    try:
        from PIL import Image
    except ImportError:
        raise RefusedTensor(_MISSING) from None
    try:
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:  # reads the header only
            seen = (image.mode, *image.size)
            pixels = np.array(image) if seen == ("RGB", shape[2], shape[1]) else None
    except Exception as error:  # Pillow's readers raise of every kind on damaged files
        raise RefusedTensor(f"The {kind} file cannot be read ({type(error).__name__}); encode it again.") from None
    if pixels is None:
        raise RefusedTensor(f"The {kind} file holds {seen}, which is not the shape it claims; encode it again.")
    return pixels.reshape(shape)
