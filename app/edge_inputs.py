"""What people give the commands of `fedge edge`: pictures, arrays, pairs and numbers, checked.

Must never guess: what does not fit is refused with a sentence.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedge.core.errors import DataError, ExperimentError
from fedge.core.params import Array
from fedge.edge.bundle import INPUT, Bundle

if TYPE_CHECKING:
    from fedge.edge.split.image import Image


def read(path: Path, bundle: Bundle) -> Array:
    """One input of the bundle's model: an .npy as it is, or a picture in the size that the model takes.

    Raises DataError where the file is neither, or the model takes no PIL.Image.
    """
    if path.suffix == ".npy":
        return _array(path)
    (tensor, *_) = bundle.boundary(INPUT).tensors
    if tensor.dtype != "uint8" or len(tensor.shape) != 4 or tensor.shape[3] != 3:
        raise DataError(
            f"The model takes {tensor.dtype} {list(tensor.shape)} and no pictures; give {path.name!r} as an .npy."
        )
    return _picture(path, tensor.shape[1], tensor.shape[2])


def _picture(path: Path, height: int, width: int) -> Array:
    try:
        import PIL.Image
    except ImportError:
        raise DataError("Reading pictures needs Pillow; install 'fedge[images]'.") from None
    try:
        with PIL.Image.open(path) as opened:
            small = opened.convert("RGB").resize((width, height))
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{str(path)!r} is no picture that can be read ({error}); give another.") from None
    return np.asarray(small, np.uint8)[None]


def samples(path: Path) -> tuple[Array, Array | None]:
    """The arrays x [n, ...] and y [n], or None, of an .npz. Raises DataError."""
    found = _loaded(path)
    if isinstance(found, np.ndarray) or "x" not in found:
        raise DataError(f"{str(path)!r} holds no array x; save samples as x, and their classes as y, with numpy.savez.")
    return found["x"], found.get("y")


def _array(path: Path) -> Array:
    found = _loaded(path)
    if not isinstance(found, np.ndarray):
        raise DataError(f"{str(path)!r} holds several arrays; give one input as an .npy.")
    return found


def _loaded(path: Path) -> Array | dict[str, Array]:
    try:
        found = np.load(path, allow_pickle=False)
        return {name: found[name] for name in found.files} if hasattr(found, "files") else found
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{str(path)!r} cannot be read as arrays ({error}); write it with numpy.") from None


def pair(text: str) -> tuple[str, str]:
    """NAME=TENSOR. Raises ExperimentError."""
    name, _, tensor = text.partition("=")
    if not name or not tensor:
        raise ExperimentError(f"--exit {text!r}: write NAME=TENSOR, such as early=logits_1.")
    return name, tensor


def numbers(text: str, count: int) -> tuple[float, ...]:
    """So many numbers between commas. Raises ExperimentError."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != count or not np.isfinite(found).all():
        raise ExperimentError(f"{text!r}: write {count} numbers between commas.")
    return found


def image(size: str, mean: str, std: str) -> "Image":
    """How the model wants PIL.Image. Raises ExperimentError."""
    from fedge.edge.split.image import Image

    height, _, width = size.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ExperimentError(f"--image {size!r}: write HEIGHTxWIDTH in pixels, such as 224x224.")
    red, green, blue = numbers(mean, 3)
    by_red, by_green, by_blue = numbers(std, 3)
    return Image(int(height), int(width), (red, green, blue), (by_red, by_green, by_blue))
