"""Who is there: the table of phases, silence, and what a stranger may send."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core.errors import DataError, RefusedClient
from fedge.core.limits import LlmLimits
from fedge.edge.llm.group import membership, messages
from fedge.edge.llm.group.membership import TABLE, Event, Phase
from fedge.edge.llm.group.messages import Hello, Offer
from fedge.edge.llm.group.roster import Roster
from fedge.edge.llm.mesh import security
from fedge.protos import llm_pb2 as pb

LIMITS = LlmLimits(max_ranks=4, silence_s=5.0, rest_s=30.0)


def hello(name="a", incarnation="0" * 32):
    return Hello(Offer(name, {"int8": 1e9}, 1 << 30, 1e9), incarnation, ":7000", "")


def told(**changes):
    fields = {
        "protocol": messages.PROTOCOL,
        "name": "a",
        "incarnation": "0" * 32,
        "weights_per_s": {"int8": 1e9},
        "memory_bytes": 1,
        "disk_bps": 1e9,
        "data_address": ":7000",
    }
    return pb.Hello(**{**fields, **changes})


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_device_goes_through_an_epoch_and_is_used_again():
    members = membership.enter({}, hello(), 0.0, LIMITS)
    for event, phase in (
        (Event.LOAD, Phase.LOADING),
        (Event.READY, Phase.READY),
        (Event.START, Phase.RUNNING),
        (Event.END, Phase.ENDING),
    ):
        members = membership.happen(members, "a", event, 3)
        assert members["a"].phase == phase
        assert membership.usable(members, 0.0) == ()
    members = membership.happen(members, "a", Event.BROKEN, 3)
    assert [one.name for one in membership.usable(members, 0.0)] == ["a"]


@given(st.lists(st.tuples(st.sampled_from(Event), st.integers(1, 3))))
def test_events_follow_the_table_and_those_of_another_epoch_change_nothing(events):
    members = membership.enter({}, hello(), 0.0, LIMITS)
    for event, epoch in events:
        before = members["a"]
        members = membership.happen(members, "a", event, epoch)
        after = members["a"]
        if event != Event.LOAD and epoch != before.epoch:
            assert after == before
        else:
            assert after.phase == TABLE.get((before.phase, event), before.phase)
        assert membership.happen(members, "b", event, epoch) == members


def test_who_has_not_started_is_free_when_the_epoch_ends_and_who_has_must_say_that_it_noticed():
    for events, phase in (
        ([Event.LOAD], Phase.FREE),
        ([Event.LOAD, Event.READY], Phase.FREE),
        ([Event.LOAD, Event.READY, Event.START], Phase.ENDING),
    ):
        members = membership.enter({}, hello(), 0.0, LIMITS)
        for event in [*events, Event.END]:
            members = membership.happen(members, "a", event, 1)
        assert members["a"].phase == phase


def test_another_incarnation_replaces_the_old_and_more_than_the_limit_are_refused():
    members = membership.enter({}, hello(), 0.0, LIMITS)
    members = membership.happen(members, "a", Event.LOAD, 1)
    members = membership.enter(members, hello(incarnation="1" * 32), 1.0, LIMITS)
    assert members["a"].phase == Phase.FREE
    assert members["a"].hello.incarnation == "1" * 32
    for name in "bc":
        members = membership.enter(members, hello(name), 0.0, LIMITS)
    with pytest.raises(RefusedClient, match="has its 4 devices"):
        membership.enter(members, hello("d"), 0.0, LIMITS)
    assert set(membership.enter(members, hello("c"), 0.0, LIMITS)) == {"a", "b", "c"}


def test_silence_ends_a_device_and_a_beat_puts_it_off():
    clock = Clock()
    roster = Roster(LIMITS, clock)
    seats = [roster.enter(hello(name)) for name in "ab"]
    clock.now = 4.0
    roster.report(seats[0], pb.Report(beat=pb.Beat(private_bytes=10, mapped_bytes=20)))
    clock.now = 6.0
    assert set(roster.members) == {"a"}
    assert (roster.members["a"].private_bytes, roster.members["a"].mapped_bytes) == (10, 20)
    assert seats[1].orders.get_nowait().dismiss.reason == "SILENT"
    assert seats[1].orders.get_nowait() is None


def test_a_device_that_fails_for_a_reason_of_its_own_rests_and_one_that_lost_another_does_not():
    clock = Clock()
    roster = Roster(LIMITS, clock)
    for rank, usable in ((-1, 0), (1, 1)):
        seat = roster.enter(hello())
        roster.order("a", Event.LOAD, 1, pb.Order())
        roster.report(seat, pb.Report(broken=pb.Broken(epoch=1, rank=rank, detail="The disk is full.")))
        assert len(roster.usable()) == usable
    seat = roster.enter(hello())
    roster.rest("a", "why", 30.0)
    clock.now = 4.0
    roster.report(seat, pb.Report(beat=pb.Beat()))
    assert roster.members["a"].detail == "why"
    assert roster.usable() == ()


def test_a_device_that_fails_again_and_again_rests_longer_until_it_was_met():
    clock = Clock()
    roster = Roster(LIMITS, clock)
    roster.enter(hello())
    for seconds in (30.0, 60.0, 120.0, 240.0, 480.0, 600.0, 600.0):
        roster.fail("a", "It could not be met.")
        assert roster.members["a"].rest_until - clock.now == seconds
    assert roster.usable() == ()
    assert [one.name for one in roster.usable(resting=True)] == ["a"]
    roster.met(["a"])
    roster.fail("a", "It could not be met.")
    assert roster.members["a"].rest_until - clock.now == 30.0


def test_reports_of_a_replaced_stream_count_for_nothing():
    roster = Roster(LIMITS, Clock())
    old, new = roster.enter(hello()), roster.enter(hello())
    assert old.orders.get_nowait().dismiss.reason == "REPLACED"
    roster.report(old, pb.Report(beat=pb.Beat(private_bytes=10)))
    roster.leave(old)
    assert roster.members["a"].private_bytes == 0
    roster.leave(new)
    assert roster.members == {}


def test_a_device_that_reads_no_orders_is_sent_away():
    roster = Roster(LIMITS, Clock())
    seat = roster.enter(hello())
    for epoch in range(200):
        roster.order("a", Event.LOAD, epoch, pb.Order())
    orders = [seat.orders.get_nowait() for _ in range(seat.orders.qsize())]
    assert len(orders) <= 65
    assert None in orders


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "x" * 65},
        {"name": "a\nb"},
        {"name": "head"},
        {"incarnation": "0"},
        {"certificate": "x" * (1 << 15)},
        {"certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
        {"weights_per_s": {"int8": math.nan}},
        {"weights_per_s": {str(one): 1.0 for one in range(17)}},
        {"disk_bps": 0.0},
        {"disk_bps": -1.0},
        {"layer_s": -1e-9},
        {"layer_s": math.inf},
        {"data_address": "nowhere"},
        {"data_address": ":0"},
        {"data_address": ":99999"},
        {"data_address": "x" * 300 + ":7000"},
    ],
)
def test_a_hello_that_cannot_be_is_refused(wrong):
    assert messages.hello(told(), "10.0.0.7", LIMITS).address == "10.0.0.7:7000"
    assert messages.hello(told(data_address="10.0.0.9:1"), "10.0.0.7", LIMITS).address == "10.0.0.9:1"
    good = security.identity()[0]
    assert messages.hello(told(certificate=good), "10.0.0.7", LIMITS, secure=True).certificate == good
    with pytest.raises(DataError, match="certificate"):
        messages.hello(told(), "10.0.0.7", LIMITS, secure=True)
    with pytest.raises(DataError):
        messages.hello(told(**wrong), "10.0.0.7", LIMITS)


def load(**changes):
    fields = {
        "epoch": 1,
        "rank": 1,
        "peers": [pb.Peer(address=":7000"), pb.Peer(address="10.0.0.7:7000")],
        "digest": "0" * 64,
        "bytes": 10,
        "key": b"0" * 32,
        "slots": 1,
        "context": 10,
    }
    return pb.Load(**{**fields, **changes})


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": 2},
        {"peers": [pb.Peer(address=":7000")]},
        {"peers": [pb.Peer(address=":7000")] * 65},
        {"peers": [pb.Peer(address=":7000"), pb.Peer(address="x")]},
        {"epoch": 0},
        {"epoch": 1 << 40},
        {"digest": "../secret"},
        {"bytes": 0},
        {"key": b"short"},
        {"slots": 0},
        {"slots": 1000},
        {"context": 0},
        {"context": 1 << 30},
        {"collective": "gossip"},
    ],
)
def test_a_load_that_cannot_be_is_refused(wrong):
    messages.check_load(load(), LIMITS)
    with pytest.raises(DataError):
        messages.check_load(load(**wrong), LIMITS)


@given(st.binary(max_size=300))
def test_whatever_comes_is_a_report_or_a_data_error(data):
    try:
        report = messages.report(data, LIMITS)
        messages.hello(report.hello, "", LIMITS)
    except DataError:
        return
    assert report.WhichOneof("event")


def test_a_device_says_what_its_layers_take_besides():
    assert messages.hello(told(layer_s=1e-4), "h", LIMITS).offer.layer_s == 1e-4


@given(st.builds(pb.Hello, protocol=st.just(1), name=st.text(), incarnation=st.text(), data_address=st.text()))
def test_any_hello_is_taken_or_refused(one):
    one.disk_bps = 1.0
    try:
        found = messages.hello(one, "h", LIMITS)
    except DataError:
        return
    assert found.offer.name.isprintable()


@given(st.text(max_size=600))
def test_what_is_shown_of_a_sentence_fits_on_one_line(text):
    shown = messages.clip(text)
    assert shown == "" or shown.isprintable()
    assert len(shown) <= 500
