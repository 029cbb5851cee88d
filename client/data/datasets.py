"""Data sets as NumPy arrays: what one must be, and where it may come from.

Owns the checks that every data set passes, whatever its source: a `Dataset` that exists is sound. Must never copy
images, turn them into floats, or unpickle anything.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedge.client.data.archives import read_npz
from fedge.client.data.images import read_folder, read_hugging_face, read_torchvision
from fedge.core import registry
from fedge.core.errors import DataError, ExperimentError, FedgeError
from fedge.core.limits import MAX_CLASSES
from fedge.core.params import Array

EMBEDDED = Path(__file__).with_name("fashion-mnist-10k.npz")
FINITE_BLOCK = 1 << 20  # elements looked at at once, so that the check needs no second copy of the data
KNOWN = (
    "'fashion-mnist', a .npz file, a folder with train/CLASS/, 'hf:NAME', 'torchvision:NAME' or 'package.module:name'"
)


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Examples and labels, read-only. Raises DataError on anything that could not be trained on.

    `x_train` [n, ...] and `x_test` [m, ...] hold numbers of any kind (images: uint8 [n, height, width(, 3)]); `y_train`
    [n] and `y_test` [m] become int64, 0 <= y < len(classes). The test set may be empty, m = 0. `classes` are names;
    where there are none they are "0", "1", .... `columns` hold one value per training example each.
    """

    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: tuple[str, ...] = ()
    columns: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x_train, x_test = _features("x_train", self.x_train), _features("x_test", self.x_test)
        y_train, y_test = _labels("y_train", self.y_train), _labels("y_test", self.y_test)
        if len(x_train) == 0:
            raise DataError("x_train is empty; a data set needs at least one training example.")
        if len(x_test) and x_test.shape[1:] != x_train.shape[1:]:
            raise DataError(f"an example has shape {x_train.shape[1:]} in x_train but {x_test.shape[1:]} in x_test.")
        for side, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
            if len(x) != len(y):
                raise DataError(
                    f"x_{side} has {len(x)} examples but y_{side} has {len(y)} labels; they must be as many."
                )
        columns = {name: _column(name, values, len(y_train)) for name, values in self.columns.items()}
        arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
        values = {**arrays, "columns": columns, "classes": _classes(self.classes, y_train, y_test)}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def of(arrays: Mapping[str, Any]) -> "Dataset":
        """A data set from arrays under the names of an .npz file: x_train, y_train, [x_test, y_test], [classes], and
        any further ones as columns. Raises DataError.
        """
        rest = dict(arrays)
        for name in ("x_train", "y_train"):
            if name not in rest:
                found = ", ".join(sorted(rest)) or "nothing"
                raise DataError(f"it has no array {name!r} (it has {found}); name its arrays x_train, y_train, ....")
        if ("x_test" in rest) != ("y_test" in rest):
            raise DataError("it has only one of x_test and y_test; give both or neither.")
        x_train, y_train = np.asarray(rest.pop("x_train")), np.asarray(rest.pop("y_train"))
        x_test = np.asarray(rest.pop("x_test", np.empty((0, *x_train.shape[1:]), x_train.dtype)))
        y_test = np.asarray(rest.pop("y_test", np.empty(0, np.int64)))
        classes = np.asarray(rest.pop("classes", []))
        if classes.ndim != 1:
            raise DataError("classes must be a list of names, shape [classes].")
        columns = {name: np.asarray(values) for name, values in rest.items()}
        return Dataset(x_train, y_train, x_test, y_test, tuple(map(str, classes)), columns)


def load(settings: str | Mapping[str, Any]) -> Dataset:
    """The data set that `[data] dataset` names: a name, or {"kind": name, **options of its source}.

    Raises DataError where it is missing or unsound, ExperimentError where the name or an option is wrong.
    """
    options = {"kind": settings} if isinstance(settings, str) else dict(settings)
    name = options.pop("kind", None)
    if not isinstance(name, str) or not name:
        raise ExperimentError(f"data.dataset: needs kind = {KNOWN}.")
    try:
        return _read(name, options)
    except DataError as error:
        raise DataError(f"Data set {name!r}: {error}") from error


def _read(name: str, options: dict[str, Any]) -> Dataset:
    source, _, rest = name.partition(":")
    path = Path(name).expanduser()
    if name == "fashion-mnist":
        return Dataset.of(_call(read_npz, EMBEDDED, options))
    if path.suffix == ".npz":
        return Dataset.of(_call(read_npz, path, options))
    if path.is_dir():
        return Dataset.of(_call(read_folder, path, options))
    if source == "hf" and rest:
        return Dataset.of(_call(read_hugging_face, rest, options))
    if source == "torchvision" and rest:
        return Dataset.of(_call(read_torchvision, rest, options))
    if rest:
        return _own(name, options)
    raise DataError(f"there is no such data set or folder; name {KNOWN}.")


def _call(reader: Callable[..., Any], subject: Any, options: dict[str, Any]) -> Any:
    _fits(reader, subject, **options)
    return reader(subject, **options)


def _fits(function: Callable[..., Any], *given: Any, **options: Any) -> None:
    """Raises ExperimentError where the function does not take these options."""
    try:
        inspect.signature(function).bind(*given, **options)
    except TypeError as error:
        raise ExperimentError(f"data.dataset: {error}; options other than kind are those of the source.") from error


def _own(path: str, options: dict[str, Any]) -> Dataset:
    """What the user's function returns."""
    function = registry.load(path, "data.dataset")
    if not callable(function):
        raise ExperimentError(f"data.dataset: {path!r} is no function; name one that returns a Dataset.")
    _fits(function, **options)
    try:
        made = function(**options)
    except FedgeError:
        raise
    except Exception as error:  # a plug-in boundary: whatever the user's code raises goes on with its name
        raise DataError(f"the function raised {error!r}; mend it.") from error
    if not isinstance(made, Dataset):
        raise DataError(f"the function returned {type(made).__name__}; it must return a fedge.client.data.Dataset.")
    return made


def _features(name: str, values: Array) -> Array:
    if values.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {values.dtype} instead of numbers; convert it to uint8 or float32.")
    if values.ndim < 2 or (len(values) and not values.size):
        raise DataError(
            f"{name} has shape {values.shape}; it must be [examples, ...], at least one number per example."
        )
    if values.dtype.kind == "f" and not _finite(values):
        raise DataError(f"{name} holds NaN or infinite values; clean them out.")
    return _read_only(values)


def _finite(values: Array) -> bool:
    rows = max(1, FINITE_BLOCK * len(values) // max(1, values.size))
    return all(bool(np.isfinite(values[start : start + rows]).all()) for start in range(0, len(values), rows))


def _labels(name: str, values: Array) -> NDArray[np.int64]:
    if values.dtype.kind not in "iu" or values.ndim != 1:
        raise DataError(
            f"{name} holds {values.dtype} of shape {values.shape}; labels are integers, one per example, shape [n]."
        )
    if len(values) and not 0 <= values.min() <= values.max() < MAX_CLASSES:
        raise DataError(f"{name} runs from {values.min()} to {values.max()}; number the classes from 0 on.")
    return _read_only(values.astype(np.int64, copy=False))


def _column(name: str, values: Array, examples: int) -> Array:
    if values.dtype.hasobject:
        raise DataError(f"array {name!r} holds Python objects; store numbers or words.")
    if values.ndim == 0 or len(values) != examples:
        raise DataError(
            f"array {name!r} has shape {values.shape}; every further array is a column and needs one entry for each of "
            f"the {examples} training examples."
        )
    return _read_only(values)


def _classes(names: tuple[str, ...], *labels: NDArray[np.int64]) -> tuple[str, ...]:
    needed = max(int(part.max()) for part in labels if len(part)) + 1
    if names and needed > len(names):
        raise DataError(f"label {needed - 1} has no name among the {len(names)} classes; number the classes from 0 on.")
    return names or tuple(map(str, range(needed)))


def _read_only(values: Array) -> Array:
    view = values.view()
    view.flags.writeable = False
    return view
