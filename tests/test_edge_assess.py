"""What held-out samples say of a bundle, against the same computed slowly: one sample and one coding at a time."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import nn

from fedge.client.data import load as load_data
from fedge.core.errors import DataError, ExperimentError, RefusedTensor
from fedge.edge import assess as assessing
from fedge.edge.assess import ENOUGH, assess, halves, offer, suited
from fedge.edge.bundle import INPUT, OUTPUT, Boundary, Bundle, Sent, Tensor, load, write
from fedge.edge.coding.codings import decode, encode
from fedge.edge.exits.rules import decide
from fedge.edge.exits.to_onnx import to_onnx
from fedge.edge.exits.train import EarlyExit, batches, exit_head, joint, train
from fedge.edge.runtime.sessions import open_piece
from fedge.edge.split.export import export
from fedge.edge.split.image import Image
from tests.onnx_models import Net, save

Array = np.ndarray[Any, Any]
COUNT = 300
TRIED = {INPUT: ["raw", "u8"], "max_pool2d": ["f16", "u8+zstd"]}


def stage(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))


@pytest.fixture(scope="module")
def fashion() -> tuple[Array, Array]:
    data = load_data("fashion-mnist")
    return (data.x_test[:COUNT, None] / 255).astype(np.float32), np.array(data.y_test[:COUNT])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[tuple[str, str], ...]]:
    """Two stages with an exit each, trained for a second or two."""
    data, threads = load_data("fashion-mnist"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            exits = {0: exit_head(torch.zeros(1, 4, 14, 14), 10), 1: nn.Sequential(nn.Flatten(), nn.Linear(392, 10))}
            head = nn.Sequential(nn.Flatten(), nn.Linear(392, 64), nn.ReLU(), nn.Linear(64, 10))
            net = EarlyExit([stage(1, 4), stage(4, 8)], exits, head)
        x = torch.from_numpy((data.x_train[:2000, None] / 255).astype(np.float32))
        train(net, batches(x, torch.from_numpy(np.array(data.y_train[:2000])), 32), steps=150, loss=joint())
        path = tmp_path_factory.mktemp("assess") / "model.onnx"
        return path, to_onnx(net, x[:1], path)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path: Path, model: tuple[Path, tuple[tuple[str, str], ...]]) -> Path:
    path, exits = model
    export(path, tmp_path / "bundle", exits=exits)
    return tmp_path / "bundle"


def run(folder: Path, bundle: Bundle, legs: Sequence[str], values: dict[str, Array]) -> dict[str, Array]:
    """Through the pieces between these boundaries; everything they gave."""
    found = dict(values)
    for start, end in pairwise(legs):
        runner = open_piece(folder, bundle, start, end)
        found |= runner.run({tensor.name: found[tensor.name] for tensor in bundle.boundary(start).tensors})
        runner.close()
    return found


def line(bundle: Bundle) -> list[str]:
    return [INPUT, *(leave.boundary for leave in bundle.exits), OUTPUT]


def literally(folder: Path, bundle: Bundle, x: Array) -> tuple[list[int | None], list[list[int]]]:
    """Per sample: which exit it leaves at, if any, and the class that each exit and the output names."""
    places: list[int | None] = []
    named: list[list[int]] = []
    name = bundle.boundary(INPUT).tensors[0].name
    found = run(folder, bundle, line(bundle), {name: x})
    final = found[bundle.boundary(OUTPUT).tensors[0].name]
    for row in range(len(x)):
        logits = [found[leave.logits.name][row : row + 1] for leave in bundle.exits]
        left = None
        for index, leave in enumerate(bundle.exits):
            if decide(bundle.rule, logits[: index + 1], leave.temperature, leave.threshold)[0]:
                left = index
                break
        places.append(left)
        named.append([int(one.argmax()) for one in logits] + [int(final[row].argmax())])
    return places, named


def expect_exits(folder: Path, bundle: Bundle, x: Array, truth: Sequence[int] | None, lose: float) -> None:
    """The thresholds keep the goal where they were chosen, and the figures are those of the other samples."""
    choosing, telling = halves(len(x))
    expect_goal(folder, bundle, x[choosing], None if truth is None else np.asarray(truth)[choosing], lose)
    expect_figures(folder, bundle, x[telling], None if truth is None else np.asarray(truth)[telling])


def expect_figures(folder: Path, bundle: Bundle, x: Array, truth: Array | None) -> None:
    places, named = literally(folder, bundle, x)
    told = [row[-1] for row in named] if truth is None else list(truth)
    for index, leave in enumerate(bundle.exits):
        here = [row for row, place in enumerate(places) if place == index]
        assert leave.share == pytest.approx(len(here) / len(x))
        if here:
            assert leave.accuracy == pytest.approx(np.mean([named[row][index] == told[row] for row in here]))
            assert leave.final_accuracy == pytest.approx(np.mean([named[row][-1] == told[row] for row in here]))


def expect_goal(folder: Path, bundle: Bundle, x: Array, truth: Array | None, lose: float) -> None:
    places, named = literally(folder, bundle, x)
    told = [row[-1] for row in named] if truth is None else list(truth)
    full = np.mean([names[-1] == one for names, one in zip(named, told)])
    early = np.mean([names[-1 if place is None else place] == one for names, place, one in zip(named, places, told)])
    assert early >= full - lose - 1e-9


# ---- what it says is so ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["confidence", "patience"])
@pytest.mark.parametrize("labelled", [True, False])
def test_shares_and_accuracies_of_exits_are_those_of_the_samples(
    folder: Path, fashion: tuple[Array, Array], labelled: bool, rule: str
) -> None:
    x, y = fashion
    before = load(folder)
    made = assess(folder, x, y if labelled else None, lose=0.1, rule=rule, tried={INPUT: ["raw"]})
    assert made == load(folder)
    assert made.version != before.version
    assert made.rule == rule
    assert sum(leave.share for leave in made.exits) > 0.1  # somebody leaves, or this tests nothing
    expect_exits(folder, made, x, y if labelled else None, 0.1)


def test_figures_of_exits_are_of_samples_that_chose_nothing_where_there_are_enough() -> None:
    for count in (1, ENOUGH - 1, ENOUGH, ENOUGH + 1, 5000):
        choosing, telling = (set(rows.tolist()) for rows in halves(count))
        assert choosing | telling == set(range(count))
        assert (choosing & telling) == (set() if count >= ENOUGH else set(range(count)))
    assert [half.tolist() for half in halves(400)] == [half.tolist() for half in halves(400)]
    assert abs(np.mean(halves(5000)[0]) - 2500) < 100  # drawn, not the first half of a file that may be sorted


def test_labels_of_the_telling_half_choose_nothing(folder: Path, fashion: tuple[Array, Array]) -> None:
    x, y = fashion
    told = halves(len(x))[1]
    other = y.copy()
    other[told] = (y[told] + 1) % 10
    first = assess(folder, x, y, lose=0.1, tried={name: [] for name in TRIED}).exits
    second = assess(folder, x, other, lose=0.1, tried={name: [] for name in TRIED}).exits
    chosen = [[(one.temperature, one.threshold, one.share) for one in exits] for exits in (first, second)]
    assert chosen[0] == chosen[1]
    assert [one.accuracy for one in first] != [one.accuracy for one in second]


def test_accuracy_and_bytes_of_codings_are_those_of_each_sample(folder: Path, fashion: tuple[Array, Array]) -> None:
    x, y = fashion[0][:80], fashion[1][:80]
    made = assess(folder, x, y, tried=TRIED)
    for boundary, named in TRIED.items():
        assert list(made.codings[boundary]) == named
        (tensor,) = made.boundary(boundary).tensors
        whole = run(folder, made, [INPUT, boundary] if boundary != INPUT else [INPUT], {"input": x})[tensor.name]
        for coding in named:
            coded = [encode(tensor.name, whole[row : row + 1], coding) for row in range(len(x))]
            back = np.concatenate([decode(one, tensor) for one in coded])
            output = run(folder, made, [boundary, OUTPUT], {tensor.name: back})["output"]
            sent = made.codings[boundary][coding]
            sizes = [len(one.data) + 4 * len([*one.low, *one.high]) for one in coded]
            assert sent.bytes == pytest.approx(np.mean(sizes))
            assert sent.accuracy == pytest.approx(np.mean(output.argmax(axis=1) == y), abs=0.013)  # one near tie of 80


def test_raw_is_as_right_as_the_model_and_without_labels_always(folder: Path, fashion: tuple[Array, Array]) -> None:
    x, y = fashion
    whole = run(folder, load(folder), line(load(folder)), {"input": x})["output"].argmax(axis=1)
    raw = {"tried": {INPUT: ["raw"], "max_pool2d": ["raw"], "max_pool2d_1": ["raw"]}}
    made = assess(folder, x, y, **raw)  # type: ignore[arg-type]
    assert {sent.accuracy for named in made.codings.values() for sent in named.values()} == {np.mean(whole == y)}
    made = assess(folder, x, **raw)  # type: ignore[arg-type]
    assert {sent.accuracy for named in made.codings.values() for sent in named.values()} == {1.0}


def test_losing_nothing_is_a_wish_that_any_count_of_samples_allows(folder: Path, fashion: tuple[Array, Array]) -> None:
    """Means of counts that are no binary fractions do not make the goal unreachable."""
    x, y = fashion
    for count in range(1, 42, 2):
        made = assess(folder, x[:count], y[:count], lose=0.0, tried={name: [] for name in TRIED})
        assert all(leave.share == 0.0 for leave in made.exits)  # so few samples prove nothing


def test_a_judge_of_ones_own_says_what_is_right(folder: Path, fashion: tuple[Array, Array]) -> None:
    x, y = fashion
    made = assess(folder, x, y, judge=lambda output, truth: np.full(len(truth), 0.25), tried=TRIED)
    assert {sent.accuracy for boundary in TRIED for sent in made.codings[boundary].values()} == {0.25}


# ---- which codings ------------------------------------------------------------------------------


def test_what_a_coding_cannot_hold_is_not_offered(tmp_path: Path) -> None:
    """f16 ends at 65504; the others are offered all the same."""
    net = Net(3)
    net.op("Mul", "x", net.const(1e6), name="large")
    net.op("Gemm", "large", net.weight(4, 3), net.weight(3), name="logits")
    made = net.model({"x": (TensorProto.FLOAT, ["n", 4])}, {"logits": (TensorProto.FLOAT, ["n", 3])})
    export(save(made, tmp_path / "m.onnx"), tmp_path / "b", cuts=["large"])
    found = assess(tmp_path / "b", np.eye(4, dtype=np.float32), np.zeros(4, np.int64)).codings
    assert "f16" in found[INPUT]
    assert set(found["large"]) == set(suited(load(tmp_path / "b").boundary("large"))) - {"f16"}


def test_pictures_get_codings_of_pictures(tmp_path: Path) -> None:
    net = Net(4)
    net.head(net.cnr("x", 3, 4, stride=2), 4, 10, "logits")
    made = net.model({"x": (TensorProto.FLOAT, ["n", 3, 16, 16])}, {"logits": (TensorProto.FLOAT, ["n", 10])})
    export(save(made, tmp_path / "m.onnx"), tmp_path / "b", image=Image(16, 16))
    x = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    found = assess(tmp_path / "b", x).codings[INPUT]
    assert set(found) == set(assessing.IMAGE_CODINGS)
    assert found["raw"] == Sent(1.0, 16 * 16 * 3)
    assert found["png"].accuracy == 1.0
    lengths = [len(encode("image", x[row : row + 1], "jpeg75").data) for row in range(len(x))]
    assert found["jpeg75"].bytes == pytest.approx(np.mean(lengths))


def test_a_model_of_a_fixed_batch_takes_whole_batches(tmp_path: Path) -> None:
    net = Net(5)
    net.op("Gemm", "x", net.weight(4, 3), net.weight(3), name="logits")
    made = net.model({"x": (TensorProto.FLOAT, [2, 4])}, {"logits": (TensorProto.FLOAT, [2, 3])})
    export(save(made, tmp_path / "m.onnx"), tmp_path / "b", cuts=[])
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    assert assess(tmp_path / "b", x).codings[INPUT]["raw"] == Sent(1.0, 2 * 4 * 4)
    with pytest.raises(DataError, match="2 samples at a time"):
        assess(tmp_path / "b", x[:5])


def rows_of(net: Net, inputs: list[Any], outputs: list[Any], path: Path, **settings: Any) -> Path:
    """The bundle of a network from `x` to `y`, in the folder `path`."""
    made = net.model({"x": (TensorProto.FLOAT, inputs)}, {"y": (TensorProto.FLOAT, outputs)})
    export(save(made, path.with_suffix(".onnx")), path, **settings)
    return path


def test_a_cut_whose_rows_are_not_samples_is_sent_a_sample_at_a_time(tmp_path: Path) -> None:
    """Two rows of the cut belong to one sample, so its bytes are those of both."""
    net = Net(6)
    net.op("Reshape", "x", net.const([-1, 4], np.int64), name="split")
    net.op("Relu", "split", name="cut")
    net.op("Gemm", net.op("Reshape", "cut", net.const([-1, 8], np.int64)), net.weight(8, 3), name="y")
    folder = rows_of(net, ["n", 8], ["n", 3], tmp_path / "b", cuts=["cut"])
    assert load(folder).boundary("cut").tensors[0].shape == (-2, 4)
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    found = assess(folder, x).codings
    assert found["cut"]["raw"] == found[INPUT]["raw"] == Sent(1.0, 8 * 4)


def filtered(path: Path) -> Path:
    """A prefilter `empty` of two logits, then an exit `sure` of three, as many as the output."""
    net = Net(7)
    net.op("Relu", net.op("MatMul", "x", net.weight(4, 4)), name="first")
    net.op("MatMul", "first", net.weight(4, 2), name="empty")
    net.op("Relu", net.op("MatMul", "first", net.weight(4, 4)), name="second")
    net.op("MatMul", "second", net.weight(4, 3), name="sure")
    net.op("MatMul", net.op("Relu", net.op("MatMul", "second", net.weight(4, 4))), net.weight(4, 3), name="y")
    exits = [("empty", "empty"), ("sure", "sure")]
    return rows_of(net, ["n", 4], ["n", 3], path, cuts=["first", "second"], exits=exits)


@pytest.mark.parametrize("rule", ["confidence", "patience"])
def test_an_exit_of_other_classes_keeps_its_settings_and_the_others_are_calibrated(tmp_path: Path, rule: str) -> None:
    folder = filtered(tmp_path / "b")
    before = load(folder)
    settings = {"threshold": 0.9, "share": 0.25, "accuracy": 1.0, "final_accuracy": 1.0}
    prefilter = msgspec.structs.replace(before.exits[0], **settings)
    write(folder, msgspec.structs.replace(before, exits=(prefilter, before.exits[1])))
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    made = assess(folder, x, lose=1.0, rule=rule)
    assert made.exits[0] == prefilter
    assert made.exits[1].temperature != 1.0
    assert 0.0 < made.exits[1].share + prefilter.share <= 1.0
    if rule == "confidence":
        assert made.exits[1].share == pytest.approx(0.75)  # all that the prefilter leaves over


def test_offered_without_samples_is_only_what_changes_nothing(folder: Path) -> None:
    made = offer(folder)
    assert made == load(folder)
    assert set(made.codings) == {boundary.name for boundary in made.boundaries[:-1]}
    assert all(set(named) == {"raw", "raw+zstd"} for named in made.codings.values())
    assert {sent for named in made.codings.values() for sent in named.values()} == {Sent()}
    picture = Boundary(INPUT, (Tensor("x", "uint8", (-1, 8, 8, 3)),), 0)
    assert set(assessing.lossless(picture)) == {"raw", "png"}


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said", "arguments"),
    [
        (DataError, "no held-out sample", {"x": np.zeros((0, 1, 28, 28), np.float32)}),
        (DataError, "no held-out sample", {"x": np.float32(1)}),
        (DataError, "3 answers", {"y": np.zeros(3, np.int64)}),
        (DataError, "Labels go from 99", {"y": np.full(4, 99)}),
        (RefusedTensor, "must be float32", {"x": np.zeros((4, 28, 28), np.float32)}),
        (RefusedTensor, "must be float32", {"x": np.zeros((4, 1, 28, 28), np.uint8)}),
        (DataError, "NaN", {"x": np.full((4, 1, 28, 28), np.nan, np.float32)}),
        (ExperimentError, "no share", {"lose": 1.5}),
        (ExperimentError, "no share", {"lose": float("nan")}),
        (ExperimentError, "no exit rule", {"rule": "luck"}),
        (ExperimentError, "sent at 'nowhere'", {"tried": {"nowhere": ["raw"]}}),
        (RefusedTensor, "No coding is called 'u9'", {"tried": {INPUT: ["u9"]}}),
    ],
)
def test_what_cannot_be_assessed_leaves_the_bundle_as_it_was(
    folder: Path, error: type[Exception], said: str, arguments: dict[str, Any]
) -> None:
    before = load(folder)
    given = {"x": np.zeros((4, 1, 28, 28), np.float32), "y": np.zeros(4, np.int64)} | arguments
    with pytest.raises(error, match=said):
        assess(folder, given.pop("x"), given.pop("y"), **given)
    assert load(folder) == before


def with_output(columns: int, folder: Path) -> Path:
    net = Net(8)
    net.op("MatMul", net.op("Relu", "x"), net.weight(4, columns), name="y")
    return rows_of(net, ["n", 4], ["n", columns], folder, cuts=[])


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.arange(90, 98), "Labels go from 90 to 97"),
        (np.full(8, -1), "Labels go from -1"),
        (np.zeros((8, 1), np.int64), "one whole number per sample"),
        (np.zeros(8), "one whole number per sample"),
        (np.zeros((8, 2), np.float32), "one whole number per sample"),
    ],
)
def test_labels_that_the_output_cannot_have_are_refused_without_exits_too(
    tmp_path: Path, labels: Array, said: str
) -> None:
    folder = with_output(3, tmp_path / "b")
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    with pytest.raises(DataError, match=said):
        assess(folder, x, labels)
    assert assess(folder, x, np.eye(3, dtype=np.float32)[[0] * 8]).codings[INPUT]["raw"].accuracy is not None


@pytest.mark.parametrize("labels", [None, np.zeros(8, np.int64)])
def test_an_output_that_names_no_class_needs_a_judge(tmp_path: Path, labels: Array | None) -> None:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    flat = Net(9)
    flat.op("ReduceSum", flat.op("Relu", "x"), flat.const([1], np.int64), name="y", keepdims=0)
    square = Net(10)
    square.op("Unsqueeze", square.op("Relu", "x"), square.const([2], np.int64), name="y")
    folders = [
        with_output(1, tmp_path / "one"),
        rows_of(flat, ["n", 4], ["n"], tmp_path / "flat", cuts=[]),
        rows_of(square, ["n", 4], ["n", 4, 1], tmp_path / "square", cuts=[]),
    ]
    for folder in folders:
        with pytest.raises(DataError, match="names no class"):
            assess(folder, x, labels)
        made = assess(folder, x, labels, judge=lambda output, truth: np.ones(len(output)))
        assert made.codings[INPUT]["raw"].accuracy == 1.0


def test_a_model_with_two_inputs_is_refused(tmp_path: Path) -> None:
    tensors = (Tensor("a", "float32", (-1, 2)), Tensor("b", "float32", (-1, 2)))
    ends = (Boundary(INPUT, tensors, 0), Boundary(OUTPUT, (Tensor("c", "float32", (-1, 2)),), 1))
    write(tmp_path, Bundle(1, "", "two", ends, (), {}))
    with pytest.raises(DataError, match="several inputs"):
        assess(tmp_path, np.zeros((1, 2), np.float32))
