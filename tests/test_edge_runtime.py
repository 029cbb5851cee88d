"""The device's runtime: right answers out of mapped files, a cache that heals, refusals, and what is measured."""

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fedge.core.errors import BadBundle, DataError, FedgeError, ModelError, RefusedTensor
from fedge.edge import bundle as bundles
from fedge.edge.bundle import INPUT, OUTPUT, WEIGHTS, Boundary, Bundle, Exit, Piece, Sent, Tensor
from fedge.edge.plan.profile import decode, encode
from fedge.edge.runtime import cache as caches
from fedge.edge.runtime import memory
from fedge.edge.runtime.measure import line, profile_bundle, profile_piece
from fedge.edge.runtime.nodes import Node, nodes
from fedge.edge.runtime.operators import attribute, predict, profile_operators
from fedge.edge.runtime.sessions import open_piece
from fedge.edge.runtime.tensors import example

IMAGE = Tensor("x", "float32", (-1, 16, 12, 12))
FEATURES = Tensor("relu", "float32", (-1, 16, 12, 12))
EARLY = Tensor("early", "float32", (-1, 4))
LOGITS = Tensor("logits", "float32", (-1, 4))
HEAD, TAIL, WHOLE = (INPUT, "middle"), ("middle", OUTPUT), (INPUT, OUTPUT)


def weights():
    generator = np.random.default_rng(3)
    shapes = {"kernel": (16, 16, 3, 3), "scale": (16,), "bias": (16,), "mean": (16,), "var": (16,)}
    shapes |= {"first": (16, 4), "second": (16, 4)}
    made = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return made | {"var": np.abs(made["var"]) + 1}


HEAD_NODES = [
    helper.make_node("Conv", ["x", "kernel"], ["conv"], "a", pads=[1, 1, 1, 1]),
    helper.make_node("BatchNormalization", ["conv", "scale", "bias", "mean", "var"], ["norm"], "b"),
    helper.make_node("Relu", ["norm"], ["relu"], "c"),
]
EXIT_NODES = [
    helper.make_node("ReduceMean", ["relu"], ["pooled"], "d", axes=[2, 3], keepdims=0),
    helper.make_node("MatMul", ["pooled", "first"], ["early"], "e"),
]
TAIL_NODES = [
    helper.make_node("Sigmoid", ["relu"], ["gate"], "f"),
    helper.make_node("Mul", ["relu", "gate"], ["swish"], "g"),
    helper.make_node("ReduceMax", ["swish"], ["most"], "h", axes=[2, 3], keepdims=0),
    helper.make_node("MatMul", ["most", "second"], ["logits"], "i"),
]


def info(tensor):
    shape = [extent if extent > 0 else "batch" for extent in tensor.shape]
    return helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape)


def graph(operators, inputs, outputs, held, external=True):
    """A skeleton whose weights lie one after the other in weights.data, or inside."""
    tensors, offset = [], 0
    for name, array in held.items():
        tensor = onnx.numpy_helper.from_array(array, name)
        if external:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": WEIGHTS, "offset": offset, "length": array.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
        offset += array.nbytes
        if any(name in node.input for node in operators):
            tensors.append(tensor)
    made = helper.make_graph(operators, "piece", [info(one) for one in inputs], [info(one) for one in outputs], tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def make(folder):
    """A bundle of three pieces and one exit."""
    held = weights()
    (folder / "pieces").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"".join(array.tobytes() for array in held.values()))
    parts = {
        "head": (HEAD, [*HEAD_NODES, *EXIT_NODES], (IMAGE,), (FEATURES, EARLY), ("early",)),
        "tail": (TAIL, TAIL_NODES, (FEATURES,), (LOGITS,), ()),
        "whole": (WHOLE, [*HEAD_NODES, *TAIL_NODES], (IMAGE,), (LOGITS,), ()),
    }
    pieces = []
    for name, (ends, operators, inputs, outputs, exits) in parts.items():
        (folder / f"pieces/{name}.onnx").write_bytes(graph(operators, inputs, outputs, held))
        pieces.append(Piece(f"pieces/{name}.onnx", *ends, inputs, outputs, exits))
    line = (Boundary(INPUT, (IMAGE,), 0), Boundary("middle", (FEATURES,), 3), Boundary(OUTPUT, (LOGITS,), 7))
    codings = {"middle": {"f16": Sent(), "u8+zlib": Sent(0.9)}}
    leaves = (Exit("early", "middle", EARLY),)
    bundles.write(folder, Bundle(1, "", "demo", line, tuple(pieces), {}, leaves, codings=codings))
    return bundles.load(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    return folder, make(folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


def reference(x):
    """The model in plain onnxruntime, without any optimisation, weights inside."""
    data = graph(
        [*HEAD_NODES, *EXIT_NODES, *TAIL_NODES], (IMAGE,), (FEATURES, EARLY, LOGITS), weights(), external=False
    )
    chosen = onnxruntime.SessionOptions()
    chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    chosen.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, chosen, providers=["CPUExecutionProvider"])
    return dict(zip(("relu", "early", "logits"), session.run(None, {"x": x})))


def image(batch=1):
    return np.random.default_rng(batch).standard_normal((batch, 16, 12, 12)).astype(np.float32)


# ---- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_pieces_one_after_the_other_answer_as_the_whole_model(made, kept, batch, threads):
    x, wanted = image(batch), reference(image(batch))
    head, tail, whole = (open_piece(*made, *ends, threads=threads, cache=kept) for ends in (HEAD, TAIL, WHOLE))
    assert head.optimised
    middle = head.run({"x": x})
    assert list(middle) == ["relu", "early"]
    end = tail.run({"relu": middle["relu"]})
    for name, found in (middle | end).items():
        np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(whole.run({"x": x})["logits"], wanted["logits"], rtol=1e-4, atol=1e-5)


def test_answers_are_the_callers_and_inputs_need_not_be_contiguous(made, kept):
    runner, x = open_piece(*made, *WHOLE, cache=kept), image(2)
    first = runner.run({"x": x})["logits"]
    copy = first.copy()
    runner.run({"x": -x})
    np.testing.assert_array_equal(first, copy)
    strided = np.asfortranarray(x)
    np.testing.assert_array_equal(runner.run({"x": strided})["logits"], copy)


def test_threads_may_share_a_runner(made, kept):
    runner = open_piece(*made, *WHOLE, cache=kept)
    wanted = {batch: runner.run({"x": image(batch)})["logits"] for batch in (1, 2, 3, 4)}
    found = {}
    workers = [
        threading.Thread(target=lambda batch=batch: found.update({batch: runner.run({"x": image(batch)})["logits"]}))
        for batch in wanted
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for batch, logits in wanted.items():
        np.testing.assert_allclose(found[batch], logits, rtol=1e-6)


def test_packed_weights_change_the_memory_and_not_the_answer(tmp_path):
    wide = 12_288  # a matrix of 48 MiB: the system gives and takes such pieces of memory one by one
    held = {"matrix": np.random.default_rng(0).random((wide, 1024), np.float32)}
    folder = tmp_path / "bundle"
    (folder / "pieces").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(held["matrix"].tobytes())
    x, y = Tensor("x", "float32", (-1, wide)), Tensor("y", "float32", (-1, 1024))
    operators = [helper.make_node("MatMul", ["x", "matrix"], ["y"])]
    (folder / "pieces/p.onnx").write_bytes(graph(operators, (x,), (y,), held))
    line = (Boundary(INPUT, (x,), 0), Boundary(OUTPUT, (y,), 1))
    bundle = bundles.write(folder, Bundle(1, "", "", line, (Piece("pieces/p.onnx", *WHOLE, (x,), (y,)),), {}))
    open_piece(folder, bundle, *WHOLE, cache=tmp_path / "cache").close()
    private, answers, batch = {}, {}, np.ones((2, wide), np.float32)
    for packed in (False, True):
        before = memory.resident()
        runner = open_piece(folder, bundle, *WHOLE, cache=tmp_path / "cache", packed=packed)
        answers[packed] = runner.run({"x": batch})["y"]
        private[packed] = memory.resident().since(before).private
        runner.close()
    np.testing.assert_allclose(answers[True], answers[False], rtol=1e-4, atol=1e-3)
    assert private[False] < held["matrix"].nbytes / 4 < held["matrix"].nbytes * 3 / 4 < private[True]


def test_a_closed_piece_says_so(made, kept):
    runner = open_piece(*made, *WHOLE, cache=kept)
    runner.close()
    runner.close()
    with pytest.raises(ModelError, match="open it again"):
        runner.run({"x": image()})


def test_a_piece_closed_while_it_runs_still_answers(made, kept):
    runner = open_piece(*made, *WHOLE, cache=kept)

    class Closing(Mapping):
        """Inputs that are read after the piece was found open, and before it is run."""

        def __getitem__(self, name):
            return image()

        def __iter__(self):
            return iter(("x",))

        def __len__(self):
            return 1

        def items(self):
            runner.close()
            return super().items()

    assert np.array_equal(runner.run(Closing())["logits"].argmax(), reference(image())["logits"].argmax())
    with pytest.raises(ModelError, match="has been closed"):
        runner.run({"x": image()})


# ---- the cache ---------------------------------------------------------------------------------


def entries(cache):
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def test_a_piece_is_optimised_once_and_its_weights_are_kept_outside_the_graph(made, tmp_path):
    open_piece(*made, *HEAD, cache=tmp_path)
    (entry,) = entries(tmp_path)
    assert list(tmp_path.iterdir()) == [entry], "nothing is left lying about"
    assert (entry / caches.DATA).stat().st_size >= 16 * 16 * 9 * 4
    before = (entry / caches.DATA).stat()
    assert open_piece(*made, *HEAD, cache=tmp_path).optimised
    assert (entry / caches.DATA).stat().st_ino == before.st_ino
    fused = onnx.load(entry / caches.GRAPH, load_external_data=False).graph.node
    assert "BatchNormalization" not in {node.op_type for node in fused}


@pytest.mark.parametrize("victim", [caches.GRAPH, caches.DATA, caches.RECORD])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped", "empty", "link"])
def test_a_damaged_entry_is_made_again(made, tmp_path, victim, damage):
    wanted = open_piece(*made, *WHOLE, cache=tmp_path).run({"x": image()})
    (entry,) = entries(tmp_path)
    path = entry / victim
    raw = path.read_bytes()
    path.unlink()
    if damage == "link":
        (tmp_path / ".other").write_bytes(bytes(len(raw)))
        path.symlink_to(tmp_path / ".other")
    elif damage != "gone":
        flipped = bytes([*raw[:-9], raw[-9] ^ 64, *raw[-8:]])
        path.write_bytes({"cut": raw[:-1], "empty": b"", "flipped": flipped}[damage])
    runner = open_piece(*made, *WHOLE, cache=tmp_path)
    assert runner.optimised
    np.testing.assert_array_equal(runner.run({"x": image()})["logits"], wanted["logits"])
    assert (entry / caches.DATA).read_bytes() == raw or victim != caches.DATA


def test_a_file_that_nobody_wrote_to_is_not_read_again(made, tmp_path, monkeypatch):
    open_piece(*made, *WHOLE, cache=tmp_path)
    (entry,) = entries(tmp_path)
    read = []
    monkeypatch.setattr(caches, "digest", lambda path: read.append(path.name) or bundles.digest(path))
    open_piece(*made, *WHOLE, cache=tmp_path)
    assert sorted(read) == [caches.DATA, caches.GRAPH], "too young to be taken at its time's word"
    stamps = json.loads((entry / caches.RECORD).read_bytes())
    for stamp in stamps.values():
        stamp["checked_ns"] += 10**10
    (entry / caches.RECORD).write_text(json.dumps(stamps))
    read.clear()
    assert open_piece(*made, *WHOLE, cache=tmp_path).optimised
    assert read == []
    (entry / caches.DATA).touch()
    open_piece(*made, *WHOLE, cache=tmp_path)
    assert read == [caches.DATA]


def test_other_weights_are_another_entry(made, tmp_path):
    folder, bundle = made
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / WEIGHTS).write_bytes(bytes((folder / WEIGHTS).stat().st_size))
    changed = bundles.write(other, bundle)
    cache = tmp_path / "cache"
    ours = open_piece(folder, bundle, *WHOLE, cache=cache).run({"x": image()})["logits"]
    theirs = open_piece(other, changed, *WHOLE, cache=cache).run({"x": image()})["logits"]
    assert len(entries(cache)) == 2
    assert np.abs(ours).max() > 0
    assert np.isnan(theirs).all() or np.abs(theirs).max() == 0


def test_without_a_cache_the_answers_are_the_same(made, kept, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    runner = open_piece(*made, *WHOLE, cache=tmp_path / "file" / "cache")
    assert not runner.optimised
    assert "with more memory" in caplog.text
    wanted = open_piece(*made, *WHOLE, cache=kept).run({"x": image()})["logits"]
    np.testing.assert_allclose(runner.run({"x": image()})["logits"], wanted, rtol=1e-6)
    with pytest.raises(DataError, match="name a cache"):
        profile_operators(*made, *WHOLE, {"x": image()}, cache=tmp_path / "file" / "cache")


def test_a_full_disk_leaves_nothing_behind(made, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caches.os, "fsync", full)
    assert not open_piece(*made, *WHOLE, cache=tmp_path).optimised
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_an_entry_the_first_one_serves_both(made, tmp_path):
    def slow(fresh):
        open_piece(*made, *HEAD, cache=tmp_path)
        (fresh / caches.GRAPH).write_text("the second one's")

    name = caches.key(made[1], made[1].piece(*HEAD))
    entry = caches.entry(tmp_path, name, slow)
    assert entry == tmp_path / name
    assert (entry / caches.GRAPH).read_bytes() != b"the second one's"
    assert list(tmp_path.iterdir()) == [entry]


def test_the_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caches.default() == tmp_path / "fedge" / "pieces"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert caches.default() == Path.home() / ".cache" / "fedge" / "pieces"


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"y": image()},
        {"x": image(), "y": image()},
        {"x": image().astype(np.float64)},
        {"x": image().astype(">f4")},
        {"x": image()[0]},
        {"x": image()[:0]},
        {"x": image()[:, :15]},
        {"x": np.array(["text"], object)},
    ],
    ids=["nothing", "name", "more", "type", "order", "rank", "empty", "extent", "object"],
)
def test_inputs_that_do_not_fit_are_refused(made, kept, inputs):
    with pytest.raises(RefusedTensor) as refused:
        open_piece(*made, *WHOLE, cache=kept).run(inputs)
    assert str(refused.value).count("\n") == 0


@settings(deadline=None)
@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 12, 16]), max_size=5),
    dtype=st.sampled_from(["float32", "float64", "uint8", "bool"]),
)
def test_what_runs_is_what_fits(made, kept, shape, dtype):
    runner = runners(made, kept)
    fits = dtype == "float32" and len(shape) == 4 and shape[0] > 0 and shape[1:] == [16, 12, 12]
    try:
        found = runner.run({"x": np.zeros(shape, dtype)})
    except RefusedTensor:
        assert not fits
    else:
        assert fits
        assert found["logits"].shape == (shape[0], 4)


_open = {}


def runners(made, kept):
    return _open.setdefault(kept, open_piece(*made, *WHOLE, cache=kept))


def test_a_piece_that_is_not_there_is_named(made, kept):
    with pytest.raises(BadBundle, match="no piece from 'output' to 'input'; it has input..middle"):
        open_piece(*made, OUTPUT, INPUT, cache=kept)


@pytest.mark.parametrize("victim", ["pieces/whole.onnx", WEIGHTS])
def test_a_file_that_changed_since_it_was_verified_is_not_used(made, tmp_path, victim):
    folder = tmp_path / "bundle"
    shutil.copytree(made[0], folder)
    raw = bytearray((folder / victim).read_bytes())
    raw[-20] ^= 1
    (folder / victim).write_bytes(raw)
    with pytest.raises(BadBundle, match="has changed since"):
        open_piece(folder, made[1], *WHOLE, cache=tmp_path / "cache")


def lying(tmp_path, **changes):
    """A bundle with right hashes whose only piece is not what its description says."""
    folder = tmp_path / "lying"
    bundle = make(folder)
    piece = bundle.piece(*WHOLE)
    fields = {name: getattr(piece, name) for name in Piece.__struct_fields__} | changes
    return folder, bundles.write(folder, Bundle(1, "", "", bundle.boundaries, (Piece(**fields),), {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"inputs": (Tensor("z", "float32", IMAGE.shape),)},
        {"inputs": (Tensor("x", "uint8", IMAGE.shape),)},
        {"inputs": (Tensor("x", "float32", (-1, 3, 12, 12)),)},
        {"outputs": (EARLY,)},
        {"outputs": (Tensor("logits", "no type", LOGITS.shape),)},
    ],
    ids=["name", "type", "extent", "output", "nonsense"],
)
def test_a_graph_that_is_not_what_is_described_is_refused(tmp_path, changes):
    with pytest.raises(BadBundle, match="not the graph that the bundle describes"):
        open_piece(*lying(tmp_path, **changes), *WHOLE, cache=tmp_path / "cache")


@pytest.mark.parametrize("text", [b"", b"no model", b"\x3a\x02\x0a\x00"])
def test_what_onnxruntime_cannot_load_is_refused(made, tmp_path, text):
    folder = tmp_path / "bundle"
    shutil.copytree(made[0], folder)
    (folder / "pieces/whole.onnx").write_bytes(text)
    bundle = bundles.write(folder, made[1])
    with pytest.raises(FedgeError) as refused:
        open_piece(folder, bundle, *WHOLE, cache=tmp_path / "cache")
    assert isinstance(refused.value, BadBundle)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["other.bin", ".hidden", "pieces/bundle.json", "link"])
def test_what_the_description_does_not_name_is_not_in_the_folder(made, tmp_path, name):
    folder = tmp_path / "bundle"
    shutil.copytree(made[0], folder)
    (folder / "empty").mkdir()
    assert bundles.load(folder) == made[1]
    if name == "link":
        (folder / name).symlink_to(tmp_path)
    else:
        (folder / name).write_bytes(b"weights that nobody hashed")
    with pytest.raises(BadBundle, match=f"'{name}' lies in the bundle's folder but is no part of it; move it"):
        bundles.load(folder)


def with_exit(**changes):
    return lambda bundle: {"exits": (msgspec.structs.replace(bundle.exits[0], **changes),)}


def with_middle(**changes):
    def changed(bundle):
        first, middle, last = bundle.boundaries
        return {"boundaries": (first, msgspec.structs.replace(middle, **changes), last)}

    return changed


def with_pieces(**changes):
    return lambda bundle: {"pieces": tuple(msgspec.structs.replace(piece, **changes) for piece in bundle.pieces)}


LIES = {
    "no tensors": (with_middle(tensors=()), "has no tensors"),
    "unknown tensor": (with_middle(tensors=(Tensor("q", "float32", (-1, 4)),)), "does not join its boundaries"),
    "other shape": (with_middle(tensors=(Tensor("relu", "float32", (-1, 16, 12, 13)),)), "does not join"),
    "unknown logits": (with_exit(logits=Tensor("zzz", "float32", (-1, 4))), "does not join"),
    "no outputs": (with_pieces(outputs=(), exits=()), "does not join"),
    "no inputs": (with_pieces(inputs=()), "does not join"),
    "exit that tails lack": (with_pieces(exits=("early",)), "does not join"),
    "exit passed over": (with_pieces(exits=()), "leaves out an exit"),
    "threshold": (with_exit(threshold=-1.0), "'early' are impossible"),
    "temperature": (with_exit(temperature=0.0), "'early' are impossible"),
    "share": (with_exit(share=1.5), "'early' are impossible"),
    "one name": (lambda bundle: {"exits": bundle.exits * 2}, "same name"),
    "rule": (lambda _: {"rule": "nonsense"}, "rule 'nonsense' is unknown"),
    "negative bytes": (
        lambda _: {"codings": {"middle": {"raw": Sent(0.9, -1.0)}}},
        "a coding of the bundle are imposs",
    ),
    "endless bytes": (
        lambda _: {"codings": {"middle": {"raw": Sent(0.9, 1e308)}}},
        "a coding of the bundle are imposs",
    ),
    "accuracy": (lambda _: {"codings": {"middle": {"raw": Sent(1.1)}}}, "a coding of the bundle are imposs"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_contradicts_itself_is_refused(made, tmp_path, lie):
    changes, said = LIES[lie]
    folder = tmp_path / "bundle"
    shutil.copytree(made[0], folder)
    bundles.write(folder, msgspec.structs.replace(made[1], **changes(made[1])))
    with pytest.raises(BadBundle, match=said):
        bundles.load(folder)


# ---- measurement -------------------------------------------------------------------------------


def test_a_profile_covers_the_bundle(made, kept):
    folder, bundle = made
    profile = profile_bundle(folder, bundle, repeats=2, device="bench", inputs={"x": image()}, cache=kept)
    assert (profile.device, profile.version, profile.threads) == ("bench", bundle.version, 1)
    assert profile.pieces.keys() == {"input..middle", "middle..output", "input..output"}
    assert profile.memory_bytes.keys() == profile.pieces.keys()
    assert min(profile.pieces.values()) > 0
    assert profile.memory_bytes["input..output"] > (folder / WEIGHTS).stat().st_size / 2
    assert profile.codings.keys() == {"middle f16", "middle u8+zlib"}
    assert profile.codings["middle f16"].bytes == 2 * 16 * 12 * 12
    assert 0 < profile.codings["middle u8+zlib"].bytes < 16 * 12 * 12
    assert [tensor for tensor, _ in profile.operators] == [node.output[0] for node in [*HEAD_NODES, *TAIL_NODES]], (
        "the fewest pieces: the whole, which has no exit"
    )
    assert decode(encode(profile)) == profile


def test_operators_are_charged_to_tensors_of_the_model(made, kept):
    found = dict(profile_operators(*made, *HEAD, {"x": image()}, repeats=3, cache=kept))
    assert list(found) == ["conv", "norm", "relu", "pooled", "early"]
    assert found["conv"] == found["norm"] == 0, "they exist only inside the fused kernel"
    assert found["relu"] > 0
    with pytest.raises(RefusedTensor):
        profile_operators(*made, *HEAD, {"x": image()[:, :3]}, cache=kept)


def test_kernels_go_where_they_belong():
    model = [Node("a", ("conv",)), Node("b", ("relu",)), Node("c", ("split", "rest")), Node("d", ("y",))]
    fused = [Node("relu_nchwc", ("token",)), Node("order", ("token2",)), Node("c", ("s", "rest")), Node("d", ("y",))]
    kernels = [("in", 0.125), ("relu_nchwc", 1.0), ("order", 0.5), ("c", 2.0), ("d", 4.0), ("strange", 0.25)]
    assert attribute(model, fused, kernels) == (("conv", 0.0), ("relu", 1.625), ("split", 2.0), ("y", 4.25))


times = st.lists(st.integers(0, 1000).map(lambda micro: micro / 1e6), min_size=1, max_size=30)


@settings(deadline=None)
@given(times, st.data())
def test_the_parts_of_a_prediction_sum_to_the_whole(seconds, data):
    operators = [(f"t{index}", one) for index, one in enumerate(seconds)]
    cut = data.draw(st.integers(0, len(operators) - 1))
    last = operators[-1][0]
    whole = predict(operators, None, last)
    assert whole == pytest.approx(sum(seconds))
    assert predict(operators, None, f"t{cut}") + predict(operators, f"t{cut}", last) == pytest.approx(whole)
    assert predict(operators, f"t{cut}", f"t{cut}") == 0
    if cut < len(operators) - 1:
        with pytest.raises(DataError, match="no operators from"):
            predict(operators, last, f"t{cut}")


def test_operators_that_are_not_there_predict_nothing():
    for ends in ((None, "z"), ("z", "a")):
        with pytest.raises(DataError, match="no operators from"):
            predict([("a", 1.0)], *ends)


def test_nodes_are_read_without_the_onnx_package(made):
    path = made[0] / "pieces/head.onnx"
    wanted = [Node(node.name, tuple(node.output)) for node in onnx.load(path, load_external_data=False).graph.node]
    assert nodes(path.read_bytes()) == wanted
    with pytest.raises(BadBundle, match="no ONNX model"):
        nodes(b"\xff\xff\xff")


def test_the_least_of_all_runs_counts(monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr("fedge.edge.runtime.measure.time.perf_counter", lambda: next(clock))

    class Still:
        def run(self, inputs):
            return inputs

    assert profile_piece(Still(), {}, repeats=3) == 1.0


def test_a_line_that_breaks_off_is_refused(made):
    bundle = made[1]
    assert [(piece.start, piece.end) for piece in line(bundle)] == [WHOLE]
    broken = Bundle(1, "", "", bundle.boundaries, (bundle.piece(*HEAD),), {})
    with pytest.raises(BadBundle, match="goes on from 'middle'"):
        line(broken)


def test_examples_fit_what_they_are_examples_of():
    tensors = (Tensor("a", "uint8", (-1, 2)), Tensor("b", "int64", (3,)), Tensor("c", "float16", ()))
    made = example(tensors)
    assert [(str(made[one.name].dtype), made[one.name].shape) for one in tensors] == [
        *(("uint8", (1, 2)), ("int64", (3,)), ("float16", ()))
    ]


def test_memory_of_a_piece_that_does_not_run_is_an_error(made, tmp_path):
    with pytest.raises(ModelError, match="no piece from"):
        memory.piece_memory(*made, OUTPUT, INPUT, cache=tmp_path)


def test_memory_is_told_apart(tmp_path):
    before = memory.resident()
    held = np.ones(64 << 20, np.uint8)
    (tmp_path / "file").write_bytes(bytes(8 << 20))
    mapped = np.memmap(tmp_path / "file", np.uint8, mode="r")
    total = int(mapped.sum()) + int(held[0])
    found = memory.resident().since(before)
    assert total == 1
    assert found.private == pytest.approx(64 << 20, rel=0.1)
    assert found.mapped == pytest.approx(8 << 20, rel=0.1)
