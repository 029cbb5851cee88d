"""Benchmarks: the same work on every engine, goals judged as said, and the shape that `--quick --json` promises."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import aggregators as timing
from benchmarks.harness import arguments, emit, goal, in_turns, ratio
from benchmarks.probes import patience, probed
from benchmarks.rival_aggregators import BYZFL, FUNCTIONS, STRATEGIES, Rival, Rows, rivals
from benchmarks.simulation import flower_row, row
from benchmarks.trivial import SIZE, bare_rounds, examples_of
from fedge.strategies import aggregators

SIMULATION = {
    "overhead over a bare loop, worst of the fleets",
    "times faster than pfl, worst of the fleets",
    "times faster than Flower at 100 clients",
    "TorchTrainer over a bare PyTorch loop, worst of the models",
}
COORDINATOR = {
    "median round, 10 clients, 1 MiB (ms)",
    "updates in over a bare gRPC stream",
    "peak of its own memory beyond a coordinator without a model (models)",
}
AGGREGATORS = {
    "after the last arrival over the mean, worst Gram rule",
    "end to end over Gram and weighted sum, worst Gram rule",
    "end to end over a sort of the rows, worst coordinate rule",
    "times faster than byzfl and Flower, worst coordinate rule",
    "times faster than the published Flag Aggregator",
}


@pytest.mark.parametrize(
    ("value", "wanted", "holds"),
    [(1.3, "<= 1.3", True), (1.31, "<= 1.3", False), (20, ">= 20", True), (1.0, "> 1", False), (None, "<= 9", False)],
)
def test_a_goal_holds_as_its_words_say(value, wanted, holds):
    assert goal("speed", value, wanted).holds is holds


def test_things_to_compare_are_timed_in_turns():
    calls = []
    taken = in_turns({"one": lambda: calls.append(1), "two": lambda: calls.append(2)}, 3)
    assert calls == [1, 2, 2, 1, 1, 2]
    assert {name: len(seconds) for name, seconds in taken.items()} == {"one": 3, "two": 3}


def test_what_comes_before_a_turn_is_called_with_its_name_and_not_timed(monkeypatch):
    calls, clock = [], SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("benchmarks.harness.time", clock)

    def before(name):
        calls.append(name)
        clock.now += 1.0

    work = {"one": lambda: calls.append("work"), "two": lambda: calls.append("work")}
    taken = in_turns(work, 2, before)
    assert calls == ["one", "work", "two", "work", "two", "work", "one", "work"]
    assert (taken, clock.now) == ({"one": [0.0, 0.0], "two": [0.0, 0.0]}, 4.0)


def test_a_ratio_is_the_median_over_pairs():
    assert ratio([1.0, 30.0, 9.0], [1.0, 10.0, 2.0]) == 3.0


def test_a_rival_that_is_not_installed_is_said_to_be_missing(monkeypatch):
    monkeypatch.setattr("benchmarks.simulation.installed", lambda _: "missing")
    assert flower_row(100, 2, 0.01)["note"] == "missing"
    assert row("pfl", 100, None, None)["note"] == "missing"


def test_the_table_names_what_was_missed(capsys):
    emit("demo", [{"what": "speed", "value": 3}], [goal("speed", 3, "<= 2")], as_json=False)
    shown = capsys.readouterr().out
    assert "MISSED speed: 3 (goal <= 2)" in shown
    assert "demo" in shown


def test_the_command_line_has_two_options():
    options = arguments("demo", ["--json", "--quick"])
    assert (options.json, options.quick) == (True, True)
    assert arguments("demo", ["--only", "A,B"], only="setups").only == "A,B"


def test_every_engine_does_the_same_work():
    from benchmarks.simulation import fedge_rounds

    floor = bare_rounds(4, 3)
    assert floor.shape == (SIZE,)
    assert [examples_of(client) for client in (0, 6, 7)] == [1, 7, 1]
    np.testing.assert_allclose(fedge_rounds(4, 3), floor, rtol=1e-6)
    np.testing.assert_allclose(floor, (1 - 1e-3) ** 3, rtol=1e-6)
    if importlib.util.find_spec("pfl"):
        program = "from benchmarks.pfl_rounds import rounds; print(repr(float(rounds(4, 3).mean())))"
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert float(found.stdout) == pytest.approx((1 - 1e-3) ** 3, rel=1e-6)


# ---- aggregators -------------------------------------------------------------------------------


def broad(count, size, byzantine):
    """Rows that take no memory, for what is decided by their number and length."""
    return Rows(np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (count, size), (0, 0)), byzantine)


def test_every_rule_is_timed():
    assert aggregators.AGGREGATORS.entries.keys() <= timing.CASES.keys()
    for case in timing.CASES:
        assert timing.Fedge(case, timing.SMALL.rows()).family in ("gram", "sort", "both", "")


@pytest.mark.parametrize("case", sorted({*BYZFL, *FUNCTIONS, *STRATEGIES, "flag"}))
def test_what_is_compared_agrees_unless_it_is_said_to_differ(case):
    found = timing.agreement(case)
    for rival in rivals(case, timing.SMALL.rows()):
        assert rival.why_not or rival.differs or found[rival.library] == "yes"


def test_a_difference_that_nothing_explains_stops_the_benchmark(monkeypatch):
    monkeypatch.setattr(timing, "rivals", lambda case, rows: [Rival("other", lambda: lambda: 2 * rows.table[0])])
    with pytest.raises(SystemExit, match="other and fedge disagree about 'krum'"):
        timing.agreement("krum")


@pytest.mark.parametrize("case", ["multi-krum", "trimmed-mean", "gas", "mean", "local-clipping"])
def test_a_state_is_used_up_in_copies_only(case):
    own = timing.Fedge(case, timing.SMALL.rows())
    arrived, seconds = timing.arrivals(own)
    first, second = (own.finished(timing.copied(arrived)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, own.at_once(), rtol=1e-4, atol=1e-5)
    assert seconds > 0


def test_what_cannot_be_run_is_listed_with_the_reason(monkeypatch):
    assert {rival.why_not for rival in rivals("mda", broad(100, 10, 20))} == {"5.4e+20 subsets"}
    assert next(rivals("flag", broad(2, 10**7, 0))).why_not == "5 times what one step takes"
    assert "some minutes" in next(iter(rivals("bulyan", broad(100, 10**6, 20)))).why_not
    monkeypatch.setattr("benchmarks.rival_aggregators.free_gib", lambda: 20.0)
    found = {rival.why_not for rival in rivals("nnm, multi-krum", broad(100, 10**6, 20))}
    assert found == {"needs 30.2 GiB beside the rows, 20.0 are free"}
    assert not any(rival.why_not for rival in rivals("nnm, multi-krum", broad(20, 10**6, 4)))


def test_libraries_that_are_not_installed_are_said_to_be_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {rival.library: rival.why_not for rival in rivals("median", timing.SMALL.rows())}
    assert found == dict.fromkeys(["byzfl, torch", "byzfl, numpy", "flwr, functions", "flwr, strategies"], "missing")


def test_a_rule_that_refuses_the_rows_is_listed_with_what_it_says():
    rows = broad(41, 2, 20)
    setup = timing.Setup("demo", 41, 2, 20, 1)
    ((line, ratios),) = timing.compared(setup, "mda", rows, {})
    assert (line["library"], line["ms"], ratios) == ("fedge", None, {})
    assert "2^f subsets" in line["note"]


def test_goals_are_about_the_worst():
    ratios = [
        {"case": "krum", "family": "gram", "last": 1.1, "whole": 1.0},
        {"case": "flag", "family": "gram", "last": 1.4, "whole": 1.1},
        {"case": "flag", "family": "gram", "faster": 150.0},
        {"case": "median", "family": "sort", "last": 9.0, "whole": 1.6},
        {"case": "median", "family": "sort", "faster": 3.0},
        {"case": "bulyan", "family": "both", "last": 9.0, "whole": 7.0},
        {"case": "gas", "family": "", "last": 9.0, "whole": None},
    ]
    found = [(one.value, one.holds) for one in timing.goals(ratios)]
    assert found == [(1.4, False), (1.1, True), (1.6, False), (3.0, False), (150.0, True)]


def test_the_memory_of_a_run_is_what_it_takes_beside_what_is_there():
    held = np.ones(16 << 20, np.float32)
    _, peak = probed(lambda: lambda: (held + held, held - held))
    assert 125 < peak < 140, "two arrays of 64 MiB"


def test_what_does_not_end_is_stopped():
    with pytest.raises(TimeoutError), patience(0.05):
        sum(number for number in range(10**10))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "goals"), [("simulation", SIMULATION), ("coordinator", COORDINATOR), ("aggregators", AGGREGATORS)]
)
def test_a_quick_run_prints_one_object_of_the_contract(name, goals):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["benchmark"] == name
    assert {"processor", "cores", "memory_gib"} <= result["machine"].keys()
    assert {"python", "fedge", "numpy"} <= result["versions"].keys()
    assert result["rows"]
    assert {one["name"] for one in result["goals"]} == goals
    for one in result["goals"]:
        assert one.keys() == {"name", "value", "goal", "holds"}
        assert isinstance(one["holds"], bool)
