"""What people give the commands of `fedge edge`: models, pictures, arrays, pairs and numbers, checked.

Must never guess: what does not fit is refused with a sentence.
"""

import importlib.util
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedge.client.data.archives import read_npz
from fedge.core import registry
from fedge.core.errors import DataError, ExperimentError, ModelError, RefusedTensor
from fedge.core.limits import EdgeLimits
from fedge.core.params import Array
from fedge.edge.bundle import INPUT, Bundle, Tensor
from fedge.edge.exits.rules import check_rule
from fedge.edge.runtime.tensors import check

if TYPE_CHECKING:
    from fedge.edge.split.image import Image

MOST_DIGITS = 9  # of an extent
HINT = "write it with numpy.save, one input or a batch of them"


def needs(module: str, extra: str) -> None:
    """Raises ExperimentError where a package that an extra brings is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ExperimentError(f"This needs {module}; install it with: pip install '.[{extra}]' in fedge's folder.")


# ---- models ------------------------------------------------------------------------------------


Exits = tuple[tuple[str, str], ...]


def model(named: str, shape: str, folder: Path) -> tuple[Path, Exits]:
    """The ONNX file that is named, or that of the torch module which the factory "package.module:name" makes, with
    the exits that the module has; it is written to `folder`.

    `shape` is that of the factory's sample, such as 1x3x32x32; a file has its own. Raises ExperimentError, ModelError.
    """
    if Path(named).exists() or named.endswith(".onnx") or ":" not in named:
        if shape:
            raise ExperimentError(f"--input goes with a factory package.module:name, not with {named!r}; leave it out.")
        return Path(named), ()
    return _made(named, extents(shape), folder)


def _made(factory: str, shape: tuple[int, ...], folder: Path) -> tuple[Path, Exits]:
    needs("torch", "torch")
    needs("onnxscript", "export")
    import torch

    from fedge.edge.exits.to_onnx import to_onnx

    make = registry.load(factory, "MODEL")
    try:
        module = make()
    except Exception as error:  # a plug-in boundary: the user's factory
        raise ModelError(f"The factory {factory} raised {error!r}; mend it.") from error
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"The factory {factory} returned {type(module).__name__}; it must return a torch.nn.Module.")
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(shape))
    except Exception as error:  # as above
        raise ModelError(
            f"The model takes no {list(shape)} ({error}); give the shape of a sample as --input."
        ) from error
    path = folder / f"{factory.rpartition(':')[2]}.onnx"
    return path, to_onnx(module, torch.zeros(shape), path)


def extents(text: str) -> tuple[int, ...]:
    """Whole numbers between x, such as 1x3x32x32. Raises ExperimentError."""
    parts = text.split("x")
    if not all(_whole(part) for part in parts):
        raise ExperimentError(f"--input {text!r}: write the shape of one sample, such as 1x3x32x32.")
    shape = tuple(map(int, parts))
    if 4 * prod(shape) > EdgeLimits().max_tensor_bytes:
        raise ExperimentError(f"--input {text}: a sample is at most {EdgeLimits().max_tensor_bytes} bytes; give less.")
    return shape


def _whole(text: str) -> bool:
    """Whether this is a whole number above 0 that is an extent; Python itself refuses thousands of digits."""
    return text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS and int(text) > 0


def image(size: str, mean: str, std: str) -> "Image | None":
    """How the model wants pictures; None where it is given none. Raises ExperimentError."""
    if not size:
        if mean or std:
            raise ExperimentError(
                "--mean and --std are of pictures; give their size as --image HxW, or leave them out."
            )
        return None
    from fedge.edge.split.image import Image

    height, _, width = size.partition("x")
    if not all(_whole(part) for part in (height, width)):
        raise ExperimentError(f"--image {size!r}: write HEIGHTxWIDTH in pixels, such as 224x224.")
    if 3 * int(height) * int(width) > EdgeLimits().max_tensor_bytes:
        raise ExperimentError(f"--image {size}: a picture is at most {EdgeLimits().max_tensor_bytes} bytes; give less.")
    red, green, blue = numbers(mean or "0,0,0", 3)
    by_red, by_green, by_blue = numbers(std or "1,1,1", 3)
    return Image(int(height), int(width), (red, green, blue), (by_red, by_green, by_blue))


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


def rule(named: str, calibrated: bool) -> str:
    """Raises ExperimentError for what is no rule, and where another than that of every bundle would change nothing."""
    check_rule(named)
    if named != "confidence" and not calibrated:
        raise ExperimentError(f"--rule {named} needs thresholds, which held-out samples choose; give them as --data.")
    return named


def share(option: str, figure: float | None) -> float | None:
    """Raises ExperimentError outside [0, 1]."""
    if figure is not None and not 0 <= figure <= 1:
        raise ExperimentError(f"{option} {figure}: give a share from 0 to 1.")
    return figure


def whole_bytes(megabytes: float | None) -> int | None:
    """Raises ExperimentError below 0 and for what is no number."""
    if megabytes is None:
        return None
    if not 0 <= megabytes < 1e12:
        raise ExperimentError(f"--memory {megabytes}: give megabytes, 0 or more.")
    return int(megabytes * 1e6)


# ---- samples -----------------------------------------------------------------------------------


def read(path: Path, bundle: Bundle) -> Iterator[tuple[str, Array]]:
    """Name and array of every input in a file: the rows of an .npy, or a picture in the size that the model takes.

    Rows are single inputs where the batch is free; else the file is one input. Raises DataError where the file is
    neither, or the model takes no pictures, and RefusedTensor where the array does not fit.
    """
    (tensor, *_) = bundle.boundary(INPUT).tensors
    if path.suffix != ".npy":
        yield str(path), _picture(path, tensor)
        return
    array = _array(path)
    _fits(path, array, tensor)
    if array.ndim != len(tensor.shape) or tensor.shape[:1] != (-1,) or len(array) == 1:
        yield str(path), array
        return
    for row in range(len(array)):
        yield f"{path}[{row}]", array[row : row + 1]


def samples(path: Path) -> tuple[Array, Array | None]:
    """The arrays x [n, ...] and y [n], or None, of an .npz. Raises DataError."""
    try:
        found = read_npz(path)
    except DataError as error:
        raise DataError(f"{str(path)!r}: {error}") from None
    if "x" not in found:
        raise DataError(f"{str(path)!r} holds no array x; save samples as x, and their classes as y, with numpy.savez.")
    labels = found.get("y")
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise DataError(f"{str(path)!r}: y is {labels.dtype} {list(labels.shape)}; give one whole number per sample.")
    return found["x"], labels


def _fits(path: Path, array: Array, tensor: Tensor) -> None:
    try:
        check((tensor,), {tensor.name: array})
    except RefusedTensor as error:
        raise RefusedTensor(f"{str(path)!r}: {error}") from None


def _array(path: Path) -> Array:
    """Mapped, as memory is not to be asked for on the word of a header."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"There is no file {str(path)!r}; check the path.") from None
    except Exception as error:  # NumPy reads headers with Python's own parser, which raises whatever it likes
        raise DataError(f"{str(path)!r} cannot be read as an array ({error}); {HINT}.") from None
    if not isinstance(found, np.ndarray):
        raise DataError(f"{str(path)!r} holds several arrays; {HINT}.")
    if found.nbytes > EdgeLimits().max_weights_bytes or not found.size:
        raise DataError(f"{str(path)!r} is empty or too large; {HINT}.")
    return found


def _picture(path: Path, tensor: Tensor) -> Array:
    if tensor.dtype != "uint8" or len(tensor.shape) != 4 or tensor.shape[3] != 3:
        raise DataError(
            f"The model takes {tensor.dtype} {list(tensor.shape)} and no pictures; give {path.name!r} as an .npy, "
            "or export the model with --image."
        )
    needs("PIL", "images")
    import PIL.Image

    try:
        with PIL.Image.open(path) as opened:
            small = opened.convert("RGB").resize((tensor.shape[2], tensor.shape[1]))
    except FileNotFoundError:
        raise DataError(f"There is no file {str(path)!r}; check the path.") from None
    except Exception as error:  # Pillow's readers raise whatever they like
        raise DataError(f"{str(path)!r} is no picture that can be read ({error}); give another.") from None
    return np.asarray(small, np.uint8)[None]
