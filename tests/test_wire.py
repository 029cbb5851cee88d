"""The wire: what parses, and that nothing else does."""

from io import BytesIO

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedge.core.errors import (
    BadReport,
    FedgeError,
    ModelError,
    OurFault,
    RefusedClient,
    StrategyError,
    TheirFault,
    UnknownTask,
    WrongHash,
    WrongManifest,
    WrongOffset,
    WrongSize,
    leaves,
)
from fedge.core.limits import Limits
from fedge.core.task import Broadcast, Task, Update
from fedge.protos import fedge_pb2 as pb
from fedge.protos import wire

SMALL = Limits(max_update_bytes=1 << 12, max_blobs=4, max_metadata_items=4, max_name_bytes=16)
SENDER = pb.Sender(client="site-1", incarnation="ab12")

dtypes = st.sampled_from([np.dtype(name) for name in wire.DTYPES])
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)
arrays = dtypes.flatmap(lambda dtype: hnp.arrays(dtype, shapes))
letters = "az_/.é\u202e\n\x00\U0001f600 "
blob_maps = st.dictionaries(st.text("abc/._-", min_size=1, max_size=8), arrays, max_size=4)


def same(left, right):
    assert list(left) == list(right)
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        assert array.shape == right[name].shape
        assert array.tobytes() == right[name].tobytes()  # NaN and -0 included


def received(manifest, buffers, chunk_bytes, cuts=()):
    """Send in chunks and begin again at each cut, as after a lost connection."""
    sink = BytesIO()
    receiver = wire.Receiver(manifest, sink)
    for cut in (*cuts, None):
        for chunk in wire.chunks(buffers, receiver.offset, chunk_bytes):
            if cut is not None and receiver.offset >= cut:
                break
            receiver.take(chunk)
    receiver.finish()
    return sink.getvalue()


# ---- laws --------------------------------------------------------------------------------------


@given(blob_maps, st.integers(1, 64), st.lists(st.integers(0, 300), max_size=3))
def test_what_is_sent_arrives_to_the_bit_however_cut(blobs, chunk_bytes, cuts):
    manifest, buffers = wire.encode_blobs(blobs)
    wire.check_manifest(manifest, Limits())
    same(blobs, wire.decode_blobs(manifest, received(manifest, buffers, chunk_bytes, sorted(cuts))))


@given(blob_maps, st.integers(0, 400), st.integers(1, 64))
def test_chunks_from_any_offset_are_the_rest(blobs, offset, chunk_bytes):
    _, buffers = wire.encode_blobs(blobs)
    whole = b"".join(buffers)
    sent = list(wire.chunks(buffers, offset, chunk_bytes))
    assert b"".join(chunk.data for chunk in sent) == whole[offset:]
    assert all(1 <= len(chunk.data) <= chunk_bytes for chunk in sent)
    assert all(whole[chunk.offset :].startswith(chunk.data) for chunk in sent)


@given(blob_maps, st.integers(0, 400))
def test_a_receiver_goes_on_with_what_was_spooled(blobs, kept):
    manifest, buffers = wire.encode_blobs(blobs)
    have = b"".join(buffers)[:kept]
    sink = BytesIO(have)
    sink.seek(0, 2)
    receiver = wire.Receiver(manifest, sink, [have[:3], have[3:]])
    for chunk in wire.chunks(buffers, receiver.offset, 7):
        receiver.take(chunk)
    receiver.finish()
    same(blobs, wire.decode_blobs(manifest, sink.getvalue()))


scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(letters, max_size=5)
names = st.text("abcxyz_/é", min_size=1, max_size=8)


@given(names, st.integers(0, 2**62), st.integers(0, 10_000_000), st.dictionaries(names, scalars, max_size=4))
def test_a_task_comes_back_as_it_was(task_id, version, steps, hyper):
    task = Task(task_id, "site-1", version, steps, "train", hyper)
    message = pb.Task.FromString(wire.task_to_pb(task).SerializeToString())
    back = wire.task_from_pb(message, "site-1", SMALL)
    assert back == task
    assert {key: type(value) for key, value in back.hyper.items()} == {key: type(value) for key, value in hyper.items()}


@given(blob_maps, st.dictionaries(names, st.floats(), max_size=4), st.integers(-5, 2**62))
def test_an_update_comes_back_as_it_was(blobs, metrics, examples):
    update = Update("site-1", "t1", 3, 4, examples, blobs, {"compute_s": float("nan")}, metrics)
    manifest, buffers = wire.encode_blobs(update.blobs)
    begin = pb.UploadBegin.FromString(wire.begin_of(update, SENDER, manifest).SerializeToString())
    wire.check_begin(begin, Limits())
    back = wire.update_from(begin, wire.decode_blobs(begin.manifest, b"".join(buffers)))
    same(update.blobs, back.blobs)
    assert (back.client, back.task_id, back.base_version, back.steps, back.examples) == ("site-1", "t1", 3, 4, examples)
    np.testing.assert_equal(dict(back.metrics), metrics)
    np.testing.assert_equal(back.timings["compute_s"], np.nan)


def test_a_broadcast_comes_back_read_only():
    sent = Broadcast(7, np.arange(5, dtype=np.float32), {"control": np.ones(3)})
    encoded = wire.encode_broadcast(sent)
    back = wire.broadcast_from(7, encoded.manifest, bytearray(b"".join(encoded.buffers)))
    assert back.version == encoded.version == 7
    same({"v": sent.vector, **sent.blobs}, {"v": back.vector, **back.blobs})
    assert not back.vector.flags.writeable


def test_no_copies_are_made_of_plain_vectors():
    vector = np.ones(1000, np.float32)
    manifest, buffers = wire.encode_blobs({"delta": vector})
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), vector)
    raw = bytes(buffers[0])
    assert np.shares_memory(wire.decode_blobs(manifest, raw)["delta"], np.frombuffer(raw, np.uint8))


def test_arrays_of_other_order_and_alignment_arrive():
    blobs = {
        "flag": np.array([True, False, True]),
        "crooked": np.arange(6.0).reshape(2, 3).T[::-1],
        "big": np.arange(3, dtype=">i4").astype(">i4"),
    }
    manifest, buffers = wire.encode_blobs(blobs)
    back = wire.decode_blobs(manifest, b"".join(buffers))
    for name, array in blobs.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].flags.aligned
        assert back[name].dtype.isnative


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("leaf", leaves(), ids=lambda leaf: leaf.__name__)
def test_every_refusal_arrives_as_the_same_leaf(leaf):
    status, detail, metadata = wire.refusal_of(leaf("No."))
    back = wire.error_from(dict(metadata)[wire.REASON_KEY], status, detail)
    assert back.reason == leaf.reason
    assert str(back) == "No."
    assert type(back) is leaf or leaf.reason == FedgeError.reason


def test_an_unknown_reason_is_our_fault_and_says_what_came():
    error = wire.error_from("FROM_THE_FUTURE", "ABORTED", "so sorry")
    assert isinstance(error, OurFault)
    assert "ABORTED FROM_THE_FUTURE: so sorry" in str(error)


def test_a_refusal_is_short():
    assert len(wire.refusal_of(WrongSize("x" * 10_000))[1]) == 500


def manifest_of(*blobs, size=None, sha256=bytes(32)):
    manifest = pb.Manifest(blobs=[pb.Blob(name=n, dtype=d, shape=s) for n, d, s in blobs], sha256=sha256)
    manifest.size_bytes = 0 if size is None else size
    return manifest


HOSTILE = {
    "no hash": (manifest_of(sha256=b""), WrongManifest),
    "too many blobs": (manifest_of(*[(str(i), "uint8", [0]) for i in range(5)]), WrongManifest),
    "twice the same name": (manifest_of(("a", "uint8", [1]), ("a", "uint8", [1]), size=2), WrongManifest),
    "no name": (manifest_of(("", "uint8", [1]), size=1), WrongManifest),
    "a long name": (manifest_of(("a" * 17, "uint8", [1]), size=1), WrongManifest),
    "a name with a newline": (manifest_of(("a\nb", "uint8", [1]), size=1), WrongManifest),
    "objects": (manifest_of(("a", "object", [1]), size=8), WrongManifest),
    "a structured type": (manifest_of(("a", "f4,f4", [1]), size=8), WrongManifest),
    "an alias of a type": (manifest_of(("a", "<f4", [1]), size=4), WrongManifest),
    "many dimensions": (manifest_of(("a", "uint8", [1] * 33), size=1), WrongManifest),
    "more than allowed": (manifest_of(("a", "uint8", [4097]), size=4097), WrongSize),
    "a huge product": (manifest_of(("a", "float64", [2**63, 2**63, 2**63]), size=8), WrongSize),
    "hugeness behind a zero": (manifest_of(("a", "float64", [0, 2**60]), size=0), WrongSize),
    "a product that wraps to 8": (manifest_of(("a", "uint8", [2**32, 2**32 + 1]), size=8), WrongSize),
    "a declared size too small": (manifest_of(("a", "float32", [4]), size=15), WrongSize),
    "a declared size too large": (manifest_of(("a", "float32", [4]), size=17), WrongSize),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifests_are_refused(case):
    manifest, leaf = HOSTILE[case]
    with pytest.raises(leaf):
        wire.check_manifest(manifest, SMALL)


def fields(**changes):
    update = Update("site-1", "t1", 3, 4, 5, {"delta": np.ones(3, np.float32)}, {"compute_s": 1.0}, {"loss": 2.0})
    begin = wire.begin_of(update, SENDER, wire.encode_blobs(update.blobs)[0])
    begin.MergeFrom(pb.UploadBegin(**changes))
    return begin


BEGINS = {
    "no task": (pb.UploadBegin(sender=SENDER, manifest=fields().manifest), UnknownTask),
    "a task with a path": (fields(task_id="../\x00etc"), UnknownTask),
    "no sender": (pb.UploadBegin(task_id="t1", manifest=fields().manifest), RefusedClient),
    "a client of many bytes": (fields(sender=pb.Sender(client="é" * 9)), RefusedClient),
    "many metrics": (fields(metrics={str(i): 0.0 for i in range(5)}), BadReport),
    "a long metric name": (fields(metrics={"m" * 17: 0.0}), BadReport),
    "a nameless timing": (fields(timings={"": 0.0}), BadReport),
    "endless steps": (fields(steps=2**64 - 1), BadReport),
    "an endless version": (fields(base_version=2**63), BadReport),
    "nothing": (pb.UploadBegin(), RefusedClient),
}


@pytest.mark.parametrize("case", BEGINS)
def test_hostile_heads_are_refused(case):
    begin, leaf = BEGINS[case]
    wire.check_begin(fields(), SMALL)
    with pytest.raises(leaf):
        wire.check_begin(begin, SMALL)


def test_hostile_chunks_are_refused():
    manifest, buffers = wire.encode_blobs({"delta": np.arange(4, dtype=np.float32)})
    raw = b"".join(buffers)

    def take(*chunks):
        sink = BytesIO()
        receiver = wire.Receiver(manifest, sink)
        for offset, data in chunks:
            receiver.take(pb.Chunk(offset=offset, data=data))
        receiver.finish()

    take((0, raw[:5]), (5, raw[5:]))
    for chunks, leaf in [
        ([(1, raw)], WrongOffset),
        ([(0, raw[:5]), (4, raw[4:])], WrongOffset),
        ([(0, raw[:5]), (6, raw[6:])], WrongOffset),
        ([(0, raw[:5]), (0, raw[:5])], WrongOffset),
        ([(2**64 - 1, raw)], WrongOffset),
        ([(0, raw + b"!")], WrongSize),
        ([(0, raw), (16, b"!")], WrongSize),
        ([(0, b"")], WrongSize),
        ([(0, raw[:15])], WrongSize),
        ([], WrongSize),
        ([(0, raw[:15] + b"\xff")], WrongHash),
    ]:
        with pytest.raises(leaf):
            take(*chunks)


def test_a_wrong_offset_leaves_the_receiver_as_it_was():
    manifest, buffers = wire.encode_blobs({"delta": np.arange(4, dtype=np.float32)})
    sink = BytesIO()
    receiver = wire.Receiver(manifest, sink)
    with pytest.raises(WrongOffset, match="go on at 0"):
        receiver.take(pb.Chunk(offset=3, data=b"xyz"))
    for chunk in wire.chunks(buffers, receiver.offset, 100):
        receiver.take(chunk)
    receiver.finish()


def test_bytes_that_are_no_bool_are_refused():
    manifest, _ = wire.encode_blobs({"mask": np.array([True, False])})
    with pytest.raises(WrongManifest, match="neither 0 nor 1"):
        wire.decode_blobs(manifest, b"\x01\x02")


def test_a_buffer_of_another_length_is_refused():
    manifest, buffers = wire.encode_blobs({"delta": np.ones(4, np.float32)})
    for raw in (b"", bytes(buffers[0])[:-1], bytes(buffers[0]) + b"!"):
        with pytest.raises(WrongSize):
            wire.decode_blobs(manifest, raw)


@pytest.mark.parametrize(
    "blobs", [{}, {"model": np.ones(3)}, {"model": np.ones((3, 1), np.float32)}, {"weights": np.ones(3, np.float32)}]
)
def test_a_broadcast_without_a_model_is_refused(blobs):
    manifest, buffers = wire.encode_blobs(blobs)
    with pytest.raises(WrongManifest):
        wire.broadcast_from(1, manifest, b"".join(buffers))


def test_what_does_not_travel_is_refused_before_it_is_sent():
    with pytest.raises(WrongManifest, match="complex"):
        wire.encode_blobs({"delta": np.ones(3, np.complex64)})
    with pytest.raises(WrongManifest):
        wire.encode_blobs({"delta": np.array(["a"], object)})
    with pytest.raises(StrategyError):
        wire.encode_broadcast(Broadcast(0, np.ones(3, np.float32), {wire.MODEL: np.ones(3)}))
    with pytest.raises(StrategyError, match="'k'"):
        wire.task_to_pb(Task("t", "c", 0, 1, hyper={"k": 2**63}))
    with pytest.raises(BadReport):
        wire.begin_of(Update("c", "t", 0, -1, 1, {}), SENDER, pb.Manifest())


def join(**changes):
    request = pb.JoinRequest(sender=SENDER, protocol=wire.PROTOCOL, layout_hash="ab", examples=3)
    request.MergeFrom(pb.JoinRequest(**changes))
    return request


@pytest.mark.parametrize(
    ("request_", "leaf"),
    [
        (join(protocol=wire.PROTOCOL + 1), RefusedClient),
        (join(sender=pb.Sender(client="a\u202eb")), RefusedClient),
        (join(examples=-1), RefusedClient),
        (join(examples=10**12), RefusedClient),
        (join(layout_hash="x" * 17), ModelError),
        (pb.JoinRequest(), RefusedClient),
    ],
)
def test_hostile_joins_are_refused(request_, leaf):
    wire.check_join(join(), SMALL)
    with pytest.raises(leaf):
        wire.check_join(request_, SMALL)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "\x1b[2J"},
        {"chunk_bytes": 2**40},
        {"stream_timeout_s": float("nan")},
        {"stream_timeout_s": -1.0},
        {"layout_hash": "x" * 17},
    ],
)
def test_hostile_terms_are_refused(changes):
    terms = pb.JoinReply(run_id="r", layout_hash="ab", chunk_bytes=1000, stream_timeout_s=10.0)
    wire.check_join_reply(terms, SMALL)
    terms.MergeFrom(pb.JoinReply(**changes))
    with pytest.raises(RefusedClient):
        wire.check_join_reply(terms, SMALL)
    with pytest.raises(RefusedClient):
        wire.check_join_reply(pb.JoinReply(), SMALL)


@given(st.text(letters))
def test_a_clipped_text_is_fit_for_the_record(text):
    clipped = wire.clip(text, SMALL)
    assert len(clipped.encode()) <= SMALL.max_name_bytes
    assert clipped.isprintable()


# ---- fuzzing: it parses, or TheirFault is raised -------------------------------------------------

words = st.text(letters, max_size=20) | st.sampled_from(["", "a", "delta", "float32", "bool", "object"])
wholes = st.integers(0, 2**64 - 1) | st.integers(0, 20)
blobs_ = st.builds(
    pb.Blob,
    name=words,
    dtype=st.sampled_from([*wire.DTYPES, "object", "", "f4"]),
    shape=st.lists(st.integers(0, 4) | wholes, max_size=3),
)
manifests = st.builds(
    pb.Manifest,
    blobs=st.lists(blobs_, max_size=6),
    size_bytes=wholes,
    sha256=st.just(bytes(32)) | st.binary(max_size=40),
)


@given(manifests, st.booleans())
@settings(max_examples=300)
def test_any_manifest_parses_or_is_their_fault(manifest, mend):
    if mend:  # so that some get past the sums
        manifest.size_bytes = sum(
            int(np.prod([min(extent, 99) for extent in blob.shape])) * wire.DTYPES[blob.dtype].itemsize
            for blob in manifest.blobs
            if blob.dtype in wire.DTYPES
        )
    try:
        wire.check_manifest(manifest, SMALL)
        blobs = wire.decode_blobs(manifest, bytes(manifest.size_bytes))
    except TheirFault:
        return
    assert sum(array.nbytes for array in blobs.values()) == manifest.size_bytes <= SMALL.max_update_bytes


def seeds():
    update = Update(
        "c", "t1", 3, 4, 5, {"delta": np.ones(3, np.float32), "m": np.array([True])}, {"a": 1.0}, {"b": 2.0}
    )
    begin = wire.begin_of(update, SENDER, wire.encode_blobs(update.blobs)[0])
    task = wire.task_to_pb(Task("t1", "c", 3, 4, "train", {"a": True, "b": 7, "c": 0.5, "d": "x"}))
    terms = pb.JoinReply(run_id="r", layout_hash="ab", chunk_bytes=1000, stream_timeout_s=10.0)
    return [
        (begin, take_begin),
        (task, lambda message: wire.task_from_pb(message, "c", SMALL)),
        (join(), lambda message: wire.check_join(message, SMALL)),
        (terms, lambda message: wire.check_join_reply(message, SMALL)),
    ]


def take_begin(begin):
    wire.check_begin(begin, SMALL)
    wire.update_from(begin, wire.decode_blobs(begin.manifest, bytes(begin.manifest.size_bytes)))


@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), max_size=6),
    st.integers(0, 500),
    st.binary(max_size=8),
)
@settings(max_examples=500)
def test_garbled_messages_parse_or_are_their_fault(which, flips, cut, tail):
    message, take = seeds()[which]
    raw = bytearray(message.SerializeToString()[:cut] if cut % 3 == 0 else message.SerializeToString())
    for at, value in flips:
        if raw:
            raw[at % len(raw)] = value
    try:
        garbled = type(message).FromString(bytes(raw) + tail)
    except DecodeError:
        return  # gRPC answers these before anyone is asked
    try:
        take(garbled)
    except TheirFault as refusal:
        sentence = str(refusal)
        assert 10 < len(sentence) < 1000


@given(st.lists(st.tuples(st.integers(0, 20) | wholes, st.binary(max_size=12)), max_size=8))
def test_any_chunks_are_taken_or_are_their_fault(pairs):
    manifest, _ = wire.encode_blobs({"delta": np.zeros(4, np.float32)})
    sink = BytesIO()
    receiver = wire.Receiver(manifest, sink)
    for offset, data in pairs:
        try:
            receiver.take(pb.Chunk(offset=offset, data=data))
        except TheirFault:
            assert len(sink.getvalue()) == receiver.offset
    assert len(sink.getvalue()) <= manifest.size_bytes
    try:
        receiver.finish()
    except TheirFault:
        assert sink.getvalue() != bytes(16)
    else:
        assert sink.getvalue() == bytes(16)
