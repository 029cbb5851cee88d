"""Local clipping: its formulas as loops, the throttle, the cycle, and what flooding attackers can do to training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.core import state as plain
from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators import build
from fedge.strategies.aggregators.local_clipping import PATIENCE, Known, LocalClipping
from fedge.strategies.aggregators.mean import Mean
from fedge.strategies.contracts import KeepsRows


def close(rule, memory, **rows):
    """One group of rows by client."""
    state = rule.init(2)
    for row in rows.values():
        state = rule.fold(state, np.asarray(row, np.float32), 1.0)
    return rule.finish(state, list(rows), memory, 0)


class Literal:
    """The same in plain loops over float64 rows."""

    def __init__(self, byzantine, radius, repeat, beta):
        self.byzantine, self.radius, self.repeat, self.beta = byzantine, radius, repeat, beta
        self.centre, self.last, self.sent = None, {}, {}

    def close(self, rows):
        centre = np.zeros(len(next(iter(rows.values())))) if self.centre is None else self.centre
        for client, row in rows.items():
            self.last[client] = np.linalg.norm(row - centre)
        radius = self.radius * np.median(list(self.last.values()))
        outs, moves = [], []
        for client, row in rows.items():
            count = self.sent.get(client, 0)
            self.sent[client] = count + 1
            length = np.linalg.norm(row - centre)
            clipped = (row - centre) * (min(1.0, radius / length) if length else 1.0)
            outs.append((centre + clipped) / self.repeat**count)
            moves.append(clipped / self.repeat**count)
        self.centre = centre + (1 - self.beta ** len(rows)) * np.mean(moves, axis=0)
        heard = [client for client in self.last if client in self.sent]
        often = [client for client in heard if self.sent[client] >= PATIENCE]
        if len(often) > len(self.last) / 2:
            self.last = {client: self.last[client] for client in heard}
            self.sent = {}
        elif len(heard) >= max(1, len(self.last) - self.byzantine):
            self.sent = {}
        return np.mean(outs, axis=0)


GROUPS = st.lists(st.sets(st.sampled_from("abcdefg"), min_size=1, max_size=3), min_size=1, max_size=25)


@given(GROUPS, st.integers(0, 2), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([2.0, 5.0]))
def test_equals_the_plain_loops(groups, byzantine, radius, repeat):
    draw = np.random.default_rng(len(groups))
    rule, literal, memory = LocalClipping(byzantine, radius, repeat), Literal(byzantine, radius, repeat, 0.9), Known()
    for group in groups:
        rows = {client: draw.standard_normal(9) * draw.choice([0.1, 1.0, 10.0]) for client in sorted(group)}
        outcome = close(rule, memory, **rows)
        memory = outcome.memory
        np.testing.assert_allclose(outcome.vector, literal.close(rows), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(memory.centre, literal.centre, rtol=1e-3, atol=1e-4)
        assert memory.sent == literal.sent
        assert memory.distances == pytest.approx(literal.last, rel=1e-3, abs=1e-3)


@given(GROUPS, st.randoms())
def test_the_order_within_a_group_changes_no_bit_and_the_memory_survives_a_snapshot(groups, shuffler):
    draw = np.random.default_rng(len(groups))
    rule, one, other = LocalClipping(), Known(), Known()
    for group in groups:
        rows = [(client, draw.standard_normal(5)) for client in sorted(group)]
        found = close(rule, one, **dict(rows))
        shuffler.shuffle(rows)
        again = close(rule, other, **dict(rows))
        assert np.array_equal(found.vector, again.vector)
        assert found.verdicts == again.verdicts
        one, other = found.memory, plain.convert(plain.decode(plain.encode(again.memory)), Known)
        assert one.distances == other.distances


@given(st.sampled_from([2.0**-20, 2.0**-3, 2.0**20]), st.integers(1, 30))
def test_in_other_units_it_is_the_same_result(scale, count):
    draw, rule = np.random.default_rng(count), LocalClipping(byzantine=1)
    one, other = Known(), Known()
    for index in range(count):
        client, row = f"c{index % 4}", draw.standard_normal(6)
        first, second = close(rule, one, **{client: row}), close(rule, other, **{client: scale * row})
        np.testing.assert_allclose(second.vector / np.float32(scale), first.vector, rtol=1e-5, atol=1e-6)
        one, other = first.memory, second.memory


def test_equal_rows_come_back_to_the_bit_where_nobody_repeats():
    rule, memory = LocalClipping(), Known()
    row = np.array([3.0, -4.0], np.float32)
    for client in "abcabc":
        outcome = close(rule, memory, **{client: row})
        memory = outcome.memory
        np.testing.assert_allclose(outcome.vector, row, rtol=1e-6)
        assert outcome.verdicts[client].rejected is False
    outcome = close(rule, Known(), a=[0, 0], b=[0, 0])
    assert np.array_equal(outcome.vector, [0, 0])
    assert outcome.verdicts["a"].score == 1.0


def test_a_far_row_is_clipped_to_the_median_distance_and_says_so():
    rule = LocalClipping(byzantine=1)
    outcome = close(rule, rule.memory(), a=[1.0, 0.0], b=[0.0, 2.0], z=[-1e15, 0.0])
    np.testing.assert_allclose(outcome.vector, [(1.0 - 2.0) / 3, 2.0 / 3], rtol=1e-6)
    assert [outcome.verdicts[name].rejected for name in "abz"] == [False, False, True]
    assert outcome.verdicts["z"].score == pytest.approx(1e15 / 2)
    assert outcome.verdicts["a"].coefficient == pytest.approx(1 / 3)


def test_repeats_count_less_and_less_until_all_but_f_have_sent():
    rule = LocalClipping(byzantine=1)
    memory = close(rule, Known(), a=[1, 0], b=[1, 0], z=[1, 0]).memory
    assert memory.sent == {}
    shares = []
    for client in "zzzab":
        outcome = close(rule, memory, **{client: [1, 0]})
        shares.append(outcome.verdicts[client].coefficient)
        memory = outcome.memory
    assert shares == [1.0, 0.5, 0.25, 1.0, 1.0]  # with a and z two of three have sent, so b begins a new cycle
    assert memory.sent == {"b": 1}
    assert outcome.verdicts["b"].rejected is False


def test_a_silent_client_stops_nobody_and_is_forgotten():
    rule = LocalClipping()
    memory = close(rule, Known(), a=[1, 0], b=[1, 0], gone=[5, 0]).memory
    shares = []
    for client in "ab" * PATIENCE + "a":
        outcome = close(rule, memory, **{client: [1, 0]})
        shares.append(outcome.verdicts[client].coefficient)
        memory = outcome.memory
    assert shares[-1] == 1.0
    assert min(shares) == 0.5 ** (PATIENCE - 1)
    assert sorted(memory.distances) == ["a", "b"]


def test_nothing_moves_before_more_than_twice_f_clients_are_known():
    rule = LocalClipping(byzantine=2)
    assert rule.lacks(["a", "b"], Known()) == "3 more clients"
    assert rule.lacks(["a", "b"], Known(distances={"b": 1.0, "c": 1.0, "d": 2.0})) == "1 more clients"
    assert rule.lacks(["e"], Known(distances=dict.fromkeys("abcd", 1.0))) == ""
    assert rule.min_rows() == 1
    assert LocalClipping().lacks(["a"], Known()) == ""


def test_rows_can_be_dropped_and_merged():
    rule = LocalClipping()
    rows = [np.full(2, value, np.float32) for value in range(4)]
    state = rule.merge(rule.fold(rule.fold(rule.init(2), rows[0], 1.0), rows[1], 1.0), [rows[2], rows[3]])
    assert [row[0] for row in rule.drop(state, 1)] == [0, 2, 3]
    assert isinstance(rule, KeepsRows)
    assert not rule.associative


def test_rows_and_results_share_no_memory_with_what_is_remembered():
    rule, row = LocalClipping(), np.ones(3, np.float32)
    row.flags.writeable = False
    outcome = rule.finish(rule.fold(rule.init(3), row, 1.0), ["a"], rule.memory(), 0)
    assert not np.shares_memory(outcome.vector, outcome.memory.centre)
    assert not np.shares_memory(row, outcome.memory.centre)


@pytest.mark.parametrize("length", [1.0, 1e4, 1e15])
@pytest.mark.parametrize("repeat", [2.0, 8.0])
def test_however_often_it_sends_a_client_adds_no_more_than_documented(length, repeat):
    rule, draw = LocalClipping(byzantine=1, repeat=repeat), np.random.default_rng(0)
    memory = close(rule, Known(), **{name: draw.standard_normal(8) for name in "abcde"}).memory
    added, radius = np.zeros(8), 0.0
    for _ in range(200):
        before = memory.centre.astype(np.float64)
        count = memory.sent.get("z", 0)
        outcome = close(rule, memory, z=-length * np.ones(8))
        memory = outcome.memory
        radius = max(radius, float(np.median(list(memory.distances.values()))))
        added += outcome.vector - before / repeat**count
    assert np.linalg.norm(added) <= 1.0001 * repeat / (repeat - 1) * radius
    assert radius < 5.0


# ---- training on single arrivals ---------------------------------------------------------------

N, F, SIZE = 20, 4, 30


def trained(rule, attack, *, noise, rate=10.0, arrivals=4000, step=0.05):
    """The distance from the optimum, over that at the start, after FedAsync on clients' quadratics |w - w_i|^2 / 2.

    Hostile clients send `attack(honest row)` and arrive `rate` times as often as the honest ones.
    """
    draw = np.random.default_rng(7)
    optimum = draw.standard_normal(SIZE)
    goals = optimum + 0.1 * draw.standard_normal((N, SIZE)) * (noise > 0)
    goals[F:] += optimum - goals[F:].mean(axis=0)
    speeds = np.ones(N)
    speeds[:F] = rate if attack else 1.0
    model = optimum + 10.0 * np.ones(SIZE) / np.sqrt(SIZE)
    versions, memory, held, names = [model], rule.memory(), rule.init(SIZE), []
    for client in draw.choice(N, size=arrivals, p=speeds / speeds.sum()).tolist():
        base = versions[-min(len(versions), 1 + int(draw.integers(5)))]
        row = 0.5 * (base - goals[client]) + noise * draw.standard_normal(SIZE) / np.sqrt(SIZE)
        row = attack(row) if attack and client < F else row
        name = f"client-{client:02d}"
        if name in names:
            held = rule.drop(held, names.index(name))
            names.remove(name)
        held = rule.fold(held, row.astype(np.float32), 1.0)
        names.append(name)
        if rule.lacks(names, memory):
            continue
        outcome = rule.finish(held, names, memory, 0)
        memory, held, names = outcome.memory, rule.init(SIZE), []
        versions = [*versions[-5:], versions[-1] - step * outcome.vector.astype(np.float64)]
        if not np.isfinite(versions[-1]).all() or np.abs(versions[-1]).max() > 1e12:
            return np.inf
    return np.linalg.norm(versions[-1] - optimum) / 10.0


def test_without_attack_it_trains_as_the_mean_does():
    robust = trained(LocalClipping(byzantine=F), None, noise=1.0, arrivals=2000)
    plain_mean = trained(Mean(), None, noise=1.0, arrivals=2000)
    assert plain_mean < 0.05
    assert robust < 0.05
    # On the way it is behind by what repeats within a cycle lose: less than half of the arrivals.
    halfway = trained(Mean(), None, noise=1.0, arrivals=60)
    assert trained(LocalClipping(byzantine=F), None, noise=1.0, arrivals=120) < halfway < 0.5


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("length", [-1.0, -100.0, -1e12])
def test_flooding_with_flipped_rows_does_not_keep_it_from_the_optimum(noise, length):
    found = trained(LocalClipping(byzantine=F), lambda row: length * row, noise=noise)
    assert found < 0.1


def test_the_mean_does_not_survive_that():
    assert trained(Mean(), lambda row: -100.0 * row, noise=1.0, arrivals=500) == np.inf


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"byzantine": -1}, "byzantine: must be at least 0, not -1"),
        ({"radius": 0.0}, "radius: must be above 0, not 0.0"),
        ({"repeat": 1.0}, "repeat: must be above 1, not 1.0"),
        ({"beta": 1.0}, "beta: must be at least 0 and below 1, not 1.0"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(settings, what):
    with pytest.raises(ExperimentError, match=what):
        LocalClipping(**settings)


def test_the_registry_builds_it():
    assert build({"kind": "local-clipping", "radius": 2.0}) == LocalClipping(radius=2.0)
