"""The device's runtime: right answers out of mapped files, a cache that heals, and refusals."""

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from fedge.core.errors import BadBundle, DataError, FedgeError, ModelError, RefusedTensor
from fedge.edge import bundle as bundles
from fedge.edge.bundle import INPUT, OUTPUT, WEIGHTS, Boundary, Bundle, Piece, Sent, Tensor
from fedge.edge.runtime import cache as caches
from fedge.edge.runtime import memory
from fedge.edge.runtime.operators import profile_operators
from fedge.edge.runtime.sessions import open_piece
from tests.edge_pieces import (
    EARLY,
    HEAD,
    IMAGE,
    LOGITS,
    TAIL,
    WHOLE,
    graph,
    image,
    make,
    reference,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "demo"
    return folder, make(folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


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
