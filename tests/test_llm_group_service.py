"""A head and its workers over a real server: who is let in, and what becomes of shards, orders and nonsense."""

import contextlib
import secrets
import threading
from contextlib import contextmanager
from dataclasses import replace

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedge.core.errors import AddressError, ExperimentError, StaleIncarnation
from fedge.edge.llm.group import device
from fedge.edge.llm.group import group as groups
from fedge.edge.llm.group.messages import PROTOCOL
from fedge.edge.llm.group.service import SERVICE
from fedge.edge.llm.mesh import security
from fedge.edge.llm.mesh.control import TOKEN
from fedge.edge.llm.mesh.security import Ticket
from fedge.edge.llm.ranks.step import Part, Step
from fedge.protos import llm_pb2 as pb
from tests.llm_fixture import folder
from tests.llm_group_head import KERNEL, LIMITS, PROMPT, Worker, alone, greedy, head, until


@pytest.fixture
def model(tmp_path):
    return folder(tmp_path)


@pytest.fixture
def group(model, tmp_path):
    with head(model, tmp_path / "head") as made:
        yield made


@contextmanager
def calls(address, token=""):
    """The two calls as a stranger would make them, with bytes of any kind."""
    metadata = ((TOKEN, token),)
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        join = channel.stream_stream(f"/{SERVICE}/Join", None, pb.Order.FromString)
        fetch = channel.unary_stream(f"/{SERVICE}/Fetch", pb.FetchRequest.SerializeToString, pb.Chunk.FromString)
        yield (
            lambda reports: join(iter(reports), metadata=metadata, timeout=10),
            lambda request: fetch(request, metadata=metadata, timeout=10),
        )


def hello(name="x", **changes):
    told = pb.Hello(protocol=PROTOCOL, name=name, incarnation=secrets.token_hex(16), disk_bps=1.0, data_address=":7000")
    told.MergeFrom(pb.Hello(**changes))
    return pb.Report(hello=told).SerializeToString()


def test_two_workers_answer_like_one_rank(model, tmp_path, caplog):
    caplog.set_level("INFO", "fedge")
    answer = alone(model, tmp_path / "alone")
    with (
        head(model, tmp_path / "head", wanted=2) as group,
        Worker(group.address, tmp_path / "a", "a") as a,
        Worker(group.address, tmp_path / "b", "b"),
    ):
        assert greedy(group.form(10)) == answer
        assert sorted(group.names) == ["a", "b", "head"]
        assert sorted(one.phase for one in group.devices()) == ["running", "running"]
        until(lambda: all(one.private_bytes > 1 << 20 for one in group.devices()))
        assert any("computing" in one for one in a.states)
        group.close()
        until(lambda: any(one.startswith("waiting for the head") for one in a.states))
        assert any("dismissed: The head has ended" in one for one in a.states)
    told = [record.getMessage() for record in caplog.records]
    assert {"a has joined", "b has joined"} <= set(told)
    until(lambda: "b has left" in [record.getMessage() for record in caplog.records])


@contextmanager
def formed(model, store, workers, **settings):
    """The head's model, with so many workers, which choose their kernels themselves."""
    with contextlib.ExitStack() as opened:
        group = opened.enter_context(head(model, store / "head", wanted=workers, **settings))
        for number in range(workers):
            own = {"name": f"w{number}", "kernel": settings.get("kernel", KERNEL)}
            opened.enter_context(Worker(group.address, store / own["name"], **own))
        yield group.form(30)


def test_sums_of_several_tokens_are_in_8_bits_where_that_is_asked_for_and_those_of_one_are_exact(model, tmp_path):
    steps = Step((Part(0, 0, 1),)), Step((Part(1, 0, len(PROMPT)),))
    found = []
    for name in ("full", "int8"):
        with formed(model, tmp_path / name, 1, collective=name) as made:
            found.append([made.run(step, np.array(PROMPT[: step.tokens])) for step in steps])
    (one, several), (one_again, rounded) = found
    np.testing.assert_array_equal(one, one_again)
    assert 1e-5 < np.abs(rounded - several).max() / np.abs(several).max() < 0.1


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_invariant_group_computes_the_same_bits_alone_and_in_company(model, tmp_path, kind):
    """Four ranks, of which more tokens would otherwise be added up in another order, too."""
    with formed(model, tmp_path, 3, kind=kind, kernel=None, invariant=True) as made:
        alone = made.run(Step((Part(0, 0, len(PROMPT)),)), np.array(PROMPT))
        both = made.run(Step((Part(0, 0, len(PROMPT)), Part(1, 0, 40)), free=(0,)), np.array([*PROMPT, *range(40)]))
        np.testing.assert_array_equal(alone[0], both[0])
        next_alone = made.run(Step((Part(0, len(PROMPT), 1),)), np.array([7]))
        with_other = made.run(Step((Part(0, len(PROMPT), 1), Part(1, 40, 9))), np.array([7, *range(9)]))
        np.testing.assert_array_equal(next_alone[0], with_other[0])


def test_a_group_over_tls_lets_in_who_has_the_ticket(model, tmp_path):
    answer = alone(model, tmp_path / "alone")
    path = security.make_ticket(tmp_path / "ticket")
    ticket, key = security.read_ticket(path), security.read_key(tmp_path / "ticket")
    with (
        head(model, tmp_path / "head", wanted=1, ticket=ticket, key=key) as group,
        Worker(group.address, tmp_path / "a", ticket=ticket),
    ):
        stranger = Worker(group.address, tmp_path / "b", "b", ticket=Ticket(ticket.certificate, "another token here"))
        stranger.wait()
        assert isinstance(stranger.error, ExperimentError)
        assert "copy ticket.json" in str(stranger.error)
        other = security.identity()[0]
        with Worker(group.address, tmp_path / "c", "c", ticket=Ticket(other, ticket.token)) as wrong:
            assert greedy(group.form(10)) == answer
            assert [one.name for one in group.devices()] == ["a"]
            until(lambda: any("waiting for the head (" in one for one in wrong.states))
        assert wrong.error is None
        assert not any("waiting for work" in one for one in wrong.states)


def test_a_word_keeps_strangers_on_the_same_machine_out(model, tmp_path):
    with (
        head(model, tmp_path / "head", ticket=Ticket("", "the word of the test")) as group,
        calls(group.address, "another") as (join, fetch),
    ):
        for call in (join([hello()]), fetch(pb.FetchRequest(digest="0" * 64))):
            with pytest.raises(grpc.RpcError) as refused:
                next(call)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        with Worker(group.address, tmp_path / "a", ticket=Ticket("", "the word of the test")):
            until(group.devices)


def test_what_can_never_work_is_refused_at_once(model, tmp_path, group):
    with pytest.raises(AddressError, match="give a ticket"), head(model, tmp_path / "b", listen="0.0.0.0:0"):
        pass
    with pytest.raises(AddressError, match="Cannot listen"), head(model, tmp_path / "c", listen=group.address):
        pass
    with pytest.raises(ExperimentError, match="cannot be"), head(model, tmp_path / "d", slots=1000):
        pass
    with (
        pytest.raises(ExperimentError, match="no collective 'gossip'"),
        head(model, tmp_path / "d", collective="gossip"),
    ):
        pass
    with (
        pytest.raises(ExperimentError, match="leave out"),
        head(model, tmp_path / "d", collective="int8", invariant=True),
    ):
        pass
    with pytest.raises(ExperimentError, match="another machine"):
        device.run("10.255.255.1:7000", name="a", memory_bytes=1, store=tmp_path / "e", limits=LIMITS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExperimentError, match="cannot be used"), head(model, tmp_path / "file"):
        pass


def test_too_few_devices_are_said_in_time(model, tmp_path):
    with (
        head(model, tmp_path / "head", wanted=2) as group,
        Worker(group.address, tmp_path / "a"),
    ):
        until(group.devices)
        with pytest.raises(AddressError, match="1 of 2 devices have come within 1 s"):
            group.form(1)


def test_another_protocol_ends_a_worker_with_a_sentence(group, tmp_path, monkeypatch):
    monkeypatch.setattr("fedge.edge.llm.group.messages.PROTOCOL", PROTOCOL + 1)
    with calls(group.address) as (join, _):
        (order,) = join([hello()])
    assert order.dismiss.reason == "PROTOCOL"
    assert "install the same version" in order.dismiss.detail


def test_a_head_of_another_protocol_ends_a_worker_too(group, tmp_path):
    with Worker(group.address, tmp_path / "a") as worker:
        until(group.devices)
        group._roster._seats["a"].put(pb.Order(welcome=pb.Welcome(protocol=PROTOCOL + 1)))
        worker.wait()
    assert "another protocol" in str(worker.error)


def test_a_worker_that_is_refused_for_good_ends(group, tmp_path):
    worker = Worker(group.address, tmp_path / "a", "head")
    worker.wait()
    assert isinstance(worker.error, ExperimentError)


def test_another_of_the_same_name_replaces_the_first(group, tmp_path):
    first = Worker(group.address, tmp_path / "a")
    until(group.devices)
    old = group.devices()[0].hello.incarnation
    with Worker(group.address, tmp_path / "b"):
        first.wait()
        assert isinstance(first.error, StaleIncarnation)
        until(lambda: group.devices() and group.devices()[0].hello.incarnation != old)


def test_more_devices_than_the_limit_wait_outside(model, tmp_path):
    with (
        head(model, tmp_path / "head", limits=replace(LIMITS, max_ranks=2)) as group,
        Worker(group.address, tmp_path / "a", "a") as first,
    ):
        until(group.devices)
        with Worker(group.address, tmp_path / "b", "b") as second:
            until(lambda: any("The group has its 2 devices" in one for one in second.states))
            first.end()
            until(lambda: [one.name for one in group.devices()] == ["b"])


def test_a_shard_is_sent_from_any_offset_and_nothing_else_is(model, tmp_path):
    with head(model, tmp_path / "head") as group:
        group.form(5)
        (path,) = (tmp_path / "head").glob("cut-*/*.safetensors")
        digest = security.json.loads((path.parent / "cut.json").read_text())[0]["digest"]
        with calls(group.address) as (_, fetch):
            for offset in (0, 5000, path.stat().st_size, 1 << 60):
                got = b"".join(chunk.data for chunk in fetch(pb.FetchRequest(digest=digest, offset=offset)))
                assert got == path.read_bytes()[offset:]
            for wrong in ("", "0" * 64, "../cut.json", str(path)):
                with pytest.raises(grpc.RpcError) as refused:
                    next(fetch(pb.FetchRequest(digest=wrong)))
                assert refused.value.code() == grpc.StatusCode.NOT_FOUND


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.builds(
                lambda epoch, rank, detail: pb.Report(
                    broken=pb.Broken(epoch=epoch, rank=rank, detail=detail)
                ).SerializeToString(),
                st.integers(0, 2**64 - 1),
                st.integers(-(2**31), 2**31 - 1),
                st.text(max_size=20),
            ),
            st.builds(lambda epoch: pb.Report(ready=pb.Ready(epoch=epoch)).SerializeToString(), st.integers(0, 2)),
            st.builds(lambda: hello("y")),
        ),
        max_size=5,
    ),
    st.booleans(),
)
def test_nonsense_ends_the_stream_that_it_came_from_and_nothing_else(group, reports, polite):
    told = [*([hello()] if polite else []), *reports]
    assume(told)  # who says nothing at all gets no order
    with calls(group.address) as (join, _):
        orders = list(join(told))
    assert {one.WhichOneof("what") for one in orders} <= {"welcome", "dismiss"}
    assert until(lambda: group.devices() == ())


def test_who_says_nothing_and_who_says_too_much_is_cut_off(model, tmp_path):
    with (
        head(model, tmp_path / "head", limits=replace(LIMITS, connect_timeout_s=1.5)) as group,
        calls(group.address) as (join, _),
    ):
        quiet = threading.Event()

        def nothing():
            quiet.wait(30)
            return
            yield

        with pytest.raises(grpc.RpcError) as refused:
            next(join(nothing()))
        assert refused.value.code() == grpc.StatusCode.CANCELLED
        quiet.set()
        with pytest.raises(grpc.RpcError) as refused:
            list(join([hello(certificate="x" * LIMITS.max_report_bytes)]))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert group.devices() == ()


@pytest.mark.parametrize("certificate", ["n\u00f6", "no certificate"])
def test_a_certificate_that_is_none_is_told_so(group, certificate):
    with calls(group.address) as (join, _):
        (order,) = join([hello(certificate=certificate)])
    assert "its certificate is none" in order.dismiss.detail


def test_a_worker_survives_orders_that_make_no_sense(model, tmp_path, group, monkeypatch):
    answer = alone(model, tmp_path / "alone")
    with Worker(group.address, tmp_path / "a") as worker:
        until(group.devices)
        roster = group._roster
        for order in (
            pb.Order(),
            pb.Order(start=pb.Start(epoch=7)),
            pb.Order(load=pb.Load(epoch=9, rank=3)),
            pb.Order(welcome=pb.Welcome(protocol=PROTOCOL)),
        ):
            roster._seats["a"].put(order)
        assert greedy(group.form(10)) == answer
        assert group.names == ("head", "a")
        assert worker.error is None


def test_a_load_ends_what_was_loaded_before(model, tmp_path):
    answer = alone(model, tmp_path / "alone")
    load = pb.Load(epoch=99, rank=1, digest="0" * 64, bytes=10, key=b"0" * 32, slots=1, context=9)
    load.peers.extend([pb.Peer(address=":7000")] * 2)
    with head(model, tmp_path / "head", wanted=1) as group, Worker(group.address, tmp_path / "a"):
        formed = group.form(10)
        group._roster._seats["a"].put(pb.Order(load=load))
        until(lambda: group.devices()[0].phase == "free")
        with pytest.raises(groups.RankLost):
            greedy(formed)
        assert greedy(group.recover()) == answer
        assert group.names == ("head", "a")


def test_a_worker_without_room_on_its_disk_is_left_out_for_a_while(model, tmp_path):
    answer = alone(model, tmp_path / "alone")
    small = replace(LIMITS, max_store_bytes=1000)
    with (
        head(model, tmp_path / "head", wanted=2) as group,
        Worker(group.address, tmp_path / "a", "a", limits=small),
        Worker(group.address, tmp_path / "b", "b"),
    ):
        assert greedy(group.form(10)) == answer
        assert group.names == ("head", "b")
        resting = {one.name: one.detail for one in group.devices()}
        assert "allow more" in resting["a"]
        assert not group.better()


def test_a_shard_that_is_another_than_promised_is_no_end(model, tmp_path, monkeypatch):
    """The head's file changes after its digest was taken; the worker refuses it, and the head goes on alone."""
    answer = alone(model, tmp_path / "alone")
    make = groups.Cuts.make

    def spoil(self, shares, watch):
        cuts = make(self, shares, watch)
        if len(cuts) > 1:
            cuts[1].path.write_bytes(cuts[1].path.read_bytes()[:-1] + b"!")
        return cuts

    monkeypatch.setattr(groups.Cuts, "make", spoil)
    with head(model, tmp_path / "head", wanted=1) as group, Worker(group.address, tmp_path / "a"):
        assert greedy(group.form(10)) == answer
        assert group.names == ("head",)
        assert "could not be fetched" in group.devices()[0].detail


def test_a_shard_of_another_rank_is_refused_and_fetched_again_once(model, tmp_path, monkeypatch):
    fetched = []
    make = groups.Cuts.make
    monkeypatch.setattr(groups.Cuts, "make", lambda self, shares, _: list(reversed(make(self, shares))))
    monkeypatch.setattr(groups.Cuts, "find", lambda self, digest: fetched.append(digest) or self._known.get(digest))
    # Alone there is one order only, so the head's own shard is right again.
    with head(model, tmp_path / "head", wanted=1) as group, Worker(group.address, tmp_path / "a"):
        group.form(10)
        assert group.names == ("head",)
        assert "The shard is of rank 0 of 2" in group.devices()[0].detail
    assert len(fetched) == 2


def test_a_shard_that_lies_there_already_is_not_fetched_again(model, tmp_path, monkeypatch):
    fetched = []
    find = groups.Cuts.find
    monkeypatch.setattr(groups.Cuts, "find", lambda self, digest: fetched.append(digest) or find(self, digest))
    for _ in range(2):
        with head(model, tmp_path / "head", wanted=1) as group, Worker(group.address, tmp_path / "a"):
            group.form(10)
    assert len(fetched) == 1


def test_a_download_that_is_cut_goes_on_where_it_stood(model, tmp_path, monkeypatch):
    answer, offsets = alone(model, tmp_path / "alone"), []
    fetch = groups.Ranks.fetch

    def cut(self, requests, context):
        request = next(requests)
        offsets.append(request.offset)
        for number, chunk in enumerate(fetch(self, iter([request]), context)):
            if number == 2 and len(offsets) < 3:
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            yield chunk

    monkeypatch.setattr(groups.Ranks, "fetch", cut)
    with head(model, tmp_path / "head", wanted=1) as group, Worker(group.address, tmp_path / "a"):
        assert greedy(group.form(10)) == answer
        assert group.names == ("head", "a")
    step = 2 * LIMITS.fetch_chunk_bytes
    assert offsets == [0, step, 2 * step]
