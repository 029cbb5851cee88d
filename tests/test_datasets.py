"""Data sets: the embedded one is what it says, every source loads, and every fault is one clear sentence."""

import hashlib
import importlib.util
import io
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image as Pillow

from fedge.client.data import Dataset, archives, load
from fedge.client.data.datasets import EMBEDDED
from fedge.core.errors import DataError, ExperimentError

ROOT = Path(__file__).resolve().parents[1]


def arrays(n=6, m=2, **changes):
    """A small sound data set, under the names of an .npz file; None takes one away."""
    rng = np.random.default_rng(0)
    made = {
        "x_train": rng.integers(0, 256, (n, 4, 4), np.uint8),
        "y_train": np.arange(n) % 3,
        "x_test": rng.integers(0, 256, (m, 4, 4), np.uint8),
        "y_test": np.arange(m) % 3,
    }
    return {name: value for name, value in {**made, **changes}.items() if value is not None}


def saved(folder, **changes):
    path = folder / "set.npz"
    np.savez_compressed(path, **arrays(**changes))
    return str(path)


# ---- the embedded set ----------------------------------------------------------------------------


def test_the_embedded_set_is_balanced_and_whole():
    data = load("fashion-mnist")
    assert data.x_train.shape == (8000, 28, 28)
    assert data.x_test.shape == (2000, 28, 28)
    assert data.x_train.dtype == data.x_test.dtype == np.uint8
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert np.bincount(data.y_train).tolist() == [800] * 10
    assert np.bincount(data.y_test).tolist() == [200] * 10
    assert data.classes[0] == "T-shirt/top"
    assert data.classes[9] == "Ankle boot"
    assert len(data.classes) == 10
    assert data.columns == {}


def test_no_embedded_image_is_on_both_sides():
    data = load("fashion-mnist")
    sides = [{hashlib.sha256(image.tobytes()).digest() for image in x} for x in (data.x_train, data.x_test)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) > 7980  # the source has a few images twice


def test_the_embedded_labels_belong_to_the_images():
    """The class means tell most test images apart, so images and labels are in step."""
    data = load("fashion-mnist")
    means = np.stack([data.x_train[data.y_train == k].mean(axis=0).ravel() for k in range(10)])
    x = data.x_test.reshape(2000, -1).astype(np.float32)
    nearest = ((x**2).sum(1)[:, None] - 2 * x @ means.T + (means**2).sum(1)).argmin(axis=1)
    assert (nearest == data.y_test).mean() > 0.6


def test_the_embedded_set_is_small_in_mixed_order_and_needs_no_pickle():
    assert EMBEDDED.stat().st_size < 6_000_000
    assert len(set(load("fashion-mnist").y_train[:50])) == 10
    assert (EMBEDDED.parent / "LICENSE-fashion-mnist.md").read_text().count("MIT") >= 2


def test_the_tool_keeps_the_first_of_each_class_and_writes_the_same_bytes(tmp_path):
    spec = importlib.util.spec_from_file_location("make_fashion_subset", ROOT / "tools" / "make_fashion_subset.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(2), 1000))
    images = np.arange(2000, dtype=np.uint16)[:, None]
    source = tmp_path / "source.npz"
    np.savez(source, x_train=images, y_train=labels, x_test=images, y_test=labels, classes=["a", "b"])
    for name in ("one.npz", "two.npz"):
        tool.make(source, tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    data = load(str(tmp_path / "one.npz"))
    expected = np.sort(np.concatenate([np.flatnonzero(labels == k)[:800] for k in (0, 1)]))
    assert np.array_equal(data.x_train[:, 0], expected)
    assert np.array_equal(data.y_train, labels[expected])
    assert np.bincount(data.y_test).tolist() == [200, 200]


# ---- what a data set is --------------------------------------------------------------------------


def test_a_dataset_neither_copies_nor_converts_images_and_is_read_only():
    made = arrays()
    data = Dataset.of(made)
    assert data.x_train.dtype == np.uint8
    assert np.shares_memory(data.x_train, made["x_train"])
    for array in (data.x_train, data.y_train, data.x_test, data.y_test):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    made["x_train"][0] = 0  # the owner's array stays writable


def test_test_set_and_classes_are_optional():
    data = Dataset.of(arrays(x_test=None, y_test=None))
    assert data.x_test.shape == (0, 4, 4)
    assert data.y_test.shape == (0,)
    assert data.classes == ("0", "1", "2")


def test_further_arrays_are_columns():
    writers = np.array(["ann", "bob", "ann", "bob", "cem", "cem"])
    data = Dataset.of(arrays(writer=writers, weight=np.ones(6)))
    assert set(data.columns) == {"writer", "weight"}
    assert data.columns["writer"].tolist() == writers.tolist()
    assert not data.columns["writer"].flags.writeable


@given(st.integers(1, 5), st.integers(0, 3), st.sampled_from([np.uint8, np.int16, np.float32, np.float64, np.bool_]))
def test_numbers_of_any_kind_are_taken_as_they_are(n, m, dtype):
    x, y = np.ones((n + m, 3), dtype), np.zeros(n + m, np.uint8)
    data = Dataset(x[:n], y[:n], x[n:], y[n:])
    assert data.x_train.dtype == dtype
    assert len(data.y_train) == n
    assert len(data.x_test) == m


FAULTS = [
    ({"x_train": None}, "no array 'x_train'"),
    ({"y_train": None}, "no array 'y_train'"),
    ({"y_test": None}, "only one of x_test and y_test"),
    ({"y_train": np.zeros(5, int)}, "6 examples but y_train has 5 labels"),
    ({"y_test": np.zeros(3, int)}, "2 examples but y_test has 3 labels"),
    ({"x_train": np.zeros((0, 4, 4)), "y_train": np.zeros(0, int)}, "x_train is empty"),
    ({"x_train": np.zeros(6)}, "at least one number per example"),
    ({"x_train": np.zeros((6, 0))}, "at least one number per example"),
    ({"x_test": np.zeros((2, 5, 5))}, "shape \\(4, 4\\) in x_train but \\(5, 5\\)"),
    ({"x_train": np.full((6, 4, 4), np.nan)}, "NaN or infinite"),
    ({"x_test": np.full((2, 4, 4), np.inf, np.float32)}, "x_test holds NaN or infinite"),
    ({"x_train": np.full((6, 4, 4), "a")}, "instead of numbers"),
    ({"x_train": np.zeros((6, 4, 4), complex)}, "instead of numbers"),
    ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, "number the classes from 0"),
    ({"y_train": np.array([0, 1, 2, 0, 1, 2**40])}, "number the classes from 0"),
    ({"y_train": np.array([0, 1, 2, 0, 1, 2**64 - 1], np.uint64)}, "number the classes from 0"),
    ({"y_train": np.linspace(0, 1, 6)}, "labels are integers"),
    ({"y_train": np.zeros((6, 1), int)}, "one per example"),
    ({"classes": np.array(["a", "b"])}, "label 2 has no name among the 2 classes"),
    ({"classes": np.array("abc")}, "classes must be a list of names"),
    ({"writer": np.zeros(5)}, "array 'writer' has shape \\(5,\\)"),
    ({"note": np.array(1)}, "array 'note' has shape \\(\\)"),
]


@pytest.mark.parametrize(("changes", "words"), FAULTS)
def test_every_fault_of_a_file_is_one_sentence_that_names_the_file(tmp_path, changes, words):
    path = saved(tmp_path, **changes)
    with pytest.raises(DataError, match=words) as caught:
        load(path)
    assert str(caught.value).startswith(f"Data set {path!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", [0, 1047, 1048, 2096, 3000])  # at the edges of what is looked at in one go
def test_a_single_nan_in_a_large_array_is_found(row):
    x = np.zeros((3001, 1000), np.float32)
    x[row, -1] = np.nan
    with pytest.raises(DataError, match="NaN"):
        Dataset(x, np.zeros(3001, int), x[:0], np.zeros(0, int))


# ---- .npz files ----------------------------------------------------------------------------------


def test_a_file_loads_as_it_was_saved(tmp_path):
    made = arrays(classes=np.array(["a", "b", "c"]), writer=np.arange(6))
    path = tmp_path / "set.npz"
    np.savez(path, **made)
    data = load({"kind": str(path)})
    assert np.array_equal(data.x_train, made["x_train"])
    assert np.array_equal(data.y_test, made["y_test"])
    assert data.classes == ("a", "b", "c")
    assert data.columns["writer"].tolist() == list(range(6))


def test_python_objects_are_never_loaded(tmp_path):
    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (marker,))

    path = tmp_path / "set.npz"
    np.savez(path, **arrays(x_train=np.array([Bomb()], object)))
    with pytest.raises(DataError, match="Python objects"):
        load(str(path))
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 not a zip", b"\x93NUMPY\x01\x00", np.random.default_rng(0).bytes(999)]
)
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "set.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load(str(path))


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_a_data_set_or_a_data_error(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    path = Path(saved(folder))
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        outcome = str(len(load(str(path)).x_train))
    except DataError as error:
        outcome = str(error)
    assert outcome == "6" or outcome.startswith(f"Data set {str(path)!r}: ")


def archive(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return str(path)


@pytest.mark.parametrize(("kind", "there"), [("|u1", 96), ("<U0", 0)])
def test_a_header_that_claims_more_than_there_is_allots_nothing(tmp_path, kind, there):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": kind, "fortran_order": False, "shape": (1 << 50, 4, 4)})
    with pytest.raises(DataError, match="not as long as its header says"):
        load(archive(tmp_path / "set.npz", x_train=buffer.getvalue() + bytes(there)))


HEADER = b"{'descr': '|u1', 'fortran_order': False, 'shape': (6, 4, 4), }"


@given(st.integers(0, len(HEADER) - 1), st.binary(min_size=1, max_size=9), st.integers(0, 1))
@example(10, b"(" * 9, 0)  # Python's tokenizer reads on to the end of the file
@example(0, b"-" * 9000, 0)  # and its parser has a stack of its own
@example(len(HEADER) - 8, b"-6, -4, -4", 0)
def test_a_damaged_header_gives_a_data_set_or_a_data_error(tmp_path_factory, position, text, keep):
    head = HEADER[:position] + text + HEADER[position + keep * len(text) :]
    content = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(96)
    labels = io.BytesIO()
    np.save(labels, np.zeros(6, int))
    path = archive(tmp_path_factory.mktemp("header") / "set.npz", x_train=content, y_train=labels.getvalue())
    try:
        outcome = str(len(load(path).x_train))
    except DataError as error:
        outcome = str(error)
    assert outcome.startswith(f"Data set {path!r}: ") or int(outcome) == 6


def test_a_small_file_that_unpacks_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **arrays(x_train=np.zeros((6, 1000, 1000), np.uint8)))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(archives, "MAX_DATASET_BYTES", 5_000_000)
    monkeypatch.setattr(np, "load", lambda *a, **k: pytest.fail("it was unpacked"))
    with pytest.raises(DataError, match="more than the limit of 5000000"):
        load(str(path))


def test_too_many_arrays_are_refused(tmp_path):
    members = {f"a{index}": b"" for index in range(archives.MAX_DATASET_ARRAYS + 1)}
    with pytest.raises(DataError, match="1025 arrays"):
        load(archive(tmp_path / "set.npz", **members))


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere/set.npz", "no such file"), ("fashion_mnist", "no such data set or folder"), ("nowhere", "hf:NAME")],
)
def test_a_missing_data_set_is_named(name, words):
    with pytest.raises(DataError, match=words) as caught:
        load(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "needs kind"),
        ({"kind": 3}, "needs kind"),
        ("", "needs kind"),
        ({"kind": "fashion-mnist", "size": 3}, "size"),
        ({"kind": "hf:mnist", "imag": "x"}, "imag"),
        ("nowhere_at_all:make", "cannot import 'nowhere_at_all'"),
        ("fedge.client.data:nothing", "has no 'nothing'"),
        ("fedge.client.data.datasets:KNOWN", "is no function"),
    ],
)
def test_a_wrong_name_or_option_is_an_experiment_error(settings, words):
    with pytest.raises(ExperimentError, match=words):
        load(settings)


# ---- image folders -------------------------------------------------------------------------------


def picture(path, value, mode="L", size=(5, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new(mode, size, value).save(path)


def test_an_image_folder_loads_with_classes_from_its_folders(tmp_path):
    for index in range(3):
        picture(tmp_path / "train" / "cat" / f"{index}.png", index)
        picture(tmp_path / "train" / "ant" / f"{index}.PNG", 100 + index)
    picture(tmp_path / "test" / "cat" / "0.png", 50)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    data = load(str(tmp_path))
    assert data.classes == ("ant", "cat")
    assert data.x_train.shape == (6, 4, 5)
    assert data.x_train.dtype == np.uint8
    assert data.x_train[:, 0, 0].tolist() == [100, 101, 102, 0, 1, 2]
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.x_test[0, 0, 0] == 50
    assert data.y_test.tolist() == [1]


def test_colours_make_all_images_colour(tmp_path):
    picture(tmp_path / "train" / "a" / "0.png", 7)
    picture(tmp_path / "train" / "a" / "1.png", (1, 2, 3), "RGB")
    picture(tmp_path / "test" / "a" / "0.png", 9)
    data = load(str(tmp_path))
    assert data.x_train[:, 0, 0].tolist() == [[7, 7, 7], [1, 2, 3]]
    assert data.x_test[:, 0, 0].tolist() == [[9, 9, 9]]


def test_faults_of_image_folders(tmp_path):
    with pytest.raises(DataError, match="no train/CLASS/ folders"):
        load(str(tmp_path))
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no images"):
        load(str(tmp_path))
    picture(tmp_path / "train" / "a" / "0.png", 7)
    picture(tmp_path / "train" / "a" / "1.png", 7, size=(9, 9))
    with pytest.raises(DataError, match=r"1\.png has shape \(9, 9\) where the first has \(4, 5\)"):
        load(str(tmp_path))
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png cannot be read as an image"):
        load(str(tmp_path))
    (tmp_path / "train" / "a" / "1.png").unlink()
    picture(tmp_path / "test" / "b" / "0.png", 7)
    with pytest.raises(DataError, match="class 'b' has a folder in test/ but none in train/"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [
        ("PIL.Image", ".", "pillow"),
        ("datasets", "hf:mnist", "datasets"),
        ("torchvision.datasets", "torchvision:MNIST", "torchvision"),
    ],
)
def test_a_missing_library_is_named_with_its_remedy(monkeypatch, module, name, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"pip install {package}"):
        load(name)


# ---- Hugging Face datasets and torchvision, by modules that behave as theirs -----------------------


class Image:
    """A feature of the type that Hugging Face names so."""


class Value:
    pass


class Sequence:
    pass


class ClassLabel:
    def __init__(self, names):
        self.names = names


class Split:
    def __init__(self, features, columns):
        self.features, self.columns = features, columns

    def __getitem__(self, name):
        return self.columns[name]


def hub(monkeypatch, **splits):
    """A stand-in for `datasets` that knows one data set; returns what it was asked for."""
    asked = []

    def load_dataset(path, name=None):
        asked.append((path, name))
        if path != "user/digits":
            raise FileNotFoundError(f"Couldn't find {path}")
        return splits

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def digits(features, n=4, **columns):
    return Split(features, {"picture": [Pillow.new("L", (3, 2), k) for k in range(n)], **columns})


def test_hugging_face_columns_are_found_by_type(monkeypatch):
    features = {"picture": Image(), "number": ClassLabel(["zero", "one"]), "writer": Value(), "boxes": Sequence()}
    rest = {"writer": ["a", "b", "a", "b"], "boxes": [[1], [1, 2], [], []]}
    train = digits(features, number=[0, 1, 0, 1], **rest)
    test = digits(features, n=2, number=[1, 0], writer=["c", "c"], boxes=[[], []])
    asked = hub(monkeypatch, train=train, test=test)
    data = load({"kind": "hf:user/digits", "config": "small"})
    assert asked == [("user/digits", "small")]
    assert data.x_train.shape == (4, 2, 3)
    assert data.x_train[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert data.y_test.tolist() == [1, 0]
    assert data.classes == ("zero", "one")
    assert {name: column.tolist() for name, column in data.columns.items()} == {"writer": ["a", "b", "a", "b"]}


def test_hugging_face_columns_are_found_by_name_or_given(monkeypatch):
    features = {"picture": Value(), "label": Value(), "other": Value()}
    hub(monkeypatch, train=digits(features, label=[0, 1, 2, 0], other=[1, 1, 0, 0]))
    found = load("hf:user/digits")
    assert found.y_train.tolist() == [0, 1, 2, 0]
    assert len(found.x_test) == 0
    given_ = load({"kind": "hf:user/digits", "image": "picture", "label": "other"})
    assert given_.y_train.tolist() == [1, 1, 0, 0]
    assert given_.columns["label"].tolist() == [0, 1, 2, 0]


def test_hugging_face_faults(monkeypatch):
    features = {"a": Value(), "b": Value()}
    hub(monkeypatch, train=Split(features, {"a": [1], "b": [2]}))
    with pytest.raises(DataError, match="FileNotFoundError"):
        load("hf:user/nothing")
    with pytest.raises(DataError, match="image column is not to be told from its columns a, b; set image = NAME"):
        load("hf:user/digits")
    with pytest.raises(DataError, match="no column 'c'"):
        load({"kind": "hf:user/digits", "image": "c", "label": "b"})
    with pytest.raises(DataError, match="no split 'training'"):
        load({"kind": "hf:user/digits", "train": "training"})


class Vision:
    """What torchvision's data sets are: a sequence of (pillow image, label)."""

    def __init__(self, root, n, offset):
        self.root, self.n, self.offset = root, n, offset

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return Pillow.new("RGB", (3, 2), (index, 0, self.offset)), index % 2


class ByTrain(Vision):
    classes = ("even", "odd")

    def __init__(self, root, train=True, download=False):
        assert download
        super().__init__(root, 4 if train else 2, int(train))


class Inheriting(ByTrain):
    """As EMNIST: a split of another meaning, and `train` behind **kwargs."""

    def __init__(self, root, split, **kwargs):
        assert split == "letters"
        super().__init__(root, **kwargs)


class BySplit(Vision):
    """As SVHN."""

    def __init__(self, root, split="train", download=False):
        assert download
        super().__init__(root, {"train": 4, "test": 2}[split], int(split == "train"))


@pytest.fixture
def vision(monkeypatch):
    module = types.SimpleNamespace(ByTrain=ByTrain, Inheriting=Inheriting, BySplit=BySplit)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))


@pytest.mark.parametrize(
    ("settings", "classes"),
    [
        ("torchvision:ByTrain", ("even", "odd")),
        ({"kind": "torchvision:Inheriting", "split": "letters"}, ("even", "odd")),
        ({"kind": "torchvision:BySplit", "root": "elsewhere"}, ("0", "1")),
    ],
)
def test_torchvision_sides_are_told_apart(vision, settings, classes):
    data = load(settings)
    assert data.x_train.shape == (4, 2, 3, 3)
    assert data.x_test.shape == (2, 2, 3, 3)
    assert (data.x_train[..., 2] == 1).all()
    assert (data.x_test[..., 2] == 0).all()
    assert data.y_train.tolist() == [0, 1, 0, 1]
    assert data.classes == classes


def test_torchvision_faults(vision):
    with pytest.raises(DataError, match="has no 'Nothing'"):
        load("torchvision:Nothing")
    with pytest.raises(DataError, match="TypeError"):
        load({"kind": "torchvision:ByTrain", "colour": True})


# ---- the user's own function ---------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch):
    def make(n=6):
        return Dataset.of(arrays(n=n))

    def broken():
        raise KeyError("patients.csv")

    def missing():
        raise DataError("the share is not mounted; mount it.")

    module = types.ModuleType("my_data")
    module.make, module.broken, module.missing, module.wrong = make, broken, missing, lambda: 3
    monkeypatch.setitem(sys.modules, "my_data", module)


def test_a_dotted_path_calls_the_users_function(plugin):
    assert len(load("my_data:make").x_train) == 6
    assert len(load({"kind": "my_data:make", "n": 9}).x_train) == 9


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ("my_data:broken", DataError, r"the function raised KeyError\('patients.csv'\)"),
        ("my_data:missing", DataError, "the share is not mounted; mount it"),
        ("my_data:wrong", DataError, "returned int; it must return a fedge.client.data.Dataset"),
        ({"kind": "my_data:make", "m": 9}, ExperimentError, "unexpected keyword argument 'm'"),
    ],
)
def test_faults_of_the_users_function(plugin, settings, error, words):
    with pytest.raises(error, match=words):
        load(settings)
