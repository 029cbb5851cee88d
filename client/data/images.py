"""Images as arrays: from folders, Hugging Face `datasets` and `torchvision`.

Each reader returns arrays under the names of an .npz data set (see `datasets.py`). Owns the detection of image and
label columns. Must never import pillow, datasets or torchvision before one is asked for.
"""

import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fedge.client.data.archives import check_size
from fedge.core.errors import DataError
from fedge.core.params import Array

SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
IMAGE_NAMES = ("image", "img", "images", "pixel_values", "picture")
LABEL_NAMES = ("label", "labels", "target", "class", "fine_label", "digit", "y")
SCALAR_KINDS = "biufUS"


def read_folder(folder: Path) -> dict[str, Any]:
    """train/CLASS/*.png and, where there is one, test/CLASS/*.png; classes are the folders' names, sorted."""
    opener = _optional("PIL.Image", "pillow")
    classes = [entry.name for entry in _folders(folder / "train")]
    if not classes:
        raise DataError("it has no train/CLASS/ folders with images; put each class in a folder of its own there.")
    sides = {}
    for side in ("train", "test"):
        files = _labelled_files(folder / side, classes)
        if files or side == "train":
            sides[side] = [_opened(opener, path) for path, _ in files], [label for _, label in files]
    return {**_stacked(sides), "classes": classes}


def read_hugging_face(
    name: str,
    *,
    config: str | None = None,
    image: str | None = None,
    label: str | None = None,
    train: str = "train",
    test: str = "test",
) -> dict[str, Any]:
    """A data set of the Hub by its splits; `image` and `label` name columns that cannot be detected."""
    library = _optional("datasets", "datasets")
    try:
        splits = library.load_dataset(name, config)
    except Exception as error:  # the library raises whatever its network and file layers do
        raise DataError(f"Hugging Face datasets could not load it ({error!r}); check the name and network.") from error
    if train not in splits:
        raise DataError(f"it has no split {train!r}; set train to one of {', '.join(splits)}.")
    features = splits[train].features
    image = image or _detect(features, "Image", IMAGE_NAMES, "image")
    label = label or _detect(features, "ClassLabel", LABEL_NAMES, "label")
    present = {side: splits[split] for side, split in (("train", train), ("test", test)) if split in splits}
    arrays = _stacked({side: (_column(split, image), _column(split, label)) for side, split in present.items()})
    if hasattr(features[label], "names"):
        arrays["classes"] = list(features[label].names)
    return arrays | _scalar_columns(splits[train], {image, label})


def read_torchvision(name: str, *, root: str = "data", **options: Any) -> dict[str, Any]:
    """A class of torchvision.datasets by its name, kept under `root`; `options` go to its constructor."""
    library = _optional("torchvision.datasets", "torchvision")
    maker = getattr(library, name, None)
    if maker is None:
        raise DataError(f"torchvision.datasets has no {name!r}; names are spelt as its classes, e.g. 'FashionMNIST'.")
    sides = {}
    for side in ("train", "test"):
        try:
            pairs = maker(root, download=True, **_side(maker, side), **options)
            images, labels = zip(*(pairs[index] for index in range(len(pairs))))
        except Exception as error:  # downloads, checksums, decoders: each data set has errors of its own
            raise DataError(f"torchvision could not load it ({error!r}); check its options and network.") from error
        sides[side] = images, labels
    return {**_stacked(sides), "classes": list(getattr(pairs, "classes", ()))}


def _stacked(sides: Mapping[str, tuple[Sequence[Any], Sequence[Any]]]) -> dict[str, Any]:
    """Arrays from (images, labels) of each side: x is [n, height, width] where all images are grey, else [..., 3]."""
    grey = all(getattr(image, "mode", "L") == "L" for images, _ in sides.values() for image in images)
    arrays = {f"x_{side}": _stack(images, grey=grey) for side, (images, _) in sides.items()}
    return arrays | {f"y_{side}": np.asarray(labels) for side, (_, labels) in sides.items()}


def _stack(images: Sequence[Any], *, grey: bool) -> Array:
    """Pillow images, or arrays, of one size as one array. Raises DataError where sizes differ or nothing is there."""
    if not images:
        raise DataError("it holds no images to train on.")
    out: Array = np.empty(0)
    for index, image in enumerate(images):
        pixels = np.asarray(image if grey or not hasattr(image, "convert") else image.convert("RGB"))
        if index == 0:
            check_size(len(images) * pixels.nbytes)
            out = np.empty((len(images), *pixels.shape), pixels.dtype)
        if pixels.shape != out.shape[1:]:
            which = getattr(image, "filename", None) or f"image {index}"
            raise DataError(f"{which} has shape {pixels.shape} where the first has {out.shape[1:]}; resize them alike.")
        out[index] = pixels
    return out


def _optional(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(f"it needs {package}, which is not installed; run: pip install {package}") from None


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _labelled_files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    files: list[tuple[Path, int]] = []
    for entry in _folders(folder):
        if entry.name not in classes:
            raise DataError(f"class {entry.name!r} has a folder in test/ but none in train/; add one or remove it.")
        images = sorted(path for path in entry.iterdir() if path.suffix.lower() in SUFFIXES)
        files += [(path, classes.index(entry.name)) for path in images]
    return files


def _opened(opener: ModuleType, path: Path) -> Any:
    try:
        with opener.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, opener.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); mend or remove it.") from error


def _detect(features: Any, kind: str, names: Iterable[str], what: str) -> str:
    """The one column of that type, else the first with one of the usual names."""
    typed = [name for name, feature in features.items() if type(feature).__name__ == kind]
    if len(typed) == 1:
        return str(typed[0])
    for name in names:
        if name in (typed or features):
            return name
    raise DataError(f"its {what} column is not to be told from its columns {', '.join(features)}; set {what} = NAME.")


def _column(split: Any, name: str) -> list[Any]:
    if name not in split.features:
        raise DataError(f"it has no column {name!r}; its columns are {', '.join(split.features)}.")
    return list(split[name])


def _scalar_columns(split: Any, taken: set[str]) -> dict[str, Array]:
    """The other columns, where they hold one number or word per example (writer, hospital, ...)."""
    columns = {name: np.asarray(split[name]) for name in split.features if name not in taken and _scalar(split, name)}
    return {name: values for name, values in columns.items() if values.ndim == 1 and values.dtype.kind in SCALAR_KINDS}


def _scalar(split: Any, name: str) -> bool:
    return type(split.features[name]).__name__ in {"Value", "ClassLabel"}


def _side(maker: Any, side: str) -> dict[str, Any]:
    """How this class is told which side to read: by train=bool, its own or inherited, or by split="train"."""
    known = {name for base in maker.__mro__ for name in inspect.signature(base.__init__).parameters}
    return {"train": side == "train"} if "train" in known else {"split": side}
