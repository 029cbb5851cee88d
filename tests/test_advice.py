"""The advice on f: probabilities against counting by hand, laws, and what the command prints."""

import json
import warnings
from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge import build as wiring
from fedge import experiment as experiments
from fedge.core.errors import ExperimentError
from fedge.strategies.aggregators import AGGREGATORS, PRESETS, build
from fedge.strategies.aggregators.advice import advise, bound, exceeded, fit, least, quorum

with warnings.catch_warnings():  # typer still imports what click has deprecated
    warnings.filterwarnings("ignore", ".*Click 9", DeprecationWarning)
    from fedge import cli


@st.composite
def draws(draw: st.DrawFn, most: int) -> tuple[int, int, int]:
    """(clients, sampled, hostile), the hostile a minority."""
    clients = draw(st.integers(1, most))
    return clients, draw(st.integers(1, clients)), draw(st.integers(0, (clients - 1) // 2))


# ---- the probabilities -------------------------------------------------------------------------


@given(draws(9))
def test_the_probabilities_are_those_of_counting_every_draw(numbers: tuple[int, int, int]) -> None:
    clients, sampled, hostile = numbers
    drawn = [sum(client < hostile for client in group) for group in combinations(range(clients), sampled)]
    expected = [Fraction(sum(count > f for count in drawn), len(drawn)) for f in range(min(hostile, sampled) + 1)]
    assert exceeded(clients, sampled, hostile) == expected


@given(draws(60))
def test_they_fall_with_f_to_zero_and_rise_with_the_hostile(numbers: tuple[int, int, int]) -> None:
    clients, sampled, hostile = numbers
    found = exceeded(clients, sampled, hostile)
    assert found[-1] == 0
    assert all(1 >= more >= less for more, less in pairwise(found))
    assert all(low <= high for low, high in zip(found, exceeded(clients, sampled, hostile + 1)))


@given(draws(40), st.integers(1, 9999), st.integers(1, 2000))
def test_f_is_the_smallest_that_keeps_the_risk_and_grows_with_the_rounds(
    numbers: tuple[int, int, int], risk: int, rounds: int
) -> None:
    clients, sampled, hostile = numbers
    accepted = Fraction(risk, 10_000 * rounds)
    f = bound(clients, sampled, hostile, accepted)
    chances = exceeded(clients, sampled, hostile)
    assert chances[f] <= accepted
    assert f == 0 or chances[f - 1] > accepted
    assert bound(clients, sampled, hostile, accepted / 2) >= f
    assert all(bound(clients, sampled, hostile, chance) == chances.index(chance) for chance in chances)
    assert bound(clients, clients, hostile, accepted) == hostile  # nothing is left to chance


def test_a_known_case() -> None:
    # 4 of 40, 10 drawn: P(H = 4) = C(36, 6) / C(40, 10).
    assert exceeded(40, 10, 4)[3] == Fraction(1947792, 847660528)
    assert (advise(40, 10, 4, 1e-3).byzantine, advise(40, 10, 4, 1e-2).byzantine) == (4, 3)
    assert advise(40, 10, 4, 1e-2, rounds=4).byzantine == 3  # 4 x 0.0023 is still below
    assert advise(40, 10, 4, 1e-2, rounds=5).byzantine == 4


def test_many_clients_are_no_matter() -> None:
    found = advise(5000, 100, 1000, 1e-3, rounds=100)
    assert found.kept
    assert float(found.tails[found.byzantine].run) <= 1e-3 < float(found.tails[found.byzantine - 1].run)
    assert sum(tail.run for tail in found.tails) > 1


# ---- quorum and rules --------------------------------------------------------------------------


@given(draws(25))
def test_the_quorum_is_the_fewest_with_which_the_rule_is_valid(numbers: tuple[int, int, int]) -> None:
    clients, _, hostile = numbers
    accepted = Fraction(1, 1000)

    def valid(sampled: int) -> bool:
        return build({"kind": "multi-krum", "byzantine": bound(clients, sampled, hostile, accepted)}).min_rows() <= (
            sampled
        )

    found = quorum(clients, hostile, accepted, least("multi-krum"))
    assert [sampled for sampled in range(1, clients + 1) if valid(sampled)][:1] == ([] if found is None else [found])


def test_every_kind_is_judged_by_what_it_says_it_needs() -> None:
    found = {rule.kind: rule for rule in advise(40, 10, 4).rules}
    assert list(found) == [*PRESETS, *AGGREGATORS.entries]
    assert (found["krum"].valid, found["krum"].needs, found["krum"].cost) == (False, 11, "Gram")
    assert (found["trimmed-mean"].valid, found["trimmed-mean"].needs) == (True, 9)
    assert found["trimmed-mean"].cost == "coordinate"
    assert not found["trimmed-mean"].honours_weights
    assert (found["bulyan"].needs, found["gas"].cost, found["local-clipping"].cost) == (19, "split", "sum")
    assert (found["fltrust"].valid, found["fltrust"].needs) == (True, 1)
    assert "root" in found["fltrust"].note
    assert (found["local-clipping"].valid, found["local-clipping"].needs) == (True, 1)
    for kind in ("mean", "average", "foolsgold"):
        assert (found[kind].valid, found[kind].needs, bool(found[kind].note)) == (False, None, True)
    assert fit("krum", 11, 4).valid
    assert not fit("mda", 1000, 100).valid  # 2^100 subsets
    assert "2^f subsets" in fit("mda", 1000, 100).note


@given(st.sampled_from([*PRESETS, *AGGREGATORS.entries]), st.integers(1, 30), st.integers(0, 9))
def test_whoever_withstands_f_withstands_less_and_in_more_rows(kind: str, rows: int, byzantine: int) -> None:
    if fit(kind, rows, byzantine + 1).valid:
        assert fit(kind, rows, byzantine).valid
        assert fit(kind, rows + 1, byzantine + 1).valid


# ---- what to write -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "words", "cached"),
    [
        ((40, 40, 4), "f = 4 keeps the risk", False),
        ((40, 13, 4), "f = 4 keeps the risk", False),
        ((40, 6, 4), "No f below half of 6 rows", True),
        ((21, 21, 9), "f = 9 keeps the risk", False),
    ],
)
def test_what_it_says_to_write_is_a_valid_experiment(numbers: tuple[int, int, int], words: str, cached: bool) -> None:
    found = advise(*numbers)
    assert (found.words.startswith(words), found.cached, "cache = true" in found.experiment) == (True, cached, cached)
    plan = wiring.settled(
        experiments.parse(found.experiment + f"[data]\npartition = {{ kind = 'iid', clients = {found.clients} }}\n")
    )
    assert plan.server.aggregator["byzantine"] == (found.hostile if cached else found.byzantine)
    assert plan.server.aggregator["cache"] is (cached or plan.server.scheduler["kind"] == "compass")
    assert (plan.server.selector is None) == (found.sampled == found.clients)


def test_where_no_group_is_large_enough_it_says_how_many_to_draw_or_to_cache() -> None:
    found = advise(40, 6, 4)
    assert not found.kept
    assert found.quorum is not None
    assert found.quorum_byzantine == advise(40, found.quorum, 4).byzantine
    assert (
        f"Draw {found.quorum} clients per round with f = {found.quorum_byzantine}, or set cache = true" in found.words
    )
    assert "f = 4 holds among all 40" in found.words
    again = advise(40, found.quorum, 4)
    assert (again.kept, again.cached) == (True, False)


@pytest.mark.parametrize(
    ("numbers", "risk", "words"),
    [
        ((1000, 50, 100), 1e-3, "f = 12 keeps the risk of 0.001; so few as 22 clients per round, with f = 7, would do"),
        ((100, 13, 4), 0.05, "f = 2 keeps the risk of 0.05; so few as 4 clients per round, with f = 1, would do"),
        (
            (100, 1, 4),
            0.05,
            "but withstands nobody; 'robust' withstands the hostile in 4 clients per round, with f = 1.",
        ),
        ((100, 4, 4), 0.05, "f = 1 keeps the risk of 0.05."),
        ((100, 1, 0), 0.05, "f = 0 keeps the risk of 0.05."),
    ],
)
def test_fewer_clients_are_named_with_the_f_that_belongs_to_them(
    numbers: tuple[int, int, int], risk: float, words: str
) -> None:
    assert words in advise(*numbers, risk).words


@pytest.mark.parametrize(
    ("numbers", "more", "sentence"),
    [
        ((0, 1, 0), {}, "There are 0 clients; name 1 to 10000"),
        ((10**12, 10**5, 10**6), {}, "There are 1000000000000 clients; name 1 to 10000"),
        ((20, 20, 10), {}, "'fltrust' withstands any number"),
        ((10, 11, 1), {}, "11 of 10 clients cannot be drawn; draw 1 to 10."),
        ((10, 0, 1), {}, "draw 1 to 10"),
        ((10, 5, -1), {}, "-1 hostile clients cannot be; name 0 to 4 of 10."),
        ((10, 5, 5), {}, "at most 4 of 10, or 5 of at least 11"),
        ((10, 5, 1), {"risk": 0.0}, "above 0 and below 1"),
        ((10, 5, 1), {"risk": 1.5}, "above 0 and below 1"),
        ((10, 5, 1), {"rounds": 0}, "name 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_refused_with_those_that_can(
    numbers: tuple[int, int, int], more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ExperimentError) as caught:
        advise(*numbers, **more)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the command -------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli._outcome(["robust", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_prints_probabilities_rules_and_what_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "advise", "--clients", "40", "--sampled", "10", "--byzantine", "4", "--rounds", "20")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["3", "0.0023", "0.046"] in lines
    assert ["4", "0", "0"] in lines
    assert ["trimmed-mean", "yes", "9", "no", "coordinate"] in lines
    assert ["krum", "no", "11", "no", "Gram"] in lines
    assert "one hostile row moves it at will" in out
    assert out.endswith(advise(40, 10, 4, rounds=20).experiment)
    assert "robust" in out


def test_as_json_it_is_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "advise", "--clients", "40", "--byzantine", "4", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["clients"], found["sampled"], found["hostile"], found["byzantine"]) == (40, 40, 4, 4)
    assert found["tails"][3] == {"byzantine": 3, "group": 1.0, "run": 1.0}
    assert {rule["kind"] for rule in found["rules"]} == {*PRESETS, *AGGREGATORS.entries}
    assert found["experiment"].startswith("[server]\n")


def test_impossible_numbers_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "advise", "--clients", "10", "--byzantine", "5")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ")


def test_robust_alone_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert (code, err) == (0, "")
    assert "advise" in out
