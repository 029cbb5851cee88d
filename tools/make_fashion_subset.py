"""Make client/data/fashion-mnist-10k.npz: the first 800 training and 200 test images per class of a larger archive.

    python tools/make_fashion_subset.py fashion-mnist.npz [OUT.npz]

The archive holds x_train, y_train, x_test, y_test and classes; client/data/LICENSE-fashion-mnist.md says where it came
from. Order is kept, and the same input gives the same bytes (with the same zlib).
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

OUT = Path(__file__).resolve().parents[1] / "client" / "data" / "fashion-mnist-10k.npz"
PER_CLASS = {"train": 800, "test": 200}


def first(labels: NDArray[np.int64], per_class: int) -> NDArray[np.int64]:
    """Indices of the first `per_class` examples of each class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == value)[:per_class] for value in np.unique(labels)]))


def save(path: Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    """Like np.savez_compressed, but without the time of day and the operating system in it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy")
            info.create_system = 3
            info.compress_type = zipfile.ZIP_DEFLATED
            buffer = io.BytesIO()
            np.save(buffer, array, allow_pickle=False)
            archive.writestr(info, buffer.getvalue(), compresslevel=9)


def make(source: Path, out: Path) -> None:
    """Read `source`, write the subset to `out`."""
    arrays: dict[str, NDArray[np.generic]] = {}
    with np.load(source, allow_pickle=False) as archive:
        for side, per_class in PER_CLASS.items():
            images, labels = archive[f"x_{side}"], archive[f"y_{side}"]
            chosen = first(labels, per_class)
            arrays[f"x_{side}"] = images[chosen]
            arrays[f"y_{side}"] = labels[chosen].astype(np.uint8)
        arrays["classes"] = archive["classes"]
    save(out, arrays)


if __name__ == "__main__":
    if len(sys.argv) not in {2, 3}:
        sys.exit(__doc__)
    make(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else OUT)
