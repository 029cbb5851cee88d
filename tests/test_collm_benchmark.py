"""The collaborative benchmark: its own clouds and device say what the whole model says, bytes and goals are right."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import collm, collm_cloud, collm_model
from benchmarks.collm import ALONE, CALIBRATED, EACH, EXACT, GOAL_MS, GUESSES, NAIVE, QUICK, STREAM, Case
from benchmarks.collm_device import Device, Order, Taken
from fedge.core.errors import ModelError
from fedge.edge.llm.collab.thresholds import row
from fedge.edge.llm.shards.shard import open_shard
from tests.llm_fixture import folder
from tests.llm_reference import logits
from tests.relay import Relay


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("model"), layers=4, vocab=320, context=64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def about(path, cache):
    with collm_model.subject(QUICK, path, cache) as made:
        yield made


@pytest.fixture(scope="module")
def whole(about):
    made = collm_cloud.model(open_shard(about.whole), about.kernel, QUICK.context)
    yield made
    made.close()


@pytest.fixture(scope="module")
def clouds(about):
    context = str(QUICK.context)
    with (
        collm_cloud.process("fedge", about.kernel, context, str(about.upper)) as fedge,
        collm_cloud.process("plain", about.kernel, context, str(about.whole), str(about.upper)) as plain,
    ):
        yield {False: fedge, True: plain}


@pytest.fixture(scope="module")
def device(about):
    with Device(about.halves.path, about.kernel, QUICK.context) as made:
        yield made


def order(about, case, address):
    return Order(case.way, address, about.prompts, QUICK.tokens, case.threshold, case.coding)


def test_texts_are_the_whole_models(path, about):
    """The slow, obvious model says the same."""
    for prompt, text in zip(about.prompts, about.texts):
        assert len(prompt) == QUICK.prompt_tokens
        said = logits(path, [*prompt, *text[:-1]])[len(prompt) - 1 :]
        np.testing.assert_array_equal(said.argmax(axis=1), text)
    assert len(set(about.prompts)) == QUICK.prompts


EXACT_WAYS = (Case("1", "exits"), Case("f32", "speculative", coding="f32"))
PLAIN_WAYS = tuple(Case(name, way) for name, way in ((STREAM, "stream"), (EACH, "each"), (NAIVE, "resend")))


@pytest.mark.parametrize("case", [*EXACT_WAYS, *PLAIN_WAYS], ids=lambda case: case.name)
def test_ways_that_are_exact_say_what_the_whole_model_says(about, clouds, device, case):
    taken = device.take(order(about, case, clouds[case.plain]))
    assert taken.ids == about.texts
    assert sum(taken.labels.values()) == sum(map(len, about.texts))
    assert 0 < taken.first_s < taken.seconds


def test_bytes_are_those_of_the_ways(about, clouds, device):
    sizes = [len(text) for text in about.texts]
    tokens, prompts, hidden = sum(sizes), sum(map(len, about.prompts)), about.hidden
    streamed, each, naive = (device.take(order(about, case, clouds[True])) for case in PLAIN_WAYS)
    assert (streamed.sent_bytes, streamed.asked) == (12 * len(sizes) + 4 * prompts, len(sizes))
    assert streamed.received_bytes == 4 * (tokens + len(sizes))
    assert (each.asked, each.received_bytes) == (tokens, 4 * tokens)
    assert each.sent_bytes == 12 * tokens + 4 * (prompts + tokens - len(sizes))
    rows = sum(len(prompt) + at for prompt, size in zip(about.prompts, sizes) for at in range(size))
    assert naive.sent_bytes == 12 * tokens + 4 * hidden * rows
    ours = device.take(order(about, EXACT_WAYS[0], clouds[False]))
    states = 2 * hidden * (prompts + tokens - len(sizes))
    assert states < ours.sent_bytes < 2 * states


def test_the_relay_counts_what_messages_need_and_no_warming_up(about, clouds, device):
    with Relay(clouds[True]) as relay:
        found = collm._row(PLAIN_WAYS[0], 0, relay, device, order(about, PLAIN_WAYS[0], relay.address))
    assert (found["link_up_bytes"], found["link_down_bytes"]) == (found["up_bytes"], found["down_bytes"])
    assert found["asked_share"] == round(len(about.prompts) / found["tokens"], 4)
    with Relay(clouds[False]) as relay:
        case = EXACT_WAYS[0]
        found = collm._row(case, 0, relay, device, order(about, case, relay.address))
    assert found["up_bytes"] < found["link_up_bytes"] < found["up_bytes"] + 200  # what gRPC adds


def test_questions_without_an_answer_were_asked():
    taken = Taken(((1, 2, 3, 4),), 1.0, 0.1, 40, 20, asked=3, labels={"exit:1": 1, "cloud": 1, "fallback": 2})
    device = SimpleNamespace(take=lambda _, begin: begin() or taken)
    found = collm._row(EXACT_WAYS[0], 0, SimpleNamespace(forwarded_bytes=(0, 0)), device, None)
    assert found["asked_share"] == 0.75


def test_what_was_foreseen_along_the_texts_is_what_a_device_does_as_long_as_it_writes_them(
    about, whole, clouds, device
):
    threshold = float(np.quantile(about.seen.confidence.max(axis=0), 0.7))
    foreseen = row(about.seen, [threshold] * 2)
    assert 0.5 < foreseen.cloud < 0.9
    taken = device.take(order(about, Case("some", "exits", threshold), clouds[False]))
    sure = (about.seen.confidence >= threshold).any(axis=0)
    at = 0
    for text, ids in zip(about.texts, taken.ids):
        wrong = next((n for n, (one, other) in enumerate(zip(text, ids)) if one != other), len(text))
        assert wrong == len(text) or sure[at + wrong]  # only an exit says something else
        at += len(text)
    own = collm_model.agreement(whole, about.prompts, taken.ids)
    assert own < 1.0 or taken.ids == about.texts
    assert collm_model.agreement(whole, about.prompts, about.texts) == 1.0


def test_exits_are_trained_once(path, cache, about):
    made = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(made) == 1
    again = collm_model.trained(QUICK, path, cache)
    assert again.table == about.exits.table
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == made
    next(iter(made)).write_bytes(b"no exits")
    assert collm_model.trained(QUICK, path, cache).table == about.exits.table


def test_a_model_that_cannot_begin_a_text_is_refused(tmp_path, about):
    bare = folder(tmp_path, layers=4, vocab=320, context=64, bos_token_id=None)
    with pytest.raises(Exception, match="begins a text") as caught:
        collm_model.trained(QUICK, bare, tmp_path / "cache")
    assert not isinstance(caught.value, ModelError) or "\n" not in str(caught.value)


def test_a_cloud_does_not_outlive_its_parent(about):
    argv = [sys.executable, "-m", collm_cloud.__name__, "fedge", about.kernel, "64", str(about.upper)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline().startswith("127.0.0.1:")
        child.stdin.close()
        assert child.wait(60) == 1


def rows(**changed):
    """What all goals hold for, with changes by the name of the way."""
    times = {CALIBRATED: 5.0, GUESSES: 4.0, EXACT: 4.0, EACH: 45.0, STREAM: 6.0}
    whole = {"forced_agreement": 0.985, "asked_share": 0.4, "up_bytes_per_position": 140.0, "same_text": 1.0}
    return [
        {"way": way, "delay_ms": delay, "ms_per_token": ms, **whole} | changed.get(way, {})
        for way, ms in times.items()
        for delay in (0, GOAL_MS)
    ]


def held(found):
    return [one.holds for one in collm.judged(found, 64)]


def test_goals():
    assert held(rows()) == [True] * 8
    assert held(rows(**{CALIBRATED: {"forced_agreement": 0.97}}))[0] is False
    assert held(rows(**{CALIBRATED: {"asked_share": 0.51}}))[1] is False
    assert held(rows(**{CALIBRATED: {"up_bytes_per_position": 144.5}}))[2] is False
    assert held(rows(**{EXACT: {"same_text": 0.95}}))[3] is False
    assert held(rows(**{CALIBRATED: {"ms_per_token": 20.0}}))[4:] == [True, False, True, True]
    assert held(rows(**{GUESSES: {"ms_per_token": 50.0}}))[4:] == [True, True, False, False]
    assert held([]) == [False] * 8
    assert len({one.name for one in collm.judged([], 64)}) == 8


def test_what_can_be_chosen():
    found = collm.chosen("stories15m", "2,4", "int8")
    assert (found.exits, found.kind) == ((2, 4), "int8")
    assert collm.chosen("stories15m", "", "") == collm.PLANS["stories15m"]
    for wrong in (("none", "", ""), ("stories15m", "two", ""), ("stories15m", "", "int3")):
        with pytest.raises(SystemExit, match="name"):
            collm.chosen(*wrong)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_command_cut_down(tmp_path):
    """All ways, without a delay and with one; the picture; all goals by name."""
    picture = tmp_path / "collm.png"
    argv = [sys.executable, "-m", "benchmarks.collm", "--json", "--quick", "--figure", str(picture)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["benchmark"] == "collm"
    ways = [case.name for case in collm.cases(0.5)]
    assert [(one["way"], one["delay_ms"]) for one in found["rows"]] == [
        (way, delay) for delay in collm.QUICK_DELAYS_MS for way in ways
    ]
    by = {(one["way"], one["delay_ms"]): one for one in found["rows"]}
    for way in ("exits, 1", EXACT, STREAM, EACH, NAIVE):
        assert by[way, 0]["same_text"] == 1.0
    for way in ("exits, 1", EACH, NAIVE):
        assert by[way, 20]["ms_per_token"] >= 40  # a round trip for every token
    assert by[ALONE, 20]["link_up_bytes"] == 0
    assert [one["name"] for one in found["goals"]] == [one.name for one in collm.judged([], 64)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "ms per token" in done.stderr
