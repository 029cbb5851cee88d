"""Gradient splitting: the literal algorithm on the same split, with every base; the split itself; its laws."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge import aggregate
from fedge.core.errors import ExperimentError
from fedge.strategies import parts as parts_module
from fedge.strategies.aggregators import AGGREGATORS, build
from fedge.strategies.aggregators.average import Average
from fedge.strategies.aggregators.evidence import Evidence
from fedge.strategies.aggregators.gas import GradientSplitting
from fedge.strategies.gram import gram
from fedge.strategies.parts import MANY, PANEL, RUN, Parts
from fedge.strategies.preaggregators import PREAGGREGATORS

BASES = ("multi-krum", "krum", "average", "median", "trimmed-mean", "meamed", "phocas", "bulyan", "sign-majority")
SEEDS = st.integers(0, 10_000)


def drawn(seed, n, d):
    return np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)


def evidence_of(rows, f, seed=0):
    names = tuple(f"row-{index:03d}" for index in range(len(rows)))
    return Evidence(gram(rows), np.full(len(rows), 1 / len(rows)), f, names, seed)


def members(parts):
    """The coordinates of each part."""
    whole = parts.size // parts.unit * parts.unit
    found = []
    for low, high in zip(parts.bounds, parts.bounds[1:]):
        runs = parts.order[low:high, None] * parts.unit + np.arange(parts.unit)
        found.append(runs.reshape(-1).tolist())
    found[-1] += range(whole, parts.size)
    return found


def literal(rows, f, splits, seed, base, pre=()):
    """Which rows stay: each part judged by the base alone, in float64."""
    scores = np.zeros(len(rows))
    for part in members(Parts.random(rows.shape[1], splits, seed)):
        own = rows[:, part]
        aggregate_of_part = aggregate(own, kind=base, byzantine=f, pre=pre, seed=seed).astype(np.float64)
        scores += np.sqrt(((own - aggregate_of_part) ** 2).sum(axis=1))
    return sorted(np.argsort(scores, kind="stable")[: len(rows) - f].tolist()), scores


def chosen(rows, f, splits, seed, base, pre=()):
    rule = GradientSplitting(base, splits)
    steps = [PREAGGREGATORS.build({"kind": name}) for name in pre]
    found = rule.choose(list(rows), evidence_of(rows, f, seed), steps)
    kept = np.flatnonzero(found)
    assert found[kept].tolist() == [1 / (len(rows) - f)] * (len(rows) - f)
    return kept.tolist()


@pytest.mark.parametrize("pre", [(), ("nnm",)])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("splits", [1, 4, 7])
def test_equals_the_literal_algorithm_on_the_same_split(base, pre, splits):
    for seed, d in enumerate((7, 61, 4 * MANY * RUN + 21)):
        rows = drawn(seed, 11, d) * np.linspace(0.8, 1.3, 11, dtype=np.float32)[:, None]
        wanted, scores = literal(rows, 2, splits, seed, base, pre)
        ranked = np.sort(scores)
        assert ranked[9] - ranked[8] > 1e-4 * ranked[8]  # no tie that rounding could decide
        assert chosen(rows, 2, splits, seed, base, pre) == wanted


@pytest.mark.parametrize("base", ["multi-krum", "median", "bulyan"])
def test_parts_longer_than_a_panel_and_many_in_one_come_to_the_same(base, monkeypatch):
    rows = drawn(1, 11, 3 * MANY * RUN + 5) * np.linspace(0.8, 1.3, 11, dtype=np.float32)[:, None]
    wanted, _ = literal(rows, 2, 3, 1, base)
    for panel in (RUN, 2 * RUN, 10 * MANY * RUN):
        monkeypatch.setattr(parts_module, "PANEL", panel)
        assert chosen(rows, 2, 3, 1, base) == wanted


@given(st.integers(1, 3000), st.integers(1, 40), SEEDS)
def test_the_split_is_a_partition_into_equal_parts(size, count, seed):
    parts = Parts.random(size, count, seed)
    found = members(parts)
    assert len(found) == parts.count == min(count, size)
    assert sorted(one for part in found for one in part) == list(range(size))
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= parts.unit
    assert parts.unit == (RUN if size >= count * MANY * RUN else 1)


@given(st.integers(1, 3000), st.integers(1, 40), SEEDS)
@settings(max_examples=50)
def test_panels_hold_every_part_once_and_are_never_large(size, count, seed):
    parts, row = Parts.random(size, count, seed), np.arange(size, dtype=np.float32)
    found = []
    for low, high in parts.batches():
        panels = list(parts.panels([row, -row], low, high))
        assert all(panel.shape[:2] == (2, high - low) and panel[0].size <= PANEL for panel in panels)
        assert all(np.array_equal(panel[0], -panel[1]) for panel in panels)
        found += np.concatenate([panel[0] for panel in panels], axis=1).astype(int).tolist()
    assert found == members(parts)


def test_large_parts_come_in_pieces():
    size = 3 * PANEL + 7
    pieces = [panel.shape for panel in Parts.random(size, 1, 0).panels([np.zeros(size, np.float32)], 0, 1)]
    assert pieces == [(1, 1, PANEL)] * 3 + [(1, 1, 7)]


def test_the_same_seed_splits_alike_and_another_does_not():
    one, again, other = (Parts.random(500, 5, seed).order.tolist() for seed in (3, 3, 4))
    assert one == again
    assert one != other
    rows = drawn(0, 9, 500)
    assert np.array_equal(
        aggregate(rows, kind="gas", byzantine=2, seed=5), aggregate(rows, kind="gas", byzantine=2, seed=5)
    )


@pytest.mark.parametrize("base", BASES)
def test_rows_far_off_in_some_coordinates_are_left_out(base):
    rows = drawn(2, 11, 200)
    rows[3, :20] += 300
    rows[8, 100:120] -= 300
    honest = np.delete(rows, [3, 8], axis=0)
    np.testing.assert_allclose(
        aggregate(rows, kind="gas", base=base, byzantine=2, splits=10), honest.mean(axis=0), rtol=1e-5, atol=1e-6
    )


@given(SEEDS, st.floats(0.01, 100))
@settings(max_examples=25)
def test_scale_comes_through(seed, scale):
    rows = drawn(seed, 9, 40)
    found = aggregate(rows, kind="gas", byzantine=2, splits=4)
    np.testing.assert_allclose(
        aggregate(rows * np.float32(scale), kind="gas", byzantine=2, splits=4),
        found * scale,
        rtol=1e-3,
        atol=1e-5 * scale,
    )


def test_without_hostile_rows_it_is_the_mean_even_with_fewer_coordinates_than_splits():
    rows = drawn(4, 7, 3)
    np.testing.assert_allclose(aggregate(rows, kind="gas", splits=1000), rows.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_rows_that_differ_by_little_beside_what_they_share_are_told_apart():
    shared = 1000 * drawn(0, 1, 400)
    apart = drawn(1, 9, 400) * np.float32(0.05)
    apart[6:8] *= 3
    rows = shared + apart
    assert chosen(rows, 2, 5, 0, "multi-krum") == [0, 1, 2, 3, 4, 5, 8]


def test_mapped_rows_stay_as_they_are(tmp_path):
    table = drawn(5, 9, 5 * MANY * RUN + 3)
    table.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.float32, "r", shape=table.shape)
    for base in ("multi-krum", "median"):
        assert chosen(mapped, 2, 5, 0, base) == chosen(table, 2, 5, 0, base)
    assert np.array_equal(mapped, table)


def test_krum_sees_many_matrices_as_it_sees_each():
    stack = np.stack([evidence_of(drawn(seed, 9, 6), 2).distances for seed in range(5)])
    for kind in ("krum", "multi-krum"):
        rule = AGGREGATORS.build({"kind": kind})
        each = [rule.coefficients(evidence_of(drawn(seed, 9, 6), 2)) for seed in range(5)]
        assert np.array_equal(rule.by_distance(stack, 2), each)


def test_it_needs_what_its_base_needs():
    for base, least in (("multi-krum", 7), ("median", 5), ("bulyan", 11)):
        assert build({"kind": "gas", "base": base, "byzantine": 2}).min_rows() == least


def test_what_a_base_of_ones_own_asks_of_clients_is_asked():
    gas = GradientSplitting(f"{__name__}:OnlyWithAda", 3)
    assert gas.lacks(["ada", "bob"]) == ""
    assert gas.lacks(["bob"]) == "ada"
    assert GradientSplitting().lacks(["bob"]) == ""


@dataclass(frozen=True)
class OnlyWithAda(Average):
    def lacks(self, clients):
        return "" if "ada" in clients else "ada"


@pytest.mark.parametrize("base", ["gas", "mean"])
def test_what_cannot_judge_parts_is_refused(base):
    with pytest.raises(ExperimentError, match="cannot judge parts"):
        build({"kind": "gas", "base": base})


def test_wrong_settings_are_refused():
    with pytest.raises(ExperimentError, match=r"splits: must be at least 1, not 0"):
        build({"kind": "gas", "splits": 0})
    with pytest.raises(ExperimentError, match="no kind 'medain'; did you mean 'median'"):
        build({"kind": "gas", "base": "medain"})
