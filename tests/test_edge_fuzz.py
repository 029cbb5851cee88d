"""Ten thousand broken requests against the real service, many in flight: no crash, and a documented reason for each."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.core.errors import FedgeError
from fedge.core.limits import EdgeLimits
from fedge.edge.bundle import Bundle, load
from fedge.edge.cloud import wire
from fedge.edge.coding.codings import Coded, decode, encode
from fedge.protos import edge_pb2 as pb
from tests import edge_fixture as tiny
from tests.test_edge_cloud import Stream

MESSAGES, STREAMS = 10_000, 4
DOCUMENTED = {"", "BAD_TENSOR", "OTHER_BUNDLE", "OVERLOADED", "TOO_LATE"}
NUMBERS = (0, 1, 2, 15, 16, 17, 64, 255, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-40, 3.4e38, -3.4e38, float("nan"), float("inf"), float("-inf"))
WORDS = ("", "x", "a", "b", "input", "output", "raw", "f16", "u8", "u8c@99.9", "f16+zlib", "raw+zstd", "png", "jpeg90")
MORE_WORDS = (*WORDS, "float32", "float16", "object", "int8", "bool", "\0", "é" * 300, "jpeg999", "u8@1e9", "../x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("edge") / "bundle"
    tiny.make(place)
    return place


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load(folder)


def valid(bundle: Bundle, rng: random.Random) -> pb.TailRequest:
    boundary = rng.choice(["input", "a", "b"])
    (tensor,) = bundle.boundary(boundary).tensors
    values = np.random.default_rng(rng.getrandbits(32)).standard_normal((rng.choice([1, 1, 2, 16]), tensor.shape[1]))
    coding = rng.choice(["raw", "f16", "u8", "u8c", "u8@99.9", "raw+zlib", "f16+zstd"])
    one = encode(tensor.name, values.astype(np.float32), coding)
    data = wire.request_to(rng.randrange(1, 1 << 32), bundle.version, boundary, [one], 10.0)
    return pb.TailRequest.FromString(data)


def mutate(message: pb.TailRequest, rng: random.Random) -> bytes:
    """One of the ways in which a request can be wrong; some are not wrong after all."""
    one = message.tensors[0]
    ways: list[Any] = [
        lambda: setattr(message, "boundary", rng.choice(MORE_WORDS)),
        lambda: setattr(message, "version", rng.choice(MORE_WORDS)),
        lambda: setattr(message, "deadline_s", rng.choice((*FLOATS, 1e-6))),
        lambda: setattr(one, "name", rng.choice(MORE_WORDS)),
        lambda: setattr(one, "dtype", rng.choice(MORE_WORDS)),
        lambda: setattr(one, "coding", rng.choice(MORE_WORDS)),
        lambda: one.shape.__setitem__(rng.randrange(2), rng.choice(NUMBERS)),
        lambda: one.shape.append(rng.choice(NUMBERS)),
        lambda: one.shape.pop(),
        lambda: one.low.append(rng.choice(FLOATS)),
        lambda: one.ClearField("high"),
        lambda: one.high.extend([rng.choice(FLOATS)] * rng.randrange(40)),
        lambda: setattr(one, "data", one.data[: rng.randrange(len(one.data) + 1)]),
        lambda: setattr(one, "data", one.data + rng.randbytes(rng.randrange(100))),
        lambda: setattr(one, "data", rng.randbytes(len(one.data))),
        lambda: message.tensors.append(one),
        lambda: message.ClearField("tensors"),
    ]
    for way in rng.sample(ways, rng.choice([1, 1, 1, 2, 3])):
        if len(message.tensors) and len(one.shape) > 1:
            way()
    data = bytearray(message.SerializeToString())
    for _ in range(rng.choice([0, 0, 0, 1, 5])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.05 else data)


@pytest.mark.slow
def test_ten_thousand_broken_requests_each_get_a_documented_reason(folder: Path, bundle: Bundle) -> None:
    rng = random.Random(20261121)
    reasons: dict[str, int] = {}
    with tiny.serving(folder) as address:
        streams = [Stream(address) for _ in range(STREAMS)]
        for _ in range(MESSAGES // (STREAMS * 20)):
            for stream in streams:
                for _ in range(20):
                    stream.send(mutate(valid(bundle, rng), rng))
            for stream in streams:
                for _ in range(20):
                    reply = stream.receive()
                    reasons[reply.reason] = reasons.get(reply.reason, 0) + 1
                    assert bool(reply.reason) == bool(reply.detail) == (not reply.outputs)
        for stream in streams:
            good = wire.request_to(1, bundle.version, "input", [encode("x", tiny.sample(), "raw")], 10.0)
            (output,) = wire.reply_from(stream.ask(good), EdgeLimits()).outputs
            found = decode(output, bundle.boundary("output").tensors[0])
            np.testing.assert_allclose(found, tiny.whole(tiny.sample()), rtol=1e-4, atol=1e-4)
            assert stream.end() == []
            stream.__exit__()
    assert sum(reasons.values()) == MESSAGES
    assert reasons.keys() <= DOCUMENTED
    assert reasons["BAD_TENSOR"] > MESSAGES / 4
    assert min(reasons[""], reasons["OTHER_BUNDLE"]) > MESSAGES / 100


def reason_of(work: Callable[[], Any]) -> str:
    """The reason with which it is refused, or none; every other error comes through."""
    try:
        work()
    except FedgeError as error:
        return error.reason
    return ""


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_a_refusal(bundle: Bundle, data: bytes) -> None:
    def take() -> None:
        message = wire.parse(data)
        message.version = bundle.version
        wire.check_request(message, bundle, EdgeLimits())

    assert reason_of(take) == "BAD_TENSOR"


@settings(max_examples=300)
@given(
    st.lists(st.integers(0, (1 << 64) - 1), max_size=10),
    st.sampled_from(MORE_WORDS),
    st.sampled_from(MORE_WORDS),
    st.sampled_from(MORE_WORDS),
    st.binary(max_size=64),
)
def test_any_tensor_is_taken_as_it_is_or_refused(
    shape: list[int], name: str, dtype: str, coding: str, data: bytes
) -> None:
    tensor = pb.Coded(name=name, dtype=dtype, shape=shape, coding=coding, data=data)
    limits = EdgeLimits()
    fits = len(shape) <= limits.max_rank and max(shape, default=0) <= limits.max_tensor_bytes
    short = max(len(name), len(dtype), len(coding)) <= wire.MAX_TEXT
    assert reason_of(lambda: wire.from_pb(tensor, limits)) == ("" if fits and short else "BAD_TENSOR")
    if fits and short:
        assert wire.from_pb(tensor, limits) == Coded(name, dtype, tuple(shape), coding, (), (), data)
