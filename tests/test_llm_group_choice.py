"""Who is in a group and who is left out: plans, links, devices that rest, come and go, and what each may hold."""

import contextlib
import threading
import time
from dataclasses import replace

import pytest

from fedge.core.errors import AddressError, ExperimentError, ModelError
from fedge.edge.llm.engine.engine import Engine
from fedge.edge.llm.engine.requests import Request
from fedge.edge.llm.engine.sampler import Sampling
from fedge.edge.llm.group import cuts
from fedge.edge.llm.group import group as groups
from fedge.edge.llm.group.division import HOPED, Division, everyone, planned
from fedge.edge.llm.group.messages import Offer
from fedge.edge.llm.group.roster import Roster
from fedge.edge.llm.models.config import Config, Rope
from fedge.edge.llm.shards.shares import even
from fedge.edge.plan.link import Link
from tests.llm_fixture import folder
from tests.llm_group_head import KERNEL, LIMITS, MEMORY, PROMPT, Worker, alone, greedy, head, until


@pytest.fixture
def model(tmp_path):
    return folder(tmp_path)


def test_a_window_holds_what_the_memory_cannot(tmp_path):
    model = folder(tmp_path, layers=6)
    answer = alone(model, tmp_path / "alone")
    keys = 2 * 4 * 6 * 16 * 2 * 128  # of one key/value head
    with (
        head(model, tmp_path / "head", wanted=1) as group,
        Worker(group.address, tmp_path / "a", memory_bytes=keys + 100_000),
    ):
        assert greedy(group.form(10)) == answer
    with (
        head(model, tmp_path / "head", wanted=1) as group,
        Worker(group.address, tmp_path / "a", memory_bytes=keys),
    ):
        group.form(10)
        assert group.names == ("head",)
        assert "cannot hold two blocks" in group.devices()[0].detail


def test_a_head_that_comes_back_finds_its_workers(model, tmp_path):
    answer = alone(model, tmp_path / "alone")
    with head(model, tmp_path / "head", wanted=1) as first:
        worker = Worker(first.address, tmp_path / "a")
        first.form(10)
    with head(model, tmp_path / "head", wanted=1, listen=first.address) as second:
        assert greedy(second.form(10)) == answer
        assert second.names == ("head", "a")
    worker.end()
    assert worker.error is None
    assert worker.states[-1] == "stopped"


def test_a_worker_that_leaves_and_one_that_comes(model, tmp_path):
    answer = alone(model, tmp_path / "alone")
    with head(model, tmp_path / "head", wanted=1) as group:
        with Worker(group.address, tmp_path / "a", "a"):
            formed = group.form(10)
            assert greedy(formed) == answer
            assert not group.better()
        until(group.better)
        with pytest.raises(groups.RankLost):
            greedy(formed)
        assert greedy(group.recover()) == answer
        assert group.names == ("head",)
        with Worker(group.address, tmp_path / "b", "b"):
            until(group.better)
            assert greedy(group.recover()) == answer
            assert group.names == ("head", "b")
            with Worker(group.address, tmp_path / "c", "c"):
                until(group.better)
                assert greedy(group.recover()) == answer
                assert set(group.names) == {"head", "b", "c"}


def test_a_worker_that_cannot_be_met_is_left_out(model, tmp_path):
    """Its address leads nowhere for the other worker, which dials it."""
    answer = alone(model, tmp_path / "alone")
    with (
        head(model, tmp_path / "head", wanted=2, limits=replace(LIMITS, rest_s=60, connect_timeout_s=2.0)) as group,
        Worker(group.address, tmp_path / "a", "a", limits=replace(LIMITS, connect_timeout_s=2.0)),
        Worker(group.address, tmp_path / "b", "b", limits=replace(LIMITS, connect_timeout_s=2.0)),
    ):
        until(lambda: len(group.devices()) == 2)
        roster = group._roster
        lost = group.devices()[0]
        roster._members = {**roster.members, lost.name: replace(lost, hello=replace(lost.hello, address=":1"))}
        assert greedy(group.form(20)) == answer
        assert len(group.names) == 2


def test_the_planner_takes_those_who_are_worth_it():
    config = Config(
        family="llama", layers=22, hidden=2048, ffn=5632, heads=32, kv_heads=4, head_dim=64, vocab=32000,
        context=2048, eps=1e-5, rope=Rope(), tied=False, qkv_bias=False, o_bias=False, ffn_bias=False,
        qk_norm=False, window=0, bos=None, eos=(),
    )  # fmt: skip
    offers = [Offer(name, {"int8": 1e10}, 4 << 30, 1e9) for name in ("head", "a", "b")]
    near = planned(config, "int8", offers, Link(1e9, 1e-4), 2048)
    far = planned(config, "int8", offers, Link(1e7, 5e-2), 2048)
    assert set(near.names) == {"head", "a", "b"}
    assert far.names == ("head",)
    assert 0 < near.token_s < far.token_s
    slow = planned(config, "int8", [replace(one, layer_s=0.1) for one in offers], Link(1e9, 1e-4), 2048)
    assert slow.token_s == pytest.approx(near.token_s + 22 * 0.1)
    with pytest.raises(ModelError):
        planned(config, "int8", [replace(one, memory_bytes=1000) for one in offers], Link(1e9, 1e-4), 2048)


def test_better_asks_the_planner_what_a_device_gains(model, tmp_path):
    gain = 0.95

    def divide(config, kind, offers, link, kv_tokens):
        return Division(tuple(one.name for one in offers), even(config, len(offers)), gain ** len(offers))

    with head(model, tmp_path / "head", divide=divide, wanted=1) as group, Worker(group.address, tmp_path / "a"):
        group.form(10)
        assert group.names == ("head", "a")
        with Worker(group.address, tmp_path / "b", "b"):
            until(lambda: len(group.devices()) == 2)
            assert not group.better()
            assert group.improve() is None
            gain = 0.5
            assert group.better()
            group.improve()
            assert group.names == ("head", "a", "b")
            assert not group.better()


def test_devices_whose_links_turn_out_too_slow_are_left_out(model, tmp_path):
    answer = alone(model, tmp_path / "alone")
    links = []

    def divide(config, kind, offers, link, kv_tokens):
        links.append(link)
        many = len(offers) if link == HOPED else 1
        return Division(tuple(one.name for one in offers[:many]), even(config, many), 1.0)

    with head(model, tmp_path / "head", divide=divide, wanted=1) as group, Worker(group.address, tmp_path / "a"):
        assert greedy(group.form(10)) == answer
        assert group.epoch == 2
        assert group.names == ("head",)
        assert [one.detail for one in group.devices()] == ["The others are faster without it."]
        assert not group.better()
    assert links[-1].rtt_s > 0


def only_the_head_unless_hoped(config, kind, offers, link, kv_tokens):
    """A plan of one for a link that was measured, and of all who are there for one that was not."""
    many = len(offers) if link == HOPED else 1
    return Division(tuple(one.name for one in offers[:many]), even(config, many), 1.0 / many)


def test_a_link_that_was_measured_long_ago_is_measured_again(model, tmp_path):
    limits = replace(LIMITS, useless_s=2.5)
    settings = {"divide": only_the_head_unless_hoped, "wanted": 1, "limits": limits}
    with head(model, tmp_path / "head", **settings) as group, Worker(group.address, tmp_path / "a"):
        group.form(10)
        assert group.names == ("head",)
        until(group.better)
        group.improve()
        assert group.epoch == 4


def test_a_link_to_a_device_that_is_gone_says_nothing_of_others(model, tmp_path):
    with head(model, tmp_path / "head", divide=only_the_head_unless_hoped, wanted=1) as group:
        with Worker(group.address, tmp_path / "a", "a"):
            group.form(10)
            with Worker(group.address, tmp_path / "b", "b"):
                until(lambda: len(group.devices()) == 2)
                assert not group.better()
        with Worker(group.address, tmp_path / "c", "c"):
            until(group.better)


@pytest.mark.parametrize("collective", ["full", "doubling"])
def test_links_are_measured_also_where_the_way_to_add_up_is_named(model, tmp_path, collective):
    links = []

    def divide(config, kind, offers, link, kv_tokens):
        links.append(link)
        return everyone(config, kind, offers, link, kv_tokens)

    settings = {"divide": divide, "wanted": 1, "collective": collective}
    with head(model, tmp_path / "head", **settings) as group, Worker(group.address, tmp_path / "a"):
        group.form(10)
        assert group.names == ("head", "a")
    assert links[0] == HOPED
    assert links[-1] != HOPED


def test_a_device_that_rests_is_used_where_nothing_works_without_it(model, tmp_path, monkeypatch):
    """Also one that is slow to notice the end of its last group."""
    answer, release, report = alone(model, tmp_path / "alone"), threading.Event(), Roster.report

    def divide(config, kind, offers, link, kv_tokens):
        if len(offers) < 2:
            raise ModelError("No device has the memory.")
        return Division(tuple(one.name for one in offers[:2]), even(config, 2), 1.0)

    with head(model, tmp_path / "head", divide=divide) as group, contextlib.ExitStack() as there:
        a, _ = (there.enter_context(Worker(group.address, tmp_path / name, name)) for name in "ab")
        until(lambda: len(group.devices()) == 2)
        roster = group._roster
        roster.rest("b", "The others are faster without it.", 600.0)
        group.form(10)
        assert group.names == ("head", "a")
        a.end()
        until(lambda: [one.name for one in group.devices()] == ["b"])
        assert greedy(group.recover()) == answer
        assert group.names == ("head", "b")
        slow = threading.Timer(LIMITS.settle_s + 0.5, release.set)
        monkeypatch.setattr(roster, "report", lambda seat, told: release.wait(30) and report(roster, seat, told))
        slow.start()
        assert greedy(group.recover()) == answer
        assert group.names == ("head", "b")


def test_what_was_loaded_for_an_epoch_that_does_not_begin_is_given_back(model, tmp_path):
    """One of two devices fails, and the head goes on alone."""
    small = replace(LIMITS, max_store_bytes=1000)

    def divide(config, kind, offers, link, kv_tokens):
        many = len(offers) if len(offers) == 3 else 1
        return Division(tuple(one.name for one in offers[:many]), even(config, many), 1.0)

    with (
        head(model, tmp_path / "head", wanted=2, divide=divide) as group,
        Worker(group.address, tmp_path / "a", "a") as first,
        Worker(group.address, tmp_path / "b", "b", limits=small),
    ):
        group.form(10)
        assert group.names == ("head",)
        until(lambda: first.states[-1] == "waiting for work")
        until(lambda: not any(one.name.startswith("fedge-epoch") for one in threading.enumerate()))


def test_cutting_takes_nothing_from_the_time_to_load(model, tmp_path, monkeypatch):
    make = groups.Cuts.make
    monkeypatch.setattr(groups.Cuts, "make", lambda self, *given: time.sleep(2.2) or make(self, *given))
    with (
        head(model, tmp_path / "head", wanted=1, limits=replace(LIMITS, load_timeout_s=2.0)) as group,
        Worker(group.address, tmp_path / "a"),
    ):
        until(group.devices)
        group.form(0.1)
        assert group.names == ("head", "a")


@pytest.mark.parametrize("how", ["give_up", "close"])
@pytest.mark.parametrize("where", ["cuts", "opens", "waits", "comes"])
def test_a_group_that_is_formed_while_its_head_ends_is_given_up_and_leaves_nothing(
    model, tmp_path, monkeypatch, where, how
):
    """Each step lasts until the group is told to end, or for ever where it asks in between."""
    there, told, opened = threading.Event(), threading.Event(), []

    def stay(work):
        def worked(*given, **more):
            there.set()
            assert told.wait(60)
            return work(*given, **more)

        return worked

    def blocks(*given, **more):
        opened.append(open_blocks(*given, **more))
        monkeypatch.setattr(opened[-1], "close", lambda close=opened[-1].close: (opened.pop(), close()))
        return opened[-1]

    open_blocks = groups.open_blocks
    monkeypatch.setattr(groups, "open_blocks", stay(blocks) if where == "opens" else blocks)
    if where == "cuts":
        monkeypatch.setattr("fedge.edge.llm.group.cuts.export", stay(cuts.export))
    if where == "waits":  # for a device that never says that it is ready
        monkeypatch.setattr(groups, "_settled", lambda *_: there.set())
    limits = replace(LIMITS, step_timeout_s=60.0)
    found, wanted = [], {"waits": 1, "comes": 2}.get(where, 0)
    with (
        head(model, tmp_path / "head", limits=limits, wanted=wanted) as group,
        Worker(group.address, tmp_path / "a") if where == "waits" else contextlib.nullcontext(),
    ):
        works = threading.Thread(target=form, args=(group, found)), threading.Thread(target=getattr(group, how))
        works[0].start()
        assert where == "comes" or there.wait(30)
        works[1].start()
        until(lambda: group._given_up)
        told.set()
        for one in works:
            one.join(60)
            assert not one.is_alive()
        assert [type(one) for one in found] == [AddressError]
        assert "about to end" in str(found[0])
        assert group._model is None
        assert not opened


def form(group, found):
    """Keeps what is raised."""
    try:
        found.append(group.form(60))
    except Exception as error:
        found.append(error)


def test_a_kernel_that_depends_on_company_is_refused_where_none_shall(model, tmp_path):
    with (
        head(model, tmp_path / "head", invariant=True, kernel=KERNEL) as group,
        pytest.raises(ExperimentError, match=r"numpy-float32 computes .* name another kernel"),
    ):
        group.form(5)
    with (
        head(model, tmp_path / "other", invariant=True, kernel="numpy-rows-float32", wanted=1) as group,
        Worker(group.address, tmp_path / "a"),
    ):
        group.form(10)
        assert group.names == ("head",)
        assert "name another kernel" in group.devices()[0].detail


def test_a_worker_says_why_it_waits(model, tmp_path):
    with Worker("127.0.0.1:1", tmp_path / "a") as worker:
        until(lambda: any("waiting for the head (UNAVAILABLE" in one for one in worker.states))
    assert len(worker.states) == len(set(worker.states))


def test_other_files_in_a_workers_folder_are_no_fault(model, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(b"of somebody else")
    with head(model, tmp_path / "head", wanted=1) as group, Worker(group.address, tmp_path / "a"):
        group.form(10)
        assert group.names == ("head", "a")


def test_memory_and_names_reach_the_plan(model, tmp_path):
    seen = []

    def divide(config, kind, offers, link, kv_tokens):
        seen.append((offers, kv_tokens))
        return everyone(config, kind, offers, link, kv_tokens)

    with head(model, tmp_path / "head", divide=divide, wanted=1) as group, Worker(group.address, tmp_path / "a"):
        group.form(10)
    offers, kv_tokens = seen[0]
    assert [one.name for one in offers] == ["head", "a"]
    assert [one.memory_bytes for one in offers] == [MEMORY, MEMORY]
    assert kv_tokens == 256


def test_an_engine_takes_devices_in_and_does_without_them_between_requests(model, tmp_path):
    answer = alone(model, tmp_path / "alone")
    with head(model, tmp_path / "head") as group:
        settings = {"vocab": 128, "slots": 2, "context": 128, "recover": group.recover, "between": group.improve}
        engine = Engine(group.form(5), None, **settings)
        try:
            for names in (("head", "a"), ("head",)):
                with contextlib.ExitStack() as there:
                    if len(names) > 1:
                        there.enter_context(Worker(group.address, tmp_path / "a"))
                    until(lambda names=names: group.names == names)
                    pieces = list(engine.submit(Request(PROMPT, 12, Sampling(temperature=0), stop_tokens=())))
                    assert [piece.token for piece in pieces if piece.token is not None] == answer
            assert engine.stats()["recoveries"] == 0
        finally:
            engine.close()
